"""`python -m trainer`, the same as `trainer`; the form that `trainer compare` starts."""

import sys

from trainer.cli import main

if __name__ == "__main__":
    sys.exit(main())
