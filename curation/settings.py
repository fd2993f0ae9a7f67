"""Everything a curation run is configured by, as one frozen object that travels to every worker.

Each field is the one declaration of a setting: `curation.options` makes the options of `curation run`, the parameters
of the flow and the table of docs/settings.md from its name, type, default, bounds and description. A field's `option`
is its name there, where the name here would not tell what it belongs to.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

DEVICE = r"^(auto|cpu|cuda(:\d+)?)$"
_STRICT = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class VideoLimits(BaseModel):
    """What a video file may ask of a process before it is refused, whatever its header says. See docs/observing.md."""

    model_config = _STRICT

    max_pixels: int = Field(
        35_651_584, ge=256, description="Pixels of a frame as stored; the default is level 6.2 of H.264 and HEVC, 8K."
    )
    max_fps: int = Field(1000, ge=1, description="Frames shown within any one second.")
    max_frames: int = Field(
        2_000_000, ge=1, description="Frames of a file, or samples of a track; the default is 18 hours at 30 fps."
    )
    max_samples: int = Field(
        21_600, ge=1, description="Samples of a clip, about 50 kB each; the default is an hour at 6 per second."
    )
    max_tracks: int = Field(64, ge=1, description="Tracks of a file, of all kinds.")
    max_pictures: int = Field(8, ge=1, description="Tracks of a file that have pictures, covers included.")


_LIMITS = Field(VideoLimits(), description="A file or clip beyond these limits is refused: pixels, frames, tracks.")


class DownloadSettings(BaseModel):
    """How videos are fetched."""

    model_config = _STRICT

    max_height: int = Field(
        1080, ge=144, description="Largest short side of a stream, in pixels: 1080 allows 1920x1080 and 1080x1920."
    )
    http_hosts: tuple[str, ...] = Field(
        (), description="Hosts (host or host:port) allowed for platform http.", json_schema_extra={"flag": "http-host"}
    )
    local_root: Path | None = Field(None, description="Folder below which platform local may read files.")
    allow_loopback: bool = Field(False, description="Allow loopback addresses; for tests and demonstrations only.")
    timeout_s: float = Field(
        30.0,
        gt=0,
        description="Seconds without an answer after which a request fails.",
        json_schema_extra={"option": "download_timeout_s"},
    )
    retries: int = Field(
        3,
        ge=0,
        description="Further attempts after a transient failure of a download.",
        json_schema_extra={"option": "download_retries"},
    )
    session: str = Field(
        "default",
        pattern=r"^[\w.-]{1,40}$",
        description="Name of the address that platforms see; workers behind one address share its rates.",
    )
    videos_per_hour: int = Field(250, ge=0, description="Videos per hour of one platform and session; 0 is no limit.")
    pause_s: tuple[float, float] = Field(
        (5.0, 10.0),
        description="Shortest and longest pause between two videos of a platform, in seconds.",
        json_schema_extra={"flag": "pause"},
    )
    bytes_per_s: int | None = Field(None, ge=1, description="Largest rate of a download, in bytes per second.")
    max_video_mb: int = Field(8192, ge=1, description="Largest video that is downloaded, in MB.")
    min_free_mb: int = Field(2048, ge=0, description="Disk space that a download leaves free, in MB.")
    budget_mb: int | None = Field(
        None, ge=1, description="Disk space for videos, in MB; the oldest finished ones are deleted to make room."
    )
    cookies: Path | None = Field(
        None, description="Netscape cookie file, for platforms that ask for one; never changed or logged."
    )
    proxy_file: Path | None = Field(None, description="File whose one line is the address of a proxy; never logged.")
    limits: VideoLimits = _LIMITS


class ObserveSettings(BaseModel):
    """What is measured on a clip; part of an observation's provenance."""

    model_config = _STRICT

    detector: str | None = Field(
        None, description="ultralytics weights: a file or a published name; the policy's by default."
    )
    sample_fps: float = Field(6.0, gt=0, description="Detector samples and training frames per second.")
    detector_long_side: int = Field(
        640, ge=64, multiple_of=32, description="Longer side of the detector's input, in pixels, a multiple of 32."
    )
    detector_confidence: float = Field(0.10, gt=0, lt=1, description="Boxes of lower confidence are not stored.")
    prescreen_key_frames: int = Field(
        8, ge=2, description="Clips with fewer key frames among their samples skip the prescreen."
    )
    frame_long_side: int = Field(
        518, ge=14, multiple_of=14, description="Longer side of training frames, in pixels, a multiple of 14."
    )
    device: str = Field(
        "auto", pattern=DEVICE, description="Device of detector and teacher: auto, cpu, cuda or cuda:N."
    )
    limits: VideoLimits = _LIMITS


