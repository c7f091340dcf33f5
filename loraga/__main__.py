"""`python -m loraga` is the command `loraga`."""

import sys

from loraga.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
