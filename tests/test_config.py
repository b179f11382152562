import argparse
import dataclasses
import math
import shlex
import subprocess
import sys
import typing
from pathlib import Path

import pytest
from conftest import tiny_face
from hypothesis import assume, given
from hypothesis import strategies as st

from vitface.__main__ import main
from vitface.commands.experiments import RECORDED
from vitface.commands.parser import add_settings
from vitface.config import TrainConfig, differences, resolve, to_flag
from vitface.errors import ConfigError
from vitface.kernels import fused
from vitface.presets import EXPERIMENTS, VIT_PRESETS, backbone_name

FIELDS = {item.name: item for item in dataclasses.fields(TrainConfig)}
HINTS = typing.get_type_hints(TrainConfig)
BOUNDS = {name: item.metadata["bounds"] for name, item in FIELDS.items() if item.metadata["bounds"] is not None}


def parse(*argv):
    parser = argparse.ArgumentParser(allow_abbrev=False, exit_on_error=False)
    add_settings(parser)
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
    for name, (_, accuracies) in RECORDED.items():
        assert f"{accuracies[0]:.2f} % on LFW" in EXPERIMENTS[name].text


def test_the_headline_is_a_preset():
    """Of the command in docs/results.md the preset leaves the paths and the seed to be given, and has more patches."""
    page = (Path(__file__).parents[1] / "docs" / "results.md").read_text(encoding="utf-8")
    section = page.partition("## ViT-Ti on 289 people: LFW")[2]
    command = next(line for line in section.splitlines() if line.startswith("    python train.py "))
    recorded = parse(*shlex.split(command)[2:])
    given = {name: getattr(recorded, name) for name in ("weights", "train_data")}
    best = dataclasses.replace(recorded, exp="lfw_vit_tiny", image_size=160, epochs=14)
    assert resolve({"exp": "lfw_vit_tiny", **given}) == best
    assert "The mean is **92.88 ± 0.08**" in section and "92.9 % on LFW" in EXPERIMENTS["lfw_vit_tiny"].text


def to_argv(config: TrainConfig) -> list[str]:
    argv = []
    for name, value in dataclasses.asdict(config).items():
        if isinstance(value, bool):
            argv.append(to_flag(name) if value else "--no-" + to_flag(name)[2:])
        elif value is not None:
            argv += [to_flag(name), str(value)]
    return argv


def values(name: str) -> st.SearchStrategy:
    """What a flag may hold by itself."""
    hint, bounds = HINTS[name], BOUNDS.get(name)
    kind = next(arm for arm in (*typing.get_args(hint), hint) if arm is not type(None))
    if typing.get_origin(hint) is typing.Literal:
        return st.sampled_from(typing.get_args(hint))
    if kind is bool:
        return st.booleans()
    if kind is int:
        found = st.integers(bounds.least, min(bounds.most, 10**6))
    elif kind is float:
        low = max(bounds.least, bounds.above)
        found = st.floats(low, min(bounds.most, 1e6), exclude_min=bounds.above == low)
    else:
        found = st.text("abc/", min_size=1)
    return found if FIELDS[name].default is not None else st.none() | found


RELATED = {  # flags that have to fit others
    "exp": st.sampled_from([None, *EXPERIMENTS]),
    "backbone": st.sampled_from(["dinov2", *(name for name, vit in VIT_PRESETS.items() if vit.pool != "tokens")]),
    "image_size": st.sampled_from([224, "448:2,224"]),
    "epochs": st.integers(3, 10**6),
    "head": st.sampled_from([*8 * ["patches"], "bn", "linear"]),  # one of these alone takes levels
    "train_head": st.just(False),
    "router_depth": st.integers(1, 3),
    "head_levels": st.integers(1, 3),
    "grad_accum": st.integers(1, 4),
    "batch_size": st.integers(1, 9).map(lambda parts: 24 * parts),
}


@given(st.fixed_dictionaries({name: values(name) for name in FIELDS} | RELATED))
def test_parse_inverts_to_argv(settings):
    try:
        config = TrainConfig(**settings)
    except ConfigError:
        assume(False)
    assert parse(*to_argv(config)) == config


def test_every_number_has_bounds():
    numbers = {name for name, hint in HINTS.items() if {int, float} & {hint, *typing.get_args(hint)}}
    assert set(BOUNDS) == numbers
    zero = {"margin", "weight_decay", "balance_loss_weight", "holdout_people", "num_workers", "patience", "seed"}
    assert {name for name, bounds in BOUNDS.items() if 0 in bounds} == zero
    assert not any(-1e-9 in bounds for bounds in BOUNDS.values())


