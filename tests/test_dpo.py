"""dpo.py against the lecture's numbers, its gradient, and token-by-token loops. Every test says
which bug it is for."""

import contextlib
import json
import math
import random
import re
import sys

import numpy as np
import pytest
import torch

import dpo
import reward_model
import sft
from data import stories
from data.files import InputError, hold_out, read_pairs, write_jsonl
from data.judges import annotator_judge, constitution_judge
from data.run import Run, SilentRun, read_torch, write_torch
from data.tokenizer import Pair, encode_pairs, labels_of
from dpo import dpo_loss, ipo_loss, kto_baseline, kto_loss, orpo_loss, simpo_loss
from gpt import (batches_by_length, load_checkpoint, make_optimizer, pad, response_logprobs,
                 save_checkpoint)
from helpers import cpu_only, metrics, noise, snapshot, tiny_gpt, untimed

END = 4
PAIRS = [Pair([2, 0, 1, 3, 3, END], [2, 0, END], 2),
         Pair([1, 1, END], [1, 2, 3, 0, 0, 1, 2, 2, END], 1),
         Pair([3, 0, 1, 2, 0, END], [3, 0, 1, 2, 1, 1, 1, 1, END], 4),
         Pair([0, END], [0, 3, END], 1),
         Pair([2, 2, 2, 2, 3, 1, 0, 1, 0, END], [2, 2, 2, 2, 1, END], 4)]
LABELS = labels_of(PAIRS)


def numbers(*values):
    return [torch.tensor([value], dtype=torch.float64) for value in values]


def logprob_by_hand(model, sequence, prompt_length):
    """log π(y|x): the response's tokens one by one, each from its own prefix, <|end|> included."""
    total = 0.0
    for t in range(prompt_length, len(sequence)):
        total = total + model(torch.tensor([sequence[:t]]))[0, -1].log_softmax(0)[sequence[t]]
    return total


def log_ratio_by_hand(policy, reference, sequence, prompt_length):
    """log π_θ(y|x)/π_ref(y|x), with a gradient for π_θ."""
    ref = logprob_by_hand(reference, sequence, prompt_length).detach()
    return logprob_by_hand(policy, sequence, prompt_length) - ref


# --------------------------------------------------------------------------------------------------
# The loss


def test_worked_number_of_the_lecture():
    """A wrong sign, or the reference left out (0.750 and 0.713 instead of 0.640)."""
    loss = dpo_loss(*numbers(-15.2, -14.8, -16.0, -14.5), beta=0.1)
    assert loss.item() == pytest.approx(0.640, abs=5e-4)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-0.11)), abs=1e-12)


def test_policy_at_the_reference_is_at_log_2():
    """A margin that is not 0 where policy and reference agree: somewhere the two are not treated
    alike."""
    logprobs = noise(0, 6) * 30, noise(1, 6) * 30
    assert dpo_loss(*logprobs, *logprobs, beta=0.7).item() == pytest.approx(math.log(2))


def test_swapping_a_pair_flips_the_margin():
    """Chosen and rejected mixed up on one side only: the margin then doesn't change its sign."""
    a, b, c, d = numbers(-15.2, -14.8, -16.0, -14.5)
    loss = dpo_loss(a, b, c, d, 0.1)
    swapped = dpo_loss(b, a, d, c, 0.1)
    assert (swapped - loss).item() == pytest.approx(0.11)  # -log σ(-z) + log σ(z) = z
    assert loss < math.log(2) < swapped


@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_gradient_of_the_lecture(beta):
    """The lecture's -β σ(-z) [∇ log π(y_w) - ∇ log π(y_l)]: a loss with another weight, or without
    its beta."""
    logprobs = [(3 * noise(seed, 4)).double().requires_grad_() for seed in range(4)]
    dpo_loss(*logprobs, beta).backward()
    a, b, c, d = [x.detach() for x in logprobs]
    z = beta * ((a - c) - (b - d))
    expected = -beta / (1 + z.exp()) / 4  # σ(-z) = 1 / (1 + e^z); the mean over 4 pairs
    for x, sign in zip(logprobs, (1, -1, -1, 1)):
        torch.testing.assert_close(x.grad, sign * expected)


def test_large_margins_stay_finite():
    """log(sigmoid(z)) is -inf at z = -1000, its gradient nan; logsigmoid is not."""
    logprobs = [x.requires_grad_() for x in numbers(-2000.0, 0.0, -1000.0, -1000.0)]
    loss = dpo_loss(*logprobs, beta=0.5)
    loss.backward()
    assert loss.item() == pytest.approx(1000.0)
    assert logprobs[0].grad.item() == pytest.approx(-0.5)


# --------------------------------------------------------------------------------------------------
# The losses that followed


def test_ipo_is_a_square_around_its_target():
    """β in the place of 1/(2β), a target of 1/β, or a logistic loss: h = 1.1 of the lecture's pair,
    by hand."""
    for beta, target in ((0.5, 1.0), (0.1, 5.0)):
        loss = ipo_loss(*numbers(-15.2, -14.8, -16.0, -14.5), beta)
        assert loss.item() == pytest.approx((1.1 - target) ** 2, abs=1e-12)
    a, b, c, d = [(9 * noise(seed, 50)).double() for seed in range(4)]
    h = (a - c).numpy() - (b - d).numpy()
    assert ipo_loss(a, b, c, d, 0.3).item() == pytest.approx(np.mean((h - 1 / 0.6) ** 2))


def test_ipos_gradient_turns_round_at_its_target():
    """A loss that pulls beyond 1/(2β), as DPO's does: at it the gradient is 0, behind it the sign
    is the other."""
    for h, sign in ((0.9, -1), (1.0, 0), (1.1, 1)):
        chosen, rejected = [x.requires_grad_() for x in numbers(h, 0.0)]
        ipo_loss(chosen, rejected, *numbers(0.0, 0.0), beta=0.5).backward()
        assert chosen.grad.item() == pytest.approx(2 * (h - 1)) == -rejected.grad.item()
        assert np.sign(round(chosen.grad.item(), 9)) == sign


def sigma(x):
    return 1 / (1 + math.exp(-x))


def kto_by_hand(policy, ref, desirable, z0, beta, good=1.0, bad=1.0):
    """λ_y - v(x, y), label by label."""
    total = 0.0
    for r, d in zip((policy - ref).tolist(), desirable.tolist()):
        if d:
            total += good * (1 - sigma(beta * (r - z0)))
        else:
            total += bad * (1 - sigma(beta * (z0 - r)))
    return total / len(desirable)


