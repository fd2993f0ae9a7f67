"""The columns of a shard, version 2: names, types, units and frames, in one table that a test compares with the docs.

A file may have further columns (such as ground truth of synthetic clips); readers ignore columns they do not know.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pyarrow as pa

from curation.failures import UsageError

SCHEMA_VERSION = 2
ROWS_PER_GROUP = 180
VERSION_KEY = b"unish:schema_version"
PROVENANCE_KEY = b"unish:provenance"


class ShardError(UsageError):
    """A shard, its index or data for it is missing or invalid; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Field:
    """One column. `nullable` columns are null where the value does not exist, never a magic number."""

    name: str
    type: pa.DataType
    nullable: bool
    unit: str
    doc: str

    def arrow(self) -> pa.Field:
        """The Arrow field, carrying unit and doc as metadata."""
        return pa.field(self.name, self.type, self.nullable, metadata={"unit": self.unit, "doc": self.doc})


FIELDS: tuple[Field, ...] = (
    Field("clip_id", pa.string(), False, "", "The clip: 16 hex digits, the same on every machine."),
    Field("split", pa.string(), True, "", "Split named by the manifest."),
    Field("frame_index", pa.int32(), False, "frames", "Position within the clip, from 0, without gaps."),
    Field("time_s", pa.float64(), False, "s", "Presentation time relative to the video's first frame."),
    Field("width", pa.int32(), False, "px", "Width W of the training grid."),
    Field("height", pa.int32(), False, "px", "Height H of the training grid."),
    Field(
        "stretch",
        pa.float64(),
        False,
        "",
        "Horizontal over vertical scale of the grid against the displayed picture, whose pixels are square: "
        "fx / fy of a camera with square pixels.",
    ),
    Field("jpeg", pa.binary(), False, "", "The frame, W x H, RGB. These bytes, decoded, are what the teacher saw."),
    Field(
        "depth",
        pa.binary(),
        True,
        "code",
        "Teacher depth along the optical axis: a blosc2 chunk of H x W little-endian uint16, each the zigzag of the "
        "code's 2-D difference (row and column, modulo 2^16). Code 0 is invalid; code c > 0 is "
        "exp(depth_log_min + (c - 1) / 1024) metres, within 5e-4 of the teacher's value. Null if no teacher ran.",
    ),
    Field("depth_log_min", pa.float32(), True, "log m", "Natural log of code 1: at most the clip's nearest depth."),
    Field(
        "depth_log_max", pa.float32(), True, "log m", "Natural log of the largest code: at least the clip's farthest."
    ),
    Field(
        "depth_valid",
        pa.binary(),
        True,
        "bits",
        "H x W bits, row-major, most significant first: where depth's code is not 0.",
    ),
    Field(
        "human_mask",
        pa.binary(),
        True,
        "bits",
        "H x W bits like depth_valid: pixels of the person. Null until a labeller has filled it.",
    ),
    Field("box", pa.list_(pa.float32(), 4), True, "px", "x0, y0, x1, y1 of the person; null where not detected."),
    Field("box_confidence", pa.float32(), True, "0-1", "The detector's confidence in that box."),
    Field(
        "intrinsics",
        pa.list_(pa.float32(), 9),
        True,
        "px",
        "The teacher's K, row-major: OpenCV camera (x right, y down, z forward), pixels of the training grid.",
    ),
    Field("provenance", pa.string(), False, "", f"SHA-256 key into the file's {PROVENANCE_KEY.decode()} JSON object."),
)

SCHEMA = pa.schema([field.arrow() for field in FIELDS], metadata={VERSION_KEY: str(SCHEMA_VERSION)})


def check_schema(columns: pa.Schema, metadata: Mapping[bytes, bytes], name: str) -> None:
    """Raise ShardError unless `columns` and a file's key-value `metadata` are those of a shard of this version."""
    version = metadata.get(VERSION_KEY)
    if version is None:
        raise ShardError(f"{name} has no shard schema version; it is not a shard: move it out of the folder.")
    if version != str(SCHEMA_VERSION).encode():
        raise ShardError(
            f"{name} has shard schema version {version.decode()}, this program reads version {SCHEMA_VERSION}; "
            "use the release that wrote it, or write the shards again."
        )
    for field in FIELDS:
        if field.name not in columns.names or columns.field(field.name).type != field.type:
            raise ShardError(f"{name} has no column {field.name} of type {field.type}; write the shard again.")
