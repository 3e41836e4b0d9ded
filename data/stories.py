"""The little world: children's stories, requests for them, and the exact probability of each.

Everything is made from sentence patterns with slots. A request names a hero and a thing:

    Tell me a story about a shy fox and a kite.

A story has an opening, a wish or a trouble, one to four turns (each kind, unkind or neutral), and
most of the time an ending (happy or sad):

    Once there was a shy fox who lived by the river. A strong wind had carried her kite away.
    She sang softly until the old miller felt better. In the end she went home with nothing.

Inside one story a slot keeps its word (one hero, one place, one friend), and no pattern comes
twice. A story honours its request most of the time, not always. No two ways of making a story give
the same text, so its probability is a product that one can write down: that of its hero and thing
given the request, of its plan (which patterns, in which order), and 1/n for each other slot.

One request in 32 is held out (Grammar.held_out_every): no page has it, and request(rng) draws it
only with held_out=True. So what training teaches can be measured on requests that never occurred in
it.

>>> import random
>>> rng = random.Random(0)
>>> asked = request(rng)
>>> asked.text
'Tell me a story about an odd robot and a teapot.'
>>> round(asked.logprob, 2)         # one of 12 * 28 * 32 * 36 * 31/32 requests: -log 374976 nats
-12.83
>>> told = story(rng, asked.text)
>>> told.logprob == log_probability(asked.text, told.text)
True
>>> never_seen = request(rng, held_out=True)
>>> is_held_out(asked.text), is_held_out(never_seen.text)
(False, True)

All sentences were written for this project.
"""

import math
import re
from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from string import Formatter
from typing import NamedTuple

# --------------------------------------------------------------------------------------------------
# The words. The three lists that a request draws from share no word with anything below them.

SHE = ("fox", "owl", "mouse", "hen", "otter", "cat", "squirrel", "turtle",
       "baker", "sailor", "painter", "queen", "dancer", "pilot", "witch", "gardener")
HE = ("bear", "rabbit", "badger", "frog", "goat", "dog", "hedgehog", "beaver",
      "robot", "farmer", "knight", "king", "wizard", "tailor", "cook", "pirate")

PLACES = (
    "by the river", "in the forest", "near the mill", "on the hill", "behind the barn",
    "beside the lake", "by the sea", "in the valley", "near the bridge", "in the orchard",
    "on the island", "in the village", "beside the meadow", "by the harbor", "near the castle",
    "behind the school", "in the park", "near the waterfall", "beside the well",
    "near the station")

WORDS = {
    "adjective": (
        "shy", "brave", "tiny", "tall", "sleepy", "clever", "curious", "gentle", "proud",
        "lonely", "cheerful", "grumpy", "quiet", "young", "silly", "busy", "jolly", "nervous",
        "patient", "careful", "playful", "dreamy", "polite", "honest", "stubborn", "lazy",
        "eager", "odd"),
    "hero": SHE + HE,
    "thing": (
        "kite", "lantern", "drum", "ball", "boat", "hat", "bell", "book", "basket", "ribbon",
        "button", "key", "map", "whistle", "scarf", "umbrella", "mirror", "blanket", "candle",
        "flute", "feather", "shell", "marble", "doll", "wagon", "spoon", "teapot", "clock",
        "coin", "bucket", "broom", "pillow", "crown", "ring", "violin", "sled"),
    "home": PLACES,     # where the hero lives
    "place": PLACES,    # where things happen
    "friend": (
        "Grandma Rosa", "Grandpa Joe", "Aunt Lily", "Uncle Tom", "Cousin Ben", "little Anna",
        "Captain Finn", "Nurse Ivy", "the old miller", "the old shepherd", "the ferryman",
        "the village teacher", "the blacksmith", "the postman", "the little swan",
        "the gray goose", "the little sparrow", "the wise raven", "the white pony",
        "the old donkey"),
    "weather": (
        "sunny", "windy", "rainy", "snowy", "foggy", "frosty", "cloudy", "stormy", "misty", "warm"),
    "time": ("morning", "afternoon", "day", "Monday", "Tuesday", "Friday", "Sunday"),
    "food": (
        "plum cake", "honey bread", "apple pie", "hot soup", "ginger cookies", "roasted nuts",
        "fresh cheese", "sweet pears", "oat porridge", "pumpkin stew", "cherry jam",
        "butter rolls"),
    "color": ("red", "blue", "green", "yellow", "golden", "silver", "purple", "brown"),
    "number": ("two", "three", "four", "five", "six", "seven", "eight", "nine"),
    "tree": ("oak", "willow", "birch", "pine", "chestnut", "maple"),
}

