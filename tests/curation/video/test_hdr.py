"""HDR video as SDR: against ffmpeg's zscale, against BT.2408's own figures, and the same pixels for everybody."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from curation.observe.frames import sample_frames
from curation.observe.observe import observe, prescreen
from curation.people.detector import Detections
from curation.records import ClipRef
from curation.settings import ObserveSettings
from curation.video.decode import decode, resize, thumbnail, to_rgb
from curation.video.ffmpeg import ffmpeg_exe
from curation.video.hdr import OPERATOR, to_sdr, transfer_of
from curation.video.index import index_video
from tests.support.examples import examples
from tests.support.numbered import encode, ffmpeg, picture
from tests.support.scenes import Watcher

WIDTH, HEIGHT = 192, 112
REF, SETTINGS = ClipRef("local", "clip"), ObserveSettings()
PQ, HLG = "smpte2084", "arib-std-b67"
_HEVC = ("-c:v", "libx265", "-preset", "ultrafast", "-x265-params", "lossless=1:log-level=error")
_H264 = ("-c:v", "libx264", "-preset", "ultrafast", "-qp", "0")
_VP9 = ("-c:v", "libvpx-vp9", "-deadline", "realtime", "-cpu-used", "8")
_SVT = ("-c:v", "libsvtav1", "-preset", "10", "-svtav1-params", "lp=1")
# BT.2087's matrix from BT.709 to BT.2020.
_TO_2020 = np.array([[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]])


def ramps() -> NDArray[np.float64]:
    """Every hue from black to full signal; smooth from hue to hue, as chroma is stored at half the size."""
    hues = np.array([(1, 1, 1), (1, 0, 0), (1, 1, 0), (0, 1, 0), (0, 1, 1), (0, 0, 1), (1, 0, 1), (1, 0.5, 0.3)])
    rows = cv2.resize(hues, (3, HEIGHT), interpolation=cv2.INTER_LINEAR)
    return rows[:, None] * np.linspace(0, 1, WIDTH)[:, None]


def random_picture(seed: int) -> NDArray[np.float64]:
    blobs = cv2.GaussianBlur(np.random.default_rng(seed).random((HEIGHT, WIDTH, 3)), (0, 0), 5)
    return (blobs - blobs.min()) / (blobs.max() - blobs.min())


def hdr_video(
    path: Path, signals: Sequence[NDArray[np.float64]], transfer: str, *codec: str,
    primaries: str = "bt2020", matrix: str = "bt2020nc", range_: str = "limited", pixels: str = "yuv420p10le",
) -> Path:  # fmt: skip
    """Encode pictures of R'G'B' signal, 0 to 1; zscale makes YCbCr of it and changes nothing else."""
    height, width = signals[0].shape[:2]
    tags = f"setparams=color_primaries={primaries}:color_trc={transfer}"
    chain = f"{tags}:colorspace=gbr:range=pc,format=gbrp16le,zscale=m={matrix}:r={range_},format={pixels}"
    chain += f",{tags}:colorspace={matrix}:range={range_}:chroma_location=left"
    raw = ["-f", "rawvideo", "-pix_fmt", "rgb48le", "-s", f"{width}x{height}", "-r", "30", "-i", "-"]
    feed = b"".join(np.round(signal * 65535).astype("<u2").tobytes() for signal in signals)
    ffmpeg(*raw, "-vf", chain, *(codec or _HEVC), path, feed=feed)
    return path


