"""Claims and queues on a real catalog: who gets what, and what becomes of it when a worker dies or sleeps."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from curation.catalog import Catalog
from curation.failures import LostError
from curation.run.claims import Claims, Queue
from tests.support.examples import examples


@dataclass(frozen=True)
class Piece:
    batch_id: str


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    return Catalog(f"sqlite:///{tmp_path / 'catalog.sqlite'}")


def test_what_one_worker_holds_another_does_not_get(catalog: Catalog, tmp_path: Path):
    with Claims(catalog, tmp_path / "a", 60) as first, Claims(catalog, tmp_path / "b", 60) as second:
        assert first.take("x") and first.take("x") and not second.take("x")
        first.release("x")
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
from curation.run.claims import Claims
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


STAND_STILL = """
import sys
from pathlib import Path
from curation.catalog import Catalog
from curation.run.claims import Claims
from curation.failures import LostError
with Claims(Catalog(sys.argv[1]), Path(sys.argv[2]), 1.5) as claims:
    assert claims.take("x") and claims.take("y")
    claims.check("x")
    print("working", flush=True)
    sys.stdin.readline()
    for name in ("x", "y"):
        try:
            claims.check(name)
            print("mine", flush=True)
        except LostError:
            print("lost", flush=True)
"""


def test_a_stopped_worker_s_claims_are_taken_over_and_it_learns_of_it(catalog: Catalog, tmp_path: Path):
    command = [sys.executable, "-c", STAND_STILL, catalog.url, str(tmp_path / "a")]
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert worker.stdout is not None and worker.stdout.readline() == "working\n"
        with Claims(catalog, tmp_path / "a", 60) as claims:  # the same folder: its lock says that it lives
            os.kill(worker.pid, signal.SIGSTOP)
            deadline = time.monotonic() + 20
            while not claims.take("x"):
                assert time.monotonic() < deadline
                claims.release_dead()
                time.sleep(0.05)
            os.kill(worker.pid, signal.SIGCONT)
            said, _ = worker.communicate("go on\n", timeout=20)
            assert said.split() == ["lost", "mine"], "y lapsed too, but nobody took it"
            assert claims.held("x")
            claims.check("x")
    finally:
        worker.kill()
        worker.wait()


def test_after_a_power_cut_the_next_run_starts_at_once(catalog: Catalog, tmp_path: Path):
    """Signs without a lock, leases that have long to go, and a sign whose worker had no lease yet."""
    signs = tmp_path / "a" / ".claims"
    signs.mkdir(parents=True)
    for owner in ("0" * 16, "1" * 16, "2" * 16):
        (signs / owner).touch()
    catalog.claim(["x"], "0" * 16, 3600)
    catalog.claim(["y"], "1" * 16, 3600)
    with Claims(catalog, tmp_path / "a", 60) as claims:
        assert claims.take("x") and claims.take("y")
    assert not list(signs.iterdir())


def test_a_ticket_travels_and_says_when_the_work_is_another_s(catalog: Catalog, tmp_path: Path):
    with Claims(catalog, tmp_path / "a", 0.3) as claims:
        assert claims.take("x")
        ticket = pickle.loads(pickle.dumps(claims.ticket("x")))
        ticket()
        catalog.release(claims._owner)  # as if it had lapsed
        assert catalog.claim(["x"], "another", 60)
        time.sleep(0.2)
        with pytest.raises(LostError):
            ticket()
        with pytest.raises(LostError):
            claims.check("x")
        with pytest.raises(LostError):
            claims.check("never taken")


def test_the_end_of_a_worker_does_not_wait_for_a_database_that_is_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("curation.run.claims._GOODBYE_S", 0.5)
    (tmp_path / "share").mkdir()
    catalog = Catalog(f"sqlite:///{tmp_path / 'share' / 'catalog.sqlite'}")
    with Claims(catalog, tmp_path / "a", 60) as claims:
        assert claims.take("x")
        (tmp_path / "share").rename(tmp_path / "away")
        ending = time.monotonic()
    assert time.monotonic() - ending < 10


def test_turns_are_taken_one_after_the_other(catalog: Catalog, tmp_path: Path):
    inside, most = [0], [0]

    def work() -> None:
        with Claims(catalog, tmp_path, 60) as claims, claims.hold("index"):
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
            queues[name].release(piece)

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
