"""Revisited Oxford and Paris: the authors' numbers, and ground truth from files that nobody need trust."""

from __future__ import annotations

import collections
import datetime
import io
import json
import os
import pickle
import struct
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mimco_deploy.errors import EvaluationError
from mimco_deploy.evaluation import ground_truth as module
from mimco_deploy.evaluation.ground_truth import GroundTruth, read_ground_truth
from mimco_deploy.evaluation.revisited import Protocol, evaluate_revisited

Labels = npt.NDArray[np.int64]
LISTS = ("easy", "hard", "junk")


def truth_of(gnd: list[dict[str, Any]], pictures: int) -> GroundTruth:
    lists = {key: tuple(np.array(entry[key], np.int64) for entry in gnd) for key in LISTS}
    return GroundTruth(
        gallery=tuple(f"picture{number}" for number in range(pictures)),
        queries=tuple(f"query{number}" for number in range(len(gnd))),
        boxes=(None,) * len(gnd),
        **lists,
    )


def chosen(truth: GroundTruth, queries: Labels) -> GroundTruth:
    """Some of the queries."""
    lists = {key: tuple(getattr(truth, key)[query] for query in queries) for key in LISTS}
    names = tuple(truth.queries[query] for query in queries)
    return replace(truth, queries=names, boxes=(None,) * len(names), **lists)


def assert_protocol(ours: Protocol, theirs: Any, name: str) -> None:
    assert ours.mean_average_precision == pytest.approx(float(theirs[f"{name}_map"]), abs=1e-12)
    np.testing.assert_allclose(list(ours.mean_precision.values()), theirs[f"{name}_mpr"], rtol=0, atol=1e-12)
    np.testing.assert_allclose(ours.average_precision, theirs[f"{name}_aps"], rtol=0, atol=1e-12)
    np.testing.assert_allclose(ours.precision, theirs[f"{name}_prs"], rtol=0, atol=1e-12)


@pytest.mark.golden("revisitop/map_seed*.npz")
def test_all_protocols_are_the_authors(golden_file: Path) -> None:
    with np.load(golden_file, allow_pickle=False) as theirs:
        gallery = theirs["X"].T
        truth = truth_of(json.loads(str(theirs["gnd_json"])), len(gallery))
        ks = tuple(theirs["kappas"].tolist())
        ranks = theirs["ranks"].T
        scores = -np.argsort(ranks, axis=1).astype(np.float32)  # in the same order, without rounding
        for ranked in (ranks, scores):
            found = evaluate_revisited(ranked, truth, ks)
            for name in ("easy", "medium", "hard"):
                assert_protocol(getattr(found, name), theirs, name)
        deep = evaluate_revisited(ranks, truth, (3, 50, len(gallery) + 10)).medium
        np.testing.assert_allclose(deep.precision, theirs["medium_kappas_3_50_big_prs"], rtol=0, atol=1e-12)
        means = list(deep.mean_precision.values())
        np.testing.assert_allclose(means, theirs["medium_kappas_3_50_big_mpr"], rtol=0, atol=1e-12)
        junkless = replace(truth, junk=(np.array([], np.int64),) * len(truth.queries))
        without = evaluate_revisited(ranks, junkless, ks).medium
        np.testing.assert_allclose(without.average_precision, theirs["nojunk_aps"], rtol=0, atol=1e-12)
        np.testing.assert_allclose(list(without.mean_precision.values()), theirs["nojunk_mpr"], rtol=0, atol=1e-12)


@pytest.mark.golden("revisitop/map_seed*.npz")
def test_rankings_cut_off_are_measured_as_the_authors_do(golden_file: Path) -> None:
    with np.load(golden_file, allow_pickle=False) as theirs:
        queries = theirs["trunc_queries"]
        truth = chosen(truth_of(json.loads(str(theirs["gnd_json"])), len(theirs["ranks"])), queries)
        ranks = theirs["ranks"].T[queries, : int(theirs["trunc_n"])]
        found = evaluate_revisited(ranks, truth, tuple(theirs["kappas"].tolist()))
        for name in ("easy", "medium", "hard"):
            assert_protocol(getattr(found, name), theirs, f"trunc_{name}")


