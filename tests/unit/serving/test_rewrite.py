"""Compaction and repair: nothing embedded again, all that is sound kept, and the old index in use until the end."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mimco_deploy.errors import IndexStoreError
from mimco_deploy.serving import rewrite
from mimco_deploy.serving.catalog import Catalog, Problem
from mimco_deploy.serving.generations import Generation, begin_generation, current_generation, writer_lock
from mimco_deploy.serving.index import Hit, ImageIndex
from mimco_deploy.serving.inspect import status_of, verify
from mimco_deploy.serving.rewrite import compact, repair
from mimco_deploy.serving.salvage import Salvage
from mimco_deploy.serving.tuning import Budget, tune_index
from mimco_deploy.serving.update import UpdateReport, update_index
from tests.helpers import DIM, CountingEncoder, Embeddings, gallery, noise, save

REPOSITORY = Path(__file__).parent.parent.parent.parent
PAGE = 4096
COUNT = 120
"""Pictures: enough for a catalogue with more than one page of everything."""
BUDGET = Budget(latency_ms=0, recall=0.1)
"""So few pictures have an approximation where it need not be good; `hits` asks for so many that it is exact."""
QUERIES: Embeddings = CountingEncoder().embed(np.stack([np.asarray(noise(seed)) for seed in (0, 3, 50, 119, 1000)]))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of two folders with copies, problems, dead embeddings and an approximation. Copy it."""
    folder = tmp_path_factory.mktemp("whole")
    gallery(folder / "photos" / ("long name " * 9), COUNT)
    gallery(folder / "more", 30, first=500)
    for number in range(20):
        shutil.copy(folder / "more/0500.png", folder / f"more/copy{number}.png")
        (folder / f"more/broken{number}.jpg").write_bytes(b"\xff\xd8 and no more")
    extra = gallery(folder / "photos", 15, first=700)
    update_index(folder / "index", [folder / "photos", folder / "more"], CountingEncoder())
    for path in extra:
        path.unlink()
    update_index(folder / "index", [], CountingEncoder())
    tune_index(folder / "index", BUDGET)
    assert current_generation(folder / "index").catalog.stat().st_size > 20 * PAGE
    return folder


@pytest.fixture
def index(whole: Path, tmp_path: Path) -> Path:
    """A copy of the index; its folders are those of all."""
    return Path(shutil.copytree(whole / "index", tmp_path / "index"))


def update(index: Path) -> UpdateReport:
    return update_index(index, [], CountingEncoder())


def hits(index: Path | ImageIndex, k: int = 200) -> list[list[Hit]]:
    found = (ImageIndex.open(index) if isinstance(index, Path) else index).search_many(QUERIES, k)
    # What is expected by chance is measured on a sample, which is another one when rows have other numbers.
    return [[replace(hit, expected_by_chance=None, confidence=None) for hit in one] for one in found]


def same(found: list[list[Hit]], expected: list[list[Hit]]) -> bool:
    """Whether hits are equal but for the last bits, which depend on what was embedded together."""
    for one, other in zip(found, expected, strict=True):
        if [(hit.path, hit.content) for hit in one] != [(hit.path, hit.content) for hit in other]:
            return False
        if not np.allclose([hit.score for hit in one], [hit.score for hit in other], rtol=0, atol=1e-6):
            return False
    return True


def problems(index: Path) -> list[Problem]:
    return ImageIndex.open(index).problems()


def stamps(index: Path) -> list[object]:
    with Catalog(current_generation(index).catalog) as catalog, catalog.snapshot():
        return [(file.root, file.path, file.stamp, file.sha256, file.facts) for file in catalog.listing()]


def folders(index: Path) -> list[str]:
    return sorted(path.name for path in index.iterdir() if path.is_dir())


def contents(index: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(index)): path.read_bytes()
        for path in sorted(index.rglob("*"))
        if path.is_file() and path.name != "lock"
    }


def check_that_it_is_whole(index: Path, whole: Path) -> None:
    """No damage, and the same as the sound one."""
    assert verify(index) == []
    assert same(hits(index), hits(whole / "index"))
    assert stamps(index) == stamps(whole / "index")
    assert problems(index) == problems(whole / "index")
    assert ImageIndex.open(index).roots() == ImageIndex.open(whole / "index").roots()


