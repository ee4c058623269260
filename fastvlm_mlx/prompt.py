"""The `qwen_2` conversation template, and `<image>` expanded into slots.

A prompt is a list of token ids in which IMAGE stands once per picture; `expand` turns each into
as many slots as that picture has tokens, so ids and embeddings have one length by construction.
"""

from collections.abc import Sequence

from .errors import PromptError
from .tokenizer import Tokenizer

__all__ = [
    "IMAGE",
    "IMAGE_TEXT",
    "STYLES",
    "SYSTEM",
    "USER",
    "expand",
    "place",
    "prompt_ids",
    "turn_ids",
]

IMAGE = -200
"""Stands for a picture in a list of token ids (LLaVA's IMAGE_TOKEN_INDEX); never embedded."""
IMAGE_TEXT = "<image>"
STYLES = {
    # How captions are asked for in LLaVA-1.5's training data (TextCaps in its 665k mix).
    "short": "Provide a one-sentence caption for the provided image.",
    "detailed": "Describe the image in detail.",
    "alt": "Write alt text for the image: one sentence for people who cannot see it.",
    "tags": "List the keywords for this image, separated by commas.",
    "ocr": "What text is in the image?",
}
"""Prompts for common kinds of caption, by name."""
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
USER = "<|im_start|>user\n"
_ASSISTANT = "<|im_end|>\n<|im_start|>assistant\n"


def prompt_ids(tokenizer: Tokenizer, question: str, images: int) -> list[int]:
    """Token ids of a first turn, with IMAGE once per picture.

    Pictures stand in front of the question, each on a line of its own, unless the question says
    where: then it must contain `<image>` exactly `images` times. Raises PromptError otherwise.
    The text is checkpoint notes section 6.3: what the models were trained on.
    """
    return _tokenize(tokenizer, SYSTEM + USER + place(question, images) + _ASSISTANT)


def turn_ids(tokenizer: Tokenizer, question: str, images: int = 0) -> list[int]:
    """Token ids of a further turn, from the end of the last answer's text on."""
    return _tokenize(tokenizer, f"<|im_end|>\n{USER}{place(question, images)}{_ASSISTANT}")


def expand(ids: Sequence[int], tokens: Sequence[int]) -> list[int]:
    """Repeat the n-th IMAGE `tokens[n]` times. Raises PromptError if the counts differ."""
    slots = sum(i == IMAGE for i in ids)
    if slots != len(tokens):
        raise PromptError(_mismatch(slots, len(tokens)))
    counts = iter(tokens)
    return [i for i in ids for _ in range(next(counts) if i == IMAGE else 1)]


def place(question: str, images: int) -> str:
    """The question with `<image>` once per picture: where it says, else in front of it.

    Raises PromptError for what is no text or empty, and for slots that do not match the pictures.
    """
    if not isinstance(question, str) or not question.strip():
        raise PromptError(f"The question is {question!r:.100}; expected a text.")
    slots = question.count(IMAGE_TEXT)
    if slots == 0:
        return f"{IMAGE_TEXT}\n" * images + question
    if slots != images:
        raise PromptError(_mismatch(slots, images))
    return question


def _mismatch(slots: int, images: int) -> str:
    return (
        f"The prompt has {slots} {IMAGE_TEXT} but {images} picture(s) were given; give one "
        f"picture per {IMAGE_TEXT}, or leave {IMAGE_TEXT} out to put all pictures in front."
    )


def _tokenize(tokenizer: Tokenizer, text: str) -> list[int]:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(
            f"The question holds {text[error.start]!r}, which is no character; expected text, "
            "in UTF-8 where it comes as bytes."
        ) from error
    first, *rest = (tokenizer.encode(part) for part in text.split(IMAGE_TEXT))
    return first + [i for part in rest for i in (IMAGE, *part)]
