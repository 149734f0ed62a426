"""The process as its operators see it: what it listens on, what a supervisor hears of it, and how it ends.

It may import `streams` and what lies below, and no routes. Begin with `drain`, the shutdown in its order.
"""
