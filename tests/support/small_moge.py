"""A MoGe-2 small enough for unit tests, and frames to look at."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np

from curation.records import Frames


def make_frames(images: np.ndarray, fps: float = 6.0) -> Frames:
    """(N, H, W, 3) RGB -> Frames."""
    jpeg = tuple(cv2.imencode(".jpg", image[..., ::-1])[1].tobytes() for image in images)
    return Frames(images.shape[2], images.shape[1], np.arange(len(images)) / fps, jpeg)


def noise_frames(count: int, height: int, width: int) -> Frames:
    """Frames of smooth coloured noise, each another."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 255, (count, 7, 10, 3), dtype=np.uint8)
    return make_frames(
        np.stack([cv2.resize(image, (width, height), interpolation=cv2.INTER_CUBIC) for image in coarse])
    )


def decoded(frames: Frames) -> Any:
    """(N, 3, H, W) float32 tensor in [0, 1], RGB."""
    import torch

    images = [cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR)[..., ::-1] for jpeg in frames.jpeg]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255


def small_config() -> dict[str, Any]:
    """MoGe-2 with the smallest encoder that the package knows and narrow heads."""
    widths = [16, 8, 8, 8, 8]
    stack = {
        "dim_res_blocks": widths,
        "num_res_blocks": [0, 0, 0, 0, 0],
        "res_block_in_norm": "none",
        "res_block_hidden_norm": "none",
        "resamplers": ["bilinear"] * 4,
    }

    def head(channels: int) -> dict[str, Any]:
        return stack | {"dim_in": widths, "dim_out": [None] * 4 + [channels]}

    return {
        "encoder": {"backbone": "dinov2_vits14", "intermediate_layers": [1, 3], "dim_out": 16},
        "neck": stack | {"dim_in": [18, 2, 2, 2, 2], "dim_out": None},
        "points_head": head(3),
        "normal_head": head(3),
        "mask_head": head(1),
        "scale_head": {"dims": [384, 16, 1]},
        "remap_output": "exp",
        "num_tokens_range": [1200, 3600],
    }


def small_network() -> Any:
    """`small_config` with random weights under which some pixels are valid and some are not."""
    import torch
    from moge.model.v2 import MoGeModel

    torch.manual_seed(3)
    network = MoGeModel(**small_config())
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter[0].numel() ** -0.5)
    return network.eval()
