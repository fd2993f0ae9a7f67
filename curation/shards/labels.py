"""Columns that labels add to a shard: the names and types that writers of labels and the training loader share."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Label:
    """One column of ground truth: float32, row-major."""

    name: str
    length: int
    unit: str
    doc: str


LABELS = (
    Label("smpl_pose", 72, "rad", "24 axis-angle rotations; the first is the root's orientation in the world."),
    Label("smpl_betas", 10, "", "Shape, constant over a clip."),
    Label("smpl_transl", 3, "m", "Added to the posed vertices, in the world."),
    Label(
        "extrinsics", 16, "m", "World to camera, 4 x 4: OpenCV camera (x right, y down, z forward); the world has y up."
    ),
    Label("joints_3d", 72, "m", "24 joints in the world."),
    Label(
        "joints_2d",
        48,
        "px",
        "24 joints on the training grid, also where hidden or outside; the first pixel's centre is (0.5, 0.5).",
    ),
)
