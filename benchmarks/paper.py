"""What the FastVLM paper and others published, as data: the rows that claims and figures divide.

Source: arXiv 2412.13303v2 (15 May 2025) with its supplement; table numbers are that version's.
Taken on a MacBook Pro with M1 Max, 32 GB: encoders by Core ML on the Neural Engine (coremltools
7.2), language models by MLX in float16 on the GPU. The paper's TTFT is encoder plus prefill of the
visual tokens, no more: no preprocessing, no text prompt, no sampling.

Table 4 prints FastViTHD's latencies 1.5 to 2.2 times higher than Table 10; every TTFT and claim
uses Table 10's, and so does this module.
"""

from dataclasses import dataclass
from types import MappingProxyType

__all__ = [
    "AVG5",
    "BENCHMARKS",
    "ENCODERS",
    "FIGURE_1A",
    "MACHINE",
    "MODELS",
    "PREFILLS",
    "EncoderRow",
    "ModelRow",
    "Point",
    "PrefillRow",
    "encoder_row",
    "model_row",
    "prefill_row",
]

MACHINE = "M1 Max (MacBook Pro, 32 GB): encoder Core ML on the Neural Engine, LLM MLX float16"

BENCHMARKS = (
    "GQA", "SQA", "TextVQA", "POPE", "LLaVA-W", "MM-Vet", "VQAv2", "DocVQA", "MMMU", "SeedBench-I",
)  # fmt: skip
"""Columns of Table 6, in its order."""

AVG5 = ("GQA", "TextVQA", "POPE", "DocVQA", "SeedBench-I")
"""Those that the paper averages in Tables 1 and 4 and Figures 1 and 4 (checked: R15, R19, R27)."""


@dataclass(frozen=True)
class EncoderRow:
    """Latency of one encoder at one input."""

    encoder: str
    parameters: float
    """Millions, as printed."""
    side: int
    """Input side in pixels: of the whole picture if it is cut into tiles."""
    tiles: int
    """Pictures that go through the encoder."""
    tokens: int | None
    """Visual tokens the language model then gets, where the table says so."""
    milliseconds: float
    table: str


@dataclass(frozen=True)
class PrefillRow:
    """Latency of a language model over the visual tokens."""

    language_model: str
    tokens: int
    milliseconds: float
    table: str
    exact: bool = True
    """False: read off a figure, about 1 ms uncertain."""


@dataclass(frozen=True)
class Point:
    """A point of Figure 1a, read off the figure: about 1 ms uncertain in TTFT."""

    encoder: str
    side: int
    ttft_ms: float
    avg5: float


@dataclass(frozen=True)
class ModelRow:
    """One row of Table 6."""

    name: str
    """R1 ... R44 in the table's order; a prime marks rows of the CVPR version."""
    model: str
    encoder: str
    language_model: str
    data: str
    """Millions of samples: pretraining + instruction tuning."""
    side: int | None
    """Input side in pixels; None where encoders of several sizes are mixed."""
    tokens: int
    parameters: float
    """Of the encoder, millions."""
    ttft_ms: float | None
    scores: MappingProxyType[str, float]
    """Accuracy in percent by benchmark; only those printed."""
    table: str

    @property
    def avg5(self) -> float | None:
        """Mean of the five benchmarks of AVG5, None unless all are printed."""
        if any(name not in self.scores for name in AVG5):
            return None
        return sum(self.scores[name] for name in AVG5) / len(AVG5)

    @property
    def encoder_ms(self) -> float | None:
        """Latency of its encoder where the paper prints it for this side, else None."""
        return next(
            (r.milliseconds for r in ENCODERS if (r.encoder, r.side) == (self.encoder, self.side)),
            None,
        )


def encoder_row(encoder: str, side: int) -> EncoderRow:
    """The published latency of an encoder; KeyError if there is none."""
    for row in ENCODERS:
        if (row.encoder, row.side) == (encoder, side):
            return row
    raise KeyError(f"The paper has no latency of {encoder} at {side}.")


def prefill_row(language_model: str, tokens: int) -> PrefillRow:
    """The published prefill of a language model; KeyError if there is none."""
    for row in PREFILLS:
        if (row.language_model, row.tokens) == (language_model, tokens):
            return row
    raise KeyError(f"The paper has no prefill of {tokens} tokens by {language_model}.")


def model_row(name: str) -> ModelRow:
    """A row of Table 6 by its name; KeyError if there is none."""
    for row in MODELS:
        if row.name == name:
            return row
    raise KeyError(f"Table 6 has no row {name}.")


