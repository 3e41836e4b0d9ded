"""The world of data/stories.py, against enumeration, sampling and the rules of English."""

import dataclasses
import itertools
import math
import random
from collections import Counter

import pytest

from data import stories
from data.stories import WORLD, log_probability, recognise, split_sentences

# A world small enough to enumerate. Some slots are shown by some sentences only, one pattern shows
# the hero under two forms, one hero is a "he", and one adjective takes "an". Of its 8 requests 2
# are held out.
TINY = dataclasses.replace(
    WORLD,
    words={"adjective": ("shy", "odd"), "hero": ("fox", "bear"), "thing": ("kite", "umbrella"),
           "friend": ("little Anna", "the postman"),
           "place": ("by the sea", "on the hill", "in the park")},
    patterns={"ask": ("Tell me about {a_hero} and {a_thing}.",),
              "opening": ("Once there was {a_hero}.", "{A_hero} knew {friend}."),
              "wish": ("{She} wanted {a_thing}.",),
              "kind": ("{She} helped {friend}.", "The {hero} shared {her} supper."),
              "unkind": ("{She} pushed {friend}.", "{She} broke a window {place}."),
              "neutral": ("{Friend} looked at {him}.", "It rained."),
              "happy": ("{She} found the {thing}.",),
              "sad": ("The {hero} cried {herself} to sleep.",)},
    turns=(0.7, 0.3), page_lengths=(1, 2, 3), held_out_every=3)
REQUEST = "Tell me about an odd bear and a kite."
TINIEST = dataclasses.replace(
    TINY, patterns={part: patterns[:1] for part, patterns in TINY.patterns.items()}, turns=(1.0,))


def render(pattern, slots):
    """The pattern filled in, by means of its own; `slots` are the bare words."""
    she, her, him = ("He", "his", "him") if slots["hero"] == "bear" else ("She", "her", "her")
    a = {"odd": "an", "umbrella": "an"}
    a_hero = f"{a.get(slots['adjective'], 'a')} {slots['adjective']} {slots['hero']}"
    text = pattern.replace("{a_hero}", a_hero).replace("{A_hero}", a_hero.replace("a", "A", 1))
    text = text.replace("{a_thing}", f"{a.get(slots['thing'], 'a')} {slots['thing']}")
    text = text.replace("{She}", she).replace("{her}", her).replace("{him}", him)
    text = text.replace("{herself}", him + "self")
    text = text.replace("{Friend}", slots["friend"][0].upper() + slots["friend"][1:])
    for slot, word in slots.items():
        text = text.replace("{" + slot + "}", word)
    return text


def all_stories(world, titled=False):
    """The set of all stories of a small world, by brute force; titled: with a line above."""
    patterns = world.patterns
    turns = patterns["kind"] + patterns["unkind"] + patterns["neutral"]
    middles = []
    for n in range(1, len(world.turns) + 1):
        middles += itertools.permutations(turns, n)
    endings = [(), *((pattern,) for pattern in patterns["happy"] + patterns["sad"])]
    plans = list(itertools.product(patterns["opening"], patterns["wish"], middles, endings))

    texts = set()
    for words in itertools.product(*world.words.values()):
        slots = dict(zip(world.words, words))
        title = "The {adjective} {hero} and the {thing}\n".format(**slots) if titled else ""
        for opening, wish, middle, ending in plans:
            plan = (opening, wish, *middle, *ending)
            texts.add(title + " ".join(render(pattern, slots) for pattern in plan))
    return texts


def all_requests(world):
    """{request: whether it is held out} of a small world with one way to ask, by brute force."""
    requests = {}
    lists = [world.words[slot] for slot in ("adjective", "hero", "thing")]
    for words in itertools.product(*lists):
        slots = {"adjective": words[0], "hero": words[1], "thing": words[2], "friend": "-"}
        total = sum(choices.index(word) for choices, word in zip(lists, words))
        requests[render(world.patterns["ask"][0], slots)] = total % world.held_out_every == 0
    return requests


def test_probabilities_sum_to_one():
    """A log-probability that forgets a choice, counts one twice, or repeats turns; a page whose
    length costs nothing, or that holds a held-out request; a document that is no page or story."""
    texts = all_stories(TINY)
    for request in (None, REQUEST):
        total = math.fsum(math.exp(log_probability(request, text, TINY)) for text in texts)
        assert total == pytest.approx(1, abs=1e-9)

    requests = all_requests(TINIEST)
    logprobs = []
    for n in TINIEST.page_lengths:
        for lines in itertools.product(requests, repeat=n):
            text = "\n".join(lines)
            never = any(requests[line] for line in lines)
            logprobs.append(stories.document_log_probability(text, TINIEST))
            page = stories.page_log_probability(text, TINIEST)
            assert (page == -math.inf) == (logprobs[-1] == -math.inf) == never
            assert never or page == pytest.approx(logprobs[-1] - math.log(0.3))
    for text in all_stories(TINIEST, titled=True):
        logprobs.append(stories.document_log_probability(text, TINIEST))
    assert math.fsum(map(math.exp, logprobs)) == pytest.approx(1, abs=1e-9)


