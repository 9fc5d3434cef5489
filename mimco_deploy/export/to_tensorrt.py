"""A bundle's ONNX graph → a TensorRT engine, by TensorRT's own Python API.

One path for TensorRT 10 and 11 and for TensorRT for RTX: the module comes as the parameter `trt`. Networks are strongly
typed, so an engine has the types that the graph states, and those are read back.
"""

from __future__ import annotations

import contextlib
import logging
import re
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mimco_deploy.atomic import write_bytes
from mimco_deploy.bundle import Bundle, Precision
from mimco_deploy.errors import ConfigError, EngineError
from mimco_deploy.serving.encoders.onnx import INPUT_NAME
from mimco_deploy.serving.encoders.tensorrt import TensorRTEncoder
from mimco_deploy.serving.engine_types import LISTED, TYPES
from mimco_deploy.serving.engines import (
    ENGINES,
    Engine,
    EngineSpec,
    engine_for,
    model_hash,
    platform_here,
    write_plan,
    write_sidecar,
)
from mimco_deploy.serving.trt import Flavour, gpu_here, load_cuda, new_log

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
"""Phase, steps done, steps in all."""
_PRODUCTS = ("MATRIX_MULTIPLY", "CONVOLUTION", "DECONVOLUTION")
_SETTINGS = "strongly-typed no-tf32 detailed"
"""What `_configure` sets in every builder; says so in the sidecar."""
_MAX_WORKSPACE_MIB = 1 << 20
_MAX_BATCH = 1 << 16


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """What to build."""

    precision: Precision = "fp16"
    profile: tuple[int, int, int] = (1, 32, 256)
    """Least, most usual and largest batch."""
    workspace_mib: int = 0
    """Limit of scratch memory while building; 0 leaves it to TensorRT."""
    compute_capabilities: tuple[int, ...] = ()
    """TensorRT for RTX: of the GPUs to build for, ten times the version; none means the GPU here."""

    def __post_init__(self) -> None:
        """Raises ConfigError for values that cannot be meant."""
        least, usual, most = self.profile
        if not 1 <= least <= usual <= most:
            raise ConfigError(f"profile {least},{usual},{most}", expected="1 ≤ least ≤ most usual ≤ largest batch")
        if most > _MAX_BATCH:
            raise ConfigError(f"a largest batch of {most}", expected=f"at most {_MAX_BATCH}")
        if self.workspace_mib > _MAX_WORKSPACE_MIB:
            raise ConfigError(f"a workspace of {self.workspace_mib} MiB", expected=f"at most {_MAX_WORKSPACE_MIB}")
        if self.precision not in TYPES:
            raise ConfigError(f"an engine in {self.precision}", expected=f"--precision {' or '.join(TYPES)}")


def gpus_to_build_for(trt: Any, flavour: Flavour, options: EngineOptions) -> tuple[str, tuple[int, ...]]:
    """Name of the GPU here, empty for an engine that is built ahead of time, and the compute capabilities.

    Raises:
        ConfigError: there is no GPU and none is named, or one that this TensorRT does not build for.
    """
    gpu = gpu_here()
    ahead = tuple(sorted(set(options.compute_capabilities)))
    if ahead and flavour == "tensorrt":
        raise ConfigError("--compute-capability with --format tensorrt", expected="--format tensorrt-rtx")
    if gpu is None and not ahead:
        expected = "--compute-capability, such as 89,120" if flavour == "tensorrt-rtx" else "an NVIDIA GPU"
        raise ConfigError("no GPU to build for", expected=expected)
    here, wanted = ("", ahead) if ahead or gpu is None else (gpu.name, (gpu.compute_capability,))
    if flavour == "tensorrt-rtx":  # which builds for any GPU, and says that it cannot run there afterwards only
        known = sorted(int(name[2:]) for name in dir(trt.ComputeCapability) if name.startswith("SM"))
        if unknown := [capability for capability in wanted if capability not in known]:
            raise ConfigError(
                f"compute capability {unknown[0]}{here and f' of {here}'}",
                expected=f"one that TensorRT for RTX supports: {', '.join(map(str, known))}",
            )
    return here, wanted


def plan_engine(trt: Any, flavour: Flavour, bundle: Bundle, options: EngineOptions) -> EngineSpec:
    """All that the engine will depend on.

    Raises:
        ConfigError: see `gpus_to_build_for`.
        BundleError: the bundle has no graph of the precision.
    """
    gpu, capabilities = gpus_to_build_for(trt, flavour, options)
    least, usual, most = options.profile
    return EngineSpec(
        flavour=flavour,
        version=str(trt.__version__),
        model_sha256=model_hash(bundle, options.precision),
        precision=options.precision,
        min_batch=least,
        opt_batch=usual,
        max_batch=most,
        workspace_mib=options.workspace_mib,
        settings=_SETTINGS,
        platform=platform_here(),
        gpu=gpu,
        compute_capabilities=capabilities,
    )


