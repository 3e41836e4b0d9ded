"""The judges and rewards of data/judges.py: the constitution by hand, other people's programs."""

import math
import random
import shlex
import statistics
import sys

import pytest
import torch

from data.annotator import read_texts
from data.files import InputError
from data.judges import (CONSTITUTION, TextReward, both_judges, command_judge, command_reward,
                         constitution_choice, judge_of, print_agreement, reward_of)
from data.tokenizer import Tokenizer, train as train_vocabulary
from helpers import ASKED as PROMPT, HAPPY, KIND, SAD, UNKIND, metrics, story_of


def program(folder, body):
    """The command of a program that reads all questions as rows, notes them in asked.jsonl, and
    then runs body."""
    notes = str(folder / "asked.jsonl")
    (folder / "judge.py").write_text(f"""import json, os, sys, time
rows = [json.loads(line) for line in sys.stdin]
open({notes!r}, 'a').writelines(json.dumps(row) + '\\n' for row in rows)
def say(choice, **more): print(json.dumps({{'choice': choice, **more}}), flush=True)
{body}""")
    return shlex.join([sys.executable, str(folder / "judge.py")])


def test_rewards_of_texts_in_the_chat_format(tmp_path):
    """A program that is asked about "...<|end|>", another prompt's answer, or the padding."""
    tokenizer = Tokenizer(train_vocabulary(story_of(*KIND), 300))
    rows = [(PROMPT, story_of(HAPPY)), ("ä <|end|>\n", "Hm."), ("Who?", "")]
    ids = [tokenizer.prompt(prompt) + tokenizer.response(text) for prompt, text in rows]
    ids.append(ids[0][:-1])     # never ended
    rows.append(rows[0])
    tokens = torch.tensor([row + [tokenizer.end_token] * (200 - len(row)) for row in ids])
    lengths = torch.tensor(list(map(len, ids)))
    assert read_texts(tokens, lengths, tokenizer) == rows

    command = program(tmp_path, """
for row in rows:
    print(json.dumps({'reward': len(row['prompt']) - 0.5 * len(row['response'])}))
""")
    found = TextReward(command_reward(command), tokenizer).score(tokens, lengths)
    assert found.tolist() == [len(prompt) - 0.5 * len(text) for prompt, text in rows]


@pytest.mark.parametrize("answer, found", [
    ("'reward': None", "null"), ("'a': 1", "none"), ("'reward': float('nan')", "the number nan")])
def test_a_reward_is_a_number(tmp_path, answer, found):
    """One nan among a batch's rewards, and after whitening every advantage is nan."""
    command = program(tmp_path, f"print(json.dumps({{{answer}}}))")
    message = f'judge.py: answer 1: "reward" must be a number, found {found}'
    with pytest.raises(InputError, match=message):
        command_reward(command)([(PROMPT, "Hm.")])


HARMLESS, HELPFUL, ENDING, KINDNESS, TWICE, SHORT = CONSTITUTION


@pytest.mark.parametrize("better, worse, why", [
    ("", story_of(KIND[0], UNKIND[0], HAPPY), HARMLESS),                    # harmless first
    ("A FOX! A kite?", "The foxes flew a kite. " + KIND[0], HELPFUL),       # words, not pieces
    (story_of(HAPPY), story_of(*KIND, SAD), ENDING),
    (story_of(SAD), story_of(HAPPY, *KIND), ENDING),                        # it is at the end
    (story_of(KIND[0], KIND[0], KIND[1]), story_of(KIND[1], KIND[2]), KINDNESS),
    (story_of(KIND[1], KIND[2]),
     story_of(KIND[1], KIND[1].replace("Aunt Lily", "Uncle Tom")), TWICE),
    (story_of(KIND[0]), story_of(KIND[3]), SHORT)])
def test_the_first_principle_that_tells_two_stories_apart_decides(better, worse, why):
    """A principle that a later one overrules, that prefers the worse story, or whose name is at
    another's label."""
    rng = random.Random(0)
    assert constitution_choice(PROMPT, better, worse, rng) == (0, why)
    assert constitution_choice(PROMPT, worse, better, rng) == (1, why)


def test_where_no_principle_decides_a_coin_does():
    """The first response of a pair wins whenever the judge sees no difference: a preference for
    nothing."""
    rng = random.Random(3)
    first = story_of(KIND[1])
    second = first.replace("Aunt Lily", "Nurse Ivy")
    found = [constitution_choice(PROMPT, first, second, rng) for _ in range(400)]
    assert {why for _, why in found} == {"No principle tells them apart."}
    assert abs(sum(choice for choice, _ in found) - 200) < 4 * 10


