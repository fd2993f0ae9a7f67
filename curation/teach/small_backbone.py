"""The encoder of the small MoGe-2 that comes with the package: a DINOv2 layout of a size that MoGe does not list.

A checkpoint names its encoder, and MoGe looks that name up among its own sizes. `register` adds one more, so that the
file loads through `MoGeModel.from_pretrained` and through the teacher as every other checkpoint does.
"""

from __future__ import annotations

from typing import Any

BACKBONE = "synthetic_vit14"  # a DINOv2 layout of our own size, not one of DINOv2's networks
WIDTH, _SIDE = 144, 224


def register() -> None:
    """Let MoGe find BACKBONE. Changes nothing else, and may be called again."""
    from moge.model.dinov2.hub import backbones

    setattr(backbones, BACKBONE, _backbone)


def _backbone(*, pretrained: bool = False) -> Any:
    """A DINOv2 transformer, 6 blocks 144 wide. There are no weights to fetch: `pretrained` is part of MoGe's call."""
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
