"""A service under attack: a short run of what `attack.py` does for long by hand."""

from __future__ import annotations

from pathlib import Path

from tests.faults.attack import attack


def test_what_nobody_should_send_is_answered_in_order(tmp_path: Path) -> None:
    found = attack(tmp_path, [], 250, seed=1)
    assert found["wrong"] == []
    assert sum(found["statuses"].values()) == 250
    assert {"200", "400", "404", "415", "422"} <= set(found["statuses"]), "it was no one kind of request only"
