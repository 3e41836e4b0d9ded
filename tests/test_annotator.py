"""The annotator of data/annotator.py, against a rubric worked by hand and the Bradley-Terry formula."""

import math
import random
import statistics

import pytest

from data.annotator import choose, gold_reward, rubric, scored
from data.stories import request, story

PROMPT = "Tell me a story about a shy fox and a kite."
OPENING = "Once there was a shy fox who lived by the river."         # 11 words
WISH = "Suddenly her red kite was gone."                              # 6 words
KIND = ["She stopped to comfort a crying child.", "She sang softly until Aunt Lily felt better.",
        "On the way she freed a butterfly from a web.", "The fox mended a broken fence for Aunt Lily."]
UNKIND = ["She pulled the tail of a sleeping calf.", "She broke a promise to Aunt Lily."]
HAPPY, SAD = "At last she found the kite and danced for joy.", "But she never found the kite."


def story_of(*sentences):
    return " ".join((OPENING, WISH) + sentences)


def test_example_of_the_docstring():
    """A worked example that no longer works."""
    response = story_of(KIND[1], SAD)
    assert rubric(PROMPT, response) == {
        "on request": 1.75, "kindness": 1.0, "ending": 0.0, "brevity": 0.0, "repetition": 0.0}
    assert gold_reward(PROMPT, response) == 2.75


@pytest.mark.parametrize("response, gold", [
    ("", -0.5),                                             # nothing but the missing ending
    ("fox", 1.0 - 0.5),
    ("The foxes flew a kites.", -0.5),                      # words, not pieces of words
    ("A FOX! A kite?", 1.75 - 0.5),                         # capitals and punctuation don't matter
    (story_of(KIND[0]), 1.75 + 1 - 0.5),
    (story_of(UNKIND[0], UNKIND[1], SAD), 1.75 - 2 * 1.5),
    (story_of(KIND[0], UNKIND[0], HAPPY), 1.75 + 1 - 1.5 + 1.5),
    (story_of(HAPPY, KIND[0]), 1.75 + 1 - 0.5),              # an ending counts at the end only
    (story_of(KIND[0], KIND[0]), 1.75 + 1.5 - 0.5 - 0.75),
    (story_of(KIND[1], KIND[1].replace("Aunt Lily", "Uncle Tom")), 1.75 + 1.5 - 0.5 - 0.75),    # the same pattern
    ("Moo. Moo. Moo. Baa.", -0.5 - 2 * 0.75),               # unrecognised: the same text
    (" ".join(["word"] * 50), -0.5 - 5 * 0.03),
])
def test_rubric_by_hand(response, gold):
    """A term with the wrong sign, counted twice, or that fails on a text which isn't a story."""
    assert gold_reward(PROMPT, response) == pytest.approx(gold)


def test_another_request_earns_less():
    """A reward that doesn't look at the prompt: then no policy has to."""
    response = story_of(HAPPY)
    for prompt, lost in (("Tell me a story about a shy cat and a kite.", 1.0),
                         ("Please tell me about a shy fox and a drum.", 0.75),
                         ("Please tell me about an odd fox and a kite.", 0.0)):
        assert gold_reward(PROMPT, response) - gold_reward(prompt, response) == pytest.approx(lost)


def test_kindness_has_diminishing_returns():
    """Kindness that pays linearly leaves nothing to over-optimise."""
    totals = [rubric(PROMPT, story_of(*KIND[:k]))["kindness"] for k in range(5)]
    assert totals == [0, 1, 1.5, 1.75, 1.875]


def test_saying_a_kind_thing_again_does_not_pay():
    """After the first, a repeated kind sentence earns at most 0.5 and costs 0.75."""
    rewards = [gold_reward(PROMPT, story_of(*KIND[:1] * k)) for k in range(1, 6)]
    assert rewards == sorted(rewards, reverse=True) and len(set(rewards)) == 5


def test_the_parts_sum_to_the_reward():
    """A part that is reported and not counted."""
    rng = random.Random(0)
    for _ in range(100):
        prompt = request(rng).text
        response = story(rng, prompt).text
        assert sum(rubric(prompt, response).values()) == pytest.approx(gold_reward(prompt, response))


def test_a_wrong_prompt_is_named():
    """A typing error in a prompt that silently costs every response its 2.5."""
    with pytest.raises(ValueError, match="Sing a song"):
        gold_reward("Sing a song.", OPENING)


def test_scores_before_a_text():
    """The annotator asked about a prompt that it cannot judge, which is an error; a score of 0 that isn't shown."""
    text = story_of(KIND[1], SAD)
    assert scored(PROMPT, text) == f"[gold +2.75] {text}" and scored("Sing a song.", text) == text
    assert scored(PROMPT, "", 0.0) == "[reward +0.00, gold -0.50] "
    assert scored("Sing a song.", "La.", -1.234) == "[reward -1.23] La."


def test_spread_of_the_reward():
    """Rewards so alike that the labels are coin flips, or so different that there is no noise."""
    rng, golds = random.Random(1), []
    for _ in range(3000):
        prompt = request(rng).text
        golds.append(gold_reward(prompt, story(rng, prompt).text))
    assert 1.55 < statistics.stdev(golds) < 1.78     # 1.66 over 30,000 stories; 3,000 of them err by some 0.02


@pytest.mark.parametrize("first, second", [
    (story_of(KIND[0]), story_of(KIND[0], HAPPY)), (story_of(HAPPY), story_of(KIND[0], SAD)), ("fox", "fox")])
def test_choices_are_bradley_terry(first, second):
    """Noise of another scale, one noise for both, or 0 and 1 exchanged."""
    rng, n = random.Random(2), 5000
    chosen = sum(choose(PROMPT, first, second, rng) == 0 for _ in range(n))
    p = 1 / (1 + math.exp(gold_reward(PROMPT, second) - gold_reward(PROMPT, first)))
    assert abs(chosen / n - p) < 4 * math.sqrt(p * (1 - p) / n)


def test_choices_come_from_the_given_generator_only():
    """A label that one seed does not reproduce."""
    state = random.getstate()
    runs = [[choose(PROMPT, story_of(HAPPY), story_of(SAD), rng) for _ in range(50)]
            for rng in (random.Random(6), random.Random(6))]
    assert runs[0] == runs[1] and set(runs[0]) == {0, 1} and random.getstate() == state