# ---------------------------------------------------------------------- compaction


def test_compaction_drops_what_is_dead_and_nothing_else(index: Path, whole: Path) -> None:
    before, catalog = hits(index), stamps(index)
    report = compact(index)
    assert (report.dropped_embeddings, report.lost_files, report.files) == (15, 0, COUNT + 50)
    assert report.bytes_after < report.bytes_before
    assert report.bytes_after == status_of(index).bytes
    assert (report.generation, folders(index)) == (2, ["000002"])
    counts = status_of(index).counts
    assert (counts.files, counts.contents, counts.dead, counts.problems) == (COUNT + 50, COUNT + 30, 0, 20)
    assert current_generation(index).vectors.stat().st_size == 16 + (COUNT + 30) * DIM * 4
    assert (hits(index), stamps(index)) == (before, catalog)
    check_that_it_is_whole(index, whole)


def test_after_a_compaction_nothing_is_embedded_again(index: Path) -> None:
    compact(index)
    report = update(index)
    assert (report.unchanged, report.added, report.changed, report.removed, report.embedded) == (COUNT + 50, 0, 0, 0, 0)


def test_a_compaction_keeps_what_made_the_index_and_its_budget(index: Path) -> None:
    before = status_of(index)
    compact(index)
    after = status_of(index)
    assert (after.fingerprint, after.embedding_dim) == (before.fingerprint, before.embedding_dim)
    assert after.made_by == before.made_by == {"provider": "NumPy", "precision": "fp32"}
    assert after.budget == before.budget == BUDGET
    assert after.search.kind.startswith("IVF")
    assert after.search.rows == COUNT + 30, "the approximation is of the rows that are left"


def test_a_dead_picture_that_comes_back_after_a_compaction_is_embedded(tmp_path: Path) -> None:
    paths = gallery(tmp_path / "photos", 6)
    encoder = CountingEncoder()
    update_index(tmp_path / "index", [tmp_path / "photos"], encoder)
    paths[2].rename(tmp_path / "aside.png")
    update_index(tmp_path / "index", [], encoder)
    assert compact(tmp_path / "index").dropped_embeddings == 1
    (tmp_path / "aside.png").rename(paths[2])
    assert update_index(tmp_path / "index", [], encoder).embedded == 1
    assert ImageIndex.open(tmp_path / "index").files() == paths
    assert verify(tmp_path / "index") == []


def test_an_index_with_nothing_left_is_compacted_to_nothing(tmp_path: Path) -> None:
    (path,) = gallery(tmp_path / "photos", 1)
    update_index(tmp_path / "index", [tmp_path / "photos"], CountingEncoder())
    path.unlink()
    update_index(tmp_path / "index", [], CountingEncoder())
    report = compact(tmp_path / "index")
    assert (report.files, report.dropped_embeddings) == (0, 1)
    assert verify(tmp_path / "index") == []
    save(path, 9)
    assert update_index(tmp_path / "index", [], CountingEncoder()).counts.files == 1


def test_a_compaction_of_nothing_dead_changes_no_hit(index: Path, whole: Path) -> None:
    compact(index)
    assert compact(index).dropped_embeddings == 0
    check_that_it_is_whole(index, whole)
    assert folders(index) == ["000003"]


def test_a_reader_that_is_open_goes_on(index: Path) -> None:
    opened = ImageIndex.open(index)
    expected = hits(opened)
    with Catalog(current_generation(index).catalog) as catalog, catalog.snapshot():
        compact(index)
        assert catalog.counts().dead == 15, "who reads the old one sees it to the end"
    assert hits(opened) == expected
    assert opened.counts().dead == 0, "the next call follows"


