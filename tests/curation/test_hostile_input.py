"""Hostile manifests and policy files: accepted or refused in one sentence, never a traceback, never a stray request.

Files are grown from good ones by many small wrongs. What is accepted must keep every promise; what is refused must say
which file, which row and which field.
"""

from __future__ import annotations

import csv
import datetime
import decimal
import io
import itertools
import json
import os
import re
import socket
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from curation.addresses import address_allowed
from curation.catalog import Catalog
from curation.cli import main
from curation.download.fetch import download
from curation.failures import ClipFailure, FailureCode, UsageError
from curation.judge.criteria import CRITERIA, judge
from curation.judge.policy import Policy, describe, find_policy, load_policy
from curation.manifest import COLUMNS, MAX_SECONDS, ManifestError, read_manifest, write_manifest
from curation.platforms import link_listed, validate_video_id
from curation.records import ClipRef
from curation.settings import DownloadSettings
from tests.support.builders import DANCER, observations
from tests.support.examples import ALL, examples
from tests.support.servers import FileServer, redirect, serve

HOSTS = ("example.org", "media.example.org:8080", "93.184.215.14")
SUFFIXES = (".csv", ".jsonl", ".parquet")

# --- what good manifests are made of, and what spoils them

GOOD = [
    ("youtube", "abcdefghijk"),
    ("youtube", "--exec-aaaa"),  # eleven legal characters
    ("bilibili", "BV1xx411c7mD"),
    ("tiktok", "7123456789012345678"),
    ("vimeo", "76979871"),
    ("http", "https://example.org/a%20b/clip-1.mp4"),
    ("http", "http://media.example.org:8080/a.mp4"),
    ("http", "https://93.184.215.14/a.mp4"),
    ("local", "set 1/dance_01 v2.mp4"),
]
HOSTILE_HOSTS = [
    "127.0.0.1", "10.0.0.1", "192.168.0.7", "169.254.169.254", "100.64.0.1", "168.63.129.16", "0.0.0.0", "0", "127.1",
    "2130706433", "0x7f000001", "0177.0.0.1", "127.0.0.1.", "[::1]", "[::ffff:10.0.0.1]", "[fe80::1%25eth0]",
    "[fec0::1]", "[::ffff:a9fe:a9fe]", "localhost", "a.localhost", "printer.local", "metadata.google.internal",
    "intranet", "example.org.", "example.org:443", "example.org:0", "example.org:99999", "example.org:8080",
    "user:pass@example.org", "example.org@10.0.0.1", "example.org\\@10.0.0.1", "EXAMPLE.org", "exаmple.org",
    "example。org", "ⓔxample.org", "１２７.0.0.1", "example.org%00", "example.org#@10.0.0.1", "example.org?@10.0.0.1",
    "xn--exmple-cua.org", "notexample.org", "example.org.evil.com", "evil.com", "", "..", "-example.org",
]  # fmt: skip
HOSTILE_IDS = [
    "", " ", "-", "--", "--exec", "--exec=reboot", "-rf /", "../../etc/passwd", "..", ".", "/etc/passwd", "a/../b.mp4",
    "a//b.mp4", "a\\b.mp4", "C:\\a.mp4", "~/a.mp4", "\0", "abcdefghij\0", "abcdefghijk\n", "$(reboot)", "`id`", "a;b",
    "|cat", "&&x", "<script>", "'; DROP TABLE clips; --", "%s%n", "{0}", "${HOME}", "*", "?", "аbcdefghijk",
    "ａbcdefghijk", "٧١٢٣", "\u202eabcdefghij", "\u200babcdefghij", "\ufeff", "é" * 11, "\U0001f483" * 3, "nan", "None",
    "true", "7.12E+18", "=1+1", "@cmd", "file:///etc/passwd", "data:text/plain,a", "ftp://example.org/a.mp4",
    "javascript:a", "HTTP://example.org/a.mp4", "http:/example.org/a.mp4", "http:///a.mp4", "//example.org/a.mp4",
    "https://example.org", "https://example.org/", "https://example.org/a.mp4?x=1", "https://example.org/a.mp4#x",
    "https://example.org/%2e%2e/a.mp4", "https://example.org/../a.mp4", "https://example.org/a%0d%0aHost:b", "a" * 3000,
    *(f"{scheme}://{host}/a.mp4" for scheme in ("http", "https") for host in HOSTILE_HOSTS),
]  # fmt: skip
HOSTILE_PLATFORMS = ["", "YouTube", "youtube ", "file", "generic", "https", "youtubе", "--exec", "\0", "a" * 99, "[/]"]
HOSTILE_TEXT = [
    "nan", "NaN", "inf", "-inf", "1e999", "-1", "-0.000001", "1e308", "1e-999", "9" * 400, "10000000.1", "1,5", "1_000",
    "0x10", "٣", "½", "1:30", "00:01:30", "2024-01-01", "true", "abc", "\0", "0", "1 2", "+", ".",
    "e5", "5 s", "'5", "=5",
]  # fmt: skip
HOSTILE_VALUES: list[Any] = [
    None, True, False, 0, -1, 5, 10**400, 2**63, 0.5, -0.0, 1e308, float("nan"), float("inf"), float("-inf"), [], [1],
    ["youtube"], {}, {"a": 1}, {"platform": "youtube"}, [[[[]]]], "", "\ud800",
]  # fmt: skip
HOSTILE_NAMES = [
    "title", "", " ", "Platform", "platform ", "platfоrm", "\ufeffplatform", "video_id\0", "start", "__class__",
    "a" * 500, "\x1b[31m", "[bold]", "split",
]  # fmt: skip

