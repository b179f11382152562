"""A newcomer follows the quickstart alone: trains on a folder of five people, and asks who is on a new photo.

The commands are those of its "Your own people", word for word. By default they run in this process, on drawn
photos, with a stub for the detector and the small backbone under DINOv2's name, as the two `fetch` commands cannot run
here. Under `-m slow` they run as a shell script on real photos, with the real detector and ViT-Ti for DINOv2.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from test_docs import ROOT, command_lines, marked_blocks, run_line

import vitface
from vitface.__main__ import main
from vitface.data.faces.alignment import TEMPLATE
from vitface.data.faces.detect import Face, FaceDetector
from vitface.data.synthetic.worlds import SyntheticSamples
from vitface.presets import VIT_PRESETS
from vitface.store.backbone import find_backbone, read_backbone, save_backbone

PEOPLE, PHOTOS, MARGIN = ("anna", "ben", "chloe", "dora", "emil"), 57, 24


def quickstart() -> list[str]:
    (block,) = marked_blocks((ROOT / "docs" / "quickstart.md").read_text(), "test_newcomer.py")
    return command_lines(block)


def take_photos(folder):
    """PHOTOS drawn photos of each person, a face in a wider frame; the last one of anna is new.jpg."""
    samples = SyntheticSamples(len(PEOPLE), PHOTOS)
    for i, label in enumerate(samples.labels):
        number = i % PHOTOS + 1
        photo = np.pad(samples.read(i), ((MARGIN, MARGIN), (MARGIN, MARGIN), (0, 0)), mode="edge")
        last_of_anna = PEOPLE[label] == "anna" and number == PHOTOS
        path = folder / ("new.jpg" if last_of_anna else f"photos/{PEOPLE[label]}/{number}.jpg")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photo).save(path, quality=95)


@pytest.fixture
def fetched(tmp_path, monkeypatch):
    """What the two `fetch` commands would have got: the small backbone as DINOv2, and a detector for these photos."""
    _, config, tensors, source = read_backbone(find_backbone("vit_nano"))
    monkeypatch.setitem(VIT_PRESETS, "dinov2_vits14", config)
    (tmp_path / "weights").mkdir()
    save_backbone(tmp_path / "weights" / "dinov2_vits14.safetensors", "dinov2_vits14", config, tensors, source)
    face = Face(np.array([MARGIN + 20.0, MARGIN + 20, 72, 80]), TEMPLATE + MARGIN, 0.9)
    monkeypatch.setattr(FaceDetector, "__init__", lambda self, model=None: None)
    monkeypatch.setattr(FaceDetector, "detect", lambda self, image: [face])


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_the_quickstart_trains_on_five_people_and_knows_a_new_photo(tmp_path, monkeypatch, fetched, capsys):
    monkeypatch.chdir(tmp_path)
    take_photos(tmp_path)
    fetches, commands = quickstart()[:2], quickstart()[2:]
    assert all(line.startswith("vitface fetch ") for line in fetches) and len(commands) == 6
    printed = {}
    for line in commands:
        code, name = run_line(line), re.search(r"vitface (\w+)|(train)\.py", line)
        printed[name[1] or name[2]] = code, capsys.readouterr().out
    assert printed["align"][0] == 0 and f"{len(PEOPLE) * PHOTOS - 1} photos with one face" in printed["align"][1]
    assert printed["train"][0] == 0 and re.search(r"FAR 0\.01: -?0\.\d{4}, accepts", printed["train"][1])
    assert printed["embed"][0] == 0 and f"people: {len(PEOPLE) * PHOTOS - 1} images" in printed["embed"][1]
    assert re.match(
        r"new\.jpg: cosine and person, threshold -?0\.\d{4}\n +0\.\d{4}  anna  \(anna/", printed["search"][1]
    )
    code, text = printed["verify"]
    assert text.startswith(("same person: cosine", "different people: cosine")[code]) and "0.4" in text

    model, gallery = vitface.load("runs/mine"), vitface.Gallery.load("people")
    assert model.verify("new.jpg", "aligned/anna/1.jpg", align=True).far == 0.01  # without --threshold
    people = np.array([name.split("/")[0] for name in gallery.names])
    score = gallery.embeddings @ model.embed(["new.jpg"], align=True)[0]
    accepted = {name: (score[people == name] >= model.thresholds[0.01]).mean() for name in PEOPLE}
    assert accepted.pop("anna") > 0.2 and max(accepted.values()) < 0.1, accepted


@pytest.mark.slow
def test_the_quickstart_as_a_script_on_real_photos(real_data, tmp_path):
    """Three photos of each of five people are far too few to learn from: that it runs, and what it says, is tested."""
    weights = tmp_path / "weights" / "vit_tiny_patch16.safetensors"
    weights.parent.mkdir()
    source = real_data / "vit_tiny_patch16_224_augreg.pth"
    assert main(["convert", "vit_tiny_patch16", "--src", str(source), "--out", str(weights)]) == 0
    shutil.copy(real_data / "face_detection_yunet.onnx", tmp_path)
    for path in sorted((real_data / "raw_faces").glob("*.jpg"))[:15]:
        name, number = path.stem.rsplit("_", 1)
        person = "anna" if name == "Angelina_Jolie" else name
        new = person == "anna" and number == "0003"
        target = tmp_path / ("new.jpg" if new else f"photos/{person}/{int(number)}.jpg")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    lines = [line for line in quickstart() if "vitface fetch " not in line]
    lines[2] += " --backbone vit_tiny_patch16"
    python = shlex.quote(sys.executable)
    programs = {"python train.py": f"{python} {shlex.quote(str(ROOT / 'train.py'))}", "vitface": f"{python} -m vitface"}
    script = "\n".join(re.sub("^(python train.py|vitface)", lambda start: programs[start[0]], line) for line in lines)
    code = f'set -u\nrun() {{ "$@"; echo "code $?"; }}\n{re.sub("^", "run ", script, flags=re.MULTILINE)}\n'
    environment = {
        **os.environ,
        "VITFACE_HOME": str(tmp_path),
        "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
    }
    done = subprocess.run(["bash", "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    codes = [int(code) for code in re.findall(r"^code (\d+)$", done.stdout, re.MULTILINE)]
    assert [codes[i] for i in (0, 2, 3)] == [0, 0, 0] and codes[5] in (0, 1), done.stdout + done.stderr
    assert "not enough pairs" in done.stdout and "your own threshold" in done.stdout
    assert len(json.loads((tmp_path / "people" / "gallery.json").read_text())["model"]) == 64
