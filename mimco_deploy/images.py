"""The one decoder: bytes → upright RGB picture, or a typed refusal.

Training, export, indexing and querying all read pictures here, so a picture has the same pixels everywhere. What comes
out is mode RGB, 8 bits, upright, in sRGB, without transparency, metadata or a tie to its file. The rules:

- **Orientation**: EXIF 1 to 8 is applied; any other value, and EXIF that cannot be parsed, counts as upright.
- **Transparency** of every kind (channel, palette, colour key) is laid over white.
- **Colour profile**: an embedded one is converted to sRGB; a broken or unfit one is ignored.
- **More than 8 bits**: 16-bit unsigned is scaled by its full range, 65535 → 255 (4095 where a TIFF states 12 bits).
  32-bit integer and float carry no range, so the smallest usual full range that holds all values is taken, 255 or
  65535 (for float also 1); values outside all of them are stretched from smallest to largest. NaN counts as the
  bottom of the range, an infinity as the end that it points to.
- **Animations and pages**: the first.
- **Truncated** files are refused, never filled with grey.
- **Large JPEGs** are decoded at a half, a quarter or an eighth where the caller says how small a picture will do: a
  reduction that the format itself has, several times as fast.

Standard library, NumPy and Pillow only.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
import stat
import struct
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, UnidentifiedImageError

from mimco_deploy.errors import ImageError, ImageProblem, plain

MAX_BYTES = 128 * 2**20
"""Largest file: a photo of 48 megapixels has 10 to 40 MiB as JPEG and about 100 as PNG."""
MAX_PIXELS = 2**26
"""Most pixels: 67 million, so photos of phones that say 48, 50 and 64 megapixels pass. At that size a JPEG takes
256 MiB, turning it or laying it over white 512 MiB, and Pillow's WebP decoder 1 GiB."""
MAX_SIDE_PX = 65_535
"""Longest side, as in JPEG. Pillow also keeps 8 bytes a row, which for a picture 1 px wide outweigh its pixels."""

# Camera and web photos and what people save them as. Left out: icons (ICO), layers (PSD), textures (DDS, BLP), vectors
# and programs (EPS would run Ghostscript, WMF), and JPEG 2000: rare among photos and a large decoder to expose. MPO,
# what some phones write, opens as JPEG. AVIF came with Pillow 11.3. The usual ones stand first: Pillow asks in order.
FORMATS = (
    *("JPEG", "PNG", "GIF", "BMP", "PPM", "TIFF", "WEBP"),
    *(("AVIF",) if importlib.util.find_spec("PIL.AvifImagePlugin") else ()),
)
IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".gif", ".webp", ".avif", ".heic", ".heif"}
    | {".tif", ".tiff", ".bmp", ".dib", ".ppm", ".pgm", ".pbm", ".pnm"}
)
"""Lower-case suffixes that a walk takes for pictures. HEIC is among them to be reported, not passed over in silence."""

_STARTS = {  # of the formats above: a file that begins so and cannot be identified is broken, not foreign
    "JPEG": rb"\xff\xd8\xff",
    "PNG": rb"\x89PNG",
    "GIF": rb"GIF8[79]a",
    "BMP": rb"BM.{4}\0\0\0\0",
    "TIFF": rb"II[*+]\0|MM\0[*+]",
    "WEBP": rb"RIFF.{4}WEBP",
    "AVIF": rb".{4}ftypavi[fs]",
}
_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND", "GIF": b";"}  # one of these that fails and has no end was cut off
_PLAIN = (b"P1", b"P2", b"P3")
_FOREIGN = {  # what lies in photo folders under a picture's name
    "HEIC, which has to be converted to JPEG first": rb".{4}ftyp(hei|hev|mif1|msf1)",
    "a Git LFS pointer, not the file it stands for": rb"version https://git-lfs",
    "a web page or XML": rb"\s*<",
    "a PDF": rb"%PDF",
    "a ZIP archive": rb"PK\x03\x04",
}
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_REDUCING_GAP = 2
"""Between a reduced JPEG and what it will be resized to: what Pillow calls close to a fair resampling."""
_TURNED_ASIDE = {5, 6, 7, 8}
_PILLOW = r"PIL\."
_HUSH = ("ignore", None, Warning, re.compile(_PILLOW), 0)


