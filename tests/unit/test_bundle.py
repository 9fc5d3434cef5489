"""The contract of a bundle: what is written is read, and what is not whole is refused by name."""

from __future__ import annotations

import io
import itertools
import json
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mimco_deploy.bundle import (
    FORMAT_VERSION,
    GOLDEN_FILE,
    MODEL_FILES,
    SPEC_FILE,
    TOLERANCES,
    checksum_of,
    read_bundle,
    write_contract,
)
from mimco_deploy.errors import BundleError
from tests.helpers import tiny_bundle, tiny_spec


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_bundle(tmp_path / "encoder")


def test_what_was_written_is_read(folder: Path) -> None:
    (folder / MODEL_FILES["int8"]).write_bytes(b"a graph")
    write_contract(folder, tiny_spec(), {"cpu": "int8"})
    bundle = read_bundle(folder)
    assert bundle.spec == tiny_spec()
    assert bundle.precisions == ("fp32", "int8")
    assert bundle.model("int8") == folder / "model.int8.onnx"
    assert (bundle.precision_for("cpu"), bundle.precision_for("cuda")) == ("int8", "fp32")


def test_every_byte_of_the_contract_counts(folder: Path) -> None:
    path = folder / SPEC_FILE
    whole = path.read_bytes()
    rng = random.Random(0)
    for _ in range(300):
        damaged = bytearray(whole)
        place = rng.randrange(len(whole))
        damaged[place] ^= 1 << rng.randrange(7)
        path.write_bytes(damaged)
        try:
            assert json.loads(damaged) == json.loads(whole)  # another kind of space between two tokens
        except (ValueError, AssertionError):
            with pytest.raises(BundleError):
                read_bundle(folder)


def test_a_contract_cut_anywhere_is_refused(folder: Path) -> None:
    path = folder / SPEC_FILE
    whole = path.read_bytes()
    for length in range(0, len(whole) - 2, 17):
        path.write_bytes(whole[:length])
        with pytest.raises(BundleError, match="cannot be read"):
            read_bundle(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda document: document.pop("fingerprint"),
        lambda document: document.update(more="than the format has"),
        lambda document: document.update(image_size_px="32"),
        lambda document: document.update(image_size_px=-1),
        lambda document: document.update(image_size_px=0),
        lambda document: document.update(embedding_dim=0),
        lambda document: document.update(crop_share=1.5),
        lambda document: document.update(crop_share=1e-320),
        lambda document: document.update(crop_share=1 / 17),
        lambda document: document.update(interpolation="nearest"),
        lambda document: document.update(licence=None),
        lambda document: document.update(files=[]),
        lambda document: document.update(defaults=None),
        lambda document: document.update(defaults={"cpu": "fp8"}),
        lambda document: document.update(defaults={"cpu": "int8"}),
        lambda document: document.update(patch_grid=True),
        lambda document: document.update(crop_share=True),
        lambda document: document.update(fingerprint="\ud800"),
        lambda document: document["files"].update({"../secret": "0"}),
        lambda document: document["files"].pop("model.onnx"),
        lambda document: document["files"].update({"golden.npz": 7}),
    ],
)
def test_a_contract_of_another_shape_is_refused_though_its_checksum_fits(
    folder: Path, change: Callable[[dict[str, Any]], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mimco_deploy.bundle.checksum_of", lambda _: "the same")
    document = json.loads((folder / SPEC_FILE).read_text(encoding="utf-8"))
    change(document)
    (folder / SPEC_FILE).write_text(json.dumps({**document, "checksum": "the same"}), encoding="utf-8")
    with pytest.raises(BundleError):
        read_bundle(folder)


@pytest.mark.parametrize("content", [b"[]", b"null", b"7", b"{}", b"[" * 100_000, b"\xff\xfe", b" " * (2 << 20)])
def test_a_contract_that_is_none_is_refused(folder: Path, content: bytes) -> None:
    (folder / SPEC_FILE).write_bytes(content)
    with pytest.raises(BundleError, match="cannot be read"):
        read_bundle(folder)


def test_a_bundle_from_before_crop_modes_crops_the_centre(folder: Path) -> None:
    document = json.loads((folder / SPEC_FILE).read_text(encoding="utf-8"))
    assert document.pop("crop_mode") == "center"
    document = {**document, "format_version": 2}
    del document["checksum"]
    (folder / SPEC_FILE).write_text(json.dumps({**document, "checksum": checksum_of(document)}), encoding="utf-8")
    spec = read_bundle(folder).spec
    assert spec.crop_mode == "center"
    write_contract(folder, spec)
    assert json.loads((folder / SPEC_FILE).read_text(encoding="utf-8"))["format_version"] == FORMAT_VERSION
    assert read_bundle(folder).spec == spec


def test_another_format_version_is_named(folder: Path) -> None:
    document = json.loads((folder / SPEC_FILE).read_text(encoding="utf-8"))
    (folder / SPEC_FILE).write_text(json.dumps({**document, "format_version": 1}), encoding="utf-8")
    with pytest.raises(BundleError, match=f"format version 1; expected {FORMAT_VERSION}; run: mimco export"):
        read_bundle(folder)


def test_golden_pictures_that_unpack_to_too_much_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mimco_deploy.bundle._MAX_GOLDEN_BYTES", 1 << 16)
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("images.npy", bytes(1 << 20))
    (folder / GOLDEN_FILE).write_bytes(content.getvalue())
    write_contract(folder, tiny_spec())
    with pytest.raises(BundleError, match="more than 65,536 bytes"):
        read_bundle(folder)


@pytest.mark.parametrize("content", [b"", b"no zip", b"PK\x05\x06" + bytes(18)])
def test_golden_pictures_that_are_none_are_refused(folder: Path, content: bytes) -> None:
    (folder / GOLDEN_FILE).write_bytes(content)
    write_contract(folder, tiny_spec())
    with pytest.raises(BundleError, match=f"{GOLDEN_FILE} cannot be read"):
        read_bundle(folder)


@pytest.mark.parametrize("name", ["images", "embeddings"])
def test_golden_members_that_are_no_arrays_are_refused(folder: Path, name: str) -> None:
    arrays = dict(np.load(folder / GOLDEN_FILE))
    del arrays[name]
    np.savez(folder / GOLDEN_FILE, **arrays)
    with zipfile.ZipFile(folder / GOLDEN_FILE, "a") as archive:
        archive.writestr(name, b"no array")
    write_contract(folder, tiny_spec())
    with pytest.raises(BundleError, match=rf"holds golden images .* \|S8 \[1\]|{name} \|S8 \[1\]"):
        read_bundle(folder)


def test_a_coarser_precision_is_allowed_more() -> None:
    order = [TOLERANCES[precision] for precision in ("fp32", "fp16", "bf16", "int8")]
    for finer, coarser in itertools.pairwise(order):
        assert finer.max_abs < coarser.max_abs
        assert finer.min_cosine > coarser.min_cosine
        assert finer.min_overlap >= coarser.min_overlap


def test_a_key_that_comes_twice_is_refused(folder: Path) -> None:
    text = (folder / SPEC_FILE).read_text(encoding="utf-8")
    (folder / SPEC_FILE).write_text(text.replace('"licence":', '"licence": "MIT", "licence":'), encoding="utf-8")
    with pytest.raises(BundleError, match="a key comes twice"):
        read_bundle(folder)
