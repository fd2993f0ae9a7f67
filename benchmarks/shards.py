"""Shards beside the plain way: kB per frame and milliseconds of our depth codec and of fp16 + zstd, in one run.

    python -m benchmarks.shards

Depth is made here: a floor, walls, a body of spheres, relief and sensor-like noise at 518x294, with an invalid sky.
Times are CPU milliseconds, the best of several repeats; on a shared machine trust the ratios, not the times.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from benchmarks.machine import hardware
from curation.records import ClipSample, Frames, TeacherDepth
from curation.shards import codec
from curation.shards.reader import ShardReader
from curation.shards.writer import write_shards

WIDTH, HEIGHT, FOCAL = 518, 294, 450.0
WINDOW = 16


def scene(
    frames: int, seed: int = 0, *, width: int = WIDTH, height: int = HEIGHT
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Depth (N, H, W) float32 metres, 0 where invalid, and validity (N, H, W) of a body moving in a room under a sky.

    Noise is 0.2% with a correlation length of 2 px, the level at which fp16 + zstd takes what it takes on real maps.
    """
    rng = np.random.default_rng(seed)
    focal = FOCAL * width / WIDTH
    x, y = np.meshgrid((np.arange(width) + 0.5 - width / 2) / focal, (np.arange(height) + 0.5 - height / 2) / focal)
    relief = _smooth(rng, x.shape, 25)
    room = np.minimum(np.where(y > 0.01, 1.5 / np.maximum(y, 0.01), np.inf), 9 / (1 + 0.35 * x - 0.1 * y))
    depth = np.empty((frames, height, width), np.float32)
    for index in range(frames):
        sway = 0.4 * np.sin(index / 3)
        spheres = [(-1.0, 0.2, 4.0, 0.5), (1.2, 0.9, 5.0, 0.6), (0.9, -0.8, 6.0, 0.7)]
        spheres += [(sway, 0.1, 3.0, 0.28), (sway, -0.45, 3.0, 0.13), (sway, 0.7, 3.05, 0.25)]
        surface = room
        for *centre, radius in spheres:
            surface = np.minimum(surface, _sphere(x, y, centre, radius))
        surface = surface * np.exp(0.02 * relief + 0.002 * _smooth(rng, x.shape, 2))
        sky = (y < -0.22 + 0.05 * np.sin(9 * x)) & (surface > 8)
        depth[index] = np.where(sky, 0, surface)
    return depth, depth > 0


def clip(frames: int, seed: int = 0, *, width: int = WIDTH, height: int = HEIGHT) -> ClipSample:
    """A whole sample around `scene`: shaded pictures, boxes, intrinsics and a provenance."""
    depth, valid = scene(frames, seed, width=width, height=height)
    rng = np.random.default_rng(seed)
    pictures = []
    for metres in depth:
        shade = 255 * np.exp(-metres / 6) + 6 * _smooth(rng, metres.shape, 1)
        tinted = shade[..., None] * np.array([1.0, 0.9, 0.8]) + 10 * rng.random(3)
        pictures.append(codec.encode_jpeg(np.clip(tinted, 0, 255).astype(np.uint8)))
    boxes = np.tile(np.array([0.4 * width, 0.1 * height, 0.6 * width, 0.9 * height], np.float32), (frames, 1))
    focal = FOCAL * width / WIDTH
    camera = np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]], np.float32)
    return ClipSample(
        clip_id=f"{seed:016x}",
        split="train",
        frames=Frames(width, height, np.arange(frames) / 6.0, tuple(pictures)),
        boxes=boxes,
        box_confidence=np.full(frames, 0.9, np.float32),
        depth=TeacherDepth(depth, valid, np.tile(camera, (frames, 1, 1))),
        provenance={"teacher": {"name": "generated", "seed": 0}},
    )


def measure(frames: int, clip_lengths: list[int], repeats: int) -> dict[str, Any]:
    """All figures, as they go into the JSON."""
    depth, valid = scene(frames)
    bounds = codec.depth_range(depth, valid)
    zstd = pa.Codec("zstd", 3)
    raw = HEIGHT * WIDTH * 2

    def half_encode(index: int) -> bytes:
        return zstd.compress(depth[index].astype(np.float16).tobytes(), asbytes=True)

    def half_decode(blob: bytes) -> NDArray[np.float32]:
        return np.frombuffer(zstd.decompress(blob, raw), np.float16).reshape(HEIGHT, WIDTH).astype(np.float32)

    results = {
        "ours": _codec_figures(
            depth,
            lambda index: codec.encode_depth(depth[index], valid[index], bounds),
            lambda blob: codec.decode_depth(blob, HEIGHT, WIDTH, bounds),
            repeats,
        ),
        "fp16+zstd": _codec_figures(depth, half_encode, half_decode, repeats),
    }
    ratios = {
        f"{key} fp16+zstd / ours": results["fp16+zstd"][key] / results["ours"][key]
        for key in ("kb_per_frame", "encode_ms", "decode_ms")
    }
    windows = {f"{length}-frame clips": _windows(length, repeats) for length in clip_lengths}
    return {
        "hardware": hardware("numpy", "pyarrow", "blosc2", "opencv-python"),
        "frames": frames,
        "depth": results,
        "ratios": ratios,
        "windows": windows,
    }


