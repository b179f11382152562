"""Folders from somebody else, with links where files are expected: nothing outside them is written."""

import os
import resource
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_recogniser
from matrix import ROWS, sizes
from PIL import Image
from tiny import in_child, start

import vitface
from vitface.data.faces.folder import COLUMNS, Finder, Row, align_folder, write_crop
from vitface.data.images import read_image
from vitface.data.tables import table_text
from vitface.errors import CheckpointError, ConfigError
from vitface.evaluation.protocol import verify
from vitface.evaluation.scores import SCORES, keep_scores, load_scores
from vitface.files import new_folder, replace_file, write_output, write_synced
from vitface.gallery.gallery import Gallery
from vitface.lock import folder_lock, waiting_lock


@pytest.fixture
def victim(tmp_path):
    path = tmp_path / "authorized_keys"
    path.write_text("mine")
    yield path
    assert path.read_text() == "mine"


@pytest.mark.parametrize("lock", [lambda path: folder_lock(path.parent), waiting_lock])
def test_a_lock_that_is_a_link_is_refused(victim, tmp_path, lock):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / ".lock").symlink_to(victim)
    with pytest.raises(CheckpointError, match=r"\.lock is a link or no regular file"), lock(tmp_path / "set" / ".lock"):
        pass


@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_a_lock_that_is_no_file_is_refused_at_once(tmp_path, kind):
    os.mkfifo(tmp_path / ".lock") if kind == "pipe" else (tmp_path / ".lock").mkdir()
    with pytest.raises((CheckpointError, IsADirectoryError), match=r"\.lock"), folder_lock(tmp_path):
        pass


@pytest.mark.parametrize("name", ["scores", ".scores.part", ".scores..part"])
def test_a_replaced_file_is_a_file_and_what_it_was_a_link_to_is_as_it_was(victim, tmp_path, name):
    (tmp_path / name).symlink_to(victim)
    replace_file(tmp_path / "scores", b"new")
    assert (tmp_path / "scores").read_bytes() == b"new" and not (tmp_path / "scores").is_symlink()


def test_a_new_file_is_not_written_through_a_link(victim, tmp_path):
    (tmp_path / "step").symlink_to(victim)
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    for name in ("step", "dangling"):
        with pytest.raises(FileExistsError):
            write_synced(tmp_path / name, b"new")
    assert not (tmp_path / "nothing").exists()


def test_a_new_folder_is_not_written_through_a_link(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ".partial-run").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError), new_folder(tmp_path / "run") as folder:
        write_synced(folder / "file", b"new")
    assert not list((tmp_path / "elsewhere").iterdir())


def test_what_a_user_names_may_be_a_pipe_and_is_not_written_through_a_link(victim, tmp_path):
    (tmp_path / "report.html").symlink_to(victim)
    write_output(tmp_path / "report.html", b"page")
    assert (tmp_path / "report.html").read_bytes() == b"page"
    os.mkfifo(tmp_path / "pipe")
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_bytes()))
    read: list[bytes] = []
    reader.start()
    write_output(tmp_path / "pipe", b"numbers")
    reader.join(10)
    assert read == [b"numbers"] and stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_a_device_is_written_to_or_refused_and_never_replaced(tmp_path):
    """Root may replace /dev/null, after which nothing on the machine works."""
    null = tmp_path / "null"
    try:
        os.mknod(null, stat.S_IFCHR | 0o600, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("only root makes devices")
    write_output(null, b"numbers")
    with pytest.raises(ConfigError, match=r"null is a device, which no file should replace; name a file"):
        replace_file(null, b"numbers")
    assert null.is_char_device() and list(tmp_path.iterdir()) == [null]


def test_a_crop_on_a_full_disk_is_not_there(tmp_path):
    """The disk takes 4 kB of each file; Pillow's own writer would leave a cut JPEG there, and say nothing."""
    crop = np.random.default_rng(0).integers(0, 256, (112, 112, 3), np.uint8)

    def write():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        for name in ("a.jpg", "b.png"):
            with pytest.raises(OSError, match="File too large"):
                write_crop(tmp_path / name, crop)

    assert in_child(write) == 0 and not list(tmp_path.iterdir())
    write_crop(tmp_path / "a.jpg", crop)
    assert read_image(tmp_path / "a.jpg").shape == crop.shape


@sizes("writers")
def test_three_writers_of_one_file_lose_nothing(tmp_path, ran, cases):
    """Each keeps other scores of its own benchmark in each round, and finds them afterwards, whatever the others do."""
    names, issame = ("lfw", "cfp_fp", "agedb_30"), np.arange(40) % 2 == 0

    def write(number):
        generator = np.random.default_rng(number)
        for _ in range(cases):
            result = verify(generator.random(40), issame)
            keep_scores(tmp_path, {names[number]: result}, "model")
            found, _ = load_scores(tmp_path / SCORES)
            assert (found[names[number]].distance == result.distance).all()

    writers = [start(lambda number=number: write(number)) for number in range(3)]
    assert [os.waitpid(pid, 0)[1] for pid in writers] == [0, 0, 0]
    assert set(load_scores(tmp_path / SCORES)[0]) == set(names)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".scores.lock", SCORES]
    ran(ROWS["writers"].fault, cases)


def test_what_tells_of_people_is_for_its_owner_alone(tmp_path):
    os.umask(0o022)
    gallery = Gallery(4)
    gallery.add(["anna"], torch.eye(4)[:1])
    gallery.save(tmp_path / "people")
    keep_scores(tmp_path, {"lfw": verify(np.arange(40.0), np.arange(40) < 20)}, tiny_recogniser().config.backbone)
    private = [*(tmp_path / "people").glob("part-*"), tmp_path / SCORES]
    assert len(private) == 2 and all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in private)
    replace_file(tmp_path / "public", b"")
    assert stat.S_IMODE((tmp_path / "public").stat().st_mode) == 0o644


def test_no_module_of_the_current_folder_is_run(tmp_path):
    """The folder has modules that stand in for those of packages; `python -m` would look there first."""
    for name in ("tqdm", "numpy", "json", "einops", "argparse", "torch"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    environment = {**os.environ, "PYTHONPATH": str(Path(vitface.__file__).parents[1])}
    command = [sys.executable, "-m", "vitface", "data", "check", "."]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "unreadable" in done.stdout and not done.stderr, done.stderr
    assert not (tmp_path / "ran").exists()


def test_a_report_of_crops_elsewhere_deletes_nothing(victim, tmp_path):
    """In somebody's folder align.csv says that a file outside it is the crop of a photo that is gone."""
    out, photos = tmp_path / "out", tmp_path / "photos"
    for folder in (out, photos):
        folder.mkdir()
    marks = np.array([[38.0, 52.0], [74.0, 51.0], [56.0, 72.0], [42.0, 92.0], [71.0, 92.0]])
    Image.new("RGB", (120, 120)).save(photos / "a.jpg")
    victim.rename(tmp_path / "mine.jpg")
    names = ("../mine.jpg", str(tmp_path / "mine.jpg"))
    rows = [Row(name, "ok", 1, marks, "", "1 2", str(photos.resolve())).cells() for name in (*names, "a.jpg")]
    (out / "align.csv").write_text(table_text([COLUMNS, *rows]))
    done = align_folder(photos, out, Finder({"a.jpg": marks}), prune=True)
    (tmp_path / "mine.jpg").rename(victim)
    assert done.statuses == {"ok": 1} and not done.gone and (out / "a.jpg").is_file()
