"""The mount program: `python -m unionfuse -o lowerdir=… MOUNTPOINT`."""

from __future__ import annotations

import sys

from unionfuse.daemon.command import main

if __name__ == "__main__":
    sys.exit(main())
