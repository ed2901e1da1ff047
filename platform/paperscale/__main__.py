"""``python -m paperscale`` is the same program as ``paperscale``."""

import sys

from paperscale.cli import main

if __name__ == "__main__":
    sys.exit(main())
