"""`python -m loraga.kernels.dev`: see command.py."""

from loraga.kernels.dev.command import main

if __name__ == "__main__":
    raise SystemExit(main())
