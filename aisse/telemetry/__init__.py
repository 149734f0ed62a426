"""What operators see of a process that runs: its log, and how fast it goes.

It imports nothing of aisse's. Whoever counts or logs is given the part by its constructor; the log alone is the
process's.
"""
