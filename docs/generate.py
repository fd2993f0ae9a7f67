"""Write the pages of docs/ that are made from the code; `make docs`. A test compares them with what is committed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

DOCS = Path(__file__).parent


def failures() -> str:
    """docs/failures.md: every failure code, from its one declaration."""
    from curation.failures import TRIES, FailureCode, Trait

    def again(code: FailureCode) -> str:
        if Trait.THRICE in code.traits:
            return f"yes, {TRIES} times"
        if Trait.TRANSIENT in code.traits or Trait.SETTINGS in code.traits:
            return "yes"
        return f"with `--retry {code.value}`"

    rows = [f"| `{code.value}` | {code.said} | {again(code)} | {code.advice} |" for code in FailureCode]
    blocking = ", ".join(f"`{code.value}`" for code in FailureCode if Trait.BLOCKS in code.traits)
    resumed = ", ".join(f"`{code.value}`" for code in FailureCode if Trait.KEEPS_PART in code.traits)
    return "\n".join(
        [
            "# Failures",
            "",
            "A failure is not a verdict: a clip that cannot be fetched, decoded or measured is never rejected. Each",
            "failure of a clip has one of these codes. `curation failures --out FOLDER` shows them clip by clip.",
            "This page is made from `curation/failures.py` by `make docs`.",
            "",
            "| code | what happened | tried again by the next run | what to do |",
            "|---|---|---|---|",
            *rows,
            "",
            f"After {blocking} no worker asks that platform again until its time is over; its other clips are",
            "postponed, which is no failure.",
            "",
            f"After {resumed} what was received stays on the disk, and the next attempt resumes it if the server",
            "still reports the same ETag or Last-Modified.",
            "",
        ]
    )


PAGES: dict[str, Callable[[], str]] = {"failures.md": failures}


if __name__ == "__main__":
    for name, page in PAGES.items():
        (DOCS / name).write_text(page())
