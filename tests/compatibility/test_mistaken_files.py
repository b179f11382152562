"""Files that are something else than their names or places say."""

import pickle
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from cases import case
from PIL import Image

from vitface.__main__ import main
from vitface.data.faces.build import _find
from vitface.data.folders import list_folder
from vitface.data.formats.pairs import read_bin, write_bin
from vitface.data.formats.samples import load_samples, read_domains
from vitface.data.images import encode_image, read_image, to_array
from vitface.data.tables import read_table
from vitface.errors import CheckpointError, DataError, ImageError, WeightsError
from vitface.store.backbone import read_backbone
from vitface.store.faces import open_checkpoint
from vitface.weights.conversion import convert_backbone

KIND = "Mistaken files"
JPEG = encode_image(np.full((112, 112, 3), 90, np.uint8), "JPEG")


@pytest.mark.parametrize(
    ("name", "data", "what"),
    [
        pytest.param("a.jpg", JPEG, "one JPEG image", marks=case("`--weights` of a JPEG", "error: what it is")),
        pytest.param("a.csv", b"image,domain\n", "a text file", marks=case("`--weights` of a CSV", "the same")),
        pytest.param("a.pth", b"<html>", "a web page", marks=case("`--weights` of a web page", "the same")),
        pytest.param(
            "lfw.bin",
            pickle.dumps(([], [])),
            "a pickle, as a .bin of pairs is",
            marks=case("`vitface info lfw.bin`", "the same; not to convert it"),
        ),
        pytest.param("a.parquet", b"PAR1\0", "a Parquet file", marks=case("`vitface info a.parquet`", "the same")),
        pytest.param("index.faiss", b"IxFI\0", "an index of FAISS", marks=case("`info index.faiss`", "the same")),
        pytest.param("f.onnx", b"\x08\x08\x12\x07pytorch", "an ONNX file", marks=case("`info face.onnx`", "the same")),
        pytest.param("a", None, "a folder", marks=case("`--weights` of a folder", "the same")),
    ],
)
def test_no_weights(tmp_path, name, data, what):
    path = tmp_path / name
    path.mkdir() if data is None else path.write_bytes(data)
    with pytest.raises(WeightsError, match=f"{name} holds no weights but is {what}; "):
        read_backbone(path)
    if data:
        with pytest.raises(CheckpointError, match=f"{name} is {what}, neither a run"):
            open_checkpoint(path)


@pytest.mark.parametrize(
    ("name", "data", "what"),
    [
        pytest.param(
            "LVFace-B_Glint360K.onnx", b"\x08\x08\x12\x07pytorch", r"an ONNX file; take the .pt.* of the same weights",
            marks=case("`convert lvface_b --src LVFace-B_Glint360K.onnx`", "error: the file to take instead"),
        ),
        pytest.param("a.pt", b"<html>", "a web page; ", marks=case("`convert --src` of a web page", "the same")),
        pytest.param("a.pt", b"version https://git-lfs", "a pointer of Git LFS; run git lfs pull"),
    ],
)  # fmt: skip
def test_no_source_of_weights(tmp_path, name, data, what):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(WeightsError, match=f"{name} holds no tensors by name but is {what}"):
        convert_backbone("lvface_b", tmp_path / name, tmp_path / "out.safetensors")


@pytest.mark.parametrize(
    ("data", "what"),
    [
        pytest.param(
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            "no image but a pointer of Git LFS: run git lfs pull",
            marks=case("a Git LFS pointer named `1.jpg`", "named as that, with the command"),
        ),
        pytest.param(
            b"<!DOCTYPE html><html>",
            "no image but a web page: the download failed",
            marks=case("a web page named `1.jpg`", "named as that"),
        ),
        pytest.param(b"%PDF-1.7", "no image but a PDF document$", marks=case("a PDF named `1.jpg`", "named as that")),
    ],
)
def test_no_image(tmp_path, data, what):
    (tmp_path / "1.jpg").write_bytes(data)
    with pytest.raises(ImageError, match=rf"1\.jpg: {what}"):
        read_image(tmp_path / "1.jpg")


