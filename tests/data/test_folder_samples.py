"""Folders of images: their order, what they leave out and say so, their faults by name; domains from a CSV."""

import os
import pickle

import numpy as np
import pytest
from PIL import Image
from record_files import face, insightface, write_rec

from vitface.config import resolve
from vitface.data.formats.samples import FolderSamples, load_samples, read_domains
from vitface.errors import ConfigError, DataError, ImageError
from vitface.training.setup import open_inputs


def folder_set(root, people):
    for person, names in people.items():
        (root / person).mkdir(parents=True)
        for i, name in enumerate(names):
            (root / person / name).write_bytes(face(10 + i, "PNG" if name.endswith("png") else "JPEG"))
    return root


def test_folder_order_is_sorted_names(tmp_path):
    root = folder_set(
        tmp_path / "set", {"zoe": ["b.png", "a.png"], "Zed": ["1.PNG"], "ann": ["x.webp", "y.jpeg", "z.JPG"]}
    )
    (root / "README.md").write_text("not a person")
    (root / ".hidden").mkdir()
    (root / "zoe" / ".a.png").write_bytes(b"")
    (root / "zoe" / "notes.txt").write_bytes(b"")
    (root / "zoe" / "deeper").mkdir()
    samples = load_samples(str(root))
    assert isinstance(samples, FolderSamples) and samples.domains is None
    assert samples.names == ["Zed", "ann", "zoe"]
    assert samples.labels.dtype == np.int64 and samples.labels.tolist() == [0, 1, 1, 1, 2, 2]
    found = samples.image_names()
    assert found == ["Zed/1.PNG", "ann/x.webp", "ann/y.jpeg", "ann/z.JPG", "zoe/a.png", "zoe/b.png"]
    assert (samples.read(4) == (11, 22, 7)).all() and (samples.read(5) == (10, 20, 7)).all()
    copy = pickle.loads(pickle.dumps(samples))
    np.testing.assert_array_equal(copy.read(5), samples.read(5))


def test_odd_names_are_listed_as_they_are(tmp_path):
    people = ["-rf", "a b", "e\u0301", "\u00e9", "new\nline", "n" * 255]
    samples = FolderSamples(folder_set(tmp_path / "set", {person: ["a.png"] for person in people}))
    assert samples.names == sorted(people)
    assert all(samples.read(i).shape == (112, 112, 3) for i in range(6))


def test_links_are_followed(tmp_path):
    real = folder_set(tmp_path / "real", {"a": ["1.png"]})
    (tmp_path / "set" / "c").mkdir(parents=True)
    (tmp_path / "set" / "b").symlink_to(real / "a")
    (tmp_path / "set" / "c" / "1.png").symlink_to(real / "a" / "1.png")
    (tmp_path / "set" / "loop").symlink_to(tmp_path / "set" / "loop")
    samples = FolderSamples(tmp_path / "set")
    assert samples.names == ["b", "c"] and (samples.read(1) == samples.read(0)).all()


def broken(kind):
    def plant(root):
        path = root / "ann" / "2.jpg"
        match kind:
            case "fifo":
                os.mkfifo(path)
            case "dangling":
                path.symlink_to(root / "nowhere")
            case "loop":
                path.symlink_to(path)

    return plant


FOLDER_FAULTS = {
    "empty person": (lambda root: (root / "bob").mkdir(), "1 of 2 folders have no image: bob"),
    "person without images": (
        lambda root: (root / "bob" / "raw").mkdir(parents=True),
        "1 of 2 folders have no image: bob",
    ),
}


@pytest.mark.parametrize("fault", FOLDER_FAULTS)
def test_folder_faults_are_named(tmp_path, fault):
    root = folder_set(tmp_path / "set", {"ann": ["1.png"]})
    plant, message = FOLDER_FAULTS[fault]
    plant(root)
    with pytest.raises(DataError, match=message):
        FolderSamples(root)