def _codec_figures(
    depth: NDArray[np.float32],
    encode: Callable[[int], bytes],
    decode: Callable[[bytes], NDArray[np.float32]],
    repeats: int,
) -> dict[str, float]:
    frames, valid = len(depth), depth > 0
    blobs = [encode(index) for index in range(frames)]
    decoded = np.stack([decode(blob) for blob in blobs])
    return {
        "kb_per_frame": sum(map(len, blobs)) / frames / 1000,
        "encode_ms": _best(lambda: [encode(index) for index in range(frames)], repeats) / frames,
        "decode_ms": _best(lambda: [decode(blob) for blob in blobs], repeats) / frames,
        "max_relative_error": float(np.max(np.abs(decoded[valid] / depth[valid] - 1))),
    }


def _windows(length: int, repeats: int) -> dict[str, float]:
    """A random window of decoded frames from shards, beside decoding the same bytes already in memory."""
    clips = [replace(sample, clip_id=f"{index:016x}") for sample in [clip(length)] for index in range(3)]
    size = sum(len(picture) for picture in clips[0].frames.jpeg)
    with tempfile.TemporaryDirectory() as folder:
        entries = write_shards(clips, Path(folder), max_bytes=2**30)
        reader, chance = ShardReader(Path(folder)), random.Random(0)
        asked = [(sample.clip_id, chance.randrange(length - WINDOW + 1)) for sample in clips]
        rows = [reader.table(clip_id, start, start + WINDOW).to_pydict() for clip_id, start in asked]
        bounds = [codec.DepthRange(row["depth_log_min"][0], row["depth_log_max"][0]) for row in rows]

        def decode() -> None:
            for row, limits in zip(rows, bounds, strict=True):
                for picture, packed in zip(row["jpeg"], row["depth"], strict=True):
                    codec.decode_jpeg(picture)
                    codec.decode_depth(packed, HEIGHT, WIDTH, limits)

        def locate() -> None:
            for clip_id, start in asked:
                reader.table(clip_id, start, start + WINDOW)

        def read() -> None:
            for clip_id, start in asked:
                reader.frames(clip_id, start, start + WINDOW)

        figures = {f"{f.__name__}_ms": _best(f, repeats) / len(asked) for f in (locate, decode, read)}
    return figures | {
        "frames_per_window": WINDOW,
        "read / decode": figures["read_ms"] / figures["decode_ms"],
        "file_kb_per_frame": sum(entry.size_bytes for entry in entries) / (length * len(clips)) / 1000,
        "jpeg_kb_per_frame": size / length / 1000,
    }


def _best(work: Callable[[], Any], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return 1000 * min(times)


def _smooth(rng: np.random.Generator, shape: tuple[int, ...], sigma: float) -> NDArray[np.float64]:
    """Gaussian noise of that correlation length, standard deviation 1."""
    noise = cv2.GaussianBlur(rng.standard_normal(shape), (0, 0), sigma)
    return noise / noise.std()


def _sphere(x: NDArray[np.float64], y: NDArray[np.float64], centre: list[float], radius: float) -> NDArray[np.float64]:
    """Depth of a sphere along the rays (x, y, 1); infinite where they miss."""
    cx, cy, cz = centre
    a, b = x * x + y * y + 1, x * cx + y * cy + cz
    root = b * b - a * (cx * cx + cy * cy + cz * cz - radius * radius)
    return np.where(root > 0, (b - np.sqrt(np.maximum(root, 0))) / a, np.inf)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--frames", type=int, default=30)
    parser.add_argument("--clip-lengths", type=int, nargs="+", default=[30, 180])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "shards.json")
    options = parser.parse_args()
    figures = measure(options.frames, options.clip_lengths, options.repeats)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(figures, indent=2) + "\n")
    print(f"{'depth':12}{'kB/frame':>10}{'encode ms':>11}{'decode ms':>11}{'max error':>11}")
    for name, row in figures["depth"].items():
        print(
            f"{name:12}{row['kb_per_frame']:10.1f}{row['encode_ms']:11.2f}{row['decode_ms']:11.2f}"
            f"{row['max_relative_error']:11.1e}"
        )
    for name, ratio in figures["ratios"].items():
        print(f"{name}: {ratio:.2f}")
    for name, row in figures["windows"].items():
        print(f"{name}, {WINDOW} frames: " + ", ".join(f"{key} {value:.2f}" for key, value in row.items()))


if __name__ == "__main__":
    main()
