"""How many examples a property is tried on: a quarter among the fast tests, all of them in `make test-slow`."""

from __future__ import annotations

import os

ALL = os.environ.get("UNISH_TEST_EXAMPLES") == "all"


def examples(many: int) -> int:
    """`many`, or a quarter of it but no less than 10, for Hypothesis's max_examples."""
    return many if ALL else max(10, many // 4)
