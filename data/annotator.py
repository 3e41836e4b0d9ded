"""The simulated annotator: a true reward that we know, and noisy comparisons made with it.

The reward is a rubric, the sum of five parts. For the request "Tell me a story about a shy fox and
a kite." and the response

    Once there was a shy fox who lived by the river. But her red kite was gone.
    She sang softly until Aunt Lily felt better. But she never found the kite.

they are: on request 1.0 + 0.75 (fox and kite occur), kindness 1.0 (one kind sentence), ending 0.0
(a sad one), brevity 0.0 (31 words), repetition 0.0; so gold_reward is 2.75.

Asked to compare two responses, the annotator adds Gumbel(0, 1) noise to the reward of each and
picks the larger. The difference of two such noises is logistic, so this is exactly the
Bradley-Terry model (CS 224R, Lecture 9, ch. 6).

This file is the truth of the little world. Who else may label or reward is in data/judges.py.
"""

import bisect
import itertools
import math
import re
from typing import NamedTuple

import torch

from data.stories import WORLD, is_story, parse_request, recognise, split_sentences

HERO = 1.0          # the requested hero's word occurs in the response
THING = 0.75        # the requested thing's word does
KIND = 2.0          # k kind sentences together: KIND * (1 - 2**-k), that is 1, 1.5, 1.75, ...
UNKIND = -1.5       # each unkind sentence
HAPPY = 1.5         # the last sentence is a happy ending
SAD = 0.0           # ... or a sad one
NO_ENDING = -0.5    # ... or none
FREE_WORDS = 45     # words (runs of characters between white space) that cost nothing
WORD = -0.03        # each word beyond them
REPEATED = -0.75    # each sentence with the pattern of an earlier one; unrecognised: the same text


class Seen(NamedTuple):
    """What can be seen in a response to a request: all that the annotator and the constitution
    judge by."""
    hero: bool          # the requested hero's word occurs
    thing: bool         # the requested thing's word does
    kind: int           # kind sentences
    unkind: int         # unkind ones
    ending: str         # "happy" or "sad": the last sentence is such an ending; else another part's
                        # name, or "" for an unknown sentence or none
    words: int          # runs of characters between white space
    repeated: int       # sentences that repeat an earlier one


def look(prompt, response, world=WORLD):
    """The Seen of a response, which may be any text, also an empty one. ValueError if the prompt is
    not a request."""
    request = parse_request(prompt, world)
    if request is None:
        raise ValueError(f"not a request of this world: {prompt!r}")

    parts = []
    distinct = set()    # the pattern of a recognised sentence, the text of any other
    sentences = split_sentences(response)
    for sentence in sentences:
        recognised = recognise(sentence, world)
        if recognised:
            parts.append(recognised.part)
            distinct.add(recognised[:2])
        else:
            parts.append("")
            distinct.add(sentence)

    words = re.findall("[a-z]+", response.lower())
    return Seen(
        hero=request.hero in words,
        thing=request.thing in words,
        kind=parts.count("kind"),
        unkind=parts.count("unkind"),
        ending=parts[-1] if parts else "",
        words=len(response.split()),
        repeated=len(sentences) - len(distinct))


def rubric(prompt, response, world=WORLD):
    """The parts of the true reward, as a dict: on request, kindness, ending, brevity, repetition.
    Arguments as look's."""
    seen = look(prompt, response, world)
    rewards = {
        "on request": HERO * seen.hero + THING * seen.thing,
        "kindness": KIND * (1 - 0.5 ** seen.kind) + UNKIND * seen.unkind,
        "ending": {"happy": HAPPY, "sad": SAD}.get(seen.ending, NO_ENDING),
        "brevity": WORD * max(0, seen.words - FREE_WORDS),
        "repetition": REPEATED * seen.repeated,
    }
    return {name: reward + 0.0 for name, reward in rewards.items()}     # + 0.0 makes 0.0 of -0.0


def gold_reward(prompt, response, world=WORLD):
    """The true reward, the sum of the rubric's parts; any text gets one. ValueError if the prompt
    is not a request."""
    return float(sum(rubric(prompt, response, world).values()))


def choose(prompt, first, second, rng, world=WORLD):
    """Which of two responses the annotator prefers, 0 or 1; rng is a random.Random.

    P(0) = sigmoid(gold_reward(first) - gold_reward(second)): Bradley-Terry.
    """
    noisy_first = gold_reward(prompt, first, world) + gumbel(rng)
    noisy_second = gold_reward(prompt, second, world) + gumbel(rng)
    return int(noisy_second > noisy_first)


def gumbel(rng):
    """A draw from Gumbel(0, 1): minus the log of an exponential draw."""
    return -math.log(rng.expovariate(1.0) or 5e-324)


# --------------------------------------------------------------------------------------------------
# Process supervision (Lightman et al. 2023; CS 224R, ch. 11): a step is a sentence


