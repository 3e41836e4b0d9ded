"""The Bradley-Terry reward model: its loss, its score, its pairs, its answer key, and the stage as a whole."""

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

import gpt
import reward_model
import sft
from data import annotator, stories
from data.files import InputError, hold_out, read_pairs, write_jsonl
from data.run import Run, read_torch
from data.tokenizer import Tokenizer, encode_pairs, train as train_vocabulary
from helpers import cpu_only, metrics, snapshot, tiny_reward_model, untimed
from reward_model import RewardModel, answer_key, bradley_terry_loss, score_all

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
    """(chosen, rejected, prompt length), of very different lengths."""
    rng, pairs = random.Random(seed), []
    for prompt in random_rows(seed, count, 5):
        pairs.append(tuple(prompt + [rng.randrange(V) for _ in range(rng.randint(1, 40))] for _ in range(2)) + (len(prompt),))
    return pairs


# ----------------------------------------------------------------------------------------------------------------------
# The loss


def test_the_lectures_numbers():
    """A sign that is wrong: the loss rewards the rejected answer, and is small all the same (CS 224R, ch. 6)."""
    high, low = torch.tensor([2.5]), torch.tensor([1.0])
    assert bradley_terry_loss(high, low).item() == pytest.approx(0.201, abs=5e-4)
    assert bradley_terry_loss(low, high).item() == pytest.approx(1.70, abs=5e-3)
    assert math.exp(-bradley_terry_loss(high, low)) == pytest.approx(0.818, abs=5e-4)
    assert math.exp(-bradley_terry_loss(low, high)) == pytest.approx(0.182, abs=5e-4)
    assert bradley_terry_loss(high, high).item() == pytest.approx(math.log(2))
    both = bradley_terry_loss(torch.cat([high, low]), torch.cat([low, high]))      # the mean over pairs, not the sum
    assert both.item() == pytest.approx((0.2014 + 1.7014) / 2, abs=1e-4)


def test_only_differences_count():
    """A loss that depends on the rewards' level pushes it somewhere; Bradley-Terry leaves it free."""
    generator = torch.Generator().manual_seed(0)
    chosen, rejected = torch.randn(2, 50, dtype=torch.float64, generator=generator)
    torch.testing.assert_close(bradley_terry_loss(chosen + 7, rejected + 7), bradley_terry_loss(chosen, rejected))


def test_gradient_is_the_probability_of_the_other_order():
    """-(1 - P) for the winner, +(1 - P) for the loser: a pair that is surely right must not pull any more."""
    chosen, rejected = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in ([2.5, 1.0, 0.0], [1.0, 2.5, 0.0]))
    (3 * bradley_terry_loss(chosen, rejected)).backward()
    p = [1 / (1 + math.exp(b - a)) for a, b in ((2.5, 1.0), (1.0, 2.5), (0.0, 0.0))]
    assert chosen.grad.tolist() == pytest.approx([-(1 - x) for x in p])
    assert rejected.grad.tolist() == pytest.approx([1 - x for x in p])


def test_large_differences_do_not_overflow():
    """log(sigmoid(x)) in two steps is -inf from a difference of -104 in float32, and its gradient NaN."""
    chosen, rejected = torch.tensor([-200.0, 300.0], requires_grad=True), torch.tensor([200.0, -300.0])
    loss = bradley_terry_loss(chosen, rejected)
    loss.backward()
    assert loss.item() == pytest.approx(200) and chosen.grad.tolist() == pytest.approx([-0.5, 0])


# ----------------------------------------------------------------------------------------------------------------------
# The model


def test_score_reads_the_last_token_whatever_the_padding():
    """A score read at column -1 is that of the padding; one that looks for the padding token stops at the first <|end|>."""
    model, rows = tiny_model(1), random_rows(1, 12)
    alone = torch.stack([model(torch.tensor([row]))[0, -1] for row in rows])
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
    assert model(tokens).shape == (1, 20) and changed.tolist() == [False] * 8 + [True] * 12


def test_the_final_norm_is_applied_once():
    """A head behind a second LayerNorm: the reward model then isn't the SFT model with another head."""
    model = tiny_model(3)
    tokens = torch.randint(V, (2, 9), generator=torch.Generator().manual_seed(3))
    states = []
    hook = model.trunk.ln_f.register_forward_hook(lambda module, inputs, output: states.append(output.detach()))
    rewards = model(tokens).detach()
    hook.remove()
    assert len(states) == 1
    by_hand = (states[0] * model.head.weight[0]).sum(dim=2) + model.head.bias
    torch.testing.assert_close(rewards, by_hand.float(), check_dtype=False)
    logits = states[0] @ model.trunk.wte.weight.T       # the same hidden state gives the language model's logits
    torch.testing.assert_close(logits, model.trunk(tokens))


def test_scores_are_float32_under_autocast():
    """A bf16 head: scores near 3 are rounded to 1/64, and two answers that differ get one score."""
    model = tiny_model(3).float()
    with torch.no_grad():
        model.head.weight *= 4
    tokens = torch.randint(V, (3, 12), generator=torch.Generator().manual_seed(3))
    states, inside = [], []
    model.trunk.ln_f.register_forward_hook(lambda module, inputs, output: states.append(output.detach()))
    model.trunk.h[0].mlp.c_fc.register_forward_hook(lambda module, inputs, output: inside.append(output.dtype))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        rewards = model(tokens)
        assert torch.is_autocast_enabled("cpu")
        rounded = model.head(states[0]).squeeze(2)
    assert inside == [torch.bfloat16]       # the trunk is what bf16 makes faster
    assert rewards.dtype == torch.float32 and rounded.dtype == torch.bfloat16
    with torch.no_grad():
        assert torch.equal(rewards, model.head(states[0].float()).squeeze(2))
    assert (rewards - rounded.float()).abs().max() > 0.002      # so the comparison means something


