"""What a machine needs besides the package: the systemd units, as they are shipped and as one machine needs them.

It may import `settings` and `errors`. Begin with `units`.
"""
