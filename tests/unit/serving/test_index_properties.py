"""Whatever is done to a folder, its index says what the folder holds."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from mimco_deploy.serving.index import ImageIndex
from mimco_deploy.serving.query import search_image
from mimco_deploy.serving.update import update_index
from tests.helpers import CountingEncoder, save

NAMES = [f"{folder}{name}.png" for folder in ("", "x/", "x/y/") for name in ("a", "b")]
# A folder as it is at one update: which picture, if any, each name holds. None is a file that is no picture.
folders = st.dictionaries(st.sampled_from(NAMES), st.one_of(st.none(), st.integers(0, 4)), max_size=6)


def write(root: Path, wanted: dict[str, int | None]) -> None:
    for name in NAMES:
        path = root / name
        if name not in wanted:
            path.unlink(missing_ok=True)
        elif (seed := wanted[name]) is not None:
            save(path, seed)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"no picture")


def check(root: Path, index: ImageIndex, encoder: CountingEncoder, wanted: dict[str, int | None]) -> None:
    pictures = {root / name: seed for name, seed in wanted.items() if seed is not None}
    assert index.files() == sorted(pictures)
    assert {problem.path for problem in index.problems()} == {root / name for name in wanted} - pictures.keys()
    for path, seed in pictures.items():
        copies = sorted(other for other, content in pictures.items() if content == seed)
        hits = search_image(index, encoder, path, len(pictures))
        assert [hit.path for hit in hits[: len(copies)]] == copies
        assert sorted(hit.path for hit in hits) == sorted(pictures)


@settings(max_examples=25, deadline=None)
@given(states=st.lists(folders, min_size=1, max_size=4))
def test_after_any_changes_the_index_holds_what_the_folder_holds(states: list[dict[str, int | None]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root, path, encoder = Path(folder).resolve() / "photos", Path(folder) / "index", CountingEncoder()
        keeper = root / "keeper.png"  # a search needs something to find
        save(keeper, 99)
        contents: set[int] = set()
        files = 0
        opened: ImageIndex | None = None
        for state in states:
            write(root, state)
            report = update_index(path, [root], encoder, batch_size=2)
            files += report.added - report.removed
            assert report.counts.files == files, "what was said to be done was done"
            wanted = state | {"keeper.png": 99}
            contents |= {seed for seed in wanted.values() if seed is not None}
            check(root, ImageIndex.open(path), encoder, wanted)
            opened = opened or ImageIndex.open(path)
            check(root, opened, encoder, wanted)
            searches = len(encoder.batches)
            assert update_index(path, [], encoder).unchanged == len(opened.files())
            assert len(encoder.batches) == searches
        embedded = ImageIndex.open(path).counts()
        assert embedded.contents + embedded.dead == len(contents), "each content was embedded once"
