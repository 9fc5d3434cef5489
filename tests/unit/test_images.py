"""What the decoder makes of pictures: the same upright RGB pixels, however they are stored."""

from __future__ import annotations

import io
import struct
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from mimco_deploy import images
from mimco_deploy.drawings import draw
from mimco_deploy.images import IMAGE_SUFFIXES, decode_image
from mimco_deploy.preprocess import decode_pixels, preprocess

SAVED_AS = ["JPEG", "PNG", "GIF", "BMP", "PPM", "TIFF", "WEBP"]
MODES = ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "I;16", "I;16B"]
ORIENTATION = 0x0112
_STORED = {  # what a camera does to the upright picture before it writes the number
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
Pixels = npt.NDArray[np.uint8]


def encoded(picture: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, form, **options)
    return file.getvalue()


def pixels(content: bytes) -> Pixels:
    picture = decode_image(content)
    assert picture.mode == "RGB"
    assert type(picture) is Image.Image
    return np.asarray(picture)


@settings(deadline=None, derandomize=True)
@given(
    mode=st.sampled_from(MODES),
    form=st.sampled_from(SAVED_AS),
    width=st.integers(1, 40),
    height=st.integers(1, 40),
    seed=st.integers(0, 2**32 - 1),
)
@example(mode="F", form="PPM", width=5, height=9, seed=1)  # holds a signalling NaN
def test_any_mode_and_size_gives_rgb_of_the_same_size(mode: str, form: str, width: int, height: int, seed: int) -> None:
    noise = np.random.default_rng(seed).bytes(width * height * 4)
    stored = {"1": "L", "PA": "LA"}.get(mode, mode)
    depth = {"L": 1, "P": 1, "LA": 2, "RGB": 3, "YCbCr": 3, "LAB": 3, "HSV": 3, "I;16": 2, "I;16B": 2}.get(stored, 4)
    picture = Image.frombytes(stored, (width, height), noise[: width * height * depth])
    if mode != stored:
        picture = picture.convert(mode)
    if mode in ("P", "PA"):
        picture.putpalette(noise[:3].ljust(768, noise[:1]))
    try:
        content = encoded(picture, form)
    except (OSError, ValueError, KeyError, RuntimeError):  # this format has no such mode
        return

    assert pixels(content).shape == (height, width, 3)


@pytest.mark.parametrize(
    ("form", "options"),
    [("JPEG", {"quality": 95, "subsampling": 0}), ("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True})],
)
def test_all_orientations_give_the_same_picture(form: str, options: dict[str, Any]) -> None:
    upright = draw("sky", 0, 64).crop((0, 0, 64, 40))
    for number in range(1, 9):
        exif = Image.Exif()
        exif[ORIENTATION] = number
        stored = upright.transpose(_STORED[number]) if number > 1 else upright

        decoded = pixels(encoded(stored, form, exif=exif, **options))

        difference = np.abs(decoded.astype(int) - np.asarray(upright))
        assert difference.max() <= (40 if form == "JPEG" else 0), number
        assert difference.mean() < 2


@pytest.mark.parametrize("exif", [b"Exif\0\0II*\0\x08\0\0\0\x01\0", b"Exif\0\0garbage", 0, 9, 99])
def test_an_invalid_orientation_counts_as_upright(exif: bytes | int) -> None:
    plain = draw("bursts", 0, 32)
    if isinstance(exif, int):
        tags = Image.Exif()
        tags[ORIENTATION] = exif
        exif = tags.tobytes()

    assert np.array_equal(pixels(encoded(plain, "JPEG", exif=exif)), pixels(encoded(plain, "JPEG")))


def test_a_turned_picture_is_not_turned_again_by_who_reads_its_metadata() -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6

    decoded = decode_image(encoded(draw("sky", 0, 32), "JPEG", exif=exif))

    assert decoded.getexif() == {}
    assert decoded.info == {}


@pytest.mark.parametrize(("form", "mode"), [("PNG", "I;16"), ("TIFF", "I;16"), ("TIFF", "I;16B"), ("TIFF", "I")])
def test_16_bits_are_scaled_by_their_full_range(form: str, mode: str) -> None:
    values = np.array([[0, 128, 129, 257, 32_768, 40_000, 65_278, 65_535]])
    picture = Image.fromarray(values.astype({"I;16": "<u2", "I;16B": ">u2", "I": "<i4"}[mode]))
    assert picture.mode == mode

    assert pixels(encoded(picture, form))[0, :, 0].tolist() == [0, 0, 1, 1, 128, 156, 254, 255]


def test_a_dark_16_bit_picture_stays_dark() -> None:
    assert pixels(encoded(Image.new("I;16", (2, 2), 200))).max() == 1


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 0.5, 1.0], [0, 128, 255]),
        ([0.0, 100.0, 200.4], [0, 100, 200]),
        ([0.0, 257.0, 65535.0], [0, 1, 255]),
        ([-1.0, 0.0, 1.0], [0, 128, 255]),
        ([1e6, 2e6, 3e6], [0, 128, 255]),
        ([np.nan, np.inf, -np.inf, 0.5], [0, 255, 0, 128]),
        ([np.nan, np.nan], [0, 0]),
        ([-7.0, -7.0], [0, 0]),
        ([-3e38, 0.0, 3e38], [0, 128, 255]),
    ],
)
def test_float_is_scaled_by_the_smallest_usual_range_that_holds_it(values: list[float], expected: list[int]) -> None:
    picture = Image.fromarray(np.array([values], np.float32))

    assert pixels(encoded(picture, "TIFF"))[0, :, 0].tolist() == expected


