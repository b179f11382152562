"""The settings that model hubs store beside a file of weights: config.json, preprocessor_config.json, open_clip's."""

from pathlib import Path
from typing import Any

from vitface.errors import WeightsError
from vitface.files import read_json
from vitface.presets import ViTConfig

_ACTS = {  # transformers' names of activations
    "gelu": "gelu",
    "quick_gelu": "quick_gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu6": "relu6",
}
FILES = ("config.json", "preprocessor_config.json", "open_clip_config.json")


def settings_beside(src: Path, config: ViTConfig) -> tuple[dict[str, Any], list[str]]:
    """The settings of `ViTConfig` that files in the folder of `src` give, and the names of these files.

    Known are the activation, the norms' eps, mean and std. A file about a model of another width is passed over.
    """
    found: dict[str, Any] = {}
    names = []
    for name in FILES:
        path = src.parent / name
        if not path.is_file():
            continue
        try:
            given = _known(read_json(path), config)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise WeightsError(
                f"{path} is damaged ({error}); mend it, or move {src.name} to a folder of its own"
            ) from None
        if given:
            found |= given
            names.append(name)
    return found, names


def _known(settings: dict[str, Any], config: ViTConfig) -> dict[str, Any]:
    tower, clip = settings.get("vision_config", settings), settings.get("model_cfg", {})
    pixels = settings.get("preprocess_cfg", settings.get("pretrained_cfg", settings))
    widths = tower.get("hidden_size"), clip.get("vision_cfg", {}).get("width"), settings.get("num_features")
    if any(width not in (None, config.embed_dim) for width in widths):
        return {}
    found: dict[str, Any] = {}
    if clip:
        found["act"] = "quick_gelu" if clip.get("quick_gelu") else "gelu"
    if tower.get("hidden_act") in _ACTS and config.act != "swiglu":
        found["act"] = _ACTS[tower["hidden_act"]]
    if "layer_norm_eps" in tower:
        found["norm_eps"] = float(tower["layer_norm_eps"])
    for ours in ("mean", "std"):
        values = pixels.get(f"image_{ours}", pixels.get(ours))
        if values is not None:
            found[ours] = colours(values)
    return found


def colours(values: Any) -> tuple[float, float, float]:
    """Three finite numbers of red, green and blue; ValueError for anything else."""
    red, green, blue = (float(value) for value in values)
    if not all(abs(value) <= 255 for value in (red, green, blue)):  # NaN is not
        raise ValueError(f"{values} are no values of red, green and blue")
    return red, green, blue
