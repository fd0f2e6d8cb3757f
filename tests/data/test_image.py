"""Still pictures: colours, turn, alpha, and files that are refused."""

from __future__ import annotations

import random
import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from dalle2_video.data.media.decode import decode_clip
from dalle2_video.data.media.frame import ClipError, crop_resize
from dalle2_video.data.media.image import decode_image
from tests.helpers.media import PATCHES, patch_colours
from tests.helpers.pictures import LOSSLESS, TILES, animation, chunk, gamma_profile, png16, saved

# ---------------------------------------------------------------- shape and colour


@pytest.mark.parametrize("form", LOSSLESS)
@pytest.mark.parametrize("shape", [(64, 64), (47, 63), (90, 40), (20, 24)])
def test_the_centre_square_is_that_of_a_video(form: str, shape: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    found = decode_image(saved(image, form, **LOSSLESS[form]), 32)
    assert found.converted == ()
    assert np.array_equal(found.image, crop_resize(image, 32))


def test_jpeg_within_its_own_loss_and_from_a_path_of_any_name(tmp_path: Path) -> None:
    data = saved(TILES, "JPEG", quality=95, subsampling=0)
    (tmp_path / "picture.txt").write_bytes(data)
    found = decode_image(tmp_path / "picture.txt", 64)
    assert np.abs(patch_colours(found.image) - PATCHES).max() <= 4
    assert np.array_equal(found.image, decode_image(data, 64).image)


@pytest.mark.parametrize("form", ["JPEG", *LOSSLESS])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(form: str, orientation: int) -> None:
    """EXIF says where row 0 and column 0 of what is stored are to be seen."""
    upright = np.zeros((32, 32, 3), np.uint8)
    upright[:16, :16, 0] = upright[:16, 16:, 1] = upright[16:, :16, 2] = 220
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[274] = orientation
    options = {"quality": 95, "subsampling": 0} if form == "JPEG" else LOSSLESS[form]
    found = decode_image(saved(np.ascontiguousarray(stored), form, exif=exif, **options), 32)
    inner = np.r_[2:14, 18:30]
    error = found.image.astype(int) - upright
    assert np.abs(error[inner][:, inner]).max() <= (4 if form == "JPEG" else 0)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_leaves_the_picture_as_it_is() -> None:
    data = saved(TILES, "PNG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff" + bytes(20))
    assert np.array_equal(decode_image(data, 64).image, TILES)


@pytest.mark.parametrize("form", LOSSLESS)
def test_alpha_is_on_black_before_the_picture_is_shrunk(form: str) -> None:
    """Hidden pixels have a colour of their own, which must not bleed into their neighbours."""
    image = np.full((64, 64, 4), 255, np.uint8)
    image[:, ::2, 3] = 0
    image[:32, 1::2, 3] = 128
    options = {"exact": True, "lossless": True} if form == "WEBP" else {}
    found = decode_image(saved(image, form, **options), 16)
    assert found.converted == ("alpha on black",)
    assert (found.image[:8] == 64).all() and (np.abs(found.image[8:] - 127.5) <= 0.5).all()
    image[..., 3] = 255
    assert decode_image(saved(image, form, **options), 16).converted == ()


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA"])
def test_pictures_of_few_colours(mode: str) -> None:
    grey = np.kron(np.array([[0, 255], [255, 0]], np.uint8), np.ones((16, 16), np.uint8))
    picture = Image.fromarray(grey).convert(mode)
    found = decode_image(saved(picture, "PNG"), 32)
    assert found.converted == () and np.array_equal(found.image, grey[..., None].repeat(3, 2))


def test_a_transparent_palette_colour() -> None:
    picture = Image.fromarray(np.eye(32, dtype=np.uint8), "P")
    picture.putpalette([250, 0, 0, 0, 250, 0])
    found = decode_image(saved(picture, "PNG", transparency=0), 32)
    assert found.converted == ("alpha on black",)
    assert np.array_equal(found.image[..., 1], 250 * np.eye(32)) and not found.image[..., 0].any()


def test_sixteen_bits() -> None:
    """Grey is rounded to 8 bits; of RGB Pillow takes the upper 8."""
    codes = np.linspace(0, 65535, 32 * 32).reshape(32, 32).round().astype(np.uint16)
    exact = (codes / 257)[..., None]
    assert np.abs(decode_image(png16(codes), 32).image - exact).max() <= 0.5
    assert np.abs(decode_image(png16(codes[..., None].repeat(3, 2)), 32).image - exact).max() <= 1
    hidden = decode_image(png16(codes, struct.pack(">H", codes[20, 20])), 32)
    assert hidden.converted == ("alpha on black",) and not hidden.image[20, 20].any()
    assert np.abs(hidden.image[:20] - exact[:20]).max() <= 0.5


def test_cmyk() -> None:
    """Plain inks, without a profile: RGB is what the inks leave over."""
    picture = Image.fromarray(TILES).convert("CMYK")
    found = decode_image(saved(picture, "JPEG", quality=98, subsampling=0), 64)
    assert found.converted == ("CMYK to RGB",)
    assert np.abs(patch_colours(found.image) - PATCHES).max() <= 6


@pytest.mark.parametrize(("form", "space"), [("PNG", b"RGB "), ("PNG", b"GRAY"), ("WEBP", b"RGB ")])
def test_a_colour_profile_becomes_srgb(form: str, space: bytes) -> None:
    """A profile of gamma 1: its codes are light, which IEC 61966-2-1 turns into sRGB codes."""
    codes = np.arange(256, dtype=np.uint8).reshape(16, 16)
    picture = Image.fromarray(codes if space == b"GRAY" else codes[..., None].repeat(3, 2))
    data = saved(picture, form, icc_profile=gamma_profile(1.0, space), **LOSSLESS[form])
    found = decode_image(data, 16)
    assert found.converted == ("colour profile to sRGB",)
    light = codes / 255
    srgb = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    assert np.abs(found.image - 255 * srgb[..., None]).max() <= 1.5


def test_an_srgb_profile_and_a_damaged_one_change_nothing() -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile in (srgb, b"no profile", gamma_profile(1.0, b"RGB ")[:150]):
        found = decode_image(saved(TILES, "PNG", icc_profile=profile), 64)
        assert found.converted == () and np.array_equal(found.image, TILES)


# ---------------------------------------------------------------- bad pictures


@pytest.mark.parametrize("form", ["GIF", "BMP", "TIFF", "PPM", "ICO"])
def test_other_formats_are_refused(form: str) -> None:
    with pytest.raises(ClipError, match="no image: not a whole JPEG, PNG or WebP"):
        decode_image(saved(Image.fromarray(TILES), form), 32)


@pytest.mark.parametrize("data", [b"", b"%!PS-Adobe", bytes(1000)])
def test_what_is_no_picture(data: bytes) -> None:
    with pytest.raises(ClipError, match="no image"):
        decode_image(data, 32)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ClipError, match="No such file"):
        decode_image(tmp_path / "none.png", 32)


