"""Packing: the same images, whatever stops it; nothing stale, damaged or foreign is ever trained on."""

import hashlib
import json
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from record_files import face, insightface, write_rec

import vitface.__main__
from vitface.data.formats import packing
from vitface.data.formats.packed import PackedSamples
from vitface.data.formats.packing import cached, pack
from vitface.data.formats.samples import FolderSamples, RecordSamples, load_samples
from vitface.data.loader import read_batches
from vitface.errors import DataError

ROOT = Path(__file__).parents[2]
KILLS = 20


def contents(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def many_people(root, people=9, images=7):
    """Folders of single-coloured images: image j of person i has the value 20 i + j."""
    return write_people(root, {f"p{i}": {f"{j}.png": face(20 * i + j) for j in range(images)} for i in range(people)})


def write_people(root, people):
    """`people`: name -> {file name: bytes}."""
    for person, images in people.items():
        (root / person).mkdir(parents=True)
        for name, data in images.items():
            (root / person / name).write_bytes(data)
    return FolderSamples(root)


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(packing, "SHARD", 4)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_packed_images_are_the_decoded_ones(tmp_path, small_shards, num_workers, capsys):
    source = many_people(tmp_path / "set")
    packed = pack(source, tmp_path / "out", num_workers)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["images.uint8", "labels.npy", "manifest.json"]
    assert packed.names == source.names and packed.labels.tolist() == source.labels.tolist() and packed.domains is None
    for i in range(len(source)):
        np.testing.assert_array_equal(packed.read(i), source.read(i))
    order = np.random.default_rng(0).permutation(len(source))
    np.testing.assert_array_equal(packed.gather(order)[:, 0, 0, 0], [20 * (i // 7) + i % 7 for i in order])
    again = load_samples(tmp_path / "out")
    assert isinstance(again, PackedSamples)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(packed)).read(3), again.read(3))
    packed.verify()
    with pytest.raises(IndexError):
        packed.gather(np.array([len(source)]))


def test_records_and_their_packed_form_give_the_same_batches(tmp_path):
    source = RecordSamples(write_rec(tmp_path / "set", insightface(), 3))
    packed = pack(source, tmp_path / "out")
    indices, positions = np.array([4, 2, 0, 3]), [np.array([k]) for k in (2, 1, 0, 3, 3, 1, 0)]
    decoded = list(read_batches(source, indices, positions))
    for (at, images), (expected_at, expected) in zip(
        read_batches(packed, indices, positions, num_workers=2), decoded, strict=True
    ):
        assert at.tolist() == expected_at.tolist()
        np.testing.assert_array_equal(images, expected)


def test_bad_images_are_skipped_listed_and_their_people_left_out(tmp_path, small_shards, capsys):
    people = {"a": {"1.png": face(1), "2.png": b"no image"}, "b": {"1.png": b"nothing"}, "c": {"1.png": face(3)}}
    source = write_people(tmp_path / "set", people)
    packed = pack(source, tmp_path / "out")
    assert packed.names == ["a", "c"] and packed.labels.tolist() == [0, 1]
    assert packed.gather(np.arange(2))[:, 0, 0, 0].tolist() == [1, 3]
    assert len(packed.skipped) == 2 and "2.png: not a JPEG" in packed.skipped[0]
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["counts"] == {"images": 2, "people": 2, "skipped": 2}
    assert manifest["people_without_images"] == ["b"] and "pillow" in manifest["made_with"]
    shutil.rmtree(tmp_path / "set" / "a")
    shutil.rmtree(tmp_path / "set" / "c")
    with pytest.raises(DataError, match="no image can be decoded"):
        pack(FolderSamples(tmp_path / "set"), tmp_path / "none")


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python 3.12 and later, if another test has threads
def test_killed_at_random_points_and_resumed_is_bit_identical(tmp_path, small_shards, monkeypatch, capfd):
    # tqdm's own lock is shared with the children: one that is killed while it holds it would stop everybody
    monkeypatch.setattr("tqdm.tqdm._lock", threading.RLock(), raising=False)
    source = many_people(tmp_path / "set", people=12, images=20)
    began = time.perf_counter()
    pack(source, tmp_path / "reference")
    duration = time.perf_counter() - began
    expected, rng, kills, stages = contents(tmp_path / "reference"), random.Random(0), 0, set()
    fork = multiprocessing.get_context("fork")
    out = tmp_path / "out"
    while kills < KILLS:
        child = fork.Process(target=pack, args=(source, out))
        child.start()
        child.join(rng.uniform(0, duration / 2))
        if child.is_alive():
            child.kill()
            kills += 1
        child.join()
        if out.exists():
            assert contents(out) == expected
            shutil.rmtree(out)
        else:
            journal = tmp_path / "out.part" / "journal.jsonl"
            stages.add(journal.read_bytes().count(b"\n") if journal.exists() else 0)
    pack(source, out)
    assert contents(out) == expected
    assert len(stages) > 2  # it was killed early and late


@pytest.mark.parametrize("cut", [0, 1, 5, 40, 200])
def test_what_the_journal_does_not_vouch_for_is_packed_again(tmp_path, small_shards, monkeypatch, cut, capsys):
    source = many_people(tmp_path / "set")
    expected = contents(pack(source, tmp_path / "reference").path)
    monkeypatch.setattr(packing, "_seal", stop)
    with pytest.raises(KeyboardInterrupt):
        pack(source, tmp_path / "out")
    monkeypatch.undo()
    monkeypatch.setattr(packing, "SHARD", 4)
    part = tmp_path / "out.part"
    with open(part / "journal.jsonl", "r+b") as journal:
        journal.truncate((part / "journal.jsonl").stat().st_size - cut)
    if cut == 40:  # the journal outlived the images, as after a power cut
        os.truncate(part / "images.uint8", 1000)
    assert contents(pack(source, tmp_path / "out").path) == expected


def stop(*_):
    raise KeyboardInterrupt


def test_a_journal_of_another_source_is_not_continued(tmp_path, small_shards, monkeypatch, capsys):
    source = many_people(tmp_path / "set")
    with monkeypatch.context() as patch:
        patch.setattr(packing, "_seal", stop)
        with pytest.raises(KeyboardInterrupt):
            pack(source, tmp_path / "out")
    (tmp_path / "set" / "p0" / "0.png").write_bytes(face(250))
    packed = pack(FolderSamples(tmp_path / "set"), tmp_path / "out")
    assert packed.read(0)[0, 0, 0] == 250


def test_pack_never_touches_what_is_not_its_own(tmp_path, capsys):
    source = many_people(tmp_path / "set", 2, 2)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    other = pack(many_people(tmp_path / "other", 2, 3), tmp_path / "packed")
    for folder in ("mine", "packed"):
        with pytest.raises(DataError, match="delete it or choose another folder"):
            pack(source, tmp_path / folder)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    assert len(pack(load_samples(tmp_path / "other"), tmp_path / "packed")) == len(other)


def test_a_disk_too_small_is_said_before_anything_is_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr(packing.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1000))
    with pytest.raises(DataError, match="--no-pack"):
        pack(many_people(tmp_path / "set", 2, 2), tmp_path / "out")


def cut_images(folder):
    os.truncate(folder / "images.uint8", 5)


def flip_bit(name):
    def fault(folder):
        data = bytearray((folder / name).read_bytes())
        data[len(data) // 2] ^= 1
        (folder / name).write_bytes(data)

    return fault


def new_image(folder):
    (folder.parents[1] / "set" / "p0" / "9.png").write_bytes(face(9))


def touched(folder):
    os.utime(folder.parents[1] / "set" / "p0" / "0.png", (1, 1))


def without(key):
    def fault(folder):
        manifest = json.loads((folder / "manifest.json").read_text())
        del manifest[key]
        (folder / "manifest.json").write_text(json.dumps(manifest))

    return fault


FAULTS = {
    "no hash": (without("labels_sha256"), "manifest.json is damaged"),
    "nothing": (lambda folder: None, None),
    "image bit": (flip_bit("images.uint8"), "is damaged in shard"),
    "label bit": (flip_bit("labels.npy"), "labels.npy is damaged"),
    "cut": (cut_images, "has 5 bytes"),
    "manifest": (lambda folder: (folder / "manifest.json").write_text("{}"), "manifest.json is damaged"),
    "no labels": (lambda folder: (folder / "labels.npy").unlink(), "No such file"),
    "new image": (new_image, "has changed since"),
    "newer image": (touched, "has changed since"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_stale_or_damaged_cache_is_rebuilt_with_a_message(tmp_path, fault, capsys):
    said = []
    many_people(tmp_path / "set", 2, 3)
    first = cached(FolderSamples(tmp_path / "set"), tmp_path / "cache", 0, said.append)
    assert len(said) == 1 and said[0].startswith("packing ")
    plant, message = FAULTS[fault]
    plant(first.path)
    source = FolderSamples(tmp_path / "set")
    packed = cached(source, tmp_path / "cache", 0, said.append)
    assert packed.path == first.path and len(said) == (1 if message is None else 2)
    assert message is None or (message in said[1] and said[1].endswith("pack the set again (which is done now)"))
    np.testing.assert_array_equal(packed.gather(np.arange(len(source))), [source.read(i) for i in range(len(source))])


def test_the_command_lists_what_it_skips(tmp_path, capsys):
    write_people(tmp_path / "set", {"a": {"1.png": face(1), "2.png": b"no image"}})
    command = ["data", "pack", str(tmp_path / "set"), str(tmp_path / "out"), "--num-workers", "0"]
    assert vitface.__main__.main(command) == 0
    printed = capsys.readouterr().out
    assert "1 images of 1 people, 1 skipped" in printed and "2.png: not a JPEG" in printed
    assert vitface.__main__.main(["data", "pack", str(tmp_path / "out"), str(tmp_path / "again")]) == 2
    assert "is packed already" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_killed_on_real_data_is_bit_identical(real_data, tmp_path, capfd):
    """Whole processes with workers, killed at KILLS random points of a run."""
    command = [sys.executable, "-m", "vitface", "data", "pack", str(real_data / "celeba289"), "--num-workers", "2"]

    def start(out):
        return subprocess.Popen([*command, str(out)], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    assert start(tmp_path / "reference").wait() == 0
    expected, rng, out = contents(tmp_path / "reference"), random.Random(0), tmp_path / "out"
    for _ in range(KILLS):
        process = start(out)
        deadline = time.monotonic() + 30
        while not (tmp_path / "out.part").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)  # importing torch is not what is tested
        time.sleep(rng.uniform(0, 1))
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        if out.exists():
            assert contents(out) == expected
            shutil.rmtree(out)
    assert start(out).wait() == 0
    assert contents(out) == expected
    print(f"killed {KILLS} times")
