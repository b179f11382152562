"""`vitface.load` and the `Recogniser` that it returns: a face model and the methods that an application needs."""

import io
import itertools
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Set
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vitface.config import Dtype, FaceConfig
from vitface.data.faces.detect import REMARKS, FaceDetector
from vitface.data.faces.photos import CropReader, Photo
from vitface.data.images import CROP_SIZE
from vitface.data.quality import crop_quality
from vitface.device import DTYPES, inference_dtype, known_device
from vitface.errors import CheckpointError, ConfigError, ImageError, expect, in_one_line, is_whole
from vitface.model.face import FaceModel
from vitface.model.inference import Crops, attend_crops, embed_batches, prepare_inference, route_crops, split
from vitface.store.faces import Checkpoint, open_checkpoint
from vitface.store.thresholds import Verdict, choose_threshold

Images = np.ndarray | Tensor | Iterable[Photo]
SHOWN = 3  # photos that a warning names
Align = bool | FaceDetector | None


def load(
    path: str | Path,
    weights: str | Path | None = None,
    device: str | torch.device = "cpu",
    dtype: Dtype | None = None,
) -> "Recogniser":
    """The model of a run directory (its best checkpoint), of one checkpoint directory, or of a repository
    `hf://owner/name` (`hf://owner/name@revision`) on the Hugging Face Hub.

    `weights` names the frozen backbone's file; by default it is looked for where it was in training, then in the usual
    places. `dtype` is the precision of the frozen part; by default that of training, or "fp32" on a CPU on which that
    is faster. The model is prepared for embedding, as by the commands (see `Recogniser.prepare`): one to train or save
    is `vitface.store.faces.open_checkpoint(path).load()`. CheckpointError if the checkpoint is damaged or does not fit
    the backbone; ConfigError for a `device` that is neither a CPU nor a CUDA GPU, and other arguments that cannot be.
    """
    device = known_device(device)  # before anything is read
    return Recogniser.from_checkpoint(open_checkpoint(path, weights), device, dtype).prepare()


