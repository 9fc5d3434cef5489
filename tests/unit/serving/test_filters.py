from __future__ import annotations

import csv
import os
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from mimco_deploy.errors import ConfigError
from mimco_deploy.serving.filters import COLUMNS, Filter, FilteredFiles
from mimco_deploy.serving.index import ImageIndex
from mimco_deploy.serving.update import update_index
from tests.helpers import CountingEncoder, Embeddings, noise

SIZES = [(40, 30), (30, 40), (32, 32), (64, 32)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pictures of known name, size, date and camera, and an index over them."""
    folder = tmp_path_factory.mktemp("filters").resolve()
    for number in range(12):
        exif = Image.Exif()
        if number % 3 == 0:
            exif[0x010F], exif[0x0110] = "Canon", "Canon EOS 5D"
            exif.get_ifd(0x8769)[0x9003] = f"2024:0{1 + number % 9}:15 10:00:00"
        path = (
            folder
            / "photos"
            / ("holidays" if number < 6 else "work")
            / f"img_{number:02d}.{('jpg', 'PNG')[number % 2]}"
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        noise(number).resize(SIZES[number % 4]).save(path, exif=exif)
        day = datetime(2020 + number, 6, 1, tzinfo=UTC).timestamp()
        os.utime(path, (day, day))
    update_index(folder / "index", [folder / "photos"], CountingEncoder())
    return folder


@pytest.fixture(scope="module")
def query() -> Embeddings:
    (embedding,) = CountingEncoder().embed(np.stack([np.asarray(noise(0))]))
    return np.asarray(embedding)


def found(folder: Path, query: Embeddings, **condition: object) -> list[int]:
    """Numbers of the pictures that a search under a condition returns."""
    with ImageIndex.open(folder / "index") as index:
        hits = index.search(query, 100, Filter(**condition))  # type: ignore[arg-type]
    return sorted(int(hit.path.stem.removeprefix("img_")) for hit in hits)


@pytest.mark.parametrize(
    ("where", "holds"),
    [
        ("folder glob '*/holidays'", lambda n: n < 6),
        ("path like '%/WORK/%'", lambda n: n >= 6),
        ("name = 'img_03.PNG'", lambda n: n == 3),
        ("suffix = '.png'", lambda n: n % 2 == 1),
        ("orientation = 'portrait'", lambda n: n % 4 == 1),
        ("orientation = 'square'", lambda n: n % 4 == 2),
        ("width_px >= 40 and height_px < 32", lambda n: n % 4 == 0),
        ("camera like 'canon%'", lambda n: n % 3 == 0),
        ("camera = 'Canon EOS 5D'", lambda n: n % 3 == 0),
        ("taken is null", lambda n: n % 3),
        ("taken >= '2024-04' and taken < '2024-05'", lambda n: n == 3),
        ("modified < '2023'", lambda n: n < 3),
        ("date >= '2026'", lambda n: n > 5 and n % 3),
        ("bytes > 0", lambda _: True),
        ("not (width_px = 64) or false -- a remark", lambda n: n % 4 != 3),
        ("1 = 0", lambda _: False),
        ("", lambda _: True),
    ],
)
def test_a_condition_keeps_what_it_says(
    folder: Path, query: Embeddings, where: str, holds: Callable[[int], object]
) -> None:
    assert found(folder, query, where=where) == [number for number in range(12) if holds(number)]


def test_a_folder_keeps_what_lies_below_it(folder: Path, query: Embeddings) -> None:
    assert found(folder, query, root=folder / "photos/work") == list(range(6, 12))
    assert found(folder, query, root=folder / "photos") == list(range(12))
    assert found(folder, query, root=folder / "photos" / "work" / ".." / "holidays") == list(range(6))
    (folder / "link").symlink_to(folder / "photos/holidays")
    assert found(folder, query, root=folder / "link") == list(range(6))
    with pytest.raises(ConfigError, match="wor holds no indexed picture"):
        found(folder, query, root=folder / "photos/wor")
    assert found(folder, query, root=folder / "photos/work", where="suffix = '.jpg'") == [6, 8, 10]


def test_every_column_that_is_documented_can_be_named(folder: Path, query: Embeddings) -> None:
    for name in COLUMNS:
        found(folder, query, where=f"{name} is null or {name} is not null")


def test_few_that_are_allowed_are_found_although_many_others_are_nearer(folder: Path, query: Embeddings) -> None:
    with ImageIndex.open(folder / "index") as index:
        all_hits = index.search(query, 12)
        last = all_hits[-1]
        (hit,) = index.search(query, 1, Filter(f"name = '{last.path.name}'"))
    assert (hit.path, hit.score, hit.content) == (last.path, last.score, last.content)


@pytest.mark.parametrize(
    "where",
    [
        "nope = 1",
        "\"nope\" = 'x'",
        "'it''s' <> '' and \"no\npe\" is null",
        "name = 'open",
        "1) or (1",
        "1 then 1 end or case when 1",
        "1) then 1 end or case when (1",
        "1, 2",
        "1; drop table files",
        "load_extension('x')",
        "randomblob(100000000) is not null",
        "(select count(*) from sqlite_master) > 0",
        "exists (with recursive t(x) as (values (1) union all select x + 1 from t) select * from t)",
        "name = readfile('/etc/passwd')",
        "printf('%999999999s', 'x') is not null",
        "x" * 5000,
    ],
)
def test_what_is_no_condition_is_refused_in_one_line(folder: Path, query: Embeddings, where: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        found(folder, query, where=where)
    assert len(str(refusal.value).splitlines()) == 1
    assert found(folder, query, where="name = 'img_03.PNG'") == [3], "the index is as it was"


def test_a_column_may_stand_in_double_quotes_and_a_text_or_remark_may_hold_them(
    folder: Path, query: Embeddings
) -> None:
    assert found(folder, query, where="\"name\" = 'img_03.PNG' and 'say \"it\"' <> '' -- \"so\"") == [3]


def test_a_condition_cannot_reach_beyond_the_folder(folder: Path, query: Embeddings) -> None:
    assert found(folder, query, where="1 or 1", root=folder / "photos/work") == list(range(6, 12))


def test_a_condition_changes_nothing(folder: Path, query: Embeddings) -> None:
    before = {path.name: path.read_bytes() for path in (folder / "index/000001").iterdir()}
    found(folder, query, where="name like 'img%'")
    assert {path.name: path.read_bytes() for path in (folder / "index/000001").iterdir()} == before


def write_csv(path: Path, *rows: tuple[object, ...]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


@pytest.mark.parametrize("key", ["name", "path", "path below the root", "sha256"])
def test_a_table_is_joined_by_name_path_or_hash(folder: Path, query: Embeddings, tmp_path: Path, key: str) -> None:
    with ImageIndex.open(folder / "index") as index:
        hits = {int(hit.path.stem[4:]): hit for hit in index.search(query, 12)}
    names = {
        "name": lambda n: hits[n].path.name,
        "path": lambda n: str(hits[n].path),
        "path below the root": lambda n: str(hits[n].path.relative_to(folder / "photos")),
        "sha256": lambda n: hits[n].content,
    }
    rows = [(names[key](n), "cat" if n % 2 else "dog", n) for n in range(10)]
    table = write_csv(tmp_path / "labels.csv", (key.split()[0], "label", "price"), *rows)
    assert found(folder, query, where="label = 'cat'", table=table) == [1, 3, 5, 7, 9]
    assert found(folder, query, where="price >= 8", table=table) == [8, 9], "numbers are numbers"
    assert found(folder, query, where="label is null", table=table) == [10, 11]


def test_a_table_that_changes_is_read_again_and_else_its_condition_is_remembered(
    folder: Path, query: Embeddings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Filter] = []
    rows = FilteredFiles.rows

    def spy(files: FilteredFiles, condition: Filter) -> npt.NDArray[np.int64]:
        asked.append(condition)
        return rows(files, condition)

    monkeypatch.setattr(FilteredFiles, "rows", spy)
    table = write_csv(tmp_path / "t.csv", ("name", "good"), ("img_00.jpg", 1), ("img_01.PNG", 0))
    with ImageIndex.open(folder / "index") as index:
        for _ in range(2):
            assert [hit.path.name for hit in index.search(query, 9, Filter("good = 1", table=table))] == ["img_00.jpg"]
        assert len(asked) == 1
        write_csv(table, ("name", "good"), ("img_00.jpg", 0), ("img_01.PNG", 1))
        os.utime(table, (1, 1))
        assert [hit.path.name for hit in index.search(query, 9, Filter("good = 1", table=table))] == ["img_01.PNG"]


def test_a_column_called_as_one_of_ours_has_another_name(folder: Path, query: Embeddings, tmp_path: Path) -> None:
    table = write_csv(tmp_path / "t.csv", ("name", "camera", "a b"), ("img_00.jpg", "mine", "x"))
    assert found(folder, query, where="side_camera = 'mine' and \"a b\" = 'x'", table=table) == [0]


def test_parquet_is_read_like_csv(folder: Path, query: Embeddings, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow.parquet")
    import pyarrow as pa

    columns = {
        "name": ["img_00.jpg", "img_01.PNG"],
        "price": [1.5, 2.5],
        "cost": [Decimal("9.50"), Decimal("10.00")],
        "when": [datetime(2024, 1, 1, tzinfo=UTC)] * 2,
    }
    pyarrow.write_table(pa.table(columns), tmp_path / "t.parquet")
    assert found(folder, query, where="price > 2 and \"when\" like '2024%'", table=tmp_path / "t.parquet") == [1]
    assert found(folder, query, where="cost < 10", table=tmp_path / "t.parquet") == [0]


@pytest.mark.parametrize(
    "content", [b"", b"label\ncat\n", b"name,x\na\n", b"name,name\na,b\n", b"name,x\na,\x00\xff\n"]
)
def test_a_table_that_cannot_be_used_is_refused_in_one_line(
    folder: Path, query: Embeddings, tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "t.csv").write_bytes(content)
    if content.endswith(b"\xff\n"):
        assert found(folder, query, where="x = 'y'", table=tmp_path / "t.csv") == []  # odd bytes are no reason
        return
    with pytest.raises(ConfigError) as refusal:
        found(folder, query, where="x = 1", table=tmp_path / "t.csv")
    assert len(str(refusal.value).splitlines()) == 1
    with pytest.raises(ConfigError, match="cannot be read"):
        found(folder, query, where="x = 1", table=tmp_path / "missing.csv")


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(allowed=st.sets(st.integers(0, 11)), k=st.integers(1, 12))
def test_a_filtered_search_is_that_of_a_plain_scan(folder: Path, query: Embeddings, allowed: set[int], k: int) -> None:
    with ImageIndex.open(folder / "index") as index:
        every = index.search(query, 12)
        names = ", ".join(f"'{hit.path.name}'" for hit in every if int(hit.path.stem[4:]) in allowed)
        hits = index.search(query, k, Filter(f"name in ({names})"))
    assert [(hit.path, hit.score) for hit in hits] == [
        (hit.path, hit.score) for hit in every if int(hit.path.stem[4:]) in allowed
    ][:k]


def test_copies_are_hits_only_where_their_own_name_passes(tmp_path: Path, query: Embeddings) -> None:
    for name in ("a.png", "b.png", "c.png"):
        (tmp_path / "photos").mkdir(exist_ok=True)
        noise(0).save(tmp_path / "photos" / name)
    update_index(tmp_path / "index", [tmp_path / "photos"], CountingEncoder())
    with ImageIndex.open(tmp_path / "index") as index:
        assert [hit.path.name for hit in index.search(query, 5, Filter("name <> 'b.png'"))] == ["a.png", "c.png"]


def test_a_remembered_condition_follows_the_index(tmp_path: Path, query: Embeddings) -> None:
    (tmp_path / "photos").mkdir()
    noise(0).save(tmp_path / "photos/a.png")
    update_index(tmp_path / "index", [tmp_path / "photos"], CountingEncoder())
    with ImageIndex.open(tmp_path / "index") as index:
        condition = Filter("suffix = '.png'")
        assert len(index.search(query, 5, condition)) == len(index.search(query, 5, condition)) == 1
        noise(1).save(tmp_path / "photos/b.png")
        update_index(tmp_path / "index", [], CountingEncoder())
        assert len(index.search(query, 5, condition)) == 2


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index over two files whose names are no text, one in a folder whose name is none either."""
    folder = tmp_path_factory.mktemp("odd").resolve()
    for number, name in enumerate((b"img_0.png", b"img\xff_1.png", b"fo\xff/img_2.png")):
        path = Path(os.fsdecode(os.fsencode(folder / "photos") + b"/" + name))
        path.parent.mkdir(parents=True, exist_ok=True)
        noise(number).save(path, "PNG")
    update_index(folder / "index", [folder / "photos"], CountingEncoder())
    return folder


@pytest.mark.parametrize(
    ("where", "count"),
    [("name like '%_0.png'", 1), ("suffix = '.png'", 3), ("folder like '%/fo%'", 1), ("path like '%_1.png'", 1)],
)
def test_a_name_that_is_no_text_breaks_no_condition(odd: Path, query: Embeddings, where: str, count: int) -> None:
    with ImageIndex.open(odd / "index") as index:
        assert len(index.search(query, 10, Filter(where))) == count


def test_a_folder_whose_name_is_no_text_keeps_what_lies_below_it(odd: Path, query: Embeddings) -> None:
    with ImageIndex.open(odd / "index") as index:
        hits = index.search(query, 10, Filter(root=Path(os.fsdecode(os.fsencode(odd / "photos") + b"/fo\xff"))))
    assert [hit.path.name for hit in hits] == ["img_2.png"]


def test_paths_have_their_own_folder_whatever_its_name_and_however_many(tmp_path: Path, query: Embeddings) -> None:
    """The first few stand in the query as text, those whose names are none and all others are looked up."""
    names = [b"it's", "ü".encode(), b"no\xfftext", *(b"f%d" % number for number in range(20))]
    folders = [Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)) for name in names]
    for number, folder in enumerate(folders):
        folder.mkdir()
        noise(number).save(folder / "a.png")
    update_index(tmp_path / "index", folders[:-1], CountingEncoder())
    with ImageIndex.open(tmp_path / "index") as index:
        for name, folder in zip(names[:-1], folders[:-1], strict=True):
            text = name.decode("utf-8", "ignore").replace("'", "''").replace("notext", "no%text")
            for column, shape in (("path", f"%/{text}/a.png"), ("root", f"%/{text}")):
                hits = index.search(query, 5, Filter(f"{column} like '{shape}'"))
                assert [hit.path for hit in hits] == [folder / "a.png"]
        update_index(tmp_path / "index", folders, CountingEncoder())
        assert len(index.search(query, 5, Filter("path like '%/f19/%'"))) == 1


