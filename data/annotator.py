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

Below the annotator stand those who may take its place (CS 224R, ch. 11): a constitution, and any program
of the user's. And the answer key: how far a reward model is from the best one.
"""

import bisect
import itertools
import json
import math
import re
import shlex
import shutil
import subprocess
import tempfile
from collections import Counter
from typing import NamedTuple

import torch
import torch.nn.functional as F

from data.files import InputError, kind, objects, parse_object, read_bytes, shown, text_of, write_atomic
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


class Seen(NamedTuple):
    """What there is to see in a response to a request: all that the annotator and the constitution judge by."""
    hero: bool          # the requested hero's word occurs
    thing: bool         # the requested thing's word does
    kind: int           # kind sentences
    unkind: int         # unkind ones
    ending: str         # the part of the last sentence: "happy" or "sad" is an ending; "" for an unknown sentence or none
    words: int          # runs of characters between white space
    repeated: int       # sentences that say an earlier one again


def look(prompt, response, world=WORLD):
    """The Seen of a response, which may be any text, also an empty one. ValueError if the prompt is not a request."""
    asked = parse_request(prompt, world)
    if asked is None:
        raise ValueError(f"not a request of this world: {prompt!r}")
    sentences = split_sentences(response)
    found = [recognise(sentence, world) for sentence in sentences]
    parts = [sentence.part if sentence else "" for sentence in found]
    distinct = {known[:2] if known else text for known, text in zip(found, sentences)}     # patterns, else texts
    words = re.findall("[a-z]+", response.lower())
    return Seen(asked.hero in words, asked.thing in words, parts.count("kind"), parts.count("unkind"),
                parts[-1] if parts else "", len(response.split()), len(sentences) - len(distinct))


def rubric(prompt, response, world=WORLD):
    """The parts of the true reward, as a dict: on request, kindness, ending, brevity, repetition. Arguments as look's."""
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
    """The true reward, the sum of the rubric's parts; any text gets one. ValueError: the prompt is no request."""
    return float(sum(rubric(prompt, response, world).values()))


# ----------------------------------------------------------------------------------------------------
# Process supervision (Lightman et al. 2023; CS 224R, ch. 11): a step is a sentence

def steps(prompt, response, world=WORLD):
    """The true reward step by step: what each sentence adds to the reward of the story so far, a list of floats.

    gold_reward(first k sentences) - gold_reward(first k - 1): an ending counts where it stands, and is lost again where the
    story goes on. The sum telescopes to gold_reward(response) - gold_reward(""), that is gold_reward + 0.5, because a story
    that has not begun lacks an ending.
    """
    sentences = split_sentences(response)
    totals = [gold_reward(prompt, " ".join(sentences[:k]), world) for k in range(len(sentences) + 1)]
    return [after - before for before, after in zip(totals, totals[1:])]


def step_ends(pieces):
    """Where the sentences of a response end: the index of the last token of each. pieces: the bytes of its tokens."""
    text = b"".join(pieces).decode("utf-8", "surrogateescape")  # bytes that are no text keep their number
    lengths, ends, at = list(itertools.accumulate(map(len, pieces))), [], 0
    for sentence in split_sentences(text):
        at = text.index(sentence, at) + len(sentence)
        ends.append(bisect.bisect_left(lengths, len(text[:at].encode("utf-8", "surrogateescape"))))
    return ends


class Marked(NamedTuple):
    """A response with the annotator's mark for every step."""
    ids: list       # prompt + response + <|end|>
    ends: list      # the index in ids of each step's last token
    steps: list     # their true rewards
    marks: list     # good or not


def mark(rows, tokenizer, rng):
    """The annotator marks both responses of every pair: a list of Marked. rng: a random.Random.

    The mark of a step compares the story with it and without it, as choose does: P(good) = sigmoid(step).
    """
    marked = []
    for row in rows:
        for text in (row["chosen"], row["rejected"]):
            prompt, response, true = tokenizer.prompt(row["prompt"]), tokenizer.response(text), steps(row["prompt"], text)
            ends = [len(prompt) + end for end in step_ends(tokenizer.pieces(response[:-1]))]
            marked.append(Marked(prompt + response, ends, true, [rng.random() < 1 / (1 + math.exp(-x)) for x in true]))
    return marked


def read_texts(tokens, lengths, tokenizer):
    """Sequences in the chat format, tokens (B, T) and their lengths (B,), as texts: [(prompt, response)]."""
    texts = []
    for row, length in zip(tokens.tolist(), lengths.tolist()):
        start = row.index(tokenizer.assistant_token)
        stop = length - (row[length - 1] == tokenizer.end_token)
        texts.append((tokenizer.decode(row[1:start]), tokenizer.decode(row[start + 1:stop])))
    return texts


