"""Wire formats: what an upstream may be asked, and what its events and errors mean. No HTTP library and no sockets.

It may import `sse`, `settings` and `errors`. Begin with `format`, which is the contract; `anthropic` keeps it. A new
format is a module beside that one, and a line in `known`. `document` and `errors` are what formats have in common.
"""
