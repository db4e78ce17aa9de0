"""`python -m infinilm`: the same as the command `infinilm`."""

import sys

from infinilm.cli import main

if __name__ == "__main__":
    sys.exit(main())
