"""Manifests of a few kilobytes that would take gigabytes are refused before they do."""

from __future__ import annotations

import mmap
import random
from contextlib import suppress

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation import manifest
from curation.manifest import MAX_LINE, MAX_PROBLEMS, MAX_ROWS, ManifestError, read_manifest
from curation.pages import footer_size, pages
from tests.support.peaks import peak_mb

READ = """
from curation.manifest import ManifestError, read_manifest
import pyarrow.parquet, pyarrow.compute
start()
for name in sys.argv[1:]:
    try:
        print(len(read_manifest(Path(name))))
    except ManifestError as error:
        print(error)
"""


def refused(path) -> str:
    with pytest.raises(ManifestError) as caught:
        read_manifest(path)
    return caught.value.problems[-1].message


def table(path, ids, platform="youtube", **options):
    rows = len(ids)
    platforms = pa.DictionaryArray.from_arrays(pa.nulls(rows, pa.int8()).fill_null(0), [platform])
    pq.write_table(pa.table({"platform": platforms, "video_id": ids}), path, **options)
    return path


def repeated(rows, value="aaaaaaaaaaa"):
    return pa.DictionaryArray.from_arrays(pa.nulls(rows, pa.int32()).fill_null(0), [value])


def test_tables_that_grow_when_read_take_little_memory(tmp_path):
    long = "a" * (64 << 20)
    bombs = [
        table(tmp_path / "rows.parquet", repeated(MAX_ROWS + 1)),
        table(tmp_path / "same.parquet", repeated(100_000)),
        table(tmp_path / "page.parquet", pa.array([long]), compression="zstd", use_dictionary=False),
        table(tmp_path / "texts.parquet", repeated(5_000, "a" * 1_000_000), compression="zstd"),
    ]
    assert max(path.stat().st_size for path in bombs) < 200_000
    assert "10000000 rows" in refused(bombs[0])
    assert "larger than 16 MB" in refused(bombs[2])
    assert "65536 bytes" in refused(bombs[3])
    assert peak_mb(READ, *bombs) < 150


def test_text_that_begins_as_the_text_before_is_refused(tmp_path):
    ids = pa.array(["a" * 100_000] * 300)
    encoding = {"video_id": "DELTA_BYTE_ARRAY", "platform": "PLAIN"}
    path = table(tmp_path / "m.parquet", ids, use_dictionary=False, column_encoding=encoding, data_page_version="2.0")
    assert path.stat().st_size < 200_000
    assert "DELTA_BYTE_ARRAY" in refused(path)


def test_rows_are_counted_by_their_pages_too(tmp_path, monkeypatch):
    path = table(tmp_path / "m.parquet", repeated(900), row_group_size=300)
    assert len(read_manifest(path)) == 1
    monkeypatch.setattr(manifest, "MAX_ROWS", 899)
    assert "rows" in refused(path)
    assert manifest._unbearable(path, Footer(pq.read_metadata(path), 5)) == manifest._TOO_MANY


class Footer:
    """A footer that says less rows than there are."""

    def __init__(self, real, rows):
        self._real, self.num_rows = real, rows
        self.num_row_groups, self.num_columns = real.num_row_groups, real.num_columns

    def row_group(self, number):
        return self._real.row_group(number)


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("dictionary", [False, True])
@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
def test_the_pages_of_a_column_are_what_the_footer_says_of_an_honest_file(tmp_path, version, dictionary, compression):
    values = [None if n % 7 == 0 else f"id{n % 50:09}" for n in range(5000)]
    columns = pa.table({"text": values, "number": pa.array(range(5000), pa.float32())})
    path = tmp_path / "t.parquet"
    pq.write_table(
        columns, path, compression=compression, use_dictionary=dictionary, data_page_version=version,
        row_group_size=2000, data_page_size=1000, write_page_checksum=True,
    )  # fmt: skip
    footer = pq.read_metadata(path)
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for group in range(footer.num_row_groups):
            for number in range(2):
                chunk = footer.row_group(group).column(number)
                found = list(pages(data, chunk))
                assert sum(page.values for page in found) == chunk.num_values
                assert 0 < sum(page.size for page in found) < chunk.total_uncompressed_size
                assert found[0].values or chunk.has_dictionary_page


def test_a_huge_footer_is_refused_unread(tmp_path, monkeypatch):
    path = table(tmp_path / "m.parquet", repeated(10))
    monkeypatch.setattr(manifest, "_FOOTER", 100)
    assert "its footer" in refused(path)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_text_of_one_endless_line_takes_little_memory(tmp_path, suffix):
    path = tmp_path / f"m{suffix}"
    with path.open("wb") as stream:
        stream.write(b"platform,video_id\nyoutube," if suffix == ".csv" else b'{"platform": "')
        stream.truncate(300 << 20)
    assert f"longer than {MAX_LINE}" in refused(path)
    assert peak_mb(READ, path) < 60


def test_lines_are_measured_across_pieces_and_whatever_ends_them(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "_PIECE", 1000)
    path = tmp_path / "m.csv"
    rows = [f"youtube,{n:011}" for n in range(500)]
    for end in ("\n", "\r\n", "\r"):
        path.write_text(end.join(["platform,video_id", *rows]), newline="")
        assert [ref.video_id for ref in read_manifest(path)] == [row[8:] for row in rows]
    path.write_text("\n".join(["platform,video_id", *rows, "youtube," + "a" * MAX_LINE]))
    with pytest.raises(ManifestError) as caught:
        read_manifest(path)
    assert [problem.row for problem in caught.value.problems] == [502]
    path.write_bytes(b"\n".join([b"platform,video_id", *(row.encode() for row in rows), "ü".encode()[:1], b"x"]))
    with pytest.raises(ManifestError) as caught:
        read_manifest(path)
    assert [(problem.row, problem.field) for problem in caught.value.problems] == [(502, "file")]


def test_quotes_hold_no_endless_row_together(tmp_path):
    path = tmp_path / "m.csv"
    path.write_text("platform,video_id\n" + '"a\n",' * 100_000)
    assert "quotes" in refused(path)


def test_rows_and_problems_are_counted_while_they_are_read(tmp_path, monkeypatch):
    path = tmp_path / "m.jsonl"
    path.write_text("{}\n" * 3 * MAX_PROBLEMS)
    with pytest.raises(ManifestError) as caught:
        read_manifest(path)
    assert MAX_PROBLEMS < len(caught.value.problems) < MAX_PROBLEMS + 10
    monkeypatch.setattr(manifest, "MAX_ROWS", 20)
    assert "rows" in refused(path)


def test_a_damaged_parquet_table_is_read_or_refused(tmp_path):
    """Each byte before the footer is changed; pyarrow itself ends the process for some changes of a footer."""
    path = tmp_path / "m.parquet"
    columns = {"platform": ["youtube"] * 50, "video_id": [f"{n:011}" for n in range(50)], "start_s": [0.0] * 50}
    pq.write_table(pa.table(columns | {"end_s": [1.0] * 50}), path, compression="none")
    good = path.read_bytes()
    rng = random.Random(7)
    for place in range(4, len(good) - 8 - footer_size(path)):
        wrong = rng.choice((84, 0, 255, good[place] ^ 1 << rng.randrange(8)))
        path.write_bytes(good[:place] + bytes([wrong]) + good[place + 1 :])
        with suppress(ManifestError):
            read_manifest(path)