times = st.sampled_from([(0.0, 5.0), (5.0, 9.5), (3.0, 6.0), (None, 5.0), (5.0, None), (None, None)])
good_rows = st.builds(
    lambda clip, span, split: dict(zip(COLUMNS, (*clip, *span, split), strict=True)),
    st.sampled_from(GOOD),
    times,
    st.sampled_from([None, "train", "val"]),
)
wrongs = {
    "platform": st.sampled_from(HOSTILE_PLATFORMS),
    "video_id": st.sampled_from(HOSTILE_IDS) | st.text(max_size=12),
    "start_s": st.sampled_from(HOSTILE_TEXT),
    "end_s": st.sampled_from(HOSTILE_TEXT),
    "split": st.sampled_from(["", " ", "../x", "a" * 33, "é", "train val", "-x", "\0"]),
}


@st.composite
def tables(draw: st.DrawFn, values: st.SearchStrategy[Any]) -> tuple[list[str], list[list[Any]]]:
    """Header and rows: good ones, with some cells, rows and columns spoiled; `values` are what no cell should hold."""
    header = draw(st.permutations(COLUMNS) | st.just(list(COLUMNS)))
    good = draw(st.booleans())
    unique = (lambda row: row["video_id"]) if good else None  # spans of one video may overlap
    rows = draw(st.lists(good_rows, min_size=int(good), max_size=5, unique_by=unique))
    table = [[row[name] for name in header] for row in rows]
    if good:
        return header, table
    for _ in range(draw(st.sampled_from([0, 0, 1, 1, 2, 3])) if table else 0):
        row = draw(st.integers(0, len(table) - 1))
        column = draw(st.integers(0, len(header) - 1))
        usual = draw(st.sampled_from([True, True, True, False]))
        table[row][column] = draw(wrongs[header[column]] if usual else values)
    spoiled = draw(
        st.sampled_from(["", "", "", "", "", "drop", "double", "extra", "rename", "short", "long", "repeat"])
    )
    column = draw(st.integers(0, len(header) - 1))
    if spoiled == "drop":
        header = header[:column] + header[column + 1 :]
        table = [row[:column] + row[column + 1 :] for row in table]
    elif spoiled in ("double", "extra"):
        header = [*header, header[column] if spoiled == "double" else draw(st.sampled_from(HOSTILE_NAMES))]
        table = [[*row, row[column]] for row in table]
    elif spoiled == "rename":
        header = [*header]
        header[column] = draw(st.sampled_from(HOSTILE_NAMES))
    elif table and spoiled == "short":
        table[-1] = table[-1][:-1]
    elif table and spoiled == "long":
        table[0] = [*table[0], "more"]
    elif spoiled == "repeat":
        table += table
    return header, table


