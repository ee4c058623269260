"""A small byte-level BPE with Qwen2's pre-tokenizer and special tokens.

Trained on the sentences of `language`, it is written in the file form of the published
0.5B model: vocab.json, merges.txt and three small JSON files, no tokenizer.json.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from .language import KINDS, exchange, pair_exchange, vocabulary_text
from .prompt import SYSTEM, TURN
from .scenes import make_scene

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# Qwen2's rule for cutting text before BPE: words, single digits, punctuation, newlines.
WORD = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BASE_VOCABULARY = 680
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def _around(bpe: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def train(scenes: int = 4000) -> Tokenizer:
    """Deterministic: the text comes from fixed seeds."""
    rng = np.random.Generator(np.random.PCG64(0))
    text = [SYSTEM, TURN.format(question="")] * 200 + vocabulary_text() * 200
    for seed in range(scenes):
        scene = make_scene(seed)
        asked = [exchange(scene, kind, rng) for kind in KINDS]
        asked.append(pair_exchange(scene, scene, rng))
        text += [s for e in asked if e for s in (e.question, e.answer)]
    tokenizer = _around(models.BPE())
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=BASE_VOCABULARY, initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(text, trainer)
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.model.save(str(folder))
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL}
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    _write(folder / "added_tokens.json", ids)
    _write(
        folder / "special_tokens_map.json",
        {
            "additional_special_tokens": list(SPECIAL[1:]),
            "eos_token": {"content": SPECIAL[2], **flags},
            "pad_token": {"content": SPECIAL[0], **flags},
        },
    )
    _write(
        folder / "tokenizer_config.json",
        {
            "add_prefix_space": False,
            "added_tokens_decoder": {
                str(i): {"content": token, **flags, "special": True} for token, i in ids.items()
            },
            "additional_special_tokens": list(SPECIAL[1:]),
            "bos_token": None,
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "eos_token": SPECIAL[2],
            "errors": "replace",
            "model_max_length": 8192,
            "pad_token": SPECIAL[0],
            "split_special_tokens": False,
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": None,
        },
    )


def load(folder: Path) -> Tokenizer:
    bpe = models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    tokenizer = _around(bpe)
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
