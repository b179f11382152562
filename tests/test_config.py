import argparse
import dataclasses

import pytest
import torch
from conftest import tiny_face
from hypothesis import given
from hypothesis import strategies as st

from vitface.commands import train
from vitface.config import (
    BOOKKEEPING,
    EXPERIMENTS,
    VIT_PRESETS,
    TrainConfig,
    add_flags,
    backbone_name,
    resolve,
    to_flag,
)
from vitface.device import resolve_impl
from vitface.errors import ConfigError
from vitface.model.ops import runs_fused
from vitface.training.setup import resolve_choices


def parse(*argv):
    parser = argparse.ArgumentParser(allow_abbrev=False, exit_on_error=False)
    add_flags(parser)
    return resolve(vars(parser.parse_args(argv)))


def test_default_below_preset_below_flag():
    assert parse().lr == TrainConfig().lr
    assert parse("--exp", "exp_003").lr == 1e-4
    assert parse("--exp", "exp_003", "--lr", "0.01").lr == 0.01
    assert parse("--lr", "0.01", "--exp", "exp_003").lr == 0.01
    assert parse("--exp", "exp_003", "--no-use-dalora").use_dalora is False


def test_experiments_are_a_two_by_two_grid():
    resolved = {name: dataclasses.asdict(parse("--exp", name)) for name in ("exp_001", "exp_002", "exp_003", "exp_004")}

    def differ(a, b):
        return {key for key in resolved[a] if resolved[a][key] != resolved[b][key]} - {"exp"}

    assert differ("exp_001", "exp_003") == differ("exp_002", "exp_004") == {"use_dalora"}
    assert differ("exp_001", "exp_002") == differ("exp_003", "exp_004") == {"backbone"}
    recorded = dict(lora_rank=16, lora_alpha=16, head="linear", lr=1e-4, batch_size=128, epochs=40, loss="cosface")
    recorded |= dict(scale=64, margin=0.35, train_patch_embed=False, num_domains=3)
    assert recorded.items() <= resolved["exp_003"].items()
    assert (resolved["exp_001"]["backbone"], resolved["exp_002"]["backbone"]) == ("dinov2", "clip")


def to_argv(config: TrainConfig) -> list[str]:
    argv = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, bool):
            argv.append(to_flag(field.name) if value else "--no-" + to_flag(field.name)[2:])
        elif value is not None:
            argv += [to_flag(field.name), str(value)]
    return argv


@given(
    st.builds(
        TrainConfig,
        backbone=st.sampled_from(sorted(VIT_PRESETS)),
        image_size=st.just(112),
        lr=st.floats(1e-8, 1),
        batch_size=st.integers(2, 999),
        head=st.sampled_from(["bn", "linear", "patches"]),
        use_dalora=st.booleans(),
        max_samples=st.none() | st.integers(1, 10**6),
        save_dir=st.none() | st.text("abc/", min_size=1),
    )
)
def test_parse_inverts_to_argv(config):
    assert parse(*to_argv(config)) == config


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--exp", "exp_009"], "known: "),
        (["--backbone", "resnet50"], "known: dinov2, clip"),
        (["--image-size", "100"], "use 98 or 112"),
        (["--image-size", "-14"], "--image-size must be positive"),
        (["--lr", "nan"], "--lr must be positive, not nan"),
        (["--lr", "0"], "--lr must be positive"),
        (["--epochs", "-1"], "--epochs must be positive"),
        (["--seed", "-1"], "--seed must not be negative"),
        (["--batch-size", "1"], "at least 2"),
        (["--router-depth", "13"], "1 to 12 for dinov2"),
        (["--max-samples", "0"], "--max-samples must be positive"),
        (["--head-levels", "13"], "--head-levels must be 1 to 12 for dinov2, not 13"),
        (["--head", "bn", "--head-levels", "2"], "--head-levels goes with --head patches"),
    ],
)
def test_users_mistakes_are_named_with_exit_code_2(argv, message, capsys):
    with pytest.raises(ConfigError, match=message):
        parse(*argv)
    assert train.main(argv) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--head", "mlp"], ["--epochs", "many"], ["--batch", "4"], ["--nonsense"]])
def test_argparse_refuses_with_exit_code_2(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(argv)
    assert stop.value.code == 2


def test_aliases():
    assert backbone_name("dinov2") == "dinov2_vits14"
    assert backbone_name("clip") == "clip_vitb16"
    assert {VIT_PRESETS[backbone_name(name)].patch_size for name in ("dinov2", "clip")} == {14, 16}
    assert all(backbone_name(EXPERIMENTS[name]["backbone"]) in VIT_PRESETS for name in EXPERIMENTS)


@pytest.mark.parametrize(
    ("changes", "limit"), [({"image_size": 1036}, 1024), ({"embedding_dim": 8193}, 8192), ({"lora_rank": 9000}, 8192)]
)
def test_no_model_is_trained_that_could_not_be_loaded(changes, limit):
    with pytest.raises(ConfigError, match=f"must be at most {limit}"):
        resolve(changes)


def test_bookkeeping_names_fields():
    assert {item.name for item in dataclasses.fields(TrainConfig)} > BOOKKEEPING


def test_auto_is_fused_on_the_cpu_alone(monkeypatch):
    """Until somebody has measured it on a GPU (kernels/README.md)."""
    for device, impl in (("cpu", "fused"), ("cuda:1", "reference"), ("mps", "reference")):
        assert resolve_impl("auto", torch.device(device)) == impl
        assert resolve_impl("fused", torch.device(device)) == "fused"
    config = resolve({"weights": "random", "dtype": "fp32", "device": "cpu"})
    assert resolve_choices(config).impl == "fused"
    monkeypatch.setattr("vitface.training.setup.resolve_device", lambda name: torch.device("cuda"))
    assert resolve_choices(config).impl == "reference"


def test_a_model_takes_the_implementation_of_the_device_it_is_on():
    impl = tiny_face().vit.blocks[0].attn.qkv.impl
    assert runs_fused(impl, torch.empty(1)) and not runs_fused(impl, torch.empty(1, device="meta"))


def test_synthetic_faces_bring_their_own_domains(capsys):
    for world in ("synthetic", "synthetic_shift"):
        assert train.main(["--exp", "demo", "--train-data", world, "--domain-labels", "labels.csv"]) == 2
        assert "synthetic faces come with their domains" in capsys.readouterr().err
