"""Decoders that hang, crash or want all memory: each costs its file, never the run."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mimco_deploy.errors import ConfigError, ImageError, MimcoError
from mimco_deploy.images import MAX_BYTES, decode_image
from mimco_deploy.preprocess import read_pixels
from mimco_deploy.serving.guarded import NEVER_OPENED, DecodePool, Limits, RefusedError
from mimco_deploy.serving.scan import Stamp
from mimco_deploy.serving.update import update_index
from tests.helpers import SIDE, CountingEncoder, Images, gallery, noise, save, tiny_spec

REPOSITORY = Path(__file__).parent.parent.parent.parent
LONG = Limits(seconds=3600)
# Python runs it when it starts. It notes each process that does, and each picture that one of them decodes; and it
# makes of files with certain beginnings what a broken decoder would.
HOSTILE = """
import os, signal
from pathlib import Path
from PIL import Image

notes = Path(__file__).parent
def note(what, line):
    with (notes / what).open("a") as file:
        file.write(f"{line}\\n")

note("started", os.getpid())
decode = Image.open
def opened(file, *args, **options):
    start = file.getvalue()[:5]
    note("decoded", start.decode() if start.endswith(b"!") else "other")
    if start == b"HANG!":
        while True:
            pass
    if start == b"SEGV!":
        os.kill(os.getpid(), signal.SIGSEGV)
    if start == b"EXIT!":
        os._exit(7)
    if start == b"ONCE!" and (notes / "decoded").read_text().count("ONCE!") == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if start == b"MUCH!":
        bytearray(2**40)
    return decode(file, *args, **options)
Image.open = opened
"""


class Notes:
    """What the processes did."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def started(self) -> list[int]:
        return [int(line) for line in self._lines("started")]

    def decoded(self, start: str) -> int:
        return self._lines("decoded").count(start)

    def wait_for(self, start: str) -> None:
        while not self.decoded(start):
            threading.Event().wait(0.01)  # the limit of the test ends it

    def _lines(self, what: str) -> list[str]:
        path = self.folder / what
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Notes:
    folder = tmp_path / "startup"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(HOSTILE)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return Notes(folder)


@pytest.fixture
def pool() -> Iterator[DecodePool]:
    with DecodePool(tiny_spec()) as pool:
        yield pool


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def refused(pool: DecodePool, path: Path) -> RefusedError:
    with pytest.raises(RefusedError) as caught:
        pool.read(path)
    return caught.value


def stamp_of(path: Path) -> Stamp:
    status = path.stat()
    return Stamp(status.st_size, status.st_mtime_ns)


def expected_pixels(path: Path) -> Images:
    return read_pixels(path, SIDE, 1.0, "bicubic")


def is_there(process: int) -> bool:
    """Whether it runs; one that ended and that nobody asked about does not."""
    try:
        status = Path(f"/proc/{process}/stat").read_text() if Path("/proc/self/stat").exists() else " R"
        os.kill(process, 0)
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def is_good(pool: DecodePool, path: Path) -> bool:
    pixels = pool.read(path).pixels
    return pixels is not None and np.array_equal(pixels, expected_pixels(path))


# ---------------------------------------------------------------------- what a file held


def test_a_picture_comes_with_its_pixels_its_hash_and_its_stamp(pool: DecodePool, tmp_path: Path) -> None:
    for path in gallery(tmp_path, 3):
        content = pool.read(path)
        assert content.pixels is not None
        assert content.pixels.dtype == np.uint8
        assert content.pixels.tolist() == expected_pixels(path).tolist()
        assert content.sha256 == hashlib.sha256(path.read_bytes()).digest()
        assert content.stamp == stamp_of(path)


@pytest.mark.parametrize(("mtime_ns", "what"), [(-5_000_000_001, "before 1970"), (4_102_444_800_123_456_789, "2100")])
def test_a_stamp_of_any_time_is_told(pool: DecodePool, tmp_path: Path, mtime_ns: int, what: str) -> None:
    path = save(tmp_path / "a.png", 1)
    os.utime(path, ns=(mtime_ns, mtime_ns))
    assert pool.read(path).stamp == Stamp(path.stat().st_size, mtime_ns), what


