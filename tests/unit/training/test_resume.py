"""6 steps = 3 + stop + resume + 3, bit for bit; the log and the checkpoints of a run."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import signal
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from mimco_deploy.errors import CheckpointError, ConfigError, TrainingInterrupted
from mimco_deploy.training import loop
from mimco_deploy.training.augment import TwoViews
from mimco_deploy.training.checkpoint import read_checkpoint, save_checkpoint
from mimco_deploy.training.config import Stage1Config, Stage2Config
from mimco_deploy.training.corpus import load_corpus
from mimco_deploy.training.data import fewest_parts, fit_batch
from mimco_deploy.training.loop import StepReport, train
from mimco_deploy.training.method_config import Dictionary
from mimco_deploy.training.methods import mocov3
from mimco_deploy.training.schedules import momentum_at
from mimco_deploy.training.stages import train_stage1, train_stage2
from tests.unit.training.small import (
    STEPS,
    Stub,
    assert_close_weights,
    assert_same_run,
    assert_same_state,
    draw_photos,
    every_method,
    rows_of,
    run_config,
    stage1_config,
    stage2_config,
    stop_at,
    train_any,
)

Config = Stage1Config | Stage2Config


pytestmark = pytest.mark.usefixtures("on_cpu")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_photos(tmp_path_factory.mktemp("resume") / "photos")


@pytest.fixture(scope="module")
def stage1_run(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "stage1"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        train_stage1(stage1_config(photos), folder)
    return folder


def stop_and_resume(config: Config, folder: Path, *stops: int) -> None:
    """Train until after each of `stops`, and then to the end, as the command line does."""
    resume = None
    for stop in stops:
        with pytest.raises(TrainingInterrupted, match=f"stopped after step {stop} of {STEPS}"):
            train_any(config, folder, resume=resume, on_step=stop_at(stop))
        resume = read_checkpoint(folder / "last")
        assert resume.step == stop
        torch.manual_seed(stop)  # whatever else the process drew
        config = resume.config
    train_any(config, folder, resume=resume)


@pytest.mark.parametrize("stops", [(3,), (2,), (5,), (2, 4)], ids=["epoch's end", "mid-epoch", "late", "twice"])
def test_stage_1_resumes_bit_for_bit(tmp_path: Path, photos: Path, stage1_run: Path, stops: tuple[int, ...]) -> None:
    stop_and_resume(stage1_config(photos), tmp_path / "run", *stops)
    assert_same_run(tmp_path / "run", stage1_run)
    assert [row["step"] for row in rows_of(tmp_path / "run")] == list(range(STEPS))


@pytest.mark.parametrize(
    ("dictionaries", "accumulate", "stops"),
    [
        (("intra", "batch"), 1, (3,)),
        (("intra", "batch"), 1, (2,)),
        (("queue",), 1, (2, 5)),
        (("intra", "batch", "queue"), 2, (3,)),
    ],
)
def test_stage_2_resumes_bit_for_bit(
    tmp_path: Path,
    photos: Path,
    stage1_run: Path,
    dictionaries: tuple[Dictionary, ...],
    accumulate: int,
    stops: tuple[int, ...],
) -> None:
    config = stage2_config(photos, stage1_run / "last", dictionaries=dictionaries, accumulate=accumulate)
    train_stage2(config, tmp_path / "whole")
    stop_and_resume(config, tmp_path / "run", *stops)
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    assert ("patch_level.queue.rows" in read_checkpoint(tmp_path / "run" / "last").load_model()) == (
        "queue" in dictionaries
    )


@pytest.mark.parametrize("name", sorted(every_method(Path(), Path())))
def test_every_method_goes_on_bit_for_bit_after_a_crash(
    tmp_path: Path, photos: Path, stage1_run: Path, name: str
) -> None:
    """Queues, momentum encoders and schedules go on where the checkpoint was; what came after it is done again."""
    config = every_method(photos, stage1_run / "last")[name]
    train_any(config, tmp_path / "whole")

    def crash(report: StepReport) -> None:
        if report.step == 4:
            raise KeyboardInterrupt

    often = dataclasses.replace(config, run=dataclasses.replace(config.run, checkpoint_every_steps=2))
    with pytest.raises(KeyboardInterrupt):
        train_any(often, tmp_path / "run", on_step=crash)
    checkpoint = read_checkpoint(tmp_path / "run" / "last")
    assert checkpoint.step == 2
    train_any(checkpoint.config, tmp_path / "run", resume=checkpoint)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_stage_2_resumes_without_its_teachers_folder(tmp_path: Path, photos: Path, stage1_run: Path) -> None:
    """The checkpoint holds the teacher's weights and tells its architecture."""
    teacher = Path(shutil.copytree(stage1_run, tmp_path / "stage1"))
    config = stage2_config(photos, teacher / "last")
    train_stage2(config, tmp_path / "whole")
    with pytest.raises(TrainingInterrupted):
        train_stage2(config, tmp_path / "run", on_step=stop_at(3))
    shutil.rmtree(teacher)
    train_stage2(config, tmp_path / "run", resume=read_checkpoint(tmp_path / "run" / "last"))
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_another_seed_is_another_run(tmp_path: Path, photos: Path, stage1_run: Path) -> None:
    train_stage1(stage1_config(photos, seed=4), tmp_path / "run")
    ours, theirs = (read_checkpoint(folder / "last").load_model() for folder in (tmp_path / "run", stage1_run))
    assert not torch.equal(
        ours["encoder.body.blocks.0.attn.qkv.weight"], theirs["encoder.body.blocks.0.attn.qkv.weight"]
    )


