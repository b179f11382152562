"""RecordIO sets as their writers leave them and as disks and editors change them."""

import os
import struct

import pytest
from cases import case
from PIL import Image

from vitface.__main__ import main
from vitface.data.formats import record_set
from vitface.data.formats.samples import load_samples
from vitface.data.images import encode_image
from vitface.errors import DataError

KIND = "RecordIO"


def jpeg(value):
    return encode_image(Image.new("RGB", (112, 112), (value,) * 3), "JPEG")


def payload(label, image=b"", number=0):
    """mxnet.recordio.pack: labels in a list go behind the header, whose own label is then 0."""
    labels = label if isinstance(label, list) else []
    header = struct.pack("<IfQQ", len(labels), 0 if labels else label, number, 0)
    return header + struct.pack(f"<{len(labels)}f", *labels) + image


def write(folder, payloads, keys=None, property_text=None):
    """What MXIndexedRecordIO writes: a .rec, and the key and the offset of each record in a .idx."""
    folder.mkdir()
    lines = []
    with open(folder / "train.rec", "wb") as rec:
        for key, data in zip(keys or range(len(payloads)), payloads, strict=True):
            lines.append(f"{key}\t{rec.tell()}\n")
            rec.write(struct.pack("<II", 0xCED7230A, len(data)) + data + bytes(-len(data) % 4))
    (folder / "train.idx").write_text("".join(lines))
    if property_text is not None:
        (folder / "property").write_bytes(property_text)
    return folder


def images(labels, first=0):
    return [payload(label, jpeg(10 * i), first + i) for i, label in enumerate(labels)]


def headed(labels):
    """InsightFace's face2rec2: record 0 counts, the images, and a range per person without image bytes."""
    n, people = len(labels), len(set(labels))
    ranges = [payload([1.0, 2.0], number=n + 1 + i) for i in range(people)]
    return [payload([n + 1.0, n + 1.0 + people]), *images(labels, 1), *ranges]


def facts(folder):
    """Each image's label and grey value, and the people's names."""
    samples = load_samples(folder)
    values = [int(samples.read(i)[0, 0, 0]) for i in range(len(samples))]
    return samples.labels.tolist(), values, samples.names


LABELS = [0, 0, 1, 1, 2]
EXPECTED = (LABELS, [0, 10, 20, 30, 40], ["0", "1", "2"])


@case("`property` of two lines, keys from 0 and no header record, as InsightFace's RecBuilder writes", "read")
def test_recbuilder(tmp_path):
    folder = write(tmp_path / "set", images(LABELS), property_text=b"3,112,112\n5\n")
    assert facts(folder) == EXPECTED and not load_samples(folder).notes


@case("RecBuilder's `property` counts more records than there are", "read; both numbers are named")
def test_recbuilder_that_lost_records(tmp_path):
    folder = write(tmp_path / "set", images(LABELS), property_text=b"3,112,112\n9\n")
    assert load_samples(folder).notes == [f"{folder / 'property'} says 9 images, there are 5"]


@case("no `property`, no header record, shuffled ids (`im2rec`, arcface_torch)", "people are counted, and it is said")
def test_im2rec(tmp_path):
    order = [3, 0, 4, 2, 1]  # im2rec shuffles its list, whose first column is key and id
    payloads = [payload(LABELS[i], jpeg(10 * i), i) for i in order]
    folder = write(tmp_path / "set", payloads, order)
    assert facts(folder) == EXPECTED
    assert load_samples(folder).notes == [f"{folder}: no file `property`; 3 people were counted from the labels"]


@case("im2rec `--pack-label`: labels behind the header, record 0 an image with two labels", "read")
def test_packed_labels(tmp_path):
    folder = write(tmp_path / "set", [payload([float(x), 7.0], jpeg(10 * i)) for i, x in enumerate(LABELS)])
    assert facts(folder) == EXPECTED


