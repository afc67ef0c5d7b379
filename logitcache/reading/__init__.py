"""How a cache is read: LogitCache, its shards, its order."""
