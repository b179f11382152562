"""Graphs and merged backbones compute what the model does; the commands write whole files or say why not."""

import importlib.util
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import optional
from runs import NAME, face_on, faces, save_run, use_tiny

import vitface
from vitface.__main__ import main
from vitface.errors import ExchangeError
from vitface.model.lora import Mix
from vitface.store.backbone import load_backbone, read_backbone

KINDS = {
    "lora": {},
    "dalora": {"num_domains": 3, "head": "patches", "head_levels": 2, "gate_temperature": 0.5},
    "rslora, mlp": {"lora_scaling": "rslora", "lora_targets": "attn+mlp", "head": "linear"},
    "fp16, two domains": {"num_domains": 2, "head": "bn", "dtype": "fp16"},
    "bf16, patch convolution": {"num_domains": 2, "dtype": "bf16", "train_patch_embed": True},
}


@pytest.fixture
def backbone(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    return use_tiny(monkeypatch, tmp_path / "home")


def paths_in(data: bytes) -> list[str]:
    """What tells where the exporter's files lie, and so often who it is."""
    here = {str(Path(vitface.__file__).parents[1]), str(Path(torch.__file__).parents[1]), str(Path.home()), "/torch/"}
    return [path for path in here if path.encode() in data]


def trained(backbone, tmp_path, **changes):
    return save_run(tmp_path / "run", face_on(backbone, **{"head": "bn", **changes}))


def export(kind: str, out: str, *more: str) -> int:
    return main(["export", "run", "--format", kind, "--out", out, *more])


def in_float32(run):
    return vitface.load(run, dtype="fp32")


@pytest.mark.parametrize("kind", [pytest.param("lora", marks=pytest.mark.slow), "dalora"])
def test_onnx_runtime_computes_the_same(backbone, tmp_path, kind, monkeypatch, capsys):
    onnxruntime = optional("onnxruntime")

    run = trained(backbone, tmp_path, **KINDS[kind])
    assert export("onnx", "face.onnx") == 0
    assert "in ONNX Runtime" in capsys.readouterr().out
    data, model = (tmp_path / "face.onnx").read_bytes(), in_float32(run)
    assert not paths_in(data)
    assert optional("onnx").load_from_string(data).ir_version == 8
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    for count in (1, 2, 5, 32):
        outputs = session.run(None, {"images": faces(count)})
        assert outputs[0].shape == (count, 8)
        assert (outputs[0] * model.embed(faces(count))).sum(axis=1).min() >= 0.99999
        np.testing.assert_allclose(outputs[0], model.embed(faces(count)), atol=5e-5)
        if model.config.num_domains > 1:
            np.testing.assert_allclose(outputs[1], model.domain_weights(faces(count)), atol=1e-5)
    names = ["embeddings", *(["domain_weights"] if model.config.num_domains > 1 else [])]
    assert [output.name for output in session.get_outputs()] == names
    described = json.loads(session.get_modelmeta().custom_metadata_map["vitface"])
    assert described["thresholds"] == {"0.01": 0.25} and described["backbone"] == NAME
    # the graph of one model for another: nothing is written
    save_run(tmp_path / "other", face_on(backbone, **{"head": "bn", **KINDS[kind], "lora_alpha": 9}))
    monkeypatch.setattr("vitface.exchange.onnx_graph.trace", lambda *_: None)
    monkeypatch.setattr("vitface.exchange.onnx_graph.onnx_bytes", lambda *_: data)
    assert main(["export", "other", "--format", "onnx", "--out", "other.onnx"]) == 2
    assert "embeddings differ (cosine " in capsys.readouterr().err
    assert not (tmp_path / "other.onnx").exists()


@pytest.mark.parametrize(
    ("kind", "flip"),
    [
        ("bf16, patch convolution", True),
        pytest.param("fp16, two domains", True, marks=pytest.mark.slow),
        ("rslora, mlp", False),
    ],
)
def test_torch_export_computes_the_same(backbone, tmp_path, kind, flip):
    run = trained(backbone, tmp_path, **KINDS[kind])
    assert export("torch", "face.pt2", *([] if flip else ["--no-flip"])) == 0
    program, model = torch.export.load(tmp_path / "face.pt2"), in_float32(run)
    with zipfile.ZipFile(tmp_path / "face.pt2") as archive:
        assert not paths_in(b"".join(map(archive.read, archive.namelist())))
    for count in (1, 32):
        found = program.module()(torch.from_numpy(faces(count)))[0].detach().numpy()
        np.testing.assert_allclose(found, model.embed(faces(count), flip=flip), atol=1e-5)
        assert np.abs(found - model.embed(faces(count), flip=not flip)).max() > 1e-3


@pytest.mark.parametrize("missing", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_extra_is_named(backbone, tmp_path, missing, monkeypatch, capsys):
    trained(backbone, tmp_path)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find(name))
    assert export("onnx", "face.onnx") == 2
    assert f"needs {missing}:\n  pip install {missing}" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["lora", "rslora, mlp"])
