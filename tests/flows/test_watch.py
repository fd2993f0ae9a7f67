"""What is shown of a run while it goes: forecasts that hold, few lines, and no control characters in a log."""

from __future__ import annotations

import inspect
import io

import pytest
from prefect.client.schemas.objects import Artifact
from rich.console import Console

from flows import watch
from flows.plugin import watched
from flows.watch import Board, Pace


def artifacts(**clips: float) -> list[Artifact]:
    """What a run of 40 clips publishes of its stages."""
    return [
        Artifact(key=f"curate-{stage}", type="progress", data=100 * done / 40, description=f"{done} of 40 clips")
        for stage, done in clips.items()
    ]


def forecast(signs: list[tuple[float, float]], now_s: float) -> float | None:
    pace = Pace()
    for at_s, share in signs:
        pace.add(at_s, share)
    return pace.left_s(now_s)


def test_a_steady_stage_is_forecast_to_the_second():
    pace = Pace()
    for clip in range(41):
        now_s = 100 + 3 * clip
        pace.add(now_s, clip / 40)
        if 3 <= clip < 40:
            for later_s in (0, 1, 2.9):
                assert pace.left_s(now_s + later_s) == pytest.approx(3 * (40 - clip) - later_s)


def test_too_little_is_known_at_first():
    assert forecast([], 10) is None
    assert forecast([(0, 0.0), (5, 0.5)], 10) is None, "the first sign may be what an earlier run did"
    assert forecast([(0, 0.0), (5, 0.5), (6, 0.6)], 10) is None


def test_what_was_there_already_does_not_make_the_rest_look_quick():
    """Nine tenths are skipped in a second, then a clip takes 10 s."""
    signs = [(0.0, 0.5), (1.0, 0.9)] + [(1.0 + 10 * n, 0.9 + 0.01 * n) for n in range(1, 8)]
    assert forecast(signs, 71.0) == pytest.approx(30, rel=0.1)


def test_a_clip_that_is_overdue_puts_the_end_off():
    signs = [(float(n), n / 100) for n in range(1, 21)]
    left = [forecast(signs, 20 + idle_s) for idle_s in (0, 1, 10, 100)]
    assert left[0] == pytest.approx(80) and left[1] == pytest.approx(79)
    assert left[1] < left[2] < left[3]


def test_no_stage_ends_before_the_one_that_feeds_it():
    board = Board()
    for n in range(8):
        board.update(artifacts(download=40, observe=n, teach=2 * n), 10.0 * n)
    observe, teach = board.stages["observe"], board.stages["teach"]
    assert observe.left_s == pytest.approx(330) and teach.left_s == observe.left_s
    assert observe.left() == "about 6 min left" and board.stages["download"].left() == ""


def test_a_terminal_shows_a_line_a_stage_that_renews_itself():
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    board = Board()
    with watch._shown(board, console) as say:
        for n in range(10):
            board.update(artifacts(download=40, observe=n, teach=0), 10.0 * n)
            say(10.0 * n)
    last = console.file.getvalue().rpartition("\x1b[2K")[2]
    assert [line.split()[0] for line in last.splitlines() if "clips" in line] == ["download", "observe", "teach"]
    assert "9 of 40 clips" in last and "about 5 min left" in last


def test_a_log_gets_few_plain_lines():
    console = Console(file=io.StringIO(), width=40)
    board = Board()
    board.status = "waiting"
    with watch._shown(board, console) as say:
        for second in range(401):
            if second >= 5:
                board.update(artifacts(download=40, observe=second // 10, teach=0), float(second))
            say(float(second))
    lines = console.file.getvalue().splitlines()
    assert lines[:2] == ["waiting", "download: 40 of 40 clips"] and lines[-1] == "observe: 40 of 40 clips"
    assert 8 < len(lines) < 20, lines
    assert "observe: 12 of 40 clips, about 5 min left" in lines, lines
    assert "".join(lines).isascii() and "".join(lines).isprintable()


def test_a_long_run_is_not_named_for_every_clip():
    console = Console(file=io.StringIO(), width=40)
    board = Board()
    with watch._shown(board, console) as say:
        for minute in range(401):
            board.update(artifacts(observe=minute / 10), 60.0 * minute)
            say(60.0 * minute)
    assert 20 <= len(console.file.getvalue().splitlines()) <= 60


@pytest.mark.parametrize(
    ("line", "ours"),
    [
        ("deployment run curate/curate --watch", True),
        ("deployments run --watch curate/curate -p a=1", True),
        ("deployment run curate/curate", False),
        ("deployment run other/other --watch", False),
        ("flow-run watch curate/curate --watch", False),
    ],
)
def test_only_the_watch_of_this_deployment_is_changed(line, ours):
    assert watched(line.split()) is ours


def test_it_stands_in_for_the_function_that_prefect_has():
    from prefect.cli import deployment, flow_runs_watching

    assert deployment.watch_flow_run is flow_runs_watching.watch_flow_run
    theirs = inspect.signature(flow_runs_watching.watch_flow_run).parameters.values()
    ours = inspect.signature(watch.watch_flow_run).parameters.values()
    assert [(p.name, p.default) for p in ours] == [(p.name, p.default) for p in theirs]
