"""The settings as options: one list, from which the command, the flow and the documentation are made.

`options` reads the fields of Settings, `parameters` gives them to a function as parameters, which Typer and Prefect
understand, and `settings_of` makes Settings from their values.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from curation.failures import FailureCode, UsageError
from curation.settings import Settings, VideoLimits

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Option:
    """One setting by its public name.

    paths: the fields of Settings that it sets; several where parts of a run share it. field: the declaration of the
    first. flag: its name on the command line. env: the environment variable that stands in for it.
    """

    name: str
    paths: tuple[tuple[str, ...], ...]
    field: FieldInfo
    flag: str
    env: str | None

    @property
    def many(self) -> bool:
        """Whether it takes any number of values."""
        return get_args(self.field.annotation)[-1:] == (Ellipsis,)

    @property
    def type(self) -> Any:
        """The type of its value; a list where Settings has a tuple of any length."""
        return list[str] if self.many else self.field.annotation

    @property
    def default(self) -> Any:
        """The value where none is given."""
        return list(self.field.default) if self.many else self.field.default


@cache
def options(*, flat: bool = False) -> dict[str, Option]:
    """All settings but `out`, by their public names, in the order of their declaration.

    The limits of video files are one option; with `flat` each limit is an option of its own, as a command line needs.
    """
    found: dict[str, Option] = {}

    def add(model: type[BaseModel], path: tuple[str, ...]) -> None:
        for key, field in model.model_fields.items():
            kind = field.annotation
            if isinstance(kind, type) and issubclass(kind, BaseModel) and (flat or kind is not VideoLimits):
                add(kind, (*path, key))
                continue
            extra: dict[str, Any] = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
            name = extra.get("option", key)
            if name in found:  # several parts of a run share it
                found[name] = replace(found[name], paths=(*found[name].paths, (*path, key)))
            else:
                flag = extra.get("flag", name.replace("_", "-"))
                found[name] = Option(name, ((*path, key),), field, f"--{flag}", extra.get("env"))

    add(Settings, ())
    del found["out"]
    return found


def settings_of(out: Path, values: Mapping[str, Any], *, flat: bool = False) -> Settings:
    """Settings from the values of options. What is missing or None has its default, or its variable's value.

    Raises UsageError that names each wrong value as the user knows it: by its flag with `flat`, else by its name.
    """
    tree: dict[str, Any] = {"out": out}
    shown: dict[tuple[str, ...], str] = {}
    for option in options(flat=flat).values():
        value = values.get(option.name)
        if option.env is not None:  # an empty field of a form is none
            value = value or os.environ.get(option.env) or None
        for path in option.paths:
            shown[path] = option.flag if flat else option.name
            if value is not None:
                branch = tree
                for key in path[:-1]:
                    branch = branch.setdefault(key, {})
                branch[path[-1]] = tuple(value) if option.many else value
    try:
        settings = Settings.model_validate(tree)
    except ValidationError as error:
        wrong = dict.fromkeys(f"{_shown(each['loc'], shown)}: {each['msg']}" for each in error.errors())
        raise UsageError("; ".join(wrong) + ".") from None
    for code in settings.retry:
        if code not in set(FailureCode):
            raise UsageError(f"{shown['retry',]} {code} is no failure code; known are {', '.join(FailureCode)}.")
    return settings


def _shown(place: tuple[int | str, ...], shown: Mapping[tuple[str, ...], str]) -> str:
    keys = tuple(key for key in place if isinstance(key, str))  # not which number of a pair it is
    for end in range(len(keys), 0, -1):
        if name := shown.get(keys[:end]):
            return ".".join([name, *keys[end:]])
    return ".".join(keys)


def parameters(of: Iterable[Option], kind: Callable[[Option], Any]) -> Callable[[Function], Function]:
    """Give a function these options as keyword parameters, of `kind(option)`, in place of its own `**values`."""

    def change(function: Function) -> Function:
        signature = inspect.signature(function, eval_str=True)
        own = [each for each in signature.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
        only = inspect.Parameter.KEYWORD_ONLY
        made = [inspect.Parameter(each.name, only, default=each.default, annotation=kind(each)) for each in of]
        every = sorted([*own[:2], *made, *own[2:]], key=lambda each: each.kind)
        function.__signature__ = signature.replace(parameters=every)  # type: ignore[attr-defined]
        function.__annotations__ = {each.name: each.annotation for each in every}
        return function

    return change
