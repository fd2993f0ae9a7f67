"""CPU time of observing one clip: ours, what scripts usually do, and the floor of merely decoding it, in one run.

    python -m benchmarks.observing [CLIP] [--detector WEIGHTS] [--seconds 20]

Naive is PySceneDetect on the file, ultralytics' tracker on the file, the frames read once more by OpenCV and kept as
PNG, depth kept as npz; "naive at 6 fps" tracks every fifth frame only. Every variant is a process of its own with one
thread everywhere. What counts is user plus system time from the moment when everything is loaded and warm, the least of
some rounds; loading is shown beside it. On a busy machine trust the ratios, not the seconds. Then kB per frame of what
is kept.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.machine import hardware

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = "yolo11n-int8dq.pt"
WIDTH, HEIGHT = 518, 294
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "OPENCV_FFMPEG_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "YOLO_OFFLINE": "true",
    "YOLO_AUTOINSTALL": "false",
}
Part = tuple[str, Callable[[], Any]]


def ours(clip: Path, weights: str, folder: Path) -> list[Part]:
    """Shots, people, tracks and training frames in one pass, and the depth of those frames as shards hold it."""
    from curation.observe.observe import observe
    from curation.people.detector import detector_for
    from curation.records import ClipRef
    from curation.settings import ObserveSettings
    from curation.shards import codec

    settings = ObserveSettings(device="cpu")
    detector = detector_for(settings, weights)
    detector([np.zeros((360, 640, 3), np.uint8)])
    depth = depth_maps(clip)

    def keep() -> None:
        bounds = codec.depth_range(depth, depth > 0)
        for number, metres in enumerate(depth):
            (folder / f"{number}.depth").write_bytes(codec.encode_depth(metres, metres > 0, bounds))

    return [("observe", lambda: observe(ClipRef("local", clip.name), clip, settings, detector)), ("keep depth", keep)]


def naive(clip: Path, weights: str, folder: Path, stride: int = 1) -> list[Part]:
    """Each library opens the file by itself; the frames that are kept are those of `ours`."""
    import cv2
    from scenedetect import ContentDetector, detect
    from ultralytics import YOLO

    model = YOLO(weights, task="detect")
    model.predict(np.zeros((360, 640, 3), np.uint8), verbose=False, device="cpu")
    depth = depth_maps(clip)

    def track() -> None:
        for _ in model.track(str(clip), stream=True, vid_stride=stride, verbose=False, device="cpu"):
            pass

    def keep_frames() -> None:
        video = cv2.VideoCapture(str(clip))
        step = round(video.get(cv2.CAP_PROP_FPS) / 6)
        number = 0
        while (frame := video.read()[1]) is not None:
            if number % step == 0:
                cv2.imwrite(str(folder / f"{number}.png"), cv2.resize(frame, (WIDTH, HEIGHT)))
            number += 1

    def keep_depth() -> None:
        for number, metres in enumerate(depth):
            np.savez_compressed(folder / f"{number}.npz", depth=metres)

    return [
        ("scenes", lambda: detect(str(clip), ContentDetector())),
        ("track", track),
        ("keep frames", keep_frames),
        ("keep depth", keep_depth),
    ]


def naive_at_6_fps(clip: Path, weights: str, folder: Path) -> list[Part]:
    """The same, with a tracker that is told to skip frames."""
    from curation.video.index import index_video

    return naive(clip, weights, folder, stride=max(1, round(index_video(clip).fps / 6)))


def floor(clip: Path, weights: str, folder: Path) -> list[Part]:
    """A bare decode of every frame, in order, whatever is done with them."""
    return [("decode", lambda: _decode(clip, lambda number, frame: None))]


def floor_with_detector(clip: Path, weights: str, folder: Path) -> list[Part]:
    """A bare decode, and the detector's forward pass and nothing else at 6 frames a second."""
    from curation.people.detector import detector_for
    from curation.settings import ObserveSettings

    detector = detector_for(ObserveSettings(device="cpu"), weights)
    detector([np.zeros((360, 640, 3), np.uint8)])

    def see(number: int, frame: Any) -> None:
        if number % 5 == 0:
            detector([frame.to_ndarray(width=640, height=360, format="rgb24", threads=1)])

    return [("decode and detect", lambda: _decode(clip, see))]


VARIANTS: dict[str, Callable[[Path, str, Path], list[Part]]] = {
    "ours": ours,
    "naive": naive,
    "naive at 6 fps": naive_at_6_fps,
    "floor": floor,
    "floor with detector": floor_with_detector,
}


