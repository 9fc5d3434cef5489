"""What the decoder refuses: damaged, cut, foreign and oversized files, each with its reason and before it costs."""

from __future__ import annotations

import io
import os
import pickle
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from mimco_deploy import images
from mimco_deploy.drawings import draw
from mimco_deploy.errors import ImageError
from mimco_deploy.images import MAX_PIXELS, decode_image, read_image

SAVED_AS = ["JPEG", "PNG", "GIF", "BMP", "PPM", "TIFF", "WEBP"]
OUTCOMES = {"picture", "empty", "corrupt", "truncated", "too_large", "unsupported"}


def encoded(picture: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, form, **options)
    return file.getvalue()


def problem_of(content: bytes) -> str:
    with pytest.raises(ImageError) as caught:
        decode_image(content, "query.jpg")
    assert "query.jpg" in str(caught.value)
    assert "\n" not in str(caught.value)
    return caught.value.problem


def png_header(width: int, height: int) -> bytes:
    """A PNG of that size that ends where its pixels would begin."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">II", zlib.crc32(body), 99) + b"IDAT"


def outcome_of(content: bytes) -> str:
    """`picture`, or the problem of the refusal; anything else is a failure."""
    try:
        picture = decode_image(content)
    except ImageError as error:
        return error.problem
    return "picture" if picture.mode == "RGB" else picture.mode


@settings(deadline=None, derandomize=True)
@given(content=st.binary(max_size=200), start=st.sampled_from([b"", b"\xff\xd8\xff\xe0", b"GIF89a", b"BM", b"II*\0"]))
def test_any_bytes_give_a_picture_or_a_typed_refusal(content: bytes, start: bytes) -> None:
    assert outcome_of(start + content) in OUTCOMES


@settings(max_examples=300, deadline=None, derandomize=True)
@given(form=st.sampled_from(SAVED_AS), place=st.floats(0, 1), value=st.integers(0, 255))
def test_a_damaged_byte_gives_a_picture_or_a_typed_refusal(form: str, place: float, value: int) -> None:
    content = bytearray(encoded(draw("dots", 1, 24), form))
    content[int(place * (len(content) - 1))] = value

    assert outcome_of(bytes(content)) in OUTCOMES


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("PNG", {}),
        ("GIF", {}),
        ("BMP", {}),
        ("PPM", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("WEBP", {}),
        ("WEBP", {"lossless": True}),
    ],
)
def test_a_file_cut_anywhere_is_refused_or_the_whole_picture(form: str, options: dict[str, Any]) -> None:
    content = encoded(draw("clutter", 2, 40), form, **options)
    whole = decode_image(content)
    problems = []
    for end in range(1, len(content), max(1, len(content) // 200)):
        try:
            assert decode_image(content[:end]) == whole, end
        except ImageError as error:
            problems.append(error.problem)
    assert len(problems) > 150
    if "compression" not in options:  # libtiff does not say why it failed
        assert problems.count("truncated") > 0.9 * len(problems)


def test_pillows_global_settings_stay_as_they_were() -> None:
    before = (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)
    for content in (png_header(60_000, 60_000), png_header(12_000, 12_000), encoded(draw("sky", 0))[:-40]):
        assert problem_of(content) in ("too_large", "truncated")

    assert before == (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)


@pytest.mark.parametrize("size", [(12_000, 12_000), (8_193, 8_192), (65_536, 1), (1, 65_536), (2**31 - 1, 2**31 - 1)])
def test_size_is_checked_before_decoding(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    def decoding(_: ImageFile.ImageFile) -> None:
        raise AssertionError("pixels were decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", decoding)

    assert problem_of(png_header(*size)) == "too_large"


def test_photos_of_48_and_50_megapixels_are_within_the_limit() -> None:
    assert MAX_PIXELS >= 8064 * 6048
    assert MAX_PIXELS >= 8192 * 6144


def test_files_beyond_the_limit_are_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sparse = tmp_path / "huge.jpg"
    with sparse.open("wb") as file:
        file.truncate(images.MAX_BYTES + 1)
    monkeypatch.setattr(Path, "open", None)

    with pytest.raises(ImageError, match=r"huge\.jpg has 134,217,729 bytes") as caught:
        read_image(sparse)

    assert caught.value.problem == "too_large"


@pytest.mark.parametrize(
    ("content", "problem", "said"),
    [
        (b"", "empty", "0 bytes"),
        (b"hello", "unsupported", "no picture format"),
        (b"<!doctype html><html>", "unsupported", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "unsupported", "Git LFS"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "unsupported", "HEIC"),
        (b"%PDF-1.7", "unsupported", "PDF"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "unsupported", "no picture format"),
        (png_header(0, 8), "truncated", "PNG"),
        (b"BM" + bytes(60), "corrupt", "BMP"),
    ],
)
def test_a_refusal_says_what_was_found(content: bytes, problem: str, said: str) -> None:
    assert problem_of(content) == problem
    with pytest.raises(ImageError, match=said):
        decode_image(content)


def test_a_file_that_cannot_be_read_is_refused_with_its_reason(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "file.txt").touch()
    for name, problem in [
        ("none.jpg", "missing"),
        ("file.txt/none.jpg", "missing"),
        ("file.txt", "empty"),
        ("pipe.jpg", "unreadable"),
        (".", "unreadable"),
        ("nul\0.jpg", "unreadable"),
        ("long" * 100, "unreadable"),
    ]:
        with pytest.raises(ImageError) as caught:
            read_image(tmp_path / name)
        assert (name, caught.value.problem) == (name, problem)


def test_odd_file_names_stay_on_one_line(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/two\nlines \xff.jpg"))

    with pytest.raises(ImageError, match=re.escape(r"two\nlines \udcff.jpg")) as caught:
        read_image(path)

    assert str(caught.value).encode()
    assert len(str(caught.value).splitlines()) == 1


def test_any_error_of_pillow_becomes_a_refusal_that_keeps_nothing_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    content = encoded(draw("sky", 0, 8))
    for kind in (OSError, ValueError, EOFError, RuntimeError, SyntaxError, TypeError, ZeroDivisionError, MemoryError):

        def load(_: ImageFile.ImageFile, kind: type[Exception] = kind) -> None:
            raise kind("first\nsecond")

        monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", load)
        assert problem_of(content) in ("corrupt", "truncated", "too_large")
        with pytest.raises(ImageError) as caught:
            decode_image(content)
        assert caught.value.__context__ is None
        copy = pickle.loads(pickle.dumps(caught.value))
        assert (copy.problem, str(copy)) == (caught.value.problem, str(caught.value))
