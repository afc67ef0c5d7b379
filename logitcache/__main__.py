"""python -m logitcache."""

import sys

from logitcache.cli import main

if __name__ == "__main__":
    sys.exit(main())