def spoiled_bytes(draw: st.DrawFn, text: str) -> bytes:
    """The text as bytes, now and then not quite."""
    data = text.encode("utf-8", "surrogatepass")
    kind = draw(st.sampled_from(["", "", "", "", "bom", "utf-16", "latin-1", "crlf", "cr", "cut", "insert", "empty"]))
    if kind == "bom":
        return b"\xef\xbb\xbf" + data
    if kind == "utf-16":
        return text.encode("utf-16", "surrogatepass")
    if kind == "latin-1":
        return text.encode("latin-1", "replace") + b"\xe9"
    if kind in ("crlf", "cr"):
        return data.replace(b"\n", b"\r\n" if kind == "crlf" else b"\r")
    at = draw(st.integers(0, len(data)))
    if kind == "cut":
        return data[:at]
    if kind == "insert":
        junk = draw(
            st.sampled_from([b"\0", b'"', b"\t", b"\n", b"\xff", b",", b"\xef\xbb\xbf", b"{", b"\x1a", b"'", b"&"])
        )
        return data[:at] + junk + data[at:]
    return b"" if kind == "empty" else data


@st.composite
def csv_files(draw: st.DrawFn) -> bytes:
    header, rows = draw(tables(st.sampled_from(HOSTILE_TEXT)))
    stream = io.StringIO()
    delimiter = draw(st.sampled_from([*",,,,,,,,", "\t", ";"]))
    writer = csv.writer(stream, delimiter=delimiter, quoting=draw(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])))
    writer.writerow(header)
    writer.writerows([["" if value is None else value for value in row] for row in rows])
    return spoiled_bytes(draw, stream.getvalue())


@st.composite
def jsonl_files(draw: st.DrawFn) -> bytes:
    header, rows = draw(tables(st.sampled_from(HOSTILE_VALUES)))
    lines = []
    for row in rows:
        # Written by hand, so that a key may be there twice.
        pairs = ", ".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in zip(header, row, strict=False))
        lines.append(f"{{{pairs}}}")
    extra = ["", "[]", "null", "{", "{}", '"a"', "1", "[" * 5000, '{"a":' * 5000, "9" * 5000, "NaN", "// a", "{'a': 1}"]
    lines += draw(st.lists(st.sampled_from(extra), max_size=1))
    return spoiled_bytes(draw, "\n".join(lines) + "\n")


@st.composite
def parquet_files(draw: st.DrawFn) -> bytes:
    header, rows = draw(tables(st.sampled_from(HOSTILE_TEXT)))
    moment = datetime.datetime(2024, 1, 1)
    spoiled: list[pa.Array] = [
        pa.array([value], kind)
        for value, kind in [
            (b"\xff\xfe", pa.binary()), ([1], pa.list_(pa.int64())), ({"a": "b"}, pa.struct([("a", pa.string())])),
            (True, pa.bool_()), (decimal.Decimal("1.5"), pa.decimal128(5, 2)), (moment, pa.timestamp("ns")),
            (moment, pa.timestamp("us", tz="Nowhere/Land")), (2**62, pa.duration("s")), (2**50, pa.timestamp("s")),
            (2**63 - 1, pa.int64()), (-1, pa.int8()), (float("nan"), pa.float32()), (float("inf"), pa.float64()),
            (None, pa.null()), ([("a", 1)], pa.map_(pa.string(), pa.int64())), ("5", pa.large_string()),
            ("vimeo", pa.string()), (datetime.date(2024, 1, 1), pa.date32()), (7, pa.uint64()),
        ]
    ]  # fmt: skip
    spoiled.append(pa.array(["vimeo"]).dictionary_encode())
    spoiled.append(pa.StringArray.from_buffers(1, pa.py_buffer(np.array([0, 2], np.int32)), pa.py_buffer(b"\xff\xfe")))
    columns = []
    odd = draw(st.none() | st.sampled_from(range(len(header))))
    for place in range(len(header)):
        values = [row[place] if place < len(row) else None for row in rows]
        if place == odd:
            columns.append(pa.concat_arrays([draw(st.sampled_from(spoiled))] * len(rows)) if rows else pa.nulls(0))
            continue
        texts = [value if value is None else str(value) for value in values]
        numbers = all(value is None or type(value) is float for value in values)
        columns.append(pa.array(values, pa.float64()) if numbers and any(values) else pa.array(texts, pa.string()))
    stream = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_arrays(columns, names=header), stream)
    data = stream.getvalue().to_pybytes()
    at = draw(st.integers(0, len(data) - 1))
    kind = draw(st.sampled_from(["", "", "", "", "", "", "", "cut", "flip", "text", "empty"]))
    if kind == "cut":
        return data[:at]
    if kind == "flip":
        return data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]
    return {"text": b"platform,video_id\nvimeo,1\n", "empty": b""}.get(kind, data)


