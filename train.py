"""Adapt a frozen ViT to face recognition; the same as `vitface train`."""

import sys

from vitface.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
