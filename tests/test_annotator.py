"""The annotator of data/annotator.py, against a rubric worked by hand and the Bradley-Terry formula; other judges."""

import itertools
import json
import math
import random
import shlex
import statistics
import sys

import pytest
import torch

from data.annotator import (CONSTITUTION, TextReward, both_judge, choose, command_judge, command_reward,
                            constitution_choice, gold_reward, judge_of, mark, pass_at_k, print_agreement, read_texts,
                            rubric, scored, step_ends, steps, verified_optimum, verifier, verify)
from data.files import InputError
from data.stories import request, split_sentences, story
from data.tokenizer import Tokenizer, train as train_vocabulary

PROMPT = "Tell me a story about a shy fox and a kite."
OPENING = "Once there was a shy fox who lived by the river."         # 11 words
WISH = "Suddenly her red kite was gone."                              # 6 words
KIND = ["She stopped to comfort a crying child.", "She sang softly until Aunt Lily felt better.",
        "On the way she freed a butterfly from a web.", "The fox mended a broken fence for Aunt Lily."]
UNKIND = ["She pulled the tail of a sleeping calf.", "She broke a promise to Aunt Lily."]
HAPPY, SAD = "At last she found the kite and danced for joy.", "But she never found the kite."


def story_of(*sentences):
    return " ".join((OPENING, WISH) + sentences)


def test_example_of_the_docstring():
    """A worked example that no longer works."""
    response = story_of(KIND[1], SAD)
    assert rubric(PROMPT, response) == {
        "on request": 1.75, "kindness": 1.0, "ending": 0.0, "brevity": 0.0, "repetition": 0.0}
    assert gold_reward(PROMPT, response) == 2.75


@pytest.mark.parametrize("response, gold", [
    ("", -0.5),                                             # nothing but the missing ending
    ("fox", 1.0 - 0.5),
    ("The foxes flew a kites.", -0.5),                      # words, not pieces of words
    ("A FOX! A kite?", 1.75 - 0.5),                         # capitals and punctuation don't matter
    (story_of(KIND[0]), 1.75 + 1 - 0.5),
    (story_of(UNKIND[0], UNKIND[1], SAD), 1.75 - 2 * 1.5),
    (story_of(KIND[0], UNKIND[0], HAPPY), 1.75 + 1 - 1.5 + 1.5),
    (story_of(HAPPY, KIND[0]), 1.75 + 1 - 0.5),              # an ending counts at the end only
    (story_of(KIND[0], KIND[0]), 1.75 + 1.5 - 0.5 - 0.75),
    (story_of(KIND[1], KIND[1].replace("Aunt Lily", "Uncle Tom")), 1.75 + 1.5 - 0.5 - 0.75),    # the same pattern
    ("Moo. Moo. Moo. Baa.", -0.5 - 2 * 0.75),               # unrecognised: the same text
    (" ".join(["word"] * 50), -0.5 - 5 * 0.03),
])
def test_rubric_by_hand(response, gold):
    """A term with the wrong sign, counted twice, or that fails on a text which isn't a story."""
    assert gold_reward(PROMPT, response) == pytest.approx(gold)


def test_another_request_earns_less():
    """A reward that doesn't look at the prompt: then no policy has to."""
    response = story_of(HAPPY)
    for prompt, lost in (("Tell me a story about a shy cat and a kite.", 1.0),
                         ("Please tell me about a shy fox and a drum.", 0.75),
                         ("Please tell me about an odd fox and a kite.", 0.0)):
        assert gold_reward(PROMPT, response) - gold_reward(prompt, response) == pytest.approx(lost)


def test_kindness_has_diminishing_returns():
    """Kindness that pays linearly leaves nothing to over-optimise."""
    totals = [rubric(PROMPT, story_of(*KIND[:k]))["kindness"] for k in range(5)]
    assert totals == [0, 1, 1.5, 1.75, 1.875]


def test_saying_a_kind_thing_again_does_not_pay():
    """After the first, a repeated kind sentence earns at most 0.5 and costs 0.75."""
    rewards = [gold_reward(PROMPT, story_of(*KIND[:1] * k)) for k in range(1, 6)]
    assert rewards == sorted(rewards, reverse=True) and len(set(rewards)) == 5


