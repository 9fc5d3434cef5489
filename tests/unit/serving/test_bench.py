"""The bench: variants in processes of their own, rows that say what was measured, and the choice that follows."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from mimco_deploy.bundle import MODEL_FILES, Precision, read_bundle, write_contract
from mimco_deploy.bundle_archive import pack
from mimco_deploy.cli import main
from mimco_deploy.errors import BundleError
from mimco_deploy.serving.agreement import Embeddings
from mimco_deploy.serving.bench import Embed, Row, Variant, bundle_variants, measure, pick
from mimco_deploy.serving.encoders import load_encoder
from mimco_deploy.serving.sample import Pixels
from tests.helpers import gallery, golden_images, tiny_bundle, tiny_embed, tiny_graph, tiny_spec


def load_slow(seed: int, seconds: float) -> tuple[Embed, str]:
    """Runs in the process of a variant."""

    def embed(images: Pixels) -> Embeddings:
        time.sleep(seconds)
        return tiny_embed(images, seed)

    return embed, f"process {os.getpid()}"


def load_dying() -> tuple[Embed, str]:
    os.abort()


def variant(seed: int = 0, seconds: float = 0.0, precision: Precision = "fp32") -> Variant:
    return Variant("stand-in", precision, "cpu", load_slow, (seed, seconds), 1.0)


def row(precision: Precision, images_per_s: float, **changes: object) -> Row:
    plain = Row("x", precision, "cpu", "p", 8, images_per_s, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0)
    return dataclasses.replace(plain, **changes)  # type: ignore[arg-type]


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """fp32, and an int8 that is the same graph."""
    path = tiny_bundle(tmp_path / "encoder")
    (path / MODEL_FILES["int8"]).write_bytes(tiny_graph().SerializeToString())
    write_contract(path, tiny_spec())
    return path


def test_rows_hold_what_was_measured() -> None:
    pictures = golden_images(40)
    rows, failures = measure([variant(), variant(seconds=0.02, precision="int8")], pictures, [1, 4])
    assert failures == []
    assert [(one.precision, one.batch_size) for one in rows] == [("fp32", 1), ("fp32", 4), ("int8", 1), ("int8", 4)]
    slow = rows[3]
    assert 20.0 <= slow.p50_ms <= slow.p99_ms
    assert slow.images_per_s == pytest.approx(4 / slow.p50_ms * 1e3)
    assert slow.startup_s > 0.02
    assert (slow.overlap, slow.recall_loss, slow.breaches) == (1.0, 0.0, [])
    assert rows[0].provider != slow.provider  # another process


def test_what_loses_neighbours_is_told_with_the_numbers() -> None:
    rows, _ = measure([variant(), variant(seed=1, precision="int8")], golden_images(60), [1])
    assert rows[0].breaches == []
    assert any(breach.startswith("top-10 overlap") for breach in rows[1].breaches)
    assert (rows[1].recall_loss or 0.0) > 0.1


def test_a_variant_that_dies_costs_its_rows_alone() -> None:
    dying = Variant("dying", "fp16", "cpu", load_dying, (), 1.0)
    rows, failures = measure([variant(), dying, variant(precision="int8")], golden_images(30), [1])
    assert [one.precision for one in rows] == ["fp32", "int8"]
    assert [(one.backend, one.precision) for one in failures] == [("dying", "fp16")]


def test_without_its_reference_nothing_passes() -> None:
    dying = Variant("dying", "fp32", "cpu", load_dying, (), 1.0)
    rows, _ = measure([dying, variant(precision="int8")], golden_images(30), [1])
    assert rows[0].breaches == ["fp32 did not run: nothing to compare with"]


def test_a_bundles_variants_are_its_precisions(bundle: Path) -> None:
    (bundle / MODEL_FILES["bf16"]).write_bytes(b"not for a CPU")
    write_contract(bundle, tiny_spec())
    found = bundle_variants(bundle, read_bundle(bundle), ["cpu", "cuda"])
    assert [(one.device, one.precision) for one in found] == [
        *(("cpu", "fp32"), ("cpu", "int8"), ("cuda", "fp32"), ("cuda", "bf16"), ("cuda", "int8")),
    ]


def test_the_fastest_that_passes_is_picked_for_its_device(bundle: Path) -> None:
    rows = [
        row("fp32", 10.0),
        row("int8", 30.0),
        row("fp16", 50.0, breaches=["cosine 0.5"]),
        row("fp32", 90.0, in_bundle=False),
        row("fp32", 70.0, device="cuda"),
        row("int8", 60.0, device="cuda"),
    ]
    assert pick(bundle, rows) == {"cpu": "int8", "cuda": "fp32"}
    assert load_encoder(bundle, "cpu").precision == "int8"
    assert pick(bundle, [row("fp32", 1.0)]) == {"cpu": "fp32", "cuda": "fp32"}  # another device's choice stays


def test_nothing_is_picked_where_nothing_passes_or_nothing_can_be_written(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"nothing in .* passed"):
        pick(bundle, [row("fp32", 1.0, breaches=["cosine"])])
    pack(bundle, tmp_path / "encoder.zip")
    with pytest.raises(BundleError, match="is an archive"):
        pick(tmp_path / "encoder.zip", [row("fp32", 1.0)])


def test_the_command_measures_and_picks(bundle: Path, tmp_path: Path) -> None:
    gallery(tmp_path / "photos", 30)
    options = ["--encoder", str(bundle), "--check", str(tmp_path / "photos"), "--batch-size", "2", "--device", "cpu"]
    done = CliRunner().invoke(main, ["--workspace", str(tmp_path / "ws"), "bench", *options, "--pick", "--json"])
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert (document["pictures"], document["pictures_from"]) == (30, "folder")
    assert [(one["precision"], one["batch_size"]) for one in document["rows"]] == [("fp32", 2), ("int8", 2)]
    fastest = max(document["rows"], key=lambda one: float(one["images_per_s"]))
    assert document["defaults"] == {"cpu": fastest["precision"]}
    assert document["versions"]["numpy"] == np.__version__
    assert read_bundle(bundle).precision_for("cpu") == fastest["precision"]


def test_picking_takes_no_graph_into_the_contract(bundle: Path) -> None:
    (bundle / MODEL_FILES["fp16"]).write_bytes(tiny_graph(seed=3).SerializeToString())
    pick(bundle, [row("int8", 2.0)])
    assert read_bundle(bundle).precisions == ("fp32", "int8")


def test_nothing_that_ran_is_an_error(bundle: Path, tmp_path: Path) -> None:
    options = ["--encoder", str(bundle), "--device", "cuda", "--batch-size", "1"]
    done = CliRunner().invoke(main, ["--workspace", str(tmp_path / "ws"), "bench", *options])
    assert done.exit_code == 1
    assert done.output.count("run: mimco doctor") == 1


def test_too_few_pictures_to_pick_by_are_told(bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    gallery(tmp_path / "photos", 5)
    options = ["--encoder", str(bundle), "--check", str(tmp_path / "photos"), "--batch-size", "1", "--device", "cpu"]
    done = CliRunner().invoke(main, ["--workspace", str(tmp_path / "ws"), "bench", *options, "--pick"])
    assert done.exit_code == 0, done.output
    assert "5 pictures are too few to compare neighbours, expected 21: only fp32 is picked" in caplog.text
    assert "defaults: cpu fp32" in done.stdout