class Recogniser:
    """A `FaceModel` in eval mode with its `thresholds` {FAR: cosine}, empty where nothing was calibrated.

    At that false accept rate, two embeddings are of the same person if their cosine reaches the threshold.
    """

    def __init__(self, model: FaceModel, thresholds: Mapping[float, float] = MappingProxyType({})):
        self.model = model
        self.thresholds = dict(thresholds)

    @classmethod
    def from_checkpoint(
        cls, checkpoint: Checkpoint, device: str | torch.device = "cpu", dtype: Dtype | None = None
    ) -> "Recogniser":
        """The model of an open checkpoint, see `load`."""
        expect(dtype is None or str(dtype) in DTYPES, "dtype", dtype, f"one of {', '.join(DTYPES)}, or None")
        device, trained = known_device(device), checkpoint.config
        dtype = dtype or inference_dtype(trained.dtype, device, trained.vit.embed_dim)
        return cls(checkpoint.load(dtype), checkpoint.thresholds).to(device)

    @property
    def config(self) -> FaceConfig:
        return self.model.config

    def __repr__(self) -> str:
        config, domains = self.config, self.config.num_domains
        kind = "frozen" if not config.lora_rank else "LoRA" if domains == 1 else f"DA-LoRA x {domains}"
        rates = ", ".join(f"{far:g}" for far in sorted(self.thresholds))
        sizes = f"{config.image_size} px -> {config.embedding_dim} numbers"
        return f"<Recogniser: {config.backbone}, {kind}, {sizes}, thresholds at FAR {rates or '(none)'}>"

    def __getstate__(self) -> dict:
        """What pickle and copy take. ConfigError for a model that was prepared: its weights have no other form."""
        if any(parameter.is_mkldnn for parameter in self.model.parameters()):
            raise ConfigError("a model prepared for the CPU cannot be copied or sent to a process; load it again there")
        return self.__dict__

    def to(self, device: str | torch.device) -> "Recogniser":
        """Moves the model; returns itself. ConfigError for one that was prepared for the CPU."""
        device = known_device(device)
        if any(parameter.is_mkldnn for parameter in self.model.parameters()) and device.type != "cpu":
            raise ConfigError(
                f"this model is prepared for the CPU; load it there: vitface.load(..., device={str(device)!r})"
            )
        self.model.to(device)
        return self

    def prepare(self) -> "Recogniser":
        """Makes embedding faster (see `prepare_inference`) and returns itself. The model cannot be saved any more."""
        prepare_inference(self.model)
        return self

    def embed(
        self, images: Images, flip: bool = True, batch_size: int | None = None, align: Align = None
    ) -> np.ndarray:
        """Images -> float32 (B, E), unit norm.

        `images` is an array or tensor, uint8 (B, 112, 112, 3) RGB, or any iterable of paths, encoded bytes, PIL images
        and uint8 (H, W, 3) arrays, which is read batch by batch.

        `align=None`, as the commands: in each path, bytes or PIL image that is not 112 x 112 pixels the face is found
        and aligned; arrays are aligned faces, square ones are resized. True: also in arrays; a FaceDetector: by this
        one; False: all are aligned faces (see `vitface.data.faces.photos.CropReader`).

        `flip` sums the embeddings of the image and its mirror image before normalising, as the benchmarks' protocol
        does. `batch_size` is chosen for the device by default. ImageError names an image that cannot be used, TypeError
        what is none; ConfigError for other arguments that cannot be; CheckpointError if an embedding is not of unit
        norm (NaN, 0), and so compares with nothing. A warning names photos in which several faces were found, that were
        turned upright or that end close to the face.
        """
        return self._rows(images, align, flip, batch_size)

    def _rows(self, images: Images, align: Align, flip: bool = True, batch_size: int | None = None) -> np.ndarray:
        expect(isinstance(flip, bool | np.bool_), "flip", flip, "True or False")
        rows = embed_batches(self.model, self._batches(images, align, flip, batch_size, frames=5), flip)[0]
        if not (np.abs(np.linalg.norm(rows, axis=1) - 1) < 0.01).all():  # NaN is not smaller either
            raise CheckpointError("the model gives NaN or 0 for an image, no embedding: it is damaged, or misleads")
        return rows

    def verify(self, first: Photo, second: Photo, far: float | None = None, align: Align = None) -> Verdict:
        """Do two images, each a path, bytes, PIL image or uint8 (H, W, 3), show the same person?

        `far` is one of the calibrated false accept rates, by default the lowest; ConfigError for any other. Without
        thresholds the verdict has a score but no answer: `threshold`, `far` and `same` are None. `align` and the other
        errors are those of `embed`; an array that is taken for an aligned face without being 112 x 112 is warned of.
        """
        threshold = choose_threshold(self.thresholds, far)
        for image in (first, second):
            sides = tuple(image.shape[:2]) if isinstance(image, np.ndarray | Tensor) and image.ndim == 3 else (0, 1)
            if align is None and sides[0] == sides[1] != CROP_SIZE:
                text = f"an array of {sides[0]} x {sides[1]} pixels is taken for an aligned face"
                warnings.warn(f"{text}; align=True finds the face in it, align=False says that it is one", stacklevel=2)
        rows = self._rows([first, second], align)
        return Verdict(float(rows[0] @ rows[1]), *threshold)

    def quality(self, images: Images, batch_size: int | None = None, align: Align = None) -> np.ndarray:
        """How fine the detail of each image is, float32 (B,) in [0, 1]: about 0.8 for a good photo, below POOR (see
        `vitface.data.quality`) for one whose embedding says little, 0 without any detail. It is a function of the
        aligned face's pixels, the same for every model; it does not see whether there is a face, or how it is turned.
        `images` and `align` are those of `embed`."""
        rows = [crop_quality(batch).cpu().numpy() for batch in self._batches(images, align, batch_size=batch_size)]
        return np.concatenate(rows) if rows else np.zeros(0, np.float32)

    def domain_weights(self, images: Images, align: Align = None) -> np.ndarray:
        """The router's weights for each image, float32 (B, K), rows sum to one; ones (B, 1) for plain LoRA. `images`
        and `align` are those of `embed`."""
        rows = [*map(lambda batch: route_crops(self.model, batch).cpu().numpy(), self._batches(images, align))]
        return np.concatenate(rows) if rows else np.zeros((0, self.config.num_domains), np.float32)

    def attention(self, images: Images, block: int = -1, align: Align = None) -> np.ndarray:
        """The attention of CLS in one block of the adapted model: float32 (B, nh, g, g) over the patch grid. `images`
        and `align` are those of `embed`."""
        depth = self.config.vit.depth
        blocks = f"0 to {depth - 1}, or -1 for the last"
        expect(is_whole(block) and -depth <= block < depth, "block", block, blocks)
        batches = self._batches(images, align)
        rows = [*map(lambda batch: attend_crops(self.model, batch, block).cpu().numpy(), batches)]
        side, heads = self.config.vit.grid(self.config.image_size), self.config.vit.num_heads
        return np.concatenate(rows) if rows else np.zeros((0, heads, side, side), np.float32)

    def _batches(
        self, images: Images, align: Align = None, flip: bool = False, batch_size: int | None = None, frames: int = 3
    ) -> Iterator[Crops]:
        """The images as crops, in batches; warns at the end of those with REMARKS, where a method was called, `frames`
        above this one."""
        size = "a whole number from 1, or None"
        expect(batch_size is None or (is_whole(batch_size) and batch_size > 0), "batch_size", batch_size, size)
        reader, numbers, remarked = CropReader(align), itertools.count(), []
        for batch in split(self.model, _several(images), flip, batch_size):
            if isinstance(batch, Tensor):
                yield _checked(batch)
                continue
            crops = []
            for image, number in zip(batch, numbers, strict=False):
                where = str(image) if isinstance(image, str | os.PathLike) else f"image {number}"
                crop, _, remarks = reader.read(image, where)
                crops.append(crop)
                remarked += [in_one_line(f"{where}: {REMARKS[remark]}") for remark in remarks]
            yield np.stack(crops)
        if remarked:
            more = f"; and {len(remarked) - SHOWN:,} more photos" if remarked[SHOWN:] else ""
            warnings.warn("; ".join(remarked[:SHOWN]) + more, stacklevel=frames)


