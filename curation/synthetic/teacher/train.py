"""Trains the small MoGe-2 teacher from random weights on the synthetic world's exact depth, and measures it.

    python -m curation.synthetic.teacher.train WORK_FOLDER --minutes 40

Writes WORK_FOLDER/synthetic-moge.pt (half precision, below 5 MB), a checkpoint that `MoGeModel.from_pretrained` reads.
The same seed, scenes and number of steps give the same weights on the same machine; `--minutes` only sets the number
of steps, from the speed of the first ones, and prints it. Nothing is downloaded.

The losses are those of MoGe-2 (arXiv 2507.02546) as its own training code has them: the affine-invariant point map
of MoGe (arXiv 2410.19115, section 3.2), without its local terms, and its normals; the mask (section 3.3); and the
metric scale, which a separate head learns in log space towards the scale of the best alignment (MoGe-2, section 3.2).
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from curation.files import atomic_path
from curation.records import Frames
from curation.settings import TeacherSettings
from curation.shards.codec import encode_jpeg
from curation.synthetic.teacher import NAME, NUM_TOKENS, WEIGHTS, model_config
from curation.synthetic.teacher.data import Pictures, read_scenes, write_scenes
from curation.teach.small_backbone import register
from curation.teach.teacher import load_teacher

HELD_OUT_SEED = 900_000
BATCH = 16
ALIGN_SIDE = 10  # the alignment is found on 10 x 10 points; its cost grows with the fourth power
MASK_WEIGHT, SCALE_WEIGHT = 0.1, 0.1
WARMUP_STEPS, PACE_STEPS = 100, 30
EMA = 0.998


def train(
    work: Path,
    scenes: int,
    minutes: float | None = None,
    steps: int | None = None,
    seed: int = 0,
    rate: float = 1e-3,
    workers: int | None = None,
    start: Path | None = None,
) -> Path:
    """Render what is missing, train for `steps` steps or about `minutes` minutes, and write the weights' running mean.

    Raises ValueError unless exactly one of `minutes` and `steps` is given.
    """
    import torch
    from moge.model.v2 import MoGeModel
    from rich.progress import Progress, TextColumn

    if (minutes is None) == (steps is None):
        raise ValueError("Give either minutes or steps.")
    with Progress(*Progress.get_default_columns(), TextColumn("{task.fields[note]}")) as bar:
        rendering = bar.add_task("scenes", total=None, note="")
        paths = write_scenes(
            work / "train", scenes, 1000 * (seed + 1), workers, lambda d, n: bar.update(rendering, completed=d, total=n)
        )
        pictures = read_scenes(paths)
        bar.remove_task(rendering)

        register()
        torch.manual_seed(seed)
        rng = np.random.default_rng(seed)
        network = MoGeModel.from_pretrained(start) if start else MoGeModel(**model_config())
        network = network.float().to(memory_format=torch.channels_last).train()  # halves the time on a CPU
        mean = copy.deepcopy(network).eval().requires_grad_(False)
        decayed = [p for p in network.parameters() if p.ndim > 1]
        rest = [p for p in network.parameters() if p.ndim <= 1]
        optimiser = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}], rate, (0.9, 0.98)
        )
        task = bar.add_task("steps", total=steps, note="")
        smooth: dict[str, float] = {}
        began, step = time.monotonic(), 0
        while steps is None or step < steps:
            if steps is None and step == PACE_STEPS:
                assert minutes is not None
                steps = max(WARMUP_STEPS, round(minutes * 60 / (time.monotonic() - began) * PACE_STEPS))
                bar.update(task, total=steps)
                bar.console.print(f"{steps} steps in about {minutes:g} minutes; repeat with --steps {steps}")
            for group in optimiser.param_groups:
                group["lr"] = rate * _schedule(step, steps)
            images, points = _batch(pictures, rng)
            losses = _losses(network, torch.from_numpy(images), torch.from_numpy(points))
            total = sum(losses.values())
            optimiser.zero_grad(set_to_none=True)
            total.backward()
            norm = torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            if not torch.isfinite(norm):
                raise FloatingPointError(f"the gradient is not finite at step {step}")
            optimiser.step()
            _follow(mean, network, min(EMA, (1 + step) / (10 + step)))
            step += 1
            now = {name: value.item() for name, value in losses.items()}
            smooth = {name: 0.98 * smooth.get(name, value) + 0.02 * value for name, value in now.items()}
            note = "  ".join(f"{name} {value:.3f}" for name, value in smooth.items())
            bar.update(task, completed=step, note=note)
            if step % 100 == 0:
                save(mean, work / WEIGHTS.name)
                if not bar.console.is_terminal and steps is not None:  # a log file shows no bar
                    left = (time.monotonic() - began) / step * (steps - step) / 60
                    bar.console.print(f"{step} of {steps} steps, {left:.0f} min left  {note}")
    return save(mean, work / WEIGHTS.name)


def save(network: Any, path: Path) -> Path:
    """Write a network in half precision, as MoGe's checkpoints are."""
    import torch

    state = {name: value.half() if value.is_floating_point() else value for name, value in network.state_dict().items()}
    with atomic_path(path) as temporary:
        torch.save({"model_config": model_config(), "model": state}, temporary)
    return path


