"""`python -m peftops` is the `peftops` command."""

import sys

from peftops.cli import main

if __name__ == "__main__":
    sys.exit(main())
