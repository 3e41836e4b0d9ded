"""The family in ppo.py, from REINFORCE to GRPO, and PPO beside it: each formula and gradient
against brute force or float64. Where the methods end is measured in test_enumerable.py."""

import copy
import math
import random
import re
from unittest import mock

import numpy as np
import pytest
import torch

import gpt
import ppo
from data import corpus
from data.files import InputError, checksum
from data.run import read_torch, write_torch
from data.tokenizer import Tokenizer, train as train_vocabulary
from gpt import GPT, load_checkpoint
from helpers import (END, LIMIT, METHODS, V, bare_rollouts, draw_prompts, first_step,
                     made_up_rollouts, noise, optimize, ragged_mask, response_reward, tiny_gpt,
                     tiny_reward_model)
from reward_model import RewardModel

WITH_RATIO = [method for method in METHODS if method not in ppo.ONE_STEP]
CLIPPED = [method for method in WITH_RATIO if method != "ppo_penalty"]


def test_a_group_of_equal_scores():
    """0/0, or a rounding error over another: steps of full size to nowhere. One response, scored in
    two micro-batches, has two scores that differ in the last bits."""
    equal = torch.full((14,), 0.1)
    equal[7:] = torch.arange(7.0)  # another prompt's
    advantages = ppo.group_advantages(equal, 7, True)
    assert (advantages[:7] == 0).all() and advantages[7:].abs().max() > 0.4
    assert ppo.group_advantages(0.1 + 1e-6 * noise(0, 8), 8, True).abs().max() < 0.05


def advantages_of(method, rewards, mask, mean=0.0, **flags):
    """Step 3 of a method that has no use for V."""
    rollouts = bare_rollouts(mask)._replace(old_values=torch.full_like(rewards, 99.0))
    return ppo.estimate_advantages(rewards, rollouts, mean, ppo.Config(method=method, **flags))[0]


def test_baselines():
    """A return that runs on into the padding, or discounts from the response's start; a baseline
    over padding or another prompt's responses; a division that a method should have left off."""
    mask, prompts, lengths = ragged_mask(3, B=6)
    rewards = torch.where(mask, noise(1, *mask.shape), math.nan)
    G = torch.zeros(mask.shape)
    for b, (prompt, length) in enumerate(zip(prompts, lengths)):
        for t in range(prompt - 1, length - 1):
            G[b, t] = sum(0.9 ** (k - t) * rewards[b, k] for k in range(t, length - 1))
    first = torch.stack([G[b, prompt - 1] for b, prompt in enumerate(prompts)])  # G_0
    groups = first.view(2, 3)
    others = []
    for i in range(6):
        group = range(0, 3) if i < 3 else range(3, 6)
        others.append(np.mean([first[j] for j in group if j != i]))
    expected = {"reinforce": G, "reinforce_baseline": G - G[mask].mean(),
                "reinforce_moving": G - 2.5, "rloo": G - torch.tensor(others)[:, None]}
    centred = groups - groups.mean(dim=1, keepdim=True)
    for method in ppo.GRPO:
        expected[method] = centred.view(6, 1)
    expected["grpo"] = (centred / groups.std(dim=1, keepdim=True, correction=0)).view(6, 1)
    for method, advantages in expected.items():
        found = advantages_of(method, rewards, mask, mean=2.5, group=3, gamma=0.9)
        torch.testing.assert_close(found, advantages * mask, rtol=1e-4, atol=1e-5)


def test_leave_one_out_is_no_function_of_the_own_response():
    """The mean of all the group: a baseline that knows the action takes a share of the gradient
    away, 1/G of it."""
    mask, _, _ = ragged_mask(3, B=6)
    rewards = torch.where(mask, noise(1, *mask.shape), 0.0)
    other = rewards.clone()
    other[1] *= 5

    def baseline(method, rewards):
        return ppo.returns_to_go(rewards, mask, 1.0) - advantages_of(method, rewards, mask, group=3)

    for method, touched in (("rloo", [True, False, True, False, False, False]),
                            ("reinforce_baseline", [True] * 6)):
        moved = (baseline(method, other) - baseline(method, rewards)).abs().amax(dim=1)
        assert (moved > 1e-4).tolist() == touched


