"""The little world: children's stories, requests for them, and the exact probability of each.

Everything is made from sentence patterns with slots. A request names a hero and a thing:

    Tell me a story about a shy fox and a kite.

A story has an opening, a wish or a trouble, one to four turns (each kind, unkind or neutral), and
most of the time an ending (happy or sad):

    Once there was a shy fox who lived by the river. A strong wind had carried her kite away.
    She sang softly until the old miller felt better. In the end she went home with nothing.

Inside one story a slot keeps what stands in it (one hero, one place, one friend), and no pattern
comes twice. A story honours its request most of the time, not always. No two ways of making a story
give the same text, so its probability is a product that one can write down: that of its hero and
thing given the request, of its plan (which patterns, in which order), and 1/n for each other slot.

One request in 32 is held out (Grammar.held_out_every): no page has it, and request(rng) draws it only with
held_out=True, so that what training teaches can be measured on requests that cannot have occurred in it.

>>> import random
>>> rng = random.Random(0)
>>> asked = request(rng)
>>> asked.text, round(asked.logprob, 2)         # one of 12 * 28 * 32 * 36 * 31/32 requests: -log 374976 nats
('Tell me a story about an odd robot and a teapot.', -12.83)
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

# ---------------------------------------------------------------------------------------------
# The words. The three lists that a request draws from share no word with anything below them.

SHE = ("fox", "owl", "mouse", "hen", "otter", "cat", "squirrel", "turtle",
       "baker", "sailor", "painter", "queen", "dancer", "pilot", "witch", "gardener")
HE = ("bear", "rabbit", "badger", "frog", "goat", "dog", "hedgehog", "beaver",
      "robot", "farmer", "knight", "king", "wizard", "tailor", "cook", "pirate")

PLACES = (
    "by the river", "in the forest", "near the mill", "on the hill", "behind the barn", "beside the lake",
    "by the sea", "in the valley", "near the bridge", "in the orchard", "on the island", "in the village",
    "beside the meadow", "by the harbor", "near the castle", "behind the school", "in the park",
    "near the waterfall", "beside the well", "near the station")

WORDS = {
    "adjective": (
        "shy", "brave", "tiny", "tall", "sleepy", "clever", "curious", "gentle", "proud", "lonely",
        "cheerful", "grumpy", "quiet", "young", "silly", "busy", "jolly", "nervous", "patient", "careful",
        "playful", "dreamy", "polite", "honest", "stubborn", "lazy", "eager", "odd"),
    "hero": SHE + HE,
    "thing": (
        "kite", "lantern", "drum", "ball", "boat", "hat", "bell", "book", "basket", "ribbon", "button", "key",
        "map", "whistle", "scarf", "umbrella", "mirror", "blanket", "candle", "flute", "feather", "shell",
        "marble", "doll", "wagon", "spoon", "teapot", "clock", "coin", "bucket", "broom", "pillow", "crown",
        "ring", "violin", "sled"),
    "home": PLACES,     # where the hero lives
    "place": PLACES,    # where things happen
    "friend": (
        "Grandma Rosa", "Grandpa Joe", "Aunt Lily", "Uncle Tom", "Cousin Ben", "little Anna", "Captain Finn",
        "Nurse Ivy", "the old miller", "the old shepherd", "the ferryman", "the village teacher",
        "the blacksmith", "the postman", "the little swan", "the gray goose", "the little sparrow",
        "the wise raven", "the white pony", "the old donkey"),
    "weather": ("sunny", "windy", "rainy", "snowy", "foggy", "frosty", "cloudy", "stormy", "misty", "warm"),
    "time": ("morning", "afternoon", "day", "Monday", "Tuesday", "Friday", "Sunday"),
    "food": (
        "plum cake", "honey bread", "apple pie", "hot soup", "ginger cookies", "roasted nuts", "fresh cheese",
        "sweet pears", "oat porridge", "pumpkin stew", "cherry jam", "butter rolls"),
    "color": ("red", "blue", "green", "yellow", "golden", "silver", "purple", "brown"),
    "number": ("two", "three", "four", "five", "six", "seven", "eight", "nine"),
    "tree": ("oak", "willow", "birch", "pine", "chestnut", "maple"),
}

# ---------------------------------------------------------------------------------------------
# The patterns, one sentence each. {a_hero} is "a shy fox", {hero} is "fox", {her} is "her" or "his",
# {him} is "her" or "him"; a slot with a capital letter begins a sentence. Until the ending nobody
# comes by the thing, so the turns may stand in any order.

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

PRONOUNS = {  # slot -> what stands in it for a hero who is a "she", and for one who is a "he"
    "she": {"she": "she", "he": "he"},
    "her": {"she": "her", "he": "his"},
    "him": {"she": "her", "he": "him"},
    "herself": {"she": "herself", "he": "himself"},
}


# ---------------------------------------------------------------------------------------------
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
    return {"a_hero": ("adjective", "hero"), "a_thing": ("thing",)}.get(form, ("she" if form in PRONOUNS else form,))


# ---------------------------------------------------------------------------------------------
# The grammar

@dataclass(frozen=True, eq=False)
class Grammar:
    """A world: its words, its patterns, its odds. For a smaller one: dataclasses.replace(WORLD, words=...)."""
    words: dict                                 # slot -> tuple of what may stand in it
    patterns: dict                              # part -> tuple of sentence patterns
    she: tuple = SHE                            # the heroes that are a "she"; all others are a "he"
    turns: tuple = (0.3, 0.4, 0.2, 0.1)         # P(one turn), P(two turns), ...
    turn_odds: tuple = (("kind", 0.4), ("unkind", 0.25), ("neutral", 0.35))
    ending_odds: tuple = (("happy", 0.55), ("sad", 0.30), (None, 0.15))     # None: the story just stops
    hero_kept: float = 0.9                      # P(hero and adjective are the request's); else: another hero
    thing_kept: float = 0.8                     # P(the thing is the request's); else: another thing
    title: str = "The {adjective} {hero} and the {thing}"    # the line above a story in a book
    page_lengths: tuple = (3, 4, 5, 6)          # requests on a page of the exercise book, equally likely
    page_share: float = 0.3                     # P(a pretraining document is a page); else: a story
    held_out_every: int = 32                    # a request is held out if this divides the sum of its four indices

    def __post_init__(self):
        if self.held_out_every < 2:
            raise ValueError("held_out_every must be at least 2: 1 leaves no request to train on")
        if min(len(self.words["hero"]), len(self.words["thing"])) < 2:
            raise ValueError("a world needs two heroes and two things: a story need not keep the request's")
        for part, _ in self.turn_odds:
            if len(self.patterns[part]) < len(self.turns):
                raise ValueError(f"{len(self.turns)} turns without repetition need as many {part!r} patterns")
        for part, named in (("ask", "adjective hero thing"), ("opening", "adjective hero"), ("wish", "thing")):
            for pattern in self.patterns[part]:
                if not self.slots[pattern].issuperset(named.split()):
                    raise ValueError(f"the {part} pattern {pattern!r} does not name its {named}")

    @cached_property
    def slots(self):
        """Pattern -> the set of its slots, whatever their form: "{She} saw {a_thing}." has she and thing."""
        return {pattern: {slot for _, form, _, _ in Formatter().parse(pattern) if form for slot in _slots(form)}
                for patterns in self.patterns.values() for pattern in patterns}

    @cached_property
    def readers(self):
        """First word -> [(part, index, regular expression)]; under None those whose first word varies."""
        readers = {}
        for part, patterns in self.patterns.items():
            for index, pattern in enumerate(patterns):
                first = pattern.split()[0]
                for key in ("She", "He") if first == "{She}" else (None if "{" in first else first,):
                    readers.setdefault(key, []).append((part, index, re.compile(_regex(pattern, self.words))))
        return readers

    @cached_property
    def request_counts(self):
        """{held out or not: number of requests}; neither is 0."""
        sums = Counter([0])     # sum of the indices so far, modulo held_out_every -> number of ways to get it
        for choices in (self.patterns["ask"], *(self.words[slot] for slot in ("adjective", "hero", "thing"))):
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
    """A text, and the natural logarithm of the probability that just this text was drawn."""
    text: str
    logprob: float


class Request(NamedTuple):
    """What a request asks for; `ask` is the index of its pattern."""
    ask: int
    adjective: str
    hero: str
    thing: str


class Sentence(NamedTuple):
    """A sentence understood: its part of the story, the index of its pattern there, what stood in its slots."""
    part: str
    pattern: int
    slots: dict


def curate(world=WORLD, unwanted="unkind"):
    """The world's documents on the condition that each is a story without a turn of the unwanted part, for mid-training.

    Returns (its Grammar, log P(condition) in nats). With u the odds of the part, P(condition) = (1 - page_share) Σ_k
    turns_k (1 - u)^k. By Bayes' rule P(k turns | condition) ~ turns_k (1 - u)^k, and each turn is of another part with its
    odds / (1 - u). So what is left is again a world, and of every document the log-probability is the old one less the
    same constant, log P(condition).
    """
    odds = dict(world.turn_odds)
    rest = 1 - odds.pop(unwanted)
    turns = [p * rest ** k for k, p in enumerate(world.turns, 1)]
    curated = replace(world, turns=tuple(p / sum(turns) for p in turns), page_share=0.0,
                      turn_odds=tuple((part, p / rest) for part, p in odds.items()))
    return curated, math.log((1 - world.page_share) * sum(turns))


# ---------------------------------------------------------------------------------------------
# Writing and reading one sentence

def _write(pattern, slots):
    """The pattern filled in: "{She} saw {a_thing}." with she="he", thing="kite" gives "He saw a kite."."""
    forms = dict(slots)
    if "she" in slots:
        forms.update([(form, by_gender[slots["she"]]) for form, by_gender in PRONOUNS.items()])
    if "adjective" in slots:
        forms["a_hero"] = f"{article(slots['adjective'])} {slots['adjective']} {slots['hero']}"
    if "thing" in slots:
        forms["a_thing"] = f"{article(slots['thing'])} {slots['thing']}"
    forms.update([(_capital(form), _capital(text)) for form, text in forms.items()])
    return pattern.format_map(forms)


def _regex(pattern, words):
    """A regular expression for the pattern, with a named group for each form that stands in it."""
    def group(form):
        small = _small(form)
        if small in ("a_hero", "a_thing"):
            return "[Aa]n? " + " ".join(map(group, _slots(small)))
        texts = list(PRONOUNS[small].values() if small in PRONOUNS else words[small])
        texts = texts if form == small else [_capital(text) for text in texts]
        return f"(?P<{form}>{'|'.join(map(re.escape, texts))})"

    regex = ""
    for literal, form, _, _ in Formatter().parse(pattern):
        regex += re.escape(literal)
        if form:
            regex += f"(?P={form})" if f"(?P<{form}>" in regex else group(form)
    return regex


def _readings(sentence, world):
    """Yields every way, as a Sentence, in which the world's patterns can say the sentence: at most one."""
    first = sentence.split(" ", 1)[0]
    for part, index, regex in world.readers.get(first, []) + world.readers.get(None, []):
        match = regex.fullmatch(sentence)
        if not match:
            continue
        slots = {}
        for form, text in match.groupdict().items():
            small = _small(form)
            if small in PRONOUNS:
                slots["she"] = next(she for she, word in PRONOUNS[small].items() if word == text.lower())
            elif form == small:
                slots[form] = text
            else:
                slots[small] = next(word for word in world.words[small] if _capital(word) == text)
        if "she" in slots and "hero" in slots:
            slots["she"] = world.pronoun(slots["hero"])
        if _write(world.patterns[part][index], slots) == sentence:     # a/an and the pronouns agree
            yield Sentence(part, index, slots)