# --------------------------------------------------------------------------------------------------
# The patterns, one sentence each. {a_hero} is "a shy fox", {hero} is "fox", {her} is "her" or
# "his", {him} is "her" or "him"; a slot with a capital letter begins a sentence. Until the ending
# no one gets the thing, so the turns may come in any order.

PATTERNS = {
    "ask": (
        "Tell me a story about {a_hero} and {a_thing}.",
        "Please tell me about {a_hero} and {a_thing}.",
        "Can you tell a story with {a_hero} and {a_thing}?",
        "I would like to hear about {a_hero} with {a_thing}.",
        "Write a short story about {a_hero} and {a_thing}.",
        "What happened when {a_hero} found {a_thing}?",
        "Could I hear the one about {a_hero} and {a_thing}?",
        "Make up a bedtime story with {a_hero} and {a_thing}.",
        "My sister wants a tale of {a_hero} and {a_thing}.",
        "Let us have a story of {a_hero} and {a_thing}.",
        "Do you know a story about {a_thing} and {a_hero}?",
        "Once more, the story with {a_thing} and {a_hero}, please.",
    ),
    "opening": (
        "Once there was {a_hero} who lived {home}.",
        "{A_hero} lived {home} with {her} {number} sisters.",
        "One {weather} {time}, {a_hero} went for a walk.",
        "Long ago {a_hero} built a house {home}.",
        "There once was {a_hero} whom everybody knew.",
        "It was a {weather} {time}, and {a_hero} yawned.",
        "Under the {tree} tree {home} lived {a_hero}.",
        "Listen to what happened to {a_hero} one {weather} {time}.",
        "{Friend} once had a neighbor, {a_hero}.",
        "In a {color} house {home} lived {a_hero}.",
        "Every {time} {a_hero} sat {home} and dreamed.",
        "Not far from here, {a_hero} swept the floor.",
        "Did you know {a_hero} once lived {home}?",
        "{A_hero} was the best friend of {friend}.",
    ),
    "wish": (
        "{She} wanted {a_thing} more than anything in the world.",
        "{She} saw {a_thing} in a window but had no money.",
        "Suddenly {her} {color} {thing} was gone.",
        "{She} had lost {her} {thing} somewhere {place}.",
        "The {hero} had dreamed of {a_thing} for {number} nights.",
        "A strong wind had carried {her} {thing} away.",
        "{Friend} had promised {him} {a_thing} but forgot.",
        "Somebody had taken {her} {thing} in the night.",
        "{Her} {thing} had fallen into a deep hole.",
        "How {she} longed for {a_thing}!",
        "The {hero} needed {a_thing} to cheer up {friend}.",
        "{Friend} said {a_thing} was hidden {place}.",
        "The only {thing} in the land was locked away.",
        "The {hero} could not find {her} {thing} anywhere.",
        "All {she} wished for was {a_thing} of {her} own.",
        "A letter said that {a_thing} was waiting for {him}.",
    ),
    "kind": (
        "The {hero} shared {her} {food} with {friend}.",
        "{She} helped {friend} carry the heavy bags home.",
        "The {hero} helped at once when {friend} fell down.",
        "On the way {she} freed a butterfly from a web.",
        "{She} stopped to comfort a crying child.",
        "The {hero} gave {her} thick coat to {friend}.",
        "{She} picked {number} {color} flowers for {friend}.",
        "{She} sang softly until {friend} felt better.",
        "\"Come and rest,\" the {hero} told {friend}.",
        "{She} carried a lost puppy back to its mother.",
        "The {hero} mended a broken fence for {friend}.",
        "A beetle lay upside down, and {she} turned it over.",
        "{She} forgave {friend} for an ancient quarrel.",
        "The {hero} fed the hungry birds {place}.",
        "{She} gave all {her} {food} to a poor traveler.",
        "\"Thank you for everything,\" {she} told {friend}.",
        "{She} taught {friend} a merry little song.",
        "{She} walked slowly so that {friend} could keep up.",
    ),
    "unkind": (
        "The {hero} laughed at {friend} and walked on.",
        "{She} pushed {friend} into the mud.",
        "\"Go away,\" the {hero} shouted at {friend}.",
        "{She} ate all the {food} and shared nothing.",
        "The {hero} told a mean lie about {friend}.",
        "{She} stole {food} from {friend} and ran off.",
        "{She} kicked over a pail of milk {place}.",
        "The {hero} slammed the door on {friend}.",
        "{She} called {friend} nasty names.",
        "The {hero} threw stones at the ducks {place}.",
        "{She} broke a promise to {friend}.",
        "{She} trampled the tulips {place} and did not care.",
        "{She} blamed {friend} for {her} own mistake.",
        "{Friend} asked for help, but the {hero} refused.",
        "{She} frightened a small boy with an angry shout.",
        "{She} pulled the tail of a sleeping calf.",
    ),
    "neutral": (
        "{She} walked {number} miles along a winding road.",
        "The {hero} ate some {food} under the {tree} tree.",
        "{She} asked {friend} about the {thing}.",
        "{Friend} could not tell {him} where the {thing} was.",
        "The {hero} looked for the {thing} {place}.",
        "{Number} {color} birds flew over {her} head.",
        "A narrow stream crossed the path, and {she} jumped over.",
        "The {weather} day was full of strange sounds.",
        "{She} counted {her} steps up to a hundred and {number}.",
        "Far away, somebody was playing a slow tune.",
        "The {hero} sat down and thought about the {thing}.",
        "A {color} leaf landed on {her} nose.",
        "{She} climbed the {tree} tree to look around.",
        "{She} asked, \"Where can the {thing} be?\"",
        "{Friend} told {him} a long story about {food}.",
        "Beyond the {tree} tree, the road split in two.",
        "The {hero} took a short nap {place}.",
        "{She} drew the {thing} in the sand with a stick.",
    ),
    "happy": (
        "At last {she} found the {thing} and danced for joy.",
        "That night the {hero} fell asleep beside the {thing}, smiling.",
        "Then {friend} brought the {thing}, and everybody cheered.",
        "And {place} lay the {thing}, shining like new.",
        "Soon {she} had the {thing} and hugged it tightly.",
        "{She} skipped home with the {thing} and a new friend.",
        "So the {hero} got the {thing} and lived happily ever after.",
        "Finding the {thing} made it a wonderful {time}!",
        "That evening {she} and {friend} ate {food} together.",
        "{Friend} hugged {him}, and all was well again.",
        "To this day the {hero} keeps the {thing} safe.",
        "Finally {she} held the {thing}, and {her} heart leapt.",
        "The {hero} came home singing, and the stars came out.",
        "Everybody celebrated when the {hero} finally got the {thing}.",
    ),
    "sad": (
        "But {she} never found the {thing}.",
        "That night the {hero} cried {herself} to sleep.",
        "In the end {she} went home with nothing.",
        "Alas, the {thing} sank into the deep, dark water.",
        "{Friend} moved away, and the {hero} was alone.",
        "Still dreaming of the {thing}, {she} wept.",
        "Nobody came to say good night.",
        "It was the saddest {time} of {her} life.",
        "Somebody else had the {thing} now, and would keep it.",
        "The {hero} sighed and gave up hope.",
        "Nobody {place} ever heard {him} laugh again.",
        "All that was left was a cold supper.",
    ),
}

