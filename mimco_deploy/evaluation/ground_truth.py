"""The ground truth of Revisited Oxford and Paris (arXiv 1803.11285), read without running it.

The ground truth is published as a pickle, which is a program that its reader runs. Here what it may name are numpy's
arrays, types and numbers, and bytes; for each it gets a stand-in of ours that only remembers. Whatever else it names,
and every instruction that data has no use for, is refused. Numbers are read from what the stand-ins remember.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mimco_deploy.errors import EvaluationError
from mimco_deploy.evaluation.retrieval import Labels

Box = tuple[float, float, float, float]

_MAX_BYTES = 8 * 2**20
"""Six thousand names and a hundred thousand numbers fill a fifth of it."""
_MAX_INDICES = 10_000_000
"""Of all queries together; one list can stand in a file once and count for many queries."""
_MAX_TUPLES = 20_000
"""Hashing a tuple in a tuple, and so on, overflows the interpreter's stack; 70 queries' arrays need 1,700."""
_DATA_OPCODES = frozenset(
    {
        *("PROTO", "FRAME", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE"),
        *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
        *("BINUNICODE", "SHORT_BINUNICODE", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES"),
        *("EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_DICT", "SETITEM", "SETITEMS"),
        *("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
        *("BINPUT", "LONG_BINPUT", "MEMOIZE", "BINGET", "LONG_BINGET"),
        *("GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD"),
        # Protocol 0, Python 2's default: the same as lines of text.
        *("INT", "LONG", "FLOAT", "STRING", "UNICODE", "LIST", "DICT", "PUT", "GET"),
    }
)
_PUTS = ("PUT", "BINPUT", "LONG_BINPUT")
_NUMBERS = frozenset({"i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f4", "f8"})
_EXPECTED = "gnd_roxford5k.pkl or gnd_rparis6k.pkl as published, or the same as .json"


@dataclass(frozen=True, kw_only=True, eq=False)
class GroundTruth:
    """Which pictures of the gallery show what a query shows. Q queries, N pictures in the gallery."""

    gallery: tuple[str, ...]
    """[N], names without the suffix of a picture."""
    queries: tuple[str, ...]
    """[Q], the same."""
    boxes: tuple[Box | None, ...]
    """[Q], the part of the query that is searched with: x1, y1, x2, y2 in px of the original; None for all of it."""
    easy: tuple[Labels, ...]
    """[Q], gallery numbers, in [0, N): clearly the same building."""
    hard: tuple[Labels, ...]
    """[Q], the same building, in another light, from aside or far away."""
    junk: tuple[Labels, ...]
    """[Q], hardly recognisable: neither right nor wrong."""


def read_ground_truth(path: Path) -> GroundTruth:
    """Reads a published ground truth; nothing in it is executed.

    Args:
        path: a dict of `imlist`, `qimlist` and `gnd`, a list with `bbx`, `easy`, `hard` and `junk` for each query, as
            `.pkl` or `.json`; at most 8 MiB. `bbx` may be missing or null.

    Raises:
        EvaluationError: not there, too large, not such a file, without queries or gallery, a pickle of anything but
            data, a number outside the gallery, or a name that leads out of a folder.
    """
    readers: dict[str, Callable[[bytes], object]] = {".pkl": _unpickle, ".json": json.loads}
    if path.suffix not in readers:
        raise EvaluationError(f"{path} is no ground truth", expected=_EXPECTED)
    if not path.is_file():
        raise EvaluationError(f"there is no file {path}", expected=_EXPECTED)
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise EvaluationError(f"it has more than {_MAX_BYTES // 2**20} MiB")
        return _ground_truth(readers[path.suffix](path.read_bytes()))
    except EvaluationError as error:
        raise EvaluationError(f"{path}: {error.found}", expected=error.expected or _EXPECTED) from error
    except Exception as error:  # broken bytes raise nearly anything
        raise EvaluationError(f"{path} cannot be read ({type(error).__name__})", expected=_EXPECTED) from error


def _ground_truth(content: object) -> GroundTruth:
    """Whatever was in the file → a ground truth, or an EvaluationError."""
    if not isinstance(content, dict):
        raise EvaluationError("it holds no dict")
    gallery, queries = _names(content, "imlist"), _names(content, "qimlist")
    entries = content.get("gnd")
    if not isinstance(entries, list) or len(entries) != len(queries) or not all(isinstance(e, dict) for e in entries):
        raise EvaluationError(f"gnd is no list of {len(queries)} dicts, one for each of qimlist")
    lists = {}
    room = _MAX_INDICES
    for key in ("easy", "hard", "junk"):
        listed = []
        for query, entry in enumerate(entries):
            listed.append(_indices(entry.get(key), f"gnd[{query}].{key}", len(gallery), room))
            room -= len(listed[-1])
        lists[key] = tuple(listed)
    boxes = tuple(_box(entry.get("bbx"), f"gnd[{query}].bbx") for query, entry in enumerate(entries))
    return GroundTruth(gallery=gallery, queries=queries, boxes=boxes, **lists)


def _names(content: dict[Any, Any], key: str) -> tuple[str, ...]:
    names = content.get(key)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise EvaluationError(f"{key} is no list of names")
    if not names:
        raise EvaluationError(f"{key} is empty", expected="one name or more")
    for number, name in enumerate(names):
        # They become paths: below the pictures' folder on every system, or nowhere.
        if not name.isprintable() or set(name) & set("\\:") or any(part in ("", ".", "..") for part in name.split("/")):
            raise EvaluationError(f"{key}[{number}] is {name[:80]!a}", expected="a name below the pictures' folder")
    return tuple(names)


def _indices(values: object, where: str, pictures: int, room: int) -> Labels:
    if not isinstance(values, (list, _Array)):
        raise EvaluationError(f"{where} is no list of numbers")
    if len(values) > room:
        raise EvaluationError(f"{where} and the lists before it have more than {_MAX_INDICES} pictures")
    numbers = values.numbers() if isinstance(values, _Array) else values
    for number in numbers:  # 3.0 is 3: MATLAB writes whole numbers so
        if not _is_number(number) or not 0 <= number < pictures or number != int(number):
            raise EvaluationError(f"{where} holds what is no number of the {pictures} in imlist")
    return np.array(numbers, np.int64)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _box(values: object, where: str) -> Box | None:
    if values is None:
        return None
    if not isinstance(values, (list, tuple, _Array)) or len(values) != 4:
        raise EvaluationError(f"{where} is no list of four numbers")
    numbers = values.numbers() if isinstance(values, _Array) else values
    if not all(map(_is_number, numbers)):
        raise EvaluationError(f"{where} is no list of four numbers")
    left, top, right, bottom = (float(number) for number in numbers)
    if not all(map(math.isfinite, (left, top, right, bottom))) or left >= right or top >= bottom:
        raise EvaluationError(f"{where} is no box", expected="x1 < x2 and y1 < y2")
    return left, top, right, bottom


class _Unpickler(pickle.Unpickler):
    """Knows the names in `_STAND_INS`, and no other."""

    def find_class(self, module: str, name: str) -> object:
        made = _STAND_INS.get((module.replace("numpy._core", "numpy.core"), name))
        if made is None:
            raise EvaluationError(f"it names {f'{module}.{name}'[:80]!a}, which is no data")
        return _StandIn(made)


class _StandIn:
    """Can be called, and nothing else: a pickle may set attributes of what it names, and this has none."""

    __slots__ = ("_make",)

    def __init__(self, make: Callable[..., object]) -> None:
        self._make = make

    def __call__(self, *args: object) -> object:
        return self._make(*args)

    def __setstate__(self, state: object) -> None:
        raise EvaluationError("it changes what it names")


class _Type:
    """In place of a numpy dtype: a kind of number, and its byte order."""

    __slots__ = ("code", "order")

    def __init__(self, code: object, *_: object) -> None:
        if not isinstance(code, str) or code not in _NUMBERS:
            raise EvaluationError("it has an array of what are no numbers")
        self.code = code
        self.order = "="

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, tuple) or len(state) < 5 or state[1] not in ("<", ">", "=", "|") or any(state[2:5]):
            raise EvaluationError("it has an array of a type that is no number")
        self.order = state[1]


class _Array:
    """In place of a numpy array or number: a type, how many, and their bytes.

    They are not made into numbers before they are used: a file can say the same bytes in thousands of arrays.
    """

    __slots__ = ("_count", "_data", "_type")

    def __init__(self, *_: object) -> None:
        self.fill(_Type("i1"), 0, "")

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, tuple) or len(state) != 5 or not isinstance(state[1], tuple):
            raise EvaluationError("it has an array that is not one of numbers")
        _, shape, kind, _, data = state
        if len(shape) > 2 or not all(type(side) is int and side >= 0 for side in shape):
            raise EvaluationError("it has an array of a shape that is no list's")
        self.fill(kind, math.prod(shape), data)

    def fill(self, kind: object, count: int, data: object) -> None:
        if not isinstance(kind, _Type) or not isinstance(data, (str, bytes)):
            raise EvaluationError("it has an array that is not one of numbers")
        if len(data) != count * int(kind.code[1:]):
            raise EvaluationError("it has an array with more or fewer bytes than its shape says")
        self._type, self._count, self._data = kind, count, data

    def __len__(self) -> int:
        return self._count

    def numbers(self) -> list[int] | list[float]:
        data = self._data.encode("latin-1") if isinstance(self._data, str) else self._data
        numbers: list[int] | list[float] = np.frombuffer(data, f"{self._type.order}{self._type.code}").tolist()
        return numbers


def _scalar(kind: object, data: object) -> int | float:
    one = _Array()
    one.fill(kind, 1, data)
    return one.numbers()[0]


def _latin1(text: object, encoding: object) -> object:
    """How Python 3 writes bytes for Python 2. They stay text until they are used, see `_Array`."""
    if encoding not in ("latin1", "latin-1"):
        raise EvaluationError("it has text in an encoding that is not latin1")
    return text


def _no_bytes() -> bytes:
    """How Python 3 writes b"" for Python 2. Called with anything it raises."""
    return b""


_STAND_INS: dict[tuple[str, str], Callable[..., object]] = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy", "dtype"): _Type,
    ("numpy", "ndarray"): _Array,
    ("_codecs", "encode"): _latin1,
    ("__builtin__", "bytes"): _no_bytes,
    ("builtins", "bytes"): _no_bytes,
}


def _unpickle(content: bytes) -> object:
    """The plain data in a pickle.

    Its instructions are read through before they are followed: a few bytes can ask the unpickler for a table of 64 GiB.
    """
    kept = tuples = 0
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name not in _DATA_OPCODES:
            raise EvaluationError(f"it has the instruction {opcode.name}, which data has no use for")
        if opcode.name in _PUTS and (not isinstance(argument, int) or argument > kept):
            raise EvaluationError("it counts wrongly what it keeps")
        kept += opcode.name in (*_PUTS, "MEMOIZE")
        tuples += "TUPLE" in opcode.name
    if tuples > _MAX_TUPLES:
        raise EvaluationError(f"it has more than {_MAX_TUPLES} tuples")
    return _Unpickler(io.BytesIO(content), encoding="latin-1").load()