def _cells(table: str) -> list[list[str]]:
    lines = [line for line in table.strip().splitlines() if line.strip()]
    return [[cell.strip() for cell in line.split("|")] for line in lines]


def _integer(cell: str) -> int | None:
    return None if cell == "-" else int(cell)


def _scores(cell: str) -> MappingProxyType[str, float]:
    values = zip(BENCHMARKS, cell.split(), strict=True)
    return MappingProxyType({name: float(value) for name, value in values if value != "-"})


# encoder | parameters, M | side | tiles | tokens | ms | table
# 1152 is nine tiles of 384 and an overview; 672 is four of 336 and one; 2048 four of 1024 and one.
_ENCODERS = """
FastViTHD          |  125.1 |  224 |  1 |    - |    6.8 | 3
FastViTHD          |  125.1 |  256 |  1 |   16 |    6.8 | 10
FastViTHD          |  125.1 |  768 |  1 |  144 |   54.8 | 10, 12
FastViTHD          |  125.1 | 1024 |  1 |  256 |  116.3 | 10, 12
FastViTHD          |  125.1 | 2048 |  5 | 1280 |  581.5 | 10
FastViT            |   35.7 |  256 |  1 |   64 |    3.0 | 1
FastViT            |   35.7 |  768 |  1 |  576 |   34.5 | 1
ViT-L/14           |  304   |  224 |  1 |    - |   47.2 | 3
ViT-L/14           |  304   |  336 |  1 |  576 |  127.4 | 1, 10
ViT-L/14           |  304   |  672 |  5 | 2880 |  637.0 | 10
ViTamin-L          |  333   |  224 |  1 |    - |   38.1 | 3
ViTamin-L          |  333   |  384 |  1 |  576 |  137.6 | 10
SigLIP-SO400M      |  430   |  384 |  1 |  729 |  272.1 | 10
SigLIP-SO400M      |  430   | 1152 | 10 | 7290 | 2721.4 | 10
ConvNeXt-L         |  200   |  320 |  1 |  100 |   34.4 | 3, 4
ConvNeXt-L         |  200   |  512 |  1 |  256 |   71.9 | 4
ConvNeXt-L         |  200   |  768 |  1 |  144 |  164.3 | 10
ConvNeXt-L         |  200   | 1024 |  1 |  256 |  696.1 | 10
ConvNeXt-L         |  200   | 1536 |  1 |  576 | 1569.7 | 10
ConvNeXt-XXL       |  846   |  256 |  1 |   64 |   89.9 | 4
ConvNeXt-XXL       |  846   |  512 |  1 |  256 |  397.1 | 4
ConvNeXt-XXL       |  846   | 1024 |  1 |    - | 2290.4 | 10
ViT-g/14           | 1012   |  224 |  1 |   32 |  149.5 | 10
DINOv2 ViT-L/14    |  304   |  518 |  1 |    - | 1171.5 | 10
"""

ENCODERS = tuple(
    EncoderRow(n, float(m), int(side), int(tiles), _integer(tokens), float(ms), table)
    for n, m, side, tiles, tokens, ms, table in _cells(_ENCODERS)
)

# language model | tokens | ms | table; "1a" is read off that figure. MobileLLaMA's "458" at 144
# tokens is left out: its TTFT is 458 in Table 6, so that the prefill cannot be.
_PREFILLS = """
Qwen2-0.5B   |   16 |    25   | 1a
Qwen2-0.5B   |   64 |    29   | 1a
Qwen2-0.5B   |  144 |    41.8 | 1a
Qwen2-0.5B   |  256 |    50.5 | 10
Qwen2-0.5B   |  576 |   129   | 1a
Qwen2-0.5B   | 1024 |   246   | 1a
Qwen2-0.5B   | 1280 |   336.4 | 10
Qwen2-0.5B   | 7290 | 11402.4 | 10
Qwen1.5-0.5B |  729 |   263.3 | 10
Qwen2-1.5B   |  144 |    97.1 | 10
Qwen2-1.5B   |  256 |   116.1 | 10
Qwen2-1.5B   | 1280 |   681.7 | 10
Qwen2-7B     |  144 |   391.2 | 10
Qwen2-7B     |  256 |   524.5 | 10
Qwen2-7B     | 1280 |  3139.5 | 10
Vicuna-7B    |   16 |   143.4 | 10
Vicuna-7B    |   32 |   152.1 | 10
Vicuna-7B    |  144 |   332.1 | 10
Vicuna-7B    |  256 |   461.1 | 10
Vicuna-7B    |  576 |  1170.0 | 10
LLaMA-2-7B   |  576 |  1169.5 | 10
LLaMA-3-8B   |  576 |  1223.6 | 10
LLaMA-3-8B   | 2880 | 19709.7 | 10
"""

