"""Engines in a bundle: whether the bundle is what to build from, the build, and what came of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mimco_deploy.atomic import current_dir
from mimco_deploy.bundle import SPEC_FILE, Precision, read_bundle
from mimco_deploy.errors import BundleError
from mimco_deploy.export.to_tensorrt import EngineOptions, ensure_engine, plan_engine
from mimco_deploy.export.triton import write_repository
from mimco_deploy.serving.engine_types import TYPES
from mimco_deploy.serving.engines import Engine
from mimco_deploy.serving.trt import Flavour


@dataclass(frozen=True)
class BuiltEngine:
    """An engine that is there now."""

    engine: Engine
    is_new: bool
    """Whether it was built now, and not before."""
    repository: Path | None
    """For Triton, where one was asked for."""

    def document(self) -> dict[str, object]:
        """For JSON."""
        return {
            "engine": self.engine.plan,
            "built": self.is_new,
            **dataclasses.asdict(self.engine.spec),
            "layers": dict(self.engine.layers),
            "mib": self.engine.plan.stat().st_size / 2**20,
            "triton": self.repository,
        }

    def sentence(self) -> str:
        """For people."""
        spec, size = self.engine.spec, self.engine.plan.stat().st_size / 2**20
        state = "built" if self.is_new else "up to date"
        products = ", ".join(f"{count} {name}" for name, count in self.engine.layers.items() if "MULTIPLY" in name)
        proved = "proved on its GPU: " if spec.gpu else "of a network with "
        return f"{spec.flavour} {spec.version}: {self.engine.plan} {state}, {size:.1f} MiB ({proved}{products})"


def bundle_is_current(folder: Path, precisions: Sequence[Precision], student: Path) -> bool:
    """Whether a bundle holds the graphs to build from, and is no older than the workspace's student.

    Raises:
        BundleError: there is a bundle, and it is broken; or it is not the student's, and has no such graph.
    """
    contract = current_dir(folder) / SPEC_FILE
    trained = current_dir(student) / "config.json"
    if not contract.is_file():
        if not trained.is_file():
            read_bundle(folder)  # says that there is none
        return False
    bundle = read_bundle(folder)
    if not trained.is_file() or not bundle.spec.weights_source.startswith("mimco stage2"):
        for precision in precisions:
            if precision not in bundle.precisions:
                there = " or ".join(other for other in bundle.precisions if other in TYPES)
                raise BundleError(
                    f"{folder} has no {precision}",
                    expected=f"--precision {there}, or where its weights are an export of it",
                    command=f"mimco export --format onnx --precision {precision}",
                )
        return True
    # Not the contract's date: it is written anew for a default that was picked.
    newer = trained.stat().st_mtime_ns > bundle.model("fp32").stat().st_mtime_ns
    return not newer and set(precisions) <= set(bundle.precisions)


def build_engine(
    trt: Any,
    flavour: Flavour,
    folder: Path,
    options: EngineOptions,
    triton: Path | None,
    on_progress: Callable[[int, int], None] | None = None,
) -> BuiltEngine:
    """Bring an engine of a bundle up to date.

    Args:
        trt: the module of the flavour.
        flavour: which.
        folder: the bundle's.
        options: what to build.
        triton: folder of a model repository to write as well.
        on_progress: called with done and total steps of a phase, over and over.

    Raises:
        ConfigError: nothing to build for.
        EngineError: see `ensure_engine`.
    """
    bundle = read_bundle(folder)
    spec = plan_engine(trt, flavour, bundle, options)

    def show(_: str, done: int, total: int) -> None:
        if on_progress is not None:
            on_progress(done, total)

    engine, is_new = ensure_engine(trt, bundle, spec, show)
    repository = None
    if triton is not None:
        repository = write_repository(triton, bundle, engine.plan, spec.max_batch)
    return BuiltEngine(engine, is_new, repository)
