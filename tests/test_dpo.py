"""dpo.py against its gradient and token-by-token loops; the lecture's numbers: test_lecture.py."""

import math
import random
from unittest import mock

import pytest
import torch

import dpo
import sft
from data import stories
from data.files import InputError, hold_out, read_pairs, write_jsonl
from data.judges import constitution_judge
from data.run import SilentRun, read_torch, write_torch
from data.tokenizer import Pair, Tokenizer, encode_pairs, labels_of, train as train_vocabulary
from dpo import dpo_loss, kto_baseline
from gpt import batches_by_length, load_checkpoint, make_optimizer
from helpers import END, cpu_only, metrics, noise, snapshot, tiny_gpt, token_losses, untimed

PAIRS = [Pair([2, 0, 1, 3, 3, END], [2, 0, END], 2),
         Pair([1, 1, END], [1, 2, 3, 0, 0, 1, 2, 2, END], 1),
         Pair([3, 0, 1, 2, 0, END], [3, 0, 1, 2, 1, 1, 1, 1, END], 4),
         Pair([0, END], [0, 3, END], 1),
         Pair([2, 2, 2, 2, 3, 1, 0, 1, 0, END], [2, 2, 2, 2, 1, END], 4)]
LABELS = labels_of(PAIRS)


def logprob_by_hand(model, sequence, prompt_length):
    """log π(y|x) of one sequence alone, <|end|> included."""
    return -token_losses(model, [sequence], [prompt_length]).sum()


def log_ratio_by_hand(policy, reference, sequence, prompt_length):
    """log π_θ(y|x)/π_ref(y|x), with a gradient for π_θ."""
    ref = logprob_by_hand(reference, sequence, prompt_length).detach()
    return logprob_by_hand(policy, sequence, prompt_length) - ref


def test_gradient_of_the_lecture():
    """The lecture's -β σ(-z) [∇ log π(y_w) - ∇ log π(y_l)]: a loss with another weight, or without
    its beta."""
    for beta in (0.1, 2.0):
        logprobs = (3 * noise(0, 4, 4)).double().requires_grad_()
        dpo_loss(*logprobs, beta).backward()
        a, b, c, d = logprobs.detach()
        z = beta * ((a - c) - (b - d))
        expected = -beta / (1 + z.exp()) / 4  # σ(-z) = 1 / (1 + e^z); the mean over 4 pairs
        signed = torch.stack([expected, -expected, -expected, expected])
        torch.testing.assert_close(logprobs.grad, signed)


@pytest.mark.parametrize("loss", ["dpo", "simpo", "orpo"])
def test_large_values_stay_finite(loss):
    """log(sigmoid(z)) is -inf at z = -1000, its gradient nan; at 0, for a text known by heart,
    ORPO's odds are infinite."""
    for values in ((-2000.0, 0.0), (0.0, -2000.0), (-2000.0, -2000.0), (0.0, 0.0), (-1e-8, -1.0)):
        a, b = [torch.tensor([value], requires_grad=True) for value in values]
        c, d = torch.zeros(2, 1)
        arguments = {"dpo": (a, b, c, d, 0.5), "simpo": (a, b, 2.0, 0.5), "orpo": (a, b, 0.5)}
        found = getattr(dpo, f"{loss}_loss")(*arguments[loss])
        found.backward()
        assert found.dim() == 0 and math.isfinite(found.item())
        assert all(x.grad.isfinite().all() for x in (a, b))


@torch.no_grad()
def test_logprobs_are_sums_token_by_token():
    """A mean for the sum (another loss, SimPO's), <|end|> left out, the prompt or the padding
    counted; chosen and rejected exchanged."""
    model = tiny_gpt(0)
    by_hand = [logprob_by_hand(model, label.ids, label.prompt_length).item() for label in LABELS]
    assert dpo.label_logprobs(model, LABELS).tolist() == pytest.approx(by_hand, abs=1e-4)
    chosen, rejected = dpo.pair_logprobs(model, PAIRS)
    assert chosen.tolist() + rejected.tolist() == pytest.approx(by_hand, abs=1e-4)


