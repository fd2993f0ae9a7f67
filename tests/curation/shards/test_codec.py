from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import blosc2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from curation.shards import codec
from curation.shards.codec import DepthRange, decode_codes, decode_depth, depth_range, encode_depth
from curation.shards.schema import ShardError
from tests.support.examples import examples

SHAPES = hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=24)
# Everything a teacher could hand over, including what it should not.
ANY_DEPTH = hnp.arrays(
    np.float32,
    SHAPES,
    elements=st.floats(0.25, 500, width=32) | st.sampled_from([0.0, -1.0, np.inf, -np.inf, np.nan]),
)


def round_trip(depth: np.ndarray, valid: np.ndarray) -> np.ndarray:
    bounds = depth_range(depth[None], valid[None])
    return decode_depth(encode_depth(depth, valid, bounds), *depth.shape, bounds)


@given(ANY_DEPTH, st.data())
def test_any_map_comes_back_within_the_error_and_invalid_as_zero(depth: np.ndarray, data: st.DataObject) -> None:
    valid = data.draw(hnp.arrays(np.bool_, depth.shape))
    decoded = round_trip(depth, valid)
    usable = valid & np.isfinite(depth) & (depth > 0)
    assert decoded.dtype == np.float32
    assert np.array_equal(decoded > 0, usable)
    assert np.all(np.abs(decoded[usable].astype(np.float64) - depth[usable]) <= 5e-4 * depth[usable])


@given(hnp.arrays(np.uint16, SHAPES))
def test_every_code_survives_packing(codes: np.ndarray) -> None:
    """Differences of 16-bit codes wrap; the way back must wrap too."""
    assert np.array_equal(decode_codes(codec._pack(codes), *codes.shape), codes)


def test_a_large_map_of_random_codes_survives_packing() -> None:
    codes = np.random.default_rng(0).integers(0, 2**16, (294, 518)).astype(np.uint16)
    assert np.array_equal(decode_codes(codec._pack(codes), 294, 518), codes)


def test_real_looking_maps_stay_small_and_exact(bench: ModuleType) -> None:
    depth, valid = bench.scene(2)
    bounds = depth_range(depth, valid)
    blobs = [encode_depth(metres, mask, bounds) for metres, mask in zip(depth, valid, strict=True)]
    for blob, metres, mask in zip(blobs, depth, valid, strict=True):
        decoded = decode_depth(blob, *metres.shape, bounds)
        assert np.array_equal(decoded > 0, mask)
        assert np.max(np.abs(decoded[mask] / metres[mask] - 1)) <= 5e-4
    assert max(map(len, blobs)) < 45_000


def test_a_range_of_2000_to_1_fits_13_bits(bench: ModuleType) -> None:
    depth, valid = bench.scene(1)
    logs = np.log(depth, where=valid, out=np.zeros_like(depth))
    spread = np.exp(np.log(0.1) + (logs - logs[valid].min()) * np.log(2000) / np.ptp(logs[valid]), dtype=np.float32)
    bounds = depth_range(spread, valid)
    decoded = decode_depth(encode_depth(spread[0], valid[0], bounds), *spread[0].shape, bounds)
    assert spread[valid].max() / spread[valid].min() == pytest.approx(2000, rel=1e-4)
    assert bounds.levels < 2**13
    assert np.max(np.abs(decoded[valid[0]] / spread[valid] - 1)) <= 5e-4


@pytest.mark.parametrize("value", [1e-30, 0.1, 1.0, 3.0, 1e30])
def test_a_constant_map_takes_two_levels_at_most(value: float) -> None:
    depth = np.full((7, 9), value, np.float32)
    assert depth_range(depth[None], depth[None] > 0).levels <= 2
    np.testing.assert_allclose(round_trip(depth, depth > 0), depth, rtol=5e-4)


def test_an_all_invalid_map_is_all_zero() -> None:
    depth = np.full((3, 4), np.nan, np.float32)
    assert not round_trip(depth, np.ones((3, 4), bool)).any()
    assert depth_range(depth[None], depth[None] > 0) == DepthRange(0.0, 0.0)


def test_the_range_is_exact_in_float32() -> None:
    depth = np.random.default_rng(0).uniform(0.1, 200, (1, 20, 20)).astype(np.float32)
    bounds = depth_range(depth, depth > 0)
    assert (np.float32(bounds.log_min), np.float32(bounds.log_max)) == (bounds.log_min, bounds.log_max)
    assert np.exp(bounds.log_min) <= depth.min() and depth.max() <= np.exp(bounds.log_max)