FILES = {".csv": csv_files(), ".jsonl": jsonl_files(), ".parquet": parquet_files()}


# --- what must hold


def read_or_refused(path: Path, allow_loopback: bool = False) -> list[ClipRef] | None:
    """The clips, if every promise is kept; None if the refusal says where and what."""
    try:
        refs = read_manifest(path, http_hosts=HOSTS, allow_loopback=allow_loopback)
    except ManifestError as error:
        assert str(error).startswith(f"{path.name} cannot be used")
        lines = path.read_bytes().count(b"\n") + path.read_bytes().count(b"\r") + 1
        for problem in error.problems:
            assert 1 <= problem.row <= max(lines, 100)
            assert problem.field and problem.field.isprintable() and len(problem.field) <= 42
            assert problem.message and "Error" not in problem.message
        for problem in error.problems[:20]:
            assert f"row {problem.row}, {problem.field}: {problem.message}" in str(error)
        assert error.problems
        return None
    for ref in refs:
        validate_video_id(ref.platform, ref.video_id, allow_loopback=allow_loopback)
        assert type(ref.video_id) is str and ref.video_id.isascii() and ref.video_id.isprintable()
        assert ref.start_us is None or 0 <= ref.start_us <= MAX_SECONDS * 1e6
        assert ref.end_us is None or (ref.start_us or 0) < ref.end_us <= MAX_SECONDS * 1e6
        assert re.fullmatch("[0-9a-f]{16}", ref.clip_id) and re.fullmatch("[0-9a-f]{16}", ref.video_key)
        if ref.platform == "http":
            host = urlsplit(ref.video_id).hostname or ""
            assert link_listed(ref.video_id, HOSTS) and host in ("example.org", "media.example.org", "93.184.215.14")
        if ref.platform == "local":
            root = Path("/a/b")
            assert (root / ref.video_id).is_relative_to(root) and ".." not in Path(ref.video_id).parts
    spans: dict[str, list[tuple[float, float]]] = {}
    for ref in refs:
        spans.setdefault(ref.video_key, []).append((ref.start_us or 0, np.inf if ref.end_us is None else ref.end_us))
    for of_video in map(sorted, spans.values()):
        assert all(one[1] <= other[0] for one, other in itertools.pairwise(of_video))
    for suffix in SUFFIXES:
        written = path.with_name(f"again{suffix}")
        write_manifest(refs, written)
        again = read_manifest(written, http_hosts=HOSTS, allow_loopback=allow_loopback)
        assert again == refs and [ref.clip_id for ref in again] == [ref.clip_id for ref in refs]
    return refs


@pytest.mark.many_examples
@pytest.mark.parametrize(("suffix", "count"), [(".csv", 220), (".jsonl", 200), (".parquet", 130)])
def test_any_manifest_is_read_or_refused_with_row_and_field(suffix: str, count: int):
    outcomes: Counter[str] = Counter()

    @settings(max_examples=examples(count), deadline=None, suppress_health_check=list(HealthCheck))
    @given(FILES[suffix], st.booleans())
    def check(data: bytes, allow_loopback: bool) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"m{suffix}"
            path.write_bytes(data)
            refs = read_or_refused(path, allow_loopback)
            outcomes["refused" if refs is None else "read" if refs else "empty"] += 1

    check()
    assert not ALL or min(outcomes["read"], outcomes["refused"]) >= 3, outcomes  # not one kind alone


