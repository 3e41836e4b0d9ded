"""The family in ppo.py, from REINFORCE to GRPO: each formula against brute force or float64, each flag against its promise.
Where the methods end is measured in test_enumerable.py."""

import copy
import itertools
import math
import random

import numpy as np
import pytest
import torch

import gpt
import ppo
import sft
from data.files import InputError, write_jsonl
from data.run import read_torch
from data.tokenizer import Tokenizer, train as train_vocabulary
from gpt import GPT, GPTConfig, load_checkpoint, save_checkpoint
from helpers import V, experience, metrics, noise, ragged_mask, snapshot, tiny_gpt, tiny_reward_model, untimed
from reward_model import RewardModel

END, LIMIT = 4, 3
METHODS = tuple(ppo.PRESETS["method"])

# ----------------------------------------------------------------------------------------------------------------------
# Advantages


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
@pytest.mark.parametrize("junk", [1e6, math.nan, math.inf])
def test_returns_to_go(gamma, junk):
    """A sum that begins at the prompt, runs on into the padding, or discounts from the start of the response."""
    mask, prompts, lengths = ragged_mask(4, B=7)
    rewards = torch.where(mask, noise(1, *mask.shape), junk)
    returns = ppo.returns_to_go(rewards, mask, gamma)
    for b, (prompt, length) in enumerate(zip(prompts, lengths)):
        for t in range(mask.shape[1]):
            inside = range(t, length - 1) if t >= prompt - 1 else ()
            expected = sum(gamma ** (k - t) * rewards[b, k].item() for k in inside)
            assert returns[b, t].item() == pytest.approx(expected, abs=1e-5), (b, t)


