"""dpo.py against the lecture's numbers, its gradient, and token-by-token loops. Every test says which bug it is for."""

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
from data import stories
from data.files import InputError, read_pairs, write_jsonl
from data.run import Run
from data.tokenizer import encode_pairs
from dpo import dpo_loss, ipo_loss, kto_baseline, kto_loss, labels_of, orpo_loss, simpo_loss
from gpt import load_checkpoint, pad, save_checkpoint
from helpers import cpu_only, metrics, noise, snapshot, tiny_gpt, untimed

END = 4
FIGURES = ["loss", "accuracy", "margin", "chosen_log_ratio", "rejected_log_ratio"]
PAIRS = [([2, 0, 1, 3, 3, END], [2, 0, END], 2), ([1, 1, END], [1, 2, 3, 0, 0, 1, 2, 2, END], 1),
         ([3, 0, 1, 2, 0, END], [3, 0, 1, 2, 1, 1, 1, 1, END], 4), ([0, END], [0, 3, END], 1),
         ([2, 2, 2, 2, 3, 1, 0, 1, 0, END], [2, 2, 2, 2, 1, END], 4)]  # (chosen ids, rejected ids, prompt length)


def numbers(*values):
    return [torch.tensor([value], dtype=torch.float64) for value in values]


def logprob_by_hand(model, sequence, prompt_length):
    """log π(y|x): the response's tokens one by one, each from its own prefix, <|end|> included."""
    total = 0.0
    for t in range(prompt_length, len(sequence)):
        total = total + model(torch.tensor([sequence[:t]]))[0, -1].log_softmax(0)[sequence[t]]
    return total


def loss_by_hand(policy, reference, pairs, beta):
    """The loss of the lecture as a mean over pairs, without a batch; the rows are the implicit-reward margins."""
    margins = []
    for chosen, rejected, n in pairs:
        with torch.no_grad():
            ref_chosen, ref_rejected = logprob_by_hand(reference, chosen, n), logprob_by_hand(reference, rejected, n)
        margins.append(beta * ((logprob_by_hand(policy, chosen, n) - ref_chosen)
                               - (logprob_by_hand(policy, rejected, n) - ref_rejected)))
    margins = torch.stack(margins)
    return (1 + (-margins).exp()).log().mean(), margins


# ----------------------------------------------------------------------------------------------------------------------
# The loss


def test_worked_number_of_the_lecture():
    """A wrong sign, or the reference left out (0.750 and 0.713 instead of 0.640)."""
    loss = dpo_loss(*numbers(-15.2, -14.8, -16.0, -14.5), beta=0.1)
    assert loss.item() == pytest.approx(0.640, abs=5e-4)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-0.11)), abs=1e-12)


def test_policy_at_the_reference_is_at_log_2():
    """A margin that is not 0 where policy and reference agree: somewhere the two are not treated alike."""
    logprobs = noise(0, 6) * 30, noise(1, 6) * 30
    assert dpo_loss(*logprobs, *logprobs, beta=0.7).item() == pytest.approx(math.log(2))


def test_swapping_a_pair_flips_the_margin():
    """Chosen and rejected mixed up on one side only: the margin then doesn't change its sign."""
    a, b, c, d = numbers(-15.2, -14.8, -16.0, -14.5)
    loss, swapped = dpo_loss(a, b, c, d, 0.1), dpo_loss(b, a, d, c, 0.1)
    assert (swapped - loss).item() == pytest.approx(0.11)  # -log σ(-z) + log σ(z) = z
    assert loss < math.log(2) < swapped


@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_gradient_of_the_lecture(beta):
    """The lecture's -β σ(-z) [∇ log π(y_w) - ∇ log π(y_l)]: a loss with another weight, or without its beta."""
    logprobs = [(3 * noise(seed, 4)).double().requires_grad_() for seed in range(4)]
    dpo_loss(*logprobs, beta).backward()
    a, b, c, d = (x.detach() for x in logprobs)
    z = beta * ((a - c) - (b - d))
    expected = -beta / (1 + z.exp()) / 4  # σ(-z) = 1 / (1 + e^z); the mean over 4 pairs
    for x, sign in zip(logprobs, (1, -1, -1, 1)):
        torch.testing.assert_close(x.grad, sign * expected)


def test_large_margins_stay_finite():
    """log(sigmoid(z)) is -inf at z = -1000, its gradient nan; logsigmoid is not."""
    logprobs = [x.requires_grad_() for x in numbers(-2000.0, 0.0, -1000.0, -1000.0)]
    loss = dpo_loss(*logprobs, beta=0.5)
    loss.backward()
    assert loss.item() == pytest.approx(1000.0) and logprobs[0].grad.item() == pytest.approx(-0.5)


# ----------------------------------------------------------------------------------------------------------------------
# The losses that followed


def test_ipo_is_a_square_around_its_target():
    """β in the place of 1/(2β), a target of 1/β, or a logistic loss: h = 1.1 of the lecture's pair, by hand."""
    for beta, target in ((0.5, 1.0), (0.1, 5.0)):
        loss = ipo_loss(*numbers(-15.2, -14.8, -16.0, -14.5), beta)
        assert loss.item() == pytest.approx((1.1 - target) ** 2, abs=1e-12)
    a, b, c, d = ((9 * noise(seed, 50)).double() for seed in range(4))
    h = (a - c).numpy() - (b - d).numpy()
    assert ipo_loss(a, b, c, d, 0.3).item() == pytest.approx(np.mean((h - 1 / 0.6) ** 2))


def test_ipos_gradient_turns_round_at_its_target():
    """A loss that pulls beyond 1/(2β), as DPO's does: at it the gradient is 0, behind it the sign is the other."""
    for h, sign in ((0.9, -1), (1.0, 0), (1.1, 1)):
        chosen, rejected = (x.requires_grad_() for x in numbers(h, 0.0))
        ipo_loss(chosen, rejected, *numbers(0.0, 0.0), beta=0.5).backward()
        assert chosen.grad.item() == pytest.approx(2 * (h - 1)) == -rejected.grad.item()
        assert math.isclose(np.sign(round(chosen.grad.item(), 9)), sign)


