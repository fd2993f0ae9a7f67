"""The human branch (CameraHMR): a person crop, and its position in the image, to SMPL pose and shape.

The crop is raw RGB in [0, 1]: the released model was fine-tuned on that, so nothing here normalises it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32
from torch import Tensor, nn
from torch.nn import functional as F

from unish_model.network.config import HumanConfig, TransformerConfig
from unish_model.network.geometry import rotation_from_6d
from unish_model.network.layers import Block, Branch, by_frames, full_precision
from unish_model.network.scene import PatchEmbed

CROP_SIDE = 256
"""Side of the branch's square input crop."""


@dataclass(frozen=True)
class HumanOutput:
    """Bodies in their cameras, float32."""

    rotations: Float32[Tensor, "B S J 3 3"]
    """Joint rotations; joint 0 is the root in camera coordinates."""
    frame_betas: Float32[Tensor, "B S betas"]
    """SMPL shape estimated from each frame."""
    tokens: Float32[Tensor, "B S width"]
    """Body features for AlignNet."""

    @property
    def betas(self) -> Float32[Tensor, "B betas"]:
        """Mean shape of the clip."""
        return self.frame_betas.mean(1)


class HumanBackbone(Branch):
    """ViT without class token, applied to the middle columns of the crop."""

    def __init__(self, config: HumanConfig) -> None:
        super().__init__()
        size = config.backbone
        rows, columns = config.grid
        self.patch_embed = PatchEmbed(size.width, config.patch, padding=2)
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + rows * columns, size.width))
        last = max(size.depth - 1, 1)
        self.blocks = nn.ModuleList(Block(size, drop_path=config.drop_path * i / last) for i in range(size.depth))
        self.last_norm = nn.LayerNorm(size.width, eps=1e-6)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, crops: Float[Tensor, "frames 3 H W"]) -> Float[Tensor, "frames patches width"]:
        # the class token's position is added to every patch, as in ViTPose
        x = self.patch_embed(crops) + self.pos_embed[:, 1:] + self.pos_embed[:, :1]
        for block in self.blocks:
            x = self.run(block, x)
        return self.last_norm(x)


class HeadAttention(nn.Module):
    """Attention of the SMPL decoder: self-attention, or cross-attention to a context of another width."""

    def __init__(self, width: int, heads: int, head_dim: int, context: int | None = None) -> None:
        super().__init__()
        inner = heads * head_dim
        self.heads = heads
        if context is None:
            self.to_qkv = nn.Linear(width, 3 * inner, bias=False)
        else:
            self.to_q = nn.Linear(width, inner, bias=False)
            self.to_kv = nn.Linear(context, 2 * inner, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner, width))

    def forward(
        self, x: Float[Tensor, "frames queries width"], context: Float[Tensor, "frames tokens context"] | None = None
    ) -> Float[Tensor, "frames queries width"]:
        parts = self.to_qkv(x).chunk(3, -1) if context is None else (self.to_q(x), *self.to_kv(context).chunk(2, -1))
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))


class HeadFeedForward(nn.Module):
    """Linear, exact GELU, Linear; the identities keep the released indices, where that code has a dropout of zero."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(), nn.Identity(), nn.Linear(hidden, width), nn.Identity()
        )

    def forward(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        return self.net(x)


class PreNorm(nn.Module):
    """Normalise, apply, add."""

    def __init__(self, width: int, fn: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fn = fn

    def forward(self, x: Float[Tensor, "*batch width"], *context: Tensor) -> Float[Tensor, "*batch width"]:
        return x + self.fn(self.norm(x), *context)


class CrossLayer(nn.ModuleList):
    """Self-attention, cross-attention and feed-forward, named 0, 1 and 2."""

    def __init__(self, config: TransformerConfig, head_dim: int, context: int) -> None:
        width, heads = config.width, config.heads
        attend, cross = HeadAttention(width, heads, head_dim), HeadAttention(width, heads, head_dim, context)
        super().__init__(PreNorm(width, part) for part in (attend, cross, HeadFeedForward(width, config.mlp)))

    def forward(
        self, x: Float[Tensor, "frames queries width"], context: Float[Tensor, "frames tokens context"]
    ) -> Float[Tensor, "frames queries width"]:
        attend, cross, feed = self
        return feed(cross(attend(x), context))


class CrossDecoder(Branch):
    """Layers in which a query attends to a context."""

    def __init__(self, config: TransformerConfig, head_dim: int, context: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(CrossLayer(config, head_dim, context) for _ in range(config.depth))

    def forward(
        self, x: Float[Tensor, "frames queries width"], context: Float[Tensor, "frames tokens context"]
    ) -> Float[Tensor, "frames queries width"]:
        for layer in self.layers:
            x = self.run(layer, x, context)
        return x


class TokenDecoder(nn.Module):
    """One query token per frame, which attends to the crop's tokens."""

    def __init__(self, config: HumanConfig, inputs: int) -> None:
        super().__init__()
        width = config.decoder.width
        self.to_token_embedding = nn.Linear(inputs, width)
        self.pos_embedding = nn.Parameter(torch.randn(1, 1, width))
        self.transformer = CrossDecoder(config.decoder, config.decoder_head_dim, config.backbone.width)

    def forward(
        self, query: Float[Tensor, "frames inputs"], context: Float[Tensor, "frames tokens context"]
    ) -> Float[Tensor, "frames width"]:
        return self.transformer(self.to_token_embedding(query)[:, None] + self.pos_embedding, context)[:, 0]


