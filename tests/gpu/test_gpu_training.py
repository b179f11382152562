"""Training with the fused layers: as on the CPU, without waiting for the GPU, in memory that does not grow."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from vitface.__main__ import main
from vitface.config import FaceConfig, resolve
from vitface.data.degrade import degrade, draw, parse_sensors
from vitface.kernels import fused
from vitface.model import ops
from vitface.model.face import FaceModel
from vitface.model.margin import MarginLoss, make_margin
from vitface.store.backbone import load_backbone
from vitface.training.batches import Batch
from vitface.training.step import total_loss

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def cuda():
    if not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")


def test_the_demo_trains_as_on_the_cpu(tmp_path, monkeypatch):
    """200 steps: the loss curves stay within 1 %, the adapters within 2 % of their size, as `fused` on the CPU does."""
    adapters, losses = {}, {}
    for device, module in (("cpu", ops), ("cuda", fused)):
        monkeypatch.setattr("vitface.model.face.fused", module)
        flags = ["--exp", "demo", "--dtype", "fp32", "--device", device, "--batch-size", "32"]
        run_dir = tmp_path / device
        with torch.backends.cudnn.flags(enabled=False):  # it would round the stem's pixels to TF32
            assert main(["train", *flags, "--max-samples", "3200", "--epochs", "2", "--save-dir", str(run_dir)]) == 0
        tensors = load_file(run_dir / "checkpoints" / "last" / "model.safetensors")
        adapters[device] = torch.cat([tensors[name].flatten() for name in sorted(tensors) if "lora_" in name])
        losses[device] = [json.loads(line)["loss"] for line in (run_dir / "log.jsonl").read_text().splitlines()]
    assert len(losses["cuda"]) == 22
    torch.testing.assert_close(*(torch.tensor(losses[device]) for device in ("cuda", "cpu")), rtol=0.01, atol=0)
    difference = (adapters["cuda"] - adapters["cpu"]).norm() / adapters["cpu"].norm()
    assert 0 < difference < 0.02


@pytest.fixture(params=[("dinov2_vits14", 1, "attn"), ("clip_vitb16", 3, "attn+mlp")], ids=lambda p: p[0])
def step(request):
    """One training step of a full-size model in bf16 on four images each time it is called; returns the loss."""
    backbone, domains, targets = request.param
    vit = load_backbone(backbone, "random", 224)
    face = FaceConfig(
        backbone,
        "random",
        vit.config,
        224,
        lora_rank=16,
        lora_targets=targets,
        num_domains=domains,
        head="linear",
        dtype="bf16",
    )
    model = FaceModel(vit, face).cuda().train()
    model.use_ops(fused)
    margin = MarginLoss(make_margin("cosface", 0.35), 100, face.embedding_dim, 64.0).cuda()
    trained = [p for module in (model, margin) for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    config = resolve({"backbone": backbone, "weights": "random", "use_dalora": domains > 1})
    images = torch.randn(4, 3, 224, 224, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    labels = torch.arange(4, device="cuda")

    def one():
        loss = total_loss(model, margin, Batch(images, labels, None, np.zeros(1, int)), config)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    for _ in range(3):
        one()
    torch.cuda.synchronize()
    return one


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_nothing_waits_for_the_gpu_within_a_step(step):
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert loss.isfinite()


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_sensors_do_not_wait_for_the_gpu():
    images = torch.rand(32, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    drawn = draw(parse_sensors("all"), 0, 0, np.arange(32))
    there = images.cuda()
    degrade(there, drawn)  # the constants are copied once
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = degrade(there, drawn)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(found.cpu(), degrade(images, drawn), rtol=0, atol=2 / 255)


def test_memory_does_not_grow_in_a_thousand_steps(step):
    def used():
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()

    loss = step()
    before = used()
    for _ in range(1000):
        loss = step()
    assert used() == before and loss.isfinite()


def test_recomputed_blocks_give_the_same_gradients():
    """`--memory-budget` runs a fused block a second time in the backward pass."""
    vit = load_backbone("vit_nano", "random", 112)
    face = FaceConfig("vit_nano", "random", vit.config, 112, lora_rank=16, num_domains=3, router_depth=1)
    model = FaceModel(vit, face).cuda().train()
    model.use_ops(fused)
    images = torch.randn(4, 3, 112, 112, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    trained = [p for name, p in model.named_parameters() if "lora_a" in name or "lora_b" in name]
    with torch.no_grad():
        for p in trained:
            p.normal_(std=0.05)
    dout = torch.randn(4, 128, device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    found = []
    for recomputed in (0, 2):
        model.vit.recompute(recomputed)
        found.append(torch.autograd.grad(model(images)[0], trained, dout))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-4 * one.abs().max().item())
