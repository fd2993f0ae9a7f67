"""Blocks shared by the branches: attention with PyTorch's fused kernels, rotary embedding, activation checkpointing.

Parameter names are those of the released checkpoints. Nothing here synchronises with the host, or builds an attention
matrix if the device has a fused kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from jaxtyping import Float, Float32
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from unish_model.network.config import TransformerConfig


class Rotary(NamedTuple):
    """Cosine and sine of every token's angles."""

    cos: Float[Tensor, "*batch tokens axes frequencies"]
    sin: Float[Tensor, "*batch tokens axes frequencies"]


def autocast_type(device: torch.device) -> torch.dtype | None:
    """The type that autocast uses on a device, or None if it is off."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def full_precision(device: torch.device) -> AbstractContextManager:
    """A context that disables autocast on a device, for a float32 part."""
    if autocast_type(device) is not None:
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def frequencies(count: int, base: float, device: torch.device | None = None) -> Float32[Tensor, " frequencies"]:
    """Rotary frequencies base^(-k/count) for k in 0..count-1."""
    return 1.0 / base ** (torch.arange(count, dtype=torch.float32, device=device) / count)


def grid_rotary(
    rows: int,
    columns: int,
    specials: int,
    head_dim: int,
    base: float,
    *,
    dtype: torch.dtype,
    device: torch.device,
    round_angles: bool = False,
) -> Rotary:
    """Two-axis tables for `specials` unrotated tokens followed by a row-major grid that counts from one.

    The row rotates the first half of a head's channels, the column the second. Angles are float32; `round_angles`
    rounds them to `dtype` before cosine and sine, as the released code does, which in bfloat16 changes an angle by up
    to 0.125 rad.
    """
    row = torch.arange(1, rows + 1, device=device).repeat_interleave(columns)
    column = torch.arange(1, columns + 1, device=device).repeat(rows)
    positions = F.pad(torch.stack((row, column), -1), (0, 0, specials, 0))
    angles = positions[..., None].float() * frequencies(head_dim // 4, base, device)
    if round_angles:
        angles = angles.to(dtype)
    return Rotary(angles.cos().to(dtype), angles.sin().to(dtype))


def rotate(x: Float[Tensor, "*batch tokens channels"], rotary: Rotary) -> Float[Tensor, "*batch tokens channels"]:
    """Rotate channel pairs (k, k + half) of every axis, in the type of `x`."""
    cos, sin = rotary
    first, second = x.unflatten(-1, (cos.shape[-2], 2, cos.shape[-1])).unbind(-2)
    return torch.stack((first * cos - second * sin, second * cos + first * sin), -2).flatten(-3)


class Attention(nn.Module):
    """Multi-head self-attention with a fused qkv projection."""

    def __init__(self, config: TransformerConfig, *, qk_norm: bool = False) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.q_norm: nn.Module = nn.LayerNorm(config.head_dim) if qk_norm else nn.Identity()
        self.k_norm: nn.Module = nn.LayerNorm(config.head_dim) if qk_norm else nn.Identity()
        self.proj = nn.Linear(config.width, config.width)

    def forward(
        self, x: Float[Tensor, "*batch tokens width"], rotary: Rotary | None = None
    ) -> Float[Tensor, "*batch tokens width"]:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).transpose(-2, -4).unbind(-3)
        # under autocast the norms return float32, but the kernel needs a single type
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(-2, -3).flatten(-2))


class Mlp(nn.Module):
    """Linear, exact GELU, Linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        return self.fc2(F.gelu(self.fc1(x)))


class LayerScale(nn.Module):
    """A learned gain per channel."""

    def __init__(self, width: int, initial: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), initial))

    def forward(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        return x * self.gamma


class DropPath(nn.Module):
    """Skip a residual branch for whole samples in training (stochastic depth)."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: Float[Tensor, " frames *rest"]) -> Float[Tensor, " frames *rest"]:
        if not self.training or self.probability == 0:
            return x
        keep = 1 - self.probability
        return x * x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep).div_(keep)


class Block(nn.Module):
    """Pre-norm transformer block, used by every trunk."""

    def __init__(
        self,
        config: TransformerConfig,
        *,
        layer_scale: float | None = None,
        qk_norm: bool = False,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()

        def scale() -> nn.Module:
            return nn.Identity() if layer_scale is None else LayerScale(config.width, layer_scale)

        self.norm1 = nn.LayerNorm(config.width, eps=1e-6)
        self.attn = Attention(config, qk_norm=qk_norm)
        self.ls1 = scale()
        self.norm2 = nn.LayerNorm(config.width, eps=1e-6)
        self.mlp = Mlp(config.width, config.mlp)
        self.ls2 = scale()
        self.drop_path = DropPath(drop_path)

    def forward(
        self, x: Float[Tensor, "*batch tokens width"], rotary: Rotary | None = None
    ) -> Float[Tensor, "*batch tokens width"]:
        x = x + self.drop_path(self.ls1(self.attn(self.norm1(x), rotary)))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))


class Branch(nn.Module):
    """A part whose blocks can recompute their activations in the backward pass instead of storing them."""

    checkpointing: bool = False

    def run(self, block: Callable[..., Tensor], *inputs: object) -> Tensor:
        """Call a block, with activation checkpointing if it is enabled and gradients are recorded."""
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)


def by_frames(
    function: Callable[[Tensor], Tensor], x: Float[Tensor, " frames *rest"], step: int | None
) -> Float[Tensor, " frames *out"]:
    """Apply a function of independent frames to `step` frames at a time: the same result with less memory."""
    if step is None or x.shape[0] <= step:
        return function(x)
    return torch.cat([function(part) for part in x.split(step)])
