"""The annotator of data/annotator.py, against a rubric by hand and Bradley-Terry's formula."""

import math
import random

import pytest

from data.annotator import (answers, choose, gold_reward, mark, step_ends, steps, verify)
from data.stories import request, split_sentences, story
from data.tokenizer import Tokenizer, train as train_vocabulary
from helpers import ASKED as PROMPT, HAPPY, KIND, SAD, UNKIND, story_of


@pytest.mark.parametrize("response, gold", [
    (story_of(KIND[1], SAD), 2.75),                         # the docstring's
    ("fox", 1.0 - 0.5),
    ("The foxes flew a kites.", -0.5),                      # words, not pieces of words
    ("A FOX! A kite?", 1.75 - 0.5),                         # capitals, punctuation don't matter
    (story_of(*KIND[:3]), 1.75 + 1.75 - 0.5),               # kindness has diminishing returns
    (story_of(UNKIND[0], UNKIND[1], SAD), 1.75 - 2 * 1.5),
    (story_of(HAPPY, KIND[0]), 1.75 + 1 - 0.5),             # an ending counts at the end only
    (story_of(KIND[1], KIND[1].replace("Aunt Lily", "Uncle Tom")),      # the same pattern
     1.75 + 1.5 - 0.5 - 0.75),
    ("Moo. Moo. Moo. Baa.", -0.5 - 2 * 0.75),               # unrecognised: the same text
    (" ".join(["word"] * 50), -0.5 - 5 * 0.03),
])
def test_rubric_by_hand(response, gold):
    """A term with the wrong sign, counted twice, or that fails on a text which isn't a story.
    Kindness that pays linearly, or for saying it again, leaves nothing to over-optimise."""
    assert gold_reward(PROMPT, response) == pytest.approx(gold)


def test_another_request_earns_less():
    """A reward that doesn't look at the prompt: then no policy has to."""
    for prompt, gold in (("Tell me a story about a shy cat and a kite.", 0.75 + 1.5),
                         ("Please tell me about an odd fox and a drum.", 1.0 + 1.5)):
        assert gold_reward(prompt, story_of(HAPPY)) == pytest.approx(gold)


def test_steps_add_up_to_the_reward():
    """A dense reward, of steps, whose sum is another reward: its optimum is another policy."""
    rng = random.Random(1)
    texts = [(PROMPT, text) for text in ("", "fox", "Moo. Moo. \n Moo! ", "word " * 60)]
    for _ in range(50):
        prompt = request(rng).text
        texts.append((prompt, story(rng, prompt).text))
    for prompt, text in texts:
        assert sum(steps(prompt, text)) == pytest.approx(gold_reward(prompt, text) + 0.5)
        assert len(steps(prompt, text)) == len(split_sentences(text))


def test_choices_are_bradley_terry():
    """Noise of another scale, one noise for both, or 0 and 1 exchanged; a label that one seed does
    not reproduce."""
    n = 2500
    for first, second in ((story_of(KIND[0]), story_of(KIND[0], HAPPY)),
                          (story_of(HAPPY), story_of(KIND[0], SAD))):
        rngs = [random.Random(2), random.Random(2)]
        labels = [choose(PROMPT, first, second, rngs[0]) for _ in range(n)]
        again = [choose(PROMPT, first, second, rngs[1]) for _ in range(40)]
        p = 1 / (1 + math.exp(gold_reward(PROMPT, first) - gold_reward(PROMPT, second)))
        assert labels[:40] == again and set(again) == {0, 1}
        assert abs(sum(labels) / n - p) < 4 * math.sqrt(p * (1 - p) / n)


@pytest.mark.parametrize("sentences, gains", [
    ([KIND[0], UNKIND[0], HAPPY], [1.0, 0.75, 1.0, -1.5, 2.0]),     # no ending: 0.5 from the start
    ([HAPPY, KIND[0], KIND[0]],                                     # the ending is lost again
     [1.0, 0.75, 2.0, 1.0 - 2.0, 0.5 - 0.75])])