@pytest.mark.golden("revisitop/gnd_seed*.json")
def test_a_ground_truth_reads_the_same_from_json_and_every_pickle(golden_file: Path, tmp_path: Path) -> None:
    gnd = json.loads(golden_file.read_text())
    pictures = 1 + max(255, *(number for entry in gnd for key in LISTS for number in entry[key]))
    content = published(gnd, pictures)
    expected = truth_of(gnd, pictures)
    (tmp_path / "gnd.json").write_text(json.dumps(content))
    assert_same(read_ground_truth(tmp_path / "gnd.json"), expected, content)
    for protocol in (0, 1, 2, 3, 4):
        for name, write in WRITERS.items():
            path = tmp_path / f"{name}{protocol}.pkl"
            path.write_bytes(pickle.dumps(write(content), protocol))
            assert_same(read_ground_truth(path), expected, content)


def published(gnd: list[dict[str, Any]], pictures: int = 300) -> dict[str, Any]:
    """In the shape of the files that are published; for JSON, or for a pickle of lists."""
    return {
        "imlist": [f"picture{number}" for number in range(pictures)],
        "qimlist": [f"query{number}" for number in range(len(gnd))],
        "gnd": [{**entry, "bbx": [136.5, 34.1 + query, 648.5, 955.7]} for query, entry in enumerate(gnd)],
    }


def with_arrays(content: dict[str, Any], dtype: str) -> dict[str, Any]:
    arrays = [
        {key: np.array(value, dtype if key in LISTS else ">f8") for key, value in e.items()} for e in content["gnd"]
    ]
    return {**content, "gnd": arrays}


def with_scalars(content: dict[str, Any]) -> dict[str, Any]:
    scalars = [{key: list(np.array(value)) for key, value in entry.items()} for entry in content["gnd"]]
    return {**content, "gnd": scalars}


WRITERS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "lists": lambda content: content,
    "int64": lambda content: with_arrays(content, "<i8"),
    "big_endian": lambda content: with_arrays(content, ">i4"),
    "matlab": lambda content: with_arrays(content, "<f8"),
    "scalars": with_scalars,
}


def assert_same(read: GroundTruth, expected: GroundTruth, content: dict[str, Any]) -> None:
    assert (read.gallery, read.queries) == (expected.gallery, expected.queries)
    assert read.boxes == tuple(tuple(entry["bbx"]) for entry in content["gnd"])
    for key in LISTS:
        for ours, theirs in zip(getattr(read, key), getattr(expected, key), strict=True):
            assert ours.dtype == np.int64
            np.testing.assert_array_equal(ours, theirs)


def test_a_pickle_of_python_2_is_read(tmp_path: Path) -> None:
    """There, names and an array's bytes are both the str of Python 2; as Python 3 cannot write it, by hand."""
    data = struct.pack("<2q", 0, 255)
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01K\x02\x85cnumpy\ndtype\nU\x02i8K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
    )
    array += b"U" + bytes([len(data)]) + data + b"tb"
    names = b"]" + b"".join(b"U\x04p" + b"%03d" % number + b"a" for number in range(256))
    entry = b"}U\x04easy" + array + b"sU\x04hard]sU\x04junk]s"
    path = tmp_path / "gnd.pkl"
    path.write_bytes(b"\x80\x02}U\x06imlist" + names + b"sU\x07qimlist]U\x01qasU\x03gnd]" + entry + b"as.")
    truth = read_ground_truth(path)
    assert truth.easy[0].tolist() == [0, 255]
    assert truth.gallery[255] == "p255"
    assert truth.boxes == (None,)


class Calls:
    """Unpickled, it calls what an attacker chose."""

    def __init__(self, function: Callable[..., object], *args: object) -> None:
        self.call = (function, args)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("function", ["system", "eval", "exec"])
