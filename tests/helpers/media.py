"""Makes the video files and archives that the data tests read: real H.264 with known content."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from dalle2_video.data.atomic import write_json
from dalle2_video.data.config import StoreSettings
from dalle2_video.data.sources.captions import to_line
from dalle2_video.data.store.shard import FORMAT, ShardWriter, shard_paths
from dalle2_video.data.store.texts import write_texts

# Kr, Kb of ITU-R BT.601 and BT.709, and the AVColorSpace number that tags them.
MATRICES = {"bt601": (0.299, 0.114, 6), "bt709": (0.2126, 0.0722, 1)}


def rgb_to_yuv(rgb: np.ndarray, matrix: str, full: bool) -> np.ndarray:
    """RGB 0..255 (..., 3) -> 8-bit codes of Y, Cb, Cr, float64, by the standard's equations."""
    kr, kb, _ = MATRICES[matrix]
    red, green, blue = np.moveaxis(rgb.astype(np.float64) / 255, -1, 0)
    y = kr * red + (1 - kr - kb) * green + kb * blue
    cb, cr = (blue - y) / (2 * (1 - kb)), (red - y) / (2 * (1 - kr))
    if full:
        return np.stack([255 * y, 255 * cb + 128, 255 * cr + 128], -1)
    return np.stack([219 * y + 16, 224 * cb + 128, 224 * cr + 128], -1)


