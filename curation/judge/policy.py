"""Policies: thresholds as data, read from YAML files that may extend one another."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from curation.failures import UsageError
from curation.files import sha256_json

_Share = Field(ge=0, le=1)
_MAX_COUNT = 1_000_000  # of samples or frames: more than any clip has
_MOST = 1e9  # for any figure: it must fit the single precision of the measurements
_MAX_BYTES = 1 << 16  # of a policy file: many times the built-in ones, and still parsed within seconds


class _Part(BaseModel):
    # strict: yes and "0.4" are not numbers
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class LengthRule(_Part):
    """The least duration and number of samples of a clip."""

    min_duration_s: float = Field(ge=0, le=_MOST)
    min_samples: int = Field(ge=1, le=_MAX_COUNT)


class EditLine(_Part):
    """A change of at least `gap` that is at least `ratio` times the changes around it is an edit."""

    gap: float = Field(ge=0, le=_MOST)
    ratio: float = Field(ge=0, le=_MOST)


class ShotRule(_Part):
    """What breaks a continuous shot."""

    edits: tuple[EditLine, ...] = Field(strict=False)
    person_edits: tuple[EditLine, ...] = Field(strict=False)
    cut_content: float = Field(ge=0, le=_MOST)
    cut_gap: float = Field(ge=0, le=_MOST)
    ratio_window_s: float = Field(gt=0, le=_MOST)
    flash_luma: float = Field(ge=0, le=_MOST)
    flash_gap: float = Field(ge=0, le=_MOST)
    edge_frames: int = Field(ge=0, le=_MAX_COUNT)
    fade_contrast: float = _Share
    fade_s: float = Field(gt=0, le=_MOST)
    dissolve: float = _Share
    dissolve_frames: int = Field(ge=1, le=_MAX_COUNT)
    max_heights_per_s: float | None = Field(gt=0, le=_MOST)


class SingleRule(_Part):
    """Which boxes count as people, which of them are one person, and how often the count may be wrong."""

    person_confidence: float = _Share
    other_confidence: float = _Share
    faint_confidence: float = _Share
    faint_share: float = _Share
    merge_iou: float = _Share
    merge_inside: float = _Share
    merge_max_confidence: float = _Share
    tolerance: float = _Share


class HeightRule(_Part):
    """The mean height of the subject's box, as a share of the image height, must exceed this."""

    min_mean: float = _Share


class BorderRule(_Part):
    """How near the border a box counts as truncated, and the share of samples where it may be."""

    margin: float = Field(ge=0, lt=0.5)
    inside_bars: bool
    copies: Literal["refuse", "keep", "crop"]
    tolerance: float = _Share


class OverlapRule(_Part):
    """Which other boxes count as overlapping the subject, and the share of samples where they may."""

    confidence: float = _Share
    min_of_subject: float = _Share
    min_of_other: float = _Share
    merge_iou: float = _Share
    ignore_classes: tuple[str, ...] = Field(strict=False)
    tolerance: float = _Share


class Policy(_Part):
    """All thresholds of one policy; policies/default.yaml explains each and gives its evidence."""

    name: str = Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")
    detector: str = Field(pattern=r"^[^\x00-\x1f\x7f]{1,1024}$")
    length: LengthRule
    hdr: Literal["convert", "refuse"]
    shot: ShotRule
    single: SingleRule
    height: HeightRule
    border: BorderRule
    overlap: OverlapRule

    @property
    def prescreen_share(self) -> float:
        """A prescreen that sees at most this share of a clip's samples cannot decide anything under this policy."""
        return 0.0 if self.hdr == "refuse" else min(self.single.tolerance, self.border.tolerance)

    @property
    def hash(self) -> str:
        """16 hex digits over every threshold. The detector is not in it: it affects measurements, not verdicts."""
        return sha256_json(self.model_dump(mode="json", exclude={"detector", "name"}))[:16]


def find_policy(policy: Path) -> Path:
    """A policy file's absolute path; a bare name such as `default`, if no such file exists, is a built-in policy."""
    return policy.absolute() if _is_file(policy) else _BUILT_IN.get(str(policy), policy.absolute())


