"""The generated files are summed up at the end."""

from __future__ import annotations

import pytest

from tests.support.comparison import versions
from tests.support.generated import KINDS, by_family, summary


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What became of the generated files, by kind, where many were made; and with which libraries."""
    reports = [report for state in ("passed", "failed") for report in terminalreporter.getreports(state)]
    results = [value for report in reports for name, value in report.user_properties if name == "generated"]
    if results:
        terminalreporter.section("generated files")
        terminalreporter.line(", ".join(f"{name} {version}" for name, version in versions().items()))
    if len(results) > len(KINDS):
        for name, found in by_family(sorted(results, key=lambda result: result["number"])).items():
            terminalreporter.line(f"{name}: {summary(found)}")
