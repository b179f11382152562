"""`vitface.load` and the `Recogniser` that it returns: a face model and the methods that an application needs."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from vitface.config import Dtype, FaceConfig
from vitface.data.faces.detect import FaceDetector
from vitface.data.faces.photos import CropReader, Photo
from vitface.device import inference_dtype
from vitface.model.face import FaceModel
from vitface.model.inference import Crops, attend_crops, embed_batches, prepare_inference, route_crops, split
from vitface.store.faces import Checkpoint, open_checkpoint
from vitface.store.thresholds import Verdict, choose_threshold

Images = np.ndarray | Tensor | Sequence[Photo]


def load(
    path: str | Path,
    weights: str | Path | None = None,
    device: str | torch.device = "cpu",
    dtype: Dtype | None = None,
) -> "Recogniser":
    """The model of a run directory (its best checkpoint), of one checkpoint directory, or of a repository `owner/name`
    (`owner/name@revision`) on the Hugging Face Hub.

    `weights` names the frozen backbone's file; by default it is looked for where it was in training, then in the usual
    places. `dtype` is the precision of the frozen part; by default that of training, or "fp32" on a CPU on which that
    is faster. CheckpointError if the checkpoint is damaged or does not fit the backbone.
    """
    return Recogniser.from_checkpoint(open_checkpoint(path, weights), device, dtype)


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
        device, trained = torch.device(device), checkpoint.config
        dtype = dtype or inference_dtype(trained.dtype, device, trained.vit.embed_dim)
        return cls(checkpoint.load(dtype), checkpoint.thresholds).to(device)

    @property
    def config(self) -> FaceConfig:
        return self.model.config

    def to(self, device: str | torch.device) -> "Recogniser":
        """Moves the model; returns itself."""
        self.model.to(device)
        return self

    def prepare(self) -> "Recogniser":
        """Makes embedding faster (see `prepare_inference`) and returns itself. The model cannot be saved any more."""
        prepare_inference(self.model)
        return self

    def embed(
        self, images: Images, flip: bool = True, batch_size: int | None = None, align: bool | FaceDetector = False
    ) -> np.ndarray:
        """Aligned faces -> float32 (B, E), unit norm: uint8 (B, 112, 112, 3) RGB, or a list of paths, PIL images or
        uint8 (H, W, 3) arrays; square ones are resized.

        `align=True` is for photos: the face is found and aligned in every image that is not 112 x 112 pixels (see
        `vitface.data.faces.photos.CropReader`). `flip` sums the embeddings of the image and its mirror image before
        normalising, as the benchmarks' protocol does. `batch_size` is chosen for the device by default. ImageError
        names a file that cannot be used.
        """
        return embed_batches(self.model, self._batches(images, align, flip, batch_size), flip)[0]

    def verify(
        self, first: Photo, second: Photo, far: float | None = None, align: bool | FaceDetector = False
    ) -> Verdict:
        """Do two images, each a path, PIL image or uint8 (H, W, 3), show the same person?

        `far` is one of the calibrated false accept rates, by default the lowest; ConfigError for any other. Without
        thresholds the verdict has a score but no answer: `threshold`, `far` and `same` are None. `align` and the other
        errors are those of `embed`.
        """
        threshold = choose_threshold(self.thresholds, far)
        rows = self.embed([first, second], align=align)
        return Verdict(float(rows[0] @ rows[1]), *threshold)

    def domain_weights(self, images: Images, batch_size: int | None = None) -> np.ndarray:
        """The router's weights for each image, float32 (B, K), rows sum to one; ones (B, 1) for plain LoRA."""
        batches = self._batches(images, batch_size=batch_size)
        rows = [route_crops(self.model, batch).cpu().numpy() for batch in batches]
        return np.concatenate(rows) if rows else np.zeros((0, self.config.num_domains), np.float32)

    def attention(self, images: Images, block: int = -1) -> np.ndarray:
        """The attention of CLS in one block of the adapted model: float32 (B, nh, g, g) over the patch grid."""
        rows = [attend_crops(self.model, batch, block).cpu().numpy() for batch in self._batches(images)]
        side, heads = self.config.vit.grid(self.config.image_size), self.config.vit.num_heads
        return np.concatenate(rows) if rows else np.zeros((0, heads, side, side), np.float32)

    def _batches(
        self, images: Images, align: bool | FaceDetector = False, flip: bool = False, batch_size: int | None = None
    ) -> Iterator[Crops]:
        """The images as crops, in batches."""
        if isinstance(images, str | Path):
            raise TypeError(f"images must be a list, even of one: [{str(images)!r}]")
        as_crop = CropReader(align)
        for batch in split(self.model, images, flip, batch_size):
            yield batch if isinstance(batch, Tensor) else np.stack([as_crop(image) for image in batch])
