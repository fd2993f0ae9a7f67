"""The scene branch as an ONNX file for one input shape, for runtimes without PyTorch. Writing needs `onnxscript`."""

from __future__ import annotations

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from unish_model.network.scene import Scene

OUTPUTS = ("local_points", "conf_logits", "c2ws", "hidden")


class FixedScene(nn.Module):
    """The scene branch with the position table of one image size; returns a plain tuple in the order of OUTPUTS."""

    positions: Tensor

    def __init__(self, scene: Scene, height: int, width: int) -> None:
        super().__init__()
        self.scene = scene
        patch = scene.config.patch
        with torch.no_grad():
            # resized once here, because antialiased bicubic resizing differs between runtimes
            table = scene.encoder.positions(height // patch, width // patch).detach()
        self.register_buffer("positions", table)

    def forward(self, images: Float[Tensor, "B S 3 H W"]) -> tuple[Tensor, ...]:
        """Images in [0, 1] to the tensors of `SceneOutput`."""
        out = self.scene(images, positions=self.positions)
        return tuple(getattr(out, name) for name in OUTPUTS)


def export_scene(scene: Scene, images: Float[Tensor, "B S 3 H W"], path: Path) -> None:
    """Write the branch to `path`, for inputs of exactly the shape of `images`."""
    fixed = FixedScene(scene, *images.shape[-2:]).eval()
    with torch.no_grad():
        program = torch.export.export(fixed, (images,))
        torch.onnx.export(program, (), str(path), input_names=["images"], output_names=list(OUTPUTS), dynamo=True)