def test_kto_label_by_label():
    """A weight on the wrong side, good and bad mixed up, a baseline that is added, or a mean over
    one side only."""
    policy = noise(0, 40).double() * 5
    ref = noise(1, 40).double() * 5
    desirable = noise(2, 40) > 0.3
    for z0, beta, weights in ((0.0, 0.2, (1.0, 1.0)), (1.7, 0.2, (1.0, 1.0)),
                              (0.9, 1.0, (1.5, 0.75))):
        loss = kto_loss(policy, ref, desirable, z0, beta, *weights)
        expected = kto_by_hand(policy, ref, desirable, z0, beta, *weights)
        assert loss.item() == pytest.approx(expected, rel=1e-6)

    # r̂ = 1, z0 = 3, β = 1: 1 - σ(-2); a bad one: 1 - σ(2).
    one, zero = numbers(1.0, 0.0)
    good = torch.tensor([True])
    for label, weight, expected in ((good, 1.0, 0.8808), (~good, 1.0, 0.1192), (good, 2.0, 1.7616)):
        loss = kto_loss(one, zero, label, 3.0, 1.0, desirable_weight=weight)
        assert loss.item() == pytest.approx(expected, abs=1e-4)


def test_simpos_gamma_is_a_margin():
    """CS 224R adds γ to the rewards of both responses, where it cancels: the loss then doesn't know
    it."""
    a = noise(0, 30).double()
    b = noise(1, 30).double()
    for beta, gamma in ((2.0, 0.5), (2.5, 1.4), (1.0, 0.0)):
        z = beta * a.numpy() - beta * b.numpy() - gamma
        expected = np.log1p(np.exp(-z)).mean()
        assert simpo_loss(a, b, beta, gamma).item() == pytest.approx(expected)
    level = simpo_loss(*numbers(-1.0, -1.0), beta=2.0, gamma=0.5)
    assert level.item() == pytest.approx(math.log(1 + math.exp(0.5)))  # not 0.693: equal won't do


def test_orpo_of_odds_by_hand():
    """A ratio of probabilities for one of odds, λ on the SFT loss, the rejected response's loss, or
    a sign."""
    p = np.linspace(0.02, 0.9, 12)
    q = np.linspace(0.95, 0.1, 12)
    for lam in (0.0, 0.5, 2.0):
        ratio = (p / (1 - p)) / (q / (1 - q))
        expected = (-np.log(p) + lam * np.log1p(1 / ratio)).mean()
        loss = orpo_loss(torch.tensor(np.log(p)), torch.tensor(np.log(q)), lam)
        assert loss.item() == pytest.approx(expected)

    # p = 1/2 and q = 1/5: odds 1 and 1/4, σ(log 4) = 0.8
    loss = orpo_loss(*numbers(math.log(0.5), math.log(0.2)), 1.0)
    assert loss.item() == pytest.approx(math.log(2) - math.log(0.8))


def test_orpos_odds_near_one():
    """log(1 - exp(m)) of float32 is -inf long before m is 0; at 0, for a text known by heart,
    gradients are nan."""
    chosen = torch.tensor([-1e-5], requires_grad=True)
    loss = orpo_loss(chosen, torch.tensor([-1.0]), lam=0.5)
    ratio = (1 / math.expm1(1e-5)) * math.expm1(1.0)
    assert loss.item() == pytest.approx(1e-5 + 0.5 * math.log1p(1 / ratio), rel=1e-4)
    for means in ((0.0, 0.0), (0.0, -2.0), (-2.0, 0.0), (-80.0, 0.0), (0.0, -80.0), (-80.0, -80.0)):
        leaves = [torch.tensor([mean], requires_grad=True) for mean in means]
        loss = orpo_loss(*leaves, lam=0.5)
        loss.backward()
        assert math.isfinite(loss.item())
        assert all(x.grad.isfinite().all() for x in leaves), means


@pytest.mark.parametrize("loss", ["ipo", "simpo", "kto"])
def test_large_values_stay_finite(loss):
    """log(sigmoid(z)) is -inf at z = -1000, its gradient nan; a value that saturates is a number
    all the same."""
    for values in ((-2000.0, 0.0), (0.0, -2000.0), (-2000.0, -2000.0)):
        a, b = [torch.tensor([value], requires_grad=True) for value in values]
        if loss == "ipo":
            found = ipo_loss(a, b, 0 * a, 0 * b, 0.1)
        elif loss == "simpo":
            found = simpo_loss(a, b, 2.0, 0.5)
        else:
            good = torch.tensor([True, False])
            found = kto_loss(torch.cat([a, b]), torch.zeros(2), good, 1.0, 0.5)
        found.backward()
        assert found.dim() == 0 and math.isfinite(found.item())
        assert all(x.grad.isfinite().all() for x in (a, b))


# --------------------------------------------------------------------------------------------------
# Summed log-probabilities


@torch.no_grad()
def test_logprobs_are_sums_token_by_token():
    """A mean for the sum (another loss, SimPO's), <|end|> left out, the prompt or the padding
    counted; chosen and rejected exchanged."""
    model = tiny_gpt(0)
    assert [label.ids for label in LABELS[:5]] == [pair.chosen for pair in PAIRS]
    assert [label.ids for label in LABELS[5:]] == [pair.rejected for pair in PAIRS]
    assert [label.prompt_length for label in LABELS] == 2 * [pair.prompt_length for pair in PAIRS]
    assert [label.desirable for label in LABELS] == [True] * 5 + [False] * 5

    by_hand = [logprob_by_hand(model, label.ids, label.prompt_length).item() for label in LABELS]
    tokens, lengths = pad([label.ids for label in LABELS])
    prompt_lengths = torch.tensor([label.prompt_length for label in LABELS])
    for padding in (0, END):
        padded = torch.where(torch.arange(tokens.shape[1]) < lengths[:, None], tokens, padding)
        found = response_logprobs(model, padded, prompt_lengths, lengths)
        assert found.tolist() == pytest.approx(by_hand, abs=1e-4)
    assert dpo.label_logprobs(model, LABELS).tolist() == pytest.approx(by_hand, abs=1e-4)
    chosen, rejected = dpo.pair_logprobs(model, PAIRS)
    assert chosen.tolist() + rejected.tolist() == pytest.approx(by_hand, abs=1e-4)


