"""Where a clip lies is told by the index of its data set alone; the catalog numbers the versions of that index."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Drop what the index holds too, and add the table of version numbers."""
    op.create_table(
        "index_versions",
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("version", sa.BigInteger, nullable=False),
    )
    op.drop_index("ix_outputs_shard", "outputs")
    for column in ("shard", "row_group_first", "row_group_count", "sha256"):
        op.drop_column("outputs", column)
    op.create_index("ix_outputs_dataset", "outputs", ["provenance_hash", "clip_id"])
