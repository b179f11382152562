"""What the tests share: where real data lies, tiny models, single-threaded exactness."""

import dataclasses
import importlib
import json
import os
import signal
import warnings
from pathlib import Path
from types import ModuleType, SimpleNamespace

if "PYTEST_XDIST_WORKER" in os.environ:  # one core each, what a test starts included; read when numpy and torch load
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from hypothesis import settings
from torch.utils._python_dispatch import TorchDispatchMode

from vitface.config import FaceConfig
from vitface.evaluation import benchmarks
from vitface.model.face import FaceModel
from vitface.model.vit import ViT, init_weights
from vitface.presets import VIT_PRESETS, ViTConfig
from vitface.recogniser import Recogniser
from vitface.store.backbone import load_backbone, save_backbone
from vitface.store.faces import open_checkpoint, trained_tensors
from vitface.store.thresholds import THRESHOLDS_FILE
from vitface.training.runs.checkpoint import save_checkpoint

settings.register_profile("default", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("default")
torch.set_num_threads(1)  # for what several tests share; see `threads`

signal.signal(signal.SIGINT, signal.default_int_handler)  # which a script that starts the tests with & has them ignore

TEST_DATA = Path(os.environ.get("VITFACE_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))


def optional(name: str) -> ModuleType:
    """A package that not every machine has, imported; where that fails, for any reason, the test or file is skipped."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except Exception as error:
        pytest.skip(f"{name} cannot be imported ({type(error).__name__}: {error})", allow_module_level=True)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config) -> int | None:
    """One process, 0 workers, for single files, which end before a second one has loaded torch, and for a GPU. For all
    else as many as xdist finds cores for."""
    files = all(Path(argument.split("::")[0]).is_file() for argument in config.args)
    return 0 if files or config.option.markexpr == "gpu" else None


PAIRS = 60


@pytest.fixture
def few_pairs(monkeypatch):
    """The benchmark "synthetic" has PAIRS pairs."""
    benchmarks._synthetic_benchmark.cache_clear()
    monkeypatch.setitem(benchmarks.BENCHMARKS, "synthetic", benchmarks.Benchmark("synthetic", PAIRS))
    yield
    benchmarks._synthetic_benchmark.cache_clear()


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """What a test fetches or packs stays out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VITFACE_HOME", str(tmp_path_factory.getbasetemp() / "vitface-home"))
        yield


@pytest.fixture(autouse=True)
def threads(request):
    """One thread, so that sums are added in one order; full-size runs take all that no other worker has."""
    alone = "PYTEST_XDIST_WORKER" not in os.environ and request.node.get_closest_marker("slow")
    torch.set_num_threads(os.cpu_count() or 1 if alone else 1)
    yield
    torch.set_num_threads(1)


@pytest.fixture
def ran(record_property):
    """`ran(row, count)` notes how many cases of a row of docs/reliability.md were run; printed at the end."""
    return record_property


def pytest_terminal_summary(terminalreporter):
    for report in terminalreporter.getreports("passed"):
        for row, count in report.user_properties:
            terminalreporter.write_line(f"reliability: {count:>6,} x {row}")


@pytest.fixture
def real_data():
    """The folder of real faces and weights; the test is skipped where it is absent."""
    if not TEST_DATA.is_dir():
        pytest.skip(f"real data is not at {TEST_DATA}; set VITFACE_TEST_DATA")
    return TEST_DATA


def tiny_config(**changes) -> ViTConfig:
    """DINOv2-shaped, 2 blocks of width 16 at 4 x 4 patches of 8 pixels, unless changed."""
    small = dict(native_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2)
    return dataclasses.replace(VIT_PRESETS["dinov2_vits14"], **{**small, **changes})


def tiny_vit(image_size: int = 32, seed: int = 0, **changes) -> ViT:
    vit = ViT(tiny_config(**changes), image_size)
    init_weights(vit, seed)
    with torch.no_grad():  # attention and MLP large enough that every part moves the output
        for parameter in vit.blocks.parameters():
            parameter.mul_(5 if parameter.dim() > 1 else 1)
    return vit.eval()


def tiny_face(seed: int = 0, **changes) -> FaceModel:
    """A tiny face model in eval mode; `changes` go to its FaceConfig."""
    vit = tiny_vit()
    fields = dict(lora_rank=4, lora_alpha=8, head="bn", embedding_dim=8, router_depth=1)
    config = FaceConfig("dinov2_vits14", "random", vit.config, 32, **{**fields, **changes})
    return FaceModel(vit, config, seed=seed).eval()


def tiny_recogniser(seed: int = 0, **changes) -> Recogniser:
    """`tiny_face` as `vitface.load` would give it, each of its adapters with a say."""
    model = tiny_face(seed, **changes)
    randomise_adapters(model)
    return Recogniser(model)


@pytest.fixture
def tiny_run(tmp_path, monkeypatch):
    """A run directory with a trained-looking tiny DA-LoRA model of three domains and thresholds 0.2 and 0.6."""
    monkeypatch.setitem(VIT_PRESETS, "tiny", tiny_config())
    vit = load_backbone("tiny", "random", 32)
    config = FaceConfig(
        "tiny", "random", vit.config, 32, lora_rank=4, num_domains=3, router_depth=1, head="bn", embedding_dim=8
    )
    model = FaceModel(vit, config).eval()
    randomise_adapters(model)
    run = tmp_path / "runs" / "tiny"
    save_checkpoint(run, 7, trained_tensors(model), dataclasses.asdict(config), {}, {}, is_best=True)
    write_thresholds(run, {"0.01": {"threshold": 0.2, "tar": 0.9}, "0.001": {"threshold": 0.6, "tar": 0.5}})
    return run


def write_thresholds(run: Path, thresholds: dict) -> None:
    """Those of a run, as if it had calibrated them."""
    pairs = {"same": 9, "different": 30_000}
    written = {"model": open_checkpoint(run).sha256, "pairs": pairs, "thresholds": thresholds}
    (run / THRESHOLDS_FILE).write_text(json.dumps(written))


def randomise_adapters(model: torch.nn.Module, seed: int = 0) -> None:
    """Gives every adapter a random B, as training would; a fresh one is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_b"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.1)


@pytest.fixture
def tiny_preset(monkeypatch):
    """A preset "tiny" of a 2-block ViT."""
    for module in ("vitface.presets", "vitface.store.backbone"):
        monkeypatch.setitem(__import__(module, fromlist=["x"]).VIT_PRESETS, "tiny", tiny_config())


@pytest.fixture
def backbone(tmp_path, tiny_preset):
    """A file of the tiny preset, and the ViT it was saved from."""
    vit = tiny_vit(seed=3)
    save_backbone(tmp_path / "tiny.safetensors", "tiny", vit.config, vit.state_dict(), {"file": "x", "licence": "none"})
    return tmp_path / "tiny.safetensors", vit


@pytest.fixture
def uploaded(monkeypatch):
    """What the Hub is given."""
    huggingface_hub = optional("huggingface_hub")
    given = {}

    class Api:
        private = True

        def create_repo(self, repository, private, exist_ok, **kind):
            assert private and exist_ok
            return f"https://huggingface.co/{repository}"

        def repo_info(self, repository, **kind):
            return SimpleNamespace(private=self.private)

        def create_commit(self, repository, operations, commit_message, **kind):
            given.update({op.path_in_repo: op.path_or_fileobj for op in operations})

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    return given


class Largest(TorchDispatchMode):
    """The most elements that any operation inside returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for item in out if isinstance(out, tuple | list) else [out]:
            own = isinstance(item, torch.Tensor) and not (item._is_view() and func.is_view)
            self.numel = max(self.numel, item.numel() if own else 0)
        return out
