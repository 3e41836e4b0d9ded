"""The simulated annotator: a true reward that we know, and noisy comparisons made with it.

The reward is a rubric, the sum of five parts. For the request "Tell me a story about a shy fox and a
kite." and the response

    Once there was a shy fox who lived by the river. But her red kite was gone.
    She sang softly until Aunt Lily felt better. But she never found the kite.

they are: on request 1.0 + 0.75 (fox and kite occur), kindness 1.0 (one kind sentence), ending 0.0 (a sad
one), brevity 0.0 (32 words), repetition 0.0; so gold_reward is 2.75.

Asked to compare two responses, the annotator adds Gumbel(0, 1) noise to the reward of each and picks the
larger. The difference of two such noises is logistic, so this is exactly the Bradley-Terry model
(CS 224R, Lecture 9, ch. 6).
"""

import math
import re

from data.stories import WORLD, is_story, parse_request, recognise, split_sentences

HERO = 1.0          # the requested hero's word occurs in the response
THING = 0.75        # the requested thing's word does
KIND = 2.0          # k kind sentences together: KIND * (1 - 2**-k), that is 1, 1.5, 1.75, ...: less each time
UNKIND = -1.5       # each unkind sentence
HAPPY = 1.5         # the last sentence is a happy ending
SAD = 0.0           # ... or a sad one
NO_ENDING = -0.5    # ... or none
FREE_WORDS = 45     # words (runs of characters between white space) that cost nothing
WORD = -0.03        # each word beyond them
REPEATED = -0.75    # each sentence with the pattern of an earlier one; unrecognised: with its very text


def rubric(prompt, response, world=WORLD):
    """The parts of the true reward, as a dict: on request, kindness, ending, brevity, repetition.

    The response may be any text, also an empty one. Raises ValueError if the prompt is not a request.
    """
    asked = parse_request(prompt, world)
    if asked is None:
        raise ValueError(f"not a request of this world: {prompt!r}")
    sentences = split_sentences(response)
    found = [recognise(sentence, world) for sentence in sentences]
    parts = [sentence.part if sentence else None for sentence in found]
    distinct = {known[:2] if known else text for known, text in zip(found, sentences)}     # patterns, else texts
    words = re.findall("[a-z]+", response.lower())
    rewards = {
        "on request": HERO * (asked.hero in words) + THING * (asked.thing in words),
        "kindness": KIND * (1 - 0.5 ** parts.count("kind")) + UNKIND * parts.count("unkind"),
        "ending": {"happy": HAPPY, "sad": SAD}.get(parts[-1] if parts else None, NO_ENDING),
        "brevity": WORD * max(0, len(response.split()) - FREE_WORDS),
        "repetition": REPEATED * (len(sentences) - len(distinct)),
    }
    return {name: reward + 0.0 for name, reward in rewards.items()}     # + 0.0 makes 0.0 of -0.0


def gold_reward(prompt, response, world=WORLD):
    """The true reward, the sum of the rubric's parts; any text gets one. ValueError: the prompt is no request."""
    return float(sum(rubric(prompt, response, world).values()))


def answers(texts, ended):
    """How many of the responses are answers: (share with a story, share with a flawless one).

    A story: the response ended, and more than half of its sentences, two at least, are sentences of the world.
    Flawless: every sentence is, and the first is an opening (is_story).
    """
    stories_told, flawless = 0, 0
    for text, end in zip(texts, ended):
        known = [recognise(sentence) is not None for sentence in split_sentences(text)]
        stories_told += end and sum(known) >= 2 and 2 * sum(known) > len(known)
        flawless += end and is_story(text)
    return stories_told / len(texts), flawless / len(texts)


def scored(prompt, text, reward=None):
    """A text with its scores before it, for the screen: the reward model's (where one is given), and the annotator's true
    reward where the prompt is the world's."""
    scores = [] if reward is None else [f"reward {reward:+.2f}"]
    if parse_request(prompt):
        scores.append(f"gold {gold_reward(prompt, text):+.2f}")
    return f"[{', '.join(scores)}] {text}" if scores else text


def choose(prompt, first, second, rng, world=WORLD):
    """Which of two responses the annotator prefers, 0 or 1; rng is a random.Random.

    P(0) = sigmoid(gold_reward(first) - gold_reward(second)): Bradley-Terry.
    """
    noisy = [gold_reward(prompt, response, world) + _gumbel(rng) for response in (first, second)]
    return int(noisy[1] > noisy[0])


def _gumbel(rng):
    """A draw from Gumbel(0, 1): minus the log of an exponential draw."""
    return -math.log(rng.expovariate(1.0) or 5e-324)