@pytest.mark.parametrize("rewritten", [compact, repair])
def test_without_an_index_none_is_made(tmp_path: Path, rewritten: Callable[[Path], object]) -> None:
    with pytest.raises(IndexStoreError, match=r"no index in .*; run: mimco index DIR"):
        rewritten(tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("rewritten", [compact, repair])
def test_a_second_writer_is_refused(index: Path, rewritten: Callable[[Path], object]) -> None:
    with writer_lock(index), pytest.raises(IndexStoreError, match="is being written by process"):
        rewritten(index)


def test_a_damaged_index_is_not_compacted(index: Path) -> None:
    damage_embeddings(current_generation(index), [7])
    before = contents(index)
    with pytest.raises(IndexStoreError, match=r"1 embeddings are damaged .*run: mimco index repair"):
        compact(index)
    assert contents(index) == before


# ---------------------------------------------------------------------- repair: embeddings


def embeddings_of(generation: Generation) -> Embeddings:
    rows = (generation.vectors.stat().st_size - 16) // (4 * DIM)
    return np.memmap(generation.vectors, np.float32, "r+", 16, (rows, DIM))


def damage_embeddings(generation: Generation, rows: list[int]) -> None:
    embeddings_of(generation)[rows, 3] += np.float32(1e-6)


def files_of(index: Path, rows: list[int]) -> int:
    with Catalog(current_generation(index).catalog) as catalog, catalog.snapshot():
        return sum(len(paths) for _, paths in catalog.files_of(rows).values())


def row_of(index: Path, name: str) -> int:
    with Catalog(current_generation(index).catalog) as catalog, catalog.snapshot():
        (row,) = {file.row for file in catalog.listing() if file.path.endswith(name)}
        return row


def check_that_an_update_mends(index: Path, whole: Path, embedded: int) -> None:
    assert verify(index) == []
    report = update(index)
    assert report.embedded == embedded
    check_that_it_is_whole(index, whole)
    again = update(index)
    assert (again.unchanged, again.embedded) == (COUNT + 50, 0)


def test_damaged_embeddings_are_dropped_with_their_files(index: Path, whole: Path) -> None:
    rows = sorted([row_of(index, "0000.png"), row_of(index, "more/0500.png"[5:]), row_of(index, "0007.png")])
    damage_embeddings(current_generation(index), rows)
    sound = {hit.path for hit in hits(index)[0]} - bad_paths(index, rows)
    report = repair(index)
    assert report.lost_files == 23, "with the twenty copies of one"
    assert (report.files, report.dropped_embeddings) == (COUNT + 50 - 23, 3)
    assert verify(index) == []
    assert {hit.path for hit in hits(index)[0]} == sound
    check_that_an_update_mends(index, whole, embedded=3)


def bad_paths(index: Path, rows: list[int]) -> set[Path]:
    with Catalog(current_generation(index).catalog) as catalog, catalog.snapshot():
        return {path for _, paths in catalog.files_of(rows).values() for path in paths}


@pytest.mark.parametrize("kept_bytes", [0, 7, 16, 17, 16 + 40 * DIM * 4, 16 + 100 * DIM * 4 + 3])
def test_a_store_that_was_cut_off_keeps_its_whole_rows(index: Path, whole: Path, kept_bytes: int) -> None:
    generation = current_generation(index)
    generation.vectors.write_bytes(generation.vectors.read_bytes()[:kept_bytes])
    assert verify(index) != []
    kept = max(0, kept_bytes - 16) // (4 * DIM)
    files = files_of(index, list(range(kept)))
    report = repair(index)
    assert (report.files, report.lost_files) == (files, COUNT + 50 - files)
    assert report.dropped_embeddings == COUNT + 45 - kept
    assert verify(index) == []
    update(index)
    check_that_it_is_whole(index, whole)


def test_a_store_that_is_gone_is_made_anew(index: Path, whole: Path) -> None:
    current_generation(index).vectors.unlink()
    assert repair(index).files == 0
    check_that_an_update_mends(index, whole, embedded=COUNT + 30)


@pytest.mark.parametrize("header", [b"\0" * 16, b"MIMCOVEC\x09\0\0\0\x10\0\0\0", b"MIMCOVEC\x01\0\0\0\x11\0\0\0"])
def test_a_destroyed_header_costs_no_embedding(index: Path, whole: Path, header: bytes) -> None:
    generation = current_generation(index)
    with generation.vectors.open("r+b") as file:
        file.write(header)
    with pytest.raises(IndexStoreError):
        hits(index)
    report = repair(index)
    assert (report.lost_files, report.dropped_embeddings) == (0, 0)
    check_that_it_is_whole(index, whole)
    assert update(index).embedded == 0


def test_rows_that_nobody_counts_are_left_out(index: Path, whole: Path) -> None:
    with current_generation(index).vectors.open("ab") as file:
        file.write(bytes(3 * DIM * 4 + 5))
    assert repair(index).lost_files == 0
    check_that_it_is_whole(index, whole)


def test_a_sound_index_is_repaired_to_itself(index: Path, whole: Path) -> None:
    report = repair(index)
    assert (report.lost_files, report.dropped_embeddings, report.files) == (0, 0, COUNT + 50)
    assert status_of(index).counts.dead == 15
    check_that_it_is_whole(index, whole)
    assert update(index).embedded == 0


@pytest.mark.parametrize("damage", ["cut", "gone", "other", "empty"])
def test_a_damaged_approximation_is_made_anew(index: Path, whole: Path, damage: str) -> None:
    generation = current_generation(index)
    (file,) = generation.path.glob("ann-*.faiss")
    match damage:
        case "cut":
            file.write_bytes(file.read_bytes()[:-1000])
        case "gone":
            file.unlink()
        case "other":
            file.write_bytes(b"no index of FAISS")
        case "empty":
            file.write_bytes(b"")
    assert len(verify(index)) == 1
    assert repair(index).lost_files == 0
    assert len(list(current_generation(index).path.glob("ann-*.faiss"))) == 1
    check_that_it_is_whole(index, whole)


# ---------------------------------------------------------------------- repair: pointer


@pytest.mark.parametrize(
    "pointer", [None, b"", b"{", b"[]", b'{"format_version": 1}', b"\xff\xfe", b'{"generation": 1}']
)
def test_a_pointer_that_is_lost_is_found_again(index: Path, whole: Path, pointer: bytes | None) -> None:
    path = index / "index.json"
    path.unlink() if pointer is None else path.write_bytes(pointer)
    with pytest.raises(IndexStoreError):
        hits(index)
    repair(index)
    check_that_it_is_whole(index, whole)
    assert update(index).embedded == 0


def test_a_pointer_to_nothing_is_set_right(index: Path, whole: Path) -> None:
    (index / "index.json").write_text('{"format_version": 1, "generation": 9}')
    repair(index)
    check_that_it_is_whole(index, whole)


def test_without_a_pointer_the_generation_that_holds_most_is_taken(index: Path, whole: Path) -> None:
    with writer_lock(index):
        begun = begin_generation(index, "f" * 64, DIM)
    assert begun.number == 2
    (index / "index.json").unlink()
    repair(index)
    check_that_it_is_whole(index, whole)
    assert folders(index) == ["000003"]


def test_a_folder_with_no_readable_catalogue_is_refused_as_it_is(index: Path) -> None:
    (index / "index.json").unlink()
    current = index / "000001" / "catalog.sqlite"
    current.write_bytes(b"no catalogue" * 1000)
    before = contents(index)
    with pytest.raises(IndexStoreError, match=r"holds no readable catalogue; .*run: mimco index reindex DIR"):
        repair(index)
    assert contents(index) == before


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "photos" / "0001" / "a.png", 1)
    with pytest.raises(IndexStoreError, match="holds no readable catalogue"):
        repair(tmp_path / "photos")


