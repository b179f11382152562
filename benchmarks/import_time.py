"""What `import vitface` costs beyond `import torch`.

    python benchmarks/import_time.py [--rounds 15]

Fresh processes import torch, then vitface, and say how long each took; the first round warms the file caches and does
not count. Medians and spread; the last line is JSON, in seconds.
"""

import argparse
import json
import statistics
import subprocess
import sys

from timing import machine

IMPORT = """
import time
start = time.perf_counter()
import torch
between = time.perf_counter()
import vitface
print(between - start, time.perf_counter() - between)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    printed = [subprocess.check_output([sys.executable, "-c", IMPORT], text=True) for _ in range(rounds + 1)]
    took = [tuple(map(float, line.split())) for line in printed[1:]]
    print(machine())
    for name, values in zip(("torch", "vitface, after torch"), zip(*took, strict=True), strict=True):
        print(f"{name:<21} {statistics.median(values):.3f} s ({min(values):.3f} to {max(values):.3f})")
    print(json.dumps({"seconds_beyond_torch": round(statistics.median(own for _, own in took), 4)}))


if __name__ == "__main__":
    main()
