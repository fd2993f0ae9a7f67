"""The pool of processes. It stands alone, because every process of the pool imports the file with its task."""

from __future__ import annotations

import os

from curation.workers import spread


def test_a_worker_that_dies_costs_its_own_clip_only():
    results = dict(spread(_die_on_three, list(range(6)), 2))
    assert {task: result for task, result in results.items() if task != 3} == {n: n * n for n in (0, 1, 2, 4, 5)}
    assert type(results[3]).__name__ == "BrokenProcessPool"


def _die_on_three(number: int) -> int:
    if number == 3:
        os._exit(9)
    return number * number
