"""Depth computed elsewhere: put on the training grid by nearest pixel, matched by time, and never guessed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curation.failures import ClipFailure, FailureCode
from curation.records import Frames, TeacherDepth
from curation.settings import TeacherSettings
from curation.teach.teacher import load_teacher
from tests.support.examples import examples

CLIP = "0123456789abcdef"


def frames_of(times_s: list[float] | np.ndarray, height: int = 28, width: int = 42) -> Frames:
    return Frames(width, height, np.asarray(times_s, np.float64), (b"",) * len(times_s))


def camera(count: int, height: int, width: int) -> np.ndarray:
    return np.tile(np.array([[width * 0.9, 0, width / 2], [0, height * 1.1, height / 2], [0, 0, 1]]), (count, 1, 1))


def teach(folder: Path, frames: Frames, **arrays: np.ndarray) -> TeacherDepth:
    np.savez(folder / f"{CLIP}.npz", **arrays)
    answer = load_teacher(TeacherSettings(kind="folder", model=str(folder), name="megasam"))(frames, CLIP)
    assert answer is not None
    return answer


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("depth")


def test_depth_on_the_grid_comes_through_unchanged(folder):
    depth = np.random.default_rng(0).uniform(0.5, 9, (3, 28, 42)).astype(np.float32)
    intrinsics = camera(3, 28, 42)
    answer = teach(folder, frames_of([0, 0.2, 0.4]), depth=depth, intrinsics=intrinsics)
    np.testing.assert_array_equal(answer.depth_m, depth)
    np.testing.assert_allclose(answer.intrinsics, intrinsics, rtol=1e-6)
    assert answer.valid.all()
    assert (answer.depth_m.dtype, answer.valid.dtype, answer.intrinsics.dtype) == (np.float32, np.bool_, np.float32)


def test_what_is_no_depth_is_invalid_and_zero(folder):
    depth = np.full((1, 28, 42), 2.0)
    depth[0, 0, :6] = [0, -1, np.nan, np.inf, -np.inf, 1e300]
    valid = np.ones(depth.shape, np.uint8)
    valid[0, 1] = 0
    with np.errstate(over="ignore"):
        answer = teach(folder, frames_of([0]), depth=depth, intrinsics=camera(1, 28, 42), valid=valid)
    expected = np.ones((28, 42), bool)
    expected[0, :6] = expected[1] = False
    np.testing.assert_array_equal(answer.valid[0], expected)
    np.testing.assert_array_equal(answer.depth_m[0], np.where(expected, 2, 0))


@settings(max_examples=examples(60), deadline=None)
@given(
    source_height=st.integers(60, 200),
    stretch=st.floats(0.93, 1.07),
    rows=st.integers(4, 12),
    columns=st.integers(4, 12),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_pixel_keeps_its_depth_and_its_ray(folder, source_height, stretch, rows, columns, seed):
    """Each target pixel holds the depth of the source pixel that its centre lies in; rays differ by half of one."""
    height, width = 14 * rows, 14 * columns
    source_width = max(round(source_height * width / height * stretch), 1)
    rng = np.random.default_rng(seed)
    depth = rng.uniform(0.1, 200, (1, source_height, source_width)).astype(np.float32)
    source = camera(1, source_height, source_width)
    answer = teach(folder, frames_of([0], height, width), depth=depth, intrinsics=source)

    v, u = np.indices((height, width)) + 0.5  # pixel centres
    target = answer.intrinsics[0].astype(np.float64)
    ray_x, ray_y = (u - target[0, 2]) / target[0, 0], (v - target[1, 2]) / target[1, 1]
    source_u = ray_x * source[0, 0, 0] + source[0, 0, 2]
    source_v = ray_y * source[0, 1, 1] + source[0, 1, 2]
    assert ((source_u > 0) & (source_u < source_width) & (source_v > 0) & (source_v < source_height)).all()
    on_edge = (np.abs(source_u - source_u.round()) < 1e-3) | (np.abs(source_v - source_v.round()) < 1e-3)
    there = depth[0, source_v.astype(int), source_u.astype(int)]
    assert (on_edge | (answer.depth_m[0] == there)).all()


@given(factor=st.sampled_from([3, 5, 7]), seed=st.integers(0, 1000))
@settings(max_examples=examples(10), deadline=None)
def test_enlarging_by_an_odd_factor_and_back_loses_nothing(folder, factor, seed):
    depth = np.random.default_rng(seed).uniform(1, 5, (2, 14, 28)).astype(np.float32)
    large = depth.repeat(factor, axis=1).repeat(factor, axis=2)
    answer = teach(folder, frames_of([0, 1], 14, 28), depth=large, intrinsics=camera(2, 14 * factor, 28 * factor))
    np.testing.assert_array_equal(answer.depth_m, depth)
    np.testing.assert_allclose(answer.intrinsics, camera(2, 14, 28), rtol=1e-6)


@pytest.mark.parametrize("shape", [(1080, 1920), (540, 960), (288, 512), (294, 518), (256, 512)])
def test_a_lens_has_two_focal_lengths_on_a_stretched_grid(folder, shape):
    """Of a 16:9 picture on 42 x 28, whatever the shape of the maps: their own pixels need not be square either."""
    stretch = (42 / 1920) / (28 / 1080)
    height, width = shape
    lens = np.array([[0.8 * width, 0, width / 2], [0, 0.8 * 16 / 9 * height, height / 2], [0, 0, 1]])
    frames = Frames(42, 28, np.zeros(1), (b"",), stretch)
    camera = teach(folder, frames, depth=np.ones((1, *shape), np.float32), intrinsics=lens[None]).intrinsics[0]
    assert camera[0, 0] / camera[1, 1] == pytest.approx(stretch, rel=1e-6)
    assert camera[0, 0] == pytest.approx(0.8 * 42) and camera[0, 2] == 21 and camera[1, 2] == 14


def constant_maps(values: list[float]) -> np.ndarray:
    return np.ones((len(values), 28, 42), np.float32) * np.array(values, np.float32)[:, None, None]


@settings(max_examples=examples(40), deadline=None)
@given(data=st.data(), count=st.integers(1, 40), rate=st.sampled_from([6, 24, 30000 / 1001, 50, 60]))
def test_frames_find_the_depth_of_their_own_time(folder, data, count, rate):
    """Any order, any surplus, times rounded to milliseconds: the map of the same video frame is taken."""
    order = data.draw(st.permutations(range(count)))
    wanted = sorted(data.draw(st.sets(st.integers(0, count - 1), min_size=1)))
    answer = teach(
        folder,
        frames_of(np.array(wanted) / rate + 12.5),
        depth=constant_maps([i + 1 for i in order]),
        intrinsics=camera(count, 28, 42) * np.array(order)[:, None, None] + camera(count, 28, 42),
        times_s=np.round(np.array(order) / rate + 12.5, 3),
    )
    np.testing.assert_array_equal(answer.depth_m[:, 0, 0], np.array(wanted) + 1)
    focal = camera(1, 28, 42)[0, 0, 0] * (np.array(wanted) + 1)
    np.testing.assert_allclose(answer.intrinsics[:, 0, 0], focal, rtol=1e-6)


def good() -> dict[str, np.ndarray]:
    return {"depth": np.ones((2, 28, 42), np.float32), "intrinsics": camera(2, 28, 42)}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"depth": np.ones((3, 28, 42)), "intrinsics": camera(3, 28, 42)}, "3 maps for 2 frames"),
        ({"times_s": np.array([0.0, 0.21])}, "no map at the time of 1 of 2"),
        ({"times_s": np.array([0.0, np.nan])}, "no map at the time of"),
        ({"times_s": np.array([0.0])}, "do not fit"),
        ({"depth": np.ones((2, 28))}, "do not fit"),
        ({"depth": np.ones((0, 28, 42))}, "do not fit"),
        ({"valid": np.ones((2, 28, 41), bool)}, "do not fit"),
        ({"intrinsics": np.eye(3)}, "do not fit"),
        ({"intrinsics": np.zeros((2, 3, 3))}, "focal length"),
        ({"intrinsics": np.full((2, 3, 3), np.nan)}, "focal length"),
        ({"depth": np.ones((2, 42, 28)), "intrinsics": camera(2, 42, 28)}, "another aspect ratio"),
        ({"depth": np.full((2, 28, 42), "far")}, "plain numbers"),
        ({"depth": np.full((2, 28, 42), None)}, "plain numbers"),
        ({"depth": None}, "lacks depth"),
        ({"intrinsics": None}, "lacks depth or intrinsics"),
    ],
)
def test_depth_that_does_not_fit_is_missing(folder, change, words):
    arrays = {name: array for name, array in (good() | change).items() if array is not None}
    with pytest.raises(ClipFailure, match=words) as failure:
        teach(folder, frames_of([0, 0.2]), **arrays)
    assert failure.value.code is FailureCode.MISSING_DEPTH
    assert str(folder) not in failure.value.message


def test_an_absent_or_damaged_file_is_missing_depth(tmp_path):
    np.savez(tmp_path / "ffffffffffffffff.npz", **good())
    path = tmp_path / f"{CLIP}.npz"
    teacher = load_teacher(TeacherSettings(kind="folder", model=str(tmp_path)))
    with pytest.raises(ClipFailure, match="no file for this clip"):
        teacher(frames_of([0, 0.2]), CLIP)
    whole = (tmp_path / "ffffffffffffffff.npz").read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for damaged in (whole[:-200], bytes(flipped), b"", b"\x93NUMPY"):
        path.write_bytes(damaged)
        with pytest.raises(ClipFailure, match="damaged") as failure:
            teacher(frames_of([0, 0.2]), CLIP)
        assert failure.value.code is FailureCode.MISSING_DEPTH
    load_teacher(TeacherSettings(kind="folder", model=str(tmp_path)))  # one damaged file stops its own clip only


def test_provenance_names_the_teacher_and_changes_with_its_files(tmp_path):
    def provenance() -> dict:
        return load_teacher(TeacherSettings(kind="folder", model=str(tmp_path), name="megasam")).provenance

    np.savez(tmp_path / f"{CLIP}.npz", **good())
    first = provenance()
    assert first == {"kind": "folder", "name": "megasam", "files_sha256": first["files_sha256"]}
    assert len(first["files_sha256"]) == 64
    assert provenance() == first
    np.savez(tmp_path / f"{CLIP}.npz", **(good() | {"depth": np.full((2, 28, 42), 2, np.float32)}))
    changed = provenance()
    np.savez(tmp_path / "ffffffffffffffff.npz", **good())
    assert len({each["files_sha256"] for each in (first, changed, provenance())}) == 3
