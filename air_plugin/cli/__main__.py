"""`python -m air_plugin.cli`: the same as `air`."""

import sys

from air_plugin.cli import main

if __name__ == "__main__":
    sys.exit(main())