@torch.no_grad()
def baseline_by_hand(policy, reference, labels):
    """z0: each prompt with the next label's response, couple by couple."""
    ratios = []
    for label, other in zip(labels, labels[1:] + labels[:1]):
        prompt = label.ids[:label.prompt_length]
        couple = prompt + other.ids[other.prompt_length:]
        same = prompt == other.ids[:other.prompt_length]
        if not same and len(couple) <= policy.config.block_size:
            ratios.append(log_ratio_by_hand(policy, reference, couple, len(prompt)).item())
    return sum(ratios) / len(ratios), len(ratios)


@pytest.mark.parametrize("rows", [1, 4, 64])
def test_ktos_baseline_couple_by_couple(rows):
    """A prompt with its own response, a response cut at the wrong place, a last part that counts as
    much as a full one; a negative KL; a couple that exceeds the context ends in a traceback."""
    for block_size, count in ((32, 10), (9, 8)):
        models = [tiny_gpt(seed, block_size=block_size) for seed in (0, 1)]
        fitting = [label for label in LABELS if len(label.ids) <= block_size]
        mean, found = baseline_by_hand(*models, fitting)
        assert found == count and (block_size == 32 or found < len(fitting)) and abs(mean) > 0.1
        there = kto_baseline(*models, fitting, rows)
        back = kto_baseline(*reversed(models), fitting, rows)
        assert [there, back] == pytest.approx([max(0.0, mean), max(0.0, -mean)], abs=1e-4)
        assert min(there, back) == 0 < there + back


def test_ktos_baseline_without_a_mismatch():
    """The next label may answer the same prompt, or be the only one: its own log-ratio is no
    estimate of the KL."""
    models = tiny_gpt(0), tiny_gpt(1)
    pair = labels_of(PAIRS[:1])
    for labels in (pair[:1], pair, 2 * pair):
        assert kto_baseline(*models, labels) == 0 == kto_baseline(*reversed(models), labels)


# --------------------------------------------------------------------------------------------------
# The loops


def record_gradients(policy, monkeypatch):
    """A list that gets the gradients of a loop's step; the weights stay."""
    gradients = []

    def look(optimizer, model, lr):
        assert model is policy
        gradients.extend(parameter.grad.clone() for parameter in model.parameters())
        optimizer.zero_grad()

    monkeypatch.setattr(dpo, "optimizer_step", look)
    return gradients


def check_gradients(gradients, loss, policy):
    """They are those of the loss, and what came after the step has left none."""
    expected = torch.autograd.grad(loss, list(policy.parameters()))
    for found, gradient in zip(gradients, expected, strict=True):
        torch.testing.assert_close(found, gradient, rtol=1e-3, atol=1e-5)
    assert all(parameter.grad is None for parameter in policy.parameters())


def learn_from_pairs(loop, policy, reference, config, run):
    """Either of the loops over pairs, on PAIRS, which are held out too."""
    rng = random.Random(0)
    if loop == "dpo":
        dpo.dpo(policy, reference, PAIRS, PAIRS, config, rng, run)
    else:
        optimizer = make_optimizer(policy, weight_decay=0.0)
        dpo.fit_pairs(policy, reference, PAIRS, PAIRS, optimizer, config, rng, run)


def pair_by_hand(loss, policy, reference, pair):
    """(the loss with β 0.3, γ 0.4, λ 0.7, the margin) of a Pair."""
    n = pair.prompt_length
    if loss in ("dpo", "ipo"):
        h = (log_ratio_by_hand(policy, reference, pair.chosen, n)
             - log_ratio_by_hand(policy, reference, pair.rejected, n))
        if loss == "dpo":
            return (1 + (-0.3 * h).exp()).log(), 0.3 * h
        return (h - 1 / 0.6) ** 2, 0.3 * h
    w = logprob_by_hand(policy, pair.chosen, n) / (len(pair.chosen) - n)
    l = logprob_by_hand(policy, pair.rejected, n) / (len(pair.rejected) - n)
    if loss == "simpo":
        return (1 + (0.4 - 0.3 * (w - l)).exp()).log(), w - l
    odds_ratio = (w.exp() / (1 - w.exp())) / (l.exp() / (1 - l.exp()))
    return -w + 0.7 * (1 + 1 / odds_ratio).log(), w - l


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 5])
@pytest.mark.parametrize("loop, loss", [("dpo", "dpo"), ("fit_pairs", "dpo"), ("fit_pairs", "ipo"),
                                        ("fit_pairs", "simpo"), ("fit_pairs", "orpo")])
def test_a_step_pair_by_pair(loop, loss, micro_batch, monkeypatch):
    """A sum for a mean or a mean for a sum, arguments in the wrong order; the last, smaller
    micro-batch weighing as much as the others; a reference that learns along; a figure of another
    loss, or from another column; held-out pairs that are trained on."""
    config = dpo.Config(loss=loss, beta=0.3, gamma=0.4, lam=0.7, batch=5, micro_batch=micro_batch)
    policy = tiny_gpt(0)
    reference = None
    if loss in ("dpo", "ipo"):
        reference = tiny_gpt(1)
    gradients = record_gradients(policy, monkeypatch)
    run = SilentRun()
    learn_from_pairs(loop, policy, reference, config, run)

    by_hand = [pair_by_hand(loss, policy, reference, pair) for pair in PAIRS]
    value = torch.stack([one for one, _ in by_hand]).mean()
    margins = torch.stack([margin for _, margin in by_hand])
    check_gradients(gradients, value, policy)
    accuracy = (margins > 0).float().mean().item()
    expected = dict(loss=value.item(), accuracy=accuracy, margin=margins.mean().item(),
                    held_out_loss=value.item(), held_out_accuracy=accuracy)
    if reference:
        for name in ("chosen", "rejected"):
            ratios = [log_ratio_by_hand(policy, reference, getattr(pair, name), pair.prompt_length)
                      for pair in PAIRS]
            expected[f"{name}_log_ratio"] = torch.stack(ratios).mean().item()
        assert all(parameter.grad is None for parameter in reference.parameters())
    [row] = untimed(run.rows)
    assert 0 < accuracy < 1
    assert row == pytest.approx({"step": 1, **expected}, abs=1e-4)


