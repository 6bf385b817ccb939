"""Where the KV bytes of past tokens live: host memory, layer by layer and head by head."""