@case("a header record and ranges, but no `property`", "read; people are counted")
def test_header_without_property(tmp_path):
    assert facts(write(tmp_path / "set", headed(LABELS))) == EXPECTED


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(b"\xef\xbb\xbf3,112,112\n", marks=case("a byte order mark in `property`", "read")),
        pytest.param(b"3,112,112\r\n\r\n", marks=case("`property` with Windows line ends and a blank line", "read")),
        pytest.param(b" 3, 112, 112", marks=case("`property` with spaces, without a line end", "read")),
    ],
)
def test_property_as_editors_leave_it(tmp_path, text):
    folder = write(tmp_path / "set", images(LABELS), property_text=text)
    assert facts(folder) == EXPECTED and not load_samples(folder).notes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param(
            b"2,112,112",
            "says 2 people, but there are 3",
            marks=case("`property` of a smaller set", "error: both numbers"),
        ),
        pytest.param(
            "3,112,112".encode("utf-16"),
            "is not `num_classes",
            marks=case("`property` in UTF-16 (PowerShell)", "error"),
        ),
    ],
)
def test_a_wrong_property_can_be_deleted(tmp_path, text, message):
    folder = write(tmp_path / "set", images(LABELS), property_text=text)
    with pytest.raises(DataError, match=f"property.*{message}.*delete it: people are then counted from the labels"):
        load_samples(folder)
    (folder / "property").unlink()
    assert facts(folder) == EXPECTED


@pytest.mark.parametrize(
    ("labels", "text", "note"),
    [
        pytest.param(
            [0, 0, 2, 2, 4],
            b"5,112,112",
            "property says 5 people, 3 of them have images; labels go up to 4, those without an image are skipped",
            marks=case("labels with holes (people removed)", "people are numbered anew, and it is said"),
        ),
        pytest.param(
            [1, 1, 2, 2, 3],
            b"3,112,112",
            "3 people; labels go up to 3, those without an image are skipped",
            marks=case("labels that begin at 1", "people are numbered anew, and it is said"),
        ),
        pytest.param(
            LABELS,
            b"9,112,112",
            "property says 9 people, 3 of them have images",
            marks=case("`property` of a larger set", "read; both numbers are named"),
        ),
    ],
)
def test_holes_are_closed_and_said(tmp_path, labels, text, note):
    folder = write(tmp_path / "set", images(labels), property_text=text)
    names = [str(label) for label in sorted(set(labels))]
    assert facts(folder) == (*EXPECTED[:2], names)
    (said,) = load_samples(folder).notes
    assert said.endswith(note)


def edited(folder, edit):
    path = folder / "train.idx"
    path.write_bytes(edit(path.read_bytes()))
    return folder


@pytest.mark.parametrize(
    "edit",
    [
        pytest.param(lambda b: b"\xef\xbb\xbf" + b, marks=case("a byte order mark in `train.idx`", "read")),
        pytest.param(lambda b: b + b"\n\n", marks=case("blank last lines in `train.idx`", "read")),
        pytest.param(lambda b: b"\n" + b.replace(b"\n", b"\n \n"), marks=case("blank lines everywhere", "read")),
        pytest.param(lambda b: b.replace(b"\n", b"\r\n"), marks=case("Windows line ends in `train.idx`", "read")),
        pytest.param(lambda b: b.replace(b"\t", b"  "), marks=case("spaces for tabs in `train.idx`", "read")),
        pytest.param(bytes.rstrip, marks=case("no line end at the end of `train.idx`", "read")),
    ],
)
def test_index_as_editors_leave_it(tmp_path, edit):
    assert facts(edited(write(tmp_path / "set", images(LABELS)), edit)) == EXPECTED


@case("keys from 1, no record 0", "read")
def test_keys_from_one(tmp_path):
    assert facts(write(tmp_path / "set", images(LABELS), [1, 2, 3, 4, 5])) == EXPECTED


CUTS = {
    "after a line": lambda b: b"".join(b.splitlines(True)[:3]),
    "inside a line": lambda b: b"".join(b.splitlines(True)[:3]) + b"3\t1",
    "before its first line": lambda b: b.split(b"\n", 1)[1],
    "in UTF-16": lambda b: b.decode().encode("utf-16"),
    "of floats": lambda b: b.replace(b"\t", b".0\t"),
    "empty": lambda b: b"",
}