# ---------------------------------------------------------------------------------------------
# Reading texts

def split_sentences(text):
    """The sentences of a text: split at white space after . ! or ?, or after a closing quote behind one."""
    return [sentence for sentence in re.split(r"(?<=[.!?])\s+|(?<=[.!?]\")\s+", text.strip()) if sentence]


def recognise(sentence, world=WORLD):
    """Understands one sentence of a story.

    Returns a Sentence(part, pattern, slots), part one of "opening", "wish", "kind", "unkind", "neutral",
    "happy", "sad"; or None if no story of the world can say it. `slots` has the bare words, and under
    "she" the pronoun: "The fox gave her thick coat to Aunt Lily." is
    Sentence("kind", 5, {"hero": "fox", "she": "she", "friend": "Aunt Lily"}).
    """
    return next((reading for reading in _readings(sentence, world) if reading.part != "ask"), None)


def is_story(text, world=WORLD):
    """Whether the text is a story in form: two sentences or more, all the world's, the first an opening.

    Whether hero and thing stay the same is not looked at; log_probability does that.
    """
    sentences = [recognise(sentence, world) for sentence in split_sentences(text)]
    return len(sentences) >= 2 and None not in sentences and sentences[0].part == "opening"


def parse_request(text, world=WORLD):
    """The Request(ask, adjective, hero, thing) that the text is, or None if it is not one of the world's."""
    for part, ask, slots in _readings(text, world):
        if part == "ask":
            return Request(ask, slots["adjective"], slots["hero"], slots["thing"])
    return None


