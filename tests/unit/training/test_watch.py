"""What a person sees of a run: the probe's numbers, the report, and the batch that a run ended badly with."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from mimco_deploy.errors import TrainingError, TrainingInterrupted
from mimco_deploy.training.augment import TwoViews
from mimco_deploy.training.checkpoint import load_encoder, read_checkpoint
from mimco_deploy.training.corpus import load_corpus
from mimco_deploy.training.data import StepSampler, load_batches
from mimco_deploy.training.loop import train
from mimco_deploy.training.losses import retrieval
from mimco_deploy.training.probe import (
    CLASSES,
    PICTURES,
    Probe,
    Sight,
    choose,
    effective_rank,
    leave_one_out,
    make_probe,
    read_sights,
    write_sights,
)
from mimco_deploy.training.report import write_report
from mimco_deploy.training.watch import narrowed
from tests.unit.training.small import (
    BACKBONE,
    Stub,
    draw_photos,
    every_method,
    rows_of,
    stage1_config,
    stage2_config,
    stop_at,
    train_any,
)

pytestmark = pytest.mark.usefixtures("on_cpu")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_photos(tmp_path_factory.mktemp("watch") / "photos")


class Page(HTMLParser):
    """Counts elements, and keeps the text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        source = dict(attrs).get("src")
        assert source is None or source.startswith("data:image/jpeg;base64,")

    def handle_data(self, data: str) -> None:
        self.text += data


# ------------------------------------------------------------------------------------------------------------ numbers


@pytest.mark.parametrize(("rank", "width"), [(1, 8), (3, 8), (8, 8)])
def test_effective_rank_is_the_number_of_equal_directions(rank: int, width: int) -> None:
    embeddings = torch.eye(width)[torch.arange(24 * rank) % rank]
    assert effective_rank(embeddings) == pytest.approx(rank, rel=1e-4)


def test_effective_rank_is_rankmes_formula() -> None:
    embeddings = np.random.default_rng(0).normal(size=(20, 6))
    values = np.linalg.svd(embeddings, compute_uv=False)
    shares = [value / sum(values) for value in values]
    expected = math.exp(-sum(share * math.log(share) for share in shares))
    assert effective_rank(torch.from_numpy(embeddings)) == pytest.approx(expected, rel=1e-4)


def test_leave_one_out_is_a_vote_of_the_others() -> None:
    rng = np.random.default_rng(1)
    embeddings = rng.normal(size=(12, 4))
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    labels = rng.integers(0, 3, 12)
    right = 0
    for i in range(12):
        order = sorted((j for j in range(12) if j != i), key=lambda j: -(embeddings[i] @ embeddings[j]))[:5]
        votes = [sum(math.exp(embeddings[i] @ embeddings[j] / 0.07) for j in order if labels[j] == c) for c in range(3)]
        right += int(votes.index(max(votes)) == labels[i])
    cosines = torch.from_numpy(embeddings @ embeddings.T)
    cosines.fill_diagonal_(-torch.inf)
    assert leave_one_out(cosines, torch.from_numpy(labels), k=5) == pytest.approx(right / 12)


def test_retrieval_tells_similarity_and_whether_the_own_key_is_nearest() -> None:
    keys = torch.eye(4)
    queries = torch.stack([keys[1] * 3, keys[2], keys[0]])
    similarity, accuracy = retrieval(queries, keys, first_positive=1)
    assert similarity.item() == pytest.approx(2 / 3)
    assert accuracy.item() == pytest.approx(2 / 3)


# -------------------------------------------------------------------------------------------------------------- probe


@pytest.mark.parametrize("classes", [1, 20, 32, 33, 200, 1000])
def test_k_nn_has_several_pictures_of_each_class_however_many_there_are(classes: int) -> None:
    labels = [f"n{number % classes:04}" for number in range(4000)]
    numbers = choose(labels)
    assert numbers == sorted(set(numbers))
    assert 128 <= len(numbers) <= PICTURES
    seen = Counter(labels[number] for number in numbers)
    assert len(seen) == min(classes, CLASSES)
    assert min(seen.values()) >= min(4, 4000 // classes)


def test_folders_of_a_picture_or_two_do_not_make_the_probe_small() -> None:
    dates = [f"2019-{number:04}" for number in range(3000) for _ in range(1 + number % 2)]
    assert len(choose(dates)) == PICTURES
    some = [*dates, *(f"large{number % 40}" for number in range(400))]
    assert {some[number][:5] for number in choose(some)} == {"large"}


def test_what_was_seen_of_other_pictures_is_not_gone_on_with(tmp_path: Path, photos: Path) -> None:
    config = stage1_config(photos, checkpoint_every_steps=2)
    with pytest.raises(TrainingInterrupted):
        train_any(config, tmp_path, on_step=stop_at(4))
    write_sights(tmp_path, [dataclasses.replace(one, pictures="others") for one in read_sights(tmp_path, 99)])
    train_any(config, tmp_path, resume=read_checkpoint(tmp_path / "last"))
    assert [sight.step for sight in read_sights(tmp_path, 99)] == [5, 6]


def test_pictures_without_labels_are_evenly_spread() -> None:
    assert choose([None, *["a"] * 255, "b"])[0::255] == [0, 256]
    assert choose([None] * 3) == [0, 1, 2]


def test_a_probe_looks_without_a_trace(photos: Path) -> None:
    method = Stub(dataclasses.replace(BACKBONE, drop_path=0.5)).train()
    before = {name: value.clone() for name, value in method.state_dict().items()}
    probe = Probe(load_corpus(stage1_config(photos).data), 16)
    torch.manual_seed(3)
    first, second = (probe.look(7, method.encoder, "mean") for _ in range(2))
    drawn = torch.rand(3)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(3))
    assert first is not None
    assert first == second
    assert method.encoder.training
    assert all(torch.equal(before[name], value) for name, value in method.state_dict().items())
    assert (first.step, len(first.neighbours)) == (7, 6)
    assert all(shown not in row for shown, row in zip(probe.shown, first.neighbours, strict=True))
    assert all(scores == sorted(scores, reverse=True) for scores in first.scores)
    assert first.knn is not None  # the folders are twelve kinds of two


