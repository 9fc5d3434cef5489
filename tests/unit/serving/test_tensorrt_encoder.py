"""The TensorRT encoder on stand-ins for TensorRT and CUDA that keep their rules: what it copies, launches and refuses.

The stand-ins show that batches, buffers and graphs are handled as the real libraries want them. That an engine runs on
a GPU they cannot show.
"""

from __future__ import annotations

import ctypes
import dataclasses
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mimco_deploy.bundle import Bundle, read_bundle
from mimco_deploy.errors import BundleError, EngineError, MissingExtraError, ProviderError
from mimco_deploy.serving.encoders import load_encoder, tensorrt
from mimco_deploy.serving.encoders.tensorrt import TensorRTEncoder, open_engine
from mimco_deploy.serving.engines import EngineSpec, model_hash, write_engine
from mimco_deploy.serving.trt import Gpu
from tests.helpers import DIM, SIDE, golden_images, tiny_bundle, tiny_embed

HERE = Gpu("NVIDIA L4", 89)
MAX_BATCH = 6


class FakeCuda:
    """Memory is the host's; a captured stream records what it is given and a launch does it."""

    cudaMemcpyKind = types.SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)
    cudaStreamCaptureMode = types.SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)

    def __init__(self) -> None:
        self.memory: list[Any] = []
        self.recording: list[Callable[[], None]] | None = None
        self.queue: list[Callable[[], None]] = []
        self.launches = 0
        self.fail_malloc = False

    def cudaMalloc(self, size: int) -> tuple[Any, ...]:
        if self.fail_malloc:
            return (2, None)
        self.memory.append(ctypes.create_string_buffer(size))
        return (0, ctypes.addressof(self.memory[-1]))

    def cudaHostAlloc(self, size: int, _: int) -> tuple[Any, ...]:
        return self.cudaMalloc(size)

    def cudaStreamCreate(self) -> tuple[Any, ...]:
        return (0, 7)

    def do(self, work: Callable[[], None]) -> None:
        (self.queue if self.recording is None else self.recording).append(work)

    def cudaMemcpyAsync(self, to: int, source: int, count: int, *_: object) -> tuple[Any, ...]:
        def copy() -> None:
            ctypes.memmove(to, source, count)

        self.do(copy)
        return (0,)

    def cudaStreamSynchronize(self, _: object) -> tuple[Any, ...]:
        assert self.recording is None, "a synchronisation breaks a capture"
        for work in self.queue:
            work()
        self.queue.clear()
        return (0,)

    def cudaStreamBeginCapture(self, *_: object) -> tuple[Any, ...]:
        self.recording = []
        return (0,)

    def cudaStreamEndCapture(self, _: object) -> tuple[Any, ...]:
        recorded, self.recording = self.recording, None
        return (0, recorded)

    def cudaGraphInstantiate(self, graph: list[Callable[[], None]], _: int) -> tuple[Any, ...]:
        return (0, graph)

    def cudaGraphLaunch(self, graph: list[Callable[[], None]], _: object) -> tuple[Any, ...]:
        self.launches += 1
        self.queue.extend(graph)
        return (0,)

    def cudaGetErrorString(self, status: int) -> tuple[Any, ...]:
        return (0, b"out of memory" if status == 2 else b"?")


class FakeContext:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda
        self.addresses: dict[str, int] = {}
        self.shape: tuple[int, ...] = (0,)

    def set_tensor_address(self, name: str, address: int) -> None:
        self.addresses[name] = address

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert name == "image"
        self.shape = shape
        return 1 <= shape[0] <= MAX_BATCH

    def execute_async_v3(self, stream: object) -> bool:
        assert stream == 7
        count = self.shape[0]

        def compute() -> None:
            assert self.shape[0] == count, "the shape of a captured context changed"
            size = int(np.prod(self.shape))
            pixels = (ctypes.c_ubyte * size).from_address(self.addresses["image"])
            found = tiny_embed(np.frombuffer(memoryview(pixels), np.uint8).reshape(self.shape))
            ctypes.memmove(self.addresses["embedding"], found.tobytes(), found.nbytes)

        self.cuda.do(compute)
        return True


