"""What each variant of an encoder is worth on this machine: speed, start, size, and what it costs in neighbours.

Each variant runs in a process of its own, one at a time and in rounds: threads of one runtime do not slow another,
start-up is that of a fresh process, and a provider that crashes costs one row. Variants are anything that a process can
load; those with torch come from `export.torch_variants`, since serving knows no torch.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mimco_deploy.bundle import TOLERANCES, Bundle, Precision, read_bundle, write_contract
from mimco_deploy.bundle_archive import is_archive
from mimco_deploy.errors import BundleError, EngineError
from mimco_deploy.serving.agreement import Embeddings, compare
from mimco_deploy.serving.doctor import installed
from mimco_deploy.serving.encoders.proof import first_line
from mimco_deploy.serving.engines import ENGINES, read_engine
from mimco_deploy.serving.sample import Pixels
from mimco_deploy.serving.trt import gpu_here

logger = logging.getLogger(__name__)

Embed = Callable[[Pixels], Embeddings]
DRAWN_PICTURES, SAMPLED_PICTURES = 64, 200
_ROUNDS = 2
_MIN_RUNS, _MIN_SECONDS = 4, 0.5
_CHECK_BATCH = 16
_VERSIONS = ("mimco-deploy", "numpy", "onnxruntime", "onnxruntime-gpu", "torch", "timm")


@dataclass(frozen=True)
class Variant:
    """One way to run the encoder."""

    backend: str
    """As the table names it."""
    precision: Precision
    device: str
    """`cpu`, `cuda` or `tensorrt`"""
    load: Callable[..., tuple[Embed, str]]
    """Called in a fresh process with `arguments`: gives what embeds, and the provider that really runs."""
    arguments: tuple[object, ...]
    size_mib: float
    """On disk."""
    in_bundle: bool = True
    """Whether `--pick` may choose it."""


@dataclass(frozen=True)
class Row:
    """One variant at one batch size."""

    backend: str
    precision: Precision
    device: str
    provider: str
    """What really ran."""
    batch_size: int
    images_per_s: float
    """By the median batch."""
    p50_ms: float
    p99_ms: float
    startup_s: float
    """From a fresh process to the first embedding, imports included; the fastest round's."""
    size_mib: float
    overlap: float | None
    """Top-10 overlap with fp32 on the pictures; None with too few."""
    recall_loss: float | None
    """Share of pictures whose nearest neighbour by fp32 is not among the ten found; None likewise."""
    breaches: list[str] = field(default_factory=list)
    """What is outside the tolerance of its precision."""
    in_bundle: bool = True


@dataclass(frozen=True)
class Failure:
    """A variant that did not run."""

    backend: str
    precision: str
    device: str
    found: str


@dataclass(frozen=True)
class _Measured:
    provider: str
    startup_s: float
    seconds: dict[int, list[float]]
    embeddings: Embeddings


def devices_here() -> list[str]:
    """`cpu`, `cuda` where the runtime has it, `tensorrt` where there is a GPU; whether they start, their rows tell."""
    from mimco_deploy.serving.encoders.onnx import import_runtime

    cuda = ["cuda"] if "CUDAExecutionProvider" in import_runtime().get_available_providers() else []
    return ["cpu", *cuda, *(["tensorrt"] if gpu_here() else [])]


def bundle_variants(path: Path, bundle: Bundle, devices: Sequence[str]) -> list[Variant]:
    """Every precision of a bundle on every device, and its engines; fp32 on the first comes first, the reference."""
    onnx = _onnx_variants(path, bundle, [device for device in devices if device != "tensorrt"])
    return [*onnx, *_engine_variants(path, bundle)] if "tensorrt" in devices else onnx


def _engine_variants(path: Path, bundle: Bundle) -> list[Variant]:
    found = []
    for sidecar in sorted((bundle.path / ENGINES).glob("*.json")):
        plan = sidecar.with_suffix(".plan")
        try:
            spec = read_engine(plan).spec
        except EngineError as error:  # the others can be measured all the same
            logger.warning("%s", error)
            continue
        size_mib = plan.stat().st_size / 2**20
        found.append(Variant(spec.flavour, spec.precision, "tensorrt", _load_engine, (path, plan.name), size_mib))
    return found


