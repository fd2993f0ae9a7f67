"""Claims and queues on a real catalog: who gets what, and what becomes of it when a worker dies or sleeps."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from examples import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from curation.catalog import Catalog
from curation.claims import Claims, Queue


@dataclass(frozen=True)
class Piece:
    batch_id: str


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    return Catalog(f"sqlite:///{tmp_path / 'catalog.sqlite'}")


def test_what_one_worker_holds_another_does_not_get(catalog: Catalog, tmp_path: Path):
    with Claims(catalog, tmp_path / "a", 60) as first, Claims(catalog, tmp_path / "b", 60) as second:
        assert first.take("x") and first.take("x") and not second.take("x")
        first.leave("x")
        assert second.take("x") and not first.take("x")
    assert catalog.leases() == []


def test_a_heartbeat_keeps_claims_longer_than_they_last(catalog: Catalog, tmp_path: Path):
    with Claims(catalog, tmp_path / "a", 0.6) as first, Claims(catalog, tmp_path / "b", 0.6) as second:
        assert first.take("x")
        time.sleep(1.5)
        assert not second.take("x")


DIE = """
import os, sys
from pathlib import Path
from curation.catalog import Catalog
from curation.claims import Claims
claims = Claims(Catalog(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])).__enter__()
assert claims.take("x")
os._exit(9)
"""


def die(catalog: Catalog, folder: Path, seconds: float) -> None:
    ended = subprocess.run([sys.executable, "-c", DIE, catalog.url, str(folder), str(seconds)], check=False)
    assert ended.returncode == 9


def test_on_one_machine_a_dead_worker_s_claims_are_back_at_once(catalog: Catalog, tmp_path: Path):
    die(catalog, tmp_path / "a", 3600)
    assert [lease.name for lease in catalog.leases()] == ["x"]
    with Claims(catalog, tmp_path / "a", 60) as claims:
        assert claims.take("x")
    assert not list((tmp_path / "a" / ".claims").iterdir())


def test_elsewhere_they_lapse(catalog: Catalog, tmp_path: Path):
    die(catalog, tmp_path / "a", 2.0)
    with Claims(catalog, tmp_path / "b", 60) as claims:
        assert not claims.take("x")
        deadline = time.monotonic() + 10
        while not claims.take("x"):
            assert time.monotonic() < deadline
            time.sleep(0.1)


def test_turns_are_taken_one_after_the_other(catalog: Catalog, tmp_path: Path):
    inside, most = [0], [0]

    def work() -> None:
        with Claims(catalog, tmp_path, 60) as claims, claims.turn("index"):
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            time.sleep(0.05)
            inside[0] -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]


@settings(max_examples=examples(30), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=st.lists(st.sampled_from(["a", "b", "A", "B"]), max_size=60),
    count=st.integers(1, 6),
    done=st.sets(st.integers(0, 5)),
)
def test_every_piece_is_done_once_whatever_the_order(tmp_path_factory, steps, count, done):
    """a, b: that worker takes a piece; A, B: it finishes its oldest. At the end both work until nothing is left."""
    folder = tmp_path_factory.mktemp("queue")
    catalog = Catalog(f"sqlite:///{folder / 'catalog.sqlite'}")
    pieces = [Piece(str(n)) for n in range(count)]
    finished = {str(n) for n in done}
    worked: list[str] = []
    with Claims(catalog, folder, 60) as one, Claims(catalog, folder, 60) as two:
        queues = {
            name: Queue(claims, pieces, lambda p: p.batch_id in finished, trusting=True)
            for name, claims in (("a", one), ("b", two))
        }
        open_: dict[str, list[Piece]] = {"a": [], "b": []}

        def finish(name: str) -> None:
            piece = open_[name].pop(0)
            worked.append(piece.batch_id)
            finished.add(piece.batch_id)
            queues[name].leave(piece)

        for step in [*steps, *"aAbB" * (2 * count + 2)]:
            name = step.lower()
            if step.islower() and (piece := queues[name].take()) is not None:
                open_[name].append(piece)
            elif step.isupper() and open_[name]:
                finish(name)
        while open_["a"] or open_["b"]:
            finish("a" if open_["a"] else "b")
        for queue in queues.values():
            assert queue.take() is None and queue.waiting == 0
    assert sorted(worked) == sorted({str(n) for n in range(count)} - {str(n) for n in done})