@torch.no_grad()
def baseline_by_hand(policy, reference, labels):
    """(z0 before it is cut off at 0, its couples): each prompt with the next label's response."""
    ratios = []
    for label, other in zip(labels, labels[1:] + labels[:1]):
        prompt = label.ids[:label.prompt_length]
        couple = prompt + other.ids[other.prompt_length:]
        same = prompt == other.ids[:other.prompt_length]
        if not same and len(couple) <= policy.config.block_size:
            ratios.append(log_ratio_by_hand(policy, reference, couple, len(prompt)).item())
    return sum(ratios) / len(ratios), len(ratios)


@pytest.mark.parametrize("block_size, couples", [(8, 7), (9, 8)])  # one fills it; one exceeds it
def test_ktos_baseline_couple_by_couple(block_size, couples):
    """A prompt with its own response; a last part that counts as much as a full one; a negative KL;
    a couple that exceeds the context."""
    models = [tiny_gpt(seed, block_size=block_size) for seed in (0, 1)]
    fitting = [label for label in LABELS if len(label.ids) <= block_size]
    mean, count = baseline_by_hand(*models, fitting)
    assert count == couples and abs(mean) > 0.1
    there = kto_baseline(*models, fitting, rows=4)
    back = kto_baseline(*reversed(models), fitting, rows=4)
    assert [there, back] == pytest.approx([max(0.0, mean), max(0.0, -mean)], abs=1e-4)
    assert kto_baseline(*models, LABELS[3:4]) == 0     # no other response: no estimate


def learn(loop, policy, reference, items, held_out, config, monkeypatch, *paired):
    """One step of a loop on these items. Returns (its gradients, its row of figures); the weights
    stay."""
    gradients = []

    def look(optimizer, model, lr):
        assert model is policy
        gradients.extend(parameter.grad.clone() for parameter in model.parameters())
        optimizer.zero_grad()

    monkeypatch.setattr(dpo, "optimizer_step", look)
    optimizer = [] if loop is dpo.dpo else [make_optimizer(policy, weight_decay=0.0)]
    run = SilentRun()
    loop(policy, reference, items, held_out, *paired, *optimizer, config, random.Random(0), run)
    for model in filter(None, (policy, reference)):     # held-out figures, too, leave no gradient
        assert all(parameter.grad is None for parameter in model.parameters())
    [row] = untimed(run.rows)
    return gradients, row


def mean(values):
    return torch.stack(values).mean()


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


@pytest.mark.parametrize("loop, loss", [("dpo", "dpo"), ("fit_pairs", "dpo"), ("fit_pairs", "ipo"),
                                        ("fit_pairs", "simpo"), ("fit_pairs", "orpo")])
def test_a_step_pair_by_pair(loop, loss, monkeypatch):
    """β for 1/(2β), SimPO's γ in both rewards, where it cancels (CS 224R), probabilities for ORPO's
    odds; a smaller micro-batch that weighs as much; a reference that learns along."""
    config = dpo.Config(loss=loss, beta=0.3, gamma=0.4, lam=0.7, batch=5, micro_batch=2)
    policy = tiny_gpt(0)
    reference = tiny_gpt(1) if loss in ("dpo", "ipo") else None
    gradients, row = learn(getattr(dpo, loop), policy, reference, PAIRS, PAIRS, config, monkeypatch)

    losses, margins = zip(*[pair_by_hand(loss, policy, reference, pair) for pair in PAIRS])
    expected = torch.autograd.grad(mean(losses), list(policy.parameters()))
    torch.testing.assert_close(gradients, list(expected), rtol=1e-3, atol=1e-5)
    accuracy = mean([(margin > 0).float() for margin in margins]).item()
    value = mean(losses).item()
    expected = dict(step=1, loss=value, accuracy=accuracy, margin=mean(margins).item(),
                    held_out_loss=value, held_out_accuracy=accuracy)
    if reference:
        for name in ("chosen", "rejected"):
            ratios = [log_ratio_by_hand(policy, reference, getattr(pair, name), pair.prompt_length)
                      for pair in PAIRS]
            expected[f"{name}_log_ratio"] = mean(ratios).item()
    assert 0 < accuracy < 1 and row == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("paired", [False, True])
