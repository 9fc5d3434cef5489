"""The encoder as a TensorRT engine: pinned buffers and CUDA graphs by cuda-python, no torch.

Never run on a GPU so far (docs/decisions.md): tests drive it with stand-ins for TensorRT and CUDA, and check the names
that it uses against the real ones.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import logging
import shlex
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mimco_deploy.bundle import Bundle, EncoderSpec, Precision
from mimco_deploy.errors import BundleError, EngineError, MimcoError
from mimco_deploy.serving.encoders.onnx import INPUT_NAME, OUTPUT_NAME, PATCHES_NAME
from mimco_deploy.serving.encoders.proof import check_images, prove
from mimco_deploy.serving.engine_types import check_engine_types
from mimco_deploy.serving.engines import (
    ENGINES,
    Engine,
    EngineSpec,
    differences,
    model_hash,
    platform_here,
    read_engine,
)
from mimco_deploy.serving.trt import Gpu, gpu_here, load_cuda, load_trt, new_log

logger = logging.getLogger(__name__)


class TensorRTEncoder:
    """Runs an engine of a bundle. Safe to use from several threads, which take turns: there is one set of buffers.

    Args:
        bundle: as `read_bundle` gives it.
        engine: one for this machine; see `open_engine`.
        trt: the module of its flavour.
        cuda: `cuda.bindings.runtime`.

    Raises:
        EngineError: TensorRT does not load it, or it has other inputs, outputs or types.
    """

    def __init__(self, bundle: Bundle, engine: Engine, trt: Any, cuda: Any) -> None:
        self._bundle, self._spec, self._plan = bundle, engine.spec, engine.plan
        self._trt, self._cuda = trt, cuda
        self._turn = threading.Lock()
        with contextlib.ExitStack() as owned:  # on the GPU; given back where anything below fails
            log = new_log(trt)
            self._runtime = trt.Runtime(log)
            self._engine = self._runtime.deserialize_cuda_engine(engine.plan.read_bytes())
            if self._engine is None:
                raise self._refused(f"does not load: {log.errors[0] if log.errors else 'no reason given'}")
            shapes = self._shapes()
            if not engine.spec.gpu:  # nobody could inspect it where it was built
                self.check_types()
            most = engine.spec.max_batch
            self._stream = _done(cuda.cudaStreamCreate(), cuda)
            owned.callback(cuda.cudaStreamDestroy, self._stream)
            self._input = _Buffer(cuda, (most, *shapes.pop(INPUT_NAME)), np.uint8, owned)
            self._outputs = {name: _Buffer(cuda, (most, *shape), np.float32, owned) for name, shape in shapes.items()}
            self._any_size = self._new_context()
            self._graphs: dict[int, Any] = {}
            self._contexts: list[Any] = []
            if engine.spec.flavour == "tensorrt":  # that for RTX captures by itself; see `_new_context`
                for size in {1, engine.spec.opt_batch}:
                    self._capture(size, owned)
            weakref.finalize(self, owned.pop_all().close)

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
            EngineError: the GPU does not do it.
        """
        return self._in_parts(images, ())[0]

    def embed_with_patches(
        self, images: npt.NDArray[np.uint8]
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Embed pictures and their patches; see `OnnxEncoder.embed_with_patches`.

        Args:
            images: as for `embed`.

        Returns:
            float32 [B, D], L2-normalised, and float32 [B, L, width].

        Raises:
            BundleError: the bundle was exported without patches.
            ValueError: another shape or type.
            EngineError: the GPU does not do it.
        """
        if not self.spec.patch_grid:
            command = "mimco export --format onnx --with-patches"
            raise BundleError(f"{self._plan} has no patch tokens", expected="an export --with-patches", command=command)
        embeddings, patches = self._in_parts(images, (PATCHES_NAME,))
        return embeddings, patches

    def check_types(self) -> None:
        """Ask the engine itself.

        Raises:
            EngineError: it is not of its precision.
        """
        check_engine_types(self._trt, self._engine, self.precision)

    def prove(self) -> None:
        """See `proof.prove`: alone, and in each way that a batch is run."""
        command = self._spec.command(self._bundle.path)
        sizes = sorted({1, min(3, self._spec.max_batch), self._spec.opt_batch})
        prove(self, self._bundle.golden, self._plan, command, sizes)

    def _in_parts(self, images: npt.NDArray[np.uint8], others: tuple[str, ...]) -> list[npt.NDArray[np.float32]]:
        check_images(images, self.spec)
        most = self._spec.max_batch
        with self._turn:
            parts = [self._run(images[start : start + most], others) for start in range(0, len(images), most)]
        return [np.concatenate(part) for part in zip(*parts, strict=True)]

    def _run(self, images: npt.NDArray[np.uint8], others: tuple[str, ...]) -> list[npt.NDArray[np.float32]]:
        """The embeddings, and other outputs by their names."""
        cuda, size = self._cuda, len(images)
        run = max(size, self._spec.min_batch)  # rows past the pictures hold what was there before; nobody reads them
        self._input.host[:size] = images
        if run in self._graphs:
            _done(cuda.cudaGraphLaunch(self._graphs[run], self._stream), cuda)
        else:
            self._enqueue(self._any_size, run)
        for name in others:
            self._copy_out(name, run)
        _done(cuda.cudaStreamSynchronize(self._stream), cuda)
        return [self._outputs[name].host[:size].copy() for name in (OUTPUT_NAME, *others)]

    def _enqueue(self, context: Any, size: int) -> None:
        """Copy in, compute, copy out, on the stream."""
        if not context.set_input_shape(INPUT_NAME, (size, *self._input.host.shape[1:])):
            raise self._refused(f"takes no batch of {size}")
        into, count, kind = self._input, self._input.row_bytes * size, self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        _done(self._cuda.cudaMemcpyAsync(into.device, into.pinned, count, kind, self._stream), self._cuda)
        if not context.execute_async_v3(self._stream):
            raise self._refused("does not run")
        self._copy_out(OUTPUT_NAME, size)

    def _copy_out(self, name: str, size: int) -> None:
        out, kind = self._outputs[name], self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        count = out.row_bytes * size
        _done(self._cuda.cudaMemcpyAsync(out.pinned, out.device, count, kind, self._stream), self._cuda)

    def _new_context(self) -> Any:
        if self._spec.flavour == "tensorrt":
            context = self._engine.create_execution_context()
        else:
            trt, config = self._trt, self._engine.create_runtime_config()
            config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            context = self._engine.create_execution_context(config)
        if context is None:
            raise self._refused("does not start: the GPU may lack memory")
        for name, buffer in {INPUT_NAME: self._input, **self._outputs}.items():
            context.set_tensor_address(name, int(buffer.device))
        return context

    def _capture(self, size: int, owned: contextlib.ExitStack) -> None:
        """One launch in place of hundreds, for a batch that comes often; without it where that does not work.

        Each graph has a context of its own: what was captured breaks when the shape of its context changes.
        """
        cuda = self._cuda
        if size < self._spec.min_batch:
            return
        context = self._new_context()
        self._enqueue(context, size)  # the first run of a shape does work that cannot be captured
        _done(cuda.cudaStreamSynchronize(self._stream), cuda)
        mode = cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        try:
            _done(cuda.cudaStreamBeginCapture(self._stream, mode), cuda)
            try:
                self._enqueue(context, size)
            except EngineError:
                cuda.cudaStreamEndCapture(self._stream)  # which only says once more that it failed
                raise
            graph = _done(cuda.cudaStreamEndCapture(self._stream), cuda)
            owned.callback(cuda.cudaGraphDestroy, graph)
            launch = _done(cuda.cudaGraphInstantiate(graph, 0), cuda)
        except EngineError as error:
            logger.warning("%s: batches of %d run without a CUDA graph (%s)", self._plan.name, size, error.found)
            return
        owned.callback(cuda.cudaGraphExecDestroy, launch)
        self._graphs[size] = launch
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
            raise self._refused(f"has tensors {found}", str(wanted))
        kinds = {name: self._engine.get_tensor_dtype(name).name for name in names}
        if kinds != {name: "UINT8" if name == INPUT_NAME else "FLOAT" for name in names}:
            raise self._refused(f"has tensors of types {kinds}", "UINT8 in, FLOAT out")
        return found

    def _refused(self, found: str, expected: str = "an engine for this machine") -> EngineError:
        command = self._spec.command(self._bundle.path)
        return EngineError(f"{self._plan} {found}", expected=expected, command=command)


class _Buffer:
    """Memory on the GPU, and pinned memory of the same size that it is copied from or to.

    Args:
        cuda: `cuda.bindings.runtime`.
        shape: largest batch first.
        kind: of an element.
        owned: gives it back.
    """

    def __init__(self, cuda: Any, shape: tuple[int, ...], kind: type[np.generic], owned: contextlib.ExitStack) -> None:
        self.row_bytes = int(np.prod(shape[1:])) * np.dtype(kind).itemsize
        size = self.row_bytes * shape[0]
        self.device = _done(cuda.cudaMalloc(size), cuda)
        owned.callback(cuda.cudaFree, self.device)
        self.pinned = _done(cuda.cudaHostAlloc(size, 0), cuda)
        owned.callback(cuda.cudaFreeHost, self.pinned)
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
    here = _gpu_of(gpu)
    wanted = precision or bundle.defaults.get("tensorrt")
    reasons: list[tuple[int, MimcoError]] = []
    for sidecar in sorted((bundle.path / ENGINES).glob("*.json")):  # a plan without one does not count
        apart = sys.maxsize  # until it is known what would have to be otherwise
        try:
            engine = read_engine(sidecar.with_suffix(".plan"))
            if wanted is not None and engine.spec.precision != wanted:
                continue
            trt = load(engine.spec.flavour)
            own = _own(bundle, engine.spec, here, str(trt.__version__))
            apart = len(differences(engine.spec, own))
            return _open(bundle, engine, own, trt)
        except MimcoError as error:
            reasons.append((apart, error))
    if reasons:
        raise min(reasons, key=lambda reason: reason[0])[1]
    command = ["mimco", "export", "--format", "tensorrt", "--precision", wanted or "fp16", "--output", str(bundle.path)]
    found = f"no engine in {bundle.path / ENGINES}"
    raise EngineError(found, expected="one for this GPU", command=shlex.join(command))


def open_plan(bundle: Bundle, plan: Path) -> TensorRTEncoder:
    """One engine of a bundle.

    Raises:
        EngineError: it is damaged, stale or foreign, or does not load.
        MissingExtraError: TensorRT or cuda-python is not installed.
    """
    engine = read_engine(plan)
    trt = load_trt(engine.spec.flavour)
    return _open(bundle, engine, _own(bundle, engine.spec, _gpu_of(gpu_here), str(trt.__version__)), trt)


def _gpu_of(gpu: Callable[[], Gpu | None]) -> Gpu:
    here = gpu()
    if here is None:
        raise EngineError("no NVIDIA GPU for a TensorRT engine", expected="one", command="mimco doctor")
    return here


def _own(bundle: Bundle, spec: EngineSpec, here: Gpu, version: str) -> EngineSpec:
    """What an engine would have to be to run here, on this TensorRT, for this bundle."""
    fits = here.compute_capability in spec.compute_capabilities
    return dataclasses.replace(
        spec,
        version=version,
        model_sha256=model_hash(bundle, spec.precision),
        platform=platform_here(),
        gpu=here.name if spec.gpu else "",
        compute_capabilities=spec.compute_capabilities if fits else (here.compute_capability,),
    )


def _open(bundle: Bundle, engine: Engine, own: EngineSpec, trt: Any) -> TensorRTEncoder:
    if differ := differences(engine.spec, own):
        found = f"{engine.plan} is of {'; '.join(differ)}"
        raise EngineError(found, expected="its own", command=own.command(bundle.path))
    return TensorRTEncoder(bundle, engine, trt, load_cuda())


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