def kto_by_hand(policy, ref, desirable, z0, beta, good=1.0, bad=1.0):
    """λ_y - v(x, y), label by label."""
    total = 0.0
    for r, d in zip((policy - ref).tolist(), desirable.tolist()):
        value = 1 / (1 + math.exp(-beta * (r - z0))) if d else 1 / (1 + math.exp(-beta * (z0 - r)))
        total += (good if d else bad) * (1 - value)
    return total / len(desirable)


def test_kto_label_by_label():
    """A weight on the wrong side, good and bad mixed up, a baseline that is added, or a mean over one side only."""
    policy, ref, desirable = noise(0, 40).double() * 5, noise(1, 40).double() * 5, noise(2, 40) > 0.3
    for z0, beta, weights in ((0.0, 0.2, (1.0, 1.0)), (1.7, 0.2, (1.0, 1.0)), (0.9, 1.0, (1.5, 0.75))):
        loss = kto_loss(policy, ref, desirable, z0, beta, *weights)
        assert loss.item() == pytest.approx(kto_by_hand(policy, ref, desirable, z0, beta, *weights), rel=1e-6)
    one, zero, good = *numbers(1.0, 0.0), torch.tensor([True])  # r̂ = 1, z0 = 3, β = 1: 1 - σ(-2); a bad one: 1 - σ(2)
    assert kto_loss(one, zero, good, 3.0, 1.0).item() == pytest.approx(0.8808, abs=1e-4)
    assert kto_loss(one, zero, ~good, 3.0, 1.0).item() == pytest.approx(0.1192, abs=1e-4)
    assert kto_loss(one, zero, good, 3.0, 1.0, desirable_weight=2.0).item() == pytest.approx(2 * 0.8808, abs=1e-4)


def test_simpos_gamma_is_a_margin():
    """CS 224R adds γ to the rewards of both responses, where it cancels: the loss then doesn't know it."""
    a, b = (noise(seed, 30).double() for seed in (0, 1))
    for beta, gamma in ((2.0, 0.5), (2.5, 1.4), (1.0, 0.0)):
        z = beta * a.numpy() - beta * b.numpy() - gamma
        assert simpo_loss(a, b, beta, gamma).item() == pytest.approx(np.log1p(np.exp(-z)).mean())
    level = simpo_loss(*numbers(-1.0, -1.0), beta=2.0, gamma=0.5)
    assert level.item() == pytest.approx(math.log(1 + math.exp(0.5)))  # equal responses don't do: 0.974, not 0.693


def test_orpo_of_odds_by_hand():
    """A ratio of probabilities for one of odds, λ on the SFT loss, the rejected response's loss, or a sign."""
    p, q = np.linspace(0.02, 0.9, 12), np.linspace(0.95, 0.1, 12)
    for lam in (0.0, 0.5, 2.0):
        ratio = (p / (1 - p)) / (q / (1 - q))
        expected = (-np.log(p) + lam * np.log1p(1 / ratio)).mean()
        assert orpo_loss(*map(torch.tensor, (np.log(p), np.log(q))), lam).item() == pytest.approx(expected)
    # p = 1/2 and q = 1/5: odds 1 and 1/4, σ(log 4) = 0.8
    assert orpo_loss(*numbers(math.log(0.5), math.log(0.2)), 1.0).item() == pytest.approx(math.log(2) - math.log(0.8))


def test_orpos_odds_near_one():
    """log(1 - exp(m)) of float32 is -inf long before m is 0; at 0, for a text known by heart, gradients are nan."""
    chosen = torch.tensor([-1e-5], requires_grad=True)
    loss = orpo_loss(chosen, torch.tensor([-1.0]), lam=0.5)
    ratio = (1 / math.expm1(1e-5)) * math.expm1(1.0)
    assert loss.item() == pytest.approx(1e-5 + 0.5 * math.log1p(1 / ratio), rel=1e-4)
    for means in ((0.0, 0.0), (0.0, -2.0), (-2.0, 0.0), (-80.0, 0.0), (0.0, -80.0), (-80.0, -80.0)):
        leaves = [torch.tensor([mean], requires_grad=True) for mean in means]
        loss = orpo_loss(*leaves, lam=0.5)
        loss.backward()
        assert math.isfinite(loss.item()) and all(x.grad.isfinite().all() for x in leaves), means


@pytest.mark.parametrize("loss", [
    lambda a, b: ipo_loss(a, b, 0 * a, 0 * b, 0.1), lambda a, b: simpo_loss(a, b, 2.0, 0.5),
    lambda a, b: kto_loss(torch.cat([a, b]), torch.zeros(2), torch.tensor([True, False]), 1.0, 0.5)],
    ids=["ipo", "simpo", "kto"])
def test_large_values_stay_finite(loss):
    """log(sigmoid(z)) is -inf at z = -1000, its gradient nan; a value that saturates is a number all the same."""
    for values in ((-2000.0, 0.0), (0.0, -2000.0), (-2000.0, -2000.0)):
        leaves = [torch.tensor([value], requires_grad=True) for value in values]
        found = loss(*leaves)
        found.backward()
        assert found.dim() == 0 and math.isfinite(found.item()) and all(x.grad.isfinite().all() for x in leaves)


# ----------------------------------------------------------------------------------------------------------------------
# Summed log-probabilities, batches


