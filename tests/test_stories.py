"""The world of data/stories.py, against enumeration, sampling and the rules of English."""

import dataclasses
import itertools
import math
import random
import re
from collections import Counter
from string import Formatter

import pytest

from data import stories
from data.stories import WORLD, log_probability, parse_request, recognise, split_sentences

STORY_PARTS = ("opening", "wish", "kind", "unkind", "neutral", "happy", "sad")

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
    """The set of all stories of a small world, by brute force; titled: with a line above, as in a
    book."""
    patterns = world.patterns
    turns = patterns["kind"] + patterns["unkind"] + patterns["neutral"]
    middles = []
    for n in range(1, len(world.turns) + 1):
        middles += itertools.permutations(turns, n)
    endings = [()]
    for pattern in patterns["happy"] + patterns["sad"]:
        endings.append((pattern,))

    texts = set()
    for words in itertools.product(*world.words.values()):
        slots = dict(zip(world.words, words))
        title = ""
        if titled:
            title = f"The {slots['adjective']} {slots['hero']} and the {slots['thing']}\n"
        for opening, wish, middle, ending in itertools.product(
                patterns["opening"], patterns["wish"], middles, endings):
            plan = (opening, wish) + middle + ending
            texts.add(title + " ".join(render(pattern, slots) for pattern in plan))
    return texts


def request_lists(world):
    """What a request is chosen from: patterns, adjectives, heroes, things."""
    words = world.words
    return world.patterns["ask"], words["adjective"], words["hero"], words["thing"]


def all_requests(world):
    """{request: whether it is held out}, by brute force."""
    lists = request_lists(world)
    requests = {}
    for a, b, c, d in itertools.product(*(range(len(choices)) for choices in lists)):
        slots = {"adjective": lists[1][b], "hero": lists[2][c], "thing": lists[3][d], "friend": "-"}
        requests[render(lists[0][a], slots)] = (a + b + c + d) % world.held_out_every == 0
    return requests


def random_slots(rng, world=WORLD):
    slots = {slot: rng.choice(words) for slot, words in world.words.items()}
    return {**slots, "she": world.pronoun(slots["hero"])}


def longest_slots(world=WORLD):
    slots = {"she": "she"}
    for slot, words in world.words.items():
        slots[slot] = max(words, key=lambda word: len(word.split()))
    return slots


# --------------------------------------------------------------------------------------------------
# Probabilities

def test_story_probabilities_sum_to_one():
    """A log-probability that forgets a choice, counts one twice, or forgets that turns aren't
    repeated."""
    texts = all_stories(TINY)
    for request in [None] + sorted(all_requests(TINY))[::3]:
        total = math.fsum(math.exp(log_probability(request, text, TINY)) for text in texts)
        assert total == pytest.approx(1, abs=1e-9)


def test_page_and_document_probabilities_sum_to_one():
    """A page whose length costs nothing, or with a held-out request; a document that forgets which
    of the two it is."""
    requests = all_requests(TINIEST)
    assert len(requests) == 8 and sum(requests.values()) == 2
    pages = set()
    for n in TINIEST.page_lengths:
        for lines in itertools.product(requests, repeat=n):
            pages.add("\n".join(lines))
    total = math.fsum(math.exp(stories.page_log_probability(text, TINIEST)) for text in pages)
    assert total == pytest.approx(1, abs=1e-9)
    for text in pages:
        never = any(requests[line] for line in text.split("\n"))
        for log_p in (stories.page_log_probability, stories.document_log_probability):
            assert (log_p(text, TINIEST) == -math.inf) == never
    total = math.fsum(math.exp(stories.document_log_probability(text, TINIEST))
                      for text in pages | all_stories(TINIEST, titled=True))
    assert total == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("request_", [
    None, "Tell me about an odd bear and a kite.", "Tell me about a shy fox and a kite."])
def test_samples_are_as_frequent_as_their_probability(request_):
    """A sampler and a log-probability that both sum to one, of two different distributions."""
    rng, n = random.Random(5), 12_000
    p = {text: math.exp(log_probability(request_, text, TINIEST)) for text in all_stories(TINIEST)}
    counts = dict.fromkeys(p, 0)
    for _ in range(n):
        counts[stories.story(rng, request_, TINIEST).text] += 1
    assert all(counts[text] == 0 for text in p if p[text] == 0)
    cells = [text for text in p if n * p[text] >= 5]
    assert sum(p[text] for text in cells) > 0.8
    chi2 = sum((counts[text] - n * p[text]) ** 2 / (n * p[text]) for text in cells)
    assert abs(chi2 - len(cells)) < 5 * math.sqrt(2 * len(cells))


