"""Where a patch is: learned positions at another grid than their own, and rotary ones.

Letters: g patches a side, N tokens, D width, hd head dim.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from vitface.presets import ViTConfig


def resample_pos_embed(pos_embed: Tensor, grid: int, rule: str) -> Tensor:
    """Resamples the patch part of `pos_embed`, (1, 1 + g², D) -> (1, 1 + grid², D), in float32 at least.

    Without a place for CLS, (1, g², D) -> (1, grid², D).

    Each rule is the one that some weights were published with:
    "scale_offset"   Meta's DINOv2: by the scale factor (grid + 0.1) / g, no antialias (`interpolate_offset`)
    "size"           to the size, no antialias (transformers; our choice for CLIP, which has none of its own)
    "size_antialias" to the size, with antialias (timm)
    "size_bilinear"  to the size, bilinear instead of bicubic, no antialias (PE)
    If `grid` is the native grid, the table is returned as it is.
    """
    native = math.isqrt(pos_embed.shape[1])
    places = pos_embed.shape[1] - native * native  # of CLS
    if places > 1:
        raise ValueError(f"pos_embed has {pos_embed.shape[1]} rows, which is no square grid, with or without CLS")
    cls, patches = pos_embed[:, :places], pos_embed[:, places:]
    if grid == native:
        return pos_embed
    table = rearrange(patches.to(torch.promote_types(patches.dtype, torch.float32)), "1 (h w) d -> 1 d h w", h=native)
    if rule == "scale_offset":
        factor = (grid + 0.1) / native
        table = F.interpolate(table, scale_factor=(factor, factor), mode="bicubic")
    elif rule in ("size", "size_antialias"):
        table = F.interpolate(table, size=(grid, grid), mode="bicubic", antialias=rule == "size_antialias")
    elif rule == "size_bilinear":
        table = F.interpolate(table, size=(grid, grid), mode="bilinear")
    else:
        raise ValueError(f"unknown positional rule {rule!r}")
    assert table.shape[-2:] == (grid, grid)
    return torch.cat([cls, rearrange(table, "1 d h w -> 1 (h w) d").to(cls.dtype)], dim=1)


def resample_rows(rows: Tensor, places: int, width: int, grid: int, of_map: bool = False) -> Tensor:
    """Numbers for each token of a row, (E, (places + g²) width), at another grid: (E, (places + grid²) width).

    Those of patches are interpolated, bilinearly with antialias. With `of_map` they are a linear map of tokens, and it
    becomes that of tokens interpolated to the grid g. Those of the `places` before them stay.
    """
    before, patches = rows.split([places * width, rows.shape[1] - places * width], dim=1)
    native = math.isqrt(patches.shape[1] // width)
    old, new = (native, grid) if of_map else (grid, native)
    places_of = torch.eye(new * new, dtype=rows.dtype, device=rows.device).view(-1, 1, new, new)
    shares = F.interpolate(places_of, size=(old, old), mode="bilinear", antialias=True).flatten(1)  # (new², old²)
    patches = rearrange(patches, "e (p c) -> e p c", c=width)
    resampled = torch.einsum("epc,qp->eqc" if of_map else "epc,pq->eqc", patches, shares)
    return torch.cat([before, rearrange(resampled, "e q c -> e (q c)")], dim=1)


def rotations(config: ViTConfig, image_size: int) -> Tensor | None:
    """Cosine and sine by which queries and keys are turned (2, N, hd); None without rotary positions.

    A patch at row y and column x has the angles y f and x f, f = s · base^(-4 i / hd) for i < hd / 4, twice in a row
    (Su et al. 2021, arXiv:2104.09864, in two dimensions). Rule "unit" (DINOv3): y and x are the patch's centre in
    [-1, 1], s is 2 pi, the base 100; "index" (PE): they count from one, s is 1, the base 10,000. The tokens before the
    patches are not turned.
    """
    if config.rope == "none":
        return None
    grid, quarter = config.grid(image_size), config.embed_dim // config.num_heads // 4
    places = torch.arange(grid, dtype=torch.float64)
    if config.rope == "unit":
        places, scale, base = (2 * places + 1) / grid - 1, 2 * math.pi, 100.0
    else:
        places, scale, base = places + 1, 1.0, 10_000.0
    along = places[:, None] * scale * base ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    rows, columns = repeat(along, "y i -> (y x) i", x=grid), repeat(along, "x i -> (y x) i", y=grid)
    angles = torch.cat([rows, columns, rows, columns], dim=1)
    angles = torch.cat([angles.new_zeros(config.prefix, 4 * quarter), angles])
    return torch.stack([angles.cos(), angles.sin()]).to(torch.get_default_dtype())
