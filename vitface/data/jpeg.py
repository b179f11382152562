"""A JPEG's structure, looked at before it is decoded.

A decoder's work grows with the number of scans, each of which goes over the whole image, and with that of segments,
some of which are joined. A file of 300 kB can ask for a minute of it, where no camera's has more than a few dozen.
"""

import re
from collections import Counter

from vitface.errors import ImageError

MAX_SCANS, MAX_SEGMENTS, MAX_APP1 = 100, 300, 100  # segments of one kind: a colour profile may have 255 parts
START, SCAN, END, APP1 = 0xD8, 0xDA, 0xD9, 0xE1
_AFTER_PIXELS = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # the next marker: in coded pixels, others follow 0xff
_AFTER_PADDING = re.compile(rb"[^\xff]")
_ALONE = {0x01, START, *range(0xD0, 0xD8)}  # markers without a segment


def check_jpeg(data: bytes) -> None:
    """ImageError for a JPEG file that has more scans or segments than a photo; faults are left to the decoder."""
    at, kinds = 2, Counter[int]()
    while at + 3 < len(data) and data[at] == 0xFF and data[at + 1] != END:
        marker = data[at + 1]
        if marker == 0xFF:
            found = _AFTER_PADDING.search(data, at)
            at = found.start() - 1 if found else len(data)
            continue
        if marker in _ALONE:
            at += 2
            continue
        kinds[marker] += 1
        limit = {SCAN: MAX_SCANS, APP1: MAX_APP1}.get(marker, MAX_SEGMENTS)
        if kinds[marker] > limit:
            raise ImageError(f"more than {limit} {'scans' if marker == SCAN else 'segments'}, as no photo has")
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == SCAN:
            found = _AFTER_PIXELS.search(data, at)
            at = found.start() if found else len(data)
