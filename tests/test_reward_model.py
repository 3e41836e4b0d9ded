"""The Bradley-Terry reward model: its loss, its score, its pairs, its answer key, and the stage as
a whole."""

import contextlib
import itertools
import json
import math
import random
import shutil
import statistics
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import gpt
import reward_model
import sft
from data import annotator, stories
from data.answer_key import reward_model_figures
from data.corpus import draw_requests
from data.files import InputError, hold_out, read_pairs, write_jsonl
from data.judges import annotator_judge, constitution_choice
from data.run import Run, SilentRun, read_torch
from data.tokenizer import Pair, Tokenizer, encode_pairs, train as train_vocabulary
from helpers import cpu_only, metrics, snapshot, tiny_reward_model, untimed
from reward_model import RewardModel, bradley_terry_loss, score_all

V = 11


def tiny_model(seed=0, head=True):
    """A reward model in float64; with head=False its head is still at 0, as a new one's is."""
    torch.manual_seed(seed)
    model = RewardModel(gpt.GPTConfig(V, 64, n_layer=2, n_head=2, n_embd=32))
    if head:
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1 or parameter is model.head.weight:
                    parameter += 0.3 * torch.randn(parameter.shape)
    return model.double()


def random_rows(seed, count, longest=40):
    rng = random.Random(seed)
    return [[rng.randrange(V) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def random_pairs(seed, count):
    """Pairs of very different lengths."""
    prompts = random_rows(seed, count, 5)
    chosen = random_rows(seed + 100, count)
    rejected = random_rows(seed + 200, count)
    pairs = []
    for prompt, better, worse in zip(prompts, chosen, rejected):
        pairs.append(Pair(prompt + better, prompt + worse, len(prompt)))
    return pairs


def reward_of(model, ids):
    """A sequence's reward, without padding."""
    return model(torch.tensor([ids]))[0, -1]


def sigma(x):
    return 1 / (1 + math.exp(-x))


# --------------------------------------------------------------------------------------------------
# The loss


def test_the_lectures_numbers():
    """A sign that is wrong: the loss rewards the rejected answer, and is small all the same
    (CS 224R, ch. 6)."""
    high = torch.tensor([2.5])
    low = torch.tensor([1.0])
    assert bradley_terry_loss(high, low).item() == pytest.approx(0.201, abs=5e-4)
    assert bradley_terry_loss(low, high).item() == pytest.approx(1.70, abs=5e-3)
    assert math.exp(-bradley_terry_loss(high, low)) == pytest.approx(0.818, abs=5e-4)
    assert math.exp(-bradley_terry_loss(low, high)) == pytest.approx(0.182, abs=5e-4)
    assert bradley_terry_loss(high, high).item() == pytest.approx(math.log(2))

    # The mean over pairs, not the sum.
    both = bradley_terry_loss(torch.cat([high, low]), torch.cat([low, high]))
    assert both.item() == pytest.approx((0.2014 + 1.7014) / 2, abs=1e-4)


def test_only_differences_count():
    """A loss that depends on the rewards' level pushes it somewhere; Bradley-Terry leaves it
    free."""
    generator = torch.Generator().manual_seed(0)
    chosen, rejected = torch.randn(2, 50, dtype=torch.float64, generator=generator)
    shifted = bradley_terry_loss(chosen + 7, rejected + 7)
    torch.testing.assert_close(shifted, bradley_terry_loss(chosen, rejected))


def test_gradient_is_the_probability_of_the_other_order():
    """-(1 - P) for the winner, +(1 - P) for the loser: a pair that is surely right must not pull
    any more."""
    chosen = torch.tensor([2.5, 1.0, 0.0], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([1.0, 2.5, 0.0], dtype=torch.float64, requires_grad=True)
    (3 * bradley_terry_loss(chosen, rejected)).backward()
    p = [sigma(1.5), sigma(-1.5), sigma(0.0)]
    assert chosen.grad.tolist() == pytest.approx([-(1 - x) for x in p])
    assert rejected.grad.tolist() == pytest.approx([1 - x for x in p])


def test_large_differences_do_not_overflow():
    """log(sigmoid(x)) in two steps is -inf from a difference of -104 in float32, and its gradient
    NaN."""
    chosen = torch.tensor([-200.0, 300.0], requires_grad=True)
    rejected = torch.tensor([200.0, -300.0])
    loss = bradley_terry_loss(chosen, rejected)
    loss.backward()
    assert loss.item() == pytest.approx(200)
    assert chosen.grad.tolist() == pytest.approx([-0.5, 0])


# --------------------------------------------------------------------------------------------------
# The model


def test_score_reads_the_last_token_whatever_the_padding():
    """A score read at column -1 is that of the padding; one that looks for the padding token stops
    at the first <|end|>."""
    model = tiny_model(1)
    rows = random_rows(1, 12)
    alone = torch.stack([reward_of(model, row) for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        tokens = torch.randint(V, (12, 50), generator=generator)
        for i, row in enumerate(rows):
            tokens[i, :len(row)] = torch.tensor(row)
        torch.testing.assert_close(model.score(tokens, lengths), alone)
    for batch in (1, 5, 128):
        torch.testing.assert_close(score_all(model, rows, batch), alone.detach())
    assert alone.std() > 0.1


@pytest.mark.parametrize("length", [0, 51])
def test_a_length_outside_of_the_tokens_is_an_error(length):
    """A row without a last token drops out of the scores, and those behind it move up by one."""
    tokens = torch.zeros(3, 50, dtype=torch.long)
    with pytest.raises(RuntimeError, match="out of bounds"):
        tiny_model(1).score(tokens, torch.tensor([4, length, 5]))


def test_a_column_depends_on_no_later_token():
    """A value that has seen the rest of the answer: perfect in training, useless in PPO."""
    model = tiny_model(2)
    tokens = torch.randint(V, (1, 20), generator=torch.Generator().manual_seed(2))
    other = tokens.clone()
    other[0, 8] = (tokens[0, 8] + 1) % V
    changed = (model(tokens) - model(other)).abs()[0] > 1e-9
    assert model(tokens).shape == (1, 20)
    assert changed.tolist() == [False] * 8 + [True] * 12


def hidden_states(model):
    """A list that gets what the trunk's final norm gives, from here on."""
    states = []
    model.trunk.ln_f.register_forward_hook(
        lambda module, inputs, output: states.append(output.detach()))
    return states


def test_the_final_norm_is_applied_once():
    """A head behind a second LayerNorm: the reward model then isn't the SFT model with another
    head."""
    model = tiny_model(3)
    tokens = torch.randint(V, (2, 9), generator=torch.Generator().manual_seed(3))
    states = hidden_states(model)
    rewards = model(tokens).detach()
    assert len(states) == 1
    by_hand = (states[0] * model.head.weight[0]).sum(dim=2) + model.head.bias
    torch.testing.assert_close(rewards, by_hand.float(), check_dtype=False)
    logits = states[0] @ model.trunk.wte.weight.T   # the same hidden state, the language model's
    torch.testing.assert_close(logits, model.trunk(tokens))


def test_scores_are_float32_under_autocast():
    """A bf16 head: scores near 3 are rounded to 1/64, and two answers that differ get one score."""
    model = tiny_model(3).float()
    with torch.no_grad():
        model.head.weight *= 4
    tokens = torch.randint(V, (3, 12), generator=torch.Generator().manual_seed(3))
    states = hidden_states(model)
    inside = []
    model.trunk.h[0].mlp.c_fc.register_forward_hook(
        lambda module, inputs, output: inside.append(output.dtype))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        rewards = model(tokens)
        assert torch.is_autocast_enabled("cpu")
        rounded = model.head(states[0]).squeeze(2)
    assert inside == [torch.bfloat16]       # the trunk is what bf16 makes faster
    assert rewards.dtype == torch.float32 and rounded.dtype == torch.bfloat16
    with torch.no_grad():
        assert torch.equal(rewards, model.head(states[0].float()).squeeze(2))
    assert (rewards - rounded.float()).abs().max() > 0.002      # so the comparison means something


def one_step(train, model, items, micro_batch, monkeypatch):
    """Let a training loop, fit or fit_process, take one step on all items, which are held out too;
    the weights stay. Returns (the gradients, the row of figures)."""
    gradients = []

    def look(optimizer, model, lr):
        gradients.extend(parameter.grad.clone() for parameter in model.parameters())

    monkeypatch.setattr(reward_model, "optimizer_step", look)
    config = reward_model.Config(batch=len(items), micro_batch=micro_batch)
    run = SilentRun()
    train(model, items, items, config, random.Random(0), run)
    assert len(gradients) == len(list(model.parameters()))
    return gradients, run.rows[-1]


def test_a_new_head_starts_at_log_2(monkeypatch):
    """A random head: the first steps unlearn it, and the trunk with it."""
    model = tiny_model(4, head=False)
    pairs = random_pairs(4, 6)
    assert score_all(model, [pair.chosen for pair in pairs]).tolist() == [0.0] * 6
    _, row = one_step(reward_model.fit, model, pairs, 6, monkeypatch)
    assert row["loss"] == pytest.approx(math.log(2))
    assert model.head.weight.grad.any()


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 7, 64])
def test_micro_batches_give_the_gradient_of_the_whole_batch(micro_batch, monkeypatch):
    """A last micro-batch that is smaller and counts as much as the others; chosen and rejected cut
    apart at the wrong row; an accuracy of 30 % that is one of 70 % with a sign turned."""
    model = tiny_model(5)
    twin = tiny_model(5)
    pairs = random_pairs(5, 7)
    gradients, row = one_step(reward_model.fit, model, pairs, micro_batch, monkeypatch)

    # Pair by pair, without padding.
    margins = [reward_of(twin, pair.chosen) - reward_of(twin, pair.rejected) for pair in pairs]
    margin = torch.stack(margins)
    loss = torch.log1p(torch.exp(-margin)).mean()
    loss.backward()
    for ours, theirs in zip(gradients, twin.parameters()):
        torch.testing.assert_close(ours, theirs.grad, atol=1e-6, rtol=1e-4)

    accuracy = (margin > 0).double().mean().item()
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-5) == row["held_out_loss"]
    assert row["held_out_accuracy"] == pytest.approx(accuracy) and 0 < accuracy < 1
    found = reward_model.held_out_margins(model, pairs).tolist()
    assert found == pytest.approx(margin.tolist(), abs=1e-5)


# --------------------------------------------------------------------------------------------------
# Pairs


@pytest.fixture(scope="module")
def tokenizer():
    rng = random.Random(7)
    text = "\n".join(stories.document(rng).text for _ in range(50))
    return Tokenizer(train_vocabulary(text, 400))


def test_pairs_that_teach_nothing_or_do_not_fit_are_dropped(tokenizer):
    """A pair of equal texts adds log 2 to every loss; a pair that is cut is scored on a text that
    nobody chose."""
    rows = [{"prompt": "Hi.", "chosen": "Good morning to you.", "rejected": "No."},
            {"prompt": "Hi.", "chosen": "No.", "rejected": "No."},
            {"prompt": "Hi.", "chosen": "No.", "rejected": "Good morning to you."},
            {"prompt": "Hi.", "chosen": "No.", "rejected": "No. "}]
    prompt = tokenizer.prompt("Hi.")
    pairs = []
    for row in rows:
        pairs.append(Pair(prompt + tokenizer.response(row["chosen"]),
                          prompt + tokenizer.response(row["rejected"]), len(prompt)))
    longest = len(pairs[0].chosen)
    for block_size, kept, longer in ((longest, [0, 2, 3], 0), (longest - 1, [3], 2)):
        dropped = {"longer than the context": longer, "equal texts": 1}
        expected = [pairs[i] for i in kept], [rows[i] for i in kept], dropped
        assert encode_pairs(rows, tokenizer, block_size) == expected


class Writer:
    """Stands in for reward_model.respond: the world's own stories; some never end, come twice or
    are blank."""

    def __init__(self, tokenizer, broken=True):
        self.rng = random.Random(9)
        self.tokenizer = tokenizer
        self.broken = broken
        self.seeds = []
        self.answers = []   # (request, text, whether it ended)

    def __call__(self, model, tokenizer, prompts, max_new_tokens, seed):
        self.seeds.append(seed)
        texts = []
        ended = []
        for ids in prompts:
            request = self.tokenizer.decode(ids[1:-1])
            copy = self.broken and len(texts) % 2 == 1 and self.rng.random() < 0.2
            blank = self.broken and self.rng.random() < 0.1
            if copy:
                texts.append(texts[-1])
            elif blank:
                texts.append(self.rng.choice(["", " \n", "a\0b"]))
            else:
                texts.append(stories.story(self.rng, request).text)
            ended.append(not self.broken or self.rng.random() > 0.1)
            self.answers.append((request, texts[-1], ended[-1]))
        return texts, ended


def of_context(block_size):
    """A policy of which only the context matters."""
    return SimpleNamespace(config=SimpleNamespace(block_size=block_size))


def gold_margin(row):
    chosen = annotator.gold_reward(row["prompt"], row["chosen"])
    return chosen - annotator.gold_reward(row["prompt"], row["rejected"])


def test_collected_pairs_are_comparable_and_labelled_by_the_annotator(tokenizer, monkeypatch,
                                                                      tmp_path):
    """An answer under another's prompt, an unfinished one compared with a whole one, or a label
    that is turned round."""
    writer = Writer(tokenizer)
    monkeypatch.setattr(reward_model, "respond", writer)
    config = reward_model.Config(sample_batch=64)
    rows, dropped = reward_model.collect_pairs(of_context(1000), tokenizer, draw_requests, 400,
                                               annotator_judge, config, random.Random(10))

    pairs = list(zip(writer.answers[::2], writer.answers[1::2]))
    assert all(first[0] == second[0] for first, second in pairs)    # both answer one request
    counts = {"no end": 0, "blank": 0, "equal texts": 0}
    usable = []
    for (request, first, first_ended), (_, second, second_ended) in pairs:
        if not (first_ended and second_ended):
            counts["no end"] += 1
        elif not (first.strip() and second.strip()) or "\0" in first + second:
            counts["blank"] += 1
        elif first == second:
            counts["equal texts"] += 1
        else:
            usable.append((request, first, second))
    assert len(rows) == len(usable) == 400
    for row, (request, first, second) in zip(rows, usable):
        assert list(row) == ["prompt", "chosen", "rejected"] and row["prompt"] == request
        assert {row["chosen"], row["rejected"]} == {first, second}
    assert dropped == counts and min(counts.values()) > 10

    write_jsonl(tmp_path / "pairs.jsonl", rows)
    assert read_pairs(tmp_path / "pairs.jsonl") == rows     # dpo.py will read this file
    assert len(set(writer.seeds)) == len(writer.seeds) > 5  # fresh samples in every batch

    # As noisy as Bradley-Terry, no more, no less; no preference for the first answer.
    gold = [gold_margin(row) for row in rows]
    p = [sigma(abs(g)) for g in gold]
    wins = sum(g > 0 for g in gold) + 0.5 * sum(g == 0 for g in gold)
    assert abs(wins - sum(p)) < 4 * math.sqrt(sum(x * (1 - x) for x in p))
    first_wins = sum(row["chosen"] == first for row, (_, first, _) in zip(rows, usable))
    assert abs(first_wins - 200) < 4 * 10


def test_a_reward_model_judges_with_bradley_terrys_noise(tokenizer):
    """The better score always, which no finite margin can fit; a choice turned round, or of another
    pair's scores."""
    model = tiny_reward_model(1, vocab=tokenizer.n_vocab, block_size=64)
    model.head.weight.data *= 0.3
    judge = reward_model.reward_model_judge(model, tokenizer)
    asked = [("Hi.", "Good morning.", "No."), ("Hi.", "No.", "Good morning."),
             ("Who?", "A fox.", "Me."), ("Why?", "So.", "So so.")]
    p = []
    for prompt, *texts in asked:
        first, second = [reward_of(model, tokenizer.prompt(prompt) + tokenizer.response(text))
                         for text in texts]
        p.append(sigma((first - second).item()))
    assert p[0] == pytest.approx(1 - p[1], abs=1e-5) and max(p) - min(p) > 0.3 and 0.02 < min(p)

    rng = random.Random(3)
    chosen = []
    for times in (1, 5):
        for _ in range(500):
            chosen.append([choice for choice, _ in judge(asked * times, rng)[:4]])
    chosen = torch.tensor(chosen)
    assert set(chosen.unique().tolist()) == {0, 1}
    for share, x in zip((chosen == 0).double().mean(dim=0).tolist(), p):    # 0: the first one
        assert abs(share - x) < 4 * math.sqrt(x * (1 - x) / 1000)

    # The noise is that of the rng; a batch in which nothing is usable.
    assert judge(asked, random.Random(5)) == judge(asked, random.Random(5))
    assert judge([], rng) == [] == annotator_judge([], rng)


def test_another_judge_and_prompts_of_a_users_own(tokenizer, monkeypatch):
    """The annotator asked, who knows no reward there; requests of the world beside one's own; an
    unusable pair that is judged; a sample that, encoded anew, no longer fits the context, and ends
    in a traceback of the judge's."""
    answers = {"Hi.": ["Good morning.", "No."], "Who?": ["Me.", "Me."],
               "Why?": ["So. " * 9, "So."], "How?": [" ", "So."]}
    asked = []

    def respond(model, tokenizer, prompts, max_new_tokens, seed):
        texts = []
        for i, ids in enumerate(prompts):
            texts.append(answers[tokenizer.decode(ids[1:-1])][i % 2])
        return texts, [True] * len(texts)

    def judge(batch, rng):
        asked.extend(batch)
        return [(1, "")] * len(batch)

    def draw_prompts(count, rng):
        return rng.choices(list(answers), k=count)

    monkeypatch.setattr(reward_model, "respond", respond)
    config = reward_model.Config(sample_batch=2)
    for context, kept in ((20, {"Hi."}), (1000, {"Hi.", "Why?"})):
        asked.clear()
        rows, dropped = reward_model.collect_pairs(of_context(context), tokenizer, draw_prompts, 12,
                                                   judge, config, random.Random(2))
        assert len(rows) == len(asked) == 12
        assert {row["prompt"] for row in rows} == kept == {prompt for prompt, _, _ in asked}
        for row in rows:
            assert [row["rejected"], row["chosen"]] == answers[row["prompt"]]  # the second one won
        assert dropped["blank"] and dropped["equal texts"]
        assert bool(dropped["no end"]) == (context == 20)


def test_a_policy_that_never_ends_is_named(tokenizer, monkeypatch):
    """Sampling for ever, without a word, from a model that was not taught to stop."""
    def respond(model, tokenizer, prompts, *_):
        return ["a"] * len(prompts), [False] * len(prompts)

    monkeypatch.setattr(reward_model, "respond", respond)
    with pytest.raises(InputError, match="0 can be compared, dropped 55 no end, .* 96 if"):
        reward_model.collect_pairs(of_context(1000), tokenizer, draw_requests, 5, annotator_judge,
                                   reward_model.Config(), random.Random(0))


def rollout_of(rows, tokenizer):
    """A Rollout of (prompt, text, whether it ended)."""
    sequences = []
    prompt_lengths = []
    for prompt, text, ended in rows:
        ids = tokenizer.prompt(prompt)
        prompt_lengths.append(len(ids))
        response = tokenizer.response(text)
        sequences.append(ids + (response if ended else response[:-1]))
    tokens, lengths = gpt.pad(sequences)
    return gpt.Rollout(tokens, torch.tensor(prompt_lengths), lengths)


def test_gold_rewards_judges_each_response_by_its_own_prompt(tokenizer):
    """A gold reward of "...<|end|>", or of the answer to another request: all of them wrong by the
    same amount."""
    rng = random.Random(11)
    rows = []
    for i in range(6):
        prompt = stories.request(rng).text
        rows.append((prompt, stories.story(rng, prompt).text, i % 2 == 0))
    found = annotator.gold_rewards(rollout_of(rows, tokenizer), tokenizer)
    expected = [annotator.gold_reward(prompt, text) for prompt, text, _ in rows]
    assert found.tolist() == pytest.approx(expected)


# --------------------------------------------------------------------------------------------------
# The answer key


def simulated_labels(n=40000, seed=12):
    """Winner-first margins of the truth, as an annotator with Gumbel noise would give them."""
    generator = torch.Generator().manual_seed(seed)
    delta = 2 * torch.randn(n, generator=generator)     # gold(first) - gold(second)
    first = torch.rand(n, generator=generator) < torch.sigmoid(delta)
    return torch.where(first, delta, -delta)


def test_the_true_reward_reaches_the_best_possible_figures():
    """A Bayes accuracy that the truth itself does not reach, or surpasses: then no distance to it
    means anything."""
    gold = simulated_labels()
    figures, table = reward_model_figures(gold, gold)
    bayes = figures["bayes_accuracy"]
    assert figures["slope"] == pytest.approx(1) and figures["correlation"] == pytest.approx(1)
    assert figures["accuracy"] == pytest.approx(bayes, abs=4 * 0.5 / 200)   # 40,000 labels' 4 sigma
    assert figures["expected_accuracy"] == pytest.approx(bayes)             # without their noise
    assert figures["loss"] == pytest.approx(figures["annotator_loss"], abs=0.02)
    assert 0.7 < bayes < 0.9
    assert sum(count for count, _, _ in table) == 2 * len(gold) and len(table) == 10
    for count, predicted, observed in table:    # both orders: not independent
        assert observed == pytest.approx(predicted, abs=4 * math.sqrt(2 * 0.25 / count))


def test_above_chance_runs_from_a_coin_to_the_truth():
    """A share of Bayes accuracy alone: a coin has two thirds of it."""
    gold = simulated_labels()
    truth, _ = reward_model_figures(gold, gold)
    assert truth["above_chance"] == pytest.approx(1) == truth["share_of_bayes"]
    for name in ("above_chance_error", "share_of_bayes_error"):
        assert truth[name] == pytest.approx(0, abs=1e-9)
    guesses = torch.randn(len(gold), generator=torch.Generator().manual_seed(14))
    coin, _ = reward_model_figures(guesses, gold)
    assert abs(coin["above_chance"]) < 4 * coin["above_chance_error"] < 0.08
    share = 0.5 / coin["bayes_accuracy"]
    assert abs(coin["share_of_bayes"] - share) < 4 * coin["share_of_bayes_error"]
    assert coin["share_of_bayes"] > 0.6
    wrong, _ = reward_model_figures(-gold, gold)
    assert wrong["above_chance"] == pytest.approx(-1)


def test_standard_errors_are_the_spread_of_repeated_measurements():
    """An error of a ratio as if its two means came from different pairs, a variance for its root, a
    forgotten 1/√n."""
    generator = torch.Generator().manual_seed(15)
    measured = []
    for _ in range(400):
        delta = 2 * torch.randn(200, generator=generator)
        margin = delta + 2 * torch.randn(200, generator=generator)
        prefers_first = torch.rand(200, generator=generator) < torch.sigmoid(delta)
        sign = torch.where(prefers_first, 1, -1)
        figures, _ = reward_model_figures(sign * margin, sign * delta)
        measured.append(figures)
    for name in ("expected_accuracy", "share_of_bayes", "above_chance"):
        spread = statistics.stdev(figures[name] for figures in measured)    # to 1 / √800, 3.5 %
        error = statistics.mean(figures[f"{name}_error"] for figures in measured)
        assert error == pytest.approx(spread, rel=0.14)


def test_an_overconfident_model_is_seen():
    """A scale that the answer key does not see: a model twice too sure has the same accuracy and
    correlation."""
    gold = simulated_labels()
    truth, _ = reward_model_figures(gold, gold)
    figures, table = reward_model_figures(2 * gold, gold)
    assert figures["slope"] == pytest.approx(2) and figures["correlation"] == pytest.approx(1)
    assert figures["loss"] > truth["loss"] + 0.02
    for name in ("accuracy", "expected_accuracy", "annotator_loss", "bayes_accuracy"):
        assert figures[name] == truth[name]
    for _, predicted, observed in table:
        if 0.6 < predicted < 0.95:
            assert observed < predicted - 0.02


def test_expected_accuracy_is_the_accuracy_over_all_labels():
    """An expectation that hangs on the labels which happened to be drawn, or that is not the
    accuracy's."""
    generator = torch.Generator().manual_seed(13)
    for seed in range(5):
        # First minus second response; then all 64 sets of labels, 1: the first is preferred.
        delta, margin = 1.5 * torch.randn(2, 6, dtype=torch.float64, generator=generator)
        expected = 0.0
        bayes = 0.0
        loss = 0.0
        total = 0.0
        outcomes = []
        for signs in itertools.product((1, -1), repeat=6):
            sign = torch.tensor(signs, dtype=torch.float64)
            probability = math.prod(sigma(x) for x in (sign * delta).tolist())
            figures, _ = reward_model_figures(sign * margin, sign * delta)
            truth, _ = reward_model_figures(sign * delta, sign * delta)
            outcomes.append(figures)
            total += probability
            expected += probability * figures["accuracy"]
            bayes += probability * truth["accuracy"]
            loss += probability * truth["loss"]
        assert total == pytest.approx(1)
        for figures in outcomes:
            assert figures["expected_accuracy"] == pytest.approx(expected)
            assert figures["bayes_accuracy"] == pytest.approx(bayes)
            assert figures["annotator_loss"] == pytest.approx(loss)
            assert figures["expected_accuracy"] <= figures["bayes_accuracy"] + 1e-12
        assert len({figures["accuracy"] for figures in outcomes}) > 3   # which the labels do change


def test_the_answer_key_by_hand():
    """Two pairs, and every figure from its definition."""
    gold = torch.tensor([2.0, -0.5])
    figures, table = reward_model_figures(torch.tensor([0.5, -1.0]), gold)
    entropies = [-sigma(g) * math.log(sigma(g)) - sigma(-g) * math.log(sigma(-g))
                 for g in gold.tolist()]
    covariance = 0.5 * 2 + 1 * 0.5
    assert figures == pytest.approx({
        "accuracy": 0.5,
        # the model prefers y_w in the first, y_l in the second pair
        "expected_accuracy": (sigma(2.0) + sigma(0.5)) / 2,
        "expected_accuracy_error": (sigma(2.0) - sigma(0.5)) / 2 / math.sqrt(2),
        "bayes_accuracy": (sigma(2.0) + sigma(0.5)) / 2,
        "share_of_bayes": 1, "share_of_bayes_error": 0, "above_chance": 1, "above_chance_error": 0,
        "loss": -(math.log(sigma(0.5)) + math.log(sigma(-1.0))) / 2,
        "annotator_loss": sum(entropies) / 2,
        "correlation": covariance / math.sqrt((0.25 + 1) * (4 + 0.25)),
        "slope": covariance / (4 + 0.25)})

    # predictions 0.622 (won), 0.378 (lost), 0.269 (won), 0.731 (lost), by bins of a tenth
    predicted = [sigma(-1.0), sigma(-0.5), sigma(0.5), sigma(1.0)]
    assert [row[0] for row in table] == [1, 1, 1, 1]
    assert [row[1] for row in table] == pytest.approx(predicted)
    assert [row[2] for row in table] == [1, 0, 1, 0]

    # An untrained model, an annotator who sees no difference; probabilities of exactly 0 and 1.
    figures, _ = reward_model_figures(torch.zeros(2), torch.zeros(2))
    assert all(math.isfinite(value) for value in figures.values())
    assert figures["loss"] == pytest.approx(math.log(2))
    _, (low, high) = reward_model_figures(torch.tensor([50.0, 40.0]), gold)
    assert low == pytest.approx((2, 0, 0)) and high == pytest.approx((2, 1, 1))


# --------------------------------------------------------------------------------------------------
# Before and after


@pytest.mark.parametrize("world, scored",
                         [(True, True), (True, False), (False, True), (False, False)])
def test_the_text_that_is_shown_is_the_median_one(tokenizer, monkeypatch, capsys, world, scored):
    """The luckiest of 33 prompts shown as the rule; a text beside another's scores; the reward
    model's opinion where the true reward is known; two seeds, or a temperature at which the policy
    was not trained; a reward of which the tokens' part is left out."""
    before = of_context(400)
    after = of_context(400)
    rng = random.Random(16)
    calls = []
    prompts = None
    if not world:
        prompts = [f"Color {i}?" for i in range(40)] + ["long " * 400]

    def generate(policy, ids, max_new_tokens, end_token, temperature, seed, rows):
        asked = [tokenizer.decode(row[1:-1]) for row in ids]
        texts = []
        for i, request in enumerate(asked):
            text = "Red " * rng.randrange(30) + f"{i}."
            if world:
                text = stories.story(rng, request).text
            texts.append(text)
        calls.append((policy, temperature, seed, asked, texts))
        return rollout_of([(*row, True) for row in zip(asked, texts)], tokenizer)

    def score(lengths):     # nothing like gold
        return lengths * 37 % 101 / 10

    def reward(rollout):
        token_rewards = torch.zeros(rollout.tokens[:, 1:].shape)
        token_rewards[:, 3] = score(rollout.lengths) - 1
        return torch.ones(len(rollout.lengths)), token_rewards

    monkeypatch.setattr(sft, "generate", generate)
    config = reward_model.Config(seed=5, max_new_tokens=96)
    sft.show_before_and_after(prompts, before, after, tokenizer, config,
                              reward if scored else None, 0.7)
    (policy, temperature, seed, asked, _), again = calls
    assert (policy, temperature, seed) == (before, 1.0, 5) and again[:4] == (after, 0.7, 5, asked)
    assert len(set(asked)) == 33 if world else asked == prompts[:33]

    figures = {}    # what is known of the answers of the two policies
    if scored:
        figures["reward"] = []
    if world:
        figures["gold"] = []
    for *_, texts in calls:
        rewards = []
        golds = []
        for prompt, text in zip(asked, texts):
            rewards.append(score(len(tokenizer.prompt(prompt) + tokenizer.response(text))))
            golds.append(annotator.gold_reward(prompt, text) if world else None)
        if scored:
            figures["reward"].append(rewards)
        if world:
            figures["gold"].append(golds)

    head, *shown = capsys.readouterr().out.splitlines()
    which = asked.index(shown[0].removeprefix("prompt   "))
    for i, label in enumerate(("before", "after")):
        text = calls[i][-1][which]
        if figures:
            tags = ", ".join(f"{name} {found[i][which]:+.2f}" for name, found in figures.items())
            text = f"[{tags}] {text}"
        assert shown[1 + i] == f"{label:9s}{text}"
    assert len(shown) == 3

    expected = []
    for name, (x, y) in figures.items():    # gold, if it is known, comes last and decides
        gains = [after - before for before, after in zip(x, y)]
        expected.append(f"{name} {statistics.mean(x):.2f} → {statistics.mean(y):.2f} "
                        f"(± {statistics.pstdev(gains) / math.sqrt(33):.2f})")
    sentence = "before and after on 33 held-out prompts"
    if figures:
        sentence += ": " + "; ".join(expected)
        assert gains[which] == pytest.approx(statistics.median(gains))
    assert head == sentence


# --------------------------------------------------------------------------------------------------
# The stage


def color_pairs(count):
    return [{"prompt": f"Color {i}?", "chosen": f"Red {i % 5}.", "rejected": f"Mud {i % 7}."}
            for i in range(count)]


PAIRS = color_pairs(60)
SMALL = "--n_layer 1 --n_head 2 --n_embd 32 --batch 8".split()


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """A folder with a tiny base model and a tiny SFT model that answers questions about colors with
    good and bad."""
    folder = tmp_path_factory.mktemp("policy")
    (folder / "corpus.txt").write_text("".join(" ".join(row.values()) + "\n" for row in PAIRS) * 2)
    rows = []
    for row in PAIRS:
        rows.append({"prompt": row["prompt"], "completion": row["chosen"]})
        rows.append({"prompt": row["prompt"], "completion": row["rejected"]})
    write_jsonl(folder / "rows.jsonl", rows)
    write_jsonl(folder / "pairs.jsonl", PAIRS)
    common = ["--size", "cpu", "--out", str(folder)]
    flags = "--vocab_size 290 --block_size 64 --steps 10 --report 10"
    gpt.main([*common, *SMALL, "--text", str(folder / "corpus.txt"), *flags.split()])
    flags = "--batch 8 --lr 0.01 --max_new_tokens 20"
    sft.main([*common, "--data", str(folder / "rows.jsonl"), *flags.split()])
    return folder


def load(path, stage="reward_model"):
    model, _, _ = gpt.load_checkpoint(path, stage, "cpu", model_class=RewardModel)
    return model


def train(folder, *flags):
    """Run the script; the model that it leaves."""
    common = "--size cpu --max_new_tokens 20 --batch 8 --warmup 1 --lr 0.01".split()
    reward_model.main([*common, "--out", str(folder), *flags])
    return load(folder / "cpu/reward_model/checkpoint.pt")


@contextlib.contextmanager
def stopped_after(step, stage="reward_model"):
    """A stage's run inside is stopped after this step, when its state has been saved if it was
    due."""
    end_step = Run.end_step

    def stop(run, state):
        end_step(run, state)
        if (run.stage, run.step) == (stage, step):
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "end_step", stop)
        yield


def check_same(folder, other):
    """Two runs have left the same weights and figures."""
    found = read_torch(folder / "checkpoint.pt")["model"]
    expected = read_torch(other / "checkpoint.pt")["model"]
    assert found.keys() == expected.keys()
    assert all(torch.equal(x, expected[name]) for name, x in found.items())
    assert untimed(metrics(folder / "metrics.jsonl")) == untimed(metrics(other / "metrics.jsonl"))


def share_right(margin):
    return (margin > 0).float().mean().item()


def test_training_on_your_own_pairs(policy, capsys):
    """Rewards that are shifted the wrong way, rescaled, or saved before the shift; a trunk that
    isn't the SFT model's."""
    model = train(policy, "--data", str(policy / "pairs.jsonl"), "--epochs", "3")
    sft_model, tokenizer, _ = gpt.load_checkpoint(policy / "cpu/sft/checkpoint.pt", "sft", "cpu")

    # 1. It learnt what was preferred, and stayed near the SFT model, from which it started.
    pairs, _, _ = encode_pairs(PAIRS, tokenizer, 64)
    margin = reward_model.held_out_margins(model, pairs)
    assert share_right(margin) > 0.95 and margin.mean() > 1
    before = sft_model.wte.weight
    assert (model.trunk.wte.weight - before).abs().mean() < 0.5 * before.abs().mean()

    # 2. The mean over fresh samples of the SFT model is 0, within the samples' own error.
    prompts = [tokenizer.prompt(row["prompt"]) for row in PAIRS * 10]
    rollout = gpt.generate(sft_model, prompts, 20, tokenizer.end_token, seed=99)
    scores = model.score(rollout.tokens, rollout.lengths).detach()
    assert scores.mean().abs() < 4 * scores.std() * (1 / 512 + 1 / 600) ** 0.5
    assert scores.std() > 0.5

    # 3. The scale is the loss's own: what was printed before the shift is what the saved model has.
    printed = capsys.readouterr().out
    deviation = float(printed.split("standard deviation ")[1].split()[0])
    assert scores.std().item() == pytest.approx(deviation, rel=0.2)
    *_, row = metrics(policy / "cpu/reward_model/metrics.jsonl")
    train_rows, held_out_rows = hold_out(PAIRS)
    held_out, _, _ = encode_pairs(held_out_rows, tokenizer, 64)
    margin = reward_model.held_out_margins(model, held_out)
    loss = F.softplus(-margin).mean().item()
    assert row["held_out_loss"] == pytest.approx(loss, rel=1e-3, abs=1e-5)
    assert row["held_out_accuracy"] == pytest.approx(share_right(margin))

    # 4. The files beside the checkpoint are the pairs it was made of, for a dpo.py without --data.
    assert read_pairs(policy / "cpu/reward_model/pairs.jsonl") == train_rows
    assert read_pairs(policy / "cpu/reward_model/held_out.jsonl") == held_out_rows
    assert " 57 pairs, dropped 0 longer than the context, 0 equal texts\n" in printed
    assert " 3 held out, dropped 0 longer than the context, 0 equal texts\n" in printed


def test_the_files_hold_what_was_trained_on(policy, tmp_path, capsys):
    """A pair that was dropped here and comes back in DPO; files of the little world's pairs beside
    a model of others."""
    rows = list(PAIRS)
    for row in PAIRS:
        rows.append({**row, "chosen": "Red " * 100})
        rows.append({**row, "chosen": row["rejected"]})
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    train(policy, "--data", str(tmp_path / "pairs.jsonl"))
    train_rows, held_out_rows = hold_out(PAIRS)  # the same prompts, so the same ones held out
    assert read_pairs(policy / "cpu/reward_model/pairs.jsonl") == train_rows
    assert read_pairs(policy / "cpu/reward_model/held_out.jsonl") == held_out_rows
    printed = capsys.readouterr().out
    assert " 57 pairs, dropped 57 longer than the context, 57 equal texts\n" in printed
    assert " 3 held out, dropped 3 longer than the context, 3 equal texts\n" in printed


def test_one_seed_one_result(policy):
    """An order of pairs that nobody seeded."""
    runs = []
    for _ in range(2):
        random.seed()
        torch.rand(5)
        model = train(policy, "--data", str(policy / "pairs.jsonl"))
        runs.append([parameter.tolist() for parameter in model.parameters()])
    assert runs[0] == runs[1]


@pytest.mark.parametrize("given", [False, True])
def test_the_learning_curve_uses_the_stages_pairs_or_the_file(policy, tmp_path, monkeypatch, capsys,
                                                              given):
    """A curve over other pairs than the checkpoint's, or, with --data, over those instead of the
    file's; one whose points start from one another, or that costs the checkpoint."""
    for name, count in (("stage", 320), ("given", 340)):
        write_jsonl(tmp_path / f"{name}.jsonl", color_pairs(count))
    train(policy, "--data", str(tmp_path / "stage.jsonl"), "--batch", "32")
    before = snapshot(policy)
    sft_model, tokenizer, _ = gpt.load_checkpoint(policy / "cpu/sft/checkpoint.pt", "sft", "cpu",
                                                  gpt.get_device())
    points = []
    fit = reward_model.fit

    def spy(model, pairs, held_out, *rest):
        for ours, theirs in zip(model.trunk.parameters(), sft_model.parameters()):
            assert torch.equal(ours, theirs)
        assert not model.head.weight.any()
        points.append((model, pairs, held_out))
        fit(model, pairs, held_out, *rest)

    monkeypatch.setattr(reward_model, "fit", spy)
    capsys.readouterr()
    stage = policy / "cpu/reward_model"
    if given:
        source = tmp_path / "given.jsonl"
        train(policy, "--learning_curve", "--batch", "32", "--data", str(source))
        train_rows, held_out_rows = hold_out(color_pairs(340))
    else:
        source = stage / "pairs.jsonl"
        train(policy, "--learning_curve", "--batch", "32")
        train_rows = read_pairs(source)
        held_out_rows = read_pairs(stage / "held_out.jsonl")
    pairs, _, _ = encode_pairs(train_rows, tokenizer, 64)
    held_out, _, _ = encode_pairs(held_out_rows, tokenizer, 64)
    assert (len(pairs), len(held_out)) == ((296, 44) if given else (280, 40))

    origin, kept, left, header, *lines = capsys.readouterr().out.splitlines()
    assert origin.endswith(f" {source}")
    assert f" {len(pairs)} pairs" in kept and f" {len(held_out)} held out" in left
    assert "Bayes" not in header            # the true rewards are not known
    assert [int(line.split()[0]) for line in lines] == [256, len(pairs)]
    assert [point[1] for point in points] == [pairs[:256], pairs]
    for (model, _, used), line in zip(points, lines):
        assert used == held_out
        accuracy = share_right(reward_model.held_out_margins(model, held_out))
        assert float(line.split()[1]) == pytest.approx(accuracy, abs=6e-4)
    assert snapshot(policy) == before


def lines_of(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


EQUAL = {"chosen": "b", "rejected": "b"}
LONG = [{"prompt": "z" * 45 + letter, "chosen": "b", "rejected": "c"} for letter in "abc"]


@pytest.mark.parametrize("content, reasons", [
    (None, ["no such file"]),
    ("", ["empty"]),
    (lines_of({"prompt": "a", "chosen": "b"}), [":1", "rejected"]),
    (lines_of(PAIRS[0]), ["same prompt"]),
    (lines_of(*LONG), ["no prompt leaves room", "--max_new_tokens 20"]),
    (lines_of({"prompt": "a", **EQUAL}, {"prompt": "c", **EQUAL}), ["no pair is left"])])
def test_a_wrong_file_is_one_line_and_costs_nothing(policy, tmp_path, content, reasons):
    """A typing error in the file that costs the checkpoint of last night."""
    train(policy, "--data", str(policy / "pairs.jsonl"))
    before = snapshot(policy)
    path = tmp_path / "pairs.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError) as error:
        train(policy, "--data", str(path))
    message = str(error.value)
    assert "\n" not in message
    assert all(reason in message for reason in [str(path), *reasons])
    assert snapshot(policy) == before and policy / "cpu/reward_model/checkpoint.pt" in before


@pytest.fixture
def teller(tmp_path, monkeypatch):
    """(A folder with an SFT model that tells stories from the first day, its tokenizer)."""
    common = ["--size", "cpu", "--out", str(tmp_path)]
    gpt.main([*common, *SMALL, "--steps", "2", "--report", "2"])
    model, tokenizer, _ = gpt.load_checkpoint(tmp_path / "cpu/gpt/checkpoint.pt", "gpt", "cpu")
    (tmp_path / "cpu/sft").mkdir()
    gpt.save_checkpoint(tmp_path / "cpu/sft/checkpoint.pt", "sft", "cpu", model, tokenizer)
    monkeypatch.setattr(reward_model, "respond", Writer(tokenizer, broken=False))
    return tmp_path, tokenizer


@cpu_only
def test_collecting_and_training_on_the_world(teller, capsys):
    """Held-out pairs that are trained on too; figures that belong to other pairs than the files
    that were written."""
    out, tokenizer = teller
    flags = "--pairs 48 --held_out 40 --sample_batch 32 --max_new_tokens 90"
    trained = train(out, *flags.split())
    stage = out / "cpu/reward_model"
    pairs = metrics(stage / "pairs.jsonl")
    held_out = metrics(stage / "held_out.jsonl")
    *_, figures = metrics(stage / "metrics.jsonl")
    assert (len(pairs), len(held_out)) == (48, 40)
    assert not {row["chosen"] for row in pairs} & {row["chosen"] for row in held_out}
    gold = torch.tensor([gold_margin(row) for row in held_out])
    encoded, _, _ = encode_pairs(held_out, tokenizer, 128)
    margin = reward_model.held_out_margins(trained, encoded)
    expected, table = reward_model_figures(margin, gold)
    found = {name: figures[name] for name in expected}
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-5)
    printed = capsys.readouterr().out.split("calibration")[1].splitlines()[1:1 + len(table)]
    assert [int(line.split()[0]) for line in printed] == [count for count, _, _ in table]

    # The learning curve's last point has all pairs; the annotator's noise is taken out of it too.
    train(out, "--learning_curve")
    *_, header, line = capsys.readouterr().out.splitlines()
    assert "share of Bayes accuracy" in header and "above chance" in header
    count, accuracy, _, _, share, _, _, above, _, _ = line.replace("%", "").split()   # ± its error
    bayes = expected["bayes_accuracy"]
    assert count == "48"
    assert float(share) / 100 == pytest.approx(float(accuracy) / bayes, abs=2e-3)
    assert float(above) / 100 == pytest.approx((float(accuracy) - 0.5) / (bayes - 0.5), abs=5e-3)


# --------------------------------------------------------------------------------------------------
# Other judges

JUDGED = ("--size cpu --pairs 64 --held_out 16 --batch 8 --epochs 2 --max_new_tokens 16 "
          "--sample_batch 32 --report 3").split()


def test_another_judge_labels_what_is_trained_on_only(out, capsys):
    """Held-out figures against the constitution's own labels, which no annotator gave; a principle
    that is lost."""
    held_out = (out / "cpu/reward_model/held_out.jsonl").read_bytes()
    reward_model.main(["--out", str(out), "--judge", "constitution", *JUDGED])
    # As the annotator's stage, which `out` holds, batch for batch.
    assert (out / "cpu/reward_model/held_out.jsonl").read_bytes() == held_out
    rows = metrics(out / "cpu/reward_model/pairs.jsonl")
    for row in rows:
        choice, why = constitution_choice(row["prompt"], row["chosen"], row["rejected"],
                                          random.Random(0))
        assert why == row["why"] and (choice == 0 or "No principle" in why)
    [(why, number)] = Counter(row["why"] for row in rows).most_common(1)
    assert f"        {number / 64:5.1%}  {why}\n" in capsys.readouterr().out


JUDGE = """import json, sys
rows = [json.loads(line) for line in sys.stdin]
open({asked!r}, "a").writelines(json.dumps(row) + "\\n" for row in rows)
for row in rows[:{most}]:
    print(json.dumps(dict(choice=len(row["first"]) % 2, why="parity of " + row["prompt"])))
"""


def test_with_a_programs_labels_a_run_continues_bit_for_bit(out, tmp_path, monkeypatch):
    """A label paid for twice, or given to another pair; pairs sampled again, or reasons that are
    lost, when the run is resumed; labels that stay beside the next run's checkpoint."""
    folder = out / "cpu/reward_model"
    whole = tmp_path / "whole"
    command = f"{sys.executable} {tmp_path / 'judge.py'}"
    argv = ["--out", str(out), "--judge", command, *JUDGED]

    def judge(most, asked):
        text = JUDGE.format(asked=str(tmp_path / asked), most=most)
        (tmp_path / "judge.py").write_text(text)

    judge(99, "whole.jsonl")
    reward_model.main(argv)
    shutil.copytree(folder, whole)
    judge(20, "killed.jsonl")
    with pytest.raises(InputError, match="gave 20 of .* answers"):
        reward_model.main(argv)
    judge(99, "killed.jsonl")
    with stopped_after(7):  # the state was saved after step 6
        reward_model.main([*argv, "--resume"])
    monkeypatch.setattr(reward_model, "collect_pairs", None)
    reward_model.main([*argv, "--resume"])
    names = sorted(path.name for path in whole.iterdir())
    assert sorted(path.name for path in folder.iterdir()) == names and "labels.jsonl" not in names
    assert (folder / "pairs.jsonl").read_bytes() == (whole / "pairs.jsonl").read_bytes()
    check_same(folder, whole)

    once = metrics(tmp_path / "whole.jsonl")
    again = metrics(tmp_path / "killed.jsonl")
    first = len(again) - (len(once) - 20)   # what the program that died was asked, before it died
    assert again[:first] + again[first:][first - 20:] == once and first > 20
    labelled = []
    for row in once:
        texts = [row["first"], row["second"]]
        choice = len(texts[0]) % 2
        labelled.append(dict(prompt=row["prompt"], chosen=texts[choice], rejected=texts[1 - choice],
                             why=f"parity of {row['prompt']}"))
    assert metrics(folder / "pairs.jsonl") == labelled


@pytest.mark.parametrize("argv, message", [
    ("--judge constitution --data pairs.jsonl",
     "--judge constitution: compares nothing where --data has the pairs"),
    ("--held_out 8 --data pairs.jsonl", "--held_out 8: compares nothing"),
    ("--learning_curve --pairs 8", "--pairs 8: .*reward_model has its comparisons already"),
    ("--judge anotator", "--judge anotator: no such program")])
def test_what_would_not_be_asked_is_refused(argv, message, out):
    """A mistyped judge, found after minutes of sampling; labels of the file's under the name of
    another judge; a number of pairs that nothing collects."""
    before = snapshot(out)
    with pytest.raises(InputError, match=message):
        reward_model.main(["--out", str(out), *argv.split()])
    assert snapshot(out) == before


# --------------------------------------------------------------------------------------------------
# The process reward model


def random_marked(seed, count):
    """Marked responses of very different lengths and numbers of steps."""
    rng = random.Random(seed)
    responses = []
    for ids in random_rows(seed, count, 60):
        ends = sorted(rng.sample(range(len(ids)), rng.randint(1, min(6, len(ids)))))
        steps = [rng.gauss(0, 2) for _ in ends]
        marks = [rng.random() < 0.6 for _ in ends]
        responses.append(annotator.Marked(ids, ends, steps, marks))
    return responses


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 9])
def test_the_loss_of_marks_is_a_binary_loss_per_step(micro_batch, monkeypatch):
    """A mean over each response's steps first, in which a sentence of a long story counts less; a
    mark read at another step; the padding's reward. The oracle is binary cross-entropy over all
    steps, response by response."""
    model = tiny_model(20)
    twin = tiny_model(20)
    responses = random_marked(20, 9)
    gradients, row = one_step(reward_model.fit_process, model, responses, micro_batch, monkeypatch)

    rewards = []
    marks = []
    for response in responses:
        rewards.append(twin(torch.tensor([response.ids]))[0, response.ends])
        marks += response.marks
    rewards = torch.cat(rewards)
    good = torch.tensor(marks)
    loss = F.binary_cross_entropy_with_logits(rewards, good.double())
    loss.backward()
    for ours, theirs in zip(gradients, twin.parameters()):
        torch.testing.assert_close(ours, theirs.grad, atol=1e-6, rtol=1e-4)

    margin = torch.where(good, rewards, -rewards).detach()  # positive where the mark is guessed
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-5) == row["held_out_loss"]
    assert row["held_out_accuracy"] == pytest.approx(share_right(margin))
    for rows in (4, 128):
        found = reward_model.step_margins(model, responses, rows)
        torch.testing.assert_close(found, margin, check_dtype=False)