def ensure_engine(
    trt: Any, bundle: Bundle, spec: EngineSpec, on_progress: Progress | None = None
) -> tuple[Engine, bool]:
    """The engine of `spec`, built where it is not there or is stale.

    Args:
        trt: the module of the flavour.
        bundle: in a folder.
        spec: see `plan_engine`.
        on_progress: see `Progress`.

    Returns:
        The engine, and whether it was built now.

    Raises:
        EngineError: TensorRT refuses the graph or does not build it, or types are not those asked for.
        BundleError: what was built on its GPU does not answer as the graph does.
        MissingExtraError: cuda-python is not installed, to prove it with.
        KeyboardInterrupt: Ctrl-C; nothing is left behind.
    """
    try:
        return engine_for(bundle, spec), False
    except EngineError as stale:
        there = (bundle.path / ENGINES / f"{spec.name}.plan").exists()
        logger.log(logging.WARNING if there else logging.INFO, "building %s: %s", spec.name, stale.found)
    if spec.gpu:
        load_cuda()  # which the proof takes: missing, it is told before minutes of building
    log = new_log(trt)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse(bundle.model(spec.precision).read_bytes()):  # by content: of weights beside it nothing is known
        problems = [parser.get_error(number) for number in range(parser.num_errors)]
        reasons = [f"{problem.node_operator()} {problem.node_name()}: {problem.desc()}" for problem in problems]
        raise _failed(spec, "cannot read the graph", reasons or log.errors)
    layers = layer_types(network)
    check_types(layers, _names_of_products(network), spec.precision)
    config = _configure(trt, builder, bundle, spec)
    cache = None if spec.flavour == "tensorrt-rtx" else _use_timing_cache(config, bundle, spec)
    plan = _build(trt, builder, network, config, on_progress)
    if plan is None:
        raise _failed(spec, "builds no engine", log.errors)
    engine = write_plan(bundle.path, spec, plan, layers)
    if cache is not None and (measured := config.get_timing_cache()) is not None:
        write_bytes(cache, bytes(measured.serialize()))
    if spec.gpu:
        try:
            _prove(trt, bundle, engine)
        except BaseException:
            engine.plan.unlink()
            raise
    write_sidecar(engine)
    return engine, True


def _prove(trt: Any, bundle: Bundle, engine: Engine) -> None:
    """Load what was built, read its types back and run it on the golden pictures: before that it does not count.

    Raises:
        EngineError: it does not load, or has other types than asked for.
        BundleError: it does not run, or answers otherwise than the graph that it was made of.
        MissingExtraError: cuda-python is not installed.
    """
    encoder = TensorRTEncoder(bundle, engine, trt, load_cuda())
    encoder.check_types()
    encoder.prove()


def trtexec_command(bundle: Bundle, options: EngineOptions) -> list[str]:
    """The command that builds the same engine with TensorRT's own tool."""
    least, usual, most = options.profile
    side = bundle.spec.image_size_px
    model = bundle.model(options.precision)
    shapes = {"min": least, "opt": usual, "max": most}
    limit = [f"--memPoolSize=workspace:{options.workspace_mib}"] if options.workspace_mib else []
    return [
        "trtexec",
        f"--onnx={model}",
        "--stronglyTyped",
        *(f"--{name}Shapes={INPUT_NAME}:{batch}x{side}x{side}x3" for name, batch in shapes.items()),
        *limit,
        "--noTF32",
        "--profilingVerbosity=detailed",
        f"--saveEngine={model.with_suffix('.plan')}",
    ]


def layer_types(network: Any) -> Mapping[str, int]:
    """Kind and type of each layer of a network, counted; without those that compute shapes alone."""
    kinds: Counter[str] = Counter()
    for number in range(network.num_layers):
        layer = network.get_layer(number)
        kind, dtype = layer.type.name, layer.get_output(0).dtype.name
        if dtype in TYPES.values() and kind != "CONSTANT":
            kinds[f"{kind} {dtype}"] += 1
    return dict(sorted(kinds.items()))