@pytest.mark.parametrize("held_out", [False, True])
def test_requests_are_as_frequent_as_their_probability(held_out):
    """A way past the held-out requests that favors their neighbors, or a log-probability of the
    other kind."""
    rng, n = random.Random(6), 12_000
    counts = Counter(stories.request(rng, TINIEST, held_out) for _ in range(n))
    expected = {text for text, kept in all_requests(TINIEST).items() if kept == held_out}
    assert {text for text, _ in counts} == expected
    for (_, logprob), count in counts.items():
        assert logprob == pytest.approx(-math.log(len(counts)))
        assert abs(count - n / len(counts)) < 5 * math.sqrt(n / len(counts))


def test_documents_are_as_frequent_as_their_probability():
    """A page drawn from all requests whose log-probability is of the training requests, or the
    other way round."""
    rng, n = random.Random(7), 12_000
    counts = Counter(stories.document(rng, TINIEST).text for _ in range(n))
    p = {}  # of the pages of one line
    for text in all_requests(TINIEST):
        p[text] = math.exp(stories.document_log_probability(text, TINIEST))
        assert abs(counts[text] - n * p[text]) <= 5 * math.sqrt(n * p[text])
    assert math.fsum(p.values()) == pytest.approx(0.3 / 3)


def test_turns_are_drawn_without_replacement_at_the_stated_odds():
    """Two turns of a sort: the second is one of those left over, not of all; here, then,
    certain."""
    text = ("Once there was a shy fox. She wanted a kite. She helped little Anna. "
            "The fox shared her supper.")
    facts = 0.9 * 0.8                                   # hero and thing are the request's
    plan = 0.3 * 0.4 * 0.4 * 0.15 / 2 / 1 / 2 / 1       # two turns, kind, kind, no ending; patterns
    expected = math.log(facts * plan / 2)               # and one friend of two
    found = log_probability("Tell me about a shy fox and a kite.", text, TINY)
    assert found == pytest.approx(expected)


def test_facts_given_a_request():
    """A hero or thing that isn't the request's must be drawn from all the others, the adjective
    from all."""
    text = "Once there was a shy fox. She wanted a kite. It rained."
    base = log_probability("Tell me about a shy fox and a kite.", text, TINY)
    other_thing = log_probability("Tell me about a shy fox and an umbrella.", text, TINY)
    other_hero = log_probability("Tell me about a shy bear and a kite.", text, TINY)
    other_adjective = log_probability("Tell me about an odd fox and a kite.", text, TINY)
    assert other_thing - base == pytest.approx(math.log(0.2 / 0.8))
    assert other_hero - base == pytest.approx(math.log(0.1 / 2 / 0.9))  # one other, two adjectives
    assert other_adjective == -math.inf


def test_draws_carry_their_exact_log_probability():
    """An answer key that is off: the entropy of the source is the mean of these numbers."""
    rng = random.Random(1)
    for _ in range(400):
        request = stories.request(rng)
        assert request.logprob == pytest.approx(-math.log(12 * 28 * 31 * 36))
        never_seen = stories.request(rng, held_out=True)
        assert never_seen.logprob == pytest.approx(-math.log(12 * 28 * 36))
        for asked in (request.text, never_seen.text, None):
            text, logprob = stories.story(rng, asked)
            assert logprob == pytest.approx(log_probability(asked, text), abs=1e-9)
            assert stories.is_story(text)
        text, logprob = stories.page(rng)
        assert logprob == pytest.approx(stories.page_log_probability(text), abs=1e-9)
        assert 3 <= len(text.split("\n")) <= 6 and not stories.is_story(text)
        text, logprob = stories.document(rng)
        assert logprob == pytest.approx(stories.document_log_probability(text), abs=1e-9)