def test_a_finished_run_that_is_resumed_stays_as_it_is(tmp_path: Path, photos: Path) -> None:
    train_stage1(stage1_config(photos), tmp_path / "run")
    before = read_checkpoint(tmp_path / "run" / "last")
    weights, rows = before.load_model(), rows_of(tmp_path / "run")
    train_stage1(stage1_config(photos), tmp_path / "run", resume=before)
    after = read_checkpoint(tmp_path / "run" / "last")
    assert after.step == STEPS
    assert_same_state(after.load_model(), weights)
    assert rows_of(tmp_path / "run") == rows


def test_resuming_on_another_corpus_is_refused(tmp_path: Path, photos: Path) -> None:
    with pytest.raises(TrainingInterrupted):
        train_stage1(stage1_config(photos), tmp_path / "run", on_step=stop_at(2))
    rows = rows_of(tmp_path / "run")
    draw_photos(tmp_path / "others")
    checkpoint = read_checkpoint(tmp_path / "run" / "last")
    weights = checkpoint.load_model()
    with pytest.raises(CheckpointError, match="another corpus than these 24 pictures; expected the same pictures"):
        train_stage1(stage1_config(tmp_path / "others"), tmp_path / "run", resume=checkpoint)
    assert rows_of(tmp_path / "run") == rows
    assert_same_state(read_checkpoint(tmp_path / "run" / "last").load_model(), weights)


def test_weights_that_do_not_fit_are_refused_on_resuming(tmp_path: Path, photos: Path, stage1_run: Path) -> None:
    config = stage1_config(photos)
    wider = dataclasses.replace(config, method=dataclasses.replace(config.method, hidden_dim=64))
    with pytest.raises(CheckpointError, match=r"projector\.0\.weight"):
        train_stage1(wider, tmp_path / "run", resume=read_checkpoint(stage1_run / "last"))


@pytest.mark.parametrize(
    "state", [{}, {"state": {}, "param_groups": []}, {"state": {}, "param_groups": [{"params": [0]}]}]
)
def test_an_optimizers_state_that_does_not_fit_is_refused(
    tmp_path: Path, photos: Path, stage1_run: Path, state: dict[str, Any]
) -> None:
    shutil.copytree(stage1_run / "last", tmp_path / "last")
    torch.save(state, tmp_path / "last" / "optimizer.pt")
    with pytest.raises(CheckpointError, match=r"last"):
        train_stage1(stage1_config(photos), tmp_path / "run", resume=read_checkpoint(tmp_path / "last"))


def test_stage_2_resumes_without_looking_at_a_teacher_trained_anew(tmp_path: Path, photos: Path) -> None:
    """The teacher's folder may hold another run by then; the student's checkpoint holds its own teacher."""
    train_stage1(stage1_config(photos), tmp_path / "stage1")
    config = stage2_config(photos, tmp_path / "stage1" / "last")
    train_stage2(config, tmp_path / "whole")
    with pytest.raises(TrainingInterrupted):
        train_stage2(config, tmp_path / "run", on_step=stop_at(3))
    train_stage1(stage1_config(photos, seed=9), tmp_path / "stage1")
    train_stage2(config, tmp_path / "run", resume=read_checkpoint(tmp_path / "run" / "last"))
    assert_same_run(tmp_path / "run", tmp_path / "whole")


