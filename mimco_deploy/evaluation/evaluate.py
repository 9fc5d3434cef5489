"""An encoder evaluated: which protocols the pictures allow, and what each of them gives."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from mimco_deploy.errors import EvaluationError, MimcoError
from mimco_deploy.evaluation.copies import EDITS, copy_detection, embed_copies
from mimco_deploy.evaluation.few_shot import SHOTS, few_shot
from mimco_deploy.evaluation.knn import knn_accuracies
from mimco_deploy.evaluation.label_free import alignment, spread
from mimco_deploy.evaluation.linear import obstacle_to_probing, probe
from mimco_deploy.evaluation.measures import Measure, mean_of, mean_over_draws
from mimco_deploy.evaluation.pictures import (
    Embedded,
    Labels,
    Tell,
    check_apart,
    check_classes,
    classes_of,
    counted,
    embed_pictures,
)
from mimco_deploy.evaluation.retrieval import Retrieval, retrieval, retrieval_among
from mimco_deploy.serving.encoders import Encoder
from mimco_deploy.sources import Picture, warn_of_merged_classes

logger = logging.getLogger(__name__)

Protocol = Literal["knn", "linear", "few-shot", "retrieval", "copies", "spread"]

WITH_TRAIN: tuple[Protocol, ...] = ("knn", "linear", "few-shot", "retrieval", "spread")
"""What is measured where pictures with known classes vote; `copies` only when asked for."""
WITH_CLASSES: tuple[Protocol, ...] = ("retrieval", "copies", "spread")
WITHOUT_LABELS: tuple[Protocol, ...] = ("copies", "spread")
KNN_KS = (10, 20, 100, 200)
"""DINO's."""
RECALL_KS = (1, 5, 10)
COPIES = 1000
"""Pictures at most that are edited for `copies`: ten edits of each."""


@dataclass(frozen=True)
class Evaluation:
    """What was found of one encoder."""

    name: str
    encoder: dict[str, str | int]
    """What ran: architecture, precision, provider, fingerprint."""
    pictures: Embedded
    """That were evaluated."""
    voters: Embedded | None
    """Pictures of --train."""
    classes: list[str]
    """Empty without labels."""
    measures: list[Measure] = field(default_factory=list)

    def as_document(self) -> dict[str, object]:
        """For JSON."""
        return {
            "name": self.name,
            "encoder": self.encoder,
            "pictures": len(self.pictures.pictures),
            "train_pictures": len(self.voters.pictures) if self.voters else 0,
            "classes": len(self.classes),
            "refused": {**self.pictures.refused, **(self.voters.refused if self.voters else {})},
            "measures": [measure.as_row() for measure in self.measures],
        }