def _decode(clip: Path, use: Callable[[int, Any], None]) -> None:
    import av

    with av.open(str(clip)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        stream.codec_context.thread_type = "NONE"
        for number, frame in enumerate(container.decode(stream)):
            use(number, frame)


def depth_maps(clip: Path) -> NDArray[np.float32]:
    """As many maps as `ours` samples frames, (n, 294, 518) metres, 0 where invalid; thirty different ones."""
    from benchmarks.shards import scene
    from curation.observe.sampling import sample_indices
    from curation.video.index import index_video

    count = len(sample_indices(index_video(clip).times_s, 6.0))
    depth, _ = scene(min(30, count), width=WIDTH, height=HEIGHT)
    return depth[np.arange(count) % len(depth)]


def run_here(variant: str, clip: Path, weights: str) -> dict[str, float]:
    """CPU seconds of a variant's parts and of loading what they need."""
    import cv2
    import torch

    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        parts = VARIANTS[variant](clip, weights, Path(folder))
        seconds = {"loading": time.process_time()}
        for name, work in parts:
            began = time.process_time()
            work()
            seconds[name] = time.process_time() - began
    return seconds


def run_alone(variant: str, clip: Path, weights: str) -> dict[str, float]:
    """The same in a process of its own."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.observing",
        str(clip.resolve()),
        "--detector",
        weights,
        "--variant",
        variant,
    ]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | ONE_THREAD, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def make_clip(target: Path, seconds: float) -> None:
    """1080p30 H.264 at about 5 Mbit/s, as platforms serve it: a detailed picture that moves, with some noise.

    It shows no person; decoder and detector take the same time for it as for any other.
    """
    from curation.video.ffmpeg import ffmpeg_exe

    still = "mandelbrot=s=2560x1440:r=30:end_scale=0.3,select='eq(n,0)',loop=loop=-1:size=1,setpts=N/30/TB"
    moving = "crop=1920:1080:x='320+300*sin(t)':y='180+170*sin(1.7*t)',noise=alls=8:allf=t"
    rate = ["-preset", "veryfast", "-b:v", "5M", "-maxrate", "8M", "-bufsize", "10M", "-g", "60"]
    command = [ffmpeg_exe(), "-y", "-nostdin", "-loglevel", "error", "-f", "lavfi", "-i", f"{still},{moving}"]
    encode = ["-t", str(seconds), "-r", "30", "-c:v", "libx264", *rate, "-pix_fmt", "yuv420p", str(target)]
    subprocess.run([*command, *encode], check=True)


def sizes() -> dict[str, float]:
    """kB per frame of what is kept, ours and otherwise, on the generated depth of the shard benchmark."""
    from benchmarks import shards

    depth, _ = shards.scene(10)
    figures = shards.measure(10, [], 1)["depth"]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "depth.npz"
        np.savez_compressed(file, depth=depth[0])
        npz = file.stat().st_size / 1000
    return {
        "depth, ours": round(figures["ours"]["kb_per_frame"], 1),
        "depth, fp16+zstd": round(figures["fp16+zstd"]["kb_per_frame"], 1),
        "depth, npz": round(npz, 1),
    }


def default_weights() -> Path:
    """The small detector where the tests look for it."""
    return Path(os.environ.get("UNISH_TEST_WEIGHTS", ROOT.parent / "shared" / "weights")) / WEIGHTS


def main() -> None:
    """Measure all variants, print them, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clip", nargs="?", type=Path, help="a video; a 1080p30 one is made where none is given")
    parser.add_argument("--detector", type=Path, default=default_weights())
    parser.add_argument("--seconds", type=float, default=20.0, help="length of the clip that is made")
    parser.add_argument("--rounds", type=int, default=2, help="the least time of these counts, for every part")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "observing.json")
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.detector.is_file():
        sys.exit(f"No detector weights at {options.detector}: pass --detector with the path of YOLO11n weights.")
    weights = str(options.detector.absolute())
    if options.variant:
        print(json.dumps(run_here(options.variant, options.clip, weights)))
        return
    with tempfile.TemporaryDirectory() as folder:
        clip = options.clip or Path(folder) / "clip.mp4"
        if options.clip is None:
            make_clip(clip, options.seconds)
        rounds = [{name: run_alone(name, clip, weights) for name in VARIANTS} for _ in range(options.rounds)]
    seconds = {name: {part: min(r[name][part] for r in rounds) for part in rounds[0][name]} for name in VARIANTS}
    work = {name: sum(parts.values()) - parts["loading"] for name, parts in seconds.items()}
    ratios = {
        "naive / ours": work["naive"] / work["ours"],
        "naive at 6 fps / ours": work["naive at 6 fps"] / work["ours"],
        "observe / floor": seconds["ours"]["observe"] / work["floor"],
        "observe / floor with detector": seconds["ours"]["observe"] / work["floor with detector"],
    }
    figures = {
        "clip": options.clip.name if options.clip else f"generated, {options.seconds:g} s of 1080p30 H.264",
        "detector": options.detector.name,
        "hardware": hardware("numpy", "opencv-python", "av", "scenedetect", "ultralytics", "openvino", "torch"),
        "ratios": {name: round(value, 2) for name, value in ratios.items()},
        "cpu_seconds": {name: {part: round(s, 2) for part, s in parts.items()} for name, parts in seconds.items()},
        "kb_per_frame": sizes(),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    for name, parts in seconds.items():
        shown = ", ".join(f"{part} {value:.1f}" for part, value in parts.items())
        print(f"{name:20} {work[name]:7.1f} CPU s   ({shown})")
    for name, value in (ratios | figures["kb_per_frame"]).items():
        print(f"{name}: {value:.2f}")


if __name__ == "__main__":
    main()
