"""How an index lies on the disk, who may write it, and how a rebuilt one takes its place.

    index/
    ├── index.json          {"format_version": 1, "generation": 3}: which folder is the index
    ├── lock                flock while somebody writes; holds the writer's process id
    └── 000003/             one generation
        ├── catalog.sqlite
        ├── vectors.f32
        └── ann-000001.faiss    an approximation for fast searching, where there is one; derived

An update grows the current generation. A rebuild fills the next one beside it and then replaces `index.json`, one
rename: readers of the old one go on reading what they opened, the lock never moves, and a rebuild that was killed goes
on where it stopped. No number comes twice, so SQLite never finds the journal of another catalogue under its name.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mimco_deploy.atomic import sync_dir, write_bytes
from mimco_deploy.errors import EncoderMismatchError, IndexBusyError, IndexStoreError
from mimco_deploy.serving.catalog import BUDGET, Catalog, create_catalog
from mimco_deploy.serving.salvage import Salvage
from mimco_deploy.serving.schema import other_format
from mimco_deploy.serving.vectors import create_vectors, read_vectors

FORMAT_VERSION = 1
POINTER_FILE = "index.json"
LOCK_FILE = "lock"
STAGING_FOLDER = ".staging"
CATALOG_FILE = "catalog.sqlite"


@dataclass(frozen=True)
class Generation:
    """One complete set of index files."""

    path: Path
    """The folder; its name is the number, six digits."""

    @property
    def number(self) -> int:
        """Counts up from 1."""
        return int(self.path.name)

    @property
    def catalog(self) -> Path:
        """The truth."""
        return self.path / CATALOG_FILE

    @property
    def vectors(self) -> Path:
        """The embeddings."""
        return self.path / "vectors.f32"


def has_index(index: Path) -> bool:
    """Whether there is an index to read."""
    return (index / POINTER_FILE).is_file()


def current_generation(index: Path) -> Generation:
    """Find the generation to read.

    Raises:
        IndexNewerError: its pointer is of a newer format.
        IndexStoreError: there is no index, or its pointer cannot be read.
    """
    pointer = index / POINTER_FILE
    if not has_index(index):
        raise IndexStoreError(f"no index in {index}", command="mimco index DIR")
    try:
        document = json.loads(pointer.read_text(encoding="utf-8"))
        version, number = document["format_version"], int(document["generation"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise IndexStoreError(f"{pointer} cannot be read ({error!r})", command="mimco index repair") from error
    if version != FORMAT_VERSION:
        raise other_format(pointer, version, FORMAT_VERSION)
    return _generation(index, number)


def begin_generation(index: Path, fingerprint: str, dim: int) -> Generation:
    """Make a generation after the current one, or go on with one that was begun for the same encoder.

    Call under `writer_lock`. Readers do not see it before `switch_to`.

    Raises:
        IndexStoreError: the pointer is lost, and with it which generation was the index.
    """
    later = _later(index, _last_number(index))
    for begun in later:
        if _was_begun_for(begun, fingerprint, dim):
            return begun
    if not has_index(index) and any(_holds_rows_of_another(one, "") for one in later):
        raise IndexStoreError(f"{index} has lost its {POINTER_FILE}", command="mimco index repair")
    generation = _generation(index, max((one.number for one in later), default=_last_number(index)) + 1)
    with _explained(index):
        for begun in later:
            shutil.rmtree(begun.path, ignore_errors=True)
        generation.path.mkdir(parents=True)
        create_vectors(generation.vectors, dim)
        create_catalog(generation.catalog, fingerprint, dim)
        sync_dir(generation.path)
        sync_dir(index)
    return generation


def move_rebuild(index: Path, old: Generation, new: Generation) -> None:
    """Let what another encoder embedded anew, when it was cut short, follow the rewrite that takes the index's place.

    The rewrite has a higher number, so the rebuild would be swept away. One by the same encoder may go, since its
    embeddings are those that the index holds. Call under `writer_lock`, between `promote` and `switch_to`: after a
    crash in between the rebuild is found all the same.

    Raises:
        IndexStoreError: it cannot be moved, or not be looked at for now.
    """
    with Catalog(new.catalog) as catalog:
        fingerprint = catalog.fingerprint
    for begun in _later(index, old.number):
        if begun.number < new.number and _holds_rows_of_another(begun, fingerprint):
            with _explained(index):
                begun.path.replace(_generation(index, _later(index, old.number)[0].number + 1).path)
                sync_dir(index)


def _later(index: Path, number: int) -> list[Generation]:
    """Generations above a number, the highest first: what was begun, and what a crash left."""
    if not index.is_dir():
        return []
    numbers = [int(folder.name) for folder in index.iterdir() if folder.name.isdecimal()]
    return [_generation(index, one) for one in sorted(numbers, reverse=True) if one > number]


def _holds_rows_of_another(begun: Generation, fingerprint: str) -> bool:
    with _if_readable(), Catalog(begun.catalog) as catalog, catalog.snapshot():
        return catalog.fingerprint != fingerprint and catalog.row_count() > 0
    return False  # nothing that a rebuild would go on with


def take_over(index: Path, begun: Catalog, folders: Sequence[Path]) -> None:
    """Bring a rebuild, which may have been cut short, in line with the index that it replaces.

    It gets the budget of that, and loses the folders that were forgotten or that moved since it was begun; their
    embeddings stay, dead. Nothing is done where there is no old index that can be read.

    Args:
        index: the index folder.
        begun: catalogue of the generation that is filled.
        folders: that are to be indexed, beside those that the old index has.
    """
    budget: str | None = None
    wanted: set[Path] | None = None
    with _if_readable(), Catalog(current_generation(index).catalog) as old, old.snapshot():
        budget, wanted = old.setting(BUDGET), {*folders, *(root.path for root in old.roots())}
    if wanted is None:
        return
    with begun.transaction():
        begun.set_setting(BUDGET, budget)
        for root in begun.roots():
            if root.path not in wanted:
                begun.remove_root(root)


def files_to_replace(index: Path) -> list[Path]:
    """The files, absolute, of the index that a rebuild replaces; none where there is none that can be read."""
    with _if_readable(), Catalog(current_generation(index).catalog) as old, old.snapshot():
        return old.files()
    return []


def stage_generation(index: Path) -> Generation:
    """Make an empty folder to fill, which is no generation before `promote`. Call under `writer_lock`.

    A crash leaves it to the next writer, who removes it.
    """
    staging = index / STAGING_FOLDER
    with _explained(index):
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
    return Generation(staging)


def promote(index: Path, staged: Generation) -> Generation:
    """Give a filled folder the next free number. `switch_to` then makes it the current one."""
    generation = _generation(index, max((one.number for one in _later(index, 0)), default=0) + 1)
    with _explained(index):
        sync_dir(staged.path)
        staged.path.replace(generation.path)
        sync_dir(index)
    return generation


def newest_generation(index: Path) -> Generation | None:
    """The current generation or, where the pointer is lost, the one that holds most; None where none can be read.

    Raises:
        IndexBusyError: one of them is held for now, or of a newer format.
    """
    with _if_readable():
        current = current_generation(index)
        if current.path.is_dir():
            return current
    held: list[tuple[int, int, Generation]] = []
    for folder in index.iterdir():
        if folder.name.isdecimal():
            with _if_readable(), Salvage(folder / CATALOG_FILE) as salvage:
                held.append((sum(1 for _ in salvage.crc32s()), int(folder.name), Generation(folder)))
    return max(held)[2] if held else None


def switch_to(index: Path, generation: Generation) -> None:
    """Make a generation the current one and remove those before it. Call under `writer_lock`."""
    document = {"format_version": FORMAT_VERSION, "generation": generation.number}
    with _explained(index):
        write_bytes(index / POINTER_FILE, (json.dumps(document) + "\n").encode())
    sweep(index, generation)


def sweep(index: Path, current: Generation) -> None:
    """Remove what a crash may have left: older generations, half a pointer or rewrite. Call under `writer_lock`."""
    for file in index.glob(f".{POINTER_FILE}.*.tmp"):
        file.unlink(missing_ok=True)
    for folder in [index / STAGING_FOLDER, *index.iterdir()]:
        if folder.name == STAGING_FOLDER or (folder.name.isdecimal() and int(folder.name) < current.number):
            shutil.rmtree(folder, ignore_errors=True)


def check_encoder(index: Path, recorded: str, fingerprint: str) -> None:
    """Refuse an index made by another encoder: its embeddings mean something else.

    Args:
        index: the index folder.
        recorded: fingerprint that its catalogue holds.
        fingerprint: of the encoder at hand.

    Raises:
        EncoderMismatchError: they differ.
    """
    if recorded != fingerprint:
        raise EncoderMismatchError(
            f"the index in {index} was made by encoder {recorded[:12]}",
            expected=f"{fingerprint[:12]}, the encoder at hand",
            command="mimco index reindex",
        )


@contextlib.contextmanager
def writer_lock(index: Path) -> Iterator[None]:
    """Be the only writer of an index while the block runs. The lock falls with the process, however it ends.

    Raises:
        IndexBusyError: another process writes.
        IndexStoreError: the file system has no locks, or refuses to be written.
    """
    with _explained(index):
        index.mkdir(parents=True, exist_ok=True)
        file = (index / LOCK_FILE).open("a+", encoding="utf-8")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise IndexBusyError(
                f"the index in {index} is being written by process {holder}", expected="one writer at a time"
            ) from None
        except OSError as error:  # as some network file systems give
            raise IndexStoreError(
                f"the file system of {index} gives no locks ({error.strerror})", expected="a local disk"
            ) from error
        with _explained(index):
            file.truncate(0)
            file.write(f"{os.getpid()}\n")
            file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def writing_process(index: Path) -> int | None:
    """Number of the process that writes an index now, None where none does. A hint: it may be out of date at once."""
    try:
        number = int((index / LOCK_FILE).read_text(encoding="utf-8"))
        os.kill(number, 0)
    except PermissionError:
        return number  # somebody else's
    except (OSError, ValueError, OverflowError):
        return None
    return number


@contextlib.contextmanager
def _explained(index: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise IndexStoreError(
            f"the index in {index} cannot be written ({error.strerror})",
            expected="room on the disk and the right to write",
        ) from error


def _generation(index: Path, number: int) -> Generation:
    return Generation(index / f"{number:06d}")


def _last_number(index: Path) -> int:
    """Number of the current generation, 0 where there is none; of the newest where the pointer is broken."""
    if not has_index(index):
        return 0
    try:
        return current_generation(index).number
    except IndexStoreError:
        return max((int(folder.name) for folder in index.iterdir() if folder.name.isdecimal()), default=0)


def _was_begun_for(generation: Generation, fingerprint: str, dim: int) -> bool:
    with _if_readable(), Catalog(generation.catalog) as catalog, catalog.snapshot():
        read_vectors(generation.vectors, catalog.embedding_dim, catalog.row_count())
        return catalog.fingerprint == fingerprint and catalog.embedding_dim == dim
    return False


@contextlib.contextmanager
def _if_readable() -> Iterator[None]:
    """Leave off where an index is broken or not there. One that is held for now, or of a newer format, is neither."""
    try:
        yield
    except IndexBusyError:
        raise
    except IndexStoreError:
        pass
