"""A run seen through a few fixed pictures: how far apart their embeddings are, and who their neighbours are."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mimco_deploy.errors import DataError
from mimco_deploy.preprocess import preprocess
from mimco_deploy.training.augment import ToInput
from mimco_deploy.training.backbone import CROP_SHARE, Backbone
from mimco_deploy.training.corpus import Corpus

PICTURES = 256
"""Pictures looked at, evenly spread over the corpus."""
CLASSES = 32
"""Of more classes than this, so many evenly spread ones alone: k-NN needs several pictures of each."""
SHOWN = 6
"""Of them, whose neighbours are shown."""
NEIGHBOURS = 8
_BATCH = 64


@dataclass(frozen=True)
class Sight:
    """What the probe saw at one step."""

    step: int
    """Optimiser steps done."""
    spread: float
    """As `monitor.spread`: 0 is collapse, 1 is even on the sphere."""
    effective_rank: float
    """As `effective_rank`: from 1 to the smaller of D and the number of pictures."""
    knn: float | None
    """Leave-one-out k-NN top-1 over the probe's pictures, in [0, 1]; None where folders give no labels."""
    neighbours: list[list[int]]
    """Of each shown picture: the nearest of the others, best first."""
    scores: list[list[float]]
    """Their cosines."""
    pictures: str = ""
    """Which were looked at; see `Probe.key`."""


class Probe:
    """Fixed pictures of a corpus, decoded once.

    Args:
        corpus: where they come from.
        image_size_px: of the encoder.
    """

    def __init__(self, corpus: Corpus, image_size_px: int) -> None:
        decoded = {}
        for number in choose([picture.label for picture in corpus.pictures]):
            pixels, refused = corpus.pixels(number)  # of a later picture where this one cannot be decoded
            decoded[(number + len(refused)) % len(corpus)] = Image.fromarray(pixels)
        self.numbers, self.pictures = list(decoded), list(decoded.values())
        self.names = [corpus.pictures[number].name for number in self.numbers]
        seen = np.stack([preprocess(picture, image_size_px, CROP_SHARE) for picture in self.pictures])
        self._pixels = torch.from_numpy(seen).permute(0, 3, 1, 2)  # [N, 3, H, W]
        labels = [corpus.pictures[number].label for number in self.numbers]
        known = sorted({label for label in labels if label is not None})
        self._labels = torch.tensor([known.index(str(label)) for label in labels]) if _can_vote(labels) else None

    @torch.no_grad()
    def look(self, step: int, encoder: Backbone, pooling: str) -> Sight | None:
        """Embed the pictures in eval mode and compare them; the encoder is then in the mode that it was in.

        None where the embeddings are no numbers.
        """
        training = encoder.training
        encoder.eval()
        device = next(encoder.parameters()).device
        to_input = ToInput(encoder.config).to(device)
        batches = torch.split(self._pixels, _BATCH)
        with torch.compiler.set_stance("force_eager"):  # no graph for batches that come once in a while
            parts = [encoder(to_input(batch.to(device))).pooled(pooling).float().cpu() for batch in batches]
        encoder.train(training)
        embeddings = F.normalize(torch.cat(parts), dim=1)  # [N, D]
        if not embeddings.isfinite().all():
            return None  # the next steps will say so
        cosines = embeddings @ embeddings.T
        cosines.fill_diagonal_(-torch.inf)
        near = cosines[:: max(1, len(cosines) // SHOWN)][:SHOWN].topk(min(NEIGHBOURS, len(cosines) - 1), dim=1)
        return Sight(
            step,
            float(embeddings.std(dim=0, correction=0).mean() * math.sqrt(embeddings.shape[1])),
            effective_rank(embeddings),
            None if self._labels is None else leave_one_out(cosines, self._labels),
            near.indices.tolist(),
            [[round(score, 4) for score in row] for row in near.values.tolist()],
            self.key,
        )

    @property
    def key(self) -> str:
        """Tells probes of other pictures apart."""
        return hashlib.sha256(str(self.numbers).encode()).hexdigest()[:12]

    @property
    def shown(self) -> list[int]:
        """Which of the pictures are shown with their neighbours."""
        return list(range(0, len(self.pictures), max(1, len(self.pictures) // SHOWN)))[:SHOWN]


def choose(labels: Sequence[str | None]) -> list[int]:
    """Which pictures of a corpus to look at.

    Args:
        labels: the folder of each picture; None where one lies in none.

    Returns:
        Rising indices, `PICTURES` at most.
    """
    members: dict[str | None, list[int]] = {}
    for index, label in enumerate(labels):
        members.setdefault(label, []).append(index)
    if None not in members and len(members) > CLASSES:
        for each in (PICTURES // CLASSES, PICTURES // CLASSES // 2):
            large = [label for label, found in members.items() if len(found) >= each]
            if len(large) >= CLASSES:
                chosen = [members[large[place]] for place in _evenly(range(len(large)), CLASSES)]
                return sorted(index for found in chosen for index in _evenly(found, each))
    return _evenly(range(len(labels)), PICTURES)  # few classes, or folders that hold a picture or two


def _evenly(items: Sequence[int], most: int) -> list[int]:
    """So many of them at most, evenly spread."""
    return [items[round(place)] for place in np.linspace(0, len(items) - 1, min(most, len(items)))]


def effective_rank(embeddings: Tensor) -> float:
    """Over how many directions embeddings spread.

    Args:
        embeddings: [N, D]

    Returns:
        exp of the entropy of the singular values, which are made to sum to 1; from 1 to min(N, D).

    Source: RankMe (arXiv 2210.02885), equation 1.
    """
    values = torch.linalg.svdvals(embeddings.double())
    shares = values / values.sum() + 1e-7
    return float(torch.exp(-(shares * shares.log()).sum()))


def leave_one_out(cosines: Tensor, labels: Tensor, k: int = 20, temperature: float = 0.07) -> float:
    """Weighted k-NN top-1 of each picture among all others, by DINO's rule (arXiv 2104.14294).

    Args:
        cosines: [N, N], −inf on the diagonal.
        labels: [N] int64.
        k: neighbours that vote.
        temperature: a neighbour of cosine c votes exp(c / temperature).
    """
    near = cosines.topk(min(k, len(cosines) - 1), dim=1)
    votes = torch.zeros(len(cosines), int(labels.max()) + 1, dtype=torch.float64)
    votes.scatter_add_(1, labels[near.indices], (near.values.double() / temperature).exp())
    return float((votes.argmax(dim=1) == labels).double().mean())


def read_sights(folder: Path, before: int) -> list[Sight]:
    """What earlier probes of a run saw, up to a step; lines that a crash cut short are left out."""
    path = folder / "probe.jsonl"
    sights = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            sight = Sight(**json.loads(line))
        except (ValueError, TypeError):
            continue
        if sight.step <= before:
            sights.append(sight)
    return sights


def write_sights(folder: Path, sights: list[Sight]) -> None:
    """Keep them for a resumed run."""
    text = "".join(json.dumps(asdict(sight)) + "\n" for sight in sights)
    (folder / "probe.jsonl").write_text(text, encoding="utf-8")


def make_probe(corpus: Corpus, image_size_px: int) -> Probe | None:
    """A probe, or None where there are too few pictures that can be decoded."""
    try:
        return Probe(corpus, image_size_px) if len(corpus) > 1 else None
    except DataError:
        return None


def _can_vote(labels: list[str | None]) -> bool:
    """Whether folders name at least two classes, each with two pictures on average."""
    known = {label for label in labels if label is not None}
    return None not in labels and len(known) >= 2 and 2 * len(known) <= len(labels)
