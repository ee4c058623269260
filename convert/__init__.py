"""Checkpoint conversion: recipes, quantization, streaming, verification, model card."""