def _parse_asked(request, world):
    """The parsed request; None for None; ValueError for what is not a request."""
    asked = None if request is None else parse_request(request, world)
    if request is not None and asked is None:
        raise ValueError(f"not a request of this world: {request!r}")
    return asked


def is_held_out(text, world=WORLD):
    """Whether the request (its text) is one of those kept from training; raises ValueError if it is not a request."""
    return _is_held_out(_parse_asked(text, world), world)


def _is_held_out(asked, world):
    """Whether the Request is held out.

    The sum of its indices decides. In WORLD just one of the 32 heroes is then held out whatever else is asked, so each
    ask, adjective and thing is exactly as frequent among the held-out requests as among all; each hero within 3 %.
    """
    words = world.words
    return (asked.ask + words["adjective"].index(asked.adjective) + words["hero"].index(asked.hero)
            + words["thing"].index(asked.thing)) % world.held_out_every == 0


# ---------------------------------------------------------------------------------------------
# Probabilities, in nats

def _log(p):
    return math.log(p) if p > 0 else -math.inf


def _log_p_facts(asked, slots, world):
    """log P(adjective, hero and thing of the story | what was asked)."""
    adjectives, heroes, things = (len(world.words[slot]) for slot in ("adjective", "hero", "thing"))
    if asked is None:
        return -math.log(adjectives * heroes * things)
    if slots["hero"] != asked.hero:
        p = (1 - world.hero_kept) / ((heroes - 1) * adjectives)
    else:
        p = world.hero_kept if slots["adjective"] == asked.adjective else 0
    if slots["thing"] != asked.thing:
        return _log(p) + _log((1 - world.thing_kept) / (things - 1))
    return _log(p) + _log(world.thing_kept)


