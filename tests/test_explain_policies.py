"""dpo.py --explain, best_of_n.py --prompt and the frontier: the numbers on the screen are those
that training and the yardstick compute."""

import re
import shutil

import pytest
import torch

import best_of_n
import dpo
import gpt
import ppo
from data.annotator import gold_reward
from data.files import read_pairs
from data.tokenizer import Pair
from helpers import explained
from reward_model import RewardModel, score_all

SETTINGS = {"dpo": dict(beta=0.3), "ipo": dict(beta=0.1), "simpo": dict(beta=5.0, gamma=0.7),
            "orpo": dict(lam=1.5), "kto": dict(undesirable_weight=0.5)}  # not the defaults


@pytest.fixture(scope="module")
def trained(stages, tmp_path_factory):
    """A folder with a policy of every loss, and one of PPO."""
    out = shutil.copytree(stages, tmp_path_factory.mktemp("explained") / "out")
    common = ["--out", str(out), "--size", "cpu", "--max_new_tokens", "16"]
    for loss, settings in SETTINGS.items():
        flags = f"--loss {loss} --name dpo-{loss} --batch 8 --lr 1e-2 --warmup 1".split()
        for name, value in settings.items():
            flags += [f"--{name}", str(value)]
        if loss == "ipo":  # as on a file of one's own
            flags += ["--data", str(out / "cpu/reward_model/pairs.jsonl")]
        dpo.main(common + flags)
    ppo.main(common + "--iterations 2 --rollouts 8 --minibatch 4 --lr 1e-3".split())
    return out


def explained_pair(loss, out, monkeypatch, *flags):
    """dpo.py --explain of a loss's policy: its tables, {label: text}, the lines below, one text."""
    texts = {}
    monkeypatch.setattr(dpo, "show", lambda *lines: texts.update(lines))
    tables, lines = explained(dpo, out, monkeypatch, "--explain", "--name", f"dpo-{loss}", *flags)
    return tables, texts, "\n".join(lines)


def load(out, name, stage, model_class=gpt.GPT):
    path = out / "cpu" / name / "checkpoint.pt"
    return gpt.load_checkpoint(path, stage, "cpu", model_class=model_class)


@torch.no_grad()
def response_logprobs(model, ids, prompt):
    """log π of each token of a response, (n,)."""
    x = torch.tensor([ids])
    return gpt.token_logprobs(model(x), x)[0, len(prompt) - 1:]


@pytest.mark.parametrize("loss", SETTINGS)
def test_a_pairs_numbers(loss, trained, monkeypatch):
    """A column of another response or model; a β, γ, λ or pair that is the default's and not one of
    the policy's training; a gradient with the sign of the other response."""
    (tokens, sums, rewards), texts, legend = explained_pair(loss, trained, monkeypatch)
    policy, tokenizer, _ = load(trained, f"dpo-{loss}", "dpo")
    reference, _, _ = load(trained, "sft", "sft")
    reward_model, _, _ = load(trained, "reward_model", "reward_model", RewardModel)
    own = read_pairs(trained / f"cpu/reward_model/{'pairs' if loss == 'ipo' else 'held_out'}.jsonl")
    assert dict(prompt=texts["prompt"], chosen=texts["y_w"], rejected=texts["y_l"]) in own

    prompt = tokenizer.prompt(texts["prompt"])
    pair = []
    logprobs = []
    refs = []
    for i, (label, mark) in enumerate((("y_w", ""), ("y_l", "'"))):
        ids = prompt + tokenizer.response(texts[label])
        found = response_logprobs(policy, ids, prompt)
        ref = response_logprobs(reference, ids, prompt)
        n = len(found)
        assert tokens[label][:n] == tokenizer.shown(ids[len(prompt):])
        assert tokens[f"log π_θ{mark}"][:n] == pytest.approx(found.tolist(), abs=1e-5)
        assert not any(tokens[label][n:]) and not any(tokens[f"log π_θ{mark}"][n:])
        if loss in ("dpo", "ipo", "kto"):
            ratio = tokens[f"log ratio{mark}"][:n]
            assert ratio == pytest.approx((found - ref).tolist(), abs=1e-5)
        pair.append(ids)
        logprobs.append(found.sum(dim=0, keepdim=True).requires_grad_())
        refs.append(ref.sum(dim=0, keepdim=True))
        gold = gold_reward(texts["prompt"], texts[label])
        score = score_all(reward_model, [ids]).item()
        assert rewards[label][-2:] == pytest.approx([score, gold], abs=1e-5)
        assert sums["log π_θ(y|x)"][i] == pytest.approx(found.sum().item(), abs=1e-4)

    config = dpo.Config(loss=loss, **SETTINGS[loss])
    if loss == "kto":
        z0 = sums["log ratio"][0] - sums["log ratio - z0"][0]
        assert f"z0 = {z0:.3f} nats" in legend
        good = torch.tensor([True, False])
        expected = 2 * dpo.kto_loss(torch.cat(logprobs), torch.cat(refs), good, z0, config.beta,
                                    config.desirable_weight, config.undesirable_weight)
        shown = sum(sums["loss λ_y - v"])
    else:
        expected, _ = dpo.loss_of_logprobs(logprobs, refs, [Pair(*pair, len(prompt))], config)
        shown = float(re.search(r"loss.* (\d+\.\d{3})(;|$)", legend, re.M)[1])
    assert shown == pytest.approx(expected.item(), abs=2e-3)
    gradient = torch.autograd.grad(expected, logprobs)
    assert sums["∂L/∂log π_θ(y|x)"] == pytest.approx([x.item() for x in gradient], rel=1e-2)


def test_candidates_weights(trained, monkeypatch):
    """Weights beside another candidate, β and 1/β confused, PPO's ratio upside down."""
    question = "Tell me a story about a shy fox and a kite."
    flags = "--max_new_tokens 16 --beta 0.4 --n 6 --prompt".split()
    (rows, means), _ = explained(best_of_n, trained, monkeypatch, *flags, question)
    policy, tokenizer, _ = load(trained, "ppo", "ppo")
    reference, _, _ = load(trained, "sft", "sft")
    r = torch.tensor(rows["r"])
    for i, beta in enumerate((0.1, 0.4, 1.6), start=1):
        weights = torch.tensor(rows[f"β = {beta:g}"])
        assert torch.allclose(weights, (r / beta).softmax(0), atol=1e-5)
        kl = (weights * (6 * weights).log()).sum().item()
        assert means["KL to π_ref"][i] == pytest.approx(kl, abs=1e-5)
        assert means["E[gold]"][i] == pytest.approx((weights * torch.tensor(rows["gold"])).sum())
        assert means["β log Z"][i] == pytest.approx(means["E[r]"][i] - beta * kl, abs=1e-4)

    prompt = tokenizer.prompt(question)
    for text, found in zip(rows["candidate"], rows["log π_PPO/π_ref"]):
        ids = prompt + tokenizer.encode(text)
        ratios = []
        for x in (ids, ids + [tokenizer.end_token]):  # it may have hit the limit
            ratio = response_logprobs(policy, x, prompt) - response_logprobs(reference, x, prompt)
            ratios.append(ratio.sum().item())
        assert any(ratio == pytest.approx(found, abs=1e-3) for ratio in ratios), text
