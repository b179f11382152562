"""Tensors in safetensors files, which are checked before they are used."""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from vitface.errors import CheckpointError
from vitface.files import open_regular

MAX_HEADER_BYTES = 1 << 20


def tensor_bytes(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """A safetensors file's contents, for `vitface.files`: safetensors' own writer does not fsync."""
    return save({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, metadata)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file from anybody; CheckpointError if it is damaged or has a header of over 1 MB."""
    try:
        with open_regular(path) as file:
            header = int.from_bytes(file.read(8), "little")
        if header > MAX_HEADER_BYTES:
            raise CheckpointError(f"{path}: damaged, or not ours: its header claims {header:,} bytes")
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: damaged ({error})") from None


def read_tensors(path: Path, expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """`load_tensors`; CheckpointError unless names, shapes and dtypes are those of `expected`, and all are finite."""
    tensors = load_tensors(path)
    fault = first_fault(tensors, expected, exact_dtype=True)
    if fault:
        raise CheckpointError(f"{path}: {fault}; it is not of the model that its settings describe")
    return tensors


def first_fault(tensors: dict[str, Tensor], expected: dict[str, Tensor], exact_dtype: bool) -> str | None:
    """The first tensor that is missing, unknown, not finite, or of a wrong shape or dtype; None if all are right."""
    for key in sorted(expected.keys() ^ tensors.keys()):
        return f"{'missing' if key in expected else 'unknown'} tensor {key}"
    for key, tensor in tensors.items():
        want = expected[key]
        same_kind = tensor.is_floating_point() == want.is_floating_point() and tensor.itemsize > 1  # no float8
        if tensor.shape != want.shape or not (tensor.dtype == want.dtype if exact_dtype else same_kind):
            return f"{key} is {tensor.dtype} {tuple(tensor.shape)}, expected {want.dtype} {tuple(want.shape)}"
        if not tensor.isfinite().all():
            return f"{key} has NaN or infinite values"
    return None
