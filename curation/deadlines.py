"""A time limit for work in this process, which cannot be killed: the work checks the limit between two steps."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from curation.failures import ClipFailure, FailureCode

TOO_SLOW = "the work on it was stopped after {:.0f} s"

_limit: ContextVar[tuple[float, float] | None] = ContextVar("time limit", default=None)


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Within this block and thread, `check_time` raises once `seconds` have passed."""
    token = _limit.set((time.monotonic() + seconds, seconds))
    try:
        yield
    finally:
        _limit.reset(token)


def check_time() -> None:
    """Raise ClipFailure(TOO_SLOW) if this thread's time limit has passed; without a limit do nothing."""
    limit = _limit.get()
    if limit is not None and time.monotonic() > limit[0]:
        raise ClipFailure(FailureCode.TOO_SLOW, TOO_SLOW.format(limit[1]))
