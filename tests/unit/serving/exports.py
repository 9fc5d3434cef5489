"""Exports made by hand, and what an index that took one in holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from mimco_deploy.images import Facts
from mimco_deploy.serving.catalog import Catalog
from mimco_deploy.serving.generations import current_generation
from mimco_deploy.serving.scan import Stamp
from tests.helpers import DIM, Embeddings


def listing(index: Path) -> list[tuple[str, str, Stamp, bytes, Facts]]:
    """All that is known of each file, but for its row."""
    with Catalog(current_generation(index).catalog) as catalog, catalog.snapshot():
        return [(file.root, file.path, file.stamp, file.sha256, file.facts) for file in sorted(catalog.listing())]


def lines_of(target: Path) -> Path:
    return target.with_name(f"{target.name}.jsonl")


def unit(count: int, dim: int = DIM) -> Embeddings:
    raw = np.random.default_rng(0).standard_normal((count, dim))
    return np.asarray(raw / np.linalg.norm(raw, axis=1, keepdims=True), np.float32)


HEADER = {"format_version": 1, "fingerprint": "f" * 64, "embedding_dim": DIM}


def write_npy(path: Path, records: list[tuple[str, str]], changed: dict[str, Any] | None = None, **header: Any) -> Path:
    """Write an export by hand; `changed` goes into its second record."""
    np.save(path, unit(len(records)))
    lines: list[Any] = [{**HEADER, **header}]
    for number, (root, name) in enumerate(records):
        record = {"root": root, "path": name, "sha256": f"{number:064x}", "size": 5, "mtime_ns": 7}
        lines.append({**record, **(changed or {})} if number == 1 else record)
    lines_of(path).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
