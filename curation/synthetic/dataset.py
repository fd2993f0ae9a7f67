"""Labelled shards of the synthetic world: stage-2 training data of any size, deterministic per seed.

    python -m curation.synthetic.dataset FOLDER --clips 200 --seed 0

The shards have the ordinary schema, with exact depth and masks, and more columns of ground truth (LABELS).
Coordinates: the world is metric, y up; extrinsics map it to an OpenCV camera. Provenance says `synthetic`, so nobody
mistakes them for real data.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from curation.pool import cores, run_all
from curation.records import ClipRef, ClipSample, Frames, TeacherDepth
from curation.shards.codec import encode_jpeg, pack_mask
from curation.shards.labels import LABELS, Label
from curation.shards.writer import encode_clip, write_tables
from curation.synthetic.clips import ClipPlan, shoot

FPS = 6
WORLD_VERSION = 1  # raise it when the same seed no longer gives the same pixels
_CASES = ("good", "good", "good", "good", "good", "occluded", "held_object", "truncated_bottom", "truncated_left")
_GRIDS = ((518, 294), (294, 518))


def write_dataset(
    folder: Path,
    clips: int,
    seed: int = 0,
    frames: int = 60,
    workers: int | None = None,
    max_bytes: int = 512 * 2**20,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write `clips` labelled clips as shards and their index. The same arguments give the same bytes."""

    def tables() -> Iterator[pa.Table]:
        batch = 4 * (workers or cores())  # results are written in order; this bounds how many wait
        for start in range(0, clips, batch):
            tasks = [(seed, number, frames) for number in range(start, min(start + batch, clips))]
            made: dict[int, pa.Table] = {}
            for task, result in run_all(_labelled, tasks, workers):
                if isinstance(result, BaseException):
                    raise result
                made[task[1]] = result
                if progress:
                    progress(start + len(made), clips)
            yield from (made[number] for _, number, _ in tasks)

    write_tables(tables(), folder, max_bytes=max_bytes)


def _labelled(task: tuple[int, int, int]) -> pa.Table:
    return labelled_clip(*task)


def labelled_clip(seed: int, number: int, frames: int) -> pa.Table:
    """One clip as rows of the shard schema, with its labels."""
    rng = np.random.default_rng([seed, number])
    case = _CASES[int(rng.integers(len(_CASES)))]
    size = _GRIDS[int(rng.random() < 0.25 and case == "good")]
    footage = shoot(ClipPlan(f"{seed}-{number}", case, int(rng.integers(2**31)), size, FPS, frames / FPS))
    take = footage.parts[0][0]
    motion = take.dancers[0].motion
    shown = [take.frame(index) for index in range(frames)]
    people = [frame.seen[0] for frame in shown]
    boxes = np.array([np.full(4, np.nan) if one.visible is None else one.visible for one in people], np.float32)
    depth = np.stack([frame.rendered.depth_m for frame in shown])
    sample = ClipSample(
        clip_id=ClipRef("synthetic", f"{seed}-{number}").clip_id,
        split="synthetic",
        frames=Frames(*size, footage.times_s, tuple(encode_jpeg(frame.rendered.rgb) for frame in shown)),
        boxes=boxes,
        box_confidence=np.where(np.isnan(boxes[:, 0]), np.nan, 1.0).astype(np.float32),
        depth=TeacherDepth(depth, depth > 0, np.stack([frame.camera.intrinsics for frame in shown]).astype(np.float32)),
        provenance=_provenance(seed, number, case),
    )
    table = encode_clip(sample)
    masks = [pack_mask(frame.rendered.instances == 1) for frame in shown]
    at = table.schema.get_field_index("human_mask")
    table = table.set_column(at, table.schema.field(at), pa.array(masks, pa.binary()))
    joints = np.stack([frame.bodies[0].joints for frame in shown])
    labels = {
        "smpl_pose": motion.pose,
        "smpl_betas": np.tile(motion.betas, (frames, 1)),
        "smpl_transl": motion.transl,
        "extrinsics": np.stack([frame.camera.extrinsics for frame in shown]),
        "joints_3d": joints,
        "joints_2d": np.stack([frame.camera.project(points) for frame, points in zip(shown, joints, strict=True)]),
    }
    for label in LABELS:
        table = table.append_column(_field(label), _rows(labels[label.name], label.length))
    return table


def _provenance(seed: int, number: int, case: str) -> dict[str, Any]:
    return {
        "kind": "synthetic",
        "teacher": {"kind": "synthetic", "name": "oracle"},
        "world": WORLD_VERSION,
        "seed": seed,
        "number": number,
        "case": case,
    }


def _field(label: Label) -> pa.Field:
    return pa.field(label.name, pa.list_(pa.float32(), label.length), False, {"unit": label.unit, "doc": label.doc})


def _rows(values: NDArray[np.float64], length: int) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1).astype(np.float32)), length)


def main() -> None:
    """Command line, with a progress bar."""
    from rich.progress import Progress

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--clips", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--frames", type=int, default=60, help="frames per clip, at 6 a second")
    parser.add_argument("--workers", type=int)
    arguments = parser.parse_args()
    with Progress() as bar:
        task = bar.add_task("labelled clips", total=arguments.clips)
        write_dataset(
            arguments.folder,
            arguments.clips,
            arguments.seed,
            arguments.frames,
            arguments.workers,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )


if __name__ == "__main__":
    main()
