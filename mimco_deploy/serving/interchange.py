"""An index as files that other programs read, and back: Parquet, or .npy with a JSON line for each embedding.

    photos.parquet           a row for each file: path, root, sha256, size, mtime_ns, facts, embedding (D × float32)
    photos.npy               [N, D] float32
    photos.npy.jsonl         N + 1 lines: a header, then the same of each embedding, facts where there are any

The header, in Parquet the metadata under the key `mimco`, is JSON: format_version, fingerprint, embedding_dim. A name
that is not UTF-8 keeps its bytes as the surrogate escapes of Python, which JSON can carry; Parquet cannot, and has
them in the column `path_bytes`. Imported files count as seen: the next update reads only what has changed since.
"""

from __future__ import annotations

import contextlib
import json
import os
import tokenize
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from mimco_deploy.atomic import only_writer, remove_temporaries, sync_dir, sync_file, temporary_beside
from mimco_deploy.errors import IndexStoreError, MissingExtraError
from mimco_deploy.images import Facts
from mimco_deploy.serving.catalog import Catalog, NewContent, Root
from mimco_deploy.serving.generations import (
    Generation,
    begin_generation,
    check_encoder,
    current_generation,
    has_index,
    switch_to,
    writer_lock,
)
from mimco_deploy.serving.inspect import read_current
from mimco_deploy.serving.roots import record_roots
from mimco_deploy.serving.scan import Stamp, readable
from mimco_deploy.serving.tuning import keep_tuned_or_warn
from mimco_deploy.serving.vectors import VectorWriter, crc32s, read_vectors

T = TypeVar("T")

FORMAT_VERSION = 1
_ROWS = 8192
"""Rows in a portion: 12 MB of embeddings at 384 numbers."""
_NORM = 1e-3
_MAX_LINE_BYTES = 2**16
_UNREADABLE = (
    *(OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError),
    *(SyntaxError, tokenize.TokenError, MemoryError),  # of NumPy's headers
)
"""What files of any content make their readers raise."""
_MAX_PATH_BYTES = 8192
"""Of a folder and a path below it; Linux takes 4096 at once."""
_MAX_FACT = 256
FACTS = tuple(one.name for one in fields(Facts))


@dataclass(frozen=True)
class Header:
    """What the embeddings are."""

    format_version: int
    fingerprint: str
    embedding_dim: int


@dataclass(frozen=True)
class Record:
    """One file and what is known of it."""

    root: str
    """Indexed folder, absolute."""
    path: str
    """Relative to it."""
    sha256: str
    """Of its content, hexadecimal."""
    size: int
    mtime_ns: int
    width_px: int | None = None
    height_px: int | None = None
    taken: str | None = None
    camera: str | None = None


Portion = tuple[list[Record], npt.NDArray[np.float32]]
"""Records and their embeddings [B, D]."""


def export_index(index: Path, target: Path) -> int:
    """Write all files of an index with their embeddings, as it is now: an update does not wait for the end.

    Args:
        index: the index folder.
        target: a name that ends in `.parquet` or `.npy`; replaced where it exists.

    Returns:
        How many files were written.

    Raises:
        IndexStoreError: there is no index, the ending is another, or the target cannot be written.
        MissingExtraError: Parquet without pyarrow.
    """
    write = _format_of(target)[0]
    if not target.parent.is_dir():
        raise IndexStoreError(f"no folder {readable(target.parent)}", expected="one that exists, to write into")
    target = Path(os.path.realpath(target))
    with only_writer(target, IndexStoreError(f"another process writes {readable(target)}", expected="one at a time")):
        return read_current(index, lambda generation: _export(generation, target, write))


def _export(generation: Generation, target: Path, write: Callable[..., None]) -> int:
    with Catalog(generation.catalog, private=True) as catalog, catalog.snapshot():
        header = Header(FORMAT_VERSION, catalog.fingerprint, catalog.embedding_dim)
        vectors = read_vectors(generation.vectors, catalog.embedding_dim, catalog.row_count())
        count = catalog.counts().files
        finals = [target] if target.suffix == ".parquet" else [target, _lines_of(target)]
        temporary = [temporary_beside(path) for path in finals]
        try:
            for final in finals:
                remove_temporaries(final)
            write(temporary, header, count, _portions(catalog, vectors))
            for path in temporary:
                sync_file(path)
            for final in finals[1:]:
                final.unlink(missing_ok=True)  # so that a crash leaves no lines of other embeddings
            for path, final in zip(temporary, finals, strict=True):
                path.replace(final)
            sync_dir(target.parent)
        except OSError as error:
            raise IndexStoreError(
                f"{readable(target)} cannot be written ({error.strerror or error})",
                expected="room on the disk and the right to write",
            ) from error
        finally:
            for path in temporary:
                path.unlink(missing_ok=True)
    return count


