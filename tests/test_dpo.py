"""dpo.py against the lecture's numbers, its gradient, and token-by-token loops. Every test says which bug it is for."""

import json
import math
import random
import re

import pytest
import torch

import dpo
import reward_model
from data.files import InputError, read_pairs, write_jsonl
from dpo import dpo_loss
from gpt import load_checkpoint, pad
from helpers import metrics, noise, snapshot, tiny_gpt, untimed
from reward_model import encode_pairs

END = 4
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
# Summed log-probabilities, batches


def test_figures_of_the_lectures_pair():
    """Chosen and rejected exchanged in a column, a margin without its beta, a sum over the pairs for the mean."""
    pair, config, loss = [-15.2, -14.8, -16.0, -14.5], dpo.Config(beta=0.1), torch.tensor(7.0)
    found = dpo.figures(loss, *numbers(*pair), config)
    assert found.shape == (5,) == (len(dpo.FIGURES),)
    assert dict(zip(dpo.FIGURES, found.tolist())) == pytest.approx(
        {"loss": 7, "accuracy": 1, "margin": 0.11, "chosen_log_ratio": 0.8, "rejected_log_ratio": -0.3})
    # A second pair, the same one turned round: means of both.
    both = [torch.cat(column) for column in zip(numbers(*pair), numbers(-14.8, -15.2, -14.5, -16.0))]
    assert dpo.figures(loss, *both, config).tolist() == pytest.approx([7, 0.5, 0, 0.25, 0.25])


def test_the_loss_that_is_reported_is_the_one_that_was_trained_on(monkeypatch):
    """A figure that computes its own loss: whoever changes dpo_loss trains on one and reads the other. Here it is
    IPO's, with another gradient and other values (Azar et al. 2023)."""
    def ipo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta):
        return (((policy_chosen - ref_chosen) - (policy_rejected - ref_rejected) - 1 / (2 * beta)) ** 2).mean()

    policy, reference, config = tiny_gpt(0), tiny_gpt(1), dpo.Config(beta=0.3, micro_batch=2)
    _, margins = loss_by_hand(policy, reference, PAIRS, beta=1.0)
    loss = ((margins - 1 / 0.6) ** 2).mean()
    expected = torch.autograd.grad(loss, list(policy.parameters()))
    monkeypatch.setattr(dpo, "dpo_loss", ipo_loss)
    figures = [dpo.backward(policy, reference, PAIRS, config), dpo.evaluate(policy, reference, PAIRS, config, rows=2)]
    for parameter, gradient in zip(policy.parameters(), expected):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-5)
    assert [row[0].item() for row in figures] == pytest.approx([loss.item()] * 2, rel=1e-4)


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
    assert 0 < accuracy < 1
    assert figures[:3].tolist() == pytest.approx([loss.item(), accuracy, margins.mean().item()], abs=1e-4)
    assert beta * (figures[3] - figures[4]).item() == pytest.approx(margins.mean().item(), abs=1e-4)
    evaluated = dpo.evaluate(policy, reference, PAIRS, config, rows=micro_batch)
    torch.testing.assert_close(evaluated, figures, rtol=1e-4, atol=1e-5)


def test_training_prefers_the_chosen():
    """A loss that goes down while the chosen responses lose against the rejected ones."""
    policy, reference, config = tiny_gpt(0), tiny_gpt(0), dpo.Config(beta=0.5, micro_batch=2)
    start = dpo.evaluate(policy, reference, PAIRS, config)
    assert start.tolist() == pytest.approx([math.log(2), 0, 0, 0, 0], abs=1e-5)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.05)
    for _ in range(15):
        dpo.backward(policy, reference, PAIRS, config)
        optimizer.step()
        optimizer.zero_grad()
    loss, accuracy, margin, chosen, rejected = dpo.evaluate(policy, reference, PAIRS, config).tolist()
    assert accuracy == 1 and margin > 0.5 and loss < 0.5 and chosen > rejected
    untouched = tiny_gpt(0)
    assert all((p == q).all() for p, q in zip(reference.parameters(), untouched.parameters()))


# ----------------------------------------------------------------------------------------------------------------------
# The script


FLAGS = "--size cpu --batch 8 --report 2 --max_new_tokens 8".split()
KEYS = {"step", "loss", "accuracy", "margin", "chosen_log_ratio", "rejected_log_ratio", "held_out_loss", "held_out_accuracy",
        "seconds"}


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
