"""Connections to Redis and Valkey: URLs, pools, cluster, Sentinel, errors."""