def rollout_of_steps(tokenizer):
    """(A Rollout of four texts, one of which never ended; the sentences of each)."""
    rows = [("", "Hi there. You!", True), ("Why? ", "One", True), ("Why? " * 2, "A. B. C.", False),
            ("Why? " * 3, "", True)]
    told = [["Hi there.", "Hi there. You!"], ["One"], ["A.", "A. B.", "A. B. C."], []]
    return rollout_of(rows, tokenizer), told


def test_rewards_of_the_steps_of_a_rollout(tokenizer):
    """A step's reward one action too early or too late, at <|end|>, or of the prompt's
    sentences."""
    model = tiny_reward_model(2, vocab=tokenizer.n_vocab, block_size=128)
    rollout, told = rollout_of_steps(tokenizer)
    rewards, steps = reward_model.step_rewards(model, rollout, tokenizer)
    assert rewards.shape == steps.shape == (4, rollout.tokens.shape[1] - 1)
    assert not rewards[~steps].any()
    for row, ids in enumerate(rollout.tokens):
        columns = steps[row].nonzero().flatten().tolist()
        start = rollout.prompt_lengths[row]
        assert [tokenizer.decode(ids[start:column + 2].tolist()) for column in columns] == told[row]
        for column in columns:
            alone = reward_of(model, ids[:column + 2].tolist()).item()
            assert rewards[row, column].item() == pytest.approx(alone, abs=1e-5)


