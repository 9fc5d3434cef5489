"""`mimco search` from a shell."""

from __future__ import annotations

import io
import json
import os
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from mimco_deploy.cli import main
from mimco_deploy.serving import update_index
from mimco_deploy.serving.encoders import load_encoder
from tests.helpers import noise, save, tiny_bundle
from tests.unit.serving.place import COUNT


def run(workspace: Path, *words: object, stdin: bytes = b"") -> Result:
    return CliRunner().invoke(main, ["--workspace", str(workspace), "search", *map(str, words)], input=stdin)


def test_a_picture_on_stdin_and_lists_are_searched(workspace: Path) -> None:
    path = workspace / "photos/0008.png"
    piped = json.loads(run(workspace, "-", "-k", 2, "--json", stdin=path.read_bytes()).stdout)
    assert (piped["query"], piped["hits"][0]["path"]) == ("-", str(path))
    paths = [workspace / f"photos/000{number}.png" for number in (1, 2, 3)]
    for separator in (b"\n", b"\0"):
        listed = run(workspace, "--list", "-", "-k", 1, "--json", stdin=separator.join(map(os.fsencode, paths)))
        lines = [json.loads(line) for line in listed.stdout.splitlines()]
        assert [line["hits"][0]["path"] for line in lines] == [line["query"] for line in lines] == list(map(str, paths))


def test_standard_input_is_the_query_alone(workspace: Path) -> None:
    refused = run(workspace, workspace / "photos/0001.png", "--plus", "-:2", "--json")
    assert refused.exit_code == 2
    assert "standard input is read for the query alone" in refused.stderr


