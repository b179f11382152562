"""Adapt a frozen ViT to face recognition; the same as `vitface train`."""

import sys

from vitface.commands.train import main

if __name__ == "__main__":
    sys.exit(main())