PRONOUNS = {  # slot -> its word for a hero who is a "she", and for one who is a "he"
    "she": {"she": "she", "he": "he"},
    "her": {"she": "her", "he": "his"},
    "him": {"she": "her", "he": "him"},
    "herself": {"she": "herself", "he": "himself"},
}


# --------------------------------------------------------------------------------------------------
# The forms of the slots

def article(word):
    """"a" or "an", by the sound of the word."""
    return "an" if word[0] in "aeiou" or word == "honest" else "a"


def _capital(text):
    return text[0].upper() + text[1:]


def _small(form):
    return form[0].lower() + form[1:]


def _slots(form):
    """The slots that a form shows: a_hero -> adjective, hero; Her -> she; Friend -> friend."""
    form = _small(form)
    if form == "a_hero":
        return ("adjective", "hero")
    if form == "a_thing":
        return ("thing",)
    if form in PRONOUNS:
        return ("she",)
    return (form,)


def _forms(pattern):
    """The forms of slots in a pattern, in order: "{She} saw {a_thing}." has She and a_thing."""
    return [form for _, form, _, _ in Formatter().parse(pattern) if form]


# --------------------------------------------------------------------------------------------------
# The grammar

@dataclass(frozen=True, eq=False)
class Grammar:
    """A world: words, patterns, odds. For a smaller one: dataclasses.replace(WORLD, words=...)."""
    words: dict                     # slot -> tuple of its words
    patterns: dict                  # part -> tuple of sentence patterns
    she: tuple = SHE                # the heroes that are a "she"; all others are a "he"

    turns: tuple = (0.3, 0.4, 0.2, 0.1)     # P(one turn), P(two turns), ...
    turn_odds: tuple = (("kind", 0.4), ("unkind", 0.25), ("neutral", 0.35))
    ending_odds: tuple = (("happy", 0.55), ("sad", 0.30), (None, 0.15))  # None: it just stops

    hero_kept: float = 0.9          # P(hero and adjective are the request's); else: another hero
    thing_kept: float = 0.8         # P(the thing is the request's); else: another thing

    title: str = "The {adjective} {hero} and the {thing}"    # the line above a story in a book
    page_lengths: tuple = (3, 4, 5, 6)      # requests on a page, equally likely
    page_share: float = 0.3         # P(a pretraining document is a page); else: a story
    held_out_every: int = 32        # held out: requests whose four indices' sum is divisible by it

    def __post_init__(self):
        if self.held_out_every < 2:
            raise ValueError("held_out_every must be at least 2: 1 leaves no request to train on")
        if len(self.words["hero"]) < 2 or len(self.words["thing"]) < 2:
            raise ValueError("a world needs two heroes and two things: a story need not keep the "
                             "request's")
        for part, _ in self.turn_odds:
            if len(self.patterns[part]) < len(self.turns):
                raise ValueError(f"{len(self.turns)} turns without repetition need as many "
                                 f"{part!r} patterns")
        needed = {"ask": "adjective hero thing", "opening": "adjective hero", "wish": "thing"}
        for part, slots in needed.items():
            for pattern in self.patterns[part]:
                if not self.slots[pattern].issuperset(slots.split()):
                    raise ValueError(f"the {part} pattern {pattern!r} does not name its {slots}")

    @cached_property
    def slots(self):
        """Pattern -> the set of its slots in any form: "{She} saw {a_thing}." has she and thing."""
        slots = {}
        for patterns in self.patterns.values():
            for pattern in patterns:
                slots[pattern] = set()
                for form in _forms(pattern):
                    slots[pattern].update(_slots(form))
        return slots

    @cached_property
    def readers(self):
        """First word (None: it varies) -> [(part, index, regular expression)] of the patterns."""
        readers = {}
        for part, patterns in self.patterns.items():
            for index, pattern in enumerate(patterns):
                reader = (part, index, re.compile(_regex(pattern, self.words)))
                first = pattern.split()[0]
                if first == "{She}":
                    keys = ["She", "He"]
                elif "{" in first:
                    keys = [None]
                else:
                    keys = [first]
                for key in keys:
                    readers.setdefault(key, []).append(reader)
        return readers

    @cached_property
    def request_counts(self):
        """{held out or not: number of requests}; neither is 0."""
        words = self.words
        sums = Counter([0])  # sum of the indices so far, mod held_out_every -> ways to get it
        for choices in (self.patterns["ask"], words["adjective"], words["hero"], words["thing"]):
            longer = Counter()
            for total, ways in sums.items():
                for index in range(len(choices)):
                    longer[(total + index) % self.held_out_every] += ways
            sums = longer
        return {False: sums.total() - sums[0], True: sums[0]}

    def pronoun(self, hero):
        """"she" or "he"."""
        return "she" if hero in self.she else "he"


