"""Checks every golden file of a folder: each output against its gate.

A file is recognised by its name, and its arrays give all sizes, so the same code checks other salts, image sizes and
frame counts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from unish_model.network.config import UniSHConfig
from unish_model.selfcheck import network
from unish_model.selfcheck.compare import NETWORK_GATE, Arrays, Check, Found, GoldenError, load_arrays

CHECKS: dict[str, Callable[[Arrays, network.Context], Found]] = {
    r"rope": network.check_rope,
    r"rotations": network.check_rotations,
    r"svd_orthogonalize": network.check_svd,
    r"transform_smpl": network.check_transform,
    r"focal_shift": network.check_focal_shift,
    r"depth_to_points": network.check_unprojection,
    r"preprocess": network.check_preprocess,
    r"alignnet": network.check_alignnet,
    r"human_head": network.check_human_head,
    r"camera_head": network.check_camera_head,
    r"unish_\w*pose_world_right": network.check_right_root,
    r"unish": network.check_unish,
    r"forward": network.check_forward,
    r"run_inference": network.check_chunks,
    r"pi3": network.check_pi3,
    r"moge": network.check_moge,
}
"""Pattern of the whole file stem to its check. The first match counts; checks run in this order, small ones first."""


def _rank(path: Path) -> int:
    """The position of a file's check in CHECKS; one past the end if there is none."""
    for rank, pattern in enumerate(CHECKS):
        if re.fullmatch(pattern + r"\w*", path.stem):
            return rank
    return len(CHECKS)


def run_selfcheck(
    folder: Path, salt: str = "public-1", config: UniSHConfig | None = None, only: str | None = None
) -> Iterator[Check]:
    """Check every golden file in a folder, yielding each output as it is compared.

    folder: *.npz files; salt: that of their weights; config: the network's sizes, released by default; only: a regular
    expression that file names (without .npz) must match. An unknown file, array or output counts as a miss. Raises
    GoldenError if there is no such file, and for missing inputs.
    """
    paths = [path for path in folder.glob("*.npz") if only is None or re.search(only, path.stem)]
    if not paths:
        raise GoldenError(f"no golden .npz file in {folder}" + (f" has a name with {only!r}" if only else ""))
    context = network.Context(folder, salt, config or UniSHConfig.released())
    checks = list(CHECKS.values())
    for path in sorted(paths, key=lambda path: (_rank(path), path)):
        rank = _rank(path)
        if rank == len(checks):
            yield Check(path.name, "unknown file", float("inf"), NETWORK_GATE)
            continue
        context.path = path
        found: list[tuple[str, float, float]] = []
        try:
            with torch.no_grad():
                found.extend(checks[rank](load_arrays(path), context))
        except KeyError as error:
            found.append((f"{error.args[0]}: unknown or missing array", float("inf"), NETWORK_GATE))
        for output, difference, gate in found or [("no output", float("inf"), NETWORK_GATE)]:
            yield Check(path.name, output, difference, gate)
