"""The index of a data set alone knows where a clip is stored; the catalog numbers the versions of that index."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Drop columns that repeat the index, and add the table of version numbers."""
    op.create_table(
        "index_versions",
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("version", sa.BigInteger, nullable=False),
    )
    op.drop_index("ix_outputs_shard", "outputs")
    for column in ("shard", "row_group_first", "row_group_count", "sha256"):
        op.drop_column("outputs", column)
    op.create_index("ix_outputs_dataset", "outputs", ["provenance_hash", "clip_id"])
