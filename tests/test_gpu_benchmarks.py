"""The benchmarks for a GPU run on the CPU, too, on tiny sizes, and their arithmetic is right."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import optional, tiny_vit
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vitface.config import FaceConfig
from vitface.model import ops
from vitface.model.face import FaceModel
from vitface.model.lora import adapted_linears
from vitface.presets import VIT_PRESETS

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import ceilings  # noqa: E402
import contest  # noqa: E402
import embed  # noqa: E402
import end_to_end  # noqa: E402
import flops  # noqa: E402
import sweep  # noqa: E402
import train_step  # noqa: E402


def last_line(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_ceilings(capsys):
    ceilings.main(["--device", "cpu", "--dtype", "fp32", "--side", "64", "--copied", "4096"])
    found = last_line(capsys)
    assert found["fp32_tflop_per_s"] > 0 and found["copy_gb_per_s"] > 0
    assert (found["side"], found["copied"]) == (64, 4096)


@pytest.mark.parametrize("targets", ["attn", "attn+mlp"])
@pytest.mark.parametrize(("domains", "head"), [(1, "linear"), (3, "patches")])
def test_the_count_is_that_of_torch(domains, head, targets):
    """Against torch's own count of what runs; its head is taken off, and it counts an addition as an operation, too."""
    vit = tiny_vit()
    config = FaceConfig(
        "dinov2_vits14",
        "random",
        vit.config,
        32,
        lora_rank=4,
        num_domains=domains,
        head=head,
        embedding_dim=8,
        router_depth=1,
        lora_targets=targets,
    )
    model = FaceModel(vit, config).eval()
    model.use_ops(ops)
    model.head = torch.nn.Identity()
    model.head.reads_tokens = head == "patches"
    model.router = None if domains == 1 else _Constant(domains)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # the only one whose operations torch counts
        model(torch.zeros(1, 3, 32, 32))
    columns = 4 * domains
    adapters = sum(
        columns
        * (layer.in_features + layer.out_features)
        * (17 if head == "patches" or ".0." in name or "qkv" in name else 1)
        for name, layer in adapted_linears(model.vit).items()
    )
    embedding, step = flops.forward_and_step(config)
    grid = 1 + (-(-4 // 2)) ** 2
    router = 12 * grid * 16**2 + 2 * grid**2 * 16 if domains > 1 else 0  # its block; `_Constant` runs none
    forward = counter.get_total_flops() // 2 + router
    assert embedding == forward - (adapters if domains == 1 else 0)
    patches = 16 * 3 * 64 * 16
    assert step == patches + 2 * (forward - adapters - router - patches) + 3 * adapters + router


@pytest.mark.parametrize("name", ["dinov2_vits14_reg", "dinov3_vits16plus", "siglip2_vitb16", "adaface_vit_s"])
def test_the_count_is_that_of_torch_for_other_backbones(name):
    """Registers, SwiGLU, no CLS token, other widths of the MLP."""
    sizes = dict(native_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, pool_heads=2)
    vit = tiny_vit(**{**vars(VIT_PRESETS[name]), **sizes})
    config = FaceConfig(name, "random", vit.config, 32, embedding_dim=vit.config.output_dim)
    model = FaceModel(vit, config).eval()
    model.use_ops(ops)
    model.vit.pool = torch.nn.Identity()
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(torch.zeros(1, 3, 32, 32))
    assert flops.forward_and_step(config)[0] == counter.get_total_flops() // 2


class _Constant(torch.nn.Module):
    def __init__(self, domains):
        super().__init__()
        self.domains = domains

    def forward(self, tokens, vit, domains):
        logits = tokens.new_zeros(len(tokens), self.domains)
        return logits.softmax(1), logits


def test_a_vit_s_has_the_known_number_of_operations():
    """timm gives 5.52 G for ViT-S/14 at 224 px, without attention's two products; the last block can spare most."""
    vit = VIT_PRESETS["dinov2_vits14"]
    config = FaceConfig("dinov2_vits14", "random", vit, 224, head="patches")
    attention = 12 * 2 * 257**2 * 384
    assert flops.forward_and_step(config)[0] - attention == pytest.approx(5.52e9, rel=2e-3)
    spared = 9 * 256 * 384**2 + 2 * 256 * 257 * 384
    cls = flops.forward_and_step(dataclasses.replace(config, head="pretrained"))[0]
    assert flops.forward_and_step(config)[0] - cls == spared


def entrant(group, dtype="fp32", needs=()):
    return contest.Contestant(group, dtype, lambda: lambda: None, needs)


def test_the_report_compares_the_fastest_of_each_group():
    known = {
        "vitface": "vitface",
        "vitface, bf16": "vitface",
        "timm": "peers",
        "timm, bf16": "peers",
        "formulas": "reference",
    }
    entrants = {name: entrant(group, "bf16" if "bf16" in name else "fp32") for name, group in known.items()}
    results = contest.Results(
        final={"vitface": [10.0, 20.0, 30.0], "vitface, bf16": [40.0, 40.0, 40.0], "timm": [5.0, 10.0, 15.0]},
        heat={"timm, bf16": [8.0], "formulas": [20.0]},
        peak_gb={"vitface": None, "vitface, bf16": 1.5, "timm": None, "timm, bf16": None, "formulas": None},
        left_out={"transformers": "pip install transformers"},
    )
    text = contest.report(results, entrants, {"fp32": 80.0, "bf16": 160.0}, "here")
    found = json.loads(text.splitlines()[-1])
    assert (found["fastest"], found["vitface"], found["ceiling_share"], found["peak_gb"]) == (
        "vitface, bf16",
        40.0,
        0.25,
        1.5,
    )
    assert (found["ratio_to_fastest_peer"], found["ratio_to_fastest_reference"]) == (4.0, 2.0)
    assert found["peers"] == {"timm": 10.0, "timm, bf16": 8.0} and found["left_out"] == results.left_out
    rows = text.splitlines()[2:-1]
    assert [row.split("  ")[0] for row in rows] == ["vitface, bf16", "vitface", "timm", "formulas", "timm, bf16"]
    assert "2.00 x" in rows[1] and "25.0%" in rows[1] and rows[3].endswith("heat") and rows[0].endswith("1.5")


SCRIPT = """
import sys, time
sys.path.insert(0, {benchmarks!r})
import contest
def made(seconds):
    print("what a library prints")
    if seconds is None:
        raise MemoryError("the memory is full")
    return lambda: time.sleep(seconds)
TIMES = dict(vitface=0.001, slow=0.05, fast=0.002, middling=0.01, broken=None)
entrants = {{
    name: contest.Contestant("vitface" if name == "vitface" else "peers", "fp32", lambda s=s: made(s))
    for name, s in TIMES.items()
}}
contest.serve(entrants[sys.argv[sys.argv.index("--only") + 1]])
"""


@pytest.mark.slow
def test_contestants_take_turns_in_processes_of_their_own(tmp_path, capsys):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(benchmarks=str(ROOT / "benchmarks")))
    entrants = {name: entrant("peers") for name in ("slow", "fast", "middling", "broken")}
    entrants |= {"vitface": entrant("vitface"), "absent": entrant("peers", needs=("no_such_module",))}
    contest.PACKAGES["no_such_module"] = "no-such-package"
    results = contest.hold([str(script)], entrants, images=4, repetitions=3)
    assert results.final.keys() == {"vitface", "fast", "middling"} and results.heat.keys() == {"slow"}
    assert {len(rates) for rates in results.final.values()} == {3} and len(results.heat["slow"]) == contest.HEAT
    assert 0 < results.heat["slow"][0] <= 4 / 0.05
    expected = {"broken": "MemoryError: the memory is full", "absent": "pip install no-such-package"}
    assert results.left_out == expected
    assert "absent: left out, pip install no-such-package" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="broken failed"):
        contest.hold([str(script)], {"broken": entrant("vitface")}, images=4, repetitions=1)