def test_the_parts_sum_to_the_reward():
    """A part that is reported and not counted."""
    rng = random.Random(0)
    for _ in range(100):
        prompt = request(rng).text
        response = story(rng, prompt).text
        assert sum(rubric(prompt, response).values()) == pytest.approx(gold_reward(prompt, response))


def test_a_wrong_prompt_is_named():
    """A typing error in a prompt that silently costs every response its 2.5."""
    with pytest.raises(ValueError, match="Sing a song"):
        gold_reward("Sing a song.", OPENING)


def test_scores_before_a_text():
    """The annotator asked about a prompt that it cannot judge, which is an error; a score of 0 that isn't shown."""
    text = story_of(KIND[1], SAD)
    assert scored(PROMPT, text) == f"[gold +2.75] {text}" and scored("Sing a song.", text) == text
    assert scored(PROMPT, "", 0.0) == "[reward +0.00, gold -0.50] "
    assert scored("Sing a song.", "La.", -1.234) == "[reward -1.23] La."


def test_spread_of_the_reward():
    """Rewards so alike that the labels are coin flips, or so different that there is no noise."""
    rng, golds = random.Random(1), []
    for _ in range(3000):
        prompt = request(rng).text
        golds.append(gold_reward(prompt, story(rng, prompt).text))
    assert 1.55 < statistics.stdev(golds) < 1.78     # 1.66 over 30,000 stories; 3,000 of them err by some 0.02


@pytest.mark.parametrize("first, second", [
    (story_of(KIND[0]), story_of(KIND[0], HAPPY)), (story_of(HAPPY), story_of(KIND[0], SAD)), ("fox", "fox")])
def test_choices_are_bradley_terry(first, second):
    """Noise of another scale, one noise for both, or 0 and 1 exchanged."""
    rng, n = random.Random(2), 5000
    chosen = sum(choose(PROMPT, first, second, rng) == 0 for _ in range(n))
    p = 1 / (1 + math.exp(gold_reward(PROMPT, second) - gold_reward(PROMPT, first)))
    assert abs(chosen / n - p) < 4 * math.sqrt(p * (1 - p) / n)


def test_choices_come_from_the_given_generator_only():
    """A label that one seed does not reproduce."""
    state = random.getstate()
    runs = [[choose(PROMPT, story_of(HAPPY), story_of(SAD), rng) for _ in range(50)]
            for rng in (random.Random(6), random.Random(6))]
    assert runs[0] == runs[1] and set(runs[0]) == {0, 1} and random.getstate() == state


# ----------------------------------------------------------------------------------------------------------------------
# Steps


@pytest.mark.parametrize("sentences, gains", [
    ([KIND[0], UNKIND[0], HAPPY], [1.0, 0.75, 1.0, -1.5, 2.0]),             # no ending costs 0.5 from the start
    ([KIND[0], KIND[1], KIND[0], SAD], [1.0, 0.75, 1.0, 0.5, 0.25 - 0.75, 0.5]),
    ([HAPPY, KIND[0]], [1.0, 0.75, 2.0, 1.0 - 2.0])])                        # an ending that was none is lost again
def test_steps_by_hand(sentences, gains):
    """A step that is paid for what came before it, or for an ending that the story does not have there."""
    assert steps(PROMPT, story_of(*sentences)) == pytest.approx(gains)


def test_steps_sum_to_the_true_reward():
    """A dense reward whose sum is another reward: its optimum is another policy."""
    rng, texts = random.Random(4), [(PROMPT, text) for text in ("", "fox", "Moo. Moo. \n Moo! ", "word " * 60, story_of(*KIND))]
    for _ in range(50):
        prompt = request(rng).text
        texts.append((prompt, story(rng, prompt).text))
    for prompt, text in texts:
        assert sum(steps(prompt, text)) == pytest.approx(gold_reward(prompt, text) + 0.5)
        assert len(steps(prompt, text)) == len(split_sentences(text))


