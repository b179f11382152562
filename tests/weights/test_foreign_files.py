"""What is inside a foreign file decides how it is read; of one that is damaged or hostile nothing is executed."""

import dataclasses
import pickle
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import LAYOUTS, as_meta, as_openai, assert_same, random_state, tiny, write
from torch import Tensor, nn

from vitface.errors import WeightsError
from vitface.files import sha256_file
from vitface.store.backbone import load_backbone, read_backbone
from vitface.store.sources import SOURCES
from vitface.weights.conversion import convert_file


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("convert")


def save_zip(path: Path, state) -> Path:
    torch.save(state, path)
    return path


def save_legacy(path: Path, state) -> Path:
    torch.save(state, path, _use_new_zipfile_serialization=False)
    return path


def as_training_checkpoint(path: Path, state) -> Path:
    wrapped = {"epoch": 32, "name": "run", "state_dict": {f"module.{key}": tensor for key, tensor in state.items()}}
    return save_zip(path, wrapped)


def as_model_entry(path: Path, state) -> Path:
    return save_zip(path, {"model": state})


@pytest.mark.parametrize("save", [write, save_zip, save_legacy, as_training_checkpoint, as_model_entry])
@pytest.mark.parametrize("layout", ["meta dinov2", "open_clip"])
def test_a_file_is_read_by_what_is_inside_it(save, layout, tmp_path):
    name, write_as = LAYOUTS[layout]
    config = tiny(name)
    ours = random_state(config)
    src = save(tmp_path / "pytorch_model.bin", write_as(ours))
    convert_file(name, config, src, tmp_path / "out.safetensors")
    assert_same(read_backbone(tmp_path / "out.safetensors")[2], ours)


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("save", [save_zip, save_legacy, lambda path, state: path.write_bytes(pickle.dumps(state))])
def test_a_pickle_with_code_is_refused_and_not_run(save, tmp_path):
    src, trace = tmp_path / "evil.pth", tmp_path / "executed"
    save(src, {"cls_token": Hostile(trace)})
    with pytest.raises(WeightsError, match="not a file of plain tensors"):
        convert_file("dinov2_vits14", tiny("dinov2_vits14"), src, tmp_path / "out.safetensors")
    assert not trace.exists()


@pytest.mark.parametrize("save", [save_zip, save_legacy, write])
@pytest.mark.parametrize("part", [0.01, 0.1, 0.5, 0.9, 0.999])
def test_a_file_that_ends_too_early_is_said_to_be_damaged(save, part, tmp_path):
    config = tiny("dinov2_vits14")
    src = save(tmp_path / "file", random_state(config))
    src.write_bytes(src.read_bytes()[: int(part * src.stat().st_size)])
    with pytest.raises(WeightsError, match=r"file.*(damaged|not a file of plain tensors)"):
        convert_file("dinov2_vits14", config, src, tmp_path / "out.safetensors")


@settings(max_examples=40)
@given(save=st.sampled_from([save_zip, save_legacy, write]), data=st.data())
def test_a_file_with_wrong_bytes_converts_or_says_so(folder, save, data):
    config = tiny("dinov2_vits14", embed_dim=2, depth=1, patch_size=2, native_size=4)
    src = save(folder / "file", random_state(config))
    content = bytearray(src.read_bytes())
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=8)):
        content[place] = data.draw(st.integers(0, 255))
    src.write_bytes(content)
    try:
        convert_file("dinov2_vits14", config, src, folder / "out.safetensors")
    except WeightsError as error:
        assert str(src) in str(error)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"<html>not found</html>", "holds no tensors by name but is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a pointer of Git LFS"),
        (b"", "ends too early"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_said_to_be_none(content, says, tmp_path):
    (tmp_path / "f.pth").write_bytes(content)
    with pytest.raises(WeightsError, match=says):
        convert_file("dinov2_vits14", tiny("dinov2_vits14"), tmp_path / "f.pth", tmp_path / "out.safetensors")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"optimizer": {}, "epoch": 3}, "optimizer is a dict, not a tensor"),
        ([torch.zeros(3)], "holds no tensors by name"),
        (torch.zeros(3), "holds no tensors by name"),
        ({}, "holds no tensors by name"),
        ({3: torch.zeros(3)}, "3 is a Tensor"),
        ({"visual.trunk.cls_token": torch.zeros(3)}, "none of the known layouts.*visual.trunk.cls_token"),
    ],
)
def test_files_of_something_else_are_named(content, says, tmp_path):
    src = save_zip(tmp_path / "f.pth", content)
    with pytest.raises(WeightsError, match=says):
        convert_file("dinov2_vits14", tiny("dinov2_vits14"), src, tmp_path / "out.safetensors")


