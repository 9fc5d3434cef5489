"""mimco: from a folder of unlabelled photos to a search engine over them.

Two-stage self-supervised pre-training (MimCo, arXiv 2209.03063), export that proves itself, a crash-safe index, and
search. The map of the package is docs/architecture.md. This module imports nothing, so that the command line starts at
once.
"""

__version__ = "0.1.0"
