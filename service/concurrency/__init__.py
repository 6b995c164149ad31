"""Threads, locks and queues that know nothing of the service."""