HOSTILE = ["Hi. There!", "Né. \xa0Où? \x85 日本。 Fin", "a.\u2028b? \" c.\" d", " . ! ?", "..", "No end", "x.\x1cy.\r\n\tz.", ""]


@pytest.mark.parametrize("vocab_size", [259, 300])
def test_a_step_is_read_at_its_sentences_last_token(vocab_size):
    """A mark read a token too early, where the sentence might still turn out well, or at the next one's first word;
    sentences counted otherwise than the annotator does, and all marks behind them moved."""
    tokenizer, rng = Tokenizer(train_vocabulary(" ".join(HOSTILE) + story_of(*KIND), vocab_size)), random.Random(5)
    texts = HOSTILE + [story_of(*KIND, HAPPY), story_of(SAD)]
    samples = [tokenizer.encode(text) for text in texts]
    samples += [rng.choices([*tokenizer.encode(". ! \"? é 日 a b"), *range(tokenizer.n_vocab)], k=40) for _ in range(200)]
    for ids in samples:         # a sample may be any tokens: bytes that are no text, special ones
        ends, sentences = step_ends(tokenizer.pieces(ids)), split_sentences(tokenizer.decode(ids))
        assert len(ends) == len(sentences) and ends == sorted(set(ends))
        for k, end in enumerate(ends):
            before, through = (split_sentences(tokenizer.decode(ids[:stop])) for stop in (end, end + 1))
            assert through == sentences[:k + 1]
            assert before[:k + 1] != sentences[:k + 1] or "\ufffd" in sentences[k]      # of a character, a byte is enough


def test_marks_are_a_comparison_with_the_story_without_the_step():
    """A mark that is the sign of the reward, which no noise hides, or that hangs on the steps after it."""
    tokenizer, rng, n = Tokenizer(train_vocabulary(story_of(*KIND), 300)), random.Random(6), 1000
    row = {"prompt": PROMPT, "chosen": story_of(KIND[0], UNKIND[0], HAPPY), "rejected": story_of(SAD)}
    marked = mark([row] * n, tokenizer, rng)
    for text, items in zip((row["chosen"], row["rejected"]), (marked[::2], marked[1::2])):
        ids = tokenizer.prompt(PROMPT) + tokenizer.response(text)
        assert all(item.ids == ids and item.steps == steps(PROMPT, text) for item in items)
        assert [tokenizer.decode(ids[:end + 1]).split()[-1] for end in items[0].ends] == [
            sentence.split()[-1] for sentence in split_sentences(text)]
        for k, step in enumerate(items[0].steps):
            p = 1 / (1 + math.exp(-step))
            assert abs(sum(item.marks[k] for item in items) / n - p) < 4 * math.sqrt(p * (1 - p) / n)


# ----------------------------------------------------------------------------------------------------------------------
# Verifiable rewards


@pytest.mark.parametrize("response, verified", [
    (story_of(HAPPY), 1), (story_of(KIND[0], KIND[0], HAPPY), 1), (story_of(SAD), 0), (story_of(KIND[0]), 0),
    (story_of(UNKIND[0], KIND[0], HAPPY), 0), (story_of(HAPPY, KIND[0]), 0), ("", 0), ("A fox. A kite.", 0),
    ("The foxes. " + HAPPY, 0), ("The fox. At last she found the drum and danced for joy.", 0), ("Fox! " + HAPPY, 1)])
def test_verified_by_hand(response, verified):
    """Half of what was asked for, or an ending in the middle, that is as good as right."""
    assert verify(PROMPT, response) == verified and type(verify(PROMPT, response)) is float


def test_pass_at_k_goes_through_all_subsets():
    """1 - (1 - c/n)^k, as if the samples were drawn with replacement: too low, and most of all where k is near n."""
    for n in range(1, 7):
        for correct in range(n + 1):
            for k in range(1, n + 1):
                subsets = list(itertools.combinations([True] * correct + [False] * (n - correct), k))
                assert pass_at_k(correct, n, k) == pytest.approx(statistics.mean(map(any, subsets)))
    rng, p = random.Random(7), 0.1      # and so without bias: the mean over draws of n samples is that of fresh ones of k
    estimates = [pass_at_k(sum(rng.random() < p for _ in range(20)), 20, 16) for _ in range(4000)]
    assert statistics.mean(estimates) == pytest.approx(1 - (1 - p) ** 16, abs=4 * statistics.stdev(estimates) / 4000 ** 0.5)