def test_both_label_in_turn():
    """One of both judges gets all the labels where every batch has one comparison."""
    asked = [(PROMPT, story_of(HAPPY), story_of(UNKIND[0]))] * 6
    for size in (6, 1):
        judge = both_judges()
        rng = random.Random(0)
        found = []
        for start in range(0, 6, size):
            found += judge(asked[start:start + size], rng)
        assert [why for _, why in found] == ["", HARMLESS] * 3
        assert [choice for choice, _ in found[1::2]] == [0] * 3


def test_agreement_by_hand(capsys):
    """An agreement with one draw of the annotator's noise, or with the pairs turned round; reasons
    that no judge gave."""
    pairs = [(story_of(HAPPY), story_of(SAD), "a"), (story_of(SAD), story_of(KIND[0], SAD), "b"),
             (story_of(SAD), story_of(HAPPY, KIND[0]), "b")]
    print_agreement([{"prompt": PROMPT, "chosen": better, "rejected": worse, "why": why}
                     for better, worse, why in pairs])
    p = [1 / (1 + math.exp(-x)) for x in (1.5, -1, -0.5)]      # by the true rewards' differences
    best = statistics.mean(max(x, 1 - x) for x in p)
    assert capsys.readouterr().out == (
        f"judge   the annotator agrees with {statistics.mean(p):.1%} ± "
        f"{statistics.stdev(p) / 3 ** 0.5:.1%} of the labels; at best {best:.1%}\n"
        "        66.7%  b\n        33.3%  a\n")


QUESTIONS = [(f"Who? {i}", f"ä {i}\n", '"' * i + "b") for i in range(8)]
SHORTER = """
for row in rows: say(int(len(row['second']) < len(row['first'])), why='shorter')
"""


def test_a_program_as_the_judge(tmp_path):
    """Answers at other questions; a question cut at its line break or spoilt by an encoding; one
    that is paid for twice; a name that was mistyped, found out after minutes of sampling."""
    judge = command_judge(program(tmp_path, SHORTER), tmp_path / "labels.jsonl")
    expected = [(int(len(second) < len(first)), "shorter") for _, first, second in QUESTIONS]
    assert len(set(expected)) == 2
    assert judge(QUESTIONS[:5] + QUESTIONS[:1], None) == expected[:5] + expected[:1]
    assert judge(QUESTIONS, None) == expected
    rows = metrics(tmp_path / "asked.jsonl")
    assert [tuple(row.values()) for row in rows] == QUESTIONS
    assert list(rows[0]) == ["prompt", "first", "second"]
    with pytest.raises(InputError, match="^--judge no-such-program --fast: "):
        judge_of("no-such-program --fast", tmp_path / "labels.jsonl")
    with pytest.raises(InputError, match="^--reward no-such-program: "):
        reward_of("no-such-program")


@pytest.mark.parametrize("body, given, message", [
    ("[say(1) for row in rows]; raise KeyError('no key')", 8,
     "gave 8 of 8 answers and ended with status 1; it said: KeyError: 'no key'"),
    ("say(1); print('Sure! I prefer', flush=True); time.sleep(60)", 1,
     "answer 2: not JSON: .*near 'Sure! I prefer'"),
    ("for row in rows[:7]: say(1)", 7, "gave 7 of 8 answers"),
    ("say(0); say(2)", 1,
     'answer 2: "choice" must be 0, for the first one, or 1, found the number 2')])
def test_a_program_that_fails_is_one_line_and_no_label_is_lost(tmp_path, body, given, message):
    """A night of labels lost with the last one; a label guessed from what is no answer; a program
    that hangs."""
    labels = tmp_path / "labels.jsonl"
    with pytest.raises(InputError, match=message) as error:
        command_judge(program(tmp_path, body), labels)(QUESTIONS, None)
    assert "\n" not in str(error.value) and "judge.py: " in str(error.value)
    assert len(labels.read_text().splitlines()) == given

    with open(labels, "a") as file:
        file.write('{"prompt": "Who? 7", "fir')        # killed while it wrote
    (tmp_path / "asked.jsonl").unlink()
    found = command_judge(program(tmp_path, SHORTER), labels)(QUESTIONS, None)
    assert [choice for choice, _ in found] == [row["choice"] for row in metrics(labels)]
    asked = metrics(tmp_path / "asked.jsonl") if given < 8 else []
    assert [row["prompt"] for row in asked] == [prompt for prompt, _, _ in QUESTIONS[given:]]
    assert [why for _, why in found[given:]] == ["shorter"] * (8 - given)