@pytest.mark.parametrize("loop", ["dpo", "fit_pairs"])
def test_the_loss_that_is_reported_is_the_one_that_was_trained_on(loop, monkeypatch):
    """A figure that computes its own loss: whoever changes dpo_loss trains on one and reads the
    other. Here it is a square, with another gradient and other values."""
    def square(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta):
        h = (policy_chosen - ref_chosen) - (policy_rejected - ref_rejected)
        return ((h - 1 / (2 * beta)) ** 2).mean()

    monkeypatch.setattr(dpo, "dpo_loss", square)
    policy = tiny_gpt(0)
    reference = tiny_gpt(1)
    gradients = record_gradients(policy, monkeypatch)
    run = SilentRun()
    config = dpo.Config(beta=0.3, batch=5, micro_batch=2)
    learn_from_pairs(loop, policy, reference, config, run)
    losses = [pair_by_hand("ipo", policy, reference, pair)[0] for pair in PAIRS]
    value = torch.stack(losses).mean()
    check_gradients(gradients, value, policy)
    [row] = run.rows
    assert row["loss"] == pytest.approx(value.item(), rel=1e-4) == row["held_out_loss"]


def label_by_hand(policy, reference, label, z0):
    """(KTO's loss with β 0.3, λ_D 1.5 and λ_U 0.75; r̂ - z0 on the label's side) of a Label."""
    r = 0.3 * (log_ratio_by_hand(policy, reference, label.ids, label.prompt_length) - z0)
    margin = r if label.desirable else -r
    weight = 1.5 if label.desirable else 0.75
    return weight * (1 - 1 / (1 + (-margin).exp())), margin


@pytest.mark.parametrize("micro_batch", [1, 3, 10])
@pytest.mark.parametrize("paired", [False, True])
def test_a_step_label_by_label(paired, micro_batch, monkeypatch):
    """A micro-batch with a weight or a baseline of its own; a gradient through the baseline; the
    good labels' weight on the bad ones; an accuracy of pairs beside that of labels, or of responses
    to different prompts."""
    labels = random.Random(3).sample(LABELS, len(LABELS))
    held_out = LABELS if paired else labels
    [order] = batches_by_length([len(label.ids) for label in labels], 10, random.Random(0))
    batch = [labels[i] for i in order]  # the next label's response is the baseline's
    policy = tiny_gpt(0)
    reference = tiny_gpt(1)
    if baseline_by_hand(policy, reference, batch)[0] < 0:  # 0 would hide where it comes from
        policy, reference = reference, policy
    z0, _ = baseline_by_hand(policy, reference, batch)
    held_out_z0, _ = baseline_by_hand(policy, reference, held_out)
    assert z0 > 0.1 and held_out_z0 > 0.1 and abs(z0 - held_out_z0) > 0.01

    gradients = record_gradients(policy, monkeypatch)
    run = SilentRun()
    config = dpo.Config(loss="kto", beta=0.3, batch=10, micro_batch=micro_batch,
                        desirable_weight=1.5, undesirable_weight=0.75)
    dpo.kto(policy, reference, labels, held_out, paired, make_optimizer(policy, weight_decay=0.0),
            config, random.Random(0), run)
    assert all(parameter.grad is None for parameter in reference.parameters())

    by_hand = [label_by_hand(policy, reference, label, z0) for label in batch]
    value = torch.stack([one for one, _ in by_hand]).mean()
    margins = torch.stack([margin for _, margin in by_hand])
    check_gradients(gradients, value, policy)
    expected = dict(loss=value.item(), accuracy=(margins > 0).float().mean().item(),
                    margin=margins.mean().item())

    by_hand = [label_by_hand(policy, reference, label, held_out_z0) for label in held_out]
    expected["held_out_loss"] = torch.stack([one for one, _ in by_hand]).mean().item()
    margins = torch.stack([margin for _, margin in by_hand])
    if paired:
        margins = margins[:5] + margins[5:]  # r̂(x, y_w) - r̂(x, y_l)
    expected["held_out_accuracy"] = (margins > 0).float().mean().item()
    [row] = untimed(run.rows)
    assert 0 < expected["accuracy"] < 1
    assert row == pytest.approx({"step": 1, **expected}, abs=1e-4)


def test_training_prefers_the_chosen():
    """A loss that goes down while the chosen responses lose against the rejected ones."""
    policy = tiny_gpt(0)
    reference = tiny_gpt(0)
    run = SilentRun(report=1)
    config = dpo.Config(beta=0.5, batch=5, micro_batch=2, epochs=15, lr=5e-3, warmup=1)
    dpo.dpo(policy, reference, PAIRS, PAIRS, config, random.Random(0), run)
    first = run.rows[0]
    last = run.rows[-1]
    names = ("loss", "accuracy", "margin", "chosen_log_ratio", "rejected_log_ratio")
    assert [first[name] for name in names] == pytest.approx([math.log(2), 0, 0, 0, 0], abs=1e-5)
    assert last["held_out_accuracy"] == 1 and last["margin"] > 0.5 and last["held_out_loss"] < 0.5
    assert last["chosen_log_ratio"] > last["rejected_log_ratio"]
    assert same_weights(reference, tiny_gpt(0))


# --------------------------------------------------------------------------------------------------
# The script


FLAGS = "--size cpu --batch 8 --report 2 --max_new_tokens 8".split()
LOG_RATIOS = {"chosen_log_ratio", "rejected_log_ratio"}
FIGURES = {"step", "loss", "accuracy", "margin", "held_out_loss", "held_out_accuracy"}


def run_dpo(out, *flags):
    dpo.main(["--out", str(out), *FLAGS, *flags])


def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


def load(folder, stage="dpo"):
    """(a stage's model, its tokenizer)."""
    model, tokenizer, _ = load_checkpoint(folder / "checkpoint.pt", stage, "cpu")
    return model, tokenizer


