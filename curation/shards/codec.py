"""Pixels to bytes and back: JPEG frames, logarithmic depth, packed masks. Same input, same bytes. Never touches a file.

Depth is stored on one logarithmic grid of 1024 levels per factor e, so rounding to the nearest level has a relative
error of at most exp(1 / 2048) - 1 = 4.9e-4 at any distance. A clip's range only sets the grid level of code 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import blosc2
import cv2
import numpy as np
from numpy.typing import NDArray

from curation.shards.schema import ShardError

LEVELS_PER_E = 1024
MAX_LEVELS = 2**16 - 1
MAX_RELATIVE_ERROR = 5e-4
# On seven real clips at 518 px: 95 takes 47 kB at 44.2 dB, 90 takes 33 kB at 41.8 dB (38 in the worst clip). Shards are
# written once, often after the video is deleted, and surface refinement learns from fine texture.
JPEG_QUALITY = 95


@dataclass(frozen=True, slots=True)
class DepthRange:
    """Natural logarithms of a clip's nearest and farthest level, in log metres; both multiples of 1 / 1024.

    Such multiples are exact in float32, so nothing is lost when the range is stored.
    """

    log_min: float
    log_max: float

    @property
    def levels(self) -> int:
        """Number of levels, the largest code."""
        return round((self.log_max - self.log_min) * LEVELS_PER_E) + 1

    def table(self) -> NDArray[np.float32]:
        """Depth in metres by code, (levels + 1,) float32; code 0, invalid, is 0 m."""
        first = round(self.log_min * LEVELS_PER_E)
        metres = np.exp(np.arange(first - 1, first + self.levels) / LEVELS_PER_E).astype(np.float32)
        metres[0] = 0
        return metres


def usable(depth_m: NDArray[np.float32], valid: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Pixels whose depth a shard can store: valid, finite and positive."""
    return valid & np.isfinite(depth_m) & (depth_m > 0)


def depth_range(depth_m: NDArray[np.float32], valid: NDArray[np.bool_]) -> DepthRange:
    """The range that covers every usable pixel of a clip, (N, H, W) metres; for a clip with none, the range of 1 m.

    Raises ShardError if farthest / nearest exceeds e^64.
    """
    pixels = usable(depth_m, valid)
    if not pixels.any():
        return DepthRange(0.0, 0.0)
    nearest = float(np.min(depth_m, where=pixels, initial=np.inf))
    farthest = float(np.max(depth_m, where=pixels, initial=0))
    bounds = DepthRange(
        math.floor(math.log(nearest) * LEVELS_PER_E) / LEVELS_PER_E,
        math.ceil(math.log(farthest) * LEVELS_PER_E) / LEVELS_PER_E,
    )
    if bounds.levels > MAX_LEVELS:
        raise ShardError(
            f"Depth from {nearest:.3g} to {farthest:.3g} m needs {bounds.levels} levels, more than the {MAX_LEVELS} of "
            "16 bits; the teacher's depth is wrong: run the teacher again, or mark those pixels invalid."
        )
    return bounds


def encode_depth(depth_m: NDArray[np.float32], valid: NDArray[np.bool_], bounds: DepthRange) -> bytes:
    """Pack one frame's depth, (H, W) metres. Invalid, non-finite and non-positive pixels become code 0.

    Raises ShardError if a usable pixel is outside `bounds`, or does not decode to within 5e-4 of its value.
    """
    pixels = usable(depth_m, valid)
    metres = np.where(pixels, depth_m, 1).astype(np.float64)
    level = np.rint(np.log(metres) * LEVELS_PER_E) + (1 - round(bounds.log_min * LEVELS_PER_E))
    if np.any((level < 1) | (level > bounds.levels), where=pixels):
        raise ShardError("A depth pixel is outside the clip's range; use the range of the whole clip.")
    codes = np.where(pixels, level, 0).astype(np.uint16)
    if np.any(np.abs(bounds.table()[codes] / metres - 1) > MAX_RELATIVE_ERROR, where=pixels):
        raise ShardError(f"A depth pixel does not decode to within {MAX_RELATIVE_ERROR:g}; is it denormal?")
    return _pack(codes)


