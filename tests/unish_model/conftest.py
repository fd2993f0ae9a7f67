"""A tiny network with deterministic weights and a clip for it."""

from __future__ import annotations

from collections.abc import Iterator

import jaxtyping
import pytest
import torch

from tests.support.tiny_network import Clip, random_input
from unish_model.network.config import UniSHConfig
from unish_model.network.model import UniSH
from unish_model.selfcheck.weights import fill


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Threads that wait for each other on a busy machine cost more than these sizes gain."""
    torch.set_num_threads(1)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Shapes are not checked, as in a plain import."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def tiny() -> UniSH:
    model = UniSH(UniSHConfig.tiny()).eval()
    fill(model, "tests")
    return model


@pytest.fixture(scope="session")
def clip() -> Clip:
    """Two clips of three frames."""
    box = torch.tensor([5.0, -3.0, 40.0]) + 4 * random_input("bbox", 2, 3, 3)
    images, patches = random_input("images", 2, 3, 3, 56, 84), random_input("patches", 2, 3, 3, 256, 256)
    return Clip(images.sigmoid(), patches.sigmoid(), box)