# --- the loop with a method of its own --------------------------------------------------------------------------------


def train_stub(config: Stage1Config, folder: Path, method: Stub | None = None, **options: Any) -> Stub:
    method = method or Stub()
    folder.mkdir(exist_ok=True)
    corpus = load_corpus(config.data)

    def make_views(picture: Any) -> tuple[Tensor, ...]:
        return TwoViews(config.backbone.image_size_px, config.views)(picture)

    train(method, config, corpus, make_views, folder, **options)
    return method


def test_a_method_starts_each_step_once_with_the_share_done(tmp_path: Path, photos: Path) -> None:
    method = train_stub(stage1_config(photos, accumulate=2), tmp_path / "run")
    assert method.progress == [step / STEPS for step in range(STEPS)]
    with pytest.raises(TrainingInterrupted):
        train_stub(stage1_config(photos), tmp_path / "other", on_step=stop_at(2))
    resumed = train_stub(stage1_config(photos), tmp_path / "other", resume=read_checkpoint(tmp_path / "other" / "last"))
    assert resumed.progress == [step / STEPS for step in range(2, STEPS)]


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulation_is_the_same_as_one_large_batch(tmp_path: Path, photos: Path, accumulate: int) -> None:
    """On a method without batch norm and negatives; the gradient is the mean over the micro-batches."""
    train_stub(stage1_config(photos), tmp_path / "whole")
    train_stub(stage1_config(photos, accumulate=accumulate), tmp_path / "parts")
    assert_close_weights(tmp_path / "parts", tmp_path / "whole")
    assert_moved(tmp_path / "whole", Stub().state_dict())


def assert_moved(folder: Path, start: dict[str, Tensor]) -> None:
    """Far enough for the tolerance of `assert_close_weights` to mean something."""
    now = read_checkpoint(folder / "last").load_model()
    assert max(float((now[name] - start[name]).abs().max()) for name in now) > 1e-3


def test_the_gradient_of_a_step_is_the_mean_over_its_micro_batches(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adam hides a factor; so this looks at what it is given."""
    given: list[Tensor] = []
    real = torch.optim.AdamW.step

    def spy(optimizer: torch.optim.AdamW, *arguments: Any) -> Any:
        given.append(torch.cat([p.grad.flatten() for group in optimizer.param_groups for p in group["params"]]))
        return real(optimizer, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    config = stage1_config(photos, epochs=1)
    unclipped = dataclasses.replace(config, optim=dataclasses.replace(config.optim, clip_norm=0.0))
    for accumulate in (1, 2, 4):
        run = dataclasses.replace(unclipped.run, accumulate=accumulate)
        train_stub(dataclasses.replace(unclipped, run=run), tmp_path / str(accumulate))
    assert len(given) == 9
    for first in (given[3], given[6]):
        torch.testing.assert_close(first, given[0], rtol=1e-4, atol=1e-6)


def test_the_models_random_numbers_do_not_depend_on_the_views(tmp_path: Path, photos: Path) -> None:
    """Whichever process drew them: with data-loading processes this one draws none."""

    class Spy(Stub):
        drawn: list[float]

        def forward(self, view: Tensor, *views: Tensor) -> dict[str, Tensor]:
            self.drawn.append(torch.rand(()).item())
            return super().forward(view, *views)

    def drawn(more: int) -> list[float]:
        method, config = Spy(), stage1_config(photos, accumulate=2)
        method.drawn = []
        two_views = TwoViews(16, config.views)

        def make_views(picture: Image.Image) -> tuple[Tensor, ...]:
            views = two_views(picture)
            torch.rand(more)
            return views

        (tmp_path / str(more)).mkdir()
        train(method, config, load_corpus(config.data), make_views, tmp_path / str(more))
        return method.drawn

    first = drawn(0)
    assert len(set(first)) == 2 * STEPS
    assert drawn(5) == first


def test_accumulation_is_the_same_as_one_large_batch_for_the_patch_loss(
    tmp_path: Path, photos: Path, stage1_run: Path
) -> None:
    """With negatives from the same image alone. The image head's batch norm sees smaller batches, at weight 0."""
    for name, accumulate in (("whole", 1), ("parts", 2)):
        config = stage2_config(
            photos, stage1_run / "last", dictionaries=("intra",), image_weight=0.0, accumulate=accumulate
        )
        config = dataclasses.replace(config, backbone=dataclasses.replace(config.backbone, drop_path=0.0))
        train_stage2(config, tmp_path / name)
    assert_close_weights(tmp_path / "parts", tmp_path / "whole")
    parts, whole = (rows_of(tmp_path / name)[0]["patch_loss"] for name in ("parts", "whole"))
    assert parts == pytest.approx(whole, rel=1e-5)  # the log has the mean over micro-batches


def test_the_log_holds_the_lr_and_the_metrics_of_each_logged_step(tmp_path: Path, photos: Path) -> None:
    reports: list[StepReport] = []
    config = stage1_config(photos, log_every_steps=2, epochs=3)
    train_stub(config, tmp_path / "run", on_step=reports.append)
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 3, 5, 7, 8]  # the first, every second, and the last
    assert [report.step for report in reports] == [1, 2, 4, 6, 8, 9]
    assert all(report.total_steps == 9 for report in reports)
    peak = 0.03 * 8 / 256
    assert [line["lr"] for line in lines[:2]] == [
        0.0,
        pytest.approx(peak / 2),
    ]  # warm-up of half an epoch, rounded to 2 steps
    assert max(line["lr"] for line in lines) <= peak
    assert lines[-1]["lr"] < lines[3]["lr"]
    for line, report in zip(lines, reports, strict=True):
        assert {"loss", "feature_spread", "images_per_s", "waiting"} <= line.keys()
        assert report.metrics == {name: line[name] for name in ("loss", "feature_spread")}
        assert 0 <= line["waiting"] <= 1
        assert line["images_per_s"] > 0


