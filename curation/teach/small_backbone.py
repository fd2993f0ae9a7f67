"""The encoder of the small MoGe-2 that comes with the package: DINOv2's layout in a size that MoGe does not list.

A checkpoint names its encoder, and MoGe looks that name up in its own list. `register` adds this size to the list, so
that the file loads through `MoGeModel.from_pretrained` and through the teacher like every other checkpoint.
"""

from __future__ import annotations

from typing import Any

BACKBONE = "synthetic_vit14"  # a DINOv2 layout of our own size, not one of DINOv2's networks
WIDTH, _SIDE = 144, 224


def register() -> None:
    """Let MoGe find BACKBONE. Changes nothing else, and may be called more than once."""
    from moge.model.dinov2.hub import backbones

    setattr(backbones, BACKBONE, _backbone)


def _backbone(*, pretrained: bool = False) -> Any:
    """A DINOv2 transformer, 6 blocks, 144 wide. `pretrained` is there because MoGe passes it; there are no weights."""
    from moge.model.dinov2.models.vision_transformer import DinoVisionTransformer

    if pretrained:
        raise ValueError(f"{BACKBONE} has no weights of its own: it comes with a whole checkpoint.")
    return DinoVisionTransformer(
        img_size=_SIDE,
        patch_size=14,
        embed_dim=WIDTH,
        depth=6,
        num_heads=4,
        init_values=1.0,
        block_chunks=0,
    )