def measure(weights: Path, work: Path, scenes: int = 40, workers: int | None = None) -> dict[str, float]:
    """Mean relative depth errors over held-out pictures, of the teacher as the pipeline loads it.

    Over pixels that are valid in both. metric: without alignment. scale, affine: after the best scale, or scale and
    shift, of each picture's depth (MoGe's alignment: least absolute relative error). missing: share of true pixels
    that it marks invalid. focal: relative error of the focal length.
    """
    pictures = read_scenes(write_scenes(work / "held-out", scenes, HELD_OUT_SEED, workers))
    errors = [error for group in pictures.values() for error in teacher_errors(weights, group)]
    return {name: float(np.mean([error[name] for error in errors])) for name in errors[0]}


def teacher_errors(weights: Path, pictures: Pictures) -> list[dict[str, float]]:
    """The errors of each picture, which `measure` averages."""
    import torch
    from moge.utils.alignment import align_depth_affine, align_depth_scale

    teacher = load_teacher(
        TeacherSettings(kind="moge", model=str(weights), name=NAME, num_tokens=NUM_TOKENS, device="cpu")
    )
    count, height, width = pictures.depth_m.shape
    jpeg = tuple(encode_jpeg(image) for image in pictures.rgb)
    found = teacher(Frames(width, height, np.arange(count) / 6, jpeg), "held-out")
    assert found is not None
    errors = []
    for depth, valid, intrinsics, true, camera in zip(
        found.depth_m, found.valid, found.intrinsics, pictures.depth_m, pictures.intrinsics, strict=True
    ):
        both = valid & (true > 0)
        x, y = torch.from_numpy(depth[both]), torch.from_numpy(true[both].astype(np.float32))
        thin = slice(None, None, max(1, len(x) // 1500))  # the alignment's cost grows with the square
        scale = align_depth_scale(x[thin], y[thin], 1 / y[thin])
        affine, shift = align_depth_affine(x[thin], y[thin], 1 / y[thin])
        errors.append(
            {
                "metric": float(((x - y).abs() / y).mean()),
                "scale": float(((scale * x - y).abs() / y).mean()),
                "affine": float(((affine * x + shift - y).abs() / y).mean()),
                "missing": float((~valid & (true > 0)).sum() / (true > 0).sum()),
                "focal": float(abs(intrinsics[1, 1] / camera[1, 1] - 1)),
            }
        )
    return errors


def _schedule(step: int, steps: int | None) -> float:
    """A linear warm-up, then half a cosine down to a hundredth."""
    if steps is None or step < WARMUP_STEPS:
        return min(1.0, (step + 1) / WARMUP_STEPS)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS)))


