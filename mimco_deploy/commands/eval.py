"""`mimco eval`: how well an encoder does, on pictures with classes and without."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mimco_deploy.commands.common import (
    AnyPath,
    device_option,
    extra,
    json_option,
    new_page,
    print_json,
    say_if_shipped,
)
from mimco_deploy.errors import plain
from mimco_deploy.shipped import NAME, SHIPPED_ENCODER, encoder_of
from mimco_deploy.workspace import Workspace

if TYPE_CHECKING:
    from mimco_deploy.evaluation.compare import Comparison
    from mimco_deploy.evaluation.evaluate import Evaluation, Protocol
    from mimco_deploy.evaluation.measures import Measure
    from mimco_deploy.serving.encoders import Device, Encoder
    from mimco_deploy.sources import Picture


@click.command("eval")
@click.argument("pictures", nargs=-1, required=True, type=AnyPath)
@click.option(
    "--train", multiple=True, type=AnyPath, help="Pictures of the same classes, which vote and train; repeatable."
)
@click.option(
    "--protocol",
    "protocols",
    type=click.Choice(["knn", "linear", "few-shot", "retrieval", "copies", "spread"]),
    multiple=True,
    help="Repeatable.  [default: all that the pictures allow; copies, with --train, only when asked for]",
)
@click.option(
    "-k",
    "recall_ks",
    type=click.IntRange(min=1),
    multiple=True,
    default=(1, 5, 10),
    show_default=True,
    help="Of recall@k, precision@k and mP@k; repeatable.",
)
@click.option("--compare", nargs=2, type=AnyPath, metavar="A B", help="Two encoders on the same pictures.")
@click.option(
    "--ground-truth",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Of Revisited Oxford or Paris, as published (gnd_roxford5k.pkl); PICTURES is their folder.",
)
@click.option(
    "--limit",
    type=click.IntRange(min=2),
    help="Take about so many of PICTURES, and of --train, of each class its share.",
)
@click.option(
    "--report",
    type=click.Path(path_type=Path, dir_okay=False),
    callback=new_page,
    help="Write a page with plots there, too.",
)
@click.option(
    "--encoder",
    type=AnyPath,
    help="Bundle, or a checkpoint's folder.  [default: the workspace's encoder, else mimco's]",
)
@device_option
@json_option
@click.pass_obj
def eval_(
    workspace: Workspace,
    /,
    pictures: tuple[Path, ...],
    train: tuple[Path, ...],
    protocols: tuple[Protocol, ...],
    recall_ks: tuple[int, ...],
    compare: tuple[Path, Path] | None,
    ground_truth: Path | None,
    limit: int | None,
    report: Path | None,
    encoder: Path | None,
    device: Device,
    as_json: bool,
) -> None:
    """Measure an encoder on PICTURES: folders or tars of <class>/<picture>, or photos without any labels.

    \b
    mimco eval val/ --train train/                  k-NN, linear probe, few-shot, retrieval
    mimco eval ./photos                             no labels: edited copies must find their originals
    mimco eval ./photos --compare old/ .mimco/encoder --report compare.html
    mimco eval jpg/ --ground-truth gnd_roxford5k.pkl
    """
    from mimco_deploy.evaluation.label_free import check_enough
    from mimco_deploy.evaluation.pictures import sample
    from mimco_deploy.sources import find_pictures

    if compare and encoder:
        raise click.UsageError("--compare names both encoders; leave --encoder out.")
    if compare and len(found_files := set(compare)) < 2:
        raise click.UsageError(f"--compare takes two encoders, not {found_files.pop()} twice.")
    if ground_truth and (compare or train or protocols or report or limit):
        raise click.UsageError(
            "--ground-truth says what is measured; of the other options it takes --encoder, --device and -k."
        )
    recall_ks = tuple(dict.fromkeys(recall_ks))
    to_evaluate = find_pictures(map(str, pictures))
    if ground_truth:
        _revisited(workspace, encoder, device, ground_truth, to_evaluate, recall_ks, as_json)
        return
    to_evaluate = sample(to_evaluate, limit)
    if compare:  # before hours of work, not after
        check_enough(len(to_evaluate))
        for path in compare:
            _check_readable(path)
    voters = sample(find_pictures(map(str, train)), limit) if train else []
    found = [
        _evaluate(workspace, path, device, to_evaluate, voters, protocols, recall_ks)
        for path in (compare or (encoder,))
    ]
    comparison = None
    if len(found) == 2:
        from mimco_deploy.evaluation.compare import compare as compare_encoders

        comparison = compare_encoders(*found)
    _print(found, comparison, as_json)
    if report:
        from mimco_deploy.evaluation.page import write_page

        write_page(report, found, comparison)


def _evaluate(
    workspace: Workspace,
    path: Path | None,
    device: Device,
    pictures: Sequence[Picture],
    voters: Sequence[Picture],
    protocols: Sequence[Protocol],
    recall_ks: Sequence[int],
) -> Evaluation:
    from mimco_deploy.evaluation.evaluate import evaluate
    from mimco_deploy.terminal import counting_bar

    with _loaded(workspace, path, device) as (name, encoder), contextlib.ExitStack() as bars:
        return evaluate(
            encoder, name, pictures, voters, protocols, recall_ks, lambda title: bars.enter_context(counting_bar(title))
        )


def _check_readable(path: Path) -> None:
    """Refuse what is neither a bundle nor a checkpoint, or a broken one, without loading it."""
    if _is_checkpoint(path):
        with extra("train,export"):
            from mimco_deploy.training.checkpoint import read_checkpoint
        read_checkpoint(path)
        return
    from mimco_deploy.bundle import read_bundle

    read_bundle(path)


def _is_checkpoint(path: Path) -> bool:
    from mimco_deploy.bundle import SPEC_FILE
    from mimco_deploy.bundle_archive import is_archive

    return path.is_dir() and not is_archive(path) and not (path / SPEC_FILE).is_file()


@contextlib.contextmanager
def _loaded(workspace: Workspace, path: Path | None, device: Device) -> Iterator[tuple[str, Encoder]]:
    """The encoder of a bundle; a checkpoint is exported first, so that what is measured is what would ship."""
    from mimco_deploy.serving.encoders import load_encoder

    bundle = path or encoder_of(workspace)
    say_if_shipped(bundle)
    if not _is_checkpoint(bundle):
        yield NAME if bundle == SHIPPED_ENCODER else str(bundle), load_encoder(bundle, device)
        return
    with extra("train,export"):
        from mimco_deploy.export.pipeline import export_encoder
        from mimco_deploy.export.student import from_checkpoint
        from mimco_deploy.training.checkpoint import read_checkpoint
    with tempfile.TemporaryDirectory() as folder:
        export_encoder(from_checkpoint(read_checkpoint(bundle)), Path(folder) / "encoder")
        yield str(bundle), load_encoder(Path(folder) / "encoder", device)


def _revisited(
    workspace: Workspace,
    path: Path | None,
    device: Device,
    ground_truth: Path,
    pictures: Sequence[Picture],
    ks: Sequence[int],
    as_json: bool,
) -> None:
    from mimco_deploy.evaluation.ground_truth import read_ground_truth
    from mimco_deploy.evaluation.landmarks import measure_landmarks
    from mimco_deploy.terminal import counting_bar

    truth = read_ground_truth(ground_truth)
    with _loaded(workspace, path, device) as (name, encoder), counting_bar("pictures") as tell:
        measures = measure_landmarks(encoder, truth, pictures, ks, tell)
    if as_json:
        print_json({"name": name, "measures": [measure.as_row() for measure in measures]})
        return
    _print_measures([[measure] for measure in measures], [name])


def _print(found: Sequence[Evaluation], comparison: Comparison | None, as_json: bool) -> None:
    from mimco_deploy.evaluation.compare import table

    if as_json:
        document: dict[str, Any] = {"encoders": [evaluation.as_document() for evaluation in found]}
        if comparison is not None:
            document["differences"] = [measure.as_row() for measure in comparison.differences]
            known = comparison.agreement
            document["agreement"] = known and {**known.as_row(), "by_chance": comparison.by_chance}
        print_json(document)
        return
    for evaluation in found:
        refused = {**evaluation.pictures.refused, **(evaluation.voters.refused if evaluation.voters else {})}
        for name, problem in list(refused.items())[:3]:
            click.echo(plain(f"{name}: {problem}"), err=True)
        if len(refused) > 3:
            click.echo(f"{len(refused) - 3:,} others could not be read either; --json names them", err=True)
    _print_measures(table(found), [evaluation.name for evaluation in found])
    if comparison is not None:
        click.echo("The second less the first, picture by picture; * is beyond chance at 95 %")
        for measure in comparison.differences:
            star = "*" if measure.beyond_chance else " "
            click.echo(f"{star} {measure.protocol:<10} {measure.name:<28} {_shown(measure)}")
        if (agreement := comparison.agreement) is not None:
            click.echo(f"{agreement.name}: {_shown(agreement)}, by chance {comparison.by_chance:.3f}")


def _print_measures(rows: Sequence[Sequence[Measure | None]], names: Sequence[str]) -> None:
    from mimco_deploy.terminal import print_table

    cells = []
    for row in rows:
        first = row[0]
        assert first is not None
        cells.append([first.protocol, first.name, *(_shown(measure) for measure in row), f"{first.count:,}"])
    print_table(["protocol", "measure", *names, "over"], cells)


def _shown(measure: Measure | None) -> str:
    return "" if measure is None else measure.in_words()