@pytest.mark.parametrize("link", [link for link in HOSTILE_IDS if "://" in link])
@pytest.mark.parametrize("allow_loopback", [False, True])
def test_no_hostile_link_is_read_for_another_host(tmp_path: Path, link: str, allow_loopback: bool):
    path = tmp_path / "m.jsonl"
    path.write_text(json.dumps({"platform": "http", "video_id": link}) + "\n")
    for ref in read_or_refused(path, allow_loopback) or ():
        assert urlsplit(ref.video_id).hostname == "example.org"
    try:
        refs = read_manifest(path, http_hosts=None, allow_loopback=allow_loopback)
    except UsageError:
        return
    host = urlsplit(refs[0].video_id).hostname or ""
    if re.fullmatch(r"[0-9.]+", host):
        assert address_allowed(host, allow_loopback=allow_loopback)


@pytest.mark.parametrize("make", ["folder", "absent", "long", "null", "suffix", "fifo"])
def test_what_is_no_file_is_one_sentence(tmp_path: Path, make: str):
    name = {"long": "a" * 300 + ".csv", "null": "a\0.csv", "suffix": "m.xlsx"}.get(make, "m.csv")
    path = tmp_path / name
    if make == "folder":
        path.mkdir()
    elif make == "suffix":
        path.touch()
    elif make == "fifo":  # to open it would wait for ever
        os.mkfifo(path)
    with pytest.raises(UsageError, match=re.escape(name)) as refused:
        read_manifest(path)
    assert type(refused.value) is UsageError


# --- policies

DEFAULT = yaml.safe_load(find_policy(Path("default")).read_text(encoding="utf-8"))
FIELDS = [(part, name) for part, values in DEFAULT.items() if isinstance(values, dict) for name in values]
HOSTILE_SCALARS: list[Any] = [
    None, True, "", "0.4", "abc", [], [1], {}, {"a": 1}, -1, -0.0, 0, 1, 2, 1e-320, 1e308, -1e308, float("inf"),
    float("-inf"), float("nan"), 10**18, 10**400, 2.5, datetime.date(2024, 1, 1), datetime.datetime(2024, 1, 1),
    b"\0", "\ud800", "a" * 500, "[bold]", "../x.pt", "--x", [[]], [{"gap": 1, "ratio": float("nan")}],
    [{"gap": 0.0, "ratio": 0}], [{"gap": 1e308, "ratio": 1e308}], ["person"], [None],
]  # fmt: skip
SNIPPETS = [
    "name: twice", "single: {tolerance: 0.2}", "extends: default", "extends: paper", "extends: p.yaml",
    "extends: other.yaml", "extends: loop.yaml", "extends: nobody", "extends: folder.yaml", "extends: latin.yaml",
    "extends: [default]", "extends: 5", "extends: ''", "extends: .", 'extends: "a\\0b"', "extends: /etc/passwd",
    "extends: " + "a" * 300, "extends: &a [*a]", "a: &a [*a]", "a: &b {c: *b}", "<<: {name: x}", "<<: [1]",
    "a: !!python/object/apply:os.system ['true']", "a: !!python/name:os.system", "a: !!binary é", "a: !!timestamp x",
    "a: !!int ''", "a: !!float x", "a: !!bool x", "a: 2020-13-45", "a: 0x_", "a: 1:99:99", "a: =", "=: 1", "1: 2",
    "~: 1", "? [a]\n: b", "? {a: b}\n: c", "a: *nobody", "a: &x 1\nb: *x", "--- \na: b", "%YAML 9.9", "\t- a", "{",
    "a: b: c", "a: " + "[" * 500, "a: " + "{a: " * 500, "a: " + "9" * 5000,
    "length: {min_samples: 0x" + "f" * 5000 + "}", "}",
    "a: |\n  b", "a: !x y", "!!set {a, b}", "\x00", "\x07", "\ufeff", "\u2028", '"\\e[31m": 1', "__class__: a",
    "hash: a",
]  # fmt: skip