def _batch(
    pictures: dict[tuple[int, int], Pictures], rng: np.random.Generator
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(B, 3, H, W) RGB in [0, 1] and (B, H, W, 3) points in metres in the camera's frame, infinite where invalid."""
    groups = list(pictures.values())
    sizes = np.array([len(group.rgb) for group in groups])
    group = groups[int(rng.choice(len(groups), p=sizes / sizes.sum()))]
    chosen = rng.integers(len(group.rgb), size=BATCH)
    points = point_maps(group.depth_m[chosen], group.intrinsics[chosen])
    images = np.stack([_degrade(image, rng) for image in group.rgb[chosen]])
    mirrored = rng.random(BATCH) < 0.5
    images[mirrored] = images[mirrored, :, ::-1]
    points[mirrored] = points[mirrored, :, ::-1] * np.array([-1, 1, 1], np.float32)
    for row in np.flatnonzero(rng.random(BATCH) < 0.08):
        bar = int(images.shape[1] * rng.uniform(0.05, 0.14))
        images[row, :bar], images[row, -bar:] = 0, 0
        points[row, :bar], points[row, -bar:] = np.inf, np.inf
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2)), points


def point_maps(depth_m: NDArray[Any], intrinsics: NDArray[np.float32]) -> NDArray[np.float32]:
    """(N, H, W) depth and (N, 3, 3) intrinsics -> (N, H, W, 3) points, infinite where depth is 0."""
    _, height, width = depth_m.shape
    v, u = np.mgrid[:height, :width].astype(np.float32) + np.float32(0.5)
    focal, centre = intrinsics[:, [0, 1], [0, 1]], intrinsics[:, :2, 2]
    rays = (np.stack([u, v], -1) - centre[:, None, None]) / focal[:, None, None]
    depth = np.where(depth_m > 0, depth_m, np.inf).astype(np.float32)[..., None]
    with np.errstate(invalid="ignore"):  # the ray through the centre times infinity
        return np.concatenate([rays * depth, depth], -1, dtype=np.float32)


def _degrade(image: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.float32]:
    """Exposure, white balance, contrast and noise, in [0, 1]."""
    value = image.astype(np.float32) / 255 * rng.uniform(0.7, 1.2) * rng.uniform(0.9, 1.1, 3).astype(np.float32)
    value = 0.5 + (value - 0.5) * rng.uniform(0.8, 1.2)
    value += rng.normal(0, rng.uniform(0, 0.02), image.shape).astype(np.float32)
    return np.clip(value, 0, 1).astype(np.float32)


def _losses(network: Any, images: Any, points: Any) -> dict[str, Any]:
    from moge.train.losses import affine_invariant_global_loss, mask_bce_loss, metric_scale_loss, normal_loss

    found = network(images, num_tokens=NUM_TOKENS)
    valid = points.isfinite().all(-1)
    shape, _, scale = affine_invariant_global_loss(found["points"], points, align_resolution=ALIGN_SIDE)
    normals, _ = normal_loss(found["points"][:, ::3, ::3], points[:, ::3, ::3])
    mask, _ = mask_bce_loss(found["mask"], valid, ~valid)
    metric, _ = metric_scale_loss(found["metric_scale"], scale)
    return {
        "points": shape.mean(),
        "normals": normals.mean(),
        "mask": MASK_WEIGHT * mask.mean(),
        "scale": SCALE_WEIGHT * metric.mean(),
    }


def _follow(mean: Any, network: Any, keep: float) -> None:
    """Move the running mean of the weights a little towards the network."""
    for kept, new in zip(mean.state_dict().values(), network.state_dict().values(), strict=True):
        if kept.is_floating_point():
            kept.lerp_(new, 1 - keep)


def main() -> None:
    """Command line, with progress and the time left."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--scenes", type=int, default=900)
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("--minutes", type=float, help="approximate training time; 40 if neither is given")
    amount.add_argument("--steps", type=int, help="exact number of steps, to get the same weights again")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--start", type=Path, help="weights to continue from")
    parser.add_argument("--workers", type=int)
    a = parser.parse_args()
    minutes = 40.0 if a.minutes is None and a.steps is None else a.minutes
    weights = train(a.work, a.scenes, minutes, a.steps, a.seed, a.rate, a.workers, a.start)
    print(json.dumps(measure(weights, a.work, workers=a.workers)))


if __name__ == "__main__":
    main()
