"""Background work: jobs, reindexing, the queue of the shadow memory."""
