"""The real detector on real frames, its coordinates and its errors, and the tracker."""

from __future__ import annotations

import json
import shutil
import socket
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml

from curation.failures import UsageError
from curation.people import detector as people
from curation.people.detector import Detections, Detector
from curation.people.tracker import PeopleTracker
from curation.people.weights import find_weights
from curation.video.decode import decode, resize, to_rgb
from curation.video.index import index_video

SIDE = 640


@pytest.fixture(scope="module")
def detector(yolo11n: Path) -> Detector:
    return Detector(yolo11n, device="cpu", long_side=SIDE, confidence=0.1)


@pytest.fixture(scope="module")
def frames(media: Path) -> list[np.ndarray]:
    """Upright frames of one size, of a clip with one dancer: every tenth, the first six."""
    index = index_video(media / "n_rooftop_dance.mp4")
    wanted = list(range(0, 60, 10))
    pairs = decode(index, 0, 60, only=wanted)
    return [resize(to_rgb(frame), index, index.width, index.height) for _, frame in pairs]


def best(found: Detections) -> np.ndarray:
    """The box of the most certain person."""
    mine = np.flatnonzero(found.klass == 0)
    return found.xyxy[mine[np.argmax(found.confidence[mine])]]


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union."""
    sides = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
    shared = float(np.prod(np.maximum(sides, 0)))
    return shared / (float(np.prod(a[2:] - a[:2])) + float(np.prod(b[2:] - b[:2])) - shared)


def test_recorded_boxes_are_found_again(detector, media, frames):
    """Boxes that ultralytics itself recorded for this clip, at every step-th frame."""
    lines = (media / "detections_yolo11n.jsonl").read_text().splitlines()
    record = next(r for r in map(json.loads, lines) if r["file"] == "n_rooftop_dance.mp4")
    size = np.array([record["W"], record["H"]] * 2)
    compared = 0
    for number, boxes in record["frames"]:
        if number % 10 == 0 and number < 60:
            certain = max((box for box in boxes if box[0] == 0), key=lambda box: box[1])
            found = detector([frames[number // 10]])[0]
            assert overlap(best(found), np.array(certain[2:]) / size) > 0.9
            assert found.confidence.max() == pytest.approx(certain[1], abs=0.06)
            compared += 1
    assert compared >= 3


def test_it_finds_what_ultralytics_finds(detector, yolo11n, frames):
    from ultralytics import YOLO

    model = YOLO(str(yolo11n), task="detect")
    for image in frames[:2]:
        options = {"imgsz": SIDE, "conf": 0.1, "iou": 0.7, "verbose": False, "device": "cpu"}
        result = model.predict(np.ascontiguousarray(image[..., ::-1]), **options)[0].boxes
        found = detector([image])[0]
        sure = result.conf.numpy() > 0.15
        for box, confidence, klass in zip(result.xyxyn[sure], result.conf[sure], result.cls[sure], strict=True):
            alike = [n for n in np.flatnonzero(found.klass == int(klass)) if overlap(found.xyxy[n], box.numpy()) > 0.9]
            assert len(alike) == 1
            assert found.confidence[alike[0]] == pytest.approx(float(confidence), abs=0.05)


def test_several_at_once_are_the_same_as_one_by_one(detector, frames):
    together = detector(frames)
    assert len(together) == len(frames)
    for image, found in zip(frames, together, strict=True):
        alone = detector([image])[0]
        assert np.array_equal(found.klass, alone.klass)
        assert np.abs(found.xyxy - alone.xyxy).max() < 1e-4
        assert np.abs(found.confidence - alone.confidence).max() < 1e-4


@pytest.mark.parametrize("scale", [0.5, 0.77, 2.0])
def test_boxes_are_fractions_whatever_the_size(detector, frames, scale):
    image = frames[2]
    resized = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    assert overlap(best(detector([image])[0]), best(detector([resized])[0])) > 0.9


@pytest.mark.parametrize(("top", "left"), [(0, 0), (0, 300), (200, 0), (90, 130)])
def test_boxes_map_back_through_the_letterbox(detector, frames, top, left):
    """The same person somewhere in a picture of another shape, whose sides are no multiples of 32."""
    image = cv2.resize(frames[2], (frames[2].shape[1] // 2, frames[2].shape[0] // 2), interpolation=cv2.INTER_AREA)
    height, width = image.shape[:2]
    canvas = np.full((height + 211, width + 307, 3), 114, np.uint8)
    canvas[top : top + height, left : left + width] = image
    x1, y1, x2, y2 = best(detector([image])[0])
    expected = np.array([left + x1 * width, top + y1 * height, left + x2 * width, top + y2 * height])
    found = best(detector([canvas])[0]) * np.array([*canvas.shape[1::-1]] * 2)
    assert overlap(found, expected) > 0.85
    assert np.abs(found - expected).max() < 0.05 * height


def test_an_empty_picture_has_no_boxes(detector):
    found = detector([np.full((120, 200, 3), 114, np.uint8)])[0]
    assert (found.xyxy.shape, found.confidence.shape, found.klass.shape) == ((0, 4), (0,), (0,))


def test_confidence_is_the_floor_of_what_is_kept(yolo11n, detector, frames):
    strict = Detector(yolo11n, device="cpu", long_side=SIDE, confidence=0.5)
    for image in frames[:3]:
        loose, few = detector([image])[0], strict([image])[0]
        assert few.confidence.min() > 0.5 and loose.confidence.min() > 0.1
        assert few.confidence.tolist() == pytest.approx([c for c in loose.confidence if c > 0.5])


def test_the_record_says_what_ran(detector, yolo11n):
    record = json.loads(json.dumps(detector.provenance))
    assert record["weights"] == yolo11n.name and len(record["sha256"]) == 64
    assert record["backend"] == "openvino-fp32"
    assert (record["long_side"], record["confidence"]) == (SIDE, 0.1)


def test_the_path_for_gpus_sees_what_the_path_for_cpus_sees(yolo11n, detector, frames):
    """The same network in half precision by torch; here on the CPU, so that it is tried without a GPU."""
    images = np.stack([cv2.resize(frame, (160, 224), interpolation=cv2.INTER_AREA) for frame in frames[:2]])
    by_torch, names = people._torch_backend(yolo11n, "cpu")
    by_openvino, _ = people._openvino_backend(yolo11n, detector.sha256, 0.0)
    assert names == detector.names
    half, full = by_torch(images).float().numpy(), by_openvino(images).numpy()
    assert half.shape == full.shape == (2, 84, 160 * 224 // 64 + 160 * 224 // 256 + 160 * 224 // 1024)
    assert np.abs(half[:, 4:] - full[:, 4:]).max() < 0.05
    likely = full[:, 4:].max(1) > 0.3
    assert likely.any()
    assert np.abs(half[:, :4] - full[:, :4]).transpose(0, 2, 1)[likely].max() < 3  # pixels


def test_a_gpu_that_is_not_there_is_said(yolo11n):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UsageError, match="no CUDA device"):
        Detector(yolo11n, device="cuda:0", long_side=SIDE, confidence=0.1)


def test_six_candidates_are_not_taken_for_finished_boxes(yolo11n, detector, frames):
    """ultralytics tells the two apart by the number of columns."""
    image = cv2.resize(frames[2], (640, 384))
    forward, _ = people._openvino_backend(yolo11n, detector.sha256, 0.0)
    scores = np.sort(forward(image[None]).numpy()[0, 4:].max(0))
    for count in (5, 6, 7):
        floor = float(scores[-count - 1] + scores[-count]) / 2
        found = Detector(yolo11n, device="cpu", long_side=SIDE, confidence=floor)([image])[0]
        loose = detector([image])[0]
        assert found.confidence.tolist() == pytest.approx([c for c in loose.confidence if c > floor])


def test_neither_library_reports_home(detector, monkeypatch):
    from ultralytics.utils import is_online
    from ultralytics.utils.events import events

    monkeypatch.setattr(socket, "getaddrinfo", lambda *names: [])  # as if there were a network
    assert not is_online() and not events.enabled
    assert sys.modules["openvino.tools.ovc.telemetry_utils"].tm.__name__ == "openvino.tools.ovc.telemetry_stub"


def test_a_detector_of_no_people_is_refused(yolo11n, detector, tmp_path, monkeypatch):
    exported = people._exported(yolo11n, detector.sha256)
    copy = shutil.copytree(exported, tmp_path / "openvino" / exported.name)
    values = yaml.safe_load((copy / "metadata.yaml").read_text())
    values["names"][0] = "pedestrian"
    (copy / "metadata.yaml").write_text(yaml.safe_dump(values))
    monkeypatch.setenv("UNISH_CACHE", str(tmp_path))
    with pytest.raises(UsageError, match="no class named 'person'"):
        Detector(yolo11n, device="cpu", long_side=SIDE, confidence=0.1)


def test_weights_are_found_by_path_and_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("UNISH_CACHE", str(tmp_path))
    mine = tmp_path / "mine.pt"
    mine.write_bytes(b"x")
    assert find_weights(str(mine)) == mine
    cached = tmp_path / "weights" / "yolo11x.pt"
    cached.parent.mkdir()
    cached.write_bytes(b"x")
    assert find_weights("yolo11x.pt") == cached


@pytest.mark.parametrize("name", ["my-own.pt", "elsewhere/yolo11x.pt", "../yolo11x.pt"])
def test_weights_that_nobody_has_are_named(tmp_path, monkeypatch, name):
    monkeypatch.setenv("UNISH_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"publishes no file of that name: pass --detector"):
        find_weights(name)


def test_without_a_network_the_user_is_told_to_copy_the_file(tmp_path, monkeypatch):
    monkeypatch.setenv("UNISH_CACHE", str(tmp_path))
    for variable in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("YOLO_OFFLINE", "true")
    with pytest.raises(UsageError, match=r"yolov8x\.pt could not be downloaded .* copy the file"):
        find_weights("yolov8x.pt")
    assert list((tmp_path / "weights").iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"no checkpoint at all " * 999, b"PK\x03\x04" + bytes(5000)])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, monkeypatch, content):
    monkeypatch.setenv("UNISH_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "weights.pt"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"weights\.pt cannot be read as ultralytics weights"):
        Detector(path, device="cpu", long_side=SIDE, confidence=0.1)
    assert [file for file in (tmp_path / "cache" / "openvino").iterdir() if file.suffix != ".pt"] == []


@pytest.mark.parametrize("bare", [True, pytest.param(False, marks=pytest.mark.slow)])  # each exports anew
def test_a_checkpoint_that_lacks_what_the_exporter_reads_works(seer, tmp_path, monkeypatch, bare):
    """ultralytics exports and fuses with the layout's file name and the picture size of training, where they are."""
    import torch

    monkeypatch.setenv("UNISH_CACHE", str(tmp_path / "cache"))
    checkpoint = torch.load(seer, weights_only=False)
    if bare:
        del checkpoint["model"].yaml
        checkpoint["train_args"] = {"imgsz": None}
    else:
        checkpoint["model"].yaml["yaml_file"] = None
    path = tmp_path / "bare.pt"
    torch.save(checkpoint, path)
    image = np.zeros((96, 160, 3), np.uint8)
    found = Detector(path, device="cpu", long_side=160, confidence=0.1)([image])[0]
    assert (found.klass == 0).any()
    by_torch, _ = people._torch_backend(path, "cpu")  # as on a GPU
    assert by_torch(np.zeros((1, 96, 160, 3), np.uint8)).shape == (1, 84, 12 * 20 + 6 * 10 + 3 * 5)


