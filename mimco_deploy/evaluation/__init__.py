"""How good embeddings are. Takes embeddings, or an encoder that serves; never torch."""