@st.composite
def policy_files(draw: st.DrawFn) -> bytes:
    start = draw(st.sampled_from(["whole", "whole", "whole", "extends", "extends", "nothing", "list", "empty"]))
    if start == "empty":
        return b""
    if start == "list":
        return yaml.safe_dump([DEFAULT]).encode()
    values: dict[Any, Any] = {name: dict(part) if isinstance(part, dict) else part for name, part in DEFAULT.items()}
    if start != "whole":
        values = {"extends": "default"} if start == "extends" else {}
    for _ in range(draw(st.integers(0, 3))):
        part, name = draw(st.sampled_from(FIELDS))
        kind = draw(st.sampled_from(["set", "set", "set", "set", "drop", "drop part", "add", "top"]))
        if kind == "drop part":
            values.pop(part, None)
        elif kind == "top":
            top = draw(st.sampled_from([*DEFAULT, "more", "hash", "", "é"]))
            values[top] = draw(st.sampled_from(HOSTILE_SCALARS))
        elif isinstance(values.setdefault(part, {}), dict):
            if kind == "drop":
                values[part].pop(name, None)
            else:
                values[part][name if kind == "set" else "more"] = draw(st.sampled_from(HOSTILE_SCALARS))
    text = yaml.safe_dump(values, sort_keys=draw(st.booleans()), default_flow_style=draw(st.booleans()))
    if draw(st.booleans()):
        return text.encode()
    snippet = draw(st.sampled_from(SNIPPETS))
    text = f"{text}{snippet}\n" if draw(st.booleans()) else f"{snippet}\n{text}"
    return spoiled_bytes(draw, text)


def neighbours(folder: Path) -> None:
    (folder / "other.yaml").write_text("extends: default\nname: other\n")
    (folder / "loop.yaml").write_text("extends: p.yaml\nname: loop\n")
    (folder / "latin.yaml").write_bytes(b"name: \xe9\n")
    (folder / "folder.yaml").mkdir()


OBSERVATIONS = [
    observations(),
    observations([[]] * 18),
    observations([]),
    observations([[DANCER, ("person", 0.9, (0.5, 0.1, 0.9, 0.9)), ("chair", 0.6, (0.4, 0.5, 0.7, 0.9))]] * 18),
    observations([[("person", 0.9, (0.0, 0.0, 0.0, 0.0))]] * 6),
    observations(seconds=1 / 30),
    observations([[DANCER]] * 4, kind="keyframes"),
    observations([], kind="keyframes"),
]
_SAYS_WHERE = re.compile(
    r"The policy \S.* (is wrong at \S.*: \S|is not valid YAML: \S|cannot be read: \S|must be a mapping|is over \d)",
    re.S,
)


def loaded_or_refused(path: Path) -> Policy | None:
    try:
        policy = load_policy(path)
    except UsageError as error:
        said = str(error)
        assert _SAYS_WHERE.match(said), said
        assert any(name in said for name in (path.name, "latin.yaml", "folder.yaml", "passwd"))
        assert said.endswith(".") and said.isprintable() and len(said) < 700
        return None
    json.dumps(describe(policy), allow_nan=False)
    assert re.fullmatch("[0-9a-f]{16}", policy.hash)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a sum that overflows would be told on the screen for every clip
        for measured in OBSERVATIONS:
            verdict = judge(measured, policy)
            assert verdict.decision in ("accept", "reject", "unknown") and len(verdict.criteria) == len(CRITERIA)
    return policy


@pytest.mark.many_examples
def test_any_policy_judges_or_is_refused_with_file_and_field():
    outcomes: Counter[str] = Counter()

    @settings(max_examples=examples(500), deadline=None, suppress_health_check=list(HealthCheck))
    @given(policy_files())
    def check(data: bytes) -> None:
        with tempfile.TemporaryDirectory() as folder:
            neighbours(Path(folder))
            path = Path(folder) / "p.yaml"
            path.write_bytes(data)
            outcomes["refused" if loaded_or_refused(path) is None else "loaded"] += 1

    check()
    assert not ALL or min(outcomes["loaded"], outcomes["refused"]) >= 5, outcomes  # not one kind alone