@case("films, archives, `.hdr` and `.pdf` among photos", "named in one line each; films do no harm")
def test_others_among_photos(tmp_path):
    for name in ("a.jpg", "b.MOV", "c.mp4", "d.zip", "e.tar.gz", "f.hdr", "g.pdf", "notes.txt"):
        (tmp_path / name).write_bytes(JPEG)
    found = list_folder(tmp_path)
    assert found.images == ["a.jpg"]
    assert {reason.partition(";")[0]: names for reason, names in found.left_out.items()} == {
        "a film": ["b.MOV", "c.mp4"],
        "an archive": ["d.zip", "e.tar.gz"],
        ".hdr is not read": ["f.hdr"],
        ".pdf is not read": ["g.pdf"],
    }


def saved(path, image, **options):
    image.save(path, **options)
    return read_image(path)


@case("a floating-point TIFF", "error: it has no range")
def test_float_tiff(tmp_path):
    with pytest.raises(ImageError, match="floating-point numbers of an unknown range"):
        saved(tmp_path / "a.tif", Image.fromarray(np.ones((20, 20), np.float32)))


@case("16-bit grey PNG and TIFF", "the high bytes")
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits(tmp_path, suffix):
    assert (saved(tmp_path / f"a.{suffix}", Image.fromarray(np.full((20, 20), 0x8C33, np.uint16))) == 0x8C).all()


@case("8 bits in a 16-bit grey PNG or a 32-bit TIFF", "as 8 bits")
@pytest.mark.parametrize(("suffix", "dtype"), [("png", np.uint16), ("tif", np.uint16), ("tif", np.int32)])
def test_eight_bits_with_room_for_more(tmp_path, suffix, dtype):
    """Shifted by 8 bits they would all be black, and all people the same."""
    grey = np.arange(400).reshape(20, 20) % 256
    found = saved(tmp_path / f"a.{suffix}", Image.fromarray(grey.astype(dtype)))
    assert np.array_equal(found, np.repeat(grey[..., None], 3, axis=2))
    in_memory = Image.fromarray(grey.astype(np.uint8)).convert("I")
    assert np.array_equal(to_array(in_memory), found)


@case("12 bits of a camera in a 16-bit PNG, and grey values that 16 bits do not hold", "error: which values it has")
@pytest.mark.parametrize("values", [(0, 4095), (300, 16383), (-1, 200), (0, 65536)])
def test_other_ranges(tmp_path, values):
    grey = np.linspace(*values, 400).round().astype(np.int32).reshape(20, 20)
    with pytest.raises(ImageError, match=f"its grey values are {values[0]} to {values[1]:,}, .*save it with 8 bits"):
        saved(tmp_path / "a.tif", Image.fromarray(grey))


@case("a CMYK JPEG", "its colour")
def test_cmyk(tmp_path):
    found = saved(tmp_path / "a.jpg", Image.new("CMYK", (20, 20), (0, 255, 255, 0)), quality=100)
    assert abs(found[10, 10].astype(int) - [255, 0, 0]).max() < 8


@case("an animated GIF or WebP", "the first picture")
@pytest.mark.parametrize("suffix", ["gif", "webp"])
def test_animations(tmp_path, suffix):
    red, blue = (Image.new("RGB", (20, 20), colour) for colour in ("red", "blue"))
    found = saved(tmp_path / f"a.{suffix}", red, save_all=True, append_images=[blue])
    assert abs(found[10, 10].astype(int) - [255, 0, 0]).max() < 8


