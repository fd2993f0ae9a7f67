"""Waiting for what is away for a moment: a database that restarts, a storage that does not answer.

What is safe to do again is done again, with pauses that grow and differ between workers, up to a limit; then the run
ends with an OutageError. One line is logged for each outage, however many threads meet it. Never known here: which
errors pass by themselves; callers say that.
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

OUTAGE_S = 300.0  # how long a database or a storage that is away is waited for
_FIRST_S, _LONGEST_S = 0.2, 10.0  # pauses are drawn from 0 to these: from the first to the longest ones

_logger = logging.getLogger(__name__)
_patience: ContextVar[float | None] = ContextVar("patience", default=None)
_waiting: Counter[str] = Counter()  # how many calls have met an outage of this and wait
_lock = threading.Lock()

T = TypeVar("T")


@contextmanager
def patience(seconds: float) -> Iterator[None]:
    """Wait for so many seconds instead of OUTAGE_S, within this block and thread."""
    token = _patience.set(seconds)
    try:
        yield
    finally:
        _patience.reset(token)


def wait_for(what: str, work: Callable[[], T], passing: Callable[[BaseException], str | None]) -> T:
    """The result of `work`, which is done again while it fails with an error that `passing` gives a reason for.

    what: what may be away, to begin a sentence with. passing: why it is away, in words that name no host, user or
    path; None for an error that waiting does not mend, which is raised as it is. `work` must be safe to repeat, also
    when it was done and only its answer was lost. Raises OutageError, which tells nothing of the error itself, after
    OUTAGE_S.
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
        # the error's own text names hosts, users and paths: none of them may reach a log
        raise OutageError(
            f"{what} was away for longer than {limit_s:.0f} s ({reason}); what is done is kept: run again when it is "
            "back."
        ) from None
    if last:
        _logger.info("%s is back.", what)
    return result