def test_steps_by_hand(sentences, gains):
    """A step that is paid for what came before it, or for an ending that the story does not have
    there."""
    assert steps(PROMPT, story_of(*sentences)) == pytest.approx(gains)


HOSTILE = ["Hi. There!", "Né. \xa0Où? \x85 日本。 Fin", "a.\u2028b? \" c.\" d", " . ! ?", "..",
           "No end", "x.\x1cy.\r\n\tz.", ""]


def test_a_step_is_read_at_its_sentences_last_token():
    """A mark read a token too early, where the sentence might still turn out well, or at the next
    one's first word; sentences counted otherwise than the annotator does: all marks move."""
    tokenizer = Tokenizer(train_vocabulary(" ".join(HOSTILE) + story_of(*KIND), 300))
    rng = random.Random(5)
    samples = tokenizer.encode_batch(HOSTILE + [story_of(*KIND, HAPPY), story_of(SAD)])
    tokens = tokenizer.encode(". ! \"? é 日 a b") + list(range(tokenizer.n_vocab))
    for _ in range(100):        # any tokens: bytes that are no text, special ones
        samples.append(rng.choices(tokens, k=40))
    for ids in samples:
        ends = step_ends(tokenizer.pieces(ids))
        sentences = split_sentences(tokenizer.decode(ids))
        assert len(ends) == len(sentences) and ends == sorted(set(ends))
        for k, end in enumerate(ends):
            before = split_sentences(tokenizer.decode(ids[:end]))
            assert split_sentences(tokenizer.decode(ids[:end + 1])) == sentences[:k + 1]
            # of a character that is no text, one byte is enough
            assert before[:k + 1] != sentences[:k + 1] or "\ufffd" in sentences[k]


def test_marks_are_a_comparison_with_the_story_without_the_step():
    """A mark that is the sign of the reward, which no noise hides, or that depends on the steps
    after it."""
    tokenizer = Tokenizer(train_vocabulary(story_of(*KIND), 300))
    rng = random.Random(6)
    n = 250
    row = {"prompt": PROMPT, "chosen": story_of(KIND[0], UNKIND[0], HAPPY),
           "rejected": story_of(SAD)}
    marked = mark([row] * n, tokenizer, rng)
    for text, items in ((row["chosen"], marked[::2]), (row["rejected"], marked[1::2])):
        ids = tokenizer.prompt(PROMPT) + tokenizer.response(text)
        assert all(item.ids == ids and item.steps == steps(PROMPT, text) for item in items)
        last_words = [tokenizer.decode(ids[:end + 1]).split()[-1] for end in items[0].ends]
        assert last_words == [sentence.split()[-1] for sentence in split_sentences(text)]
        for k, step in enumerate(items[0].steps):
            p = 1 / (1 + math.exp(-step))
            good = sum(item.marks[k] for item in items) / n
            assert abs(good - p) < 4 * math.sqrt(p * (1 - p) / n)


@pytest.mark.parametrize("response, verified", [
    (story_of(KIND[0], HAPPY), 1), ("Fox! " + HAPPY, 1), (story_of(SAD), 0),
    (story_of(UNKIND[0], HAPPY), 0), (story_of(HAPPY, KIND[0]), 0),
    ("The fox. At last she found the drum and danced for joy.", 0)])
def test_verified_by_hand(response, verified):
    """Half of what was asked for, or an ending in the middle, that is as good as right."""
    assert verify(PROMPT, response) == verified and type(verify(PROMPT, response)) is float


def test_answers_by_hand():
    """More requests, or half a story that never ends, counted as an answer."""
    two = f"{KIND[0]} {SAD}"
    texts = [story_of(), two, two, f"{two} Moo. Baa.", KIND[0]]
    assert answers(texts, [True, True, False, True, True]) == (2 / 5, 1 / 5)