def _checked(crops: Tensor) -> Tensor:
    """The crops of a tensor; ImageError for any other."""
    if crops.dtype != torch.uint8:
        raise ImageError(f"images must be uint8, from 0 to 255, not {crops.dtype}")
    if crops.shape[1:] != (CROP_SIZE, CROP_SIZE, 3):
        cure = "images.permute(0, 2, 3, 1)" if crops.shape[1] == 3 else "a list of arrays may have other sizes"
        raise ImageError(f"images must be uint8 (B, 112, 112, 3), not {tuple(crops.shape)}: {cure}")
    return crops


def _several(images: Images) -> Images:
    """The images; TypeError for a single one, whose rows or bytes would be taken for images, and for those that have no
    order."""
    single = isinstance(images, str | bytes | bytearray | os.PathLike | Image.Image | Mapping | Set | io.IOBase)
    if isinstance(images, np.ndarray | Tensor):
        if images.ndim == 1 and isinstance(images, np.ndarray):
            return images.tolist()  # of paths
        single = images.ndim < 4
    if single or not isinstance(images, Iterable):
        kind = f"an array {tuple(images.shape)}" if isinstance(images, np.ndarray | Tensor) else type(images).__name__
        raise TypeError(f"images must be a list, even of one: [image]; this is {kind}")
    return images
