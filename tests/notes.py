"""Where the genuine config, tokenizer and tensor-table files are, if this machine has them."""

from pathlib import Path

NOTES = Path(__file__).resolve().parents[2] / "shared" / "data"