@pytest.mark.parametrize(("values", "expected"), [([0, 255], [0, 255]), ([0, 256], [0, 1]), ([-5, 95], [0, 255])])
def test_32_bit_integers_are_scaled_by_the_range_that_holds_them(values: list[int], expected: list[int]) -> None:
    assert pixels(encoded(Image.fromarray(np.array([values], np.int32)), "TIFF"))[0, :, 0].tolist() == expected


def test_cmyk_is_read_as_ink_on_paper() -> None:
    inks = [(0, 0, 0, 0), (0, 0, 0, 255), (0, 255, 255, 0), (255, 0, 0, 0)]
    expected = [[255, 255, 255], [0, 0, 0], [255, 0, 0], [0, 255, 255]]

    for ink, colour in zip(inks, expected, strict=True):
        for form in ("TIFF", "JPEG"):
            assert np.abs(pixels(encoded(Image.new("CMYK", (8, 8), ink), form)).astype(int) - colour).max() <= 3


def _with_alpha(mode: str) -> bytes:
    if mode == "P with bytes":
        picture = Image.new("P", (4, 4), 0)
        picture.putpalette([200, 100, 0] + [9] * 765)
        return encoded(picture, transparency=bytes([128]))
    if mode == "P with a key":
        picture = Image.new("P", (4, 4), 0)
        picture.putpalette([200, 100, 0] + [9] * 765)
        return encoded(picture, "GIF", transparency=0)
    colours: dict[str, Any] = {
        "RGBA": (200, 100, 0, 128),
        "LA": (100, 128),
        "RGB": (200, 100, 0),
        "L": 100,
        "I;16": 30_000,
    }
    keys: dict[str, Any] = {
        "RGB": {"transparency": (200, 100, 0)},
        "L": {"transparency": 100},
        "I;16": {"transparency": 30_000},
    }
    return encoded(Image.new(mode, (4, 4), colours[mode]), **keys.get(mode, {}))


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("RGBA", (227, 177, 127)),
        ("LA", (177, 177, 177)),
        ("P with bytes", (227, 177, 127)),
        ("P with a key", (255, 255, 255)),
        ("RGB", (255, 255, 255)),
        ("L", (255, 255, 255)),
        ("I;16", (255, 255, 255)),
    ],
)
def test_transparency_is_laid_over_white(mode: str, expected: tuple[int, int, int]) -> None:
    assert np.abs(pixels(_with_alpha(mode)).astype(int) - expected).max() <= 1


def test_premultiplied_alpha_is_laid_over_white() -> None:
    picture = images._rgb(Image.new("RGBa", (1, 1), (100, 50, 0, 128)))

    assert np.abs(np.array(picture.getpixel((0, 0))) - (227, 177, 127)).max() <= 1
    assert images._rgb(Image.new("La", (1, 1), (0, 0))).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_an_animation_the_first_frame_is_taken(form: str) -> None:
    first, second = Image.new("RGB", (8, 8), (250, 0, 0)), Image.new("RGB", (8, 8), (0, 0, 250))

    decoded = pixels(encoded(first, form, save_all=True, append_images=[second]))

    assert decoded[..., 0].min() > 240
    assert decoded[..., 2].max() < 10


