"""What happened to each clip: the only memory of a run. The rest of the package uses `Catalog` alone.

tables and migrations define what is stored, database connects, rows are the records, funnel counts them; leases and
turns coordinate workers.
"""

from curation.catalog.catalog import Catalog, forgotten_clip_digest, forgotten_digest
from curation.catalog.funnel import Funnel
from curation.catalog.rows import Attempt, ClipHistory, Forgotten, Known, ObservationFile, Output, StoredVideo

__all__ = [
    "Attempt",
    "Catalog",
    "ClipHistory",
    "Forgotten",
    "Funnel",
    "Known",
    "ObservationFile",
    "Output",
    "StoredVideo",
    "forgotten_clip_digest",
    "forgotten_digest",
]