def evaluate(
    encoder: Encoder,
    name: str,
    pictures: Sequence[Picture],
    train: Sequence[Picture] = (),
    protocols: Sequence[Protocol] = (),
    recall_ks: Sequence[int] = RECALL_KS,
    tell: Callable[[str], Tell] = lambda _: lambda _done, _all: None,
) -> Evaluation:
    """Evaluate one encoder.

    Args:
        encoder: of a bundle.
        name: for reports.
        pictures: to be evaluated.
        train: pictures with known classes, which vote and train the probe; may be none.
        protocols: which; by default all that the pictures allow.
        recall_ks: of recall@k and precision@k, each 1 or more.
        tell: gives, for what is being done, where to report progress.

    Raises:
        EvaluationError: the pictures do not allow a protocol that was asked for, or none at all; pictures vote and are
            evaluated.
        MissingExtraError: the linear probe was asked for without scikit-learn.
    """
    labelled = bool(train) or _have_classes(pictures)
    classes = classes_of(train or pictures) if labelled else []
    if train:
        check_classes(classes, classes_of(pictures))
        check_apart(pictures, train)
    if labelled:
        warn_of_merged_classes(pictures)
        warn_of_merged_classes(train)
    chosen = _choose(protocols, pictures, train, classes)
    spec = encoder.spec
    about: dict[str, str | int] = {
        "architecture": spec.architecture,
        "image_size_px": spec.image_size_px,
        "embedding_dim": spec.embedding_dim,
        "precision": encoder.precision,
        "provider": encoder.provider,
        "fingerprint": spec.fingerprint,
        "weights": spec.weights_source,
    }
    voters = embed_pictures(encoder, train, tell("pictures that vote")) if train else None
    found = Evaluation(name, about, embed_pictures(encoder, pictures, tell("pictures")), voters, classes)
    if classes:
        _warn_of_lost_classes(pictures, found.pictures, "")
    if voters is not None:
        _warn_of_lost_classes(train, voters, " of --train")
    chosen = _still_possible(chosen, found)
    if voters is not None:
        found.measures.extend(_by_votes(chosen, found, voters, recall_ks))
    elif "retrieval" in chosen:
        among = retrieval_among(found.pictures.embeddings, found.pictures.labels(classes), recall_ks)
        found.measures.extend(_retrieved(among))
    if "spread" in chosen:
        found.measures.extend(spread(found.pictures.embeddings))
    if "copies" in chosen:
        found.measures.extend(_copies(encoder, found.pictures, tell("edited copies")))
    return found


def _have_classes(pictures: Sequence[Picture]) -> bool:
    """Whether all lie in folders of two classes or more; a warning where only some do."""
    if len({picture.label for picture in pictures} - {None}) < 2:
        return False
    stray = [picture.name for picture in pictures if picture.label is None]
    if stray:
        logger.warning(
            "%d of %s in no folder of a class, such as %s: measured without classes",
            len(stray),
            counted(len(pictures), "picture"),
            stray[0],
        )
    return not stray


def _warn_of_lost_classes(given: Sequence[Picture], read: Embedded, where: str) -> None:
    labels = {str(picture.label) for picture in given}
    if lost := sorted(labels - {str(picture.label) for picture in read.pictures}):
        logger.warning(
            "no picture%s can be read for %d of %s, such as %s",
            where,
            len(lost),
            counted(len(labels), "class", "classes"),
            lost[0],
        )


def _choose(
    asked: Sequence[Protocol], pictures: Sequence[Picture], train: Sequence[Picture], classes: Sequence[str]
) -> Sequence[Protocol]:
    """What is asked for, once nothing stands in its way; by default all that nothing stands in the way of.

    Before anything is embedded: hours of work shall not end at a class with a single picture.
    """
    if asked:
        for protocol in asked:
            if (reason := _obstacle(protocol, pictures, train, classes)) is not None:
                raise reason
        return asked
    usual = WITH_TRAIN if train else WITH_CLASSES if classes else WITHOUT_LABELS
    return _left({protocol: _obstacle(protocol, pictures, train, classes) for protocol in usual})


def _still_possible(chosen: Sequence[Protocol], found: Evaluation) -> Sequence[Protocol]:
    """What the pictures that could be read allow: one that could not costs its protocol, and not the others.

    Raises:
        EvaluationError: nothing is left.
    """
    train = found.voters.pictures if found.voters else ()
    classes = sorted({str(picture.label) for picture in train or found.pictures.pictures}) if found.classes else ()
    return _left({protocol: _obstacle(protocol, found.pictures.pictures, train, classes) for protocol in chosen})


def _left(reasons: Mapping[Protocol, MimcoError | None]) -> list[Protocol]:
    """The protocols that nothing stands in the way of; a warning for each of the others.

    Raises:
        EvaluationError: none is left; the first reason.
    """
    stopped = [reason for reason in reasons.values() if reason is not None]
    if len(stopped) == len(reasons):
        raise stopped[0]
    for reason in stopped:
        logger.warning("left out: %s", reason)
    return [protocol for protocol, reason in reasons.items() if reason is None]