@pytest.mark.parametrize("payloads", [images, headed])
@pytest.mark.parametrize(
    "edit",
    [
        pytest.param(
            "after a line", marks=case("`train.idx` cut after a line", "error: `vitface data index` restores it")
        ),
        pytest.param("inside a line", marks=case("`train.idx` cut inside a line", "the same")),
        pytest.param("before its first line", marks=case("`train.idx` without its first line", "the same")),
        pytest.param("in UTF-16", marks=case("`train.idx` saved as UTF-16", "the same")),
        pytest.param("of floats", marks=case("`train.idx` with keys like `1.0`", "the same")),
        pytest.param("empty", marks=case("an empty `train.idx`", "the same")),
    ],
)
def test_a_damaged_index_is_rebuilt(tmp_path, capsys, payloads, edit):
    folder = write(tmp_path / "set", payloads(LABELS))
    whole = (folder / "train.idx").read_bytes()
    edited(folder, CUTS[edit])
    with pytest.raises(DataError, match=f"(?s).*vitface data index {folder}"):
        load_samples(folder)
    assert main(["data", "index", str(folder)]) == 0
    assert "records; the old one was damaged or not whole" in capsys.readouterr().out
    assert (folder / "train.idx").read_bytes() == whole and facts(folder) == EXPECTED


@case("no `train.idx` at all", "error that names `vitface data index SET`, which makes it")
def test_no_index(tmp_path, capsys):
    order = [3, 0, 4, 2, 1]
    folder = write(tmp_path / "set", [payload(LABELS[i], jpeg(10 * i), i) for i in order], order)
    (folder / "train.idx").unlink()
    with pytest.raises(DataError, match=f"no train.idx.*: vitface data index {folder}"):
        load_samples(folder)
    assert main(["data", "index", str(folder / "train.rec")]) == 0
    assert "train.idx: 5 records; there was none" in capsys.readouterr().out
    assert facts(folder) == EXPECTED  # in the order of the ids


@case("`vitface data index` of a set that is whole", "nothing is written")
def test_a_whole_index_stays(tmp_path, capsys):
    folder = write(tmp_path / "set", images(LABELS), [2, 4, 6, 8, 10])
    before = (folder / "train.idx").stat().st_mtime_ns
    assert main(["data", "index", str(folder)]) == 0
    assert "lists all of train.rec, 5 records, and was left as it is" in capsys.readouterr().out
    assert (folder / "train.idx").stat().st_mtime_ns == before


@case("`train.idx` without a line in the middle, no header record", "read; the share left out is said")
def test_a_hole_in_the_index(tmp_path):
    folder = edited(
        write(tmp_path / "set", images(LABELS)), lambda b: b"".join(b.splitlines(True)[i] for i in (0, 1, 3, 4))
    )
    assert facts(folder) == ([0, 0, 1, 2], [0, 10, 30, 40], ["0", "1", "2"])
    assert "leaves out 20.0% of train.rec" in load_samples(folder).notes[-1]
    assert main(["data", "index", str(folder)]) == 0
    assert facts(folder) == EXPECTED


@case("`train.idx` without a line in the middle, with a header record", "error: `vitface data index` restores it")
def test_a_hole_that_the_header_shows(tmp_path):
    folder = write(tmp_path / "set", headed(LABELS))
    edited(folder, lambda b: b"".join(line for line in b.splitlines(True) if not line.startswith(b"3\t")))
    with pytest.raises(DataError, match="record 0 claims 5 images, the .idx lists 4 of them; rebuild the .idx"):
        load_samples(folder)


@case("`train.rec` cut inside a record (a download that broke off)", "error, for `vitface data index`, too")
def test_a_cut_rec(tmp_path, capsys):
    folder = write(tmp_path / "set", headed(LABELS))
    data = (folder / "train.rec").read_bytes()
    (folder / "train.rec").write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match="truncated"):
        load_samples(folder)
    assert main(["data", "index", str(folder)]) == 2
    assert "truncated; get the file again, or, to keep the" in capsys.readouterr().err


