"""Depth teachers: MoGe-2, a folder of precomputed depth, or none.

A teacher reads the JPEGs that are stored for training and returns depth on their grid. It never judges a clip, never
writes a file, and never unpickles code. `check_teacher` finds every set-up error before the first video is decoded.
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
        """What made the depth, as JSON values: kind, name, and all that affects the numbers. Contains no path."""
        ...

    def __call__(self, frames: Frames, clip_id: str) -> TeacherDepth | None:
        """Depth of every frame, or None if this teacher gives none. Raises ClipFailure if it cannot process the clip.

        It calls `check_time` between steps, so that it can be stopped.
        """
        ...


def check_teacher(settings: TeacherSettings) -> TeacherSettings:
    """Find whatever would make `load_teacher` fail. Fetches a Hub model's weights if they are not in the cache.

    Returns the settings with local paths absolute. Reads the structure of a checkpoint, not its numbers.
    Raises UsageError: no weights and no network, a file that is not a MoGe-2 checkpoint, a missing folder or device.
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
    """What identifies a data set's teacher, without loading it: its weights and parameters.

    Number format and versions are only in each clip's provenance, so that different machines can share the work; so is
    the content of a depth folder, which may still grow. Raises UsageError if the weights are not on this machine.
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
    """(H, W) metres -> (H, W, 3) RGB, warm is near, black is invalid; each image has its own scale."""
    nearness = 1 / np.where(valid, depth_m, 1)
    low, high = np.percentile(nearness[valid], [2, 98]) if valid.any() else (0.0, 1.0)
    level = np.clip((nearness - low) / max(high - low, 1e-9), 0, 1)
    colour = cv2.applyColorMap(np.rint(level * 255).astype(np.uint8), cv2.COLORMAP_TURBO)
    return np.where(valid[..., None], colour[..., ::-1], 0).astype(np.uint8)