def test_changed_stories_have_another_probability():
    """A reader that skips over what it doesn't understand: hero, order, repetition, white space."""
    request = "Tell me a story about a shy fox and a kite."
    first = "Once there was a shy fox who lived by the sea."
    wish = "Somebody had taken her kite in the night."
    turn = "She broke a promise to Uncle Tom."
    other = "She called Uncle Tom nasty names."
    end = "But she never found the kite."
    good = log_probability(request, f"{first} {wish} {turn} {other} {end}")
    assert math.isfinite(good)
    assert good == pytest.approx(log_probability(request, f"{first} {wish} {other} {turn} {end}"))
    for bad in (
            "", first, f"{first} {wish}", f"{first} {wish} {end}",         # no turn
            f"{first} {wish} {turn} {turn} {end}",                         # a pattern twice
            f"{first} {wish} {turn} {other.replace('Tom', 'Joe')}",        # no one's name
            f"{first} {wish} {turn} {other.replace('Uncle Tom', 'the postman')}",   # another friend
            f"{first} {wish} {turn} {end.replace('kite', 'drum')}",        # another thing
            f"{first} {wish} {turn.replace('She', 'He')}",                 # another pronoun
            f"{first} {wish.replace('her', 'his')} {turn.replace('She', 'He')}",    # the wrong one
            f"{first} {turn} {wish}", f"{wish} {first} {turn}", f"{first} {wish} {end} {turn}",
            f"{first} {wish}  {turn}", f"{first} {wish} {turn} ",
            f"{first} {wish} {turn} The end."):
        assert log_probability(request, bad) == -math.inf, bad
    changed = f"{first} {wish.replace('kite', 'drum')} {turn} {other} {end.replace('kite', 'drum')}"
    assert log_probability(request, changed) == pytest.approx(good + math.log(0.2 / 35 / 0.8))


def test_a_wrong_request_is_named():
    """A typing error in a prompt that silently becomes a story without a request."""
    with pytest.raises(ValueError, match="Sing a song"):
        stories.story(random.Random(0), "Sing a song.")
    with pytest.raises(ValueError, match="Sing a song"):
        log_probability("Sing a song.", "")
    with pytest.raises(ValueError, match="Sing a song"):
        stories.is_held_out("Sing a song.")


def test_a_seed_fixes_the_text_and_the_global_generator_is_left_alone():
    """Iteration over a set of strings, whose order changes from process to process; random.choice
    by mistake."""
    state = random.getstate()
    rng = random.Random(3)
    other = random.Random(3)
    for _ in range(20):
        assert stories.document(rng) == stories.document(other)
    assert random.getstate() == state


# --------------------------------------------------------------------------------------------------
# Held-out requests

def test_no_draw_is_of_the_other_kind():
    """A training run that sees the very requests it is judged by, alone or on a page."""
    rng = random.Random(8)
    for _ in range(20_000):
        assert not stories.is_held_out(stories.request(rng).text)
        assert stories.is_held_out(stories.request(rng, held_out=True).text)
    for _ in range(5_000):
        assert not any(map(stories.is_held_out, stories.page(rng).text.split("\n")))


def test_held_out_requests_of_the_world():
    """A logprob that is not of the number of requests, and held-out requests that prefer a word to
    the others."""
    asks, adjectives, heroes, things = request_lists(WORLD)
    held_out = []
    for values in itertools.product(range(12), adjectives, heroes, things):
        asked = stories.Request(*values)
        if stories._is_held_out(asked, WORLD):
            held_out.append(asked)
    total = len(held_out)
    assert WORLD.request_counts == {True: total, False: 12 * 28 * 32 * 36 - total}
    for kind, count in WORLD.request_counts.items():
        logprob = stories.request(random.Random(0), held_out=kind).logprob
        assert logprob == pytest.approx(-math.log(count))

    ask_counts = Counter(asked.ask for asked in held_out)
    adjective_counts = Counter(asked.adjective for asked in held_out)
    hero_counts = Counter(asked.hero for asked in held_out)
    thing_counts = Counter(asked.thing for asked in held_out)
    assert {ask_counts[ask] for ask in range(len(asks))} == {total / 12}
    assert {adjective_counts[adjective] for adjective in adjectives} == {total / 28}
    assert {thing_counts[thing] for thing in things} == {total / 36}
    for hero in heroes:
        assert abs(hero_counts[hero] - total / 32) < 0.03 * total / 32


@pytest.mark.parametrize("every", [2, 3, 4, 5, 32])
def test_requests_are_counted_in_any_world(every):
    """A count that is right only where held_out_every divides the number of requests."""
    words = {**TINY.words, "hero": ("fox", "bear", "owl")}
    world = dataclasses.replace(TINY, held_out_every=every, words=words)
    requests = all_requests(world)
    assert world.request_counts == Counter(requests.values())
    assert {text: stories.is_held_out(text, world) for text in requests} == requests


# --------------------------------------------------------------------------------------------------
# Reading