def gold_rewards(rollout, tokenizer):
    """The annotator's true reward of every response of a Rollout in the chat format: (B,)."""
    return torch.tensor([gold_reward(*texts) for texts in read_texts(rollout.tokens, rollout.lengths, tokenizer)])


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


# ----------------------------------------------------------------------------------------------------
# Verifiable rewards (DeepSeek-R1; CS 224R, ch. 11). A reward of texts takes [(prompt, response)] and returns their
# rewards, a list of numbers

def verify(prompt, response, world=WORLD):
    """1.0 where the story names hero and thing, has no unkind sentence and ends happily, else 0.0: right or wrong."""
    seen = look(prompt, response, world)
    return float(seen.hero and seen.thing and not seen.unkind and seen.ending == "happy")


def verifier(asked):
    """verify as a reward of texts."""
    return [verify(*one) for one in asked]


def command_reward(command):
    """A reward of texts that is a program of the user's (see ask): {"prompt", "response"} in, {"reward": number} out."""
    words = words_of(command, "--reward")

    def number(row, where):
        if type(row.get("reward")) not in (int, float) or not abs(row["reward"]) < 1e30:
            found = kind(row["reward"]) if "reward" in row else "none"
            raise InputError(f'{where}: "reward" must be a number, found {found}')
        return float(row["reward"])

    return lambda asked: list(ask(words, [dict(zip(("prompt", "response"), one)) for one in asked], number))


def reward_of(name, data=""):
    """The reward of texts of this name, "verifier", or else the command_reward; None for a model's, "reward_model" and
    "process". InputError if it knows the little world only, and the prompts are of a user's data."""
    if data and name in ("process", "verifier"):
        raise InputError(f"--reward {name}: knows the little world only, not the prompts of {data}")
    if name in ("reward_model", "process"):
        return None
    return verifier if name == "verifier" else command_reward(name)


class TextReward:
    """A reward of texts with the score of a RewardModel."""

    def __init__(self, rewards, tokenizer):
        self.rewards, self.tokenizer = rewards, tokenizer

    def score(self, tokens, lengths):
        """The rewards (B,) of sequences in the chat format, tokens (B, T), lengths (B,)."""
        return torch.tensor(self.rewards(read_texts(tokens, lengths, self.tokenizer)), dtype=torch.float32,
                            device=tokens.device)

    def token_rewards(self, rollout):
        """(B, T-1): those of a whole Rollout, for one program is started for all of it, at each last action."""
        rewards = torch.zeros(rollout.tokens[:, 1:].shape, device=rollout.tokens.device)
        return rewards.scatter(1, rollout.lengths[:, None] - 2, self.score(rollout.tokens, rollout.lengths)[:, None])


def pass_at_k(correct, n, k):
    """P(one of k samples at least is right), from `correct` right ones of n samples, without bias: 1 - C(n - c, k)/C(n, k),
    the share of all subsets of k that hold one (Chen et al. 2021, eq. 1).

    >>> pass_at_k(1, 4, 1), pass_at_k(1, 4, 2), pass_at_k(0, 4, 4)
    (0.25, 0.5, 0.0)
    """
    return 1 - math.comb(n - correct, k) / math.comb(n, k)


def verified_optimum(p, beta):
    """The best policy for a reward of 1 (with probability p under the reference) or 0: (J*, its own probability of 1).

    Z = E_ref[exp(r/β)] = 1 - p + p e^{1/β}, J* = β log Z, and π* is right with probability p e^{1/β}/Z (CS 224R, ch. 7).
    >>> J_star, right = verified_optimum(0.25, 1 / math.log(3))     # right ones count three times: Z = 0.75 + 0.25 · 3
    >>> round(J_star * math.log(3), 3), right
    (0.405, 0.5)
    """
    if p == 0:
        return 0.0, 0.0
    z = p + (1 - p) * (math.exp(-1 / beta) if beta else 0.0)  # Z e^{-1/β}, which a small β cannot make too large
    return 1 + beta * math.log(z), p / z


# ----------------------------------------------------------------------------------------------------
# Judges. A judge labels comparisons: it takes (asked, rng), asked a list of (prompt, first response, second
# response), and returns a list of (which one it prefers, 0 or 1, and why: "" for no reason given).

def annotator_judge(asked, rng):
    """The annotator as a judge."""
    return [(choose(*one, rng), "") for one in asked]