class FakeTrt:
    """A module of the names that the encoder uses."""

    __version__ = "11.4.0"

    class ILogger:
        ERROR, INTERNAL_ERROR = 1, 0

    def __init__(self, cuda: FakeCuda, dim: int = DIM) -> None:
        shapes = {"image": (-1, SIDE, SIDE, 3), "embedding": (-1, dim)}
        self.loads = True
        engine = types.SimpleNamespace(
            num_io_tensors=2,
            get_tensor_name=list(shapes).__getitem__,
            get_tensor_shape=shapes.__getitem__,
            create_execution_context=lambda: FakeContext(cuda),
        )

        def runtime(log: Any) -> Any:
            def deserialize(plan: bytes) -> Any:
                assert plan == b"a plan"
                if not self.loads:
                    log.log(self.ILogger.ERROR, "the version tag does not match")
                return engine if self.loads else None

            return types.SimpleNamespace(deserialize_cuda_engine=deserialize)

        self.Runtime = runtime


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return read_bundle(tiny_bundle(tmp_path / "encoder"))


def spec_for(bundle: Bundle, **changes: Any) -> EngineSpec:
    spec = EngineSpec(
        flavour="tensorrt",
        version="11.4.0",
        model_sha256=model_hash(bundle, "fp32"),
        precision="fp32",
        min_batch=1,
        opt_batch=4,
        max_batch=MAX_BATCH,
        workspace_mib=0,
        gpu="NVIDIA L4",
        compute_capabilities=(89,),
    )
    return dataclasses.replace(spec, **changes)


def opened(bundle: Bundle, cuda: FakeCuda, **changes: Any) -> TensorRTEncoder:
    engine = write_engine(bundle.path, spec_for(bundle, **changes), b"a plan", {})
    return TensorRTEncoder(bundle, engine, FakeTrt(cuda), cuda)


@pytest.mark.parametrize("count", [1, 2, 4, 5, 6, 7, 13])
def test_any_number_of_pictures_is_embedded_in_parts(bundle: Bundle, count: int) -> None:
    encoder = opened(bundle, FakeCuda())
    images = golden_images(count)
    np.testing.assert_allclose(encoder.embed(images), tiny_embed(images), atol=1e-6)
    encoder.prove()


def test_frequent_batches_are_one_launch_and_others_do_not_break_them(bundle: Bundle) -> None:
    cuda = FakeCuda()
    encoder = opened(bundle, cuda)
    for count, launches in [(1, 1), (4, 2), (3, 2), (1, 3), (2, 3), (4, 4), (5, 4), (4, 5)]:
        images = golden_images(8)[8 - count :]
        np.testing.assert_allclose(encoder.embed(images), tiny_embed(images), atol=1e-6)
        assert cuda.launches == launches


def test_an_answer_is_a_copy(bundle: Bundle) -> None:
    encoder = opened(bundle, FakeCuda())
    first = encoder.embed(golden_images(4)[:1])
    kept = first.copy()
    encoder.embed(golden_images(4)[1:2])
    np.testing.assert_array_equal(first, kept)


def test_fewer_than_the_profile_takes_are_filled_up(bundle: Bundle) -> None:
    encoder = opened(bundle, FakeCuda(), min_batch=3)
    images = golden_images(2)
    np.testing.assert_allclose(encoder.embed(images), tiny_embed(images), atol=1e-6)


def test_what_runs_is_told(bundle: Bundle) -> None:
    encoder = opened(bundle, FakeCuda())
    assert (encoder.provider, encoder.precision, encoder.spec) == ("tensorrt 11.4.0", "fp32", bundle.spec)
    with pytest.raises(ValueError, match="expected uint8"):
        encoder.embed(np.zeros((1, 3, SIDE, SIDE), np.uint8))


