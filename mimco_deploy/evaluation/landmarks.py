"""Revisited Oxford and Paris with an encoder: the pictures found by name, the queries cut to their boxes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mimco_deploy.errors import EvaluationError
from mimco_deploy.evaluation.ground_truth import GroundTruth
from mimco_deploy.evaluation.measures import Measure, mean_of
from mimco_deploy.evaluation.pictures import Embeddings, Tell, counted, embed_finite, embed_pictures
from mimco_deploy.evaluation.revisited import evaluate_revisited
from mimco_deploy.preprocess import cut, preprocess
from mimco_deploy.serving.encoders import Encoder
from mimco_deploy.sources import Picture

_WHOLE = 10**9
"""Queries are decoded at their full size, for their boxes are in its pixels."""


def measure_landmarks(
    encoder: Encoder,
    truth: GroundTruth,
    pictures: Sequence[Picture],
    ks: Sequence[int] = (1, 5, 10),
    tell: Tell = lambda _done, _all: None,
) -> list[Measure]:
    """MAP and mP@k of the three protocols.

    Args:
        encoder: of a bundle.
        truth: the published ground truth.
        pictures: among which those of the ground truth are found, by their names without folder and suffix.
        ks: of mP@k.
        tell: called with how many of the gallery are done, and of how many.

    Raises:
        EvaluationError: a picture of the ground truth is missing, twice there or cannot be read.
        ImageError: a query cannot be read.

    Source: arXiv 1803.11285. Queries are cut by their boxes, as its evaluation does; each picture is the encoder's one
    square, not several scales of the whole.
    """
    wanted = {*truth.gallery, *truth.queries}
    by_name: dict[str, Picture] = {}
    for picture in pictures:
        name = Path(picture.name.rpartition(":")[2]).stem
        if name not in wanted:
            continue
        if name in by_name:
            raise EvaluationError(f"{name} is there twice: {by_name[name].name} and {picture.name}")
        by_name[name] = picture
    missing = [name for name in (*truth.gallery, *truth.queries) if name not in by_name]
    if missing:
        raise EvaluationError(
            f"no file for {counted(len(missing), 'picture')} of the ground truth, such as {missing[0]}",
            expected="the folder of the dataset's pictures",
        )
    gallery = embed_pictures(encoder, [by_name[name] for name in truth.gallery], tell)
    if gallery.refused:
        name, problem = next(iter(gallery.refused.items()))
        raise EvaluationError(f"{counted(len(gallery.refused), 'picture')} cannot be read, such as {name}: {problem}")
    queries = _embed_queries(encoder, truth, by_name)
    found = evaluate_revisited(queries @ gallery.embeddings.T, truth, ks)
    measures = []
    for name, protocol in (("easy", found.easy), ("medium", found.medium), ("hard", found.hard)):
        measures.append(mean_of(name, "mAP", protocol.average_precision))
        measures += [mean_of(name, f"mP@{k}", protocol.precision[:, n]) for n, k in enumerate(protocol.ks)]
    return measures


def _embed_queries(encoder: Encoder, truth: GroundTruth, by_name: dict[str, Picture]) -> Embeddings:
    spec = encoder.spec
    rows = []
    for name, box in zip(truth.queries, truth.boxes, strict=True):
        picture = by_name[name].decode(_WHOLE)
        part = cut(picture, None if box is None else (box[0], box[1], box[2] - box[0], box[3] - box[1]))
        pixels = preprocess(part, *spec.geometry)
        rows.append(embed_finite(encoder, pixels[None]))
    return np.concatenate(rows)