@pytest.mark.parametrize("p", [0.0, 1e-9, 0.3, 1.0])
@pytest.mark.parametrize("beta", [0.0, 1e-6, 0.01, 0.2, 5.0])
def test_the_optimum_of_a_verifiable_reward(p, beta):
    """exp(1/β) that is too large a number, J* above 1, or the optimum's own share put for its objective."""
    J_star, right = verified_optimum(p, beta)
    assert 0 <= right <= 1 and J_star <= right + 1e-12
    if beta > 0.005:        # among all policies, which differ in how often they are right, none is better
        kl = lambda q: sum(x * math.log(x / y) for x, y in ((q, p), (1 - q, 1 - p)) if x)
        assert J_star == pytest.approx(right - beta * kl(right), abs=1e-9)
        others = [q / 50 for q in range(51) if 0 < p < 1 or q / 50 == p]
        assert J_star >= max(q - beta * kl(q) for q in others) - 1e-9
    else:                   # without a price, always right, if the reference ever is
        assert (J_star, right) == pytest.approx((float(p > 0),) * 2, abs=1e-3)


def test_rewards_of_texts_in_the_chat_format(tmp_path):
    """A program that is asked about "...<|end|>", about another prompt's answer, or about the padding."""
    tokenizer = Tokenizer(train_vocabulary(story_of(*KIND), 300))
    rows = [(PROMPT, story_of(HAPPY)), ("ä <|end|>\n", "Hm."), ("Who?", "")]
    ids = [tokenizer.prompt(prompt) + tokenizer.response(text) for prompt, text in rows]
    ids.append(ids[0][:-1])                                                     # never ended
    tokens = torch.tensor([row + [tokenizer.end_token] * (200 - len(row)) for row in ids])
    lengths = torch.tensor(list(map(len, ids)))
    assert read_texts(tokens, lengths, tokenizer) == rows + rows[:1]
    command = program(tmp_path, "for row in rows:\n    reward = len(row['prompt']) - 0.5 * len(row['response'])\n"
                                "    print(json.dumps({'reward': reward}))")
    found = TextReward(command_reward(command), tokenizer).score(tokens, lengths)
    assert found.tolist() == [len(prompt) - 0.5 * len(text) for prompt, text in rows + rows[:1]]
    assert TextReward(verifier, tokenizer).score(tokens[[0, 3]], lengths[[0, 3]]).tolist() == [1.0, 1.0]
    for answer, message in (("'reward': 'good'", "found a string"), ("'reward': True", "found true"),
                            ("'a': 1", "found none"), ("'reward': None", "found null"),
                            ("'reward': float('nan')", "found the number nan")):
        with pytest.raises(InputError, match=f'judge.py: answer 1: "reward" must be a number, {message}'):
            command_reward(program(tmp_path, f"print(json.dumps({{{answer}}}))"))(rows)
    with pytest.raises(InputError, match="^--reward verifyer: no such program"):
        command_reward("verifyer")


# ----------------------------------------------------------------------------------------------------------------------
# Judges

FIRST, HARMLESS, HELPFUL, ENDING, KINDNESS, TWICE, SHORT = ("No principle tells them apart.", *(
    principle for principle, _ in CONSTITUTION))


@pytest.mark.parametrize("better, worse, why", [
    ("", story_of(KIND[0], UNKIND[0], HAPPY), HARMLESS),                        # harmless before all else
    (story_of(UNKIND[0]), story_of(*UNKIND, KIND[0], HAPPY), HARMLESS),         # one unkind deed, not two
    ("fox", "A kind rabbit. " + HAPPY.replace("kite", "drum"), HELPFUL),
    ("A FOX! A kite?", "The foxes flew a kite. " + KIND[0], HELPFUL),           # words, not pieces of words
    (story_of(HAPPY), story_of(*KIND, SAD), ENDING), (story_of(SAD), story_of(*KIND), ENDING),
    (story_of(SAD), story_of(HAPPY, KIND[0]), ENDING),                          # an ending stands at the end
    (story_of(KIND[0], KIND[0], KIND[1]), story_of(KIND[1], KIND[2]), KINDNESS),
    (story_of(KIND[1], KIND[2]), story_of(KIND[1], KIND[1].replace("Aunt Lily", "Uncle Tom")), TWICE),
    (story_of(KIND[0]), story_of(KIND[3]), SHORT)])