class HumanHead(nn.Module):
    """Crop tokens and box to SMPL parameters. Always float32."""

    init_body_pose: Tensor
    init_betas: Tensor
    init_cam: Tensor

    def __init__(self, config: HumanConfig) -> None:
        super().__init__()
        pose = 6 * config.joints
        width = config.decoder.width
        self.transformer = TokenDecoder(config, 3 + pose + config.betas + 3)
        self.decpose = nn.Linear(width, pose)
        self.decshape = nn.Linear(width, config.betas)
        register_mean_body(self, config)

    def forward(self, context: Float[Tensor, "frames tokens width"], bbox_info: Float[Tensor, "B S 3"]) -> HumanOutput:
        """context: crop tokens; bbox_info: box centre from the image centre and side, over the focal length."""
        batch, frames, _ = bbox_info.shape
        with full_precision(context.device):
            mean = torch.cat((self.init_body_pose, self.init_betas, self.init_cam), -1)
            query = torch.cat((bbox_info.float().flatten(0, 1), mean.expand(batch * frames, -1)), -1)
            token = self.transformer(query, context.float())
            pose = self.init_body_pose + self.decpose(token)
            return HumanOutput(
                rotations=rotation_from_6d(pose.view(batch, frames, -1, 6)),
                frame_betas=(self.init_betas + self.decshape(token)).view(batch, frames, -1),
                tokens=token.view(batch, frames, -1),
            )


class Human(nn.Module):
    """The branch alone, for loading a CameraHMR checkpoint; `run_human` runs its parts."""

    def __init__(self, config: HumanConfig) -> None:
        super().__init__()
        self.backbone = HumanBackbone(config)
        self.human_head = HumanHead(config)


def register_mean_body(module: nn.Module, config: HumanConfig) -> None:
    """Buffers `init_body_pose`, `init_betas`, `init_cam`: an upright mean body until a checkpoint is loaded."""
    module.register_buffer("init_body_pose", torch.tensor([1.0, 0, 0, 0, 1, 0]).repeat(config.joints)[None])
    module.register_buffer("init_betas", torch.zeros(1, config.betas))
    module.register_buffer("init_cam", torch.tensor([[0.9, 0.0, 0.0]]))


def run_human(
    backbone: HumanBackbone,
    head: HumanHead,
    config: HumanConfig,
    patches: Float[Tensor, "B S 3 256 256"],
    bbox_info: Float[Tensor, "B S 3"],
    frame_step: int | None = None,
) -> HumanOutput:
    """Run the whole branch.

    patches: RGB in [0, 1]; bbox_info: divided by the focal length in pixels.
    frame_step: crops per step in the backbone. Raises ValueError for wrong shapes.
    """
    if patches.ndim != 5 or tuple(patches.shape[2:]) != (3, CROP_SIDE, CROP_SIDE):
        raise ValueError(f"patches must be (B, S, 3, {CROP_SIDE}, {CROP_SIDE}), not {tuple(patches.shape)}")
    if bbox_info.shape != (*patches.shape[:2], 3):
        raise ValueError(f"bbox_info must be {(*patches.shape[:2], 3)}, not {tuple(bbox_info.shape)}")
    top, left = ((CROP_SIDE - side) // 2 for side in config.crop)
    crops = patches.flatten(0, 1)[:, :, top : CROP_SIDE - top, left : CROP_SIDE - left]
    tokens = by_frames(backbone, crops.to(backbone.patch_embed.proj.weight.dtype), frame_step)
    return head(tokens, bbox_info)
