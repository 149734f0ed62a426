"""The engine: what is generated here, who reads it, and what other instances generate.

It may import `replay`, `upstream`, `formats`, `telemetry` and what lies below; it knows HTTP only where a reader's
bytes meet a socket. Begin with `stream`; `relay` fills one, `reader` empties it, `registry` owns all, `shared` brings
those of other instances.
"""