@pytest.mark.parametrize(("part", "name"), FIELDS)
def test_the_one_wrong_field_is_named(tmp_path: Path, part: str, name: str):
    path = tmp_path / "p.yaml"
    for value in (None, True, "0.4", {"a": 1}, [None], -1, 10**18, 1e308, float("inf"), float("nan"), b"\0"):
        path.write_text(yaml.safe_dump({"extends": "default", part: {name: value}}))
        try:
            policy = load_policy(path)
        except UsageError as error:
            assert f"p.yaml is wrong at {part}.{name}" in str(error)
        else:
            assert getattr(getattr(policy, part), name) is not None or (part, name) == ("shot", "max_heights_per_s")
            assert type(value) is not bool or name == "inside_bars"
            assert value != 1e308, "no figure of the measurements is as large"
    del (values := {key: dict(of) if isinstance(of, dict) else of for key, of in DEFAULT.items()})[part][name]
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(UsageError, match=f"p.yaml is wrong at {part}.{name}: this field is missing"):
        load_policy(path)


# --- the command


def command(*words: str | Path) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of the command, run in this process."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["curation", *map(str, words)])
        patch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as ended:
            main()
    return int(ended.value.code or 0), out.getvalue(), err.getvalue()


def good_or_one_sentence(code: int, out: str, err: str) -> None:
    assert code in (0, 2)
    assert "Traceback" not in out + err
    if code == 0:
        assert out and not err
    else:
        assert err.startswith("error: ") and err.endswith(".\n") and err.count("error: ") == 1
        assert all(line.startswith("  ") for line in err.splitlines()[1:]), "one sentence, and at most a list of rows"


@settings(max_examples=examples(60), deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(SUFFIXES).flatmap(lambda suffix: st.tuples(st.just(suffix), FILES[suffix])))
def test_check_manifest_ends_well_or_with_one_sentence(file: tuple[str, bytes]):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"m{file[0]}"
        path.write_bytes(file[1])
        code, out, err = command("check-manifest", path, "--http-host", "example.org")
        good_or_one_sentence(code, out, err)
        assert path.name in out + err


@pytest.mark.many_examples
def test_a_policy_on_the_command_line_ends_well_or_with_one_sentence(tmp_path: Path):
    Catalog(f"sqlite:///{tmp_path}/catalog.sqlite")
    neighbours(tmp_path)
    path = tmp_path / "p.yaml"

    @settings(max_examples=examples(40), deadline=None, suppress_health_check=list(HealthCheck))
    @given(policy_files())
    def check(data: bytes) -> None:
        path.write_bytes(data)
        good_or_one_sentence(*command("status", "--out", tmp_path, "--policy", path))

    check()


def test_a_name_that_is_no_text_is_no_traceback(tmp_path: Path):
    for name in (b"\xff.csv", b"[", b"[bold].csv", b"[].csv", b"a\nb.csv", b"\x1b[31m.csv"):
        path = Path(str(tmp_path)) / name.decode("utf-8", "surrogateescape")
        path.write_bytes(b"platform,video_id\nvimeo,1\n")
        code, out, err = command("check-manifest", path)
        assert code == (0 if path.suffix else 2) and "Traceback" not in out + err


# --- where requests go


@dataclass
class Watch:
    """Every address that was connected to and every name that was looked up."""

    server: FileServer
    names: dict[str, str]
    connected: set[tuple[Any, ...]] = field(default_factory=set)
    looked_up: set[str] = field(default_factory=set)


@contextmanager
def watched(server: FileServer, names: dict[str, str]) -> Iterator[Watch]:
    """Let connections reach the server alone, and names mean what `names` says."""
    watch = Watch(server, names)
    port = int(server.host.rpartition(":")[2])
    connect, look_up = socket.socket.connect, socket.getaddrinfo

    def guarded_connect(self: socket.socket, address: Any) -> None:
        watch.connected.add(address if isinstance(address, tuple) else (address,))
        if address != ("127.0.0.1", port):
            raise ConnectionRefusedError("not in this test")
        connect(self, address)

    def guarded_look_up(host: Any, *arguments: Any, **options: Any) -> Any:
        watch.looked_up.add(str(host))
        if re.fullmatch(r"[0-9a-f.:]+", str(host)):
            return look_up(host, *arguments, **options)
        if host not in names:
            raise socket.gaierror(socket.EAI_NONAME, "not in this test")
        return look_up(names[host], *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded_connect)
        patch.setattr(socket.socket, "connect_ex", lambda self, address: guarded_connect(self, address) or 0)
        patch.setattr(socket, "getaddrinfo", guarded_look_up)
        yield watch


