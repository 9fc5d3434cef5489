"""mimco: from a folder of unlabelled photos to a search engine over them.

Two-stage self-supervised pre-training (MimCo, arXiv 2209.03063), export that proves itself, a crash-safe index, and
search. The map of the package is docs/architecture.md. This module imports nothing that takes time, so that the command
line starts at once.
"""

import os

__version__ = "0.1.0"

# The builds of ONNX Runtime on the registry report to their maker from 1.32 on, and keep an id of the machine in the
# user's cache. This is read when onnxruntime is first imported; a program that sets it itself is left its choice.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