def test_the_loss_that_is_reported_is_the_one_that_was_trained_on(monkeypatch):
    """A figure that computes its own loss: whoever changes dpo_loss trains on one and reads the other. Here it is
    a square, with another gradient and other values."""
    def square(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta):
        return (((policy_chosen - ref_chosen) - (policy_rejected - ref_rejected) - 1 / (2 * beta)) ** 2).mean()

    policy, reference, config = tiny_gpt(0), tiny_gpt(1), dpo.Config(beta=0.3, micro_batch=2)
    _, margins = loss_by_hand(policy, reference, PAIRS, beta=1.0)
    loss = ((margins - 1 / 0.6) ** 2).mean()
    expected = torch.autograd.grad(loss, list(policy.parameters()))
    monkeypatch.setattr(dpo, "dpo_loss", square)
    figures = [dpo.backward(policy, reference, PAIRS, config), dpo.evaluate(policy, reference, PAIRS, config)]
    for parameter, gradient in zip(policy.parameters(), expected):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-5)
    assert [row["loss"] for row in figures] == pytest.approx([loss.item()] * 2, rel=1e-4)


@torch.no_grad()
def test_response_logprobs_are_sums_token_by_token():
    """A mean for the sum (another loss, SimPO's), <|end|> left out, the prompt or the padding counted."""
    model = tiny_gpt(0)
    sequences = [sequence for chosen, rejected, _ in PAIRS for sequence in (chosen, rejected)]
    prompt_lengths = [n for _, _, n in PAIRS for _ in range(2)]
    tokens, lengths = pad(sequences)
    for padding in (0, END):
        padded = torch.where(torch.arange(tokens.shape[1]) < lengths[:, None], tokens, padding)
        batch = dpo.response_logprobs(model, padded, torch.tensor(prompt_lengths), lengths)
        by_hand = [logprob_by_hand(model, *row).item() for row in zip(sequences, prompt_lengths)]
        assert batch.tolist() == pytest.approx(by_hand, abs=1e-4)


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 5])
def test_micro_batches_give_the_full_gradient_and_the_reference_none(micro_batch):
    """The last, smaller micro-batch weighing as much as the others; a reference that learns along."""
    policy, reference, beta, config = tiny_gpt(0), tiny_gpt(1), 0.3, dpo.Config(beta=0.3, micro_batch=micro_batch)
    loss, margins = loss_by_hand(policy, reference, PAIRS, beta)
    expected = torch.autograd.grad(loss, list(policy.parameters()))
    figures = dpo.backward(policy, reference, PAIRS, config)
    for parameter, gradient in zip(policy.parameters(), expected):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-6)
    assert all(parameter.grad is None for parameter in reference.parameters())

    accuracy = (margins > 0).float().mean().item()
    assert 0 < accuracy < 1 and list(figures) == FIGURES
    assert list(figures.values())[:3] == pytest.approx([loss.item(), accuracy, margins.mean().item()], abs=1e-4)
    for column, name in enumerate(FIGURES[3:]):  # chosen and rejected, each from its own column
        both = [[logprob_by_hand(model, pair[column], pair[2]).item() for pair in PAIRS] for model in (policy, reference)]
        assert figures[name] == pytest.approx((sum(both[0]) - sum(both[1])) / len(PAIRS), abs=1e-4)
    gradients = [parameter.grad.clone() for parameter in policy.parameters()]
    assert dpo.evaluate(policy, reference, PAIRS, config) == pytest.approx(figures, abs=1e-5)
    assert all(torch.equal(parameter.grad, gradient) for parameter, gradient in zip(policy.parameters(), gradients))


def test_pairs_as_labels_and_their_responses():
    """Chosen and rejected exchanged, a length that counts the prompt, a mask that leaves out <|end|>: of every loss."""
    labels = labels_of(PAIRS)
    assert [ids for ids, _, _ in labels] == [chosen for chosen, _, _ in PAIRS] + [rejected for _, rejected, _ in PAIRS]
    assert [n for _, n, _ in labels] == 2 * [n for _, _, n in PAIRS]
    assert [good for *_, good in labels] == [True] * 5 + [False] * 5
    assert labels_of(labels) == labels  # single labels are their own
    policy, reference = tiny_gpt(0), tiny_gpt(1)
    logp, ref, lengths, good = dpo.responses(policy, reference, labels)
    assert lengths.tolist() == [len(ids) - n for ids, n, _ in labels] and good.tolist() == [good for *_, good in labels]
    assert logp.requires_grad and not ref.requires_grad
    for model, found in ((policy, logp), (reference, ref)):
        assert found.tolist() == pytest.approx([logprob_by_hand(model, ids, n).item() for ids, n, _ in labels], abs=1e-4)
    assert dpo.responses(policy, None, labels)[1] is None


@torch.no_grad()
def baseline_by_hand(policy, reference, labels):
    """z0: each prompt with the next label's response, couple by couple."""
    ratios = []
    for i, (ids, n, _) in enumerate(labels):
        other, m, _ = labels[(i + 1) % len(labels)]
        couple = ids[:n] + other[m:]
        if ids[:n] != other[:m] and len(couple) <= policy.config.block_size:
            ratios.append((logprob_by_hand(policy, couple, n) - logprob_by_hand(reference, couple, n)).item())
    return sum(ratios) / len(ratios), len(ratios)


@pytest.mark.parametrize("rows", [1, 4, 64])
def test_ktos_baseline_couple_by_couple(rows):
    """A prompt with its own response, a response cut at the wrong place, a last part that counts as much as a full one;
    a negative KL; a couple that exceeds the context ends in a traceback."""
    labels = labels_of(PAIRS)
    for block_size, count in ((32, 10), (9, 8)):
        models = [tiny_gpt(seed, block_size=block_size) for seed in (0, 1)]
        fitting = [label for label in labels if len(label[0]) <= block_size]
        mean, found = baseline_by_hand(*models, fitting)
        assert found == count and (block_size == 32 or found < len(fitting)) and abs(mean) > 0.1
        there, back = kto_baseline(*models, fitting, rows), kto_baseline(*reversed(models), fitting, rows)
        assert [there, back] == pytest.approx([max(0.0, mean), max(0.0, -mean)], abs=1e-4)
        assert min(there, back) == 0 < there + back


