"""The study's tables, from its raw results: Markdown on stdout.

    python benchmarks/study/tables.py docs/study/raw > docs/study/tables.md

Means over the seeds that are there, with their standard deviation where there are several; the interval in brackets of
a single seed is over the pictures. All seeds share one teacher, so a deviation is that of stage 2.
Every number comes from a file beside the log of its training.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from benchmarks.study.rows import ROWS, TABLES
from mimco_deploy.evaluation.measures import mean_of

TITLES = {"pixels": "raw 16 × 16 pixels", "random": "random weights", "teacher": "the teacher: MoCo v3, CLS token"}
COLUMNS = {
    "k-NN, mean": ("tiny-imagenet, mean", "knn", "top-1, k 20"),
    "k-NN, CLS": ("tiny-imagenet, cls", "knn", "top-1, k 20"),
    "linear": ("tiny-imagenet", "linear", "top-1"),
    "fine-tune": ("finetune", "finetune", "top-1"),
    "5-shot": ("tiny-imagenet", "few-shot", "top-1, 5 a class"),
    "photos mAP": ("photos", "retrieval", "mAP"),
    "photos recall@1": ("photos", "retrieval", "recall@1"),
    "copies recall@1": ("photos, copies", "copies", "recall@1, all edits"),
    "rank": ("tiny-imagenet", "spread", "effective rank"),
}
"""Where each is found; `tiny-imagenet` alone is by the pooling that the encoder ships with."""
SHARES = {("knn", "top-1, k 20"), ("linear", "top-1"), ("finetune", "top-1"), ("retrieval", "recall@1")}


def read(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Results by row, seeds in order, with what finetune.py found where it ran."""
    results: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("*-seed*.json")):
        document = json.loads(path.read_text(encoding="utf-8"))
        finetuned = folder / "finetune" / path.name
        if finetuned.exists():
            document["finetune"] = json.loads(finetuned.read_text(encoding="utf-8"))
        results.setdefault(document["row"], []).append(document)
    return results


def find(document: dict[str, Any], part: str, protocol: str, name: str) -> dict[str, Any] | None:
    """One measure of a result."""
    if part == "tiny-imagenet" or document["pooling"] == "none":  # pixels are not pooled
        part = part.replace("tiny-imagenet, mean", "tiny-imagenet").replace(
            "tiny-imagenet", f"tiny-imagenet, {document['pooling']}", 1
        )
    for measure in document.get(part, {}).get("measures", []):
        plain = measure["name"].split(", C ")[0]  # results before 2026-11-26 have the probe's choice in the name
        if measure["protocol"] == protocol and plain == name:
            return dict(measure)
    return None


def interval(measure: dict[str, Any], protocol: str, name: str) -> tuple[float, float]:
    """Over the pictures. Of shares Wilson's, also where older results have that of a bootstrap."""
    if (protocol, name) in SHARES:
        right = round(measure["value"] * measure["count"])
        again = mean_of(protocol, name, [1.0] * right + [0.0] * (measure["count"] - right))
        return again.low, again.high
    return measure["low"], measure["high"]


def cell(documents: list[dict[str, Any]], part: str, protocol: str, name: str) -> str:
    """Mean ± standard deviation of the seeds; of a single one with its interval over the pictures."""
    found = [measure for document in documents if (measure := find(document, part, protocol, name)) is not None]
    if not found:
        return "–"
    values = [measure["value"] for measure in found]
    low, high = interval(found[0], protocol, name)
    digits = 1 if name == "effective rank" else 3
    if len(values) == 1:
        known = low is not None and high is not None
        return f"{values[0]:.{digits}f}" + (f" ({low:.{digits}f} to {high:.{digits}f})" if known else "")
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def table(rows: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Lines of one table, from the results of each row by its title."""
    lines = ["| student | seeds | " + " | ".join(COLUMNS) + " | images | seconds | with its teacher's |"]
    lines.append("| --- " * (len(COLUMNS) + 5) + "|")
    for title, documents in rows.items():
        trained = [document["training"] for document in documents if "training" in document]
        images = f"{trained[0]['images']:,}" if trained else "–"
        seconds = f"{statistics.mean(training['seconds'] for training in trained):.0f}" if trained else "–"
        teacher = documents[0].get("teacher's training")
        together = f"{float(seconds) + teacher['seconds']:.0f}" if teacher else seconds
        cells = [cell(documents, *column) for column in COLUMNS.values()]
        lines.append(f"| {title} | {len(documents)} | " + " | ".join(cells) + f" | {images} | {seconds} | {together} |")
    return lines


def title_of(row: str) -> str:
    """What a row is, in words."""
    return TITLES.get(row) or ROWS[row].title


def main() -> None:
    """Print all tables of the folder given."""
    folder = Path(sys.argv[1])
    results = read(folder)
    tables = {name: {title_of(row): results[row] for row in rows if row in results} for name, rows in TABLES.items()}
    # Files of their own folders, for a row and its seed are there once already.
    longer = {
        f"{title_of(row)}, {documents[0]['made with']['epochs']} epochs": documents
        for row, documents in read(folder / "equal-time").items()
    }
    for documents in read(folder / "teacher-on").values():
        longer["the teacher, an epoch more (its first four not counted)"] = documents
    if longer:
        shown = {title_of(row): results[row] for row in ("teacher", "mimco", "mimco-from-teacher")}
        tables["as much time as MimCo and its teacher"] = longer | shown
    for name, rows in tables.items():
        if len(rows) > 1:
            print(f"## {name[0].upper()}{name[1:]}\n")
            print("\n".join(table(rows)), end="\n\n")


if __name__ == "__main__":
    main()