@cpu_only
def test_main_on_the_collected_pairs(out, capsys):
    """A run that cannot be repeated, that trains on the held-out pairs, or that writes over another
    stage."""
    before = snapshot(out)
    for name in ("dpo", "dpo-again"):
        run_dpo(out, "--name", name, "--micro_batch", "3")
    rows = untimed(metrics(out / "cpu/dpo/metrics.jsonl"))
    assert rows == untimed(metrics(out / "cpu/dpo-again/metrics.jsonl"))
    assert set(rows[0]) == FIGURES | LOG_RATIOS
    assert [row["step"] for row in rows] == [2, 4, 6, 8]  # 64 pairs, 8 in a step
    after = snapshot(out)
    assert {path: after[path] for path in before} == before
    printed = capsys.readouterr().out
    assert "64 pairs" in printed and "16 held out" in printed
    assert "next: python best_of_n.py" in printed
    assert re.search("before and after on 33 held-out prompts: reward .*; gold ", printed)

    # The held-out figures are those of the saved policy on held_out.jsonl.
    policy, tokenizer = load(out / "cpu/dpo")
    reference, _ = load(out / "cpu/sft", "sft")
    held_out = read_pairs(out / "cpu/reward_model/held_out.jsonl")
    pairs, _, _ = encode_pairs(held_out, tokenizer, policy.config.block_size)
    margins = []
    for pair in pairs:  # β 0.2: the README's, and the default
        margins.append(0.2 * (log_ratio_by_hand(policy, reference, pair.chosen, pair.prompt_length)
                              - log_ratio_by_hand(policy, reference, pair.rejected,
                                                  pair.prompt_length)).item())
    loss = np.log1p(np.exp(-np.array(margins))).mean()
    assert rows[-1]["held_out_loss"] == pytest.approx(loss, abs=1e-4)
    assert rows[-1]["held_out_accuracy"] == pytest.approx(np.mean(np.array(margins) > 0))


def test_main_on_somebodys_own_pairs(out, tmp_path, capsys):
    """Pairs cut to fit the context, equal texts trained on, or a reward model asked for that DPO
    doesn't need."""
    rng = random.Random(0)
    rows = []
    for i in range(40):
        chosen = "Yes " * rng.randint(1, 3) + "."
        rows.append({"prompt": f"Say {i}.", "chosen": chosen, "rejected": "No."})
    rows.append({"prompt": "Say 1.", "chosen": "So.", "rejected": "So."})
    rows.append({"prompt": "Say 2.", "chosen": "A. " * 200, "rejected": "B."})
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    (out / "cpu/reward_model/checkpoint.pt").unlink()
    run_dpo(out, "--data", str(tmp_path / "pairs.jsonl"), "--lr", "1e-2", "--warmup", "1")

    # A tenth of 40 prompts is held out; "Say 1." and "Say 2.", of whose two rows one is dropped,
    # may be among them.
    found = re.search(
        r"pairs.jsonl\n +(\d+) pairs, dropped (\d) longer than the context, (\d) equal texts\n"
        r" +(\d+) held out, dropped (\d) longer than the context, (\d) equal texts\n",
        capsys.readouterr().out)
    kept, longer, equal, held_out, held_out_longer, held_out_equal = map(int, found.groups())
    assert (kept, held_out) == (36, 4)
    assert longer + held_out_longer == equal + held_out_equal == 1
    rows = metrics(out / "cpu/dpo/metrics.jsonl")
    assert rows[-1]["held_out_accuracy"] == 1
    assert rows[-1]["held_out_loss"] < rows[0]["held_out_loss"]
    assert not (out / "cpu/reward_model/checkpoint.pt").exists()


def own_pairs(path, count=40, chosen="Yes."):
    """Write pairs that are not of the little world; the flags that name the file."""
    rows = []
    for i in range(count):
        rows.append({"prompt": f"Say {i}.", "chosen": chosen, "rejected": "No, no."})
    write_jsonl(path, rows)
    return ["--data", str(path)]


def test_the_policy_is_shown_at_the_prompts_of_its_pairs(out, tmp_path, capsys):
    """The world's requests put to a policy of somebody's own pairs, because reward_model.py was the
    one to get --data."""
    reward_model.main(["--out", str(out), *own_pairs(tmp_path / "pairs.jsonl", 30), *FLAGS])
    capsys.readouterr()
    run_dpo(out)
    printed = capsys.readouterr().out
    shown = re.search(r"\nprompt   (.*)\nbefore   \[reward .*\nafter    \[reward ", printed)
    held_out = read_pairs(out / "cpu/reward_model/held_out.jsonl")
    assert shown[1] in {row["prompt"] for row in held_out}
    assert "before and after on 2 held-out prompts: reward " in printed and "gold" not in printed


def test_main_without_pairs(out, tmp_path):
    """An empty batch ends in nan weights that are saved over the last good checkpoint; a file that
    the message leaves out."""
    run_dpo(out)
    before = snapshot(out)
    data = own_pairs(tmp_path / "pairs.jsonl", 9, chosen="No, no.")
    with pytest.raises(InputError, match="pairs.jsonl: no pair is left"):
        run_dpo(out, *data)
    one_prompt = [{"prompt": "Why?", "chosen": f"So {i}.", "rejected": "No."} for i in range(9)]
    write_jsonl(tmp_path / "pairs.jsonl", one_prompt)
    with pytest.raises(InputError, match="pairs.jsonl.*same prompt"):
        run_dpo(out, *data)
    assert snapshot(out) == before


def test_a_name_that_is_another_stages(out):
    """--name sft: the policy takes the place of the reference that it was trained against."""
    before = snapshot(out)
    for name in ("sft", "reward_model", "ppo", "my-dpo", "../dpo", "dpo/../sft"):
        with pytest.raises(InputError, match="--name .*must be dpo"):
            run_dpo(out, "--name", name)
    assert snapshot(out) == before


# --------------------------------------------------------------------------------------------------
# The script with the other losses, and online


def check_same(folder, other):
    """Two runs have left the same weights and figures."""
    assert same_weights(load(folder)[0], load(other)[0])
    assert untimed(metrics(folder / "metrics.jsonl")) == untimed(metrics(other / "metrics.jsonl"))


@contextlib.contextmanager
def stopped_after(calls, owner=Run, name="end_step"):
    """A run inside is stopped when it has called this function so often; end_step: after this step,
    when its state has been saved if it was due."""
    original = getattr(owner, name)
    done = []

    def stop(*arguments):
        result = original(*arguments)
        done.append(name)
        if len(done) == calls:
            raise KeyboardInterrupt
        return result

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(owner, name, stop)
        yield


def record_loads(monkeypatch):
    """The list of the stages whose checkpoints dpo.py loads from here on."""
    stages = []
    load_checkpoint = dpo.load_checkpoint

    def recorded(path, stage, *rest):
        stages.append(stage)
        return load_checkpoint(path, stage, *rest)

    monkeypatch.setattr(dpo, "load_checkpoint", recorded)
    return stages


