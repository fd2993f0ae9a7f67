"""The catalog's benchmark as tests use it: a PostgreSQL server of our own, or a skip with the reason."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

from curation.ingest.failures import UsageError


@cache
def catalog_benchmark() -> ModuleType:
    """benchmarks/catalog.py, which makes catalogs and servers."""
    path = Path(__file__).parents[1] / "benchmarks" / "catalog.py"
    spec = importlib.util.spec_from_file_location("benchmarks_catalog", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def postgres_server() -> Iterator[str]:
    """The server's URL; skips the test where there are no server programs or no driver."""
    with ExitStack() as stack:
        try:
            url = stack.enter_context(catalog_benchmark().postgres_server("-c", "fsync=off"))
        except UsageError as error:
            pytest.skip(str(error))
        yield url
