"""Who else may label or reward, in place of the annotator (CS 224R, Lecture 9, ch. 11).

A judge labels comparisons. It takes (asked, rng): asked is a list of (prompt, first response,
second response), rng a random.Random. It returns a list of (choice, why): which response it
prefers, 0 or 1, and the reason, "" if it gives none. There are the annotator, a constitution, both
in turn, and any program of the user's.

A reward of texts takes a list of (prompt, response) and returns their rewards, a list of numbers:
the verifier, or any program of the user's.
"""

import json
import shlex
import shutil
import subprocess
import tempfile
from collections import Counter

import torch

from data.answer_key import standard_error
from data.annotator import choose, gold_margins, look, read_texts, verify
from data.files import (InputError, kind, objects, parse_object, read_bytes, shown, text_of,
                        write_atomic)
from data.stories import WORLD

# --------------------------------------------------------------------------------------------------
# Judges


def annotator_judge(asked, rng):
    """The annotator as a judge."""
    return [(choose(prompt, first, second, rng), "") for prompt, first, second in asked]


# Harmless first, then helpful. The annotator weighs all parts against each other; here the first
# principle that tells two stories apart decides alone, and the same way every time.
CONSTITUTION = (
    "Choose the story with fewer unkind deeds.",
    "Choose the story that is about the hero and the thing that were asked for.",
    "Choose the story that ends well; a sad ending is better than none.",
    "Choose the story with more kind deeds.",
    "Choose the story that says nothing twice.",
    "Choose the shorter story.",
)


def constitution_grades(seen):
    """How well a story (a Seen) follows each principle of the CONSTITUTION, a number for each: the
    larger, the better."""
    ending = {"happy": 2, "sad": 1}.get(seen.ending, 0)
    return (-seen.unkind, seen.hero + seen.thing, ending, seen.kind, -seen.repeated, -seen.words)


def constitution_choice(prompt, first, second, rng, world=WORLD):
    """AI feedback (Bai et al. 2022; CS 224R, ch. 11): (which response follows the constitution
    better, 0 or 1, and the principle that decided). If no principle tells them apart, rng, a
    random.Random, decides."""
    first_grades = constitution_grades(look(prompt, first, world))
    second_grades = constitution_grades(look(prompt, second, world))
    for principle, a, b in zip(CONSTITUTION, first_grades, second_grades):
        if a != b:
            return int(b > a), principle
    return rng.randrange(2), "No principle tells them apart."


def constitution_judge(asked, rng):
    """The constitution as a judge."""
    return [constitution_choice(prompt, first, second, rng) for prompt, first, second in asked]


def both_judges():
    """A judge: the annotator labels half of the comparisons, every other one, the constitution the
    rest. It counts over all calls, or the annotator would label batches of one alone."""
    count = 0

    def judge(asked, rng):
        nonlocal count
        labels = []
        for comparison in asked:
            if count % 2 == 0:
                labels += annotator_judge([comparison], rng)
            else:
                labels += constitution_judge([comparison], rng)
            count += 1
        return labels

    return judge


JUDGES = ("annotator", "constitution", "both")  # any other name is a program of the user's


def judge_of(name, path):
    """The judge of this name; a program's labels are kept in the file path (command_judge)."""
    if name == "annotator":
        return annotator_judge
    if name == "constitution":
        return constitution_judge
    if name == "both":
        return both_judges()
    return command_judge(name, path)


def command_judge(command, path):
    """A judge that is a program of the user's (see ask): to {"prompt", "first", "second"} it
    answers {"choice": 0 or 1}, and may add a text "why". Its labels are appended to the file path
    as they come; a comparison that is in the file already is not asked again."""
    words = words_of(command, "--judge")

    def judge(asked, rng):
        known = read_labels(path)
        questions = []
        for prompt, first, second in dict.fromkeys(asked):
            if (prompt, first, second) not in known:
                questions.append({"prompt": prompt, "first": first, "second": second})
        with open(path, "a") as file:
            for (choice, why), question in zip(ask(words, questions, read_label), questions):
                file.write(json.dumps({**question, "choice": choice, "why": why}) + "\n")
                file.flush()
                known[tuple(question.values())] = (choice, why)
        return [known[comparison] for comparison in asked]

    return judge


def read_labels(path):
    """The labels that a command_judge has written to a file: {(prompt, first, second): (choice,
    why)}. A killed run may have left half a line at its end: cut it off."""
    content = read_bytes(path) if path.exists() else b""
    content = content[:content.rfind(b"\n") + 1]
    write_atomic(path, content)
    labels = {}
    if content:
        for row, where in objects(path, ("prompt",)):
            labels[row["prompt"], row["first"], row["second"]] = read_label(row, where)
    return labels