def _onnx_variants(path: Path, bundle: Bundle, devices: Sequence[str]) -> list[Variant]:
    return [
        Variant(
            "ONNX Runtime",
            precision,
            device,
            _load_onnx,
            (path, device, precision),
            bundle.model(precision).stat().st_size / 2**20,
        )
        for device in devices
        for precision in bundle.precisions
        if not (precision == "bf16" and device == "cpu")  # which has no such operators
    ]


def measure(
    variants: Sequence[Variant],
    pictures: Pixels,
    batch_sizes: Sequence[int],
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[list[Row], list[Failure]]:
    """Measure variants in rounds.

    Args:
        variants: the first is the reference for neighbours.
        pictures: uint8 [N, H, W, 3].
        batch_sizes: to time, each at least 1.
        on_progress: called with done and total.

    Returns:
        Rows, variant by variant, and what did not run.
    """
    found: dict[int, list[_Measured]] = {}
    failures: list[Failure] = []
    failed: set[int] = set()
    total = _ROUNDS * len(variants)
    for done, (number, variant) in enumerate(_turns(variants)):
        if on_progress is not None:
            on_progress(done, total)
        if number in failed:
            continue
        try:
            found.setdefault(number, []).append(_in_fresh_process(variant, pictures, batch_sizes))
        except Exception as error:  # of a runtime, of a process that died: runtimes' own classes share no base
            failed.add(number)
            found.pop(number, None)
            failures.append(Failure(variant.backend, variant.precision, variant.device, first_line(error)))
    if on_progress is not None:
        on_progress(total, total)
    reference = found[0][0].embeddings if 0 in found else None
    rows = [row for number, rounds in sorted(found.items()) for row in _rows(variants[number], rounds, reference)]
    return rows, failures


def pick(path: Path, rows: Sequence[Row]) -> dict[str, Precision]:
    """Make the fastest variant that passes the bundle's default, device by device.

    Args:
        path: folder of the bundle.
        rows: as `measure` gives them.

    Returns:
        Device → precision, as now written.

    Raises:
        BundleError: the bundle is an archive, or nothing passed.
    """
    check_can_pick(path)
    bundle = read_bundle(path)
    best: dict[str, Row] = {}
    for row in rows:
        measured = row.precision == "fp32" or row.overlap is not None  # with too few pictures nothing says it is good
        if row.in_bundle and not row.breaches and measured:
            leader = best.get(row.device)
            if leader is None or row.images_per_s > leader.images_per_s:
                best[row.device] = row
    if not best:
        raise BundleError(f"nothing in {path} passed", expected="one variant that does")
    defaults = {**bundle.defaults, **{device: row.precision for device, row in best.items()}}
    write_contract(bundle.path, bundle.spec, defaults, bundle.precisions)
    return defaults


def check_can_pick(path: Path) -> None:
    """Raise BundleError where a choice cannot be written into the bundle."""
    if is_archive(path):
        raise BundleError(f"{path} is an archive", expected="a folder, which a choice can be written into")


def document(rows: Sequence[Row], failures: Sequence[Failure], pictures: int, folder: Path | None) -> dict[str, object]:
    """For JSON, with the machine and the versions."""
    return {
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "versions": {name: version for name in _VERSIONS if (version := installed(name))},
        "pictures": pictures,
        "pictures_from": "drawn" if folder is None else "folder",
        "rows": [asdict(row) for row in rows],
        "failures": [asdict(failure) for failure in failures],
    }


def table(rows: Sequence[Row], failures: Sequence[Failure]) -> tuple[list[str], list[list[str]]]:
    """For people: column titles and rows."""
    titles = [
        "backend",
        "precision",
        "batch",
        "images/s",
        "p50 ms",
        "p99 ms",
        "start s",
        "MiB",
        "overlap",
        "recall loss",
    ]
    lines = [
        [
            f"{row.backend} ({row.device})",
            row.precision,
            str(row.batch_size),
            f"{row.images_per_s:,.1f}",
            f"{row.p50_ms:,.1f}",
            f"{row.p99_ms:,.1f}",
            f"{row.startup_s:.2f}",
            f"{row.size_mib:,.1f}",
            "" if row.overlap is None else f"{row.overlap:.3f}",
            "" if row.recall_loss is None else f"{row.recall_loss:.3f}",
            "; ".join(row.breaches) or "passes",
        ]
        for row in rows
    ]
    lines += [[f"{one.backend} ({one.device})", one.precision, *[""] * 8, one.found] for one in failures]
    return [*titles, ""], lines


def _turns(variants: Sequence[Variant]) -> Iterator[tuple[int, Variant]]:
    for _ in range(_ROUNDS):
        yield from enumerate(variants)


def _in_fresh_process(variant: Variant, pictures: Pixels, batch_sizes: Sequence[int]) -> _Measured:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        asked = time.time()
        return pool.submit(_measure_here, asked, variant.load, variant.arguments, pictures, tuple(batch_sizes)).result()


def _measure_here(
    asked: float,
    load: Callable[..., tuple[Embed, str]],
    arguments: tuple[object, ...],
    pictures: Pixels,
    batch_sizes: tuple[int, ...],
) -> _Measured:
    embed, provider = load(*arguments)
    embed(pictures[:1])
    startup = time.time() - asked  # the process was started and imported in between
    seconds = {size: _time_batch(embed, np.resize(pictures, (size, *pictures.shape[1:]))) for size in batch_sizes}
    parts = [embed(pictures[start : start + _CHECK_BATCH]) for start in range(0, len(pictures), _CHECK_BATCH)]
    return _Measured(provider, startup, seconds, np.concatenate(parts))


def _time_batch(embed: Embed, batch: npt.NDArray[np.uint8]) -> list[float]:
    embed(batch)  # allocates, and what compiles does so
    seconds: list[float] = []
    while len(seconds) < _MIN_RUNS or sum(seconds) < _MIN_SECONDS:
        start = time.perf_counter()
        embed(batch)
        seconds.append(time.perf_counter() - start)
    return seconds


def _rows(variant: Variant, rounds: Sequence[_Measured], reference: Embeddings | None) -> Iterator[Row]:
    first = rounds[0]
    agreement = compare(first.embeddings, first.embeddings if reference is None else reference)
    breaches = agreement.breaches(TOLERANCES[variant.precision])
    if reference is None:
        breaches.append("fp32 did not run: nothing to compare with")
    for size in first.seconds:
        times = sorted(second for measured in rounds for second in measured.seconds[size])
        median = statistics.median(times)
        yield Row(
            variant.backend,
            variant.precision,
            variant.device,
            first.provider,
            size,
            size / median,
            1e3 * median,
            1e3 * float(np.quantile(times, 0.99)),
            min(measured.startup_s for measured in rounds),
            variant.size_mib,
            agreement.overlap,
            None if agreement.recall is None else 1.0 - agreement.recall,
            breaches,
            variant.in_bundle,
        )


def _load_engine(path: Path, plan: str) -> tuple[Embed, str]:
    from mimco_deploy.serving.encoders.tensorrt import open_plan

    bundle = read_bundle(path)
    encoder = open_plan(bundle, bundle.path / ENGINES / plan)
    encoder.prove()
    return encoder.embed, encoder.provider


def _load_onnx(path: Path, device: str, precision: Precision) -> tuple[Embed, str]:
    from mimco_deploy.serving.encoders.onnx import OnnxEncoder

    encoder = OnnxEncoder(read_bundle(path), precision, "cuda" if device == "cuda" else "cpu", strict=True)
    encoder.prove()  # the reference is among them
    return encoder.embed, encoder.provider
