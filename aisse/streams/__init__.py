"""The engine: what is generated here, who reads it, and what other instances generate.

It may import `replay`, `upstream`, `formats`, `telemetry` and what lies below; it knows HTTP only where a reader's
bytes meet a socket. Begin with `stream`. `relay` fills one, within its upstream's `deadlines`; `reader` empties it into
an `outlet`, the socket of a `response`. `leave` knows when a stream ends that nobody reads, `endings` how each end is
said. `registry` owns all: the `table` of streams and keys, the `sweep` that looks at them once a second, the `figures`
for operators. `shared` is the log that instances have in common: `elsewhere` is what others say of streams that run
here, `followed` are streams of others, `claims` are keys on all instances.
"""
