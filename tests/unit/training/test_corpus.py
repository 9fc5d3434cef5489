"""Where pictures come from: folders, files, tars; held in memory or read at each use; bad ones."""

from __future__ import annotations

import io
import itertools
import logging
import os
import shutil
import subprocess
import sys
import tarfile
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mimco_deploy.drawings import draw
from mimco_deploy.errors import DataError, ImageError
from mimco_deploy.sources import Picture, find_pictures, warn_of_merged_classes
from mimco_deploy.training.augment import TwoViews
from mimco_deploy.training.config import DataConfig, ViewsConfig
from mimco_deploy.training.corpus import Corpus, load_corpus
from tests.helpers import gallery, noise, save


def config(*sources: Path, held: bool = True, short_side_px: int = 64, max_bad_share: float = 0.05) -> DataConfig:
    return DataConfig(
        sources=tuple(map(str, sources)),
        memory_mib=2048 if held else 0,
        short_side_px=short_side_px,
        max_bad_share=max_bad_share,
        workers=0,
    )


def pack(path: Path, files: dict[str, Path], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, file in files.items():
            archive.add(file, name)
    return path


def break_file(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def pixels(corpus: Corpus) -> list[bytes]:
    return [corpus.get(index)[0].tobytes() for index in range(len(corpus))]


def test_a_folder_is_walked_in_full_and_labels_are_parent_folders(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    for name in ("cats/a.png", "cats/kittens/b.PNG", "dogs/c.jpeg", "top.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        noise(1).save(root / name, "PNG")
    (root / "dogs" / "notes.txt").write_text("not a picture", encoding="utf-8")
    save(root / ".thumbnails" / "hidden.png", 1)
    (root / "folder.png").mkdir()
    pictures = find_pictures([str(root)])
    names = [Path(picture.name).relative_to(root).as_posix() for picture in pictures]
    assert names == ["cats/a.png", "cats/kittens/b.PNG", "dogs/c.jpeg", "top.png"]
    assert [picture.label for picture in pictures] == ["cats", "kittens", "dogs", None]
    assert all(picture.read() == picture.file.read_bytes() for picture in pictures)


def test_a_single_picture_is_a_source(tmp_path: Path) -> None:
    (picture,) = find_pictures([str(save(tmp_path / "one.png", 0))])
    assert picture.name == str(tmp_path / "one.png")
    assert picture.decode(64).size == (32, 32)


def test_the_order_does_not_depend_on_the_order_of_the_sources(tmp_path: Path) -> None:
    gallery(tmp_path / "b", 3)
    gallery(tmp_path / "a", 3)
    pack(tmp_path / "c.tar", {"x/1.png": tmp_path / "a" / "0000.png", "x/0.png": tmp_path / "a" / "0001.png"})
    single = save(tmp_path / "aa.png", 9)
    sources = [str(tmp_path / "b"), str(tmp_path / "a"), str(tmp_path / "c.tar"), str(single)]
    listings = [find_pictures(order) for order in itertools.permutations(sources)]
    assert all(listing == listings[0] for listing in listings)
    assert len(listings[0]) == 9
    names = [picture.name for picture in listings[0]]
    assert names == sorted(names)
    prints = {Corpus(find_pictures(order), config()).fingerprint for order in itertools.permutations(sources)}
    assert len(prints) == 1


def test_a_picture_named_twice_is_taken_once(tmp_path: Path) -> None:
    paths = gallery(tmp_path / "photos", 3)
    sources = [str(tmp_path / "photos"), str(paths[1]), str(tmp_path / "photos")]
    assert [picture.file for picture in find_pictures(sources)] == paths


def test_a_tar_is_read_in_place(tmp_path: Path) -> None:
    paths = gallery(tmp_path / "photos", 4)
    tar = pack(
        tmp_path / "set.tar",
        {"cats/0.png": paths[0], "cats/1.png": paths[1], "top.png": paths[2], "notes.txt": paths[3]},
    )
    pictures = find_pictures([str(tar)])
    assert [picture.name for picture in pictures] == [
        f"{tar}:{name}" for name in ("cats/0.png", "cats/1.png", "top.png")
    ]
    assert [picture.label for picture in pictures] == ["cats", "cats", None]
    for picture, path in zip(pictures, paths, strict=False):
        assert picture.read() == path.read_bytes()
        assert picture.decode(64).tobytes() == Image.open(path).convert("RGB").tobytes()


def test_tars_inside_a_folder_are_walked(tmp_path: Path) -> None:
    paths = gallery(tmp_path / "photos", 2)
    pack(tmp_path / "photos" / "more.tar", {"birds/0.png": paths[0]})
    names = [picture.name for picture in find_pictures([str(tmp_path / "photos")])]
    assert f"{tmp_path}/photos/more.tar:birds/0.png" in names
    assert len(names) == 3


def test_pictures_in_a_tar_have_the_label_of_its_folder_where_it_has_none_inside(tmp_path: Path) -> None:
    paths = gallery(tmp_path / "spare", 2)
    (tmp_path / "photos/cats").mkdir(parents=True)
    pack(tmp_path / "photos/cats/more.tar", {"0.png": paths[0], "tabby/1.png": paths[1]})
    assert [picture.label for picture in find_pictures([str(tmp_path / "photos")])] == ["cats", "tabby"]


def test_what_a_mac_writes_beside_each_picture_is_none_in_a_tar_either(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", 0)
    tar = pack(tmp_path / "set.tar", {"cats/1.png": path, "cats/._1.png": path})
    assert [picture.name for picture in find_pictures([str(tar)])] == [f"{tar}:cats/1.png"]


@pytest.mark.parametrize("inner_first", [True, False])
def test_a_picture_named_twice_keeps_the_label_that_one_naming_tells(tmp_path: Path, inner_first: bool) -> None:
    save(tmp_path / "photos/cats/1.png", 0)
    sources = [str(tmp_path / "photos/cats"), str(tmp_path / "photos")]
    assert [picture.label for picture in find_pictures(sources if inner_first else sources[::-1])] == ["cats"]


def test_links_and_folders_in_a_tar_are_passed_over(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", 0)
    with tarfile.open(tmp_path / "set.tar", "w") as archive:
        archive.add(path, "real.png")
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "real.png"
        archive.addfile(link)
        folder = tarfile.TarInfo("folder.png")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
    assert [picture.name for picture in find_pictures([str(tmp_path / "set.tar")])] == [f"{tmp_path}/set.tar:real.png"]


@pytest.mark.parametrize(
    ("suffix", "mode"), [(".tar.gz", "w:gz"), (".tgz", "w:gz"), (".tar.xz", "w:xz"), (".tar", "w:gz")]
)
def test_a_compressed_tar_is_refused_with_what_to_do(tmp_path: Path, suffix: str, mode: str) -> None:
    tar = pack(tmp_path / f"set{suffix}", {"a.png": save(tmp_path / "a.png", 0)}, mode)
    with pytest.raises(
        DataError, match=r"a plain \.tar, which is read in place; unpack or decompress it first"
    ) as error:
        find_pictures([str(tar)])
    assert str(tar) in error.value.found


def test_a_picture_whose_name_speaks_of_a_tar_is_a_picture(tmp_path: Path) -> None:
    path = save(tmp_path / "la.tar.pits.png", 0)
    assert [picture.file for picture in find_pictures([str(path)])] == [path]


def test_a_missing_source_is_named(tmp_path: Path) -> None:
    gallery(tmp_path / "photos", 1)
    with pytest.raises(DataError, match=r"nowhere does not exist; expected a folder, a picture or a plain \.tar"):
        find_pictures([str(tmp_path / "photos"), str(tmp_path / "nowhere")])


def test_a_missing_tar_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.tar"):
        find_pictures([str(tmp_path / "nowhere.tar")])


def test_no_picture_at_all_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("", encoding="utf-8")
    with pytest.raises(DataError, match=r"no picture in .*empty; expected --data DIR with pictures"):
        find_pictures([str(tmp_path / "empty")])
    with pytest.raises(DataError, match="no picture in no source"):
        find_pictures([])


def test_held_and_streamed_pictures_are_the_same(tmp_path: Path) -> None:
    for number, size in enumerate([(40, 90), (200, 100), (64, 64), (10, 10), (131, 65)]):
        draw("plaid", number, max(size)).resize(size).save(tmp_path / f"{number}.png")
    held, streamed = load_corpus(config(tmp_path)), load_corpus(config(tmp_path, held=False))
    assert held.held is not None
    assert streamed.held is None
    assert pixels(held) == pixels(streamed)
    assert held.fingerprint == streamed.fingerprint
    shapes = [held.get(index)[0].shape for index in range(5)]
    assert shapes == [(90, 40, 3), (64, 128, 3), (64, 64, 3), (10, 10, 3), (64, 129, 3)]


def test_a_corpus_that_decodes_larger_than_the_budget_is_streamed(tmp_path: Path) -> None:
    for number in range(3):
        Image.new("RGB", (512, 512), (number, 0, 0)).save(tmp_path / f"{number}.png")  # 2 KB each, 768 KiB decoded
    one_mib = DataConfig(sources=(str(tmp_path),), memory_mib=1, short_side_px=512, workers=0)
    corpus = load_corpus(one_mib)
    assert corpus.held is None
    assert [corpus.get(index)[0][0, 0].tolist() for index in range(3)] == [[0, 0, 0], [1, 0, 0], [2, 0, 0]]


@pytest.mark.parametrize(
    ("size", "expected"), [((100, 50), (60, 30)), ((30, 31), (30, 31)), ((31, 3000), (30, 2903)), ((5, 9), (5, 9))]
)
def test_the_short_side_is_reduced_and_never_enlarged(
    tmp_path: Path, size: tuple[int, int], expected: tuple[int, int]
) -> None:
    Image.new("RGB", size).save(tmp_path / "a.png")
    assert find_pictures([str(tmp_path)])[0].decode(30).size == expected


def test_a_tar_and_its_folder_give_the_same_pictures(tmp_path: Path) -> None:
    paths = gallery(tmp_path / "photos", 5)
    tar = pack(tmp_path / "set.tar", {path.name: path for path in paths})
    from_tar = load_corpus(config(tar, held=False))
    shutil.move(tar, tmp_path / "elsewhere.tar")
    assert pixels(load_corpus(config(tmp_path / "photos"))) == pixels(load_corpus(config(tmp_path / "elsewhere.tar")))
    with pytest.raises(DataError):
        from_tar.get(0)


@pytest.mark.parametrize("held", [True, False])
def test_the_same_corpus_has_one_fingerprint_and_another_has_another(tmp_path: Path, held: bool) -> None:
    gallery(tmp_path, 4)
    first = load_corpus(config(tmp_path, held=held)).fingerprint
    assert load_corpus(config(tmp_path, held=held)).fingerprint == first
    save(tmp_path / "0004.png", 4)
    more = load_corpus(config(tmp_path, held=held)).fingerprint
    (tmp_path / "0004.png").rename(tmp_path / "0005.png")
    renamed = load_corpus(config(tmp_path, held=held)).fingerprint
    noise(5, 48).save(tmp_path / "0005.png")
    resized = load_corpus(config(tmp_path, held=held)).fingerprint
    assert len({first, more, renamed, resized}) == 4


def test_held_corpus_takes_the_next_good_picture_and_names_bad_ones_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    paths = gallery(tmp_path, 10)
    break_file(paths[2])
    paths[9].write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        corpus = load_corpus(config(tmp_path, max_bad_share=0.2))
    assert corpus.held is not None
    assert pixels(corpus) == [noise(number).tobytes() for number in (0, 1, 3, 3, 4, 5, 6, 7, 8, 0)]
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert all(message.startswith("skipped ") for message in messages)
    assert all(sum(str(path) in message for message in messages) == 1 for path in (paths[2], paths[9]))


def test_a_bad_picture_makes_no_other_corpus_of_one_that_is_held(tmp_path: Path) -> None:
    """A run may be resumed with other `data.memory_mib`: that must not change what is learned."""
    paths = gallery(tmp_path, 6)
    break_file(paths[2])
    held, streamed = (load_corpus(config(tmp_path, held=held, max_bad_share=0.2)) for held in (True, False))
    assert (held.held is None, streamed.held is None) == (False, True)
    assert held.fingerprint == streamed.fingerprint
    assert pixels(held) == pixels(streamed)
    assert [held.pixels(index)[1] for index in range(6)] == [streamed.pixels(index)[1] for index in range(6)]


def test_streamed_corpus_takes_the_next_good_picture_and_names_bad_ones_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    paths = gallery(tmp_path, 30)
    for number in (3, 4, 29):
        break_file(paths[number])
    corpus = load_corpus(config(tmp_path, held=False, max_bad_share=0.1))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            for index, instead in ((3, 5), (4, 5), (29, 0), (6, 6)):
                picture, bad = corpus.get(index)
                assert picture.tobytes() == noise(instead).tobytes()
                corpus.report_bad(bad)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == len(set(messages)) == 3
    assert {path.name for path in paths if any(str(path) in message for message in messages)} == {
        "0003.png",
        "0004.png",
        "0029.png",
    }


def test_too_many_bad_pictures_are_refused_when_held(tmp_path: Path) -> None:
    paths = gallery(tmp_path, 10)
    for path in paths[:3]:
        break_file(path)
    assert len(load_corpus(config(tmp_path, max_bad_share=0.3)).bad) == 3
    with pytest.raises(DataError) as error:
        load_corpus(config(tmp_path, max_bad_share=0.29))
    assert "3 of 10 pictures cannot be decoded" in error.value.found
    assert str(tmp_path) in error.value.found
    assert "at most 29%" in error.value.expected


def test_too_many_bad_pictures_are_refused_when_streamed(tmp_path: Path) -> None:
    paths = gallery(tmp_path, 10)
    for path in paths[:3]:
        break_file(path)
    for share, refused in ((0.3, False), (0.29, True)):
        corpus = load_corpus(config(tmp_path, held=False, max_bad_share=share))
        bad = [name for index in range(10) for name in corpus.get(index)[1]]
        if refused:
            with pytest.raises(DataError, match="3 of 10 pictures cannot be decoded"):
                corpus.report_bad(bad)
        else:
            corpus.report_bad(bad)


@pytest.mark.parametrize("held", [True, False])
def test_a_corpus_of_bad_pictures_only_is_refused(tmp_path: Path, held: bool) -> None:
    for path in gallery(tmp_path, 3):
        break_file(path)

    def first() -> object:
        return load_corpus(config(tmp_path, held=held, max_bad_share=0.99)).get(0)

    with pytest.raises(DataError, match="none of 3 pictures can be decoded"):
        first()


def test_a_picture_that_vanishes_while_training_is_a_bad_one(tmp_path: Path) -> None:
    paths = gallery(tmp_path, 30)
    corpus = load_corpus(config(tmp_path, held=False))
    paths[4].unlink()
    picture, bad = corpus.get(4)
    assert picture.tobytes() == noise(5).tobytes()
    assert len(bad) == 1
    assert str(paths[4]) in bad[0]


def test_a_tar_that_is_cut_short_after_listing_gives_bad_pictures(tmp_path: Path) -> None:
    paths = gallery(tmp_path / "photos", 2)
    tar = pack(tmp_path / "set.tar", {path.name: path for path in paths})
    listed = find_pictures([str(tar)])
    tar.write_bytes(tar.read_bytes()[: listed[1].offset + 10])
    assert listed[0].decode(64).tobytes() == noise(0).tobytes()
    with pytest.raises(ImageError):
        listed[1].decode(64)


def test_a_picture_larger_than_the_limit_is_refused_without_reading_it_all(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", 0)
    huge = Picture(path, 0, 2**40, "a.png", None)
    assert huge.read() == path.read_bytes()
    with path.open("r+b") as file:
        file.truncate(200 * 2**20)
    assert len(huge.read()) == 128 * 2**20 + 1
    with pytest.raises(ImageError) as error:
        huge.decode(64)
    assert error.value.problem == "too_large"


def test_turned_and_transparent_pictures_come_upright_and_opaque(tmp_path: Path) -> None:
    picture = noise(0).resize((48, 32))
    exif = Image.Exif()
    exif[0x0112] = 6
    content = io.BytesIO()
    picture.save(content, "JPEG", exif=exif, quality=95)
    (tmp_path / "turned.jpg").write_bytes(content.getvalue())
    Image.new("RGBA", (20, 20), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    corpus = load_corpus(config(tmp_path))
    assert [corpus.get(index)[0].shape for index in range(2)] == [(20, 20, 3), (48, 32, 3)]
    assert all(corpus.get(index)[0].dtype == np.uint8 for index in range(2))


ALL_BAD = """
import sys
from mimco_deploy.errors import DataError
from mimco_deploy.training.config import DataConfig, RunConfig
from mimco_deploy.training.data import StepSampler, load_batches
from mimco_deploy.training.corpus import load_corpus
corpus = load_corpus(DataConfig(sources=(sys.argv[1],), memory_mib=0, max_bad_share=0.99))
sampler = StepSampler(len(corpus), RunConfig(epochs=1, global_batch_size=2))
try:
    next(load_batches(corpus, lambda picture: (), sampler, 0, 1))
except DataError as error:
    print(error)
"""


def test_bad_pictures_in_a_data_loading_process_end_the_run_with_one_line(tmp_path: Path) -> None:
    for path in gallery(tmp_path, 4):
        break_file(path)
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", ALL_BAD, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert run.stdout == "none of 4 pictures can be decoded; expected pictures\n"


DEFECT = """
import sys
from contextlib import closing
from mimco_deploy.training.config import DataConfig, RunConfig
from mimco_deploy.training.corpus import load_corpus
from mimco_deploy.training.data import StepSampler, load_batches
corpus = load_corpus(DataConfig(sources=(sys.argv[1],)))
def fail(picture):
    raise ValueError("a defect in the views")
sampler = StepSampler(len(corpus), RunConfig(epochs=1, global_batch_size=2))
with closing(load_batches(corpus, fail, sampler, 0, 1)) as batches:
    next(batches)
"""


def test_a_defect_in_a_data_loading_process_ends_the_run_and_does_not_hang_it(tmp_path: Path) -> None:
    gallery(tmp_path, 4)
    run = subprocess.run(
        [sys.executable, "-c", DEFECT, str(tmp_path)], capture_output=True, text=True, check=False, timeout=60
    )
    assert run.returncode == 1
    assert "ValueError: a defect in the views" in run.stderr


def test_pixels_are_held_as_bytes_and_their_own(tmp_path: Path) -> None:
    gallery(tmp_path, 2)
    corpus = load_corpus(config(tmp_path))
    assert corpus.held is not None
    first = corpus.held[0]
    assert isinstance(first, np.ndarray)
    before = first.copy()
    make_views = TwoViews(first.shape[0], ViewsConfig(min_crop_scale=0.9))
    for _ in range(20):
        make_views(corpus.get(0)[0])
    assert first.dtype == np.uint8
    assert np.array_equal(first, before)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    for name in ("a.png", "a.tar"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(DataError, match=rf"{name} is no file; expected a folder, a picture or a plain \.tar"):
            find_pictures([str(tmp_path / name)])


def old_tar(folder: Path, count: int) -> Path:
    """Without the additional headers of newer forms, whose loss Python's reader notices itself."""
    with tarfile.open(folder / "set.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
        for path in gallery(folder / "photos", count):
            archive.add(path, path.name)
    return folder / "set.tar"


@pytest.mark.parametrize("beyond", [-1, 1, 100, 511, 512, 600])
def test_a_tar_that_was_cut_off_is_refused(tmp_path: Path, beyond: int) -> None:
    """Python's reader ends quietly where a header or a picture is cut."""
    tar = old_tar(tmp_path, 4)
    third = find_pictures([str(tar)])[2]
    end = third.offset + -(-third.size // 512) * 512
    tar.write_bytes(tar.read_bytes()[: end + beyond if beyond > 0 else third.offset + third.size - 1])
    with pytest.raises(DataError, match=r"set\.tar cannot be read as a tar \((cut off|unexpected end of data)"):
        find_pictures([str(tar)])


def test_a_tar_with_garbage_between_members_is_refused(tmp_path: Path) -> None:
    tar = old_tar(tmp_path, 4)
    content = bytearray(tar.read_bytes())
    second = find_pictures([str(tar)])[1].offset - 512
    content[second : second + 512] = b"x" * 512
    tar.write_bytes(content)
    with pytest.raises(DataError, match=rf"cut off or broken at byte {second}"):
        find_pictures([str(tar)])


def test_a_tar_without_end_marks_is_read(tmp_path: Path) -> None:
    paths = gallery(tmp_path / "photos", 3)
    tar = pack(tmp_path / "set.tar", {path.name: path for path in paths})
    last = max(find_pictures([str(tar)]), key=lambda picture: picture.offset)
    end = last.offset + -(-last.size // 512) * 512
    tar.write_bytes(tar.read_bytes()[:end])
    assert len(find_pictures([str(tar)])) == 3


def test_a_class_has_one_name_however_its_folder_is_written(tmp_path: Path) -> None:
    for form in ("NFC", "NFD"):
        save(tmp_path / form / unicodedata.normalize(form, "café") / "a.png", 0)
    labels = [find_pictures([str(tmp_path / form)])[0].label for form in ("NFC", "NFD")]
    assert labels == ["caf\u00e9"] * 2


def test_folders_of_one_name_in_several_places_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number, folder in enumerate(("fruit/orange", "juice/orange", "fruit/pear")):
        save(tmp_path / folder / "a.png", number)
    with caplog.at_level(logging.WARNING):
        warn_of_merged_classes(find_pictures([str(tmp_path)]))
        warn_of_merged_classes(find_pictures([str(tmp_path / "fruit"), str(tmp_path / "juice")]))  # meant as one
    assert caplog.messages == ["class orange is 2 folders, such as fruit/orange and juice/orange"]
