"""Which embeddings lie close together, without comparing all with all.

Two embeddings are a pair where their inner product reaches a score, and what hangs together by pairs is a group. Groups
are what is asked for, so pairs are never kept: a million of them between a thousand frames of one film are merged into
the forest of groups as they are found, and rows that are in one group already are not compared again. Memory stays at a
few blocks of scores, whatever the embeddings.

Up to `COMPARED_IN_FULL` rows, every row is compared with every other, in blocks. Beyond, the space is cut into cells
around centroids, and a row is compared with the rows of the few cells nearest to it; the two of a pair nearly always
see each other, from one side or the other. Sums are made in float32; where one is too near to the score for that to
decide, it is made again in float64.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from mimco_deploy.serving.ann import Cells

Scores = npt.NDArray[np.float64]
Rows = npt.NDArray[np.int64]
Vectors = npt.NDArray[np.float32]

COMPARED_IN_FULL = 16_384
"""Rows; a few seconds for two cores at 384 numbers."""
_PROBES = 16
"""Cells that a row is compared with; `benchmarks/dupes.py` has what that finds."""
_BLOCK = 1024
_DECIDED_AT_ONCE = 2**14
# Two float32 sums of the same unit-length embeddings differ by less: 384 terms give 1e-6.
_ROUNDING = 1e-5
_LEADERS = 8
"""Balls to try in a cell that is larger than a block."""


def scores_of(vectors: Vectors, a: Rows, b: Rows) -> Scores:
    """Scores of rows with rows, one by one, in float64 from the stored embeddings.

    Args:
        vectors: [N, D], unit length.
        a: [n].
        b: [n].

    Returns:
        [n], in [−1, 1].
    """
    found = np.empty(len(a))
    for start in range(0, len(a), _DECIDED_AT_ONCE):
        part = slice(start, start + _DECIDED_AT_ONCE)
        found[part] = (vectors[a[part]].astype(np.float64) * vectors[b[part]]).sum(axis=1)
    return found.clip(-1.0, 1.0)  # rounding may step over the ends


def groups_above(vectors: Vectors, rows: Rows, min_score: float) -> Rows:
    """Put rows into groups: two whose score reaches `min_score` are in one, and so is all that such pairs connect.

    Equal embeddings are always in one.

    Args:
        vectors: [N, D], unit length; a memory map is read in place.
        rows: [n], each once.
        min_score: in (0, 1].

    Returns:
        [n]: for each of `rows`, the place in `rows` of the first of its group.
    """
    equal_to = _first_equals(vectors, rows)
    places = np.unique(equal_to)
    different = rows[places]
    forest = _Forest(len(different))
    if len(different) <= COMPARED_IN_FULL:
        everything = np.arange(len(different))
        for a, b in _tiles(everything, everything, upper=True):
            _join_tile(vectors, different, forest, a, b, min_score)
    else:
        for askers, members in _by_cell(vectors, different, different):
            if len(members) > _BLOCK:
                _join_balls(vectors, different, forest, members, min_score)
            # What is together already lies side by side then, and whole tiles of it are passed over.
            askers, members = (each[np.argsort(forest.roots(each), kind="stable")] for each in (askers, members))
            for a, b in _tiles(askers, members):
                _join_tile(vectors, different, forest, a, b, min_score)
    roots = forest.roots(np.arange(len(different)))
    return np.asarray(places[roots][np.searchsorted(places, equal_to)])


def nearest_above(vectors: Vectors, askers: Rows, rows: Rows, min_score: float) -> tuple[Rows, Scores]:
    """For each of some rows, the one of others that is most like it.

    Args:
        vectors: [N, D], unit length; a memory map is read in place.
        askers: [n].
        rows: [m], among which is looked.
        min_score: in (0, 1]; an equal embedding always reaches it.

    Returns:
        Rows [n], −1 where no score reaches `min_score`, and the scores.
    """
    first = _first_equals(vectors, np.concatenate([rows, askers]))[len(rows) :]
    equal = first < len(rows)
    found, best = np.full(len(askers), -1, np.int64), np.full(len(askers), -np.inf)
    found[equal] = rows[first[equal]]
    best[equal] = scores_of(vectors, askers[equal], found[equal])
    others = np.flatnonzero(~equal)
    for places, b in _opposite(vectors, askers[others], rows):
        a = others[places]
        scores = vectors[askers[a]] @ vectors[rows[b]].T  # [a, b]
        nearest = scores.argmax(axis=1)
        top = scores[np.arange(len(a)), nearest]
        likely = np.flatnonzero(top >= np.maximum(min_score, best[a]) - _ROUNDING)
        a, other = a[likely], rows[b[nearest[likely]]]
        exact = scores_of(vectors, askers[a], other)
        better = (exact >= min_score) & (exact > best[a])
        found[a[better]], best[a[better]] = other[better], exact[better]
    return found, best


class _Forest:
    """Groups that grow together: a union–find on arrays. The root of a group is its smallest item."""

    def __init__(self, count: int) -> None:
        self._parent = np.arange(count)

    def roots(self, items: Rows) -> Rows:
        found = self._parent[items]
        while True:
            above = self._parent[found]
            if bool((above == found).all()):
                break
            found = above
        self._parent[items] = found
        return found

    def join(self, a: Rows, b: Rows) -> None:
        while len(a):
            a, b = self.roots(a), self.roots(b)
            apart = a != b
            a, b = a[apart], b[apart]
            np.minimum.at(self._parent, np.maximum(a, b), np.minimum(a, b))


def _first_equals(vectors: Vectors, rows: Rows) -> Rows:
    """For each row, the place of the first whose embedding has the same bytes."""
    first: dict[bytes, int] = {}
    found = np.empty(len(rows), np.int64)
    for start in range(0, len(rows), _BLOCK):
        for place, embedding in enumerate(np.ascontiguousarray(vectors[rows[start : start + _BLOCK]]), start):
            found[place] = first.setdefault(hashlib.blake2b(embedding, digest_size=16).digest(), place)
    return found


def _tiles(a: Rows, b: Rows, *, upper: bool = False) -> Iterator[tuple[Rows, Rows]]:
    """All of `a` against all of `b`, a block each at once; with `upper`, of two blocks only once."""
    for row in range(0, len(a), _BLOCK):
        for column in range(row if upper else 0, len(b), _BLOCK):
            yield a[row : row + _BLOCK], b[column : column + _BLOCK]


def _opposite(vectors: Vectors, askers: Rows, rows: Rows) -> Iterator[tuple[Rows, Rows]]:
    """Blocks of places in `askers`, and of places in `rows` to compare them with."""
    if len(askers) * len(rows) <= COMPARED_IN_FULL**2:
        yield from _tiles(np.arange(len(askers)), np.arange(len(rows)))
        return
    for some, members in _by_cell(vectors, askers, rows):
        yield from _tiles(some, members)


def _by_cell(vectors: Vectors, askers: Rows, rows: Rows) -> Iterator[tuple[Rows, Rows]]:
    """For each cell, the places of the askers that look into it, and of the rows that lie in it."""
    cells = Cells(vectors, rows, 2 ** round(math.log2(4 * len(rows) ** 0.5)))
    seen = cells.nearest(askers, _PROBES)
    own = seen[:, 0] if askers is rows else cells.nearest(rows, 1)[:, 0]
    members, looking = np.argsort(own, kind="stable"), np.argsort(seen, axis=None, kind="stable")
    numbers = np.arange(cells.count + 1)
    of_members, of_looking = np.searchsorted(own[members], numbers), np.searchsorted(seen.ravel()[looking], numbers)
    for cell in range(cells.count):
        inside = members[of_members[cell] : of_members[cell + 1]]
        if len(inside):
            yield looking[of_looking[cell] : of_looking[cell + 1]] // seen.shape[1], inside


def _join_tile(vectors: Vectors, rows: Rows, forest: _Forest, a: Rows, b: Rows, min_score: float) -> None:
    roots_a, roots_b = forest.roots(a), forest.roots(b)
    if roots_a[0] == roots_b[0] and bool((roots_a == roots_a[0]).all() and (roots_b == roots_b[0]).all()):
        return
    scores = vectors[rows[a]] @ vectors[rows[b]].T  # [a, b]
    above = np.flatnonzero(scores >= min_score - _ROUNDING)
    left, right = np.divmod(above, len(b))
    if len(left) > len(a) + len(b):  # a crowd: one pair of each row puts together nearly all of it
        certain = scores >= min_score + _ROUNDING
        for of_a, of_b in ((np.arange(len(a)), certain.argmax(axis=1)), (certain.argmax(axis=0), np.arange(len(b)))):
            sure = certain[of_a, of_b]
            forest.join(roots_a[of_a[sure]], roots_b[of_b[sure]])
        roots_a, roots_b = forest.roots(a), forest.roots(b)
    apart = roots_a[left] != roots_b[right]
    left, right = left[apart], right[apart]
    sure = scores[left, right] >= min_score + _ROUNDING
    forest.join(roots_a[left[sure]], roots_b[right[sure]])
    left, right = left[~sure], right[~sure]
    decided = scores_of(vectors, rows[a[left]], rows[b[right]]) >= min_score
    forest.join(roots_a[left[decided]], roots_b[right[decided]])


def _join_balls(vectors: Vectors, rows: Rows, forest: _Forest, members: Rows, min_score: float) -> None:
    """Join what lies so close to one row that any two of it are a pair: a crowd is one group at the cost of one look.

    Embeddings at half the angle of `min_score` from one row are at most the whole angle from each other.
    """
    reach = math.sqrt((1 + min_score) / 2) + _ROUNDING
    for _ in range(_LEADERS):
        leader = members[len(members) // 2]
        near = np.empty(len(members), np.bool_)
        for start in range(0, len(members), _DECIDED_AT_ONCE):
            part = slice(start, start + _DECIDED_AT_ONCE)
            near[part] = vectors[rows[members[part]]] @ vectors[rows[leader]] >= reach
        inside = members[near]
        forest.join(inside, np.full(len(inside), leader))
        members = members[~near & (members != leader)]
        if len(members) <= _BLOCK:
            return