def import_index(index: Path, source: Path) -> int:
    """Take the files and embeddings of an export into an index, which is made if missing.

    Args:
        index: the index folder; one that exists must be of the same encoder.
        source: as `export_index` wrote it.

    Returns:
        How many files were taken in.

    Raises:
        IndexStoreError: the source is broken, which is found before anything of a portion is taken in.
        EncoderMismatchError: the index is of another encoder.
        MissingExtraError: Parquet without pyarrow.
    """
    read = _format_of(source)[1]
    with contextlib.ExitStack() as stack:
        try:
            header, portions = read(source, stack)
            checked = _checked(portions, header.embedding_dim, source)
            # Checked before a new index is made, which would be bound to the encoder of a broken source.
            first = list(islice(checked, 1))
        except _UNREADABLE as error:
            raise _broken(source, error) from error
        stack.enter_context(writer_lock(index))
        if has_index(index):
            generation = current_generation(index)
        else:
            generation = begin_generation(index, header.fingerprint, header.embedding_dim)
            switch_to(index, generation)
        catalog = stack.enter_context(Catalog(generation.catalog))
        check_encoder(index, catalog.fingerprint, header.fingerprint)
        catalog.upgrade()
        with catalog.snapshot():
            rows = catalog.row_count()
        count = 0
        with VectorWriter(generation.vectors, catalog.embedding_dim, rows) as writer:
            try:
                for records, embeddings in chain(first, checked):
                    _take_in(catalog, writer, records, embeddings)
                    count += len(records)
            except _UNREADABLE as error:
                raise _broken(source, error) from error
        keep_tuned_or_warn(generation, catalog)
    return count


def _take_in(
    catalog: Catalog, writer: VectorWriter, records: list[Record], embeddings: npt.NDArray[np.float32]
) -> None:
    with catalog.snapshot():
        fresh: dict[bytes, int] = {}
        for number, record in enumerate(records):
            sha256 = bytes.fromhex(record.sha256)
            if sha256 not in fresh and catalog.row_of(sha256) is None:
                fresh[sha256] = number
    chosen = embeddings[list(fresh.values())]
    first_row = writer.append(chosen) if fresh else writer.count
    with catalog.transaction():
        record_roots(catalog, [Path(record.root) for record in records])  # all, before the first may be absorbed
        roots: dict[str, Root] = {}
        contents: list[NewContent] = []
        for (sha256, number), crc32 in zip(fresh.items(), crc32s(chosen), strict=True):
            facts = {name: getattr(records[number], name) for name in FACTS}
            contents.append(NewContent(sha256, crc32, Facts(**facts)))
        catalog.add_contents(first_row, contents)
        for record in records:
            if record.root not in roots:
                (roots[record.root],) = record_roots(catalog, [Path(record.root)])
            root = roots[record.root]
            row = catalog.row_of(bytes.fromhex(record.sha256))
            assert row is not None
            path = os.fspath((Path(record.root) / record.path).relative_to(root.path))
            catalog.put_file(root, path, Stamp(record.size, record.mtime_ns), row)


def _checked(portions: Iterable[Portion], dim: int, source: Path) -> Iterator[Portion]:
    for records, embeddings in portions:
        _check(records, embeddings, dim, source)
        yield records, embeddings


