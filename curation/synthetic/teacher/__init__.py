"""The small MoGe-2 that the project carries: it knows the synthetic world only, useless on real video (MODEL_CARD.md).

A checkpoint names its encoder, and MoGe looks that name up among its own DINOv2 sizes. `register` adds one more, so
that the file loads through `MoGeModel.from_pretrained` and through the teacher as every other checkpoint does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

BACKBONE = "synthetic_vit14"  # a DINOv2 layout of our own size, not one of DINOv2's networks
WEIGHTS = Path(__file__).parent / "synthetic-moge.pt"
NAME = "synthetic-moge"  # what provenance calls it
NUM_TOKENS = 144  # 16 x 9, what it was trained at, for TeacherSettings.num_tokens

_WIDTH, _SIDE = 144, 224


def register() -> None:
    """Let MoGe find BACKBONE. Changes nothing else, and may be called again."""
    from moge.model.dinov2.hub import backbones

    setattr(backbones, BACKBONE, _backbone)


def model_config() -> dict[str, Any]:
    """The arguments of `MoGeModel` for the small network: 2.3 M parameters, one feature level per power of two."""
    widths, narrow, mask = [96, 64, 32, 16, 8], [64, 32, 16, 8, 8], [16, 8, 8, 4, 4]
    stack = {
        "resamplers": ["conv_transpose"] * 4,
        "res_block_in_norm": "layer_norm",
        "res_block_hidden_norm": "none",
    }

    def head(inner: list[int], blocks: list[int], channels: int) -> dict[str, Any]:
        return stack | {
            "dim_in": widths,
            "dim_res_blocks": inner,
            "dim_out": [None] * 4 + [channels],
            "num_res_blocks": blocks,
        }

    return {
        "encoder": {"backbone": BACKBONE, "intermediate_layers": [2, 5], "dim_out": widths[0]},
        "neck": stack
        | {
            "dim_in": [widths[0] + 2, 2, 2, 2, 2],
            "dim_res_blocks": widths,
            "dim_out": None,
            "num_res_blocks": [2, 1, 0, 0, 0],
        },
        "points_head": head(narrow, [1, 0, 0, 0, 0], 3),
        "mask_head": head(mask, [0, 0, 0, 0, 0], 1),
        "scale_head": {"dims": [_WIDTH, _WIDTH, 1]},
        "remap_output": "exp",
        "num_tokens_range": [NUM_TOKENS, NUM_TOKENS],
    }


def _backbone(*, pretrained: bool = False) -> Any:
    """A DINOv2 transformer, 6 blocks 144 wide. There are no weights to fetch: `pretrained` is part of MoGe's call."""
    from moge.model.dinov2.models.vision_transformer import DinoVisionTransformer

    if pretrained:
        raise ValueError(f"{BACKBONE} has no weights of its own: it comes with a whole checkpoint.")
    return DinoVisionTransformer(
        img_size=_SIDE,
        patch_size=14,
        embed_dim=_WIDTH,
        depth=6,
        num_heads=4,
        init_values=1.0,
        block_chunks=0,
    )
