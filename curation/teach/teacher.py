"""Depth teachers: MoGe-2, a folder of depth somebody else computed, or none.

A teacher sees the very JPEGs that train and answers on their grid. It never judges a clip, never writes a file of its
own, and never unpickles code. `check_teacher` finds every set-up fault before the first video is decoded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from curation.files import sha256_file
from curation.records import Frames, TeacherDepth
from curation.settings import TeacherSettings
from curation.teach.folder import FolderTeacher, depth_folder
from curation.teach.moge import MogeTeacher, hub_weights, local_weights, read_network, torch_device


class Teacher(Protocol):
    """Gives a clip its depth."""

    @property
    def provenance(self) -> dict[str, Any]:
        """What made the depth, as JSON values: kind, name, and all that changes the numbers. Holds no path."""
        ...

    def __call__(self, frames: Frames, clip_id: str) -> TeacherDepth | None:
        """Depth of every frame, or None if this teacher gives none. Raises ClipFailure for a clip it cannot do.

        It calls `check_time` between two steps, so that it can be ended.
        """
        ...


def check_teacher(settings: TeacherSettings) -> TeacherSettings:
    """Find what would stop `load_teacher`, fetching a Hub model's weights once if they are not in the cache.

    Returns the settings with local paths absolute. Reads the structure of a checkpoint, not its numbers.
    Raises UsageError: no weights and no network, a file that is no MoGe-2 checkpoint, a missing folder or device.
    """
    if settings.kind == "moge":
        local = local_weights(settings.model)
        weights = local or hub_weights(settings.model)
        read_network(weights, mmap=True)
        torch_device(settings.device)
        return settings.model_copy(update={"model": str(local)}) if local else settings
    if settings.kind == "folder":
        folder = depth_folder(settings.model)
        return settings.model_copy(update={"model": str(folder), "name": settings.name or folder.name})
    return settings


def load_teacher(settings: TeacherSettings) -> Teacher:
    """The teacher of these settings, ready to be called. Raises UsageError as `check_teacher` does."""
    if settings.kind == "moge":
        return MogeTeacher(settings)
    if settings.kind == "folder":
        return FolderTeacher(settings)
    return NoTeacher()


def teacher_identity(settings: TeacherSettings) -> dict[str, Any]:
    """What tells one data set's teacher from another's, without loading it: its weights and parameters.

    Number format and versions are left to the provenance of each clip, so that unlike machines may share the work, and
    so is the content of a depth folder, which may still grow. Raises UsageError where the weights are not here.
    """
    if settings.kind == "moge":
        local = local_weights(settings.model)
        return {
            "kind": "moge",
            "name": settings.name or "moge-2",
            "sha256": sha256_file(local or hub_weights(settings.model)),
            "num_tokens": settings.num_tokens,
        }
    if settings.kind == "folder":
        return {"kind": "folder", "name": settings.name or Path(settings.model).name}
    return {"kind": "none", "name": "none"}


class NoTeacher:
    """Shards without depth, and a provenance that says so."""

    def __init__(self) -> None:
        """Nothing to load."""
        self.provenance: dict[str, Any] = {"kind": "none", "name": "none"}

    def __call__(self, frames: Frames, clip_id: str) -> None:
        """No depth."""
        return None


def depth_preview(depth_m: NDArray[np.float32], valid: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """(H, W) metres -> (H, W, 3) RGB, near is warm, black where invalid; the scale is the picture's own."""
    nearness = 1 / np.where(valid, depth_m, 1)
    low, high = np.percentile(nearness[valid], [2, 98]) if valid.any() else (0.0, 1.0)
    level = np.clip((nearness - low) / max(high - low, 1e-9), 0, 1)
    colour = cv2.applyColorMap(np.rint(level * 255).astype(np.uint8), cv2.COLORMAP_TURBO)
    return np.where(valid[..., None], colour[..., ::-1], 0).astype(np.uint8)


# MoGe-2's weights


# depth folders