def test_ktos_baseline_without_a_mismatch():
    """The next label may answer the same prompt, or be the only one: its own log-ratio is no estimate of the KL."""
    models, pair = (tiny_gpt(0), tiny_gpt(1)), labels_of(PAIRS[:1])
    for labels in (pair[:1], pair, 2 * pair):
        assert kto_baseline(*models, labels) == 0 == kto_baseline(*reversed(models), labels)


def shuffled(items):
    return random.Random(3).sample(items, len(items))


def family_by_hand(loss, policy, reference, items, z0=None):
    """The mean loss of items with β 0.3, γ 0.4, λ 0.7, a response at a time: (scalar, accuracies, margins)."""
    losses, margins = [], []
    for item in items:
        if loss == "kto":
            ids, n, good = item
            r = logprob_by_hand(policy, ids, n) - logprob_by_hand(reference, ids, n).detach()
            margins.append(0.3 * (r - z0) * (1 if good else -1))
            losses.append(1 - 1 / (1 + (-margins[-1]).exp()))
            continue
        *both, n = item
        (w, length_w), (l, length_l) = ((logprob_by_hand(policy, ids, n), len(ids) - n) for ids in both)
        if loss in ("dpo", "ipo"):
            h = w - l - (logprob_by_hand(reference, both[0], n) - logprob_by_hand(reference, both[1], n)).detach()
            margins.append(0.3 * h)
            losses.append((1 + (-0.3 * h).exp()).log() if loss == "dpo" else (h - 1 / 0.6) ** 2)
        else:  # means
            w, l = w / length_w, l / length_l
            margins.append(w - l)
            odds = [p / (1 - p) for p in (w.exp(), l.exp())]
            losses.append((1 + (0.4 - 0.3 * (w - l)).exp()).log() if loss == "simpo" else
                          -w + 0.7 * (1 + odds[1] / odds[0]).log())
    return torch.stack(losses).mean(), torch.stack(margins)


@pytest.mark.parametrize("micro_batch", [1, 3, 10])
@pytest.mark.parametrize("loss", dpo.LOSSES)
def test_the_family_response_by_response(loss, micro_batch):
    """A sum for a mean or a mean for a sum, arguments in the wrong order, a micro-batch with a weight or, for KTO, a
    baseline of its own; a gradient through the baseline; a figure of another loss."""
    policy, config = tiny_gpt(0), dpo.Config(loss=loss, beta=0.3, gamma=0.4, lam=0.7, micro_batch=micro_batch)
    reference = None if loss in dpo.WITHOUT_REFERENCE else tiny_gpt(1)
    items = shuffled(labels_of(PAIRS)) if loss == "kto" else PAIRS
    z0 = None
    if loss == "kto":
        mean, _ = baseline_by_hand(policy, reference, items)
        if mean < 0:  # a baseline of 0 would hide where it comes from
            policy, reference = reference, policy
        z0, _ = baseline_by_hand(policy, reference, items)
        assert z0 > 0.1
    expected, margins = family_by_hand(loss, policy, reference, items, z0)
    gradients = torch.autograd.grad(expected, list(policy.parameters()))
    figures = dpo.backward(policy, reference, items, config)
    for parameter, gradient in zip(policy.parameters(), gradients):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-5)
    assert list(figures.values())[:3] == pytest.approx(
        [expected.item(), (margins > 0).float().mean().item(), margins.mean().item()], abs=1e-4)
    assert list(figures) == (FIGURES if loss in ("dpo", "ipo") else FIGURES[:3])  # log-ratios need pairs and reference


def test_training_prefers_the_chosen():
    """A loss that goes down while the chosen responses lose against the rejected ones."""
    policy, reference, config = tiny_gpt(0), tiny_gpt(0), dpo.Config(beta=0.5, micro_batch=2)
    start = dpo.evaluate(policy, reference, PAIRS, config)
    assert list(start.values()) == pytest.approx([math.log(2), 0, 0, 0, 0], abs=1e-5)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.05)
    for _ in range(15):
        dpo.backward(policy, reference, PAIRS, config)
        optimizer.step()
        optimizer.zero_grad()
    loss, accuracy, margin, chosen, rejected = dpo.evaluate(policy, reference, PAIRS, config).values()
    assert accuracy == 1 and margin > 0.5 and loss < 0.5 and chosen > rejected
    untouched = tiny_gpt(0)
    assert all((p == q).all() for p, q in zip(reference.parameters(), untouched.parameters()))


# ----------------------------------------------------------------------------------------------------------------------
# The script


FLAGS = "--size cpu --batch 8 --report 2 --max_new_tokens 8".split()
KEYS = {"step", "loss", "accuracy", "margin", "chosen_log_ratio", "rejected_log_ratio", "held_out_loss", "held_out_accuracy",
        "seconds"}


@cpu_only
def test_main_on_the_collected_pairs(out, capsys):
    """A run that cannot be repeated, that trains on the held-out pairs, or that writes over another stage."""
    before = snapshot(out)
    runs = []
    for name in ("dpo", "dpo-again"):
        dpo.main(["--out", str(out), "--name", name, "--micro_batch", "3", *FLAGS])
        runs.append(metrics(out / "cpu" / name / "metrics.jsonl"))
    assert untimed(runs[0]) == untimed(runs[1])
    assert set(runs[0][0]) == KEYS
    assert [row["step"] for row in runs[0]] == [2, 4, 6, 8]  # 64 pairs, 8 in a step
    after = snapshot(out)
    assert {path: after[path] for path in before} == before
    printed = capsys.readouterr().out
    assert "64 pairs" in printed and "16 held out" in printed and "next: python best_of_n.py" in printed
    assert re.search("before and after on 33 held-out prompts: reward .*; gold ", printed)

    # The held-out figures are those of the saved policy on held_out.jsonl.
    policy, tokenizer, _ = load_checkpoint(out / "cpu/dpo/checkpoint.pt", "dpo", "cpu")
    reference, _, _ = load_checkpoint(out / "cpu/sft/checkpoint.pt", "sft", "cpu")
    rows = [json.loads(line) for line in (out / "cpu/reward_model/held_out.jsonl").read_text().splitlines()]
    pairs, _, _ = encode_pairs(rows, tokenizer, policy.config.block_size)
    loss, margins = loss_by_hand(policy, reference, pairs, beta=0.2)  # the README's, and the default
    assert runs[0][-1]["held_out_loss"] == pytest.approx(loss.item(), abs=1e-4)
    assert runs[0][-1]["held_out_accuracy"] == pytest.approx((margins > 0).float().mean().item())


