"""What can be typed: `aisse serve` and the other commands, one module each.

This is the only room with arguments, environment variables, signals and exit codes. It may import everything. Only
`aisse.__main__` imports it. Begin with `cli`, which reads the arguments and runs one command.

A command's module has `add`, which describes the command to the parser, and is named in `cli.COMMANDS`. What
commands share is in `sources` (the settings from file, environment and flags), `flags` (the arguments), `output` (what
a command prints) and `loop` (the event loop and signals).
"""