@pytest.mark.parametrize("micro_batch", [1, 3, 4])
def test_a_reward_of_rollouts(tokenizer, micro_batch):
    """Rows that were sorted by length and never put back; a score read at the padding; the
    reward of steps counted again at the end."""
    model = tiny_reward_model(2, vocab=tokenizer.n_vocab, block_size=128)
    rollout, _ = rollout_of_steps(tokenizer)
    zeros = torch.zeros(4, rollout.tokens.shape[1] - 1)
    reward = reward_model.make_reward("reward_model", model, tokenizer, micro_batch)
    scores, token_rewards = reward(rollout)
    for score, ids, length in zip(scores, rollout.tokens.tolist(), rollout.lengths):
        assert score.item() == pytest.approx(reward_of(model, ids[:length]).item(), abs=1e-5)
    assert torch.equal(token_rewards, zeros)

    reward = reward_model.make_reward("process", model, tokenizer, micro_batch)
    scores, token_rewards = reward(rollout)
    expected, _ = reward_model.step_rewards(model, rollout, tokenizer)
    assert torch.equal(token_rewards, expected) and not scores.any()

    rows = []
    for seed in range(40):
        request = stories.request(random.Random(seed)).text
        rows.append((request, stories.story(random.Random(seed), request).text, True))
    reward = reward_model.make_reward("verifier", None, tokenizer, micro_batch)
    scores, token_rewards = reward(rollout_of(rows, tokenizer))
    assert scores.tolist() == [annotator.verify(prompt, text) for prompt, text, _ in rows]
    assert 0 < scores.sum() < 40 and not token_rewards.any()