def boxes(*rows: tuple[float, float, int]) -> Detections:
    """Boxes of a fifth of the width and half of the height at x, of a confidence and a class."""
    xyxy = np.array([[x, 0.25, x + 0.2, 0.75] for x, _, _ in rows], np.float32).reshape(-1, 4)
    return Detections(
        xyxy, np.array([row[1] for row in rows], np.float32), np.array([row[2] for row in rows], np.int32)
    )


def test_a_person_keeps_the_number_and_things_have_none():
    tracker = PeopleTracker(person=0)
    tracks = [tracker(boxes((0.1 + 0.02 * n, 0.9, 0), (0.5, 0.9, 56), (0.75, 0.9, 0)), 640, 360) for n in range(8)]
    assert {tuple(track) for track in tracks[1:]} == {tuple(tracks[1])}
    first, thing, second = tracks[1]
    assert thing == 0 and first > 0 and second > 0 and first != second


def test_a_person_who_is_missed_for_a_second_is_the_same_one():
    tracker = PeopleTracker(person=0)
    before = [tracker(boxes((0.4, 0.9, 0)), 640, 360) for _ in range(4)][-1]
    gone = [tracker(boxes(), 640, 360) for _ in range(6)]
    again = [tracker(boxes((0.4, 0.9, 0)), 640, 360) for _ in range(2)][-1]
    assert before[0] > 0 and all(len(track) == 0 for track in gone)
    assert again[0] == before[0]


def test_every_clip_begins_with_number_one():
    assert [PeopleTracker(0)(boxes((0.4, 0.9, 0)), 640, 360).tolist() for _ in range(2)] == [[1], [1]]
