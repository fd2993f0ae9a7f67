"""What the product reads of generated files of every kind, against the frames that the ffmpeg program shows.

A failing file is made again by its number: `python -m tests.support.generated --make NUMBER FOLDER`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.support.comparison import reference
from tests.support.generated import COUNT, KINDS, Result, make, report, run, table

FAMILIES = list(KINDS)
# Of these videos.py has an example, which the fast tests read already.
ELSEWHERE = {
    "colours",
    "cut anywhere (TS)",
    "cut by stream copy",
    "fragments",
    "intra refresh",
    "jittering times",
    "odd start",
    "old codec in AVI",
    "pauses",
    "turned",
    "usual codec",
}
FEW = [number for number, family in enumerate(FAMILIES) if family not in ELSEWHERE]

# What PyAV does otherwise than the ffmpeg program, without us: by kind of file (the first one made is the example)
# and aspect.
KNOWN = {
    ("interlaced", "pixels"): "PyAV spreads the colours of each field by itself, the program those of the picture",
}


def _name(number: int) -> str:
    return f"{number}-{FAMILIES[number % len(FAMILIES)]}"


def _judge(number: int, folder: Path, record) -> None:
    result = run(number, folder / "made")
    record("generated", result)
    known = [a for a in result["of_the_library"] if (result["kinds"][0], a) in KNOWN]
    assert set(result["aspects"]) <= set(known), report(result)


@pytest.mark.parametrize("number", FEW, ids=_name)
def test_a_file_of_each_kind_is_read_as_ffmpeg_shows_it(number, tmp_path, record_property):
    _judge(number, tmp_path, record_property)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(COUNT), ids=_name)
def test_a_file_is_read_as_ffmpeg_shows_it(number, tmp_path, record_property):
    _judge(number, tmp_path, record_property)


@pytest.mark.parametrize("kind", KNOWN, ids=" ".join)
def test_what_is_known_to_differ_still_does(kind, tmp_path):
    family, aspect = kind
    result = run(FAMILIES.index(family), tmp_path / "made")
    assert aspect in result["of_the_library"], f"no longer true: {KNOWN[kind]}\n{report(result)}"


@pytest.mark.parametrize("number", [FAMILIES.index("equal times"), FAMILIES.index("sound longer or earlier")])
def test_a_file_depends_on_its_number_alone(number, tmp_path):
    shown = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        shown.append(reference(make(number, tmp_path / name).path))
    assert shown[0].ticks == shown[1].ticks
    assert np.array_equal(shown[0].frames, shown[1].frames)


def _result(kind: str, state: str, detail: str = "", aspects: tuple[str, ...] = ()) -> Result:
    return {"kinds": [kind], "state": state, "detail": detail, "aspects": list(aspects), "of_the_library": []}


def test_the_table_says_what_is_taken_now():
    old = [
        _result("mirrored", "differs", "pixels: all", ("pixels",)),
        _result("mirrored", "differs", "pixels: some", ("pixels",)),
        _result("interlaced", "taken"),
        _result("equal times", "refused", "CORRUPT: 7 of 9 frames can be decoded"),
        _result("equal times", "refused", "CORRUPT: 5 of 6 frames can be decoded"),
        _result("equal times", "taken"),
    ]
    new = [_result(result["kinds"][0], "taken") for result in old]
    assert table(old, new).splitlines()[2:] == [
        "| equal times | 1 of 3 taken; 2 of 3 refused (7 of 9 frames can be decoded) | all 3 taken |",
        "| mirrored | all 2 read wrongly: pixels | all 2 taken |",
    ]