def test_every_filling_of_every_pattern_is_read_back_one_way():
    """Two patterns that can say the same sentence would make every probability too small."""
    rng = random.Random(2)
    for part, patterns in WORLD.patterns.items():
        for index, pattern in enumerate(patterns):
            for _ in range(30):
                slots = random_slots(rng)
                sentence = stories._write(pattern, slots)
                readings = list(stories._readings(sentence, WORLD))
                assert [reading[:2] for reading in readings] == [(part, index)], sentence
                assert readings[0].slots.items() <= slots.items()
                assert split_sentences(sentence + " " + sentence) == [sentence, sentence]
                assert (recognise(sentence) is None) == (part == "ask")


def test_recognise_and_parse_request_by_hand():
    """A slot put under the wrong name, or in its written form ("The old miller") in place of the
    bare one."""
    assert recognise("The fox gave her thick coat to Aunt Lily.") == (
        "kind", 5, {"hero": "fox", "she": "she", "friend": "Aunt Lily"})
    assert recognise("The old miller hugged him, and all was well again.").slots == {
        "friend": "the old miller", "she": "he"}
    assert recognise("Under the oak tree by the sea lived an odd king.").slots == {
        "tree": "oak", "home": "by the sea", "adjective": "odd", "hero": "king"}
    assert parse_request("Do you know a story about an umbrella and an honest cat?") == (
        10, "honest", "cat", "umbrella")
    for bad in ("", "The fox gave his thick coat to Aunt Lily.",
                "The fox gave her thick coat to Aunt Lily",
                "Under the oak tree by the sea lived a odd king.",
                "Tell me a story about a shy fox and a kite."):
        assert recognise(bad) is None, bad
    for bad in ("", "Tell me a story about a odd fox and a kite.",
                "Tell me a story about a shy fox and a kite. ", "She wept."):
        assert parse_request(bad) is None, bad


def test_is_story():
    """A list of more requests, which is what the base model answers, must not count as a story; nor
    half a one."""
    opening = "Once there was a shy fox who lived by the sea."
    turn = "She stopped to comfort a crying child."
    assert stories.is_story(f"{opening} {turn}")
    for text in ("", opening, f"{turn} {opening}", f"{opening} {turn} She sto",
                 f"{opening} Tell me a story.",
                 "Tell me a story about a shy fox and a kite.\n"
                 "Tell me a story about a shy cat and a map."):
        assert not stories.is_story(text), text


def test_split_sentences():
    """A closing quote that stays with the next sentence, or a text without an end that gets
    lost."""
    assert split_sentences('He asked, "Where can the kite be?" He wept. "Go away," the fox') == [
        'He asked, "Where can the kite be?"', "He wept.", '"Go away," the fox']
    assert split_sentences(" \n") == []


# --------------------------------------------------------------------------------------------------
# Language and size

def test_articles():
    """"a honest owl", "a umbrella"."""
    for word in ("honest", "eager", "odd", "umbrella"):
        assert stories.article(word) == "an"
    for word in ("shy", "young", "hedgehog"):
        assert stories.article(word) == "a"
    rng = random.Random(4)
    for _ in range(500):
        text = stories.document(rng).text.lower()
        assert not re.search(r"\ba [aeio]|\ba hon|\ba umb|\ban [^aeiouh]|\ban h(?!on)", text), text


def test_each_pattern_is_one_sentence_with_known_slots():
    """A full stop inside a sentence would split it in two, neither recognised."""
    for patterns in WORLD.patterns.values():
        for pattern in patterns:
            assert re.fullmatch(r"[^.!?]+[.!?]\"?", pattern), pattern
            assert WORLD.slots[pattern] <= WORLD.words.keys() | {"she"}, pattern
            # It begins with a capital, or a capital form, and has none inside.
            assert re.match(r"\"?({?[A-Z])", pattern), pattern
            assert not re.search(r" {[A-Z]", pattern), pattern


def test_heroes_things_and_adjectives_occur_only_as_such():
    """A "bell" in a place's name would earn the reward for the thing without it."""
    asked = {word for slot in ("adjective", "hero", "thing") for word in WORLD.words[slot]}
    assert len(asked) == 28 + 32 + 36
    others = [word for slot, words in WORLD.words.items() for word in words
              if slot not in ("adjective", "hero", "thing")]
    others += [literal for patterns in WORLD.patterns.values() for pattern in patterns
               for literal, _, _, _ in Formatter().parse(pattern)]
    assert not asked & set(re.findall("[a-z]+", " ".join(others).lower()))


