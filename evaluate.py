"""Evaluate a face model on the face-verification benchmarks; the same as `vitface evaluate`."""

import sys

from vitface.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
