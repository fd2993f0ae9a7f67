"""Manifests: lists of clips by platform, video id and time span. Nothing else about a video is ever kept.

A manifest has the columns platform, video_id and, optionally, start_s, end_s and split; any other column is refused, so
no title or uploader is kept by accident. This module never uses the network and never opens a video.
"""

from __future__ import annotations

import codecs
import csv
import json
import math
import mmap
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from curation.failures import UsageError
from curation.files import atomic_path
from curation.pages import footer_size, pages
from curation.platforms import INTEGER_IDS, PLATFORMS, link_listed, validate_video_id
from curation.records import ClipRef

COLUMNS = ("platform", "video_id", "start_s", "end_s", "split")
MAX_ROWS = 10_000_000  # of one manifest, duplicates included
MAX_LINE = 65_536  # bytes of a line of text, and of a text in a Parquet table
MAX_PROBLEMS = 10_000  # a longer list helps nobody
MAX_SECONDS = 10_000_000  # a float64 column does not keep the microseconds of longer times

_TOO_MANY = f"a manifest has at most {MAX_ROWS} rows; split it"
_PIECE = 1 << 20
_OPEN_LINES = 100  # that one quoted field may span; no valid value has a line break
_FOOTER, _PAGE = 8 << 20, 16 << 20  # bytes of a Parquet file's footer, and of a page when it is decompressed
_PREFIXED = 7  # DELTA_BYTE_ARRAY: a text may repeat the start of the one before, so bytes become gigabytes
_BATCH = 8192

_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?").fullmatch
_SPLIT = re.compile(r"[A-Za-z0-9_-]{1,32}").fullmatch


@dataclass(frozen=True, slots=True, order=True)
class Problem:
    """What is wrong with one field. `row` counts from 1: lines of a CSV or JSONL file, rows of a Parquet table."""

    row: int
    field: str
    message: str

    def __str__(self) -> str:
        return f"row {self.row}, {self.field}: {self.message}"


class ManifestError(UsageError):
    """Every bad row of a manifest, in `problems`; the text shows the first twenty."""

    def __init__(self, name: str, problems: Iterable[Problem]) -> None:
        self.problems = tuple(sorted(problems))
        shown = "".join(f"\n  {problem}." for problem in self.problems[:20])
        more = f"\n  ... and {len(self.problems) - 20} more." if len(self.problems) > 20 else ""
        super().__init__(f"{name} cannot be used; correct these rows:{shown}{more}")


def read_manifest(path: Path, *, http_hosts: Iterable[str] | None = (), allow_loopback: bool = False) -> list[ClipRef]:
    """Read a .csv, .jsonl or .parquet manifest, in file order, exact duplicates merged.

    Spans are half-open, so adjacent spans are fine; overlapping spans of the same video are refused. Platform `http`
    needs its host in `http_hosts` ("example.org" or "example.org:8080"); None leaves that check to the download. Raises
    ManifestError with every bad row, UsageError if there is no such file, it cannot be read, or its suffix is unknown.
    """
    path = Path(path)
    hosts = None if http_hosts is None else tuple(http_hosts)
    problems: list[Problem] = []
    rows: dict[ClipRef, int] = {}
    for row, values in _rows(path, problems):
        ref = _parse(row, values, hosts, allow_loopback, problems)
        if ref is not None:
            rows.setdefault(ref, row)
        if len(problems) > MAX_PROBLEMS:
            raise ManifestError(path.name, problems)
    refs = [(row, ref) for ref, row in rows.items()]
    del rows
    merged = _merge(refs, problems)
    _find_rounded(refs, problems)
    if problems:
        raise ManifestError(path.name, problems)
    return merged


