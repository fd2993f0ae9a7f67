"""The errors of our values against golden ones, and their gates."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unish_model.network import geometry

NETWORK_GATE = 2e-5
FUNCTION_GATE = 1e-5
FLIP_GATE = 1e-4
MOGE_GATE = 5e-5
MOGE_NORMAL_GATE = 2e-4

Arrays = dict[str, np.ndarray]
Found = Iterator[tuple[str, float, float]]
"""Name, error and gate of each output that a check compares."""


class GoldenError(Exception):
    """A golden folder cannot be checked; the message says what is missing or unknown."""


@dataclass(frozen=True)
class Check:
    """One compared output."""

    file: str
    output: str
    error: float
    """Largest difference over the largest magnitude; for masks, the share of pixels that differ."""
    gate: float

    @property
    def passed(self) -> bool:
        """Whether the error is within its gate; NaN never is."""
        return self.error <= self.gate


def relative_error(ours: Any, golden: np.ndarray, scale: float | None = None) -> float:
    """max |ours - golden| / max |golden| over finite golden values; infinite if shapes or finite entries differ.

    scale: another magnitude to divide by, for sums whose terms cancel.
    """
    value = torch.as_tensor(ours).detach().double().cpu().numpy()
    target = golden.astype(np.float64)
    if value.shape != target.shape:
        return float("inf")
    finite = np.isfinite(target)
    if np.mean(np.isfinite(value) != finite) > FLIP_GATE:
        return float("inf")
    both = finite & np.isfinite(value)
    if not both.any():
        return 0.0
    largest = np.abs(target[both]).max() if scale is None else scale
    difference = np.abs(value[both] - target[both]).max()
    return float(difference / largest) if largest else float(difference)


def flips(ours: Tensor, golden: np.ndarray) -> float:
    """Share of differing pixels."""
    value = ours.detach().cpu().numpy()
    return float(np.mean(value != golden)) if value.shape == golden.shape else float("inf")


def rotation_error(ours: Any, golden: np.ndarray) -> float:
    """The error of axis-angle vectors (..., 3 n), compared as matrices."""

    def matrices(x: Any) -> Tensor:
        return geometry.rotation_from_axis_angle(torch.as_tensor(x).double().unflatten(-1, (-1, 3)))

    return relative_error(matrices(ours), matrices(golden).numpy())


def load_arrays(path: Path) -> Arrays:
    """Every array of an .npz file. Raises GoldenError if it cannot be read."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise GoldenError(f"cannot read {path} as an .npz file of plain arrays ({error}): download it again") from error


def tensors(arrays: Arrays) -> dict[str, Tensor]:
    """The arrays of a file as tensors."""
    return {name: torch.from_numpy(value) for name, value in arrays.items()}
