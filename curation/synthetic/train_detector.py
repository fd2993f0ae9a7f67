"""Trains the demo detector from scratch on the synthetic world, and measures it on held-out pictures.

    python -m curation.synthetic.train_detector WORK_FOLDER --scenes 190 --epochs 40

Writes WORK_FOLDER/demo.pt (half precision, below 2 MB). Nothing is downloaded and nothing is reported anywhere.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path

import yaml

from curation.synthetic.detector import LAYOUT
from curation.synthetic.detector import LONG_SIDE as IMAGE_SIZE
from curation.synthetic.detector_data import write_pictures
from curation.synthetic.scene import CLASSES

HELD_OUT_SEED = 900_000


def train(
    work: Path,
    scenes: int,
    epochs: int,
    start: Path | None = None,
    seed: int = 1000,
    workers: int | None = None,
    device: str = "cpu",
) -> dict[str, float]:
    """Render what is missing, train, and return the figures on held-out pictures.

    From random weights, or on from those in `start`, then with fewer mosaics and a lower rate. The last epochs
    are without mosaics, as whole pictures are what the detector will see.
    """
    os.environ.setdefault("YOLO_AUTOINSTALL", "false")
    import torch
    from ultralytics import YOLO, settings

    settings.update({"sync": False, "datasets_dir": str(work), "runs_dir": str(work / "runs")})
    write_pictures(work / "train", scenes, seed, workers)
    write_pictures(work / "val", max(scenes // 12, 2), HELD_OUT_SEED, workers)
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
    # a third less time on a CPU
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
        lr0=0.002 if start else 0.003,
        lrf=0.02,
        cos_lr=True,
        warmup_epochs=1.0,
        weight_decay=0.0005,
        mosaic=1.0,
        close_mosaic=max(1, round((0.75 if start else 0.45) * epochs)),
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
    return measure(work / "demo.pt", data)


def measure(weights: Path, data: Path) -> dict[str, float]:
    """mAP50 of the person class and of all classes on the held-out pictures of a data file."""
    from ultralytics import YOLO

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
    parser.add_argument("--start", type=Path, help="weights to go on from")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    print(
        json.dumps(train(arguments.work, arguments.scenes, arguments.epochs, arguments.start, device=arguments.device))
    )


if __name__ == "__main__":
    main()