def by_zscale(path: Path) -> NDArray[np.uint8]:
    """(n, H, W, 3) RGB: light with 1 at 203 cd/m2 (HLG through its OOTF), BT.709, BT.1886, clipped."""
    chain = "zscale=t=709:p=709:npl=203:m=gbr:r=full:agamma=0,format=gbrp"
    command = [ffmpeg_exe(), "-nostdin", "-loglevel", "error", "-i", path, "-vf", chain]
    done = subprocess.run([*command, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"], capture_output=True, check=True)
    return np.frombuffer(done.stdout, np.uint8).reshape(-1, HEIGHT, WIDTH, 3)


def frames_of(path: Path) -> list[av.VideoFrame]:
    index = index_video(path)
    return [frame for _, frame in decode(index, 0, len(index.times_s))]


def pq_signal(nits: NDArray[np.float64]) -> NDArray[np.float64]:
    """ST 2084 from light on the screen to signal."""
    light = (np.asarray(nits) / 10000) ** 0.1593017578125
    return ((0.8359375 + 18.8515625 * light) / (1 + 18.6875 * light)) ** 78.84375


def hlg_signal(nits: NDArray[np.float64]) -> NDArray[np.float64]:
    """BT.2100 from light on a screen of 1000 cd/m2, (..., 3) BT.2020, to signal."""
    screen = np.asarray(nits) / 1000
    luminance = screen @ np.array([0.2627, 0.6780, 0.0593])
    scene = screen * np.maximum(luminance, 1e-12)[..., None] ** (1 / 1.2 - 1)
    curve = 0.17883277 * np.log(np.maximum(12 * scene - 0.28466892, 1e-9)) + 0.55991073
    return np.where(scene <= 1 / 12, np.sqrt(3 * scene), curve)


SIGNALS = {"pq": pq_signal, "hlg": hlg_signal}
NAMES = {"pq": PQ, "hlg": HLG}


def rgb_frame(signal: NDArray[np.float64], transfer: str, primaries: int = 9) -> av.VideoFrame:
    """A frame without chroma subsampling and almost without rounding."""
    codes = np.ascontiguousarray(np.round(signal * 65535).astype(np.uint16))
    frame = av.VideoFrame.from_ndarray(codes, format="gbrp16le")
    frame.color_trc, frame.color_primaries, frame.colorspace = {"pq": 16, "hlg": 18}[transfer], primaries, 0
    return frame


@pytest.mark.parametrize(
    ("transfer", "name", "codec", "tags"),
    [
        (PQ, "a.mp4", _HEVC, {}),
        (HLG, "a.mp4", _HEVC, {}),
        (PQ, "a.mp4", _HEVC, {"range_": "full", "pixels": "yuv444p10le"}),
        (HLG, "a.mp4", _HEVC, {"range_": "full"}),
        (PQ, "a.mp4", _HEVC, {"pixels": "yuv444p12le"}),
        (PQ, "a.mp4", _HEVC, {"primaries": "bt709", "matrix": "bt709"}),
        (HLG, "a.mp4", _HEVC, {"primaries": "bt709", "matrix": "bt709", "range_": "full"}),
        (HLG, "a.mp4", _HEVC, {"primaries": "smpte432", "matrix": "bt709"}),
        (PQ, "a.mp4", _H264, {"pixels": "yuv420p"}),
        (HLG, "a.mp4", _H264, {"pixels": "yuv420p", "range_": "full"}),
        (PQ, "a.webm", (*_VP9, "-profile:v", "2"), {}),
        (HLG, "a.mp4", _SVT, {}),
    ],
)
def test_the_pixels_are_those_of_zscale(tmp_path, transfer, name, codec, tags):
    """In the mean within 0.1 grey levels, and at most one value in a thousand by more than 1: rounding, no more."""
    path = hdr_video(tmp_path / name, [ramps(), random_picture(1), random_picture(2)], transfer, *codec, **tags)
    frames = frames_of(path)
    assert {transfer_of(frame) for frame in frames} == {"pq" if transfer == PQ else "hlg"}
    for frame, expected in zip(frames, by_zscale(path), strict=True):
        off = np.abs(to_rgb(frame).astype(int) - expected)
        assert off.mean() < 0.1
        assert np.quantile(off, 0.999) <= 1


@pytest.mark.parametrize("transfer", ["pq", "hlg"])
@pytest.mark.parametrize(("nits", "code"), [(0, 0), (26, 108), (203, 255), (600, 255)])
def test_white_is_203_nits_and_a_grey_card_is_where_sdr_has_it(tmp_path, transfer, nits, code):
    signal = SIGNALS[transfer](np.full((HEIGHT, WIDTH, 3), float(nits)))
    path = hdr_video(tmp_path / "flat.mp4", [signal] * 6, NAMES[transfer])
    index = index_video(path)
    for frame in frames_of(path):
        assert np.abs(to_rgb(frame).astype(int) - code).max() <= 1
        assert np.abs(thumbnail(frame, index, 64, 37).astype(int) - code).max() <= 1


@given(rgb=arrays(np.uint8, (4, 6, 3)), transfer=st.sampled_from(["pq", "hlg"]))
def test_sdr_video_that_was_put_into_hdr_comes_back_with_its_codes(rgb, transfer):
    nits = 203 * (rgb / 255) ** 2.4 @ _TO_2020.T
    back = to_sdr(rgb_frame(SIGNALS[transfer](nits), transfer))
    # Near black in a saturated colour, the four digits of the matrix show.
    assert np.abs(np.maximum(back, 10).astype(int) - np.maximum(rgb, 10)).max() <= 1


@given(
    signal=arrays(np.float64, (3, 5, 3), elements=st.floats(0, 1)),
    more=arrays(np.float64, (3, 5), elements=st.floats(0, 1)),
    channel=st.integers(0, 2),
    transfer=st.sampled_from(["pq", "hlg"]),
    primaries=st.sampled_from([1, 2, 9, 12, 6]),
)
def test_more_signal_never_gives_less_light(signal, more, channel, transfer, primaries):
    before = to_sdr(rgb_frame(signal, transfer, primaries))
    raised = signal.copy()
    raised[..., channel] = np.maximum(raised[..., channel], more)
    after = to_sdr(rgb_frame(raised, transfer, primaries))
    assert (after[..., channel] >= before[..., channel]).all()


@pytest.mark.parametrize("transfer", ["pq", "hlg"])
def test_a_grey_ramp_stays_grey_and_rises(transfer):
    ramp = np.repeat(np.linspace(0, 1, 4096)[None, :, None], 3, 2)
    grey = to_sdr(rgb_frame(ramp, transfer)).astype(int)[0]
    assert (np.diff(grey, axis=0) >= 0).all()
    assert np.ptp(grey, axis=1).max() <= 1
    assert (grey[0] == 0).all() and (grey[-1] == 255).all() and len(np.unique(grey[:, 0])) == 256


@settings(max_examples=examples(20))
@given(seed=st.integers(0, 1000), transfer=st.sampled_from(["pq", "hlg"]))
def test_a_pixel_does_not_depend_on_any_other(seed, transfer):
    rng = np.random.default_rng(seed)
    signal = rng.random((130, 9, 3)) * rng.random()
    order = rng.permutation(130 * 9)
    moved = signal.reshape(-1, 3)[order].reshape(signal.shape)
    plain, shuffled = to_sdr(rgb_frame(signal, transfer)), to_sdr(rgb_frame(moved, transfer))
    assert np.array_equal(plain.reshape(-1, 3)[order].reshape(plain.shape), shuffled)


@pytest.mark.parametrize("name", ["plain.mp4", "ten-bit.mp4", "colours.mp4", "odd.mp4"])
def test_sdr_video_is_read_as_ever(video, name):
    index = index_video(video(name).path)
    for _, frame in decode(index, 0, 3):
        assert transfer_of(frame) == "sdr"
        assert np.array_equal(to_rgb(frame), frame.to_ndarray(format="rgb24", threads=1))
        small = frame.to_ndarray(width=41, height=29, format="bgr24", interpolation="AREA", threads=1)
        assert np.array_equal(thumbnail(frame, index, 41, 29), small)


def test_what_the_stream_leaves_open_is_as_bt2100_has_it(tmp_path):
    """A PQ stream without primaries and matrix: both are BT.2020's."""
    told = hdr_video(tmp_path / "told.mp4", [random_picture(3)], PQ)
    (frame,) = frames_of(told)
    expected = to_sdr(frame)
    frame.color_primaries = frame.colorspace = 2
    assert np.array_equal(to_sdr(frame), expected)


def test_the_transfer_is_the_one_that_is_meant(tmp_path):
    """HLG may be announced beside a transfer for old players; BT.2020's own transfer is SDR."""
    frames = [picture(n) for n in range(3)]
    tags = "transfer=bt2020-10:colorprim=bt2020:colormatrix=bt2020nc"
    for name, more, meant in (("hlg", ":alternative-transfer=arib-std-b67", "hlg"), ("sdr", "", "sdr")):
        path = tmp_path / f"{name}.mp4"
        encode(path, frames, "-c:v", "libx264", "-pix_fmt", "yuv420p", "-x264-params", tags + more)
        assert {transfer_of(frame) for frame in frames_of(path)} == {meant}


class _Camera(Watcher):
    """A watcher that keeps what it is shown."""

    def __init__(self) -> None:
        super().__init__(batch=4)
        self.shown: list[NDArray[np.uint8]] = []

    def __call__(self, images: Sequence[NDArray[np.uint8]]) -> list[Detections]:
        self.shown += [image.copy() for image in images]
        return super().__call__(images)


@pytest.mark.parametrize(("transfer", "bits"), [("pq", 10), ("hlg", 10), ("pq", 8)])
def test_detector_training_frames_and_thumbnails_see_the_same(tmp_path, transfer, bits):
    """A room of 0 to 150 nits, a window of 500 in it, and a white card: what each of them sees of the three."""
    nits = np.repeat(np.linspace(0, 150, WIDTH)[None, :, None], HEIGHT, 0).repeat(3, 2)
    nits[:40, :60], nits[60:, 100:160] = 500.0, 203.0
    signal = SIGNALS[transfer](nits)
    coded = {"pixels": "yuv420p"} if bits == 8 else {}  # which decord would open
    path = hdr_video(tmp_path / "room.mp4", [signal] * 30, NAMES[transfer], *(_H264 if bits == 8 else ()), **coded)
    camera = _Camera()
    measured, frames = observe(REF, path, SETTINGS, camera)
    assert (measured.transfer, measured.provenance["hdr"]) == (transfer, OPERATOR)
    assert sample_frames(REF, path, SETTINGS).jpeg == frames.jpeg

    index, expected = index_video(path), 255 * (nits / 203).clip(0, 1) ** (1 / 2.4)
    jpeg = [cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)[..., ::-1] for data in frames.jpeg]
    (frame, *_) = frames_of(path)
    for image in (*camera.shown, *jpeg, thumbnail(frame, index, 96, 56)):
        inside = cv2.resize(image, (WIDTH, HEIGHT), interpolation=cv2.INTER_AREA).astype(float) - expected
        assert np.abs(inside).mean() < 1.5
        assert np.abs(inside[70:100, 110:150]).max() <= 2 and np.abs(inside[10:30, 10:50]).max() <= 2
    assert np.array_equal(camera.shown[0], resize(to_rgb(frame), index, *camera.shown[0].shape[1::-1]))
    assert measured.luma == pytest.approx(expected.mean(), abs=2)


def test_one_hdr_frame_makes_a_clip_hdr(tmp_path):
    """A stream may change its transfer on the way, where two recordings were joined."""
    options = ("-c:v", "libx264", "-pix_fmt", "yuv420p", "-g", "5", "-bf", "0", "-x264-params")
    frames, parts = [picture(n) for n in range(30)], []
    for number, tags in enumerate(("transfer=bt709", "transfer=smpte2084:colorprim=bt2020:colormatrix=bt2020nc")):
        part = tmp_path / f"{number}.ts"
        encode(part, frames, *options, f"{tags}:scenecut=0", "-output_ts_offset", str(number))
        parts.append(part.read_bytes())
    path = tmp_path / "joined.ts"
    path.write_bytes(b"".join(parts))
    assert [transfer_of(frame) for frame in frames_of(path)] == ["sdr"] * 30 + ["pq"] * 30
    assert observe(REF, path, SETTINGS, Watcher())[0].transfer == "pq"
    found = prescreen(REF, path, SETTINGS, Watcher())
    assert found is not None and found.transfer == "pq"
    assert observe(ClipRef("local", "clip", 0, 800_000), path, SETTINGS, Watcher())[0].transfer == "sdr"