@pytest.mark.parametrize("loss, before, after", [
    ("dpo", ["sft", "sft"], ["reward_model"]), ("ipo", ["sft", "sft"], ["reward_model"]),
    ("kto", ["sft", "sft"], ["reward_model"]), ("simpo", ["sft"], ["reward_model", "sft"]),
    ("orpo", ["gpt"], ["reward_model", "sft"])])
def test_models_in_memory(loss, before, after, out, monkeypatch, capsys):
    """A reference that the loss doesn't need; ORPO on top of SFT, two stages. Texts on the screen
    need SFT afterwards. SimPO's β taken for a price of KL by whoever reads the checkpoint."""
    events = record_loads(monkeypatch)
    save = dpo.save_checkpoint

    def recorded(*rest, **extra):
        events.append("saved")
        save(*rest, **extra)

    monkeypatch.setattr(dpo, "save_checkpoint", recorded)
    run_dpo(out, "--loss", loss)
    assert events == [*before, "saved", *after]
    _, _, checkpoint = load_checkpoint(out / "cpu/dpo/checkpoint.pt", "dpo", "cpu")
    assert ("beta" in checkpoint) == (loss in ("dpo", "kto"))
    rows = untimed(metrics(out / "cpu/dpo/metrics.jsonl"))
    assert set(rows[0]) == (FIGURES | LOG_RATIOS if loss in ("dpo", "ipo") else FIGURES)
    last = 16 if loss == "kto" else 8  # 64 pairs, or 128 labels
    assert [row["step"] for row in rows] == list(range(2, last + 1, 2))
    printed = capsys.readouterr().out
    assert "before and after on 33 held-out prompts: reward " in printed
    assert f"models in memory: {len(before)} (policy" in printed


@pytest.mark.parametrize("argv, message", [
    ("--gamma 1", "--gamma 1.0: goes with --loss simpo only"),
    ("--loss kto --gamma 1", "--gamma 1.0: goes with"),
    ("--loss ipo --lam 1", "--lam 1.0: goes with --loss orpo only"),
    ("--loss simpo --lam 1", "--lam 1.0: goes with"),
    ("--undesirable_weight 2", "--undesirable_weight 2.0: goes with --loss kto only"),
    ("--loss orpo --beta 0.1", "--beta 0.1: goes with --loss dpo or ipo or kto or simpo only"),
    ("--pairs 8", "--pairs 8: goes with --online only"),
    ("--online 0 --pairs 8", "--pairs 8: goes with --online only"),
    ("--judge annotator", "--judge annotator: goes with --online only"),
    ("--beta 0", "--beta 0.0: must be positive"),
    ("--loss ipo --beta 0", "--beta 0.0: must be positive"),
    ("--lr 0", "--lr 0.0: must be positive"),
    ("--online 2 --loss orpo", "--online 2: goes with --start sft only"),
    ("--online 2 --start gpt", "--online 2: goes with --start sft only"),
    ("--online 2 --data {data} --judge annotator",
     "--judge annotator: knows the little world only, not .*data.jsonl")])
def test_what_a_run_would_ignore_is_refused(argv, message, out, tmp_path):
    """A sweep over a flag that changes nothing; minutes of training before a refusal; half a run
    left behind."""
    own_pairs(tmp_path / "data.jsonl")
    before = snapshot(out)
    with pytest.raises(InputError, match=f"^{message}") as error:
        dpo.main(["--out", str(out), *argv.format(data=tmp_path / "data.jsonl").split()])
    assert "\n" not in str(error.value) and snapshot(out) == before


def test_a_loss_brings_its_defaults(monkeypatch, capsys):
    """SimPO with DPO's β, ORPO from the SFT model, a flag of the user's that is overruled; --help
    that is silent."""
    seen = []
    monkeypatch.setattr(dpo, "train", seen.append)
    for argv in ("", "--loss kto", "--loss simpo", "--loss orpo",
                 "--loss orpo --start sft --lr 0.5", "--loss simpo --beta 3", "--loss ipo"):
        dpo.main(["--size", "cpu", *argv.split()])
    plain, kto, simpo, orpo, own_orpo, own_simpo, ipo = seen
    assert plain == dpo.Config(size="cpu")
    assert (plain.loss, plain.start, plain.batch) == ("dpo", "sft", 32)
    assert (kto.batch, kto.beta, kto.start) == (64, plain.beta, "sft")  # 64 labels: 32 pairs
    assert (simpo.beta, simpo.start, simpo.lr) == (10.0, "sft", plain.lr / 2)
    assert (orpo.start, orpo.lr) == ("gpt", sft.Config.lr)  # it learns to answer, as SFT does
    assert (own_orpo.start, own_orpo.lr, own_simpo.beta, ipo.beta) == ("sft", 0.5, 3.0, 0.05)
    with pytest.raises(SystemExit):
        dpo.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "(default: 'sft'; orpo: 'gpt')" in text
    assert "(default: 0.2; ipo: 0.05; simpo: 10.0)" in text


def test_labels_of_somebodys_own(out, tmp_path, capsys):
    """Labels that are turned round, cut to fit, or grouped by prompt: a policy that learns what it
    should unlearn."""
    rows = []
    for i in range(40):  # KTO needs no pairs
        rows.append({"prompt": f"Say {i}.", "completion": "Yes.", "label": True})
        if i % 2:
            rows.append({"prompt": f"Say {i}.", "completion": "No.", "label": False})
    rows.append({"prompt": "Say 1.", "completion": "So. " * 200, "label": True})
    write_jsonl(tmp_path / "labels.jsonl", rows)
    (out / "cpu/reward_model/checkpoint.pt").unlink()
    flags = "--loss kto --lr 1e-2 --warmup 1 --epochs 3"
    run_dpo(out, "--data", str(tmp_path / "labels.jsonl"), *flags.split())
    found = re.search(r"labels.jsonl: (\d+) labels, (\d+) held out; dropped (\d) longer",
                      capsys.readouterr().out)
    kept, held_out, dropped = map(int, found.groups())
    assert kept + held_out == 60 and dropped == 1 and 4 <= held_out <= 8
    first, *_, last = metrics(out / "cpu/dpo/metrics.jsonl")
    assert last["held_out_loss"] < min(0.4, first["held_out_loss"])  # 0.5 before the first step
    assert not (out / "cpu/reward_model/checkpoint.pt").exists()

    policy, tokenizer = load(out / "cpu/dpo")
    reference, _ = load(out / "cpu/sft", "sft")
    prompt = tokenizer.prompt("Say 7.")
    for text, good in (("Yes.", True), ("No.", False)):
        ids = prompt + tokenizer.response(text)
        assert (log_ratio_by_hand(policy, reference, ids, len(prompt)) > 0) == good