LEFT_OUT = {
    **dict.fromkeys(("dangling", "loop"), "left out 1: ann/2.jpg: a link to nothing"),
    "fifo": "left out 1: ann/2.jpg: not a regular file",
}


@pytest.mark.parametrize("kind", LEFT_OUT)
def test_what_a_folder_leaves_out_is_noted(tmp_path, kind):
    root = folder_set(tmp_path / "set", {"ann": ["1.png"]})
    broken(kind)(root)
    os.mkdir(os.fsencode(root) + b"/Jos\xe9")
    samples = FolderSamples(root)
    assert samples.image_names() == ["ann/1.png"] and samples.names == ["ann"]
    notes = ["left out 1: Jos\\xe9: the name is not UTF-8; rename it", LEFT_OUT[kind]]
    assert list(samples.notes) == notes


def test_a_damaged_file_is_named_when_read(tmp_path):
    root = folder_set(tmp_path / "set", {"ann": ["1.png", "2.png", "3.png"]})
    (root / "ann" / "1.png").write_bytes(b"")
    (root / "ann" / "2.png").write_bytes(face(1, size=96)[:-30])
    Image.new("RGB", (96, 112)).save(root / "ann" / "3.png")
    samples = FolderSamples(root)
    for i, message in enumerate(("1.png: empty file", "2.png: damaged", "(?s)3.png: 96 x 112 .*align")):
        with pytest.raises(ImageError, match=message):
            samples.read(i)


def test_load_samples_says_what_it_looked_for(tmp_path):
    with pytest.raises(DataError, match=r"(?s)nowhere does not exist.*train.rec.*vitface train --exp demo"):
        load_samples(tmp_path / "nowhere")
    (tmp_path / "outer").mkdir()
    folder = write_rec(tmp_path / "outer" / "set", insightface(), 3)
    with pytest.raises(DataError, match=rf"pass its folder, --train-data {folder}"):
        load_samples(folder / "train.rec")
    with pytest.raises(DataError, match=rf"holds no train.rec, but {folder} does"):
        load_samples(tmp_path / "outer")
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "a.jpg").write_bytes(face(1))
    with pytest.raises(DataError, match=r"neither train\.rec nor a folder per person"):
        load_samples(tmp_path / "flat")


def test_domain_labels_from_a_csv(tmp_path):
    names = ["ann/1.jpg", "ann/2.jpg", "bob/1.jpg"]
    path = tmp_path / "domains.csv"
    path.write_text("image,domain\nbob/1.jpg,profile\nann/1.jpg,frontal\nann/2.jpg,profile\nzoe/1.jpg,dark\n")
    assert read_domains(path, names).tolist() == [0, 1, 1]  # numbered over the images there are
    path.write_text("image,domain\nbob/1.jpg,profile\n")
    with pytest.raises(DataError, match=r"no domain for 2 of 3 images, first ann/1\.jpg"):
        read_domains(path, names)
    path.write_text("bob/1.jpg,profile\nann/1.jpg,frontal\n")
    with pytest.raises(DataError, match="first line must have image,domain"):
        read_domains(path, names)
    with pytest.raises(DataError, match="No such file"):
        read_domains(tmp_path / "nothing.csv", names)


def test_images_have_the_names_that_domain_labels_use(tmp_path):
    for name in ("bob", "ann"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (112, 112)).save(tmp_path / name / "1.png")
    assert FolderSamples(tmp_path).image_names() == ["ann/1.png", "bob/1.png"]
    (tmp_path / "domains.csv").write_text("image,domain\nann/1.png,a\nbob/1.png,b\n")
    flags = {"train_data": str(tmp_path), "domain_labels": str(tmp_path / "domains.csv"), "weights": "random"}
    assert open_inputs(resolve({**flags, "use_dalora": True, "num_domains": 2})).domains.tolist() == [0, 1]
    with pytest.raises(ConfigError, match="2 different domains; pass --num-domains 2"):
        open_inputs(resolve({**flags, "use_dalora": True}))
    assert open_inputs(resolve(flags)).domains is None