@case("`train.rec` whose writer was killed: the last record is cut, or zeros follow", "the command that cuts it there")
@pytest.mark.parametrize("tail", [struct.pack("<II", 0xCED7230A, 99) + b"half", bytes(4096)])
def test_a_killed_writer(tmp_path, capsys, tail):
    folder = write(tmp_path / "set", images(LABELS))
    size = (folder / "train.rec").stat().st_size
    with open(folder / "train.rec", "ab") as rec:
        rec.write(tail)
    with pytest.raises(DataError, match=f"the .idx is not whole, its records end at byte {size} of"):
        load_samples(folder)
    assert main(["data", "index", str(folder)]) == 2
    assert f"to keep the 5 records before it: truncate -s {size} {folder}/train.rec" in capsys.readouterr().err
    os.truncate(folder / "train.rec", size)
    assert facts(folder) == EXPECTED


@case("`train.rec` cut between two records, `train.idx` made for it", "error: record 0 counts more images")
def test_a_rec_cut_between_records(tmp_path):
    folder = write(tmp_path / "set", headed(LABELS))
    line = (folder / "train.idx").read_text().splitlines()[4]
    (folder / "train.rec").write_bytes((folder / "train.rec").read_bytes()[: int(line.split()[1])])
    assert main(["data", "index", str(folder)]) == 0
    with pytest.raises(DataError, match=r"claims 5 images, the .idx lists 3 of them.*get the .rec again"):
        load_samples(folder)


@case("records without image bytes among the images", "left out, and said")
def test_empty_records(tmp_path):
    payloads = images(LABELS)
    folder = write(tmp_path / "set", [*payloads[:2], payload(7), *payloads[2:]], property_text=b"3,112,112")
    assert facts(folder) == EXPECTED
    assert load_samples(folder).notes == [f"{folder / 'train.rec'}: 1 records have no image and are left out"]


@case("files called `casia.rec` and `casia.idx`", "error that says how they have to be called")
def test_other_names(tmp_path):
    folder = write(tmp_path / "set", images(LABELS))
    for name in ("rec", "idx"):
        (folder / f"train.{name}").rename(folder / f"casia.{name}")
    with pytest.raises(DataError, match=r"a set's files are called train\.rec and train\.idx: mv .*casia\.rec "):
        load_samples(folder)


@case("a set without `property` is packed, or checked", "what was counted is said")
def test_commands_say_what_was_counted(tmp_path, capsys):
    folder = write(tmp_path / "set", images(LABELS))
    assert main(["data", "pack", str(folder), str(tmp_path / "packed")]) == 0
    assert "3 people were counted from the labels" in capsys.readouterr().out
    main(["data", "check", str(folder)])
    assert "note: " + load_samples(folder).notes[0] in capsys.readouterr().out


@case("`train.idx` without the people's ranges at its end, a header record", "read: all images are listed")
def test_an_index_without_ranges(tmp_path):
    folder = write(tmp_path / "set", headed(LABELS))
    edited(folder, lambda b: b"".join(b.splitlines(True)[:6]))
    assert facts(folder) == EXPECTED and len(load_samples(folder).notes) == 1


@case(
    "`vitface data index` on a disk that is read-only",
    "error: the commands that link the data to a folder of one's own",
)
def test_a_read_only_disk(tmp_path, capsys, monkeypatch):
    folder = write(tmp_path / "set", images(LABELS))
    (folder / "train.idx").unlink()

    def refuse(*_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(record_set, "replace_file", refuse)
    assert main(["data", "index", str(folder)]) == 2
    said = capsys.readouterr().err
    link = f"mkdir my-set && ln -s {folder}/train.rec my-set/train.rec && vitface data index my-set"
    assert f"Read-only file system; use a folder of your own with a link to the data: {link}" in said
    monkeypatch.undo()
    (tmp_path / "my-set").mkdir()
    (tmp_path / "my-set" / "train.rec").symlink_to(folder / "train.rec")
    assert main(["data", "index", str(tmp_path / "my-set")]) == 0 and facts(tmp_path / "my-set") == EXPECTED
