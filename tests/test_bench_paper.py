"""The published figures agree with one another: a mistyped row is found."""

import pytest

from fastvlm_mlx.benchmarks.paper import ENCODERS, FIGURE_1A, MODELS, encoder_row, prefill_row


def test_ttft_is_encoder_plus_prefill() -> None:
    """Table 6's TTFT against the sum of Table 10's two parts, wherever all three are printed."""
    checked = 0
    for row in MODELS:
        if row.ttft_ms is None or row.encoder_ms is None or row.language_model == "MobileLLaMA":
            continue
        prefill = prefill_row(row.language_model, row.tokens).milliseconds
        # Printed truncated ("166" for 166.8) or rounded.
        assert abs(row.encoder_ms + prefill - row.ttft_ms) < 1.0, row
        checked += 1
    assert checked >= 35


def test_averages_are_those_of_tables_1_and_4() -> None:
    """Avg-5 of the LLaVA-1.5 setup at 256, 768 and 1024 (Table 4) and of ViT-L/14 (Table 1)."""
    averages = {row.name: row.avg5 for row in MODELS}
    for name, printed in {"R15": 55.5, "R19": 62.8, "R27": 63.9, "R31": 60.1}.items():
        assert averages[name] == pytest.approx(printed, abs=0.1), name


def test_tiles_are_whole_encodes() -> None:
    for encoder, tiled, tile in (
        ("SigLIP-SO400M", 1152, 384),
        ("ViT-L/14", 672, 336),
        ("FastViTHD", 2048, 1024),
    ):
        row, one = encoder_row(encoder, tiled), encoder_row(encoder, tile)
        assert row.milliseconds == pytest.approx(row.tiles * one.milliseconds, abs=0.7)
        assert one.tokens is not None and row.tokens == row.tiles * one.tokens


def test_fastvithd_makes_one_token_of_64_by_64_pixels() -> None:
    for row in MODELS:
        if row.model == "FastVLM":
            assert row.side is not None and row.tokens == (row.side // 64) ** 2, row


def test_figure_1a_meets_the_tables() -> None:
    for point in FIGURE_1A:
        if (point.encoder, point.side) == ("FastViTHD", 1024):
            sum_ = encoder_row("FastViTHD", 1024).milliseconds
            assert point.ttft_ms == pytest.approx(
                sum_ + prefill_row("Qwen2-0.5B", 256).milliseconds, abs=1
            )
    assert {p.encoder for p in FIGURE_1A} <= {r.encoder for r in ENCODERS}


def test_what_was_not_published_is_a_key_error() -> None:
    with pytest.raises(KeyError, match="no latency of FastViTHD at 1536"):
        encoder_row("FastViTHD", 1536)
