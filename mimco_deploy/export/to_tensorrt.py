"""A bundle's ONNX graph → a TensorRT engine, by TensorRT's own Python API.

One path for TensorRT 10 and 11 and for TensorRT for RTX: the module comes as the parameter `trt`. Networks are strongly
typed, so an engine has the types that the graph states, and those are read back.
"""

from __future__ import annotations

import contextlib
import json
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
from mimco_deploy.serving.engines import ENGINES, Engine, EngineSpec, engine_for, model_hash, write_engine
from mimco_deploy.serving.trt import Flavour, gpu_here, new_log

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
"""Phase, steps done, steps in all."""
PRECISIONS: dict[Precision, str] = {"fp32": "FLOAT", "fp16": "HALF", "bf16": "BF16"}
"""What an engine can be made of, and TensorRT's name of the type."""
_PRODUCTS = ("MATRIX_MULTIPLY", "CONVOLUTION", "DECONVOLUTION")
_PRODUCT_LAYER = re.compile("gemm|conv|matrix|matmul", re.IGNORECASE)
_BUILT_NAMES: dict[Precision, set[str]] = {
    "fp32": {"float", "fp32"},
    "fp16": {"half", "fp16"},
    "bf16": {"bf16", "bfloat16"},
}
_LISTED = 5
_MAX_WORKSPACE_MIB = 1 << 20


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
        if self.workspace_mib > _MAX_WORKSPACE_MIB:
            raise ConfigError(f"a workspace of {self.workspace_mib} MiB", expected=f"at most {_MAX_WORKSPACE_MIB}")
        if self.precision not in PRECISIONS:
            raise ConfigError(f"an engine in {self.precision}", expected=f"--precision {' or '.join(PRECISIONS)}")


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
        KeyboardInterrupt: Ctrl-C; nothing is left behind.
    """
    try:
        return engine_for(bundle, spec), False
    except EngineError as stale:
        there = (bundle.path / ENGINES / f"{spec.name}.plan").exists()
        logger.log(logging.WARNING if there else logging.INFO, "building %s: %s", spec.name, stale.found)
    log = new_log(trt)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(bundle.model(spec.precision))):
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
    if cache is not None:
        write_bytes(cache, bytes(config.get_timing_cache().serialize()))
    if spec.gpu:
        _check_built(trt, log, plan, spec)
    return write_engine(bundle.path, spec, plan, layers), True


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
        f"--saveEngine={model.with_suffix('.plan')}",
    ]


def layer_types(network: Any) -> Mapping[str, int]:
    """Kind and type of each layer of a network, counted; without those that compute shapes alone."""
    kinds: Counter[str] = Counter()
    for number in range(network.num_layers):
        layer = network.get_layer(number)
        kind, dtype = layer.type.name, layer.get_output(0).dtype.name
        if dtype in PRECISIONS.values() and kind != "CONSTANT":
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
    wanted = PRECISIONS[precision]
    wrong = [f"{name} is {dtype}" for name, dtype in products.items() if dtype != wanted]
    if wrong or not products:
        listed = ", ".join(wrong[:_LISTED]) + (f" and {len(wrong) - _LISTED} more" if len(wrong) > _LISTED else "")
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
    path = bundle.path / ENGINES / f"timing-{spec.version}.cache"
    content = path.read_bytes() if path.is_file() else b""
    config.set_timing_cache(config.create_timing_cache(content), ignore_mismatch=False)
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


def _check_built(trt: Any, log: Any, plan: bytes, spec: EngineSpec) -> None:
    """Read the types back from the built engine, which takes the GPU that it was built on."""
    engine = trt.Runtime(log).deserialize_cuda_engine(plan)
    if engine is None:
        raise _failed(spec, "cannot load what it built", log.errors)
    told = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    check_built_types(told, spec.precision)


def check_built_types(told: str, precision: Precision) -> None:
    """Whether the products of a built engine give the type asked for.

    Args:
        told: what the engine inspector says, JSON. Layers that were fused go by the type of their outputs.
        precision: asked for.

    Raises:
        EngineError: a product gives another type, or nothing in the engine gives this one; lists layers.
    """
    entries = [entry for entry in json.loads(told).get("Layers", []) if isinstance(entry, dict)]
    gives = {str(entry.get("Name")): _types_given(entry) for entry in entries}
    products = {str(entry.get("Name")) for entry in entries if _PRODUCT_LAYER.search(str(entry.get("LayerType")))}
    names = _BUILT_NAMES[precision]
    wrong = [f"{name} is {'/'.join(sorted(gives[name]))}" for name in sorted(products) if not gives[name] & names]
    if wrong or not any(types & names for types in gives.values()):
        listed = ", ".join(wrong[:_LISTED]) or f"none of {len(entries)} layers is"
        raise EngineError(f"asked for {precision}, but in the built engine {listed}", expected=PRECISIONS[precision])


def _types_given(entry: Mapping[str, Any]) -> set[str]:
    """The words in which the inspector tells the types of a layer's outputs."""
    told = (str(value) for output in entry.get("Outputs", []) for key, value in output.items() if "type" in key.lower())
    return {word for text in told for word in text.lower().split()}


def _failed(spec: EngineSpec, what: str, reasons: list[str]) -> EngineError:
    reason = " ".join((reasons[0] if reasons else "no reason given").split())[:300]
    return EngineError(f"{spec.flavour} {spec.version} {what}: {reason}", expected="an engine")