# Each principle with what the better story has more of: harmless first, then helpful. Unlike the annotator, who weighs
# all parts against each other, the first principle that tells two stories apart decides alone, and always alike.
CONSTITUTION = (
    ("Choose the story with fewer unkind deeds.", lambda seen: -seen.unkind),
    ("Choose the story that is about the hero and the thing that were asked for.", lambda seen: seen.hero + seen.thing),
    ("Choose the story that ends well; a sad ending is better than none.",
     lambda seen: ("sad", "happy").index(seen.ending) if seen.ending in ("sad", "happy") else -1),
    ("Choose the story with more kind deeds.", lambda seen: seen.kind),
    ("Choose the story that says nothing twice.", lambda seen: -seen.repeated),
    ("Choose the shorter story.", lambda seen: -seen.words),
)


def constitution_choice(prompt, first, second, rng, world=WORLD):
    """AI feedback (Bai et al. 2022; CS 224R, ch. 11): (which response follows the constitution better, 0 or 1, and the
    principle that decided). Where no principle tells them apart, rng, a random.Random, decides."""
    stories = [look(prompt, response, world) for response in (first, second)]
    for principle, more in CONSTITUTION:
        a, b = map(more, stories)
        if a != b:
            return int(b > a), principle
    return rng.randrange(2), "No principle tells them apart."


def constitution_judge(asked, rng):
    """The constitution as a judge."""
    return [constitution_choice(*one, rng) for one in asked]


def both_judge(asked, rng):
    """The annotator labels half of the comparisons, every other one, and the constitution the others."""
    return [(annotator_judge, constitution_judge)[i % 2]([one], rng)[0] for i, one in enumerate(asked)]


JUDGES = {"annotator": annotator_judge, "constitution": constitution_judge, "both": both_judge}


def command_judge(command, path):
    """A judge that is a program of the user's (see ask): to {"prompt", "first", "second"} it answers {"choice": 0 or 1},
    and may add a text "why". Its labels go to the file path as they come; what stands there is not asked again."""
    words, fields = words_of(command, "--judge"), ("prompt", "first", "second")

    def label(row, where):
        if type(row.get("choice")) is not int or row["choice"] not in (0, 1):
            found = kind(row["choice"]) if "choice" in row else "none"
            raise InputError(f'{where}: "choice" must be 0, for the first one, or 1, found {found}')
        return row["choice"], text_of(row, "why", where) if row.get("why") else ""

    def judge(asked, rng):
        kept = read_bytes(path) if path.exists() else b""
        kept = kept[:kept.rfind(b"\n") + 1]     # a killed run may have left half a line
        write_atomic(path, kept)
        given = {tuple(row[name] for name in fields): label(row, where) for row, where in objects(path)} if kept else {}
        new = [dict(zip(fields, one)) for one in dict.fromkeys(asked) if one not in given]
        with open(path, "a") as file:
            for (choice, why), question in zip(ask(words, new, label), new):
                file.write(json.dumps({**question, "choice": choice, "why": why}) + "\n")
                file.flush()
                given[tuple(question.values())] = choice, why
        return [given[one] for one in asked]

    return judge


def judge_of(name, path):
    """The judge of this name (JUDGES), or else the command_judge, whose labels are kept in the file path."""
    return JUDGES.get(name) or command_judge(name, path)


def words_of(command, flag):
    """A command as a list of words. InputError, naming the flag, if there is no such program."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise InputError(f"{flag} {command}: not a command: {error}") from None
    if not words or not shutil.which(words[0]):
        raise InputError(f"{flag} {command}: no such program, and none of the names that {flag} knows")
    return words


def ask(words, questions, read):
    """Put questions to a program of the user's, words: it finds them on its standard input, a JSON object a line, prints
    an answer to each, in order, a JSON object a line too, and ends. Yields read(answer, where) as they come.

    InputError, one line with what the program said, if it fails, or answers too little, too much or something else.
    """
    if not questions:
        return
    with tempfile.TemporaryFile() as asked, tempfile.TemporaryFile() as complaints:
        asked.write("".join(json.dumps(question) + "\n" for question in questions).encode())
        asked.seek(0)
        program = subprocess.Popen(words, stdin=asked, stdout=subprocess.PIPE, stderr=complaints)
        number, name = 0, shlex.join(words)
        try:
            for number, line in enumerate(program.stdout, start=1):
                if number > len(questions):
                    raise InputError(f"{name}: gave more answers than the {len(questions)} asked for: "
                                     f"{shown(line.decode(errors='replace').strip())}")
                where = f"{name}: answer {number}"
                yield read(parse_object(line.strip(), where), where)
            status = program.wait()
        finally:
            program.kill()
            program.wait()
            program.stdout.close()
        if status or number < len(questions):
            complaints.seek(0)
            said = complaints.read().decode(errors="replace").strip().splitlines()[-1:] or ["nothing"]
            raise InputError(f"{name}: gave {number} of {len(questions)} answers and ended with status {status}; it said: "
                             f"{said[0][:300]}; once it is mended, --resume goes on")


# ----------------------------------------------------------------------------------------------------
# The answer key

def gold_margins(rows):
    """The annotator's true r(x, y_w) - r(x, y_l) of every row of a file of pairs: (N,)."""
    return torch.tensor([gold_reward(row["prompt"], row["chosen"]) - gold_reward(row["prompt"], row["rejected"])
                         for row in rows])


