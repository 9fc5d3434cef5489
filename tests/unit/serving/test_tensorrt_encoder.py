"""The TensorRT encoder on stand-ins for TensorRT and CUDA that keep their rules: what it copies, launches and refuses.

The stand-ins show that batches, buffers and graphs are handled as the real libraries want them. That an engine runs on
a GPU they cannot show.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import json
import shutil
import threading
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mimco_deploy.bundle import Bundle, read_bundle
from mimco_deploy.errors import BundleError, EngineError, MissingExtraError, ProviderError
from mimco_deploy.serving.encoders import load_encoder, onnx, tensorrt
from mimco_deploy.serving.encoders.tensorrt import TensorRTEncoder, open_engine
from mimco_deploy.serving.engines import EngineSpec, model_hash, platform_here
from mimco_deploy.serving.trt import Gpu
from tests.helpers import DIM, SIDE, golden_images, tiny_bundle, tiny_embed, write_engine

HERE = Gpu("NVIDIA L4", 89)
MAX_BATCH = 6
GRID = 2


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
        self.fail_capture = False
        self.slow_s = 0.0
        self.held: list[object] = []
        """What was not given back."""

    def cudaMalloc(self, size: int) -> tuple[Any, ...]:
        if self.fail_malloc:
            return (2, None)
        self.memory.append(ctypes.create_string_buffer(size))
        self.held.append(address := ctypes.addressof(self.memory[-1]))
        return (0, address)

    def give_back(self, thing: object) -> tuple[Any, ...]:
        self.held.remove(thing)
        return (0,)

    cudaFree = cudaFreeHost = cudaStreamDestroy = cudaGraphDestroy = cudaGraphExecDestroy = give_back

    def cudaHostAlloc(self, size: int, _: int) -> tuple[Any, ...]:
        return self.cudaMalloc(size)

    def cudaStreamCreate(self) -> tuple[Any, ...]:
        self.held.append(7)
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
        time.sleep(self.slow_s)
        for work in self.queue:
            work()
        self.queue.clear()
        return (0,)

    def cudaStreamBeginCapture(self, *_: object) -> tuple[Any, ...]:
        self.recording = []
        return (0,)

    def cudaStreamEndCapture(self, _: object) -> tuple[Any, ...]:
        recorded, self.recording = self.recording, None
        if self.fail_capture:
            return (900, None)
        self.held.append(recorded)
        return (0, recorded)

    def cudaGraphInstantiate(self, graph: list[Callable[[], None]], _: int) -> tuple[Any, ...]:
        self.held.append(graph)
        return (0, graph)

    def cudaGraphLaunch(self, graph: list[Callable[[], None]], _: object) -> tuple[Any, ...]:
        self.launches += 1
        self.queue.extend(graph)
        return (0,)

    def cudaGetErrorString(self, status: int) -> tuple[Any, ...]:
        return (0, {2: b"out of memory", 900: b"operation not permitted when stream is capturing"}[status])


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
            if "patches" in self.addresses:
                patches = patches_of(found)
                ctypes.memmove(self.addresses["patches"], patches.tobytes(), patches.nbytes)

        self.cuda.do(compute)
        return True


def patches_of(embeddings: Any) -> Any:
    """Something of the shape of patch tokens: [B, GRID², 5]."""
    return np.repeat(embeddings[:, None, :5], GRID**2, axis=1) * np.arange(1, GRID**2 + 1, dtype=np.float32)[:, None]


class FakeTrt:
    """A module of the names that the encoder uses."""

    __version__ = "11.4.0"
    LayerInformationFormat = types.SimpleNamespace(JSON=1)
    CudaGraphStrategy = types.SimpleNamespace(WHOLE_GRAPH_CAPTURE="whole")

    class ILogger:
        ERROR, INTERNAL_ERROR = 1, 0

    def __init__(self, cuda: FakeCuda, dim: int = DIM, *, patches: bool = False) -> None:
        shapes: dict[str, tuple[int, ...]] = {"image": (-1, SIDE, SIDE, 3), "embedding": (-1, dim)}
        if patches:
            shapes["patches"] = (-1, GRID**2, 5)
        self.loads = True
        self.starts = True
        self.takes = "UINT8"
        self.product = "FP32"
        self.configured = types.SimpleNamespace(cuda_graph_strategy=None)

        def context(config: object = None) -> Any:
            assert config in (None, self.configured)
            return FakeContext(cuda) if self.starts else None

        def inspector() -> Any:
            layers = [{"Name": "fc", "LayerType": "gemm", "Outputs": [{"Format/Datatype": self.product}]}]
            return types.SimpleNamespace(get_engine_information=lambda _: json.dumps({"Layers": layers}))

        engine = types.SimpleNamespace(
            num_io_tensors=len(shapes),
            get_tensor_name=list(shapes).__getitem__,
            get_tensor_shape=shapes.__getitem__,
            get_tensor_dtype=lambda name: types.SimpleNamespace(name=self.takes if name == "image" else "FLOAT"),
            create_execution_context=context,
            create_runtime_config=lambda: self.configured,
            create_engine_inspector=inspector,
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
        settings="no-tf32",
        platform=platform_here(),
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


def test_two_threads_take_turns(bundle: Bundle) -> None:
    """As a search beside an index job of the same service."""
    cuda = FakeCuda()
    encoder = opened(bundle, cuda)
    cuda.slow_s = 0.002
    images, wrong = golden_images(8), []

    def ask(rows: slice) -> None:
        for _ in range(20):
            if not np.allclose(encoder.embed(images[rows]), tiny_embed(images[rows]), atol=1e-6):
                wrong.append(rows)

    threads = [threading.Thread(target=ask, args=(rows,)) for rows in (slice(0, 1), slice(3, 8))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_patches_come_with_the_embeddings(tmp_path: Path) -> None:
    folder = tiny_bundle(tmp_path / "encoder")
    plain = read_bundle(folder)
    bundle = dataclasses.replace(plain, spec=dataclasses.replace(plain.spec, patch_grid=GRID))
    engine = write_engine(folder, spec_for(plain), b"a plan", {})
    cuda = FakeCuda()
    encoder = TensorRTEncoder(bundle, engine, FakeTrt(cuda, patches=True), cuda)
    for count in (1, 4, 5, 13):
        images = golden_images(count)
        embeddings, patches = encoder.embed_with_patches(images)
        np.testing.assert_allclose(embeddings, tiny_embed(images), atol=1e-6)
        np.testing.assert_allclose(patches, patches_of(tiny_embed(images)), atol=1e-5)
    with pytest.raises(BundleError, match="has no patch tokens"):
        opened(plain, FakeCuda()).embed_with_patches(golden_images(1))


def test_what_it_held_on_the_gpu_is_given_back(bundle: Bundle) -> None:
    cuda = FakeCuda()
    encoder = opened(bundle, cuda)
    assert len(cuda.held) == 1 + 2 * 2 + 2 * 2  # a stream, two buffers and their pinned twins, two graphs
    del encoder
    gc.collect()
    assert cuda.held == []
    trt = FakeTrt(cuda)
    trt.starts = False
    with pytest.raises(EngineError, match="does not start"):
        TensorRTEncoder(bundle, write_engine(bundle.path, spec_for(bundle), b"a plan", {}), trt, cuda)
    assert cuda.held == []


def test_without_a_graph_it_runs_all_the_same(bundle: Bundle, caplog: pytest.LogCaptureFixture) -> None:
    cuda = FakeCuda()
    cuda.fail_capture = True
    encoder = opened(bundle, cuda)
    assert "batches of 4 run without a CUDA graph (CUDA: operation not permitted when stream is capt" in caplog.text
    np.testing.assert_allclose(encoder.embed(golden_images(4)), tiny_embed(golden_images(4)), atol=1e-6)
    assert cuda.launches == 0


def test_that_for_rtx_makes_its_own_graphs(bundle: Bundle) -> None:
    cuda = FakeCuda()
    trt = FakeTrt(cuda)
    engine = write_engine(bundle.path, spec_for(bundle, flavour="tensorrt-rtx"), b"a plan", {})
    encoder = TensorRTEncoder(bundle, engine, trt, cuda)
    assert trt.configured.cuda_graph_strategy == "whole"
    np.testing.assert_allclose(encoder.embed(golden_images(4)), tiny_embed(golden_images(4)), atol=1e-6)
    assert cuda.launches == 0


def test_tensors_of_another_type_are_refused(bundle: Bundle) -> None:
    trt = FakeTrt(FakeCuda())
    trt.takes = "FLOAT"
    with pytest.raises(EngineError, match=r"has tensors of types.*expected UINT8 in"):
        TensorRTEncoder(bundle, write_engine(bundle.path, spec_for(bundle), b"a plan", {}), trt, FakeCuda())


def test_an_engine_built_ahead_of_time_tells_its_types_when_it_is_loaded(bundle: Bundle) -> None:
    cuda = FakeCuda()
    trt = FakeTrt(cuda)
    engine = write_engine(bundle.path, spec_for(bundle, gpu=""), b"a plan", {})
    TensorRTEncoder(bundle, engine, trt, cuda)
    trt.product = "FP16"
    with pytest.raises(EngineError, match="asked for fp32, but in the built engine fc is fp16"):
        TensorRTEncoder(bundle, engine, trt, cuda)


def test_every_way_that_a_batch_is_run_is_proved(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = opened(bundle, FakeCuda())
    asked, embed = [], encoder.embed

    def listen(images: Any) -> Any:
        asked.append(len(images))
        return embed(images)

    monkeypatch.setattr(encoder, "embed", listen)
    encoder.prove()
    assert asked == [1, 3, 4]


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
    monkeypatch.setattr(tensorrt, "load_cuda", lambda: cuda)
    write_engine(bundle.path, spec_for(bundle, gpu="A", compute_capabilities=(80,)), b"not mine", {})
    write_engine(bundle.path, spec_for(bundle, gpu="", compute_capabilities=(80, 89)), b"a plan", {})
    encoder = open_engine(bundle, "fp32", lambda _: FakeTrt(cuda), lambda: HERE)
    np.testing.assert_allclose(encoder.embed(golden_images(3)), tiny_embed(golden_images(3)), atol=1e-6)
    with pytest.raises(EngineError, match=r"no engine in .*engines.*run: mimco export .*--precision bf16"):
        open_engine(bundle, "bf16", lambda _: FakeTrt(cuda), lambda: HERE)


def test_the_nearest_engine_is_told_and_one_without_its_graph_is_in_nobodys_way(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = FakeCuda()
    monkeypatch.setattr(tensorrt, "load_cuda", lambda: cuda)
    write_engine(bundle.path, spec_for(bundle, precision="bf16", model_sha256="0" * 64), b"of no graph", {})
    write_engine(bundle.path, spec_for(bundle, gpu="A", compute_capabilities=(80,), version="10"), b"far", {})
    write_engine(bundle.path, spec_for(bundle, version="11.3.9"), b"near", {})
    (bundle.path / "engines" / "tensorrt-bf16-sm89-b1-4-6.json").rename(bundle.path / "kept.json")
    with pytest.raises(EngineError, match=r"sm89-b1-4-6\.plan is of version 11\.3\.9, not 11\.4\.0"):
        open_engine(bundle, None, lambda _: FakeTrt(cuda), lambda: HERE)
    shutil.move(bundle.path / "kept.json", bundle.path / "engines" / "tensorrt-bf16-sm89-b1-4-6.json")
    write_engine(bundle.path, spec_for(bundle), b"a plan", {})
    assert open_engine(bundle, None, lambda _: FakeTrt(cuda), lambda: HERE).precision == "fp32"


def test_what_is_in_an_engines_way_is_told_where_onnx_runtime_has_tensorrt_too(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def stale(*_: object) -> Any:
        raise EngineError("the.plan is of version 10, not 11", command="mimco export --format tensorrt")

    monkeypatch.setattr(tensorrt, "open_engine", stale)
    monkeypatch.setattr(onnx, "has_tensorrt_provider", lambda: True)
    with pytest.raises(ProviderError, match="TensorrtExecutionProvider"):
        load_encoder(bundle.path, "tensorrt", strict=True)
    assert "the.plan is of version 10, not 11" in caplog.text
    assert "run: mimco export --format tensorrt" in caplog.text


def test_without_a_gpu_or_tensorrt_the_next_best_runs_or_strict_fails(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write_engine(bundle.path, spec_for(bundle), b"a plan", {})
    with pytest.raises(EngineError, match="no NVIDIA GPU"):
        open_engine(bundle, None, lambda _: None, lambda: None)

    def not_installed(*_: object) -> Any:
        raise MissingExtraError("tensorrt cannot be imported", command='pip install "mimco-deploy[tensorrt]"')

    monkeypatch.setattr(tensorrt, "open_engine", not_installed)
    monkeypatch.setattr(onnx, "has_tensorrt_provider", lambda: False)
    encoder = load_encoder(bundle.path, "tensorrt")
    assert encoder.provider in {"CPUExecutionProvider", "CUDAExecutionProvider"}
    assert (
        'tensorrt cannot be imported: running on the next best; run: pip install "mimco-deploy[tensorrt]"'
        in caplog.text
    )
    with pytest.raises(ProviderError, match="tensorrt cannot be imported; expected --device tensorrt"):
        load_encoder(bundle.path, "tensorrt", strict=True)
