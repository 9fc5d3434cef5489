"""Sidecars of engines: what is written is read, and nothing that differs is taken for the engine wanted."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest

from mimco_deploy.bundle import Bundle, checksum_of, read_bundle
from mimco_deploy.errors import EngineError
from mimco_deploy.serving.engines import (
    EngineSpec,
    differences,
    engine_for,
    model_hash,
    read_engine,
)
from tests.helpers import tiny_bundle, write_engine

PLAN = bytes(range(256)) * 40
SPEC = EngineSpec(
    flavour="tensorrt",
    version="11.4.0",
    model_sha256="a" * 64,
    precision="fp16",
    min_batch=1,
    opt_batch=32,
    max_batch=256,
    workspace_mib=0,
    settings="no-tf32",
    platform="linux x86_64",
    gpu="NVIDIA L4",
    compute_capabilities=(89,),
)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return read_bundle(tiny_bundle(tmp_path / "encoder"))


def test_what_was_written_is_read_and_the_plan_is_plain(bundle: Bundle) -> None:
    written = write_engine(bundle.path, SPEC, PLAN, {"SOFTMAX FLOAT": 12})
    assert read_engine(written.plan) == written == engine_for(bundle, SPEC)
    assert written.plan.read_bytes() == PLAN
    assert written.plan.name == "tensorrt-fp16-sm89-b1-32-256.plan"
    assert read_bundle(bundle.path).spec == bundle.spec  # engines are no part of the contract


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"version": "11.5.0"}, "version 11.4.0, not 11.5.0"),
        ({"model_sha256": "b" * 64}, "model_sha256 aaaaaaaaaaaa…, not bbbbbbbbbbbb…"),
        ({"gpu": "NVIDIA H100"}, "gpu NVIDIA L4, not NVIDIA H100"),
        ({"gpu": ""}, "gpu NVIDIA L4, not none"),
        ({"workspace_mib": 512}, "workspace_mib 0, not 512"),
        ({"settings": "tf32"}, "settings no-tf32, not tf32"),
        ({"platform": "win32 AMD64"}, "platform linux x86_64, not win32 AMD64"),
    ],
)
def test_a_field_that_differs_is_named_with_the_command(bundle: Bundle, change: dict[str, Any], told: str) -> None:
    write_engine(bundle.path, SPEC, PLAN, {})
    wanted = dataclasses.replace(SPEC, **change)
    assert differences(SPEC, wanted) == [told]
    with pytest.raises(EngineError) as raised:
        engine_for(bundle, wanted)
    assert told in raised.value.found
    assert raised.value.command.startswith("mimco export --format tensorrt --precision fp16 --profile 1,32,256")


@pytest.mark.parametrize(
    "change",
    [
        {"precision": "fp32"},
        {"max_batch": 64},
        {"compute_capabilities": (90,)},
        {"flavour": "tensorrt-rtx"},
    ],
)
def test_engines_that_can_be_side_by_side_have_names_of_their_own(bundle: Bundle, change: dict[str, Any]) -> None:
    other = dataclasses.replace(SPEC, **change)
    write_engine(bundle.path, SPEC, PLAN, {})
    write_engine(bundle.path, other, b"another", {})
    assert engine_for(bundle, SPEC).plan.read_bytes() == PLAN
    assert engine_for(bundle, other).plan.read_bytes() == b"another"


def test_any_flipped_byte_is_refused(bundle: Bundle) -> None:
    plan = write_engine(bundle.path, SPEC, PLAN, {"SOFTMAX FLOAT": 12}).plan
    rng = random.Random(0)
    for path in (plan, plan.with_suffix(".json")):
        whole = path.read_bytes()
        for _ in range(100):
            place = rng.randrange(len(whole))
            if whole[place : place + 1].isspace():
                continue
            damaged = bytearray(whole)
            damaged[place] ^= 1 << rng.randrange(8)
            path.write_bytes(damaged)
            with pytest.raises(EngineError):
                read_engine(plan)
        path.write_bytes(whole)
    assert read_engine(plan).spec == SPEC


@pytest.mark.parametrize("suffix", [".plan", ".json"])
def test_a_missing_half_is_refused(bundle: Bundle, suffix: str) -> None:
    plan = write_engine(bundle.path, SPEC, PLAN, {}).plan
    plan.with_suffix(suffix).unlink()
    with pytest.raises(EngineError, match="expected a plan and its sidecar"):
        read_engine(plan)


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"7", b"\xff", b"[" * 100_000, b" " * (2 << 20)])
def test_a_sidecar_that_is_none_is_refused(bundle: Bundle, content: bytes) -> None:
    plan = write_engine(bundle.path, SPEC, PLAN, {}).plan
    plan.with_suffix(".json").write_bytes(content)
    with pytest.raises(EngineError, match="cannot be read"):
        read_engine(plan)


@pytest.mark.parametrize(
    "change", [{"plan_sha256": 7}, {"min_batch": -5}, {"max_batch": 0}, {"opt_batch": 999}, {"workspace_mib": -1}]
)
def test_a_sidecar_that_cannot_be_meant_is_refused(bundle: Bundle, change: dict[str, Any]) -> None:
    plan = write_engine(bundle.path, SPEC, PLAN, {}).plan
    sidecar = plan.with_suffix(".json")
    document = json.loads(sidecar.read_text(encoding="utf-8")) | change
    del document["checksum"]
    sidecar.write_text(json.dumps({**document, "checksum": checksum_of(document)}), encoding="utf-8")
    with pytest.raises(EngineError):
        read_engine(plan)


def test_the_hash_is_that_of_the_graph(bundle: Bundle) -> None:
    before = model_hash(bundle, "fp32")
    bundle.model("fp32").write_bytes(bundle.model("fp32").read_bytes() + b"\0")
    assert model_hash(bundle, "fp32") != before