def print_agreement(rows):
    """Print how often the annotator, asked (again), agrees with the labels of rows, without the noise of this one question,
    beside the best possible; and the reasons, where the judge gave any. Its own labels are noisy too."""
    p = torch.sigmoid(gold_margins(rows).double())  # P(the annotator agrees)
    print(f"judge   the annotator agrees with {p.mean():.1%} ± {standard_error(p):.1%} of the labels; at best "
          f"{torch.maximum(p, 1 - p).mean():.1%}")
    if any("why" in row for row in rows):
        for why, number in Counter(row.get("why", "no reason given") for row in rows).most_common(10):
            print(f"        {number / len(rows):5.1%}  {why}")


def answer_key(margin, gold_margin, bins=10):
    """How far a reward model is from the best one, on pairs whose true rewards are known.

    margin, gold_margin (N,): r(y_w) - r(y_l) of the model and of the annotator. Returns (figures, table):
    accuracy is the share of labels that the model guesses; expected_accuracy is its expectation over the annotator's
    noise, E P(the model's choice), which is the same thing with less variance, and is what Bayes accuracy bounds. Bayes
    accuracy E σ(|Δgold|) is what the true reward itself scores on labels this noisy; share_of_bayes and above_chance are
    expected_accuracy / Bayes and (expected_accuracy - 0.5) / (Bayes - 0.5), because a coin is right half of the time;
    ..._error are standard errors over the pairs. The annotator's own loss is its entropy, E[-σ log σ - (1-σ) log(1-σ)];
    correlation and slope (Δreward = slope · Δgold, least squares) are taken through the origin: a pair counts in both
    orders, so both means are 0;
    table has a row (pairs, predicted, observed) for each bin of predicted preference: a pair counts in both orders.
    """
    p, norms = torch.sigmoid(gold_margin.double()), margin.norm() * gold_margin.norm()
    agreed, best = torch.where(margin > 0, p, 1 - p), torch.maximum(p, 1 - p)  # P(annotator agrees) with the model, at best
    figures = dict(accuracy=(margin > 0).double().mean().item(), expected_accuracy=agreed.mean().item(),
                   expected_accuracy_error=standard_error(agreed), bayes_accuracy=best.mean().item())
    for name, ours, most in (("share_of_bayes", agreed, best), ("above_chance", agreed - 0.5, best - 0.5)):
        share = (ours.mean() / most.mean().clamp(min=1e-9)).item()
        error = standard_error(ours - share * most) / max(most.mean().item(), 1e-9)  # of a ratio of two means
        figures.update({name: share, f"{name}_error": error})
    figures.update(loss=-F.logsigmoid(margin.double()).mean().item(),
                   annotator_loss=(torch.special.entr(p) + torch.special.entr(1 - p)).mean().item(),
                   correlation=(margin @ gold_margin / norms.clamp(min=1e-9)).item(),
                   slope=(margin @ gold_margin / (gold_margin @ gold_margin).clamp(min=1e-9)).item())
    predicted = torch.sigmoid(torch.cat([margin, -margin]))
    won = torch.cat([torch.ones_like(margin), torch.zeros_like(margin)])
    which = (predicted * bins).long().clamp(max=bins - 1)
    table = [(int((which == b).sum()), predicted[which == b].mean().item(), won[which == b].mean().item())
             for b in range(bins) if (which == b).any()]
    return figures, table


def standard_error(x):
    """The standard error of the mean of x (N,), 0 for a single number."""
    return (x.std(correction=0) / len(x) ** 0.5).item()


def print_answer_key(figures, table):
    """Print what answer_key found."""
    print(f"held-out accuracy {figures['accuracy']:.3f}, without the labels' noise {figures['expected_accuracy']:.3f} ± "
          f"{figures['expected_accuracy_error']:.3f}; Bayes {figures['bayes_accuracy']:.3f}\n"
          f"        {figures['share_of_bayes']:.1%} ± {figures['share_of_bayes_error']:.1%} of it; above chance "
          f"{figures['above_chance']:.1%} ± {figures['above_chance_error']:.1%}\n"
          f"loss {figures['loss']:.3f}, the annotator's own {figures['annotator_loss']:.3f}; "
          f"Δreward against Δgold: correlation {figures['correlation']:.3f}, slope {figures['slope']:.3f}\n"
          f"calibration   pairs  predicted  observed")
    for count, predicted, observed in table:
        print(f"           {count:8d}  {predicted:9.3f}  {observed:8.3f}")
