"""Trains the demo detector from scratch on the synthetic world, and measures it on held-out pictures.

    python -m curation.synthetic.detector.train WORK_FOLDER --scenes 190 --epochs 40

Writes WORK_FOLDER/demo.pt (half precision, below 2 MB), calibrated: 0.25 is the best cut-off of every
class. Nothing is downloaded and nothing is reported anywhere.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from curation.files import atomic_path
from curation.synthetic.detector import LAYOUT
from curation.synthetic.detector import LONG_SIDE as IMAGE_SIZE
from curation.synthetic.detector.data import write_clip_pictures, write_pictures
from curation.synthetic.world.scene import CLASSES

HELD_OUT_SEED, CALIBRATION_SEED = 900_000, 950_000
CUT_OFF = 0.25
# A tenth of a clip's samples may be wrong. So a few false things reject a good clip, while a true thing must be found
# in a few samples only: for things, precision counts twice as much as recall. A person must be found in nearly all.
_BETA = (1.5, 0.5, 0.5, 0.5)
_AS_GOOD = 0.01  # cut-offs with an F score this close to the best are equally good; the middle one is the safest
_CLIPS_APART = 500_000  # between the seeds of single pictures and those of clips


def train(
    work: Path,
    scenes: int,
    epochs: int,
    start: Path | None = None,
    seed: int = 1000,
    workers: int | None = None,
    device: str = "cpu",
) -> dict[str, float]:
    """Render what is missing, train, calibrate, and return the figures on held-out pictures.

    Starts from random weights; or continues from those in `start`, with a lower rate and without mosaics, because the
    detector will see whole pictures.
    """
    os.environ.setdefault("YOLO_AUTOINSTALL", "false")
    import torch
    from ultralytics import settings
    from ultralytics.models import YOLO

    settings.update({"sync": False, "datasets_dir": str(work), "runs_dir": str(work / "runs")})
    held_out = max(scenes // 12, 2)
    write_pictures(work / "train", scenes, seed, workers)
    write_clip_pictures(work / "train", scenes, seed + _CLIPS_APART, workers)
    write_pictures(work / "val", held_out, HELD_OUT_SEED, workers)
    write_pictures(work / "calibration", held_out, CALIBRATION_SEED, workers)
    write_clip_pictures(work / "calibration", held_out, CALIBRATION_SEED + _CLIPS_APART, workers)
    data = work / "data.yaml"
    data.write_text(
        yaml.safe_dump(
            {
                "path": str(work.absolute()),
                "train": "train/images",
                "val": "val/images",
                "names": dict(enumerate(CLASSES)),
            }
        )
    )
    model = YOLO(str(start or LAYOUT), task="detect")
    # saves a third of the time on a CPU
    model.add_callback("on_train_start", lambda trainer: trainer.model.to(memory_format=torch.channels_last))
    model.train(
        data=str(data),
        epochs=epochs,
        imgsz=IMAGE_SIZE,
        batch=16,
        device=device,
        workers=0,
        cache="ram",
        plots=False,
        amp=False,
        val=False,
        save_period=5,
        optimizer="AdamW",
        lr0=0.001 if start else 0.003,
        lrf=0.01,
        cos_lr=True,
        warmup_epochs=1.0,
        weight_decay=0.0005,
        mosaic=0.0 if start else 1.0,
        close_mosaic=max(1, round(0.45 * epochs)),
        scale=0.4,
        translate=0.1,
        fliplr=0.5,
        hsv_h=0.02,
        hsv_s=0.5,
        hsv_v=0.35,
        degrees=0.0,
        erasing=0.0,
        seed=0,
        project=str(work / "runs"),
        name="demo",
        exist_ok=True,
        verbose=False,
        patience=0,
    )
    shutil.copyfile(work / "runs" / "demo" / "weights" / "last.pt", work / "demo.pt")
    calibrate(work / "demo.pt", work / "calibration")
    return measure(work / "demo.pt", data)


def calibrate(weights: Path, pictures: Path) -> dict[str, float]:
    """Shift every class's scores in a weights file so that CUT_OFF is its best cut-off on these labelled pictures.

    The best is the middle of the cut-offs with about the highest F score, weighted by _BETA. Shifting all logits of a
    class keeps their order, and so its average precision. Returns the cut-offs that were best before.
    """
    import torch
    from ultralytics.models import YOLO

    model: Any = YOLO(str(weights))
    rows: list[tuple[int, float, bool]] = []
    truths = np.zeros(len(CLASSES))
    for path in sorted((pictures / "images").glob("*.jpg")):
        text = (pictures / "labels" / f"{path.stem}.txt").read_text()
        truth = np.array([line.split() for line in text.splitlines()], float).reshape(-1, 5)
        truths += np.bincount(truth[:, 0].astype(int), minlength=len(CLASSES))
        boxes = model.predict(str(path), imgsz=IMAGE_SIZE, conf=0.02, device="cpu", verbose=False)[0].boxes
        found = np.column_stack([boxes.cls.numpy(), boxes.conf.numpy(), boxes.xywhn.numpy()])
        rows += _matched(found, truth)
    shifts, best = np.zeros(len(CLASSES)), {}
    for number, (name, beta) in enumerate(zip(CLASSES, _BETA, strict=True)):
        mine = sorted(((score, hit) for kind, score, hit in rows if kind == number), reverse=True)
        if not any(hit for _, hit in mine):
            continue  # nothing to learn from: the scores stay
        score, hit = np.array([score for score, _ in mine]), np.array([hit for _, hit in mine], float)
        right, taken = np.cumsum(hit), np.arange(1, len(hit) + 1)
        f = (1 + beta**2) * right / (beta**2 * truths[number] + taken)
        good = score[f >= f.max() - _AS_GOOD]
        middle = (_logit(good[0]) + _logit(good[-1])) / 2
        best[name] = float(1 / (1 + np.exp(-middle)))
        shifts[number] = _logit(CUT_OFF) - middle
    checkpoint = torch.load(weights, map_location="cpu", weights_only=False)  # written by `train`
    for branch in checkpoint["model"].model[-1].cv3:
        branch[-1].bias.data += torch.from_numpy(shifts).to(branch[-1].bias.dtype)
    with atomic_path(weights) as temporary:
        torch.save(_without_paths(checkpoint), temporary)
    return best


def _without_paths(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint without what ultralytics records of the machine and the run: paths, the repository, its metrics."""

    def plain(values: dict[str, Any]) -> dict[str, Any]:
        return {key: None if isinstance(value, str) and "/" in value else value for key, value in values.items()}

    model = checkpoint["model"] or checkpoint["ema"]
    model.pt_path, model.args, model.yaml = None, plain(dict(model.args)), plain(model.yaml)
    noted = dict.fromkeys(("train_results", "train_metrics", "git"))
    return checkpoint | noted | {"train_args": plain(checkpoint["train_args"])}


