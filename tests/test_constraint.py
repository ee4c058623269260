"""Answers held to a JSON schema: valid whatever the model would rather say."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import mlx.core as mx
import numpy as np
import pytest

import fastvlm_mlx as fv
from fastvlm_mlx.constraint import SchemaCompiler
from tests.schemas import random_schema

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 3, "maximum": 40},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
PERSON_KEYS = list(PERSON["properties"])  # type: ignore[call-overload]


@pytest.fixture(scope="module")
def nano() -> fv.FastVLM:
    return fv.load("nano")


@pytest.mark.parametrize("seed", range(20))
def test_random_schemas(nano: fv.FastVLM, seed: int) -> None:
    schema = random_schema(seed)
    picture = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    image = nano.encode(picture, image_size=64)
    for options in ({}, {"temperature": 3.0, "seed": seed}):
        answer = nano.ask(image, "What is this?", json_schema=schema, max_tokens=1500, **options)
        assert answer.finish_reason == "stop", (schema, answer.text)
        jsonschema.validate(json.loads(answer.text), schema)


def test_the_words_of_the_model_are_kept_where_they_fit(nano: fv.FastVLM) -> None:
    """Among what is allowed the likeliest is taken: the mask forbids, it does not choose."""
    picture = Path(__file__).parents[1] / "examples" / "south.jpg"
    image = nano.encode(picture)
    question = "How many objects are there?"
    free = nano.ask(image, question).text
    words = ["None.", "One.", "Two.", "Three.", "Four."]
    picked = {
        w: nano.ask(image, question, json_schema={"enum": [w, "Xylophone"]}).text for w in words
    }
    assert free in words
    assert picked[free] == f'"{free}"'


@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_a_batch_gives_the_answers_of_one_by_one(
    vlm: fv.FastVLM, picture: np.ndarray, penalty: float
) -> None:
    requests = [(picture, "Who?"), (picture[::-1], "And who is this, please?")]
    options: dict[str, Any] = {
        "json_schema": PERSON, "max_tokens": 80, "repetition_penalty": penalty,
    }  # fmt: skip
    together = vlm.ask_batch(requests, **options)
    alone = [vlm.ask(*request, **options) for request in requests]
    assert [a.text for a in together] == [a.text for a in alone]
    for answer in together:
        assert answer.finish_reason == "stop"
        jsonschema.validate(json.loads(answer.text), PERSON)


def test_a_conversation_goes_on_after_json(vlm: fv.FastVLM, picture: np.ndarray) -> None:
    chat = vlm.chat(picture)
    first = chat.ask("Who?", json_schema=PERSON, max_tokens=80)
    jsonschema.validate(json.loads(first.text), PERSON)
    second = chat.ask("And now?", max_tokens=4)
    image = vlm.encode(picture)
    ids = vlm.prompt_ids("Who?") + list(first.tokens)
    from fastvlm_mlx.prompt import turn_ids

    ids += turn_ids(vlm.tokenizer, "And now?")
    for token in second.tokens:
        assert int(vlm.logits(ids, [image])[0, -1].argmax().item()) == token
        ids.append(token)


def test_what_max_tokens_cut_is_never_passed_as_whole(vlm: fv.FastVLM, picture: np.ndarray) -> None:
    image = vlm.encode(picture)
    whole = vlm.ask(image, "Who?", json_schema=PERSON, max_tokens=80)
    count = len(whole.tokens)
    exact = vlm.ask(image, "Who?", json_schema=PERSON, max_tokens=count)
    two = {"type": "array", "prefixItems": [{"const": 1}, {"const": "b"}], "minItems": 2}
    listed = vlm.ask(image, "Who?", json_schema={**two, "items": False}, max_tokens=80)
    assert listed.text == json.dumps([1, "b"]), "written as Python does"
    assert (exact.text, exact.finish_reason) == (whole.text, "stop")
    cut = vlm.ask(image, "Who?", json_schema=PERSON, max_tokens=count - 1)
    assert cut.finish_reason == "length"
    with pytest.raises(json.JSONDecodeError):
        json.loads(cut.text)
    # "1" is JSON already, but may be the beginning of 12: only the model can say that it is whole.
    number = {"type": "integer", "minimum": 1000, "maximum": 99999}
    assert vlm.ask(image, "?", json_schema=number, max_tokens=4).finish_reason == "length"


def test_a_picture_whose_json_was_cut_is_an_error_among_many(
    vlm: fv.FastVLM, picture: np.ndarray
) -> None:
    pictures = [picture, picture[::-1]]
    whole = list(vlm.caption_many(pictures, json_schema=PERSON, max_tokens=80))
    assert [sorted(json.loads(record.text or "")) for record in whole] == [sorted(PERSON_KEYS)] * 2
    cut = list(vlm.caption_many(pictures, json_schema=PERSON, max_tokens=5))
    assert all("5 tokens were not enough" in (record.error or "") for record in cut)
    assert not any(record.text for record in cut)


def test_rows_beyond_the_tokenizer_are_never_chosen(vlm: fv.FastVLM) -> None:
    """The published models have more rows of logits than tokens."""
    size = len(vlm.tokenizer)
    wider = SchemaCompiler(vlm.tokenizer, vlm.config.eos_token_ids, size + 100)
    mask = wider.constraint(PERSON).mask()
    assert mask.shape == (1, size + 100)
    assert 0 < int(mask.sum().item()) < 20
    assert not mask[0, size:].any().item()
    narrower = SchemaCompiler(vlm.tokenizer, vlm.config.eos_token_ids, 257)
    assert narrower.constraint(PERSON).mask().shape == (1, 257)


def test_the_mask_is_that_of_the_tokens_before(vlm: fv.FastVLM) -> None:
    compiler = SchemaCompiler(vlm.tokenizer, vlm.config.eos_token_ids, vlm.network.vocabulary)
    constraint = compiler.constraint({"enum": [12, 13]})
    one, two, three = (vlm.tokenizer.encode(c)[0] for c in "123")
    assert np.flatnonzero(np.array(constraint.mask()[0])).tolist() == [one]
    assert not constraint.push(one)
    assert sorted(np.flatnonzero(np.array(constraint.mask()[0])).tolist()) == sorted([two, three])
    assert constraint.push(two)


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"type": "objec"}, "Invalid type: objec"),
        ({"type": "integer", "minimum": 5, "maximum": 2}, "minimum .5. is greater than maximum"),
        ({"not": {"type": "string"}}, "not"),
        ({"$ref": "#/nowhere"}, "nowhere"),
        ({"type": "string", "pattern": "("}, "regex parse error"),
        ({"enum": [float("nan")]}, "JSON"),
        ({"enum": [object()]}, "not JSON serializable"),
        (True, "expected a JSON schema as a dict"),
        ('{"type": "string"}', "expected a JSON schema as a dict"),
    ],
)
def test_bad_schemas_are_told_before_anything_runs(schema: Any, said: str) -> None:
    with pytest.raises(fv.OptionError, match=f"json_schema.*{said}"):
        fv.Options(json_schema=schema)


def test_stop_strings_contradict_a_schema() -> None:
    with pytest.raises(fv.OptionError, match="stop would cut"):
        fv.Options(json_schema=PERSON, stop=(",",))


def test_without_the_extra_the_command_that_installs_it_is_told() -> None:
    code = (
        "import sys; sys.modules['llguidance'] = None\n"
        "import fastvlm_mlx as fv\n"
        "fv.Options()\n"
        "try: fv.Options(json_schema={})\n"
        "except fv.OptionError as error: print(error)"
    )
    said = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert 'pip install "fastvlm-mlx[json]"' in said


def test_sampling_stays_inside_the_mask() -> None:
    from fastvlm_mlx.generation import token_sampler

    logits = mx.array([[9.0, 1.0, 0.0, 8.0], [0.0, 5.0, 9.0, 1.0]])
    mask = mx.array([[False, True, True, False], [True, False, False, True]])
    assert token_sampler(fv.Options(), 4)(logits, [], mask).tolist() == [1, 3]
    choose = token_sampler(fv.Options(temperature=50.0, top_p=0.99), 4)
    drawn = [choose(logits, [], mask).tolist() for _ in range(50)]
    assert {a for a, _ in drawn} == {1, 2} and {b for _, b in drawn} == {0, 3}
