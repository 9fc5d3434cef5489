"""Index and search pictures with a bundled encoder: NumPy, Pillow, ONNX Runtime, FAISS and SQLite, never torch.

scan → pictures → encoders → vectors → catalog      (update.py: one writer)
encoders → ann → catalog → hits                     (index.py: any number of readers)
"""
