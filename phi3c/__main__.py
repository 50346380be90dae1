"""`python -m phi3c`."""

from __future__ import annotations

import sys

from phi3c.cli import main

if __name__ == "__main__":
    sys.exit(main())