def test_a_corpus_without_labels_or_of_one_picture(tmp_path: Path, photos: Path) -> None:
    for number, path in enumerate(sorted(photos.rglob("*.jpg"))[:3]):
        (tmp_path / f"{number}.jpg").write_bytes(path.read_bytes())
    config = dataclasses.replace(stage1_config(tmp_path).data)
    probe = make_probe(load_corpus(config), 16)
    assert probe is not None
    sight = probe.look(1, Stub().encoder, "mean")
    assert sight is not None
    assert sight.knn is None
    for path in sorted(tmp_path.glob("*.jpg"))[1:]:
        path.unlink()
    assert make_probe(load_corpus(config), 16) is None


# ------------------------------------------------------------------------------------------------------------- report


@pytest.mark.parametrize("name", ["mocov3", "moby", "mimco", "simmim", "mae", "joint", "mimco-l1"])
def test_a_run_of_each_method_leaves_a_report(tmp_path: Path, photos: Path, name: str) -> None:
    train_any(stage1_config(photos, epochs=1), tmp_path / "stage1")
    config = every_method(photos, tmp_path / "stage1" / "last")[name]
    train_any(config, tmp_path / "run")
    page = Page(tmp_path / "run" / "report.html")
    assert page.text.startswith(config.method.name)
    assert "step 6 of 6" in page.text
    assert "effective rank" in page.text
    assert "collapsed" not in page.text
    assert "script" not in page.tags
    masked = config.method.name in ("mimco", "simmim", "mae", "joint")
    assert ("Masks" in page.text) == masked
    assert page.tags.count("img") == 6 * (1 + 8) + 6 * masked
    parts = {"mocov3": ["image_accuracy", "positive_similarity"], "mimco": ["patch_loss", "image_loss"]}
    assert all(part in page.text for part in parts.get(name, []))


def test_the_report_goes_on_after_a_resume(tmp_path: Path, photos: Path) -> None:
    config = stage1_config(photos, checkpoint_every_steps=2)
    with pytest.raises(TrainingInterrupted):
        train_any(config, tmp_path, on_step=stop_at(4))
    assert [sight.step for sight in read_sights(tmp_path, 99)] == [1, 2, 4]
    train_any(config, tmp_path, resume=read_checkpoint(tmp_path / "last"))
    assert [sight.step for sight in read_sights(tmp_path, 99)] == [1, 2, 4, 6]
    assert [sight.step for sight in read_sights(tmp_path, 4)] == [1, 2, 4]


def test_masks_that_the_teacher_draws_are_not_shown_as_drawn_at_random(tmp_path: Path, photos: Path) -> None:
    train_any(stage1_config(photos, epochs=1), tmp_path / "stage1")
    config = stage2_config(photos, tmp_path / "stage1" / "last", epochs=1)
    train_any(dataclasses.replace(config, mask=dataclasses.replace(config.mask, kind="attention")), tmp_path / "run")
    assert "Masks" not in Page(tmp_path / "run" / "report.html").text


def test_what_is_looked_at_is_what_would_be_exported(tmp_path: Path, photos: Path) -> None:
    """A control that keeps no settings of its own too: SimMIM trains the mean of the patch tokens."""
    train_any(stage1_config(photos, epochs=1), tmp_path / "stage1")
    config = every_method(photos, tmp_path / "stage1" / "last")["simmim"]
    train_any(config, tmp_path / "run")
    encoder, pooling = load_encoder(read_checkpoint(tmp_path / "run" / "last"))
    probe = make_probe(load_corpus(config.data), 16)
    assert probe is not None
    seen = probe.look(6, encoder, pooling)
    assert seen is not None
    assert pooling == "mean"
    assert read_sights(tmp_path / "run", 6)[-1].spread == pytest.approx(seen.spread, rel=1e-4)


