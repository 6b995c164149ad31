"""Use cases that change a tenant: configuration, shots, reset, snapshots, training, migration."""
