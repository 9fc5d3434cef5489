"""Keeps a run's report up to date, and keeps the batch that a run ended badly with."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from mimco_deploy.errors import TrainingError
from mimco_deploy.training.backbone import Backbone
from mimco_deploy.training.config import Stage1Config, Stage2Config
from mimco_deploy.training.corpus import Corpus
from mimco_deploy.training.data import MakeViews, StepSampler, load_batches, seed_for
from mimco_deploy.training.method_config import pooling_of
from mimco_deploy.training.probe import SHOWN, Sight, make_probe, read_sights, write_sights
from mimco_deploy.training.report import write_report

logger = logging.getLogger(__name__)

NARROW = 2.0
"""Effective rank below which embeddings, though spread, lie along a single direction and around it."""
_REPORT_STREAM = 2  # of random numbers, beside those of views and model


def narrowed(first: Sight, last: Sight) -> str:
    """What to say where the spread is sound and the embeddings are not: along one direction no loss is learned."""
    if last.effective_rank >= min(NARROW, first.effective_rank / 2):
        return ""
    return (
        f"after step {last.step} the effective rank of embeddings is {last.effective_rank:.1f}, at first it was "
        f"{first.effective_rank:.1f}: they have all but collapsed; a lower optim.base_lr often helps"
    )


class Watch:
    """What a person sees of a run, in its main process.

    Args:
        method: its encoder is looked at.
        config: of the run.
        corpus: gives the probe's pictures.
        make_views: of the method, for the masks that are shown.
        folder: of the run; gets `report.html` and `probe.jsonl`.
        step: from which the run goes on.
    """

    def __init__(
        self,
        method: nn.Module,
        config: Stage1Config | Stage2Config,
        corpus: Corpus,
        make_views: MakeViews,
        folder: Path,
        step: int,
    ) -> None:
        assert isinstance(method.encoder, Backbone)
        self._encoder, self._pooling = method.encoder, pooling_of(config.method, method.encoder.own_pooling)
        self._config, self._corpus, self._make_views, self._folder = config, corpus, make_views, folder
        self._probe = make_probe(corpus, config.backbone.image_size_px)
        earlier = read_sights(folder, step) if step and self._probe is not None else []
        self._sights = [sight for sight in earlier if self._probe is not None and sight.pictures == self._probe.key]
        self._masked = self._draw_masks()

    @property
    def has_looked(self) -> bool:
        """Whether there is anything to compare with."""
        return bool(self._sights)

    def _look(self, step: int) -> None:
        """Embed the probe's pictures."""
        if self._probe is None:
            return
        seen = self._probe.look(step, self._encoder, self._pooling)
        if seen is not None:
            self._sights = [*(sight for sight in self._sights if sight.step < step), seen]
            write_sights(self._folder, self._sights)
            if narrow := narrowed(self._sights[0], seen):
                logger.warning("%s", narrow)

    def update(self, step: int, total_steps: int, *, look: bool) -> None:
        """Write the report; with `look` embed the probe's pictures first."""
        if look:
            self._look(step)
        self._write(f"step {step:,} of {total_steps:,}")

    def alarm(self, error: TrainingError) -> TrainingError:
        """Keep the batch of the step that went wrong, say so in the report, and give the error with where it is."""
        try:
            path = self._keep_batch(error.step)
            kept = f"its batch is in {path}"
        except (OSError, SafetensorError) as failed:  # which must not hide what went wrong first
            kept = f"its batch could not be kept: {failed}"
        self._look(error.step + 1)  # steps done; after the last good look, which stays
        self._write(f"ended at step {error.step + 1:,}", alarm=f"{error}; {kept}")
        return TrainingError(f"{error.found} ({kept})", expected=error.expected, step=error.step)

    def _write(self, progress: str, alarm: str = "") -> None:
        name = self._config.backbone.name
        alarm = alarm or (narrowed(self._sights[0], self._sights[-1]) if self._sights else "")
        title = f"{self._config.method.name} · {name} · {self._config.backbone.image_size_px} px"
        write_report(
            self._folder, title, progress, sights=self._sights, probe=self._probe, masked=self._masked, alarm=alarm
        )

    def _draw_masks(self) -> list[tuple[Tensor, Tensor]]:
        """A few pictures as the method sees them, where it has masks that views draw."""
        mask = getattr(self._config, "mask", None)
        if self._probe is None or (mask is not None and mask.kind.startswith("attention")):  # the teacher draws those
            return []
        shown = []
        with torch.random.fork_rng(devices=[]):
            for number in self._probe.shown[:SHOWN]:
                torch.manual_seed(seed_for(self._config.run.seed, _REPORT_STREAM, number))
                views = self._make_views(self._probe.pictures[number])
                masks = [view for view in views if view.dtype == torch.bool]
                if masks:
                    shown.append((views[0], masks[0]))
        return shown

    def _keep_batch(self, step: int) -> Path:
        """Views of the step's micro-batches, made again: they are a function of the seed and the step."""
        run = self._config.run
        sampler = StepSampler(len(self._corpus), run, step)
        batches = load_batches(self._corpus, self._make_views, sampler, run.seed, workers=0)
        tensors: dict[str, Tensor] = {}
        slots = []
        for micro, (taken, (views, _)) in enumerate(zip(sampler, batches, strict=False)):
            if micro == run.accumulate:
                break
            tensors |= {f"micro{micro}.view{number}": view.contiguous() for number, view in enumerate(views)}
            slots += [self._name_of(index) for index, _ in taken]
        batches.close()
        path = self._folder / f"replay-{step + 1}.safetensors"
        save_file(tensors, path, metadata={"step": str(step), "seed": str(run.seed), "pictures": json.dumps(slots)})
        path.chmod((self._folder / "log.jsonl").stat().st_mode)  # safetensors writes for the owner alone
        return path

    def _name_of(self, index: int) -> str:
        """The picture that stands in for one that cannot be decoded, else the picture itself."""
        _, refused = self._corpus.get(index)
        return self._corpus.pictures[(index + len(refused)) % len(self._corpus)].name
