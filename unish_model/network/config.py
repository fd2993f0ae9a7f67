"""All sizes of the network as frozen dataclasses. Nothing here builds a module or reads a file.

The released weights need `UniSHConfig.released()`. `paper()` follows the paper's supplement where it differs from the
release (ViTPose-Base instead of ViT-Huge). `tiny()` has the same topology with a few hundred thousand parameters.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

Compat = Literal["default", "released"]
"""`released` repeats the public inference to the digit, mistakes included; `default` corrects them."""

Preset = Literal["released", "paper", "tiny"]
"""A name that `UniSHConfig.named` takes."""


@dataclass(frozen=True)
class TransformerConfig:
    """Size of one stack of pre-norm transformer blocks."""

    width: int
    heads: int
    depth: int
    mlp: int
    """Hidden width of the feed-forward layer."""

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.width // self.heads

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of {self.heads} heads")


@dataclass(frozen=True)
class SceneConfig:
    """Pi3: per-frame encoder, cross-frame transformer, three small decoders with their heads."""

    encoder: TransformerConfig = TransformerConfig(1024, 16, 24, 4096)
    decoder: TransformerConfig = TransformerConfig(1024, 16, 36, 4096)
    """Even blocks attend within a frame, odd blocks across all frames."""
    readout: TransformerConfig = TransformerConfig(1024, 16, 5, 4096)
    """Each of the point, confidence and camera decoders."""
    camera_width: int = 512
    patch: int = 14
    position_grid: int = 37
    """Side of the square grid that the position embedding was trained on."""
    encoder_registers: int = 4
    registers: int = 5
    """Learned tokens before the patches of every frame in the cross-frame transformer."""
    rope_base: float = 100.0

    @property
    def hidden(self) -> int:
        """Width of the features that the decoders and AlignNet get."""
        return 2 * self.decoder.width

    def __post_init__(self) -> None:
        if self.decoder.width != self.encoder.width:
            raise ValueError("the cross-frame transformer takes the encoder's tokens, so their widths must be equal")
        if self.decoder.depth % 2:
            raise ValueError("the cross-frame transformer alternates two kinds of block, so its depth must be even")
        if self.readout.head_dim != self.decoder.head_dim:
            raise ValueError("the decoders share one table of rotary angles, so their head widths must be equal")
        if self.decoder.head_dim % 4:
            raise ValueError(
                f"two-axis rotary embedding needs a head width divisible by 4, not {self.decoder.head_dim}"
            )


@dataclass(frozen=True)
class HumanConfig:
    """CameraHMR: a ViT over the person crop and a one-token SMPL decoder."""

    backbone: TransformerConfig = TransformerConfig(1280, 16, 32, 5120)
    patch: int = 16
    crop: tuple[int, int] = (256, 192)
    """Height and width of the ViT's crop; the network's input is (256, 256), and its outer columns are cut off."""
    drop_path: float = 0.55
    """Largest probability of skipping a residual branch in training; it grows linearly with depth."""
    decoder: TransformerConfig = TransformerConfig(1024, 8, 6, 1024)
    decoder_head_dim: int = 64
    joints: int = 24
    betas: int = 10

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of crop tokens."""
        return self.crop[0] // self.patch, self.crop[1] // self.patch


@dataclass(frozen=True)
class AlignConfig:
    """AlignNet: metric scale of the scene and translation of the body."""

    transformer: TransformerConfig = TransformerConfig(512, 8, 2, 512)
    dropout: float = 0.1
    rope_base: float = 100.0
    rope_table: int = 120
    """Number of positions in training; for longer videos the tables of this length are stretched."""
    trained_fps: float = 6.0


@dataclass(frozen=True)
class UniSHConfig:
    """The whole network."""

    scene: SceneConfig = field(default_factory=SceneConfig)
    human: HumanConfig = field(default_factory=HumanConfig)
    align: AlignConfig = field(default_factory=AlignConfig)

    @classmethod
    def released(cls) -> UniSHConfig:
        """The sizes of the public checkpoints: 1,637,210,554 parameters in 1783 tensors."""
        return cls()

    @classmethod
    def paper(cls) -> UniSHConfig:
        """The supplement's text: ViTPose-Base in the human branch. No public UniSH checkpoint has these sizes."""
        return cls(human=HumanConfig(backbone=TransformerConfig(768, 12, 12, 3072), drop_path=0.3))

    @classmethod
    def tiny(cls) -> UniSHConfig:
        """The same topology with a few hundred thousand parameters, for tests and smoke runs on a CPU."""
        trunk = TransformerConfig(48, 3, 2, 96)
        return cls(
            scene=SceneConfig(
                encoder=trunk,
                decoder=dataclasses.replace(trunk, depth=4),
                readout=dataclasses.replace(trunk, depth=1),
                camera_width=32,
                position_grid=5,
            ),
            human=HumanConfig(
                backbone=trunk, drop_path=0.1, decoder=TransformerConfig(48, 2, 2, 48), decoder_head_dim=16
            ),
            align=AlignConfig(transformer=TransformerConfig(32, 2, 2, 32)),
        )

    @classmethod
    def named(cls, name: str) -> UniSHConfig:
        """`released`, `paper` or `tiny` by name. Raises ValueError for any other."""
        presets = {"released": cls.released, "paper": cls.paper, "tiny": cls.tiny}
        if name not in presets:
            raise ValueError(f"there is no network {name!r}; choose one of {', '.join(presets)}")
        return presets[name]()

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dictionaries, for a checkpoint's metadata."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> UniSHConfig:
        """The inverse of `to_dict`. Raises TypeError for unknown fields."""

        def stack(part: dict[str, Any], *names: str) -> dict[str, Any]:
            return {**part, **{name: TransformerConfig(**part[name]) for name in names}}

        human = stack(data["human"], "backbone", "decoder")
        human["crop"] = tuple(human["crop"])
        return cls(
            scene=SceneConfig(**stack(data["scene"], "encoder", "decoder", "readout")),
            human=HumanConfig(**human),
            align=AlignConfig(**stack(data["align"], "transformer")),
        )
