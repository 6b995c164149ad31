"""Plain values without I/O: tenants, memories, records, quotas."""
