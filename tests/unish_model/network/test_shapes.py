"""The shapes in the types of `unish_model` are checked in these tests, and nowhere else."""

from __future__ import annotations

import importlib
import inspect
import os
import pkgutil
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import pytest
import torch
from jaxtyping import TypeCheckError

import unish_model
from unish_model.network import geometry
from unish_model.network.scene import SceneOutput

ROOT = Path(__file__).parents[3]

PLAIN = """
import sys
from unish_model.network import layers
functions = layers.rotate, layers.by_frames, layers.Block.forward
print([hasattr(function, "__wrapped__") for function in functions], "beartype" in sys.modules)
"""


def test_a_shape_that_no_type_allows_is_refused() -> None:
    with pytest.raises(TypeCheckError, match="translation"):
        geometry.se3(torch.eye(3).expand(2, 3, 3), torch.zeros(3, 3))
    with pytest.raises(TypeCheckError, match="depth"):
        geometry.unproject(torch.ones(4, 5, dtype=torch.int64), torch.eye(3))
    points, logits = torch.zeros(1, 2, 4, 5, 3), torch.zeros(1, 2, 5, 4)
    with pytest.raises(TypeCheckError, match="conf_logits"):
        SceneOutput(points, logits, torch.eye(4).expand(1, 2, 4, 4), torch.zeros(1, 2, 6, 8))


def test_no_shape_is_left_unchecked_because_its_type_cannot_be_read() -> None:
    """The hook takes a type that it cannot resolve for any type, and says nothing."""
    found = 0
    for module in pkgutil.walk_packages(unish_model.__path__, "unish_model."):
        space = vars(importlib.import_module(module.name))
        classes = [value for value in space.values() if inspect.isclass(value) and value.__module__ == module.name]
        for owner in (space, *map(vars, classes)):
            for value in owner.values():
                if inspect.isfunction(value) and value.__module__ == module.name:
                    found += "[Tensor, " in str(get_type_hints(value, include_extras=True))  # raises NameError
    assert found > 60


def test_a_plain_import_checks_nothing() -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", PLAIN], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "[False, False, False] False\n"