@case("a palette with transparency", "the transparent parts are grey")
def test_transparent_palette(tmp_path):
    image = Image.new("P", (20, 20), 1)
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((0, 0), 0)
    found = saved(tmp_path / "a.png", image, transparency=0)
    assert found[0, 0].tolist() == [128] * 3 and found[5, 5].tolist() == [200, 100, 50]


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("image;domain\na.jpg;x\n", marks=case("a CSV with semicolons", "read")),
        pytest.param("Image, Domain\na.jpg,x\n", marks=case("a CSV whose columns are in capitals", "read")),
        pytest.param("image\tdomain\na.jpg\tx\n", marks=case("a table with tabs", "read")),
    ],
)
def test_tables(tmp_path, text):
    (tmp_path / "a.csv").write_text(text)
    assert read_table(tmp_path / "a.csv", ["image", "domain"]) == [(2, {"image": "a.jpg", "domain": "x"})]


@case("`--domain-labels` with one value", "error: leave it out")
def test_one_domain(tmp_path):
    (tmp_path / "a.csv").write_text("image,domain\na,x\nb,x\n")
    with pytest.raises(DataError, match="has one domain only, 'x': leave --domain-labels out"):
        read_domains(tmp_path / "a.csv", ["a", "b"])


@case("`TRAIN.REC` and `TRAIN.IDX`", "error: the commands that rename them, in training and `data check`")
def test_a_set_in_capitals(tmp_path, capsys):
    for name in ("TRAIN.REC", "TRAIN.IDX"):
        (tmp_path / name).touch()
    moves = f"mv {tmp_path}/TRAIN.REC {tmp_path}/train.rec && mv {tmp_path}/TRAIN.IDX {tmp_path}/train.idx"
    with pytest.raises(DataError) as error:
        load_samples(tmp_path)
    assert str(error.value).endswith(moves)
    assert main(["data", "check", str(tmp_path)]) == 1
    assert moves in capsys.readouterr().out


@case("`--against` of a folder", "error: name the files in it")
def test_against_a_folder(tmp_path, capsys):
    assert main(["data", "check", str(tmp_path), "--against", str(tmp_path)]) == 2
    assert f"--against {tmp_path}: a folder without a benchmark" in capsys.readouterr().err
    for name in ("agedb 30.bin", "pairs.txt", "x/cfp_fp.bin", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert main(["data", "check", str(tmp_path), "--against", str(tmp_path)]) == 2
    names = f"'{tmp_path}/agedb 30.bin' {tmp_path}/pairs.txt {tmp_path}/x/cfp_fp.bin"
    assert f"a folder; name files in it: {names}\n" in capsys.readouterr().err


@case("a fault of a .bin", "the message has its path")
def test_a_bin_is_named_by_its_path(tmp_path):
    write_bin(tmp_path / "lfw.bin", [JPEG] * 4, [True, False])
    data = (tmp_path / "lfw.bin").read_bytes()
    (tmp_path / "lfw.bin").write_bytes(data.replace(JPEG, b"\0" * len(JPEG)))
    with pytest.raises(DataError, match=f"^{tmp_path}/lfw.bin: image 0 is neither JPEG nor PNG"):
        read_bin(tmp_path / "lfw.bin")


@case("`data build` of a release whose accents the disk wrote otherwise", "found")
def test_accents_of_a_release(tmp_path):
    stored = tmp_path / unicodedata.normalize("NFD", "José") / "1.jpg"
    stored.parent.mkdir()
    stored.touch()
    assert _find(tmp_path, unicodedata.normalize("NFC", "José/1.jpg"), "a photo") == stored


@pytest.mark.parametrize(("people", "hint"), [(1, "one person cannot be trained on"), (12, "--holdout-people 2 ")])
@case("`data draw --people 1` and `--people 12`", "what it is good for; a command with --holdout-people")
def test_hints_of_data_draw(tmp_path, capsys, people, hint):
    main(["data", "draw", str(tmp_path / "faces"), "--people", str(people), "--images", "1"])
    assert hint in capsys.readouterr().out
    assert len([*Path(tmp_path / "faces").iterdir()]) == people