def load_policy(policy: Path) -> Policy:
    """Read a policy by path or built-in name; with `extends: default`, it inherits the fields it does not set.

    The base is a built-in policy or a file in the same folder, and extends nothing itself: a policy is in two files at
    most. Raises UsageError with the file, the field and what is wrong with it.
    """
    path = find_policy(policy)
    values = _read(path)
    if (base := values.pop("extends", None)) is not None:
        beside = path.parent / base if isinstance(base, str) else path.parent
        found = beside if _is_file(beside) else _BUILT_IN.get(str(base))
        if found is None:
            what = f"there is no policy {_shown(base)}" if isinstance(base, str) else "this is not text"
            raise _wrong(path, "extends", f"{what}; name one of {', '.join(_BUILT_IN)}, or a file in the same folder")
        parent = _read(found)
        if "extends" in parent:
            raise _wrong(path, "extends", f"{_shown(base)} itself extends another policy; extend that one")
        values = _merged(parent, values)
    try:
        return Policy.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(_shown, first["loc"])) or "the file"
        raise _wrong(path, where, _SAID.get(first["type"], first["msg"])) from error


_BUILT_IN = {path.stem: path for path in sorted((Path(__file__).parent / "policies").glob("*.yaml"))}
_SAID = {
    "missing": "this field is missing; add it, or begin the file with extends: default",
    "extra_forbidden": "there is no such field; remove it or correct its name",
    "string_pattern_mismatch": "these characters cannot be used here; write a plain name",
    "model_type": "this must be a mapping of fields",
}


def _wrong(path: Path, where: str, what: str) -> UsageError:
    return UsageError(f"The policy {path.name} is wrong at {where}: {what}.")


def _shown(part: str | int) -> str:
    """A name from a file, shortened and without control characters for a terminal."""
    name = str(part)
    return name if name.isprintable() and len(name) <= 42 else ascii(name)[:42]


class _Loader(yaml.SafeLoader):
    """Plain YAML that rejects duplicate fields, and merge keys, which can nest beyond any memory."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(
                    None, None, "merge keys are not supported; use extends", key.start_mark
                )
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    what = f"the field {_shown(key.value)} appears twice"
                    raise yaml.constructor.ConstructorError(None, None, what, key.start_mark)
                seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (
            ValueError,
            LookupError,
            AttributeError,
            TypeError,
        ):  # what PyYAML raises for an invalid date or number
            what = f"{_shown(node.value)} is not a valid {node.tag.rpartition(':')[2]}"
            raise yaml.constructor.ConstructorError(None, None, what, node.start_mark) from None


def _is_file(path: Path) -> bool:
    # Unlike Path.is_file, this returns False for a name that is too long.
    return os.path.isfile(path)  # noqa: PTH113


def _read(path: Path) -> dict[str, Any]:
    if not _is_file(path):
        what = "it is a folder" if os.path.isdir(path) else "there is no such file"  # noqa: PTH112
        raise UsageError(f"The policy {path} cannot be read: {what}; the built-in ones are {', '.join(_BUILT_IN)}.")
    try:
        with path.open("rb") as stream:
            data = stream.read(_MAX_BYTES + 1)
    except OSError as error:
        raise UsageError(f"The policy {path} cannot be read: {error.strerror}.") from error
    if len(data) > _MAX_BYTES:
        raise UsageError(f"The policy {path.name} is over {_MAX_BYTES >> 10} KiB: that is not a policy file.")
    try:
        values = yaml.load(data.decode("utf-8-sig"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        said = "it is nested too deeply" if isinstance(error, RecursionError) else getattr(error, "problem", None)
        what = " ".join(str(said or error).split())[:200] + (f", in line {mark.line + 1}" if mark else "")
        raise UsageError(f"The policy {path.name} is not valid YAML: {what}.") from error
    if not isinstance(values, dict):
        raise UsageError(f"The policy {path.name} must be a mapping; see policies/default.yaml.")
    return values


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The base with the changes applied, one level deep: a part that is changed keeps its other fields."""
    both = {name: (base[name], value) for name, value in changes.items() if name in base}
    parts = {n: old | new if isinstance(old, dict) and isinstance(new, dict) else new for n, (old, new) in both.items()}
    return base | changes | parts


def describe(policy: Policy) -> dict[str, Any]:
    """The policy as plain data, for provenance records."""
    return {"name": policy.name, "hash": policy.hash, **policy.model_dump(mode="json", exclude={"name"})}