def test_no_spike_is_lost_in_a_long_log(tmp_path: Path) -> None:
    rows = [{"step": step, "loss": 50.0 if step == 1234 else -7.0 if step == 55 else 1.0} for step in range(5000)]
    (tmp_path / "log.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    write_report(tmp_path, "title", "step 5,000")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "loss: 1 at step 5000, from -7 to 50" in text
    drawn = re.findall(r"([\d.]+),([\d.]+)", text.partition("<polyline points='")[2].partition("'")[0])
    assert len(drawn) < 1000
    assert min(float(y) for _, y in drawn) == 0  # the top of the chart


@pytest.mark.parametrize(
    ("first", "last", "told"), [(31.6, 1.8, True), (31.6, 2.1, False), (3.0, 1.6, False), (1.6, 1.5, False)]
)
def test_a_rank_is_low_below_two_and_below_half_of_the_first(first: float, last: float, told: bool) -> None:
    """Of two pictures it is two at most."""
    assert bool(narrowed(Sight(1, 0.2, first, None, [], []), Sight(9, 0.2, last, None, [], []))) == told


def test_embeddings_along_one_direction_are_warned_of(
    tmp_path: Path, photos: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The spread of a batch alone does not rule them out."""

    class Narrow(Stub):
        def forward(self, view: Tensor, *views: Tensor) -> dict[str, Tensor]:
            if len(self.progress) > 1:
                with torch.no_grad():  # all but the constant part of every embedding fades
                    self.encoder.body.norm.weight.mul_(0.1)
                    self.encoder.body.norm.bias.fill_(1.0)
            return {**super().forward(view, *views), "feature_spread": torch.tensor(0.2)}

    config = stage1_config(photos)
    with caplog.at_level("WARNING"):
        train(Narrow(), config, load_corpus(config.data), TwoViews(16, config.views), tmp_path)
    assert re.search(r"after step 6 the effective rank of embeddings is 1\.\d, at first it was [2-9]", caplog.text)
    assert "they have all but collapsed" in Page(tmp_path / "report.html").text


def test_the_replay_names_the_picture_that_stood_in(tmp_path: Path) -> None:
    draw_photos(tmp_path / "photos")
    broken = sorted((tmp_path / "photos").rglob("*.jpg"))[0]
    broken.write_bytes(b"no picture")
    config = stage1_config(tmp_path / "photos")
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, max_bad_share=0.5))
    (tmp_path / "run").mkdir()
    with pytest.raises(TrainingError, match="loss is nan"):
        train(Broken(), config, load_corpus(config.data), TwoViews(16, config.views), tmp_path / "run")
    with safe_open(tmp_path / "run/replay-4.safetensors", "pt") as kept:
        assert str(broken) not in json.loads(kept.metadata()["pictures"])


def test_names_are_text_whatever_is_in_them_and_broken_lines_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"step": 0, "loss": 2.0}\n{"step": 1, "lo', encoding="utf-8")
    write_report(tmp_path, "<script>x</script>", "step 1", alarm="<b>bad</b> & worse")
    page = Page(tmp_path / "report.html")
    assert "script" not in page.tags
    assert "b" in page.tags  # a chart's number; the alarm's own is text
    assert "<b>bad</b> & worse" in page.text
    assert page.tags.count("polyline") == 1


# -------------------------------------------------------------------------------------------------------------- alarms


class Broken(Stub):
    """NaN from the fourth step on."""

    def forward(self, view: Tensor, *views: Tensor) -> dict[str, Tensor]:
        row = super().forward(view, *views)
        return {**row, "loss": row["loss"] * (math.nan if len(self.progress) > 3 else 1.0)}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_batch_of_a_step_that_went_wrong_is_kept(tmp_path: Path, photos: Path, accumulate: int) -> None:
    config = stage1_config(photos, accumulate=accumulate, log_every_steps=6)
    corpus, views = load_corpus(config.data), TwoViews(16, config.views)
    with pytest.raises(
        TrainingError, match=r"step 4: loss is nan \(its batch is in .*replay-4\.safetensors\)"
    ) as error:
        train(Broken(), config, corpus, views, tmp_path)
    assert error.value.step == 3

    sampler = StepSampler(len(corpus), config.run, 3)
    batches = load_batches(corpus, views, sampler, config.run.seed, workers=0)
    mode = (tmp_path / "replay-4.safetensors").stat().st_mode
    assert mode == (tmp_path / "log.jsonl").stat().st_mode  # for whoever may read the log
    with safe_open(tmp_path / "replay-4.safetensors", "pt") as kept:
        for micro in range(accumulate):
            given, _ = next(batches)
            for number, view in enumerate(given):
                assert torch.equal(kept.get_tensor(f"micro{micro}.view{number}"), view)
        assert kept.metadata()["step"] == "3"
        assert len(json.loads(kept.metadata()["pictures"])) == 8
        assert len(list(kept.keys())) == 2 * accumulate
    page = Page(tmp_path / "report.html")
    assert "ended at step 4" in page.text
    assert re.search(r"loss is nan.*replay-4\.safetensors", page.text)
    assert [row["step"] for row in rows_of(tmp_path)] == [0, 1, 2, 3]  # what led to it
    assert "loss" not in rows_of(tmp_path)[-1]
