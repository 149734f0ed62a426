"""HTTP and nothing else: what a request asks for, and what it is answered with.

It may import `guard`, `streams` and what lies below. Begin with `chat`; the other modules are small.
"""