def test_a_new_head_starts_at_log_2():
    """A random head: the first steps unlearn it, and the trunk with it."""
    model, pairs = tiny_model(4, head=False), random_pairs(4, 6)
    assert score_all(model, [chosen for chosen, _, _ in pairs]).tolist() == [0.0] * 6
    assert float(reward_model.backward(model, pairs, 6)) == pytest.approx(math.log(2))
    assert model.head.weight.grad.any()


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 7, 64])
def test_micro_batches_give_the_gradient_of_the_whole_batch(micro_batch):
    """A last micro-batch that is smaller and counts as much as the others; chosen and rejected cut apart at the wrong row."""
    model, twin, pairs = tiny_model(5), tiny_model(5), random_pairs(5, 7)
    loss = reward_model.backward(model, pairs, micro_batch)
    oracle = 0.0
    for chosen, rejected, _ in pairs:       # pair by pair, without padding
        difference = twin(torch.tensor([chosen]))[0, -1] - twin(torch.tensor([rejected]))[0, -1]
        oracle = oracle + torch.log1p(torch.exp(-difference)) / len(pairs)
    oracle.backward()
    assert float(loss) == pytest.approx(oracle.item(), rel=1e-5)
    for ours, theirs in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=1e-4)


def test_held_out_margins_are_chosen_minus_rejected():
    """An accuracy of 30 % that is one of 70 % with a sign turned."""
    model, pairs = tiny_model(6), random_pairs(6, 5)
    expected = [(model(torch.tensor([chosen]))[0, -1] - model(torch.tensor([rejected]))[0, -1]).item()
                for chosen, rejected, _ in pairs]
    assert reward_model.held_out_margins(model, pairs).tolist() == pytest.approx(expected, abs=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# Pairs


@pytest.fixture(scope="module")
def tokenizer():
    rng = random.Random(7)
    return Tokenizer(train_vocabulary("\n".join(stories.document(rng).text for _ in range(50)), 400))


def test_pairs_that_teach_nothing_or_do_not_fit_are_dropped(tokenizer):
    """A pair of equal texts adds log 2 to every loss; a pair that is cut is scored on a text that nobody chose."""
    rows = [{"prompt": "Hi.", "chosen": "Good morning to you.", "rejected": "No."},
            {"prompt": "Hi.", "chosen": "No.", "rejected": "No."},
            {"prompt": "Hi.", "chosen": "No.", "rejected": "Good morning to you."},
            {"prompt": "Hi.", "chosen": "No.", "rejected": "No. "}]
    ids = [[tokenizer.prompt("Hi.") + tokenizer.response(row[name]) for name in ("chosen", "rejected")] for row in rows]
    length, longest = len(tokenizer.prompt("Hi.")), len(ids[0][0])
    none = {"longer than the context": 0, "equal texts": 1}
    assert encode_pairs(rows, tokenizer, longest) == (
        [(*ids[i], length) for i in (0, 2, 3)], [rows[i] for i in (0, 2, 3)], none)
    assert encode_pairs(rows, tokenizer, longest - 1) == ([(*ids[3], length)], [rows[3]], none | {"longer than the context": 2})


class Writer:
    """Stands in for reward_model.respond: the world's own stories; some never end, come twice or are blank."""

    def __init__(self, tokenizer, broken=True):
        self.rng, self.tokenizer, self.broken, self.seeds, self.answers = random.Random(9), tokenizer, broken, [], []

    def __call__(self, model, tokenizer, prompts, max_new_tokens, seed):
        self.seeds.append(seed)
        texts, ended = [], []
        for ids in prompts:
            request = self.tokenizer.decode(ids[1:-1])
            copy = self.broken and len(texts) % 2 == 1 and self.rng.random() < 0.2
            blank = self.broken and self.rng.random() < 0.1
            texts.append(texts[-1] if copy else self.rng.choice(["", " \n", "a\0b"]) if blank
                         else stories.story(self.rng, request).text)
            ended.append(not self.broken or self.rng.random() > 0.1)
            self.answers.append((request, texts[-1], ended[-1]))
        return texts, ended


def test_collected_pairs_are_comparable_and_labelled_by_the_annotator(tokenizer, monkeypatch, tmp_path):
    """An answer under another's prompt, an unfinished one compared with a whole one, or a label that is turned round."""
    writer = Writer(tokenizer)
    monkeypatch.setattr(reward_model, "respond", writer)
    rows, dropped = reward_model.collect_pairs(None, tokenizer, 400, reward_model.Config(sample_batch=64), random.Random(10))
    pairs = list(zip(writer.answers[::2], writer.answers[1::2]))
    assert all(first[0] == second[0] for first, second in pairs)       # both of a pair answer one request
    counts, usable = {"no end": 0, "blank": 0, "equal texts": 0}, []
    for first, second in pairs:
        if not (first[2] and second[2]):
            counts["no end"] += 1
        elif not (first[1].strip() and second[1].strip()) or "\0" in first[1] + second[1]:
            counts["blank"] += 1
        elif first[1] == second[1]:
            counts["equal texts"] += 1
        else:
            usable.append((first, second))
    assert len(rows) == len(usable) == 400
    for row, (first, second) in zip(rows, usable):
        assert list(row) == ["prompt", "chosen", "rejected"]
        assert row["prompt"] == first[0] and {row["chosen"], row["rejected"]} == {first[1], second[1]}
    assert dropped == counts and min(counts.values()) > 10
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    assert read_pairs(tmp_path / "pairs.jsonl") == rows                 # dpo.py will read this file
    assert len(set(writer.seeds)) == len(writer.seeds) > 5              # fresh samples in every batch
    gold = [annotator.gold_reward(row["prompt"], row["chosen"]) - annotator.gold_reward(row["prompt"], row["rejected"])
            for row in rows]
    p = [1 / (1 + math.exp(-abs(g))) for g in gold]
    wins = sum(g > 0 for g in gold) + 0.5 * sum(g == 0 for g in gold)
    assert abs(wins - sum(p)) < 4 * math.sqrt(sum(x * (1 - x) for x in p))      # as noisy as Bradley-Terry, no more, no less
    first_wins = sum(row["chosen"] == first[1] for row, (first, _) in zip(rows, usable))
    assert abs(first_wins - 200) < 4 * 10                               # no preference for the first answer


def test_a_reward_model_judges_with_bradley_terrys_noise(tokenizer):
    """The better score always, which no finite margin can fit; a choice turned round, or of another pair's scores."""
    model, rng = tiny_reward_model(1, vocab=tokenizer.n_vocab, block_size=64), random.Random(3)
    asked = [("Hi.", "Good morning.", "No."), ("Hi.", "No.", "Good morning."), ("Who?", "A fox.", "Me."),
             ("Why?", "So.", "So so.")]
    model.head.weight.data *= 0.3
    judge, p = reward_model.reward_model_judge(model, tokenizer), []
    for prompt, *texts in asked:
        rewards = []
        for text in texts:
            tokens = torch.tensor([tokenizer.prompt(prompt) + tokenizer.response(text)])
            rewards.append(model(tokens)[0, -1].item())
        p.append(1 / (1 + math.exp(rewards[1] - rewards[0])))
    assert p[0] == pytest.approx(1 - p[1], abs=1e-5) and max(p) - min(p) > 0.3 and 0.02 < min(p)
    chosen = torch.tensor([[choice for choice, _ in judge(asked * n, rng)[:4]] for n in (1, 5) for _ in range(500)])
    assert set(chosen.unique().tolist()) == {0, 1}
    for share, x in zip((chosen == 0).double().mean(dim=0).tolist(), p):  # 0: the first one
        assert abs(share - x) < 4 * math.sqrt(x * (1 - x) / 1000)
    assert judge(asked, random.Random(5)) == judge(asked, random.Random(5))  # the seed's noise, nobody else's
    assert judge([], rng) == [] == reward_model.annotator_judge([], rng)  # a batch of which nothing is usable


def test_another_judge_and_prompts_of_a_users_own(tokenizer, monkeypatch):
    """The annotator asked, who knows no reward there; requests of the world beside one's own; an unusable pair that is
    judged; a sample that, encoded anew, no longer fits the context, and ends in a traceback of the judge's."""
    answers = {"Hi.": ["Good morning.", "No."], "Who?": ["Me.", "Me."], "Why?": ["So. " * 9, "So."], "How?": [" ", "So."]}
    asked = []

    def respond(model, tokenizer, prompts, max_new_tokens, seed):
        texts = [answers[tokenizer.decode(ids[1:-1])][i % 2] for i, ids in enumerate(prompts)]
        return texts, [True] * len(texts)

    def judge(batch, rng):
        asked.extend(batch)
        return [(1, "")] * len(batch)

    monkeypatch.setattr(reward_model, "respond", respond)
    config = reward_model.Config(sample_batch=2)
    for context, kept in ((20, {"Hi."}), (1000, {"Hi.", "Why?"})):
        asked.clear()
        rows, dropped = reward_model.collect_pairs(None, tokenizer, 12, config, random.Random(2), judge=judge,
                                                   own=list(answers), context=context)
        assert len(rows) == len(asked) == 12
        assert {row["prompt"] for row in rows} == kept == {prompt for prompt, *_ in asked}
        for row in rows:
            assert [row["rejected"], row["chosen"]] == answers[row["prompt"]]  # the second one won
        assert dropped["blank"] and dropped["equal texts"] and bool(dropped["no end"]) == (context == 20)


def test_a_policy_that_never_ends_is_named(tokenizer, monkeypatch):
    """Sampling for ever, without a word, from a model that was not taught to stop."""
    monkeypatch.setattr(reward_model, "respond", lambda model, tokenizer, prompts, *_, **__: (["a"] * len(prompts),
                                                                                              [False] * len(prompts)))
    with pytest.raises(InputError, match="rarely ends"):
        reward_model.collect_pairs(None, tokenizer, 5, reward_model.Config(), random.Random(0))


def test_gold_rewards_judges_each_response_by_its_own_prompt(tokenizer):
    """A gold reward of "...<|end|>", or of the answer to another request: all of them wrong by the same amount."""
    rng, rows = random.Random(11), []
    for i in range(6):
        prompt = stories.request(rng).text
        text = stories.story(rng, prompt).text
        ids = tokenizer.prompt(prompt), tokenizer.response(text)[:None if i % 2 else -1]      # every other one never ended
        rows.append((*ids, annotator.gold_reward(prompt, text)))
    tokens, lengths = gpt.pad([prompt + response for prompt, response, _ in rows])
    rollout = gpt.Rollout(tokens, torch.tensor([len(prompt) for prompt, _, _ in rows]), lengths)
    assert annotator.gold_rewards(rollout, tokenizer).tolist() == pytest.approx([gold for *_, gold in rows])


# ----------------------------------------------------------------------------------------------------------------------
# The answer key


def simulated_labels(n=40000, seed=12):
    """Winner-first margins of the truth, as an annotator with Gumbel noise would give them."""
    generator = torch.Generator().manual_seed(seed)
    delta = 2 * torch.randn(n, generator=generator)                                   # gold(first) - gold(second)
    first = torch.rand(n, generator=generator) < torch.sigmoid(delta)
    return torch.where(first, delta, -delta)


def test_the_true_reward_reaches_the_best_possible_figures():
    """A Bayes accuracy that the truth itself does not reach, or surpasses: then no distance to it means anything."""
    gold = simulated_labels()
    figures, table = answer_key(gold, gold)
    assert figures["slope"] == pytest.approx(1) and figures["correlation"] == pytest.approx(1)
    assert figures["accuracy"] == pytest.approx(figures["bayes_accuracy"], abs=4 * 0.5 / 200)      # 4 sigma of 40,000 labels
    assert figures["expected_accuracy"] == pytest.approx(figures["bayes_accuracy"])                # and without their noise
    assert figures["loss"] == pytest.approx(figures["annotator_loss"], abs=0.02)
    assert 0.7 < figures["bayes_accuracy"] < 0.9
    assert sum(count for count, _, _ in table) == 2 * len(gold) and len(table) == 10
    for count, predicted, observed in table:
        assert observed == pytest.approx(predicted, abs=4 * math.sqrt(2 * 0.25 / count))     # both orders: not independent


def test_above_chance_runs_from_a_coin_to_the_truth():
    """A share of Bayes accuracy alone: a coin has two thirds of it."""
    gold = simulated_labels()
    truth, _ = answer_key(gold, gold)
    assert truth["above_chance"] == pytest.approx(1) == truth["share_of_bayes"]
    assert truth["above_chance_error"] == pytest.approx(0, abs=1e-9) == truth["share_of_bayes_error"]
    coin, _ = answer_key(torch.randn(len(gold), generator=torch.Generator().manual_seed(14)), gold)
    assert abs(coin["above_chance"]) < 4 * coin["above_chance_error"] < 0.08
    assert abs(coin["share_of_bayes"] - 0.5 / coin["bayes_accuracy"]) < 4 * coin["share_of_bayes_error"]
    assert coin["share_of_bayes"] > 0.6
    wrong, _ = answer_key(-gold, gold)
    assert wrong["above_chance"] == pytest.approx(-1)


def test_standard_errors_are_the_spread_of_repeated_measurements():
    """An error of a ratio as if its two means came from different pairs, a variance for its root, a forgotten 1/√n."""
    generator, measured = torch.Generator().manual_seed(15), []
    for _ in range(400):
        delta = 2 * torch.randn(200, generator=generator)
        margin = delta + 2 * torch.randn(200, generator=generator)
        sign = torch.where(torch.rand(200, generator=generator) < torch.sigmoid(delta), 1, -1)
        measured.append(answer_key(sign * margin, sign * delta)[0])
    for name in ("expected_accuracy", "share_of_bayes", "above_chance"):
        spread = statistics.stdev(figures[name] for figures in measured)        # known to 1 / √800, 3.5 %
        assert statistics.mean(figures[f"{name}_error"] for figures in measured) == pytest.approx(spread, rel=0.14)


def test_an_overconfident_model_is_seen():
    """A scale that the answer key does not see: a model twice too sure has the same accuracy and correlation."""
    gold = simulated_labels()
    truth, _ = answer_key(gold, gold)
    figures, table = answer_key(2 * gold, gold)
    assert figures["slope"] == pytest.approx(2) and figures["correlation"] == pytest.approx(1)
    assert figures["accuracy"] == truth["accuracy"] and figures["loss"] > truth["loss"] + 0.02
    assert figures["expected_accuracy"] == truth["expected_accuracy"]
    assert figures["annotator_loss"] == truth["annotator_loss"] and figures["bayes_accuracy"] == truth["bayes_accuracy"]
    assert all(observed < predicted - 0.02 for _, predicted, observed in table if 0.6 < predicted < 0.95)


def test_expected_accuracy_is_the_accuracy_over_all_labels():
    """An expectation that hangs on the labels which happened to be drawn, or that is not the accuracy's."""
    generator = torch.Generator().manual_seed(13)
    for seed in range(5):
        delta, margin = 1.5 * torch.randn(2, 6, dtype=torch.float64, generator=generator)     # first minus second response
        expected, bayes, loss, total, outcomes = 0.0, 0.0, 0.0, 0.0, []
        for signs in itertools.product((1, -1), repeat=6):      # 1: the annotator prefers the first; all 64 sets of labels
            sign = torch.tensor(signs, dtype=torch.float64)
            probability = math.prod(1 / (1 + math.exp(-x)) for x in (sign * delta).tolist())
            figures, _ = answer_key(sign * margin, sign * delta)
            outcomes.append(figures)
            total += probability
            expected += probability * figures["accuracy"]
            truth, _ = answer_key(sign * delta, sign * delta)
            bayes, loss = bayes + probability * truth["accuracy"], loss + probability * truth["loss"]
        assert total == pytest.approx(1)
        for figures in outcomes:
            assert figures["expected_accuracy"] == pytest.approx(expected)
            assert figures["bayes_accuracy"] == pytest.approx(bayes) and figures["annotator_loss"] == pytest.approx(loss)
            assert figures["expected_accuracy"] <= figures["bayes_accuracy"] + 1e-12
        assert len({figures["accuracy"] for figures in outcomes}) > 3       # which the labels do change


def test_the_answer_key_by_hand():
    """Two pairs, and every figure from its definition."""
    def sigma(x):
        return 1 / (1 + math.exp(-x))

    margin, gold = (0.5, -1.0), (2.0, -0.5)
    figures, table = answer_key(torch.tensor(margin), torch.tensor(gold))
    assert figures == pytest.approx({
        "accuracy": 0.5,
        "expected_accuracy": (sigma(2.0) + sigma(0.5)) / 2,     # the model prefers y_w in the first, y_l in the second pair
        "expected_accuracy_error": (sigma(2.0) - sigma(0.5)) / 2 / math.sqrt(2),
        "bayes_accuracy": (sigma(2.0) + sigma(0.5)) / 2,
        "share_of_bayes": 1, "share_of_bayes_error": 0, "above_chance": 1, "above_chance_error": 0,
        "loss": -(math.log(sigma(0.5)) + math.log(sigma(-1.0))) / 2,
        "annotator_loss": sum(-sigma(g) * math.log(sigma(g)) - sigma(-g) * math.log(sigma(-g)) for g in gold) / 2,
        "correlation": (0.5 * 2 + 1 * 0.5) / math.sqrt((0.25 + 1) * (4 + 0.25)),
        "slope": (0.5 * 2 + 1 * 0.5) / (4 + 0.25)})
    # predictions 0.622 (won), 0.378 (lost), 0.269 (won), 0.731 (lost), by bins of a tenth
    assert [count for count, _, _ in table] == [1, 1, 1, 1]
    assert [row[1] for row in table] == pytest.approx([sigma(-1.0), sigma(-0.5), sigma(0.5), sigma(1.0)])
    assert [row[2] for row in table] == [1, 0, 1, 0]
    figures, _ = answer_key(torch.zeros(2), torch.zeros(2))     # an untrained model, an annotator who sees no difference
    assert all(math.isfinite(value) for value in figures.values()) and figures["loss"] == pytest.approx(math.log(2))
    _, (low, high) = answer_key(torch.tensor([50.0, 40.0]), torch.tensor(gold))      # probabilities of exactly 0 and 1
    assert low == pytest.approx((2, 0, 0)) and high == pytest.approx((2, 1, 1))


# ----------------------------------------------------------------------------------------------------------------------
# Before and after


@pytest.mark.parametrize("world, scored", [(True, True), (True, False), (False, True), (False, False)])
def test_the_text_that_is_shown_is_the_median_one(tokenizer, monkeypatch, capsys, world, scored):
    """The luckiest of 33 prompts shown as the rule; a text beside another's scores; the reward model's opinion where
    the true reward is known; two seeds, or a temperature at which the policy was not trained."""
    before, after = (SimpleNamespace(config=SimpleNamespace(block_size=400)) for _ in range(2))
    rng, calls, prompts = random.Random(16), [], None if world else [f"Color {i}?" for i in range(40)] + ["long " * 400]

    def generate(policy, ids, max_new_tokens, end_token, temperature, seed):
        asked = [tokenizer.decode(row[1:-1]) for row in ids]
        texts = [stories.story(rng, request).text if world else "Red " * rng.randrange(30) + f"{i}."
                 for i, request in enumerate(asked)]
        calls.append((policy, temperature, seed, asked, texts))
        tokens, lengths = gpt.pad([row + tokenizer.response(text) for row, text in zip(ids, texts)])
        return gpt.Rollout(tokens, torch.tensor(list(map(len, ids))), lengths)

    scorer = SimpleNamespace(score=lambda tokens, lengths: (lengths * 37 % 101) / 10)     # nothing like gold
    monkeypatch.setattr(sft, "generate", generate)
    config = reward_model.Config(seed=5, max_new_tokens=96)
    sft.show_before_and_after(prompts, before, after, tokenizer, config, scorer if scored else None, 0.7)
    (policy, temperature, seed, asked, _), again = calls
    assert (policy, temperature, seed) == (before, 1.0, 5) and again[:4] == (after, 0.7, 5, asked)
    assert len(set(asked)) == 33 if world else asked == prompts[:33]

    figures = {"reward": lambda prompt, text: len(tokenizer.prompt(prompt) + tokenizer.response(text)) * 37 % 101 / 10,
               "gold": annotator.gold_reward}
    figures = {name: [[score(*row) for row in zip(asked, texts)] for *_, texts in calls]
               for (name, score), known in zip(figures.items(), (scored, world)) if known}
    head, *shown = capsys.readouterr().out.splitlines()
    which = asked.index(shown[0].removeprefix("prompt   "))
    for i, (line, label) in enumerate(zip(shown[1:], ("before", "after"))):
        tags = ", ".join(f"{name} {found[i][which]:+.2f}" for name, found in figures.items())
        assert line == f"{label:9s}" + f"[{tags}] " * (tags != "") + calls[i][-1][which]
    assert len(shown) == 3

    expected = []
    for name, (x, y) in figures.items():        # gold, where it is known, comes last and decides
        gains = [after - before for before, after in zip(x, y)]
        expected.append(f"{name} {statistics.mean(x):.2f} → {statistics.mean(y):.2f} "
                        f"(± {statistics.pstdev(gains) / math.sqrt(33):.2f})")
    assert head == "before and after on 33 held-out prompts" + ": " * (expected != []) + "; ".join(expected)
    if figures:
        assert gains[which] == pytest.approx(statistics.median(gains))


# ----------------------------------------------------------------------------------------------------------------------
# The stage

PAIRS = [{"prompt": f"Color {i}?", "chosen": f"Red {i % 5}.", "rejected": f"Mud {i % 7}."} for i in range(60)]


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """A folder with a tiny base model and a tiny SFT model that answers questions about colors with good and bad."""
    folder = tmp_path_factory.mktemp("policy")
    (folder / "corpus.txt").write_text("".join(" ".join(row.values()) + "\n" for row in PAIRS) * 2)
    rows = [{"prompt": row["prompt"], "completion": row[name]} for row in PAIRS for name in ("chosen", "rejected")]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    small = ["--size", "cpu", "--out", str(folder)]
    gpt.main([*small, "--text", str(folder / "corpus.txt"), "--vocab_size", "290", "--block_size", "64", "--n_layer", "1",
              "--n_head", "2", "--n_embd", "32", "--batch", "8", "--steps", "10", "--report", "10"])
    sft.main([*small, "--data", str(folder / "rows.jsonl"), "--batch", "8", "--lr", "0.01", "--max_new_tokens", "20"])
    return folder


def train(folder, *flags):
    reward_model.main(["--size", "cpu", "--out", str(folder), "--max_new_tokens", "20", "--batch", "8", "--warmup", "1",
                       "--lr", "0.01", *flags])
    return gpt.load_checkpoint(folder / "cpu/reward_model/checkpoint.pt", "reward_model", "cpu", model_class=RewardModel)[0]


def test_training_on_your_own_pairs(policy, capsys):
    """Rewards that are shifted the wrong way, rescaled, or saved before the shift; a trunk that isn't the SFT model's."""
    model = train(policy, "--data", str(policy / "pairs.jsonl"), "--epochs", "3")
    sft_model, tokenizer, _ = gpt.load_checkpoint(policy / "cpu/sft/checkpoint.pt", "sft", "cpu")
    # 1. It learnt what was preferred, and stayed near the SFT model where it began.
    pairs, _, _ = encode_pairs(PAIRS, tokenizer, 64)
    margin = reward_model.held_out_margins(model, pairs)
    assert (margin > 0).float().mean() > 0.95 and margin.mean() > 1
    assert (model.trunk.wte.weight - sft_model.wte.weight).abs().mean() < 0.5 * sft_model.wte.weight.abs().mean()
    # 2. The mean over fresh samples of the SFT model is 0, within the samples' own error.
    prompts = [tokenizer.prompt(row["prompt"]) for row in PAIRS * 10]
    rollout = gpt.generate(sft_model, prompts, 20, tokenizer.end_token, seed=99)
    scores = model.score(rollout.tokens, rollout.lengths).detach()
    assert scores.mean().abs() < 4 * scores.std() * (1 / 512 + 1 / 600) ** 0.5 and scores.std() > 0.5
    # 3. The scale is the loss's own: what was printed before the shift is what the saved model has.
    printed = capsys.readouterr().out
    deviation = float(printed.split("standard deviation ")[1].split()[0])
    assert scores.std().item() == pytest.approx(deviation, rel=0.2)
    rows = metrics(policy / "cpu/reward_model/metrics.jsonl")
    train_rows, held_out_rows = hold_out(PAIRS, 1)
    held_out = encode_pairs(held_out_rows, tokenizer, 64)[0]
    margin = reward_model.held_out_margins(model, held_out)
    assert rows[-1]["held_out_loss"] == pytest.approx(torch.nn.functional.softplus(-margin).mean().item(), rel=1e-3, abs=1e-5)
    assert rows[-1]["held_out_accuracy"] == pytest.approx((margin > 0).float().mean().item())
    # 4. The files beside the checkpoint are the pairs it was made of, for a dpo.py without --data too.
    assert read_pairs(policy / "cpu/reward_model/pairs.jsonl") == train_rows
    assert read_pairs(policy / "cpu/reward_model/held_out.jsonl") == held_out_rows
    assert " 54 pairs, dropped 0 longer than the context, 0 equal texts\n" in printed
    assert " 6 held out, dropped 0 longer than the context, 0 equal texts\n" in printed


def test_the_files_hold_what_was_trained_on(policy, tmp_path, capsys):
    """A pair that was dropped here and comes back in DPO; files of the little world's pairs beside a model of others."""
    rows = PAIRS + [{"prompt": f"Color {i}?", "chosen": "Red " * 100, "rejected": "Mud."} for i in range(60)]
    rows += [{"prompt": f"Color {i}?", "chosen": "Mud.", "rejected": "Mud."} for i in range(60)]
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    train(policy, "--data", str(tmp_path / "pairs.jsonl"))
    train_rows, held_out_rows = hold_out(PAIRS, 1)     # the same prompts, so the same ones are held out
    assert read_pairs(policy / "cpu/reward_model/pairs.jsonl") == train_rows
    assert read_pairs(policy / "cpu/reward_model/held_out.jsonl") == held_out_rows
    printed = capsys.readouterr().out
    assert " 54 pairs, dropped 54 longer than the context, 54 equal texts\n" in printed
    assert " 6 held out, dropped 6 longer than the context, 6 equal texts\n" in printed


def test_one_seed_one_result(policy):
    """An order of pairs that nobody seeded."""
    runs = []
    for _ in range(2):
        random.seed()
        torch.rand(5)
        runs.append([p.tolist() for p in train(policy, "--data", str(policy / "pairs.jsonl")).parameters()])
    assert runs[0] == runs[1]


def color_pairs(count):
    return [{"prompt": f"Color {i}?", "chosen": f"Red {i % 5}.", "rejected": f"Mud {i % 7}."} for i in range(count)]


@pytest.mark.parametrize("given", [False, True])
def test_the_learning_curve_uses_the_stages_pairs_or_the_file(policy, tmp_path, monkeypatch, capsys, given):
    """A curve over other pairs than the checkpoint's, or, with --data, over those instead of the file's; one whose
    points go on from one another, or that costs the checkpoint."""
    for name, count in (("stage", 320), ("given", 340)):
        write_jsonl(tmp_path / f"{name}.jsonl", color_pairs(count))
    train(policy, "--data", str(tmp_path / "stage.jsonl"), "--batch", "32")
    before = snapshot(policy)
    sft_model, tokenizer, _ = gpt.load_checkpoint(policy / "cpu/sft/checkpoint.pt", "sft", "cpu", gpt.get_device())
    points, fit = [], reward_model.fit

    def spy(model, pairs, held_out, *rest):
        assert all(torch.equal(*both) for both in zip(model.trunk.parameters(), sft_model.parameters()))
        assert not model.head.weight.any()
        points.append((model, pairs, held_out))
        return fit(model, pairs, held_out, *rest)

    monkeypatch.setattr(reward_model, "fit", spy)
    capsys.readouterr()
    train(policy, "--learning_curve", "--batch", "32", *["--data", str(tmp_path / "given.jsonl")][:2 * given])
    printed = capsys.readouterr().out.splitlines()
    if given:
        pairs, held_out = (encode_pairs(rows, tokenizer, 64)[0] for rows in hold_out(color_pairs(340), 1))
    else:
        pairs, held_out = (encode_pairs(read_pairs(policy / f"cpu/reward_model/{name}.jsonl"), tokenizer, 64)[0]
                           for name in ("pairs", "held_out"))
    assert (len(pairs), len(held_out)) == ((306, 34) if given else (288, 32))
    source = tmp_path / "given.jsonl" if given else policy / "cpu/reward_model/pairs.jsonl"
    origin, kept, left, header, *lines = printed
    assert origin.endswith(f" {source}") and f" {len(pairs)} pairs" in kept and f" {len(held_out)} held out" in left
    assert "Bayes" not in header                    # nobody knows the true rewards
    assert [int(line.split()[0]) for line in lines] == [256, len(pairs)]
    assert [point[1] for point in points] == [pairs[:256], pairs] and all(point[2] == held_out for point in points)
    for (model, _, _), line in zip(points, lines):
        accuracy = (reward_model.held_out_margins(model, held_out) > 0).float().mean().item()
        assert float(line.split()[1]) == pytest.approx(accuracy, abs=6e-4)
    assert snapshot(policy) == before


@pytest.mark.parametrize("content, reasons", [
    (None, ["no such file"]), ("", ["empty"]), ('{"prompt": "a", "chosen": "b"}\n', [":1", "rejected"]),
    (json.dumps(PAIRS[0]) + "\n", ["same prompt"]),
    ("".join(json.dumps({"prompt": "z" * 45 + letter, "chosen": "b", "rejected": "c"}) + "\n" for letter in "abc"),
     ["no prompt leaves room", "--max_new_tokens 20"]),
    ('{"prompt": "a", "chosen": "b", "rejected": "b"}\n{"prompt": "c", "chosen": "b", "rejected": "b"}\n',
     ["no pair is left"])])
def test_a_wrong_file_is_one_line_and_costs_nothing(policy, tmp_path, content, reasons):
    """A typing error in the file that costs the checkpoint of last night."""
    train(policy, "--data", str(policy / "pairs.jsonl"))
    before, path = snapshot(policy), tmp_path / "pairs.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError) as error:
        train(policy, "--data", str(path))
    message = str(error.value)
    assert "\n" not in message and all(reason in message for reason in [str(path), *reasons])
    assert snapshot(policy) == before and policy / "cpu/reward_model/checkpoint.pt" in before


@cpu_only
def test_collecting_and_training_on_the_world(tmp_path, monkeypatch, capsys):
    """Held-out pairs that are trained on too; figures that belong to other pairs than the files that were written."""
    small = ["--size", "cpu", "--out", str(tmp_path)]
    gpt.main([*small, "--n_layer", "1", "--n_head", "2", "--n_embd", "32", "--batch", "8", "--steps", "2", "--report", "2"])
    model, tokenizer, _ = gpt.load_checkpoint(tmp_path / "cpu/gpt/checkpoint.pt", "gpt", "cpu")
    (tmp_path / "cpu/sft").mkdir()
    gpt.save_checkpoint(tmp_path / "cpu/sft/checkpoint.pt", "sft", "cpu", model, tokenizer)
    monkeypatch.setattr(reward_model, "respond", Writer(tokenizer, broken=False))      # who tells stories from the first day
    trained = train(tmp_path, "--pairs", "48", "--held_out", "40", "--sample_batch", "32", "--max_new_tokens", "90")
    pairs, held_out, (*_, figures) = (metrics(tmp_path / f"cpu/reward_model/{name}.jsonl")
                                      for name in ("pairs", "held_out", "metrics"))
    assert (len(pairs), len(held_out)) == (48, 40)
    assert not {row["chosen"] for row in pairs} & {row["chosen"] for row in held_out}
    gold = torch.tensor([annotator.gold_reward(row["prompt"], row["chosen"])
                         - annotator.gold_reward(row["prompt"], row["rejected"]) for row in held_out])
    margin = reward_model.held_out_margins(trained, encode_pairs(held_out, tokenizer, 128)[0])
    expected, table = answer_key(margin, gold)
    assert {name: figures[name] for name in expected} == pytest.approx(expected, rel=1e-3, abs=1e-5)
    printed = capsys.readouterr().out.split("calibration")[1].splitlines()[1:1 + len(table)]
    assert [int(line.split()[0]) for line in printed] == [count for count, _, _ in table]

    # The learning curve's last point has all pairs; the annotator's noise is taken out of it, as above.
    train(tmp_path, "--learning_curve")
    *_, header, line = capsys.readouterr().out.splitlines()
    count, accuracy, _, _, share, _, _, above, _, _ = line.replace("%", "").split()     # each ± its error
    assert "share of Bayes accuracy" in header and "above chance" in header and count == "48"
    assert float(share) / 100 == pytest.approx(float(accuracy) / expected["bayes_accuracy"], abs=2e-3)
    assert float(above) / 100 == pytest.approx((float(accuracy) - 0.5) / (expected["bayes_accuracy"] - 0.5), abs=5e-3)


# ----------------------------------------------------------------------------------------------------------------------
# Other judges

JUDGED = "--size cpu --pairs 64 --held_out 16 --batch 8 --epochs 2 --max_new_tokens 16 --sample_batch 32 --report 3".split()


def test_another_judge_labels_what_is_trained_on_only(out, capsys):
    """Held-out figures against the constitution's own labels, which no annotator gave; a principle that is lost."""
    held_out = (out / "cpu/reward_model/held_out.jsonl").read_bytes()
    reward_model.main(["--out", str(out), "--judge", "constitution", *JUDGED])
    assert (out / "cpu/reward_model/held_out.jsonl").read_bytes() == held_out       # the annotator's stage, batch for batch
    rows = metrics(out / "cpu/reward_model/pairs.jsonl")
    for row in rows:
        choice, why = annotator.constitution_choice(row["prompt"], row["chosen"], row["rejected"], random.Random(0))
        assert why == row["why"] and (choice == 0 or "No principle" in why)
    why, number = Counter(row["why"] for row in rows).most_common(1)[0]
    assert f"        {number / 64:5.1%}  {why}\n" in capsys.readouterr().out


JUDGE = """import json, sys
rows = [json.loads(line) for line in sys.stdin]
open({asked!r}, "a").writelines(json.dumps(row) + "\\n" for row in rows)
for row in rows[:{most}]:
    print(json.dumps(dict(choice=len(row["first"]) % 2, why="parity of " + row["prompt"])))
"""


def test_a_programs_labels_go_on_bit_for_bit(out, tmp_path, monkeypatch):
    """A label paid for twice, or given to another pair; reasons that are lost when the run goes on; labels that stay
    beside the next run's checkpoint."""
    folder, whole, command = out / "cpu/reward_model", tmp_path / "whole", f"{sys.executable} {tmp_path / 'judge.py'}"
    end_step, argv = Run.end_step, ["--out", str(out), "--judge", command, *JUDGED]

    def judge(most, asked):
        (tmp_path / "judge.py").write_text(JUDGE.format(asked=str(tmp_path / asked), most=most))

    def stop(run, step, **state):
        end_step(run, step, **state)
        if step == 6:
            raise KeyboardInterrupt

    judge(99, "whole.jsonl")
    reward_model.main(argv)
    shutil.copytree(folder, whole)
    judge(20, "killed.jsonl")
    with pytest.raises(InputError, match="gave 20 of .* answers"):
        reward_model.main(argv)
    judge(99, "killed.jsonl")
    with monkeypatch.context() as patch:
        patch.setattr(Run, "end_step", stop)
        with pytest.raises(KeyboardInterrupt):
            reward_model.main([*argv, "--resume"])
    reward_model.main([*argv, "--resume"])
    names = sorted(path.name for path in whole.iterdir())
    assert sorted(path.name for path in folder.iterdir()) == names and "labels.jsonl" not in names
    assert untimed(metrics(folder / "metrics.jsonl")) == untimed(metrics(whole / "metrics.jsonl"))
    assert (folder / "pairs.jsonl").read_bytes() == (whole / "pairs.jsonl").read_bytes()
    weights, expected = (read_torch(path / "checkpoint.pt")["model"] for path in (folder, whole))
    assert all(torch.equal(x, expected[name]) for name, x in weights.items())
    once, again = (metrics(tmp_path / f"{name}.jsonl") for name in ("whole", "killed"))
    first = len(again) - (len(once) - 20)           # what the program that died was asked, before it died
    assert again[:first] + again[first:][first - 20:] == once and first > 20
    labelled = []
    for prompt, *texts in (row.values() for row in once):
        choice = len(texts[0]) % 2
        labelled.append(dict(prompt=prompt, chosen=texts[choice], rejected=texts[1 - choice], why=f"parity of {prompt}"))
    assert metrics(folder / "pairs.jsonl") == labelled


@pytest.mark.parametrize("argv, message", [
    ("--judge constitution --data pairs.jsonl", "--judge constitution: goes without --data only"),
    ("--judge anotator", "--judge anotator: no such program")])
def test_a_judge_that_would_not_be_asked_is_refused(argv, message, out):
    """A mistyped judge, found after minutes of sampling; labels of the file's under the name of another judge."""
    before = snapshot(out)
    with pytest.raises(InputError, match=message):
        reward_model.main(["--out", str(out), *argv.split()])
    assert snapshot(out) == before


# ----------------------------------------------------------------------------------------------------------------------
# The process reward model


def random_marked(seed, count):
    """Marked responses of very different lengths and numbers of steps."""
    rng, items = random.Random(seed), []
    for ids in random_rows(seed, count, 60):
        ends = sorted(rng.sample(range(len(ids)), rng.randint(1, min(6, len(ids)))))
        items.append(annotator.Marked(ids, ends, [rng.gauss(0, 2) for _ in ends], [rng.random() < 0.6 for _ in ends]))
    return items


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 9])
def test_the_loss_of_marks_is_a_binary_loss_per_step(micro_batch):
    """A mean over each response's steps first, in which a sentence of a long story counts less; a mark read at another
    step; the padding's reward. The oracle is binary cross-entropy over all steps, response by response."""
    model, twin, items = tiny_model(20), tiny_model(20), random_marked(20, 9)
    loss = reward_model.backward(model, items, micro_batch)
    rewards = torch.cat([twin(torch.tensor([item.ids]))[0, item.ends] for item in items])
    marks = torch.tensor([float(x) for item in items for x in item.marks], dtype=torch.float64)
    oracle = torch.nn.functional.binary_cross_entropy_with_logits(rewards, marks)
    oracle.backward()
    assert float(loss) == pytest.approx(oracle.item(), rel=1e-5)
    for ours, theirs in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=1e-4)
    margin = torch.where(marks > 0, rewards, -rewards).detach()     # held out: positive where the mark is guessed
    torch.testing.assert_close(reward_model.held_out_margins(model, items), margin, check_dtype=False)


