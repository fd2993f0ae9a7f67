"""Turns: spacing and hourly budgets that hold whatever the order of events, breakers that all workers see."""

from __future__ import annotations

import itertools
from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curation.download.politeness import MAX_PATIENCE_S, Blocked, Gate, Turn, Turns, service_of
from curation.failures import ClipFailure, FailureCode
from curation.records import ClipRef
from curation.settings import DownloadSettings
from tests.support.examples import examples

HOUR = 3600.0
STEPS = (900.0, 3600.0, 14400.0, 43200.0)
VIDEO = ClipRef("youtube", "abcdefghijk")
LINK = ClipRef("http", "https://clips.example.org/a.mp4")


class Clock:
    def __init__(self):
        self.time = 1_700_000_000.0

    def now(self):
        return self.time

    def sleep(self, seconds):
        assert seconds >= 0
        self.time += seconds


class Memory:
    """Turns as the protocol tells them, in memory."""

    def __init__(self, clock):
        self.clock = clock
        self.times = defaultdict(list)
        self.breakers = {}
        self.rows = defaultdict(int)
        self.calls = 0

    def take_turn(self, service, session, *, per_hour, pause_s, patience_s):
        self.calls += 1
        key, now = (service, session), self.clock.time
        code, until = self.breakers.get(key, (None, 0.0))
        if until > now:
            return Turn(until - now, code, until)
        times = self.times[key]
        at = max([now, *(t + pause_s for t in times[-1:])])
        if per_hour and len(times) >= per_hour:
            at = max(at, times[-per_hour] + HOUR)
        if at - now > patience_s:
            return Turn(at - now, FailureCode.RATE_LIMITED, at)
        times.append(at)
        return Turn(at - now)

    def block(self, service, session, code, retry_after_s):
        key = (service, session)
        step = STEPS[min(self.rows[key], len(STEPS) - 1)]
        self.rows[key] += 1
        until = self.clock.time + (
            retry_after_s if retry_after_s and self.rows[key] == 1 else max(step, retry_after_s or 0)
        )
        self.breakers[key] = (code, max(until, self.breakers.get(key, (code, 0.0))[1]))
        return self.breakers[key][1]

    def unblock(self, service, session):
        self.breakers.pop((service, session), None)
        self.rows.pop((service, session), None)


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def memory(clock):
    return Memory(clock)


def gate(memory, **changes):
    turns: Turns = memory
    return Gate(turns, DownloadSettings(**changes), sleep=memory.clock.sleep)


@settings(max_examples=examples(60), deadline=None)
@given(
    per_hour=st.integers(1, 30),
    least=st.floats(0.5, 60),
    extra=st.floats(0, 60),
    # which of three workers comes next, and how long after the one before
    arrivals=st.lists(st.tuples(st.integers(0, 2), st.floats(0, 400)), min_size=1, max_size=80),
)
def test_budget_and_spacing_hold_for_all_workers_together(per_hour, least, extra, arrivals):
    shared = Memory(Clock())
    starts = []
    worlds = []
    for _ in range(3):  # each worker sleeps by itself: the shared clock does not stand still for the others
        own = []
        worlds.append((gate_of(shared, per_hour, (least, least + extra), own), own))
    for worker, gap in arrivals:
        shared.clock.time += gap
        gate_, slept = worlds[worker]
        slept.clear()
        if gate_.wait(VIDEO) is None:
            starts.append(shared.clock.time + sum(slept))
    starts.sort()
    assert all(b - a >= least - 1e-3 for a, b in itertools.pairwise(starts))
    assert all(starts[i + per_hour] - starts[i] >= HOUR - 1e-3 for i in range(len(starts) - per_hour))
    assert len(starts) >= 1


def gate_of(shared, per_hour, pause_s, slept):
    return Gate(
        shared,
        DownloadSettings(videos_per_hour=per_hour, pause_s=pause_s),
        sleep=slept.append,
    )


def test_pauses_are_drawn_between_the_two(memory, clock):
    door = gate(memory, pause_s=(5.0, 10.0), videos_per_hour=0)
    starts = []
    for _ in range(200):
        assert door.wait(VIDEO) is None
        starts.append(clock.time)
    gaps = [b - a for a, b in itertools.pairwise(starts)]
    assert 5.0 - 1e-3 <= min(gaps) < 6 and 9 < max(gaps) <= 10.0 + 1e-3


