"""A small writer of RecordIO after dmlc-core, and InsightFace's folders made with it."""

import struct

from PIL import Image

from vitface.data.images import encode_image

MAGIC = struct.pack("<I", 0xCED7230A)


def face(value, kind="PNG", size=112):
    return encode_image(Image.new("RGB", (size, size), (value, 2 * value % 256, 7)), kind)


def pack(label, image=b"", extra=()):
    """mxnet.recordio.pack: one float label in the header, or `extra` labels behind it."""
    return struct.pack("<IfQQ", len(extra), label, 1, 0) + struct.pack(f"<{len(extra)}f", *extra) + image


def record(payload):
    """dmlc::RecordIOWriter::WriteRecord: cuts at each aligned magic inside the payload, and pads."""
    out, begin = b"", 0
    for i in range(0, len(payload) // 4 * 4, 4):
        if payload[i : i + 4] == MAGIC:
            part = payload[begin:i]
            out += MAGIC + struct.pack("<I", (1 if begin == 0 else 2) << 29 | len(part)) + part
            begin = i + 4
    part = payload[begin:]
    out += MAGIC + struct.pack("<I", (3 if begin else 0) << 29 | len(part)) + part
    return out + bytes(-len(part) % 4)


def write_rec(folder, payloads, num_classes, keys=None):
    offsets, data = [], b""
    for payload in payloads:
        offsets.append(len(data))
        data += record(payload)
    folder.mkdir(exist_ok=True)
    (folder / "train.rec").write_bytes(data)
    keys = range(len(payloads)) if keys is None else keys
    (folder / "train.idx").write_text("".join(f"{k}\t{o}\n" for k, o in zip(keys, offsets, strict=True)))
    (folder / "property").write_text(f"{num_classes},112,112\n")
    return folder


LABELS = [0.0, 0.0, 1.0, 1.0, 2.0]


def insightface(labels=LABELS, images=None, header=None):
    """A header record, the images, and one range record per identity."""
    images = images or [face(10 * (i + 1)) for i in range(len(labels))]
    n, people = len(labels), len(set(labels))
    header = header or (n + 1, n + 1 + people)
    ranges = [pack(0.0, extra=(1.0, 2.0)) for _ in range(people)]
    return [pack(0.0, extra=header), *(pack(x, image) for x, image in zip(labels, images, strict=True)), *ranges]
