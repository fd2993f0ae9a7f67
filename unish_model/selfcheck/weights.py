"""Weights and inputs that depend only on a salt, a tensor's name and its shape; no file is needed to reproduce them.

The golden files of the released networks were made with such weights, so a network with the released names reproduces
every number without a checkpoint. Each tensor is a PCG64 normal stream seeded by SHA-256, scaled by the kind of tensor.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from unish_model.network.scene import IMAGE_MEAN, IMAGE_STD

READ_OUTS = ("decpose", "trans_head", "scale_head", "decshape", "deccam", "deckp")


def normal(salt: str, name: str, shape: Sequence[int]) -> np.ndarray:
    """Float32 standard normal numbers for this salt and name."""
    seed = int.from_bytes(hashlib.sha256((salt + name).encode()).digest()[:8], "big")
    generator = np.random.Generator(np.random.PCG64(seed))
    return generator.standard_normal(math.prod(shape), dtype=np.float32).reshape(tuple(shape))


def input_array(salt: str, name: str, shape: Sequence[int]) -> np.ndarray:
    """Standard normal input for this name."""
    return normal(salt, f"input/{name}", shape)


def _offset_and_spread(name: str, shape: Sequence[int]) -> tuple[np.ndarray | float, float]:
    """Mean and standard deviation of a tensor, according to its name."""
    *_, leaf = parts = name.split(".")
    owner = parts[-2] if len(parts) > 1 else ""
    is_points = ".".join(parts[-3:-1]).endswith("point_head.proj")
    fixed: dict[str, tuple[np.ndarray | float, float]] = {
        "image_mean": (np.asarray(IMAGE_MEAN, np.float32).reshape(3, 1, 1), 0.0),
        "image_std": (np.asarray(IMAGE_STD, np.float32).reshape(3, 1, 1), 0.0),
        "init_body_pose": (np.tile(np.asarray([1, 0, 0, 0, 1, 0], np.float32), shape[-1] // 6), 0.2),
        "init_betas": (0.0, 0.3),
        "init_cam": (np.asarray([0.9, 0, 0], np.float32), 0.0),
        "gamma": (0.3, 0.05),
        "pos_embed": (0.0, 0.2),
        "pos_embedding": (0.0, 0.2),
    }
    if leaf in fixed:
        return fixed[leaf]
    if leaf in ("cls_token", "register_tokens", "register_token", "mask_token", "scale_token"):
        return 0.0, 0.5
    if len(shape) >= 2:
        gain = 0.04 if is_points else 0.25 if owner in READ_OUTS else 1.0
        return 0.0, gain / math.sqrt(math.prod(shape[1:]))
    if leaf == "weight":
        return 1.0, 0.1
    if leaf == "bias" and is_points and shape[0] == 3 * 196:
        # a sawtooth in x and y inside each patch, so that focal recovery gets points that follow the image plane
        saw = ((np.arange(14, dtype=np.float32) + 0.5) / 7 - 1) * np.float32(1.5)
        teeth = np.zeros((3, 14, 14), np.float32)
        teeth[0], teeth[1] = saw[None, :], saw[:, None]
        return teeth.reshape(-1), 0.05
    return 0.0, 0.05 if leaf == "bias" else 0.02


def weight_array(salt: str, name: str, shape: Sequence[int]) -> np.ndarray:
    """The float32 tensor for this salt, name and shape."""
    offset, spread = _offset_and_spread(name, shape)
    values = normal(salt, name, shape) if spread else np.zeros(tuple(shape), np.float32)
    values *= np.float32(spread)
    values += np.asarray(offset, np.float32)
    return values


@torch.no_grad()
def fill(module: nn.Module, salt: str, prefix: str = "") -> None:
    """Fill every tensor of a module in place, one at a time; `prefix` comes before its name."""
    for name, tensor in module.state_dict().items():
        tensor.copy_(torch.from_numpy(weight_array(salt, prefix + name, tensor.shape)))