def test_rewards_of_the_steps_of_a_rollout(tokenizer):
    """A step's reward one action too early or too late, at <|end|>, or of the prompt's sentences."""
    model = tiny_reward_model(2, vocab=tokenizer.n_vocab, block_size=128)
    rows, texts = [], ["Hi there. You!", "One", "A. B. C.", ""]
    for i, text in enumerate(texts):
        ids = tokenizer.prompt("Why? " * i), tokenizer.response(text)[:None if i != 2 else -1]      # one never ended
        rows.append(ids)
    tokens, lengths = gpt.pad([prompt + response for prompt, response in rows])
    rollout = gpt.Rollout(tokens, torch.tensor([len(prompt) for prompt, _ in rows]), lengths)
    rewards, steps = reward_model.step_rewards(model, rollout, tokenizer)
    assert rewards.shape == steps.shape == (4, tokens.shape[1] - 1) and not rewards[~steps].any()
    for row, (prompt, response), text in zip(range(4), rows, texts):
        columns = steps[row].nonzero().flatten().tolist()
        told = [tokenizer.decode(tokens[row, len(prompt):column + 2].tolist()) for column in columns]
        assert told == [text[:stop] for stop in range(1, len(text) + 1) if text[:stop].split(" ")[-1:] in (
            ["there."], ["You!"], ["One"], ["A."], ["B."], ["C."])]
        for column in columns:
            alone = model(tokens[row:row + 1, :column + 2])[0, -1].item()
            assert rewards[row, column].item() == pytest.approx(alone, abs=1e-5)