@pytest.mark.parametrize("group", [2, 3, 8])
def test_group_advantages(group):
    """Mean and deviation of the whole batch, or of rows i, i + G, i + 2G, …, that are of other prompts."""
    scores = 3 * noise(0, 5 * group) + 7
    rows = scores.double().numpy().reshape(5, group)
    centred = rows - rows.mean(axis=1, keepdims=True)
    plain, scaled = ppo.group_advantages(scores, group, scale=False), ppo.group_advantages(scores, group)
    np.testing.assert_allclose(plain, centred.flatten(), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(scaled, (centred / rows.std(axis=1, keepdims=True)).flatten(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ppo.group_advantages(100 * scores - 3, group), scaled, rtol=1e-4, atol=1e-4)
    other = scores.clone()
    other[group:2 * group] = 50 * noise(1, group)
    for scale in (True, False):
        same = ppo.group_advantages(other, group, scale) == ppo.group_advantages(scores, group, scale)
        assert same.view(5, group).all(dim=1).tolist() == [True, False, True, True, True]


@pytest.mark.parametrize("value", [0.1, 7.3, -1e6, 0.0, 1e-30])
@pytest.mark.parametrize("scale", [True, False])
def test_a_group_of_equal_scores(value, scale):
    """0/0; or 0.1 minus a mean that is rounded, over a deviation of the same rounding: steps of full size to nowhere. One
    response, sampled twice and scored in two micro-batches, has two scores that differ in the last bits."""
    for group in (2, 3, 7, 50):
        equal = torch.full((2 * group,), value)
        equal[group:] = torch.arange(float(group))  # another prompt's
        advantages = ppo.group_advantages(equal, group, scale)
        assert (advantages[:group] == 0).all() and advantages[group:].abs().min() > 0 or group % 2
    if abs(value) < 10:
        nearly = value + 1e-6 * noise(0, 8)
        assert ppo.group_advantages(nearly, 8, scale).abs().max() < 0.05


def test_every_token_has_its_responses_group_advantage():
    """A KL penalty in the rewards that counts from the token on, or not at all; a response's advantage on its neighbour."""
    mask, _, _ = ragged_mask(2, B=6)
    rewards = torch.where(mask, noise(1, *mask.shape), 0.0)
    for scale in (True, False):
        config = ppo.Config(advantage="group", group=3, scale=scale)
        advantages, _ = ppo.estimate_advantages(rewards, torch.zeros_like(rewards), mask, config)
        expected = ppo.group_advantages(rewards.sum(dim=1), 3, scale)
        torch.testing.assert_close(advantages, expected[:, None] * mask, rtol=1e-4, atol=1e-5)


def baselined(rewards, mask, moving=0.0, **flags):
    config = ppo.Config(advantage="reward_to_go", **flags)
    return ppo.estimate_advantages(rewards, torch.full_like(rewards, 99.0), mask, config, moving)[0]


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_baselines(gamma):
    """A baseline that is a mean over padding, over responses instead of tokens, of another prompt's responses, or that
    holds the response itself; V in what has no value model."""
    mask, prompts, lengths = ragged_mask(3, B=6)
    rewards = torch.where(mask, noise(1, *mask.shape), 0.0)
    G = ppo.returns_to_go(rewards, mask, gamma).double()
    first = [G[b, prompt - 1].item() for b, prompt in enumerate(prompts)]  # G_0
    expected = dict(none=[0.0] * 6, batch=[G[mask].mean().item()] * 6, moving=[2.5] * 6, leave_one_out=[
        np.mean([first[j] for j in range(6) if j // 3 == i // 3 and j != i]) for i in range(6)])
    for baseline, values in expected.items():
        found = baselined(rewards, mask, moving=2.5, baseline=baseline, group=3, gamma=gamma)
        torch.testing.assert_close(found.double(), (G - torch.tensor(values)[:, None]) * mask, rtol=1e-4, atol=1e-5)


def test_leave_one_out_is_no_function_of_the_own_response():
    """The mean of all the group: a baseline that knows the action takes a share of the gradient away, 1/G of it."""
    mask, _, _ = ragged_mask(3, B=6)
    rewards = torch.where(mask, noise(1, *mask.shape), 0.0)
    other = rewards.clone()
    other[1] *= 5
    for baseline, group, touched in (("leave_one_out", 3, [True, False, True, False, False, False]),
                                     ("batch", 1, [True] * 6), ("none", 1, [False] * 6)):
        before, after = (ppo.returns_to_go(r, mask, 1.0) - baselined(r, mask, baseline=baseline, group=group)
                         for r in (rewards, other))
        assert ((after - before).abs().amax(dim=1) > 1e-4).tolist() == touched


PROMPTS = [[2, 0], [1], [3, 3, 0, 1, 2], [0, 1, 2]]


class Length:
    """A reward model: a token of a response, or of its prompt, is worth 1."""

    def score(self, tokens, lengths):
        return lengths.float()


def loop(policy, config, reference=None, value_model=None):
    return ppo.optimize(policy, reference, Length(), value_model, lambda n, rng: rng.choices(PROMPTS, k=n), END, config)


def test_the_moving_average(monkeypatch):
    """An average that begins at 0 is far below the returns for twenty batches; one that holds the batch itself knows the
    action; one that restarts with every iteration is the last batch's mean."""
    seen, estimate = [], ppo.estimate_advantages
    monkeypatch.setattr(ppo, "estimate_advantages", lambda *args: seen.append(args[-1]) or estimate(*args))
    config = ppo.Config(**ppo.PRESETS["method"]["reinforce_baseline"] | dict(
        baseline="moving", iterations=4, rollouts=12, max_new_tokens=LIMIT, beta=0.0, lr=1e-2, missing_end_score=2.0))
    means = []
    for rollout, _, state in loop(tiny_gpt(0), config):
        scores = torch.where(rollout.ended(END), rollout.lengths.float(), 2.0)  # no KL: G_t is the score, for every token
        tokens = rollout.lengths - rollout.prompt_lengths
        means.append(((scores * tokens).sum() / tokens.sum()).item())
    assert seen[0] == 0 and len(set(means)) == 4
    for i in range(1, 4):
        expected = means[0]
        for mean in means[1:i]:
            expected = 0.9 * expected + 0.1 * mean
        assert seen[i] == pytest.approx(expected, rel=1e-5)


def test_responses_to_one_prompt_stand_together(monkeypatch):
    """Groups drawn as G copies of the batch: rows i·G to (i+1)·G - 1 are then of different prompts, and a hard prompt's
    responses all have negative advantages."""
    for group in (1, 2, 6):
        config = ppo.Config(iterations=1, rollouts=12, group=group, max_new_tokens=LIMIT, epochs=1)
        rollout, _, _ = next(loop(tiny_gpt(0), config, tiny_gpt(1), tiny_reward_model(2)))
        asked = [tuple(row[:n]) for row, n in zip(rollout.tokens.tolist(), rollout.prompt_lengths.tolist())]
        drawn = random.Random(f"ppo {config.seed} 0").choices(PROMPTS, k=12 // group)
        assert asked == [tuple(prompt) for prompt in drawn for _ in range(group)]
        if group > 1:
            assert len(set(rollout.responses()[i][0] for i in range(12))) > 1


# ----------------------------------------------------------------------------------------------------------------------
# Losses


@pytest.mark.parametrize("junk", [1e4, math.nan, math.inf])
def test_policy_gradient_loss(junk):
    """A gradient out of the padding (0 · nan is nan), a mean over it, or a sum that grows with the batch."""
    mask, _, _ = ragged_mask(5)
    logprobs, advantages = noise(1, *mask.shape).double(), noise(2, *mask.shape).double()
    logprobs[~mask], advantages[~mask] = junk, junk
    logprobs.requires_grad_()
    loss = ppo.policy_gradient_loss(logprobs, advantages, mask)
    loss.backward()
    n = mask.sum().item()
    assert loss.item() == pytest.approx(-(advantages * logprobs)[mask].sum().item() / n, rel=1e-12)
    torch.testing.assert_close(logprobs.grad, torch.where(mask, -advantages / n, 0.0), rtol=1e-12, atol=0)


@pytest.mark.parametrize("junk", [1e4, math.nan, math.inf])
def test_penalty_policy_loss(junk):
    """A penalty that rewards the distance, has no coefficient or counts the padding; ρ of the padding, e^10000."""
    mask, _, _ = ragged_mask(5)
    logprobs, old, A, kl = (noise(seed, *mask.shape).double() for seed in range(4))
    for x in (logprobs, old, A, kl):
        x[~mask] = junk
    for x in (logprobs, kl):
        x.requires_grad_()
    loss = ppo.penalty_policy_loss(logprobs, old, A, kl, mask, coefficient=0.7)
    loss.backward()
    n, ratio = mask.sum().item(), (logprobs - old).detach().exp()
    assert loss.item() == pytest.approx(-(ratio * A - 0.7 * kl)[mask].sum().item() / n, rel=1e-12)
    torch.testing.assert_close(logprobs.grad, torch.where(mask, -ratio * A / n, 0.0), rtol=1e-12, atol=0)
    torch.testing.assert_close(kl.grad, 0.7 / n * mask.double(), rtol=1e-12, atol=0)


def test_exact_kl():
    """The ratio upside down, the mean over the vocabulary for the sum, or nan where both distributions are left out."""
    old, new = (noise(seed, 3, 4, V).log_softmax(dim=2) for seed in (1, 2))
    old[:, 1], new[:, 1] = 0.0, 0.0
    found = gpt.exact_kl(old, new)
    for b, t in itertools.product(range(3), range(4)):
        p, q = old[b, t].double().exp().numpy(), new[b, t].double().exp().numpy()
        assert found[b, t].item() == pytest.approx(0 if t == 1 else np.sum(p * np.log(p / q)), abs=1e-6)
    assert found[:, [0, 2, 3]].min() > 0 and not gpt.exact_kl(old, old).any()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_distribution(temperature):
    """The distribution of the state behind: its KL is that of other tokens, and at column t the ratio's is another one."""
    policy, batch = tiny_gpt(0), experience(tiny_gpt(0), tiny_reward_model(1))
    with torch.no_grad():
        found = gpt.log_distribution(policy, batch.tokens, batch.mask, temperature)
        expected = (policy(batch.tokens)[:, :-1] / temperature).log_softmax(dim=-1)
    torch.testing.assert_close(found[batch.mask], expected[batch.mask], rtol=1e-5, atol=1e-5)
    assert found.shape == (*batch.mask.shape, V) and not found[~batch.mask].any()


@pytest.mark.parametrize("kl, expected", [
    (0.0, 0.5), (0.0066, 0.5), (0.0067, 1.0), (0.01, 1.0), (0.015, 1.0), (0.0151, 2.0), (9.0, 2.0)])
def test_adapt_penalty(kl, expected):
    """A coefficient that grows where the policy stands still, or changes within the band of 1.5 around the target."""
    assert ppo.adapt_penalty(1.0, kl, target=0.01) == expected
    assert ppo.adapt_penalty(3.0, kl, target=0.01) == 3 * expected


# ----------------------------------------------------------------------------------------------------------------------
# One minibatch


def minibatch_by_hand(policy, value_model, batch, config):
    """(policy's gradients, value model's, the four figures) in float64, token by token, from all logits at once."""
    policy, value_model = copy.deepcopy(policy).double(), copy.deepcopy(value_model).double()
    everything = (policy(batch.tokens) / config.temperature).log_softmax(dim=-1)
    responses, stopped, moved = [], [], []
    for i, mask in enumerate(batch.mask):
        terms = []
        for t in mask.nonzero().squeeze(1).tolist():
            logprob = everything[i, t, batch.tokens[i, t + 1]]
            A, log_ratio = batch.advantages[i, t].double(), logprob - batch.old_logprobs[i, t].double()
            old, ratio = batch.old_distribution[i, t].double(), log_ratio.exp()
            if config.objective == "policy_gradient":
                terms.append(A * logprob)
            elif config.objective == "clip":
                bound = 1 + config.clip if A > 0 else 1 - config.clip
                stopped.append(float(ratio > bound if A > 0 else ratio < bound))
                terms.append(A * bound if stopped[-1] else A * ratio)
            else:
                moved.append(sum(p.exp() * (p - q) for p, q in zip(old, everything[i, t])))
                terms.append(A * ratio - config.penalty * moved[-1])
            if config.objective != "penalty":
                moved.append(ratio - 1 - log_ratio)  # k3 of KL(π_old || π_θ)
            if config.kl == "loss":
                q = batch.ref_logprobs[i, t].double() - logprob  # log π_ref/π_θ
                terms[-1] = terms[-1] - config.beta * (q.exp() - q - 1)
        responses.append(torch.stack(terms))
    objective = (torch.stack([terms.mean() for terms in responses]) if config.mean == "responses" else
                 torch.cat(responses)).mean()
    values, old, G = value_model(batch.tokens)[:, :-1][batch.mask], batch.old_values[batch.mask], batch.returns[batch.mask]
    near = torch.minimum(torch.maximum(values, old - config.value_clip), old + config.value_clip)
    value_loss = 0.5 * torch.maximum((values - G) ** 2, (near - G) ** 2).mean()
    figures = torch.stack([-objective, value_loss, torch.tensor(stopped or [0.0]).mean(), torch.stack(moved).mean()])
    return (torch.autograd.grad(-objective, policy.parameters()), torch.autograd.grad(value_loss, value_model.parameters()),
            figures.detach().float())


@pytest.mark.parametrize("objective", ["clip", "penalty", "policy_gradient"])
@pytest.mark.parametrize("kl", ["rewards", "loss"])
@pytest.mark.parametrize("mean", ["tokens", "responses"])
def test_the_gradient_of_every_loss(objective, kl, mean):
    """A mean per response taken over the micro-batch it happens to stand in; a weight on the ratio, on the value loss or
    not on the penalty; k3 of π_ref/π_θ turned over, detached, without β, or counted in the rewards and the loss."""
    policy, value_model = tiny_gpt(0), tiny_reward_model(1)
    batch = experience(policy, value_model)
    config = ppo.Config(objective=objective, kl=kl, mean=mean, beta=0.7, penalty=1.3, temperature=0.8)
    *expected, figures = minibatch_by_hand(policy, value_model, batch, config)
    for micro_batch in (1, 4, 64):
        config.micro_batch = micro_batch
        found = ppo.backward(policy, value_model, batch, config)
        torch.testing.assert_close(found, figures, rtol=1e-4, atol=1e-5)
        for model, gradients in zip((policy, value_model), expected):
            for parameter, gradient in zip(model.parameters(), gradients):
                torch.testing.assert_close(parameter.grad, gradient.float(), rtol=1e-3, atol=2e-6)
            model.zero_grad()


def test_the_mean_per_response():
    """The three means of one made-up batch: a long response counts as much as a short one, or by its tokens."""
    mask = torch.tensor([[True, False, False, False], [True] * 4])
    batch = ppo.Experience(torch.zeros(2, 5, dtype=torch.long), torch.tensor([2, 5]), mask, torch.zeros(2, 4),
                           torch.tensor([[1.0, 0, 0, 0], [-1.0] * 4]))
    policy = tiny_gpt(0)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.zero_()  # every token has probability 1/5
    for mean, expected in (("tokens", (1 - 4) / 5), ("responses", (1 - 1) / 2)):
        config = ppo.Config(objective="policy_gradient", mean=mean)
        loss, _, _, _ = ppo.backward(policy, None, batch, config).tolist()
        assert loss == pytest.approx(expected * math.log(5), abs=1e-6)


@pytest.mark.parametrize("micro_batch", [1, 4, 64])
def test_pretraining_gradient(micro_batch):
    """γ times a mean over the documents' tokens, for a sum over the divisor of the policy's own loss: then γ means another
    price for every length of document; a document's first tokens masked like a prompt; padding that is learnt."""
    policy, rng = tiny_gpt(0), random.Random(0)
    batch = experience(policy, tiny_reward_model(1))
    documents = [[rng.randrange(V) for _ in range(n)] for n in (5, 2, 11, 3, 3, 7)]
    config = ppo.Config(ptx=0.3, micro_batch=micro_batch)
    loss = ppo.backward(policy, None, batch, config)[0]
    without = [parameter.grad.clone() for parameter in policy.parameters()]
    policy.zero_grad()
    double = copy.deepcopy(policy).double()
    surprise = -sum(double(torch.tensor([row]))[0, :-1].log_softmax(dim=1)[range(len(row) - 1), row[1:]].sum()
                    for row in documents)
    expected = torch.autograd.grad(0.3 * surprise / batch.mask.sum(), double.parameters())
    found = ppo.backward(policy, None, batch, config, documents)[0]
    assert (found - loss).item() == pytest.approx(0.3 * surprise.item() / batch.mask.sum().item(), rel=1e-5)
    for parameter, plain, gradient in zip(policy.parameters(), without, expected):
        torch.testing.assert_close(parameter.grad - plain, gradient.float(), rtol=1e-3, atol=2e-6)


# ----------------------------------------------------------------------------------------------------------------------
# The loop


class Untouched:
    """Stands where a model may be that is not needed."""

    def __getattr__(self, name):
        raise AssertionError(f"{name} was asked for")


@pytest.mark.parametrize("method", METHODS)
def test_a_model_that_is_not_needed_is_not_called(method):
    """A reference that is multiplied by β = 0, or values that nobody reads: a forward pass for nothing; and figures of
    models that are not there."""
    config = ppo.Config(**ppo.PRESETS["method"][method] | dict(iterations=2, rollouts=8, epochs=1, max_new_tokens=LIMIT))
    valued = config.advantage == "gae"
    for beta in (0.0, 0.5):
        config.beta = beta
        value_model = tiny_reward_model(2) if valued else Untouched()
        for _, figures, state in loop(tiny_gpt(0), config, tiny_gpt(1) if beta else Untouched(), value_model):
            assert {"kl", "J"} & figures.keys() == ({"kl", "J"} if beta else set())
            assert ("value_loss" in figures) == ("value_explained" in figures) == ("value_model" in state) == valued
            assert ("clip_fraction" in figures) == (method in ("ppo", "grpo"))
            assert ("penalty" in figures) == (method == "ppo_penalty")


@pytest.mark.parametrize("method", METHODS)
def test_where_the_kl_penalty_stands(method, monkeypatch):
    """GRPO's KL in the rewards as well: the penalty counts twice. And without a ratio, a second pass over a batch."""
    seen, shaped = [], ppo.shaped_rewards
    monkeypatch.setattr(ppo, "shaped_rewards", lambda *args: seen.append(args[-1]) or shaped(*args))
    config = ppo.Config(**ppo.PRESETS["method"][method] | dict(iterations=1, rollouts=24, beta=0.5, max_new_tokens=LIMIT))
    (_, figures, _), = loop(tiny_gpt(0), config, tiny_gpt(1), tiny_reward_model(2))
    assert seen == [0.0 if method == "grpo" else 0.5]
    assert config.epochs == 1 or config.objective != "policy_gradient"


@pytest.mark.parametrize("epochs, minibatch", [(1, 8), (3, 4)])
def test_the_penalty_adapts_to_the_whole_update(epochs, minibatch):
    """A mean over the minibatches as they are trained on: it begins at 0, with one step a batch it is 0, and c halves until
    nothing is left of the penalty. The oracle: both policies, all logits."""
    config = ppo.Config(objective="penalty", iterations=3, rollouts=8, minibatch=minibatch, epochs=epochs, lr=1e-2,
                        penalty=2.0, penalty_target=0.02, max_new_tokens=LIMIT)
    policy, coefficient = tiny_gpt(0), 2.0
    before = copy.deepcopy(policy)
    for rollout, figures, state in loop(policy, config, tiny_gpt(1), tiny_reward_model(2)):
        mask = gpt.response_mask(rollout.prompt_lengths, rollout.lengths, rollout.tokens.shape[1])
        with torch.no_grad():
            old, new = (model(rollout.tokens)[:, :-1].double().log_softmax(dim=2) for model in (before, policy))
        kl = (old.exp() * (old - new)).sum(dim=2)[mask].mean().item()
        assert figures["approx_kl"] == pytest.approx(kl, rel=1e-3) and figures["penalty"] == coefficient
        coefficient *= 2 if kl > 0.03 else 0.5 if kl < 0.02 / 1.5 else 1
        assert state["penalty"] == coefficient
        before = copy.deepcopy(policy)
    assert coefficient != 0.25  # not halved every time


# ----------------------------------------------------------------------------------------------------------------------
# The flags


def parsed(monkeypatch, *flags, size="cpu"):
    """The Config that a command line makes."""
    seen = []
    monkeypatch.setattr(ppo, "train", seen.append)
    ppo.main(["--size", size, *flags])
    return seen[0]


ONE_BY_ONE = {
    "ppo": "", "ppo_penalty": "--objective penalty",
    "a2c": "--objective policy_gradient --epochs 1",
    "reinforce": "--objective policy_gradient --epochs 1 --advantage reward_to_go",
    "reinforce_baseline":
        "--objective policy_gradient --epochs 1 --advantage reward_to_go --baseline batch",
    "grpo": "--advantage group --group 8 --kl loss --mean responses"}


def test_a_method_is_its_flags(monkeypatch):
    """A method that does something that no flag does: nobody could walk from REINFORCE to PPO; a flag that a preset
    overrules, at either size."""
    assert ONE_BY_ONE.keys() == set(METHODS)
    for size, (method, flags) in itertools.product(("cpu", "gpu"), ONE_BY_ONE.items()):
        preset = parsed(monkeypatch, "--method", method, size=size)
        assert preset.method == method
        preset.method = "ppo"
        assert preset == parsed(monkeypatch, *flags.split(), size=size)
        assert preset.epochs == 1 or preset.objective != "policy_gradient"  # a second pass needs the ratio
    config = parsed(monkeypatch, *"--method grpo --no-scale --kl rewards --group 4 --mean tokens".split())
    assert (config.scale, config.kl, config.group, config.mean) == (False, "rewards", 4, "tokens")
    assert (config.advantage, config.epochs, config.minibatch) == ("group", ppo.Config.epochs, ppo.Config.minibatch)
    config = parsed(monkeypatch, *"--method reinforce --epochs 4 --minibatch 16 --advantage gae --lam 0.5".split())
    assert (config.epochs, config.minibatch, config.advantage, config.lam) == (4, 16, "gae", 0.5)
    assert config.objective == "policy_gradient"


@pytest.mark.parametrize("flags, line", [
    ("--method reinforce --clip 0.1", "--clip 0.1: goes with --objective clip only"),
    ("--method ppo_penalty --clip 0.1", "--clip 0.1: goes with --objective clip only"),
    ("--penalty 2", "--penalty 2.0: goes with --objective penalty only"),
    ("--method grpo --penalty_target 0.1", "--penalty_target 0.1: goes with --objective penalty only"),
    ("--method grpo --lam 0.5", "--lam 0.5: goes with --advantage gae only"),
    ("--method reinforce --value_lr 1e-3", "--value_lr 0.001: goes with --advantage gae only"),
    ("--method reinforce_baseline --value_clip 1", "--value_clip 1.0: goes with --advantage gae only"),
    ("--method grpo --gamma 0.9", "--gamma 0.9: goes with --advantage gae or reward_to_go only"),
    ("--method reinforce --scale", "--scale True: goes with --advantage gae or group only"),
    ("--baseline batch", "--baseline batch: goes with --advantage reward_to_go only"),
    ("--method grpo --baseline moving", "--baseline moving: goes with --advantage reward_to_go only"),
    ("--beta 0 --kl loss", "--kl loss: goes with --beta only"),
    ("--method grpo --beta 0 --kl loss", "--kl loss: goes with --beta only"),
    ("--beta 0 --kl_target 3", "--kl_target 3.0: goes with --beta only"),
    ("--method grpo --group 1", "--group 1: must be at least 2 and divide --rollouts 64"),
    ("--method grpo --rollouts 60", "--group 8: must be at least 2 and divide --rollouts 60"),
    ("--method reinforce_baseline --baseline leave_one_out", "--group 1: must be at least 2 and divide --rollouts 64"),
    ("--group 3", "--group 3: must be at least 1 and divide --rollouts 64"),
    ("--group 128", "--group 128: must be at least 1 and divide --rollouts 64"),
    ("--group 0", "--group 0: must be positive"), ("--ptx -1", "--ptx -1.0: must be a number, and not negative"),
    ("--ptx nan", "--ptx nan: must be a number, and not negative")])
def test_a_flag_that_a_method_ignores_is_refused(flags, line, tmp_path):
    """Ten runs with --clip tuned, of a method that clips nothing; a group of one, compared with itself: no gradient at
    all. In one line, before anything is trained."""
    with pytest.raises(InputError) as error:
        ppo.main(["--size", "cpu", "--out", str(tmp_path), *flags.split()])
    assert str(error.value) == line and not any(tmp_path.iterdir())


# ----------------------------------------------------------------------------------------------------------------------
# The script, on models that nobody trained

TINY = "--size cpu --iterations 4 --rollouts 8 --minibatch 4 --epochs 2 --max_new_tokens 8 --save 2 --lr 1e-2".split()


def write_checkpoints(out, context, width=16):
    """The checkpoints that PPO builds on, of models that nobody trained; a character is a token, and a fifth of all is
    <|end|>."""
    tokenizer, shape = Tokenizer(train_vocabulary("", 259)), GPTConfig(259, context, n_layer=1, n_head=2, n_embd=width)
    torch.manual_seed(0)
    base, judge = GPT(shape), RewardModel(shape)
    with torch.no_grad():
        base.ln_f.bias += 4 * base.wte.weight[tokenizer.end_token]
        judge.head.weight.normal_()
    for stage, model, extra in (("gpt", base, {"text": ""}), ("sft", base, {}), ("reward_model", judge, {})):
        (out / "cpu" / stage).mkdir(parents=True, exist_ok=True)
        save_checkpoint(out / "cpu" / stage / "checkpoint.pt", stage, "cpu", model, tokenizer, **extra)


@pytest.fixture
def untrained(tmp_path, monkeypatch):
    """A folder with checkpoints whose context holds every story of the little world. Ten documents are held out."""
    monkeypatch.setattr(gpt, "held_out_documents", lambda documents=gpt.held_out_documents()[:10]: documents)
    write_checkpoints(tmp_path / "out", 480)
    return tmp_path / "out"


def flags_of(method):
    """TINY, without the flags that a method sets by itself."""
    flags = ["--method", method, *TINY]
    if ppo.PRESETS["method"][method].get("epochs") == 1:
        for name in ("--epochs", "--minibatch"):
            del flags[flags.index(name):flags.index(name) + 2]
    return flags


def tensors(path):
    """A checkpoint without its tensors, and those."""
    checkpoint = read_torch(path)
    return checkpoint, checkpoint.pop("model")


@pytest.mark.parametrize("method, flags", [
    ("ppo", "--ptx 0.5"), ("ppo_penalty", "--penalty_target 1e-3"), ("a2c", "--kl_target 3"), ("reinforce", "--beta 0"),
    ("reinforce_baseline", "--baseline moving"), ("reinforce_baseline", "--baseline leave_one_out --group 2"),
    ("grpo", "--group 4")])
def test_every_method_resumes_bit_for_bit(method, flags, untrained, monkeypatch):
    """A coefficient, an average or the drawing of documents that begins anew where the run goes on."""
    argv = ["--out", str(untrained), *flags_of(method), *flags.split()]
    ppo.main([*argv, "--name", "ppo-whole"])
    calls, generate = itertools.count(1), ppo.generate

    def killed(*args, **more):
        if next(calls) == 4:
            raise KeyboardInterrupt
        return generate(*args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(ppo, "generate", killed)
        with pytest.raises(KeyboardInterrupt):
            ppo.main([*argv, "--name", "ppo-killed"])
    state = read_torch(untrained / "cpu/ppo-killed/unfinished/state.pt")
    assert state["step"] == 2 and state["moving"] != 0 and (state["penalty"] != 1) == (method == "ppo_penalty")
    ppo.main([*argv, "--name", "ppo-killed", "--resume"])
    (whole, weights), (resumed, others) = (tensors(untrained / "cpu" / name / "checkpoint.pt")
                                           for name in ("ppo-whole", "ppo-killed"))
    assert resumed == whole and all(torch.equal(weights[name], others[name]) for name in weights)
    assert untimed(metrics(untrained / "cpu/ppo-killed/metrics.jsonl")) == whole["metrics"]
    assert any(not torch.equal(x, weights[name]) for name, x in tensors(untrained / "cpu/sft/checkpoint.pt")[1].items())


@pytest.mark.parametrize("flags, held", [
    ("--method ppo", "policy, reference, reward_model, value_model"),
    ("--method a2c", "policy, reference, reward_model, value_model"),
    ("--method grpo", "policy, reference, reward_model"), ("--method reinforce", "policy, reference, reward_model"),
    ("--method ppo --beta 0", "policy, reward_model, value_model"),
    ("--method grpo --beta 0", "policy, reward_model"), ("--method reinforce_baseline --beta 0", "policy, reward_model")])
def test_the_models_in_memory(flags, held, tmp_path, capsys, monkeypatch):
    """The lecture's four models held by a method that uses three, or two; a line that counts what is not there. A model
    that learns takes four times its weights: themselves, their gradients and Adam's two moments."""
    write_checkpoints(tmp_path, 128, width=128)
    seen = []
    monkeypatch.setattr(ppo, "optimize", lambda *args: seen.append(args[:4]) or iter(()))
    ppo.main(["--size", "cpu", "--out", str(tmp_path), "--max_new_tokens", "8", *flags.split()])
    names = held.split(", ")
    assert [model is not None for model in seen[0]] == [
        name in names for name in ("policy", "reference", "reward_model", "value_model")]
    sizes = [sum(x.numel() for x in read_torch(tmp_path / "cpu" / stage / "checkpoint.pt")["model"].values())
             for stage in ("sft", "sft", "reward_model", "reward_model")]
    total = sum(4 * size * (4 if name in ("policy", "value_model") else 1)
                for name, size in zip(("policy", "reference", "reward_model", "value_model"), sizes) if name in names)
    assert f"models in memory: {len(names)} ({held}), {total / 2 ** 20:.0f} MB with gradients and optimizer\n" in (
        capsys.readouterr().out)
    policy, reference, _, value_model = seen[0]
    assert policy is not reference and (not reference or torch.equal(policy.wte.weight, reference.wte.weight))


def test_no_update_reaches_the_frozen_models(untrained, monkeypatch):
    """A reference, or a reward model, that shares its weights with the model that learns from it, and learns with it."""
    seen, optimize = [], ppo.optimize
    monkeypatch.setattr(ppo, "optimize", lambda *args: seen.append(args[:4]) or optimize(*args))
    ppo.main(["--out", str(untrained), *TINY])
    for model, stage, frozen in zip(seen[0], ("sft", "sft", "reward_model", "reward_model"), (False, True, True, False)):
        weights = read_torch(untrained / "cpu" / stage / "checkpoint.pt")["model"]
        assert all(torch.equal(x.cpu(), weights[name]) for name, x in model.state_dict().items()) == frozen


def pretraining_line(printed):
    """The two numbers of the line "pretraining loss"."""
    line, = (line for line in printed.splitlines() if line.startswith("pretraining loss "))
    assert line.endswith(" nats per token")
    return [float(word) for word in line.split() if word[0].isdigit()]


def test_pretraining_text_of_the_little_world(untrained, capsys):
    """--ptx on another text than the base model's, or whose loss nobody tells; a line about it without --ptx."""
    losses = {}
    for ptx in ("0", "20"):
        ppo.main(["--out", str(untrained), *TINY, "--beta", "0", "--ptx", ptx])
        printed = capsys.readouterr().out
        assert ("pretraining loss" in printed) == (ptx == "20")
        policy, tokenizer, _ = load_checkpoint(untrained / "cpu/ppo/checkpoint.pt", "ppo", "cpu")
        documents = gpt.encode_documents(gpt.held_out_documents(), tokenizer)
        losses[ptx] = gpt.held_out_loss(policy, documents, 1)
    before = gpt.held_out_loss(load_checkpoint(untrained / "cpu/sft/checkpoint.pt", "sft", "cpu")[0], documents, 1)
    assert pretraining_line(printed) == pytest.approx([before, losses["20"]], abs=6e-4)
    assert losses["20"] < losses["0"] - 0.2


def test_pretraining_text_of_somebodys_own(tmp_path, capsys, monkeypatch):
    """--ptx that draws the little world's stories for a model of somebody's own text and prompts, its held-out tenth, or
    windows that the policy's context cannot hold; a text that is gone, or another one when the run goes on."""
    text, rows = tmp_path / "text.txt", tmp_path / "rows.jsonl"
    text.write_text("abc " * 2700 + "cba " * 300)  # the last tenth is held out
    write_jsonl(rows, [{"prompt": f"Why {i}?"} for i in range(20)])
    out, path = tmp_path / "out", tmp_path / "out/cpu/gpt/checkpoint.pt"
    write_checkpoints(out, 64)
    _, tokenizer, _ = load_checkpoint(path, "gpt", "cpu")
    wider = GPT(GPTConfig(259, 128, n_layer=1, n_head=2, n_embd=16))  # another base model, trained since
    save_checkpoint(path, "gpt", "cpu", wider, tokenizer, text=str(text))
    drawn, backward = [], sft.backward
    monkeypatch.setattr(sft, "backward", lambda *args: drawn.append(args[1]) or backward(*args))
    argv = ["--out", str(out), *TINY, "--data", str(rows), "--ptx", "20"]
    ppo.main(argv)
    before, after = pretraining_line(capsys.readouterr().out)
    assert after < before - 0.2
    assert list(map(len, drawn)) == [4] * 16  # as many as responses
    windows = {tokenizer.decode(ids.tolist()) for ids in itertools.chain(*drawn)}
    assert len(windows) > 1 and all(len(window) == 64 and "ba " not in window for window in windows)

    def killed(*args, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr(ppo, "save_checkpoint", killed)
    with pytest.raises(KeyboardInterrupt):
        ppo.main(argv)
    monkeypatch.undo()
    text.write_text("abd " * 3000)
    with pytest.raises(InputError, match="the run began with another .*text.txt; begin anew"):
        ppo.main([*argv, "--resume"])
    text.unlink()
    found = snapshot(out)
    with pytest.raises(InputError) as error:
        ppo.main([*argv, "--resume"])
    assert str(error.value) == f"{text}: no such file" and snapshot(out) == found