def task(watch=lambda rollout: None):
    """A token of a response is worth 1. watch: called with every Rollout before it is scored."""
    def reward(rollout):
        watch(rollout)
        return response_reward(len)(rollout)
    return ppo.Task(draw_prompts, reward, END)


def test_the_moving_average(monkeypatch):
    """An average that begins at 0 is far below the returns for twenty batches; one that holds the
    batch itself knows the action; one that starts anew is the last batch's mean."""
    spy = mock.Mock(wraps=ppo.estimate_advantages)
    monkeypatch.setattr(ppo, "estimate_advantages", spy)
    config = ppo.Config(method="reinforce_moving", iterations=3, rollouts=12, max_new_tokens=LIMIT,
                        lr=1e-2)
    optimize(tiny_gpt(0), tiny_gpt(1), None, task(), config)
    baselines = []
    means = []
    for call in spy.call_args_list:
        rewards, rollouts, mean, _ = call.args
        baselines.append(mean)
        means.append(ppo.returns_to_go(rewards, rollouts.mask, 1.0)[rollouts.mask].mean().item())
    expected = [0.0, means[0], 0.9 * means[0] + 0.1 * means[1]]
    assert len(set(means)) == 3 and baselines == pytest.approx(expected, rel=1e-5)


def test_adapt_penalty():
    """A coefficient that grows where the policy does not move, or changes within the band of 1.5
    around the target."""
    kls = (0.0066, 0.01 / 1.5, 0.015, 0.0151)
    assert [ppo.adapt_penalty(3.0, kl, target=0.01) for kl in kls] == [1.5, 3.0, 3.0, 6.0]


def step_by_hand(policy, value_model, rollouts, config, rows):
    """({model: its gradients}, figures) of a minibatch in float64, token by token, from all logits
    at once."""
    double = copy.deepcopy(policy).double()
    double_values = copy.deepcopy(value_model).double()
    everything = (double(rollouts.tokens) / config.temperature).log_softmax(dim=-1)
    all_values = double_values(rollouts.tokens)
    responses = []
    stopped = []
    moved = []
    squares = []
    for i in rows:
        terms = []
        for t in rollouts.mask[i].nonzero().squeeze(1).tolist():
            logprob = everything[i, t, rollouts.tokens[i, t + 1]]
            A = rollouts.advantages[i, t].double()
            log_ratio = logprob - rollouts.old_logprobs[i, t].double()
            ratio = log_ratio.exp()
            moved.append(ratio - 1 - log_ratio)  # k3 of KL(π_old || π_θ)
            if config.method in CLIPPED:
                bound = 1 + config.clip if A > 0 else 1 - config.clip
                stopped.append(float(ratio > bound if A > 0 else ratio < bound))
                terms.append(A * bound if stopped[-1] else A * ratio)
            elif config.method == "ppo_penalty":
                terms.append(A * ratio - config.penalty * moved[-1])
            else:
                terms.append(A * logprob)
            if config.method in ppo.KL_IN_LOSS:
                q = rollouts.ref_logprobs[i, t].double() - logprob  # log π_ref/π_θ
                terms[-1] = terms[-1] - config.beta * (q.exp() - q - 1)

            value = all_values[i, t]
            G = rollouts.returns[i, t].double()
            old = rollouts.old_values[i, t].double()
            near = old + (value - old).clamp(-config.value_clip, config.value_clip)
            squares.append(torch.maximum((value - G) ** 2, (near - G) ** 2))
        responses.append(torch.stack(terms))

    objective = torch.cat(responses).mean()
    if config.method in ppo.GRPO and config.method != "grpo_token_mean":
        objective = torch.stack([terms.mean() for terms in responses]).mean()
    gradients = {policy: torch.autograd.grad(-objective, double.parameters())}
    figures = {"approx_kl": torch.stack(moved).mean().item()}
    if stopped:
        figures["clip_fraction"] = sum(stopped) / len(stopped)
        assert 0 < figures["clip_fraction"] < 1
    if config.method in ppo.WITH_VALUES:
        value_loss = 0.5 * torch.stack(squares).mean()
        gradients[value_model] = torch.autograd.grad(value_loss, double_values.parameters())
        figures["value_loss"] = value_loss.item()
    return gradients, figures


