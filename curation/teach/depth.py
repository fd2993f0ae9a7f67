"""Depth teachers: MoGe-2, a folder of depth somebody else computed, or none.

A teacher sees the very JPEGs that train and answers on their grid. It never judges a clip, never writes a file of its
own, and never unpickles code. `check_teacher` finds every set-up fault before the first video is decoded.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import math
import os
import re
import warnings
import zipfile
import zlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from curation.deadlines import check_time
from curation.failures import ClipFailure, FailureCode, UsageError
from curation.files import sha256_file
from curation.records import Frames, TeacherDepth
from curation.settings import TeacherSettings
from curation.shards.codec import decode_jpeg
from curation.shards.schema import ShardError

WEIGHTS_FILE = "model.pt"  # the one file of a MoGe repository
HUB_TIMEOUT_S = 10.0
SAME_FRAME_S = 0.005  # times may be rounded to milliseconds; a neighbouring frame is never this close
ASPECT_TOLERANCE = 0.15  # tools round sides as well, and that stretches a narrow picture by up to a tenth
_HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
_BACKBONE = re.compile(r"dinov2_vit[sblg]14(_reg)?|synthetic_vit14")
_ENTRY_ARRAYS = ("depth", "intrinsics", "valid", "times_s")
_CONFIG_PARTS = ("encoder", "neck", "points_head", "mask_head", "scale_head")


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
        local = _local_weights(settings.model)
        weights = local or _hub_weights(settings.model)
        _read_network(weights, mmap=True)
        _device(settings.device)
        return settings.model_copy(update={"model": str(local)}) if local else settings
    if settings.kind == "folder":
        folder = _depth_folder(settings.model)
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
        local = _local_weights(settings.model)
        return {
            "kind": "moge",
            "name": settings.name or "moge-2",
            "sha256": sha256_file(local or _hub_weights(settings.model)),
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


class MogeTeacher:
    """MoGe-2: metric depth, validity and intrinsics of every frame by itself, in batches.

    The focal length is the one predicted for that frame: nothing is smoothed over the clip, so that a consumer can
    still tell a zoom from noise. The principal point is the centre of the image. fp16 on CUDA, fp32 on CPU.

    MoGe takes the pixels of an image for square, which those of a stretched grid are not: where fx / fy is the stretch
    s, it finds one focal length f between the two. That is taken for their geometric mean, fx = f sqrt(s) and
    fy = f / sqrt(s). Their ratio, and with it every shape parallel to the image, is then right whatever f was; and if f
    was the true fx or fy, the worst case, both are off by a factor sqrt(s), below 0.5 % at 16:9. Depth stays.
    """

    def __init__(self, settings: TeacherSettings) -> None:
        """Load the weights. Raises UsageError."""
        local = _local_weights(settings.model)
        weights = local or _hub_weights(settings.model)
        self.network = _read_network(weights)
        self.device = _device(settings.device)
        self.fp16 = self.device.type == "cuda"
        self.num_tokens = settings.num_tokens
        self.batch_size = settings.batch_size
        if hasattr(self.network, "normal_head"):
            del self.network.normal_head  # a tenth of the time on a CPU, and depth does not depend on it
        self.network.to(self.device)
        self.provenance: dict[str, Any] = {
            "kind": "moge",
            "name": settings.name or "moge-2",
            "model": local.name if local else settings.model,
            "sha256": sha256_file(weights),
            "num_tokens": self.num_tokens,
            "dtype": "float16" if self.fp16 else "float32",
            "moge": _moge_version(),
        }

    def __call__(self, frames: Frames, clip_id: str) -> TeacherDepth:
        """Depth of all frames, (N, H, W); a batch never spans clips. Raises ClipFailure for a damaged frame."""
        count = len(frames.jpeg)
        depth_m = np.zeros((count, frames.height, frames.width), np.float32)
        valid = np.zeros(depth_m.shape, np.bool_)
        intrinsics = np.zeros((count, 3, 3), np.float32)
        for start in range(0, count, self.batch_size):
            check_time()
            batch = slice(start, start + self.batch_size)
            images = np.stack([_decode(jpeg, frames) for jpeg in frames.jpeg[batch]])
            depth_m[batch], valid[batch], intrinsics[batch] = self._infer(images)
        intrinsics *= np.array([frames.width, frames.height, 1], np.float32)[:, None]
        intrinsics[:, 0, 0] *= math.sqrt(frames.stretch)
        intrinsics[:, 1, 1] /= math.sqrt(frames.stretch)
        return TeacherDepth(depth_m, valid, intrinsics)

    def _infer(self, images: NDArray[np.uint8]) -> tuple[NDArray[Any], NDArray[np.bool_], NDArray[Any]]:
        """(B, H, W, 3) RGB -> depth in metres, 0 where invalid; validity; intrinsics for an image of size 1 x 1."""
        import torch

        batch = torch.from_numpy(images).to(self.device).permute(0, 3, 1, 2).float() / 255
        # deterministic kernels: the same clip gives the same shard bytes on the same machine
        with warnings.catch_warnings(), torch.backends.cudnn.flags(enabled=True, deterministic=True):
            warnings.filterwarnings("ignore", message="In CPU autocast")
            output = self.network.infer(batch, num_tokens=self.num_tokens, use_fp16=self.fp16)
        depth = output["depth"].cpu().numpy()
        valid = output["mask"].cpu().numpy() & np.isfinite(depth) & (depth > 0)
        return np.where(valid, depth, 0), valid, output["intrinsics"].cpu().numpy()


@dataclass(frozen=True, slots=True)
class _Entry:
    """One file of a depth folder: (M, h, w) metres, (M, 3, 3) pixels of h x w, (M, h, w), (M,) seconds or None."""

    depth: NDArray[Any]
    intrinsics: NDArray[Any]
    valid: NDArray[np.bool_]
    times_s: NDArray[np.float64] | None


class FolderTeacher:
    """Depth that a video-based teacher such as MegaSAM computed beforehand: <folder>/<clip_id>.npz.

    Each file holds `depth` (M, h, w) in metres, `intrinsics` (M, 3, 3) in pixels of h x w, and optionally `valid`
    (M, h, w) and `times_s` (M,) relative to the video's first frame. With times, each frame takes the depth of its own
    time; without, M must be the number of frames.
    """

    def __init__(self, settings: TeacherSettings) -> None:
        """Look at the folder. Raises UsageError."""
        self.folder = _depth_folder(settings.model)
        self.provenance: dict[str, Any] = {
            "kind": "folder",
            "name": settings.name or self.folder.name,
            "files_sha256": _folder_hash(self.folder),
        }

    def __call__(self, frames: Frames, clip_id: str) -> TeacherDepth:
        """The clip's depth by nearest pixel on the training grid. Raises ClipFailure(MISSING_DEPTH)."""
        entry = _read_entry(self.folder / f"{clip_id}.npz")
        height, width = entry.depth.shape[1:]
        displayed = frames.width / frames.height / frames.stretch
        if not 1 - ASPECT_TOLERANCE < displayed / (width / height) < 1 + ASPECT_TOLERANCE:
            raise _missing(
                f"depth of {width}x{height} has another shape than a picture of {displayed:.3f}:1; "
                "compute it on the displayed picture"
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


def depth_preview(depth_m: NDArray[np.float32], valid: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """(H, W) metres -> (H, W, 3) RGB, near is warm, black where invalid; the scale is the picture's own."""
    nearness = 1 / np.where(valid, depth_m, 1)
    low, high = np.percentile(nearness[valid], [2, 98]) if valid.any() else (0.0, 1.0)
    level = np.clip((nearness - low) / max(high - low, 1e-9), 0, 1)
    colour = cv2.applyColorMap(np.rint(level * 255).astype(np.uint8), cv2.COLORMAP_TURBO)
    return np.where(valid[..., None], colour[..., ::-1], 0).astype(np.uint8)


# MoGe-2's weights


def _local_weights(model: str) -> Path | None:
    """The absolute path of a local file, also as the folder that holds it; None if `model` is a Hub id."""
    path = Path(model).expanduser().absolute()
    if path.is_dir():
        path /= WEIGHTS_FILE
    if path.is_file():
        return path
    if path.suffix in {".pt", ".pth", ".ckpt"} or not _HUB_ID.fullmatch(model):
        raise UsageError(f"No weights file {path}: correct the path, or give a Hugging Face id such as owner/name.")
    return None


def _hub_weights(model: str) -> Path:
    """The cached weights, without any network; else one bounded question to the Hub, then the download."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read when huggingface_hub is first imported
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache

    try:
        cached = try_to_load_from_cache(model, WEIGHTS_FILE)
        if isinstance(cached, str):
            return Path(cached)
        # hf_hub_download alone would try an unreachable Hub again for up to minutes
        get_hf_file_metadata(hf_hub_url(model, WEIGHTS_FILE), timeout=HUB_TIMEOUT_S)
        return Path(hf_hub_download(model, WEIGHTS_FILE))
    except Exception as error:  # each version of huggingface_hub brings another HTTP client and its own errors
        raise UsageError(
            f"The teacher's weights {model} are not on this machine and could not be fetched ({type(error).__name__}): "
            f"on a connected machine run `hf download {model} {WEIGHTS_FILE}` and point HF_HOME here at that cache; "
            f"or copy its {WEIGHTS_FILE} here and pass --teacher PATH; or write shards without depth: --teacher none."
        ) from error


def _read_network(path: Path, *, mmap: bool = False) -> Any:
    """A MoGe-2 network in fp32 on the CPU, in evaluation mode, every weight from the file. Raises UsageError.

    MoGeModel.from_pretrained leaves what a file lacks at random values without a word, so the file is read here.
    """
    try:
        import torch
        from moge.model.v2 import MoGeModel
    except ImportError as error:
        raise UsageError(f"The MoGe-2 teacher needs {error.name}: pip install 'unish[curate]'.") from error

    if not zipfile.is_zipfile(path):
        raise _wrong_weights(path, "is no PyTorch checkpoint, or is cut short: fetch it again")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # damaged, or code where weights should be; torch has no common type for these
        raise _wrong_weights(path, "is damaged, or holds more than plain weights: fetch it again") from error
    config, state = _checkpoint_parts(path, checkpoint)
    if config["encoder"]["backbone"] == "synthetic_vit14":  # a size that MoGe does not know by itself
        from curation.teach.small_backbone import register

        register()
    try:
        with torch.device("meta"), _linspace_on_cpu():  # no time and memory for numbers that are replaced at once
            network = MoGeModel(**config)
        network.load_state_dict(state, strict=True, assign=True)
    except Exception as error:  # the configuration is data from the file, and any of it may be wrong
        raise _wrong_weights(path, "does not hold the weights of the MoGe-2 network it describes") from error
    return network.float().eval().requires_grad_(False)


def _checkpoint_parts(path: Path, checkpoint: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """(model_config, state dict) of a MoGe-2 checkpoint with metric scale."""
    if not isinstance(checkpoint, dict):
        checkpoint = {}
    config, state = checkpoint.get("model_config"), checkpoint.get("model")
    if not isinstance(config, dict) or not isinstance(state, dict):
        raise _wrong_weights(path, "is no MoGe-2 checkpoint: it lacks model_config and model")
    if isinstance(config.get("encoder"), str):
        raise _wrong_weights(path, "is a MoGe-1 checkpoint, whose depth has no metric scale")
    missing = [part for part in _CONFIG_PARTS if not isinstance(config.get(part), dict)]
    if missing:
        raise _wrong_weights(path, f"is no MoGe-2 checkpoint with metric depth: it has no {', '.join(missing)}")
    if not _BACKBONE.fullmatch(str(config["encoder"].get("backbone"))):
        raise _wrong_weights(path, "names an encoder that is no DINOv2 network")
    return config, state


def _wrong_weights(path: Path, what: str) -> UsageError:
    default = TeacherSettings.model_fields["model"].default
    return UsageError(f"{path} {what}; give a MoGe-2 checkpoint such as {default}, or --teacher none.")


def _linspace_on_cpu() -> Any:
    """DINOv2's constructor reads numbers back from torch.linspace, which the meta device cannot give."""
    import torch
    from torch.overrides import TorchFunctionMode

    class LinspaceOnCpu(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = dict(kwargs or {})
            if func is torch.linspace:
                kwargs["device"] = "cpu"
            return func(*args, **kwargs)

    return LinspaceOnCpu()


def _device(name: str) -> Any:
    """auto takes CUDA where there is one."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name != "cpu" and not re.fullmatch(r"cuda(:\d+)?", name):
        raise UsageError(f"Unknown device {name!r} for the teacher: choose auto, cpu, cuda or cuda:N.")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"The teacher was asked to run on {name}, which PyTorch does not see: choose auto or cpu.")
    return device


def _moge_version() -> str:
    for distribution in ("dlr-moge", "moge"):  # as packaged, and as installed from its repository
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"


def _decode(jpeg: bytes, frames: Frames) -> NDArray[np.uint8]:
    """(H, W, 3) RGB."""
    with suppress(ShardError):
        image = decode_jpeg(jpeg)
        if image.shape == (frames.height, frames.width, 3):
            return image
    raise ClipFailure(FailureCode.CORRUPT, "a sampled frame cannot be decoded")


# depth folders


def _depth_folder(folder: str) -> Path:
    path = Path(folder).expanduser().absolute()
    if not path.is_dir():
        raise UsageError(f"No depth folder {path}: correct the path, or choose another teacher.")
    if next(path.glob("*.npz"), None) is None:
        raise UsageError(f"The depth folder {path} has no <clip_id>.npz: write each clip's depth there first.")
    return path


def _folder_hash(folder: Path) -> str:
    """Hex SHA-256 over names, sizes and zip checksums of all arrays: changes with any number, reads no depth."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.npz")):
        digest.update(f"{path.name}\n".encode())
        try:
            with zipfile.ZipFile(path) as archive:
                for member in sorted(archive.infolist(), key=lambda member: member.filename):
                    digest.update(f"{member.filename} {member.file_size} {member.CRC:08x}\n".encode())
        except (zipfile.BadZipFile, OSError):
            digest.update(b"damaged\n")  # its clip fails by itself when it is asked for
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
        raise _missing("the depth file is damaged or holds no plain numbers") from error
    if not {"depth", "intrinsics"} <= arrays.keys() or any(array.dtype.kind not in "fiub" for array in arrays.values()):
        raise _missing("the depth file lacks depth or intrinsics as plain numbers")
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
        raise _missing("the depth file's arrays do not fit: depth (N, H, W), intrinsics (N, 3, 3), valid, times_s (N,)")
    if not (np.isfinite(intrinsics).all() and (intrinsics[:, [0, 1], [0, 1]] > 0).all()):
        raise _missing("the depth file's intrinsics hold a focal length that is not a positive number")
    return _Entry(depth, intrinsics, valid.astype(np.bool_) & np.isfinite(depth) & (depth > 0), times_s)


def _match(entry: _Entry, times_s: NDArray[np.float64]) -> NDArray[np.intp]:
    """Which depth map belongs to each frame."""
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
    """For each of `target` pixels, the one of `source` pixels that its centre falls into."""
    return (2 * np.arange(target) + 1) * source // (2 * target)