def read_image(path: Path, short_side_px: int | None = None) -> Image.Image:
    """Read a picture from disk.

    Args:
        path: a regular file; its suffix does not matter.
        short_side_px: see `decode_image`.

    Returns:
        The picture, as `decode_image` gives it.

    Raises:
        ImageError: the file is missing, unreadable, larger than `MAX_BYTES`, or refused by `decode_image`.
    """
    shown = shown_name(str(path))
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe would block, a device would not end
            raise ImageError("unreadable", f"{shown} is not a regular file")
        _check_bytes(status.st_size, shown)
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)  # bounded: the file may have grown since
    except (FileNotFoundError, NotADirectoryError):
        raise ImageError("missing", f"{shown} does not exist") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise ImageError("unreadable", f"{shown} cannot be read ({_one_line(error)})") from None
    return decode_image(content, str(path), short_side_px)


def decode_image(content: bytes, name: str = "picture", short_side_px: int | None = None) -> Image.Image:
    """Turn an encoded picture into upright RGB pixels, by the rules above. Safe to call from several threads.

    Args:
        content: a whole file in one of `FORMATS`.
        name: what to call it in an error.
        short_side_px: what the picture will be resized to. A JPEG may then come out smaller than it is, its short side
            at least twice this; resizing that gives nearly the pixels that resizing the whole gives.

    Returns:
        A picture of mode RGB with at most `MAX_PIXELS` pixels.

    Raises:
        ImageError: whatever else the file causes, with its `problem`.
    """
    shown = shown_name(name)
    _check_bytes(len(content), shown)
    if content[:2] in _PLAIN:  # Pillow takes time that grows with the square of the comments in it
        raise ImageError("unsupported", f"{shown} is a PNM in plain text")
    _hush_pillow()
    try:
        return _upright_rgb(content, shown, short_side_px)
    except ImageError:
        raise
    # Pillow's decoders raise OSError, ValueError, EOFError, RuntimeError, SyntaxError, TypeError, struct.error, ...
    except Exception as error:
        refusal = _refusal(error, content, shown)
    raise refusal  # out here, so that it does not chain to Pillow's error, whose traceback would keep the pixels alive


@dataclass(frozen=True)
class Facts:
    """What a picture file says of itself; None where it says nothing that can be read."""

    width_px: int | None = None
    """Of the upright picture."""
    height_px: int | None = None
    taken: str | None = None
    """When, by the camera's clock: `2024-05-31T18:30:00`."""
    camera: str | None = None
    """Make and model."""


def read_facts(content: bytes) -> Facts:
    """Read the header and the EXIF data of an encoded picture. Never fails: what is broken is left out.

    Args:
        content: a file that `decode_image` takes.
    """
    _hush_pillow()
    try:
        picture = Image.open(BytesIO(content), formats=FORMATS)
        width, height = picture.size
        exif = picture.getexif()
        if exif.get(ExifTags.Base.Orientation) in _TURNED_ASIDE:
            width, height = height, width
    except Exception:
        return Facts()
    taken = camera = None
    with contextlib.suppress(Exception):
        more = exif.get_ifd(ExifTags.IFD.Exif)
        taken = _when(more.get(ExifTags.Base.DateTimeOriginal) or exif.get(ExifTags.Base.DateTime))
    with contextlib.suppress(Exception):
        camera = _camera(exif.get(ExifTags.Base.Make), exif.get(ExifTags.Base.Model))
    return Facts(width, height, taken, camera)


def _when(text: object) -> str | None:
    return datetime.strptime(str(text)[:19], "%Y:%m:%d %H:%M:%S").isoformat() if text else None  # no zone