def test_a_range_too_wide_for_16_bits_is_refused() -> None:
    depth = np.array([[[1e-20, 1e20]]], np.float32)
    with pytest.raises(ShardError, match="more than the 65535 of 16 bits"):
        depth_range(depth, depth > 0)


def test_a_pixel_outside_the_range_is_refused() -> None:
    """A range from elsewhere once clipped 0.006% of real pixels with huge errors."""
    depth = np.array([[1.0, 50.0]], np.float32)
    with pytest.raises(ShardError, match="outside the clip's range"):
        encode_depth(depth, depth > 0, depth_range(depth[None, :, :1], depth[None, :, :1] > 0))


def test_a_denormal_depth_is_refused_rather_than_altered() -> None:
    depth = (np.arange(1024, 2048)[None] * 2.0**-149).astype(np.float32)
    with pytest.raises(ShardError, match="does not decode"):
        encode_depth(depth, depth > 0, depth_range(depth[None], depth[None] > 0))


@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[:-5], lambda b: bytes(len(b))])
def test_damaged_depth_is_named(damage) -> None:
    depth = np.ones((6, 8), np.float32)
    blob = encode_depth(depth, depth > 0, depth_range(depth[None], depth[None] > 0))
    with pytest.raises(ShardError, match="damaged"):
        decode_codes(damage(blob), 6, 8)
    with pytest.raises(ShardError, match="damaged"):
        decode_codes(blob, 6, 9)


def test_the_documented_decoding_in_four_lines_agrees(bench: ModuleType) -> None:
    """docs/shards.md tells others how to decode without this package; it must be true."""
    depth, valid = bench.scene(1, width=56, height=42)
    bounds = depth_range(depth, valid)
    blob = encode_depth(depth[0], valid[0], bounds)
    page = (Path(__file__).parents[3] / "docs" / "shards.md").read_text()
    example = page.split("<!-- decode -->")[1].split("```python\n")[1].split("```")[0]
    row = {"depth": blob, "height": 42, "width": 56, "depth_log_min": np.float32(bounds.log_min)}
    scope = {"row": row, "np": np, "blosc2": blosc2}
    exec(example, scope)
    np.testing.assert_allclose(scope["depth_m"], decode_depth(blob, 42, 56, bounds), rtol=1e-6)


def test_packed_depth_is_the_same_in_another_process_with_other_threads(bench: ModuleType) -> None:
    script = (
        "import sys, numpy as np; from curation.shards.codec import *;"
        "d = np.random.default_rng(0).uniform(1, 9, (294, 518)).astype(np.float32);"
        "sys.stdout.buffer.write(encode_depth(d, d > 2, depth_range(d[None], d[None] > 2)))"
    )
    blobs = [
        subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, env=os.environ | extra).stdout
        for extra in ({"BLOSC_NTHREADS": "1"}, {"BLOSC_NTHREADS": "8", "OMP_NUM_THREADS": "3"})
    ]
    assert len(blobs[0]) > 1000
    assert blobs[0] == blobs[1]


@given(hnp.arrays(np.bool_, SHAPES))
@settings(max_examples=examples(50))
def test_masks_survive(mask: np.ndarray) -> None:
    assert np.array_equal(codec.unpack_mask(codec.pack_mask(mask), *mask.shape), mask)


def test_a_mask_of_another_size_is_refused() -> None:
    with pytest.raises(ShardError, match="is not one of 9x9"):
        codec.unpack_mask(codec.pack_mask(np.ones((4, 4), bool)), 9, 9)


def test_jpeg_keeps_colour_order_and_quality() -> None:
    rgb = np.zeros((64, 48, 3), np.uint8)
    rgb[:32, :, 0] = 200
    rgb[32:, :, 2] = 200
    decoded = codec.decode_jpeg(codec.encode_jpeg(rgb))
    assert np.abs(decoded.astype(int) - rgb)[[8, 56]].max() <= 6
    assert len(codec.encode_jpeg(rgb, 50)) < len(codec.encode_jpeg(rgb))
    with pytest.raises(ShardError, match="JPEG"):
        codec.decode_jpeg(b"no picture")
