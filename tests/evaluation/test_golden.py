"""`vitface golden` on stand-ins: a small CLIP and DINOv2 of transformers, whose accuracies are the published ones."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import optional
from drawn import drawn_faces, jpeg
from safetensors.torch import save_file

from vitface.__main__ import main
from vitface.commands import golden
from vitface.data.formats import published
from vitface.data.formats.pairs import write_bin
from vitface.data.images import decode_image
from vitface.evaluation import benchmarks
from vitface.evaluation.benchmarks import Benchmark
from vitface.evaluation.protocol import verify
from vitface.evaluation.report import FIVE
from vitface.presets import VIT_PRESETS, backbone_name
from vitface.weights.conversion import convert_file

transformers = optional("transformers")
PICTURES = [jpeg(crop) for crop in drawn_faces(people=10, images=8)]


def pairs_of(seed):
    rng = np.random.default_rng(seed)
    people = [(person, person if same else (person + 1) % 10) for person in range(10) for same in (True, False)]
    return [(8 * a + rng.integers(4), 8 * b + 4 + rng.integers(4)) for a, b in people], [a == b for a, b in people]


@pytest.fixture
def five(tmp_path, monkeypatch):
    """The five sets, of 20 pairs each."""
    for seed, name in enumerate(FIVE):
        monkeypatch.setitem(published.PAIRS, name, 20)
        monkeypatch.setitem(benchmarks.BENCHMARKS, name, Benchmark("general", 20))
        rows, issame = pairs_of(seed)
        (tmp_path / "data").mkdir(exist_ok=True)
        write_bin(tmp_path / "data" / f"{name}.bin", [PICTURES[i] for row in rows for i in row], issame)
    return tmp_path / "data"


def settings(name):
    small = dict(native_size=224, patch_size=56, embed_dim=32, depth=2, num_heads=2)
    return dataclasses.replace(VIT_PRESETS[name], **small)


def oracle(kind, config):
    """A model of transformers with random weights that are large enough to tell people apart."""
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=224, patch_size=56)
    torch.manual_seed(0)
    if kind == "clip":
        settings_ = transformers.CLIPVisionConfig(**sizes, intermediate_size=128, projection_dim=8)
        model = transformers.CLIPVisionModelWithProjection(settings_)
    else:
        model = transformers.Dinov2Model(transformers.Dinov2Config(**sizes, mlp_ratio=4))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


@torch.no_grad()
def embeddings(model, config, pictures):
    """By transformers alone: the (projected) embeddings of both mirror images, summed; float64 (B, E), unit norm."""
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (config.mean, config.std))
    crops = torch.stack([torch.from_numpy(decode_image(PICTURES[i], "")) for i in pictures]).permute(0, 3, 1, 2) / 255
    images = F.interpolate(crops, size=(224, 224), mode="bicubic", align_corners=False)
    kind = "image_embeds" if hasattr(model, "visual_projection") else "pooler_output"
    first, second = (getattr(model((x - mean) / std), kind) for x in (images, images.flip(3)))
    return F.normalize((first + second).double()).numpy()


def accuracies(model, config):
    """The protocol on these, on each set, and the average."""
    found = {}
    for seed, name in enumerate(FIVE):
        rows, issame = pairs_of(seed)
        unit = embeddings(model, config, [i for row in rows for i in row])
        found[name] = 100 * verify(np.square(unit[::2] - unit[1::2]).sum(axis=1), np.array(issame)).accuracy
    return found | {"average": float(np.mean([*found.values()]))}


@pytest.mark.parametrize("kind", ["clip", "dinov2"])
def test_published_figures_are_reproduced(kind, five, tmp_path, monkeypatch, capsys):
    name = backbone_name(kind)
    config = settings(name)
    monkeypatch.setitem(VIT_PRESETS, name, config)
    model = oracle(kind, config)
    model.save_pretrained(tmp_path)
    converted = tmp_path / "ours.safetensors"
    convert_file(name, config, tmp_path / "model.safetensors", converted)
    opened, projection = golden.open_golden(name, str(converted))
    ours = golden.project(opened.embed(np.stack([decode_image(PICTURES[i], "") for i in (0, 9, 70)])), projection)
    np.testing.assert_allclose(ours, embeddings(model, config, [0, 9, 70]), atol=2e-5)
    expected = accuracies(model, config)
    figures = expected if kind == "clip" else {"average": expected["average"]}
    assert len(set(expected.values())) > 2
    monkeypatch.setitem(golden.PUBLISHED, name, figures)
    command = ["golden", kind, "--weights", str(converted), "--data-dir", str(five), "--device", "cpu"]
    assert main([*command, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["figure"] for row in rows] == [*figures]
    for row in rows:
        assert row["measured"] == pytest.approx(row["published"], abs=1e-9) and row["within"]
    monkeypatch.setitem(golden.PUBLISHED, name, {key: value - 45 for key, value in figures.items()})
    assert main(command) == 1
    out = capsys.readouterr().out
    assert "+45.00  NOT within" in out and "not reproduced: are the .bin files InsightFace's" in out


def test_a_converted_file_and_missing_sets(five, tmp_path, monkeypatch, capsys):
    config = settings("dinov2_vits14")
    monkeypatch.setitem(VIT_PRESETS, "dinov2_vits14", config)
    model = oracle("dinov2", config)
    model.save_pretrained(tmp_path)
    convert_file("dinov2_vits14", config, tmp_path / "model.safetensors", tmp_path / "ours.safetensors")
    monkeypatch.setitem(golden.PUBLISHED, "dinov2_vits14", {"average": accuracies(model, config)["average"]})
    command = ["golden", "dinov2", "--weights", str(tmp_path / "ours.safetensors"), "--data-dir", str(five)]
    assert main([*command, "--device", "cpu"]) == 0
    assert "reproduced: weights, preprocessing and protocol" in capsys.readouterr().out
    (five / "calfw.bin").unlink()
    assert main(command) == 2
    assert "only the average of five was published, and calfw not found" in capsys.readouterr().err
    monkeypatch.setitem(VIT_PRESETS, "clip_vitb16", settings("clip_vitb16"))
    tower = oracle("clip", settings("clip_vitb16")).vision_model
    save_file(tower.state_dict(), tmp_path / "tower.safetensors")
    convert_file("clip_vitb16", settings("clip_vitb16"), tmp_path / "tower.safetensors", tmp_path / "clip.safetensors")
    assert main(["golden", "clip", "--weights", str(tmp_path / "clip.safetensors"), "--data-dir", str(five)]) == 2
    assert "has no projection, and the figures of clip_vitb16 are of projected embeddings" in capsys.readouterr().err
    assert main(["golden", "clip", "--data-dir", str(tmp_path)]) == 2
    assert "no benchmark was found" in capsys.readouterr().err


def test_some_sets_of_clip():
    rows = golden.compare(golden.PUBLISHED["clip_vitb16"], {"lfw": 93.0, "cplfw": 80.3})
    assert [(row["figure"], row["within"]) for row in rows] == [("lfw", True), ("cplfw", False)]
    text = golden.golden_text("clip_vitb16", rows)
    assert "lfw             93.33     93.00       -0.33  within 0.64" in text


def test_tolerances_are_half_intervals_of_as_many_pairs():
    """Of 93.33 % of 6,000: 92.669 to 93.933 by Wilson's formula."""
    assert golden.tolerance("lfw", 93.33) == pytest.approx((93.9339 - 92.6696) / 2 + 0.005, abs=1e-3)
    wide = 1.96 * np.sqrt(0.647 * 0.353 / 31_000)  # of five sets with 31,000 pairs
    assert golden.tolerance("average", 64.70) == pytest.approx(100 * wide + 0.005, abs=1e-3)
