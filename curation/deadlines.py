"""A time limit for work in this very process, which cannot be killed: it is looked at between two steps."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from curation.failures import ClipFailure, FailureCode

TOO_SLOW = "the work on it was ended after {:.0f} s"

_limit: ContextVar[tuple[float, float] | None] = ContextVar("time limit", default=None)


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Within this block, and on this thread, `check_time` raises once so many seconds are over."""
    token = _limit.set((time.monotonic() + seconds, seconds))
    try:
        yield
    finally:
        _limit.reset(token)


def check_time() -> None:
    """Raise ClipFailure(TOO_SLOW) where the limit that this thread works under is over; without a limit do nothing."""
    limit = _limit.get()
    if limit is not None and time.monotonic() > limit[0]:
        raise ClipFailure(FailureCode.TOO_SLOW, TOO_SLOW.format(limit[1]))
