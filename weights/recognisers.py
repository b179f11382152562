"""What the files of face recognisers need beyond a key map: variants that are refused, and the order of colours."""

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

from vitface.errors import WeightsError
from vitface.files import open_regular

MAX_SETTINGS_BYTES = 1 << 20
NOT_A_VIT = "is no Vision Transformer, and adapters go into a transformer's blocks"
# patterns of tensor names -> what a recogniser with such tensors is
REFUSED = {
    "*keypoint_linear*": "is a KP-RPE model: it takes the landmarks of each face as a second input",
    "*kprpe*": "is a KP-RPE model: it takes the landmarks of each face as a second input",
    "*rpe_[qkv].*": "has relative positions (iRPE) in its attention, which these ViTs do not have",
    "*relative_position_bias_table": "is a Swin or has its relative positions, which these ViTs do not have",
    "*cpb_mlp*": "is a Swin, whose attention has windows",
    "*stn.*": "is a part-fViT: it finds the places of its patches with a network of its own",
    "*blocks.*.norm[12].running_mean": 'has batch norms in its blocks (norm_layer="bn"); these ViTs have layer norms',
    "*layer1.0.bn1.running_mean": NOT_A_VIT,
    "*body.0.res_layer.*": NOT_A_VIT,
}


def check_variant(path: Path, names: Iterable[str]) -> None:
    """WeightsError, with the reason, for a recogniser of another kind than `pool` "tokens" is made for."""
    for name in names:
        for pattern, reason in REFUSED.items():
            if fnmatchcase(name, pattern):
                raise WeightsError(f"{path} {reason} ({name}): it is not converted")


def takes_bgr(path: Path) -> bool:
    """Whether the recogniser in `path` takes blue first: CVLface's config.yaml beside it says `input_color_flip`."""
    try:
        with open_regular(path.with_name("config.yaml")) as file:
            text = file.read(MAX_SETTINGS_BYTES).decode(errors="replace")
    except OSError:
        return False
    found = re.search(r"^\s*input_color_flip\s*:\s*['\"]?(\w+)", text, re.MULTILINE)
    return found is not None and found[1].lower() in ("true", "yes", "on", "1")
