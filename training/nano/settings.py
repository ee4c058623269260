"""The numbers of nano: its architecture and how it is trained."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class VisionSettings:
    embed_dims: tuple[int, ...] = (16, 32, 64, 128, 256)  # doubling, as the downsampling needs
    layers: tuple[int, ...] = (1, 1, 4, 3, 1)  # depth where glyphs are read: strides 16 and 32
    mlp_ratios: tuple[int, ...] = (3, 3, 3, 3, 2)


@dataclass(frozen=True)
class TextSettings:
    vocab_size: int = 0  # of the trained tokenizer
    hidden_size: int = 128
    intermediate_size: int = 256
    num_hidden_layers: int = 4
    num_attention_heads: int = 4  # of 32
    num_key_value_heads: int = 2
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0


@dataclass(frozen=True)
class Phase:
    """Part of the schedule: how often which input size, which print, and how much is said."""

    share: float  # of all images
    sizes: dict[int, float]
    prints: dict[str, float]
    told_share: float = 1.0  # images that also get text; the others teach the encoder alone
    questions: int = 2  # beside the caption and the reading question
    captioned_share: float = 1.0  # told images whose text includes the caption
    pair_share: float = 0.0625  # rows about two pictures, beside those about one
    restart: float | None = None  # learning rate to start from anew, with the eyes settled


PHASES = (
    # Big print at a quarter of the cost first; small print and large inputs once reading works.
    Phase(
        0.2925,
        {128: 0.8, 192: 0.2},
        {"large": 0.9, "medium": 0.1, "small": 0.0},
        told_share=0.5,
        questions=1,
    ),
    Phase(
        0.0585,
        {128: 0.2, 192: 0.3, 256: 0.5},
        {"large": 0.55, "medium": 0.43, "small": 0.02},
    ),
    Phase(
        0.1495,
        {128: 0.15, 192: 0.15, 256: 0.5, 320: 0.07, 384: 0.08, 512: 0.05},
        {"large": 0.40, "medium": 0.42, "small": 0.18},
        questions=4,
    ),
    # With BatchNorm and the first three stages settled, an image costs half: more questions.
    Phase(
        0.1495,
        {128: 0.15, 192: 0.2, 256: 0.5, 320: 0.06, 384: 0.06, 512: 0.03},
        {"large": 0.45, "medium": 0.40, "small": 0.15},
        questions=6,
        captioned_share=0.6,
        restart=1e-3,
    ),
    Phase(
        0.25,
        {128: 0.13, 192: 0.18, 256: 0.5, 320: 0.05, 384: 0.08, 512: 0.06},
        {"large": 0.40, "medium": 0.40, "small": 0.20},
        questions=7,
        captioned_share=0.5,
        restart=1.5e-3,
    ),
    # Two pictures: seen one by one they are known by now, told apart they are not.
    Phase(
        0.1,
        {128: 0.13, 192: 0.19, 256: 0.55, 320: 0.03, 384: 0.06, 512: 0.04},
        {"large": 0.40, "medium": 0.40, "small": 0.20},
        told_share=0.5,
        questions=6,
        captioned_share=0.7,
        pair_share=0.5,
        restart=1e-3,
    ),
)


@dataclass(frozen=True)
class TrainSettings:
    images: int = 400_000
    batch: int = 32  # of all processes together
    processes: int = 2  # one thread each: they meet once a step, threads would at every layer
    text_share: float = 0.7
    dialogue_share: float = 0.2
    learning_rate: float = 2e-3
    warm_up: int = 300  # steps
    weight_decay: float = 0.05
    clip: float = 1.0
    average: float = 0.999  # decay of the averaged weights, which are the ones exported
    seed: int = 0
    phases: tuple[Phase, ...] = field(default=PHASES)