def test_a_crash_after_a_checkpoint_leaves_no_step_twice_in_the_log(tmp_path: Path, photos: Path) -> None:
    config = stage1_config(photos, checkpoint_every_steps=2)

    def crash(report: StepReport) -> None:
        if report.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_stub(config, tmp_path / "run", on_step=crash)
    assert len(rows_of(tmp_path / "run")) == 5
    with (tmp_path / "run" / "log.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 5, "lo')  # cut short
    checkpoint = read_checkpoint(tmp_path / "run" / "last")
    assert checkpoint.step == 4
    train_stub(config, tmp_path / "run", resume=checkpoint)
    train_stub(config, tmp_path / "whole")
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    assert [row["step"] for row in rows_of(tmp_path / "run")] == list(range(STEPS))


def test_a_new_run_starts_a_new_log(tmp_path: Path, photos: Path) -> None:
    for _ in range(2):
        train_stub(stage1_config(photos), tmp_path / "run")
    assert [row["step"] for row in rows_of(tmp_path / "run")] == list(range(STEPS))


def test_checkpoints_come_at_the_asked_steps_and_at_the_end(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[int] = []
    real = save_checkpoint

    def spy(*arguments: Any, **state: Any) -> None:
        saved.append(state["step"])
        real(*arguments, **state)

    monkeypatch.setattr(loop, "save_checkpoint", spy)
    train_stub(stage1_config(photos, checkpoint_every_steps=4), tmp_path / "run")
    assert saved == [4, 6]


def test_signal_handlers_are_put_back(tmp_path: Path, photos: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    train_stub(stage1_config(photos), tmp_path / "run")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    with pytest.raises(TrainingInterrupted):
        train_stub(stage1_config(photos), tmp_path / "run", on_step=stop_at(2))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_signal_in_the_last_step_ends_a_finished_run(tmp_path: Path, photos: Path) -> None:
    train_stub(stage1_config(photos), tmp_path / "run", on_step=stop_at(STEPS))
    assert read_checkpoint(tmp_path / "run" / "last").step == STEPS


def test_training_runs_outside_the_main_thread(tmp_path: Path, photos: Path) -> None:
    thread = threading.Thread(target=train_stub, args=(stage1_config(photos), tmp_path / "run"))
    thread.start()
    thread.join()
    assert read_checkpoint(tmp_path / "run" / "last").step == STEPS


def test_clipping_bounds_the_gradient(tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    norms: list[float] = []
    real = torch.optim.AdamW.step

    def spy(optimizer: torch.optim.AdamW, *arguments: Any) -> Any:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norms.append(float(torch.stack([gradient.norm() for gradient in gradients]).norm()))
        return real(optimizer, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    config = stage1_config(photos)
    for clip in (0.0, 0.01):
        train_stub(
            dataclasses.replace(config, optim=dataclasses.replace(config.optim, clip_norm=clip)), tmp_path / "run"
        )
    assert all(norm > 0.011 for norm in norms[:STEPS])
    assert norms[STEPS:] == pytest.approx([0.01] * STEPS, rel=1e-3)


# --- the batch that fits ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "pictures", "fits"), [(8, 24, 8), (24, 24, 24), (25, 24, 16), (256, 31, 16), (256, 32, 32), (64, 2, 2)]
)
def test_the_batch_is_what_the_corpus_fills(batch: int, pictures: int, fits: int) -> None:
    assert fit_batch(run_config(global_batch_size=batch), pictures).global_batch_size == fits


@pytest.mark.parametrize(
    ("batch", "accumulate", "pictures", "parts"), [(256, 4, 1000, 4), (256, 4, 40, 1), (256, 4, 128, 2), (64, 8, 20, 2)]
)
def test_a_smaller_batch_is_divided_into_fewer_micro_batches(
    batch: int, accumulate: int, pictures: int, parts: int
) -> None:
    run = fit_batch(run_config(global_batch_size=batch, accumulate=accumulate), pictures)
    assert run.accumulate == parts
    assert run.global_batch_size // parts <= batch // accumulate


@pytest.mark.parametrize(("whole", "largest", "parts"), [(12, 12, 1), (12, 5, 3), (12, 1, 12), (7, 6, 7), (12, 0, 12)])
def test_a_batch_divides_into_as_few_parts_as_fit(whole: int, largest: int, parts: int) -> None:
    assert fewest_parts(whole, largest) == parts


def test_a_small_corpus_takes_a_smaller_batch_and_says_so(
    tmp_path: Path, photos: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        train_stage1(stage1_config(photos, global_batch_size=256), tmp_path / "run")
    assert "global batch of 16 instead of 256: 24 pictures" in caplog.messages
    checkpoint = read_checkpoint(tmp_path / "run" / "last")
    assert checkpoint.total_steps == 2
    assert checkpoint.config.run.global_batch_size == 256  # as asked, so that the same command resumes it


@pytest.mark.parametrize("run", [{"global_batch_size": 1}, {"accumulate": 3}, {"accumulate": 8}])
def test_a_batch_without_negatives_is_refused(tmp_path: Path, photos: Path, run: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=r"run\.global_batch_size .* expected at least 2 pictures in each, evenly"):
        train_stage1(stage1_config(photos, **run), tmp_path / "run")


def test_the_precision_asked_for_is_computed_in(tmp_path: Path, photos: Path) -> None:
    seen: dict[str, torch.dtype] = {}

    class Spy(Stub):
        def forward(self, view: Tensor, *views: Tensor) -> dict[str, Tensor]:
            seen[self.name] = torch.nn.functional.linear(torch.ones(1, 2), torch.ones(2, 2)).dtype
            return super().forward(view, *views)

        name = ""

    for name in ("fp32", "bf16"):
        method = Spy()
        method.name = name
        train_stub(stage1_config(photos, precision=name), tmp_path / name, method)
    assert seen == {"fp32": torch.float32, "bf16": torch.bfloat16}
    state = read_checkpoint(tmp_path / "bf16" / "last").load_model()
    assert {value.dtype for value in state.values()} == {torch.float32}


def test_momentum_follows_the_run_and_not_the_process(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []

    def spy(progress: float, start: float) -> float:
        asked.append(progress)
        return momentum_at(progress, start)

    monkeypatch.setattr(mocov3, "momentum_at", spy)
    stop_and_resume(stage1_config(photos), tmp_path / "run", 3)
    assert asked == [step / STEPS for step in range(STEPS)]


def test_nothing_warns(tmp_path: Path, photos: Path) -> None:
    """Every warning is an error in these tests; this one shows that the check is on."""
    with pytest.raises(UserWarning, match="seen"):
        warnings.warn("seen", UserWarning, stacklevel=1)
    train_stage1(stage1_config(photos), tmp_path / "run")