def test_size_of_the_world():
    """A world too small to have to be learned, or too large for a small model."""
    texts = ["a an"]
    for patterns in WORLD.patterns.values():
        for pattern in patterns:
            texts += [literal for literal, _, _, _ in Formatter().parse(pattern)]
    for by_gender in stories.PRONOUNS.values():
        texts += by_gender.values()
    for words in WORLD.words.values():
        texts += words
    everything = " ".join(texts)
    assert 500 <= len(set(re.findall("[a-z]+", everything.lower()))) <= 580
    sizes = {part: len(WORLD.patterns[part]) for part in STORY_PARTS}
    assert sum(sizes.values()) >= 100
    turns = sizes["kind"] + sizes["unkind"] + sizes["neutral"]
    # A lower bound: the other slots are not counted.
    assert (28 * 32 * 36 * sizes["opening"] * sizes["wish"] * math.perm(turns, 4)
            * (1 + sizes["happy"] + sizes["sad"])) >= 10 ** 12


def test_the_longest_story_fits():
    """A story cut off by the context has no end to learn. Tokens: 1.1 a word and one per run of
    punctuation."""
    def words(text):
        return len(text.split())

    def tokens(text):
        return 1.1 * words(text) + len(re.findall(r"[.,!?\"]+", text))

    slots = longest_slots()
    for length, limit in ((words, 78), (tokens, 95)):
        lengths = {}  # part -> of its sentences, the longest first
        for part, patterns in WORLD.patterns.items():
            lengths[part] = sorted((length(stories._write(pattern, slots)) for pattern in patterns),
                                   reverse=True)
        turns = sorted(lengths["kind"] + lengths["unkind"] + lengths["neutral"], reverse=True)
        ending = max(lengths["happy"][0], lengths["sad"][0])
        assert lengths["opening"][0] + lengths["wish"][0] + sum(turns[:4]) + ending <= limit
    assert lengths["ask"][0] <= 20


@pytest.mark.parametrize("change", [
    {"turns": (0.25,) * 4, "patterns": {**WORLD.patterns, "kind": WORLD.patterns["kind"][:3]}},
    {"words": {**WORLD.words, "thing": ("kite",)}}, {"held_out_every": 1},
    {"patterns": {**WORLD.patterns, "opening": ("Once upon a time.",)}}])
def test_impossible_worlds_are_refused(change):
    """A world that can't draw four different kind turns would fail once in a thousand stories."""
    with pytest.raises(ValueError):
        dataclasses.replace(WORLD, **change)


# --------------------------------------------------------------------------------------------------
# The curated part


@pytest.mark.parametrize("turn_odds", [TINY.turn_odds, (("unkind", 0.9), ("kind", 0.1))])
def test_conditioning_takes_the_same_constant_from_every_log_probability(turn_odds):
    """A curated world whose entropy is not the entropy of what is drawn: the numbers of turns must
    change too, because long stories have an unkind sentence more often."""
    words = {**TINY.words, "place": ("by the sea",)}
    world = dataclasses.replace(TINY, words=words, turn_odds=turn_odds)
    curated, log_p = stories.curate(world)
    total, kept = 0.0, 0
    for text in all_stories(world, titled=True):
        logprob = stories.document_log_probability(text, world)
        sentences = split_sentences(text.split("\n")[1])
        unkind = any(recognise(sentence, world).part == "unkind" for sentence in sentences)
        expected = -math.inf if unkind else logprob - log_p
        assert stories.document_log_probability(text, curated) == pytest.approx(expected, abs=1e-9)
        total += 0 if unkind else math.exp(logprob)
        kept += not unkind
    assert kept > 100 and math.log(total) == pytest.approx(log_p)


def test_curated_documents_are_the_worlds_without_unkind_ones():
    """Draws from another distribution than the one whose entropy is known; pages that are no
    stories."""
    curated, log_p = stories.curate()
    kind = 0.3 * 0.75 + 0.4 * 0.75 ** 2 + 0.2 * 0.75 ** 3 + 0.1 * 0.75 ** 4
    assert math.exp(log_p) == pytest.approx(0.7 * kind)
    rng, lengths = random.Random(40), Counter()
    for _ in range(2000):
        text, logprob = stories.document(rng, curated)
        parts = [recognise(sentence).part for sentence in split_sentences(text.split("\n")[1])]
        assert "unkind" not in parts
        lengths[sum(part in ("kind", "neutral") for part in parts)] += 1
        assert logprob == pytest.approx(stories.document_log_probability(text) - log_p)
    for k, odds in enumerate((0.3, 0.4, 0.2, 0.1), 1):
        p = 0.7 * odds * 0.75 ** k / math.exp(log_p)
        assert abs(lengths[k] / 2000 - p) < 4 * math.sqrt(p * (1 - p) / 2000)
