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

WEIGHTS_FILE = "model.pt"  # the one file of a MoGe repository
HUB_TIMEOUT_S = 10.0
_HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
_BACKBONE = re.compile(r"dinov2_vit[sblg]14(_reg)?|synthetic_vit14")
_CONFIG_PARTS = ("encoder", "neck", "points_head", "mask_head", "scale_head")


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
        local = local_weights(settings.model)
        weights = local or hub_weights(settings.model)
        self.network = read_network(weights)
        self.device = torch_device(settings.device)
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


def local_weights(model: str) -> Path | None:
    """The absolute path of a local file, also as the folder that holds it; None if `model` is a Hub id."""
    path = Path(model).expanduser().absolute()
    if path.is_dir():
        path /= WEIGHTS_FILE
    if path.is_file():
        return path
    if path.suffix in {".pt", ".pth", ".ckpt"} or not _HUB_ID.fullmatch(model):
        raise UsageError(f"No weights file {path}: correct the path, or give a Hugging Face id such as owner/name.")
    return None


def hub_weights(model: str) -> Path:
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


def read_network(path: Path, *, mmap: bool = False) -> Any:
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


def torch_device(name: str) -> Any:
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