def test_a_table_is_read_from_a_pipe(folder: Path, query: Embeddings, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=["name,good\nimg_00.jpg,1\nimg_01.PNG,0\n"], daemon=True)
    writer.start()
    with ImageIndex.open(folder / "index") as index:
        for _ in range(2):
            assert [hit.path.name for hit in index.search(query, 9, Filter("good = 1", table=pipe))] == ["img_00.jpg"]
    writer.join()


def test_an_empty_field_of_a_table_says_nothing(folder: Path, query: Embeddings, tmp_path: Path) -> None:
    table = tmp_path / "prices.csv"
    table.write_text("name,price\nimg_00.jpg,10\nimg_01.PNG,\nimg_02.jpg,30\nimg_03.PNG,NaN\n")
    assert found(folder, query, where="price > 5", table=table) == [0, 2]
    assert found(folder, query, where="price is null and name < 'img_04'", table=table) == [1, 3]


def test_codes_keep_their_zeros_and_numbers_are_numbers(folder: Path, query: Embeddings, tmp_path: Path) -> None:
    table = tmp_path / "codes.csv"
    table.write_text("name,code,count\nimg_00.jpg,007,100\nimg_01.PNG,7,20\nimg_02.jpg,0070,3\n")
    assert found(folder, query, where="code = '007'", table=table) == [0]
    assert found(folder, query, where="code like '00%'", table=table) == [0, 2]
    assert found(folder, query, where="count > 10", table=table) == [0, 1]


