"""Reads the decompressed sizes of a Parquet file's pages from their headers, before any page is decompressed.

The footer states sizes too, but a reader relies on the page headers. Nothing here knows what a column means.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

_STOP, _TRUE, _FALSE, _BYTE, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = 0, 1, 2, 3, 7, 8, 9, 10, 11, 12
_TYPE, _SIZE, _PACKED, _DATA, _DICTIONARY, _DATA_2 = 1, 2, 3, 5, 7, 8  # fields of a PageHeader
_ENCODING = {_DATA: 2, _DICTIONARY: 2, _DATA_2: 4}
_DEEPEST = 8  # nested structures; a header has three


class Page(NamedTuple):
    """size: bytes when decompressed. values: rows that a data page holds, nulls included, 0 for a dictionary.

    encoding: as in Parquet's Encodings.
    """

    size: int
    values: int
    encoding: int


def footer_size(path: Path) -> int:
    """The size of the footer in bytes, as stated at the end of the file; 0 if this is not a Parquet file."""
    with path.open("rb") as stream:
        stream.seek(max(0, path.stat().st_size - 8))
        end = stream.read(8)
    return int.from_bytes(end[:4], "little") if end[4:] == b"PAR1" else 0


def pages(data: mmap.mmap, chunk: Any) -> Iterator[Page]:
    """The pages of a column chunk (a pyarrow.parquet.ColumnChunkMetaData) in the order of the file.

    Raises ValueError if the headers do not lead from its start to its end.
    """
    if chunk.num_values <= 0:  # Arrow then reads none
        return
    place, first = chunk.data_page_offset, chunk.dictionary_page_offset if chunk.has_dictionary_page else None
    place = min(place, first) if first else place
    end = place + chunk.total_compressed_size
    if not 0 <= place <= end <= len(data):
        raise ValueError("a column is outside the file")
    while place < end:
        header, place = _structure(data, place, end, _DEEPEST)
        kind = next((kind for kind in _ENCODING if kind in header), None)
        inner = None if kind is None else header[kind]
        if kind is None or not isinstance(inner, dict):
            raise ValueError("the header of a page cannot be read")
        size, packed = header.get(_SIZE, -1), header.get(_PACKED, -1)
        values, encoding = inner.get(1, 0), inner.get(_ENCODING[kind], -1)
        if not all(isinstance(number, int) for number in (size, packed, values, encoding)):
            raise ValueError("a field in the header of a page has the wrong type")
        if size < 0 or packed < 0 or place + packed > end:
            raise ValueError("a page is outside its column")
        place += packed
        yield Page(size, 0 if kind == _DICTIONARY else values, encoding)


def _structure(data: mmap.mmap, place: int, end: int, depth: int) -> tuple[dict[int, Any], int]:
    """The numbers and structures by field of a structure in Thrift's compact protocol, and where it ends."""
    fields: dict[int, Any] = {}
    field = 0
    while True:
        head, place = _byte(data, place, end)
        if head & 15 == _STOP:
            return fields, place
        if head >> 4:
            field += head >> 4
        else:
            field, place = _integer(data, place, end)
        fields[field], place = _value(data, place, end, head & 15, depth)


def _value(data: mmap.mmap, place: int, end: int, kind: int, depth: int) -> tuple[Any, int]:
    if kind in (_TRUE, _FALSE):
        return kind == _TRUE, place
    if kind == _BYTE:
        return _byte(data, place, end)
    if kind < _DOUBLE:
        return _integer(data, place, end)
    if kind == _DOUBLE:
        return None, place + 8
    if kind == _BINARY:
        length, place = _unsigned(data, place, end)
        return None, place + length
    if kind == _STRUCT and depth:
        return _structure(data, place, end, depth - 1)
    raise ValueError("the header of a page has no field of this type")  # lists, sets and maps among them


def _integer(data: mmap.mmap, place: int, end: int) -> tuple[int, int]:
    number, place = _unsigned(data, place, end)
    return number >> 1 ^ -(number & 1), place


def _unsigned(data: mmap.mmap, place: int, end: int) -> tuple[int, int]:
    number = 0
    for shift in range(0, 70, 7):
        byte, place = _byte(data, place, end)
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, place
    raise ValueError("a number never ends")


def _byte(data: mmap.mmap, place: int, end: int) -> tuple[int, int]:
    if place >= end:
        raise ValueError("a header goes beyond its column")
    return data[place], place + 1
