"""The MoGe-2 teacher: the full-size network meets the golden numbers, and the teacher adds nothing to it."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys

import numpy as np
import pytest

from curation.failures import ClipFailure, FailureCode
from curation.files import sha256_file
from curation.records import Frames
from curation.settings import TeacherSettings
from curation.teach.moge import MogeTeacher, read_network
from curation.teach.teacher import check_teacher, depth_preview, load_teacher
from tests.support.small_moge import decoded, make_frames, noise_frames, small_network

FORWARD_GATE = 5e-5
NORMAL_GATE = 2e-4
FOCAL_GATE = 1e-5
MASK_GATE = 1e-4
CASES = {"B2_84x126_n60": 60, "B1_126x84_n70": 70}


@pytest.fixture(scope="session")
def full_checkpoint(golden, tmp_path_factory):
    """The full-size network with generated weights; removed afterwards, for it is 1.3 GB."""
    import torch

    source = importlib.util.spec_from_file_location("weights_scheme", golden / "weights_scheme.py")
    scheme = importlib.util.module_from_spec(source)
    source.loader.exec_module(scheme)
    config = json.loads((golden / "moge2_vitl_normal_config.json").read_text())
    state = scheme.make_state_dict(json.loads((golden / "state_dicts" / "moge.json").read_text()), "public-1")
    path = tmp_path_factory.mktemp("moge_full") / "model.pt"
    torch.save({"model_config": config, "model": state}, path)
    yield path
    path.unlink()


@pytest.fixture(scope="session")
def full_teacher(full_checkpoint):
    return load_teacher(TeacherSettings(model=str(full_checkpoint), num_tokens=60, device="cpu"))


@pytest.fixture(scope="session")
def full_network(full_checkpoint, full_teacher):
    """The teacher's own network, with the normal head back that the teacher leaves away."""
    full_teacher.network.normal_head = read_network(full_checkpoint, mmap=True).normal_head
    yield full_teacher.network
    del full_teacher.network.normal_head


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_full_network_meets_the_golden_numbers(golden, full_network, case, monkeypatch):
    import torch

    expected = {
        key.removeprefix(f"{case}_"): value
        for key, value in np.load(golden / "unish" / "moge2.npz").items()
        if key.startswith(case)
    }
    image = torch.from_numpy(expected.pop("image_u8")).float() / 255
    runs = {
        "infer": {},
        "inferfov": {"fov_x": 55},
        "infernomask": {"apply_mask": False, "force_projection": False},
    }
    with torch.inference_mode():
        forward = full_network(image, num_tokens=CASES[case])
    got = {f"fwd_{key}": value for key, value in forward.items()}
    once = {key: value.clone() for key, value in forward.items()}  # infer works in place
    monkeypatch.setattr(full_network, "forward", lambda *_, **__: {key: value.clone() for key, value in once.items()})
    for run, options in runs.items():
        output = full_network.infer(image, num_tokens=CASES[case], use_fp16=False, **options)
        got |= {f"{run}_{key}": value for key, value in output.items()}
    assert len(expected) == 13
    for key, golden_value in expected.items():
        value = got[key].numpy()
        assert value.shape == golden_value.shape, key
        if golden_value.dtype == bool:
            assert (value != golden_value).mean() <= MASK_GATE, key
            continue
        finite = np.isfinite(golden_value)
        assert (np.isfinite(value) != finite).mean() <= MASK_GATE, key
        finite &= np.isfinite(value)
        gate = NORMAL_GATE if "normal" in key else FOCAL_GATE if "intrinsics" in key else FORWARD_GATE
        error = np.abs(value[finite] - golden_value[finite]).max()
        assert error <= gate * np.abs(golden_value[finite]).max(), key


@pytest.mark.slow
def test_the_full_teacher_gives_what_the_golden_network_gives(golden, full_teacher, full_checkpoint):
    images = np.load(golden / "unish" / "moge2.npz")["B2_84x126_n60_image_u8"].transpose(0, 2, 3, 1)
    frames = make_frames(images)
    output = full_teacher.network.infer(decoded(frames), num_tokens=60, use_fp16=False)
    answer = full_teacher(frames, "0" * 16)
    np.testing.assert_array_equal(answer.valid, output["mask"].numpy())
    np.testing.assert_allclose(answer.depth_m[answer.valid], output["depth"].numpy()[answer.valid], rtol=1e-6)
    assert 0.3 < answer.valid.mean() < 0.9
    assert full_teacher.provenance["sha256"] == sha256_file(full_checkpoint)


@pytest.fixture(scope="module")
def frames() -> Frames:
    return noise_frames(5, 56, 84)


@pytest.fixture(scope="module")
def teacher(small_checkpoint) -> MogeTeacher:
    return load_teacher(TeacherSettings(model=str(small_checkpoint), num_tokens=40, batch_size=2, device="cpu"))


@pytest.fixture(scope="module")
def answer(teacher, frames):
    return teacher(frames, "0" * 16)