def test_numbers_too_large_to_be_kept_whole_are_codes(folder: Path, query: Embeddings, tmp_path: Path) -> None:
    table = tmp_path / "ids.csv"
    table.write_text(f"name,id,time\nimg_00.jpg,{2**63},{2**63 - 1}\nimg_01.PNG,{2**63 + 1},9\n")
    assert found(folder, query, where=f"id = '{2**63 + 1}'", table=table) == [1]
    assert found(folder, query, where=f"time = {2**63 - 1}", table=table) == [0]
    assert found(folder, query, where="time > 10", table=table) == [0]


def test_empty_lines_of_a_table_are_passed_over(folder: Path, query: Embeddings, tmp_path: Path) -> None:
    table = tmp_path / "lines.csv"
    table.write_text("name,price\nimg_00.jpg,10\n\nimg_01.PNG,20\n\n")
    assert found(folder, query, where="price > 5", table=table) == [0, 1]


@pytest.mark.parametrize("name", ["row", "sha256", "Camera", "PATH_BYTES", "side_key", "root_id"])
def test_a_column_whose_name_is_taken_has_another(folder: Path, query: Embeddings, tmp_path: Path, name: str) -> None:
    table = tmp_path / "taken.csv"
    table.write_text(f"name,{name},label\nimg_00.jpg,x,1\nimg_03.PNG,y,1\n")
    assert found(folder, query, where="label = 1 and camera = 'Canon EOS 5D'", table=table) == [0, 3]
    assert found(folder, query, where=f"side_{name} = 'y'", table=table) == [3]


def test_a_file_with_two_rows_in_a_table_is_listed_once(folder: Path, tmp_path: Path) -> None:
    table = tmp_path / "twice.csv"
    table.write_text("name,label\nimg_00.jpg,1\nimg_00.jpg,1\nimg_01.PNG,1\n")
    with ImageIndex.open(folder / "index") as index:
        page = index.page(Filter("label = 1", table=table), (b"", b""), 10)
    assert [Path(listed.path).name for listed in page] == ["img_00.jpg", "img_01.PNG"]


def test_integers_of_any_size_come_in_from_parquet(folder: Path, query: Embeddings, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = tmp_path / "hashes.parquet"
    columns = {"name": ["img_00.jpg"], "phash": pyarrow.array([2**63 + 5], pyarrow.uint64()), "code": ["007"]}
    parquet.write_table(pyarrow.table(columns), table)
    assert found(folder, query, where=f"phash = '{2**63 + 5}' and code = '007'", table=table) == [0]
