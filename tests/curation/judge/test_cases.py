"""Evaluating labelled clips: what is counted, what is printed, what a broken input says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from curation.failures import UsageError
from curation.judge import cases as evaluation
from curation.judge.cases import Case, CaseResult
from curation.judge.policy import load_policy
from curation.settings import ObserveSettings


def result(expected: str, verdict: str, label: str = "", found: str | None = None, **outcomes: str) -> CaseResult:
    case = Case(f"{expected}-{verdict}.mp4", expected, label, {"shot": "pass", "border": "fail"})
    return CaseResult(case, verdict, found, {found: ["why"]} if found else {}, outcomes)


def test_the_summary_counts_decisions_reasons_and_criteria():
    text = evaluation.summary(
        [
            result("accept", "accept", shot="pass", border="pass"),
            result("accept", "reject", found="shot", shot="fail", border="fail"),
            result("reject", "reject", "border", "border", shot="pass", border="fail"),
            result("reject", "reject", "border", "shot", shot="fail", border="fail"),
            result("error", "error", "decode", "corrupt"),
            result("ambiguous", "accept", shot="pass", border="pass"),
        ]
    )
    assert "accept: 1 of 2" in text and "reject: 2 of 2, 1 with the labelled first reason" in text
    assert "accuracy: 80.0% of 5 clips" in text
    assert [line.split() for line in text.splitlines() if line.startswith(("shot", "border"))] == [
        ["shot", "3", "0", "2"],
        ["border", "3", "2", "0"],
    ]
    disagreements = text.split("disagreements:")[1]
    assert "accept-reject.mp4" in disagreements and "reject-reject.mp4" in disagreements
    assert "error-error.mp4" not in disagreements and "ambiguous" not in disagreements


def test_clips_are_evaluated_and_written(clips: Path, seer: Path, tolerant: Path, tmp_path: Path):
    cases = [Case(f"{name}.mp4", kind, "", {}) for name, kind in (("bars", "accept"), ("cut", "reject"))]
    cases += [Case("broken.mp4", "error", "decode", {}), Case("absent.mp4", "accept", "", {})]
    settings = ObserveSettings(detector=str(seer), detector_long_side=192)
    seen: list[int] = []
    results = evaluation.evaluate(cases, clips, load_policy(tolerant), settings, 1, lambda done, _: seen.append(done))
    assert [r.verdict for r in results] == ["accept", "reject", "error", "error"] and seen == [1, 2, 3, 4]
    assert [r.first_reason for r in results] == [None, "shot", "corrupt", "missing"]
    evaluation.write_results(results, tmp_path / "r.json")
    written = json.loads((tmp_path / "r.json").read_text())
    assert {"file", "expected", "verdict", "first_reason", "reasons"} <= set(written[0])
    assert written[1]["reasons"]["shot"]


@pytest.mark.parametrize("text", ["", "file,expected\na,b\n", "file,expected,first_reason\n"])
def test_labels_without_columns_or_rows_are_refused(tmp_path: Path, text: str):
    (tmp_path / "cases.csv").write_text(text)
    with pytest.raises(UsageError, match="at least one row"):
        evaluation.read_cases(tmp_path / "cases.csv")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"a.mp4,accept\n", "row 2: it must have as many fields"),
        (b"a.mp4,accept,,,\n", "row 2: it must have as many fields"),
        (b"a.mp4,accept,\n,reject,\n", "row 3, file"),
        (b"a.mp4,accept,\na.mp4,reject,\n", "row 3, file: give a file name that no other row has"),
        (b"a\0.mp4,accept,\n", "row 2, file"),
        (b'"a"b.mp4,accept,\n', "quotes"),
        (b"\xff,accept,\n", "UTF-8"),
    ],
)
def test_a_wrong_label_is_one_sentence(tmp_path: Path, text: bytes, said: str):
    (tmp_path / "cases.csv").write_bytes(b"file,expected,first_reason\n" + text)
    with pytest.raises(UsageError, match=said):
        evaluation.read_cases(tmp_path / "cases.csv")


def test_results_that_cannot_be_written_are_one_sentence(tmp_path: Path):
    with pytest.raises(UsageError, match="cannot be written"):
        evaluation.write_results([], tmp_path)
