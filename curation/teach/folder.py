"""Depth that another tool computed in advance, read from a folder."""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from curation.failures import ClipFailure, FailureCode, UsageError
from curation.records import Frames, TeacherDepth
from curation.settings import TeacherSettings

SAME_FRAME_S = 0.005  # times may be rounded to milliseconds; a neighbouring frame is never this close
ASPECT_TOLERANCE = 0.15  # tools round the sides too, which stretches a narrow picture by up to a tenth
_ENTRY_ARRAYS = ("depth", "intrinsics", "valid", "times_s")


@dataclass(frozen=True, slots=True)
class _Entry:
    """One file of a depth folder: (M, h, w) metres, (M, 3, 3) pixels of h x w, (M, h, w), (M,) seconds or None."""

    depth: NDArray[Any]
    intrinsics: NDArray[Any]
    valid: NDArray[np.bool_]
    times_s: NDArray[np.float64] | None


class FolderTeacher:
    """Depth that a video-based teacher such as MegaSAM computed in advance: <folder>/<clip_id>.npz.

    Each file holds `depth` (M, h, w) in metres, `intrinsics` (M, 3, 3) in pixels of h x w, and optionally `valid`
    (M, h, w) and `times_s` (M,) relative to the video's first frame. With times, each frame gets the depth map at its
    own time; without, M must be the number of frames.
    """

    def __init__(self, settings: TeacherSettings) -> None:
        """Check the folder. Raises UsageError."""
        self.folder = depth_folder(settings.model)
        self.provenance: dict[str, Any] = {
            "kind": "folder",
            "name": settings.name or self.folder.name,
            "files_sha256": _folder_hash(self.folder),
        }

    def __call__(self, frames: Frames, clip_id: str) -> TeacherDepth:
        """The clip's depth on the training grid, by nearest pixel. Raises ClipFailure(MISSING_DEPTH)."""
        entry = _read_entry(self.folder / f"{clip_id}.npz")
        height, width = entry.depth.shape[1:]
        displayed = frames.width / frames.height / frames.stretch
        if not 1 - ASPECT_TOLERANCE < displayed / (width / height) < 1 + ASPECT_TOLERANCE:
            raise _missing(
                f"the depth maps of {width}x{height} have another aspect ratio than the displayed picture, "
                f"{displayed:.3f}:1; compute depth on the displayed picture"
            )
        chosen = _match(entry, frames.times_s)
        rows, columns = _nearest(height, frames.height), _nearest(width, frames.width)
        grid = np.ix_(chosen, rows, columns)
        valid = entry.valid[grid]
        scale = np.array([frames.width / width, frames.height / height, 1])
        return TeacherDepth(
            depth_m=np.where(valid, entry.depth[grid], 0).astype(np.float32),
            valid=valid,
            intrinsics=(entry.intrinsics[chosen] * scale[:, None]).astype(np.float32),
        )


def depth_folder(folder: str) -> Path:
    """The folder's absolute path. Raises UsageError if it is not a folder or holds no depth."""
    path = Path(folder).expanduser().absolute()
    if not path.is_dir():
        raise UsageError(f"There is no depth folder {path}: correct the path, or choose another teacher.")
    if next(path.glob("*.npz"), None) is None:
        raise UsageError(f"The depth folder {path} has no <clip_id>.npz: write each clip's depth there first.")
    return path


def _folder_hash(folder: Path) -> str:
    """Hex SHA-256 over names, sizes and zip checksums of all arrays: changes with any number, without reading depth."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.npz")):
        digest.update(f"{path.name}\n".encode())
        try:
            with zipfile.ZipFile(path) as archive:
                for member in sorted(archive.infolist(), key=lambda member: member.filename):
                    digest.update(f"{member.filename} {member.file_size} {member.CRC:08x}\n".encode())
        except (zipfile.BadZipFile, OSError):
            digest.update(b"damaged\n")  # only the file's own clip fails, when its depth is read
    return digest.hexdigest()


def _missing(what: str) -> ClipFailure:
    return ClipFailure(FailureCode.MISSING_DEPTH, what)


def _read_entry(path: Path) -> _Entry:
    if not path.is_file():
        raise _missing("the depth folder has no file for this clip")
    try:
        if not zipfile.is_zipfile(path):
            raise ValueError("not an npz file")
        with np.load(path, allow_pickle=False) as data:
            arrays = {name: np.asarray(data[name]) for name in _ENTRY_ARRAYS if name in data.files}
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise _missing("the depth file is damaged or contains more than plain numbers") from error
    if not {"depth", "intrinsics"} <= arrays.keys() or any(array.dtype.kind not in "fiub" for array in arrays.values()):
        raise _missing("the depth file lacks depth or intrinsics, or has an array that is not plain numbers")
    depth, intrinsics = arrays["depth"].astype(np.float32), arrays["intrinsics"]
    valid = arrays.get("valid", np.ones(depth.shape, np.bool_))
    times_s = arrays.get("times_s")
    if (
        depth.ndim != 3
        or depth.size == 0
        or valid.shape != depth.shape
        or intrinsics.shape != (len(depth), 3, 3)
        or (times_s is not None and times_s.shape != (len(depth),))
    ):
        raise _missing("the depth file's arrays do not fit: depth (M, h, w), intrinsics (M, 3, 3), valid, times_s (M,)")
    if not (np.isfinite(intrinsics).all() and (intrinsics[:, [0, 1], [0, 1]] > 0).all()):
        raise _missing("a focal length in the depth file's intrinsics is not a positive number")
    return _Entry(depth, intrinsics, valid.astype(np.bool_) & np.isfinite(depth) & (depth > 0), times_s)


def _match(entry: _Entry, times_s: NDArray[np.float64]) -> NDArray[np.intp]:
    """The index of each frame's depth map."""
    if entry.times_s is None:
        if len(entry.depth) != len(times_s):
            raise _missing(f"the depth file has {len(entry.depth)} maps for {len(times_s)} frames and no times_s")
        return np.arange(len(times_s))
    apart = np.abs(times_s[:, None] - entry.times_s)
    chosen = apart.argmin(axis=1)
    late = int((~(apart.min(axis=1) <= SAME_FRAME_S)).sum())  # also where a time is NaN
    if late:
        raise _missing(f"the depth file has no map at the time of {late} of {len(times_s)} frames")
    return chosen


def _nearest(source: int, target: int) -> NDArray[np.intp]:
    """For each of `target` pixels, the index of the one of `source` pixels that contains its centre."""
    return (2 * np.arange(target) + 1) * source // (2 * target)
