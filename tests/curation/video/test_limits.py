"""Files of a few kilobytes that would take gigabytes are refused before they do."""

from __future__ import annotations

import struct
import subprocess
import tracemalloc
import zlib
from pathlib import Path

import pytest

from curation.failures import ClipFailure, FailureCode
from curation.observe.frames import sample_frames
from curation.observe.observe import observe
from curation.records import ClipRef
from curation.settings import ObserveSettings, VideoLimits
from curation.video.container import container_format, refuse_tables
from curation.video.decode import decode
from curation.video.index import index_video, with_index
from curation.video.intake import strip
from tests.support.boxes import Box, Movie, _boxes
from tests.support.numbered import encode, ffmpeg, picture
from tests.support.peaks import peak_mb
from tests.support.scenes import Watcher

H264 = ("-c:v", "libx264", "-preset", "ultrafast", "-pix_fmt", "yuv420p", "-bf", "0")
IMPORTS = (
    "from pathlib import Path\nfrom curation.observe.observe import observe\nfrom curation.video.intake import verify\n"
    "from curation.failures import ClipFailure\n"
)
SMALL = VideoLimits(max_pixels=96 * 64)
LARGER = [picture(number, 640, 480) for number in range(4)]
PICTURES = [picture(number) for number in range(8)]


def refused(act) -> str:
    with pytest.raises(ClipFailure) as caught:
        act()
    assert caught.value.code is FailureCode.TOO_LARGE and "/" not in caught.value.message
    return caught.value.message