def test_the_process_model_learns_from_the_stages_own_responses(tmp_path, monkeypatch, capsys):
    """Responses that are another model's; the reward model's checkpoint overwritten; figures of other steps than those
    held out, or a run that goes on with other marks."""
    small = ["--size", "cpu", "--out", str(tmp_path)]
    gpt.main([*small, "--n_layer", "1", "--n_head", "2", "--n_embd", "32", "--batch", "8", "--steps", "2", "--report", "2"])
    model, tokenizer, _ = gpt.load_checkpoint(tmp_path / "cpu/gpt/checkpoint.pt", "gpt", "cpu")
    (tmp_path / "cpu/sft").mkdir()
    gpt.save_checkpoint(tmp_path / "cpu/sft/checkpoint.pt", "sft", "cpu", model, tokenizer)
    monkeypatch.setattr(reward_model, "respond", Writer(tokenizer, broken=False))
    flags = [*small, "--pairs", "48", "--held_out", "24", "--max_new_tokens", "90", "--batch", "4", "--report", "4",
             "--warmup", "1", "--lr", "0.01"]
    reward_model.main([*flags, "--process"])        # trains the missing reward model first, with these flags
    stage, folder, whole = (tmp_path / "cpu" / name for name in ("reward_model", "process_model", "whole"))
    before, end_step = snapshot(stage), Run.end_step
    assert len(read_pairs(stage / "pairs.jsonl")) == 48

    rows, rng = (read_pairs(stage / "pairs.jsonl"), read_pairs(stage / "held_out.jsonl")), random.Random("marks 1")
    items, held_out = (annotator.mark(part, tokenizer, rng) for part in rows)
    *_, learnt, figures = metrics(folder / "metrics.jsonl")
    assert learnt["step"] == len(items) / 8 == 12       # as many responses in a step as the reward model sees
    trained, _, _ = gpt.load_checkpoint(folder / "checkpoint.pt", "process_model", "cpu", model_class=RewardModel)
    margin = reward_model.held_out_margins(trained, held_out)
    true = torch.tensor([x if good else -x for item in held_out for x, good in zip(item.steps, item.marks)])
    expected, _ = answer_key(margin, true)
    assert {name: figures[name] for name in expected} == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert figures["accuracy"] == pytest.approx(learnt["held_out_accuracy"]) and 0.5 < figures["bayes_accuracy"] < 1
    marks = sum(len(item.marks) for item in items)
    assert f"steps   {marks} in 96 responses, " in capsys.readouterr().out

    def stop(run, step, **state):
        end_step(run, step, **state)
        if step == 6:
            raise KeyboardInterrupt

    folder.rename(whole)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "end_step", stop)
        with pytest.raises(KeyboardInterrupt):
            reward_model.main([*flags, "--process"])
    reward_model.main([*flags, "--process", "--resume"])
    weights, expected = (read_torch(path / "checkpoint.pt")["model"] for path in (folder, whole))
    assert all(torch.equal(x, expected[name]) for name, x in weights.items())
    assert untimed(metrics(folder / "metrics.jsonl")) == untimed(metrics(whole / "metrics.jsonl"))
    assert snapshot(stage) == before


def test_marks_of_what_the_annotator_does_not_know_are_refused(policy):
    """A traceback of the annotator's; marks of one's own pairs that nobody gave."""
    train(policy, "--data", str(policy / "pairs.jsonl"))
    before = snapshot(policy)
    with pytest.raises(InputError, match="pairs.jsonl: the annotator marks answers to the little world's requests only"):
        train(policy, "--process")
    with pytest.raises(InputError, match="--process True: goes without --data only"):
        train(policy, "--process", "--data", str(policy / "pairs.jsonl"))
    with pytest.raises(InputError, match="--learning_curve True: is a curve of pairs"):
        train(policy, "--process", "--learning_curve")
    assert snapshot(policy) == before
