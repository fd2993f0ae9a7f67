"""The list of all kinds of files made from clips, and where they are: with it, forgetting is complete.

Code that writes files made from clips first registers their kind, once, in `derived.jsonl` of the run's folder. Code
that removes a clip goes through that list and need not know every writer. The contents of the files are unknown here.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from curation.files import cut_short, fsync

REGISTRY = "derived.jsonl"
Naming = Literal["clip_id", "video_key", "index", "entries"]


@dataclass(frozen=True, slots=True)
class Derived:
    """A kind of file.

    place: path pattern below the folder, with {clip_id} or {video_key} where the name of the file or of its folder has
    that id, and {clip_id:.2} for the id's first two digits.
    clips: how clips are found there: by that id; "index": a folder of shards, or several if `place` ends with "*";
    "entries": one file, at any path, with an entry for each clip (`last_resort.remove_entries`).
    """

    kind: str
    place: str
    clips: Naming

    def ids(self, names: Iterable[str]) -> dict[str, list[str]]:
        """Those of these names below the folder that are of this kind, grouped by id; unfinished files too."""
        pattern = re.escape(self.place).replace(re.escape("{" + self.clips + "}"), r"\.?([0-9a-f]{16})")
        pattern = pattern.replace(re.escape("{" + self.clips + ":.2}"), "[0-9a-f]{2}")
        matcher = re.compile(pattern + r"([./].*)?")
        found: dict[str, list[str]] = {}
        for name in names:
            if match := matcher.fullmatch(name):
                found.setdefault(match[1], []).append(name)
        return found


def register(folder: Path, derived: Derived) -> None:
    """Add a kind to the folder's list and fsync it, unless it is there; call this before files of the kind exist."""
    if derived in registered(folder):
        return
    path = folder / REGISTRY
    new = not path.exists()
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        line = json.dumps(asdict(derived), sort_keys=True)
        # in one write: other processes append too
        os.write(handle, (("\n" if cut_short(handle) else "") + line + "\n").encode())
        os.fsync(handle)
    finally:
        os.close(handle)
    if new:
        fsync(folder)


def registered(folder: Path) -> list[Derived]:
    """The kinds of a folder, each once. A line that a crash cut short is ignored: its writer had not started yet."""
    try:
        lines = (folder / REGISTRY).read_text().splitlines()
    except FileNotFoundError:
        return []
    kinds = []
    for line in lines:
        try:
            kinds.append(Derived(**json.loads(line)))
        except (ValueError, TypeError):
            continue
    return list(dict.fromkeys(kinds))
