"""Observe and judge a folder of labelled clips, and report where the policy disagrees with the labels.

For tuning a policy on your own labelled clips. Writes nothing except the cache of exported detectors.
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from curation.failures import ClipFailure, UsageError
from curation.files import atomic_path
from curation.judge.criteria import CRITERIA, judge
from curation.judge.policy import Policy
from curation.last_resort import check_debug_file, failure_of, keep_text
from curation.people.detector import detector_ready
from curation.people.weights import find_weights
from curation.pool import run_all
from curation.records import ClipRef
from curation.settings import ObserveSettings

LIMIT_S = 3600.0  # for one clip
_COLUMNS = ("file", "expected", "first_reason")


@dataclass(frozen=True, slots=True)
class Case:
    """One labelled clip: the expected verdict, and the expected outcome of each criterion that has a label."""

    file: str
    expected: str
    first_reason: str
    criteria: dict[str, str]


@dataclass(frozen=True, slots=True)
class CaseResult:
    """What the policy decided for one clip; verdict is accept, reject, unknown or error."""

    case: Case
    verdict: str
    first_reason: str | None
    reasons: dict[str, list[str]]
    outcomes: dict[str, str]

    @property
    def agrees(self) -> bool | None:
        """Whether the verdict is the expected one; None if the label is ambiguous."""
        return None if self.case.expected == "ambiguous" else self.verdict == self.case.expected

    def as_json(self) -> dict[str, Any]:
        """The record written by --json."""
        return {
            "file": self.case.file,
            "expected": self.case.expected,
            "expected_reason": self.case.first_reason or None,
            "verdict": self.verdict,
            "first_reason": self.first_reason,
            "reasons": self.reasons,
        }


def read_cases(path: Path) -> list[Case]:
    """Read labels: the columns file, expected, first_reason and, optionally, one per criterion.

    Raises UsageError, which names the file and, if a row is wrong, the row and the field.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            rows = list(csv.DictReader(stream, strict=True))
    except OSError as error:
        raise UsageError(f"The cases {path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"The cases {path} cannot be read: save the file as UTF-8 text.") from error
    except csv.Error as error:
        raise UsageError(f"The cases {path} cannot be read: {error}; check the quotes.") from error
    if not rows or any(name not in rows[0] for name in _COLUMNS):
        raise UsageError(f"{path.name} needs the columns {', '.join(_COLUMNS)} and at least one row.")
    named: set[str] = set()
    for number, row in enumerate(rows, 2):
        if None in row or None in row.values():
            raise UsageError(f"{path.name} is wrong at row {number}: it must have as many fields as the header.")
        if not row["file"] or not row["file"].isprintable() or row["file"] in named:
            raise UsageError(f"{path.name} is wrong at row {number}, file: give a file name that no other row has.")
        named.add(row["file"])
    return [
        Case(
            row["file"],
            row["expected"],
            row["first_reason"] or "",
            {name: row[name] for name in CRITERIA if row.get(name)},
        )
        for row in rows
    ]


def evaluate(
    cases: Sequence[Case],
    folder: Path,
    policy: Policy,
    settings: ObserveSettings,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    debug_file: Path | None = None,
) -> list[CaseResult]:
    """Observe and judge every case's file in `folder`, on all cores; results are in the order of the cases.

    A clip that takes longer than LIMIT_S is an error like any other. debug_file: gets the text of unexpected errors.
    """
    if debug_file is not None:
        check_debug_file(debug_file)
    weights = str(find_weights(settings.detector or policy.detector))
    detector_ready(weights, settings)
    tasks = [(case, folder / case.file, weights, settings, policy) for case in cases]
    results: dict[str, CaseResult] = {}
    for done, (task, result) in enumerate(run_all(_evaluate_one, tasks, workers, lambda task: LIMIT_S), 1):
        if isinstance(result, UsageError):
            raise result
        if isinstance(result, BaseException):
            failure = failure_of(result)
            if debug_file is not None:
                keep_text(debug_file, [ClipRef("local", task[0].file)], "evaluate", result)
            result = _error(task[0], failure.code.value, failure.message)
        results[task[0].file] = result
        if progress is not None:
            progress(done, len(tasks))
    return [results[case.file] for case in cases]


def _evaluate_one(task: tuple[Case, Path, str, ObserveSettings, Policy]) -> CaseResult:
    from curation.observe.observe import observe
    from curation.people.detector import detector_for

    case, path, weights, settings, policy = task
    if not path.is_file():
        return _error(case, "missing", f"{case.file} is not in the folder of the cases")
    try:
        observations, _ = observe(ClipRef("local", case.file), path, settings, detector_for(settings, weights))
    except ClipFailure as error:
        return _error(case, error.code.value, error.message)
    verdict = judge(observations, policy)
    return CaseResult(
        case,
        verdict.decision,
        verdict.first_reason,
        {result.criterion: list(result.reasons) for result in verdict.criteria if result.outcome != "pass"},
        {result.criterion: result.outcome for result in verdict.criteria},
    )


def _error(case: Case, code: str, message: str) -> CaseResult:
    return CaseResult(case, "error", code, {code: [message]}, {})


def write_results(results: Sequence[CaseResult], path: Path) -> None:
    """Write the results as a JSON list. Raises UsageError if the file cannot be written."""
    text = json.dumps([result.as_json() for result in results], indent=1) + "\n"
    try:
        with atomic_path(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"The results cannot be written to {path}: {error.strerror}.") from error


def summary(results: Sequence[CaseResult]) -> str:
    """Accuracy, the confusion counts of every criterion, and every disagreement, as text."""
    lines = []
    for expected in ("accept", "reject", "error"):
        mine = [result for result in results if result.case.expected == expected]
        if not mine:
            continue
        right = sum(result.verdict == expected for result in mine)
        line = f"{expected}: {right} of {len(mine)}"
        if expected == "reject":
            named = sum(r.verdict == expected and r.first_reason == r.case.first_reason for r in mine)
            line += f", {named} with the labelled first reason"
        lines.append(line)
    decided = [result for result in results if result.agrees is not None]
    if decided:
        share = sum(bool(result.agrees) for result in decided) / len(decided)
        lines.append(f"accuracy: {share:.1%} of {len(decided)} clips with a clear label")
    lines += ["", f"{'criterion':10} {'right':>6} {'missed':>7} {'false':>6}   (labelled pass or fail only)"]
    for name in CRITERIA:
        table = Counter(
            (result.case.criteria[name], result.outcomes[name])
            for result in results
            if result.case.criteria.get(name) in ("pass", "fail") and result.outcomes.get(name) in ("pass", "fail")
        )
        if table:
            right = table["pass", "pass"] + table["fail", "fail"]
            lines.append(f"{name:10} {right:6} {table['fail', 'pass']:7} {table['pass', 'fail']:6}")
    odd = [
        result
        for result in results
        if result.agrees is False or (result.agrees and result.first_reason != (result.case.first_reason or None))
        if not (result.agrees and result.case.expected == "error")
    ]
    lines += ["", "disagreements:" if odd else "no disagreement"]
    for result in odd:
        why = "; ".join(f"{name}: {', '.join(reasons)}" for name, reasons in result.reasons.items())
        expected = f"{result.case.expected} {result.case.first_reason}".strip()
        found = f"{result.verdict} {result.first_reason or ''}".strip()
        lines.append(f"  {result.case.file}: expected {expected}, found {found}. {why}")
    return "\n".join(lines)
