"""`python -m flamingo_lite` is the command line of cli.py. By tools/book/sync.py."""

import sys

from flamingo_lite.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command())