@pytest.mark.slow
def test_on_a_gpu_each_runs_alone_the_groups_in_turn_and_none_after_the_time(tmp_path, capsys):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(benchmarks=str(ROOT / "benchmarks")))
    entrants = {"vitface": entrant("vitface"), **{name: entrant("peers") for name in ("slow", "fast", "broken")}}
    results = contest.hold([str(script)], entrants, images=4, repetitions=2, on_gpu=True)
    assert list(results.final) == ["vitface", "fast", "slow"] and not results.heat
    assert {len(rates) for rates in results.final.values()} == {2}
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["vitface", "fast", "slow"] and "img/s (" in lines[0]
    with pytest.raises(SystemExit, match="vitface failed"):
        contest.hold([str(script)], entrants, images=4, repetitions=1, minutes=0, on_gpu=True)


def test_packed_attention_is_timed_on_cuda_only():
    args = train_step.arguments(["--device", "cpu", "--dtypes", "fp32", "bf16", "--peers", "none"])
    assert not [name for name in train_step.contestants(args) if "packed" in name]
    args.device = torch.device("cuda")
    assert [name for name in train_step.contestants(args) if "packed" in name] == [
        "vitface, packed attention, bf16, compiled"
    ]


@pytest.mark.slow
def test_both_benchmarks_of_a_sweep(capsys, monkeypatch):
    monkeypatch.setitem(ceilings.SIDE, "cpu", 64)  # few processors multiply in fp16, the others take a minute for 1024
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
    flags = ["--backbone", "vit_nano", "--image-size", "112", "--batch-size", "2", "--repetitions", "1"]
    flags += ["--device", "cpu", "--peers", "none", "--no-compiled"]
    embed.main([*flags, "--dtypes", "fp32", "--runtimes", "none"])
    found = last_line(capsys)
    assert found["vitface"] > 0 and found["ratio_to_fastest_reference"] > 0
    train_step.main([*flags, "--dtypes", "fp16", "--adapter", "dalora", "--domains", "2"])
    found = last_line(capsys)
    assert found["vitface"] > 0 and found["ceiling_share"] > 0 and "ratio_to_fastest_peer" not in found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_end_to_end(capsys, monkeypatch):
    monkeypatch.setitem(end_to_end.jpeg_folder.__globals__, "FACES", 64)
    flags = ["--exp", "demo", "--device", "cpu", "--dtype", "fp32", "--batch-size", "8", "--seconds", "0.1"]
    end_to_end.main([*flags, "--head", "linear"])
    found = last_line(capsys)
    assert found["hours_of_40_epochs"] == pytest.approx(40 * 494_149 / found["images_per_s"] / 3600, rel=0.01)
    ratio = found["images_per_s"] / found["images_per_s_one_batch"]
    assert found["loader_cost"] == pytest.approx(1 - ratio, abs=1e-3)


