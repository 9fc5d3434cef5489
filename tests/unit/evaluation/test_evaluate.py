"""Whole evaluations, with a tiny encoder on drawn pictures: protocols, copies, comparison, page."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from click.testing import CliRunner
from PIL import Image

from mimco_deploy.cli import main
from mimco_deploy.drawings import KINDS, draw
from mimco_deploy.errors import EvaluationError
from mimco_deploy.evaluation.compare import compare
from mimco_deploy.evaluation.copies import EDITS, copy_detection, edit_picture, embed_copies
from mimco_deploy.evaluation.evaluate import Evaluation, Protocol, evaluate
from mimco_deploy.evaluation.ground_truth import GroundTruth
from mimco_deploy.evaluation.landmarks import measure_landmarks
from mimco_deploy.evaluation.measures import Measure
from mimco_deploy.evaluation.page import write_page
from mimco_deploy.evaluation.pictures import embed_pictures, sample
from mimco_deploy.serving.encoders import Encoder
from mimco_deploy.sources import Picture, find_pictures
from tests.helpers import CountingEncoder, as_encoder, tiny_bundle


@pytest.fixture
def encoder() -> Encoder:
    return as_encoder(CountingEncoder())


def draw_classes(folder: Path, count: int, first_seed: int = 0) -> Path:
    for kind in KINDS[:3]:
        (folder / kind).mkdir(parents=True)
        for number in range(count):
            draw(kind, first_seed + number, 48).save(folder / kind / f"{number:02d}.png")
    return folder


@pytest.fixture
def val(tmp_path: Path) -> list[Picture]:
    return find_pictures([str(draw_classes(tmp_path / "val", 5, 100))])


@pytest.fixture
def train(tmp_path: Path) -> list[Picture]:
    return find_pictures([str(draw_classes(tmp_path / "train", 8))])


def by_name(found: Evaluation) -> dict[tuple[str, str], Measure]:
    return {(measure.protocol, measure.name): measure for measure in found.measures}


def test_classes_allow_votes_probes_and_retrieval(encoder: Encoder, val: list[Picture], train: list[Picture]) -> None:
    found = evaluate(encoder, "tiny", val, train)
    assert {measure.protocol for measure in found.measures} == {"knn", "linear", "few-shot", "retrieval", "spread"}
    assert found.classes == sorted(KINDS[:3])
    assert all(0 <= measure.value <= 1 for measure in found.measures if measure.protocol != "spread")
    assert by_name(found)["knn", "top-1, k 10"].count == len(val)


def test_pictures_do_not_vote_for_themselves(encoder: Encoder, val: list[Picture], train: list[Picture]) -> None:
    with pytest.raises(EvaluationError, match="1 picture in --train and among those evaluated"):
        evaluate(encoder, "tiny", val, [*train, val[0]])


def test_a_single_class_is_no_classification(encoder: Encoder, val: list[Picture], train: list[Picture]) -> None:
    queries, voters = ([picture for picture in pictures if picture.label == KINDS[0]] for pictures in (val, train))
    with pytest.raises(EvaluationError, match="knn with 1 class;"):
        evaluate(encoder, "tiny", queries, voters, ("knn",))


def test_what_the_pictures_do_not_allow_is_left_out_before_work_begins(
    encoder: Encoder, val: list[Picture], train: list[Picture], caplog: pytest.LogCaptureFixture
) -> None:
    thin = [*[p for p in train if p.label != KINDS[0]], next(p for p in train if p.label == KINDS[0])]
    found = evaluate(encoder, "tiny", val, thin)
    assert "linear" not in {measure.protocol for measure in found.measures}
    assert "the smallest with 1 picture;" in caplog.text
    with pytest.raises(EvaluationError, match="the smallest with 1 picture;"):
        evaluate(encoder, "tiny", val, thin, ("linear",))


def test_an_encoder_that_gives_no_numbers_is_refused(val: list[Picture]) -> None:
    class Broken(CountingEncoder):
        def embed(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
            return np.full_like(super().embed(images), np.nan)

    for protocol in ("retrieval", "copies"):
        with pytest.raises(EvaluationError, match="not finite"):
            evaluate(as_encoder(Broken()), "broken", val, (), (protocol,))


def test_pictures_alone_in_their_classes_have_nothing_to_find(
    encoder: Encoder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pictures = find_pictures([str(draw_classes(tmp_path / "val", 1))])
    with pytest.raises(EvaluationError, match="retrieval of pictures with none of their class among the others"):
        evaluate(encoder, "tiny", pictures, (), ("retrieval",))
    found = evaluate(encoder, "tiny", pictures)
    assert {measure.protocol for measure in found.measures} == {"copies", "alignment", "spread"}
    assert "left out: retrieval of pictures" in caplog.text


def test_queries_whose_voters_cannot_be_read_have_nothing_to_find(
    encoder: Encoder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = draw_classes(tmp_path / "train", 2)
    for path in (folder / KINDS[0]).iterdir():
        path.write_bytes(b"broken")
    val = [
        picture for picture in find_pictures([str(draw_classes(tmp_path / "val", 2, 9))]) if picture.label == KINDS[0]
    ]
    found = evaluate(encoder, "tiny", val, find_pictures([str(folder)]), ("retrieval", "spread"))
    assert {measure.protocol for measure in found.measures} == {"spread"}
    assert "none of their class in --train" in caplog.text
    assert f"no picture of --train can be read for 1 of 3 classes, such as {KINDS[0]}" in caplog.text


def test_a_class_that_cannot_be_read_is_named_and_the_page_is_written(
    encoder: Encoder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = draw_classes(tmp_path / "val", 2)
    last = max(KINDS[:3])
    for path in (folder / last).iterdir():
        path.write_bytes(b"broken")
    found = evaluate(encoder, "tiny", find_pictures([str(folder)]), (), ("retrieval",))
    assert f"no picture can be read for 1 of 3 classes, such as {last}" in caplog.text
    write_page(tmp_path / "page.html", [found])
    assert "Classes of the neighbours" in (tmp_path / "page.html").read_text("utf-8")


def test_a_stray_picture_beside_the_classes_is_named(
    encoder: Encoder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = draw_classes(tmp_path / "val", 5)
    draw(KINDS[0], 99, 48).save(folder / "cover.png")
    found = evaluate(encoder, "tiny", find_pictures([str(folder)]), (), ("spread",))
    assert found.classes == []
    assert f"1 of 16 pictures in no folder of a class, such as {folder / 'cover.png'}: measured without" in caplog.text
    caplog.clear()
    evaluate(encoder, "tiny", find_pictures([str(folder / KINDS[0]), str(folder / "cover.png")]), (), ("spread",))
    assert caplog.text == ""


def test_one_picture_leaves_nothing_to_measure(tmp_path: Path) -> None:
    draw(KINDS[0], 0, 48).save(tmp_path / "single.png")
    bundle = tiny_bundle(tmp_path / "encoder")
    result = CliRunner().invoke(main, ["eval", str(tmp_path / "single.png"), "--encoder", str(bundle)])
    assert result.exit_code == 1
    assert "copies of one picture; expected two or more" in result.stderr


def test_photos_without_classes_get_what_needs_no_labels(encoder: Encoder, tmp_path: Path) -> None:
    for number in range(4):
        draw(KINDS[number], number, 64).save(tmp_path / f"{number}.png")
    found = evaluate(encoder, "tiny", find_pictures([str(tmp_path)]))
    assert {measure.protocol for measure in found.measures} == {"copies", "alignment", "spread"}
    assert found.classes == []


@pytest.mark.parametrize("protocol", ["knn", "linear", "few-shot"])
def test_what_needs_voters_says_so(encoder: Encoder, val: list[Picture], protocol: Protocol) -> None:
    with pytest.raises(EvaluationError, match="--train"):
        evaluate(encoder, "tiny", val, (), (protocol,))


def test_retrieval_of_a_single_class_is_refused(encoder: Encoder, tmp_path: Path) -> None:
    (tmp_path / "all").mkdir()
    draw(KINDS[0], 0, 48).save(tmp_path / "all" / "one.png")
    with pytest.raises(EvaluationError, match="two folders or more"):
        evaluate(encoder, "tiny", find_pictures([str(tmp_path)]), (), ("retrieval",))


def test_classes_that_nobody_votes_for_are_named(encoder: Encoder, val: list[Picture], train: list[Picture]) -> None:
    fewer = [picture for picture in train if picture.label != KINDS[0]]
    with pytest.raises(EvaluationError, match=re.escape(KINDS[0])):
        evaluate(encoder, "tiny", val, fewer)


def test_a_broken_file_is_left_out_and_named(encoder: Encoder, tmp_path: Path) -> None:
    draw(KINDS[0], 0, 48).save(tmp_path / "good.png")
    (tmp_path / "bad.jpg").write_bytes(b"no picture")
    embedded = embed_pictures(encoder, find_pictures([str(tmp_path)]))
    assert [Path(picture.name).name for picture in embedded.pictures] == ["good.png"]
    assert list(embedded.refused.values()) == ["unsupported"]
    assert embedded.embeddings.shape == (1, encoder.spec.embedding_dim)


def test_a_class_that_cannot_be_read_costs_its_protocol_alone(
    encoder: Encoder, tmp_path: Path, val: list[Picture], caplog: pytest.LogCaptureFixture
) -> None:
    """Found after everything was embedded: the linear probe needs two pictures of each class."""
    folder = draw_classes(tmp_path / "train", 2)
    (folder / KINDS[0] / "00.png").write_bytes(b"broken")
    train = find_pictures([str(folder)])
    found = evaluate(encoder, "tiny", val, train)
    assert {measure.protocol for measure in found.measures} == {"knn", "few-shot", "retrieval", "spread"}
    assert "left out: a linear probe on 3 classes, the smallest with 1 picture;" in caplog.text
    asked = evaluate(encoder, "tiny", val, train, ("linear", "knn"))
    assert {measure.protocol for measure in asked.measures} == {"knn"}
    with pytest.raises(EvaluationError, match="linear probe"):
        evaluate(encoder, "tiny", val, train, ("linear",))


def test_nothing_but_broken_files_is_an_error(encoder: Encoder, tmp_path: Path) -> None:
    (tmp_path / "bad.jpg").write_bytes(b"no picture")
    with pytest.raises(EvaluationError, match="none of 1 picture can be read"):
        embed_pictures(encoder, find_pictures([str(tmp_path)]))


def test_embeddings_are_in_the_order_of_the_pictures(encoder: Encoder, tmp_path: Path) -> None:
    for number in range(150):  # more than two batches
        draw(KINDS[number % 5], number, 16).save(tmp_path / f"{number:03d}.png")
    pictures = find_pictures([str(tmp_path)])
    together = embed_pictures(encoder, pictures).embeddings
    for number in (0, 63, 64, 149):
        alone = embed_pictures(encoder, [pictures[number]]).embeddings[0]
        np.testing.assert_allclose(together[number], alone, atol=1e-6)


def test_a_sample_is_always_the_same_in_order_and_of_every_folder(train: list[Picture]) -> None:
    chosen = sample(train, 12)
    assert chosen == sample(train, 12)
    assert [picture.name for picture in chosen] == sorted(picture.name for picture in chosen)
    assert Counter(picture.label for picture in chosen) == dict.fromkeys(KINDS[:3], 4)
    assert Counter(picture.label for picture in sample(train, 1)) == dict.fromkeys(KINDS[:3], 2)
    assert sample(train, 10_000) == train


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_changes_the_picture_and_is_always_the_same(name: str) -> None:
    picture = draw(KINDS[1], 5, 96)
    first, again = edit_picture(picture, name, 7), edit_picture(picture, name, 7)
    assert first.mode == "RGB"
    assert first.tobytes() == again.tobytes()
    assert first.size != picture.size or first.tobytes() != picture.tobytes()


@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize("size", [(1, 1), (1, 400), (400, 3)])
def test_edits_bear_pictures_of_any_shape(name: str, size: tuple[int, int]) -> None:
    edited = edit_picture(Image.new("RGB", size, "red"), name, 7)
    assert min(edited.size) >= 1


def test_a_picture_longer_than_a_jpeg_may_be_is_edited() -> None:
    assert edit_picture(Image.new("RGB", (65_520, 2)), "JPEG 20", 7).width <= 65_500


def test_unedited_copies_find_their_originals(encoder: Encoder, val: list[Picture]) -> None:
    originals = embed_pictures(encoder, val).embeddings
    measures = copy_detection(originals, np.arange(len(val)), {"none": originals})
    assert [measure.value for measure in measures] == [1.0, 1.0, 1.0, 1.0]


def test_an_encoder_that_gives_everything_the_same_finds_no_copy() -> None:
    same = np.tile(np.eye(1, 8, dtype=np.float32), (20, 1))
    measures = copy_detection(same, np.arange(20), {"none": same})
    assert measures[0].value == 0.0
    assert measures[1].value == 0.0


def test_micro_precision_wants_one_threshold_for_all() -> None:
    # Both queries of one pair of files are right; the other's are wrong with higher scores.
    gallery = np.eye(4, dtype=np.float32)
    weak = 0.6 * gallery[:2] + 0.8 * np.roll(gallery, 2, axis=1)[:2] * 0.5
    strong = np.stack([gallery[3], gallery[2]])
    copies = np.concatenate([weak / np.linalg.norm(weak, axis=1, keepdims=True), strong]).astype(np.float32)
    measures = {measure.name: measure for measure in copy_detection(gallery, np.arange(4), {"edit": copies})}
    assert measures["recall@1, edit"].value == 0.5
    assert measures["micro average precision"].value == pytest.approx((1 / 3 + 2 / 4) / 4)


def test_copies_are_embedded_in_the_order_of_the_pictures(encoder: Encoder, val: list[Picture]) -> None:
    together = embed_copies(encoder, val)
    assert list(together) == list(EDITS)
    last = embed_copies(encoder, val[-1:])
    for name in EDITS:
        np.testing.assert_allclose(together[name][-1:], last[name], atol=1e-6)


def test_edits_depend_on_what_a_file_holds_and_not_on_how_its_path_is_spelled(
    encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw(KINDS[1], 5, 96).save(tmp_path / "one.png")
    here = embed_copies(encoder, find_pictures([str(tmp_path)]))
    monkeypatch.chdir(tmp_path)
    there = embed_copies(encoder, find_pictures(["one.png"]))
    for name in EDITS:
        np.testing.assert_array_equal(here[name], there[name])


def test_pictures_are_edited_each_in_its_own_way() -> None:
    picture = draw(KINDS[1], 5, 96)
    assert edit_picture(picture, "colour", 1).tobytes() != edit_picture(picture, "colour", 2).tobytes()


def test_two_encoders_are_compared_picture_by_picture(val: list[Picture], train: list[Picture]) -> None:
    found = [
        evaluate(as_encoder(CountingEncoder(seed=seed)), f"{seed}", val, train, ("knn", "linear")) for seed in (0, 1)
    ]
    same, other = compare(found[0], found[0]), compare(*found)
    assert all(measure.value == 0 for measure in same.differences)
    assert same.agreement is not None
    assert other.agreement is not None
    assert other.agreement.value < same.agreement.value == 1.0
    assert {measure.protocol for measure in other.differences} == {"knn", "linear"}


def test_other_pictures_are_not_compared(encoder: Encoder, val: list[Picture]) -> None:
    first, second = evaluate(encoder, "a", val, (), ("spread",)), evaluate(encoder, "b", val[1:], (), ("spread",))
    with pytest.raises(EvaluationError, match="not the same"):
        compare(first, second)


def test_the_page_shows_names_as_text(encoder: Encoder, tmp_path: Path) -> None:
    for kind in ("<script>alert(1)", "b"):
        (tmp_path / "p" / kind).mkdir(parents=True)
        for number in range(4):
            draw(KINDS[number], number, 48).save(tmp_path / "p" / kind / f"{number}.png")
    found = evaluate(encoder, "<b>tiny", find_pictures([str(tmp_path / "p")]), (), ("retrieval",))
    write_page(tmp_path / "page.html", [found])
    page = (tmp_path / "page.html").read_text("utf-8")
    assert "<script" not in page
    assert "<b>tiny" not in page
    assert "&lt;script&gt;" in page
    assert page.count("class='strip'") == 8
    assert "by t-SNE" in page


def test_landmarks_are_found_by_name_and_queries_are_cut(encoder: Encoder, tmp_path: Path) -> None:
    truth = GroundTruth(
        gallery=("a", "b", "c"),
        queries=("q",),
        boxes=((0.0, 0.0, 48.0, 48.0),),
        easy=(np.array([1]),),
        hard=(np.array([2]),),
        junk=(np.array([], np.int64),),
    )
    for name, number in (("a", 0), ("b", 1), ("c", 2)):
        draw(KINDS[number], number, 48).save(tmp_path / f"{name}.png")
    query = Image.new("RGB", (96, 48))
    query.paste(draw(KINDS[1], 1, 48), (0, 0))  # inside of the box it is picture b
    query.save(tmp_path / "q.png")
    measures = measure_landmarks(encoder, truth, find_pictures([str(tmp_path)]))
    assert {measure.protocol for measure in measures} == {"easy", "medium", "hard"}
    assert measures[0].name == "mAP"
    assert measures[0].value == 1.0
    with pytest.raises(EvaluationError, match="no file for 1 picture of the ground truth, such as b"):
        measure_landmarks(encoder, truth, find_pictures([str(tmp_path / f"{name}.png") for name in "acq"]))


def test_the_command_prints_json_and_writes_the_page(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "encoder")
    other = tiny_bundle(tmp_path / "other", seed=1)
    draw_classes(tmp_path / "val", 5)
    page = tmp_path / "page.html"
    asked = ["eval", str(tmp_path / "val"), "--compare", str(bundle), str(other), "--report", str(page), "--json"]
    result = CliRunner().invoke(main, asked)
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert [found["name"] for found in document["encoders"]] == [str(bundle), str(other)]
    assert document["encoders"][0]["pictures"] == 15
    assert 0 < document["agreement"]["value"] < 1
    assert page.read_text("utf-8").startswith("<!doctype html>")


def test_the_command_prints_a_table_and_takes_a_sample(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "encoder")
    draw_classes(tmp_path / "val", 5, 100)
    draw_classes(tmp_path / "train", 5)
    asked = ["eval", str(tmp_path / "val"), "--train", str(tmp_path / "train"), "--encoder", str(bundle)]
    result = CliRunner().invoke(
        main, [*asked, "--limit", "6", "--protocol", "linear", "--protocol", "retrieval", "-k", "2"]
    )
    assert result.exit_code == 0, result.output
    assert re.search(r"linear +top-1 +\d\.\d{3} \(.*C \S+ +6", result.stdout)
    assert "recall@2" in result.stdout
    assert "recall@1 " not in result.stdout


def test_the_command_compares_and_marks_only_what_is_beyond_chance(tmp_path: Path) -> None:
    bundle, other = tiny_bundle(tmp_path / "a"), tiny_bundle(tmp_path / "b", seed=1)
    for number in range(13):  # two of a class, and the others alone: too few queries for an interval of mAP
        folder = tmp_path / "val" / f"{max(number, 1)}"
        folder.mkdir(parents=True, exist_ok=True)
        draw(KINDS[number % len(KINDS)], number, 48).save(folder / f"{number}.png")
    asked = ["eval", str(tmp_path / "val"), "--protocol", "retrieval", "--compare", str(bundle), str(other)]
    result = CliRunner().invoke(main, asked)
    assert result.exit_code == 0, result.output
    assert "* retrieval" not in result.stdout
    document = json.loads(CliRunner().invoke(main, [*asked, "--json"]).stdout, parse_constant=pytest.fail)
    assert document["differences"][0]["low"] is None
    assert document["differences"][0]["count"] == 2


def test_the_command_compares_on_enough_pictures_only_and_says_so_before_it_begins(tmp_path: Path) -> None:
    draw_classes(tmp_path / "val", 3)
    result = CliRunner().invoke(main, ["eval", str(tmp_path / "val"), "--compare", "no-encoder", "none-either"])
    assert result.exit_code == 1
    assert "9 pictures to compare the 10 nearest of" in result.stderr


def test_the_command_opens_both_encoders_before_it_measures_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, gone = tiny_bundle(tmp_path / "encoder"), tmp_path / "gone"
    draw_classes(tmp_path / "val", 4)
    monkeypatch.setattr("mimco_deploy.evaluation.evaluate.evaluate", pytest.fail)
    result = CliRunner().invoke(main, ["eval", str(tmp_path / "val"), "--compare", str(bundle), str(gone)])
    assert result.exit_code == 1
    assert f"no encoder in {gone}" in result.stderr


def test_pictures_that_cannot_be_read_cost_the_agreement_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bundle, other = tiny_bundle(tmp_path / "a"), tiny_bundle(tmp_path / "b", seed=1)
    draw_classes(tmp_path / "val", 4)
    (tmp_path / "val" / KINDS[0] / "00.png").write_bytes(b"broken")
    page = tmp_path / "page.html"
    asked = ["eval", str(tmp_path / "val"), "--protocol", "retrieval", "--compare", str(bundle), str(other)]
    result = CliRunner().invoke(main, [*asked, "--report", str(page)])
    assert result.exit_code == 0, result.output
    assert "The second less the first" in result.stdout
    assert "neighbours" not in result.stdout
    assert "left out: 11 pictures to compare the 10 nearest of" in caplog.text
    assert page.is_file()
    document = json.loads(CliRunner().invoke(main, [*asked, "--json"]).stdout, parse_constant=pytest.fail)
    assert document["agreement"] is None
    assert document["differences"]


def test_the_command_does_not_write_its_page_over_a_picture(tmp_path: Path) -> None:
    picture = tmp_path / "photo.JPG"
    picture.write_bytes(b"kept")
    result = CliRunner().invoke(main, ["eval", str(tmp_path), "--report", str(picture)])
    assert result.exit_code == 2
    assert "has the name of a picture" in result.stderr
    assert picture.read_bytes() == b"kept"


def test_the_command_takes_each_k_once_in_order(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "encoder")
    draw_classes(tmp_path / "val", 2)
    asked = ["eval", str(tmp_path / "val"), "--encoder", str(bundle), "--protocol", "retrieval", "--json"]
    result = CliRunner().invoke(main, [*asked, "-k", "2", "-k", "1", "-k", "2"])
    names = [measure["name"] for measure in json.loads(result.stdout)["encoders"][0]["measures"]]
    assert names == ["mAP", "recall@2", "recall@1", "precision@2"]


def test_the_command_refuses_options_that_contradict(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["eval", str(tmp_path), "--compare", "a", "b", "--encoder", "c"])
    assert result.exit_code == 2
    assert "leave --encoder out" in result.stderr