@pytest.mark.parametrize("platform", ["youtube", "bilibili", "tiktok", "vimeo"])
def test_each_platform_and_session_has_a_budget_of_its_own(memory, clock, platform):
    began = clock.time
    ref = ClipRef(platform, "x")
    for session in ("a", "b"):
        for _ in range(2):
            assert gate(memory, session=session, pause_s=(0.0, 0.0), videos_per_hour=2).wait(ref) is None
    assert clock.time == began
    assert gate(memory, session="a", pause_s=(0.0, 0.0), videos_per_hour=2).wait(ref) is None
    assert clock.time == began + HOUR, "a used up hour is waited for"


def test_a_wait_that_is_too_long_is_told_at_once_and_reserves_nothing(memory, clock):
    door = gate(memory, pause_s=(2 * MAX_PATIENCE_S, 2 * MAX_PATIENCE_S))
    began = clock.time
    assert door.wait(VIDEO) is None
    for _ in range(5):
        assert door.wait(VIDEO) == Blocked(FailureCode.RATE_LIMITED, began + 2 * MAX_PATIENCE_S)
    assert clock.time == began
    clock.time += 1.5 * MAX_PATIENCE_S
    assert door.wait(VIDEO) is None
    assert clock.time == began + 2 * MAX_PATIENCE_S


def test_a_breaker_that_opens_for_a_moment_is_waited_for(memory, clock):
    door = gate(memory)
    began = clock.time
    door.failed(LINK, ClipFailure(FailureCode.RATE_LIMITED, "", 3.0))
    assert door.wait(LINK) is None
    assert clock.time == began + 3


@pytest.mark.parametrize("code", list(FailureCode))
@pytest.mark.parametrize("ref", [VIDEO, LINK])
def test_a_breaker_opens_for_robots_and_rates_only(memory, clock, code, ref):
    door, other = gate(memory), gate(memory)
    assert door.wait(ref) is None
    door.failed(ref, ClipFailure(code, ""))
    answer = other.wait(ref)
    if code in (FailureCode.BOT_CHECK, FailureCode.RATE_LIMITED):
        assert answer == Blocked(code, clock.time + STEPS[0])
    else:
        assert answer is None


def test_a_breaker_grows_is_never_shorter_than_asked_and_closes_with_a_success(memory, clock):
    door = gate(memory)
    for step in (*STEPS, STEPS[-1]):
        door.failed(VIDEO, ClipFailure(FailureCode.BOT_CHECK, ""))
        blocked = door.wait(VIDEO)
        assert blocked == Blocked(FailureCode.BOT_CHECK, clock.time + step)
        clock.time = blocked.until
    door.succeeded(VIDEO)
    door.failed(VIDEO, ClipFailure(FailureCode.RATE_LIMITED, "", 50_000.0))
    assert door.wait(VIDEO) == Blocked(FailureCode.RATE_LIMITED, clock.time + 50_000)
    door.succeeded(VIDEO)
    assert door.wait(VIDEO) is None


def test_a_blocked_session_or_service_does_not_stop_another(memory):
    gate(memory, session="a").failed(VIDEO, ClipFailure(FailureCode.BOT_CHECK, ""))
    assert gate(memory, session="b").wait(VIDEO) is None
    assert gate(memory, session="a").wait(ClipRef("vimeo", "1")) is None
    assert gate(memory, session="a").wait(VIDEO) is not None


def test_plain_links_are_not_slowed_down_and_their_hosts_not_stored(memory, clock):
    door = gate(memory, videos_per_hour=1, pause_s=(5.0, 5.0))
    began = clock.time
    for _ in range(10):
        assert door.wait(LINK) is None
    assert clock.time == began
    door.failed(LINK, ClipFailure(FailureCode.RATE_LIMITED, ""))
    assert door.wait(LINK) is not None
    assert door.wait(ClipRef("http", "https://clips.example.org:444/a.mp4")) is None
    assert not any("example" in part for key in (*memory.times, *memory.breakers) for part in key)


def test_services():
    assert service_of(VIDEO) == "youtube"
    assert service_of(ClipRef("local", "a.mp4")) is None
    name = service_of(LINK)
    assert name is not None and name.startswith("http-") and len(name) == 17
    assert service_of(ClipRef("http", "https://clips.example.org:443/other.mp4")) == name
    assert service_of(ClipRef("http", "http://clips.example.org/a.mp4")) != name


def test_local_files_need_no_turn(memory):
    door, ref = gate(memory), ClipRef("local", "a.mp4")
    assert door.wait(ref) is None
    door.failed(ref, ClipFailure(FailureCode.RATE_LIMITED, ""))
    door.succeeded(ref)
    assert memory.calls == 0 and not memory.breakers
