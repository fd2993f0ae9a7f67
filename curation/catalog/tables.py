"""The catalog's tables, the same for SQLite and PostgreSQL; `migrations/` creates them.

Times are Unix seconds. No column may hold a title, an uploader, a web address, an absolute path or a host name.
"""

from __future__ import annotations

import sqlalchemy as sa

metadata = sa.MetaData()
_ID, _HASH = sa.String(16), sa.String(64)


def _of_clip(primary: bool = True) -> sa.Column[str]:
    return sa.Column(
        "clip_id", _ID, sa.ForeignKey("clips.clip_id", ondelete="CASCADE"), primary_key=primary, nullable=False
    )


def _of_provenance(primary: bool = False) -> sa.Column[str]:
    return sa.Column("provenance_hash", _HASH, sa.ForeignKey("provenance.hash"), primary_key=primary, nullable=False)


clips = sa.Table(
    "clips",
    metadata,
    sa.Column("clip_id", _ID, primary_key=True),
    sa.Column("platform", sa.Text, nullable=False),
    sa.Column("video_id", sa.Text, nullable=False),
    sa.Column("video_key", _ID, nullable=False, index=True),
    sa.Column("start_us", sa.BigInteger),
    sa.Column("end_us", sa.BigInteger),
    sa.Column("split", sa.Text),
    sa.Column("added_at", sa.Double, nullable=False),
)

videos = sa.Table(
    "videos",
    metadata,
    sa.Column("video_key", _ID, primary_key=True),
    sa.Column("path", sa.Text, nullable=False),
    sa.Column("sha256", _HASH, nullable=False),
    sa.Column("size_bytes", sa.BigInteger, nullable=False),
    sa.Column("codec", sa.Text, nullable=False),
    sa.Column("width", sa.Integer, nullable=False),
    sa.Column("height", sa.Integer, nullable=False),
    sa.Column("frames", sa.BigInteger, nullable=False),
    sa.Column("duration_s", sa.Double, nullable=False),
    sa.Column("downloaded_at", sa.Double, nullable=False),
    sa.Column("present", sa.Boolean, nullable=False),
    sa.Column("clips", sa.Integer, nullable=False, server_default="0"),  # number of clips of this video
    sa.Index("ix_videos_clips", "clips"),
)
PRESENT = videos.c.present.is_(sa.true())
sa.Index(
    "ix_videos_present",
    videos.c.downloaded_at,
    videos.c.video_key,
    videos.c.size_bytes,
    videos.c.present,  # without it SQLite would also read the rows
    sqlite_where=PRESENT,
    postgresql_where=PRESENT,
)

attempts = sa.Table(
    "attempts",
    metadata,
    sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True),
    _of_clip(primary=False),
    sa.Column("stage", sa.Text, nullable=False),
    sa.Column("code", sa.Text),
    sa.Column("transient", sa.Boolean, nullable=False),
    sa.Column("message", sa.Text, nullable=False),
    sa.Column("started_at", sa.Double, nullable=False),
    sa.Column("seconds", sa.Double, nullable=False),
    sa.Column("worker", sa.Text, nullable=False),
    # a failure, with no later attempt of this stage on this clip
    sa.Column("unresolved", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.Index("ix_attempts_clip", "clip_id", "stage", "id"),
)
UNRESOLVED = attempts.c.unresolved.is_(sa.true())
sa.Index(
    "ix_attempts_unresolved",
    attempts.c.stage,
    attempts.c.code,
    attempts.c.clip_id,
    attempts.c.unresolved,  # without it SQLite would also read the rows
    sqlite_where=UNRESOLVED,
    postgresql_where=UNRESOLVED,
)

observations = sa.Table(
    "observations",
    metadata,
    _of_clip(),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("path", sa.Text, nullable=False),
    sa.Column("sha256", _HASH, nullable=False),
    _of_provenance(),
    sa.Column("observed_at", sa.Double, nullable=False),
)

verdicts = sa.Table(
    "verdicts",
    metadata,
    _of_clip(),
    sa.Column("policy_hash", _HASH, primary_key=True),
    sa.Column("policy_name", sa.Text, nullable=False),
    sa.Column("decision", sa.Text, nullable=False),
    sa.Column("first_reason", sa.Text),
    sa.Column("criteria", sa.JSON, nullable=False),
    sa.Column("observation_sha256", _HASH, nullable=False),
    sa.Column("judged_at", sa.Double, nullable=False),
    sa.Index("ix_verdicts_decision", "policy_hash", "decision", "first_reason"),
)

outputs = sa.Table(
    "outputs",
    metadata,
    _of_clip(),
    _of_provenance(primary=True),
    sa.Column("frames", sa.Integer, nullable=False),
    sa.Column("written_at", sa.Double, nullable=False),
    sa.Index("ix_outputs_dataset", "provenance_hash", "clip_id"),
)

provenance = sa.Table(
    "provenance",
    metadata,
    sa.Column("hash", _HASH, primary_key=True),
    sa.Column("value", sa.JSON, nullable=False),
)

forgotten = sa.Table(
    "forgotten",
    metadata,
    sa.Column("digest", _HASH, primary_key=True),
    sa.Column("forgotten_at", sa.Double, nullable=False),
)

index_versions = sa.Table(  # the last version number of each data set's index
    "index_versions",
    metadata,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("version", sa.BigInteger, nullable=False),
)

leases = sa.Table(
    "leases",
    metadata,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("owner", sa.Text, nullable=False),
    sa.Column("expires_at", sa.Double, nullable=False),
)

turns = sa.Table(
    "turns",
    metadata,
    sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True),
    sa.Column("service", sa.Text, nullable=False),
    sa.Column("session", sa.Text, nullable=False),
    sa.Column("at", sa.Double, nullable=False),
    sa.Index("ix_turns_at", "service", "session", "at"),
)

breakers = sa.Table(  # not yet closed; `probing`: it lapsed, and one worker tries the service until `until`
    "breakers",
    metadata,
    sa.Column("service", sa.Text, primary_key=True),
    sa.Column("session", sa.Text, primary_key=True),
    sa.Column("code", sa.Text, nullable=False),
    sa.Column("until", sa.Double, nullable=False),
    sa.Column("strikes", sa.Integer, nullable=False),
    sa.Column("probing", sa.Boolean, nullable=False),
)