def scripted(path: Path, state: dict[str, Tensor]) -> Path:
    """A TorchScript archive of `state`, in the precisions and with the three scalars of OpenAI's."""

    class Holder(nn.Module):
        def forward(self, x):
            return x

    root = Holder()
    for key, tensor in state.items():
        *parents, leaf = key.split(".")
        module = root
        for parent in parents:
            if parent not in module._modules:
                module.add_module(parent, Holder())
            module = module._modules[parent]
        kept = "ln_" in key or "embedding" in key
        module.register_parameter(leaf, nn.Parameter(tensor if kept else tensor.half()))
    for scalar, value in (("input_resolution", 224), ("context_length", 77), ("vocab_size", 49408)):
        root.register_buffer(scalar, torch.tensor(value))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is deprecated")
        torch.jit.save(torch.jit.script(root), path)
    return path


def test_openais_archive_is_read_if_it_is_the_published_one(monkeypatch, tmp_path):
    config = tiny("clip_vitb16")
    src = scripted(tmp_path / "ViT-B-16.pt", as_openai(random_state(config)))
    pinned = dataclasses.replace(SOURCES["clip_vitb16"], sha256=sha256_file(src))
    monkeypatch.setitem(SOURCES, "clip_vitb16", pinned)
    done = convert_file("clip_vitb16", config, src, tmp_path / "out.safetensors")
    expected = {
        key: tensor if "norm" in key or key in ("cls_token", "pos_embed") else tensor.half().float()
        for key, tensor in random_state(config).items()
    }
    _, _, tensors, source = read_backbone(tmp_path / "out.safetensors")
    assert_same(tensors, expected)
    assert done.published and source["licence"] == "MIT (OpenAI's CLIP)"
    assert {"input_resolution", "context_length", "vocab_size"} <= done.dropped.keys()


def test_any_other_archive_is_refused(monkeypatch, tmp_path):
    def never(*args, **kwargs):
        raise AssertionError("an archive that is not the published one was opened")

    config = tiny("clip_vitb16")
    src = scripted(tmp_path / "ViT-B-16.pt", as_openai(random_state(config)))
    monkeypatch.setattr(torch.jit, "load", never)
    with pytest.raises(WeightsError, match=rf"TorchScript archive.*{sha256_file(src)}") as caught:
        convert_file("clip_vitb16", config, src, tmp_path / "out.safetensors")
    assert "vitface fetch clip" in str(caught.value)


@pytest.mark.parametrize(
    ("save", "file"), [(write, "model.safetensors"), (save_zip, "dinov2.pth"), (scripted, "clip.pt")]
)
def test_a_source_file_is_answered_with_the_command(save, file, tmp_path):
    src = save(tmp_path / file, as_openai(random_state(tiny("clip_vitb16"))))
    with pytest.raises(WeightsError) as caught:
        load_backbone("clip", src, 32)
    assert f"vitface convert NAME --src {src}" in str(caught.value)


class _OfAnySize:
    def __reduce__(self):
        return bytearray, (1 << 40,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_asks_for_any_memory_is_not_opened(tmp_path, zipped):
    path = tmp_path / "bomb.pth"
    torch.save({"weight": _OfAnySize()}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(WeightsError, match="makes a bytearray"):
        convert_file("dinov2_vits14", tiny("dinov2_vits14"), path, tmp_path / "out")
    (tmp_path / "bare.pth").write_bytes(pickle.dumps(_OfAnySize()))
    with pytest.raises(WeightsError, match="makes a bytearray"):
        convert_file("dinov2_vits14", tiny("dinov2_vits14"), tmp_path / "bare.pth", tmp_path / "out")


def test_an_archive_that_is_compressed_is_not_opened(tmp_path):
    torch.save({"weight": torch.zeros(1 << 16)}, tmp_path / "plain.pth")
    small = zipfile.ZipFile(tmp_path / "small.pth", "w", zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(tmp_path / "plain.pth") as plain, small:
        for entry in plain.namelist():
            small.writestr(entry, plain.read(entry))
    with pytest.raises(WeightsError, match="it is compressed"):
        convert_file("dinov2_vits14", tiny("dinov2_vits14"), tmp_path / "small.pth", tmp_path / "out")


@pytest.mark.parametrize(
    "odd",
    [
        lambda: torch.eye(8).to_sparse(),
        lambda: torch.eye(8).to_sparse_csr(),
        lambda: torch.empty(8, device="meta"),
        lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
        lambda: torch.empty(0),
    ],
    ids=["sparse", "csr", "meta", "nested", "empty"],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_tensors_that_are_no_plain_ones_are_named(tmp_path, odd):
    config = tiny("dinov2_vits14")
    torch.save({**as_meta(random_state(config)), "cls_token": odd()}, tmp_path / "odd.pth")
    with pytest.raises(WeightsError, match=r"odd\.pth: (cls_token|damaged)"):
        convert_file("dinov2_vits14", config, tmp_path / "odd.pth", tmp_path / "out")


def test_a_header_without_end_is_not_read(tmp_path):
    (tmp_path / "long.safetensors").write_bytes((1 << 26).to_bytes(8, "little") + b"{" + bytes(100))
    with pytest.raises(WeightsError, match="its header claims 67,108,864 bytes"):
        convert_file("dinov2_vits14", tiny("dinov2_vits14"), tmp_path / "long.safetensors", tmp_path / "out")
