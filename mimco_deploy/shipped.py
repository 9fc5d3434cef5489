"""The encoder that comes with mimco: what a workspace without one of its own indexes and searches with.

It lies in the package as any bundle does, with its model card. Standard library only.
"""

from __future__ import annotations

from pathlib import Path

from mimco_deploy.workspace import Workspace

NAME = "mimco-vit-tiny-64"
SHIPPED_ENCODER = Path(__file__).parent / "encoders" / NAME


def encoder_of(workspace: Workspace) -> Path:
    """The workspace's own bundle; the one that comes with mimco where nobody has begun to make one there.

    A student that was trained but not exported is such a beginning: to search with another encoder than it would hide
    the step that is missing.
    """
    own = workspace.encoder.exists() or workspace.stage2.exists()
    return workspace.encoder if own else SHIPPED_ENCODER
