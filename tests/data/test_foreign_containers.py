"""A member of an archive is video bytes and nothing else: it makes ffmpeg open no other file."""

from pathlib import Path

import av
import pytest

from dalle2_video.data.media.decode import decode_clip
from dalle2_video.data.media.frame import ClipError
from dalle2_video.data.media.stream import CONTAINERS
from tests.helpers.media import grey_steps, write_video


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A good video that no clip may show."""
    path = tmp_path / "secret.mp4"
    path.write_bytes(write_video(grey_steps(20)))
    assert decode_clip(path, 4.0, 4, 16).frames.shape == (4, 16, 16, 3)
    return path


SCRIPTS = {
    "concat": "ffconcat version 1.0\nfile '{secret}'\n",
    "concat, relative": "ffconcat version 1.0\nfile secret.mp4\n",
    "hls": "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{secret}\n#EXT-X-ENDLIST\n",
    "hls, by protocol": "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile://{secret}\n",
    "dash": '<?xml version="1.0"?><MPD type="static"><Period><AdaptationSet><Representation id="0">'
    "<BaseURL>{secret}</BaseURL></Representation></AdaptationSet></Period></MPD>",
    "sdp": "v=0\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
    "subtitles": "1\n00:00:00,000 --> 00:00:02,000\n{secret}\n",
    "an address": "http://127.0.0.1/secret.mp4",
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_that_names_a_video_is_no_video(name: str, secret: Path, monkeypatch) -> None:
    monkeypatch.chdir(secret.parent)
    script = SCRIPTS[name].format(secret=secret).encode()
    with pytest.raises(ClipError, match="no video"):
        decode_clip(script, 4.0, 4, 16)
    path = secret.parent / "clip.mp4"
    path.write_bytes(script)
    with pytest.raises(ClipError, match="no video"):
        decode_clip(path, 4.0, 4, 16)


def test_an_image_sequence_is_no_video(secret: Path, monkeypatch) -> None:
    from PIL import Image

    monkeypatch.chdir(secret.parent)
    for i in range(8):
        Image.new("RGB", (32, 32)).save(f"clip{i}.png")
    Path("clip%d.png.mp4").write_bytes(Path("clip0.png").read_bytes())
    with pytest.raises(ClipError, match="no video"):
        decode_clip("clip%d.png.mp4", 4.0, 4, 16)


def test_the_containers_are_ffmpegs() -> None:
    known = {name for demuxer in av.formats_available for name in demuxer.split(",")}
    assert set(CONTAINERS) <= known
    assert not {"concat", "hls", "dash", "image2", "sdp", "applehttp", "lavfi"} & set(CONTAINERS)
