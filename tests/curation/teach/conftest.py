"""One small MoGe-2 for all tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def small_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint laid out as the released ones."""
    import torch

    from tests.support.small_moge import small_config, small_network

    path = tmp_path_factory.mktemp("moge") / "small.pt"
    torch.save({"model_config": small_config(), "model": small_network().state_dict()}, path)
    return path
