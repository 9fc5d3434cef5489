"""Files that are given out: only what the index holds, whatever lies at its place by now.

Size and date do not tell. Whoever may write in an indexed folder could put a link there, of the size and date of a
picture that was indexed, to a file that he may not read and this process may. So a file is opened once, its content is
hashed, and what is open is what is sent.
"""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

from mimco_deploy.serving.scan import Stamp, stamp_of

_REMEMBERED = 4096


class Originals:
    """Opens files as they were indexed; remembers which it has hashed. Safe to use from several threads."""

    def __init__(self) -> None:
        self._hashed: dict[str, tuple[int, ...]] = {}
        """Content → device, inode, size, dates; a write or another file in its place changes one of them."""

    def open(self, path: Path, stamp: Stamp, content: str) -> int | None:
        """A descriptor, at the start; None where the file is another one now.

        Args:
            path: of the file.
            stamp: as it was indexed.
            content: SHA-256, hexadecimal.

        Raises:
            OSError: it is gone or cannot be read.
        """
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe is not waited for
        try:
            if self._is_as_indexed(descriptor, stamp, content):
                os.lseek(descriptor, 0, os.SEEK_SET)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        return None

    def _is_as_indexed(self, descriptor: int, stamp: Stamp, content: str) -> bool:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or stamp_of(status) != stamp:
            return False
        identity = (status.st_dev, status.st_ino, *stamp, status.st_ctime_ns)
        if self._hashed.get(content) == identity:
            return True
        with open(descriptor, "rb", closefd=False) as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != content:
                return False
        if len(self._hashed) >= _REMEMBERED:
            self._hashed.clear()
        self._hashed[content] = identity
        return True
