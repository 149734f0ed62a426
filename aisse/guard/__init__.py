"""Who may ask what.

It may import `settings` and `errors`. Begin with `access`. It is asked before a question's body is read.
"""
