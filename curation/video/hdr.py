"""Converts HDR frames to the SDR frames that everything after decoding expects, with the same tables for every frame.

PQ and HLG codes are converted to display light (BT.2100; HLG on its nominal display of 1000 cd/m2), display light is
converted to BT.709 primaries, and 203 cd/m2, the reference white of BT.2408, becomes white. Brighter light is clipped.

The resulting codes are those of BT.1886: display light L, relative to white, becomes L^(1/2.4). The BT.709 codes of SDR
video are used unchanged, and BT.1886 defines what they mean on a display. So SDR video that was put into an HDR file
with its white at 203 cd/m2 gets its original codes back. The grey card of BT.2408 (26 cd/m2) becomes 108 of 255; it is
104 in SDR video from a camera. BT.709's own curve maps scene light to codes: for display light it would give 86.
"""

from __future__ import annotations

import functools
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from curation.records import Transfer

# Recorded with every measurement; it changes whenever a pixel of the result may change.
OPERATOR = "bt2408-clip-1"

# Numbers of ITU-T H.273, which streams, containers and FFmpeg use for transfers, primaries and matrices.
_TRANSFERS: dict[int, Transfer] = {16: "pq", 18: "hlg"}
_UNSPECIFIED, _BT709, _BT2020, _DISPLAY_P3 = 2, 1, 9, 12
_FULL_RANGE = 2  # FFmpeg's own
_WHITE = 203.0  # cd/m2
_D65 = (0.3127, 0.3290)
_PRIMARIES = {
    _BT709: ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060)),
    _BT2020: ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046)),
    _DISPLAY_P3: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),
}
_CODES = 1 << 16
_ROWS = 64  # at once: their data stays in the CPU cache, and a 4K frame needs no more memory than these rows


def transfer_of(frame: Any) -> Transfer:
    """The transfer function of a decoded av.VideoFrame; everything that is neither PQ nor HLG is SDR.

    The frame has the value of its stream or, if the codec stores none (VP9), of its container. HEVC without a colour
    description is the exception: FFmpeg's decoder drops the container's value.
    """
    return _TRANSFERS.get(frame.color_trc, "sdr")


def to_sdr(frame: Any, **scaling: Any) -> NDArray[np.uint8]:
    """A decoded HDR av.VideoFrame as (height, width, 3) RGB, as stored, not yet upright.

    scaling: width, height and interpolation of `av.VideoFrame.to_ndarray`; without them the coded size. The HDR
    codes are scaled. Scaling after the conversion differs by 0.2 grey levels in the mean, and by more only where one
    pixel combines dark and clipped areas. Colours outside BT.709 are clipped channel by channel.
    Primaries and a matrix that the stream does not specify are taken as BT.2020.
    """
    primaries = _BT2020 if frame.color_primaries == _UNSPECIFIED else frame.color_primaries
    if frame.colorspace == _UNSPECIFIED:
        scaling["src_colorspace"] = _BT2020 if primaries == _BT2020 else _BT709
    # Planar, because swscale's packed 16-bit RGB has doubled chroma columns, or wrong ones where it interpolates.
    codes = frame.to_ndarray(format="gbrp16le", threads=1, **scaling)
    hlg = transfer_of(frame) == "hlg"
    light = _light(hlg, _white_code(frame))
    luminance, to_709 = _gamut(primaries)
    sdr = np.empty(codes.shape, np.uint8)
    for top in range(0, len(codes), _ROWS):
        rows = np.asarray(cv2.LUT(codes[top : top + _ROWS], light), np.float32)
        if hlg:
            rows *= _look_up(np.asarray(cv2.transform(rows, luminance), np.float32), _ootf())[..., None]
        rows = np.asarray(cv2.transform(rows, to_709), np.float32)
        sdr[top : top + _ROWS] = _look_up(np.clip(rows, 0, 1, out=rows), _bt1886())
    return sdr


def _white_code(frame: Any) -> int:
    """swscale's 16-bit code for the full signal: 8 bits, or the bits of a full-range stream, followed by zeros."""
    if frame.format.is_rgb or frame.color_range == _FULL_RANGE:
        bits = min(frame.format.components[0].bits, 16)
        return ((1 << bits) - 1) << (16 - bits)
    return 255 << 8


@functools.lru_cache(maxsize=16)
def _light(hlg: bool, white_code: int) -> NDArray[np.float32]:
    """(1, 65536) table from codes: PQ to display light, where 1 is white; HLG to scene light, where 1 is its peak."""
    signal = np.minimum(np.arange(_CODES) / white_code, 1)
    if hlg:
        a, b, c = 0.17883277, 0.28466892, 0.55991073
        light = np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)
    else:
        m1, m2, c1, c2, c3 = 2610 / 16384, 2523 / 32, 3424 / 4096, 2413 / 128, 2392 / 128
        root = signal ** (1 / m2)
        light = 10000 / _WHITE * (np.maximum(root - c1, 0) / (c2 - c3 * root)) ** (1 / m1)
    return light.astype(np.float32)[None]


@functools.cache
def _gamut(primaries: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(1, 3) luminance of linear RGB with these primaries, (3, 3) matrix to BT.709; unknown ones count as BT.709.

    Those are so close to BT.709 that they are not converted in SDR video either.
    """
    to_xyz = _to_xyz(primaries if primaries in _PRIMARIES else _BT709)
    to_709 = np.linalg.solve(_to_xyz(_BT709), to_xyz)
    return to_xyz[1:2].astype(np.float32), to_709.astype(np.float32)


def _to_xyz(primaries: int) -> NDArray[np.float64]:
    xyz = np.array([(x / y, 1, (1 - x - y) / y) for x, y in (*_PRIMARIES[primaries], _D65)]).T
    return xyz[:, :3] * np.linalg.solve(xyz[:, :3], xyz[:, 3])


@functools.cache
def _ootf() -> NDArray[np.float32]:
    """From HLG scene luminance to the factor from scene to display light at 1000 cd/m2, with gamma 1.2."""
    return (1000 / _WHITE * _looked_up() ** 0.2).astype(np.float32)[None]


@functools.cache
def _bt1886() -> NDArray[np.uint8]:
    return np.rint(255 * np.minimum(_looked_up(), 1) ** (1 / 2.4)).astype(np.uint8)[None]


def _looked_up() -> NDArray[np.float64]:
    """The values that the entries of `_look_up`'s tables stand for: the middle of each step."""
    return ((np.arange(_CODES) + 0.5) / (_CODES - 1)) ** 2


def _look_up(values: NDArray[np.float32], table: NDArray[Any]) -> NDArray[Any]:
    """Apply a table to values from 0 to 1; its steps are even in their square root, so they are fine in the dark."""
    steps = np.empty(values.shape, np.uint16)
    np.multiply(cv2.sqrt(values), _CODES - 1, out=steps, casting="unsafe")
    return cv2.LUT(steps, table)
