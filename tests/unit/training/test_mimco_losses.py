"""MimCo's losses against plain loops in float64, written from the definition in the module, and its token queue."""

from __future__ import annotations

import itertools
import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mimco_deploy.training.losses import first_of
from mimco_deploy.training.methods.mimco import image_loss, patch_logits
from mimco_deploy.training.momentum import KeyQueue

Floats = npt.NDArray[np.float64]
DICTIONARIES = [
    combination
    for count in (1, 2, 3)
    for combination in itertools.combinations(("intra", "batch", "queue"), count)
]  # fmt: skip


def patch_loss(logits: Tensor, temperature: float) -> Tensor:
    return first_of(logits.flatten(0, 1).float(), temperature)


def keys_of(tokens: Tensor, draw: Tensor) -> tuple[Tensor, Tensor]:
    """Drawn tokens of a batch, and the image that each is of."""
    return tokens.flatten(0, 1)[draw], draw // tokens.shape[1]


def unit(vector: Floats) -> Floats:
    return vector / math.sqrt(sum(x * x for x in vector))


def patch_loss_in_loops(
    queries: Floats,
    tokens: Floats,
    positions: npt.NDArray[np.int64],
    temperature: float,
    *,
    intra: bool,
    draw: npt.NDArray[np.int64] | None,
    queue: Floats | None,
) -> tuple[float, list[int]]:
    """The loss, and the number of negatives of each query."""
    images, length = tokens.shape[:2]
    total, negatives_of = 0.0, []
    for b in range(images):
        for m in range(queries.shape[1]):
            query, place = unit(queries[b, m]), positions[b, m]
            positive = float(query @ unit(tokens[b, place]))
            negatives: list[float] = []
            if intra:
                negatives += [float(query @ unit(tokens[b, i])) for i in range(length) if i != place]
            if draw is not None:
                drawn = [divmod(int(index), length) for index in draw]
                negatives += [float(query @ unit(tokens[image, i])) for image, i in drawn if image != b]
            if queue is not None:
                negatives += [float(query @ unit(row)) for row in queue]
            everything = [positive, *negatives]
            total += math.log(sum(math.exp(cosine / temperature) for cosine in everything)) - positive / temperature
            negatives_of.append(len(negatives))
    return total / (images * queries.shape[1]), negatives_of