def test_the_caller_says_by_the_hash_whether_pixels_are_wanted(pool: DecodePool, tmp_path: Path, notes: Notes) -> None:
    paths = gallery(tmp_path / "photos", 4)
    hashes = [hashlib.sha256(path.read_bytes()).digest() for path in paths]
    known, asked = set(hashes[:2]), list[bytes]()

    def is_known(sha256: bytes) -> bool:
        asked.append(sha256)
        return sha256 in known

    contents = [pool.read(path, is_known) for path in paths[:2]]
    assert notes.decoded("other") == 0, "what is known is not decoded"
    contents += [pool.read(path, is_known) for path in paths[2:]]
    assert notes.decoded("other") >= 2
    assert asked == hashes
    assert [content.pixels is None for content in contents] == [True, True, False, False]
    assert [content.sha256 for content in contents] == hashes
    assert [content.stamp for content in contents] == [stamp_of(path) for path in paths]
    assert len(notes.started()) == 1, "one process after the other file"


def test_a_known_content_needs_not_be_a_picture(pool: DecodePool, tmp_path: Path) -> None:
    path = write(tmp_path / "a.png", b"no picture")
    content = pool.read(path, lambda _: True)
    assert (content.stamp, content.sha256) == (stamp_of(path), hashlib.sha256(b"no picture").digest())
    assert content.pixels is None
    assert refused(pool, path).problem == "unsupported"


