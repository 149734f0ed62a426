"""What can be typed: `aisse serve` and the other commands.

The only room with arguments, environment, signals and exit codes. It may import everything; nothing imports it but
`aisse.__main__`. Begin with `cli.main`.
"""
