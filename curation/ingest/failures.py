"""The taxonomy of failures: what went wrong with one clip, whether trying again can help, and what a user does next.

A failure is not a verdict: a clip that could not be fetched or decoded is never "rejected".
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class FailureCode(StrEnum):
    """A typed reason why a clip has no result; the value is what the catalog stores."""

    # the platform will not give this video, and asking again does not change that
    REMOVED = "removed"
    PRIVATE = "private"
    GEO = "geo"
    AGE = "age"
    MEMBERS = "members"
    DRM = "drm"
    LIVE = "live"
    NO_FORMAT = "no_format"
    UNSUPPORTED = "unsupported"
    # asking later may work
    BOT_CHECK = "bot_check"
    RATE_LIMITED = "rate_limited"
    HTTP_5XX = "http_5xx"
    NETWORK = "network"
    TIMEOUT = "timeout"
    # this machine or this file
    DISK_FULL = "disk_full"
    CORRUPT = "corrupt"
    NO_VIDEO = "no_video"
    WRONG_KIND = "wrong_kind"
    TOO_LARGE = "too_large"
    SPAN_OUT_OF_RANGE = "span_out_of_range"
    MISSING_DEPTH = "missing_depth"
    # somebody said no
    REFUSED = "refused"
    FORGOTTEN = "forgotten"
    # a defect in this program, or a worker that died or did not come back
    TOO_SLOW = "too_slow"
    OUT_OF_MEMORY = "out_of_memory"
    INTERNAL = "internal"

    @property
    def transient(self) -> bool:
        """True where another attempt, without anyone doing anything, may succeed; of those REPEATED, TRIES attempts."""
        return self in _TRANSIENT

    @property
    def advice(self) -> str:
        """One sentence that tells the user what to do."""
        return _ADVICE[self]


_TRANSIENT = frozenset(
    {
        FailureCode.BOT_CHECK,
        FailureCode.RATE_LIMITED,
        FailureCode.HTTP_5XX,
        FailureCode.NETWORK,
        FailureCode.TIMEOUT,
        FailureCode.DISK_FULL,
        FailureCode.TOO_SLOW,
        FailureCode.OUT_OF_MEMORY,
        FailureCode.INTERNAL,
    }
)

# The machine may have had a bad day, or it is this very clip: so many times in one stage, and it is the clip.
TRIES = 3
REPEATED = frozenset({FailureCode.INTERNAL, FailureCode.TOO_SLOW, FailureCode.OUT_OF_MEMORY})

_ADVICE = {
    FailureCode.REMOVED: "The video is gone from its platform; drop the row from the manifest.",
    FailureCode.PRIVATE: "The owner made the video private; drop the row from the manifest.",
    FailureCode.GEO: "The video is blocked in this region; run a worker where it is shown, or drop the row.",
    FailureCode.AGE: "The platform wants a signed-in adult account, which this program does not have; drop the row.",
    FailureCode.MEMBERS: "The video is for paying members; drop the row unless your account may use it.",
    FailureCode.DRM: "The video is protected by DRM and cannot be used; drop the row.",
    FailureCode.LIVE: "The video is a live stream; run again when it is over.",
    FailureCode.NO_FORMAT: "No format's short side fits the cap; raise --max-height or drop the row.",
    FailureCode.UNSUPPORTED: "yt-dlp cannot read this page; update yt-dlp, or drop the row.",
    FailureCode.BOT_CHECK: "The platform asks for proof of a human; wait some hours, then run again and go slower.",
    FailureCode.RATE_LIMITED: "The platform asks to slow down; run again later, with fewer parallel downloads.",
    FailureCode.HTTP_5XX: "The server had an error; run again later.",
    FailureCode.NETWORK: "The connection failed; check the network and run again.",
    FailureCode.TIMEOUT: "The server did not answer in time; run again later.",
    FailureCode.DISK_FULL: "The disk is full; free some space or choose another --out, and run again.",
    FailureCode.CORRUPT: "The file is damaged or incomplete; mend its source, or fetch it anew with --retry corrupt.",
    FailureCode.NO_VIDEO: "The file has no moving picture (audio, or cover art only); drop the row.",
    FailureCode.WRONG_KIND: "This kind of file is not taken; convert it to an upright MP4, or drop the row.",
    FailureCode.TOO_LARGE: "The film is beyond what one process decodes; make it smaller or cut it, or drop the row.",
    FailureCode.SPAN_OUT_OF_RANGE: "No frame begins in the asked times; correct start_s and end_s in the manifest.",
    FailureCode.MISSING_DEPTH: "The depth folder lacks this clip or a part of it; compute it, or take another teacher.",
    FailureCode.REFUSED: "The address or path is not allowed; allow its host or folder explicitly if you trust it.",
    FailureCode.FORGOTTEN: "Removal of this video was requested; drop the row.",
    FailureCode.TOO_SLOW: "The clip took longer than the limit; raise --clip-timeout-s, or run on a faster machine.",
    FailureCode.OUT_OF_MEMORY: "The memory did not suffice; run again with fewer --workers, or on a larger machine.",
    FailureCode.INTERNAL: "An unexpected error, or a worker that died; run again with --debug-file PATH and report it.",
}


@dataclass(eq=False)  # not frozen: Python itself sets __traceback__ and notes on a raised exception
class StageError(Exception):
    """An expected failure of one clip. `message` is safe to store: no title, name, path or URL of the video.

    retry_after_s: how long the server asked to be left alone.
    """

    code: FailureCode
    message: str
    retry_after_s: float | None = None

    def __str__(self) -> str:
        return f"{self.code.value}: {self.message}"


class UsageError(Exception):
    """The user's input or set-up is wrong; the text is one sentence that says what to do. Shown without a traceback."""


class OutageError(Exception):
    """Something that the run leans on (database, storage, a lock) was away for longer than it is waited for.

    The text is a sentence for the user, shown without a traceback; it names no host, user or path of what was away.
    Nothing of the set-up need be wrong: what is done is kept, and the same run goes on later.
    """


class LostError(Exception):
    """What this worker held was taken over by another while it slept or was cut off: it must not go on with it.

    No fault of a clip and none of the user: the work is done by the one who has it now.
    """


ENDS_THE_RUN = (UsageError, OutageError, LostError)  # no fault of one clip: the next one would fail in the same way
