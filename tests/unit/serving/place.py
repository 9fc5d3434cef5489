"""A collection with an index, for what is found twice in it."""

from __future__ import annotations

from pathlib import Path

from click.testing import CliRunner, Result

from mimco_deploy.cli import main
from mimco_deploy.serving import moves
from mimco_deploy.serving.duplicates import Group, Keep, find_duplicates
from mimco_deploy.serving.moves import move_duplicates
from mimco_deploy.serving.update import update_index
from tests.helpers import CountingEncoder

COUNT = 60
"""Pictures in the workspace that tests search in."""


class Place:
    """Folders of pictures under one index."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.photos = self.folder / "photos"
        self.photos.mkdir()
        self.index = self.folder / "index"
        self.out = self.folder / "out"

    def update(self, *roots: Path) -> None:
        update_index(self.index, roots or [self.photos], CountingEncoder())

    def groups(self, min_score: float = 0.95, root: Path | None = None, keep: Keep = "largest") -> list[list[str]]:
        return [self.names(group) for group in find_duplicates(self.index, min_score, root, keep)]

    def names(self, group: Group) -> list[str]:
        return [str(one.path.relative_to(self.folder)) for one in (group.kept, *group.others)]

    def tree(self) -> dict[str, bytes]:
        """Every picture by its place, whole."""
        return {
            str(path.relative_to(self.folder)): path.read_bytes()
            for path in sorted(self.folder.rglob("*.[pj][np]g"))
            if self.index not in path.parents
        }

    def move(self) -> moves.Moves:
        return move_duplicates(self.index, find_duplicates(self.index), self.out)

    def mimco(self, *arguments: str | Path, code: int = 0) -> Result:
        result = CliRunner().invoke(main, ["--workspace", str(self.folder), *map(str, arguments)])
        assert result.exit_code == code, result.output
        return result