def huge_png(path: Path, side: int = 16000) -> Path:
    """One grey picture of side x side in a few hundred kilobytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packed = zlib.compressobj(1)
    rows = bytes(side + 1) * 100
    data = b"".join([*(packed.compress(rows) for _ in range(side // 100)), packed.flush()])
    head = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b""))
    return path


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi", ".ts", ".flv", ".mpg"])
@pytest.mark.parametrize("codec", ["h264", "mjpeg", "flv1"])
def test_a_picture_with_too_many_pixels_is_refused_in_every_container(tmp_path, suffix, codec):
    path = tmp_path / f"film{suffix}"
    options = {"h264": H264, "mjpeg": ("-c:v", "mjpeg"), "flv1": ("-c:v", "flv")}[codec]
    try:
        encode(path, LARGER, *options)
    except subprocess.CalledProcessError:
        pytest.skip("no such stream in this container")
    try:
        index_video(path)
    except ClipFailure:
        pytest.skip("not taken in this container")
    assert "6144 pixels" in refused(lambda: index_video(path, SMALL))
    assert len(index_video(path, VideoLimits(max_pixels=640 * 480)).times_s) == 4


@pytest.fixture(scope="module")
def bombs(tmp_path_factory) -> list[Path]:
    """Pictures of 16000 x 16000: as a film, as the cover of one, and as its larger track."""
    folder = tmp_path_factory.mktemp("bombs")
    png, film = huge_png(folder / "huge.png"), encode(folder / "film.mp4", PICTURES, *H264)
    for suffix in (".mkv", ".mp4"):
        ffmpeg("-r", "25", "-f", "image2", "-i", png, "-c", "copy", folder / f"alone{suffix}")
        both = ["-i", film, "-i", png, "-map", "0", "-map", "1", "-c", "copy"]
        ffmpeg(*both, folder / f"track{suffix}")
    ffmpeg(*both, "-disposition:v:1", "attached_pic", folder / "cover.mp4")
    return [folder / name for name in ("alone.mkv", "alone.mp4", "track.mkv", "track.mp4", "cover.mp4")]


def test_no_huge_picture_is_ever_decoded(bombs):
    script = (
        f"{IMPORTS}start()\nfor name in sys.argv[1:]:\n    try:\n        print(verify(Path(name)).frames)\n"
        "    except ClipFailure as error:\n        print(error.code)"
    )
    assert max(path.stat().st_size for path in bombs) < 2 << 20
    assert peak_mb(script, *bombs) < 100


def test_a_huge_cover_does_not_cost_the_film(bombs, tmp_path):
    index = index_video(bombs[-1])
    assert len(index.times_s) == len(PICTURES)
    clean = strip(index, container_format(bombs[-1]), tmp_path / "clean")
    assert len(index_video(clean).times_s) == len(PICTURES)


GROWING = {
    "h264": (*H264, "-x264-params", "repeat-headers=1"),
    "hevc": ("-c:v", "libx265", "-preset", "ultrafast", "-x265-params", "repeat-headers=1:log-level=error"),
    "vp9": ("-c:v", "libvpx-vp9", "-deadline", "realtime", "-cpu-used", "8", "-pix_fmt", "yuv420p"),
    "av1": ("-c:v", "libaom-av1", "-usage", "realtime", "-cpu-used", "8", "-pix_fmt", "yuv420p"),
    "mjpeg": ("-c:v", "mjpeg"),
}


def grown(folder: Path, codec: str, suffix: str) -> Path:
    """A stream whose picture becomes four times as large on the way."""
    import av

    path = folder / f"grown{suffix}"
    parts = [
        encode(folder / f"{n}.nut", pictures, *GROWING[codec]) for n, pictures in enumerate((PICTURES, 2 * LARGER))
    ]
    with av.open(str(path), "w") as target:
        stream, number = None, 0
        for part in parts:
            with av.open(str(part)) as source:
                stream = stream or target.add_stream_from_template(source.streams.video[0], opaque=True)
                for packet in source.demux(video=0):
                    if packet.size:
                        packet.stream = stream
                        packet.pts = packet.dts = number
                        packet.time_base = source.streams.video[0].average_rate ** -1
                        number += 1
                        target.mux(packet)
    return path


@pytest.mark.parametrize(
    ("codec", "suffix"),
    [("h264", ".mp4"), ("h264", ".ts"), ("hevc", ".mkv"), ("vp9", ".webm"), ("av1", ".mkv"),
     ("mjpeg", ".mkv")],
)  # fmt: skip
def test_a_picture_that_grows_on_the_way_is_refused_where_it_does(tmp_path, codec, suffix):
    path = grown(tmp_path, codec, suffix)

    def read(index):
        return [number for number, _ in decode(index, 0, len(index.times_s))]

    assert len(with_index(path, read)) == 16
    assert "6144 pixels" in refused(lambda: with_index(path, read, SMALL))
    assert not index_video(path).plain  # decord would know no limit


def test_too_many_frames_tracks_or_frames_a_second_are_refused(tmp_path):
    film = encode(tmp_path / "film.mp4", PICTURES, *H264)
    assert "more than 7 frames" in refused(lambda: index_video(film, VideoLimits(max_frames=7)))
    assert len(index_video(film, VideoLimits(max_frames=8)).times_s) == 8
    for suffix in (".mkv", ".ts", ".avi"):
        other = tmp_path / f"film{suffix}"
        ffmpeg("-i", film, "-c", "copy", other)
        assert "more than 7 frames" in refused(lambda other=other: index_video(other, VideoLimits(max_frames=7)))
        many = tmp_path / f"many{suffix}"
        ffmpeg("-i", film, *4 * ["-map", "0"], "-c", "copy", many)
        assert "more than 3 tracks" in refused(lambda many=many: index_video(many, VideoLimits(max_tracks=3)))
        assert "2 video tracks" in refused(lambda many=many: index_video(many, VideoLimits(max_pictures=2)))
    fast = encode(tmp_path / "fast.mp4", 130 * PICTURES, *H264, rate=1000)
    assert len(index_video(fast).times_s) == 1040
    assert "900 frames" in refused(lambda: index_video(fast, VideoLimits(max_fps=900)))


def test_a_clip_of_too_many_samples_is_refused(tmp_path):
    film = encode(tmp_path / "film.mp4", 4 * PICTURES, *H264)
    settings = ObserveSettings(limits=VideoLimits(max_samples=6))
    assert "7 samples" in refused(lambda: observe(ClipRef("local", "film"), film, settings, Watcher()))
    assert "7 samples" in refused(lambda: sample_frames(ClipRef("local", "film"), film, settings))
    assert len(sample_frames(ClipRef("local", "film", 0, 1_000_000), film, settings).jpeg) == 6


def table_bomb(film: Path, path: Path, kind: str, count: int = 40_000_000) -> Path:
    """An MP4 that declares `count` samples in no more bytes than the number takes."""
    movie = Movie(film)
    movie.write(path)
    if kind == "fragments":
        ffmpeg("-i", film, "-c", "copy", "-movflags", "frag_keyframe+empty_moov", path)
        run = struct.pack(">I4sII", 16, b"trun", 0, count)
        head = struct.pack(">I4sIII", 20, b"tfhd", 0x10, 1, 1)
        inner = struct.pack(">I4s", 8 + len(head) + len(run), b"traf") + head + run
        moof = struct.pack(">I4sI4sII", 8 + 16 + len(inner), b"moof", 16, b"mfhd", 0, 9) + inner
        path.write_bytes(path.read_bytes() + moof + struct.pack(">I4s", 8, b"mdat"))
        return path
    data = path.read_bytes()
    top = _boxes(data)
    (moov,) = (box for box in top if box.kind == b"moov")
    trak = moov.find(b"trak")
    table = trak.find(b"mdia", b"minf", b"stbl")
    if kind == "samples":
        table.put(b"stsz", struct.pack(">III", 0, 1, count))
        table.put(b"stsc", struct.pack(">IIIII", 0, 1, 1, count, 1))
        table.put(b"stco", struct.pack(">III", 0, 1, 48))
        table.put(b"stts", struct.pack(">IIII", 0, 1, count, 1))
    else:
        edit = struct.pack(">Iihh", 1000, 0, 1, 0)
        trak.put(b"edts", [Box(b"elst", struct.pack(">II", 0, count // 1000) + edit * (count // 1000))])
    path.write_bytes(b"".join(box.bytes() for box in top))
    return path


@pytest.mark.parametrize("kind", ["samples", "fragments", "edits"])
def test_samples_that_are_only_counted_are_refused_before_a_list_of_them_is_made(tmp_path, kind):
    limits = VideoLimits(max_frames=20_000)
    path = table_bomb(encode(tmp_path / "film.mp4", 300 * PICTURES, *H264), tmp_path / "bomb.mp4", kind)
    refused(lambda: index_video(path, limits))
    refused(lambda: container_format(path, limits))


def test_a_table_of_few_bytes_takes_no_memory(tmp_path):
    path = table_bomb(encode(tmp_path / "film.mp4", PICTURES, *H264), tmp_path / "bomb.mp4", "samples")
    script = f"{IMPORTS}start()\ntry:\n    verify(Path(sys.argv[1]))\nexcept ClipFailure:\n    pass"
    assert path.stat().st_size < 1 << 16
    assert peak_mb(script, path) < 60


def test_plain_sound_has_as_many_samples_as_it_likes(tmp_path):
    film, path = encode(tmp_path / "film.mp4", PICTURES, *H264), tmp_path / "sound.mov"
    ffmpeg("-i", film, "-f", "lavfi", "-i", "sine=d=1", "-c:v", "copy", "-c:a", "pcm_s16le", path)
    refuse_tables(path, VideoLimits(max_frames=100))


def box(kind: bytes, content: bytes = b"") -> bytes:
    return struct.pack(">I4s", 8 + len(content), kind) + content


def fragment(head: bytes, fields: bytes = b"", track: int = 1) -> bytes:
    """A fragment with one `trun` box of these bytes: flags and count, and what it says of each sample."""
    traf = box(b"tfhd", struct.pack(">III", 0x10, track, 1)) + box(b"trun", head + fields)
    return box(b"moof", box(b"mfhd", bytes(8)) + box(b"traf", traf)) + box(b"mdat")


def code_of(act) -> FailureCode:
    with pytest.raises(ClipFailure) as caught:
        act()
    return caught.value.code


@pytest.mark.parametrize("flags", [0xA05, 0xF05, 0x100, 0x804])
def test_a_fragment_that_counts_more_samples_than_it_lists_is_damaged(tmp_path, flags):
    film, path = encode(tmp_path / "film.mp4", PICTURES, *H264), tmp_path / "bomb.mp4"
    ffmpeg("-i", film, "-c", "copy", "-movflags", "frag_keyframe+empty_moov", path)
    path.write_bytes(path.read_bytes() + fragment(struct.pack(">II", flags, 0x5000000), bytes(64)))
    assert code_of(lambda: refuse_tables(path)) is FailureCode.CORRUPT


def test_every_sample_of_a_fragment_counts(tmp_path):
    film, path = encode(tmp_path / "film.mp4", PICTURES, *H264), tmp_path / "many.mp4"
    ffmpeg("-i", film, "-c", "copy", "-movflags", "frag_keyframe+empty_moov", path)
    refuse_tables(path, VideoLimits(max_frames=100))
    once = fragment(struct.pack(">II", 0x200, 40), bytes(160))
    path.write_bytes(path.read_bytes() + 2 * once + fragment(struct.pack(">II", 0x200, 40), bytes(160), track=2))
    refuse_tables(path, VideoLimits(max_frames=100))  # each track by itself
    path.write_bytes(path.read_bytes() + once)
    refused(lambda: refuse_tables(path, VideoLimits(max_frames=100)))


HIDDEN_FRAGMENTS = {
    "longer than what holds it": lambda moof: moof.replace(
        box(b"trun", bytes(8))[:8], struct.pack(">I4s", 999, b"trun")
    ),
    "longer than the file": lambda moof: struct.pack(">I", 9999) + moof[4:],
    "in a meta box": lambda moof: box(b"meta", bytes(4) + box(b"hdlr", bytes(24)) + moof),
    **{
        kind: lambda moof, kind=kind: box(kind.encode(), moof)
        for kind in ("udta", "dinf", "sinf", "tref", "mvex", "wave")
    },
}
HIDDEN_HEADERS = {
    "hoov": (b"moov", b"hoov"),
    "free": (b"moov", b"free"),
    "udta": (b"stbl", b"udta"),
    "dinf": (b"minf", b"dinf"),
}


@pytest.mark.parametrize("how", HIDDEN_FRAGMENTS)
def test_a_fragment_is_counted_wherever_ffmpeg_looks_for_it(tmp_path, how):
    film, path = encode(tmp_path / "film.mp4", PICTURES, *H264), tmp_path / "bomb.mp4"
    ffmpeg("-i", film, "-c", "copy", "-movflags", "frag_keyframe+empty_moov", path)
    path.write_bytes(path.read_bytes() + HIDDEN_FRAGMENTS[how](fragment(struct.pack(">II", 0, 3_000_000))))
    refused(lambda: refuse_tables(path))


@pytest.mark.parametrize("how", [*HIDDEN_HEADERS, "longer than the file"])
def test_a_table_is_counted_wherever_ffmpeg_looks_for_it(tmp_path, how):
    path = table_bomb(encode(tmp_path / "film.mp4", PICTURES, *H264), tmp_path / "bomb.mp4", "samples")
    data = path.read_bytes()
    if how in HIDDEN_HEADERS:
        path.write_bytes(data.replace(*HIDDEN_HEADERS[how]))
    else:
        place = data.index(b"moov")
        path.write_bytes(data[: place - 4] + struct.pack(">I", 1 << 30) + data[place:])
    refused(lambda: refuse_tables(path))


def test_a_table_is_counted_in_the_description_of_the_samples_too(tmp_path):
    path = table_bomb(encode(tmp_path / "film.mp4", PICTURES, *H264), tmp_path / "bomb.mp4", "samples")
    top = _boxes(path.read_bytes())
    (moov,) = (each for each in top if each.kind == b"moov")
    table = moov.find(b"trak", b"mdia", b"minf", b"stbl")
    stsz, stsd = table.find(b"stsz").content, table.find(b"stsd").content
    size = 8 + len(stsz) + struct.unpack(">I", stsd[8:12])[0]
    table.put(b"stsz", None)
    table.put(b"stsd", stsd[:8] + struct.pack(">I", size) + stsd[12:] + box(b"stsz", stsz))
    path.write_bytes(b"".join(each.bytes() for each in top))
    refused(lambda: refuse_tables(path))


def test_boxes_in_boxes_without_end_are_damaged(tmp_path):
    path, data = tmp_path / "deep.mp4", b""
    for _ in range(3000):
        data = box(b"moov", data)
    path.write_bytes(box(b"ftyp", b"isom" + bytes(4)) + data)
    assert code_of(lambda: index_video(path)) is code_of(lambda: container_format(path)) is FailureCode.CORRUPT


@pytest.mark.parametrize("holder", [b"moov", None])
def test_boxes_without_end_are_refused(tmp_path, monkeypatch, holder):
    film = encode(tmp_path / "film.mp4", PICTURES, *H264)
    path, many = tmp_path / "many.mp4", 10_000 * box(b"free")
    path.write_bytes(film.read_bytes() + (many if holder is None else box(holder, many)))
    assert container_format(path).startswith("mov")
    monkeypatch.setattr("curation.video.container.MOST_BOXES", 9000)
    assert "9000 boxes" in refused(lambda: index_video(path))
    assert "9000 boxes" in refused(lambda: container_format(path))


def test_tracks_without_end_are_refused_before_the_file_is_opened(tmp_path):
    film = encode(tmp_path / "film.mp4", PICTURES, *H264)
    path = tmp_path / "many.mp4"
    path.write_bytes(film.read_bytes() + box(b"moov", 65 * box(b"trak")))
    assert "64 tracks" in refused(lambda: refuse_tables(path))


def test_a_compressed_header_is_refused_unread(tmp_path):
    path = encode(tmp_path / "film.mp4", PICTURES, *H264)
    data = path.read_bytes()
    place = data.index(b"moov") - 4
    packed = zlib.compress(data[place:])
    parts = [Box(b"dcom", b"zlib"), Box(b"cmvd", struct.pack(">I", len(data) - place) + packed)]
    path.write_bytes(data[:place] + Box(b"moov", [Box(b"cmov", parts)]).bytes())
    with pytest.raises(ClipFailure) as caught:
        index_video(path)
    assert caught.value.code is FailureCode.WRONG_KIND


def fast_film(path: Path, rate: int, seconds: int, size: str = "160x90") -> Path:
    source = f"testsrc2=s={size}:r={rate}:d={seconds}"
    ffmpeg("-f", "lavfi", "-i", source, "-c:v", "libx264", "-preset", "ultrafast", path)
    return path


def test_observing_takes_no_more_memory_for_more_frames(tmp_path, monkeypatch):
    """A batch that never fills, no sample that ends the waiting. Windows are in time, so only the rate counts."""
    monkeypatch.setattr("curation.observe.observe._WAITING", 16, raising=False)
    settings = ObserveSettings(sample_fps=0.1)
    films = [fast_film(tmp_path / f"{seconds}.mp4", 24, seconds) for seconds in (2, 8)]
    peaks = []
    for path in (films[0], *films):  # first of all what is imported and kept for ever
        index_video(path)
        tracemalloc.start()
        try:
            observe(ClipRef("local", "film"), path, settings, Watcher(64))
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    assert peaks[2] < 1.1 * peaks[1], peaks


@pytest.mark.slow
@pytest.mark.parametrize(("rate", "seconds", "size", "most_mb"), [(960, 20, "160x90", 700), (24, 1, "7680x4320", 1800)])
def test_what_observing_takes(tmp_path, rate, seconds, size, most_mb):
    """Half a gigabyte of it is the tracker's library."""
    script = (
        f"{IMPORTS}sys.path.insert(0, sys.argv[2])\nfrom tests.support.scenes import Watcher\n"
        "from curation.records import ClipRef\nfrom curation.settings import ObserveSettings\nstart()\n"
        "observe(ClipRef('local', 'x'), Path(sys.argv[1]), ObserveSettings(), Watcher(16))"
    )
    assert peak_mb(script, fast_film(tmp_path / "film.mp4", rate, seconds, size), Path(__file__).parents[3]) < most_mb
