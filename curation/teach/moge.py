"""Metric depth from MoGe-2: its weights, and the network on the training frames."""

from __future__ import annotations

import importlib.metadata
import math
import os
import re
import warnings
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from curation.deadlines import check_time
from curation.failures import ClipFailure, FailureCode, UsageError
from curation.files import sha256_file
from curation.records import Frames, TeacherDepth
from curation.settings import TeacherSettings
from curation.shards.codec import decode_jpeg
from curation.shards.schema import ShardError
from curation.teach.small_backbone import register

WEIGHTS_FILE = "model.pt"  # the one file of a MoGe repository
HUB_TIMEOUT_S = 10.0
_HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
_BACKBONE = re.compile(r"dinov2_vit[sblg]14(_reg)?|synthetic_vit14")
_CONFIG_PARTS = ("encoder", "neck", "points_head", "mask_head", "scale_head")


class MogeTeacher:
    """MoGe-2: metric depth, validity and intrinsics, predicted for each frame on its own, in batches.

    The focal length is the frame's own prediction: nothing is smoothed over the clip, so a consumer can still tell a
    zoom from noise. The principal point is the centre of the image. fp16 on CUDA, fp32 on CPU.

    MoGe assumes square pixels, which a stretched grid does not have: where fx / fy is the stretch s, it finds one focal
    length f between the two. Treat f as their geometric mean: fx = f sqrt(s), fy = f / sqrt(s). Their ratio, and every
    shape parallel to the image, is then right whatever f is; in the worst case, where f is the true fx or fy, both are
    off by a factor sqrt(s), below 0.5 % at 16:9. Depth does not change.
    """

    def __init__(self, settings: TeacherSettings) -> None:
        """Load the weights. Raises UsageError."""
        local = local_weights(settings.model)
        weights = local or hub_weights(settings.model)
        self.network = read_network(weights)
        self.device = torch_device(settings.device)
        self.fp16 = self.device.type == "cuda"
        self.num_tokens = settings.num_tokens
        self.batch_size = settings.batch_size
        if hasattr(self.network, "normal_head"):
            del self.network.normal_head  # saves a tenth of the time on a CPU; depth does not depend on it
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
        """Depth of all frames, (N, H, W); a batch never spans two clips. Raises ClipFailure if a frame is damaged."""
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


def local_weights(model: str) -> Path | None:
    """The absolute path of a local file, or of the file in a local folder; None if `model` is a Hub id."""
    path = Path(model).expanduser().absolute()
    if path.is_dir():
        path /= WEIGHTS_FILE
    if path.is_file():
        return path
    if path.suffix in {".pt", ".pth", ".ckpt"} or not _HUB_ID.fullmatch(model):
        raise UsageError(
            f"There is no weights file {path}: correct the path, or give a Hugging Face id such as owner/name."
        )
    return None


def hub_weights(model: str) -> Path:
    """The cached weights, without network access; else one request to the Hub with a timeout, then the download."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read when huggingface_hub is first imported
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache

    try:
        cached = try_to_load_from_cache(model, WEIGHTS_FILE)
        if isinstance(cached, str):
            return Path(cached)
        # hf_hub_download alone retries an unreachable Hub for up to minutes
        get_hf_file_metadata(hf_hub_url(model, WEIGHTS_FILE), timeout=HUB_TIMEOUT_S)
        return Path(hf_hub_download(model, WEIGHTS_FILE))
    except Exception as error:  # the HTTP client and its errors differ between versions of huggingface_hub
        raise UsageError(
            f"The teacher's weights {model} are not on this machine and could not be fetched ({type(error).__name__}): "
            f"run `hf download {model} {WEIGHTS_FILE}` on a connected machine and set HF_HOME here to a copy of that "
            f"cache; or copy its {WEIGHTS_FILE} here and pass --teacher PATH; or do without depth: --teacher none."
        ) from error


def read_network(path: Path, *, mmap: bool = False) -> Any:
    """A MoGe-2 network in fp32 on the CPU, in evaluation mode, with every weight from the file. Raises UsageError.

    MoGeModel.from_pretrained silently leaves weights that a file lacks at random values, so the file is read here.
    """
    try:
        import torch
        from moge.model.v2 import MoGeModel
    except ImportError as error:
        raise UsageError(f"The MoGe-2 teacher needs {error.name}: pip install 'unish[curate]'.") from error

    if not zipfile.is_zipfile(path):
        raise _wrong_weights(path, "is not a PyTorch checkpoint, or is truncated: fetch it again")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # damaged, or contains code; torch has no common type for these errors
        raise _wrong_weights(path, "is damaged, or contains more than plain weights: fetch it again") from error
    config, state = _checkpoint_parts(path, checkpoint)
    if config["encoder"]["backbone"] == "synthetic_vit14":  # not one of MoGe's own sizes
        register()
    try:
        with torch.device("meta"), _linspace_on_cpu():  # the initial values are replaced at once
            network = MoGeModel(**config)
        network.load_state_dict(state, strict=True, assign=True)
    except Exception as error:  # the configuration comes from the file, and any part of it may be wrong
        raise _wrong_weights(path, "does not hold the weights of the MoGe-2 network it describes") from error
    return network.float().eval().requires_grad_(False)


def _checkpoint_parts(path: Path, checkpoint: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """(model_config, state dict) of a MoGe-2 checkpoint with metric scale."""
    if not isinstance(checkpoint, dict):
        checkpoint = {}
    config, state = checkpoint.get("model_config"), checkpoint.get("model")
    if not isinstance(config, dict) or not isinstance(state, dict):
        raise _wrong_weights(path, "is not a MoGe-2 checkpoint: it lacks model_config or model")
    if isinstance(config.get("encoder"), str):
        raise _wrong_weights(path, "is a MoGe-1 checkpoint, whose depth has no metric scale")
    missing = [part for part in _CONFIG_PARTS if not isinstance(config.get(part), dict)]
    if missing:
        raise _wrong_weights(path, f"is not a MoGe-2 checkpoint with metric depth: it has no {', '.join(missing)}")
    if not _BACKBONE.fullmatch(str(config["encoder"].get("backbone"))):
        raise _wrong_weights(path, "names an encoder that is not a DINOv2 network")
    return config, state


def _wrong_weights(path: Path, what: str) -> UsageError:
    default = TeacherSettings.model_fields["model"].default
    return UsageError(f"{path} {what}; give a MoGe-2 checkpoint such as {default}, or --teacher none.")


def _linspace_on_cpu() -> Any:
    """DINOv2's constructor reads values from torch.linspace, and the meta device has no values."""
    import torch
    from torch.overrides import TorchFunctionMode

    class LinspaceOnCpu(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = dict(kwargs or {})
            if func is torch.linspace:
                kwargs["device"] = "cpu"
            return func(*args, **kwargs)

    return LinspaceOnCpu()


def torch_device(name: str) -> Any:
    """The device of this name; auto is CUDA if available, else the CPU. Raises UsageError."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name != "cpu" and not re.fullmatch(r"cuda(:\d+)?", name):
        raise UsageError(f"Unknown device {name!r} for the teacher: choose auto, cpu, cuda or cuda:N.")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"PyTorch does not find the teacher's device {name}: choose auto or cpu.")
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
