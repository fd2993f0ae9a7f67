"""Small clips of a generated scene, made by the benchmark's own generator so that it stays alive."""

from __future__ import annotations

import dataclasses
from types import ModuleType
from typing import Protocol

import pytest

from curation.records import ClipSample

WIDTH, HEIGHT = 56, 42


class MakeClip(Protocol):
    """A clip of `frames` frames; equal arguments give equal clips."""

    def __call__(self, seed: int, frames: int = 5, **changes: object) -> ClipSample: ...


@pytest.fixture(scope="session")
def bench() -> ModuleType:
    from benchmarks import shards

    return shards


@pytest.fixture(scope="session")
def make_clip(bench: ModuleType) -> MakeClip:
    def make(seed: int, frames: int = 5, **changes: object) -> ClipSample:
        return dataclasses.replace(bench.clip(frames, seed, width=WIDTH, height=HEIGHT), **changes)

    return make