def _matched(found: NDArray[np.float64], truth: NDArray[np.float64]) -> list[tuple[int, float, bool]]:
    """(class, score, whether it matches a free true box) per row of class, score, xywh; truth has class, xywh."""
    rows, free = [], np.ones(len(truth), bool)
    for kind, score, *box in found[np.argsort(-found[:, 1])]:
        x, y, w, h = box
        low = np.maximum(truth[:, 1:3] - truth[:, 3:] / 2, (x - w / 2, y - h / 2))
        high = np.minimum(truth[:, 1:3] + truth[:, 3:] / 2, (x + w / 2, y + h / 2))
        shared = np.prod(np.maximum(high - low, 0), axis=1)
        overlap = shared / (w * h + np.prod(truth[:, 3:], axis=1) - shared)
        overlap[~free | (truth[:, 0] != kind)] = 0
        hit = bool(len(truth)) and float(overlap.max()) >= 0.5
        if hit:
            free[int(overlap.argmax())] = False
        rows.append((int(kind), float(score), hit))
    return rows


def _logit(p: float) -> float:
    return float(np.log(p / (1 - p)))


def measure(weights: Path, data: Path) -> dict[str, float]:
    """mAP50 of the person class and of all classes on the held-out pictures of a data file."""
    from ultralytics.models import YOLO

    result = YOLO(str(weights)).val(
        data=str(data), imgsz=IMAGE_SIZE, plots=False, verbose=False, workers=0, device="cpu"
    )
    per_class = dict(zip((int(i) for i in result.box.ap_class_index), result.box.ap50, strict=True))
    return {"person_map50": float(per_class[0]), "map50": float(result.box.map50), "map50_95": float(result.box.map)}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--scenes", type=int, default=190)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--start", type=Path, help="weights to continue from")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    print(
        json.dumps(train(arguments.work, arguments.scenes, arguments.epochs, arguments.start, device=arguments.device))
    )


if __name__ == "__main__":
    main()
