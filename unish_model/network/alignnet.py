"""AlignNet: the metric scale of the scene, and the position of the body in it. Always float32.

A scale token and one token per frame attend to the scene's features; time enters only through a rotary embedding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32
from torch import Tensor, nn
from torch.nn import functional as F

from unish_model.network.config import AlignConfig, UniSHConfig
from unish_model.network.human import register_mean_body
from unish_model.network.layers import Branch, Rotary, frequencies, full_precision, rotate


@dataclass(frozen=True)
class AlignOutput:
    """The result of AlignNet, float32."""

    scale: Float32[Tensor, " B"]
    """Metres: the mean distance of the scene's valid points from their cameras."""
    translation: Float32[Tensor, "B S 3"]
    """SMPL translation in each camera, in the scene branch's unit."""


def time_positions(
    frames: int, fps: float, trained_fps: float = 6.0, device: torch.device | None = None
) -> Float32[Tensor, " S"]:
    """Each frame's time in steps of the training rate, rounded half to even."""
    return (torch.arange(frames, dtype=torch.float32, device=device) * trained_fps / fps).round()


def time_rotary(
    positions: Float[Tensor, "*batch"], length: int, head_dim: int, base: float, table: int = 120
) -> Rotary:
    """Tables (..., 1, head_dim / 2) for integer positions in 0..length-1.

    Up to `table` positions, the angles are those of training. For a longer `length`, the table of `table` entries is
    stretched linearly over all positions, first to first and last to last, so no position leaves the trained range.
    """
    wave = frequencies(head_dim // 2, base, positions.device)
    if length <= table:
        angles = positions[..., None, None] * wave
        return Rotary(angles.cos(), angles.sin())
    source = positions[..., None, None] * ((table - 1) / (length - 1))
    low = source.floor().clamp_max(table - 2)
    part = source - low
    first, second = low * wave, (low + 1) * wave
    return Rotary(torch.lerp(first.cos(), second.cos(), part), torch.lerp(first.sin(), second.sin(), part))


class AlignLayer(nn.Module):
    """Post-norm decoder layer with separate projections."""

    def __init__(self, config: AlignConfig) -> None:
        super().__init__()
        width = config.transformer.width
        self.heads = config.transformer.heads
        for kind in ("self", "cross"):
            for part in ("q", "k", "v", "out"):
                self.add_module(f"{kind}_{part}_proj", nn.Linear(width, width))
        hidden = config.transformer.mlp
        self.feed_forward = nn.Sequential(
            nn.Linear(width, hidden), nn.ReLU(), nn.Dropout(config.dropout), nn.Linear(hidden, width)
        )
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.dropout = nn.Dropout(config.dropout)

    def attend(
        self,
        kind: str,
        x: Float[Tensor, "B queries width"],
        memory: Float[Tensor, "B tokens width"],
        time: Rotary,
        memory_time: Rotary,
    ) -> Float[Tensor, "B queries width"]:
        """One attention; values are not rotated."""
        sources = {"q": x, "k": memory, "v": memory}
        projected = (getattr(self, f"{kind}_{name}_proj")(source) for name, source in sources.items())
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in projected)
        mixed = F.scaled_dot_product_attention(rotate(q, time), rotate(k, memory_time), v)
        return self.dropout(getattr(self, f"{kind}_out_proj")(mixed.transpose(1, 2).flatten(-2)))

    def forward(
        self,
        x: Float[Tensor, "B queries width"],
        memory: Float[Tensor, "B tokens width"],
        time: Rotary,
        memory_time: Rotary,
    ) -> Float[Tensor, "B queries width"]:
        y = self.norm1(x + self.attend("self", x, x, time, time))
        y = self.norm2(y + self.attend("cross", y, memory, time, memory_time))
        y = self.norm3(y + self.dropout(self.feed_forward(y)))
        return y + x  # as in the released network, which adds a layer's input once more


class AlignNet(Branch):
    """All of AlignNet, with the released parameter names."""

    def __init__(self, config: UniSHConfig) -> None:
        super().__init__()
        self.config = config.align
        self.registers = config.scene.registers
        size = config.align.transformer

        def adapter(width: int) -> nn.Sequential:
            return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, size.width), nn.ReLU())

        self.register_feature_adapter = adapter(config.scene.hidden)
        self.patch_feature_adapter = adapter(config.scene.hidden)
        self.cam_feature_adapter = adapter(config.human.decoder.width)
        self.scale_token = nn.Parameter(torch.randn(1, 1, size.width) * 0.02)
        self.decoder_layers = nn.ModuleList(AlignLayer(config.align) for _ in range(size.depth))
        self.scale_head = nn.Linear(size.width, 1)
        self.trans_head = nn.Linear(size.width, 3)
        # unused, but part of every released checkpoint
        register_mean_body(self, config.human)

    def rotary(self, frames: int, fps: float, tokens: int, device: torch.device) -> tuple[Rotary, Rotary]:
        """Tables of the queries [scale token, bodies] and of the memory, `tokens` per frame."""
        config = self.config
        positions = time_positions(frames, fps, config.trained_fps, device)
        length = round((frames - 1) * config.trained_fps / fps) + 1
        head_dim = config.transformer.head_dim
        cos, sin = time_rotary(F.pad(positions, (1, 0)), length, head_dim, config.rope_base, config.rope_table)
        memory = Rotary(cos[1:].repeat_interleave(tokens, 0), sin[1:].repeat_interleave(tokens, 0))
        return Rotary(cos, sin), memory

    def forward(
        self, hidden: Float[Tensor, "B S tokens hidden"], body: Float[Tensor, "B S width"], fps: float
    ) -> AlignOutput:
        """hidden: the scene's tokens, registers first; body: the human branch's tokens; fps: frames per second."""
        if not fps > 0:
            raise ValueError(f"fps must be positive, not {fps}")
        batch, frames, tokens, _ = hidden.shape
        with full_precision(hidden.device):
            registers, patches = hidden.float().split([self.registers, tokens - self.registers], 2)
            memory = torch.cat((self.register_feature_adapter(registers), self.patch_feature_adapter(patches)), 2)
            query = torch.cat((self.scale_token.expand(batch, -1, -1), self.cam_feature_adapter(body.float())), 1)
            time, memory_time = self.rotary(frames, fps, tokens, hidden.device)
            for layer in self.decoder_layers:
                query = self.run(layer, query, memory.flatten(1, 2), time, memory_time)
            raw = self.trans_head(query[:, 1:])
            z = raw[..., 2:].exp()
            return AlignOutput(
                scale=F.softplus(self.scale_head(query[:, 0]))[:, 0],
                translation=torch.cat((raw[..., :2] * z, z), -1),
            )
