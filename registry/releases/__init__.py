"""Signed releases with The Update Framework (TUF).

`client` verifies, for the runtime, the server and imports alike; `signing` and `publish` make releases, `upload` takes
them in on a server, `push` sends them there, `commands` is the command line. Only `document` is free of tuf.
"""