def test_absurd_sizes_are_refused_before_they_are_decoded() -> None:
    huge = bytearray(png16(np.zeros((4, 4), np.uint16)))
    for side in (8192, 20_000, 2**31 - 1):
        head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        huge[8:33] = chunk(b"IHDR", head)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with pytest.raises(ClipError, match="its image is too large"):
                decode_image(bytes(huge), 32)


@pytest.mark.parametrize(
    ("form", "options"),
    [("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("WEBP", {}), *LOSSLESS.items()],
)
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.95, 0.9999])
def test_truncated_files_are_refused(form: str, options: dict[str, Any], share: float) -> None:
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = saved(image, form, **options)
    decode_image(data, 32)
    with pytest.raises(ClipError):
        decode_image(data[: int(len(data) * share)], 32)


def some_files() -> list[bytes]:
    """Whole files of many kinds."""
    image = np.random.default_rng(0).integers(0, 256, (24, 24, 4), dtype=np.uint8)
    exif = Image.Exif()
    exif[274] = 6
    rgb = Image.fromarray(image[..., :3].copy())
    more = {"exif": exif, "icc_profile": gamma_profile(1.8, b"RGB ")}
    return [
        saved(rgb, "JPEG", **more),
        saved(rgb, "JPEG", progressive=True),
        saved(rgb.convert("CMYK"), "JPEG"),
        saved(Image.fromarray(image), "PNG", **more),
        saved(rgb.convert("P"), "PNG", transparency=3),
        png16(np.arange(576, dtype=np.uint16).reshape(24, 24)),
        saved(Image.fromarray(image), "WEBP", **more),
        saved(rgb, "WEBP", lossless=True),
        animation("PNG", [100] * 3),
        animation("WEBP", [100] * 3),
    ]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(10))
def test_mutated_files_are_shown_or_refused(seed: int) -> None:
    """Ten files of each kind: whatever comes out is a square or a ClipError."""
    draw = random.Random(seed)
    data = some_files()[seed]
    refused = 0
    for _ in range(12):
        changed = bytearray(data)
        for _ in range(draw.choice((1, 3, 30))):
            place = draw.randrange(len(changed))
            if draw.random() < 0.5:
                changed[place] ^= 1 << draw.randrange(8)
            else:
                changed[place : place + 4] = draw.choice((b"\xff" * 4, bytes(4), b"\x7f\xff"))
        if draw.random() < 0.2:
            del changed[draw.randrange(len(changed)) :]
        for decode in (decode_image, lambda file, size: decode_clip(file, 10.0, 3, size)):
            try:
                made = decode(bytes(changed), 8)
            except ClipError:
                refused += 1
                continue
            shape = getattr(made, "image", getattr(made, "frames", None)).shape
            assert shape in ((8, 8, 3), (3, 8, 8, 3))
    assert refused >= 12, "each is a picture or a video, and no file is both"
