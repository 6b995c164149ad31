"""The store on Redis and Valkey: commands, keys, formats and Lua scripts."""