def frequent(counts, p, n):
    """Whether n draws came out as p says, by χ² over the texts that are expected five times or
    more; what is impossible never came."""
    cells = [text for text in p if n * p[text] >= 5]
    assert sum(p[text] for text in cells) > 0.8
    chi2 = sum((counts[text] - n * p[text]) ** 2 / (n * p[text]) for text in cells)
    impossible = any(p.get(text, 0) == 0 for text in counts)
    return abs(chi2 - len(cells)) < 5 * math.sqrt(2 * len(cells)) and not impossible


def test_samples_are_as_frequent_as_their_probability():
    """A sampler and a log-probability that both sum to one, of two different distributions; a way
    past the held-out requests that favors their neighbors."""
    rng = random.Random(5)
    n = 4000
    p = {text: math.exp(log_probability(REQUEST, text, TINIEST)) for text in all_stories(TINIEST)}
    assert frequent(Counter(stories.story(rng, REQUEST, TINIEST).text for _ in range(n)), p, n)
    titled = Counter(stories.document(rng, TINIEST).text[:4] == "The " for _ in range(2000))
    assert frequent(titled, {True: 0.7, False: 0.3}, 2000)
    for held_out in (False, True):
        drawn = Counter(stories.request(rng, TINIEST, held_out) for _ in range(6000))
        expected = {text for text, kept in all_requests(TINIEST).items() if kept == held_out}
        assert {text for text, _ in drawn} == expected
        assert frequent(drawn, {draw: math.exp(draw.logprob) for draw in drawn}, 6000)


def test_draws_carry_their_exact_log_probability():
    """An answer key that is off: the entropy of the source is the mean of these numbers. A training
    run that sees the very requests it is judged by, alone or on a page."""
    rng = random.Random(1)
    for _ in range(100):
        request = stories.request(rng)
        assert request.logprob == pytest.approx(-math.log(12 * 28 * 31 * 36))
        never_seen = stories.request(rng, held_out=True)
        assert not stories.is_held_out(request.text) and stories.is_held_out(never_seen.text)
        for asked in (request.text, None):
            text, logprob = stories.story(rng, asked)
            assert logprob == pytest.approx(log_probability(asked, text), abs=1e-9)
            assert stories.is_story(text)
        text, logprob = stories.page(rng)
        assert logprob == pytest.approx(stories.page_log_probability(text), abs=1e-9)
        assert not any(map(stories.is_held_out, text.split("\n")))
        text, logprob = stories.document(rng)
        assert logprob == pytest.approx(stories.document_log_probability(text), abs=1e-9)


def test_changed_stories_have_another_probability():
    """A reader that skips over what it doesn't understand: hero, order, repetition, white space.
    Half a story that counts as one, or a list of requests, which is what the base model answers."""
    request = "Tell me a story about a shy fox and a kite."
    start = ("Once there was a shy fox who lived by the sea. "
             "Somebody had taken her kite in the night.")
    turn = "She broke a promise to Uncle Tom."
    other = "She called Uncle Tom nasty names."
    end = "But she never found the kite."
    text = f"{start} {turn} {other} {end}"
    good = log_probability(request, text)
    assert good == pytest.approx(log_probability(request, f"{start} {other} {turn} {end}"))
    changed = text.replace("kite", "drum")
    assert log_probability(request, changed) == pytest.approx(good + math.log(0.2 / 35 / 0.8))
    for bad in (
            "", f"{start} {end}", f"{start} {turn} {turn} {end}", f"{turn} {start}",
            f"{start} {turn} {other.replace('Uncle Tom', 'the postman')}",  # another friend
            text.replace("She broke", "He broke"),                          # another pronoun
            f"{start} {end} {turn}", f"{start}  {turn}", f"{text} The end."):
        assert log_probability(request, bad) == -math.inf, bad
    for bad in (start.split(" Some")[0], f"{start} {turn} She sto", f"{request}\n{request}"):
        assert not stories.is_story(bad), bad


def test_conditioning_takes_the_same_constant_from_every_log_probability():
    """A curated world whose entropy is not the entropy of what is drawn: the numbers of turns must
    change too, because long stories have an unkind sentence more often."""
    words = {**TINY.words, "place": ("by the sea",), "friend": ("little Anna",)}
    world = dataclasses.replace(TINY, words=words)
    curated, log_p = stories.curate(world)
    kept = 0.0
    for text in all_stories(world, titled=True):
        logprob = stories.document_log_probability(text, world)
        sentences = split_sentences(text.split("\n")[1])
        expected = -math.inf
        if all(recognise(sentence, world).part != "unkind" for sentence in sentences):
            expected = logprob - log_p
            kept += math.exp(logprob)
        assert stories.document_log_probability(text, curated) == pytest.approx(expected, abs=1e-9)
    assert math.log(kept) == pytest.approx(log_p)
