"""The small MoGe-2 that comes with the package. It knows the synthetic world only (MODEL_CARD.md)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from curation.teach.small_backbone import BACKBONE, WIDTH

WEIGHTS = Path(__file__).parent / "synthetic-moge.pt"
NAME = "synthetic-moge"  # its name in provenance
NUM_TOKENS = 144  # 16 x 9, as in training; for TeacherSettings.num_tokens


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
        "scale_head": {"dims": [WIDTH, WIDTH, 1]},
        "remap_output": "exp",
        "num_tokens_range": [NUM_TOKENS, NUM_TOKENS],
    }