def test_an_engine_of_other_tensors_is_refused(bundle: Bundle) -> None:
    engine = write_engine(bundle.path, spec_for(bundle), b"a plan", {})
    with pytest.raises(EngineError, match="has tensors"):
        TensorRTEncoder(bundle, engine, FakeTrt(FakeCuda(), dim=DIM + 1), FakeCuda())


def test_an_engine_that_does_not_load_says_why(bundle: Bundle) -> None:
    trt = FakeTrt(FakeCuda())
    trt.loads = False
    engine = write_engine(bundle.path, spec_for(bundle), b"a plan", {})
    with pytest.raises(EngineError, match="does not load: the version tag does not match"):
        TensorRTEncoder(bundle, engine, trt, FakeCuda())


def test_a_failing_cuda_call_is_told_by_name(bundle: Bundle) -> None:
    cuda = FakeCuda()
    cuda.fail_malloc = True
    with pytest.raises(EngineError, match="CUDA: out of memory"):
        opened(bundle, cuda)


def test_an_engine_of_other_weights_does_not_prove_itself(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = opened(bundle, FakeCuda())
    monkeypatch.setattr(encoder, "embed", lambda images: tiny_embed(images, seed=3))
    with pytest.raises(BundleError, match=r"\.plan is not what its golden embeddings say, on tensorrt 11\.4\.0"):
        encoder.prove()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"gpu": "NVIDIA H100", "compute_capabilities": (90,)}, "gpu NVIDIA H100, not NVIDIA L4"),
        ({"version": "10.3.0"}, "version 10.3.0, not 11.4.0"),
        ({"model_sha256": "0" * 64}, "model_sha256 000000000000…"),
        ({"gpu": "", "compute_capabilities": (120,)}, r"compute_capabilities \(120,\), not \(89,\)"),
    ],
)
def test_a_stale_or_foreign_engine_is_never_loaded(bundle: Bundle, changes: dict[str, Any], told: str) -> None:
    write_engine(bundle.path, spec_for(bundle, **changes), b"a plan", {})

    def load(_: object) -> Any:
        return types.SimpleNamespace(__version__="11.4.0")  # which can load nothing

    with pytest.raises(EngineError, match=f"{told}.*run: mimco export --format tensorrt"):
        open_engine(bundle, None, load, lambda: HERE)


def test_the_engine_for_this_gpu_is_found_among_others(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda()
    monkeypatch.setattr(tensorrt, "_load_cuda", lambda: cuda)
    write_engine(bundle.path, spec_for(bundle, gpu="A", compute_capabilities=(80,)), b"not mine", {})
    write_engine(bundle.path, spec_for(bundle, gpu="", compute_capabilities=(80, 89)), b"a plan", {})
    encoder = open_engine(bundle, "fp32", lambda _: FakeTrt(cuda), lambda: HERE)
    np.testing.assert_allclose(encoder.embed(golden_images(3)), tiny_embed(golden_images(3)), atol=1e-6)
    with pytest.raises(EngineError, match=r"no engine in .*engines.*run: mimco export .*--precision bf16"):
        open_engine(bundle, "bf16", lambda _: FakeTrt(cuda), lambda: HERE)


def test_without_a_gpu_or_tensorrt_the_next_best_runs_or_strict_fails(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write_engine(bundle.path, spec_for(bundle), b"a plan", {})
    with pytest.raises(EngineError, match="no NVIDIA GPU"):
        open_engine(bundle, None, lambda _: None, lambda: None)

    def not_installed(*_: object) -> Any:
        raise MissingExtraError("tensorrt cannot be imported", command='pip install "mimco-deploy[tensorrt]"')

    monkeypatch.setattr(tensorrt, "open_engine", not_installed)
    encoder = load_encoder(bundle.path, "tensorrt")
    assert encoder.provider in {"CPUExecutionProvider", "CUDAExecutionProvider"}
    assert (
        'tensorrt cannot be imported: running on the next best; run: pip install "mimco-deploy[tensorrt]"'
        in caplog.text
    )
    with pytest.raises(ProviderError, match="tensorrt cannot be imported; expected --device tensorrt"):
        load_encoder(bundle.path, "tensorrt", strict=True)
