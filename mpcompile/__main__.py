"""``python -m mpcompile``."""

import sys

from mpcompile.cli import main

if __name__ == "__main__":
    sys.exit(main())