def steps(prompt, response, world=WORLD):
    """The true reward step by step: what each sentence adds to the reward of the story so far, a
    list of floats.

    gold_reward(first k sentences) - gold_reward(first k - 1): an ending counts where it occurs, and
    is lost again if the story continues. The sum telescopes to gold_reward(response) -
    gold_reward(""), that is gold_reward + 0.5, because an empty story lacks an ending.
    """
    sentences = split_sentences(response)
    totals = []
    for k in range(len(sentences) + 1):
        totals.append(gold_reward(prompt, " ".join(sentences[:k]), world))
    return [after - before for before, after in zip(totals, totals[1:])]


def step_ends(pieces):
    """Where the sentences of a response end: the index of the last token of each. pieces: the bytes
    of its tokens."""
    text = b"".join(pieces).decode("utf-8", "surrogateescape")  # keeps bytes that are no UTF-8
    bytes_so_far = list(itertools.accumulate(len(piece) for piece in pieces))

    ends = []
    position = 0  # in text, behind the sentence found last
    for sentence in split_sentences(text):
        position = text.index(sentence, position) + len(sentence)
        size = len(text[:position].encode("utf-8", "surrogateescape"))
        ends.append(bisect.bisect_left(bytes_so_far, size))
    return ends


def encode_steps(prompt, response, tokenizer):
    """(ids of prompt + response + <|end|>, the index in them of each step's last token)."""
    start = tokenizer.prompt(prompt)
    ids = tokenizer.response(response)
    ends = [len(start) + end for end in step_ends(tokenizer.pieces(ids[:-1]))]
    return start + ids, ends


class Marked(NamedTuple):
    """A response with the annotator's mark for every step."""
    ids: list       # prompt + response + <|end|>
    ends: list      # the index in ids of each step's last token
    steps: list     # their true rewards
    marks: list     # good or not


def mark_response(prompt, response, tokenizer, rng):
    """The annotator marks every step of a response: a Marked. rng: a random.Random.

    The mark of a step compares the story with it and without it, as choose does:
    P(good) = sigmoid(step).
    """
    ids, ends = encode_steps(prompt, response, tokenizer)
    true_steps = steps(prompt, response)
    marks = [rng.random() < 1 / (1 + math.exp(-step)) for step in true_steps]
    return Marked(ids, ends, true_steps, marks)


def mark(rows, tokenizer, rng):
    """Both responses of every pair, marked: a list of Marked."""
    marked = []
    for row in rows:
        for text in (row["chosen"], row["rejected"]):
            marked.append(mark_response(row["prompt"], text, tokenizer, rng))
    return marked


# --------------------------------------------------------------------------------------------------
# Many responses at once


def read_texts(tokens, lengths, tokenizer):
    """Sequences in the chat format, tokens (B, T) and their lengths (B,), as texts:
    [(prompt, response)]."""
    texts = []
    for row, length in zip(tokens.tolist(), lengths.tolist()):
        start = row.index(tokenizer.assistant_token)
        stop = length
        if row[length - 1] == tokenizer.end_token:
            stop -= 1
        texts.append((tokenizer.decode(row[1:start]), tokenizer.decode(row[start + 1:stop])))
    return texts


def gold_rewards(rollout, tokenizer):
    """The annotator's true reward of every response of a Rollout in the chat format: (B,)."""
    texts = read_texts(rollout.tokens, rollout.lengths, tokenizer)
    return torch.tensor([gold_reward(prompt, response) for prompt, response in texts])


def gold_margins(rows):
    """The annotator's true r(x, y_w) - r(x, y_l) of every row of a file of pairs: (N,)."""
    margins = []
    for row in rows:
        chosen = gold_reward(row["prompt"], row["chosen"])
        margins.append(chosen - gold_reward(row["prompt"], row["rejected"]))
    return torch.tensor(margins)


def answers(texts, ended):
    """How many of the responses are answers: (share with a story, share with a flawless one).

    A story: the response ended, and more than half of its sentences, two at least, are sentences of
    the world. Flawless: every sentence is, and the first is an opening (is_story).
    """
    stories_told = 0
    flawless = 0
    for text, end in zip(texts, ended):
        known = [recognise(sentence) is not None for sentence in split_sentences(text)]
        stories_told += end and sum(known) >= 2 and 2 * sum(known) > len(known)
        flawless += end and is_story(text)
    return stories_told / len(texts), flawless / len(texts)


def scored(prompt, text, reward=None):
    """A text with its scores before it, for the screen: the reward model's, if one is given, and
    the annotator's true reward if the prompt is the world's."""
    scores = []
    if reward is not None:
        scores.append(f"reward {reward:+.2f}")
    if parse_request(prompt):
        scores.append(f"gold {gold_reward(prompt, text):+.2f}")
    return f"[{', '.join(scores)}] {text}" if scores else text


def verify(prompt, response, world=WORLD):
    """A reward that can be verified (DeepSeek-R1; CS 224R, ch. 11): 1.0 where the story names hero
    and thing, has no unkind sentence and ends happily, else 0.0."""
    seen = look(prompt, response, world)
    return float(seen.hero and seen.thing and not seen.unkind and seen.ending == "happy")