WORLD = Grammar(words=WORDS, patterns=PATTERNS)


class Draw(NamedTuple):
    """A text, and the natural logarithm of the probability of drawing exactly this text."""
    text: str
    logprob: float


class Request(NamedTuple):
    """What a request asks for; `ask` is the index of its pattern."""
    ask: int
    adjective: str
    hero: str
    thing: str


class Sentence(NamedTuple):
    """A sentence understood: its part of the story, the index of its pattern there, its slots."""
    part: str
    pattern: int
    slots: dict


def curate(world=WORLD, unwanted="unkind"):
    """The world's documents, given that each is a story without a turn of the unwanted part.

    For mid-training. Returns (its Grammar, log P(condition) in nats). With u the odds of the part,

        P(condition) = (1 - page_share) Σ_k turns_k (1 - u)^k

    By Bayes' rule P(k turns | condition) ~ turns_k (1 - u)^k, and each turn is of another part with
    its odds / (1 - u). So the result is again a world, and the log-probability of each of its
    documents is the old one minus the same constant, log P(condition).
    """
    odds = dict(world.turn_odds)
    rest = 1 - odds.pop(unwanted)
    turns = [p * rest ** k for k, p in enumerate(world.turns, 1)]
    curated = replace(world,
                      turns=tuple(p / sum(turns) for p in turns),
                      turn_odds=tuple((part, p / rest) for part, p in odds.items()),
                      page_share=0.0)
    return curated, math.log((1 - world.page_share) * sum(turns))