def write_manifest(refs: Iterable[ClipRef], path: Path) -> None:
    """Write a .csv, .jsonl or .parquet manifest that reads back as the same clips, exact duplicates merged.

    Raises ManifestError, with rows counted from 1, for clips that `read_manifest` would refuse, UsageError for another
    suffix. The same clips give the same bytes.
    """
    path = Path(path)
    suffix = _suffix(path)
    problems: list[Problem] = []
    numbered = list(enumerate(refs, start=1))
    for row, ref in numbered:
        _parse(row, _values(ref), None, True, problems)
    merged = _merge(numbered, problems)
    _find_rounded(numbered, problems)
    if problems:
        raise ManifestError("The list of clips", problems)
    with atomic_path(path) as temporary:
        if suffix == ".csv":
            with temporary.open("w", encoding="utf-8", newline="") as stream:
                writer = csv.writer(stream, lineterminator="\n")
                writer.writerow(COLUMNS)
                for ref in merged:
                    writer.writerow(
                        (ref.platform, ref.video_id, _decimal(ref.start_us), _decimal(ref.end_us), ref.split or "")
                    )
        elif suffix == ".jsonl":
            with temporary.open("w", encoding="utf-8", newline="") as stream:
                for ref in merged:
                    stream.write(_json_line(ref))
        else:
            import pyarrow as pa
            import pyarrow.parquet as pq

            types = (pa.string(), pa.string(), pa.float64(), pa.float64(), pa.string())
            schema = pa.schema(list(zip(COLUMNS, types, strict=True)))
            columns = list(zip(*map(_values, merged), strict=True)) or [()] * len(COLUMNS)
            pq.write_table(pa.table(columns, schema=schema), temporary)


# One row's values in the order of COLUMNS, None or "" where absent.
_Row = tuple[Any, Any, Any, Any, Any]


def _values(ref: ClipRef) -> _Row:
    start = None if ref.start_us is None else ref.start_us / 1e6
    return ref.platform, ref.video_id, start, ref.end_s, ref.split


def _json_line(ref: ClipRef) -> str:
    values = zip(COLUMNS, _values(ref), strict=True)
    return json.dumps({name: value for name, value in values if value is not None}) + "\n"


def _decimal(microseconds: int | None) -> str:
    if microseconds is None:
        return ""
    whole, rest = divmod(microseconds, 1_000_000)
    return f"{whole}.{rest:06d}".rstrip("0").rstrip(".")