@pytest.mark.parametrize("method", METHODS)
def test_the_gradient_of_every_loss(method, monkeypatch):
    """The mean of the micro-batches' means (TRL, transformers 2024); max for min, a clamp on both
    sides; k3 turned over, detached, or in the rewards as well; an advantage with a gradient."""
    policy = tiny_gpt(0)
    value_model = tiny_reward_model(1)
    config = ppo.Config(method=method, iterations=1, rollouts=6, group=3, beta=0.7, penalty=1.3,
                        temperature=0.8)
    rollouts = made_up_rollouts(policy, value_model)
    rows = [4, 0, 2, 5]     # a minibatch, not all that was sampled
    rewards = rollouts.token_rewards + ppo.shaped_rewards(
        rollouts.scores, rollouts.old_logprobs, rollouts.ref_logprobs, rollouts.mask,
        0.0 if method in ppo.KL_IN_LOSS else config.beta)
    advantages, returns = ppo.estimate_advantages(rewards, rollouts, 0.0, config)
    whole = rollouts._replace(advantages=advantages, returns=returns)
    expected, figures = step_by_hand(policy, value_model, whole, config, rows)
    for micro_batch in (1, 3, 64):
        config.micro_batch = micro_batch
        found, row = first_step(monkeypatch, policy, value_model, rollouts, config, rows)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5, check_dtype=False)
        assert {name: row[name] for name in figures} == pytest.approx(figures, rel=1e-4, abs=1e-5)


def test_pretraining_gradient():
    """γ times a mean over the documents' tokens, for a sum over the policy's divisor; first tokens
    masked like a prompt; padding that is learnt; a loss of another temperature."""
    policy = tiny_gpt(0)
    rng = random.Random(0)
    documents = [rng.choices(range(V), k=length) for length in (5, 2, 11, 3, 3, 7)]
    config = ppo.Config(ptx=0.3, micro_batch=4, temperature=0.8)
    ppo.ptx_backward(policy, documents, torch.tensor(47), config)
    double = copy.deepcopy(policy).double()
    surprise = 0.0
    for row in documents:
        logprobs = (double(torch.tensor([row]))[0, :-1] / 0.8).log_softmax(dim=1)
        surprise -= logprobs[range(len(row) - 1), row[1:]].sum()
    expected = torch.autograd.grad(0.3 * surprise / 47, double.parameters())
    found = [parameter.grad for parameter in policy.parameters()]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-6, check_dtype=False)