# --------------------------------------------------------------------------------------------------
# Writing and reading one sentence

def _write(pattern, slots):
    """The pattern filled in: "{She} saw {a_thing}." with he and kite gives "He saw a kite."."""
    forms = dict(slots)
    if "she" in slots:
        for form, by_gender in PRONOUNS.items():
            forms[form] = by_gender[slots["she"]]
    if "adjective" in slots:
        forms["a_hero"] = f"{article(slots['adjective'])} {slots['adjective']} {slots['hero']}"
    if "thing" in slots:
        forms["a_thing"] = f"{article(slots['thing'])} {slots['thing']}"
    for form, text in list(forms.items()):
        forms[_capital(form)] = _capital(text)
    return pattern.format_map(forms)


def _regex(pattern, words):
    """A regular expression for the pattern, with a named group for each form in it."""
    regex = ""
    for literal, form, _, _ in Formatter().parse(pattern):
        regex += re.escape(literal)
        if not form:
            continue
        if f"(?P<{form}>" in regex:
            regex += f"(?P={form})"  # the same word again
        elif _small(form) in ("a_hero", "a_thing"):
            regex += "[Aa]n? " + " ".join(_group(slot, words) for slot in _slots(form))
        else:
            regex += _group(form, words)
    return regex


def _group(form, words):
    """A named group that matches each word of a slot in this form."""
    small = _small(form)
    if small in PRONOUNS:
        texts = PRONOUNS[small].values()
    else:
        texts = words[small]
    if form != small:
        texts = [_capital(text) for text in texts]
    return f"(?P<{form}>{'|'.join(map(re.escape, texts))})"