def test_a_file_may_have_the_name_of_standard_input(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    one, two = workspace / "photos/0001.png", workspace / "photos/0002.png"
    shutil.copyfile(one, "-")
    piped = two.read_bytes()
    assert run(workspace, "./-", "-", "-k", 1, "-0", stdin=piped).stdout_bytes == b"%b\0%b\0" % (bytes(one), bytes(two))
    assert run(workspace, "--list", "-", "-k", 1, "-0", stdin=b"-\n").stdout_bytes == b"%b\0" % bytes(one)
    Path("-").write_bytes(bytes(two))
    assert run(workspace, "--list", "./-", "-k", 1, "-0").stdout_bytes == b"%b\0" % bytes(two)
    assert run(workspace, "-", "--list", "-", stdin=bytes(two)).exit_code == 2


def test_json_lines_and_paths_with_nul(workspace: Path) -> None:
    path = workspace / "photos/0008.png"
    lines = [json.loads(line) for line in run(workspace, path, "-k", 3, "--jsonl").stdout.splitlines()]
    keys = {"query", "rank", "path", "score", "content", "expected_by_chance", "confidence"}
    assert [(line["rank"], line.keys()) for line in lines] == [(1, keys), (2, keys), (3, keys)]
    raw = run(workspace, path, "-k", 3, "-0").stdout_bytes
    assert [os.fsdecode(one) for one in raw.split(b"\0")] == [*(line["path"] for line in lines), ""]


def test_nothing_found_ends_with_three(workspace: Path) -> None:
    path = workspace / "photos/0008.png"
    none = run(workspace, path, "--where", "1 = 0")
    assert (none.exit_code, none.stdout) == (3, "")
    assert "nothing found" in none.stderr
    assert run(workspace, path, "--where", "1 = 0", "--json").exit_code == 3
    assert run(workspace, path, "-k", 1).exit_code == 0


def test_a_query_that_is_none_does_not_stop_the_others(workspace: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jpg").write_bytes(b"no picture")
    done = run(workspace, tmp_path / "bad.jpg", workspace / "photos/0001.png", "-k", 1)
    assert done.exit_code == 0
    assert "bad.jpg" in done.stderr
    assert "0001.png" in done.stdout
    assert run(workspace, tmp_path / "bad.jpg").exit_code == 1
    all_bad = run(workspace, tmp_path / "bad.jpg", tmp_path / "gone.jpg")
    assert (all_bad.exit_code, "nothing found" in all_bad.stderr) == (1, False)
    lines = run(workspace, tmp_path / "bad.jpg", workspace / "photos/0001.png", "-k", 1, "--json").stdout.splitlines()
    bad, good = map(json.loads, lines)
    assert "bad.jpg" in bad["error"]
    assert "error" not in good


def test_a_crop_outside_of_one_query_does_not_stop_the_others(workspace: Path, tmp_path: Path) -> None:
    noise(1).resize((200, 200)).save(tmp_path / "large.png")
    done = run(workspace, workspace / "photos/0001.png", tmp_path / "large.png", "--crop", "150,150,20,20", "--json")
    assert done.exit_code == 0
    assert ["error" in json.loads(line) for line in done.stdout.splitlines()] == [True, False]
    assert run(workspace, workspace / "photos/0001.png", "--crop", "150,150,20,20").exit_code == 1


def test_a_query_that_cancels_itself_does_not_stop_the_others(workspace: Path) -> None:
    one, two = workspace / "photos/0001.png", workspace / "photos/0002.png"
    done = run(workspace, one, two, "--minus", one, "-k", 1, "--json")
    assert done.exit_code == 0
    assert ["error" in json.loads(line) for line in done.stdout.splitlines()] == [True, False]
    assert done.stderr.count("cancel each other") == 1
    assert run(workspace, one, "--minus", one).exit_code == 1
    wrong = run(workspace, one, two, "--minus", one, "--where", "colour = 1")
    assert (wrong.exit_code, wrong.stderr.count("cannot be used")) == (1, 1)
    wrong = run(workspace, two, two, "--minus", one, "--root", workspace.parent / "nowhere")
    assert (wrong.exit_code, wrong.stderr.count("Error: ")) == (1, 1)


def test_a_list_of_another_system_and_an_empty_one(workspace: Path) -> None:
    path = bytes(workspace / "photos/0001.png")
    listed = run(workspace, "--list", "-", "-k", 1, "-0", stdin=b"\xef\xbb\xbf%b\r\n%b\r\n" % (path, path))
    assert listed.stdout_bytes == 2 * (path + b"\0")
    empty = run(workspace, "--list", "-", stdin=b"\n")
    assert (empty.exit_code, "names no picture" in empty.stderr) == (1, True)


def test_names_cannot_steer_the_terminal_and_are_else_shown_as_they_are(tmp_path: Path) -> None:
    tiny_bundle(tmp_path / "encoder")
    steering = "\x1b]0;mine\x07\x9b\u2028\u202e\u2066\u200f\n"
    harmless = "写\u3000真\u202f\xa0👩\u200d💻\u200c\ue000\U000e0067"
    save(tmp_path / f"photos/a{steering}b{harmless}c.png", 1)
    update_index(tmp_path / "index", [tmp_path / "photos"], load_encoder(tmp_path / "encoder"))
    shown = run(tmp_path, save(tmp_path / "query.png", 1)).stdout
    assert f"a�]0;mine�������b{harmless}c.png" in shown
    assert f"/{harmless}.png does not exist" in run(tmp_path, tmp_path / f"{harmless}.png").stderr
    assert ascii(steering)[1:-1] in run(tmp_path, tmp_path / f"{steering}.png").stderr


def test_the_options_narrow_what_is_found(workspace: Path) -> None:
    path = workspace / "photos/0008.png"
    every = [json.loads(line) for line in run(workspace, path, "-k", COUNT, "--jsonl").stdout.splitlines()]
    scored = run(workspace, path, "-k", COUNT, "--jsonl", "--min-score", every[4]["score"]).stdout.splitlines()
    assert [json.loads(line) for line in scored] == every[:5]
    sure = run(workspace, path, "-k", COUNT, "--jsonl", "--min-confidence", 0.9).stdout.splitlines()
    assert [json.loads(line) for line in sure] == [hit for hit in every if hit["confidence"] >= 0.9]
    where = ("--where", "name < '0005.png'", "--where", "name > '0002.png'")
    names = [
        Path(json.loads(line)["path"]).name for line in run(workspace, path, "--jsonl", *where).stdout.splitlines()
    ]
    assert sorted(names) == ["0003.png", "0004.png"]
    assert run(workspace, path, "--root", workspace).exit_code == 0
    elsewhere = run(workspace, path, "--root", workspace / "encoder")
    assert (elsewhere.exit_code, "holds no indexed picture" in elsewhere.stderr) == (1, True)


def test_weights_and_crops_are_read(workspace: Path, tmp_path: Path) -> None:
    one, two = workspace / "photos/0001.png", workspace / "photos/0002.png"
    plain = run(workspace, one, "--plus", f"{two}:0.001", "-k", 1, "--jsonl").stdout
    heavy = run(workspace, one, "--plus", f"{two}:100", "-k", 1, "--jsonl").stdout
    assert (json.loads(plain)["path"], json.loads(heavy)["path"]) == (str(one), str(two))
    least = run(workspace, one, "--minus", f"{two}:100", "-k", COUNT, "--jsonl").stdout.splitlines()
    assert json.loads(least[-1])["path"] == str(two)
    odd = shutil.copyfile(two, tmp_path / "a:5")  # a name that looks like a weight is a name
    assert json.loads(run(workspace, one, "--plus", odd, "--minus", one, "-k", 1, "--jsonl").stdout)["path"]
    assert run(workspace, one, "--crop", "0,0,32,32", "-k", 1).exit_code == 0
    for wrong in ("0,0,32", "a,b,c,d", "-1,0,5,5", "nan,0,1,1"):
        assert run(workspace, one, "--crop", wrong).exit_code == 2
    for wrong in (f"{two}:0", f"{two}:-1", f"{two}:inf", f"{two}:100.5", f"{two}:1e39"):
        assert run(workspace, one, "--plus", wrong).exit_code == 2


def test_hits_are_copied_without_writing_over_anything(workspace: Path, tmp_path: Path) -> None:
    path = workspace / "photos/0008.png"
    assert run(workspace, path, "-k", 2, "--copy-to", tmp_path / "hits").exit_code == 0
    first, second = sorted((tmp_path / "hits").iterdir())
    assert first.name == "001-0008.png"
    assert first.read_bytes() == path.read_bytes()
    second.write_bytes(b"mine")
    first.unlink()
    first.symlink_to(tmp_path / "nowhere")
    again = run(workspace, path, "-k", 2, "--copy-to", tmp_path / "hits")
    assert again.stderr.count("exists and is kept") == 2
    assert second.read_bytes() == b"mine"
    assert not (tmp_path / "nowhere").exists()
    assert run(workspace, path, "--copy-to", path / "hits").exit_code == 1


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_copy_that_ends_halfway_leaves_nothing_and_has_no_name_before_it_is_whole(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    meanwhile: list[str] = []

    def half(source: io.BufferedReader, copy: io.BufferedWriter) -> None:
        copy.write(source.read(10))
        meanwhile.extend(path.name for path in (tmp_path / "hits").iterdir())
        raise error

    monkeypatch.setattr(shutil, "copyfileobj", half)
    done = run(workspace, workspace / "photos/0008.png", "-k", 1, "--copy-to", tmp_path / "hits")
    assert done.exit_code == 1
    assert ("cannot be copied (No space left on device)" in done.stderr) == isinstance(error, OSError)
    assert [name.endswith(".tmp") for name in meanwhile] == [True]
    assert list((tmp_path / "hits").iterdir()) == []


def test_hits_of_one_name_and_of_long_names_are_copied_all(tmp_path: Path) -> None:
    tiny_bundle(tmp_path / "encoder")
    save(tmp_path / "photos/a/same.png", 1)
    save(tmp_path / "photos/b/same.png", 2)
    save(tmp_path / f"photos/{'ü' * 125}.png", 3)
    update_index(tmp_path / "index", [tmp_path / "photos"], load_encoder(tmp_path / "encoder"))
    queries = [save(tmp_path / f"query-{number}.png", number) for number in (1, 2, 3)]
    assert run(tmp_path, *queries, "-k", 1, "--copy-to", tmp_path / "hits").exit_code == 0
    names = sorted(path.name for path in (tmp_path / "hits").iterdir())
    assert names[:2] == ["001-same (2).png", "001-same.png"]
    assert names[2].startswith("001-üüü")
    assert names[2].endswith("ü.png")


def test_a_query_on_stdin_has_a_sheet(workspace: Path, tmp_path: Path) -> None:
    content = io.BytesIO()
    noise(4).save(content, "PNG")
    assert run(workspace, "-", "--sheet", tmp_path / "s.html", stdin=content.getvalue()).exit_code == 0
    page = (tmp_path / "s.html").read_text()
    assert "picture on stdin" in page
    assert "clear" in page


def test_a_sheet_shows_all_that_was_searched_for(workspace: Path, tmp_path: Path) -> None:
    one, two = workspace / "photos/0001.png", workspace / "photos/0002.png"
    words = ("--crop", "0,0,0.5,0.5", "--minus", f"{two}:0.5", "--sheet", tmp_path / "s.html")
    assert run(workspace, one, *words).exit_code == 0
    page = (tmp_path / "s.html").read_text()
    assert "0001.png, a part" in page
    assert "and unlike 0002.png, weight 0.5" in page


def test_a_sheet_is_not_written_over_a_picture(workspace: Path) -> None:
    path = workspace / "photos/0001.png"
    before = path.read_bytes()
    refused = run(workspace, path, "--sheet", path)
    assert (refused.exit_code, path.read_bytes() == before) == (2, True)


def test_a_sheet_is_written_where_a_link_leads_and_over_nothing_but_a_file(workspace: Path, tmp_path: Path) -> None:
    path = workspace / "photos/0001.png"
    (tmp_path / "link.html").symlink_to(tmp_path / "real.html")
    for _ in range(2):
        assert run(workspace, path, "--sheet", tmp_path / "link.html").exit_code == 0
        assert (tmp_path / "link.html").is_symlink()
        assert "0001.png" in (tmp_path / "real.html").read_text()
    os.mkfifo(tmp_path / "pipe.html")
    refused = run(workspace, path, "--sheet", tmp_path / "pipe.html")
    assert (refused.exit_code, refused.stderr.count("\n")) == (1, 1)
    assert "pipe.html is no regular file" in refused.stderr
    assert (tmp_path / "pipe.html").is_fifo()
    (tmp_path / "picture.html").symlink_to(path)
    assert run(workspace, path, "--sheet", tmp_path / "picture.html").exit_code == 2


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("a.png", "--json", "--jsonl"),
        ("a.png", "--why"),
        ("-", "-"),
        ("a.png", "b.png", "--sheet", "s.html"),
        ("a.png", "--table", "t.csv"),
        ("a.png", "--min-score", "nan"),
        ("a.png", "--min-confidence", "nan"),
    ],
)
def test_words_that_do_not_go_together_are_refused(workspace: Path, words: tuple[str, ...]) -> None:
    assert run(workspace, *words).exit_code == 2
