"""Clips: files that decode as displayed, and truth that geometry alone decides."""

import csv

import av
import numpy as np
import pytest

from curation.observe.frames import sample_frames
from curation.records import ClipRef, Frames
from curation.render.raster import Camera, Rendered
from curation.settings import ObserveSettings, TeacherSettings
from curation.synthetic.clips import (
    CASES,
    CRITERIA,
    ClipPlan,
    Footage,
    make_clip,
    make_clips,
    measure,
    plan_clips,
    shoot,
    truth_of,
    write_oracle,
)
from curation.synthetic.world.take import Frame, Seen
from curation.teach.teacher import check_teacher, load_teacher

SMALL = (256, 144)


def plan(case, size=SMALL, seed=4, seconds=1.5):
    return ClipPlan(f"t_{case}", case, seed, size, 12, seconds)


def decoded(path):
    """Times and displayed pictures of all frames."""
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
        start = frames[0].time
        return [f.time - start for f in frames], [
            np.rot90(f.to_ndarray(format="rgb24"), f.rotation // 90) for f in frames
        ]


def test_plans_go_through_every_case_and_only_depend_on_the_seed():
    plans = plan_clips(len(CASES), seed=3)
    assert [one.case for one in plans] == list(CASES)
    assert plans == plan_clips(len(CASES), seed=3) != plan_clips(len(CASES), seed=4)
    assert len({one.name for one in plans}) == len(plans)


def test_the_same_plan_gives_the_same_bytes_and_the_case_table_says_what_is_true(tmp_path):
    plans = [plan("good", seconds=1.0), plan("corrupt", seconds=1.0)]
    truths = make_clips(tmp_path / "a", plans, workers=1)
    assert [(t.expected, t.first_reason) for t in truths] == [("accept", ""), ("error", "decode")]
    again = make_clip(plans[0], tmp_path)
    assert again == truths[0]
    assert (tmp_path / "t_good.mp4").read_bytes() == (tmp_path / "a" / "t_good.mp4").read_bytes()
    rows = list(csv.DictReader((tmp_path / "a" / "cases.csv").open()))
    assert [row["file"] for row in rows] == [truth.file for truth in truths]
    assert rows[0]["border"] == "pass" and rows[1]["border"] == "na"
    times, pictures = decoded(tmp_path / "t_good.mp4")
    np.testing.assert_allclose(times, np.arange(12) / 12, atol=1e-3)
    shown = shoot(plans[0]).frame(9).rendered.rgb
    assert np.abs(pictures[9].astype(int) - shown).mean() < 8  # H.264 is lossy, but it is this picture
    with pytest.raises(av.FFmpegError):
        decoded(tmp_path / "a" / "t_corrupt.mp4")


def test_a_rotated_clip_is_displayed_upright(tmp_path):
    upright = plan("rotated", (144, 256), seconds=1.0)
    truth = make_clip(upright, tmp_path)
    with av.open(str(tmp_path / truth.file)) as container:
        assert (container.streams.video[0].width, container.streams.video[0].height) == (256, 144)
    _, pictures = decoded(tmp_path / truth.file)
    shown = shoot(upright).frame(5).rendered.rgb
    assert pictures[5].shape == shown.shape
    assert np.abs(pictures[5].astype(int) - shown).mean() < 8
    assert truth.expected == "accept"


def test_a_variable_rate_clip_has_the_times_of_its_motion(tmp_path):
    uneven = plan("variable_rate", seconds=2.0)
    truth = make_clip(uneven, tmp_path)
    times, _ = decoded(tmp_path / truth.file)
    np.testing.assert_allclose(times, shoot(uneven).times_s, atol=2e-3)
    assert np.ptp(np.diff(times)) > 0.05


def test_cuts_strobes_and_jumps_are_told_apart():
    for case, cuts in (("hard_cut", 1), ("jump_cut", 1), ("strobe", 0)):
        footage = shoot(plan(case))
        assert len(footage.cuts_s) == cuts
        if case == "jump_cut":  # the place and the camera stay, the dancer is elsewhere
            (one, _), (two, _) = footage.parts[0], footage.parts[-1]
            np.testing.assert_array_equal(one.cameras[-1].extrinsics, two.cameras[0].extrinsics)
            before, after = one.boxes(len(one.times_s) - 1)[1], two.boxes(0)[1]
            assert abs(before[0] - after[0]) > 0.1 * SMALL[0]


def test_the_oracle_is_a_depth_folder(tmp_path):
    barred = plan("letterboxed")
    write_oracle(barred, "0123456789abcdef", tmp_path)
    teacher = load_teacher(check_teacher(TeacherSettings(kind="folder", model=str(tmp_path), name="oracle")))
    footage = shoot(barred)
    height = 144 + 2 * footage.active[1]
    depth = teacher(Frames(256, height // 14 * 14, np.array([0.5, 1.0]), (b"", b"")), "0123456789abcdef")
    assert teacher.provenance["name"] == "oracle"
    assert not depth.valid[:, 0].any() and depth.valid[:, -footage.active[1] - 6].all()  # bars, and floor above them
    rendered = footage.frame(6).rendered.depth_m
    assert np.median(depth.depth_m[0][depth.valid[0]]) == pytest.approx(np.median(rendered[rendered > 0]), rel=0.02)


@pytest.mark.parametrize(("case", "size"), [("good", SMALL), ("good", (144, 256)), ("letterboxed", (256, 108))])
def test_the_oracle_s_camera_is_stretched_as_its_frames_are(tmp_path, case, size):
    """From the file to the teacher's answer: square pixels as displayed, so fx / fy on the grid is the stretch."""
    made = plan(case, size)
    truth = make_clip(made, tmp_path)
    ref = ClipRef("local", truth.file)
    frames = sample_frames(ref, tmp_path / truth.file, ObserveSettings())
    write_oracle(made, ref.clip_id, tmp_path)
    teacher = load_teacher(check_teacher(TeacherSettings(kind="folder", model=str(tmp_path), name="oracle")))
    camera = teacher(frames, ref.clip_id).intrinsics
    assert abs(frames.stretch - 1) > 0.005
    np.testing.assert_allclose(camera[:, 0, 0] / camera[:, 1, 1], frames.stretch, rtol=1e-4)


# truth from geometry, without rendering


def seen(box, instance=1, name="person", shown=1.0):
    box = np.array(box, float)
    return Seen(instance, name, box, np.clip(box, 0, [200, 100, 200, 100]), shown)


def verdict(*frames, cuts=(), case="good"):
    camera = Camera(np.eye(3), np.eye(4), (200, 100))
    blank = Rendered(*(np.zeros((1, 1), kind) for kind in (np.uint8, np.float32, np.uint8)))
    shot = [Frame(blank, camera, tuple(one), ()) for one in frames]
    footage = Footage((), np.arange(30) / 12, (0, 0, 200, 100), cuts, lambda image, _: image)
    return truth_of(ClipPlan("x", case, 0, (200, 100), 12), footage, shot), measure(footage, shot)


GOOD = seen((60, 20, 100, 90))


def test_a_whole_lone_dancer_is_accepted():
    truth, measured = verdict([GOOD], [GOOD])
    assert truth.expected == "accept" and set(truth.criteria) == set(CRITERIA)
    assert measured["height"] == pytest.approx(0.7)


@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        ([GOOD, seen((120, 20, 150, 90), 2)], "single"),
        ([], "single"),
        ([seen((60, 20, 70, 50))], "height"),
        ([seen((60, 40, 100, 120))], "border"),
        ([seen((-20, 20, 60, 90))], "border"),
        ([GOOD, seen((90, 60, 120, 95), 16, "chair")], "overlap"),
    ],
)
def test_each_criterion_is_failed_by_its_own_geometry(frame, reason):
    truth, _ = verdict(frame, frame)
    assert (truth.expected, truth.first_reason) == ("reject", reason)


def test_what_is_rare_hidden_or_apart_does_not_count():
    beside = seen((110, 60, 140, 95), 16, "chair")
    hidden = seen((120, 20, 150, 90), 2, shown=0.1)
    truth, _ = verdict(*[[GOOD, beside, hidden]] * 19, [seen((60, 40, 100, 120)), beside])
    assert truth.expected == "accept"


def test_a_cut_and_a_broken_file_outrank_the_rest():
    assert verdict([GOOD], cuts=(1.0,))[0].first_reason == "shot"
    truth = verdict([GOOD], case="corrupt")[0]
    assert (truth.expected, truth.first_reason) == ("error", "decode")
