"""DINOv3's own numbers: the CLS token of a photo of two cats (COCO 000000039769), as transformers' converter checks it.

It runs where $VITFACE_TEST_DATA holds 000000039769.jpg and a converted dinov3_vits16.safetensors or dinov3_vitb16; the
weights are given on request only. It was written without them.
"""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from vitface.data.preprocess import normalise
from vitface.store.backbone import load_backbone

DATA = Path(os.environ.get("VITFACE_TEST_DATA", "none"))
PHOTO = DATA / "000000039769.jpg"
GOLDEN = {
    "dinov3_vits16": [0.463561, -0.415609, 0.408236, -0.126613, -0.286636],
    "dinov3_vitb16": [1.034643, -0.180609, -0.341018, -0.066376, -0.011383],
}


@pytest.mark.parametrize("name", GOLDEN)
def test_cls_of_two_cats(name):
    weights = DATA / f"{name}.safetensors"
    if not PHOTO.is_file() or not weights.is_file():
        pytest.skip(f"no {PHOTO.name} or {weights.name} in $VITFACE_TEST_DATA")
    vit = load_backbone(name, weights, 224)
    pixels = torch.from_numpy(np.array(Image.open(PHOTO).convert("RGB"))).permute(2, 0, 1)[None].float()
    small = F.interpolate(pixels, size=(224, 224), mode="bilinear", antialias=True).round() / 255
    with torch.no_grad():
        cls = vit(normalise(small, vit.config.mean, vit.config.std))[0, 0, :5]
    torch.testing.assert_close(cls, torch.tensor(GOLDEN[name]), atol=5e-3, rtol=0)
