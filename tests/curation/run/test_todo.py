"""Every state that a clip can be in has one next step, and doing it leads to the end, never back."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain, combinations, product

import pytest

from curation.run.todo import Facts, next_step

STAGES = ("download", "observe", "judge", "teach")
SUBSETS = [frozenset(s) for s in chain.from_iterable(combinations(STAGES, n) for n in range(5))]
ALL = [
    Facts(measured, undecided, verdict, written, video, refetch, frames, given_up)
    for measured, undecided, written, video, refetch, frames in product((False, True), repeat=6)
    for verdict in (None, "accept", "reject", "unknown")
    for given_up in SUBSETS
]


def outcomes(clip: Facts, step: str) -> list[Facts]:
    """The facts after this step went well, whatever it found."""
    if step == "download":
        return [replace(clip, video=True, refetch=False)]
    if step == "observe":  # a verdict on other measurements is dropped; of an accepted clip the frames are kept
        fresh = replace(clip, measured=True, undecided=False, verdict=None)
        return [replace(fresh, frames=frames) for frames in (False, True)]
    if step == "judge":
        return [replace(clip, verdict=verdict) for verdict in ("accept", "reject", "unknown")]
    return [replace(clip, written=True)]


def progress(clip: Facts) -> tuple[bool, ...]:
    """Grows with every step: the most important part first."""
    measured = clip.measured and not clip.undecided
    return (measured, measured and clip.verdict is not None, clip.written, clip.video and not clip.refetch)


def test_every_state_has_one_next_step_and_each_step_goes_forward():
    for clip in ALL:
        step = next_step(clip)
        if step in ("done", "given up"):
            continue
        for after in outcomes(clip, step):
            assert progress(after) > progress(clip), (clip, step, after)
            assert next_step(after) != step


def test_every_clip_comes_to_an_end_within_five_steps():
    waiting = {clip for clip in ALL if not clip.given_up}
    for _ in range(5):  # perhaps download, observe, judge, download, teach
        waiting = {
            after
            for clip in waiting
            if (step := next_step(clip)) not in ("done", "given up")
            for after in outcomes(clip, step)
        }
    assert {next_step(clip) for clip in waiting} <= {"done"}


def test_what_is_done_is_measured_judged_and_if_accepted_written():
    for clip in ALL:
        if next_step(clip) == "done":
            assert clip.measured and not clip.undecided and clip.verdict is not None
            assert clip.verdict != "accept" or clip.written


def test_only_a_failure_for_good_ends_a_clip_early_and_none_is_asked_again():
    for clip in ALL:
        step = next_step(clip)
        assert step not in clip.given_up
        if step == "given up":
            assert next_step(replace(clip, given_up=frozenset())) not in ("done", "given up")


@pytest.mark.parametrize("gone", ["video", "measured", "written"])
def test_what_is_lost_is_made_again(gone: str):
    whole = Facts(True, False, "accept", True, True, False, True, frozenset())
    assert next_step(whole) == "done"
    lost = {"video": "done", "measured": "observe", "written": "teach"}[gone]
    assert next_step(replace(whole, **{gone: False})) == lost