def _log_p_plan(plan, world):
    """log P(plan): plan is [(part, index of the pattern)], sentence by sentence; -inf for an impossible order."""
    parts = [part for part, _ in plan]
    ending = parts[-1] if parts and parts[-1] in ("happy", "sad") else None
    turns = parts[2:-1] if ending else parts[2:]
    turn_odds = dict(world.turn_odds)
    if (parts[:2] != ["opening", "wish"] or not 1 <= len(turns) <= len(world.turns)
            or not turn_odds.keys() >= set(turns) or len(set(plan)) < len(plan)):
        return -math.inf
    logprob = _log(world.turns[len(turns) - 1]) + _log(dict(world.ending_odds).get(ending, 0))
    logprob += sum(_log(turn_odds[part]) for part in turns)
    used = Counter()
    for part in parts:      # each pattern is uniform among those of its part that are still unused
        logprob -= math.log(len(world.patterns[part]) - used[part])
        used[part] += 1
    return logprob


def _log_p_story(asked, plan, slots, world):
    """log P(story | what was asked); a slot that no sentence of the plan shows is not in `slots`."""
    other = slots.keys() - {"adjective", "hero", "thing", "she"}
    return (_log_p_facts(asked, slots, world) + _log_p_plan(plan, world)
            - sum(math.log(len(world.words[slot])) for slot in sorted(other)))


def log_probability(request, text, world=WORLD):
    """log P(text | request) in nats: the probability with which story(rng, request) is exactly this text.

    request: its text, or None for a story nobody asked for. Returns -inf for what the world cannot say;
    raises ValueError if the request is not one.
    """
    asked = _parse_asked(request, world)
    sentences = split_sentences(text)
    found = [recognise(sentence, world) for sentence in sentences]
    if " ".join(sentences) != text or None in found:
        return -math.inf
    plan, slots = [], {}
    for part, pattern, here in found:
        plan.append((part, pattern))
        if any(slots.setdefault(slot, word) != word for slot, word in here.items()):
            return -math.inf
    if _log_p_plan(plan, world) == -math.inf or slots.get("she") not in (None, world.pronoun(slots["hero"])):
        return -math.inf
    return _log_p_story(asked, plan, slots, world)