def test_main_on_somebodys_own_pairs(out, tmp_path, capsys):
    """Pairs cut to fit the context, equal texts trained on, or a reward model asked for that DPO doesn't need."""
    rng = random.Random(0)
    rows = [{"prompt": f"Say {i}.", "chosen": "Yes " * rng.randint(1, 3) + ".", "rejected": "No."} for i in range(40)]
    rows += [{"prompt": "Say 1.", "chosen": "So.", "rejected": "So."}, {"prompt": "Say 2.", "chosen": "A. " * 200,
                                                                          "rejected": "B."}]
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    (out / "cpu/reward_model/checkpoint.pt").unlink()
    dpo.main(["--out", str(out), "--data", str(tmp_path / "pairs.jsonl"), "--lr", "1e-2", "--warmup", "1", *FLAGS])
    printed = capsys.readouterr().out
    # A tenth of 40 prompts is held out; "Say 1." and "Say 2.", of whose two rows one is dropped, may be among them.
    found = re.search(r"pairs.jsonl\n +(\d+) pairs, dropped (\d) longer than the context, (\d) equal texts\n"
                      r" +(\d+) held out, dropped (\d) longer than the context, (\d) equal texts\n", printed)
    kept, longer, equal, held_out, held_out_longer, held_out_equal = map(int, found.groups())
    assert (kept, held_out) == (36, 4) and longer + held_out_longer == equal + held_out_equal == 1
    rows = metrics(out / "cpu/dpo/metrics.jsonl")
    assert rows[-1]["held_out_accuracy"] == 1 and rows[-1]["held_out_loss"] < rows[0]["held_out_loss"]
    assert not (out / "cpu/reward_model/checkpoint.pt").exists()


def test_the_policy_is_shown_at_the_prompts_of_its_pairs(out, tmp_path, capsys):
    """The world's requests put to a policy of somebody's own pairs, because reward_model.py was the one to get --data."""
    rows = [{"prompt": f"Say {i}.", "chosen": f"Yes {i}.", "rejected": "No."} for i in range(30)]
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    reward_model.main(["--out", str(out), "--data", str(tmp_path / "pairs.jsonl"), *FLAGS])
    capsys.readouterr()
    dpo.main(["--out", str(out), *FLAGS])
    printed = capsys.readouterr().out
    prompt = re.search(r"\nprompt   (.*)\nbefore   \[reward .*\nafter    \[reward ", printed)[1]
    assert prompt in {row["prompt"] for row in read_pairs(out / "cpu/reward_model/held_out.jsonl")}
    assert "before and after on 3 held-out prompts: reward " in printed and "gold" not in printed


def test_main_without_pairs(out, tmp_path):
    """An empty batch ends in nan weights that are saved over the last good checkpoint; a file that the message leaves out."""
    dpo.main(["--out", str(out), *FLAGS])
    write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": f"{i}?", "chosen": "So.", "rejected": "So."} for i in range(9)])
    before = snapshot(out)
    with pytest.raises(InputError, match="pairs.jsonl: no pair is left"):
        dpo.main(["--out", str(out), "--data", str(tmp_path / "pairs.jsonl"), *FLAGS])
    write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": "Why?", "chosen": f"So {i}.", "rejected": "No."} for i in range(9)])
    with pytest.raises(InputError, match="pairs.jsonl.*same prompt"):
        dpo.main(["--out", str(out), "--data", str(tmp_path / "pairs.jsonl"), *FLAGS])
    assert snapshot(out) == before


def test_a_name_that_is_another_stages(out):
    """--name sft: the policy takes the place of the reference that it was trained against."""
    before = snapshot(out)
    for name in ("sft", "reward_model", "ppo", "my-dpo", "../dpo", "dpo/../sft"):
        with pytest.raises(InputError, match="--name .*must be dpo"):
            dpo.main(["--out", str(out), "--name", name, *FLAGS])
    assert snapshot(out) == before


# ----------------------------------------------------------------------------------------------------------------------
# The script with the other losses, and online


def own_pairs(path, count=40):
    write_jsonl(path, [{"prompt": f"Say {i}.", "chosen": "Yes.", "rejected": "No, no."} for i in range(count)])
    return ["--data", str(path)]


def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


def check_same(folder, other):
    """Two runs have left the same weights and figures."""
    assert same_weights(*(load_checkpoint(path / "checkpoint.pt", "dpo", "cpu")[0] for path in (folder, other)))
    assert untimed(metrics(folder / "metrics.jsonl")) == untimed(metrics(other / "metrics.jsonl"))


def loads(monkeypatch):
    """The list of the stages whose checkpoints dpo.py loads from here on."""
    stages, load = [], dpo.load_checkpoint
    monkeypatch.setattr(dpo, "load_checkpoint", lambda path, stage, *rest: stages.append(stage) or load(path, stage, *rest))
    return stages


@pytest.mark.parametrize("loss, before, after", [
    ("dpo", ["sft", "sft"], ["reward_model"]), ("ipo", ["sft", "sft"], ["reward_model"]),
    ("kto", ["sft", "sft"], ["reward_model"]), ("simpo", ["sft"], ["reward_model", "sft"]),
    ("orpo", ["gpt"], ["reward_model", "sft"])])
