"""Pre-training in two stages. PyTorch and timm live here, and nothing here knows export, serving or evaluation."""
