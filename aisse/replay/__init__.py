"""The logs from which streams are read again: in memory, and shared by many instances in Redis or Valkey.

It may import `sse` and `errors`, and knows no requests. Begin with `memory`; then `mirror`, which takes streams to
Redis, and `tailer`, which brings those of others. README.md has the map.
"""