def test_a_merged_model_computes_the_same_without_adapters(backbone, tmp_path, kind):
    run = trained(backbone, tmp_path, **KINDS[kind])
    assert export("merged", "merged") == 0
    model, merged = vitface.load(run), vitface.load(tmp_path / "merged")
    assert not [name for name, _ in merged.model.named_parameters() if "lora" in name]
    np.testing.assert_allclose(merged.embed(faces()), model.embed(faces()), atol=1e-6)
    assert merged.thresholds == model.thresholds == {0.01: 0.25}
    file = tmp_path / "merged" / f"{NAME}.safetensors"
    vit = load_backbone(NAME, file, 32)
    inputs = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(6))
    model.model.vit.keep_queries(None)
    with torch.no_grad():
        torch.testing.assert_close(vit(inputs), model.model.vit(inputs, Mix()), atol=2e-6, rtol=1e-5)
    assert "sha256" in read_backbone(file)[3]["merged"]


def test_the_patch_convolution_that_was_trained_is_merged_too(backbone, tmp_path):
    model = face_on(backbone, head="bn", train_patch_embed=True)
    with torch.no_grad():
        model.vit.patch_embed.proj.weight.mul_(1.5)
    run = save_run(tmp_path / "run", model)
    assert export("merged", "merged") == 0
    np.testing.assert_allclose(vitface.load("merged").embed(faces()), vitface.load(run).embed(faces()), atol=1e-6)
    assert export("peft-timm", "adapter") == 2


def test_dalora_is_not_merged(backbone, tmp_path, capsys):
    trained(backbone, tmp_path, num_domains=3)
    assert export("merged", "merged") == 2
    assert "weights depend on the image" in capsys.readouterr().err and not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    "layout", [["peft-timm"], ["peft-transformers"], ["peft-transformers", "--transformers-version", "4"]]
)
@pytest.mark.parametrize("kind", ["lora", "dalora", "rslora, mlp"])
def test_adapters_go_out_and_come_back(backbone, tmp_path, kind, layout, capsys):
    run = trained(backbone, tmp_path, **KINDS[kind])
    assert export(layout[0], "adapter", *layout[1:]) == 0
    assert "for which PEFT has no place" in capsys.readouterr().out
    assert main(["import-peft", "adapter", "--into", "run", "--out", "back"]) == 0
    back, model = vitface.load("back"), vitface.load(run)
    assert back.config == model.config and back.thresholds == {}
    np.testing.assert_array_equal(back.embed(faces()), model.embed(faces()))


def test_an_adapter_alone_becomes_a_model_of_the_raw_cls(backbone, tmp_path, capsys):
    run = trained(backbone, tmp_path, lora_scaling="rslora")
    assert export("peft-transformers", "adapter") == 0
    assert main(["import-peft", "adapter", "--backbone", "vit_nano", "--out", "other"]) == 2
    assert "no layer to adapt in a vit_nano" in capsys.readouterr().err and not (tmp_path / "other").exists()
    from vitface.exchange.from_peft import adapted_backbone

    model, file, _ = adapted_backbone(tmp_path / "adapter", NAME, None, 32)
    assert file == backbone and model.config.lora_scaling == "rslora"
    inputs = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        torch.testing.assert_close(
            model(inputs)[0], vitface.load(run).model.vit(inputs, Mix())[:, 0], atol=2e-6, rtol=1e-5
        )


def test_domains_and_models_have_to_fit(backbone, tmp_path, capsys):
    trained(backbone, tmp_path, num_domains=3)
    assert export("peft-timm", "adapter") == 0
    assert main(["import-peft", "adapter/domain-0", "--into", "run", "--out", "back"]) == 2
    assert "adapter/domain-0 has 1 domain" in capsys.readouterr().err
    from vitface.exchange.from_peft import adapted_backbone

    with pytest.raises(ExchangeError, match="no router comes with them"):
        adapted_backbone(tmp_path / "adapter", NAME, None, 32)


@pytest.mark.parametrize("kind", ["onnx", "torch", "peft-timm", "peft-transformers", "merged"])
def test_what_is_there_is_not_overwritten(backbone, tmp_path, kind, capsys):
    trained(backbone, tmp_path)
    (tmp_path / "there").write_text("mine")
    for out, message in {"there": "there exists", "nowhere/there": "nowhere/there: its folder does not exist"}.items():
        with pytest.raises(SystemExit) as stop:
            export(kind, out)
        assert stop.value.code == 2 and f"argument --out: {message}" in capsys.readouterr().err
    assert (tmp_path / "there").read_text() == "mine"


def test_a_layout_is_for_graphs(backbone, tmp_path, capsys):
    trained(backbone, tmp_path)
    assert export("merged", "merged", "--layout", "nchw") == 2
    assert "--layout goes with --format onnx or torch" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["export", "import-peft", "publish"])
def test_help_has_examples(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    assert f"examples:\n  vitface {command}" in capsys.readouterr().out
