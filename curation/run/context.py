"""What the stages share within a process: settings, catalog, store, policy, teacher, and which data set is made."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from curation.catalog import Catalog, ObservationFile
from curation.files import sha256_file, sha256_json
from curation.judge.policy import Policy, describe, load_policy
from curation.observe.sampling import SAMPLER
from curation.people.weights import find_weights
from curation.settings import Settings
from curation.shards.schema import SCHEMA_VERSION
from curation.storage import Store
from curation.teach.teacher import load_teacher, teacher_identity
from curation.video.hdr import OPERATOR


class RunContext:
    """One process's view of a run. Files are named by their paths below the run's folder."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.store = Store(settings.out, settings.storage)
        self.catalog = Catalog(settings.database)
        self.policy: Policy = load_policy(settings.policy)
        self.derived: set[str] = set()  # kinds of files that this process has announced
        self._teacher: Any = None
        self._same: dict[str, bool] = {}

    @cached_property
    def dataset(self) -> dict[str, Any]:
        """What all clips of the data set have in common: policy, measurements and teacher."""
        return {
            "schema": SCHEMA_VERSION,
            "policy": describe(self.policy) | {"detector": Path(self.policy.detector).name},
            "observe": self._identity(),
            "frame_long_side": self.settings.observe.frame_long_side,
            "teacher": self._teacher_identity(),
        }

    @cached_property
    def dataset_hash(self) -> str:
        """The hash under which the catalog stores `dataset`."""
        return sha256_json(self.dataset)

    @cached_property
    def shards(self) -> str:
        """Name of this data set's folder: one for every combination of policy, detector and teacher."""
        return f"shards/{self.policy.name}-{self._teacher_identity()['name']}-{self.dataset_hash[:8]}"

    def _teacher_identity(self) -> dict[str, Any]:
        """The teacher's properties that change its results; not its number format, so that machines can share work."""
        return _cached_identity(teacher_identity, self.settings.teacher)

    def _identity(self) -> dict[str, Any]:
        settings = self.settings.observe
        return {
            "detector_sha256": _weights_hash(str(find_weights(settings.detector or self.policy.detector))),
            "long_side": settings.detector_long_side,
            "confidence": settings.detector_confidence,
            "sampler": SAMPLER,
            "sample_fps": settings.sample_fps,
            "hdr": OPERATOR,
        }

    def teacher(self) -> Any:
        """The teacher, loaded when the first clip needs it."""
        if self._teacher is None:
            self._teacher = load_teacher(self.settings.teacher)
        return self._teacher

    def measured_as_asked(self, file: ObservationFile) -> bool:
        """Whether these measurements were made with this run's detector and sampling."""
        if file.provenance_hash not in self._same:
            value = self.catalog.provenance(file.provenance_hash) or {}
            detector = value.get("detector", {})
            found = {
                "detector_sha256": detector.get("sha256"),
                "long_side": detector.get("long_side"),
                "confidence": detector.get("confidence"),
                "sampler": value.get("sampler"),
                "sample_fps": value.get("sample_fps"),
                "hdr": value.get("hdr"),
            }
            self._same[file.provenance_hash] = found == self._identity()
        return self._same[file.provenance_hash]


@lru_cache(maxsize=4)
def context_of(settings: Settings) -> RunContext:
    """This process's state of a run."""
    return RunContext(settings)


def forget_cached() -> None:
    """Read the files behind the settings again: they may have changed."""
    for cache in (context_of, _weights_hash, _cached_identity):
        cache.cache_clear()


@lru_cache(maxsize=4)
def _weights_hash(path: str) -> str:
    return sha256_file(Path(path))


@lru_cache(maxsize=4)
def _cached_identity(function: Callable[[Any], dict[str, Any]], settings: Any) -> dict[str, Any]:
    return function(settings)