def test_pairs_serve_as_two_labels_each(out, tmp_path, monkeypatch, capsys):
    """KTO on a file of pairs that learns from the chosen ones only; a held-out prompt that is
    trained on."""
    labels = []
    kto_part = dpo.kto_part

    def recorded(policy, reference, part, *rest):
        if torch.is_grad_enabled():
            labels.extend(part)
        return kto_part(policy, reference, part, *rest)

    monkeypatch.setattr(dpo, "kto_part", recorded)
    run_dpo(out, "--loss", "kto", *own_pairs(tmp_path / "pairs.jsonl"))
    assert "72 labels, 8 held out; dropped 0 longer" in capsys.readouterr().out
    _, tokenizer = load(out / "cpu/sft", "sft")
    texts = set()
    for ids, n, good in labels:
        texts.add((tokenizer.decode(ids[:n]), tokenizer.decode(ids[n:-1]), good))
    assert len(labels) == 72 == len(texts)
    assert len({prompt for prompt, _, _ in texts}) == 36
    assert {text[1:] for text in texts} == {("Yes.", True), ("No, no.", False)}


TOO_LONG = [{"prompt": prompt, "completion": "b " * 999, "label": True} for prompt in "ab"]


@pytest.mark.parametrize("rows, reason", [
    ([{"prompt": "a", "completion": "b", "label": 1}],
     ':1: "label" must be true or false, found the number 1'),
    ([{"prompt": "a", "completion": "b"}], ':1: the field "label" is missing'),
    (TOO_LONG, ": no label is left to train on; dropped 2 longer than the context")])
def test_wrong_labels_cost_nothing(rows, reason, out, tmp_path):
    """A 1 taken for true in one library and refused by the next; an empty batch that ends in nan
    weights."""
    path = tmp_path / "labels.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = snapshot(out)
    with pytest.raises(InputError) as error:
        run_dpo(out, "--loss", "kto", "--data", str(path))
    assert str(error.value).startswith(f"{path}{reason}") and "\n" not in str(error.value)
    assert snapshot(out) == before


ONLINE = "--online 2 --pairs 12 --batch 4 --max_new_tokens 16".split()


@pytest.mark.parametrize("loss, judge", [
    ("dpo", "reward_model"), ("dpo", "annotator"), ("kto", "reward_model"),
    ("kto", "constitution"), ("simpo", "annotator")])
