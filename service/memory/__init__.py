"""Hot memories: the cache over the store, class statistics, text features, pending writes."""