def test_code_in_a_pickle_is_refused_and_does_not_run(function: str, protocol: int, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    source = f"__import__('pathlib').Path({str(trace)!r}).touch()"
    evil = {
        "system": Calls(os.system, f"touch '{trace}'"),
        "eval": Calls(eval, source),
        "exec": Calls(exec, source),
    }[function]
    content = published([{"easy": [0], "hard": [], "junk": evil}])
    written = pickle.dumps(content, protocol)
    refuse(tmp_path, written, "it names|it has the instruction")
    assert not trace.exists()
    pickle.loads(written)
    assert trace.exists()  # it would have


def refuse(folder: Path, content: bytes, match: str, suffix: str = ".pkl") -> None:
    path = folder / f"gnd{suffix}"
    path.write_bytes(content)
    with pytest.raises(EvaluationError, match=match) as raised:
        read_ground_truth(path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


NOT_DATA: dict[str, object] = {
    "array of objects": np.array([{}, []], object),
    "array of records": np.zeros(2, [("a", "i4")]),
    "array of texts": np.array(["a", "b"]),
    "array of dates": np.array(["2020-01-01"], "M8[D]"),
    "array of complex": np.zeros(2, complex),
    "array of three dimensions": np.zeros((1, 1, 1), np.int64),
    "scalar text": np.str_("a"),
    "another class": collections.OrderedDict(),
    "a date": datetime.date(2020, 1, 1),
    "a set": {1, 2},
    "a class": GroundTruth,
    "a function": os.system,
    "numpy's function": np.load,
}


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("name", NOT_DATA)
def test_whatever_is_no_number_list_or_name_is_refused(name: str, protocol: int, tmp_path: Path) -> None:
    content = {**published([{"easy": [0], "hard": [], "junk": []}]), "more": NOT_DATA[name]}
    refuse(tmp_path, pickle.dumps(content, protocol), "it names|it has ")


def of_bytes(body: bytes) -> bytes:
    return b"\x80\x02" + body + b"."


DTYPE = b"cnumpy\ndtype\nX\x02\x00\x00\x00i8\x85R"
ARRAY = b"cnumpy.core.multiarray\n_reconstruct\n)R"
HOSTILE: dict[str, tuple[bytes, str]] = {
    "memo of 64 GiB": (of_bytes(b"Nr\xff\xff\xff\xff"), "counts wrongly"),
    "text of 4 GiB": (of_bytes(b"X\xff\xff\xff\xffabc"), "cannot be read"),
    "bytes of 8 EiB": (b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7fabc.", "instruction BINBYTES8|cannot be read"),
    "bytearray of 1 EiB": (b"\x80\x05\x96" + b"\x00" * 7 + b"\x10.", "instruction BYTEARRAY8|cannot be read"),
    "frame of 8 EiB": (b"\x80\x04\x95" + b"\xff" * 7 + b"\x7fN.", "cannot be read"),
    "array larger than its bytes": (
        of_bytes(ARRAY + b"(K\x01\x8a\x05\x00\x00\x00\x00\x10\x85" + DTYPE + b"\x89X\x08\x00\x00\x0012345678tb"),
        "more or fewer bytes",
    ),
    "array of negative size": (
        of_bytes(ARRAY + b"(K\x01J\xff\xff\xff\xff\x85" + DTYPE + b"\x89Utb"),
        "cannot be read|shape",
    ),
    "tuples in tuples": (of_bytes(b"})" + b"\x85" * 300_000 + b"Ns"), "tuples"),
    "lists in lists": (of_bytes(b"]" * 300_000 + b"a" * 299_999), "holds no dict"),
    "list in itself": (of_bytes(b"]q\x00h\x00a"), "holds no dict"),
    "dict in itself": (of_bytes(b"}q\x00X\x06\x00\x00\x00imlisth\x00s"), "imlist is no list"),
    "attributes of a stand-in": (of_bytes(b"c_codecs\nencode\n}X\x01\x00\x00\x00aK\x01sb"), "changes what it names"),
    "slots of a stand-in": (of_bytes(b"cnumpy\ndtype\n(N}X\x05\x00\x00\x00_makeNstb"), "changes what it names"),
    "persistent object": (of_bytes(b"K\x01Q"), "instruction BINPERSID"),
    "instance": (of_bytes(b"(ios\nsystem\n"), "instruction INST"),
    "encoding that is a program": (
        of_bytes(b"c_codecs\nencode\nX\x01\x00\x00\x00aX\x03\x00\x00\x00zip\x86R"),
        "latin1",
    ),
    "bytes of a size": (of_bytes(b"c__builtin__\nbytes\nJ\x00\x00\x00\x7f\x85R"), "cannot be read"),
    "type with fields": (
        of_bytes(DTYPE + b"(K\x03X\x01\x00\x00\x00<N]K\x01a}K\x08K\x01K\x00tb"),
        "type that is no number",
    ),
    "type of type": (of_bytes(b"cnumpy\ndtype\n]\x85R"), "no numbers"),
    "path through a name": (b"\x80\x04X\x05\x00\x00\x00numpyX\x09\x00\x00\x00f2py.os.x\x93.", "it names"),
    "nothing": (b"", "cannot be read"),
    "half": (pickle.dumps(published([]), 2)[:100], "cannot be read"),
    "a picture": (b"\x89PNG\r\n\x1a\n" + bytes(50), "cannot be read|instruction"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_bytes_are_refused_in_one_line(name: str, tmp_path: Path) -> None:
    content, match = HOSTILE[name]
    refuse(tmp_path, content, match)


def test_one_list_that_counts_for_many_queries_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_INDICES", 1000)
    shared = np.zeros(400, np.int64)
    for form in (shared, shared.tolist()):
        entry = {"easy": form, "hard": form, "junk": form}
        refuse(
            tmp_path, pickle.dumps(published([entry]), 2), r"gnd\[0\].junk and the lists before it have more than 1000"
        )


def test_the_same_bytes_in_many_arrays_take_no_room(tmp_path: Path) -> None:
    size = 2**20
    text = b"c_codecs\nencode\nX" + struct.pack("<I", size) + bytes(size) + b"X\x06\x00\x00\x00latin1\x86R"
    state = b"(K\x01J" + struct.pack("<i", size) + b"\x85cnumpy\ndtype\nX\x02\x00\x00\x00i1\x85R\x89" + text + b"t"
    path = tmp_path / "gnd.pkl"
    path.write_bytes(of_bytes(b"]" + ARRAY + state + b"q\x00ba" + (ARRAY + b"h\x00ba") * 100))
    tracemalloc.start()
    with pytest.raises(EvaluationError, match="holds no dict"):
        read_ground_truth(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 * size


def test_a_large_file_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "gnd.pkl"
    with path.open("wb") as file:
        file.truncate(9 * 2**20)
    with pytest.raises(EvaluationError, match="more than 8 MiB"):
        read_ground_truth(path)


def test_only_what_was_named_is_ever_looked_up() -> None:
    looked_up: list[tuple[str, str]] = []

    class Watched(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> object:
            looked_up.append((module, name))
            return super().find_class(module, name)

    for protocol in (0, 1, 2, 3, 4):
        for write in WRITERS.values():
            content = write(published([{"easy": [], "hard": [3, 200], "junk": [1]}]))
            Watched(io.BytesIO(pickle.dumps(content, protocol))).load()
    known = {(name.replace("numpy._core", "numpy.core"), attribute) for name, attribute in looked_up}
    assert known <= set(module._STAND_INS)
    assert len(known) >= 5  # that numpy writes what is thought


BROKEN: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "empty gallery": (lambda content: content["imlist"].clear(), "imlist is empty; expected one name"),
    "no queries": (lambda content: (content["qimlist"].clear(), content["gnd"].clear())[0], "qimlist is empty"),
    "no gallery": (lambda content: content.pop("imlist"), "imlist is no list"),
    "queries of another number": (lambda content: content["qimlist"].append("more"), "gnd is no list of 2 dicts"),
    "entry that is a list": (lambda content: content["gnd"].__setitem__(0, []), "gnd is no list of 1 dicts"),
    "missing list": (lambda content: content["gnd"][0].pop("junk"), r"gnd\[0\].junk is no list"),
    "number past the gallery": (lambda content: content["gnd"][0]["easy"].append(300), r"gnd\[0\].easy holds"),
    "negative number": (lambda content: content["gnd"][0]["hard"].append(-1), r"gnd\[0\].hard holds"),
    "half a number": (lambda content: content["gnd"][0]["hard"].append(0.5), r"gnd\[0\].hard holds"),
    "infinity": (lambda content: content["gnd"][0]["hard"].append(float("inf")), r"gnd\[0\].hard holds"),
    "NaN": (lambda content: content["gnd"][0]["hard"].append(float("nan")), r"gnd\[0\].hard holds"),
    "truth value": (lambda content: content["gnd"][0]["hard"].append(True), r"gnd\[0\].hard holds"),
    "list in a list": (lambda content: content["gnd"][0]["hard"].append([1]), r"gnd\[0\].hard holds"),
    "box of three": (lambda content: content["gnd"][0]["bbx"].pop(), r"gnd\[0\].bbx is no list of four"),
    "box of text": (lambda content: content["gnd"][0].update(bbx="1234"), r"gnd\[0\].bbx is no list of four"),
    "box inside out": (lambda content: content["gnd"][0]["bbx"].reverse(), r"gnd\[0\].bbx is no box"),
    "box without end": (
        lambda content: content["gnd"][0].update(bbx=[0, 0, float("inf"), 1]),
        r"gnd\[0\].bbx is no box",
    ),
    "name that is a number": (lambda content: content["imlist"].__setitem__(3, 3), "imlist is no list of names"),
}


@pytest.mark.parametrize("suffix", [".json", ".pkl"])
@pytest.mark.parametrize("name", BROKEN)
def test_what_does_not_fit_is_named(name: str, suffix: str, tmp_path: Path) -> None:
    content = published([{"easy": [0], "hard": [], "junk": []}])
    breaks, match = BROKEN[name]
    breaks(content)
    written = json.dumps(content).encode() if suffix == ".json" else pickle.dumps(content, 2)
    refuse(tmp_path, written, match, suffix)


@pytest.mark.parametrize(
    "name", ["../a", "a/../../b", "/etc/passwd", "a\\b", "C:a", "", "a//b", "./a", "a\0b", "a\nb", ".."]
)
def test_names_that_lead_elsewhere_are_refused(name: str, tmp_path: Path) -> None:
    for key in ("imlist", "qimlist"):
        content = published([{"easy": [0], "hard": [], "junk": []}])
        content[key][-1] = name
        refuse(tmp_path, json.dumps(content).encode(), rf"{key}\[\d+\] is", ".json")


@pytest.mark.parametrize("content", [b"", b"[", b"\xff", b"[" * 100_000, b"1" * 5000, b"null"])
def test_broken_json_is_refused(content: bytes, tmp_path: Path) -> None:
    refuse(tmp_path, content, "cannot be read|holds no dict", ".json")


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="there is no file"):
        read_ground_truth(tmp_path / "gnd.pkl")
    with pytest.raises(EvaluationError, match="no ground truth"):
        read_ground_truth(tmp_path / "gnd.mat")


def test_a_box_may_be_missing_and_names_may_lie_in_folders(tmp_path: Path) -> None:
    content = published([{"easy": [0], "hard": [], "junk": []}])
    del content["gnd"][0]["bbx"]
    content["imlist"][0] = "jpg/all_souls.1"
    (tmp_path / "gnd.json").write_text(json.dumps(content))
    truth = read_ground_truth(tmp_path / "gnd.json")
    assert truth.boxes == (None,)
    assert truth.gallery[0] == "jpg/all_souls.1"


ONE = truth_of([{"easy": [4], "hard": [2], "junk": [0]}], 6)


def test_protocols_take_positives_and_junk_as_stated() -> None:
    found = evaluate_revisited(np.array([[0, 1, 2, 3, 4, 5]]), ONE, (1, 2, 10))
    assert found.easy.average_precision[0] == pytest.approx((0 / 2 + 1 / 3) / 2)  # 1 3 4: 0 and 2 are junk
    assert found.hard.average_precision[0] == pytest.approx((0 / 1 + 1 / 2) / 2)  # 1 2: 0 and 4 are junk
    medium = (0 / 1 + 1 / 2) / 2 + (1 / 3 + 2 / 4) / 2  # 1 2 3 4
    assert found.medium.average_precision[0] == pytest.approx(medium / 2)
    assert found.medium.mean_precision == {1: 0, 2: 1 / 2, 10: 2 / 4}
    assert found.easy.mean_precision == {1: 0, 2: 0, 10: 1 / 3}


def test_a_perfect_ranking_is_1_and_queries_without_positives_are_left_out() -> None:
    gnd = [{"easy": [1], "hard": [5], "junk": [3]}, {"easy": [], "hard": [2], "junk": []}]
    truth = truth_of(gnd, 6)
    found = evaluate_revisited(np.array([[3, 1, 5, 0, 2, 4], [2, 0, 1, 3, 4, 5]]), truth)
    for protocol in (found.easy, found.medium, found.hard):
        assert protocol.mean_average_precision == 1
        assert protocol.mean_precision == {1: 1, 5: 1, 10: 1}
    assert [found.easy.without_positives, found.medium.without_positives] == [1, 0]
    assert np.isnan(found.easy.average_precision[1])
    assert np.isnan(found.easy.precision[1]).all()


def test_a_ranking_cut_off_before_the_first_positive_is_refused_with_its_query() -> None:
    with pytest.raises(EvaluationError, match="query query0 hold none of its 1 positives in protocol easy"):
        evaluate_revisited(np.array([[0, 1, 2]]), ONE)


@pytest.mark.parametrize(
    ("ranks", "match"),
    [
        (np.array([[0, 1, 6]]), "not in the gallery"),
        (np.array([[0, -1, 4]]), "not in the gallery"),
        (np.array([[4, 2, 4]]), "twice"),
        (np.array([[0, 1, 2], [0, 1, 2]]), "shape"),
        (np.zeros((1, 5)), "shape"),
        (np.arange(7)[None], "shape"),
        (np.full((1, 6), np.nan), "NaN"),
        (np.zeros((1, 6), bool), "type bool"),
    ],
)
def test_rankings_that_do_not_fit_are_refused(ranks: Any, match: str) -> None:
    with pytest.raises(EvaluationError, match=match):
        evaluate_revisited(ranks, ONE)


def test_of_equal_scores_the_first_of_the_gallery_comes_first() -> None:
    by_scores = evaluate_revisited(np.zeros((1, 6)), ONE)
    by_ranks = evaluate_revisited(np.arange(6)[None], ONE)
    assert by_scores.medium.average_precision == by_ranks.medium.average_precision


@st.composite
def cases(draw: st.DrawFn) -> tuple[Labels, GroundTruth]:
    """Rankings of all pictures, each of which is easy, hard, junk or wrong; at least one easy and one hard."""
    pictures = draw(st.integers(3, 30))
    gnd, rankings = [], []
    for _ in range(draw(st.integers(1, 4))):
        kinds = [0, 1, *draw(st.lists(st.integers(0, 3), min_size=pictures - 2, max_size=pictures - 2))]
        gnd.append({key: [n for n, kind in enumerate(kinds) if kind == code] for code, key in enumerate(LISTS)})
        rankings.append(draw(st.permutations(range(pictures))))
    return np.array(rankings), truth_of(gnd, pictures)


@given(cases())
@settings(deadline=None, max_examples=60)
def test_taking_junk_out_is_deleting_it_from_the_gallery(case: tuple[Labels, GroundTruth]) -> None:
    ranks, truth = case
    found = evaluate_revisited(ranks, truth)
    for query, ranking in enumerate(ranks):
        easy, hard, junk = (set(getattr(truth, key)[query].tolist()) for key in LISTS)
        protocols = (
            (found.easy, easy, junk | hard),
            (found.medium, easy | hard, junk),
            (found.hard, hard, junk | easy),
        )
        for protocol, positives, dropped in protocols:
            hits = [number in positives for number in ranking if number not in dropped]
            before = [sum(hits[:place]) / place if place else 1.0 for place in range(len(hits) + 1)]
            steps = [(before[place] + before[place + 1]) / 2 for place, hit in enumerate(hits) if hit]
            # Before the first place nothing was found: precision there is 1 by convention.
            assert protocol.average_precision[query] == pytest.approx(sum(steps) / len(positives), abs=1e-12)
            last = max(place for place, hit in enumerate(hits) if hit) + 1
            shares = [sum(hits[: min(k, last)]) / min(k, last) for k in (1, 5, 10)]
            assert protocol.precision[query] == pytest.approx(shares, abs=1e-12)


@given(cases(), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=30)
def test_numbering_the_gallery_otherwise_changes_nothing(case: tuple[Labels, GroundTruth], random: Any) -> None:
    ranks, truth = case
    other = list(range(len(truth.gallery)))
    random.shuffle(other)
    renumbered = {key: tuple(np.array(other)[numbers] for numbers in getattr(truth, key)) for key in LISTS}
    first = evaluate_revisited(ranks, truth)
    second = evaluate_revisited(np.array(other)[ranks], replace(truth, **renumbered))
    for name in ("easy", "medium", "hard"):
        np.testing.assert_array_equal(getattr(first, name).average_precision, getattr(second, name).average_precision)
        np.testing.assert_array_equal(getattr(first, name).precision, getattr(second, name).precision)