def test_models_in_memory(loss, before, after, out, monkeypatch, capsys):
    """A reference that the loss doesn't need; ORPO on top of SFT, two stages. Texts on the screen need SFT afterwards.
    SimPO's β taken for a price of KL by whoever reads the checkpoint."""
    events, save = loads(monkeypatch), dpo.save_checkpoint
    monkeypatch.setattr(dpo, "save_checkpoint", lambda *rest, **extra: events.append("saved") or save(*rest, **extra))
    dpo.main(["--out", str(out), "--loss", loss, *FLAGS])
    assert events == [*before, "saved", *after]
    assert ("beta" in load_checkpoint(out / "cpu/dpo/checkpoint.pt", "dpo", "cpu")[2]) == (loss in ("dpo", "kto"))
    rows = metrics(out / "cpu/dpo/metrics.jsonl")
    assert set(rows[0]) == (KEYS if loss in ("dpo", "ipo") else KEYS - {"chosen_log_ratio", "rejected_log_ratio"})
    assert [row["step"] for row in rows] == list(range(2, 17 if loss == "kto" else 9, 2))  # 64 pairs, or 128 labels
    printed = capsys.readouterr().out
    assert "before and after on 33 held-out prompts: reward " in printed
    assert f"models in memory: {len(before)} (policy" in printed


@pytest.mark.parametrize("argv, message", [
    ("--gamma 1", "--gamma 1.0: goes with --loss simpo only"), ("--loss kto --gamma 1", "--gamma 1.0: goes with"),
    ("--loss ipo --lam 1", "--lam 1.0: goes with --loss orpo only"), ("--loss simpo --lam 1", "--lam 1.0: goes with"),
    ("--loss orpo --beta 0.1", "--beta 0.1: goes with --loss dpo or ipo or kto or simpo only"),
    ("--pairs 8", "--pairs 8: goes with --online only"), ("--online 0 --pairs 8", "--pairs 8: goes with --online only"),
    ("--judge annotator", "--judge annotator: goes with --online only"), ("--sample_batch 8", "--sample_batch 8: goes"),
    ("--loss ipo --beta 0", "--beta 0.0: IPO"), ("--online 2 --loss orpo", "--online 2: goes with --start sft only"),
    ("--online 2 --start gpt", "--online 2: goes with --start sft only"),
    ("--online 2 --data {data} --judge annotator", "--judge annotator: knows the little world only, not .*data.jsonl")])
def test_what_a_run_would_ignore_is_refused(argv, message, out, tmp_path):
    """A sweep over a flag that changes nothing; minutes of training before a refusal; half a run left behind."""
    own_pairs(tmp_path / "data.jsonl")
    before = snapshot(out)
    with pytest.raises(InputError, match=f"^{message}") as error:
        dpo.main(["--out", str(out), *argv.format(data=tmp_path / "data.jsonl").split()])
    assert "\n" not in str(error.value) and snapshot(out) == before


def test_a_loss_brings_its_defaults(monkeypatch, capsys):
    """SimPO with DPO's β, ORPO from the SFT model, a flag of the user's that is overruled; --help that is silent."""
    seen = []
    monkeypatch.setattr(dpo, "train", seen.append)
    for argv in ("", "--loss kto", "--loss simpo", "--loss orpo", "--loss orpo --start sft --lr 0.5",
                 "--loss simpo --beta 3", "--loss ipo"):
        dpo.main(["--size", "cpu", *argv.split()])
    plain = dpo.Config(size="cpu")
    assert seen[0] == plain and (plain.loss, plain.start, plain.batch) == ("dpo", "sft", 32)
    assert (seen[1].batch, seen[1].beta, seen[1].start) == (64, plain.beta, "sft")  # 64 labels: 32 pairs
    assert (seen[2].beta, seen[2].start, seen[3].start) == (10.0, "sft", "gpt") and seen[3].lr != plain.lr
    assert (seen[4].start, seen[4].lr, seen[5].beta) == ("sft", 0.5, 3.0)
    assert seen[6].beta == 0.05
    with pytest.raises(SystemExit):
        dpo.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "(default: 'sft'; orpo: 'gpt')" in text and "(default: 0.2; ipo: 0.05; simpo: 10.0)" in text


def test_labels_of_somebodys_own(out, tmp_path, capsys):
    """Labels that are turned round, cut to fit, or grouped by prompt: a policy that learns what it should unlearn."""
    rows = [{"prompt": f"Say {i}.", "completion": "Yes." if good else "No.", "label": good}
            for i in range(40) for good in ((True, False) if i % 2 else (True,))]  # KTO needs no pairs
    rows += [{"prompt": "Say 1.", "completion": "So. " * 200, "label": True}]
    write_jsonl(tmp_path / "labels.jsonl", rows)
    (out / "cpu/reward_model/checkpoint.pt").unlink()
    argv = ["--loss", "kto", "--data", str(tmp_path / "labels.jsonl"), *"--lr 1e-2 --warmup 1 --epochs 3".split()]
    dpo.main(["--out", str(out), *argv, *FLAGS])
    kept, held_out, dropped = map(int, re.search(r"labels.jsonl: (\d+) labels, (\d+) held out; dropped (\d) longer",
                                                 capsys.readouterr().out).groups())
    assert kept + held_out == 60 and dropped == 1 and 4 <= held_out <= 8
    first, *_, last = metrics(out / "cpu/dpo/metrics.jsonl")
    assert last["held_out_loss"] < min(0.4, first["held_out_loss"])  # 0.5 before the first step
    assert not (out / "cpu/reward_model/checkpoint.pt").exists()
    policies = [load_checkpoint(out / f"cpu/{name}/checkpoint.pt", name, "cpu")[0] for name in ("sft", "dpo")]
    _, tokenizer, _ = load_checkpoint(out / "cpu/sft/checkpoint.pt", "sft", "cpu")
    prompt = tokenizer.prompt("Say 7.")
    yes, no = ([logprob_by_hand(policy, prompt + tokenizer.response(text), len(prompt)).item() for policy in policies]
               for text in ("Yes.", "No."))
    assert yes[1] > yes[0] and no[1] < no[0]