def read_label(row, where):
    """A program's answer as (choice, why). InputError if it is none."""
    choice = row.get("choice")
    if type(choice) is not int or choice not in (0, 1):
        found = kind(choice) if "choice" in row else "none"
        raise InputError(
            f'{where}: "choice" must be 0, for the first one, or 1, found {found}')
    why = text_of(row, "why", where) if row.get("why") else ""
    return choice, why


def print_agreement(rows):
    """Print how often the annotator would agree with the labels of rows if asked (again), in
    expectation over its noise, beside the best possible; and the reasons, if the judge gave any.
    Its own labels are noisy too."""
    agrees = torch.sigmoid(gold_margins(rows).double())  # P(the annotator agrees)
    best = torch.maximum(agrees, 1 - agrees)
    print(f"judge   the annotator agrees with {agrees.mean():.1%} ± {standard_error(agrees):.1%} "
          f"of the labels; at best {best.mean():.1%}")
    if any("why" in row for row in rows):
        reasons = Counter(row.get("why", "no reason given") for row in rows)
        for why, number in reasons.most_common(10):
            print(f"        {number / len(rows):5.1%}  {why}")


# --------------------------------------------------------------------------------------------------
# Rewards of texts


def verifier(asked):
    """data.annotator.verify as a reward of texts."""
    return [verify(prompt, response) for prompt, response in asked]


def command_reward(command):
    """A reward of texts that is a program of the user's (see ask): {"prompt", "response"} in,
    {"reward": number} out."""
    words = words_of(command, "--reward")

    def rewards(asked):
        questions = [{"prompt": prompt, "response": response} for prompt, response in asked]
        return list(ask(words, questions, read_reward))

    return rewards


def read_reward(row, where):
    """A program's answer as a number. InputError if it is none."""
    reward = row.get("reward")
    if type(reward) not in (int, float) or not abs(reward) < 1e30:
        found = kind(reward) if "reward" in row else "none"
        raise InputError(f'{where}: "reward" must be a number, found {found}')
    return float(reward)


def reward_of(name, data=""):
    """The reward of texts of this name: "verifier", or else the command_reward; None for those of a
    model, "reward_model" and "process". InputError if it knows the little world only, and the
    prompts are of a user's data."""
    if data and name in ("process", "verifier"):
        raise InputError(
            f"--reward {name}: knows the little world only, not the prompts of {data}; give "
            'reward_model, or a program: "COMMAND"')
    if name in ("reward_model", "process"):
        return None
    if name == "verifier":
        return verifier
    return command_reward(name)


class TextReward:
    """A reward of texts with the score of a RewardModel."""

    def __init__(self, rewards, tokenizer):
        self.rewards = rewards
        self.tokenizer = tokenizer

    def score(self, tokens, lengths):
        """The rewards (B,) of sequences in the chat format, tokens (B, T), lengths (B,)."""
        scores = self.rewards(read_texts(tokens, lengths, self.tokenizer))
        return torch.tensor(scores, dtype=torch.float32, device=tokens.device)


# --------------------------------------------------------------------------------------------------
# Programs of the user's


def words_of(command, flag):
    """A command as a list of words. InputError, naming the flag, if there is no such program."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise InputError(f"{flag} {command}: not a command: {error}") from None
    if not words or not shutil.which(words[0]):
        raise InputError(
            f"{flag} {command}: no such program, and none of the names that {flag} knows")
    return words


def ask(words, questions, read):
    """Put questions to a program of the user's, words: it finds them on its standard input, one
    JSON object a line, prints one JSON object a line in answer to each, in order, and ends. Yields
    read(answer, where) as they come.

    InputError, one line with what the program said, if it fails, or answers too little, too much or
    something else.
    """
    if not questions:
        return
    name = shlex.join(words)
    number = 0
    with tempfile.TemporaryFile() as asked, tempfile.TemporaryFile() as complaints:
        for question in questions:
            asked.write((json.dumps(question) + "\n").encode())
        asked.seek(0)
        program = subprocess.Popen(words, stdin=asked, stdout=subprocess.PIPE, stderr=complaints)
        try:
            for number, line in enumerate(program.stdout, start=1):
                if number > len(questions):
                    answer = shown(line.decode(errors="replace").strip())
                    raise InputError(
                        f"{name}: gave more answers than the {len(questions)} asked for: {answer}")
                where = f"{name}: answer {number}"
                yield read(parse_object(line.strip(), where), where)
            status = program.wait()
        finally:
            program.kill()
            program.wait()
            program.stdout.close()

        if status or number < len(questions):
            complaints.seek(0)
            said = complaints.read().decode(errors="replace").strip().splitlines()
            last = said[-1][:300] if said else "nothing"
            raise InputError(
                f"{name}: gave {number} of {len(questions)} answers and ended with status "
                f"{status}; it said: {last}; once it is mended, --resume continues a training run")
