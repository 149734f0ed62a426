"""The process as its operators see it: what it listens on, what a supervisor hears of it, and how it ends.

It may import `streams` and what lies below, but no routes. Begin with `drain`, which is the shutdown in its order.
"""
