"""Face models on disk: each has every setting needed to run it, and is checked when it is loaded.

A face model is a checkpoint directory: what was trained (adapters, router, head), its `FaceConfig`, and a manifest of
SHA-256 sums. The frozen backbone stays in its own file, which is found by its SHA-256. A checkpoint is in a run's
`checkpoints/`, or it is a bundle, a folder of its own that was published, imported or merged, with its thresholds.
"""

import dataclasses
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitface.config import Dtype, FaceConfig
from vitface.errors import CheckpointError, WeightsError, command, expect, is_path, printable
from vitface.files import identify_file, json_bytes, read_json, sha256_bytes, sha256_file
from vitface.model.face import FaceModel
from vitface.model.vit import ViT
from vitface.presets import VIT_ALIASES, VIT_PRESETS, backbone_name
from vitface.store import hub
from vitface.store.backbone import (
    backbone_files,
    contents_sha256,
    find_backbone,
    load_backbone,
    read_backbone,
    weights_sha256,
)
from vitface.store.settings import face_config, read_config
from vitface.store.tensors import read_tensors
from vitface.store.thresholds import THRESHOLDS_FILE, read_calibration

MODEL_FILES = ("model.safetensors", "model.json")  # what inference needs, and all that may be shared
MANIFEST_FILE = "manifest.json"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A face model on disk, whose files are undamaged, and what is recorded about it.

    `path` is what the user named; `folder` holds the model files, which `manifest` describes; `run` is the run
    directory around it, None for a bundle. `weights` is the backbone's file, if the user named one.
    """

    path: Path
    folder: Path
    run: Path | None
    manifest: dict[str, Any]
    config: FaceConfig
    weights: str | Path | None = None

    @property
    def sha256(self) -> str:
        """The SHA-256 of the trained tensors, which identifies the model in scores, thresholds and galleries."""
        return self.manifest["files"]["model.safetensors"]["sha256"]

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Those of the run, {} without one or, with a note, if they are damaged: the model needs none of them."""
        run = self.run
        return {} if run is None else _or_note(lambda: read_config(run)) or {}

    @property
    def thresholds_file(self) -> Path | None:
        """Where its thresholds are, or would be; None for a model without a file."""
        return (self.run or self.folder) / THRESHOLDS_FILE

    @property
    def calibration(self) -> dict[str, Any] | None:
        """`read_calibration` of this model; CheckpointError if it is damaged."""
        file = self.thresholds_file
        return None if file is None else read_calibration(file.parent, self.sha256, file.name)

    @cached_property
    def thresholds(self) -> dict[float, float]:
        """{FAR: cosine} that were calibrated for this model; empty if there are none or, with a note, if damaged."""
        entries = (_or_note(lambda: self.calibration) or {}).get("thresholds", {})
        return {float(far): entry["threshold"] for far, entry in entries.items()}

    @property
    def is_best(self) -> bool:
        """True for the best checkpoint of a run, also under the name `best`."""
        if self.run is None or not step_directories(self.run):
            return False
        best = best_checkpoint(self.run).resolve()
        return self.folder.name in (best.name, "best") and self.manifest == read_manifest(best, ())

    @cached_property
    def backbone(self) -> str | Path:
        """The file of the frozen backbone that the model was trained on, "random" if there is none.

        It is looked for in `weights`; without them beside the checkpoint, where it was when the run started, and in
        `backbone_files`. CheckpointError if none of the files found is the right one, WeightsError if none is found.
        """
        config, recorded = self.config, self.settings.get("weights")
        if config.weights_sha256 == "random":
            return "random"
        beside = self.folder / f"{config.backbone}.safetensors"
        usual = [beside, *([Path(recorded)] if recorded else [])]
        found = [*filter(Path.is_file, usual), *backbone_files(config.backbone)]
        if not found and not self.weights and not recorded:
            find_backbone(config.backbone)  # which says how to fetch it
        places = [Path(self.weights)] if self.weights else [*dict.fromkeys([*usual[1:], *found])]
        contents = self.manifest.get("backbone_sha256")
        for path in filter(Path.is_file, places):
            if sha256_file(path) == config.weights_sha256 or (contents and contents_sha256(path) == contents):
                return path
        seen = "".join(f"\n  {path}: {'another file' if path.is_file() else 'not there'}" for path in places)
        raise CheckpointError(
            f"{self.path} was trained on a {config.backbone} file with sha256 {config.weights_sha256[:16]}..., which "
            f"was not found:{seen}\nname the right file with --weights FILE"
        )

    def load(self, dtype: Dtype | None = None) -> FaceModel:
        """The model in eval mode, on the CPU; `dtype` runs its frozen part in another precision than the stored one.

        CheckpointError if the tensors or the backbone do not fit the settings, and the errors of `backbone`.
        """
        config = self.config if dtype is None else dataclasses.replace(self.config, dtype=dtype)
        vit = load_backbone(config.backbone, self.backbone, config.image_size)
        if vit.config != config.vit:
            raise CheckpointError(f"{self.path}: model.json describes another {config.backbone} than the backbone file")
        # read before the model is built: a stranger's settings may ask for more memory than the file has
        tensors = read_tensors(self.folder / "model.safetensors", trained_tensors(meta_model(config)))
        model = FaceModel(vit, config)
        model.load_state_dict(tensors, strict=False)  # without the frozen ones
        return model.eval()


