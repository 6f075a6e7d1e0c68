"""`kv_append`: new keys and values into a cache."""
