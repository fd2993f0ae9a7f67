"""docs/licences.md names every direct dependency and every file of weights, and contradicts no package."""

from __future__ import annotations

import re
import subprocess
import tomllib
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "licences.md").read_text(encoding="utf-8")
ROWS = {match[1]: match[2] for match in re.finditer(r"^\| `([a-z0-9-]+)` \|[^|]*\|([^|]*)\|", TEXT, flags=re.MULTILINE)}
WEIGHTS = {".bin", ".ckpt", ".h5", ".npy", ".npz", ".onnx", ".pkl", ".pt", ".pth", ".safetensors", ".tflite"}

# What packages write instead of an SPDX id; a family without a version stands for itself.
SPELLINGS = {
    "APACHE": "Apache-2.0",
    "Apache 2.0": "Apache-2.0",
    "Apache Software License": "Apache-2.0",
    "BSD License": "BSD",
    "GNU Affero General Public License v3 or later (AGPLv3+)": "AGPL-3.0",
    "MIT License": "MIT",
}


def _direct() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    return {re.split(r"[^A-Za-z0-9._-]", entry, maxsplit=1)[0].lower() for entries in lists for entry in entries}


def _stated(package: metadata.PackageMetadata) -> set[str]:
    """The licences that a package's metadata name, as SPDX ids or families; empty where they name none."""
    if expression := package.get("License-Expression"):
        return set(re.split(r" (?:AND|OR|WITH) |[()]", expression)) - {""}
    classifiers = package.get_all("Classifier") or []
    found = [line.rpartition(" :: ")[2] for line in classifiers if line.startswith("License ::")]
    text = package.get("License") or ""
    if not found and len(text) <= 40 and text not in ("", "UNKNOWN"):  # a longer one is the licence itself
        found = [text]
    return {SPELLINGS.get(name, name) for name in found}


def test_each_direct_dependency_has_a_row_that_its_package_does_not_contradict():
    direct = _direct()
    assert len(direct) > 40 and direct - ROWS.keys() == set()
    compared, wrong = 0, {}
    for name in sorted(direct):
        try:
            stated = _stated(metadata.metadata(name))
        except metadata.PackageNotFoundError:  # an extra that is not installed here
            continue
        compared += bool(stated)
        if lacking := {licence for licence in stated if licence not in ROWS[name]}:
            wrong[name] = lacking
    assert wrong == {}
    assert compared > 5


def test_each_file_of_weights_is_named():
    git = ["git", "-c", f"safe.directory={ROOT}", "ls-files", "-z"]
    names = subprocess.run(git, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    weights = {Path(name).name for name in names if Path(name).suffix in WEIGHTS}
    assert {"demo.pt", "body.npz"} <= weights
    assert {name for name in weights if not re.search(rf"^\| `\S*\b{re.escape(name)}` \|", TEXT, re.MULTILINE)} == set()
