"""Everything a curation run is configured by, as one frozen object that travels to every worker."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

POLICIES = Path(__file__).parent / "judge" / "policies"
DEVICE = r"^(auto|cpu|cuda(:\d+)?)$"


class VideoLimits(BaseModel):
    """What a video file may ask of a process before it is refused, whatever its header says. See docs/observing.md."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    max_pixels: int = Field(35_651_584, ge=256, description="Of a frame as stored: level 6.2 of H.264 and HEVC, 8K.")
    max_fps: int = Field(1000, ge=1, description="Frames shown within any one second.")
    max_frames: int = Field(2_000_000, ge=1, description="Of a file, or samples of a track: 18 hours at 30 a second.")
    max_samples: int = Field(21_600, ge=1, description="Of a clip, about 50 kB each: an hour at 6 a second.")
    max_tracks: int = Field(64, ge=1, description="Of a file, of all kinds.")
    max_pictures: int = Field(8, ge=1, description="Tracks of a file that have pictures, covers included.")


class DownloadSettings(BaseModel):
    """How videos are fetched."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    max_height: int = Field(1080, ge=144, description="Cap on the short side of a stream: 1080 takes 1080x1920 too.")
    http_hosts: tuple[str, ...] = Field((), description="Hosts (host or host:port) allowed for platform `http`.")
    local_root: Path | None = Field(None, description="Folder below which platform `local` may read files.")
    allow_loopback: bool = Field(False, description="Permit loopback addresses; for tests and demonstrations only.")
    timeout_s: float = Field(30.0, gt=0, description="Seconds without an answer before a request is given up.")
    retries: int = Field(3, ge=0, description="Further tries after a transient failure.")
    session: str = Field("default", pattern=r"^[\w.-]{1,40}$", description="Workers behind one address share a name.")
    videos_per_hour: int = Field(250, ge=0, description="Per platform and session; 0 for no limit.")
    pause_s: tuple[float, float] = Field((5.0, 10.0), description="Least and most seconds between two videos.")
    bytes_per_s: int | None = Field(None, ge=1, description="No video is fetched faster than this.")
    max_video_mb: int = Field(8192, ge=1, description="Larger videos are not fetched.")
    min_free_mb: int = Field(2048, ge=0, description="Disk space that a download leaves free.")
    budget_mb: int | None = Field(None, ge=1, description="Videos kept at once; the oldest finished ones make room.")
    cookies: Path | None = Field(None, description="Netscape cookie file, for platforms that ask for one.")
    proxy_file: Path | None = Field(None, description="File whose one line is the address of a proxy.")
    limits: VideoLimits = Field(VideoLimits(), description="Beyond these a fetched file is refused.")


class ObserveSettings(BaseModel):
    """What is measured on a clip; part of an observation's provenance."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    detector: str | None = Field(None, description="ultralytics weights; None takes the policy's.")
    sample_fps: float = Field(6.0, gt=0, description="Rate of detector samples and of training frames.")
    detector_long_side: int = Field(640, ge=64, multiple_of=32)
    detector_confidence: float = Field(0.10, gt=0, lt=1, description="Boxes below this are not stored.")
    prescreen_key_frames: int = Field(8, ge=2, description="Clips with fewer key frames among their samples skip it.")
    frame_long_side: int = Field(518, ge=14, multiple_of=14, description="Longer side of training frames.")
    device: str = Field("auto", pattern=DEVICE, description="auto, cpu, cuda or cuda:N.")
    limits: VideoLimits = Field(VideoLimits(), description="Beyond these a file or a clip is refused.")


class TeacherSettings(BaseModel):
    """Which depth teacher runs on accepted clips."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    kind: Literal["moge", "folder", "none"] = "moge"
    model: str = Field("Ruicheng/moge-2-vitl-normal", description="Hugging Face id, local file, or depth folder.")
    name: str | None = Field(None, description="Name recorded for a folder teacher, such as megasam.")
    num_tokens: int = Field(1800, ge=1, description="MoGe-2 tokens per frame; 777 is the native grid of 518x294.")
    batch_size: int = Field(8, ge=1, description="Frames per forward pass.")
    device: str = "auto"


class Settings(BaseModel):
    """One run: where, under which policy, with which models."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    out: Path
    policy: Path = POLICIES / "default.yaml"
    download: DownloadSettings = DownloadSettings()
    observe: ObserveSettings = ObserveSettings()
    teacher: TeacherSettings = TeacherSettings()
    batch_clips: int = Field(32, ge=1, description="Clips per batch: the unit of a task and of a shard.")
    workers: int | None = Field(None, ge=1, description="Observing processes; None is one per core.")
    clip_timeout_s: float | None = Field(
        None,
        gt=0,
        description="Seconds for measuring a clip, and for its depth; None is half an hour, a minute more for every "
        "second of the clip, and a second for every second of its video.",
    )
    debug_file: Path | None = Field(
        None, description="Unexpected errors are kept here with all they say; readable by you alone."
    )
    shard_mb: int = Field(512, ge=1, description="A shard file is closed before it grows beyond this.")
    retry: tuple[str, ...] = Field((), description="Failure codes to try again although they are permanent.")
    catalog_url: str | None = Field(None, repr=False, description="SQLAlchemy URL; None is SQLite in `out`.")
    lease_s: float = Field(
        120.0, ge=3, le=86400, description="Batches of a worker that is silent for so long go to others."
    )
    patience_s: float = Field(3600.0, ge=0, description="A run waits so long for a platform to be asked again.")
    storage: str | None = Field(
        None, repr=False, pattern=r"^[a-z][a-z0-9+]*://.", description="fsspec URL shared by machines."
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