def test_an_error_of_the_caller_is_the_caller_s(pool: DecodePool, tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", 1)

    def fail(_: bytes) -> bool:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        pool.read(path, fail)
    assert is_good(pool, path), "the answer that nobody took is not the next one's"


# ---------------------------------------------------------------------- no pictures

CUT_OFF = 60


@pytest.mark.parametrize("name", ["a.png", "a\nb.png", "caf\udce9.png", 'it\'s "😀".png'])
@pytest.mark.parametrize("content", [b"", b"no picture", b"<html>", b"\0\0\0\x18ftypheic", b"\xff\xd8\xff", None])
def test_a_picture_that_is_none_is_refused_in_the_decoder_s_own_words(
    tmp_path: Path, shared_pool: DecodePool, name: str, content: bytes | None
) -> None:
    content = save(tmp_path / "good.png", 1).read_bytes()[:CUT_OFF] if content is None else content
    path = write(tmp_path / name, content)
    with pytest.raises(ImageError) as expected:
        decode_image(content, str(path))
    found = refused(shared_pool, path)
    assert (found.problem, found.found) == (expected.value.problem, expected.value.found)
    assert found.stamp == stamp_of(path)
    assert "\n" not in str(found)


@pytest.fixture(scope="module")
def shared_pool() -> Iterator[DecodePool]:
    with DecodePool(tiny_spec()) as pool:
        yield pool


@pytest.mark.parametrize("name", ["caf\udce9.png", "new\nline.png", "😀.png", " .png", "-.png", "%s.png"])
def test_a_picture_of_any_name_is_read(shared_pool: DecodePool, tmp_path: Path, name: str) -> None:
    assert is_good(shared_pool, save(tmp_path / name, 3))


def test_a_file_over_the_size_limit_is_refused_unread(pool: DecodePool, tmp_path: Path) -> None:
    with (tmp_path / "large.png").open("wb") as file:
        file.truncate(MAX_BYTES + 1)  # sparse: it takes no room
    found = refused(pool, tmp_path / "large.png")
    assert (found.problem, found.stamp) == ("too_large", stamp_of(tmp_path / "large.png"))


def test_a_file_that_is_gone_is_no_refusal(pool: DecodePool, tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", 1)
    for gone in (tmp_path / "b.png", path / "below a file.png"):
        with pytest.raises(FileNotFoundError, match=gone.name):
            pool.read(gone)
    assert is_good(pool, path)


def test_a_file_that_cannot_be_opened_has_no_stamp(pool: DecodePool, tmp_path: Path) -> None:
    circle = tmp_path / "circle.png"
    circle.symlink_to(circle)
    found = refused(pool, circle)
    assert (found.problem, found.stamp) == ("unreadable", NEVER_OPENED)
    assert str(found) == f"{circle} cannot be read (Too many levels of symbolic links)"


@pytest.mark.usefixtures("notes")
def test_a_line_break_in_a_name_forges_no_line(tmp_path: Path) -> None:
    (tmp_path / "circle\n.png").symlink_to("circle\n.png")
    (tmp_path / "large\n.png").touch()
    os.truncate(tmp_path / "large\n.png", MAX_BYTES + 1)  # sparse: it takes no room
    for kind in ("HANG!", "SEGV!", "MUCH!"):
        write(tmp_path / f"{kind}\n.png", kind.encode())
    with DecodePool(tiny_spec(), Limits(seconds=1)) as pool:
        for path in tmp_path.glob("*\n.png"):
            assert refused(pool, path).found.startswith(ascii(str(path)))


def test_a_folder_is_unreadable(pool: DecodePool, tmp_path: Path) -> None:
    found = refused(pool, tmp_path)
    assert (found.problem, found.found) == ("unreadable", f"{tmp_path} cannot be read (Is a directory)")


# ---------------------------------------------------------------------- decoders that fail


def test_a_file_that_hangs_costs_one_file(notes: Notes, tmp_path: Path) -> None:
    good, bad = save(tmp_path / "good.png", 1), write(tmp_path / "bad.png", b"HANG!")
    with DecodePool(tiny_spec(), Limits(seconds=0.5)) as pool:
        assert is_good(pool, good)
        found = refused(pool, bad)
        assert is_good(pool, good)
    assert (found.problem, found.stamp) == ("timeout", NEVER_OPENED)
    assert str(found) == f"{bad} took more than 0.5 s to decode"
    assert notes.decoded("HANG!") == 2, "one death proves nothing"
    assert len(notes.started()) == 3


def test_the_time_limit_is_for_each_file_not_for_all(notes: Notes, tmp_path: Path) -> None:
    good = save(tmp_path / "good.png", 1)
    with DecodePool(tiny_spec(), Limits(seconds=0.5)) as pool:
        assert is_good(pool, good)
        threading.Event().wait(0.7)  # nobody asks: no timer runs
        assert is_good(pool, good)
    assert len(notes.started()) == 1


def test_a_pipe_that_nobody_writes_to_is_given_up(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with DecodePool(tiny_spec(), Limits(seconds=0.3)) as pool:
        assert refused(pool, tmp_path / "pipe.png").problem == "timeout"
        assert is_good(pool, save(tmp_path / "good.png", 1))


@pytest.mark.parametrize(("content", "how"), [(b"SEGV!", "SIGSEGV"), (b"EXIT!", "exit code 7")])
def test_a_file_that_brings_its_decoder_down_costs_one_file(
    notes: Notes, tmp_path: Path, content: bytes, how: str
) -> None:
    good, bad = save(tmp_path / "good.png", 1), write(tmp_path / "b\udce9d.png", content)
    with DecodePool(tiny_spec()) as pool:
        found = refused(pool, bad)
        assert is_good(pool, good)
    assert (found.problem, found.stamp) == ("crashed", NEVER_OPENED)
    assert str(found) == f"{str(bad)!a} brought its decoder down ({how})"
    assert notes.decoded(content.decode()) == 2, "something else may have killed the first"
    assert len(notes.started()) == 3


def test_a_file_whose_decoder_was_killed_by_something_else_is_read(notes: Notes, tmp_path: Path) -> None:
    path = write(tmp_path / "a.png", b"ONCE!")
    with DecodePool(tiny_spec()) as pool:
        assert refused(pool, path).problem == "unsupported", "what it is, not what became of its first reader"
    assert notes.decoded("ONCE!") == 2


def test_a_file_that_crashes_and_goes_away_is_gone(
    notes: Notes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "bad.png", b"SEGV!")
    bury = DecodePool._bury

    def unlink_and_bury(*arguments: Any) -> int:
        path.unlink(missing_ok=True)
        return bury(*arguments)

    monkeypatch.setattr(DecodePool, "_bury", unlink_and_bury)
    with DecodePool(tiny_spec()) as pool, pytest.raises(FileNotFoundError, match=r"bad\.png"):
        pool.read(path)
    assert notes.decoded("SEGV!") == 1


def test_a_decoder_that_wants_more_memory_than_the_limit_is_refused_it(notes: Notes, tmp_path: Path) -> None:
    good, bad = save(tmp_path / "good.png", 1), write(tmp_path / "bad.png", b"MUCH!")
    with DecodePool(tiny_spec()) as pool:
        found = refused(pool, bad)
        assert is_good(pool, good)
    assert (found.problem, found.stamp) == ("too_large", stamp_of(bad))
    assert len(notes.started()) == 1, "it lives on"


def test_a_file_that_does_not_fit_into_the_memory_limit_is_too_large(tmp_path: Path) -> None:
    with (tmp_path / "large.png").open("wb") as file:
        file.truncate(MAX_BYTES)
    with DecodePool(tiny_spec(), Limits(memory_mib=220)) as pool:
        found = refused(pool, tmp_path / "large.png")
    assert found.problem == "too_large"
    assert str(found) == f"{tmp_path / 'large.png'} needs more memory than a file may take"


# ---------------------------------------------------------------------- several at once, and the end


def test_eight_threads_get_each_its_own_answers(notes: Notes, tmp_path: Path) -> None:
    good = gallery(tmp_path, 48)
    bad = {write(tmp_path / f"{kind}.png", kind.encode()): kind for kind in ("SEGV!", "HANG!", "MUCH!")}
    problems = {"SEGV!": "crashed", "HANG!": "timeout", "MUCH!": "too_large"}

    def outcome(path: Path) -> str:
        try:
            return "good" if is_good(decoders, path) else "another's pixels"
        except RefusedError as error:
            return error.problem

    mixed = [*good[:20], *bad, *good[20:]]
    with DecodePool(tiny_spec(), Limits(seconds=3)) as decoders, ThreadPoolExecutor(8) as threads:
        found = list(threads.map(outcome, mixed))
    assert found == [problems[bad[path]] if path in bad else "good" for path in mixed]
    assert len(notes.started()) <= 8 + 3
    assert not any(is_there(process) for process in notes.started())


def test_no_process_outlives_its_pool(notes: Notes, tmp_path: Path) -> None:
    paths = gallery(tmp_path, 8)
    pool = DecodePool(tiny_spec())
    with ThreadPoolExecutor(3) as threads:
        assert all(threads.map(lambda path: is_good(pool, path), paths))
    assert notes.started()
    assert all(is_there(process) for process in notes.started())
    pool.close()
    assert not any(is_there(process) for process in notes.started())
    pool.close()  # twice is no mistake


def test_a_pool_that_is_closed_while_a_file_hangs_waits_for_nothing(notes: Notes, tmp_path: Path) -> None:
    bad = write(tmp_path / "bad.png", b"HANG!")
    pool = DecodePool(tiny_spec(), LONG)
    with ThreadPoolExecutor(1) as threads:
        answer = threads.submit(pool.read, bad)
        notes.wait_for("HANG!")
        pool.close()
        with pytest.raises(FileNotFoundError):
            answer.result()
    assert notes.decoded("HANG!") == 1
    (process,) = notes.started()
    assert not is_there(process)


def test_a_closed_pool_starts_no_process_that_stays(notes: Notes, tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", 1)
    pool = DecodePool(tiny_spec())
    pool.close()
    with pytest.raises(FileNotFoundError):
        pool.read(path)
    assert not any(is_there(process) for process in notes.started())


def test_an_update_that_fails_leaves_no_process(notes: Notes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gallery(tmp_path / "photos", 6)
    write(tmp_path / "photos/0003 hangs.png", b"HANG!")
    encoder = CountingEncoder()

    def fail(_: Images) -> Images:
        notes.wait_for("HANG!")
        raise KeyboardInterrupt

    monkeypatch.setattr(encoder, "embed", fail)
    with pytest.raises(KeyboardInterrupt):
        update_index(tmp_path / "index", [tmp_path / "photos"], encoder, batch_size=2, limits=LONG)
    assert notes.started()
    assert not any(is_there(process) for process in notes.started())


def test_an_update_lists_what_hung_and_crashed_and_does_not_try_it_again(notes: Notes, tmp_path: Path) -> None:
    good = gallery(tmp_path / "photos", 5)
    for kind in ("HANG!", "SEGV!", "MUCH!"):
        write(tmp_path / "photos" / f"{kind}.png", kind.encode())
    limits = Limits(seconds=1)
    report = update_index(tmp_path / "index", [tmp_path / "photos"], CountingEncoder(), limits=limits)
    assert report.counts.files == len(good)
    expected = [("HANG!.png", "timeout"), ("MUCH!.png", "too_large"), ("SEGV!.png", "crashed")]
    assert [(problem.path.name, problem.problem) for problem in report.problems] == expected
    report = update_index(tmp_path / "index", [], CountingEncoder(), limits=limits)
    assert (report.unchanged, len(report.problems)) == (len(good), 3)
    assert [notes.decoded(kind) for kind in ("HANG!", "SEGV!", "MUCH!")] == [2, 2, 1]
    update_index(tmp_path / "index", [], CountingEncoder(), retry_problems=True, limits=limits)
    assert [notes.decoded(kind) for kind in ("HANG!", "SEGV!", "MUCH!")] == [4, 4, 2]


IN_A_GROUP = """
import os, signal, sys
from pathlib import Path
from mimco_deploy.serving.guarded import DecodePool
from tests.helpers import tiny_spec

interrupts = []
signal.signal(signal.SIGINT, lambda *_: interrupts.append(1))
with DecodePool(tiny_spec()) as pool:
    before = pool.read(Path(sys.argv[1]))
    os.killpg(0, signal.SIGINT)
    after = pool.read(Path(sys.argv[1]))
print(len(interrupts), before.sha256 == after.sha256)
"""


def test_an_interrupt_for_all_of_the_group_is_for_the_parent_alone(
    notes: Notes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path / "a.png", 1)
    monkeypatch.setenv("PYTHONPATH", f"{notes.folder}{os.pathsep}{REPOSITORY}")
    command = [sys.executable, "-c", IN_A_GROUP, str(path)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, start_new_session=True)
    assert (run.returncode, run.stderr, run.stdout.split()) == (0, "", ["1", "True"])
    assert len(notes.started()) == 2, "the process of the run and one that decodes, which went on"


KILLED = """
import os, signal, sys
from pathlib import Path
from mimco_deploy.serving.guarded import DecodePool
from tests.helpers import tiny_spec

DecodePool(tiny_spec()).read(Path(sys.argv[1]))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_processes_end_with_a_parent_that_was_killed(
    notes: Notes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path / "a.png", 1)
    monkeypatch.setenv("PYTHONPATH", f"{notes.folder}{os.pathsep}{REPOSITORY}")
    run = subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False)
    assert run.returncode == -9
    _, decoder = notes.started()
    while is_there(decoder):
        threading.Event().wait(0.01)  # the limit of the test ends it


# ---------------------------------------------------------------------- processes that do not start


@pytest.mark.parametrize("program", ["/bin/false", "/nowhere/python", ""])
def test_a_python_that_is_none_is_no_fault_of_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str
) -> None:
    paths = gallery(tmp_path / "photos", 3)
    update_index(tmp_path / "index", [tmp_path / "photos"], CountingEncoder())
    for path in paths:
        os.utime(path)
    monkeypatch.setattr(sys, "executable", program)
    with pytest.raises(MimcoError, match="the processes that decode pictures do not start"):
        update_index(tmp_path / "index", [], CountingEncoder())
    monkeypatch.undo()
    report = update_index(tmp_path / "index", [], CountingEncoder())
    assert (report.changed, report.removed, report.problems, report.counts.files) == (3, 0, (), 3)


def test_what_keeps_the_processes_from_starting_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\nprint('one\\nno room\\n', file=sys.stderr, flush=True)\nos._exit(9)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with DecodePool(tiny_spec()) as pool, pytest.raises(MimcoError) as caught:
        pool.read(save(tmp_path / "a.png", 1))
    assert not isinstance(caught.value, ImageError)
    assert str(caught.value) == "the processes that decode pictures do not start (exit code 9: no room)"


FROM_A_FOLDER_OF_PICTURES = """
from pathlib import Path
from mimco_deploy.serving.guarded import DecodePool
from mimco_deploy.bundle import EncoderSpec
import json, sys

with DecodePool(EncoderSpec(**json.loads(sys.argv[1]))) as pool:
    print(pool.read(Path("a.png").absolute()).sha256.hex())
"""


@pytest.mark.parametrize("python_path", [None, ""])
def test_nothing_is_imported_from_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, python_path: str | None
) -> None:
    photos = tmp_path / "photos"
    path = save(photos / "a.png", 1)
    trap = f"open({str(tmp_path / 'sprung')!r}, 'a').write('1')\nraise SystemExit(1)\n"
    for module in ("PIL", "numpy", "hashlib", "struct", "encodings", "resource", "sitecustomize", "mimco_deploy"):
        (photos / f"{module}.py").write_text(trap)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    if python_path is not None:
        monkeypatch.setenv("PYTHONPATH", python_path)
    assert subprocess.run([sys.executable, "-c", "import PIL"], cwd=photos, check=False).returncode == 1
    assert (tmp_path / "sprung").exists(), "the trap works"
    (tmp_path / "sprung").unlink()
    spec = json.dumps({**tiny_spec().__dict__})
    run = subprocess.run(
        [sys.executable, "-P", "-c", FROM_A_FOLDER_OF_PICTURES, spec],
        cwd=photos,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.strip() == hashlib.sha256(path.read_bytes()).hexdigest()
    assert not (tmp_path / "sprung").exists()


def wide(path: Path) -> Path:
    noise(3, 90).crop((0, 0, 90, 40)).save(path)
    return path


def test_content_is_decoded_as_the_file_that_holds_it(shared_pool: DecodePool, tmp_path: Path) -> None:
    path = wide(tmp_path / "one.png")
    crop = (0.1, 0.0, 0.5, 1.0)
    of_file, of_content = shared_pool.read(path, crop=crop), shared_pool.decode(path.read_bytes(), crop)
    expected = read_pixels(path, SIDE, 1.0, "bicubic", crop=crop)
    assert of_file.pixels is not None
    assert of_content.pixels is not None
    np.testing.assert_array_equal(of_file.pixels, expected)
    np.testing.assert_array_equal(of_content.pixels, expected)
    assert of_content.facts.width_px == 90


def test_a_thumbnail_is_small(shared_pool: DecodePool, tmp_path: Path) -> None:
    content = wide(tmp_path / "one.png").read_bytes()
    assert decode_image(shared_pool.thumbnail(content, 32)).size == (32, 14)
    assert decode_image(shared_pool.thumbnail(content, 512)).size == (90, 40)


def test_a_process_goes_on_after_a_crop_of_nothing_and_content_that_is_no_picture(
    pool: DecodePool, tmp_path: Path, notes: Notes
) -> None:
    good = wide(tmp_path / "one.png").read_bytes()
    with pytest.raises(ConfigError, match="holds nothing"):
        pool.decode(good, (0.0, 0.0, 0.001, 0.001))
    with pytest.raises(RefusedError) as caught:
        pool.decode(b"no picture")
    assert caught.value.problem == "unsupported"
    assert pool.decode(good).pixels is not None
    assert len(notes.started()) == 1


@pytest.mark.parametrize(("content", "problem"), [(b"SEGV!", "crashed"), (b"HANG!", "timeout")])
def test_content_that_brings_its_decoder_down_is_refused(notes: Notes, content: bytes, problem: str) -> None:
    del notes
    with DecodePool(tiny_spec(), Limits(seconds=0.5)) as pool:
        with pytest.raises(RefusedError, match="the picture") as caught:
            pool.decode(content)
        assert caught.value.problem == problem