@pytest.mark.parametrize("method", METHODS)
def test_steps_and_figures_of_every_method(method, monkeypatch):
    """Without a ratio, a second step on a batch; weight decay; a rate that does not fall; groups
    drawn as copies of the batch, so that easy prompts are compared with hard ones; a figure of what
    a method does not have, or a J of another KL."""
    steps = []
    asked = []

    def optimizer_step(optimizer, model, lr):
        steps.append((type(model), lr))
        assert all(group["weight_decay"] == 0 for group in optimizer.param_groups)

    def watch(rollout):
        for row, length in zip(rollout.tokens.tolist(), rollout.prompt_lengths):
            asked.append(row[:length])

    monkeypatch.setattr(ppo, "optimizer_step", optimizer_step)
    config = ppo.Config(method=method, iterations=4, rollouts=24, minibatch=16, epochs=3, group=4,
                        beta=0.5, lr=0.4, value_lr=0.8, max_new_tokens=LIMIT)
    rows = optimize(tiny_gpt(0), tiny_gpt(1), tiny_reward_model(2), task(watch), config)
    valued = method in ppo.WITH_VALUES
    copies = 1 if method == "ppo" else 4
    prompts = []
    expected = []
    for iteration, decay in enumerate((1, 0.75, 0.5, 0.25)):
        for prompt in draw_prompts(24 // copies, random.Random(f"ppo {config.seed} {iteration}")):
            prompts += [prompt] * copies
        step = [(GPT, pytest.approx(0.4 * decay)), (RewardModel, pytest.approx(0.8 * decay))]
        expected += step[:1 + valued] * (6 if method in WITH_RATIO else 1)
    assert steps == expected and asked == prompts
    for row in rows:
        assert ("value_explained" in row) == valued
        assert ("clip_fraction" in row) == (method in CLIPPED)
        assert row["J"] == pytest.approx(row["reward"] - 0.5 * row["kl"], abs=1e-5)
        assert abs(row["kl"]) > 1e-3


def test_the_penalty_adapts_to_the_whole_update():
    """A mean over the minibatches as they are trained on: with one step a batch it is 0, and c
    halves until nothing is left. The oracle: both policies, all logits."""
    config = ppo.Config(method="ppo_penalty", iterations=4, rollouts=8, minibatch=4, epochs=3,
                        lr=1e-2, penalty=2.0, penalty_target=0.02, max_new_tokens=LIMIT)
    policy = tiny_gpt(0)
    rollouts = []
    policies = []

    def watch(rollout):
        rollouts.append(rollout)
        policies.append(copy.deepcopy(policy))

    rows = optimize(policy, tiny_gpt(1), tiny_reward_model(2), task(watch), config)
    policies.append(policy)
    coefficient = 2.0
    for i, (rollout, row) in enumerate(zip(rollouts, rows)):
        mask = gpt.response_mask(rollout.prompt_lengths, rollout.lengths, rollout.tokens.shape[1])
        with torch.no_grad():
            old, new = (gpt.token_logprobs(model(rollout.tokens), rollout.tokens).double()[mask]
                        for model in policies[i:i + 2])
        kl = ((new - old).exp() - 1 - (new - old)).mean().item()
        assert row["update_kl"] == pytest.approx(kl, rel=1e-2)
        assert row["penalty"] == coefficient
        coefficient = ppo.adapt_penalty(coefficient, kl, 0.02)
    assert row["penalty"] != 0.25  # not halved every time


# --------------------------------------------------------------------------------------------------
# The script

TINY = ("--size cpu --iterations 4 --rollouts 8 --max_new_tokens 8 --save 2 --lr 1e-2 "
        "--minibatch 4 --epochs 2").split()


def test_a_method_with_values(out, capsys, monkeypatch):
    """A coefficient, the value model or its optimizer that starts anew where the run continues. A
    count of memory that forgets gradients and moments: what learns takes four times its weights."""
    argv = ["--out", str(out), *TINY, *"--method ppo_penalty --penalty_target 1e-3".split()]
    shown = mock.Mock()
    with monkeypatch.context() as patch:
        patch.setattr(ppo, "show_models", shown)
        ppo.main([*argv, "--name", "ppo-whole"])
    big = tiny_gpt(0, vocab=10_000)     # in the place of each
    ppo.show_models(*shown.call_args.args, **dict.fromkeys(shown.call_args.kwargs, big))
    total = 2 * (1 + 4) * sum(4 * x.numel() for x in big.parameters())  # a copy of two learns
    assert ("models in memory: 4 (policy, reference, reward_model, value_model), "
            f"{total / 2 ** 20:.0f} MB with gradients and optimizer\n") in capsys.readouterr().out

    log_rollouts = ppo.log_rollouts

    def killed_in_the_fourth(run, iteration, *others):
        if iteration == 3:
            raise KeyboardInterrupt
        log_rollouts(run, iteration, *others)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ppo, "log_rollouts", killed_in_the_fourth)
        ppo.main([*argv, "--name", "ppo-killed"])
    ppo.main([*argv, "--name", "ppo-killed", "--resume"])
    whole = read_torch(out / "cpu/ppo-whole/checkpoint.pt")
    resumed = read_torch(out / "cpu/ppo-killed/checkpoint.pt")
    for name in ("model", "value_model"):
        torch.testing.assert_close(resumed[name], whole[name], atol=0, rtol=0)
    assert resumed["metrics"] == whole["metrics"] and whole["metrics"][-1]["penalty"] != 1


