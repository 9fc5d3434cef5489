"""The encoder as a TensorRT engine: pinned buffers and CUDA graphs by cuda-python, no torch.

Never run on a GPU so far (docs/decisions.md): tests drive it with stand-ins for TensorRT and CUDA, and check the names
that it uses against the real ones.
"""

from __future__ import annotations

import ctypes
import dataclasses
import importlib
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from mimco_deploy.bundle import Bundle, EncoderSpec, Precision
from mimco_deploy.errors import EngineError, MimcoError, MissingExtraError
from mimco_deploy.serving.encoders.onnx import INPUT_NAME, OUTPUT_NAME, PATCHES_NAME
from mimco_deploy.serving.encoders.proof import check_images, prove
from mimco_deploy.serving.engines import ENGINES, Engine, EngineSpec, differences, model_hash, read_engine
from mimco_deploy.serving.trt import Gpu, gpu_here, load_trt, new_log

logger = logging.getLogger(__name__)


class TensorRTEncoder:
    """Runs an engine of a bundle.

    Args:
        bundle: as `read_bundle` gives it.
        engine: one for this machine; see `open_engine`.
        trt: the module of its flavour.
        cuda: `cuda.bindings.runtime`.

    Raises:
        EngineError: TensorRT does not load it, or it has other inputs or outputs.
    """

    def __init__(self, bundle: Bundle, engine: Engine, trt: Any, cuda: Any) -> None:
        self._bundle, self._spec, self._plan = bundle, engine.spec, engine.plan
        self._cuda = cuda
        log = new_log(trt)
        self._runtime = trt.Runtime(log)
        self._engine = self._runtime.deserialize_cuda_engine(engine.plan.read_bytes())
        if self._engine is None:
            reason = log.errors[0] if log.errors else "no reason given"
            raise EngineError(
                f"{engine.plan} does not load: {reason}", expected="an engine", command=engine.spec.command
            )
        shapes = self._shapes()
        most = engine.spec.max_batch
        self._stream = _done(cuda.cudaStreamCreate(), cuda)
        self._input = _Buffer(cuda, (most, *shapes.pop(INPUT_NAME)), np.uint8)
        self._outputs = {name: _Buffer(cuda, (most, *shape), np.float32) for name, shape in shapes.items()}
        self._any_size = self._new_context()
        self._graphs: dict[int, Any] = {}
        self._contexts: list[Any] = []
        for size in {1, engine.spec.opt_batch}:
            self._capture(size)

    @property
    def spec(self) -> EncoderSpec:
        """The contract of the bundle."""
        return self._bundle.spec

    @property
    def provider(self) -> str:
        """Flavour and version of TensorRT."""
        return f"{self._spec.flavour} {self._spec.version}"

    @property
    def precision(self) -> Precision:
        """Of the engine."""
        return self._spec.precision

    def embed(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Embed pictures: any number, in parts of the engine's largest batch.

        Args:
            images: uint8 [B, H, W, 3] as `preprocess` makes them, B at least 1.

        Returns:
            float32 [B, D], L2-normalised.

        Raises:
            ValueError: another shape or type.
        """
        check_images(images, self.spec)
        most = self._spec.max_batch
        parts = [self._run(images[start : start + most]) for start in range(0, len(images), most)]
        return np.concatenate(parts)

    def prove(self) -> None:
        """See `proof.prove`."""
        prove(self, self._bundle.golden, self._plan, self._spec.command)

    def _run(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        cuda, size = self._cuda, len(images)
        run = max(size, self._spec.min_batch)  # rows past the pictures hold what was there before; nobody reads them
        self._input.host[:size] = images
        if run in self._graphs:
            _done(cuda.cudaGraphLaunch(self._graphs[run], self._stream), cuda)
        else:
            self._enqueue(self._any_size, run)
        _done(cuda.cudaStreamSynchronize(self._stream), cuda)
        return self._outputs[OUTPUT_NAME].host[:size].copy()

    def _enqueue(self, context: Any, size: int) -> None:
        """Copy in, compute, copy out, on the stream."""
        cuda, kind = self._cuda, self._cuda.cudaMemcpyKind
        if not context.set_input_shape(INPUT_NAME, (size, *self._input.host.shape[1:])):
            raise EngineError(
                f"{self._plan} takes no batch of {size}", expected="its profile", command=self._spec.command
            )
        into, count = self._input, self._input.row_bytes * size
        _done(cuda.cudaMemcpyAsync(into.device, into.pinned, count, kind.cudaMemcpyHostToDevice, self._stream), cuda)
        if not context.execute_async_v3(self._stream):
            raise EngineError(f"{self._plan} does not run", expected="an engine", command=self._spec.command)
        out = self._outputs[OUTPUT_NAME]
        count = out.row_bytes * size
        _done(cuda.cudaMemcpyAsync(out.pinned, out.device, count, kind.cudaMemcpyDeviceToHost, self._stream), cuda)

    def _new_context(self) -> Any:
        context = self._engine.create_execution_context()
        for name, buffer in {INPUT_NAME: self._input, **self._outputs}.items():
            context.set_tensor_address(name, int(buffer.device))
        return context

    def _capture(self, size: int) -> None:
        """One launch in place of hundreds, for a batch that comes often.

        Each graph has a context of its own: what was captured breaks when the shape of its context changes.
        """
        cuda = self._cuda
        if size < self._spec.min_batch:
            return
        context = self._new_context()
        self._enqueue(context, size)  # the first run of a shape does work that cannot be captured
        _done(cuda.cudaStreamSynchronize(self._stream), cuda)
        mode = cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        _done(cuda.cudaStreamBeginCapture(self._stream, mode), cuda)
        try:
            self._enqueue(context, size)
        finally:
            graph = _done(cuda.cudaStreamEndCapture(self._stream), cuda)
        self._graphs[size] = _done(cuda.cudaGraphInstantiate(graph, 0), cuda)
        self._contexts.append(context)  # lives as long as the graph

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor → shape without the batch."""
        side, grid = self.spec.image_size_px, self.spec.patch_grid
        names = [self._engine.get_tensor_name(number) for number in range(self._engine.num_io_tensors)]
        found = {name: tuple(self._engine.get_tensor_shape(name))[1:] for name in names}
        wanted: dict[str, tuple[int, ...]] = {INPUT_NAME: (side, side, 3), OUTPUT_NAME: (self.spec.embedding_dim,)}
        if grid:
            wanted[PATCHES_NAME] = (grid**2, found.get(PATCHES_NAME, (0, 0))[-1])
        if found != wanted:
            raise EngineError(f"{self._plan} has tensors {found}", expected=str(wanted), command=self._spec.command)
        return found


class _Buffer:
    """Memory on the GPU, and pinned memory of the same size that it is copied from or to.

    Args:
        cuda: `cuda.bindings.runtime`.
        shape: largest batch first.
        kind: of an element.
    """

    def __init__(self, cuda: Any, shape: tuple[int, ...], kind: type[np.generic]) -> None:
        self.row_bytes = int(np.prod(shape[1:])) * np.dtype(kind).itemsize
        size = self.row_bytes * shape[0]
        self.device = _done(cuda.cudaMalloc(size), cuda)
        self.pinned = _done(cuda.cudaHostAlloc(size, 0), cuda)
        memory = (ctypes.c_byte * size).from_address(int(self.pinned))
        self.host: npt.NDArray[Any] = np.frombuffer(memoryview(memory), kind).reshape(shape)
        """The pinned memory as an array."""


def open_engine(
    bundle: Bundle,
    precision: Precision | None,
    load: Callable[[Any], Any] = load_trt,
    gpu: Callable[[], Gpu | None] = gpu_here,
) -> TensorRTEncoder:
    """The first engine of a bundle that is for this GPU, this TensorRT and these weights.

    Args:
        bundle: in a folder.
        precision: of the engine; by default what the bundle says for `tensorrt`, else any.
        load: gives the module of a flavour.
        gpu: tells the GPU.

    Raises:
        EngineError: there is none: names what is in the way of the nearest.
        MissingExtraError: TensorRT or cuda-python is not installed.
    """
    here = gpu()
    if here is None:
        raise EngineError("no NVIDIA GPU for a TensorRT engine", expected="one", command="mimco doctor")
    wanted = precision or bundle.defaults.get("tensorrt")
    reasons: list[MimcoError] = []
    for sidecar in sorted((bundle.path / ENGINES).glob("*.json")):  # a plan without one does not count
        plan = sidecar.with_suffix(".plan")
        try:
            engine = read_engine(plan)
            if wanted is not None and engine.spec.precision != wanted:
                continue
            trt = load(engine.spec.flavour)
            _check_is_for(bundle, engine, here, str(trt.__version__))
            return TensorRTEncoder(bundle, engine, trt, _load_cuda())
        except (EngineError, MissingExtraError) as error:
            reasons.append(error)
    if reasons:
        raise reasons[0]
    command = f"mimco export --format tensorrt --precision {wanted or 'fp16'} --output {bundle.path}"
    raise EngineError(f"no engine in {bundle.path / ENGINES}", expected="one for this GPU", command=command)


def _check_is_for(bundle: Bundle, engine: Engine, here: Gpu, version: str) -> None:
    """Raise EngineError where the engine is stale or foreign."""
    spec = engine.spec
    fits = here.compute_capability in spec.compute_capabilities
    wanted: EngineSpec = dataclasses.replace(
        spec,
        version=version,
        model_sha256=model_hash(bundle, spec.precision),
        gpu=here.name if spec.gpu else "",
        compute_capabilities=spec.compute_capabilities if fits else (here.compute_capability,),
    )
    if differ := differences(spec, wanted):
        command = f"{wanted.command} --output {bundle.path}"
        raise EngineError(f"{engine.plan} is of {'; '.join(differ)}", expected="its own", command=command)


def _load_cuda() -> Any:
    try:
        return importlib.import_module("cuda.bindings.runtime")
    except ImportError as error:
        command = 'pip install "mimco-deploy[tensorrt]"'
        raise MissingExtraError(f"cuda-python cannot be imported ({error})", command=command) from error


def _done(answer: tuple[Any, ...], cuda: Any) -> Any:
    """The value of a CUDA call.

    Raises:
        EngineError: it failed.
    """
    status, *values = answer
    if int(status) != 0:
        _, name = cuda.cudaGetErrorString(status)
        text = name.decode() if isinstance(name, bytes) else str(name)
        raise EngineError(f"CUDA: {text}", expected="success", command="mimco doctor")
    return values[0] if values else None
