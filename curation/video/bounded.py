"""Opens files and decodes their packets within limits that no header can raise."""

from __future__ import annotations

import contextlib
import errno
from pathlib import Path
from typing import Any

import av
from av.codec.context import Flags as CodecFlags
from av.container import Flags
from av.error import FFmpegError

from curation.failures import ClipFailure, FailureCode
from curation.settings import VideoLimits

# Audio containers are included so that a song is reported to have no video, not to be damaged.
READ_ONLY = {
    "protocol_whitelist": "file",
    "format_whitelist": "mov,matroska,mpegts,mpeg,avi,flv,asf,ogg,mp3,wav,flac,aac",
}
# The same without decoders: otherwise opening a file decodes some frames of every track.
UNDECODED = READ_ONLY | {"codec_whitelist": "none"}


def decoder_pixels(limits: VideoLimits) -> int:
    """FFmpeg's max_pixels, which stops a decoder before it allocates a frame; some decoders count a margin too."""
    return limits.max_pixels + limits.max_pixels // 4 + (1 << 16)


def too_many_frames(limits: VideoLimits) -> ClipFailure:
    """The failure of a file with more frames than `limits` allows."""
    return ClipFailure(FailureCode.TOO_LARGE, f"a track has more than {limits.max_frames} frames or samples")


def too_many_tracks(limits: VideoLimits) -> ClipFailure:
    """The failure of a file with more tracks than `limits` allows."""
    text = f"the file has more than {limits.max_tracks} tracks or {limits.max_pictures} video tracks"
    return ClipFailure(FailureCode.TOO_LARGE, text)


def too_many_pixels(limits: VideoLimits) -> ClipFailure:
    """The failure of a file with larger frames than `limits` allows."""
    return ClipFailure(FailureCode.TOO_LARGE, f"a frame of the video has more than {limits.max_pixels} pixels")


def open_video(path: Path, limits: VideoLimits) -> Any:
    """An av.InputContainer that opens only this file, with no frame and no number of tracks above `limits`."""
    # metadata_errors: a title in a broken encoding is no reason to refuse a video.
    options = READ_ONLY | {"max_pixels": str(decoder_pixels(limits)), "max_streams": str(limits.max_tracks + 1)}
    container: Any = av.open(str(path), mode="r", options=options, metadata_errors="ignore")
    container.flags &= ~Flags.gen_pts.value  # PyAV lets FFmpeg invent timestamps; the ffmpeg program does not
    return container


def single_threaded(stream: Any, limits: VideoLimits) -> Any:
    """The stream, with a decoder that uses one thread and checks `limits` before it allocates a frame."""
    stream.codec_context.options = {"max_pixels": str(decoder_pixels(limits))}
    stream.codec_context.flags |= CodecFlags.unaligned.value  # a cropped frame starts where it states, as in ffmpeg
    # One process per core: threads inside a decoder take the same CPU time and only blur the accounting.
    stream.codec_context.thread_count = 1
    stream.codec_context.thread_type = "NONE"
    return stream


def damaged(number: int) -> ClipFailure:
    """The failure of a frame that cannot be decoded."""
    return ClipFailure(FailureCode.CORRUPT, f"frame {number} cannot be decoded")


def decode_packet(packet: Any, limits: VideoLimits) -> list[Any] | None:
    """The frames that a packet completes; None if it cannot be decoded. Raises ClipFailure(TOO_LARGE)."""
    try:
        frames = packet.decode()
    except FFmpegError as error:
        # Decoders report it in different ways: they keep the size, or clear it and set an error; dav1d only the error.
        codec = packet.stream.codec_context
        refused = (codec.width == 0 and error.errno == errno.EINVAL) or error.errno == errno.ERANGE
        if refused or codec.width * codec.height > limits.max_pixels:
            raise too_many_pixels(limits) from error
        return None
    if any(frame.width * frame.height > limits.max_pixels for frame in frames):
        raise too_many_pixels(limits)
    return frames


def decode_alone(codec: Any, packet: Any, limits: VideoLimits) -> list[Any]:
    """The frame of one packet; the decoder is flushed, because it would wait for packets that never come."""
    codec.flush_buffers()
    frames = decode_packet(packet, limits) or []
    with contextlib.suppress(FFmpegError):
        frames += codec.decode(None)
    codec.flush_buffers()
    return [frame for frame in frames if not frame.is_corrupt][:1]
