"""Which frames of a clip are sampled for training and for the detector. Times in, indices out; reads no file."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# Recorded in the provenance of measurements and shards. Raise the number when the same times no longer give the same
# frames: clips that another sampler measured are then measured again.
SAMPLER = "nearest/2"
# Two frames are equally near to a tick if their distances differ by at most 1.5 ms. A microsecond more, because at
# 29.97 fps some differ by exactly 1.5 ms, and the last bit of a float must not choose between frames.
TIE_S = 1.501e-3


def sample_indices(times_s: NDArray[np.float64], fps: float) -> NDArray[np.intp]:
    """Indices of the frames nearest to the ticks k / fps from the first frame on; each once, in order.

    times_s: (n,) presentation times of a clip's frames, in seconds, not decreasing. Of two equally near frames the
    earlier one is chosen. The ticks end where one more frame, at the median distance after the last, would be nearer:
    with a constant frame rate, a clip has the samples that the same frames have in a longer clip.
    """
    if not len(times_s):
        return np.zeros(0, np.intp)
    since = times_s - times_s[0]
    gaps = np.diff(since)
    usual = np.median(gaps) if len(gaps) else 0.0
    # A frame has the ticks up to halfway to the next frame. They are counted, not listed: a pause may have any length.
    ticks = np.floor((since + np.append(gaps, usual) / 2 + TIE_S / 2) * fps)
    return np.flatnonzero(np.diff(ticks, prepend=-1.0) > 0)
