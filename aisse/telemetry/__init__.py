"""What operators see of a process that runs: its log, and how fast it goes.

It imports nothing else of aisse. Whoever counts is given the counting part by its constructor. Only the log belongs to
the whole process. Begin with `log`.
"""