class TeacherSettings(BaseModel):
    """Which depth teacher runs on accepted clips."""

    model_config = _STRICT

    kind: Literal["moge", "folder", "none"] = Field(
        "moge",
        description="Depth teacher of accepted clips; none writes shards without depth.",
        json_schema_extra={"option": "teacher"},
    )
    model: str = Field(
        "Ruicheng/moge-2-vitl-normal",
        description="MoGe-2 weights, as a Hugging Face id or a local file; or the depth folder.",
        json_schema_extra={"option": "teacher_model"},
    )
    name: str | None = Field(
        None,
        description="Name recorded for the teacher; for a depth folder, such as megasam.",
        json_schema_extra={"option": "teacher_name"},
    )
    num_tokens: int = Field(
        1800, ge=1, description="MoGe-2 tokens per frame; 777 is the native grid of 518x294 pixels."
    )
    batch_size: int = Field(
        8, ge=1, description="Frames per forward pass of the teacher.", json_schema_extra={"option": "teacher_batch"}
    )
    device: str = Field("auto", description="Device of detector and teacher: auto, cpu, cuda or cuda:N.")


class Settings(BaseModel):
    """One run: where, under which policy, with which models."""

    model_config = _STRICT

    out: Path = Field(description="Folder of the run: catalog, videos, observations, shards.")
    policy: Path = Field(
        Path("default"), description="Policy: the name of a built-in one (default, paper) or the path of a file."
    )
    download: DownloadSettings = DownloadSettings()
    observe: ObserveSettings = ObserveSettings()
    teacher: TeacherSettings = TeacherSettings()
    batch_clips: int = Field(32, ge=1, description="Clips per batch, the unit of a task and of a shard.")
    workers: int | None = Field(None, ge=1, description="Observing processes; one per core by default.")
    clip_timeout_s: float | None = Field(
        None,
        gt=0,
        description="Longest time for one clip in observe and in teach, in seconds; by default half an hour, and more "
        "for long clips and videos.",
    )
    debug_file: Path | None = Field(
        None,
        description="File of this machine for all that unexpected errors say; it may hold titles and addresses, and "
        "only you can read it.",
    )
    shard_mb: int = Field(512, ge=1, description="Largest shard file, in MB.")
    retry: tuple[str, ...] = Field((), description="Failure codes to try again although they are permanent.")
    catalog_url: str | None = Field(
        None,
        repr=False,
        description="SQLAlchemy URL of a catalog that machines share; SQLite in the output folder by default.",
        json_schema_extra={"env": "UNISH_CATALOG_URL"},
    )
    lease_s: float = Field(
        120.0,
        ge=3,
        le=86400,
        description="A worker that sends no heartbeat for this many seconds loses its batches to other workers.",
    )
    patience_s: float = Field(
        3600.0, ge=0, description="Longest wait for a platform that limits requests, in seconds; then a later run asks."
    )
    storage: str | None = Field(
        None,
        repr=False,
        pattern=r"^[a-z][a-z0-9+]*://.",
        description="fsspec URL such as s3://bucket/run, where machines share videos, observations and shards; the "
        "output folder by default.",
        json_schema_extra={"env": "UNISH_STORAGE"},
    )

    @property
    def place(self) -> str:
        """Where the run's files are, for people: the storage without any password, or the folder."""
        # with a colon before the first slash, up to the last @, which may well stand in the password
        return re.sub(r"(?s)://(?:[^/]*:.*|[^/]*)@", "://", self.storage) if self.storage else str(self.out)

    @property
    def database(self) -> str:
        """The catalog's SQLAlchemy URL."""
        from sqlalchemy import URL

        file = str((self.out / "catalog.sqlite").absolute())
        return self.catalog_url or URL.create("sqlite", database=file).render_as_string()
