"""`python -m runtime`: the commands of `runtime.cli.commands`."""

import sys

from runtime.cli.commands import program

if __name__ == "__main__":
    sys.exit(program())