def test_a_step_label_by_label(paired, monkeypatch):
    """Good and bad mixed up; a micro-batch with a weight or a baseline of its own; a gradient
    through the baseline; an accuracy of pairs beside that of labels."""
    labels = random.Random(3).sample(LABELS, len(LABELS))
    held_out = LABELS if paired else labels
    [order] = batches_by_length([len(label.ids) for label in labels], 10, random.Random(0))
    batch = [labels[i] for i in order]  # the next label's response is the baseline's
    policy = tiny_gpt(0)
    reference = tiny_gpt(1)
    if baseline_by_hand(policy, reference, batch)[0] < 0:  # 0 would hide where it comes from
        policy, reference = reference, policy
    config = dpo.Config(loss="kto", beta=0.3, batch=10, micro_batch=3, desirable_weight=1.5,
                        undesirable_weight=0.75)
    gradients, row = learn(dpo.kto, policy, reference, labels, held_out, config, monkeypatch,
                           paired)

    expected = {"step": 1}
    for part, prefix in ((batch, ""), (held_out, "held_out_")):
        z0, _ = baseline_by_hand(policy, reference, part)
        assert z0 > 0.1
        losses = []
        margins = []
        for label in part:
            r = 0.3 * (log_ratio_by_hand(policy, reference, label.ids, label.prompt_length) - z0)
            margins.append(r if label.desirable else -r)
            weight = 1.5 if label.desirable else 0.75
            losses.append(weight * (1 - torch.sigmoid(margins[-1])))
        if not prefix:
            by_hand = torch.autograd.grad(mean(losses), list(policy.parameters()))
            torch.testing.assert_close(gradients, list(by_hand), rtol=1e-3, atol=1e-5)
            expected["margin"] = mean(margins).item()
        elif paired:
            margins = [good + bad for good, bad in zip(margins[:5], margins[5:])]
        expected[f"{prefix}loss"] = mean(losses).item()
        expected[f"{prefix}accuracy"] = mean([(margin > 0).float() for margin in margins]).item()
    assert 0 < expected["accuracy"] < 1
    assert row == pytest.approx(expected, abs=1e-4)


# --------------------------------------------------------------------------------------------------
# The script


def run_dpo(out, *flags):
    common = "--size cpu --batch 16 --report 2 --max_new_tokens 8"
    dpo.main(["--out", str(out), *common.split(), *flags])


def own_pairs(path, count=40):
    """Write pairs that are not of the little world; the flags that name the file."""
    write_jsonl(path, [{"prompt": f"Say {i}.", "chosen": "Yes.", "rejected": "No, no."}
                       for i in range(count)])
    return ["--data", str(path)]


@cpu_only
def test_main_on_the_collected_pairs(out):
    """A run that writes over another stage, or whose figures are not the saved policy's. One that
    goes on from it and takes it for π_ref: no pair has an implicit reward then."""
    before = snapshot(out)
    run_dpo(out, "--micro_batch", "3", "--lr", "0.01")
    rows = untimed(metrics(out / "cpu/dpo/metrics.jsonl"))
    assert [row["step"] for row in rows] == [2, 4]  # 64 pairs, 16 in a step
    assert before.items() <= snapshot(out).items()
    policy, tokenizer, _ = load_checkpoint(out / "cpu/dpo/checkpoint.pt", "dpo", "cpu")
    reference, _, _ = load_checkpoint(out / "cpu/sft/checkpoint.pt", "sft", "cpu")
    held_out = read_pairs(out / "cpu/reward_model/held_out.jsonl")
    pairs, _, _ = encode_pairs(held_out, tokenizer, policy.config.block_size)
    with torch.no_grad():
        loss, figures = dpo.pair_loss(policy, reference, pairs, dpo.Config(beta=0.2))  # README's
    assert rows[-1]["held_out_loss"] == pytest.approx(loss.item(), abs=1e-4)
    assert rows[-1]["held_out_accuracy"] == pytest.approx(figures["accuracy"].item())
    assert abs(loss.item() - math.log(2)) > 0.01

    run_dpo(out, "--name", "dpo-on", "--lr", "1e-9", "--start", "dpo")
    further = metrics(out / "cpu/dpo-on/metrics.jsonl")[-1]
    assert further["held_out_loss"] == pytest.approx(loss.item(), rel=1e-4)


