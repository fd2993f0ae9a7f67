"""Waiting out short outages: a database that restarts, a storage that does not respond.

Work that is safe to repeat is repeated, with growing random pauses, up to a time limit; then the run ends with an
OutageError. Each outage logs one line, however many threads meet it. The callers decide which errors are temporary.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_delay, wait_random_exponential

from curation.failures import OutageError

OUTAGE_S = 300.0  # how long to wait for an unavailable database or storage
_FIRST_S, _LONGEST_S = 0.2, 10.0  # upper bounds of the random pauses: of the first one, and of all

_logger = logging.getLogger(__name__)
_patience: ContextVar[float | None] = ContextVar("patience", default=None)
_waiting: Counter[str] = Counter()  # number of calls that wait because of an outage, by what is unavailable
_lock = threading.Lock()

T = TypeVar("T")


@contextmanager
def patience(seconds: float) -> Iterator[None]:
    """Wait for `seconds` instead of OUTAGE_S, within this block and thread."""
    token = _patience.set(seconds)
    try:
        yield
    finally:
        _patience.reset(token)


def wait_for(what: str, work: Callable[[], T], passing: Callable[[BaseException], str | None]) -> T:
    """The result of `work`, which is repeated while it fails with an error for which `passing` returns a reason.

    what: what may be unavailable, as the start of a sentence. passing: why it is unavailable, without naming a host,
    user or path; None for an error that waiting does not fix, which is raised unchanged. `work` must be safe to repeat,
    even if it succeeded and only its answer was lost. Raises OutageError, without the error's own text, after OUTAGE_S.
    """
    limit = _patience.get()
    limit_s = OUTAGE_S if limit is None else limit

    waiting = False

    def say(state: RetryCallState) -> None:
        nonlocal waiting
        if waiting:
            return
        waiting = True
        with _lock:
            first = not _waiting[what]
            _waiting[what] += 1
        if first:
            _logger.warning("%s is away: %s. Waiting for it for up to %.0f s.", what, why(state), limit_s)

    def why(state: RetryCallState) -> str | None:
        error = state.outcome.exception() if state.outcome is not None else None
        return None if error is None else passing(error)

    again = Retrying(
        retry=retry_if_exception(lambda error: passing(error) is not None),
        wait=wait_random_exponential(multiplier=_FIRST_S, max=_LONGEST_S),
        stop=stop_after_delay(limit_s),
        before_sleep=say,
        reraise=True,
    )
    last = False
    try:
        try:
            result = again(work)
        finally:
            if waiting:
                with _lock:
                    _waiting[what] -= 1
                    last = not _waiting[what]
    except Exception as error:
        reason = passing(error)
        if reason is None:
            raise
        # the error's own text names hosts, users and paths, which must not reach a log
        raise OutageError(
            f"{what} was away for longer than {limit_s:.0f} s ({reason}); finished work is kept: run again when it is "
            "back."
        ) from None
    if last:
        _logger.info("%s is back.", what)
    return result
