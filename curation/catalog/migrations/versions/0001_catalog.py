"""The first catalog: clips, videos, attempts, observations, verdicts, outputs, provenance, forgotten."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

ID, HASH = sa.String(16), sa.String(64)


def _of_clip(primary_key: bool = True) -> sa.Column[str]:
    parent = sa.ForeignKey("clips.clip_id", ondelete="CASCADE")
    return sa.Column("clip_id", ID, parent, primary_key=primary_key, nullable=False)


def _of_provenance(primary_key: bool = False) -> sa.Column[str]:
    return sa.Column("provenance_hash", HASH, sa.ForeignKey("provenance.hash"), primary_key=primary_key, nullable=False)


def upgrade() -> None:
    """Create every table and index."""
    op.create_table(
        "clips",
        sa.Column("clip_id", ID, primary_key=True),
        sa.Column("platform", sa.Text, nullable=False),
        sa.Column("video_id", sa.Text, nullable=False),
        sa.Column("video_key", ID, nullable=False, index=True),
        sa.Column("start_us", sa.BigInteger),
        sa.Column("end_us", sa.BigInteger),
        sa.Column("split", sa.Text),
        sa.Column("added_at", sa.Double, nullable=False),
    )
    op.create_table(
        "videos",
        sa.Column("video_key", ID, primary_key=True),
        sa.Column("path", sa.Text, nullable=False),
        sa.Column("sha256", HASH, nullable=False),
        sa.Column("size_bytes", sa.BigInteger, nullable=False),
        sa.Column("codec", sa.Text, nullable=False),
        sa.Column("width", sa.Integer, nullable=False),
        sa.Column("height", sa.Integer, nullable=False),
        sa.Column("frames", sa.BigInteger, nullable=False),
        sa.Column("duration_s", sa.Double, nullable=False),
        sa.Column("downloaded_at", sa.Double, nullable=False),
        sa.Column("present", sa.Boolean, nullable=False),
    )
    op.create_table(
        "provenance",
        sa.Column("hash", HASH, primary_key=True),
        sa.Column("value", sa.JSON, nullable=False),
    )
    op.create_table(
        "attempts",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True),
        _of_clip(primary_key=False),
        sa.Column("stage", sa.Text, nullable=False),
        sa.Column("code", sa.Text),
        sa.Column("transient", sa.Boolean, nullable=False),
        sa.Column("message", sa.Text, nullable=False),
        sa.Column("started_at", sa.Double, nullable=False),
        sa.Column("seconds", sa.Double, nullable=False),
        sa.Column("worker", sa.Text, nullable=False),
    )
    op.create_index("ix_attempts_clip", "attempts", ["clip_id", "stage", "id"])
    failed = sa.text("code IS NOT NULL")
    op.create_index(
        "ix_attempts_failed",
        "attempts",
        ["stage", "code", "clip_id", "id"],
        sqlite_where=failed,
        postgresql_where=failed,
    )
    op.create_table(
        "observations",
        _of_clip(),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("path", sa.Text, nullable=False),
        sa.Column("sha256", HASH, nullable=False),
        _of_provenance(),
        sa.Column("observed_at", sa.Double, nullable=False),
    )
    op.create_table(
        "verdicts",
        _of_clip(),
        sa.Column("policy_hash", HASH, primary_key=True),
        sa.Column("policy_name", sa.Text, nullable=False),
        sa.Column("decision", sa.Text, nullable=False),
        sa.Column("first_reason", sa.Text),
        sa.Column("criteria", sa.JSON, nullable=False),
        sa.Column("observation_sha256", HASH, nullable=False),
        sa.Column("judged_at", sa.Double, nullable=False),
    )
    op.create_index("ix_verdicts_decision", "verdicts", ["policy_hash", "decision", "first_reason"])
    op.create_table(
        "outputs",
        _of_clip(),
        _of_provenance(primary_key=True),
        sa.Column("shard", sa.Text, nullable=False),
        sa.Column("row_group_first", sa.Integer, nullable=False),
        sa.Column("row_group_count", sa.Integer, nullable=False),
        sa.Column("frames", sa.Integer, nullable=False),
        sa.Column("sha256", HASH, nullable=False),
        sa.Column("written_at", sa.Double, nullable=False),
    )
    op.create_index("ix_outputs_shard", "outputs", ["provenance_hash", "shard"])
    op.create_table(
        "forgotten",
        sa.Column("digest", HASH, primary_key=True),
        sa.Column("forgotten_at", sa.Double, nullable=False),
    )
