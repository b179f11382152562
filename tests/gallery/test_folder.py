"""A folder becomes a gallery: the model's own embeddings, and nothing is lost when it is stopped."""

import os
import signal
import time

import numpy as np
import pytest
from conftest import tiny_recogniser
from PIL import Image

from vitface.data.faces.photos import CropReader
from vitface.errors import DataError
from vitface.gallery import from_folder as module
from vitface.gallery.from_folder import embed_folder
from vitface.gallery.gallery import Gallery
from vitface.gallery.parts import Settings, part_files, read_names
from vitface.lock import waiting_lock

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
COUNT = 20


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """20 crops in two folders, decoded four at a time."""
    monkeypatch.setattr(module, "CHUNK", 4)
    crops = np.random.default_rng(0).integers(0, 256, (COUNT, 112, 112, 3), np.uint8)
    for i, crop in enumerate(crops):
        path = tmp_path / "photos" / "ab"[i % 2] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(crop).save(path)
    return tmp_path / "photos"


def embed(photos, out, model=None, **changes):
    settings = Settings("model", **changes)
    return embed_folder(model or tiny_recogniser(), photos, out, settings, CropReader())


@pytest.mark.parametrize("num_workers", [0, 2])
def test_rows_are_the_models_embeddings(photos, tmp_path, num_workers):
    model = tiny_recogniser()
    done = embed_folder(model, photos, tmp_path / "out", Settings("model"), CropReader(), num_workers)
    assert (done.total, done.new, done.skipped) == (COUNT, COUNT, [])
    gallery = Gallery.load(tmp_path / "out")
    assert gallery.names == sorted(path.relative_to(photos).as_posix() for path in photos.rglob("*.png"))
    np.testing.assert_allclose(gallery.embeddings, model.embed([photos / n for n in gallery.names]), atol=1e-5)
    assert (
        gallery.settings == Settings("model", folders=((os.path.realpath(photos), ""),))
        and len(part_files(tmp_path / "out")) == 1
    )


def test_what_cannot_be_used_is_named_and_tried_again(photos, tmp_path):
    (photos / "a" / "00.png").write_bytes(b"no image")
    Image.new("RGB", (120, 150)).save(photos / "b" / "wide.png")
    done = embed(photos, tmp_path / "out")
    assert (done.total, done.new) == (COUNT - 1, COUNT - 1)
    assert "00.png: not a JPEG" in done.skipped[0] and "wide.png: 120 x 150 pixels is not a square" in done.skipped[1]
    Image.new("RGB", (112, 112), (9, 99, 199)).save(photos / "a" / "00.png")
    again = embed(photos, tmp_path / "out")
    assert (again.total, again.new, len(again.skipped)) == (COUNT, 1, 1)
    assert sorted(Gallery.load(tmp_path / "out").names) == sorted([f"{'ab'[i % 2]}/{i:02d}.png" for i in range(COUNT)])


class Stopping:
    """A model that stops after some batches."""

    def __init__(self, batches, stop):
        self.recogniser, self.batches, self.stop = tiny_recogniser(), batches, stop
        self.config = self.recogniser.config

    def embed(self, images):
        if not self.batches:
            self.stop()
        self.batches -= 1
        return self.recogniser.embed(images)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, OSError])
def test_a_stopped_run_keeps_what_was_embedded_and_goes_on(photos, tmp_path, error):
    def stop():
        raise error

    with pytest.raises(error):
        embed(photos, tmp_path / "out", Stopping(3, stop))
    assert len(read_names(tmp_path / "out")) == 12
    done = embed(photos, tmp_path / "out")
    assert (done.total, done.new) == (COUNT, COUNT - 12)
    whole = embed(photos, tmp_path / "whole") and Gallery.load(tmp_path / "whole")
    resumed = Gallery.load(tmp_path / "out")
    assert resumed.names == whole.names
    np.testing.assert_allclose(resumed.embeddings, whole.embeddings, atol=1e-5)


