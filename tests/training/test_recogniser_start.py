"""Training that starts from a face recogniser: its head stays, the identity matrix starts at the people's means, and
what it knew is judged before and after.
"""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image

from vitface.config import FaceConfig, TrainConfig, resolve
from vitface.data.synthetic.worlds import SyntheticSamples
from vitface.errors import ConfigError
from vitface.model.face import FaceModel
from vitface.model.inference import embed_crops, prepare_inference
from vitface.model.margin import CosFace, MarginLoss
from vitface.model.vit import ViT, init_weights
from vitface.presets import VIT_PRESETS
from vitface.store.backbone import load_backbone, read_backbone, save_backbone
from vitface.store.faces import frozen_face, open_checkpoint, trained_tensors
from vitface.store.settings import read_epochs
from vitface.training.ranks.identities import ShardedMargin
from vitface.training.run import run
from vitface.training.start import put_prototypes, worse_than_frozen

RECOGNISER = dataclasses.replace(
    VIT_PRESETS["lvface_t"], patch_size=28, embed_dim=16, depth=2, num_heads=2, pool_dim=12, mlp_ratio=2.0
)
DRAWN = SyntheticSamples(12, 6)
NORMS = ("pool.norm1.running_mean", "pool.norm1.running_var", "pool.norm2.running_mean", "pool.norm2.running_var")


@pytest.fixture
def recogniser(tmp_path, monkeypatch):
    """lvface_t with 16 patches of width 16 and planted batch norms, in a file of $VITFACE_HOME."""
    monkeypatch.setitem(VIT_PRESETS, "lvface_t", RECOGNISER)
    monkeypatch.setenv("VITFACE_HOME", str(tmp_path / "home"))
    vit = ViT(RECOGNISER, 112)
    init_weights(vit, 3)
    state = {name: tensor * (5 if tensor.dim() > 1 else 1) for name, tensor in vit.state_dict().items()}
    generator = torch.Generator().manual_seed(1)
    state |= {name: torch.rand(state[name].shape, generator=generator) + 0.1 for name in NORMS}
    (tmp_path / "home").mkdir()
    file = tmp_path / "home" / "lvface_t.safetensors"
    save_backbone(file, "lvface_t", RECOGNISER, state, {"licence": "none"})
    return file


def settings(tmp_path, **changes) -> TrainConfig:
    given = dict(backbone="lvface_t", train_data=str(tmp_path / "people"), val_data=None, holdout_people=4, pack=False)
    given |= dict(batch_size=16, epochs=1, num_workers=0, device="cpu", dtype="fp32", lora_rank=2, augment="none")
    if not (tmp_path / "people").is_dir():
        for i, label in enumerate(DRAWN.labels):
            file = tmp_path / "people" / f"person-{label}" / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(DRAWN.read(i)).save(file)
    return resolve({**given, "save_dir": str(tmp_path / "run"), **changes})


def test_the_settings_follow_the_backbone():
    config = resolve({"backbone": "lvface_t"})
    assert (config.image_size, config.head, config.embedding_dim) == (112, "pretrained", 512)
    assert (config.lr, config.identity_lr, config.margin, config.scale, config.augment) == (2e-4, 1e-3, 0.1, 16, "flip")
    assert resolve({"backbone": "lvface_t", "margin": 0.3}).margin == 0.3
    assert resolve({"backbone": "lvface_t", "head": "linear"}).margin == resolve({"head": "pretrained"}).margin == 0.35
    assert (resolve({}).image_size, resolve({}).head) == (224, "patches")
    assert resolve({"backbone": "vit_nano"}).image_size == 112
    assert resolve({"backbone": "lvface_t", "head": "linear", "embedding_dim": 64}).embedding_dim == 64
    assert resolve({"head": "pretrained"}).embedding_dim == 384
    with pytest.raises(ConfigError, match="takes images of 112 px, not 224"):
        resolve({"backbone": "lvface_t", "image_size": 224})
    with pytest.raises(ConfigError, match="512 numbers, not --embedding-dim 64"):
        resolve({"backbone": "lvface_t", "embedding_dim": 64})
    for wrong in ({"backbone": "lvface_t", "head": "bn"}, {"head": "pretrained"}):
        with pytest.raises(ConfigError, match="--train-head trains the head that a backbone brings"):
            resolve({**wrong, "train_head": True})


@pytest.mark.parametrize("dalora", [False, True])
def test_a_run_starts_at_the_recogniser(dalora, recogniser, tmp_path, capsys):
    config = settings(tmp_path, use_dalora=dalora, num_domains=2, router_depth=1, lr=1e-8, identity_lr=1e-8)
    run(config, with_frozen=False)
    printed = capsys.readouterr().out
    assert "starts at the mean embeddings of 8 people" in printed
    epochs = read_epochs(tmp_path / "run")
    assert [row["epoch"] for row in epochs] == ["0", "1"]
    assert f"epoch 0/1  held-out AUC {float(epochs[0]['holdout_auc']):.4f}, of the frozen lvface_t" in printed
    assert float(epochs[0]["holdout_auc"]) == pytest.approx(float(epochs[1]["holdout_auc"]), abs=1e-4)
    checkpoint = open_checkpoint(tmp_path / "run")
    tensors = trained_tensors(checkpoint.load())
    assert all("lora_" in name or name.startswith("router.") for name in tensors)
    crops = np.stack([DRAWN.read(i) for i in range(4)])
    ours, frozen = (embed_crops(model, crops)[0] for model in (checkpoint.load(), frozen_face("lvface_t")))
    torch.testing.assert_close(ours, frozen, atol=1e-5, rtol=0)