def _camera(make: object, model: object) -> str | None:
    names = [" ".join(str(name).replace("\0", " ").split()) for name in (make, model) if name]
    if len(names) == 2 and names[1].lower().startswith(names[0].lower()):
        del names[0]  # many models repeat their make
    text = " ".join(names)[:100]
    return text if text and text.isprintable() else None


def _check_bytes(count: int, shown: str) -> None:
    if count == 0:
        raise ImageError("empty", f"{shown} is empty (0 bytes)")
    if count > MAX_BYTES:
        raise ImageError("too_large", f"{shown} has {count:,} bytes, more than {MAX_BYTES:,}")


def _check_size(picture: Image.Image, shown: str) -> None:
    width, height = picture.size
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE_PX:
        limit = f"{MAX_PIXELS:,} pixels or {MAX_SIDE_PX:,} on a side"
        raise ImageError("too_large", f"{shown} states {width} × {height} pixels, more than {limit}")


def _upright_rgb(content: bytes, shown: str, short_side_px: int | None) -> Image.Image:
    encoded = Image.open(BytesIO(content), formats=FORMATS)  # reads the header alone
    _check_size(encoded, shown)
    if short_side_px is not None:
        encoded.draft(None, (_REDUCING_GAP * short_side_px,) * 2)  # of the formats here, only JPEG has a way to
    encoded.load()  # before EXIF is asked for: PNG may carry it behind the pixels
    turn = _turn(encoded)
    picture = _plain(_rgb(encoded))
    del encoded  # with its decoder's buffers, before a second picture is made
    return picture if turn is None else picture.transpose(turn)


def _plain(picture: Image.Image) -> Image.Image:
    # The same pixels without a copy and without what the file class holds: the encoded bytes, a decoder's buffers, and
    # the EXIF and profile that are applied by now and must not be a second time.
    return Image.Image()._new(picture.im)


def _turn(picture: Image.Image) -> Image.Transpose | None:
    try:
        orientation = picture.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # broken metadata is no reason to lose the picture
        return None
    return _UPRIGHT.get(orientation) if isinstance(orientation, int) else None


def _rgb(picture: Image.Image) -> Image.Image:
    profile = picture.info.get("icc_profile")
    if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
        picture = _eight_bits(picture)
    elif picture.mode == "La":
        picture = picture.convert("LA").convert("RGBA")  # in one step Pillow would drop the alpha
    elif picture.has_transparency_data and picture.mode != "RGBA":
        picture = picture.convert("RGBA")
    elif picture.mode not in ("L", "RGB", "RGBA", "CMYK"):
        picture = picture.convert("RGB")
    picture = _srgb(picture, profile)
    if picture.mode == "RGBA":
        paper = Image.new("RGB", picture.size, "white")
        paper.paste(picture, mask=picture)
        return paper
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def _srgb(picture: Image.Image, profile: bytes | None) -> Image.Image:
    if not profile:
        return picture
    from PIL import ImageCms  # most pictures need none

    try:
        source = ImageCms.ImageCmsProfile(BytesIO(profile))
        if "sRGB" in (source.profile.profile_description or ""):
            return picture  # nearly all photos: saves a pass over the pixels
        mode = picture.mode if picture.mode in ("RGB", "RGBA") else "RGB"
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), picture.mode, mode)
        if mode == picture.mode:
            ImageCms.applyTransform(picture, transform, inPlace=True)
            return picture
        return ImageCms.applyTransform(picture, transform) or picture
    except Exception:  # a profile that is broken, or of another colour space than the picture
        return picture


def _eight_bits(picture: Image.Image) -> Image.Image:
    low, high = _full_range(picture)
    scale = 255.0 / ((high - low) or 1.0)
    grey = np.empty((picture.height, picture.width), np.uint8)
    for top, values in _strips(picture):
        finite = np.nan_to_num(values, nan=low, posinf=high, neginf=low)
        grey[top : top + len(values)] = np.rint((finite - low) * scale).clip(0, 255)
        if isinstance(key := picture.info.get("transparency"), int):
            grey[top : top + len(values)][values == key] = 255  # white, as all transparency
    return Image.fromarray(grey)


