"""Leases, turns and breakers for many workers; unresolved failures and clips per video, to count a million fast."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Add tables and columns, and fill the columns from the existing rows."""
    op.create_table(
        "leases",
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("owner", sa.Text, nullable=False),
        sa.Column("expires_at", sa.Double, nullable=False),
    )
    op.create_table(
        "turns",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True),
        sa.Column("service", sa.Text, nullable=False),
        sa.Column("session", sa.Text, nullable=False),
        sa.Column("at", sa.Double, nullable=False),
    )
    op.create_index("ix_turns_at", "turns", ["service", "session", "at"])
    op.create_table(
        "breakers",
        sa.Column("service", sa.Text, primary_key=True),
        sa.Column("session", sa.Text, primary_key=True),
        sa.Column("code", sa.Text, nullable=False),
        sa.Column("until", sa.Double, nullable=False),
        sa.Column("strikes", sa.Integer, nullable=False),
        sa.Column("probing", sa.Boolean, nullable=False),
    )
    op.add_column("attempts", sa.Column("unresolved", sa.Boolean, nullable=False, server_default=sa.false()))
    op.execute(
        "UPDATE attempts SET unresolved = true WHERE code IS NOT NULL AND NOT EXISTS (SELECT 1 FROM attempts AS later "
        "WHERE later.clip_id = attempts.clip_id AND later.stage = attempts.stage AND later.id > attempts.id)"
    )
    _create_partial_index(
        "ix_attempts_unresolved", "attempts", ["stage", "code", "clip_id", "unresolved"], "unresolved"
    )
    op.drop_index("ix_attempts_failed", "attempts")
    op.add_column("videos", sa.Column("clips", sa.Integer, nullable=False, server_default="0"))
    op.execute("UPDATE videos SET clips = (SELECT count(*) FROM clips WHERE clips.video_key = videos.video_key)")
    op.create_index("ix_videos_clips", "videos", ["clips"])
    _create_partial_index(
        "ix_videos_present", "videos", ["downloaded_at", "video_key", "size_bytes", "present"], "present"
    )


def _create_partial_index(name: str, table: str, columns: list[str], flag: str) -> None:
    op.create_index(
        name, table, columns, sqlite_where=sa.text(f"{flag} IS 1"), postgresql_where=sa.text(f"{flag} IS true")
    )