def _readings(sentence, world):
    """Yield every way, as a Sentence, in which the world can say the sentence: at most one."""
    first = sentence.split(" ", 1)[0]
    for part, index, regex in world.readers.get(first, []) + world.readers.get(None, []):
        match = regex.fullmatch(sentence)
        if not match:
            continue
        slots = {}
        for form, text in match.groupdict().items():
            small = _small(form)
            if small in PRONOUNS:
                for she, word in PRONOUNS[small].items():
                    if word == text.lower():
                        slots["she"] = she
                        break
            elif form == small:
                slots[form] = text
            else:
                for word in world.words[small]:
                    if _capital(word) == text:
                        slots[small] = word
                        break
        if "she" in slots and "hero" in slots:
            slots["she"] = world.pronoun(slots["hero"])
        if _write(world.patterns[part][index], slots) == sentence:     # a/an and the pronouns agree
            yield Sentence(part, index, slots)


# --------------------------------------------------------------------------------------------------
# Reading texts

def split_sentences(text):
    """The sentences of a text: split at white space after . ! or ?, or a quote after them."""
    sentences = re.split(r"(?<=[.!?])\s+|(?<=[.!?]\")\s+", text.strip())
    return [sentence for sentence in sentences if sentence]


def recognise(sentence, world=WORLD):
    """Understand one sentence of a story.

    Returns a Sentence(part, pattern, slots), part one of "opening", "wish", "kind", "unkind",
    "neutral", "happy", "sad"; or None if no story of the world can say it. `slots` has the bare
    words, and under "she" the pronoun: "The fox gave her thick coat to Aunt Lily." is
    Sentence("kind", 5, {"hero": "fox", "she": "she", "friend": "Aunt Lily"}).
    """
    for reading in _readings(sentence, world):
        if reading.part != "ask":
            return reading
    return None


def is_story(text, world=WORLD):
    """Whether a text is a story in form: two sentences or more, all the world's, an opening first.

    Whether hero and thing stay the same is not checked here; log_probability does that.
    """
    sentences = [recognise(sentence, world) for sentence in split_sentences(text)]
    return len(sentences) >= 2 and None not in sentences and sentences[0].part == "opening"


def parse_request(text, world=WORLD):
    """The text as a Request(ask, adjective, hero, thing); None if it is not one of the world's."""
    for part, ask, slots in _readings(text, world):
        if part == "ask":
            return Request(ask, slots["adjective"], slots["hero"], slots["thing"])
    return None


def _parse_asked(request, world):
    """The parsed request; None for None; ValueError for anything else."""
    if request is None:
        return None
    asked = parse_request(request, world)
    if asked is None:
        raise ValueError(f"not a request of this world: {request!r}")
    return asked


def is_held_out(text, world=WORLD):
    """Whether a request's text is kept from training; ValueError if it is not a request."""
    return _is_held_out(_parse_asked(text, world), world)


def _is_held_out(asked, world):
    """Whether the Request is held out.

    The sum of its indices decides. In WORLD exactly one of the 32 heroes is then held out for every
    choice of the rest, so each ask, adjective and thing is exactly as frequent among the held-out
    requests as among all, and each hero within 3 %.
    """
    words = world.words
    total = asked.ask
    total += words["adjective"].index(asked.adjective)
    total += words["hero"].index(asked.hero)
    total += words["thing"].index(asked.thing)
    return total % world.held_out_every == 0


# --------------------------------------------------------------------------------------------------
# Probabilities, in nats

def _log(p):
    return math.log(p) if p > 0 else -math.inf


def _log_p_facts(asked, slots, world):
    """log P(adjective, hero and thing of the story | what was asked)."""
    adjectives = len(world.words["adjective"])
    heroes = len(world.words["hero"])
    things = len(world.words["thing"])
    if asked is None:
        return -math.log(adjectives * heroes * things)

    if slots["hero"] != asked.hero:
        p_hero = (1 - world.hero_kept) / ((heroes - 1) * adjectives)
    elif slots["adjective"] == asked.adjective:
        p_hero = world.hero_kept
    else:
        p_hero = 0
    if slots["thing"] == asked.thing:
        p_thing = world.thing_kept
    else:
        p_thing = (1 - world.thing_kept) / (things - 1)
    return _log(p_hero) + _log(p_thing)


