"""The bridge from training to serving: a trained encoder becomes a bundle that proves itself."""