class FrozenBackbone(Checkpoint):
    """A backbone as a face model of which nothing was trained: the embedding is what its own pool makes."""

    @property
    def thresholds_file(self) -> Path | None:
        return None if self.weights == "random" else self.folder / f"{self.config.backbone}.thresholds.json"

    @cached_property
    def backbone(self) -> str | Path:
        assert self.weights is not None
        return self.weights

    def load(self, dtype: Dtype | None = None) -> FaceModel:
        return frozen_face(self.config.backbone, self.weights, self.config.image_size, dtype or self.config.dtype)


def open_backbone(name: str, weights: str | Path | None = None, image_size: int | None = None) -> FrozenBackbone:
    """The frozen backbone of a preset or alias as a model; the arguments are those of `load_backbone`, whose errors it
    has too."""
    name = backbone_name(name)
    file = find_backbone(name) if weights is None else weights
    vit = VIT_PRESETS[name] if file == "random" else read_backbone(Path(file), tensors=False)[1]
    image_size = image_size or vit.usual_size
    vit.grid(image_size)  # an error for a size that cannot be
    config = frozen_config(FaceConfig(name, weights_sha256(name, file), vit, image_size))
    digest = sha256_bytes(json_bytes(dataclasses.asdict(config)))
    manifest = {"files": {"model.safetensors": {"sha256": digest}}}
    return FrozenBackbone(Path(name), Path(file).parent, None, manifest, config, file)


def open_checkpoint(path: str | Path, weights: str | Path | None = None) -> Checkpoint:
    """The checkpoint that `path` names: a run directory (its best), one step directory of it, a bundle, or a repository
    `hf://owner/name` (`hf://owner/name@revision`) on the Hugging Face Hub; or a frozen backbone, by its name or its
    converted file.

    CheckpointError if `path` is none of these, if a file is missing or damaged, or if no model can have the settings.
    """
    expect(is_path(path), "the path of a model", path, "that of a run or a checkpoint, or hf://owner/name")
    expect(weights is None or is_path(weights), "weights", weights, "the path of the backbone's file, or None")
    path = Path(path).expanduser()
    if not path.exists() and str(path) in (*VIT_PRESETS, *VIT_ALIASES):
        return open_backbone(str(path), weights)
    if path.suffix == ".safetensors":
        with suppress(WeightsError):
            return open_backbone(read_backbone(path, tensors=False)[0], path)
    folder = hub.download(path) if hub.is_repository(path) else path
    if (folder / "checkpoints").is_dir():
        folder = best_checkpoint(folder)
    _check_level(folder)
    if not any((folder / name).exists() for name in (*MODEL_FILES, MANIFEST_FILE)):
        hubs = hub.REPOSITORY.fullmatch(path.as_posix()) and not folder.exists()
        on_hub = f", or, for a model on the Hub, write hf://{path}" if hubs else ""
        other = None if folder.is_dir() else identify_file(folder)
        fault = f"{folder} is {f'{other[0]}, ' if other else ''}neither a run directory nor a checkpoint"
        raise CheckpointError(f"{fault}; train one with vitface train{on_hub}")
    folder = folder.resolve()
    manifest, config = read_manifest(folder, MODEL_FILES), read_face_config(folder)
    run = folder.parent.parent if folder.parent.name == "checkpoints" else None
    return Checkpoint(path, folder, run, manifest, config, weights)


def _or_note(read: Callable[[], Any]) -> Any:
    """What `read` returns; None if that is damaged, which a note on stderr says."""
    try:
        return read()
    except (CheckpointError, OSError) as error:
        print(f"note: {printable(str(error))}", file=sys.stderr)
        return None