def test_rounds_are_new_samples_of_the_policy(loss, judge, out, monkeypatch, capsys):
    """Every round on samples of the SFT model, which is offline DPO; a reference that moves along;
    a round trained on the pairs of another, or with its prompts; an optimizer or a schedule that
    starts again; a judge who isn't asked, or is in memory and isn't."""
    loaded = record_loads(monkeypatch)
    start, tokenizer = load(out / "cpu/sft", "sft")
    collect_pairs = dpo.collect_pairs
    name = "kto" if loss == "kto" else "fit_pairs"
    learn = getattr(dpo, name)
    others = {"annotator": annotator_judge, "constitution": constitution_judge}
    sampled = []    # the policy's weights at each round
    learnt = []     # the pairs or labels of each round
    policies = []   # of each round
    optimizers = []     # of each step
    rates = []
    optimizer_step = dpo.optimizer_step

    def recorded_step(optimizer, policy, lr):
        optimizers.append(optimizer)
        rates.append(lr)
        optimizer_step(optimizer, policy, lr)

    def recorded_collect(policy, *rest):
        policies.append(policy)
        sampled.append({name: x.clone() for name, x in policy.state_dict().items()})
        assert ("reward_model" in loaded) == (judge == "reward_model")
        asked = [other for other in others if others[other] in rest]
        assert asked == ([] if judge == "reward_model" else [judge])
        return collect_pairs(policy, *rest)

    def recorded_learn(policy, reference, items, held_out, *rest):
        assert policy is policies[-1]
        learnt.append(items)
        learn(policy, reference, items, held_out, *rest)
        assert reference is None if loss == "simpo" else same_weights(reference, start)

    monkeypatch.setattr(dpo, "collect_pairs", recorded_collect)
    monkeypatch.setattr(dpo, name, recorded_learn)
    monkeypatch.setattr(dpo, "optimizer_step", recorded_step)
    run_dpo(out, "--loss", loss, "--judge", judge, *ONLINE)
    assert policies == policies[:1] * 2
    steps = 12 if loss == "kto" else 6
    assert optimizers == optimizers[:1] * steps
    peak = rates.index(max(rates))
    assert peak < steps // 2 and rates[peak:] == sorted(rates[peak:], reverse=True)
    first, second = sampled
    assert all(torch.equal(x, first[name]) for name, x in start.state_dict().items())
    assert not all(torch.equal(x, second[name]) for name, x in start.state_dict().items())

    prompts = []
    for number in (1, 2):
        rows = read_pairs(out / f"cpu/dpo/pairs-{number}.jsonl")
        assert len(rows) == 12
        prompts.append([row["prompt"] for row in rows])
        assert all(stories.parse_request(prompt) for prompt in prompts[-1])
        pairs, _, _ = encode_pairs(rows, tokenizer, 128)
        assert learnt[number - 1] == (labels_of(pairs) if loss == "kto" else pairs)
    assert prompts[0] != prompts[1]
    rows = metrics(out / "cpu/dpo/metrics.jsonl")
    assert {row["step"] for row in rows} == {*range(2, steps + 1, 2), steps // 2}
    printed = capsys.readouterr().out
    assert f"2 rounds of 12 pairs, by the {judge}; held out: " in printed


@pytest.mark.parametrize("owner, name, calls", [
    (Run, "end_step", 1), (Run, "end_step", 2), (Run, "end_step", 3), (Run, "end_step", 4),
    (Run, "end_step", 5), (Run, "end_step", 6), (dpo, "collect_pairs", 1),
    (dpo, "collect_pairs", 2), (dpo, "write_jsonl", 1), (dpo, "write_jsonl", 2)])
def test_online_it_continues_bit_for_bit(owner, name, calls, out):
    """A round that is sampled anew from a policy further on, or trained on twice; batches in
    another order; a schedule that starts again. Rounds end after step 3, the state is saved every
    2: steps before a round's samples are redone."""
    run_dpo(out, "--name", "dpo-whole", *ONLINE)
    with stopped_after(calls, owner, name):
        run_dpo(out, "--name", "dpo-killed", *ONLINE)
    whole = out / "cpu/dpo-whole"
    killed = out / "cpu/dpo-killed"
    assert not (killed / "checkpoint.pt").exists()
    run_dpo(out, "--name", "dpo-killed", *ONLINE, "--resume")
    check_same(whole, killed)
    for name in ("pairs-1.jsonl", "pairs-2.jsonl"):
        assert (whole / name).read_bytes() == (killed / name).read_bytes()


@pytest.mark.parametrize("loss", ["ipo", "kto", "simpo", "orpo"])
def test_every_loss_continues_bit_for_bit(loss, out):
    """Figures that another loss has more of, or a policy that started elsewhere, make a state that
    does not fit."""
    run_dpo(out, "--loss", loss, "--name", "dpo-whole")
    with stopped_after(5):
        run_dpo(out, "--loss", loss, "--name", "dpo-killed")
    with pytest.raises(InputError, match=f"the run began with --loss {loss}"):
        run_dpo(out, "--name", "dpo-killed", "--resume")
    run_dpo(out, "--loss", loss, "--name", "dpo-killed", "--resume")
    check_same(out / "cpu/dpo-whole", out / "cpu/dpo-killed")


def test_a_run_continues_with_its_own_judge_only(out):
    """Half of the rounds labelled by one reward model, half by another, and nobody knows."""
    with stopped_after(1):
        run_dpo(out, *ONLINE)
    path = out / "cpu/reward_model/checkpoint.pt"
    model, tokenizer, _ = load_checkpoint(path, "reward_model", "cpu", "cpu",
                                          reward_model.RewardModel)
    model.head.weight.data *= 2
    save_checkpoint(path, "reward_model", "cpu", model, tokenizer)
    with pytest.raises(InputError, match="began with another reward_model/checkpoint.pt"):
        run_dpo(out, *ONLINE, "--resume")


@pytest.mark.parametrize("stage", ["sft", "reward_model"])
def test_a_model_of_another_vocabulary(stage, out, tmp_path):
    """A reference or a judge that reads the policy's ids as other words: a loss like any other."""
    path = out / "cpu" / stage / "checkpoint.pt"
    checkpoint = read_torch(path)
    words = checkpoint["vocabulary"]
    words[-2:] = reversed(words[-2:])
    write_torch(path, checkpoint)
    before = snapshot(out)
    flags = ONLINE
    if stage == "sft":
        flags = ["--start", "gpt", *own_pairs(tmp_path / "pairs.jsonl")]
    with pytest.raises(InputError, match=f"{stage}/checkpoint.pt: its vocabulary is not that of"):
        run_dpo(out, *flags)
    assert snapshot(out) == before


def test_fewer_rounds_leave_no_pairs_of_a_run_before(out):
    """pairs-2.jsonl of last week beside the checkpoint of a run of one round, or of none."""
    for rounds in (2, 1, 0):
        flags = ["--online", str(rounds), "--pairs", "4"] if rounds else []
        run_dpo(out, *flags)
        assert len(list((out / "cpu/dpo").glob("pairs-*.jsonl"))) == rounds


def rounds_of(out):
    """The pairs of both rounds."""
    rows = []
    for number in (1, 2):
        rows += read_pairs(out / f"cpu/dpo/pairs-{number}.jsonl")
    return rows


def test_online_on_somebodys_own_prompts(out, tmp_path, capsys):
    """The world's requests put to a policy of other prompts; held-out prompts that are trained on;
    prompts too long to answer, left out without a word."""
    path = tmp_path / "pairs.jsonl"
    data = own_pairs(path)
    rows = read_pairs(path)
    for row in list(rows):
        rows.append({**row, "prompt": row["prompt"] + " Now" * 120})
    write_jsonl(path, rows)
    run_dpo(out, "--judge", "reward_model", *ONLINE, *data)
    asked = {row["prompt"] for row in rounds_of(out)}
    train, _ = hold_out(rows)
    short = {row["prompt"] for row in train if "Now" not in row["prompt"]}
    assert 30 < len(short) < 40 and len(asked) > 8 and asked <= short
    sentence = (f"pairs.jsonl: {len(short)} prompts, dropped {len(train) - len(short)} that leave "
                "no room for 16 new tokens\n")
    assert sentence in capsys.readouterr().out

    before = snapshot(out)
    with pytest.raises(InputError, match="pairs.jsonl: no prompt leaves room for .* 124"):
        run_dpo(out, *ONLINE, *own_pairs(path), "--max_new_tokens", "124")
    assert snapshot(out) == before


JUDGE = """import json, sys
for line in sys.stdin:
    row = json.loads(line)
    print(json.dumps({"choice": int(row["second"] > row["first"])}))
"""


def test_online_with_a_program_as_the_judge(out, tmp_path):
    """A program that is not asked, or whose labels stay beside the checkpoint; a stage's pairs that
    are not of the world, for which the annotator has no reward."""
    (tmp_path / "judge.py").write_text(JUDGE)
    data = own_pairs(tmp_path / "pairs.jsonl")
    run_dpo(out, "--judge", f"{sys.executable} {tmp_path / 'judge.py'}", *ONLINE, *data)
    rows = rounds_of(out)
    train, _ = hold_out(read_pairs(tmp_path / "pairs.jsonl"))
    assert len(rows) == 24 and all(row["chosen"] > row["rejected"] for row in rows)
    assert {row["prompt"] for row in rows} <= {row["prompt"] for row in train}
    assert not list(out.glob("cpu/dpo/labels*"))

    reward_model.main(["--out", str(out), *data, *FLAGS])
    for judge in ("annotator", "reward_model"):
        with pytest.raises(InputError, match="pairs.jsonl: is not of the little world; --online"):
            run_dpo(out, *ONLINE, "--judge", judge)