def test_a_colour_profile_is_converted_to_srgb() -> None:
    picture = draw("blobs", 0, 16)
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    wide = _linear_light_profile()

    converted = pixels(encoded(picture, icc_profile=wide)).astype(int)

    assert (converted >= np.asarray(picture)).all()  # linear values are shown brighter
    assert converted.mean() > np.asarray(picture).mean() + 20
    for useless in (b"garbage", wide[:100], lab):
        assert np.array_equal(pixels(encoded(picture, icc_profile=useless)), np.asarray(picture))


def _linear_light_profile() -> bytes:
    """The sRGB profile with straight tone curves and another name."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for number in range(struct.unpack_from(">I", profile, 128)[0]):
        name, offset, size = struct.unpack_from(">4sII", profile, 132 + 12 * number)
        if name in (b"rTRC", b"gTRC", b"bTRC"):
            profile[offset : offset + 12] = b"curv" + bytes(8)
        if name == b"desc":
            profile[offset + 12 : offset + size] = profile[offset + 12 : offset + size].replace(b"\0s\0R", b"\0x\0R")
    return bytes(profile)


def _odd_tiff() -> bytes:
    """A whole TIFF that states two horizontal resolutions, of which Pillow warns."""
    content = encoded(draw("sky", 0, 16), "TIFF", dpi=(72, 72))
    entry, odd = (struct.pack("<HHI", 282, 5, count) for count in (1, 2))
    assert content.count(entry) == 1
    return content.replace(entry, odd)


def test_what_pillow_warns_of_is_hushed_and_nothing_else() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="Metadata"):
            Image.open(io.BytesIO(_odd_tiff()))

        decode_image(_odd_tiff())

        with pytest.raises(UserWarning, match="mine"):
            warnings.warn("mine", stacklevel=1)


def test_threads_decode_side_by_side() -> None:
    picture = draw("dots", 0, 64)
    contents = [_odd_tiff(), *(encoded(picture, form) for form in ("JPEG", "WEBP", "PNG", "GIF", "BMP"))] * 30
    expected = [pixels(content).tobytes() for content in contents[:6]] * 30

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda content: decode_image(content).tobytes(), contents)) == expected


def test_suffixes_are_lower_case_and_cover_what_cameras_write() -> None:
    assert all(suffix == suffix.lower() and suffix.startswith(".") for suffix in IMAGE_SUFFIXES)
    assert {".jpg", ".jpeg", ".png", ".webp", ".tif", ".heic"} <= IMAGE_SUFFIXES


# ---------------------------------------------------------------------- reduced by the decoder


@pytest.mark.parametrize(
    ("size", "short_side_px", "reduced"),
    [
        ((1024, 768), 96, (256, 192)),
        ((1024, 768), 97, (512, 384)),
        ((1024, 768), 385, (1024, 768)),
        ((64, 64), 1, (8, 8)),
    ],
)
def test_a_large_jpeg_is_reduced_to_no_less_than_twice_what_is_needed(
    size: tuple[int, int], short_side_px: int, reduced: tuple[int, int]
) -> None:
    content = encoded(draw("rings", 1, 64).resize(size), "JPEG")
    assert decode_image(content, short_side_px=short_side_px).size == reduced
    assert min(reduced) >= min(2 * short_side_px, *size)
    assert decode_image(content).size == size


@pytest.mark.parametrize("form", ["PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM"])
def test_other_formats_are_never_reduced(form: str) -> None:
    content = encoded(draw("rings", 1, 64).resize((640, 480)), form)
    assert decode_image(content, short_side_px=16).size == (640, 480)


def test_a_reduced_jpeg_is_turned_upright_and_gives_nearly_the_same_pixels() -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    picture = draw("rings", 3, 128).resize((1600, 1200), Image.Resampling.BICUBIC)
    content = encoded(picture, "JPEG", exif=exif, quality=95)
    assert decode_image(content, short_side_px=64).size == (150, 200)
    whole = preprocess(decode_image(content), 64, 0.875)
    reduced = decode_pixels(content, "picture", 64, 0.875, "bicubic")
    difference = np.abs(whole.astype(int) - reduced)
    assert difference.mean() < 1.0
    assert difference.max() > 0  # it is not that nothing was reduced