def test_a_sweep_goes_on_where_it_was_stopped_and_survives_a_full_memory(tmp_path, monkeypatch, capsys):
    results, page, called = tmp_path / "sweep.json", tmp_path / "page.md", []
    row = {"vitface": 12.5, "ceiling_share": 0.3, "peak_gb": None, "machine": "a GPU", "ratio_to_fastest_peer": 1.4}

    def run(command, **options):
        called.append(command[1:])
        full = "512" in command and len(called) == 2
        code, out, err = (1, "", "torch.OutOfMemoryError: CUDA out of memory") if full else (0, json.dumps(row), "")
        return sweep.subprocess.CompletedProcess(command, code, f"table\n{out}\n", err)

    monkeypatch.setattr(sweep.subprocess, "run", run)
    flags = [str(results), "--backbones", "dinov2", "--batches", "512", "--domains", "3", "--peers-at"]
    sweep.main(flags)
    assert len(called) == 3 and "none" in called[0]
    sweep.main([*flags, "--docs", str(page)])
    assert len(called) == 3
    found = list(json.loads(results.read_text()).values())
    assert found == [row, {"error": "out of memory"}, row]
    assert page.read_text().count("| 12.5 | 30.0% |  | 1.4 x |") == 2 and "| out of memory |" in page.read_text()
    assert len(sweep.rows(_arguments(sweep, tmp_path))) == 2 * (7 * 3 + 4)


def _arguments(sweep, tmp_path):
    import argparse

    return argparse.Namespace(
        backbones=sweep.BACKBONES,
        batches=sweep.BATCHES,
        domains=sweep.DOMAINS,
        peers_at=[128],
        device="auto",
        repetitions=1,
        image_size=224,
        compiled=True,
    )


LAUNCHES, GIGABYTES = 617, 32.6  # of a compiled pass forward and backward, three domains, ViT-S, batch 128


@pytest.mark.slow
def test_a_compiled_step_moves_no_more_than_its_budget():
    """On a device without memory; the formulas take 36.5 GB. And no batch waits for the device."""
    optional("triton")
    if shutil.which("g++") is None or not torch.__version__.startswith("2.13"):
        pytest.skip("it needs g++, and the internals of torch 2.13")
    command = [sys.executable, str(ROOT / "benchmarks" / "traffic.py"), "--domains", "3"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["forward"]["launches"] + found["backward"]["launches"] <= LAUNCHES
    assert 0.9 * GIGABYTES < found["forward"]["gigabytes"] + found["backward"]["gigabytes"] <= GIGABYTES
    assert found["input"]["launches"] <= 24 and found["input"]["waits"] == 0
