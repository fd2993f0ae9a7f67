"""Every setting is declared once, and is an option of the command and a parameter of the flow."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from curation.cli.curate import run
from curation.failures import UsageError
from curation.options import options, settings_of
from curation.settings import DEVICE, Settings, VideoLimits


def fields(model: type[BaseModel], path: tuple[str, ...] = ()) -> set[tuple[str, ...]]:
    found = set()
    for name, field in model.model_fields.items():
        inner = isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
        found |= fields(field.annotation, (*path, name)) if inner else {(*path, name)}
    return found


def value_at(settings: Settings, path: tuple[str, ...]) -> Any:
    value: Any = settings
    for name in path:
        value = getattr(value, name)
    return value


OTHER = {"device": "cpu", "teacher": "none", "storage": "s3://a/b", "pause_s": (1.0, 2.0), "retry": ["corrupt"]}


def other(option) -> Any:
    """A value that is not the default."""
    if option.name in OTHER:
        return OTHER[option.name]
    if option.many:
        return ["x"]
    if isinstance(option.default, bool):
        return not option.default
    if isinstance(option.default, int | float):
        return type(option.default)(option.default * 2) if option.default < 1 else option.default * 2
    kind = str(option.type)
    return 100 if "int" in kind or "float" in kind else Path("x") if "Path" in kind else "x"


def test_every_field_of_the_settings_is_set_by_one_option():
    paths = [path for option in options(flat=True).values() for path in option.paths]
    assert len(paths) == len(set(paths))
    assert set(paths) == fields(Settings) - {("out",)}


@pytest.mark.parametrize("option", options(flat=True).values(), ids=lambda option: option.name)
def test_an_option_sets_all_its_fields_and_nothing_else(option):
    value, plain = other(option), settings_of(Path("x"), {})
    changed = settings_of(Path("x"), {option.name: value}, flat=True)
    expected = tuple(value) if option.many else value
    assert [value_at(changed, path) for path in option.paths] == [expected] * len(option.paths)
    assert option.default != value
    rest = fields(Settings) - set(option.paths)
    assert all(value_at(changed, path) == value_at(plain, path) for path in rest)


def test_every_option_says_what_it_is_for():
    for option in options(flat=True).values():
        assert option.field.description and option.field.description[-1] == ".", option.name


def test_the_command_takes_every_option():
    taken = set(inspect.signature(run).parameters)
    assert taken == {"manifest", "out", *options(flat=True)} - {"teacher_model"}


def test_the_flow_takes_every_option_with_bounds_and_description():
    from flows.curate import curate

    schema = curate.parameters.properties
    own = {"parallel_batches", "stage_timeout_hours", "task_runner", "cluster"}
    assert set(schema) == {"manifest", "out", *options(), *own}
    assert all(schema[name]["description"] for name in schema)
    assert schema["max_height"]["minimum"] == 144 and schema["lease_s"]["maximum"] == 86400
    assert schema["device"]["pattern"] == DEVICE
    curate.validate_parameters({"manifest": "m.csv", "out": "x", "storage": "", "catalog_url": ""})
    with pytest.raises(Exception, match="budget_mb"):
        curate.validate_parameters({"manifest": "m.csv", "out": "x", "budget_mb": 0})


def test_a_wrong_value_is_named_as_the_user_gave_it():
    with pytest.raises(UsageError, match=r"^--pause: "):
        settings_of(Path("x"), {"pause_s": ("a", 1)}, flat=True)
    with pytest.raises(UsageError, match=r"^limits\.max_fps: .*1\.$"):
        settings_of(Path("x"), {"limits": {"max_fps": 0}})
    with pytest.raises(UsageError, match=r"^--max-fps: "):
        settings_of(Path("x"), {"max_fps": 0}, flat=True)
    with pytest.raises(UsageError, match=r"^retry boredom is no failure code"):
        settings_of(Path("x"), {"retry": ["boredom"]})


def test_a_variable_stands_in_for_what_is_not_given(monkeypatch):
    monkeypatch.setenv("UNISH_STORAGE", "s3://from/environment")
    assert settings_of(Path("x"), {}).storage == "s3://from/environment"
    assert settings_of(Path("x"), {"storage": "s3://given/here"}).storage == "s3://given/here"
    assert settings_of(Path("x"), {"storage": "", "catalog_url": ""}).storage == "s3://from/environment"
    assert settings_of(Path("x"), {"limits": VideoLimits(max_fps=7)}).observe.limits.max_fps == 7
