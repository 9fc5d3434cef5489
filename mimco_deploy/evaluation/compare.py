"""Two encoders on the same pictures: what differs, picture by picture, and whose neighbours agree."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

from mimco_deploy.errors import EvaluationError
from mimco_deploy.evaluation.evaluate import Evaluation
from mimco_deploy.evaluation.label_free import NEIGHBOURS, check_enough, neighbour_agreement
from mimco_deploy.evaluation.measures import Measure, difference

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Comparison:
    """Of two encoders."""

    differences: list[Measure]
    """The second less the first, for each measure that is a mean over the same pictures."""
    agreement: Measure | None
    """Share of the ten nearest neighbours that both have in common; None where too few pictures could be read."""
    by_chance: float
    """What they would share by chance; NaN where that is not known."""


def compare(first: Evaluation, second: Evaluation) -> Comparison:
    """Compare what was found of two encoders.

    Raises:
        EvaluationError: they were not evaluated on the same pictures.
    """
    names = [[picture.name for picture in found.pictures.pictures] for found in (first, second)]
    if names[0] != names[1]:
        raise EvaluationError(
            f"{first.name} and {second.name} read {len(names[0])} and {len(names[1])} pictures, not the same",
            expected="pictures that do not change while they are evaluated",
        )
    theirs = {(measure.protocol, measure.name): measure for measure in second.measures}
    pairs = [(measure, theirs.get((measure.protocol, measure.name))) for measure in first.measures]
    differences = [found for ours, other in pairs if other is not None and (found := difference(ours, other))]
    agreement = _agreement(first, second)
    by_chance = math.nan if agreement is None else NEIGHBOURS / (len(names[0]) - 1)
    return Comparison(differences, agreement, by_chance)


def _agreement(first: Evaluation, second: Evaluation) -> Measure | None:
    try:
        check_enough(len(first.pictures.pictures))
    except EvaluationError as reason:  # some could not be read; what was measured by then shall not be lost
        logger.warning("left out: %s", reason)
        return None
    return neighbour_agreement(first.pictures.embeddings, second.pictures.embeddings)


def table(found: Sequence[Evaluation]) -> list[list[Measure | None]]:
    """One row a measure of the first, one column an encoder."""
    columns = [{(measure.protocol, measure.name): measure for measure in one.measures} for one in found]
    return [[column.get((measure.protocol, measure.name)) for column in columns] for measure in found[0].measures]