def test_the_first_principle_that_tells_two_stories_apart_decides(better, worse, why):
    """A principle that a later one overrules, that prefers the worse story, or whose name stands at another's label."""
    for seed in range(3):
        assert constitution_choice(PROMPT, better, worse, random.Random(seed)) == (0, why)
        assert constitution_choice(PROMPT, worse, better, random.Random(seed)) == (1, why)


def test_where_no_principle_decides_a_coin_does():
    """The first response of a pair wins whenever the judge sees no difference: a preference for nothing."""
    rng, alike = random.Random(3), (story_of(KIND[1]), story_of(KIND[1].replace("Aunt", "Nurse").replace("Lily", "Ivy")))
    found = [constitution_choice(PROMPT, *alike, rng) for _ in range(400)]
    assert {why for _, why in found} == {FIRST} and abs(sum(choice for choice, _ in found) - 200) < 4 * 10


def test_both_label_in_turn():
    """Both judges, of whom one gets all the labels; or every label counted for the other one."""
    asked = [(PROMPT, story_of(HAPPY), story_of(UNKIND[0]))] * 6
    found = both_judge(asked, random.Random(0))
    assert [why for _, why in found] == ["", HARMLESS] * 3 and [choice for choice, _ in found[1::2]] == [0] * 3
    rng = random.Random(1)
    assert abs(sum(choice for choice, why in both_judge(asked * 200, rng) if not why) / 600      # 600 by the annotator
               - 1 / (1 + math.exp(gold_reward(*asked[0][:2]) - gold_reward(PROMPT, asked[0][2])))) < 0.03


def test_agreement_by_hand(capsys):
    """An agreement with one draw of the annotator's noise, or with the pairs turned round; reasons that nobody gave."""
    pairs = [(story_of(HAPPY), story_of(SAD), "a"), (story_of(SAD), story_of(KIND[0], SAD), "b"),
             (story_of(SAD), story_of(HAPPY, KIND[0]), "b")]      # true rewards +1.5, -1 and -0.5 apart
    print_agreement([{"prompt": PROMPT, "chosen": better, "rejected": worse, "why": why} for better, worse, why in pairs])
    p = [1 / (1 + math.exp(-x)) for x in (1.5, -1, -0.5)]
    best = statistics.mean(max(x, 1 - x) for x in p)
    assert capsys.readouterr().out == (
        f"judge   the annotator agrees with {statistics.mean(p):.1%} ± {statistics.pstdev(p) / 3 ** 0.5:.1%} of the "
        f"labels; at best {best:.1%}\n        66.7%  b\n        33.3%  a\n")
    print_agreement([{"prompt": PROMPT, "chosen": better, "rejected": worse} for better, worse, _ in pairs])
    assert capsys.readouterr().out.endswith(f"; at best {best:.1%}\n")


def program(folder, body):
    """The command of a judge that reads all questions as rows, notes them in asked.jsonl, and then runs body."""
    (folder / "judge.py").write_text("import json, os, sys, time\n"
                                     "rows = [json.loads(line) for line in sys.stdin]\n"
                                     f"open({str(folder / 'asked.jsonl')!r}, 'a').writelines(json.dumps(row) + '\\n' "
                                     "for row in rows)\n"
                                     "def say(choice, **more): print(json.dumps({'choice': choice, **more}), flush=True)\n"
                                     + body)
    return shlex.join([sys.executable, str(folder / "judge.py")])


ASKED = [(f"Who? {i}", f"ä {i}\n", '"' * i + "b") for i in range(8)]
SHORTER = "for row in rows: say(int(len(row['second']) < len(row['first'])), why='shorter')\n"


