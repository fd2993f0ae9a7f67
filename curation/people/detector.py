"""Detects boxes of people and things with ultralytics.

On CUDA the model runs in half precision on batches; on a CPU the same weights run through OpenVINO, exported once per
weights file into the user's cache. Input is rectangular: no work on padding. This module never judges a box.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from curation.failures import UsageError
from curation.files import sha256_file
from curation.people.weights import cache_folder, find_weights, keep_quiet, load_model
from curation.settings import ObserveSettings

PERSON = "person"
_STRIDE = 32
_PAD = 114  # the grey that ultralytics trains and predicts with
_NMS_IOU = 0.7  # ultralytics' own default for prediction


# (n, H, W, 3) uint8 RGB -> the network's output, as a tensor for ultralytics' non-maximum suppression.
Forward = Callable[[NDArray[np.uint8]], Any]


class Detections(NamedTuple):
    """Boxes of one frame: xyxy (k, 4) float32 in fractions of the upright image, confidence (k,), class id (k,)."""

    xyxy: NDArray[np.float32]
    confidence: NDArray[np.float32]
    klass: NDArray[np.int32]


class Detector:
    """An ultralytics detector behind one call.

    detector(images) takes upright (H, W, 3) uint8 RGB images of one size and returns one Detections for each.
    `names` maps class ids to names; `provenance` records the weights and the backend.
    """

    def __init__(self, weights: Path, *, device: str, long_side: int, confidence: float) -> None:
        keep_quiet()
        self.weights = weights
        self.sha256 = sha256_file(weights)
        self.long_side = long_side
        self._confidence = confidence
        self._cuda = device if device.startswith("cuda") else None
        if device != "cpu":
            import torch

            if torch.cuda.is_available():
                self._cuda = self._cuda or "cuda"
            elif self._cuda:
                raise UsageError(f"There is no CUDA device here for --device {device}; use --device auto or cpu.")
        if self._cuda:
            self._forward, self.names = _torch_backend(weights, self._cuda)
        else:
            self._forward, self.names = _openvino_backend(weights, self.sha256, confidence)
        people = [number for number, name in self.names.items() if name == PERSON]
        if not people:
            raise UsageError(f"{weights.name} has no class named 'person'; give a detector that has one.")
        self.person = people[0]

    @property
    def provenance(self) -> dict[str, Any]:
        """Weights, backend and parameters: what a measurement depends on."""
        import ultralytics

        return {
            "weights": self.weights.name,
            "sha256": self.sha256,
            "backend": "torch-fp16" if self._cuda else "openvino-fp32",
            "long_side": self.long_side,
            "confidence": self._confidence,
            "nms_iou": _NMS_IOU,
            "ultralytics": ultralytics.__version__,
        }

    @property
    def batch(self) -> int:
        """How many images to collect for one call: batches help a GPU, not a CPU."""
        return 32 if self._cuda else 1

    def __call__(self, images: Sequence[NDArray[np.uint8]]) -> list[Detections]:
        """Detect on images of one size; coordinates are fractions of that size."""
        from ultralytics.utils.nms import non_max_suppression

        height, width = images[0].shape[:2]
        scale = self.long_side / max(height, width)
        inner = (max(1, round(width * scale)), max(1, round(height * scale)))
        outer = tuple(-(-side // _STRIDE) * _STRIDE for side in inner)
        left, top = (outer[0] - inner[0]) // 2, (outer[1] - inner[1]) // 2
        canvas = np.full((len(images), outer[1], outer[0], 3), _PAD, np.uint8)
        for slot, image in zip(canvas, images, strict=True):
            slot[top : top + inner[1], left : left + inner[0]] = cv2.resize(
                image, inner, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
            )
        raw = self._forward(canvas)
        # No time limit: the load of the machine must not change the result.
        found = non_max_suppression(
            raw, conf_thres=self._confidence, iou_thres=_NMS_IOU, max_time_img=3600.0, nc=len(self.names),
            end2end=raw.shape[-1] == 6,
        )  # fmt: skip
        offset = np.array([left, top, left, top], np.float32)
        size = np.array([*inner, *inner], np.float32)
        results = []
        for boxes in found:
            values = boxes.float().cpu().numpy()
            results.append(
                Detections(
                    np.clip((values[:, :4] - offset) / size, 0, 1).astype(np.float32),
                    values[:, 4].astype(np.float32),
                    values[:, 5].astype(np.int32),
                )
            )
        return results


@lru_cache(maxsize=2)
def load_detector(weights: str, *, device: str, long_side: int, confidence: float) -> Detector:
    """One detector per process and configuration. Raises UsageError if the weights are not available."""
    return Detector(find_weights(weights), device=device, long_side=long_side, confidence=confidence)


def _torch_backend(weights: Path, device: str) -> tuple[Forward, dict[int, str]]:
    import torch

    wrapper = load_model(weights)
    model = wrapper.model.fuse().to(device).half().eval()

    @torch.inference_mode()
    def forward(batch: NDArray[np.uint8]) -> Any:
        pixels = torch.from_numpy(batch).to(device, non_blocking=True).permute(0, 3, 1, 2)
        output = model(pixels.half() / 255)
        return output[0] if isinstance(output, list | tuple) else output

    return forward, dict(wrapper.names)


def _openvino_backend(weights: Path, sha256: str, confidence: float) -> tuple[Forward, dict[int, str]]:
    import openvino
    import torch
    import yaml
    from openvino.preprocess import PrePostProcessor

    folder = _exported(weights, sha256)
    names = yaml.safe_load((folder / "metadata.yaml").read_text())["names"]
    core = openvino.Core()
    steps = PrePostProcessor(core.read_model(next(folder.glob("*.xml"))))
    steps.input().tensor().set_element_type(openvino.Type.u8).set_layout(openvino.Layout("NHWC"))
    steps.input().preprocess().convert_element_type(openvino.Type.f32).scale(255.0)
    steps.input().model().set_layout(openvino.Layout("NCHW"))
    network = steps.build()

    @lru_cache(maxsize=4)  # each holds its own copy of the weights; videos come in few shapes
    def compiled(shape: tuple[int, ...]) -> Any:
        # A fixed shape lets OpenVINO plan its memory and kernels; a dynamic graph is slower on every call.
        network.reshape(shape)
        # One process per core; and full precision, so that machines with and without bf16 units agree.
        options = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
        return core.compile_model(network, "CPU", options).create_infer_request()

    def forward(batch: NDArray[np.uint8]) -> Any:
        raw = np.asarray(compiled(batch.shape).infer({0: batch})[0])
        if raw.shape[-1] != 6:  # torch is slow at finding the few boxes that are not background
            seen = (raw[:, 4:].max(1) > confidence).any(0)
            seen[:7] = True  # six columns would look like the finished boxes of an end-to-end network
            raw = raw[:, :, seen]
        return torch.from_numpy(raw)

    return forward, {int(key): str(value) for key, value in names.items()}


def _exported(weights: Path, sha256: str) -> Path:
    """The OpenVINO form of these weights, exported once: into a temporary folder, then renamed."""
    import openvino

    final = cache_folder() / "openvino" / f"{weights.stem}-{sha256[:16]}-{openvino.__version__.split('-')[0]}"
    if final.is_dir():
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=final.parent) as work:
        copy = Path(work) / f"{weights.stem}.pt"  # ultralytics exports next to its input, which may be read-only
        shutil.copyfile(weights, copy)
        # the size is only used for a trial run; a checkpoint's own size may be unusable
        exported = load_model(copy).export(format="openvino", dynamic=True, imgsz=640, verbose=False)
        try:
            Path(exported).rename(final)
        except OSError:
            if not final.is_dir():  # another process was first; its export is just as good
                raise
    return final


def detector_for(settings: ObserveSettings, weights: str) -> Detector:
    """This process's detector; loaded once."""
    return load_detector(
        weights, device=settings.device, long_side=settings.detector_long_side, confidence=settings.detector_confidence
    )


def detector_ready(weights: str, settings: ObserveSettings) -> None:
    """Export the detector once, before workers start and all wait for it; a bad file fails here, at once."""
    detector_for(settings, weights)
