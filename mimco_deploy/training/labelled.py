"""Pictures with classes: the folders that they lie in. To train on, and to measure on."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from timm.data.transforms_factory import create_transform
from torch import Tensor

from mimco_deploy.errors import DataError, ImageError
from mimco_deploy.preprocess import decode_pixels
from mimco_deploy.sources import Picture, find_pictures, shared_pictures, warn_of_merged_classes
from mimco_deploy.training.backbone import Geometry
from mimco_deploy.training.classifier import draws_follow_torch
from mimco_deploy.training.config import DataConfig
from mimco_deploy.training.corpus import Corpus, load_corpus
from mimco_deploy.training.distributed import mean_of_all, rank, world_size

logger = logging.getLogger(__name__)

_LABEL = "mimco_label"  # in `Image.info`


@dataclass
class LabelledCorpus(Corpus):
    """Pictures to train on; each that is given carries the number of its class."""

    classes: list[str] = field(default_factory=list)
    """Sorted."""
    labels: list[int] = field(default_factory=list)
    """The class of each picture, by its place among those."""

    def get(self, index: int) -> tuple[Image.Image, list[str]]:
        """One of Pillow's, with the class of the picture that is given, which may be one further on."""
        pixels, refused = self.pixels(index)
        label = self.labels[(index + len(refused)) % len(self.pictures)]
        return with_label(Image.fromarray(pixels), label), refused


@dataclass
class Validation:
    """Pictures to measure on, as the exported encoder will see pictures."""

    pictures: list[Picture]
    labels: list[int]
    image_size_px: int
    geometry: Geometry = field(default_factory=Geometry)
    bad: set[str] = field(default_factory=set)
    """What was said of each that cannot be decoded; it counts as not recognised."""

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's share, as uint8 [B, 3, H, W] and int64 [B]; a batch ahead is decoded by threads."""
        mine = range(rank(), len(self.pictures), world_size())
        chunks = [mine[start : start + size] for start in range(0, len(mine), size)]
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            ahead = [pool.submit(self._decode, index) for index in chunks[0]] if chunks else []
            for chunk, following in zip(chunks, [*chunks[1:], range(0)], strict=False):
                pixels = [future.result() for future in ahead]
                ahead = [pool.submit(self._decode, index) for index in following]
                good = [(index, one) for index, one in zip(chunk, pixels, strict=True) if one is not None]
                if good:
                    images = torch.from_numpy(np.stack([one for _, one in good])).permute(0, 3, 1, 2).contiguous()
                    yield images, torch.tensor([self.labels[index] for index, _ in good])

    def _decode(self, index: int) -> npt.NDArray[np.uint8] | None:
        picture = self.pictures[index]
        try:
            return decode_pixels(picture.read(), picture.name, self.image_size_px, *self.geometry)
        except ImageError as error:
            if str(error) not in self.bad:
                logger.warning("--val: %s", error)
            self.bad.add(str(error))
            return None


def with_label(picture: Image.Image, label: int) -> Image.Image:
    """A picture that `LabelledViews` can show."""
    picture.info[_LABEL] = label
    return picture


class LabelledViews:
    """Random crop, flip and RandAugment of a picture, and its class.

    Args:
        image_size_px: side of the crop.
        min_crop_scale: smallest share of the picture's area in it.
        rand_augment: timm's name of one; empty for none.
    """

    def __init__(self, image_size_px: int, min_crop_scale: float, rand_augment: str = "") -> None:
        self._transform: Callable[[Image.Image], Tensor] = create_transform(
            image_size_px,
            is_training=True,
            scale=(min_crop_scale, 1.0),
            color_jitter=0.0,
            auto_augment=rand_augment or None,
            interpolation="bicubic",
            normalize=False,
        )

    def __call__(self, picture: Image.Image) -> tuple[Tensor, Tensor]:
        """uint8 [3, H, W], and int64 []."""
        with draws_follow_torch():
            pixels = self._transform(picture)
        return pixels, torch.tensor(picture.info[_LABEL])


def load_labelled(data: DataConfig, val: Sequence[str], image_size_px: int) -> tuple[LabelledCorpus, Validation]:
    """The pictures to train on and to measure on.

    Raises:
        DataError: as `load_corpus`; a picture lies in no folder of a class, or the two have not the same classes.
    """
    corpus = load_corpus(data)
    pictures = find_pictures(val)
    classes, own, labels = number_classes(corpus.pictures, pictures)
    labelled = LabelledCorpus(corpus.pictures, corpus.config, corpus.held, corpus.bad, classes, own)
    return labelled, Validation(pictures, labels, image_size_px)


def number_classes(train: Sequence[Picture], val: Sequence[Picture]) -> tuple[list[str], list[int], list[int]]:
    """The classes, sorted, and the number of that of each picture.

    Raises:
        DataError: a picture lies in no folder of a class, there is one class only, the two have not the same, or they
            share pictures.
    """
    names, labels = _classes_of(train, "--data"), _classes_of(val, "--val")
    classes = sorted(set(names))
    if len(classes) < 2:
        raise DataError(f"--data has one class, {classes[0]}", expected="two folders of pictures at least")
    _refuse_others(set(labels) - set(classes), "--val has classes that --data has not")
    _refuse_others(set(classes) - set(labels), "--val lacks classes of --data")
    if both := shared_pictures(train, val):
        found = f"{len(both)} pictures are in --data and in --val, such as one in {both[0]}"
        raise DataError(found, expected="two sets that share none")
    for pictures in (train, val):
        warn_of_merged_classes(pictures)
    number = {name: index for index, name in enumerate(classes)}
    return classes, [number[name] for name in names], [number[name] for name in labels]


def _classes_of(pictures: Sequence[Picture], option: str) -> list[str]:
    names = [picture.label for picture in pictures if picture.label is not None]
    if len(names) < len(pictures):
        alone = [picture.name for picture in pictures if picture.label is None]
        raise DataError(
            f"{option}: {len(alone)} of {len(pictures)} pictures lie in no folder of a class, such as {alone[0]}",
            expected="a folder that holds one folder for each class",
        )
    return names


def _refuse_others(names: set[str], what: str) -> None:
    if names:
        raise DataError(f"{what}: {len(names)}, such as {min(names)}", expected="the same classes in both")


@torch.no_grad()
def accuracy(
    classify: Callable[[Tensor], Tensor], validation: Validation, batch_size: int, device: torch.device
) -> tuple[float, float]:
    """Top-1 and top-5 over all processes' shares, in [0, 1]; with up to five classes the second is 1.

    Args:
        classify: uint8 images [B, 3, H, W] on the device → logits [B, classes].
        validation: the pictures.
        batch_size: how many at once.
        device: to compute on.
    """
    hits = torch.zeros(2, dtype=torch.float64, device=device)
    for images, labels in validation.batches(batch_size):
        logits = classify(images.to(device))
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels.to(device).unsqueeze(1)  # [B, ≤ 5]
        hits += torch.stack([best[:, 0].sum(), best.sum()])
    shares = mean_of_all(hits) * world_size() / len(validation.pictures)
    return float(shares[0]), float(shares[1])