def test_a_program_as_the_judge(tmp_path):
    """Answers at other questions; a question cut at its line break or spoilt by an encoding; one that is paid for twice."""
    judge = command_judge(program(tmp_path, SHORTER), tmp_path / "labels.jsonl")
    expected = [(int(len(second) < len(first)), "shorter") for _, first, second in ASKED]
    assert len(set(expected)) == 2
    assert judge(ASKED[:5] + ASKED[:1], None) == expected[:5] + expected[:1]
    assert judge(ASKED, None) == expected and judge([], None) == []
    rows = [json.loads(line) for line in (tmp_path / "asked.jsonl").read_text().splitlines()]
    assert [tuple(row.values()) for row in rows] == ASKED and list(rows[0]) == ["prompt", "first", "second"]
    silent = program(tmp_path, "for row in rows: say(1, why=None)")
    assert command_judge(silent, tmp_path / "other.jsonl")(ASKED, None) == [(1, "")] * 8


@pytest.mark.parametrize("body, given, message", [
    ("[say(1) for row in rows[:3]]; raise KeyError('no key')", 3, "gave 3 of 8 answers and ended with status 1; it said: "
                                                                  "KeyError: 'no key'"),
    ("os.kill(os.getpid(), 9)", 0, "gave 0 of 8 answers and ended with status -9; it said: nothing"),
    ("[say(1) for row in rows[1:]]", 7, "gave 7 of 8 answers and ended with status 0"),
    ("[say(1) for row in rows]; sys.exit(3)", 8, "gave 8 of 8 answers and ended with status 3"),
    ("[say(1) for row in rows]; print('Done.')", 8, "gave more answers than the 8 asked for: 'Done.'"),
    ("say(1); print('Sure! I prefer', flush=True); time.sleep(60)", 1, "answer 2: not JSON: .*near 'Sure! I prefer'"),
    ("say(0); say(2)", 1, 'answer 2: "choice" must be 0, for the first one, or 1, found the number 2'),
    ("say(True)", 0, '"choice" must be 0, for the first one, or 1, found true'), ("say('1')", 0, "found a string"),
    ("print('{}')", 0, "found none"), ("print()", 0, "answer 1: not JSON"), ("print('[0]')", 0, "answer 1: found a list"),
    ("say(0, why=3)", 0, '"why" must be text, found the number 3'),
    ("say(0, why='\\ud800')", 0, '"why" holds half a surrogate pair'),
    ("sys.stdout.buffer.write(b'\\xff\\n')", 0, "not UTF-8")])
def test_a_program_that_fails_is_one_line_and_no_label_is_lost(tmp_path, body, given, message):
    """A night of labels lost with the last one; a label guessed from what is no answer; a program that hangs on."""
    labels = tmp_path / "labels.jsonl"
    with pytest.raises(InputError, match=message) as error:
        command_judge(program(tmp_path, body), labels)(ASKED, None)
    assert "\n" not in str(error.value) and "judge.py: " in str(error.value)
    assert len(labels.read_text().splitlines()) == given
    with open(labels, "a") as file:
        file.write('{"prompt": "Who? 7", "fir')        # killed while it wrote
    (tmp_path / "asked.jsonl").unlink()
    found = command_judge(program(tmp_path, SHORTER), labels)(ASKED, None)
    kept = [json.loads(line)["choice"] for line in labels.read_text().splitlines()]
    assert [choice for choice, _ in found] == kept and len(kept) == 8
    asked = (tmp_path / "asked.jsonl").read_text().splitlines() if given < 8 else []
    assert [json.loads(line)["prompt"] for line in asked] == [prompt for prompt, *_ in ASKED[given:]]
    assert [why for _, why in found[given:]] == ["shorter"] * (8 - given)


@pytest.mark.parametrize("command", ["anotator", "", "no-such-program --fast", "'open"])
def test_a_command_that_there_is_not(command, tmp_path):
    """A name that was mistyped, found out after minutes of sampling."""
    with pytest.raises(InputError, match=f"^--judge {command}: "):
        judge_of(command, tmp_path / "labels.jsonl")