def test_batches_give_what_single_images_give(answer, frames):
    network = small_network()
    for i, image in enumerate(decoded(frames)):
        output = network.infer(image, num_tokens=40, use_fp16=False)
        mask = output["mask"].numpy()
        np.testing.assert_array_equal(answer.valid[i], mask)
        depth = output["depth"].numpy()[mask]
        np.testing.assert_allclose(answer.depth_m[i][mask], depth, rtol=0, atol=FORWARD_GATE * depth.max())
        normalised = output["intrinsics"].numpy()
        pixels = normalised * np.array([[frames.width], [frames.height], [1]])
        np.testing.assert_allclose(
            answer.intrinsics[i], pixels, rtol=1e-4
        )  # by a solver: the last digits differ by CPU


def test_answers_are_on_the_training_grid(answer):
    assert answer.depth_m.shape == answer.valid.shape == (5, 56, 84)
    assert (answer.depth_m.dtype, answer.valid.dtype, answer.intrinsics.dtype) == (np.float32, np.bool_, np.float32)
    assert (answer.depth_m[~answer.valid] == 0).all()
    assert (answer.depth_m[answer.valid] > 0).all()
    assert 0 < answer.valid.mean() < 1
    np.testing.assert_allclose(answer.intrinsics[:, :2, 2], [[42, 28]] * 5)
    np.testing.assert_allclose(answer.intrinsics[:, 0, 0], answer.intrinsics[:, 1, 1], rtol=1e-5)
    assert len(set(answer.intrinsics[:, 0, 0].tolist())) == 5, "each frame keeps its own focal length"


@pytest.mark.parametrize("stretch", [0.969, 1.009])
def test_a_stretched_grid_has_two_focal_lengths_about_the_one_that_moge_finds(teacher, answer, frames, stretch):
    stretched = teacher(dataclasses.replace(frames, stretch=stretch), "0" * 16)
    assert stretched.depth_m.tobytes() == answer.depth_m.tobytes()
    across, down = stretched.intrinsics[:, 0, 0], stretched.intrinsics[:, 1, 1]
    np.testing.assert_allclose(across / down, stretch, rtol=1e-5)
    np.testing.assert_allclose(across * down, answer.intrinsics[:, 0, 0] ** 2, rtol=1e-5)
    np.testing.assert_array_equal(stretched.intrinsics[:, :2, 2], answer.intrinsics[:, :2, 2])


def test_asking_again_gives_the_same_bytes(teacher, answer, frames):
    again = teacher(frames, "0" * 16)
    assert again.depth_m.tobytes() == answer.depth_m.tobytes()
    assert again.intrinsics.tobytes() == answer.intrinsics.tobytes()


def test_the_number_of_tokens_is_the_asked_one(small_checkpoint, answer, frames):
    finer = load_teacher(TeacherSettings(model=str(small_checkpoint), num_tokens=90, device="cpu"))
    assert finer.provenance["num_tokens"] == 90
    assert not np.array_equal(finer(frames, "0" * 16).depth_m, answer.depth_m)


def test_provenance_says_what_made_the_depth_and_no_path(teacher, small_checkpoint):
    provenance = dict(teacher.provenance)
    assert provenance.pop("moge")[0].isdigit()
    assert provenance == {
        "kind": "moge",
        "name": "moge-2",
        "model": "small.pt",
        "sha256": sha256_file(small_checkpoint),
        "num_tokens": 40,
        "dtype": "float32",
    }
    assert str(small_checkpoint.parent) not in json.dumps(teacher.provenance)


def test_a_clip_without_frames_has_empty_depth(teacher):
    empty = teacher(Frames(84, 56, np.zeros(0), ()), "0" * 16)
    assert empty.depth_m.shape == (0, 56, 84)
    assert empty.intrinsics.shape == (0, 3, 3)


@pytest.mark.parametrize("jpeg", [b"", b"no picture", noise_frames(1, 28, 28).jpeg[0]])
def test_a_damaged_frame_is_a_typed_failure(teacher, jpeg):
    with pytest.raises(ClipFailure) as failure:
        teacher(Frames(84, 56, np.zeros(1), (jpeg,)), "0" * 16)
    assert failure.value.code is FailureCode.CORRUPT


def test_checked_settings_load_from_another_working_folder(small_checkpoint, monkeypatch, tmp_path):
    monkeypatch.chdir(small_checkpoint.parent)
    checked = check_teacher(TeacherSettings(model=small_checkpoint.name, device="cpu"))
    monkeypatch.chdir(tmp_path)
    assert load_teacher(checked).provenance["model"] == small_checkpoint.name


def test_importing_the_teacher_loads_no_network_library():
    import subprocess

    code = (
        "import sys, curation.teach.teacher; print(sorted({'torch', 'moge', 'huggingface_hub'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "[]\n"


def test_the_preview_orders_by_nearness_and_hides_the_invalid():
    depth = np.tile(np.linspace(1, 10, 50, dtype=np.float32), (20, 1))
    valid = np.ones(depth.shape, bool)
    valid[:5] = False
    picture = depth_preview(np.where(valid, depth, 0), valid)
    assert picture.dtype == np.uint8 and picture.shape == (20, 50, 3)
    assert (picture[:5] == 0).all()
    near, far = picture[10, 1].astype(int), picture[10, -1].astype(int)
    assert near[0] > near[2] and far[2] > far[0], "near is red, far is blue"
    assert (depth_preview(depth, np.zeros(depth.shape, bool)) == 0).all()