@pytest.mark.many_examples
def test_no_request_goes_to_a_host_that_is_not_allowed(clips: Path, tmp_path: Path):
    site = tmp_path / "site"
    site.mkdir()
    (site / "a.mp4").write_bytes((clips / "bars.mp4").read_bytes())
    with serve(site) as server, serve(site) as other, socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        port = server.host.rpartition(":")[2]
        away = [
            other.url("/a.mp4"), "http://10.0.0.1/a.mp4", "http://169.254.169.254/latest/meta-data", "file:///etc/passwd",
            f"http://localhost:{port}/a.mp4", f"http://[::ffff:127.0.0.1]:{port}/a.mp4", "http://2130706433/a.mp4",
            f"http://0x7f000001:{port}/a.mp4", "https://evil.example.com/a.mp4", "ftp://127.0.0.1/a.mp4",
            "//10.0.0.1/a", f"http://user@10.0.0.1:{port}/a.mp4", f"http://127.0.0.1:{silent.getsockname()[1]}/a.mp4",
            f"http://rebound.example.org:{port}/a.mp4", f"http://{server.host}@10.0.0.1/a.mp4", "data:video/mp4,a",
        ]  # fmt: skip
        for number, location in enumerate(away):
            server.script(f"/away-{number}.mp4", redirect(location, (301, 302, 303, 307, 308)[number % 5]))
        names = {"rebound.example.org": "10.0.0.7", "open.example.org": "127.0.0.1"}
        hosts = (server.host, "rebound.example.org", f"open.example.org:{port}")
        paths = ["a.mp4", "none.mp4", *(f"away-{number}.mp4" for number in range(len(away)))]
        hostile = [other.host, "evil.com", *(f"{host}:{port}" for host in HOSTILE_HOSTS if ":" not in host)]
        links = st.builds("http://{}/{}".format, st.sampled_from([*hosts, *hosts, *hostile]), st.sampled_from(paths))
        usual = st.builds("http://{}/{}".format, st.sampled_from(hosts), st.sampled_from(paths))
        got = DownloadSettings(http_hosts=hosts, allow_loopback=True, retries=0, timeout_s=5, pause_s=(0, 0))
        outcomes: Counter[str] = Counter()

        def fetched(ref: ClipRef) -> str:
            with tempfile.TemporaryDirectory() as folder:
                try:
                    download(ref, Path(folder) / "videos", got, sleep=lambda _: None)
                except ClipFailure as error:
                    return error.code.value
            return "fetched"

        with watched(server, names) as watch:

            @settings(max_examples=examples(60), deadline=None, suppress_health_check=list(HealthCheck))
            @given(st.lists(usual | links, min_size=1, max_size=2, unique=True), st.booleans())
            def check(found: list[str], listed: bool) -> None:
                path = tmp_path / "m.jsonl"
                path.write_text("".join(json.dumps({"platform": "http", "video_id": link}) + "\n" for link in found))
                try:
                    refs = read_manifest(path, http_hosts=hosts if listed else None, allow_loopback=True)
                except ManifestError:
                    outcomes["manifest"] += 1
                    return
                for ref in refs:
                    code = fetched(ref)
                    outcomes[code] += 1
                    assert link_listed(ref.video_id, hosts) or code == FailureCode.REFUSED

            check()
            for number in range(len(away)):  # none by chance alone
                ref = ClipRef("http", server.url(f"/away-{number}.mp4"))
                assert fetched(ref) in (FailureCode.REFUSED, FailureCode.NETWORK, FailureCode.UNSUPPORTED), away[number]
            assert fetched(ClipRef("http", "http://rebound.example.org/a.mp4")) == FailureCode.REFUSED
            assert fetched(ClipRef("http", f"http://open.example.org:{port}/a.mp4")) == "fetched"
        assert watch.connected == {("127.0.0.1", int(port))}
        assert watch.looked_up <= {"127.0.0.1", "rebound.example.org", "open.example.org"}
        assert not other.requests
        assert outcomes["refused"] and outcomes["manifest"] and outcomes.total() >= examples(60), outcomes
