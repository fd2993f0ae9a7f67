"""Finds a detector's weights on this disk or downloads them once, and loads them without output of their library."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from curation.failures import UsageError


def find_weights(weights: str) -> Path:
    """A weights file by path, or a published ultralytics file by name (kept in the cache, fetched once).

    Raises UsageError that names both ways if it is neither here nor available for download.
    """
    path = Path(weights).expanduser()
    if path.is_file():
        return path.absolute()
    if path.is_dir():
        raise UsageError(f"The detector weights {weights} are a folder; give the .pt file in it.")
    cached = cache_folder() / "weights" / path.name
    if cached.is_file():
        return cached
    if path.name == weights and _published(weights):
        _fetch(weights, cached)
        return cached
    raise UsageError(
        f"There is no weights file {weights}, and ultralytics publishes no file of that name: pass --detector "
        "with the path of a file, or with a published name such as yolo11x.pt."
    )


def _published(name: str) -> bool:
    keep_quiet()
    from ultralytics.utils.downloads import GITHUB_ASSETS_NAMES

    return name in GITHUB_ASSETS_NAMES


def _fetch(name: str, target: Path) -> None:
    from ultralytics.utils.downloads import attempt_download_asset

    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        file = Path(folder) / name
        try:
            attempt_download_asset(file)
            file.replace(target)
        except (OSError, RuntimeError, AssertionError, ValueError) as error:
            raise UsageError(
                f"The detector weights {name} could not be downloaded ({type(error).__name__}): "
                "check the network, or copy the file to this machine and pass --detector PATH."
            ) from error


def cache_folder() -> Path:
    """The folder of downloaded and converted weights: UNISH_CACHE, or `unish` in the user's cache."""
    root = os.environ.get("UNISH_CACHE") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "unish"
    return Path(root)


def keep_quiet() -> None:
    """Keep ultralytics and OpenVINO from installing packages, sending usage data, and printing over progress bars."""
    os.environ.setdefault("YOLO_AUTOINSTALL", "false")
    os.environ.setdefault("YOLO_OFFLINE", "true")  # no usage reports, no look-ups at import; downloads still work
    # OpenVINO reports every import and conversion, unless it cannot import this package: then it uses a stub.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    os.environ.setdefault("YOLO_VERBOSE", "false")
    os.environ.setdefault("YOLO_CONFIG_DIR", str(cache_folder() / "ultralytics"))
    Path(os.environ["YOLO_CONFIG_DIR"]).mkdir(parents=True, exist_ok=True)


def load_model(weights: Path) -> Any:
    """The ultralytics model of a detector's checkpoint. Raises UsageError for any other file."""
    from ultralytics.models import YOLO

    try:
        model: Any = YOLO(str(weights), task="detect")
        if model.task != "detect":
            raise UsageError(f"{weights.name} is a {model.task} model; give weights of a detector.")
        model.model.names  # noqa: B018 - a file that is not a checkpoint fails here
    except UsageError:
        raise
    except Exception as error:  # torch, pickle and ultralytics raise a dozen types for a file that is not a checkpoint
        raise UsageError(
            f"{weights.name} cannot be read as ultralytics weights ({type(error).__name__}); fetch the file again."
        ) from error
    # Summary and export build a path from the layout's file name, which may be missing or None in a checkpoint.
    described = getattr(model.model, "yaml", None) or {}
    if not isinstance(described.get("yaml_file"), str):
        model.model.yaml = {**described, "yaml_file": f"{weights.stem}.yaml"}
    return model