def decode_codes(blob: bytes, height: int, width: int) -> NDArray[np.uint16]:
    """The (H, W) codes of a packed depth map. Raises ShardError if the bytes are not a map of that size."""
    try:
        folded = np.frombuffer(blosc2.decompress2(blob, nthreads=1), "<u2").reshape(height, width)
    except (RuntimeError, ValueError, TypeError) as error:
        raise ShardError(
            f"A depth map is not a packed map of {width}x{height}; the shard is damaged: write it again."
        ) from error
    change = ((folded >> 1) ^ -(folded & 1)).view(np.int16)
    # An integral image is the double cumulative sum; OpenCV's is five times faster than two of numpy's, and sums of
    # 16-bit integers are exact in float64 for any image below 2^37 pixels.
    total = cv2.integral(change.astype(np.float32), sdepth=cv2.CV_64F)[1:, 1:]
    return total.astype(np.int64).astype(np.uint16)


def decode_depth(
    blob: bytes, height: int, width: int, bounds: DepthRange, out: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """One frame's depth, (H, W) float32 metres, 0 where invalid; into `out` if given. Raises like decode_codes.

    A code above the range, which no writer makes, decodes to the farthest level; `verify` reports it.
    """
    return np.take(bounds.table(), decode_codes(blob, height, width), out=out, mode="clip")


def encode_jpeg(rgb: NDArray[np.uint8], quality: int = JPEG_QUALITY) -> bytes:
    """JPEG of an (H, W, 3) RGB image."""
    done, data = cv2.imencode(".jpg", cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
    if not done:
        raise ShardError(f"An image of shape {rgb.shape} cannot be encoded as JPEG; give (H, W, 3) uint8.")
    return data.tobytes()


def decode_jpeg(data: bytes) -> NDArray[np.uint8]:
    """The (H, W, 3) RGB image of a JPEG. Raises ShardError if the bytes are not a JPEG."""
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    bgr = cv2.imdecode(np.frombuffer(data, np.uint8), flags) if data else None  # OpenCV raises for empty input
    if bgr is None:
        raise ShardError("A frame is not a readable JPEG; the shard is damaged: write it again.")
    return np.asarray(cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB), np.uint8)


def pack_mask(mask: NDArray[np.bool_]) -> bytes:
    """An (H, W) mask as bits, row-major, most significant first. The Parquet column compresses them."""
    return np.packbits(mask).tobytes()


def unpack_mask(data: bytes, height: int, width: int) -> NDArray[np.bool_]:
    """The (H, W) mask of packed bits. Raises ShardError if their number is wrong."""
    if len(data) != (height * width + 7) // 8:
        raise ShardError(f"A mask of {len(data)} bytes is not one of {width}x{height}; write the shard again.")
    bits = np.unpackbits(np.frombuffer(data, np.uint8), count=height * width)
    return bits.view(np.bool_).reshape(height, width)


def _pack(codes: NDArray[np.uint16]) -> bytes:
    zero = np.uint16(0)
    change = np.diff(np.diff(codes, axis=0, prepend=zero), axis=1, prepend=zero).view(np.int16)
    # Zigzag: without it every small negative difference sets all high bit planes, which costs 12% more bytes.
    folded = ((change << 1) ^ (change >> 15)).astype("<i2")
    return blosc2.compress2(
        folded,
        codec=blosc2.Codec.ZSTD,
        clevel=5,
        filters=[blosc2.Filter.BITSHUFFLE],
        typesize=2,
        nthreads=1,
        blocksize=folded.nbytes,  # a block per frame: 2-3% smaller than blocks that fit the first cache
    )