def example(
    images: int, masked: int, length: int, width: int = 6, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Queries, tokens, positions, a draw with duplicates, normalised queue rows; all float64."""
    rng = np.random.default_rng([seed, images, masked, length])
    queries, tokens = rng.normal(size=(images, masked, width)), rng.normal(size=(images, length, width)) * 3
    positions = np.stack([rng.permutation(length)[:masked] for _ in range(images)])
    draw = rng.integers(0, images * length, 2 * length)
    draw[-1] = draw[0]
    queue = np.stack([unit(row) for row in rng.normal(size=(5, width))])
    return (
        torch.from_numpy(queries),
        torch.from_numpy(tokens),
        torch.from_numpy(positions),
        torch.from_numpy(draw),
        torch.from_numpy(queue),
    )


@pytest.mark.parametrize("dictionaries", DICTIONARIES, ids="+".join)
@pytest.mark.parametrize(("images", "masked", "length"), [(2, 1, 4), (3, 5, 9), (4, 16, 16), (1, 3, 4)])
@pytest.mark.parametrize("temperature", [0.07, 0.2, 1.0])
def test_patch_loss_is_the_definition_in_plain_loops(
    dictionaries: tuple[str, ...], images: int, masked: int, length: int, temperature: float
) -> None:
    queries, tokens, positions, draw, queue = example(images, masked, length)
    intra = "intra" in dictionaries
    batch_draw = draw if "batch" in dictionaries else None
    rows = queue if "queue" in dictionaries else None
    keys = None if batch_draw is None else keys_of(tokens, batch_draw)
    logits = patch_logits(queries, tokens, positions, intra=intra, batch=keys, queue=rows)
    expected, negatives = patch_loss_in_loops(
        queries.numpy(),
        tokens.numpy(),
        positions.numpy(),
        temperature,
        intra=intra,
        draw=None if batch_draw is None else batch_draw.numpy(),
        queue=None if rows is None else rows.numpy(),
    )
    assert (logits.isfinite().sum(dim=2) - 1).flatten().tolist() == negatives
    assert patch_loss(logits, temperature).item() == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_column_0_is_the_positive_at_every_position() -> None:
    _, tokens, _, draw, queue = example(3, 1, 9)
    positions = torch.arange(9).expand(3, 9)
    logits = patch_logits(tokens * 7, tokens, positions, intra=True, batch=keys_of(tokens, draw), queue=queue)
    torch.testing.assert_close(logits[..., 0], torch.ones(3, 9, dtype=torch.float64))
    assert (logits[..., 1:] < 1 - 1e-9).all()


def test_no_negative_from_the_batch_is_of_the_querys_own_image() -> None:
    queries, tokens, positions, _, _ = example(3, 2, 4)
    everything = torch.arange(12)
    logits = patch_logits(queries, tokens, positions, intra=False, batch=keys_of(tokens, everything), queue=None)[
        ..., 1:
    ]
    for image in range(3):
        absent = logits[image].isinf().all(dim=0)
        assert absent.tolist() == [key // 4 == image for key in range(12)]
        assert (logits[image].isinf() == absent).all()


@pytest.mark.parametrize("temperature", [0.1, 0.2, 1.0])
@pytest.mark.parametrize("dictionaries", DICTIONARIES, ids="+".join)
def test_equal_tokens_give_the_log_of_the_dictionarys_size(dictionaries: tuple[str, ...], temperature: float) -> None:
    images, masked, length = 3, 2, 8
    _, _, positions, _, _ = example(images, masked, length)
    draw = torch.cat([torch.arange(length * images), torch.tensor([0, length, 2 * length])])  # alike for each image
    negatives = 0
    if "intra" in dictionaries:
        negatives += length - 1
    if "batch" in dictionaries:
        negatives += 2 * length + 2
    if "queue" in dictionaries:
        negatives += 5
    same = torch.ones(1, 1, 6, dtype=torch.float64)
    tokens = same.expand(images, length, 6)
    logits = patch_logits(
        same.expand(images, masked, 6),
        tokens,
        positions,
        intra="intra" in dictionaries,
        batch=keys_of(tokens, draw) if "batch" in dictionaries else None,
        queue=(same[0] / math.sqrt(6)).expand(5, 6) if "queue" in dictionaries else None,
    )
    assert (logits.isfinite().sum(dim=2) == 1 + negatives).all()
    assert patch_loss(logits, temperature).item() == pytest.approx(math.log(1 + negatives), rel=1e-6)


def test_random_tokens_give_chance_level() -> None:
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(16, 20, 384, generator=generator)
    tokens = torch.randn(16, 49, 384, generator=generator)
    positions = torch.stack([torch.randperm(49, generator=generator)[:20] for _ in range(16)])
    for intra, draw, negatives in (
        (True, None, 48),
        (False, torch.arange(16 * 49), 15 * 49),
        (True, torch.arange(16 * 49), 48 + 15 * 49),
    ):
        logits = patch_logits(
            queries, tokens, positions, intra=intra, batch=None if draw is None else keys_of(tokens, draw), queue=None
        )
        chance = math.log(1 + negatives)
        assert patch_loss(logits, 0.2).item() == pytest.approx(chance, abs=0.1)


def test_a_perfect_match_costs_nothing_as_the_temperature_falls() -> None:
    _, tokens, positions, draw, queue = example(3, 4, 9)
    queries = tokens.gather(1, positions.unsqueeze(2).expand(-1, -1, 6))
    logits = patch_logits(queries, tokens, positions, intra=True, batch=keys_of(tokens, draw), queue=queue)
    losses = [patch_loss(logits, temperature).item() for temperature in (1.0, 0.2, 0.05, 0.002)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == pytest.approx(0.0, abs=1e-6)


def test_gradient_goes_to_the_queries_alone() -> None:
    queries, tokens, positions, draw, queue = (
        tensor.clone().requires_grad_(tensor.is_floating_point()) for tensor in example(3, 4, 9)
    )
    logits = patch_logits(queries, tokens, positions, intra=True, batch=keys_of(tokens, draw), queue=queue.detach())
    patch_loss(logits, 0.2).backward()  # type: ignore[no-untyped-call]
    assert queries.grad is not None
    assert queries.grad.isfinite().all()
    assert (queries.grad.abs().sum(dim=2) > 0).all()
    assert tokens.grad is None
    keys = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    image_queries = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    image_loss(image_queries, keys, 0.2).backward()  # type: ignore[no-untyped-call]
    assert keys.grad is None
    assert image_queries.grad is not None


def test_gradient_is_that_of_finite_differences() -> None:
    queries, tokens, positions, draw, queue = example(2, 3, 4)
    queries.requires_grad_()

    def loss(values: Tensor) -> Tensor:
        logits = patch_logits(values, tokens, positions, intra=True, batch=keys_of(tokens, draw), queue=queue)
        # patch_loss computes in float32, too coarse for finite differences: the same in float64
        return (logits.div(0.2).logsumexp(dim=2) - logits[..., 0] / 0.2).mean()

    (ours,) = torch.autograd.grad(
        patch_loss(patch_logits(queries, tokens, positions, intra=True, batch=keys_of(tokens, draw), queue=queue), 0.2),
        queries,
    )
    step = 1e-6
    for index in np.ndindex(*queries.shape):
        shifted = queries.detach().clone()
        shifted[index] += step
        above = loss(shifted).item()
        shifted[index] -= 2 * step
        assert ours[index].item() == pytest.approx((above - loss(shifted).item()) / (2 * step), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("dictionaries", DICTIONARIES, ids="+".join)
def test_the_order_of_images_in_a_batch_does_not_matter(dictionaries: tuple[str, ...]) -> None:
    images, length = 4, 9
    queries, tokens, positions, draw, queue = example(images, 5, length)
    order = torch.tensor([2, 0, 3, 1])
    where = order.argsort()
    moved = where[draw // length] * length + draw % length  # the same tokens at their new places

    def loss(q: Tensor, t: Tensor, p: Tensor, d: Tensor) -> float:
        logits = patch_logits(
            q,
            t,
            p,
            intra="intra" in dictionaries,
            batch=keys_of(t, d) if "batch" in dictionaries else None,
            queue=queue if "queue" in dictionaries else None,
        )
        return patch_loss(logits, 0.2).item()

    before = loss(queries, tokens, positions, draw)
    assert loss(queries[order], tokens[order], positions[order], moved) == pytest.approx(before, rel=1e-6)
    if dictionaries == ("batch",):
        assert loss(queries[order], tokens[order], positions[order], draw) != pytest.approx(before, rel=1e-6)


@pytest.mark.parametrize("temperature", [0.07, 0.2, 1.0])
@pytest.mark.parametrize("first", [0, 4])
def test_image_loss_is_info_nce_in_plain_loops(temperature: float, first: int) -> None:
    rng = np.random.default_rng(1)
    queries, keys = rng.normal(size=(4, 6)), rng.normal(size=(8, 6)) * 5
    total = 0.0
    for i in range(4):
        cosines = [float(unit(queries[i]) @ unit(key)) for key in keys]
        total += math.log(sum(math.exp(c / temperature) for c in cosines)) - cosines[first + i] / temperature
    ours = image_loss(torch.from_numpy(queries), torch.from_numpy(keys), temperature, first)
    assert ours.item() == pytest.approx(total / 4, rel=1e-6)


def test_equal_images_give_log_n() -> None:
    same = torch.ones(8, 4)
    assert image_loss(same[:4], same, 0.2).item() == pytest.approx(math.log(8), rel=1e-6)


def queue_in_plain_python(pushes: list[int], size: int) -> list[float]:
    """Serial numbers in the queue's places after pushes of so many rows, numbered from 1."""
    places, at, serial = [0.0] * size, 0, 0
    for count in pushes:
        numbers = list(range(serial + 1, serial + count + 1))
        serial += count
        for number in numbers[-size:]:
            places[at % size] = float(number)
            at += 1
    return places[: min(at, size)]


@given(st.integers(1, 7), st.lists(st.integers(0, 16), max_size=6))
@settings(deadline=None)
def test_queue_keeps_the_newest_rows(size: int, pushes: list[int]) -> None:
    queue = KeyQueue(size, 2)
    serial = 0
    for count in pushes:
        angles = torch.arange(serial + 1, serial + count + 1) * 0.01
        serial += count
        queue.push(torch.stack([angles.cos(), angles.sin()], dim=1) * 5)
    rows = queue.rows[: int(queue.pushed)]
    assert rows.shape == (min(sum(min(count, size) for count in pushes), size), 2)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(len(rows)))
    numbers = (torch.atan2(rows[:, 1], rows[:, 0]) / 0.01).round().tolist()
    assert numbers == queue_in_plain_python(pushes, size)
    assert sorted(numbers) == [float(number) for number in range(serial - len(rows) + 1, serial + 1)]


def test_a_new_queue_holds_random_directions() -> None:
    rows = KeyQueue(64, 24).rows
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(64))
    assert (rows @ rows.T - torch.eye(64)).abs().max() < 0.9


def test_a_queue_goes_on_where_its_state_was_saved() -> None:
    torch.manual_seed(0)
    rows = torch.randn(20, 3)
    queue, restored = KeyQueue(6, 3), KeyQueue(6, 3)
    queue.push(rows[:8])
    restored.load_state_dict(queue.state_dict())
    for part in (rows[8:10], rows[10:17], rows[17:]):
        queue.push(part)
        restored.push(part)
        assert torch.equal(queue.rows, restored.rows)
        assert torch.equal(queue.pushed, restored.pushed)


def test_a_queue_takes_no_gradient() -> None:
    queue = KeyQueue(4, 3)
    queue.push(torch.randn(3, 3, requires_grad=True))
    assert not queue.rows.requires_grad
    assert not list(queue.parameters())
