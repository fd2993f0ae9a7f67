"""Fixtures that find real media and weights; a test skips with a reason where they are absent."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def _shared_part(name: str, variable: str) -> Path:
    path = Path(os.environ.get(variable, ROOT.parent / "shared" / name))
    if not path.exists():
        pytest.skip(f"no {name} folder: set {variable}, or put it in ../shared/{name}")
    return path


@pytest.fixture(scope="session")
def media() -> Path:
    """Folder of real clips with cases.csv."""
    return _shared_part("media", "UNISH_TEST_MEDIA")


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of golden numbers and the deterministic weight scheme."""
    return _shared_part("golden", "UNISH_TEST_GOLDEN")


@pytest.fixture(scope="session")
def yolo11n() -> Path:
    """A real detector's weights."""
    path = _shared_part("weights", "UNISH_TEST_WEIGHTS") / "yolo11n-int8dq.pt"
    if not path.exists():
        pytest.skip("no yolo11n-int8dq.pt in the weights folder")
    return path
