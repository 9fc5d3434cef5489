"""TensorRT engines of a bundle: `engines/<name>.plan`, a plain plan, beside `<name>.json`, which says what it is.

A plan alone tells neither which weights it was made of nor for which GPU; loaded elsewhere it fails at best. So the
sidecar holds all that an engine depends on, and an engine of which one of them differs is stale or foreign: it is built
anew or refused, never loaded. Standard library only.
"""

from __future__ import annotations

import json
import platform
import re
import shlex
import sys
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from mimco_deploy.atomic import write_bytes
from mimco_deploy.bundle import Bundle, Precision, checksum_of, sha256_of, without_repeats
from mimco_deploy.errors import EngineError
from mimco_deploy.serving.trt import Flavour

FORMAT_VERSION = 2
"""2: `platform` and `settings`."""
ENGINES = "engines"
_MAX_SIDECAR_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class EngineSpec:
    """All that an engine depends on; two that are equal can stand in for each other."""

    flavour: Flavour
    version: str
    """Of TensorRT, in full: a plan is read by the version that wrote it."""
    model_sha256: str
    """Of the ONNX graph."""
    precision: Precision
    min_batch: int
    opt_batch: int
    max_batch: int
    workspace_mib: int
    """Limit of scratch memory while building; 0 leaves it to TensorRT."""
    settings: str
    """Of the builder, beside those: a word for each."""
    platform: str
    """Operating system and machine; see `platform_here`."""
    gpu: str
    """Name of the GPU it was built on, or empty for one that was built ahead of time."""
    compute_capabilities: tuple[int, ...]
    """Of the GPUs it runs on, ten times the version; ascending."""

    @property
    def name(self) -> str:
        """Of its files, without the suffix. What can differ under one name makes an engine stale."""
        capabilities = "+".join(f"sm{capability}" for capability in self.compute_capabilities)
        return f"{self.flavour}-{self.precision}-{capabilities}-b{self.min_batch}-{self.opt_batch}-{self.max_batch}"

    def command(self, bundle: Path) -> str:
        """What builds it in a bundle."""
        words = ["--precision", self.precision, "--profile", f"{self.min_batch},{self.opt_batch},{self.max_batch}"]
        if self.workspace_mib:
            words += ["--workspace-mib", str(self.workspace_mib)]
        if not self.gpu:
            words += ["--compute-capability", ",".join(map(str, self.compute_capabilities))]
        return shlex.join(["mimco", "export", "--format", self.flavour, *words, "--output", str(bundle)])


@dataclass(frozen=True)
class Engine:
    """An engine whose sidecar was read and whose plan has the hash that it states."""

    plan: Path
    spec: EngineSpec
    layers: Mapping[str, int]
    """Of the network that it was built of. Kind and type of a layer → how many, such as `MATRIX_MULTIPLY HALF`: 72."""


def platform_here() -> str:
    """Operating system and machine, such as `linux x86_64`: engines cross neither."""
    return f"{sys.platform} {platform.machine()}"


def write_plan(folder: Path, spec: EngineSpec, plan: bytes, layers: Mapping[str, int]) -> Engine:
    """Write a plan without its sidecar, so that it does not count yet.

    Args:
        folder: of the bundle.
        spec: what it depends on.
        plan: as TensorRT serialised it, unchanged.
        layers: see `Engine`.
    """
    path = folder / ENGINES / f"{spec.name}.plan"
    path.with_suffix(".json").unlink(missing_ok=True)
    write_bytes(path, plan)
    return Engine(path, spec, layers)


def write_sidecar(engine: Engine) -> None:
    """From now on the engine counts."""
    document: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        **asdict(engine.spec),
        "layers": dict(engine.layers),
        "plan_sha256": sha256_of(engine.plan),
    }
    document["checksum"] = checksum_of(document)
    write_bytes(engine.plan.with_suffix(".json"), (json.dumps(document, indent=2) + "\n").encode())