@pytest.mark.parametrize("argv, message", [
    ("--loss kto --gamma 1", "--gamma 1.0: goes with --loss simpo only"),
    ("--loss orpo --beta 0.1", "--beta 0.1: goes with --loss dpo or ipo or kto or simpo only"),
    ("--judge annotator", "--judge annotator: goes with --online only"),
    ("--loss ipo --beta 0", "--beta 0.0: must be positive"),
    ("--online 2 --loss orpo", "--online 2: a base model cannot answer"),
    ("--name dpo/../sft", "--name dpo/../sft: must be dpo"),
    ("--data {equal}", ".*equal.jsonl: no pair is left")])
def test_what_is_refused_costs_nothing(argv, message, out, tmp_path):
    """A sweep over a flag that changes nothing; the policy written over its reference; an empty
    batch and its nan weights; minutes of training before a refusal."""
    equal = tmp_path / "equal.jsonl"
    write_jsonl(equal, [{"prompt": x, "chosen": "No.", "rejected": "No."} for x in "abcd"])
    before = snapshot(out)
    with pytest.raises(InputError, match=f"^{message}") as error:
        run_dpo(out, *argv.format(equal=equal).split())
    assert "\n" not in str(error.value) and snapshot(out) == before


def test_a_loss_brings_its_defaults(monkeypatch):
    """SimPO with DPO's β, ORPO from the SFT model or at DPO's rate; a flag that is overruled."""
    seen = []
    monkeypatch.setattr(dpo, "train", seen.append)
    for argv in ("", "--loss kto", "--loss simpo", "--loss orpo", "--loss orpo --start sft"):
        dpo.main(["--size", "cpu", *argv.split()])
    plain, kto, simpo, orpo, own_orpo = seen
    assert (plain.loss, plain.start, plain.batch) == ("dpo", "sft", 32)
    assert (kto.batch, kto.beta, kto.start) == (64, plain.beta, "sft")  # 64 labels: 32 pairs
    assert (simpo.beta, simpo.start, simpo.lr) == (10.0, "sft", plain.lr / 2)
    assert (orpo.start, orpo.lr) == ("gpt", sft.Config.lr)  # it learns to answer, as SFT does
    assert own_orpo.start == "sft"


@pytest.mark.parametrize("good, bad, weight, said", [(9, 0, 1.0, True), (9, 1, 9.0, False)])
def test_labels_of_one_kind_are_told(good, bad, weight, said, capsys):
    """Nine good labels to a bad one, or none: KTO learns little, and nothing says why."""
    tokenizer = Tokenizer(train_vocabulary("Say yes or no.", 265))
    rows = [{"prompt": "a", "completion": "yes", "label": True}] * good
    rows += [{"prompt": "b", "completion": "no", "label": False}] * bad
    config = dpo.Config(loss="kto", data="labels.jsonl", undesirable_weight=weight)
    dpo.read_data(config, (rows, rows), "labels.jsonl", tokenizer, 64)
    assert ("KTO wants about as much of both" in capsys.readouterr().out) == said


ONLINE = "--online 2 --pairs 12 --batch 4 --max_new_tokens 16".split()


def rounds_of(out):
    return [read_pairs(out / f"cpu/dpo/pairs-{number}.jsonl") for number in (1, 2)]