@pytest.mark.parametrize("name", BOUNDS)
def test_each_bound_is_kept(name):
    bounds, step = BOUNDS[name], 1 if int in (HINTS[name], *typing.get_args(HINTS[name])) else 1e-3
    outside = {bounds.least - step, bounds.above, bounds.most + step, math.nan, math.inf} - {-math.inf}
    assert len(outside) >= 3
    for value in outside:
        with pytest.raises(ConfigError, match=f"^{to_flag(name)} must be .*, not {value}$"):
            resolve({name: value})
    for value in {bounds.least, bounds.above + step, bounds.most} - {-math.inf, math.inf}:
        assert value in bounds
        try:
            resolve({name: value})
        except ConfigError as error:  # it does not fit the other flags
            assert f"must be {bounds}" not in str(error)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--exp", "exp_03"], "known: demo, lfw_vit_tiny, exp_001"),
        (["--exp", "exp_03"], "did you mean exp_003?"),
        (["--backbone", "resnet50"], "known: dinov2, dinov3, clip"),
        (["--backbone", "dinov2_vit14"], "did you mean dinov2_vits14?"),
        (["--image-size", "100"], "use 98 or 112"),
        (["--image-size", "-14"], "--image-size must be at least 1 and at most 1024, not -14"),
        (["--image-size", "1036"], "--image-size must be at least 1 and at most 1024, not 1036"),
        (["--lora-rank", "9000"], "--lora-rank must be at least 1 and at most 8192, not 9000"),
        (["--lr", "nan"], "--lr must be above 0, not nan"),
        (["--scale", "0"], "--scale must be above 0, not 0.0"),
        (["--margin", "-0.1"], "--margin must be at least 0, not -0.1"),
        (["--partial-fc", "1.5"], "--partial-fc must be above 0 and at most 1, not 1.5"),
        (["--seed", "-1"], "--seed must be at least 0 and at most 9223372036854775807, not -1"),
        (["--batch-size", "1"], "--batch-size must be at least 2"),
        (["--batch-size", "6", "--grad-accum", "6"], "--batch-size must be at least 12, twice --grad-accum"),
        (
            ["--loss", "adaface", "--head", "linear", "--batch-size", "4", "--grad-accum", "4"],
            "--batch-size must be at least 8, twice --grad-accum: AdaFace needs two images",
        ),
        (["--batch-size", "9", "--grad-accum", "2"], "--batch-size 9 is no multiple of --grad-accum 2"),
        (["--holdout-people", "1"], "--holdout-people must be 0 or at least 2"),
        (["--holdout-people", "0", "--patience", "3"], "not 0 with --patience"),
        (["--use-dalora", "--num-domains", "1"], "--num-domains of at least 2"),
        (
            ["--use-dalora", "--router-depth", "12"],
            "--router-depth must be at most 11, as dinov2 has 12 blocks, not 12",
        ),
        (["--head-levels", "13"], "--head-levels must be at most 12, the number of blocks, not 13"),
        (["--head", "bn", "--head-levels", "2"], "--head-levels goes with --head patches"),
    ],
)
def test_users_mistakes_are_named_with_exit_code_2(argv, message, capsys):
    assert main(["train", *argv]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--head", "mlp"], ["--epochs", "many"], ["--batch", "4"], ["--nonsense"]])
def test_argparse_refuses_with_exit_code_2(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", *argv])
    assert stop.value.code == 2 and argv[0] in capsys.readouterr().err


def test_the_help_has_groups_defaults_and_presets(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = capsys.readouterr().out
    groups = {title: body for title, _, body in (part.partition(":\n") for part in text.split("\n\n"))}
    for title, name in {"model": "head", "adapters": "lora_rank", "data": "train_data", "loss": "margin"}.items():
        assert f"  {to_flag(name)} " in groups[title]
    for title, name in {"optimisation": "lr", "run": "resume", "device": "memory_budget"}.items():
        assert f"  {to_flag(name)} " in groups[title]
    assert "  --margin FLOAT        margin m (default: 0.35)\n" in text
    assert "augmentation (default: 0)\n" in text and "in every epoch (default: on)\n" in text
    assert groups["presets"].splitlines()[0].startswith("  --exp demo           DA-LoRA on procedural faces")
    assert len(groups["presets"].splitlines()) == len(EXPERIMENTS)


def test_flags_and_their_help_need_neither_torch_nor_numpy():
    code = "import sys, vitface.commands.parser; sys.exit(bool({'torch', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1]).returncode == 0


def test_what_differs_from_the_preset_and_from_the_defaults():
    plain = dataclasses.asdict(resolve({"lr": 0.1, "val_data": None, "device": "cpu", "dtype": "bf16"}))
    assert differences(plain) == {"lr": 0.1, "val_data": None}
    preset = dataclasses.asdict(resolve({"exp": "exp_003", "epochs": 2, "lr": 1e-4}))
    assert differences(preset) == {"epochs": 2}


def test_aliases():
    assert backbone_name("dinov2") == "dinov2_vits14"
    assert backbone_name("clip") == "clip_vitb16"
    assert {VIT_PRESETS[backbone_name(name)].patch_size for name in ("dinov2", "clip")} == {14, 16}


def test_a_model_takes_the_fused_operations():
    assert tiny_face().vit.blocks[0].attn.qkv.ops.lora_linear is fused.lora_linear


def test_synthetic_faces_bring_their_own_domains(capsys):
    for world in ("synthetic", "synthetic_shift"):
        assert main(["train", "--exp", "demo", "--train-data", world, "--domain-labels", "labels.csv"]) == 2
        assert "synthetic faces come with their domains" in capsys.readouterr().err
