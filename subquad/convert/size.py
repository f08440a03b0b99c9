"""resize: make an image model, swapped or not, take images of another size.

What a ViT or DeiT has learnt of its size is a table of positions, one row a patch behind those of the class tokens. The patches' part is
interpolated as an image (bicubic); class tokens' rows stay. A Swin keeps its windows, and with them its relative position bias.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subquad.checks import InputError

Pair = tuple[int, int]


@torch.no_grad()
def resize(model: Any, size: int | Pair) -> Any:
    """Make a model take images of `size`, in place; returns the model.

    >>> resize(timm.create_model("deit_small_patch16_224"), 384)         # by timm's own set_input_size
    >>> resize(subquad.swap(vit, "rala"), (192, 320))                    # of transformers; its config is changed too

    transformers resizes square tables only, and in each call (``interpolate_pos_encoding=True``); this does it once, from and to any
    shape, by the same interpolation, and the result is saved with the model.

    Args:
        model: a ViT, DeiT or Swin of transformers, or a VisionTransformer or SwinTransformer of timm.
        size: rows and columns of the images, multiples of the patch's; an integer for both.

    Raises:
        InputError: nothing has been changed then.
    """
    wanted = (size, size) if type(size) is int else size
    if not isinstance(wanted, tuple | list) or len(wanted) != 2 or not all(type(n) is int and n > 0 for n in wanted):
        raise InputError("size", repr(size), "a positive number of pixels, or (rows, columns)")
    pixels: Pair = (wanted[0], wanted[1])
    if "timm" in sys.modules and _is_timm(model):
        _check_multiple(pixels, model.patch_embed.patch_size)
        kept = {"window_size": [tuple(stage.blocks[0].window_size) for stage in model.layers]} if hasattr(model, "layers") else {}
        model.set_input_size(img_size=pixels, **kept)
        return model
    embeddings = _embeddings(model)
    if embeddings is None:
        raise InputError(
            "model", type(model).__name__, "a ViT, DeiT or Swin of transformers, or timm's VisionTransformer or SwinTransformer"
        )
    patches = embeddings.patch_embeddings
    side = patches.projection.stride
    _check_multiple(pixels, side)
    grid = (pixels[0] // side[0], pixels[1] // side[1])
    config = model.config
    before = config.image_size if isinstance(config.image_size, list | tuple) else (config.image_size, config.image_size)
    table = embeddings.position_embeddings
    if table is not None:
        new = interpolate(table, (before[0] // side[0], before[1] // side[1]), grid)
        embeddings.position_embeddings = nn.Parameter(new, requires_grad=table.requires_grad)
    patches.num_patches = grid[0] * grid[1]
    for owner, name, value in (
        (patches, "grid_size", grid),
        (embeddings, "patch_grid", grid),
        *((o, "image_size", pixels) for o in (patches, embeddings)),
    ):
        if hasattr(owner, name):
            setattr(owner, name, value)
    copies: dict[int, Any] = {}
    for module in model.modules():
        if hasattr(getattr(module, "config", None), "image_size"):
            old = module.config  # mostly one and the same for all modules, and perhaps for other models too
            if id(old) not in copies:
                copies[id(old)] = copy.deepcopy(old)
                copies[id(old)].image_size = pixels
            module.config = copies[id(old)]
    return model


def interpolate(table: Tensor, before: Pair, after: Pair) -> Tensor:
    """A table of positions ``[1, P + rows·columns, C]`` for another grid; its first P rows, those of class tokens, stay.

    Bicubic, corners not aligned, no antialiasing: transformers' own way.
    """
    if before == after:
        return table.clone()
    prefix = table.shape[1] - before[0] * before[1]
    patches = table[:, prefix:].unflatten(1, before).permute(0, 3, 1, 2)
    patches = F.interpolate(patches, size=after, mode="bicubic", align_corners=False)
    return torch.cat([table[:, :prefix], patches.flatten(2).mT], 1)


def _is_timm(model: Any) -> bool:
    from timm.models.swin_transformer import SwinTransformer
    from timm.models.vision_transformer import VisionTransformer

    return isinstance(model, VisionTransformer | SwinTransformer)


def _embeddings(model: Any) -> Any:
    """transformers' embeddings of patches, or None."""
    if "transformers" not in sys.modules or not isinstance(model, nn.Module):
        return None
    from subquad.convert.families import find_family

    family = find_family(model)
    if family is None or family.causal:
        return None
    return next((module for module in model.modules() if isinstance(module, family.part("Embeddings"))), None)


def _check_multiple(pixels: Pair, side: Any) -> None:
    if pixels[0] % side[0] or pixels[1] % side[1]:
        raise InputError("size", f"{pixels[0]} × {pixels[1]}", f"multiples of the patch's {side[0]} × {side[1]} pixels")
