from __future__ import annotations

from pathlib import Path

import pytest

from curation.shards.schema import FIELDS, SCHEMA, VERSION_KEY, ShardError, check_schema

PAGE = (Path(__file__).parents[3] / "docs" / "shards.md").read_text()


def test_the_page_lists_exactly_the_columns() -> None:
    rows = [f"| {f.name} | {f.type} | {'yes' if f.nullable else ''} | {f.unit} | {f.doc} |" for f in FIELDS]
    table = PAGE.split("|---|---|---|---|---|\n")[1].split("\n\n")[0]
    assert table.splitlines() == rows


def test_every_field_carries_its_documentation() -> None:
    for field in SCHEMA:
        assert field.metadata[b"doc"]
        assert b"unit" in field.metadata


def test_other_versions_and_other_files_are_told_apart() -> None:
    check_schema(SCHEMA, SCHEMA.metadata, "a.parquet")
    with pytest.raises(ShardError, match=r"a\.parquet has shard schema version 1, this program reads version 2"):
        check_schema(SCHEMA, {VERSION_KEY: b"1"}, "a.parquet")
    with pytest.raises(ShardError, match="it is not a shard"):
        check_schema(SCHEMA, {}, "a.parquet")
    with pytest.raises(ShardError, match="no column jpeg of type binary"):
        check_schema(SCHEMA.remove(SCHEMA.get_field_index("jpeg")), SCHEMA.metadata, "a.parquet")
    check_schema(SCHEMA.append(SCHEMA.field("box").with_name("more")), SCHEMA.metadata, "a.parquet")