# ---------------------------------------------------------------------- repair: catalogue


def pages_of(catalog: Path) -> dict[str, list[int]]:
    """Pages by the table or index that they belong to, from 1."""
    with sqlite3.connect(catalog) as connection:
        try:
            rows = connection.execute("SELECT name, pageno FROM dbstat ORDER BY pageno").fetchall()
        except sqlite3.OperationalError as error:
            pytest.skip(f"this SQLite cannot tell pages apart ({error})")
    found: dict[str, list[int]] = {}
    for name, page in rows:
        found.setdefault(name, []).append(page)
    return found


def damage_page(catalog: Path, page: int, how: str, seed: int = 0) -> None:
    content = bytearray(catalog.read_bytes())
    start = (page - 1) * PAGE
    part = content[start : start + PAGE]
    rng = np.random.default_rng([page, seed])
    match how:
        case "zeros":
            part[:] = bytes(PAGE)
        case "noise":
            part[:] = rng.integers(0, 256, PAGE, np.uint8).tobytes()
        case "header":
            part[:16] = bytes(range(16))
        case "cells":
            part[16 : PAGE // 2] = rng.integers(0, 256, PAGE // 2 - 16, np.uint8).tobytes()
        case "flips":
            for at in rng.integers(8, PAGE, 40):
                part[at] ^= 1 << int(rng.integers(0, 8))
    content[start : start + PAGE] = part
    catalog.write_bytes(content)


TABLES = ["contents", "files", "problems", "files_by_row", "sqlite_autoindex_contents_1"]


@pytest.mark.parametrize("how", ["zeros", "noise", "header", "cells"])
@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("which", [0, 1, -1])
def test_a_damaged_page_of_the_catalogue_costs_what_stood_on_it(
    index: Path, whole: Path, table: str, which: int, how: str
) -> None:
    catalog = current_generation(index).catalog
    pages = pages_of(catalog)[table]
    if not -len(pages) <= which < len(pages):
        pytest.skip("the table has fewer pages")
    damage_page(catalog, pages[which], how)
    report = repair(index)
    assert verify(index) == []
    files = set(ImageIndex.open(index).files())
    assert report.files == len(files)
    assert report.lost_files == COUNT + 50 - report.files
    assert files <= set(ImageIndex.open(whole / "index").files())
    update(index)
    check_that_it_is_whole(index, whole)


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("seed", range(4))
def test_bits_that_flipped_in_the_catalogue_leave_an_index_that_an_update_completes(
    index: Path, whole: Path, table: str, seed: int
) -> None:
    # What a flipped bit makes of a name, a hash or a row cannot be told from what was there; but nothing fails of it.
    catalog = current_generation(index).catalog
    pages = pages_of(catalog)[table]
    damage_page(catalog, pages[seed % len(pages)], "flips", seed)
    repair(index)
    assert verify(index) == []
    hits(index)
    update(index)
    assert verify(index) == []
    assert ImageIndex.open(index).files() == ImageIndex.open(whole / "index").files()
    assert [problem.path for problem in problems(index)] == [problem.path for problem in problems(whole / "index")]


def test_most_of_a_catalogue_outlives_a_damaged_page(index: Path) -> None:
    catalog = current_generation(index).catalog
    pages = pages_of(catalog)["contents"]
    assert len(pages) >= 3, "the root and two with rows"
    damage_page(catalog, pages[-1], "zeros")
    report = repair(index)
    assert 0 < report.lost_files < COUNT
    assert report.files == COUNT + 50 - report.lost_files


@pytest.mark.parametrize("which", ["settings", "sqlite_schema"])
def test_what_names_the_tables_and_the_encoder_cannot_be_done_without(index: Path, which: str) -> None:
    catalog = current_generation(index).catalog
    damage_page(catalog, pages_of(catalog)[which][0], "zeros")
    before = contents(index)
    with pytest.raises(IndexStoreError):
        repair(index)
    assert contents(index) == before


@pytest.mark.parametrize("how", ["zeros", "noise", "header", "cells"])
@pytest.mark.parametrize("which", ["roots", "sqlite_autoindex_roots_1"])
def test_folders_stand_in_the_table_and_in_its_index(index: Path, whole: Path, which: str, how: str) -> None:
    catalog = current_generation(index).catalog
    damage_page(catalog, pages_of(catalog)[which][0], how)
    assert repair(index).lost_files == 0
    check_that_it_is_whole(index, whole)


def test_where_both_are_lost_it_says_so_and_naming_the_folders_again_mends(
    index: Path, whole: Path, caplog: pytest.LogCaptureFixture
) -> None:
    catalog = current_generation(index).catalog
    pages = pages_of(catalog)
    for which in ("roots", "sqlite_autoindex_roots_1"):
        damage_page(catalog, pages[which][0], "zeros")
    report = repair(index)
    assert (report.files, report.lost_files) == (0, COUNT + 50)
    assert f"the folders of {COUNT + 50} pictures are lost: name them again, mimco index DIR" in caplog.messages
    assert verify(index) == []
    update_index(index, [whole / "photos", whole / "more"], CountingEncoder())
    check_that_it_is_whole(index, whole)


def test_contents_that_are_missing_are_closed_up(index: Path, whole: Path) -> None:
    with sqlite3.connect(current_generation(index).catalog) as connection:
        connection.execute("DELETE FROM contents WHERE row IN (5, 60, 61)")
    connection.close()
    assert len(verify(index)) > 1
    repair(index)
    assert verify(index) == []
    update(index)
    check_that_it_is_whole(index, whole)


# ---------------------------------------------------------------------- crashes


@pytest.mark.parametrize("rewritten", [compact, repair])
@pytest.mark.parametrize(
    "step", ["stage_generation", "create_vectors", "VectorWriter.append", "Salvage.copy_to", "promote", "keep_tuned"]
)
def test_a_rewrite_that_fails_leaves_the_old_index_in_use(
    index: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, rewritten: Callable[[Path], object], step: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise IndexStoreError("no room")

    opened = ImageIndex.open(index)
    with monkeypatch.context() as patch:
        patch.setattr(f"{rewrite.__name__}.{step}", fail)
        with pytest.raises(IndexStoreError, match="no room"):
            rewritten(index)
    assert current_generation(index).number == 1
    assert status_of(index).counts.dead == 15, "it is the old one"
    check_that_it_is_whole(index, whole)
    assert hits(opened) == hits(whole / "index")
    assert update(index).unchanged == COUNT + 50
    rewritten(index)
    check_that_it_is_whole(index, whole)
    assert len(folders(index)) == 1, "nothing is left of the one that failed"


CRASH = """
import os, sys
from pathlib import Path
from mimco_deploy.serving import generations, rewrite
from mimco_deploy.serving.salvage import Salvage

index, name, step, when = sys.argv[1:]
owner = {"copy_to": Salvage, "write_bytes": generations, "sweep": generations}.get(step, rewrite)
real = getattr(owner, step)
def crash(*arguments, **options):
    if when == "after":
        real(*arguments, **options)
    os._exit(77)
setattr(owner, step, crash)
getattr(rewrite, name)(Path(index))
"""


@pytest.mark.parametrize("name", ["compact", "repair"])
@pytest.mark.parametrize(
    ("step", "when", "number"),
    [
        ("stage_generation", "after", 1),
        ("copy_to", "before", 1),
        ("copy_to", "after", 1),
        ("promote", "before", 1),
        ("promote", "after", 1),
        ("keep_tuned", "after", 1),
        ("write_bytes", "before", 1),
        ("write_bytes", "after", 2),
        ("sweep", "after", 2),
    ],
)
def test_a_rewrite_that_is_killed_leaves_one_sound_index(
    index: Path, whole: Path, name: str, step: str, when: str, number: int
) -> None:
    command = [sys.executable, "-c", CRASH, str(index), name, step, when]
    run = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (77, "")
    assert current_generation(index).number == number
    check_that_it_is_whole(index, whole)
    report = update(index)
    assert (report.unchanged, report.embedded) == (COUNT + 50, 0)
    assert not (index / ".staging").exists()
    compact(index)
    check_that_it_is_whole(index, whole)
    assert len(folders(index)) == 1


def test_a_full_disk_in_a_repair_loses_nothing(index: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damage_embeddings(current_generation(index), [3])
    before = contents(index)

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(IndexStoreError, match="No space left on device"):
            repair(index)
    shutil.rmtree(index / ".staging")
    assert contents(index) == before
    repair(index)
    check_that_an_update_mends(index, whole, embedded=1)


def test_salvage_reads_what_a_sound_catalogue_holds(index: Path) -> None:
    generation = current_generation(index)
    with Salvage(generation.catalog) as salvage, Catalog(generation.catalog) as catalog, catalog.snapshot():
        assert list(salvage.crc32s()) == list(catalog.crc32s())
        assert salvage.embedding_dim == catalog.embedding_dim
