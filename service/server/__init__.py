"""The HTTP server process: sockets, connection limits, event loop, memory allocator."""