PREFILLS = tuple(
    PrefillRow(name, int(tokens), float(ms), table, table != "1a")
    for name, tokens, ms, table in _cells(_PREFILLS)
)

FIGURE_1A = (
    Point("FastViTHD", 256, 31.9, 48.4),
    Point("FastViTHD", 512, 50.8, 52.5),
    Point("FastViTHD", 768, 96.6, 54.5),
    Point("FastViTHD", 1024, 166.8, 55.9),
    Point("SigLIP-SO400M", 384, 535.4, 55.5),
    Point("ConvNeXt-L", 320, 63.0, 49.0),
    Point("ConvNeXt-L", 512, 120.0, 52.2),
    Point("ConvNeXt-L", 768, 293.0, 54.4),
    Point("ConvNeXt-L", 1024, 942.0, 55.3),
    Point("ConvNeXt-XXL", 256, 119.0, 51.9),
    Point("ViT-L/14", 336, 256.0, 47.3),
)
"""All with Qwen2-0.5B in the LLaVA-1.5 setup; no such weights are published."""

# name | model | encoder | language model | data | side | tokens | encoder, M | TTFT, ms | scores
_MODELS = """
R1   | nanoLLaVA         | SigLIP-SO400M | Qwen1.5-0.5B | -        |  384 |  729 |  430   |   535 | 54.8 59.0 46.7 84.1 - - 70.8 - 30.4 -
R2   | LLaVA-OneVision   | SigLIP-SO400M | Qwen2-0.5B   | 4.5+3.2  | 1152 | 7290 |  430   | 14124 | - 67.2 - - - 29.1 - 70.0 31.4 65.5
R3   | FastVLM           | FastViTHD     | Qwen2-0.5B   | 15+1.1   | 1024 |  256 |  125.1 |   166 | 61.6 61.4 57.4 87.4 56.0 31.8 77.0 61.0 30.9 65.6
R4   | FastVLM           | FastViTHD     | Qwen2-0.5B   | 15+12.5  | 1024 |  256 |  125.1 |   166 | 63.1 81.5 62.9 86.6 66.7 29.8 78.8 70.4 32.9 69.2
R5   | FastVLM           | FastViTHD     | Qwen2-0.5B   | 15+23.1  | 1024 |  256 |  125.1 |   166 | 62.7 82.0 65.8 86.2 - 37.5 78.6 79.1 33.6 69.3
R5'  | FastVLM, tiles    | FastViTHD     | Qwen2-0.5B   | 15+12.5  | 2048 | 1280 |  125.1 |   918 | 64.0 80.7 65.4 86.9 65.2 35.3 79.2 82.1 32.9 69.6
R6   | MobileVLMv2       | ViT-L/14      | MobileLLaMA  | 1.2+3.6  |  336 |  144 |  304   |   458 | 59.3 66.7 52.1 84.3 - - - - - -
R7   | FastVLM           | FastViTHD     | Qwen2-1.5B   | 15+1.1   |  768 |  144 |  125.1 |   152 | 63.9 75.8 64.4 87.2 65.2 35.4 79.4 61.3 34.9 71.7
R8   | FastVLM           | FastViTHD     | Qwen2-1.5B   | 15+12.5  |  768 |  144 |  125.1 |   152 | 64.2 87.9 66.4 88.3 68.5 41.1 80.1 69.4 38.1 72.4
R9   | DeepSeek-VL       | SigLIP        | DeepSeek     | -        |  384 |  576 |  430   |     - | - - - 87.6 - 34.8 - - 32.2 66.7
R10  | MM1               | ViT-H         | MM1          | 3000+1.5 | 1344 |  720 |  632   |     - | - 62.3 68.2 87.4 67.5 39.4 - 68.4 33.2 65.6
R11  | FastVLM           | FastViTHD     | Qwen2-1.5B   | 15+1.1   | 1024 |  256 |  125.1 |   233 | 64.2 74.8 66.0 88.0 66.9 37.6 79.9 67.7 33.1 71.4
R12  | FastVLM           | FastViTHD     | Qwen2-1.5B   | 15+12.5  | 1024 |  256 |  125.1 |   233 | 64.3 89.9 69.0 87.8 68.0 43.6 80.7 75.6 39.1 73.1
R13  | FastVLM           | FastViTHD     | Qwen2-1.5B   | 15+23.1  | 1024 |  256 |  125.1 |   233 | 64.3 92.9 71.2 87.8 - 51.0 80.9 84.2 38.0 72.6
R13' | FastVLM, tiles    | FastViTHD     | Qwen2-1.5B   | 15+12.5  | 2048 | 1280 |  125.1 |  1263 | 64.7 90.8 71.5 86.8 71.3 45.2 81.0 87.6 40.1 73.4
R14  | InstructBLIP      | ViT-g/14      | Vicuna-7B    | 129+1.2  |  224 |   32 | 1012   |   302 | 49.2 60.5 50.1 - 60.9 26.2 - - 30.6 -
R15  | FastVLM           | FastViTHD     | Vicuna-7B    | .5+.6    |  256 |   16 |  125.1 |   150 | 60.6 69.2 53.1 82.3 60.4 27.5 74.7 17.4 36.2 63.7
R16  | FastVLM           | FastViTHD     | Vicuna-7B    | 15+1.1   |  256 |   16 |  125.1 |   150 | 62.1 75.7 57.2 83.9 64.0 31.5 77.3 29.8 37.6 68.8
R17  | MobileVLMv2       | ViT-L/14      | Vicuna-7B    | 1.2+3.6  |  336 |  144 |  304   |   460 | 62.6 74.8 62.3 85.3 - - - - - -
R18  | ConvLLaVA         | ConvNeXt-L    | Vicuna-7B    | 4.9+.6   |  768 |  144 |  200   |   496 | - - 59.1 87.3 - 44.8 - 44.8 36.3 68.8
R19  | FastVLM           | FastViTHD     | Vicuna-7B    | .5+.6    |  768 |  144 |  125.1 |   387 | 62.4 67.6 62.9 87.7 63.8 31.5 78.9 32.9 34.9 68.2
R20  | FastVLM           | FastViTHD     | Vicuna-7B    | .5+1.1   |  768 |  144 |  125.1 |   387 | 63.2 73.5 67.5 86.3 63.9 33.0 79.1 57.3 36.9 69.9
R21  | FastVLM           | FastViTHD     | Vicuna-7B    | 15+1.1   |  768 |  144 |  125.1 |   387 | 65.0 78.7 69.4 87.5 67.0 42.2 81.3 65.5 37.0 73.7
R22  | FastVLM           | FastViTHD     | Qwen2-7B     | 15+1.1   |  768 |  144 |  125.1 |   446 | 65.6 85.9 69.5 87.2 73.0 41.3 81.3 66.9 43.6 75.3
R23  | FastVLM           | FastViTHD     | Qwen2-7B     | 15+12.5  |  768 |  144 |  125.1 |   446 | 64.7 96.0 71.9 87.4 73.6 49.4 81.1 75.3 44.6 74.3
R24  | Qwen-VL           | ViT-bigG      | Qwen-7B      | 1400+50  |  448 |  256 | 1844   |     - | 59.3 67.1 63.8 - - - 79.5 65.1 - -
R25  | Qwen-VL-Chat      | ViT-bigG      | Qwen-7B      | 1400+50  |  448 |  256 | 1844   |     - | 57.5 68.2 61.5 - - - 78.2 62.6 - -
R26  | ConvLLaVA         | ConvNeXt-L    | Vicuna-7B    | 4.9+.6   | 1024 |  256 |  200   |  1157 | - - 62.5 87.7 - 44.4 - 48.5 35.1 69.3
R27  | FastVLM           | FastViTHD     | Vicuna-7B    | .5+.6    | 1024 |  256 |  125.1 |   577 | 63.1 67.4 64.4 88.1 64.8 31.7 79.2 35.6 35.1 68.5
R28  | FastVLM           | FastViTHD     | Vicuna-7B    | .5+1.1   | 1024 |  256 |  125.1 |   577 | 63.3 74.1 67.4 87.1 66.5 32.4 79.3 62.8 37.3 69.9
R29  | FastVLM           | FastViTHD     | Vicuna-7B    | 15+1.1   | 1024 |  256 |  125.1 |   577 | 65.2 80.3 70.6 87.2 71.5 40.1 81.6 72.4 36.7 73.5
R30  | FastVLM           | FastViTHD     | Qwen2-7B     | 15+1.1   | 1024 |  256 |  125.1 |   641 | 65.8 84.9 72.1 87.8 75.8 44.1 81.7 73.3 46.2 75.1
R31  | LLaVA-1.5         | ViT-L/14      | Vicuna-7B    | .5+.6    |  336 |  576 |  304   |  1297 | 62.0 70.4 58.2 85.9 59.6 31.1 76.6 28.1 35.3 66.1
R32  | MobileVLMv2       | ViT-L/14      | Vicuna-7B    | 1.2+3.6  |  336 |  576 |  304   |  1297 | 64.6 74.8 66.8 86.1 - - - - - -
R33  | ShareGPT4V        | ViT-L/14      | Vicuna-7B    | 1.2+.7   |  336 |  576 |  304   |  1297 | 63.3 68.4 60.4 85.7 72.6 37.6 80.6 - - 69.7
R34  | ViTamin           | ViTamin-L     | Vicuna-7B    | .5+.6    |  384 |  576 |  333   |  1308 | 61.6 67.6 59.8 85.5 66.1 33.6 78.9 - - -
R35  | ConvLLaVA         | ConvNeXt-L    | Vicuna-7B    | 4.9+.6   | 1536 |  576 |  200   |  2740 | - - 65.8 87.3 - 45.9 - 59.0 35.8 70.2
R36  | VILA              | ViT-L/14      | LLaMA-2-7B   | 50+1     |  336 |  576 |  304   |  1297 | 62.3 68.2 64.4 85.5 69.7 34.9 79.9 - - 62.8
R37  | LLaVA-FlexAttn    | ViT-L/14      | Vicuna-7B    | .5+.6    | 1008 |  576 |  304   |     - | 62.2 - 48.9 85.9 - 29.4 78.7 - - -
R38  | MM1               | ViT-H         | MM1-7B       | 3000+1.5 | 1344 |  720 |  632   |     - | - 72.6 72.8 86.6 81.5 42.1 82.8 76.8 37.0 69.9
R39  | LLaVA-NeXT        | ViT-L/14      | LLaMA-3-8B   | -        |  672 | 2880 |  304   | 20347 | 65.2 72.8 64.6 - 80.1 - - 78.2 41.7 72.7
R40  | FastVLM           | FastViTHD     | Qwen2-7B     | 15+6.5   | 1024 |  256 |  125.1 |   641 | 66.0 87.4 73.1 87.3 72.4 47.6 82.3 78.7 42.8 75.9
R41  | FastVLM           | FastViTHD     | Qwen2-7B     | 15+12.5  | 1024 |  256 |  125.1 |   641 | 65.2 95.7 73.4 86.9 71.1 48.4 81.6 82.7 47.3 74.1
R42  | FastVLM           | FastViTHD     | Qwen2-7B     | 15+23.1  | 1024 |  256 |  125.1 |   641 | 64.1 96.8 76.1 87.2 - 56.3 81.9 88.0 44.0 74.5
R42' | FastVLM, tiles    | FastViTHD     | Qwen2-7B     | 15+12.5  | 2048 | 1280 |  125.1 |  3721 | 65.5 96.9 76.6 87.6 75.1 54.7 82.5 92.3 47.6 75.8
R43  | MiniGemini-HD     | ConvNeXt-L + ViT-L/14 | LLaMA-3-8B | 1.5+1.5 | - | 2880 | 504  | 21832 | 64.5 75.1 70.2 - - - - 74.6 37.3 73.2
R44  | Cambrian-1        | 4 encoders    | LLaMA-3-8B   | 2.5+7    |    - |  576 | 1884   |  5085 | 64.6 80.4 71.7 - - - - 77.8 42.7 74.7
"""  # noqa: E501


def _model(cells: list[str]) -> ModelRow:
    name, model, encoder, language_model, data, side, tokens, parameters, ttft, scores = cells
    return ModelRow(
        name=name,
        model=model,
        encoder=encoder,
        language_model=language_model,
        data=data,
        side=_integer(side),
        tokens=int(tokens),
        parameters=float(parameters),
        ttft_ms=None if ttft == "-" else float(ttft),
        scores=_scores(scores),
        table="6 (CVPR)" if name.endswith("'") else "6",
    )


MODELS = tuple(_model(cells) for cells in _cells(_MODELS))