def write_video(
    images: np.ndarray,
    timestamps: Sequence[float] | None = None,
    fps: float = 10.0,
    form: str = "mp4",
    matrix: str = "bt709",
    full: bool = False,
    tagged: bool = True,
    pix_fmt: str = "yuv444p",
    aspect: Fraction | None = None,
    faststart: bool = False,
    codec: str = "libx264",
    codec_options: Mapping[str, str] | None = None,
) -> bytes:
    """Lossless video (H.264) of RGB (N, H, W, 3), shown at `timestamps` seconds (default k / fps).

    The YUV planes are computed here, not by the library under test. pix_fmt: yuv444p, or yuv420p
    (the chroma of each 2 x 2 block is its mean).
    """
    timestamps = [k / fps for k in range(len(images))] if timestamps is None else list(timestamps)
    file = io.BytesIO()
    with av.open(file, "w", format=form) as container:
        stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width, stream.pix_fmt = *images.shape[1:3], pix_fmt
        lossless = {"qp": "0", "preset": "ultrafast"} if codec == "libx264" else {}
        stream.options = {**lossless, **(codec_options or {})}
        context = stream.codec_context
        context.time_base = stream.time_base = Fraction(1, 1000)
        if aspect is not None:
            context.sample_aspect_ratio = aspect
        if tagged:
            context.colorspace = MATRICES[matrix][2]
            context.color_range = 2 if full else 1
        for image, time in zip(images, timestamps, strict=True):
            planes = np.moveaxis(rgb_to_yuv(image, matrix, full), -1, 0)
            chroma = list(planes[1:])
            if pix_fmt == "yuv420p":
                half = (images.shape[1] // 2, 2, images.shape[2] // 2, 2)
                chroma = [plane.reshape(half).mean((1, 3)) for plane in chroma]
            frame = av.VideoFrame(images.shape[2], images.shape[1], pix_fmt)
            for plane, values in zip(frame.planes, [planes[0], *chroma], strict=True):
                padded = np.zeros((plane.height, plane.line_size), np.uint8)
                padded[: values.shape[0], : values.shape[1]] = values.round().clip(0, 255)
                plane.update(padded)
            frame.pts, frame.time_base = round(time * 1000), Fraction(1, 1000)
            if tagged:
                frame.colorspace, frame.color_range = MATRICES[matrix][2], 2 if full else 1
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    data = file.getvalue()
    return index_first(data) if faststart else data


def write_codes(
    images: Sequence[np.ndarray],
    pix_fmt: str,
    codec: str,
    form: str = "mp4",
    tags: Mapping[str, int] | None = None,
    options: Mapping[str, str] | None = None,
    rate: int = 10,
) -> bytes:
    """A video of given plane codes (H, W, planes); the chroma of a 4:2:0 format takes every second
    one. tags: of the codec context and the frames, such as color_trc.
    """
    file = io.BytesIO()
    with av.open(file, "w", format=form) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = images[0].shape[:2]
        stream.pix_fmt, stream.options = pix_fmt, dict(options or {})
        for name, value in (tags or {}).items():
            setattr(stream.codec_context, name, value)
        for image in images:
            container.mux(stream.encode(frame_of(image, pix_fmt, tags or {})))
        container.mux(stream.encode())
    return file.getvalue()


def frame_of(image: np.ndarray, pix_fmt: str, tags: Mapping[str, int]) -> av.VideoFrame:
    """A frame with the codes (H, W, planes)."""
    frame = av.VideoFrame(image.shape[1], image.shape[0], pix_fmt)
    dtype = np.uint16 if "10le" in pix_fmt else np.uint8
    for number, plane in enumerate(frame.planes):
        step = image.shape[1] // plane.width
        padded = np.zeros((plane.height, plane.line_size // dtype().itemsize), dtype)
        padded[:, : plane.width] = image[::step, ::step, number]
        plane.update(padded)
    for name, value in tags.items():
        setattr(frame, name, value)
    return frame


def index_first(data: bytes) -> bytes:
    """The same mp4 with its index before the frames, so that a cut leaves it readable in part."""
    boxes, place = [], 0
    while place < len(data):
        size, kind = struct.unpack(">I4s", data[place : place + 8])
        boxes.append((kind, data[place : place + size]))
        place += size
    moov = bytearray(next(box for kind, box in boxes if kind == b"moov"))
    at = moov.index(b"stco") + 8  # after the type: version and flags, then the count
    (count,) = struct.unpack(">I", moov[at : at + 4])
    for k in range(count):
        spot = slice(at + 4 + 4 * k, at + 8 + 4 * k)
        moov[spot] = struct.pack(">I", struct.unpack(">I", moov[spot])[0] + len(moov))
    rest = [box for kind, box in boxes if kind not in (b"moov", b"ftyp")]
    return b"".join([boxes[0][1], bytes(moov), *rest])


def set_display_matrix(data: bytes, a: int, b: int, c: int, d: int) -> bytes:
    """The same mp4 with the track's display matrix set: x' = a x + c y, y' = b x + d y."""
    changed = bytearray(data)
    at = changed.index(b"tkhd") + 4 + 40  # version 0: the matrix starts 40 bytes into the box
    values = (a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    changed[at : at + 36] = struct.pack(">9i", *values)
    return bytes(changed)


def grey_steps(count: int, height: int = 32, width: int = 32, step: int = 8) -> np.ndarray:
    """RGB (count, H, W, 3): frame k is the plain grey k * step, so a frame tells its number."""
    level = np.arange(count, dtype=np.uint8) * step
    return np.broadcast_to(level[:, None, None, None], (count, height, width, 3)).copy()


def numbers(frames: np.ndarray, step: int = 8) -> list[int]:
    """The frame numbers that `grey_steps` wrote into the pixels."""
    return np.rint(frames.mean((1, 2, 3)) / step).astype(int).tolist()


PATCHES = np.array(
    [
        [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]],
        [[0, 255, 255], [255, 0, 255], [255, 255, 0], [0, 0, 0]],
        [[200, 120, 90], [90, 60, 50], [30, 40, 200], [128, 128, 128]],
        [[250, 220, 200], [10, 80, 20], [70, 10, 90], [60, 60, 60]],
    ],
    np.uint8,
)


def patches(height: int = 64) -> np.ndarray:
    """Two frames of 4 x 4 plain patches."""
    return np.kron(PATCHES, np.ones((height // 4, height // 4, 1), np.uint8))[None].repeat(2, 0)


def patch_colours(frame: np.ndarray) -> np.ndarray:
    """(4, 4, 3) mean of the inner half of each patch: chroma is blurred at the borders."""
    step = frame.shape[0] // 4
    tiles = frame.reshape(4, step, 4, step, 3).transpose(0, 2, 1, 3, 4)
    inner = slice(step // 4, step - step // 4)
    return tiles[:, :, inner, inner].mean((2, 3))


def clip_id(person: int, number: int = 0) -> str:
    """{11 characters}_{n}_{m}, with '_' and '-' in the id as in real ones."""
    return f"a_{person:04d}-b_cd_{number}_0"


def captions(name: str) -> dict[str, bytes]:
    """One short file per category, each with two lines."""
    return {
        "action_dur": f"{name} nods.\nHe nods, then talks.\n".encode(),
        "emotion": b"She is happy.\nA smile.\n",
        "face40_details_new": b"Brown hair.\nA woman with brown hair.\n",
        "light_colot_temp": b"Warm light.\n",
        "light_dir": b"Light from the left.\n",
        "light_intensity": b"Dim light.\n",
    }


def write_zip(
    path: Path, clips: Mapping[str, bytes], texts: Mapping[str, Mapping[str, bytes]] | None = None
) -> None:
    """A zip in CelebV-Text's layout; texts default to `captions` of each clip."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as file:
        for clip, video in clips.items():
            file.writestr(f"videos/celebvtext_6/{clip}.mp4", video)
            chosen = captions(clip) if texts is None else texts.get(clip, {})
            for category, text in chosen.items():
                file.writestr(f"texts/{category}/{clip}.txt", text)


def write_store(root: Path, shards: Mapping[str, Sequence[str]], settings: StoreSettings) -> None:
    """A store without any video behind it: row i of a shard is filled with a value of its clip."""
    for shard, clips in shards.items():
        with ShardWriter(root, shard, settings, len(clips)) as writer:
            for clip in clips:
                frames = np.full(settings.shape, clip_value(clip), np.uint8)
                writer.append(frames, np.arange(settings.num_frames) / settings.fps)
        texts = [
            {"emotion": [to_line(f"{clip} smiles.")], "light_dir": [to_line("left light")]}
            for clip in clips
        ]
        write_texts(shard_paths(root, shard)[1], texts)
        rows = [
            {"clip": clip, "status": "kept", "row": i, "windows": 1} for i, clip in enumerate(clips)
        ]
        index = {"format": FORMAT, "settings": asdict(settings), "clips": rows}
        write_json(shard_paths(root, shard)[2], index)


def clip_value(clip: str) -> int:
    """A pixel value 0..255 that tells clips apart."""
    return zlib.crc32(clip.encode()) % 256
