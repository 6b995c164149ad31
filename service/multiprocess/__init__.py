"""HTTP processes and worker processes: supervisor, IPC and the two kinds of child process."""