def test_pairs_serve_as_two_labels_each(out, tmp_path, capsys):
    """KTO on a file of pairs that learns from the chosen ones only; a held-out prompt that is trained on."""
    batches, backward = [], dpo.backward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dpo, "backward", lambda *arguments: batches.append(arguments[2]) or backward(*arguments))
        dpo.main(["--out", str(out), "--loss", "kto", *own_pairs(tmp_path / "pairs.jsonl"), *FLAGS])
    assert "72 labels, 8 held out; dropped 0 longer" in capsys.readouterr().out
    _, tokenizer, _ = load_checkpoint(out / "cpu/sft/checkpoint.pt", "sft", "cpu")
    labels = [label for batch in batches for label in batch]
    texts = [(tokenizer.decode(ids[:n]), tokenizer.decode(ids[n:-1]), good) for ids, n, good in labels]
    prompts = {prompt for prompt, _, _ in texts}
    assert len(texts) == 72 == len(set(texts)) and len(prompts) == 36
    assert {text[1:] for text in texts} == {("Yes.", True), ("No, no.", False)}


@pytest.mark.parametrize("rows, reason", [
    ('{"prompt": "a", "completion": "b", "label": 1}\n', ':1: "label" must be true or false, found the number 1'),
    ('{"prompt": "a", "completion": "b"}\n', ':1: the field "label" is missing'),
    ("".join(json.dumps({"prompt": p, "completion": "b " * 999, "label": True}) + "\n" for p in "ab"),
     ": no label is left to train on; dropped 2 longer than the context")])
def test_wrong_labels_cost_nothing(rows, reason, out, tmp_path):
    """A 1 taken for true in one library and refused by the next; an empty batch that ends in nan weights."""
    (tmp_path / "labels.jsonl").write_text(rows)
    before = snapshot(out)
    with pytest.raises(InputError) as error:
        dpo.main(["--out", str(out), "--loss", "kto", "--data", str(tmp_path / "labels.jsonl")])
    assert str(error.value).startswith(f"{tmp_path / 'labels.jsonl'}{reason}") and "\n" not in str(error.value)
    assert snapshot(out) == before


ONLINE = "--online 2 --pairs 12 --batch 4 --report 2 --max_new_tokens 16".split()


@pytest.mark.parametrize("loss, judge", [("dpo", "reward_model"), ("dpo", "annotator"), ("kto", "reward_model"),
                                         ("kto", "constitution"), ("simpo", "annotator")])
def test_rounds_are_fresh_samples_of_the_policy(loss, judge, out, monkeypatch, capsys):
    """Every round on samples of the SFT model, which is offline DPO; a reference that moves along; a round trained on
    the pairs of another, or with its prompts; a judge who isn't asked, or is in memory and isn't."""
    rounds, collect, backward, loaded = [], dpo.collect_pairs, dpo.backward, loads(monkeypatch)
    sft, tokenizer, _ = load_checkpoint(out / "cpu/sft/checkpoint.pt", "sft", "cpu")

    def sample(model, *arguments):
        weights = {name: x.clone() for name, x in model.state_dict().items()}
        rounds.append([model, weights, []])
        assert (dpo.JUDGES.get(judge, "no judge") in arguments) == ("reward_model" not in loaded) == (judge != "reward_model")
        return collect(model, *arguments)

    def learn(policy, reference, items, config):
        assert policy is rounds[-1][0] and (reference is None if loss == "simpo" else same_weights(reference, sft))
        rounds[-1][2].extend(items)
        return backward(policy, reference, items, config)

    monkeypatch.setattr(dpo, "collect_pairs", sample)
    monkeypatch.setattr(dpo, "backward", learn)
    dpo.main(["--out", str(out), "--loss", loss, "--judge", judge, *ONLINE])
    first, second = (weights for _, weights, _ in rounds)
    assert all(torch.equal(x, first[name]) for name, x in sft.state_dict().items())
    assert not all(torch.equal(x, second[name]) for name, x in sft.state_dict().items())
    texts = [read_pairs(out / f"cpu/dpo/pairs-{number}.jsonl") for number in (1, 2)]
    assert [row["prompt"] for row in texts[0]] != [row["prompt"] for row in texts[1]]
    for rows, (_, _, items) in zip(texts, rounds):
        assert len(rows) == 12 and all(stories.parse_request(row["prompt"]) for row in rows)
        pairs, _, _ = encode_pairs(rows, tokenizer, 128)
        assert sorted(items) == sorted(labels_of(pairs) if loss == "kto" else pairs)
    steps = 12 if loss == "kto" else 6
    assert [row["step"] for row in metrics(out / "cpu/dpo/metrics.jsonl")] == list(range(2, steps + 1, 2))
    assert f"2 rounds of 12 pairs, by the {judge}; held out: " in capsys.readouterr().out


@pytest.mark.parametrize("where, n", [*(("end_step", n) for n in range(1, 7)), ("sampling", 1), ("sampling", 2),
                                      ("sampled", 1), ("sampled", 2)])
