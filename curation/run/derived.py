"""What was derived from clips, and where it lies: the list that makes forgetting complete.

Whatever writes files made from clips says so first, once for each kind, in `derived.jsonl` of the run's folder. Who has
to take a clip out goes through that list instead of knowing every writer. Knows nothing of what the files hold.
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
    """A kind of files.

    place: where they lie below the folder, with {clip_id} or {video_key} where the file or its folder carries that id,
    and {clip_id:.2} for its first two digits.
    clips: how clips are named there: by that id; "index": a folder of shards, or folders of them with a "*" at the end;
    "entries": one file, at any path, with an entry for each clip (`last_resort.remove_entries`).
    """

    kind: str
    place: str
    clips: Naming

    def ids(self, names: Iterable[str]) -> dict[str, list[str]]:
        """Of these names below the folder those of this kind, by the id they carry; unfinished files too."""
        pattern = re.escape(self.place).replace(re.escape("{" + self.clips + "}"), r"\.?([0-9a-f]{16})")
        pattern = pattern.replace(re.escape("{" + self.clips + ":.2}"), "[0-9a-f]{2}")
        matcher = re.compile(pattern + r"([./].*)?")
        found: dict[str, list[str]] = {}
        for name in names:
            if match := matcher.fullmatch(name):
                found.setdefault(match[1], []).append(name)
        return found


def register(folder: Path, derived: Derived) -> None:
    """Add a kind to the folder's list, unless it is there; on the disk before anything of the kind is written."""
    if derived in registered(folder):
        return
    path = folder / REGISTRY
    new = not path.exists()
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        line = json.dumps(asdict(derived), sort_keys=True)
        # in one piece: others append too
        os.write(handle, (("\n" if cut_short(handle) else "") + line + "\n").encode())
        os.fsync(handle)
    finally:
        os.close(handle)
    if new:
        fsync(folder)


def registered(folder: Path) -> list[Derived]:
    """The kinds of a folder, each once. A line that a crash cut short is passed over: its writer had not begun."""
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
