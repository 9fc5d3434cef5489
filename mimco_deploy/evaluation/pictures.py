"""Pictures of an evaluation: read, labelled by their folder, embedded by the encoder that ships."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import numpy as np
import numpy.typing as npt

from mimco_deploy.errors import EvaluationError, ImageError
from mimco_deploy.preprocess import decode_pixels
from mimco_deploy.serving.encoders import Encoder
from mimco_deploy.sources import Picture, shared_pictures

Embeddings = npt.NDArray[np.float32]
Pixels = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]
Tell = Callable[[int, int], None]

BATCH = 64
_THREADS = 2
_AHEAD = 4 * BATCH


@dataclass(frozen=True)
class Embedded:
    """Pictures with their embeddings."""

    pictures: list[Picture]
    embeddings: Embeddings
    """[N, D], L2-normalised."""
    refused: dict[str, str]
    """Pictures that could not be read, by name, and why; they are not among the others."""

    def labels(self, classes: Sequence[str]) -> Labels:
        """[N], the number of each picture's folder among `classes`."""
        number = {name: index for index, name in enumerate(classes)}
        return np.array([number[str(picture.label)] for picture in self.pictures], np.int64)


def embed_pictures(encoder: Encoder, pictures: Sequence[Picture], tell: Tell = lambda _done, _all: None) -> Embedded:
    """Decode and embed pictures; those that cannot be read are left out.

    Args:
        encoder: of a bundle.
        pictures: at least one.
        tell: called with how many are done, and of how many.

    Raises:
        EvaluationError: none of them can be read.
    """
    spec = encoder.spec

    def read(picture: Picture) -> Pixels | ImageError:
        try:
            return decode_pixels(picture.read(), picture.name, *spec.geometry)
        except ImageError as error:
            return error

    good: list[Picture] = []
    refused: dict[str, str] = {}
    rows: list[Embeddings] = []
    batch: list[Pixels] = []
    for done, (picture, pixels) in enumerate(_ahead(read, pictures), start=1):
        if isinstance(pixels, ImageError):
            refused[picture.name] = pixels.problem
        else:
            good.append(picture)
            batch.append(pixels)
        if len(batch) == BATCH or (batch and done == len(pictures)):
            rows.append(embed_finite(encoder, np.stack(batch)))
            batch = []
            tell(done, len(pictures))
    if not good:
        first = next(iter(refused.items()), ("", "no picture"))
        raise EvaluationError(f"none of {counted(len(pictures), 'picture')} can be read, {first[0]}: {first[1]}")
    return Embedded(good, np.concatenate(rows), refused)


def embed_finite(encoder: Encoder, pixels: Pixels) -> Embeddings:
    """Embed pixels [B, H, W, 3]; an embedding that is not a number would pass for any neighbour.

    Raises:
        EvaluationError: there is one.
    """
    embeddings = encoder.embed(pixels)
    if not np.isfinite(embeddings).all():
        raise EvaluationError("the encoder gives embeddings that are not finite", expected="an encoder that was proved")
    return embeddings


def classes_of(pictures: Iterable[Picture]) -> list[str]:
    """The names of the pictures' folders, sorted.

    Raises:
        EvaluationError: a picture lies in no folder of its own.
    """
    names = set()
    for picture in pictures:
        if picture.label is None:
            raise EvaluationError(f"{picture.name} is in no folder of a class", expected="<class>/<picture>")
        names.add(picture.label)
    return sorted(names)


def check_classes(train: Sequence[str], val: Sequence[str]) -> None:
    """Refuse pictures of a class that nobody votes for.

    Raises:
        EvaluationError: there are some.
    """
    unknown = sorted(set(val) - set(train))
    if unknown:
        shown = ", ".join(unknown[:3]) + (" …" if len(unknown) > 3 else "")
        raise EvaluationError(
            f"no picture in --train for {len(unknown)} of {counted(len(val), 'class', 'classes')}: {shown}",
            expected="folders of the same names",
        )


def check_apart(pictures: Iterable[Picture], train: Iterable[Picture]) -> None:
    """Refuse pictures that are evaluated and vote as well: each would find itself.

    Raises:
        EvaluationError: there are some.
    """
    if both := shared_pictures(pictures, train):
        raise EvaluationError(
            f"{counted(len(both), 'picture')} in --train and among those evaluated, such as one in {both[0]}",
            expected="two sets that share none",
        )


def counted(count: int, noun: str, plural: str = "") -> str:
    """`1 picture`, `2 pictures`.

    Args:
        count: how many.
        noun: of one.
        plural: of several, where it is not the noun with an s.
    """
    return f"{count:,} {noun if count == 1 else plural or f'{noun}s'}"


def sample(pictures: Sequence[Picture], limit: int | None, seed: int = 0) -> list[Picture]:
    """About `limit` pictures, of each folder its share and two at least, at random but always the same, in their order.

    Args:
        pictures: to choose from.
        limit: how many; all where None.
        seed: of the draw.
    """
    if limit is None or len(pictures) <= limit:
        return list(pictures)
    members: dict[str | None, list[int]] = {}
    for number, picture in enumerate(pictures):
        members.setdefault(picture.label, []).append(number)
    rng = np.random.default_rng(seed)
    chosen: list[int] = []
    for numbers in members.values():
        share = max(2, round(limit * len(numbers) / len(pictures)))
        chosen += rng.permutation(numbers)[:share].tolist()
    return [pictures[number] for number in sorted(chosen)]


def _ahead(
    read: Callable[[Picture], Pixels | ImageError], pictures: Sequence[Picture]
) -> Iterator[tuple[Picture, Pixels | ImageError]]:
    """Decode a little ahead of what the encoder takes: never all pictures at once."""
    with ThreadPoolExecutor(_THREADS) as pool:
        waiting: list[tuple[Picture, Future[Pixels | ImageError]]] = []
        rest = iter(pictures)
        waiting += [(picture, pool.submit(read, picture)) for picture in islice(rest, _AHEAD)]
        while waiting:
            picture, result = waiting.pop(0)
            waiting += [(more, pool.submit(read, more)) for more in islice(rest, 1)]
            yield picture, result.result()