def test_online_it_goes_on_bit_for_bit(where, n, out, monkeypatch):
    """A round that is sampled anew from a policy further on, or trained on twice; batches in another order; a schedule
    that begins again. Rounds end after step 3, the state is saved every 2: steps before a round's samples are redone."""
    argv = ["--out", str(out), "--name", "dpo-killed", *ONLINE]
    dpo.main([*argv[:3], "dpo-whole", *argv[4:]])
    owner, name = {"end_step": (Run, "end_step"), "sampling": (dpo, "collect_pairs"),
                   "sampled": (dpo, "write_jsonl")}[where]
    calls, original = [], getattr(owner, name)

    def interrupted(*arguments, **keywords):
        calls.append(name)
        result = original(*arguments, **keywords)
        if len(calls) == n:
            raise KeyboardInterrupt
        return result

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            dpo.main(argv)
    assert not (out / "cpu/dpo-killed/checkpoint.pt").exists()
    dpo.main([*argv, "--resume"])
    check_same(out / "cpu/dpo-whole", out / "cpu/dpo-killed")
    for number in (1, 2):
        assert ((out / f"cpu/dpo-whole/pairs-{number}.jsonl").read_bytes()
                == (out / f"cpu/dpo-killed/pairs-{number}.jsonl").read_bytes())


@pytest.mark.parametrize("loss", ["ipo", "kto", "simpo", "orpo"])
def test_every_loss_goes_on_bit_for_bit(loss, out, monkeypatch):
    """Figures that another loss has more of, or a policy that began elsewhere, make a state that does not fit."""
    argv, end_step = ["--out", str(out), "--loss", loss, *FLAGS], Run.end_step

    def stop(run, step, **state):
        end_step(run, step, **state)
        if step == 5:
            raise KeyboardInterrupt

    dpo.main([*argv, "--name", "dpo-whole"])
    with monkeypatch.context() as patch:
        patch.setattr(Run, "end_step", stop)
        with pytest.raises(KeyboardInterrupt):
            dpo.main([*argv, "--name", "dpo-killed"])
    with pytest.raises(InputError, match=f"the run began with --loss {loss}"):
        dpo.main(["--out", str(out), "--name", "dpo-killed", "--resume", *FLAGS])
    dpo.main([*argv, "--name", "dpo-killed", "--resume"])
    check_same(out / "cpu/dpo-whole", out / "cpu/dpo-killed")


def test_a_run_goes_on_with_its_own_judge_only(out, monkeypatch):
    """Half of the rounds labelled by one reward model, half by another, and nobody knows."""
    argv, original = ["--out", str(out), *ONLINE], dpo.fit

    def stop(*arguments):
        yield next(original(*arguments))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(dpo, "fit", stop)
        with pytest.raises(KeyboardInterrupt):
            dpo.main(argv)
    path = out / "cpu/reward_model/checkpoint.pt"
    model, tokenizer, _ = load_checkpoint(path, "reward_model", "cpu", "cpu", reward_model.RewardModel)
    model.head.weight.data *= 2
    save_checkpoint(path, "reward_model", "cpu", model, tokenizer)
    with pytest.raises(InputError, match="began with another reward_model/checkpoint.pt"):
        dpo.main([*argv, "--resume"])


def test_fewer_rounds_leave_no_pairs_of_a_run_before(out):
    """pairs-2.jsonl of last week beside the checkpoint of a run of one round, or of none."""
    for rounds in (2, 1, 0):
        online = ["--online", str(rounds), "--pairs", "4"] if rounds else []
        dpo.main(["--out", str(out), *online, *FLAGS])
        assert len(list((out / "cpu/dpo").glob("pairs-*.jsonl"))) == rounds


def test_online_on_somebodys_own_prompts(out, tmp_path, capsys):
    """The world's requests put to a policy of other prompts; held-out prompts that are trained on; prompts too long to
    answer, left out without a word; a stage's pairs that are not of the world, for which the annotator has no reward."""
    data = own_pairs(tmp_path / "pairs.jsonl")
    rows = read_pairs(tmp_path / "pairs.jsonl")
    write_jsonl(tmp_path / "pairs.jsonl", rows + [{**row, "prompt": row["prompt"] + " Now" * 120} for row in rows])
    argv = ["--out", str(out), "--judge", "reward_model", *ONLINE]
    dpo.main([*argv, *data])
    asked = {row["prompt"] for number in (1, 2) for row in read_pairs(out / f"cpu/dpo/pairs-{number}.jsonl")}
    train, held_out = dpo.hold_out(read_pairs(tmp_path / "pairs.jsonl"), 1)
    short = {row["prompt"] for row in train if "Now" not in row["prompt"]}
    assert len(train) == 72 and 30 < len(short) < 40 and len(asked) > 8 and asked <= short
    assert (f"pairs.jsonl: {len(short)} prompts, dropped {72 - len(short)} that leave no room for 16 new tokens\n"
            in capsys.readouterr().out)
    own_pairs(tmp_path / "pairs.jsonl")
    train, _ = dpo.hold_out(read_pairs(tmp_path / "pairs.jsonl"), 1)
    before = snapshot(out)
    with pytest.raises(InputError, match="pairs.jsonl: no prompt leaves room for --max_new_tokens 124"):
        dpo.main([*argv, *data, "--max_new_tokens", "124"])
    assert snapshot(out) == before
    (tmp_path / "judge.py").write_text("import json, sys\nfor line in sys.stdin:\n    row = json.loads(line)\n"
                                       "    print(json.dumps({'choice': int(row['second'] > row['first'])}))")
    dpo.main(["--out", str(out), "--judge", f"{sys.executable} {tmp_path / 'judge.py'}", *ONLINE, *data])
    rows = [row for number in (1, 2) for row in read_pairs(out / f"cpu/dpo/pairs-{number}.jsonl")]
    assert len(rows) == 24 and all(row["chosen"] > row["rejected"] for row in rows)
    assert {row["prompt"] for row in rows} <= {row["prompt"] for row in train} and not list(out.glob("cpu/dpo/labels*"))
    reward_model.main(["--out", str(out), *data, *FLAGS])
    for judge in ("annotator", "reward_model"):
        with pytest.raises(InputError, match="pairs.jsonl: is not of the little world; --online"):
            dpo.main(["--out", str(out), *ONLINE, "--judge", judge])
