"""The scene branch (Pi3): images to point maps, confidences, cameras and features. All frames are treated alike.

Only `first_camera_frame` depends on which frame is first. Lengths are in the network's own unit, not in metres.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32
from torch import Tensor, nn
from torch.nn import functional as F

from unish_model.network.config import SceneConfig, TransformerConfig
from unish_model.network.geometry import compose, inverse_se3, nearest_rotation, se3, transform_points
from unish_model.network.layers import Block, Branch, Rotary, autocast_type, by_frames, full_precision, grid_rotary

IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class SceneOutput:
    """The scene branch's output for clips: float32, in the network's own unit of length, cameras x right, y down."""

    local_points: Float32[Tensor, "B S H W 3"]
    """Points in each frame's camera."""
    conf_logits: Float32[Tensor, "B S H W"]
    """Logit of the probability that the point is right."""
    c2ws: Float32[Tensor, "B S 4 4"]
    """Camera to the network's own world."""
    hidden: Float[Tensor, "B S tokens hidden"]
    """Features, registers first, patches row-major."""

    @property
    def first_camera_frame(self) -> Float32[Tensor, "B S 4 4"]:
        """Camera to the first frame's camera."""
        return compose(inverse_se3(self.c2ws[:, :1]), self.c2ws)

    @property
    def world_points(self) -> Float32[Tensor, "B S H W 3"]:
        """Points in the first frame's camera."""
        return transform_points(self.first_camera_frame[:, :, None, None], self.local_points)


class PatchEmbed(nn.Module):
    """Strided convolution to tokens, row-major."""

    def __init__(self, width: int, patch: int, padding: int = 0) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, stride=patch, padding=padding)

    def forward(self, x: Float[Tensor, "frames 3 H W"]) -> Float[Tensor, "frames patches width"]:
        return self.proj(x).flatten(2).transpose(1, 2)


class Encoder(Branch):
    """DINOv2 with register tokens."""

    def __init__(self, config: SceneConfig) -> None:
        super().__init__()
        size = config.encoder
        self.grid = config.position_grid
        self.patch_embed = PatchEmbed(size.width, config.patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, size.width))
        self.register_tokens = nn.Parameter(torch.zeros(1, config.encoder_registers, size.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid**2, size.width))
        self.blocks = nn.ModuleList(Block(size, layer_scale=1.0) for _ in range(size.depth))
        self.norm = nn.LayerNorm(size.width, eps=1e-6)
        for token in (self.cls_token, self.register_tokens, self.pos_embed):
            nn.init.trunc_normal_(token, std=0.02)

    def positions(self, rows: int, columns: int) -> Float[Tensor, "1 1+{rows}*{columns} width"]:
        """Positions of class token and patches: the learned grid, resized in float32, bicubic with antialiasing."""
        if rows == columns == self.grid:
            return self.pos_embed
        cls, table = self.pos_embed.float().split([1, self.grid**2], 1)
        table = table.unflatten(1, (self.grid, self.grid)).permute(0, 3, 1, 2)
        table = F.interpolate(table, size=(rows, columns), mode="bicubic", antialias=True, align_corners=False)
        return torch.cat((cls, table.flatten(2).transpose(1, 2)), 1).to(self.pos_embed.dtype)

    def forward(
        self, images: Float[Tensor, "frames 3 H W"], positions: Float[Tensor, "1 positions width"]
    ) -> Float[Tensor, "frames patches width"]:
        x = self.patch_embed(images)
        count = x.shape[0]
        x = torch.cat((self.cls_token.expand(count, -1, -1), x), 1) + positions
        # registers stand between the class token and the patches and carry no position
        x = torch.cat((x[:, :1], self.register_tokens.expand(count, -1, -1), x[:, 1:]), 1)
        for block in self.blocks:
            x = self.run(block, x)
        return self.norm(x[:, 1 + self.register_tokens.shape[1] :])


