"""The measurements of one clip and their file format: one row of one Parquet file, with nested lists.

Nothing is judged here. Every threshold is in a policy, so judging again decodes nothing.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from curation.failures import UsageError
from curation.files import atomic_path
from curation.records import Transfer

Surround = Literal["none", "bars", "copy"]
OBSERVATION_VERSION = 3


@dataclass(frozen=True, slots=True)
class Observations:
    """Measurements of one clip. n frames, s samples (6 a second by default), k boxes.

    kind: "full" for every frame; "keyframes" for the prescreen, which has only samples that are key frames, and no
    shot measures (n = 0).
    width, height: the picture as displayed. start_s, end_s: the clip's span in the video; end_s is exclusive.
    transfer: pq or hlg if any frame is coded so, else sdr; the measurements are of SDR in any case.
    surround: "bars" of one colour around the picture, or a blurred "copy" of itself, or "none".
    active: x1, y1, x2, y2 of the picture inside the surround, as fractions of the whole.
    times_s: (n,) presentation times. content, luma, contrast, gap, person_gap, dissolve: (n,) as in ShotMeasures.
    sample_times_s: (s,) presentation times of the samples.
    box_sample: (k,) index of the sample; box_xyxy: (k, 4) fractions of the picture; box_class: (k,) class names;
    box_confidence: (k,); box_track: (k,) person track number, 0 for none.
    provenance: detector, parameters and versions that the measurements depend on.
    """

    clip_id: str
    kind: Literal["full", "keyframes"]
    width: int
    height: int
    transfer: Transfer
    start_s: float
    end_s: float
    surround: Surround
    active: tuple[float, float, float, float]
    times_s: NDArray[np.float64]
    content: NDArray[np.float32]
    luma: NDArray[np.float32]
    contrast: NDArray[np.float32]
    gap: NDArray[np.float32]
    person_gap: NDArray[np.float32]
    dissolve: NDArray[np.float32]
    sample_times_s: NDArray[np.float64]
    box_sample: NDArray[np.int32]
    box_xyxy: Annotated[NDArray[np.float32], 4]
    box_class: tuple[str, ...]
    box_confidence: NDArray[np.float32]
    box_track: NDArray[np.int32]
    provenance: dict[str, Any]

    @property
    def duration_s(self) -> float:
        """Length of the clip, seconds."""
        return self.end_s - self.start_s


def _column(hint: Any) -> pa.DataType:
    """The Parquet type of a field; a number beside an array's type is the length of its second dimension."""
    kind, *width = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    if get_origin(kind) is np.ndarray:
        item = pa.from_numpy_dtype(get_args(get_args(kind)[1])[0])
        return pa.list_(pa.list_(item, *width) if width else item)
    if get_origin(kind) is tuple:
        items = get_args(kind)
        return pa.list_(pa.string()) if items[-1] is Ellipsis else pa.list_(pa.float64(), len(items))
    return {int: pa.int32(), float: pa.float64()}.get(kind, pa.string())


SCHEMA = pa.schema(
    {name: _column(hint) for name, hint in get_type_hints(Observations, include_extras=True).items()},
    metadata={"unish.observations": str(OBSERVATION_VERSION)},
)


def write_observations(observations: Observations, path: Path) -> None:
    """Write one clip's measurements to a temporary file next to `path`, then rename."""
    row: dict[str, Any] = {}
    for name in SCHEMA.names:
        value = getattr(observations, name)
        if name == "provenance":
            value = json.dumps(value, sort_keys=True)
        elif isinstance(value, np.ndarray):
            row[name] = _one_list(value, SCHEMA.field(name).type)
            continue
        row[name] = [list(value) if isinstance(value, tuple) else value]
    with atomic_path(path) as temporary:
        pq.write_table(pa.table(row, schema=SCHEMA), temporary, compression="zstd")


def _one_list(values: NDArray[Any], kind: pa.DataType) -> pa.Array:
    """A column with one row that holds these values, without a Python object for each."""
    flat = pa.array(values.ravel(), kind.value_type if values.ndim == 1 else kind.value_type.value_type)
    items = flat if values.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
    return pa.ListArray.from_arrays(pa.array([0, len(values)], pa.int32()), items).cast(kind)


def read_observations(path: Path) -> Observations:
    """Read one clip's measurements. Raises UsageError if the file is damaged or has another version."""
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise UsageError(f"The observations {path.name} cannot be read; delete the file and run again.") from error
    version = (table.schema.metadata or {}).get(b"unish.observations", b"?").decode()
    if version != str(OBSERVATION_VERSION):
        raise UsageError(f"The observations {path.name} have version {version}; delete the file and run again.")
    values: dict[str, Any] = {}
    for field in SCHEMA:
        scalar = table[field.name][0]
        if field.name == "provenance":
            values[field.name] = json.loads(scalar.as_py())
        elif not pa.types.is_list(field.type) or pa.types.is_string(field.type.value_type):
            value = scalar.as_py()
            values[field.name] = tuple(value) if isinstance(value, list) else value
        elif pa.types.is_fixed_size_list(field.type.value_type):
            flat = scalar.values.flatten() if len(scalar.values) else pa.array([], field.type.value_type.value_type)
            values[field.name] = flat.to_numpy(zero_copy_only=False).reshape(-1, field.type.value_type.list_size)
        else:
            values[field.name] = scalar.values.to_numpy(zero_copy_only=False)
    return Observations(**values)
