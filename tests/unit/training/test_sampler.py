"""Which picture comes when: a function of seed, step and position, whatever the restarts, processes and workers."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mimco_deploy.training import data
from mimco_deploy.training.augment import TwoViews
from mimco_deploy.training.config import DataConfig, ViewsConfig
from mimco_deploy.training.corpus import load_corpus
from mimco_deploy.training.data import StepSampler, load_batches, seed_for
from tests.helpers import gallery
from tests.unit.training.small import run_config


@given(
    batch=st.integers(1, 12),
    spare=st.integers(0, 30),
    epochs=st.integers(1, 4),
    seed=st.integers(0, 2**40),
    start=st.integers(0, 20),
)
@settings(deadline=None)
def test_an_epoch_is_a_permutation_and_a_late_start_is_the_tail(
    batch: int, spare: int, epochs: int, seed: int, start: int
) -> None:
    pictures = batch + spare
    run = run_config(epochs=epochs, global_batch_size=batch, seed=seed)
    sampler = StepSampler(pictures, run)
    steps = list(sampler)
    assert sampler.steps_per_epoch == pictures // batch
    assert len(steps) == sampler.total_steps == epochs * (pictures // batch)
    for epoch in range(epochs):
        inside = steps[epoch * sampler.steps_per_epoch : (epoch + 1) * sampler.steps_per_epoch]
        seen = [index for slots in inside for index, _ in slots]
        assert len(seen) == len(set(seen))
        assert set(seen) <= set(range(pictures))
        if pictures % batch == 0:
            assert sorted(seen) == list(range(pictures))
    positions = [position for slots in steps for _, position in slots]
    assert positions == list(range(len(steps) * batch))
    assert list(StepSampler(pictures, run, start)) == steps[start:]


def test_epochs_and_seeds_give_other_orders() -> None:
    run = run_config(epochs=2, global_batch_size=50)
    first, second = ([index for index, _ in slots] for slots in StepSampler(50, run))
    other = [index for index, _ in next(iter(StepSampler(50, run_config(epochs=2, global_batch_size=50, seed=4))))]
    assert len({tuple(first), tuple(second), tuple(other), tuple(range(50))}) == 4


def as_process(monkeypatch: pytest.MonkeyPatch, rank: int, world: int) -> None:
    monkeypatch.setattr(data, "rank", lambda: rank)
    monkeypatch.setattr(data, "world_size", lambda: world)


@pytest.mark.parametrize(("world", "accumulate"), [(2, 1), (1, 2), (2, 2), (4, 1), (1, 4)])
def test_processes_and_micro_batches_share_what_one_process_would_take(
    monkeypatch: pytest.MonkeyPatch, world: int, accumulate: int
) -> None:
    whole = list(StepSampler(27, run_config(global_batch_size=8, epochs=2)))
    run = run_config(global_batch_size=8, epochs=2, accumulate=accumulate)
    shares = []
    for rank in range(world):
        as_process(monkeypatch, rank, world)
        sampler = StepSampler(27, run)
        assert sampler.micro_batch == 8 // world // accumulate
        shares.append(list(sampler))
        assert list(StepSampler(27, run, start_step=2)) == shares[-1][2 * accumulate :]
    for step, slots in enumerate(whole):
        parts = [shares[rank][step * accumulate + micro] for micro in range(accumulate) for rank in range(world)]
        assert all(len(part) == sampler.micro_batch for part in parts)
        assert list(itertools.chain.from_iterable(parts)) == slots


def test_seeds_differ_from_each_other_and_from_the_models() -> None:
    views = {seed_for(3, position) for position in range(5000)}
    model = {seed_for(3, 1, step, micro, rank) for step in range(500) for micro in range(2) for rank in range(2)}
    assert len(views) == 5000
    assert len(model) == 2000
    assert not views & model
    assert all(0 <= seed < 2**64 for seed in views)


def batches(folder: Path, *, held: bool = True, start: int = 0, workers: int = 0) -> list[tuple[torch.Tensor, ...]]:
    corpus = load_corpus(DataConfig(sources=(str(folder),), memory_mib=2048 if held else 0))
    sampler = StepSampler(len(corpus), run_config(global_batch_size=4), start)
    return [
        views for views, _ in load_batches(corpus, TwoViews(16, ViewsConfig(min_crop_scale=0.08)), sampler, 3, workers)
    ]


def test_batches_are_the_same_held_streamed_and_after_a_restart(tmp_path: Path) -> None:
    gallery(tmp_path, 9)
    whole = batches(tmp_path)
    assert len(whole) == 4
    torch.manual_seed(99)  # what the process drew before does not matter
    for others, first in (
        (batches(tmp_path, held=False), 0),
        (batches(tmp_path, start=1), 1),
        (batches(tmp_path, start=3), 3),
    ):
        assert len(others) == len(whole) - first
        for ours, theirs in zip(others, whole[first:], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_pictures_views_differ_between_epochs(tmp_path: Path) -> None:
    gallery(tmp_path, 4)
    first, second = batches(tmp_path)
    as_sets = [{view.numpy().tobytes() for view in views[0]} for views in (first, second)]
    assert not as_sets[0] & as_sets[1]


def test_views_depend_on_the_position_and_not_on_the_batch_they_are_in(tmp_path: Path) -> None:
    gallery(tmp_path, 8)
    corpus = load_corpus(DataConfig(sources=(str(tmp_path),)))
    make = TwoViews(16, ViewsConfig(min_crop_scale=0.08))
    whole = StepSampler(8, run_config(global_batch_size=8))
    halves = StepSampler(8, run_config(global_batch_size=8, accumulate=2))
    eight = [views for views, _ in load_batches(corpus, make, whole, 3, 0)]
    four = [views for views, _ in load_batches(corpus, make, halves, 3, 0)]
    assert len(four) == 2 * len(eight)
    for step, views in enumerate(eight):
        for column, view in enumerate(views):
            assert torch.equal(torch.cat([four[2 * step][column], four[2 * step + 1][column]]), view)


WITH_A_WORKER = """
import sys
import torch
from pathlib import Path
from tests.unit.training.test_sampler import batches
torch.save([batches(Path(sys.argv[1]), workers=1), batches(Path(sys.argv[1]), workers=2)], sys.argv[2])
"""


def test_any_number_of_workers_gives_the_same_tensors(tmp_path: Path) -> None:
    gallery(tmp_path / "photos", 9)
    subprocess.run(
        [sys.executable, "-c", WITH_A_WORKER, str(tmp_path / "photos"), str(tmp_path / "views.pt")],
        cwd=Path(__file__).parents[3],
        check=True,
    )
    alone = batches(tmp_path / "photos")
    for others in torch.load(tmp_path / "views.pt", weights_only=True):
        assert len(others) == len(alone)
        for ours, theirs in zip(others, alone, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_names_of_skipped_pictures_come_with_the_batch(tmp_path: Path) -> None:
    paths = gallery(tmp_path, 8)
    paths[5].write_bytes(b"\xff\xd8\xff broken")
    corpus = load_corpus(DataConfig(sources=(str(tmp_path),), memory_mib=0, max_bad_share=0.5))
    sampler = StepSampler(8, run_config(global_batch_size=8, epochs=1))
    ((views, bad),) = list(load_batches(corpus, TwoViews(16, ViewsConfig(min_crop_scale=0.08)), sampler, 3, 0))
    assert views[0].shape == (8, 3, 16, 16)
    assert len(bad) == 1
    assert str(paths[5]) in bad[0]