def _check(records: list[Record], embeddings: npt.NDArray[np.float32], dim: int, source: Path) -> None:
    if embeddings.shape != (len(records), dim):
        raise ValueError(f"embeddings of shape {list(embeddings.shape)}, not [{len(records)}, {dim}]")
    unsound = ~(np.abs(np.linalg.norm(embeddings.astype(np.float64), axis=1) - 1) < _NORM)
    if unsound.any():
        name = records[int(np.flatnonzero(unsound)[0])].path
        raise IndexStoreError(
            f"{source}: the embedding of {readable(name)} is not of length 1", expected="L2-normalised embeddings"
        )
    for record in records:
        root, path = Path(record.root), Path(record.path)
        if not root.is_absolute() or path.is_absolute() or not path.parts or ".." in root.parts + path.parts:
            raise ValueError(f"{record.path!r} does not lie below the folder {record.root!r}")
        if (
            "\0" in record.root + record.path
            or len(os.fsencode(record.root) + os.fsencode(record.path)) > _MAX_PATH_BYTES
        ):
            raise ValueError(f"{record.path[:80]!r} below {record.root[:80]!r} is no path of a file")
        numbers = (record.size, record.mtime_ns, record.width_px or 0, record.height_px or 0)
        texts = (record.taken or "", record.camera or "")
        if record.size < 0 or max(map(abs, numbers)) >= 2**63 or max(map(len, texts)) > _MAX_FACT:
            raise ValueError(f"{record.path!r} has facts that no picture has")
        if len(bytes.fromhex(record.sha256)) != 32:
            raise ValueError(f"{record.sha256!r} is no SHA-256")


def _portions(catalog: Catalog, vectors: npt.NDArray[np.float32]) -> Iterator[Portion]:
    records: list[Record] = []
    rows: list[int] = []
    for file in catalog.listing():
        records.append(Record(file.root, file.path, file.sha256.hex(), *file.stamp, **asdict(file.facts)))
        rows.append(file.row)
        if len(records) == _ROWS:
            yield records, vectors[rows]
            records, rows = [], []
    if records:
        yield records, vectors[rows]


def _format_of(path: Path) -> tuple[Any, Any]:
    formats = {".parquet": (_write_parquet, _read_parquet), ".npy": (_write_npy, _read_npy)}
    if path.suffix not in formats:
        raise IndexStoreError(f"{readable(path)} ends in {path.suffix or 'nothing'}", expected=".parquet or .npy")
    return formats[path.suffix]


def _lines_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.jsonl")


def _broken(source: Path, error: Exception) -> IndexStoreError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return IndexStoreError(
        f"{readable(source)} cannot be read ({reason})", expected="an export of `mimco index export`"
    )


# ---------------------------------------------------------------------------------------------------- .npy


def _write_npy(paths: list[Path], header: Header, count: int, portions: Iterable[Portion]) -> None:
    with paths[0].open("wb") as file, paths[1].open("w", encoding="ascii") as lines:
        shape = {"descr": "<f4", "fortran_order": False, "shape": (count, header.embedding_dim)}
        np.lib.format.write_array_header_1_0(file, shape)
        lines.write(json.dumps(asdict(header)) + "\n")
        for records, embeddings in portions:
            file.write(np.ascontiguousarray(embeddings, "<f4").data)
            for record in records:
                names = {"root": _as_utf8(record.root), "path": _as_utf8(record.path)}
                lines.write(json.dumps(asdict(record) | names) + "\n")


def _read_npy(path: Path, stack: contextlib.ExitStack) -> tuple[Header, Iterator[Portion]]:
    embeddings: npt.NDArray[Any] = np.lib.format.open_memmap(path, mode="r")  # refuses what would be unpickled
    if embeddings.ndim != 2 or embeddings.dtype != np.float32:
        raise ValueError(f"{embeddings.dtype} of shape {list(embeddings.shape)}, not float32 [N, D]")
    lines = stack.enter_context(_lines_of(path).open(encoding="ascii"))
    header = _header(json.loads(lines.readline(_MAX_LINE_BYTES)))

    def portions() -> Iterator[Portion]:
        for start in range(0, len(embeddings), _ROWS):
            part = np.asarray(embeddings[start : start + _ROWS])
            yield [_record(json.loads(lines.readline(_MAX_LINE_BYTES))) for _ in part], part
        if lines.readline(1):
            raise ValueError(f"more lines than its {len(embeddings)} embeddings")

    return header, portions()


def _header(document: dict[str, Any]) -> Header:
    header = Header(document["format_version"], str(document["fingerprint"]), int(document["embedding_dim"]))
    if not 0 < header.embedding_dim < 2**16:
        raise ValueError(f"embeddings of {header.embedding_dim} numbers")
    if header.format_version != FORMAT_VERSION:
        raise ValueError(f"format version {header.format_version}, not {FORMAT_VERSION}")
    return header