def read_engine(plan: Path) -> Engine:
    """Read and check an engine; it is not loaded.

    Raises:
        EngineError: plan or sidecar is missing or damaged, or of another format.
    """
    sidecar, again = plan.with_suffix(".json"), _command_by_name(plan)
    for path in (plan, sidecar):
        if not path.is_file():
            raise EngineError(f"no {path}", expected="a plan and its sidecar", command=again)
    try:
        if sidecar.stat().st_size > _MAX_SIDECAR_BYTES:
            raise ValueError(f"more than {_MAX_SIDECAR_BYTES:,} bytes")
        document = json.loads(sidecar.read_text(encoding="utf-8"), object_pairs_hook=without_repeats)
        version = document["format_version"]
        if version != FORMAT_VERSION:
            raise EngineError(f"{sidecar} has format version {version}", expected=str(FORMAT_VERSION), command=again)
        if document.pop("checksum") != checksum_of(document):
            raise ValueError("its checksum is not that of its content")
        capabilities = tuple(document["compute_capabilities"])
        known = {item.name: document[item.name] for item in fields(EngineSpec)}
        hints = typing.get_type_hints(EngineSpec)
        wrong = [
            name for name, value in known.items() if name != "compute_capabilities" and not _fits(hints[name], value)
        ]
        if wrong or not all(_fits(int, number) for number in capabilities):
            raise ValueError(f"no such {wrong or ['compute_capabilities']}")
        spec = EngineSpec(**{**known, "compute_capabilities": capabilities})
        if not 1 <= spec.min_batch <= spec.opt_batch <= spec.max_batch or spec.workspace_mib < 0:
            raise ValueError("its profile cannot be meant")
        stated, layers = str(document["plan_sha256"]), dict(document["layers"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise EngineError(
            f"{sidecar} cannot be read ({error!r})", expected="the sidecar of an engine", command=again
        ) from error
    found = sha256_of(plan)
    if found != stated:
        raise EngineError(f"{plan} has SHA-256 {found[:12]}…", expected=f"{stated[:12]}…", command=again)
    return Engine(plan, spec, layers)


def differences(found: EngineSpec, wanted: EngineSpec) -> list[str]:
    """The fields in which an engine is another one than wanted, with both values."""
    pairs = ((item.name, getattr(found, item.name), getattr(wanted, item.name)) for item in fields(EngineSpec))
    return [f"{name} {_short(have)}, not {_short(want)}" for name, have, want in pairs if have != want]


def engine_for(bundle: Bundle, wanted: EngineSpec) -> Engine:
    """The engine of a bundle that is exactly the one wanted.

    Raises:
        EngineError: there is none, it is damaged, or it is stale or foreign: names the fields that differ.
    """
    engine = read_engine(bundle.path / ENGINES / f"{wanted.name}.plan")
    if differ := differences(engine.spec, wanted):
        raise EngineError(
            f"{engine.plan} is of {'; '.join(differ)}", expected="its own", command=wanted.command(bundle.path)
        )
    return engine


def model_hash(bundle: Bundle, precision: Precision) -> str:
    """SHA-256 of the graph that an engine is made of."""
    return sha256_of(bundle.model(precision))


_NAME = re.compile(r"(tensorrt(?:-rtx)?)-(fp32|fp16|bf16)-(sm\d+(?:\+sm\d+)*)-b(\d+)-(\d+)-(\d+)")


def _command_by_name(plan: Path) -> str:
    """What builds an engine whose sidecar says nothing."""
    words = ["--format", "tensorrt"]
    if found := _NAME.fullmatch(plan.stem):
        flavour, precision, capabilities, *profile = found.groups()
        words = ["--format", flavour, "--precision", precision, "--profile", ",".join(profile)]
        if flavour == "tensorrt-rtx":
            words += ["--compute-capability", capabilities.replace("sm", "").replace("+", ",")]
    return shlex.join(["mimco", "export", *words, "--output", str(plan.parent.parent)])


def _fits(kind: Any, value: object) -> bool:
    if choices := typing.get_args(kind):
        return value in choices
    return isinstance(value, kind) and not isinstance(value, bool)


def _short(value: object) -> str:
    text = str(value) or "none"
    return f"{text[:12]}…" if len(text) == 64 else text
