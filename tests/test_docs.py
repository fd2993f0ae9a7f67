"""The pages that are made from the code say what the code says."""

from __future__ import annotations

import importlib.util
import pickle
from pathlib import Path

import pytest

from curation.failures import ClipFailure, FailureCode, Trait

DOCS = Path(__file__).parent.parent / "docs"
spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
generate = importlib.util.module_from_spec(spec)
spec.loader.exec_module(generate)


@pytest.mark.parametrize("name", generate.PAGES)
def test_a_page_made_from_the_code_is_up_to_date(name):
    assert (DOCS / name).read_text() == generate.PAGES[name](), "run `make docs`"


def test_every_failure_code_has_its_sentences():
    for code in FailureCode:
        assert FailureCode(code.value) is code
        for sentence in (code.said, code.advice):
            assert sentence.endswith(".") and "|" not in sentence


def test_a_failure_survives_the_way_between_processes():
    failure = ClipFailure(code=FailureCode.RATE_LIMITED, retry_after_s=3.0)
    failure.add_note("where it happened")
    again = pickle.loads(pickle.dumps(failure))
    assert again.__notes__ == ["where it happened"]
    assert (again.code, again.message, again.retry_after_s) == (failure.code, failure.code.said, 3.0)


def test_what_the_next_run_tries_again_is_said_to_be():
    for code in FailureCode:
        again = Trait.TRANSIENT in code.traits or Trait.SETTINGS in code.traits
        assert code.retried.startswith("yes") == again and code.transient == (Trait.TRANSIENT in code.traits)
