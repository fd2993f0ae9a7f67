"""What happened to each clip: the one memory of a run. `Catalog` is all that the rest of the package asks.

tables and migrations say what is stored, database connects, rows are the records, funnel counts them; leases and turns
are what workers agree on.
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