def _obstacle(
    protocol: Protocol, pictures: Sequence[Picture], train: Sequence[Picture], classes: Sequence[str]
) -> MimcoError | None:
    if protocol in ("copies", "spread"):
        few = len(pictures) < 2
        return EvaluationError(f"{protocol} of one picture", expected="two or more") if few else None
    if protocol != "retrieval" and not train:
        return EvaluationError(f"{protocol} without pictures that vote", expected="--train with <class>/<picture>")
    if len(classes) < 2:
        return EvaluationError(
            f"{protocol} with {counted(len(classes), 'class', 'classes')}",
            expected="two folders or more, a class each, with its pictures",
        )
    if protocol == "retrieval" and not _has_relevant(pictures, train):
        where = "in --train" if train else "among the others"
        return EvaluationError(
            f"retrieval of pictures with none of their class {where}", expected="one or more to find"
        )
    if protocol == "linear":
        return obstacle_to_probing([str(picture.label) for picture in train])
    return None


def _has_relevant(pictures: Sequence[Picture], train: Sequence[Picture]) -> bool:
    """Whether there is a picture with another of its class to find."""
    if train:
        return not {picture.label for picture in pictures}.isdisjoint(picture.label for picture in train)
    return max(Counter(picture.label for picture in pictures).values()) > 1


def _by_votes(
    protocols: Sequence[Protocol], found: Evaluation, voters: Embedded, recall_ks: Sequence[int]
) -> list[Measure]:
    gallery, labels = voters.embeddings, voters.labels(found.classes)
    queries, truth = found.pictures.embeddings, found.pictures.labels(found.classes)
    measures: list[Measure] = []
    if "knn" in protocols:
        for k, found_by_k in knn_accuracies(gallery, labels, queries, truth, _fitting(len(gallery))).items():
            measures.append(mean_of("knn", f"top-1, k {k}", found_by_k.right))
            measures.append(mean_of("knn", f"top-5, k {k}", found_by_k.right_of_5))
    if "linear" in protocols:
        probed = probe(gallery, labels, queries, truth)
        measures.append(mean_of("linear", "top-1", probed.right, chosen=f"C {probed.chosen_c:.2g}"))
    if "few-shot" in protocols:
        for shots in SHOTS:
            right = few_shot(gallery, labels, queries, truth, shots)
            measures.append(mean_over_draws("few-shot", f"top-1, {shots} a class", right))
    if "retrieval" in protocols:
        measures.extend(_retrieved(retrieval(queries, truth, gallery, labels, recall_ks)))
    return measures


def _fitting(pictures: int) -> tuple[int, ...]:
    """DINO's k, as far as there are so many pictures; the smallest always."""
    return tuple(k for k in KNN_KS if k <= max(pictures, KNN_KS[0]))


def _retrieved(found: Retrieval) -> list[Measure]:
    measures = [mean_of("retrieval", "mAP", found.average_precision)]
    measures += [mean_of("retrieval", f"recall@{k}", found.recall[:, n]) for n, k in enumerate(found.ks)]
    measures += [mean_of("retrieval", f"precision@{k}", found.precision[:, n]) for n, k in enumerate(found.ks) if k > 1]
    return measures


def _copies(encoder: Encoder, pictures: Embedded, tell: Tell) -> list[Measure]:
    """Of at most `COPIES` pictures, evenly taken; the gallery is all of them."""
    count = len(pictures.pictures)
    chosen = np.linspace(0, count - 1, min(count, COPIES)).astype(np.int64)
    copies = embed_copies(encoder, [pictures.pictures[number] for number in chosen], tell)
    measures = copy_detection(pictures.embeddings, chosen, copies)
    for name in EDITS:
        measures.append(alignment(pictures.embeddings[chosen], copies[name], name))
    return measures


def labels_of(found: Evaluation) -> Labels | None:
    """[N], the classes of the evaluated pictures by number, where they have some."""
    return found.pictures.labels(found.classes) if found.classes else None