def _record(document: dict[str, Any]) -> Record:
    return Record(
        root=_from_utf8(str(document["root"])),
        path=_from_utf8(str(document["path"])),
        sha256=str(document["sha256"]),
        size=int(document["size"]),
        mtime_ns=int(document["mtime_ns"]),
        width_px=_or_none(int, document.get("width_px")),
        height_px=_or_none(int, document.get("height_px")),
        taken=_or_none(str, document.get("taken")),
        camera=_or_none(str, document.get("camera")),
    )


def _as_utf8(name: str) -> str:
    """A name in an export, whatever the encoding of names here: a byte that is not UTF-8 is a surrogate escape."""
    return os.fsencode(name).decode("utf-8", "surrogateescape")


def _from_utf8(name: str) -> str:
    return os.fsdecode(name.encode("utf-8", "surrogateescape"))


def _or_none(kind: Callable[[Any], T], value: object) -> T | None:
    return None if value is None else kind(value)


# ------------------------------------------------------------------------------------------------- Parquet


def import_pyarrow() -> Any:
    """The package pyarrow.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            "the package pyarrow is not installed", command='pip install "mimco-deploy[parquet]"'
        ) from error
    return pyarrow


def _write_parquet(paths: list[Path], header: Header, _: int, portions: Iterable[Portion]) -> None:
    pa = import_pyarrow()
    schema = pa.schema(
        [
            ("path", pa.string()),
            ("root", pa.string()),
            ("sha256", pa.string()),
            ("size", pa.int64()),
            ("mtime_ns", pa.int64()),
            ("width_px", pa.int64()),
            ("height_px", pa.int64()),
            ("taken", pa.string()),
            ("camera", pa.string()),
            ("path_bytes", pa.binary()),
            ("root_bytes", pa.binary()),
            ("embedding", pa.list_(pa.float32(), header.embedding_dim)),
        ],
        metadata={"mimco": json.dumps(asdict(header))},
    )
    with pa.parquet.ParquetWriter(paths[0], schema, compression="zstd") as writer:
        for records, embeddings in portions:
            flat = pa.array(np.ascontiguousarray(embeddings).reshape(-1))
            rows = [
                asdict(record)
                | {"path": readable(record.path), "root": readable(record.root)}
                | {"path_bytes": _bytes_of(record.path), "root_bytes": _bytes_of(record.root)}
                for record in records
            ]
            columns = [pa.array([row[one.name] for row in rows], one.type) for one in list(schema)[:-1]]
            columns.append(pa.FixedSizeListArray.from_arrays(flat, header.embedding_dim))
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))


def _read_parquet(path: Path, stack: contextlib.ExitStack) -> tuple[Header, Iterator[Portion]]:
    pa = import_pyarrow()
    file = stack.enter_context(pa.parquet.ParquetFile(path))
    header = _header(json.loads(file.schema_arrow.metadata[b"mimco"]))

    def portions() -> Iterator[Portion]:
        for batch in file.iter_batches(_ROWS):
            for name in ("path", "root", "sha256", "taken", "camera", "path_bytes", "root_bytes"):
                if name in batch.schema.names:  # one long text can stand in a file once and in every row
                    longest = pa.compute.max(pa.compute.binary_length(batch.column(name))).as_py()
                    if (longest or 0) > _MAX_PATH_BYTES:
                        raise ValueError(f"{name} of {longest:,} bytes")
            embeddings = batch.column("embedding").flatten().to_numpy(zero_copy_only=False)
            rows = batch.drop_columns(["embedding"]).to_pylist()
            records = [_record({**row, "path": _name(row, "path"), "root": _name(row, "root")}) for row in rows]
            yield records, np.asarray(embeddings, np.float32).reshape(len(records), -1)

    return header, portions()


def _bytes_of(name: str) -> bytes | None:
    """The bytes of a name that is not text, else None."""
    return None if _as_utf8(name).isprintable() else os.fsencode(name)


def _name(row: dict[str, Any], key: str) -> str:
    content = row.get(f"{key}_bytes")
    return str(row[key]) if content is None else content.decode("utf-8", "surrogateescape")
