"""Wire formats: what an upstream's events mean. No I/O, no clock and no aiohttp.

It may import `sse`, `settings` and `errors`. One module a format.
"""
