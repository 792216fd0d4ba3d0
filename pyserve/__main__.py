"""`python -m pyserve`."""

import sys

from pyserve.cli import main

if __name__ == "__main__":
    sys.exit(main())