class Readout(Branch):
    """A small decoder for one frame's tokens."""

    def __init__(self, config: TransformerConfig, hidden: int, out: int) -> None:
        super().__init__()
        self.projects = nn.Linear(hidden, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.linear_out = nn.Linear(config.width, out)

    def forward(self, x: Float[Tensor, "frames tokens hidden"], rotary: Rotary) -> Float[Tensor, "frames tokens out"]:
        x = self.projects(x)
        for block in self.blocks:
            x = self.run(block, x, rotary)
        return self.linear_out(x)


class PixelHead(nn.Module):
    """A linear layer that predicts `channels` values for every pixel of a patch."""

    def __init__(self, width: int, channels: int, patch: int) -> None:
        super().__init__()
        self.patch = patch
        self.proj = nn.Linear(width, channels * patch * patch)

    def forward(
        self, tokens: Float[Tensor, "frames {rows}*{columns} width"], rows: int, columns: int
    ) -> Float[Tensor, "frames H W channels"]:
        x = self.proj(tokens).transpose(1, 2).unflatten(2, (rows, columns))
        return F.pixel_shuffle(x, self.patch).permute(0, 2, 3, 1)


class ResidualUnit(nn.Module):
    """Three linear layers, each followed by ReLU, with a skip connection."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.res_conv1 = nn.Linear(width, width)
        self.res_conv2 = nn.Linear(width, width)
        self.res_conv3 = nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        return x + self.res_conv3(self.res_conv2(self.res_conv1(x).relu()).relu()).relu()


class CameraHead(nn.Module):
    """A frame's patch tokens to its camera-to-world transform."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.res_conv = nn.ModuleList(ResidualUnit(width) for _ in range(2))
        self.more_mlps = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.fc_t = nn.Linear(width, 3)
        self.fc_rot = nn.Linear(width, 9)

    def forward(self, tokens: Float[Tensor, "frames patches width"]) -> Float[Tensor, "frames 4 4"]:
        for unit in self.res_conv:
            tokens = unit(tokens)
        x = self.more_mlps(tokens.mean(1))
        rows = F.normalize(self.fc_rot(x).unflatten(-1, (3, 3)), dim=-1)
        return se3(nearest_rotation(rows), self.fc_t(x))


class Scene(Branch):
    """The whole scene branch, with Pi3's parameter names."""

    image_mean: Tensor
    image_std: Tensor

    def __init__(self, config: SceneConfig) -> None:
        super().__init__()
        self.config = config
        width, out = config.decoder.width, config.readout.width
        self.encoder = Encoder(config)
        self.register_token = nn.Parameter(torch.empty(1, 1, config.registers, width).normal_(std=1e-6))
        self.decoder = nn.ModuleList(
            Block(config.decoder, layer_scale=0.01, qk_norm=True) for _ in range(config.decoder.depth)
        )
        self.point_decoder = Readout(config.readout, config.hidden, out)
        self.conf_decoder = Readout(config.readout, config.hidden, out)
        self.camera_decoder = Readout(config.readout, config.hidden, config.camera_width)
        self.point_head = PixelHead(out, 3, config.patch)
        self.conf_head = PixelHead(out, 1, config.patch)
        self.camera_head = CameraHead(config.camera_width)
        self.register_buffer("image_mean", torch.tensor(IMAGE_MEAN).view(1, 3, 1, 1))
        self.register_buffer("image_std", torch.tensor(IMAGE_STD).view(1, 3, 1, 1))

    def float32_parts(self) -> tuple[nn.Module, ...]:
        """The heads, whose weights and arithmetic are always float32."""
        return self.point_head, self.conf_head, self.camera_head

    def rotary(self, rows: int, columns: int, device: torch.device, dtype: torch.dtype, rounded: bool) -> Rotary:
        """The cross-frame transformer's tables for one grid; all frames and blocks use them."""
        config = self.config
        return grid_rotary(
            rows,
            columns,
            config.registers,
            config.decoder.head_dim,
            config.rope_base,
            dtype=dtype,
            device=device,
            round_angles=rounded,
        )

    def mix(self, tokens: Float[Tensor, "B S patches width"], rotary: Rotary) -> Float[Tensor, "B S tokens 2*width"]:
        """The cross-frame transformer; it adds registers before the patches."""
        batch, frames, _, width = tokens.shape
        x = torch.cat((self.register_token.to(tokens.dtype).expand(batch, frames, -1, -1), tokens), 2)
        count = x.shape[2]
        # every frame has the same positions, so the global blocks repeat one frame's table
        everywhere = Rotary(rotary.cos.repeat(frames, 1, 1), rotary.sin.repeat(frames, 1, 1))
        before = x
        for index, block in enumerate(self.decoder):
            before = x
            if index % 2:
                x = self.run(block, x.reshape(batch, frames * count, width), everywhere)
            else:
                x = self.run(block, x.reshape(batch * frames, count, width), rotary)
            x = x.reshape(batch, frames, count, width)
        return torch.cat((before, x), -1)

    def read(
        self, decoder: Readout, hidden: Float[Tensor, "B S tokens hidden"], rotary: Rotary, frame_step: int | None
    ) -> Float32[Tensor, "frames patches out"]:
        """A decoder's features for every patch, `frame_step` frames at a time."""
        x = by_frames(lambda part: decoder(part, rotary), hidden.flatten(0, 1), frame_step)
        return x[:, self.config.registers :].float()

    def forward(
        self,
        images: Float[Tensor, "B S 3 H W"],
        *,
        round_angles: bool = False,
        frame_step: int | None = None,
        positions: Float[Tensor, "1 positions width"] | None = None,
    ) -> SceneOutput:
        """Run the branch.

        images: RGB in [0, 1], H and W multiples of the patch.
        round_angles: round rotary angles to the token type, as the released code does (matters below float32).
        frame_step: frames per step in the per-frame parts: the same result with less peak memory.
        positions: `encoder.positions(h, w)` if already computed.
        Raises ValueError for a wrong shape.
        """
        patch = self.config.patch
        if images.ndim != 5 or images.shape[2] != 3 or images.shape[3] % patch or images.shape[4] % patch:
            shape = tuple(images.shape)
            raise ValueError(f"images must be (B, S, 3, H, W) with H and W multiples of {patch}, not {shape}")
        batch, frames, _, height, width = images.shape
        rows, columns = height // patch, width // patch
        if positions is None:
            positions = self.encoder.positions(rows, columns)
        weights = self.encoder.patch_embed.proj.weight.dtype
        normalised = ((images.float() - self.image_mean) / self.image_std).to(weights).flatten(0, 1)
        tokens = by_frames(lambda part: self.encoder(part, positions), normalised, frame_step)
        device = images.device
        rotary = self.rotary(rows, columns, device, autocast_type(device) or weights, round_angles)
        hidden = self.mix(tokens.unflatten(0, (batch, frames)), rotary)

        decoders = self.point_decoder, self.conf_decoder, self.camera_decoder
        points, conf, camera = (self.read(decoder, hidden, rotary, frame_step) for decoder in decoders)
        with full_precision(device):
            raw = self.point_head(points, rows, columns)
            z = raw[..., 2:].exp()
            return SceneOutput(
                local_points=torch.cat((raw[..., :2] * z, z), -1).unflatten(0, (batch, frames)),
                conf_logits=self.conf_head(conf, rows, columns)[..., 0].unflatten(0, (batch, frames)),
                c2ws=self.camera_head(camera).unflatten(0, (batch, frames)),
                hidden=hidden,
            )