@pytest.mark.parametrize("loss, judge", [
    ("dpo", "reward_model"), ("dpo", "both"), ("kto", "constitution")])
def test_rounds_are_new_samples_of_the_policy(loss, judge, out, monkeypatch):
    """Every round on samples of the SFT model, or trained on another's pairs; a reference that
    moves along; an optimizer or a schedule that starts again; a judge who isn't asked, or whose
    turn in a round is not the same in a resumed run."""
    start, tokenizer, _ = load_checkpoint(out / "cpu/sft/checkpoint.pt", "sft", "cpu")
    loop = "kto" if loss == "kto" else "fit_pairs"
    training = mock.Mock(wraps=getattr(dpo, loop))
    step = mock.Mock(wraps=dpo.optimizer_step)
    monkeypatch.setattr(dpo, loop, training)
    monkeypatch.setattr(dpo, "optimizer_step", step)
    collect_pairs = dpo.collect_pairs
    sampled = []    # the policy's weights
    judges = []

    def recorded_collect(policy, *rest):
        sampled.append({name: x.clone() for name, x in policy.state_dict().items()})
        assert (rest[3] is constitution_judge) == (judge == "constitution")
        judges.append(rest[3])
        return collect_pairs(policy, *rest)

    def is_start(weights):
        return all(torch.equal(x, weights[name]) for name, x in start.state_dict().items())

    monkeypatch.setattr(dpo, "collect_pairs", recorded_collect)
    run_dpo(out, "--loss", loss, "--judge", judge, *ONLINE)
    assert is_start(sampled[0]) and not is_start(sampled[1])
    assert judge != "both" or judges[0] is not judges[1]
    count = 12 if loss == "kto" else 6
    optimizers, _, rates = zip(*[call.args for call in step.call_args_list])
    assert len(rates) == count and len(set(map(id, optimizers))) == 1
    peak = rates.index(max(rates))
    assert peak < count // 2 and list(rates[peak:]) == sorted(rates[peak:], reverse=True)

    prompts = []
    for rows, call in zip(rounds_of(out), training.call_args_list, strict=True):
        _, reference, items, *_ = call.args
        assert is_start(reference.state_dict()) and len(rows) == 12
        prompts.append([row["prompt"] for row in rows])
        pairs, _, _ = encode_pairs(rows, tokenizer, 128)
        assert items == (labels_of(pairs) if loss == "kto" else pairs)
    assert prompts[0] != prompts[1] and all(map(stories.parse_request, sum(prompts, [])))


@pytest.mark.parametrize("stage", ["sft", "reward_model"])
def test_a_model_of_another_vocabulary(stage, out, tmp_path):
    """A reference, a judge or ORPO's base that reads ids as other words: a loss like any other."""
    path = out / "cpu" / stage / "checkpoint.pt"
    checkpoint = read_torch(path)
    words = checkpoint["vocabulary"]
    words[-2:] = reversed(words[-2:])
    write_torch(path, checkpoint | {"base": "gpt-own"})
    (out / "cpu/gpt").rename(out / "cpu/gpt-own")
    flags = ONLINE
    if stage == "sft":
        flags = ["--loss", "orpo", *own_pairs(tmp_path / "pairs.jsonl")]
    with pytest.raises(InputError, match=f"{stage}/checkpoint.pt: its vocabulary is not that of"):
        run_dpo(out, *flags)


def test_online_on_somebodys_own_prompts(out, tmp_path):
    """Held-out prompts that are trained on; prompts too long to answer."""
    path = tmp_path / "pairs.jsonl"
    data = own_pairs(path)
    rows = read_pairs(path)
    rows += [{**row, "prompt": row["prompt"] + " Now" * 120} for row in rows]
    write_jsonl(path, rows)
    run_dpo(out, *ONLINE, *data)
    found = sum(rounds_of(out), [])
    train, _ = hold_out(rows)
    short = {row["prompt"] for row in train if "Now" not in row["prompt"]}
    assert 30 < len(short) < 40 and {row["prompt"] for row in found} <= short
    assert len(found) == 24
