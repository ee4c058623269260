"""Nano's scenes, language and scoring: ground truth must be true before it can judge a model."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.nano import scoring
from training.nano.drawing import render
from training.nano.language import (
    CAPTION,
    KINDS,
    NUMBERS,
    PLACES,
    Exchange,
    caption,
    exchanges,
)
from training.nano.scenes import (
    COLOURS,
    HELD_OUT,
    POSITIONS,
    PRINTS,
    SHAPES,
    SIZES,
    letters,
    make_scene,
    sign_box,
)
from training.nano.settings import TrainSettings

seeds = st.integers(0, 2 * HELD_OUT)
quick = settings(max_examples=60, deadline=None)


def rng() -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(0))


@pytest.mark.parametrize("seed", [0, 7, HELD_OUT])
def test_a_seed_is_a_picture(seed):
    scene = make_scene(seed)
    assert scene == make_scene(seed)
    assert render(scene).tobytes() == render(make_scene(seed)).tobytes()
    assert render(scene).size == (scene.width, scene.height)
    assert render(scene, 96).size != render(scene).size
    assert make_scene(seed + 1) != scene


def test_training_never_sees_held_out_seeds():
    assert TrainSettings().images < HELD_OUT


@quick
@given(seeds)
def test_scenes_keep_their_promises(seed):
    scene = make_scene(seed)
    assert 1 <= len(scene.things) <= 4
    places = [POSITIONS.index(t.position) for t in scene.things]
    assert places == sorted(set(places))
    for thing, place in zip(scene.things, places, strict=True):
        assert (int(thing.x * 3), int(thing.y * 3)) == (place % 3, place // 3)
        assert thing.shape in SHAPES and thing.colour in COLOURS and thing.size in SIZES
    assert 0.5 <= scene.width / scene.height <= 2.01
    if scene.sign:
        low, high = PRINTS[scene.sign.print_size]
        assert low <= scene.sign.em <= high
        left, top, right, bottom = sign_box(scene)
        assert 0 <= left < right <= 1 and 0 <= top < bottom <= 1
        assert "".join(c for c, _, _ in letters(scene)) == scene.sign.text
        assert all(left < x < right and top < y < bottom for _, x, y in letters(scene))


@quick
@given(seeds)
def test_captions_parse_back(seed):
    scene = make_scene(seed)
    text = caption(scene)
    assert scoring.statements(text) == scoring.truth(scene)
    assert scoring.sign_text(text) == (scene.sign.text if scene.sign else None)


@quick
@given(seeds, st.integers(0, 2**32))
def test_answers_are_true(seed, asked):
    scene = make_scene(seed)
    for item in exchanges(scene, np.random.Generator(np.random.PCG64(asked))):
        nouns = item.question.rstrip("?.").split()
        if item.kind == "exists" and "sign" not in nouns:
            shape = next(s for s in SHAPES if s in nouns)
            colour = next((c for c in COLOURS if c in nouns), None)
            present = any(t.shape == shape and colour in (None, t.colour) for t in scene.things)
            assert item.answer == ("Yes." if present else "No."), item
        if item.kind == "where":
            named = set(nouns) & {*SHAPES, *COLOURS, *SIZES}
            (thing,) = [t for t in scene.things if named <= {t.shape, t.colour, t.size}]
            assert thing.position.split()[0] in item.answer, item
            assert item.about == (thing,)
        if item.kind == "what":
            assert item.about and scoring.statements(
                f"{item.answer[:-1]} {PLACES[item.about[0].position]}"
            ) == scoring.truth(replace(scene, things=item.about))
        if item.kind == "count_colour":
            assert item.answer == f"{NUMBERS[len(item.about)]}."
            assert all(t.colour in nouns for t in item.about)
        if item.kind in ("exists", "colour", "size") and item.about is not None:
            assert bool(item.about) == (item.answer != "No."), item
            assert set(item.about) <= set(scene.things)


def test_every_kind_is_asked_and_yes_is_as_common_as_no():
    generator = rng()
    found = [e for seed in range(800) for e in exchanges(make_scene(seed), generator)]
    assert {e.kind for e in found} == set(KINDS)
    yes = [e.answer == "Yes." for e in found if e.kind == "exists"]
    assert 0.44 < sum(yes) / len(yes) < 0.56


def perfect(scene, asked):
    known = {e.question: e.answer for e in scoring.questions(scene)}
    return [known[q] for q in asked]


def test_the_truth_scores_full_marks():
    scenes = [make_scene(HELD_OUT + i) for i in range(30)]
    shares = scoring.judge_all(scenes, perfect).shares()
    assert set(shares.values()) == {1.0}
    assert {"object statements", "questions", "text", "text, small print"} <= set(shares)


@pytest.mark.parametrize("name", ["shape", "colour", "size", "position"])
def test_a_wrong_word_makes_a_statement_wrong(name):
    scene = next(s for s in map(make_scene, range(99)) if s.things[0].position == "top left")
    told = {"shape": SHAPES, "colour": tuple(COLOURS), "size": tuple(SIZES), "position": POSITIONS}
    first = scene.things[0]
    other = next(v for v in told[name] if v != getattr(first, name))
    wrong = replace(scene, things=(replace(first, **{name: other}), *scene.things[1:]))
    score = scoring.Score()
    score.judge(scene, Exchange("caption", CAPTION, ""), caption(wrong))
    assert score.right["object statements"] == len(scene.things) - 1
    assert score.right["whole captions"] == 0


def test_invented_and_forgotten_objects_cost_the_same():
    scene = next(s for s in map(make_scene, range(99)) if len(s.things) == 3)
    for count in (2, 4):
        things = (*scene.things, replace(scene.things[0], shape="ring"))[:count]
        score = scoring.Score()
        text = caption(replace(scene, things=things))
        score.judge(scene, Exchange("caption", CAPTION, ""), text)
        shares = score.shares()
        assert shares["object statements"] == pytest.approx(min(3, count) / max(3, count))


def test_the_other_picture_of_two_is_told_from_the_right_one():
    pairs = [(make_scene(HELD_OUT + i), make_scene(HELD_OUT + i + 1)) for i in range(0, 60, 2)]

    def right(scenes, question):
        asked = scoring.pair_question(*scenes)
        assert asked.question == question
        return asked.answer

    def other(scenes, question):
        scene = scenes["first" in question]
        return caption(scene) if "sign" not in question and "written" not in question else "?"

    score = scoring.judge_pairs(pairs, right)
    wrong = scoring.judge_pairs(pairs, other).shares()
    assert score.shares() == {**dict.fromkeys(wrong, 1.0), "two pictures, the other one": 0.0}
    assert {"two pictures, pair", "two pictures, pair_read"} <= set(wrong)
    assert wrong["two pictures"] == 0 and wrong["two pictures, statements"] < 0.1
    assert wrong["two pictures, the other one"] > 0.9