def check_types(layers: Mapping[str, int], products: Mapping[str, str], precision: Precision) -> None:
    """Whether the products of a network are in the type asked for.

    Args:
        layers: see `layer_types`.
        products: name → type of each product.
        precision: asked for.

    Raises:
        EngineError: one is not; lists layers.
    """
    wanted = TYPES[precision]
    wrong = [f"{name} is {dtype}" for name, dtype in products.items() if dtype != wanted]
    if wrong or not products:
        listed = ", ".join(wrong[:LISTED]) + (f" and {len(wrong) - LISTED} more" if len(wrong) > LISTED else "")
        raise EngineError(f"asked for {precision}, but {listed or 'the graph multiplies nothing'}", expected=wanted)
    logger.info("layer types: %s", ", ".join(f"{count} {name}" for name, count in layers.items()))


def _names_of_products(network: Any) -> dict[str, str]:
    layers = (network.get_layer(number) for number in range(network.num_layers))
    return {layer.name: layer.get_output(0).dtype.name for layer in layers if layer.type.name in _PRODUCTS}


def _configure(trt: Any, builder: Any, bundle: Bundle, spec: EngineSpec) -> Any:
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    side = bundle.spec.image_size_px
    shapes = [(batch, side, side, 3) for batch in (spec.min_batch, spec.opt_batch, spec.max_batch)]
    profile.set_shape(INPUT_NAME, *shapes)
    config.add_optimization_profile(profile)
    config.clear_flag(trt.BuilderFlag.TF32)  # which leaves 10 bits of each factor, and no fp32 within its tolerance
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # so that types can be read back
    if spec.workspace_mib:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, spec.workspace_mib << 20)
    if spec.flavour == "tensorrt-rtx":
        config.num_compute_capabilities = len(spec.compute_capabilities)
        for number, capability in enumerate(spec.compute_capabilities):
            name = "CURRENT" if spec.gpu else f"SM{capability}"
            config.set_compute_capability(getattr(trt.ComputeCapability, name), number)
    return config


def _use_timing_cache(config: Any, bundle: Bundle, spec: EngineSpec) -> Path:
    """Reuse what earlier builds measured; TensorRT for RTX measures nothing while it builds."""
    gpu = re.sub(r"\W+", "-", spec.gpu).lower()  # what was measured on one says nothing of another
    path = bundle.path / ENGINES / f"timing-{spec.version}-{gpu}.cache"
    content = path.read_bytes() if path.is_file() else b""
    if not config.set_timing_cache(config.create_timing_cache(content), ignore_mismatch=False):
        logger.warning("%s is of another GPU or driver: measuring anew", path.name)
        config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)
    return path


def _build(trt: Any, builder: Any, network: Any, config: Any, on_progress: Progress | None) -> bytes | None:
    """Build in a thread of its own, so that Ctrl-C reaches Python and TensorRT can be asked to stop."""
    stop = threading.Event()
    config.progress_monitor = _monitor(trt, stop, on_progress)
    built: list[bytes] = []
    failures: list[Exception] = []

    def build() -> None:
        try:
            plan = builder.build_serialized_network(network, config)
            if plan is not None:
                built.append(bytes(plan))
        except Exception as error:  # raised again below, in the thread that can be told
            failures.append(error)

    thread = threading.Thread(target=build, name="mimco-tensorrt")
    with _interrupts(stop):
        thread.start()
        while thread.is_alive():
            thread.join(timeout=0.1)
    if failures:
        raise failures[0]
    return built[0] if built else None


@contextlib.contextmanager
def _interrupts(stop: threading.Event) -> Iterator[None]:
    """Let Ctrl-C set `stop` instead of raising wherever it falls; raise it at the end."""
    if threading.current_thread() is not threading.main_thread():
        yield  # which alone gets signals
        return
    before = signal.signal(signal.SIGINT, lambda *_: stop.set())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if stop.is_set():
        raise KeyboardInterrupt


def _monitor(trt: Any, stop: threading.Event, on_progress: Progress | None) -> Any:
    class _Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # the base is known at run time only
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:  # noqa: ARG002
            """Called when a phase starts."""
            self._steps[phase_name] = num_steps

        def phase_finish(self, phase_name: str) -> None:
            """Called when a phase ends, also when it was stopped."""
            self._steps.pop(phase_name, None)

        def step_complete(self, phase_name: str, step: int) -> bool:
            """Whether to go on."""
            if on_progress is not None:
                on_progress(phase_name, step + 1, self._steps.get(phase_name, 0))
            return not stop.is_set()

    return _Monitor()


def _failed(spec: EngineSpec, what: str, reasons: list[str]) -> EngineError:
    reason = " ".join((reasons[0] if reasons else "no reason given").split())[:300]
    return EngineError(f"{spec.flavour} {spec.version} {what}: {reason}", expected="an engine")