def _check_level(folder: Path) -> None:
    """CheckpointError, which says what to name instead, for the folder of several runs, or of a run's checkpoints."""
    if is_checkpoint(folder):
        return
    if folder.name == "checkpoints" and step_directories(folder.parent):
        raise CheckpointError(f"{folder} holds the checkpoints of a run; name the run, {folder.parent}, or one of them")
    below = sorted(str(path.parent) for kind in ("checkpoints", "model.json") for path in folder.glob(f"*/{kind}"))
    if below:
        more = ", ..." * (len(below) > 5)
        raise CheckpointError(f"{folder} is no model, but a folder of some; name one: {', '.join(below[:5])}{more}")


def step_directories(run: Path) -> list[Path]:
    """The run's checkpoints step-N, newest first, verified or not."""
    found = [path for path in (run / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(found, key=lambda path: -int(path.name[5:]))


def best_checkpoint(run: Path) -> Path:
    """The newest checkpoint that was the best when it was saved, without any the newest; no link is followed.

    CheckpointError if there is none, or if the manifest of a newer one is damaged, which may have been the best.
    """
    steps = step_directories(run)
    if not steps:
        again = command("train", "--save-dir", run, "--resume", "auto")
        raise CheckpointError(f"{run} has no checkpoint step-N yet; train on with\n  {again}")
    return next((step for step in steps if read_manifest(step, ()).get("is_best")), steps[0])


def is_checkpoint(path: Path) -> bool:
    """True for a checkpoint directory, even a damaged one; False for a run."""
    return (path / MANIFEST_FILE).is_file()


def read_manifest(folder: Path, files: tuple[str, ...]) -> dict[str, Any]:
    """The manifest of a checkpoint directory, {"files": {name: {"size", "sha256"}}, ...}.

    CheckpointError unless these `files` are there and unchanged since it was written.
    """
    try:
        manifest = {**read_json(folder / MANIFEST_FILE)}
        for name in files:
            file, sealed = folder / name, manifest["files"][name]
            if file.stat().st_size != sealed["size"] or sha256_file(file) != sealed["sha256"]:
                raise CheckpointError(f"{file} is damaged: it differs from what {folder.name}/manifest.json sealed")
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} is not a whole checkpoint: no {Path(str(error.filename)).name}") from None
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{folder}/manifest.json is damaged") from None
    return manifest


def read_face_config(folder: Path) -> FaceConfig:
    """The settings of a checkpoint directory; CheckpointError if they cannot be those of a model."""
    try:
        return face_config(read_json(folder / "model.json"))
    except (TypeError, KeyError, ValueError) as error:
        raise CheckpointError(f"{folder}/model.json was not written by this version of vitface ({error})") from None


def meta_model(config: FaceConfig) -> FaceModel:
    """A model on the meta device: it has the names, shapes and dtypes of its tensors, but takes no memory."""
    with torch.device("meta"):
        return FaceModel(ViT(config.vit, config.image_size), config)


def trained_tensors(model: FaceModel) -> dict[str, Tensor]:
    """The tensors of a checkpoint, by state-dict name: all but the frozen parameters of the backbone."""
    frozen = {f"vit.{name}" for name, parameter in model.vit.named_parameters() if not parameter.requires_grad}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in frozen}


def load_trained(model: FaceModel, path: Path) -> None:
    """Loads model.safetensors into its model; the errors of `read_tensors`, which leave the model unchanged."""
    model.load_state_dict(read_tensors(path, trained_tensors(model)), strict=False)  # the frozen ones are not in it


def frozen_face(
    name: str, weights: str | Path | None = None, image_size: int | None = None, dtype: Dtype = "fp32"
) -> FaceModel:
    """The frozen backbone as a face model: the embedding is what its own pool makes, such as the CLS token."""
    vit = load_backbone(name, weights, image_size)
    name, digest = backbone_name(name), weights_sha256(backbone_name(name), weights)
    return FaceModel(vit, frozen_config(FaceConfig(name, digest, vit.config, vit.image_size, dtype=dtype))).eval()


def frozen_config(config: FaceConfig) -> FaceConfig:
    """The settings of `frozen_face` for the backbone, the image size and the dtype of a model's settings."""
    vit = config.vit
    return FaceConfig(
        config.backbone, config.weights_sha256, vit, config.image_size, embedding_dim=vit.output_dim, dtype=config.dtype
    )