def test_the_identity_matrix_starts_at_the_means(recogniser, tmp_path):
    """Against embeddings that are computed one by one."""
    from vitface.training.loop import Trainer
    from vitface.training.setup import resolve_choices
    from vitface.training.start import start_from_recogniser

    trainer = Trainer(resolve_choices(settings(tmp_path)), None)
    start_from_recogniser(trainer, None)
    data, frozen = trainer.data, frozen_face("lvface_t")
    for person in range(3):
        mine = data.split.indices[data.split.labels == person]
        mine = mine[:: -(-len(mine) // 10)]
        rows = torch.cat([embed_crops(frozen, data.samples.read(i)[None], flip=False)[0] for i in mine])
        want = torch.nn.functional.normalize(rows.sum(0), dim=0)
        torch.testing.assert_close(trainer.margin.weight[person].detach(), want, atol=1e-5, rtol=0)
    assert trainer.margin.weight.norm(dim=1).sub(1).abs().max() < 1e-5


@pytest.mark.parametrize("rate", [1.0, 0.5])
def test_prototypes_of_a_matrix_in_shards(rate):
    rows = torch.randn(7, 4)
    for margin in (MarginLoss(CosFace(0.3), 7, 4, 16.0), ShardedMargin(CosFace(0.3), 7, 4, 16.0, 0, rate)):
        put_prototypes(margin, rows)
        found = margin.weight if isinstance(margin, MarginLoss) or rate == 1 else margin.get_buffer("all_weight")
        assert torch.equal(found.detach(), rows)


def test_train_head_trains_the_pool_in_float32_and_saves_it(recogniser, tmp_path):
    run(settings(tmp_path, train_head=True, dtype="bf16", lr=1e-2), with_frozen=False)
    checkpoint = open_checkpoint(tmp_path / "run")
    model = checkpoint.load()
    trained = {name for name in trained_tensors(model) if "lora_" not in name}
    layers = {f"vit.pool.{name}" for name in ("fc1.weight", "fc2.weight")}
    norms = {f"vit.pool.norm{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")}
    assert trained == layers | norms
    frozen = read_backbone(recogniser)[2]
    for name, tensor in model.vit.pool.state_dict().items():
        assert tensor.dtype == torch.float32 and tensor.isfinite().all()
        same = torch.equal(tensor, frozen[f"pool.{name}"])
        assert same == ("running" in name), name
    assert model.vit.blocks[0].attn.qkv.weight.dtype == torch.bfloat16
    crops = torch.randint(0, 256, (3, 112, 112, 3), dtype=torch.uint8)
    before, _ = embed_crops(model, crops)
    after, _ = embed_crops(prepare_inference(checkpoint.load()), crops)
    assert (before * after).sum(1).min() > 0.999


def test_a_pool_that_is_trained_gets_gradients_and_others_none(recogniser):
    vit = load_backbone("lvface_t")
    config = FaceConfig("lvface_t", "x", vit.config, 112, lora_rank=2, embedding_dim=12, train_head=True, dtype="bf16")
    model = FaceModel(vit, config).train()
    model(torch.rand(2, 3, 112, 112) * 2 - 1).embedding.sum().backward()
    got = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert {"vit.pool.fc1.weight", "vit.pool.norm2.bias"} <= got
    assert not any("running" in name or name == "vit.norm.weight" for name in got)


def test_an_alarm_where_no_epoch_is_above_the_start():
    config = resolve({"backbone": "lvface_t"})

    def rows(*scores):
        return [{"epoch": str(epoch), "holdout_auc": str(score)} for epoch, score in enumerate(scores)]

    assert worse_than_frozen(config, rows(0.9, 0.8, 0.95)) is None and worse_than_frozen(config, rows(0.9)) is None
    assert "no epoch is above the frozen lvface_t" in (worse_than_frozen(config, rows(0.9, 0.8, 0.85)) or "")
    assert worse_than_frozen(config, [{"epoch": "1", "holdout_auc": ""}]) is None


def test_resumed_at_its_end_the_run_has_its_log_of_epoch_0_once(recogniser, tmp_path):
    run(settings(tmp_path), with_frozen=False)
    run(settings(tmp_path, resume="auto", epochs=2, allow_changed=True), with_frozen=False)
    assert [row["epoch"] for row in read_epochs(tmp_path / "run")] == ["0", "1", "2"]
    assert json.loads((tmp_path / "run" / "config.json").read_text())["head"] == "pretrained"