def _suffix(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix not in (".csv", ".jsonl", ".parquet"):
        raise UsageError(f"{path.name} is not a manifest name; end it in .csv, .jsonl or .parquet.")
    return suffix


def _rows(path: Path, problems: list[Problem]) -> Iterator[tuple[int, _Row]]:
    # Unlike Path's methods, these return False for a name that is too long.
    if os.path.isdir(path):  # noqa: PTH112
        raise UsageError(f"{path} is a folder; give the path of a manifest.")
    suffix = _suffix(path)
    if not os.path.isfile(path):  # noqa: PTH113
        raise UsageError(f"There is no file {path}; give the path of a manifest.")
    if suffix == ".parquet":
        yield from _parquet_rows(path, problems)
        return
    try:
        if _text_will_do(path, problems):
            newline = "" if suffix == ".csv" else "\n"
            with path.open(encoding="utf-8-sig", newline=newline) as stream:
                yield from (_csv_rows if suffix == ".csv" else _jsonl_rows)(stream, problems)
    except OSError as error:
        raise UsageError(f"{path.name} cannot be read: {error.strerror}; check the permissions of the file.") from error


def _text_will_do(path: Path, problems: list[Problem]) -> bool:
    """Whether a file is UTF-8, within the limits on lines and their length; it is read in pieces before all else."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    row, length = 1, 0
    with path.open("rb") as stream:
        while piece := stream.read(_PIECE):
            waiting = len(decoder.getstate()[0])
            try:
                decoder.decode(piece)
            except UnicodeDecodeError as error:
                row += piece.count(b"\n", 0, max(0, error.start - waiting))
                problems.append(Problem(row, "file", "save the file as UTF-8 text"))
                return False
            lines = re.split(rb"[\r\n]", piece)
            lengths = [length + len(lines[0]), *map(len, lines[1:])]
            if max(lengths) > MAX_LINE:
                row += sum(
                    line.count(b"\n") for line in re.split(rb"(?<=[\r\n])", piece)[: lengths.index(max(lengths))]
                )
                problems.append(Problem(row, "row", f"this line is longer than {MAX_LINE} bytes; correct it"))
                return False
            length = lengths[-1]
            row += piece.count(b"\n")
            if row > MAX_ROWS + 2:
                problems.append(Problem(row, "file", _TOO_MANY))
                return False
    try:
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        problems.append(Problem(row, "file", "save the file as UTF-8 text"))
        return False
    return True


def _columns(names: Sequence[str], row: int, problems: list[Problem]) -> list[int | None] | None:
    """The position of each of COLUMNS in `names`; None, with the problems noted, if the names are not valid."""
    before = len(problems)
    for name in dict.fromkeys(names):
        if name not in COLUMNS:
            message = f"remove this column; a manifest has only {', '.join(COLUMNS)}"
            problems.append(Problem(row, ascii(name)[:42], message))
        elif names.count(name) > 1:
            problems.append(Problem(row, name, "this column is repeated; keep one"))
    problems += [Problem(row, name, "this column is missing; add it") for name in COLUMNS[:2] if name not in names]
    return None if len(problems) > before else [names.index(name) if name in names else None for name in COLUMNS]


def _csv_rows(stream: Iterable[str], problems: list[Problem]) -> Iterator[tuple[int, _Row]]:
    open_lines = 0

    def lines() -> Iterator[str]:
        nonlocal open_lines
        for line in stream:
            open_lines += 1
            if open_lines > _OPEN_LINES:
                raise csv.Error("a quoted field spans too many lines")
            yield line

    reader = csv.reader(lines(), strict=True)
    places: list[int | None] | None = None
    width = 0
    row = 1
    try:
        for values in reader:
            open_lines = 0
            if values and any(value.strip() for value in values):
                if places is None:
                    header = [value.strip() for value in values]
                    width = len(header)
                    if width == 1 and re.search("[\t;|]", header[0]):
                        problems.append(Problem(row, "row", "put commas between the fields, nothing else"))
                        return
                    places = _columns(header, row, problems)
                    if places is None:
                        return
                elif len(values) != width:
                    message = f"there are {len(values)} fields where the header has {width}; add or remove commas"
                    problems.append(Problem(row, "row", message))
                else:
                    cells = [None if place is None else values[place].strip(" \t") for place in places]
                    yield row, (cells[0], cells[1], cells[2], cells[3], cells[4])
            row = reader.line_num + 1
            if len(problems) > MAX_PROBLEMS:
                return
    except csv.Error:
        problems.append(Problem(row, "row", "the quotes do not match or a field is far too long; correct the line"))
    if places is None and not problems:
        problems.append(Problem(1, "platform", "the file is empty; begin it with the header platform,video_id"))


class _Pairs(list[tuple[str, Any]]):
    """A JSON object as written, so that a repeated key is noticed."""


def _jsonl_rows(stream: Iterable[str], problems: list[Problem]) -> Iterator[tuple[int, _Row]]:
    good: set[tuple[str, ...]] = set()  # names known to be valid; checking them again would double the time
    for row, line in enumerate(stream, start=1):
        if len(problems) > MAX_PROBLEMS:
            return
        if not line or line.isspace():
            continue
        try:
            pairs = json.loads(line, object_pairs_hook=_Pairs)
        except (ValueError, RecursionError):
            pairs = None
        if not isinstance(pairs, _Pairs):
            problems.append(
                Problem(row, "row", 'write one JSON object, such as {"platform": "vimeo", "video_id": "1"}')
            )
            continue
        names = tuple(name for name, _ in pairs)
        if names in good or _columns(names, row, problems) is not None:
            good.add(names)
            value = dict(pairs).get
            yield row, (value("platform"), value("video_id"), value("start_s"), value("end_s"), value("split"))


def _parquet_rows(path: Path, problems: list[Problem]) -> Iterator[tuple[int, _Row]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def refuse(field: str, message: str) -> None:
        problems.append(Problem(1, field, message))

    try:
        if footer_size(path) > _FOOTER:
            return refuse("file", f"its footer is larger than {_FOOTER >> 20} MB; write the file again")
        bounds = {"thrift_string_size_limit": _FOOTER, "thrift_container_size_limit": _FOOTER}
        with pq.ParquetFile(path, **bounds) as file:
            footer, schema = file.metadata, file.schema_arrow
        places = _columns(schema.names, 1, problems)
        if places is None:
            return None
        for name in (name for name in COLUMNS if name in schema.names):
            if not _plain(kind := schema.field(name).type):
                refuse(name, f"this column contains {str(kind)[:40]}; write text, or numbers for times")
        if problems:
            return None
        if message := _unbearable(path, footer):
            return refuse("file", message)
        # Dictionary-encoded texts stay in their dictionary until their length is known.
        with pq.ParquetFile(
            path, metadata=footer, read_dictionary=schema.names, pre_buffer=False, buffer_size=_PIECE, **bounds
        ) as file:
            first = 1
            for batch in file.iter_batches(_BATCH, columns=schema.names, use_threads=False):
                columns: list[list[Any]] = []
                for name, place in zip(COLUMNS, places, strict=True):
                    column = None if place is None else batch.column(name)
                    if column is not None and _longest(column) > MAX_LINE:
                        return refuse(name, f"this column has a text of more than {MAX_LINE} bytes; correct it")
                    try:
                        columns.append([None] * len(batch) if column is None else _values_of(column))
                    except ValueError:  # text that is not UTF-8
                        return refuse(name, "this column has text that is not UTF-8; write it again")
                yield from enumerate(zip(*columns, strict=True), start=first)
                first += len(batch)
    except (pa.ArrowException, OSError, ValueError):
        refuse("file", "this is not a readable Parquet file; write it again")


def _unbearable(path: Path, footer: Any) -> str | None:
    """Why a Parquet table is too large to read, from its footer and page headers alone; None if it is not."""
    rows = 0
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for group in range(footer.num_row_groups):
            most = 0
            for number in range(footer.num_columns):
                values = 0
                for page in pages(data, footer.row_group(group).column(number)):
                    values += page.values
                    if page.size > _PAGE:
                        return f"when decompressed, a page is larger than {_PAGE >> 20} MB; write smaller ones"
                    if page.encoding == _PREFIXED:
                        return "its text has the encoding DELTA_BYTE_ARRAY; write it with another one"
                most = max(most, values)
            rows += most
            if max(rows, footer.num_rows) > MAX_ROWS:
                return _TOO_MANY
    return None


def _longest(column: Any) -> int:
    """Bytes of the longest text in an Arrow column, 0 for numbers."""
    import pyarrow as pa
    import pyarrow.compute as pc

    values = column.dictionary if pa.types.is_dictionary(column.type) else column
    if pa.types.is_string_view(values.type):
        values = values.cast(pa.large_string())
    texts = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
    if not any(holds(values.type) for holds in texts):
        return 0
    return pc.max(pc.binary_length(values)).as_py() or 0


def _values_of(column: Any) -> list[Any]:
    """Python values of an Arrow column. 83.7 in single precision becomes 83.7, as in text, not 83.69999694824219."""
    import pyarrow as pa

    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    values: list[Any] = column.to_pylist()
    if not (pa.types.is_float16(kind) or pa.types.is_float32(kind)):
        return values
    import numpy as np

    shortest = np.float16 if pa.types.is_float16(kind) else np.float32
    return [None if value is None else float(str(shortest(value))) for value in values]


def _plain(kind: Any) -> bool:
    """Whether a column of this Arrow type has text or numbers; only these are converted to Python values."""
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    known = (
        pa.types.is_null, pa.types.is_boolean, pa.types.is_integer, pa.types.is_floating, pa.types.is_string,
        pa.types.is_large_string, pa.types.is_string_view, pa.types.is_binary, pa.types.is_large_binary,
    )  # fmt: skip
    return any(holds(kind) for holds in known)


def _parse(
    row: int, values: _Row, hosts: tuple[str, ...] | None, allow_loopback: bool, problems: list[Problem]
) -> ClipRef | None:
    platform, video_id, start, end, split = values
    before = len(problems)
    if type(video_id) is int and platform in INTEGER_IDS and 0 < video_id < 10**25:
        video_id = str(video_id)
    if not isinstance(platform, str) or platform not in PLATFORMS:
        problems.append(Problem(row, "platform", f"write one of {', '.join(PLATFORMS)}"))
    elif not isinstance(video_id, str):
        problems.append(Problem(row, "video_id", "write the id as text"))
    else:
        try:
            validate_video_id(platform, video_id, allow_loopback=allow_loopback)
        except ValueError as error:
            problems.append(Problem(row, "video_id", str(error)))
        else:
            if platform == "http" and hosts is not None and not link_listed(video_id, hosts):
                problems.append(Problem(row, "video_id", "allow the host with --http-host if you trust it"))
    times: list[int | None] = []
    for field, value in (("start_s", start), ("end_s", end)):
        try:
            times.append(_microseconds(value))
        except ValueError as error:
            problems.append(Problem(row, field, str(error)))
    if split is None or split == "":
        split = None
    elif not isinstance(split, str) or _SPLIT(split) is None:
        problems.append(Problem(row, "split", "write a short name such as train, val or test"))
    if len(problems) > before:
        return None
    start_us, end_us = times
    if end_us is not None and end_us <= (start_us or 0):
        problems.append(Problem(row, "end_s", "write an end that is later than the start"))
        return None
    return ClipRef(platform, video_id, start_us, end_us, split)


def _microseconds(value: Any) -> int | None:
    if value is None or value == "":
        return None
    if isinstance(value, str) and _NUMBER(value):
        value = float(value)
    if type(value) not in (int, float):
        raise ValueError("write seconds as a plain number such as 83.5, or leave it empty")
    if isinstance(value, float) and math.isnan(value):
        raise ValueError("this is NaN; leave it empty (null)")
    if not 0 <= value <= MAX_SECONDS:
        raise ValueError(f"write a number of seconds from 0 to {MAX_SECONDS}")
    return round(value * 1e6)


def _merge(refs: list[tuple[int, ClipRef]], problems: list[Problem]) -> list[ClipRef]:
    """Drop exact duplicates; note overlapping spans of a video, and clips that are in two splits."""
    by_video: dict[tuple[str, str], list[tuple[int, ClipRef]]] = {}
    for numbered in refs:
        by_video.setdefault((numbered[1].platform, numbered[1].video_id), []).append(numbered)
    repeated: set[int] = set()
    for clips in by_video.values():
        if len(clips) == 1:
            continue
        first: dict[tuple[int | None, int | None], tuple[int, ClipRef]] = {}
        for row, ref in clips:
            earlier, same = first.setdefault((ref.start_us, ref.end_us), (row, ref))
            if earlier != row:
                repeated.add(row)
                if ref.split != same.split:
                    problems.append(Problem(row, "split", f"row {earlier} puts this clip into another split; keep one"))
        spans = sorted(
            (ref.start_us or 0, math.inf if ref.end_us is None else ref.end_us, row) for row, ref in first.values()
        )
        _, reach, holder = spans[0]
        for start, end, row in spans[1:]:
            if start < reach:
                earlier, later = sorted((holder, row))
                problems.append(
                    Problem(later, "start_s", f"this span overlaps row {earlier} of the same video; keep one or cut it")
                )
            if end > reach:
                reach, holder = end, row
    return [ref for row, ref in refs if row not in repeated]


# A program that keeps a long number in 53 bits rounds it: zeros follow the digits that it prints (15 in a
# spreadsheet, 16 in JavaScript), or the number is a multiple of 512 if all digits are printed.
_ROUNDED = (
    (1000, "end in 000: a spreadsheet or JavaScript rounded them"),
    (512, "are multiples of 512: a column of floating-point numbers rounded them"),
)
_BY_CHANCE = 1e-6  # ids are refused only if unrounded ids look like this less often


def _find_rounded(refs: list[tuple[int, ClipRef]], problems: list[Problem]) -> None:
    """Note rounded TikTok ids. Only all ids together show it: each one is valid, but mostly of no video."""
    rows: dict[int, int] = {}
    for row, ref in refs:
        if ref.platform == "tiktok" and int(ref.video_id) > 2**53:
            rows.setdefault(int(ref.video_id), row)
    for divisor, what in _ROUNDED:
        if rows and divisor ** -len(rows) <= _BY_CHANCE and not any(number % divisor for number in rows):
            said = f"all {len(rows)} long ids of tiktok {what}; export this column as text from its source"
            problems.append(Problem(min(rows.values()), "video_id", said))
            return