def _log_p_plan(plan, world):
    """log P(plan): plan is [(part, index of the pattern)], a sentence each; -inf if impossible."""
    parts = [part for part, _ in plan]
    ending = None
    if parts and parts[-1] in ("happy", "sad"):
        ending = parts[-1]
    turns = parts[2:]
    if ending:
        turns = parts[2:-1]
    turn_odds = dict(world.turn_odds)

    if parts[:2] != ["opening", "wish"] or not 1 <= len(turns) <= len(world.turns):
        return -math.inf
    if not set(turns) <= turn_odds.keys():
        return -math.inf
    if len(set(plan)) < len(plan):  # a pattern twice
        return -math.inf

    logprob = _log(world.turns[len(turns) - 1]) + _log(dict(world.ending_odds).get(ending, 0))
    logprob += sum(_log(turn_odds[part]) for part in turns)
    used = Counter()
    for part in parts:      # each pattern is uniform among those of its part that are still unused
        logprob -= math.log(len(world.patterns[part]) - used[part])
        used[part] += 1
    return logprob


def _log_p_story(asked, plan, slots, world):
    """log P(story | what was asked); `slots` has only those that the plan's sentences show."""
    other = slots.keys() - {"adjective", "hero", "thing", "she"}
    log_p_other = -sum(math.log(len(world.words[slot])) for slot in sorted(other))
    return _log_p_facts(asked, slots, world) + _log_p_plan(plan, world) + log_p_other


def log_probability(request, text, world=WORLD):
    """log P(text | request) in nats: the probability that story(rng, request) is exactly this text.

    request: its text, or None for a story without a request. Returns -inf for a text that the world
    cannot produce; raises ValueError if the request is not one.
    """
    asked = _parse_asked(request, world)
    sentences = split_sentences(text)
    found = [recognise(sentence, world) for sentence in sentences]
    if " ".join(sentences) != text or None in found:
        return -math.inf

    plan = []
    slots = {}
    for sentence in found:
        plan.append((sentence.part, sentence.pattern))
        for slot, word in sentence.slots.items():
            if slots.setdefault(slot, word) != word:  # another word than in the sentences before
                return -math.inf
    if _log_p_plan(plan, world) == -math.inf:
        return -math.inf
    if slots.get("she") not in (None, world.pronoun(slots["hero"])):
        return -math.inf
    return _log_p_story(asked, plan, slots, world)


def page_log_probability(text, world=WORLD):
    """log P(text) in nats under page(rng); -inf for a text that is not a page.

    No page has a held-out request.
    """
    requests = [parse_request(line, world) for line in text.split("\n")]
    if len(requests) not in world.page_lengths:
        return -math.inf
    for asked in requests:
        if asked is None or _is_held_out(asked, world):
            return -math.inf
    log_p_request = -math.log(world.request_counts[False])
    return -math.log(len(world.page_lengths)) + len(requests) * log_p_request


def document_log_probability(text, world=WORLD):
    """log P(text) in nats under document(rng); no text is both a story and a page."""
    title, _, told = text.partition("\n")
    log_p_story = log_probability(None, told, world)
    if log_p_story > -math.inf:
        slots = {}
        for sentence in split_sentences(told)[:2]:
            slots.update(recognise(sentence, world).slots)
        if title != _write(world.title, slots):
            log_p_story = -math.inf
    log_p_page = page_log_probability(text, world)
    return max(_log(1 - world.page_share) + log_p_story, _log(world.page_share) + log_p_page)


# --------------------------------------------------------------------------------------------------
# Drawing

