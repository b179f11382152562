"""The fused operations in training: the same curve as that of the formulas."""

import json

import pytest
import torch
from safetensors.torch import load_file

from vitface.__main__ import main
from vitface.kernels import fused
from vitface.model import ops


@pytest.mark.slow
def test_fused_and_reference_train_alike(tmp_path, monkeypatch):
    """100 steps of the demo: the loss curves stay within 1 %, the adapters within 2 % of their size."""
    adapters, losses = {}, {}
    for name, module in (("reference", ops), ("fused", fused)):
        monkeypatch.setattr("vitface.model.face.fused", module)
        run_dir = tmp_path / name
        flags = ["--exp", "demo", "--dtype", "fp32", "--batch-size", "32", "--max-samples", "1600"]
        assert main(["train", *flags, "--epochs", "2", "--save-dir", str(run_dir)]) == 0
        tensors = load_file(run_dir / "checkpoints" / "last" / "model.safetensors")
        adapters[name] = torch.cat([tensors[key].flatten() for key in sorted(tensors) if "lora_" in key])
        losses[name] = [json.loads(line)["loss"] for line in (run_dir / "log.jsonl").read_text().splitlines()]
    assert len(losses["fused"]) == 12 and losses["fused"] != losses["reference"]
    torch.testing.assert_close(*(torch.tensor(losses[name]) for name in ("fused", "reference")), rtol=0.01, atol=0)
    difference = (adapters["fused"] - adapters["reference"]).norm() / adapters["reference"].norm()
    assert 0 < difference < 0.02