def test_the_process_model_learns_from_the_stages_own_responses(teller, capsys):
    """Responses that are another model's; the reward model's checkpoint overwritten; figures of
    other steps than those held out, or a run that continues with other marks."""
    out, tokenizer = teller
    flags = "--process --max_new_tokens 90 --batch 4 --report 4 --warmup 1 --lr 0.01"
    argv = ["--size", "cpu", "--out", str(out), *flags.split()]
    # This trains the missing reward model first, with these flags.
    with stopped_after(6, "process_model"):
        reward_model.main([*argv, "--pairs", "48", "--held_out", "24"])
    reward_model.main([*argv, "--pairs", "48", "--held_out", "24", "--resume"])
    stage = out / "cpu/reward_model"
    folder = out / "cpu/process_model"
    before = snapshot(stage)
    train_rows = read_pairs(stage / "pairs.jsonl")
    assert len(train_rows) == 48

    rng = random.Random("marks 1")
    responses = annotator.mark(train_rows, tokenizer, rng)
    held_out = annotator.mark(read_pairs(stage / "held_out.jsonl"), tokenizer, rng)
    *_, learnt, figures = metrics(folder / "metrics.jsonl")
    assert learnt["step"] == len(responses) / 8 == 12   # as many in a step as a reward model sees
    trained = load(folder / "checkpoint.pt", "process_model")
    margin = reward_model.step_margins(trained, held_out)
    truth = []
    for response in held_out:
        for step, good in zip(response.steps, response.marks):
            truth.append(step if good else -step)
    expected, _ = reward_model_figures(margin, torch.tensor(truth))
    found = {name: figures[name] for name in expected}
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert figures["accuracy"] == pytest.approx(learnt["held_out_accuracy"])
    assert 0.5 < figures["bayes_accuracy"] < 1
    marks = sum(len(response.marks) for response in responses)
    assert f"steps   {marks} in 96 responses, " in capsys.readouterr().out

    resumed = folder.rename(out / "resumed")
    reward_model.main(argv)
    check_same(folder, resumed)
    assert snapshot(stage) == before


def test_marks_of_what_the_annotator_does_not_know_are_refused(policy):
    """A traceback of the annotator's; marks of one's own pairs that nobody gave."""
    train(policy, "--data", str(policy / "pairs.jsonl"))
    before = snapshot(policy)
    for flags, message in (
            ([], "pairs.jsonl: the annotator marks answers to the little world's requests only"),
            (["--data", str(policy / "pairs.jsonl")],
             "--process True: cannot be used with --data"),
            (["--learning_curve"], "--learning_curve True: is a curve of pairs")):
        with pytest.raises(InputError, match=message):
            train(policy, "--process", *flags)
    assert snapshot(policy) == before
