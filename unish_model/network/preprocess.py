"""Video frames and person boxes to the network's inputs. Arrays in, tensors out; no decoding and no detection."""

from __future__ import annotations

import cv2
import numpy as np
import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor
from torch.nn import functional as F

from unish_model.network.human import CROP_SIDE


def network_size(height: int, width: int, longer_side: int = 518, patch: int = 14) -> tuple[int, int]:
    """Height and width of the network's input: the longer side as given, the other a multiple of the patch.

    Raises ValueError if `longer_side` is not a multiple of the patch.
    """
    if longer_side % patch:
        raise ValueError(f"the longer side must be a multiple of {patch}, not {longer_side}")

    def fit(side: int) -> int:
        return (
            longer_side if side == max(height, width) else max(1, round(side * longer_side / max_side / patch)) * patch
        )

    max_side = max(height, width)
    return fit(height), fit(width)


def resize_frames(
    frames: UInt8[np.ndarray, "S H W 3"], longer_side: int = 518, patch: int = 14
) -> Float32[Tensor, "S 3 h w"]:
    """RGB bytes to RGB in [0, 1]: bilinear without antialiasing, as in training."""
    images = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float() / 255
    height, width = frames.shape[1:3]
    size = network_size(height, width, longer_side, patch)
    return F.interpolate(images, size=size, mode="bilinear", align_corners=False)


def crop_people(
    images: Float[Tensor, "B S 3 H W"], boxes: Float[Tensor, "B S 4"], box_scale: float = 1.0
) -> tuple[Float32[Tensor, "B S 3 256 256"], Float32[Tensor, "B S 3"]]:
    """Square person crops and their positions.

    images: in [0, 1]; boxes: left, top, right, bottom as fractions of the image. Returns the crops, black outside the
    image, and bbox_info: box centre from the image centre and side of the square, in pixels.
    """
    height, width = images.shape[-2:]
    size = boxes.new_tensor((width, height))
    low, high = boxes[..., :2] * size, boxes[..., 2:] * size
    centre, side = (low + high) / 2, (high - low).amax(-1) * box_scale
    crops = []
    squares = zip(images.flatten(0, 1), centre.flatten(0, 1).tolist(), side.flatten().tolist(), strict=True)
    for image, (x, y), length in squares:
        half, target = length / 2, CROP_SIDE / 2
        # three points determine the map: the centre, one below it, one right of it; no half-pixel shift
        source = np.asarray([[x, y], [x, y + half], [x + half, y]], np.float32)
        destination = np.asarray([[target, target], [target, CROP_SIDE], [CROP_SIDE, target]], np.float32)
        matrix = cv2.getAffineTransform(source, destination)
        pixels = np.ascontiguousarray(image.permute(1, 2, 0).float().cpu().numpy())
        warped = cv2.warpAffine(pixels, matrix, (CROP_SIDE, CROP_SIDE), flags=cv2.INTER_LINEAR)
        crops.append(torch.from_numpy(warped).permute(2, 0, 1))
    stacked = torch.stack(crops).unflatten(0, images.shape[:2]).to(images.device)
    return stacked, torch.cat((centre - size / 2, side[..., None]), -1).to(images.device, torch.float32)