def _draw_facts(rng, asked, world):
    """Adjective, hero and thing of a story, given the Request or None."""
    words = world.words
    slots = {slot: rng.choice(words[slot]) for slot in ("adjective", "hero", "thing")}
    if asked is None:
        return slots
    if rng.random() < world.hero_kept:
        slots["adjective"] = asked.adjective
        slots["hero"] = asked.hero
    else:
        slots["hero"] = rng.choice([hero for hero in words["hero"] if hero != asked.hero])
    if rng.random() < world.thing_kept:
        slots["thing"] = asked.thing
    else:
        slots["thing"] = rng.choice([thing for thing in words["thing"] if thing != asked.thing])
    return slots


def _pick(rng, odds):
    """One of odds' names, ((name, probability), ...)."""
    names = [name for name, _ in odds]
    probabilities = [p for _, p in odds]
    return rng.choices(names, probabilities)[0]


def _draw_plan(rng, world):
    """Which pattern each sentence has: [(part, index)]."""
    turns = _pick(rng, tuple(enumerate(world.turns, 1)))
    ending = _pick(rng, world.ending_odds)
    parts = ["opening", "wish"]
    for _ in range(turns):
        parts.append(_pick(rng, world.turn_odds))
    if ending is not None:
        parts.append(ending)

    unused = {part: list(range(len(world.patterns[part]))) for part in parts}
    plan = []
    for part in parts:
        index = unused[part].pop(rng.randrange(len(unused[part])))
        plan.append((part, index))
    return plan


def request(rng, world=WORLD, held_out=False):
    """Draw a training request, or one that is held out; all of its kind are equally likely.

    rng: a random.Random. Returns a Draw(text, logprob), logprob = -log(number of requests of that
    kind) in nats.
    """
    asks = world.patterns["ask"]
    words = world.words
    while True:
        slots = {slot: rng.choice(words[slot]) for slot in ("adjective", "hero", "thing")}
        asked = Request(rng.randrange(len(asks)), **slots)
        if _is_held_out(asked, world) == held_out:
            text = _write(asks[asked.ask], slots)
            return Draw(text, -math.log(world.request_counts[held_out]))


def story(rng, request, world=WORLD):
    """Draw a story in answer to a request's text, held out or not; None: a story without a request.

    Returns a Draw(text, logprob), logprob = log P(text | request) in nats, the same number as
    log_probability(request, text). Raises ValueError if the request is not one of this world.
    """
    draw, _ = _draw_story(rng, _parse_asked(request, world), world)
    return draw


def _draw_story(rng, asked, world):
    """(Draw, its slots): a story, given the Request or None."""
    slots = _draw_facts(rng, asked, world)
    plan = _draw_plan(rng, world)
    patterns = [world.patterns[part][index] for part, index in plan]
    slots["she"] = world.pronoun(slots["hero"])
    for pattern in patterns:
        for slot in sorted(world.slots[pattern] - slots.keys()):
            slots[slot] = rng.choice(world.words[slot])
    text = " ".join(_write(pattern, slots) for pattern in patterns)
    return Draw(text, _log_p_story(asked, plan, slots, world)), slots


def page(rng, world=WORLD):
    """Draw a page of an exercise book, 3 to 6 training requests, one a line.

    Returns a Draw(text, logprob in nats).
    """
    lines = [request(rng, world) for _ in range(rng.choice(world.page_lengths))]
    text = "\n".join(line.text for line in lines)
    logprob = sum(line.logprob for line in lines) - math.log(len(world.page_lengths))
    return Draw(text, logprob)


def document(rng, world=WORLD):
    """Draw a pretraining document, a story under its title or a page.

    Returns a Draw(text, logprob in nats). The title names adjective, hero and thing, which the
    story has anyway, so it adds nothing to the log-probability.
    """
    if rng.random() < world.page_share:
        text, logprob = page(rng, world)
        return Draw(text, logprob + _log(world.page_share))
    (text, logprob), slots = _draw_story(rng, None, world)
    title = _write(world.title, slots)
    return Draw(f"{title}\n{text}", logprob + _log(1 - world.page_share))
