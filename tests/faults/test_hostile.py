"""Odd, broken and hostile files among good pictures: each is indexed or listed with its reason, none stops the run."""

from __future__ import annotations

import csv
import shutil
from collections import Counter
from pathlib import Path

import pytest

from mimco_deploy.images import FORMATS, IMAGE_SUFFIXES, MAX_PIXELS, MAX_SIDE_PX
from mimco_deploy.serving.guarded import DecodePool, Limits
from mimco_deploy.serving.index import ImageIndex
from mimco_deploy.serving.inspect import verify
from mimco_deploy.serving.query import search_image
from mimco_deploy.serving.update import update_index
from tests.helpers import CountingEncoder, gallery

GOOD = 60
PROBLEMS = {"empty", "too_large", "unsupported", "truncated", "corrupt"}
READ = {*FORMATS, "MPO"}  # what some phones write; opens as JPEG


@pytest.fixture
def hostile(shared_data: Path) -> Path:
    folder = shared_data / "hostile"
    if not folder.is_dir():
        pytest.skip(f"no hostile pictures in {shared_data}")
    return folder


def expected(row: dict[str, str]) -> set[str]:
    """What may become of a file, by what Pillow alone made of it."""
    outcome, width, height = row["pillow13_outcome"], int(row["w"]), int(row["h"])
    if outcome == "open:UnidentifiedImageError":
        return PROBLEMS - {"too_large"}
    if outcome == "open:DecompressionBombError":
        return {"too_large", "unsupported"}
    if outcome != "ok":
        return PROBLEMS | {"picture"}  # one may be asked for no more than it has
    if row["format"] not in READ:
        return {"unsupported"}
    return {"too_large"} if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE_PX else {"picture"}


@pytest.mark.timeout(300)
def test_good_pictures_among_hostile_files_are_all_indexed(
    hostile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = tmp_path / "photos"
    good = gallery(photos / "good", GOOD // 2) + gallery(photos / "zzz good", GOOD // 2, first=GOOD // 2)
    with (hostile / "MANIFEST.tsv").open(newline="", encoding="utf-8") as file:
        manifest = {row["path"]: row for row in csv.DictReader(file, delimiter="\t")}
    copies: dict[Path, str] = {}
    for number, name in enumerate(sorted(manifest)):
        suffix = Path(name).suffix.lower()
        copy = photos / "hostile" / f"{number:04d}{suffix if suffix in IMAGE_SUFFIXES else '.jpg'}"
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(hostile / name, copy)
        copies[copy] = name
    assert len(copies) > 700

    encoder = CountingEncoder()
    report = update_index(tmp_path / "index", [photos], encoder, limits=Limits(seconds=30))
    index = ImageIndex.open(tmp_path / "index")
    outcomes = dict.fromkeys(index.files(), "picture") | {item.path: item.problem for item in report.problems}
    assert set(outcomes) == {*good, *copies}, "every file is one or the other"
    assert report.counts.files + report.counts.problems == len(outcomes)
    assert [path for path in good if outcomes[path] != "picture"] == []
    wrong = {name: outcomes[copy] for copy, name in copies.items() if outcomes[copy] not in expected(manifest[name])}
    assert wrong == {}
    assert set(Counter(outcomes.values())) == PROBLEMS | {"picture"}, "nothing hung, crashed or could not be read"
    assert all(item.found.startswith(str(item.path)) and "\n" not in item.found for item in report.problems)
    assert [search_image(index, encoder, path, 1)[0].path for path in good] == good
    assert verify(tmp_path / "index") == []

    monkeypatch.setattr(DecodePool, "read", lambda *_: pytest.fail("it was read again"))
    again = update_index(tmp_path / "index", [], encoder)
    assert (again.added, again.changed, again.removed, again.embedded) == (0, 0, 0, 0)
    assert (again.unchanged, again.problems) == (report.counts.files, report.problems)
