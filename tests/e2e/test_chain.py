"""The promise of the project: pictures go in, neighbours come out, by the commands of the README."""

from __future__ import annotations

import json
import re
from pathlib import Path

from PIL import Image

from tests.e2e.commands import Chain, mimco


def test_every_step_leaves_its_artefact(chain: Chain) -> None:
    stage1, stage2, export, index = (step.json() for step in chain.steps)
    workspace = chain.home / ".mimco"
    assert Path(stage1["checkpoint"]) == workspace / "stage1/last"
    assert stage1["step"] == stage2["step"] == 6
    (proof,) = export["artefacts"]
    assert (proof["precision"], export["refused"]) == ("fp32", [])
    assert {batch["batch_size"] for batch in proof["batches"]} == {1, 2, 5}
    assert (index["added"], index["embedded"], index["problems"]) == (len(chain.pictures), len(chain.pictures), [])
    spec = json.loads((workspace / "encoder/encoder.json").read_text(encoding="utf-8"))
    assert spec["licence"] == "CC0-1.0"
    log = (workspace / "stage2/log.jsonl").read_text(encoding="utf-8").splitlines()
    assert {"step", "loss", "patch_loss", "image_loss", "lr", "images_per_s", "waiting"} <= set(json.loads(log[-1]))
    assert list((workspace / "stage1").glob("events.*"))


def test_a_swin_goes_the_same_way_by_moby_and_mimco(chain: Chain, tmp_path: Path) -> None:
    tiny = ("image_size_px=32", "patch_size_px=2", "embed_dim=8", "depth=1,2", "num_heads=2,2", "window=4")
    small = ("--epochs", "1", "--batch-size", "24", "--set", "data.workers=0")
    backbone = [word for setting in tiny for word in ("--set", f"backbone.{setting}")]
    images = chain.home / "images"
    mimco(tmp_path, "train", "stage1", "--data", images, "--preset", "swin_tiny", *small, *backbone)
    fit = ("--set", "run.accumulate=1", "--set", "mask.mask_patch_size_px=8")
    mimco(tmp_path, "train", "stage2", *small, *fit)
    assert mimco(tmp_path, "export", "--format", "onnx", "--json").json()["refused"] == []
    mimco(tmp_path, "index", images)
    wanted = chain.pictures[5]
    assert mimco(tmp_path, "search", wanted, "-k", "1", "--json").json()["hits"][0]["path"] == str(wanted)


def test_a_teachers_file_that_does_not_fit_leaves_the_run_that_is_there(chain: Chain, tmp_path: Path) -> None:
    (tmp_path / "teacher.pth").write_bytes(b"no weights")
    before = (chain.home / ".mimco/stage2/last/config.json").read_bytes()
    done = mimco(
        chain.home, "train", "stage2", "--fresh", "--teacher", tmp_path / "teacher.pth", "--data", "images", code=1
    )
    assert done.err.count("\n") == 1
    assert "teacher.pth cannot be read" in done.err
    assert (chain.home / ".mimco/stage2/last/config.json").read_bytes() == before


def test_an_indexed_picture_finds_itself_first(chain: Chain) -> None:
    wanted = chain.pictures[7]
    answer = mimco(chain.home, "search", wanted, "-k", "3", "--json").json()
    assert len(answer["hits"]) == 3
    assert Path(answer["hits"][0]["path"]) == wanted
    assert answer["hits"][0]["score"] > 0.9999
    scores = [hit["score"] for hit in answer["hits"]]
    assert scores == sorted(scores, reverse=True)


def test_search_prints_ranked_lines_on_stdout_and_writes_a_self_contained_sheet(chain: Chain, query: Path) -> None:
    sheet = query.with_name("out.html")
    done = mimco(chain.home, "search", query, "-k", "4", "--sheet", sheet)
    rows = [line.split() for line in done.out.splitlines()]
    assert [row[0] for row in rows] == ["1", "2", "3", "4"]
    assert all((chain.home / row[-1]).is_file() for row in rows)
    page = sheet.read_text(encoding="utf-8")
    assert page.count('src="data:image/jpeg;base64,') == 5
    assert not re.findall(r"""<link|<script|@import|src=(?!["']data:)""", page)


def test_a_second_index_reads_nothing_and_follows_changes(chain: Chain, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for number, path in enumerate(chain.pictures[:5]):
        (images / f"{number}.jpg").write_bytes(path.read_bytes())
    use = ("--workspace", tmp_path / "w")
    (tmp_path / "w").mkdir()
    (tmp_path / "w/encoder").symlink_to(chain.home / ".mimco/encoder")
    assert mimco(tmp_path, *use, "index", "./images", "--json").json()["embedded"] == 5
    again = mimco(tmp_path, *use, "index", "./images", "--json").json()
    assert (again["embedded"], again["unchanged"]) == (0, 5)
    (images / "0.jpg").unlink()
    (images / "1.jpg").rename(images / "renamed.jpg")
    Image.new("RGB", (50, 40), "red").save(images / "new.png")
    (images / "broken.jpg").write_bytes(b"no picture")
    report = mimco(tmp_path, *use, "index", "--json").json()
    assert (report["embedded"], report["reused"], report["counts"]["files"]) == (1, 1, 5)
    assert [Path(problem["path"]).name for problem in report["problems"]] == ["broken.jpg"]


def test_another_encoder_is_refused_until_the_index_is_rebuilt(chain: Chain, query: Path, tmp_path: Path) -> None:
    use = ("--workspace", tmp_path / "w")
    images = chain.pictures[0].parent
    (tmp_path / "w").mkdir()
    (tmp_path / "w/encoder").symlink_to(chain.home / ".mimco/encoder")
    mimco(tmp_path, *use, "index", images)
    (tmp_path / "w/encoder").unlink()
    teacher = chain.home / ".mimco/stage1/last"
    mimco(tmp_path, *use, "export", "--format", "onnx", "--checkpoint", teacher)
    for command in (("search", query), ("index", images)):
        refused = mimco(tmp_path, *use, *command, code=1)
        assert refused.err.startswith("Error: ")
        assert "mimco index reindex" in refused.err
        assert len(refused.err.splitlines()) == 1
    mimco(tmp_path, *use, "index", "reindex")
    assert len(mimco(tmp_path, *use, "search", query, "--json").json()["hits"]) == 6


def test_the_query_is_turned_upright_like_the_gallery(chain: Chain, tmp_path: Path) -> None:
    wanted = chain.pictures[20]
    with Image.open(wanted) as picture:
        sideways = picture.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn a quarter clockwise to see it upright"
    turned = tmp_path / "turned.png"
    sideways.save(turned, exif=exif)
    hit = mimco(chain.home, "search", turned, "-k", "1", "--json").json()["hits"][0]
    assert Path(hit["path"]) == wanted
    assert hit["score"] > 0.9999
