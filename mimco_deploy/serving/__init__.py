"""Serving: encoders, the index and its search. Never imports torch.

What a program needs, from one place; each name is imported when it is first asked for:

    from mimco_deploy.serving import Filter, ImageIndex, Part, load_encoder, search_image, update_index
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mimco_deploy.serving.encoders import load_encoder as load_encoder
    from mimco_deploy.serving.filters import Filter as Filter
    from mimco_deploy.serving.index import Hit as Hit
    from mimco_deploy.serving.index import ImageIndex as ImageIndex
    from mimco_deploy.serving.query import Part as Part
    from mimco_deploy.serving.query import search_image as search_image
    from mimco_deploy.serving.update import update_index as update_index

MAX_WEIGHT = 100.0
"""Of one picture of a query, like or unlike."""

_HOMES = {
    "Filter": "filters",
    "Hit": "index",
    "ImageIndex": "index",
    "Part": "query",
    "load_encoder": "encoders",
    "search_image": "query",
    "update_index": "update",
}


def __getattr__(name: str) -> Any:
    """Import a public name from the module it lives in: nobody pays for FAISS to walk a folder."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
