"""The taxonomy of failures: what went wrong with one clip, whether trying again can help, and what a user does next.

A failure is not a verdict: a clip that could not be fetched or decoded is never "rejected". Each code is one row of
`FailureCode`, with everything the program knows about it; docs/failures.md is made from the rows.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from enum import Flag, StrEnum, auto
from typing import Any

TRIES = 3


class Trait(Flag):
    """What the program does about a failure, besides recording it."""

    TRANSIENT = auto()
    """Another attempt may succeed without anyone doing anything: the next run tries again."""
    THRICE = auto()
    """Transient for TRIES attempts in one stage; after that the clip itself is taken to be the cause."""
    BLOCKS = auto()
    """The platform is not asked again for a while, by any worker."""
    KEEPS_PART = auto()
    """What was received stays, and the next attempt resumes it."""
    SETTINGS = auto()
    """Permanent under these settings only, and cheap to find again: every run tries it."""
    REFETCH = auto()
    """The file itself is bad: `--retry` with this code downloads the video again."""
    FINAL = auto()
    """Nothing tries again, `--retry` neither."""


_LATER = Trait.TRANSIENT
_THRICE = Trait.TRANSIENT | Trait.THRICE


class FailureCode(StrEnum):
    """A typed reason why a clip has no result. Columns: the value that the catalog stores; what happened, where a stage
    has nothing more exact to say; what the user does; the traits."""

    # fmt: off
    # the platform will not give this video, and asking again does not change that
    REMOVED = ("removed", "The video is no longer there.",
               "The video is gone from its platform; drop the row from the manifest.")
    PRIVATE = ("private", "The video is not public.",
               "The owner made the video private; drop the row from the manifest.")
    GEO = ("geo", "The video is not shown in this region.",
           "The video is blocked in this region; run a worker where it is shown, or drop the row.")
    AGE = ("age", "The video is shown to signed-in adults only.",
           "The platform wants a signed-in adult account, which this program does not have; drop the row.")
    MEMBERS = ("members", "The video is shown to paying members only.",
               "The video is for paying members; drop the row unless your account may use it.")
    DRM = ("drm", "The video is protected by DRM.",
           "The video is protected by DRM and cannot be used; drop the row.")
    LIVE = ("live", "The video is a live stream, running or announced.",
            "The video is a live stream; run again when it is over.", Trait.SETTINGS)
    NO_FORMAT = ("no_format", "The platform offers no suitable format.",
                 "No format's short side fits the limit; raise --max-height or drop the row.", Trait.SETTINGS)
    UNSUPPORTED = ("unsupported", "yt-dlp found no video at this address.",
                   "yt-dlp cannot read this page; update yt-dlp, or drop the row.")
    # asking later may work
    BOT_CHECK = ("bot_check", "The platform takes this machine for a robot.",
                 "The platform asks for proof of a human; wait some hours, then run again with longer pauses.",
                 _LATER | Trait.BLOCKS)
    RATE_LIMITED = ("rate_limited", "The server asks for fewer requests.",
                    "The platform is limiting requests; run again later, with fewer videos per hour.",
                    _LATER | Trait.BLOCKS | Trait.KEEPS_PART)
    HTTP_5XX = ("http_5xx", "The server had an internal error.",
                "The server had an error; run again later.", _LATER | Trait.KEEPS_PART)
    NETWORK = ("network", "The connection failed or broke.",
               "The connection failed; check the network and run again.", _LATER | Trait.KEEPS_PART)
    TIMEOUT = ("timeout", "The server did not answer in time.",
               "The server did not answer in time; run again later.", _LATER | Trait.KEEPS_PART)
    # this machine or this file
    DISK_FULL = ("disk_full", "There is no room for the file on the disk.",
                 "The disk is full; free some space or choose another --out, and run again.", _LATER)
    CORRUPT = ("corrupt", "The file is damaged or incomplete.",
               "The file is damaged or incomplete; repair its source, or download it again with --retry corrupt.",
               Trait.REFETCH)
    NO_VIDEO = ("no_video", "The file has no moving picture.",
                "The file has no moving picture (audio, or cover art only); drop the row.", Trait.REFETCH)
    WRONG_KIND = ("wrong_kind", "This kind of file is not accepted.",
                  "This kind of file is not accepted; convert it to an upright MP4, or drop the row.")
    TOO_LARGE = ("too_large", "The video is beyond what one process decodes.",
                 "The video is beyond what one process decodes; make it smaller or cut it, or drop the row.")
    SPAN_OUT_OF_RANGE = ("span_out_of_range", "No frame begins within the clip's times.",
                         "No frame begins within the clip's times; correct start_s and end_s in the manifest.")
    MISSING_DEPTH = ("missing_depth", "The depth folder lacks this clip or a part of it.",
                     "The depth folder lacks this clip or a part of it; compute it, or choose another teacher.",
                     Trait.SETTINGS)
    # somebody said no
    REFUSED = ("refused", "The address, or one it redirects to, is not allowed.",
               "The address or path is not allowed; allow its host or folder explicitly if you trust it.",
               Trait.SETTINGS)
    FORGOTTEN = ("forgotten", "Removal of this video was requested.",
                 "Removal of this video was requested; drop the row.", Trait.FINAL)
    # a defect in this program, or a worker that died or did not come back
    TOO_SLOW = ("too_slow", "The work on the clip did not end in time.",
                "The clip took longer than the limit; raise --clip-timeout-s, or run on a faster machine.", _THRICE)
    OUT_OF_MEMORY = ("out_of_memory", "There was not enough memory.",
                     "There was not enough memory; run again with fewer --workers, or on a larger machine.", _THRICE)
    INTERNAL = ("internal", "An unexpected error.",
                "An unexpected error, or a worker that died; run again with --debug-file PATH and report it.", _THRICE)
    # fmt: on

    _value_: str
    said: str
    """What happened, in one sentence."""
    advice: str
    """One sentence that tells the user what to do."""
    traits: Trait

    def __new__(cls, value: str, said: str = "", advice: str = "", traits: Trait = Trait(0)) -> FailureCode:
        """A row of the table; elsewhere call FailureCode with the stored value alone."""
        code = str.__new__(cls, value)
        code._value_, code.said, code.advice, code.traits = value, said, advice, traits
        return code

    @classmethod
    def having(cls, trait: Trait) -> frozenset[FailureCode]:
        """The codes with this trait."""
        return frozenset(code for code in cls if trait in code.traits)

    @property
    def retried(self) -> str:
        """Whether the next run tries again, in a few words."""
        if Trait.THRICE in self.traits:
            return f"yes, {TRIES} times"
        if self.traits & (Trait.TRANSIENT | Trait.SETTINGS):
            return "yes"
        return "no" if Trait.FINAL in self.traits else f"with `--retry {self.value}`"

    @property
    def transient(self) -> bool:
        """True where another attempt, without anyone doing anything, may succeed."""
        return Trait.TRANSIENT in self.traits


@dataclass(eq=False)  # not frozen: Python itself sets __traceback__ and notes on a raised exception
class ClipFailure(Exception):
    """An expected failure of one clip. `message` is safe to store: no title, name, path or URL of the video.

    retry_after_s: how long the server asked not to be contacted.
    """

    code: FailureCode
    message: str = ""
    retry_after_s: float | None = None

    def __post_init__(self) -> None:
        self.message = self.message or self.code.said

    def __str__(self) -> str:
        return f"{self.code.value}: {self.message}"

    def __reduce__(self) -> tuple[Any, ...]:  # Exception's own forgets what was given by keyword
        return ClipFailure, (self.code, self.message, self.retry_after_s), self.__dict__


class UsageError(Exception):
    """The user's input or set-up is wrong; the text is one sentence that says what to do. Shown without a traceback."""


class OutageError(Exception):
    """Something that the run needs (database, storage, a lock) was unreachable for longer than the run waits.

    The text is a sentence for the user, shown without a traceback; it names no host, user or path of what was away.
    The set-up may be right: finished work is kept, and the same run continues later.
    """


class LostError(Exception):
    """Another worker has taken over what this one held, while this one slept or was cut off: it must not continue.

    Neither the clip nor the user is at fault: the worker that holds it now does the work.
    """


ENDS_THE_RUN = (UsageError, OutageError, LostError)  # no fault of one clip: the next one would fail in the same way

DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})  # of an OSError: no room for a file