def _full_range(picture: Image.Image) -> tuple[float, float]:
    if picture.mode not in ("I", "F"):
        return 0.0, 4095.0 if getattr(picture, "tag_v2", {}).get(ExifTags.Base.BitsPerSample) == (12,) else 65535.0
    low, high = np.inf, -np.inf
    for _, values in _strips(picture):
        finite = values[np.isfinite(values)]
        low = min(low, finite.min(initial=np.inf))
        high = max(high, finite.max(initial=-np.inf))
    usual = (255.0, 65535.0) if picture.mode == "I" else (1.0, 255.0, 65535.0)
    fitting = [full for full in usual if low >= 0 and high <= full]  # no finite value at all: the first
    return (0.0, fitting[0]) if fitting else (float(low), float(high))


def _strips(picture: Image.Image) -> Iterator[tuple[int, npt.NDArray[np.float64]]]:
    # Rows in portions of about a million pixels, as float64 [rows, W]: whole pictures would take 8 bytes a pixel.
    rows = max(1, 2**20 // picture.width)
    for top in range(0, picture.height, rows):
        part = picture.crop((0, top, picture.width, min(top + rows, picture.height)))
        with np.errstate(invalid="ignore"):  # a signalling NaN; this setting is one thread's own
            values = np.asarray(part).astype(np.float64)
        yield top, values


def _hush_pillow() -> None:
    # Pillow warns of odd metadata, which is not the user's concern, and where warnings are errors it would then refuse
    # the picture. `catch_warnings` is no way out: it swaps the filters of the whole process, so threads that decode
    # side by side would undo each other's. Instead one filter for what Pillow itself emits is put in front and stays.
    # It is put there again only where someone has since put another before it, which changes nothing for the rest.
    # The warning of oversized pictures is covered too: `_check_size` is stricter, and Pillow's error stays an error.
    front: Any = next(iter(warnings.filters), None)
    if front != _HUSH:
        warnings.filterwarnings("ignore", module=_PILLOW)


def _refusal(error: Exception, content: bytes, shown: str) -> ImageError:
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning | MemoryError):
        return ImageError("too_large", f"{shown} is too large to decode ({_one_line(error)})")
    kind = next((kind for kind, start in _STARTS.items() if re.match(start, content, re.DOTALL)), "")
    if isinstance(error, UnidentifiedImageError) and kind not in FORMATS:
        foreign = (what for what, start in _FOREIGN.items() if re.match(start, content, re.DOTALL))
        return ImageError("unsupported", f"{shown} is {next(foreign, kind or 'in no picture format that mimco reads')}")
    text = "its header is broken" if isinstance(error, UnidentifiedImageError) else _one_line(error)
    problem: ImageProblem = "truncated" if _cut_off(error, kind, content) else "corrupt"
    return ImageError(problem, f"{shown} is {problem}: {kind or 'picture'}, {text}")


def _cut_off(error: Exception, kind: str, content: bytes) -> bool:
    if isinstance(error, EOFError | struct.error) or re.search("truncat|not enough", str(error), re.IGNORECASE):
        return True
    if kind == "WEBP":
        return int.from_bytes(content[4:8], "little") + 8 > len(content)  # its header states its length
    return kind in _ENDS and _ENDS[kind] not in content[-1024:]  # some programs append to a picture


def _one_line(error: Exception) -> str:
    text = " ".join((getattr(error, "strerror", None) or str(error)).split())
    return text[:200] if text.isprintable() and text else type(error).__name__


def shown_name(name: str) -> str:
    """In a message of one line: file names may hold line ends, bytes that are no text and what steers a terminal."""
    return name if plain(name) == name and "\n" not in name else ascii(name)