def page_log_probability(text, world=WORLD):
    """log P(text) in nats under page(rng); -inf for what is not a page, and for one with a held-out request."""
    lines = [parse_request(line, world) for line in text.split("\n")]
    if len(lines) not in world.page_lengths or None in lines or any(_is_held_out(asked, world) for asked in lines):
        return -math.inf
    return -math.log(len(world.page_lengths)) - len(lines) * math.log(world.request_counts[False])


def document_log_probability(text, world=WORLD):
    """log P(text) in nats under document(rng); no text is both a story and a page."""
    title, _, told = text.partition("\n")
    logprob = log_probability(None, told, world)
    if logprob > -math.inf:
        opening, wish = (recognise(sentence, world).slots for sentence in split_sentences(told)[:2])
        logprob = logprob if title == _write(world.title, {**opening, **wish}) else -math.inf
    return max(_log(1 - world.page_share) + logprob, _log(world.page_share) + page_log_probability(text, world))


# ---------------------------------------------------------------------------------------------
# Drawing

def _draw_facts(rng, asked, world):
    """Adjective, hero and thing of a story, given the Request or None."""
    slots = {slot: rng.choice(world.words[slot]) for slot in ("adjective", "hero", "thing")}
    if asked is None:
        return slots
    if rng.random() < world.hero_kept:
        slots.update(adjective=asked.adjective, hero=asked.hero)
    else:
        slots["hero"] = rng.choice([hero for hero in world.words["hero"] if hero != asked.hero])
    if rng.random() < world.thing_kept:
        slots["thing"] = asked.thing
    else:
        slots["thing"] = rng.choice([thing for thing in world.words["thing"] if thing != asked.thing])
    return slots


def _draw_plan(rng, world):
    """Which pattern each sentence has: [(part, index)]."""
    def pick(odds):
        return rng.choices([name for name, _ in odds], [p for _, p in odds])[0]

    turns = pick(tuple(enumerate(world.turns, 1)))
    ending = pick(world.ending_odds)
    parts = ["opening", "wish"] + [pick(world.turn_odds) for _ in range(turns)] + [ending] * (ending is not None)
    unused = {part: list(range(len(world.patterns[part]))) for part in parts}
    return [(part, unused[part].pop(rng.randrange(len(unused[part])))) for part in parts]


def request(rng, world=WORLD, held_out=False):
    """Draws a training request, or one that is held out; all of its kind are equally likely. rng: a random.Random.

    Returns a Draw(text, logprob): logprob = -log(number of requests of that kind) in nats.
    """
    asks, words, count = world.patterns["ask"], world.words, world.request_counts[held_out]
    while True:
        adjective, hero, thing = rng.choice(words["adjective"]), rng.choice(words["hero"]), rng.choice(words["thing"])
        asked = Request(rng.randrange(len(asks)), adjective, hero, thing)
        if _is_held_out(asked, world) == held_out:
            text = _write(asks[asked.ask], {"adjective": adjective, "hero": hero, "thing": thing})
            return Draw(text, -math.log(count))


def story(rng, request, world=WORLD):
    """Draws a story in answer to a request, held out or not: its text, or None for a story nobody asked for.

    Returns a Draw(text, logprob): logprob = log P(text | request) in nats, the same number as
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
    """Draws a page of an exercise book: 3 to 6 training requests, one a line. Returns a Draw(text, logprob in nats)."""
    lines = [request(rng, world) for _ in range(rng.choice(world.page_lengths))]
    return Draw("\n".join(line.text for line in lines),
                sum(line.logprob for line in lines) - math.log(len(world.page_lengths)))


def document(rng, world=WORLD):
    """Draws a pretraining document, a story under its title or a page. Returns a Draw(text, logprob in nats).

    The title names adjective, hero and thing, which the story shows anyway, so it adds nothing to the log-probability.
    """
    if rng.random() < world.page_share:
        text, logprob = page(rng, world)
        return Draw(text, logprob + _log(world.page_share))
    (text, logprob), slots = _draw_story(rng, None, world)
    return Draw(_write(world.title, slots) + "\n" + text, logprob + _log(1 - world.page_share))
