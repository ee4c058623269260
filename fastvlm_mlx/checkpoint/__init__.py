"""Checkpoints in and out.

source (where it is) -> reading (headers) -> dialects (names) -> quantized, reparam (lazy algebra)
-> loading (checks, then values) -> fold (into the network of `vision.py`); writing goes back.
"""
