"""The benchmarks for a GPU run on the CPU, too, on tiny sizes, and their arithmetic is right."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_vit
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vitface.config import VIT_PRESETS, FaceConfig
from vitface.model import ops
from vitface.model.face import FaceModel
from vitface.model.lora import adapted_linears

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import ceilings  # noqa: E402
import embed  # noqa: E402
import end_to_end  # noqa: E402
import flops  # noqa: E402
import sweep  # noqa: E402
import timing  # noqa: E402
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
    model.use_router(None if domains == 1 else _Constant(domains))
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


class _Constant(torch.nn.Module):
    def __init__(self, domains):
        super().__init__()
        self.domains = domains

    def forward(self, tokens, blocks):
        logits = tokens.new_zeros(len(tokens), self.domains)
        return logits.softmax(1), logits


def test_a_vit_s_has_the_known_number_of_operations():
    """timm gives 5.52 G for ViT-S/14 at 224 px, without attention's two products; the last block can spare most."""
    vit = VIT_PRESETS["dinov2_vits14"]
    config = FaceConfig("dinov2_vits14", "random", vit, 224, head="patches")
    attention = 12 * 2 * 257**2 * 384
    assert flops.forward_and_step(config)[0] - attention == pytest.approx(5.52e9, rel=2e-3)
    spared = 9 * 256 * 384**2 + 2 * 256 * 257 * 384
    cls = flops.forward_and_step(dataclasses.replace(config, head="cls"))[0]
    assert flops.forward_and_step(config)[0] - cls == spared


def test_the_report_has_shares_and_memory():
    rates = {"vitface": [10.0, 20.0, 30.0], "timm": [5.0, 10.0, 15.0]}
    text = timing.report(rates, {"peers": ["timm"]}, 80.0, {"vitface": 1.5})
    found = json.loads(text.splitlines()[-1])
    assert (found["ceiling_share"], found["peak_gb"], found["ratio_to_fastest_peer"]) == (0.25, 1.5, 2.0)
    assert "25.0%   1.5" in text and "12.5%" in text
    assert torch.cuda.is_available() or timing.peak_memory({"a": lambda: None}) == {}


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_both_benchmarks_of_a_sweep(capsys, monkeypatch, dtype):
    monkeypatch.setitem(ceilings.SIDE, "cpu", 64)  # few processors multiply in fp16, the others take a minute for 1024
    flags = ["--backbone", "vit_nano", "--image-size", "112", "--batch-size", "2", "--repetitions", "1"]
    flags += ["--device", "cpu", "--dtype", dtype, "--peers", "none", "--no-compiled"]
    embed.main([*flags, "--runtimes", "none"])
    assert last_line(capsys)["vitface"] > 0
    train_step.main([*flags, "--adapter", "dalora", "--domains", "2"])
    found = last_line(capsys)
    assert found["vitface"] > 0 and found["ceiling_share"] > 0 and found["ratio_to_fastest_peer"] is None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_end_to_end(capsys):
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
