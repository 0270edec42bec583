"""``python -m pyksm`` and the console script ``pyksm``."""

from __future__ import annotations

import sys

from pyksm.cli import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