def test_pretraining_text_of_the_little_world(out, capsys, monkeypatch):
    """--ptx that does not train, or whose loss nobody tells, or tells at another temperature; the
    text of the folder gpt, where SFT began from another base model."""
    documents = corpus.held_out_documents()[:10]
    monkeypatch.setattr(corpus, "held_out_documents", lambda world: documents)
    (out / "cpu/gpt").rename(out / "cpu/gpt-other")
    path = out / "cpu/sft/checkpoint.pt"
    write_torch(path, read_torch(path) | {"base": "gpt-other"})
    flags = "--epochs 1 --beta 0 --ptx 20 --temperature 0.8 --reward verifier"
    ppo.main(["--out", str(out), *TINY, *flags.split()])
    losses = []
    for stage, temperature in (("sft", 1.0), ("ppo", 0.8)):
        model, tokenizer, _ = load_checkpoint(out / "cpu" / stage / "checkpoint.pt", stage, "cpu")
        ids = corpus.encode_documents(documents, tokenizer)
        losses.append(gpt.held_out_loss(model, ids, 1, 8, temperature))
    line, = re.findall("^pretraining loss .*", capsys.readouterr().out, re.M)
    assert list(map(float, re.findall(r"\d\S+", line))) == pytest.approx(losses, abs=6e-4)
    assert losses[1] < losses[0] - 0.2


def test_pretraining_text_of_somebodys_own(tmp_path):
    """--ptx that draws the little world's stories, also where mid-training was on curated ones; the
    held-out tenth, or what the context cannot hold; a file that has changed since."""
    text = tmp_path / "text.txt"
    text.write_text("abc " * 2700 + "cba " * 300)  # the last tenth is held out
    tokenizer = Tokenizer(train_vocabulary("", 259))
    base = {"text": str(text), "text_checksum": checksum(text)}
    draw_documents, _, _ = ppo.pretraining_text(base, tmp_path / "checkpoint.pt", tokenizer, 64)
    windows = [tokenizer.decode(list(ids)) for ids in draw_documents(64, random.Random(0))]
    assert len(windows) == 64 and len(set(windows)) > 1
    assert all(len(window) == 64 and "ba " not in window for window in windows)
    text.write_text("abd " * 3000)
    with pytest.raises(InputError, match="text.txt: has changed since .*checkpoint.pt"):
        ppo.pretraining_text(base, tmp_path / "checkpoint.pt", tokenizer, 64)
    draw, documents, _ = ppo.pretraining_text({"text": "", "curated": True}, 0, tokenizer, 300)
    assert documents != corpus.encode_documents(corpus.held_out_documents(), tokenizer)
    assert 250 < max(map(len, draw(64, random.Random(0)))) <= 300


@pytest.mark.parametrize("flags, expected", [
    ("--method a2c --size cpu", (400, 16)), ("--method rloo --size gpt2", (100, 512)),
    ("--method rloo --size cpu --rollouts 64", (100, 64))])
def test_methods_without_a_ratio_get_a_batch_for_every_step(monkeypatch, flags, expected):
    """They took four steps on the samples of one policy; or, with one step on PPO's large batch, a
    quarter of PPO's steps, and looked worse than they are."""
    configs = []
    monkeypatch.setattr(ppo, "train", configs.append)
    ppo.main(flags.split())
    assert (configs[0].iterations, configs[0].rollouts) == expected
