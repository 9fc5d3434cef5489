"""The process that reads and decodes files, so that one that hangs or crashes its decoder costs one file.

It ends itself: a timer of the system kills it where a file takes too long, and a limit of the system refuses it memory
beyond a bound. `guarded.py` starts it, and starts another when it is gone. Both sides write frames, a length of four
bytes and that many bytes:

    asked     REQUEST, path       or, with the flag CONTENT, the content itself
    hash      b"H" stamp sha256   with the flag HASH; answered by b"1", decode it, or b"0", do not
    pixels    b"P" stamp sha256 length-of-facts facts pixels     facts: JSON of `images.Facts`
    refused   b"R" stamp problem NUL words
    small     b"T" JPEG           where a side for thumbnails was asked for
    bad crop  b"C" words
    vanished  b"V"

The stamp is size and mtime_ns. It is taken from the open file before its bytes are read, so a file that is written to
meanwhile has another stamp at the next walk and is read again. Standard library, NumPy and Pillow only.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import resource
import signal
import struct
import sys
from dataclasses import asdict
from typing import IO, cast

from PIL import Image

from mimco_deploy.errors import ConfigError, ImageError
from mimco_deploy.images import MAX_BYTES, decode_image, read_facts, shown_name
from mimco_deploy.preprocess import Crop, CropMode, Interpolation, decode_pixels
from mimco_deploy.serving.scan import stamp_of

Geometry = tuple[int, float, Interpolation, CropMode]
"""See `EncoderSpec.geometry`."""
REQUEST = struct.Struct("<BI4d")
"""Flags; longest side of a thumbnail, or 0 for pixels; crop, of width 0 for none."""
HASH, CONTENT = 1, 2
STAMP = struct.Struct("<qq")
LENGTH = struct.Struct("<I")
READY = b"ready"
_NO_STAMP = STAMP.pack(-1, -1)
"""No file has it."""
_JPEG_QUALITY = 82


def write_frame(file: IO[bytes], *parts: bytes | memoryview) -> None:
    """Write one frame."""
    file.write(LENGTH.pack(sum(len(part) for part in parts)))
    for part in parts:
        file.write(part)
    file.flush()


def read_frame(file: IO[bytes]) -> bytes:
    """Read one frame.

    Raises:
        EOFError: the other side is gone.
    """
    head = file.read(LENGTH.size)
    if len(head) < LENGTH.size:
        raise EOFError
    (length,) = LENGTH.unpack(head)
    content = file.read(length)
    if len(content) < length:
        raise EOFError
    return content


def main(geometry: Geometry, limit_s: float, limit_mib: int) -> None:
    """Read files until nobody asks any more.

    Args:
        geometry: of the encoder.
        limit_s: after which a file is given up, with the process.
        limit_mib: memory that the process may take.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process, whatever its decoder does
    with contextlib.suppress(ValueError, OSError):  # not every system has it
        resource.setrlimit(resource.RLIMIT_AS, (limit_mib * 2**20,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    asked, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    answers.write(READY)
    answers.flush()
    silent = os.open(os.devnull, os.O_RDWR)  # decoders written in C talk to stdout and stderr
    for descriptor in (0, 1, 2):
        os.dup2(silent, descriptor)
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            request = read_frame(asked)
            signal.setitimer(signal.ITIMER_REAL, limit_s)
            _serve(request, asked, answers, geometry)
            signal.setitimer(signal.ITIMER_REAL, 0)


def _serve(request: bytes, asked: IO[bytes], answers: IO[bytes], geometry: Geometry) -> None:
    stamp = _NO_STAMP
    name = "picture" if request[0] & CONTENT else os.fsdecode(request[REQUEST.size :])
    shown = shown_name(name)
    try:
        if request[0] & CONTENT:
            content = request[REQUEST.size :]
        else:
            try:
                file = open(name, "rb")  # noqa: PTH123, SIM115  # a Path would be made for nothing
            except (FileNotFoundError, NotADirectoryError):  # only here: what a decoder misses later is another file
                write_frame(answers, b"V")
                return
            with file:
                status = os.fstat(file.fileno())
                stamp = STAMP.pack(*stamp_of(status))
                if status.st_size > MAX_BYTES:
                    raise ImageError("too_large", f"{shown} has {status.st_size:,} bytes, more than {MAX_BYTES:,}")
                content = file.read(status.st_size + 1)  # bounded also where it grows
        _answer(request, content, name, stamp, asked, answers, geometry)
    except ImageError as error:
        _refuse(answers, stamp, error.problem, error.found)
    except ConfigError as error:
        write_frame(answers, b"C", str(error).encode())
    except MemoryError:
        _refuse(answers, stamp, "too_large", f"{shown} needs more memory than a file may take")
    except OSError as error:
        _refuse(answers, stamp, "unreadable", f"{shown} cannot be read ({error.strerror})")


def _answer(
    request: bytes,
    content: bytes,
    name: str,
    stamp: bytes,
    asked: IO[bytes],
    answers: IO[bytes],
    geometry: Geometry,
) -> None:
    flags, thumbnail_px, *box = REQUEST.unpack_from(request)
    if thumbnail_px:
        write_frame(answers, b"T", _thumbnail(content, name, thumbnail_px))
        return
    sha256 = hashlib.sha256(content).digest()
    if flags & HASH:
        write_frame(answers, b"H", stamp, sha256)
        if read_frame(asked) == b"0":
            return
    crop: Crop | None = (box[0], box[1], box[2], box[3]) if box[2] else None
    pixels = decode_pixels(content, name, *geometry, crop)
    facts = json.dumps(asdict(read_facts(content))).encode()
    write_frame(answers, b"P", stamp, sha256, LENGTH.pack(len(facts)), facts, pixels.data.cast("B"))


def _thumbnail(content: bytes, name: str, side_px: int) -> bytes:
    picture = decode_image(content, name, side_px)
    picture.thumbnail((side_px, side_px), Image.Resampling.LANCZOS)
    encoded = io.BytesIO()
    picture.save(encoded, "JPEG", quality=_JPEG_QUALITY)
    return encoded.getvalue()


def _refuse(answers: IO[bytes], stamp: bytes, problem: str, found: str) -> None:
    write_frame(answers, b"R", stamp, problem.encode(), b"\0", os.fsencode(found))


if __name__ == "__main__":
    side_px, share, how, mode, *limits = sys.argv[1:]
    geometry = (int(side_px), float(share), cast(Interpolation, how), cast(CropMode, mode))
    main(geometry, float(limits[0]), int(limits[1]))