def test_a_killed_run_loses_what_was_not_yet_a_part(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PART_SECONDS", -1)  # every batch is a part
    pid = os.fork()
    if not pid:
        embed(photos, tmp_path / "out", Stopping(3, lambda: os.kill(os.getpid(), signal.SIGKILL)))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert len(read_names(tmp_path / "out")) == 12 and len(part_files(tmp_path / "out")) == 3
    assert embed(photos, tmp_path / "out").new == COUNT - 12
    part_files(tmp_path / "out")[1].unlink()  # as the message about a damaged part says
    with pytest.raises(DataError, match=r"part-000001\.safetensors with 4 rows is lost; copy it back, or embed again"):
        Gallery.load(tmp_path / "out")
    done = embed(photos, tmp_path / "out")
    assert done.new == 4 and done.lost_parts == ["part-000001.safetensors"]
    assert len(Gallery.load(tmp_path / "out")) == COUNT


def test_what_does_not_belong_together_is_refused(photos, tmp_path):
    embed(photos, tmp_path / "out")
    with pytest.raises(DataError, match="was made with another alignment"):
        embed(photos, tmp_path / "out", align=True)
    with pytest.raises(DataError, match="was made with another model"):
        embed_folder(tiny_recogniser(), photos, tmp_path / "out", Settings("other"), CropReader())
    with pytest.raises(DataError, match="is not empty"):
        embed(photos, photos)
    with pytest.raises(DataError, match="holds no image"):
        embed(tmp_path / "out", tmp_path / "new")
    assert not (tmp_path / "new").exists() and not (photos / ".lock").exists()


def test_one_process_writes_at_a_time(photos, tmp_path):
    embed(photos, tmp_path / "out")
    (photos / "a" / "00.png").unlink()
    pid = os.fork()
    if not pid:
        with waiting_lock(tmp_path / "out" / ".lock"):
            (tmp_path / "locked").touch()
            time.sleep(0.5)
            (tmp_path / "released").touch()
            os.kill(os.getpid(), signal.SIGKILL)
    while not (tmp_path / "locked").exists():
        time.sleep(0.01)
    assert embed(photos, tmp_path / "out").gone == ["a/00.png"] and (tmp_path / "released").exists()
    os.waitpid(pid, 0)


def test_several_processes_neither_lose_nor_repeat_a_row(photos, tmp_path, monkeypatch):
    """Four into one gallery, which two make of the same folder and two of one person's each, a part for each batch."""
    monkeypatch.setattr(module, "PART_SECONDS", -1)
    sources, children = [photos, photos, photos / "a", photos / "b"], []
    for source in sources:
        pid = os.fork()
        if not pid:
            try:
                embed(source, tmp_path / "out")
            except BaseException:
                os._exit(1)
            os._exit(0)
        children.append(pid)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0] * 4
    gallery = Gallery.load(tmp_path / "out")
    expected = sorted(path.relative_to(photos).as_posix() for path in photos.rglob("*.png"))
    assert sorted(gallery.names) == expected
    np.testing.assert_allclose(
        gallery.embeddings, tiny_recogniser().embed([photos / n for n in gallery.names]), atol=1e-5
    )
    assert embed(photos, tmp_path / "out").new == 0


def test_the_quality_of_photos_is_kept(photos, tmp_path):
    """With the row, when others are removed, and of the new photos only; flat ones are poor."""
    model, out = tiny_recogniser(), tmp_path / "out"
    Image.new("RGB", (112, 112), (9, 99, 199)).save(photos / "a" / "flat.png")
    done = embed_folder(model, photos, out, Settings("model"), CropReader(), quality=True)
    gallery = Gallery.load(out)
    assert list(gallery.quality) == gallery.names and "a/flat.png" in done.poor
    np.testing.assert_allclose(
        [*gallery.quality.values()], model.quality([photos / n for n in gallery.names]), atol=1e-6
    )
    gallery.save(tmp_path / "backup")
    gallery.remove("b")
    assert gallery.quality and not any(name.startswith("b/") for name in gallery.quality)
    gallery.save(out)
    Image.new("RGB", (112, 112), (9, 99, 99)).save(photos / "a" / "later.png")
    embed(photos, out)
    rated = Gallery.load(out).quality
    assert rated["a/flat.png"] < 1e-6 and len(rated) == COUNT // 2 + 1 and "a/later.png" not in rated
    assert Gallery(8).quality == {}
