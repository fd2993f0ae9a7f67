"""What the machinery costs: many small clips through the pipeline, through Prefect, and the bare work beside them.

    python -m benchmarks.machinery [--clips 2000]

The floor fetches, observes, judges and writes the same clips in one loop, without catalog, pool of processes or engine.
Every variant is a process of its own; CPU time is that of all its processes, memory the most that they had together,
sampled twice a second: one that is just starting another counts twice then. "Again" is the same run once more,
when nothing is missing. Weights are the demonstration's.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from benchmarks.machine import hardware

ROOT = Path(__file__).resolve().parents[1]
_ADOPT = 36  # PR_SET_CHILD_SUBREAPER of Linux: then the CPU time of what outlives its parent counts too
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def settings_of(folder: Path, out: str) -> Any:
    """A run without a teacher over local clips."""
    from curation.settings import DownloadSettings, ObserveSettings, Settings, TeacherSettings
    from curation.synthetic.detector import LONG_SIDE, POLICY, WEIGHTS

    return Settings(
        out=folder / out, policy=POLICY, teacher=TeacherSettings(kind="none"),
        download=DownloadSettings(local_root=folder / "videos"),
        observe=ObserveSettings(detector=str(WEIGHTS), detector_long_side=LONG_SIDE, device="cpu"),
    )  # fmt: skip


def refs_of(folder: Path) -> list[Any]:
    """The clips, in order."""
    from curation.manifest import read_manifest

    return read_manifest(folder / "manifest.csv")


def floor(folder: Path) -> None:
    """The work alone, one clip after the other."""
    from curation.download.fetch import download
    from curation.judge.criteria import judge
    from curation.judge.policy import load_policy
    from curation.observe.frames import write_frames
    from curation.observe.observations import write_observations
    from curation.observe.observe import observe, prescreen
    from curation.people.detector import detector_for

    settings = settings_of(folder, "floor")
    policy, detector = load_policy(settings.policy), detector_for(settings.observe, settings.observe.detector)
    (settings.out / "observations").mkdir(parents=True)
    (settings.out / "frames").mkdir()
    for ref in refs_of(folder):
        video = download(ref, settings.out / "videos", settings.download)
        seen = prescreen(ref, video.path, settings.observe, detector, policy.prescreen_share)
        if seen is None or judge(seen, policy).decision != "reject":
            seen, frames = observe(ref, video.path, settings.observe, detector)
            if judge(seen, policy).decision == "accept":
                write_frames(frames, settings.out / "frames" / f"{ref.clip_id}.parquet")
        write_observations(seen, settings.out / "observations" / f"{ref.clip_id}.parquet")


def pipeline(folder: Path) -> None:
    """`curation.pipeline.run`."""
    from curation import pipeline

    funnel = pipeline.run(settings_of(folder, "pipeline"), refs_of(folder))
    assert funnel.observed == funnel.clips


def prefect(folder: Path) -> None:
    """The flow `curate` against a running server."""
    from flows.curate import curate

    settings = settings_of(folder, "prefect")
    state = curate(
        manifest=folder / "manifest.csv", out=settings.out, policy=settings.policy, teacher="none", device="cpu",
        detector=settings.observe.detector, detector_long_side=settings.observe.detector_long_side,
        local_root=settings.download.local_root, return_state=True,
    )  # fmt: skip
    assert state.is_completed(), state.message


VARIANTS = {"floor": floor, "pipeline": pipeline, "prefect": prefect}


def measured(variant: str, folder: Path, environment: dict[str, str]) -> dict[str, float]:
    """Wall and CPU seconds of a variant, and the memory of its processes over time."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.monotonic()
    command = [sys.executable, "-m", "benchmarks.machinery", "--variant", variant, "--folder", str(folder.resolve())]
    child = subprocess.Popen(command, cwd=ROOT, env=os.environ | ONE_THREAD | environment, stdout=subprocess.DEVNULL)
    watched = psutil.Process(child.pid)
    memory: list[int] = []
    family = [watched]
    while child.poll() is None:
        try:
            family = [watched, *watched.children(recursive=True)]
            memory.append(sum(process.memory_info().rss for process in family))
        except psutil.Error:
            pass
        time.sleep(0.5)
    if child.returncode:
        sys.exit(f"{variant} failed with exit code {child.returncode}")
    wall = time.monotonic() - began
    for process in family[1:]:  # those that were left to end by themselves
        with suppress(ChildProcessError):
            os.waitpid(process.pid, 0)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    part = max(1, len(memory) // 4)
    second, last = max(memory[part : 2 * part] or memory), max(memory[-part:])
    return {
        "wall_s": wall,
        "cpu_s": cpu,
        "memory_mb_second_quarter": second / 2**20,
        "memory_mb_last_quarter": last / 2**20,
        "memory_last / second": last / second,
    }


def make_clips(folder: Path, clips: int) -> None:
    """Links to one generated video of two seconds, under as many names."""
    from curation.manifest import write_manifest
    from curation.records import ClipRef
    from curation.video.ffmpeg import ffmpeg_exe

    (folder / "videos").mkdir()
    first = folder / "first.mp4"
    source = ["-f", "lavfi", "-i", "testsrc2=s=160x90:r=12:d=2", "-c:v", "libx264", "-pix_fmt", "yuv420p"]
    subprocess.run([ffmpeg_exe(), "-y", "-nostdin", "-loglevel", "error", *source, str(first)], check=True)
    for number in range(clips):
        os.link(first, folder / "videos" / f"{number:05}.mp4")
    write_manifest([ClipRef("local", f"{number:05}.mp4") for number in range(clips)], folder / "manifest.csv")


def main() -> None:
    """Measure all variants, print them, write the JSON."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_ADOPT, 1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=2000)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "machinery.json")
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.variant:
        VARIANTS[options.variant](options.folder)
        return

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_clips(folder, options.clips)
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        place = {
            "PREFECT_HOME": str(folder / "home"),
            "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
            "UNISH_CACHE": str(folder / "cache"),
        }
        service = [sys.executable, "-m", "flows.service"]
        found = {}
        try:
            subprocess.run([*service, "start"], cwd=ROOT, env=os.environ | place, check=True)
            for variant, label in (
                ("floor", "floor"), ("pipeline", "pipeline"), ("pipeline", "pipeline, again"),
                ("prefect", "prefect"), ("prefect", "prefect, again"),
            ):  # fmt: skip
                found[label] = measured(variant, folder, place)
                each = found[label]
                per_clip_ms, megabytes = 1000 * each["cpu_s"] / options.clips, each["memory_mb_last_quarter"]
                print(f"{label:16} {each['wall_s']:7.1f} s, {per_clip_ms:6.1f} CPU ms per clip, {megabytes:6.0f} MB")
        finally:
            subprocess.run([*service, "stop"], cwd=ROOT, env=os.environ | place, check=False)
    per_clip = {label: 1000 * each["cpu_s"] / options.clips for label, each in found.items()}
    figures = {
        "clips": options.clips,
        "hardware": hardware(),
        "cpu_ms_per_clip": {label: round(value, 1) for label, value in per_clip.items()},
        "ratios": {
            "pipeline / floor, CPU": round(found["pipeline"]["cpu_s"] / found["floor"]["cpu_s"], 2),
            "prefect / floor, CPU": round(found["prefect"]["cpu_s"] / found["floor"]["cpu_s"], 2),
            "floor / pipeline, wall": round(found["floor"]["wall_s"] / found["pipeline"]["wall_s"], 2),
            "floor / prefect, wall": round(found["floor"]["wall_s"] / found["prefect"]["wall_s"], 2),
        },
        "runs": {label: {key: round(value, 2) for key, value in each.items()} for label, each in found.items()},
    }
    options.out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(figures["ratios"], indent=2))


if __name__ == "__main__":
    main()
