"""ppo.py against brute force, enumeration, autograd and the lecture's own table. Every test says
which bug it is for. The gradients of a minibatch are in test_policy_gradients.py.
"""

import copy
import itertools
import math
import random
import re
import shutil
import statistics
import sys

import numpy as np
import pytest
import torch

import dpo
import gpt
import ppo
import reward_model
import sft
from data import stories
from data.files import InputError, split_prompts, write_jsonl
from data.judges import annotator_judge
from data.run import SilentRun, read_torch
from data.tokenizer import Tokenizer, train as train_vocabulary
from gpt import load_checkpoint, pad, response_mask, save_checkpoint, token_logprobs
from helpers import (END, LIMIT, RESPONSES, V, cpu_only, first_step, made_up_rollouts, metrics,
                     noise, optimize, ragged_mask, response_reward, snapshot, tiny_gpt,
                     tiny_reward_model, untimed)
from reward_model import RewardModel, make_reward


@torch.no_grad()
def exact_logprobs(model, prompt, responses, temperature=1.0):
    """log π(y|x) of each response in float64, one prefix at a time: no padding, no shift."""
    model = copy.deepcopy(model).double()
    totals = []
    for response in responses:
        total = 0.0
        for t, token in enumerate(response):
            logits = model(torch.tensor([prompt + list(response[:t])]))[0, -1] / temperature
            total += torch.log_softmax(logits, 0)[token].item()
        totals.append(total)
    return torch.tensor(totals, dtype=torch.float64)


# --------------------------------------------------------------------------------------------------
# Masked statistics


@pytest.mark.parametrize("junk", [0.0, 1e30, math.inf, -math.inf, math.nan])
def test_padding_never_counts(junk):
    """Whitening over the padding (lm-human-preferences), or 0 * nan = nan out of a product with the
    mask."""
    mask, _, _ = ragged_mask(0)
    x = 3 * noise(1, *mask.shape) + 7
    inside = x[mask].double().numpy()
    x[~mask] = junk
    assert ppo.masked_mean(x, mask).item() == pytest.approx(inside.mean(), rel=1e-5)
    white = ppo.whiten(x, mask)
    expected = (inside - inside.mean()) / inside.std()
    np.testing.assert_allclose(white[mask], expected, rtol=1e-4, atol=1e-5)
    assert (white[~mask] == 0).all()


def test_whitening_equal_values_gives_zeros():
    """Division by a standard deviation of 0 when all advantages are the same."""
    mask, _, _ = ragged_mask(0)
    assert (ppo.whiten(torch.full(mask.shape, 0.5), mask) == 0).all()


# --------------------------------------------------------------------------------------------------
# Shaped rewards


def test_score_lands_on_the_last_response_token():
    """The score on the last column of the batch, or one beside <|end|>, where rows have other
    lengths."""
    mask, prompts, lengths = ragged_mask(3)
    logprobs = noise(1, *mask.shape)
    ref_logprobs = noise(2, *mask.shape)
    scores = 10 * noise(3, len(mask))
    logprobs[~mask] = math.nan
    ref_logprobs[~mask] = math.inf
    rewards = ppo.shaped_rewards(scores, logprobs, ref_logprobs, mask, beta=0.3)
    for b, (prompt, length) in enumerate(zip(prompts, lengths)):
        for t in range(mask.shape[1]):
            position = t + 1  # of the token that this column emits
            expected = 0.0
            if prompt <= position < length:
                expected -= 0.3 * (logprobs[b, t] - ref_logprobs[b, t]).item()
            if position == length - 1:
                expected += scores[b].item()
            assert rewards[b, t].item() == pytest.approx(expected, abs=1e-5), (b, t)


def test_kl_penalty_sums_to_the_kl_divergence():
    """KL with the ratio upside down (rlhf-book): its expectation is then no divergence at all, but
    negative."""
    policy = tiny_gpt(1)
    reference = tiny_gpt(2)
    prompt = [2, 0]
    beta = 0.7
    log_p = exact_logprobs(policy, prompt, RESPONSES)
    log_q = exact_logprobs(reference, prompt, RESPONSES)
    p = log_p.exp()
    assert p.sum().item() == pytest.approx(1)  # nothing is missing from the enumeration
    kl = (p * (log_p - log_q)).sum().item()

    tokens, lengths = pad([prompt + list(response) for response in RESPONSES])
    mask = response_mask(torch.full_like(lengths, len(prompt)), lengths, tokens.shape[1])
    with torch.no_grad():
        logprobs = token_logprobs(policy(tokens), tokens)
        ref_logprobs = token_logprobs(reference(tokens), tokens)
    rewards = ppo.shaped_rewards(torch.zeros(len(tokens)), logprobs, ref_logprobs, mask, beta)
    penalty = -(p * rewards.double().sum(dim=1)).sum().item() / beta
    assert kl > 0.01
    assert penalty == pytest.approx(kl, rel=1e-4)


# --------------------------------------------------------------------------------------------------
# Generalized advantage estimation


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.8), (0.97, 1.0), (1.0, 0.0),
                                        (0.5, 0.0), (1.0, 1.0)])
@pytest.mark.parametrize("junk", [1e6, math.nan])
def test_gae_is_the_sum_of_residuals(gamma, lam, junk):
    """Bootstrapping from V at the padding, from the prompt's V or across <|end|>; gamma or lambda
    forgotten."""
    mask, prompts, lengths = ragged_mask(4, B=7)
    rewards = torch.where(mask, noise(1, *mask.shape), 0.0)
    values = noise(2, *mask.shape)
    values[~mask] = junk
    advantages, returns = ppo.gae(rewards, values, mask, gamma, lam)

    A = np.zeros(mask.shape)
    for b, (prompt, length) in enumerate(zip(prompts, lengths)):
        first = prompt - 1  # the columns that emit the response's first and last token
        last = length - 2
        r = rewards[b].double().numpy()
        v = np.append(values[b].double().numpy(), 0.0)
        v[last + 1] = 0.0  # terminal
        for t in range(first, last + 1):
            for k in range(t, last + 1):
                A[b, t] += (gamma * lam) ** (k - t) * (r[k] + gamma * v[k + 1] - v[k])
            if lam == 0:  # the residual alone
                assert A[b, t] == pytest.approx(r[t] + gamma * v[t + 1] - v[t])
            if lam == 1:  # the Monte Carlo return minus V
                G = sum(gamma ** (k - t) * r[k] for k in range(t, last + 1))
                assert A[b, t] == pytest.approx(G - v[t])
    np.testing.assert_allclose(advantages, A, rtol=1e-4, atol=1e-5)
    expected = A[mask.numpy()] + values[mask].double().numpy()
    np.testing.assert_allclose(returns[mask], expected, rtol=1e-4, atol=1e-5)
    assert (returns[~mask] == 0).all()


# --------------------------------------------------------------------------------------------------
# The clipped losses


@pytest.mark.parametrize("ratio, advantage, stopped", [
    (0.5, 2.0, False), (1.1, 2.0, False), (1.5, 2.0, True),     # A > 0: only above 1+ε
    (0.5, -2.0, True), (0.9, -2.0, False), (1.5, -2.0, False),  # A < 0: only below 1-ε
    (0.5, 0.0, False), (1.0, 0.0, False), (1.5, 0.0, False),    # A = 0: no update, nothing stopped
])
def test_clipping_table_of_the_lecture(ratio, advantage, stopped):
    """max for min, or a clamp on both sides: a token that went wrong could then never come back."""
    old = noise(0, 1, 4)
    mask = torch.tensor([[True, False, True, True]])
    logprobs = old.clone()
    logprobs[0, 0] += math.log(ratio)
    logprobs[0, 1] += 1e4  # padding
    logprobs.requires_grad_()
    advantages = torch.tensor([[advantage, math.nan, 0.3, -0.4]])
    loss, clip_fraction = ppo.clipped_policy_loss(logprobs, old, advantages, mask, clip=0.2)
    loss.backward()
    first = 0.0 if stopped else -advantage * ratio / 3  # -A ρ / n
    expected = torch.tensor([[first, 0.0, -0.3 / 3, 0.4 / 3]])
    torch.testing.assert_close(logprobs.grad, expected)
    if stopped:
        ratio = 1.2 if advantage > 0 else 0.8
    objective = advantage * ratio + 0.3 - 0.4
    assert loss.item() == pytest.approx(-objective / 3, abs=1e-6)
    assert clip_fraction.item() == pytest.approx(stopped / 3)


def test_ratio_of_padding_never_overflows():
    """exp of a difference of 1e4 at the padding is inf, and its gradient nan in every weight."""
    mask, _, _ = ragged_mask(5)
    old = noise(1, *mask.shape)
    advantages = noise(2, *mask.shape)
    clean = (old + 0.1 * noise(3, *mask.shape)).requires_grad_()
    ppo.clipped_policy_loss(clean, old, advantages, mask, 0.2)[0].backward()
    for difference in (1e4, -1e4):
        dirty = torch.where(mask, clean.detach(), old + difference).requires_grad_()
        ppo.clipped_policy_loss(dirty, old, advantages, mask, 0.2)[0].backward()
        torch.testing.assert_close(dirty.grad, clean.grad)


def test_clipped_value_loss():
    """min for max, ε as a factor instead of an amount, or the mean over the padding."""
    mask, _, _ = ragged_mask(6)
    old, values, returns = (3 * noise(seed, *mask.shape) for seed in (1, 2, 3))
    for x in (old, values, returns):
        x[~mask] = 1e6
    values.requires_grad_()
    loss = ppo.clipped_value_loss(values, old, returns, mask, clip=0.5)
    loss.backward()
    total = 0.0
    gradient = np.zeros(mask.shape)
    stopped = 0
    for b, t in mask.nonzero().tolist():
        v = values[b, t].item()
        o = old[b, t].item()
        g = returns[b, t].item()
        near = min(max(v, o - 0.5), o + 0.5)
        plain = 0.5 * (v - g) ** 2
        clipped = 0.5 * (near - g) ** 2
        total += max(plain, clipped)
        gradient[b, t] = v - g if plain > clipped or near == v else 0.0
        stopped += gradient[b, t] == 0
    assert stopped > 0 and (gradient != 0).sum() > 0  # both cases occur
    assert loss.item() == pytest.approx(total / mask.sum().item(), rel=1e-5)
    expected = gradient / mask.sum().item()
    np.testing.assert_allclose(values.grad, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kl, expected", [
    (6.0, 0.5), (6.6, 0.505), (5.4, 0.495),     # 10 % off the target of 6: 1 % of beta
    (7.2, 0.51), (60.0, 0.51), (0.0, 0.49),     # never more than 2 % in one step
])
def test_adaptive_beta(kl, expected):
    """A controller that lowers beta when the KL is too high, or whose step isn't clipped."""
    assert ppo.adapt_beta(0.5, kl, kl_target=6.0) == pytest.approx(expected)


# --------------------------------------------------------------------------------------------------
# Rollouts and minibatches


def test_pick_keeps_the_rows_together():
    """An advantage beside the tokens of another row, or columns cut by the lengths of rows that
    were not picked."""
    batch = made_up_rollouts(tiny_gpt(0), tiny_reward_model(1))
    shape = batch.mask.shape
    batch = batch._replace(advantages=noise(7, *shape), returns=noise(8, *shape))
    for rows in ([4], [5, 0], [2, 4, 0], [3, 1, 5, 0, 4, 2]):
        part = batch.pick(torch.tensor(rows))
        T = max(batch.lengths[row].item() for row in rows)
        for name in batch._fields:
            whole = getattr(batch, name)
            found = getattr(part, name)
            if whole.dim() == 2:
                whole = whole[:, :T if name == "tokens" else T - 1]
            assert found.shape == (len(rows), *whole.shape[1:]), name
            for i, row in enumerate(rows):
                assert torch.equal(found[i], whole[row]), name
        assert part.mask.sum() == batch.mask[rows].sum()  # only padding was cut off


def test_every_pass_takes_every_row_once():
    """Rows that are drawn with replacement, left over at the end, or in the same order again."""
    batches = ppo.minibatches(10, 3, 4, random.Random(0), "cpu")
    assert [len(rows) for rows in batches] == [4, 4, 2] * 3
    orders = [torch.cat(batches[i:i + 3]).tolist() for i in (0, 3, 6)]
    assert [sorted(order) for order in orders] == [list(range(10))] * 3
    assert orders[0] != orders[1] != orders[2]


@pytest.mark.parametrize("micro_batch, widest", [
    (1, [4, 5, 7, 11, 15, 21]), (2, [5, 11, 21]), (3, [7, 21]), (6, [21])])
def test_rows_of_one_length_stand_together(micro_batch, widest, monkeypatch):
    """Micro-batches cut from the rows as they come: half of what is computed is padding."""
    policy = tiny_gpt(0)
    value_model = tiny_reward_model(1)
    batch = made_up_rollouts(policy, value_model)
    shapes = []
    for model in (policy, value_model.trunk):
        model.wte.register_forward_hook(
            lambda module, inputs, output: shapes.append(inputs[0].shape))
    config = ppo.Config(iterations=1, rollouts=6, micro_batch=micro_batch)
    first_step(monkeypatch, policy, value_model, batch, config, [3, 1, 5, 0, 4, 2])
    assert shapes == [(micro_batch, T) for T in widest for _ in range(2)]


def test_values_never_look_ahead():
    """V(s_t) read at the token that is only just being emitted: the baseline then knows the
    action."""
    model = tiny_reward_model(0)
    mask_column = 4
    tokens = torch.randint(V, (1, 10), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(tokens)[:, :-1]
        for changed in range(10):
            other = tokens.clone()
            other[0, changed] = (other[0, changed] + 1) % V
            same = model(other)[0, mask_column] == before[0, mask_column]
            assert same == (changed > mask_column)  # column t sees tokens[:, :t+1], nothing else


# --------------------------------------------------------------------------------------------------
# Scoring

PROMPTS = [[2, 0], [1], [3, 3, 0, 1, 2], [0, 1, 2]]


def draw_prompts(count, rng):
    return rng.choices(PROMPTS, k=count)


def task_of(score):
    """A task whose responses earn score(ids)."""
    return ppo.Task(draw_prompts, response_reward(score), END)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("micro_batch", [1, 2, 4, 5, 64])
def test_score_is_what_the_full_logits_say(micro_batch, temperature, monkeypatch):
    """Rows that come back in the order of their lengths; a score read at the padding, or where a
    longer row ends; a value where no response is; the reference at the policy's temperature, where
    it is another model than the SFT model. The oracle reads everything off one batch with all its
    padding."""
    policy = tiny_gpt(0)
    reference = tiny_gpt(1)
    scorer = tiny_reward_model(2)
    value_model = tiny_reward_model(3)
    prompts = torch.tensor([3, 1, 5, 2, 4, 1, 6])
    lengths = torch.tensor([4, 15, 7, 11, 5, 21, 13])
    tokens = torch.randint(V, (7, 24), generator=torch.Generator().manual_seed(4))  # padding too
    tokens[range(7), lengths - 1] = END
    mask = response_mask(prompts, lengths, 24)
    monkeypatch.setattr(ppo, "generate",
                        lambda *args, **more: gpt.Rollout(tokens, prompts, lengths))
    config = ppo.Config(micro_batch=micro_batch, temperature=temperature)
    task = ppo.Task(None, make_reward("reward_model", scorer, None, micro_batch), END)
    found = ppo.sample(policy, reference, value_model, task, [], config, random.Random(0),
                       SilentRun())
    with torch.no_grad():
        plain = [(found.old_logprobs, token_logprobs(policy(tokens), tokens, temperature)),
                 (found.ref_logprobs, token_logprobs(reference(tokens), tokens)),
                 (found.old_values, value_model(tokens)[:, :-1])]
        last = scorer(tokens)[range(7), lengths - 1]
    for fast, slow in plain:
        assert fast.shape == mask.shape
        assert (fast[~mask] == 0).all() and slow[~mask].abs().min() > 0
        torch.testing.assert_close(fast[mask], slow[mask], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.scores, last, rtol=1e-5, atol=1e-5)
    assert not found.token_rewards.any()


def test_rollouts_follow_the_scored_distribution():
    """Rollouts sampled with top-k or at temperature 1, but scored at another: importance ratios of
    the wrong policy."""
    count = 1000
    policy = tiny_gpt(0)
    config = ppo.Config(micro_batch=4000, max_new_tokens=1, temperature=0.5)
    rollouts = ppo.sample(policy, policy, None, task_of(len), PROMPTS * count, config,
                          random.Random(0), SilentRun())
    for i, prompt in enumerate(PROMPTS):
        drawn = rollouts.tokens[i::len(PROMPTS), len(prompt)]
        logprobs = exact_logprobs(policy, prompt, [[token] for token in range(V)], temperature=0.5)
        p = logprobs.exp()
        frequency = torch.bincount(drawn, minlength=V) / count
        error = (p * (1 - p) / count).sqrt()
        assert ((frequency - p).abs() < 4.5 * error + 1e-3).all()


# --------------------------------------------------------------------------------------------------
# The loop, in the small world


def before_the_update(monkeypatch, policy, reference, value_model, task, config):
    """(the first iteration's Rollouts with their advantages; copies of policy and value model as
    they were before the first step; all rows of figures)."""
    seen = []
    pick = ppo.Rollouts.pick

    def spy(rollouts, rows):
        if not seen:
            seen.extend([rollouts, copy.deepcopy(policy), copy.deepcopy(value_model)])
        return pick(rollouts, rows)

    monkeypatch.setattr(ppo.Rollouts, "pick", spy)
    rows = optimize(policy, reference, value_model, task, config)
    return (*seen, rows)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_first_minibatch_is_on_policy(monkeypatch, temperature):
    """Another temperature, position or padding in the scoring than in the sampling: the ratio
    starts off at 1 no more."""
    config = ppo.Config(iterations=1, rollouts=32, minibatch=32, micro_batch=5, epochs=1,
                        max_new_tokens=LIMIT, temperature=temperature)
    policy = tiny_gpt(0)
    batch, policy, value_model, (figures,) = before_the_update(
        monkeypatch, policy, copy.deepcopy(policy), tiny_reward_model(1), task_of(len), config)
    assert len(set(batch.mask.sum(dim=1).tolist())) > 1
    assert len(set(batch.mask.int().argmax(dim=1).tolist())) > 1
    with torch.no_grad():
        logprobs = token_logprobs(policy(batch.tokens), batch.tokens, temperature)
    assert ((logprobs - batch.old_logprobs)[batch.mask].exp() - 1).abs().max() < 1e-4
    assert figures["clip_fraction"] == 0 and abs(figures["approx_kl"]) < 1e-6
    everything = batch.advantages[batch.mask]  # whitened over all rollouts
    assert everything.mean().item() == pytest.approx(0, abs=1e-5)
    assert everything.std(correction=0).item() == pytest.approx(1, abs=1e-4)
    assert figures["length"] == pytest.approx(batch.mask.sum().item() / 32)
    entropy = -batch.old_logprobs[batch.mask].mean().item()
    assert figures["entropy"] == pytest.approx(entropy, rel=1e-5)

    # Every row alone, in float64: what was sampled, V of the prefix, the KL to the reference, which
    # is the same model at temperature 1, and the entropy that a sample's -log π estimates.
    surprise = []
    log_ratios = []
    double = copy.deepcopy(policy).double()
    for row, mask, old, values in zip(batch.tokens.tolist(), batch.mask, batch.old_logprobs,
                                      batch.old_values):
        first, last = mask.nonzero()[[0, -1], 0].tolist()
        prompt = row[:first + 1]
        response = row[first + 1:last + 2]
        exact = exact_logprobs(policy, prompt, [response], temperature).item()
        assert old[mask].sum().item() == pytest.approx(exact, abs=1e-4)
        log_ratios.append(exact - exact_logprobs(policy, prompt, [response]).item())
        for t in range(first, last + 1):
            prefix = torch.tensor([row[:t + 1]])
            with torch.no_grad():
                alone = value_model(prefix)[0, -1].item()
                logits = double(prefix)[0, -1] / temperature
            assert values[t].item() == pytest.approx(alone, abs=1e-4)
            uncertainty = torch.distributions.Categorical(logits=logits).entropy().item()
            surprise.append(-old[t].item() - uncertainty)
    assert figures["kl"] == pytest.approx(statistics.mean(log_ratios), abs=1e-5)
    assert abs(np.mean(surprise)) < 4 * np.std(surprise) / len(surprise) ** 0.5


def test_response_without_end_is_terminal_and_fined(monkeypatch):
    """A cut response that keeps the reward model's score, or whose last return bootstraps from
    V."""
    config = ppo.Config(iterations=1, rollouts=64, minibatch=64, micro_batch=64, epochs=1,
                        max_new_tokens=LIMIT, missing_end_score=-3.0)
    policy = tiny_gpt(3)
    value_model = tiny_reward_model(1)
    torch.nn.init.constant_(value_model.head.bias, 100.0)  # a bootstrap would be seen
    batch, _, _, (figures,) = before_the_update(
        monkeypatch, policy, copy.deepcopy(policy), value_model, task_of(lambda response: 7.0),
        config)
    ended = batch.tokens[range(64), batch.lengths - 1] == END
    assert 0 < ended.sum() < 64
    expected = torch.where(ended, 7.0, -3.0)
    assert figures["no_end"] == pytest.approx(1 - ended.float().mean().item())
    assert figures["reward"] == pytest.approx(expected.mean().item(), rel=1e-5)
    last_returns = batch.returns[range(64), batch.lengths - 2]
    torch.testing.assert_close(last_returns, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("factor", [0.0, 1.0, 0.5, -1.0, 3.0])
def test_value_explained_is_measured_against_what_came(monkeypatch, factor):
    """Values compared with λ-returns, which are half made of those values: whatever V says, it
    explains itself. Here every G_t is the response's score, and V = factor · G_t + 7 leaves
    (1 - factor)² of its variance."""
    config = ppo.Config(iterations=1, rollouts=32, epochs=1, max_new_tokens=LIMIT, lam=0.5,
                        beta=0.0)

    def all_values(value_model, rollout, mask, micro_batch):
        scores = 2.0 * mask.sum(dim=1)
        G = torch.where(rollout.ended(END), scores, config.missing_end_score)
        return torch.where(mask, factor * G[:, None] + 7, 0.0)

    monkeypatch.setattr(ppo, "all_values", all_values)
    task = task_of(lambda response: 2 * len(response))
    figures, = optimize(tiny_gpt(0), tiny_gpt(1), tiny_reward_model(2), task, config)
    assert figures["value_explained"] == pytest.approx(1 - (1 - factor) ** 2, abs=1e-4)


def test_value_explained_where_there_is_nothing_to_explain():
    """All responses earn the same: a rounding error over a rounding error, -1e8, in a column of
    seven characters; or no figure at all, and all columns behind it under another one's name."""
    config = ppo.Config(iterations=1, rollouts=8, epochs=1, max_new_tokens=LIMIT, beta=0.0,
                        missing_end_score=1.0)
    for value_model in (tiny_reward_model(2), RewardModel(tiny_gpt(0).config)):
        figures, = optimize(tiny_gpt(0), tiny_gpt(1), value_model, task_of(lambda y: 1.0), config)
        assert figures["value_explained"] == 0


def objective(policy, reference, score, beta):
    """(J, J*, KL) by enumeration, means over the prompts; a response without END gets the fine of
    -5."""
    figures = []
    r = torch.tensor([score(y) if y[-1] == END else -5.0 for y in RESPONSES]).double()
    for prompt in PROMPTS:
        log_p = exact_logprobs(policy, prompt, RESPONSES)
        log_q = exact_logprobs(reference, prompt, RESPONSES)
        kl = (log_p.exp() * (log_p - log_q)).sum()
        J = (log_p.exp() * r).sum() - beta * kl
        best = beta * (log_q + r / beta).logsumexp(0)
        figures.append(torch.stack([J, best, kl]))
    return torch.stack(figures).mean(dim=0).tolist()


def test_training_climbs_to_the_optimum_and_beta_holds_it_back():
    """A loss with the wrong sign, advantages of the wrong token, a KL penalty that pushes away from
    the reference."""
    def score(response):
        return 1.5 * response.count(2) - response.count(1)

    divergence = {}
    for beta in (0.5, 20.0):
        policy = tiny_gpt(3)
        reference = tiny_gpt(3)
        start, _, _ = objective(policy, reference, score, beta)
        config = ppo.Config(iterations=12, rollouts=96, minibatch=48, micro_batch=48, epochs=3,
                            max_new_tokens=LIMIT, lr=2e-3, value_lr=5e-3, beta=beta)
        rows = optimize(policy, reference, RewardModel(policy.config), task_of(score), config)
        end, best, divergence[beta] = objective(policy, reference, score, beta)
        if beta == 0.5:
            assert (end - start) / (best - start) > 0.7
            assert rows[-1]["reward"] > rows[0]["reward"] + 1
    assert divergence[0.5] > 10 * divergence[20.0]


# --------------------------------------------------------------------------------------------------
# The script

FLAGS = ["--rollouts", "6", "--minibatch", "4", "--micro_batch", "3", "--epochs", "2",
         "--max_new_tokens", "16", "--size", "cpu"]


def test_main(out, capsys):
    """A run that cannot be repeated, a figure that the README explains and nothing logs, a
    checkpoint that won't load."""
    before = snapshot(out)
    runs = []
    for name in ("ppo", "ppo-again"):
        ppo.main(["--out", str(out), "--iterations", "3", "--name", name, *FLAGS])
        runs.append(metrics(out / "cpu" / name / "metrics.jsonl"))
    assert set(runs[0][0]) == {
        "step", "reward", "gold", "kl", "J", "beta", "entropy", "clip_fraction", "approx_kl",
        "value_explained", "value_loss", "length", "no_end", "memory_mb", "rollout_s", "scoring_s",
        "update_s", "seconds"}
    assert [row["step"] for row in runs[0]] == [1, 2, 3]
    assert untimed(runs[0]) == untimed(runs[1])
    assert {row["beta"] for row in runs[0]} == {0.2}  # the README's, and the default
    for row in runs[0]:
        assert row["J"] == pytest.approx(row["reward"] - row["beta"] * row["kl"], abs=1e-4)
    assert runs[0][0]["kl"] == pytest.approx(0, abs=1e-4) and runs[0][2]["kl"] != 0
    policy, _, _ = load_checkpoint(out / "cpu/ppo/checkpoint.pt", "ppo", "cpu")
    reference, _, _ = load_checkpoint(out / "cpu/sft/checkpoint.pt", "sft", "cpu")
    assert any((p != q).any() for p, q in zip(policy.parameters(), reference.parameters()))
    after = snapshot(out)
    for path in before:  # the stages before it are as they were
        assert after[path] == before[path]
    printed = capsys.readouterr().out
    assert "next: python dpo.py" in printed
    header = next(line for line in printed.splitlines() if line.startswith("     step  ")).split()
    hidden = {"beta", "approx_kl", "value_loss", "memory_mb", "rollout_s", "scoring_s", "update_s",
              "seconds"}
    # The names' last words; the words before them are in the line above.
    shown = [name.split("_")[-1] for name in runs[0][0] if name not in hidden]
    assert header == shown + ["left"]

    ppo.main(["--out", str(out), "--iterations", "2", "--seed", "2", "--name", "ppo-other", *FLAGS])
    other = metrics(out / "cpu/ppo-other/metrics.jsonl")
    assert untimed(other)[0] != untimed(runs[0])[0]  # the seed counts


def test_kl_target_moves_beta(out, monkeypatch):
    """A controller that is never called, or that sees another KL than the one that is logged; a
    checkpoint that names the first beta, not the last one, or does not say how its policy was
    trained; the same after a run that was killed once all iterations were done."""
    flags = "--iterations 3 --kl_target 3 --lr 1e-2 --temperature 0.8 --missing_end_score -3"
    argv = ["--out", str(out), *FLAGS, *flags.split()]
    ppo.main(argv)
    rows = metrics(out / "cpu/ppo/metrics.jsonl")
    betas = [row["beta"] for row in rows]
    expected = 0.2
    for row in rows:
        assert row["beta"] == pytest.approx(expected, rel=1e-5)
        expected = ppo.adapt_beta(row["beta"], row["kl"], 3.0)
    assert betas[1] == pytest.approx(0.2 * 0.98) and len(set(betas)) == 3

    def killed(*args, **extra):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ppo, "save_checkpoint", killed)
        with pytest.raises(KeyboardInterrupt):
            ppo.main([*argv, "--name", "ppo-killed"])
    ppo.main([*argv, "--name", "ppo-killed", "--resume"])
    for name in ("ppo", "ppo-killed"):
        _, _, checkpoint = load_checkpoint(out / "cpu" / name / "checkpoint.pt", "ppo", "cpu")
        assert checkpoint["beta"] == betas[-1]
        assert checkpoint["temperature"] == 0.8
        assert checkpoint["missing_end_score"] == -3
        assert untimed(checkpoint["metrics"]) == untimed(rows)
        assert untimed(metrics(out / "cpu" / name / "metrics.jsonl")) == untimed(rows)


def test_no_held_out_request_is_trained_on(out, monkeypatch):
    """A held-out request that a demonstration, a pair or a rollout has shown before: drawn with
    another seed, a few of them occur in training all the same."""
    _, tokenizer, _ = load_checkpoint(out / "cpu/sft/checkpoint.pt", "sft", "cpu")
    trained_on = []
    held_out = []
    data = sft.read_data(sft.Config(size="cpu", demonstrations=1500), None, tokenizer, 128)
    trained_on.append([one.ids[:one.prompt_length] for one in data.demonstrations])
    held_out.append([one.ids[:one.prompt_length] for one in data.held_out])
    assert [tokenizer.prompt(question) for question in data.questions] == held_out[0][:200]

    def respond(model, tokenizer, prompts, *rest, **more):
        return [str(i) for i in range(len(prompts))], [True] * len(prompts)

    with monkeypatch.context() as patch:
        patch.setattr(reward_model, "respond", respond)
        config = reward_model.Config(size="cpu", pairs=1500, held_out=150)
        pairs, held_out_pairs = reward_model.collect(tiny_gpt(0, block_size=128), tokenizer,
                                                     annotator_judge, config)
    trained_on.append([tokenizer.prompt(row["prompt"]) for row in pairs])
    held_out.append([tokenizer.prompt(row["prompt"]) for row in held_out_pairs])

    def loop(policy, reference, value_model, task, config, run):
        trained_on.append(task.draw_prompts(1500, random.Random(0)))
        run.record(beta=0.2)

    def generate(model, prompts, *rest, **more):
        held_out.append(prompts)
        return gpt.generate(model, prompts, *rest, **more)

    monkeypatch.setattr(ppo, "ppo", loop)
    monkeypatch.setattr(sft, "generate", generate)
    ppo.main(["--out", str(out), *FLAGS])
    assert [len(prompts) for prompts in trained_on] == [1500] * 3
    assert [len(prompts) for prompts in held_out] == [500, 150, 33, 33]
    for sequences, expected in ((trained_on, False), (held_out, True)):
        for ids in itertools.chain(*sequences):
            assert stories.is_held_out(tokenizer.decode(ids[1:-1])) == expected


@torch.no_grad()
def greedy(policy, ids, count, end):
    """The likeliest token, again and again: the ids behind the prompt, without <|end|>."""
    found = []
    while len(found) < count and end not in found:
        found.append(int(policy(torch.tensor([ids + found]))[0, -1].argmax()))
    return [token for token in found if token != end]


@cpu_only
def test_a_prompt_is_answered_by_the_stages_own_policy(out, capsys):
    """--prompt that asks the SFT model whatever the stage and the --name, a --top_k that does not
    reach the sampler, a temperature that is not the trained one times the given one."""
    question = "Tell me a story about a shy fox and a kite."
    folders = ("sft", "ppo", "ppo-sharp", "dpo")
    policies = {}
    for k, name in enumerate(folders):
        policy, tokenizer, _ = load_checkpoint(out / "cpu/sft/checkpoint.pt", "sft", "cpu")
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter += 0.3 * noise(k, *parameter.shape)
        policies[name] = policy
    for name, policy in policies.items():
        path = out / "cpu" / name / "checkpoint.pt"
        path.parent.mkdir(exist_ok=True)
        extra = {"temperature": 0.5} if name == "ppo-sharp" else {}
        save_checkpoint(path, name.partition("-")[0], "cpu", policy, tokenizer, **extra)
    before = snapshot(out)
    ids = tokenizer.prompt(question)

    def ask(name, *flags):
        stage = {"sft": sft, "ppo": ppo, "dpo": dpo}[name.partition("-")[0]]
        argv = ["--out", str(out), "--size", "cpu", "--prompt", question, "--max_new_tokens", "12"]
        if name != "sft":
            argv += ["--name", name]
        stage.main([*argv, *flags])
        return capsys.readouterr().out.removesuffix("\n")

    def sampled(name, seed, temperature):
        texts, _ = gpt.respond(policies[name], tokenizer, [ids], 12, seed, temperature)
        return texts[0]

    answers = []
    for name in folders:
        trained = 0.5 if name == "ppo-sharp" else 1.0
        answers.append(ask(name))
        assert answers[-1] == sampled(name, 1, trained)
        hotter = ask(name, "--seed", "3", "--temperature", "2")
        assert hotter == sampled(name, 3, 2 * trained) != sampled(name, 3, 2.5)
        likeliest = greedy(policies[name], ids, 12, tokenizer.end_token)
        assert ask(name, "--top_k", "1") == tokenizer.decode(likeliest)
        with pytest.raises(InputError, match="--temperature 0.0: must be at least"):
            ask(name, "--temperature", "0")
    assert len(set(answers)) == 4
    assert snapshot(out) == before


@pytest.mark.parametrize("stage, flag", [(sft, "top_k"), (sft, "temperature"), (ppo, "top_k"),
                                         (dpo, "top_k"), (dpo, "temperature")])
def test_a_flag_of_the_answer_without_a_prompt(out, stage, flag):
    """--top_k without --prompt: minutes of training, and whoever gave it believes that the rollouts
    were truncated."""
    before = snapshot(out)
    with pytest.raises(InputError, match=f"--{flag} 3.*goes with --prompt only"):
        stage.main(["--out", str(out), "--size", "cpu", f"--{flag}", "3"])
    assert snapshot(out) == before


def test_prompts_of_somebodys_own(out, tmp_path, capsys):
    """The annotator asked about prompts that it cannot judge; a prompt cut to fit, or that crashes
    the sampler; a held-out prompt that is trained on."""
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"Who sings {i}?"} for i in range(20)]
    rows += [{"prompt": f"{i} " + "long " * 200} for i in range(20)]
    rows += [{"prompt": "Who sings 3?", "chosen": "So."}]
    write_jsonl(path, rows)
    ppo.main(["--out", str(out), "--iterations", "2", "--data", str(path), *FLAGS])
    line = re.search(r": (\d+) prompts, dropped (\d+) that leave no room for 16 new",
                     capsys.readouterr().out)
    kept, held_out = split_prompts(path)
    assert len(kept) + len(held_out) == 40 and held_out
    fitting = [prompt for prompt in kept if "long" not in prompt]
    assert (int(line[1]), int(line[2])) == (len(fitting), len(kept) - len(fitting))
    for row in metrics(out / "cpu/ppo/metrics.jsonl"):
        assert "gold" not in row and "reward" in row


def test_no_prompt_is_left(out, tmp_path):
    """An empty pool of prompts ends in a traceback out of random.choices."""
    before = snapshot(out)
    path = tmp_path / "prompts.jsonl"
    too_long = [{"prompt": f"{i} " + "long " * 200} for i in range(9)]
    the_same = [{"prompt": "Why?"}] * 9
    for rows, reason in ((too_long, "max_new_tokens 16"), (the_same, "same prompt")):
        write_jsonl(path, rows)
        with pytest.raises(InputError, match=f"prompts.jsonl.*{reason}"):
            ppo.main(["--out", str(out), "--iterations", "1", "--data", str(path), *FLAGS])
    assert snapshot(out) == before


@pytest.mark.parametrize("flags, reason", [
    ("--name sft", "--name sft: must be ppo"), ("--name reward_model", "--name .*must be ppo"),
    ("--name dpo", "--name .*must be ppo"), ("--name my-ppo", "--name .*must be ppo"),
    ("--name ../ppo", "--name .*must be ppo"), ("--name ppo/../sft", "--name .*must be ppo"),
    ("--temperature 0", "--temperature 0.0: must be at least"),
    ("--beta 0 --kl_target 6", "--kl_target 6.0: cannot be used with --beta 0")])
def test_flags_that_would_cost_another_stage(out, flags, reason):
    """--name sft: the policy takes the reference's place. --temperature 0: a division by zero in
    the first rollout. --beta 0 with a KL target: a controller that multiplies 0, and holds nothing
    back."""
    before = snapshot(out)
    with pytest.raises(InputError, match=reason):
        ppo.main(["--out", str(out), "--iterations", "1", *FLAGS, *flags.split()])
    assert snapshot(out) == before


def test_reward_model_of_another_vocabulary(out):
    """Ids of one tokenizer scored by a model of another: numbers come out, and they mean
    nothing."""
    argv = ["--out", str(out), "--iterations", "1", *FLAGS]
    ppo.main(argv)  # an earlier result that must survive
    path = out / "cpu/reward_model/checkpoint.pt"
    model, tokenizer, _ = load_checkpoint(path, "reward_model", "cpu", model_class=RewardModel)
    strings = list(tokenizer.vocabulary)  # the same size
    strings[-2:] = reversed(strings[-2:])
    save_checkpoint(path, "reward_model", "cpu", model, Tokenizer(strings))
    before = snapshot(out)
    with pytest.raises(InputError, match="reward_model.checkpoint.pt: its vocabulary"):
        ppo.main(argv)
    assert snapshot(out) == before


@pytest.mark.parametrize("fine, noted", [("9", True), ("-9", False)])
def test_a_fine_that_pays_is_told(out, fine, noted, capsys):
    """A policy that learns never to end, because its finished responses score less than the fine
    for unfinished ones, without a word; or the word in every iteration."""
    ppo.main(["--out", str(out), "--iterations", "3", *FLAGS, f"--missing_end_score={fine}"])
    assert capsys.readouterr().out.count("never ending pays") == noted


# --------------------------------------------------------------------------------------------------
# Other rewards


def test_a_process_reward_stands_at_its_steps(monkeypatch):
    """A dense reward that is whitened away, paid once more at the end, or paid to a response that
    never ended; the reward on the screen that is not what the policy got. No score is paid anywhere
    else."""
    config = ppo.Config(iterations=1, rollouts=32, minibatch=32, max_new_tokens=LIMIT, beta=0.3,
                        missing_end_score=-4.0)
    reference = tiny_gpt(1)
    gae = ppo.gae
    rollouts = []
    seen = []

    def dense(rollout):
        steps = rollout.tokens[:, 1:] == 2  # a step ends with a 2
        return noise(7, *steps.shape) * steps

    def reward(rollout):
        rollouts.append(rollout)
        return torch.zeros(32), dense(rollout)

    def spy(rewards, *others):
        seen.append(rewards)
        return gae(rewards, *others)

    monkeypatch.setattr(ppo, "gae", spy)
    figures, = optimize(tiny_gpt(0), reference, tiny_reward_model(1),
                        ppo.Task(draw_prompts, reward, END), config)
    rollout, = rollouts
    rewards, = seen
    mask = response_mask(rollout.prompt_lengths, rollout.lengths, rollout.tokens.shape[1])
    ended = rollout.ended(END)
    assert 0 < ended.sum() < 32
    with torch.no_grad():
        kl = token_logprobs(tiny_gpt(0)(rollout.tokens), rollout.tokens)
        kl -= token_logprobs(reference(rollout.tokens), rollout.tokens)
    earned = dense(rollout)
    scores = []
    for row in range(32):
        expected = torch.where(mask[row], -0.3 * kl[row], 0.0)
        if ended[row]:
            scores.append(earned[row].sum().item())
            expected += earned[row]
        else:
            scores.append(-4.0)
            expected[rollout.lengths[row] - 2] -= 4.0
        torch.testing.assert_close(rewards[row], expected, atol=1e-5, rtol=1e-4)
    assert figures["reward"] == pytest.approx(statistics.mean(scores), abs=1e-5)


def test_a_reward_of_texts_is_asked_once_a_batch(monkeypatch):
    """A program that is started for every few responses, or asked about some of them in another
    order."""
    rng = random.Random(8)
    asked = []
    tokenizer = Tokenizer(train_vocabulary("a b c d e f", 270))
    rows = []
    for i in range(20):
        rows.append((f"{i}?", " ".join(rng.choices("abcdef", k=rng.randint(1, 9)))))
    prompts = [tokenizer.prompt(prompt) for prompt, _ in rows]
    tokens, lengths = pad([ids + tokenizer.response(text)
                           for ids, (_, text) in zip(prompts, rows)])
    rollout = gpt.Rollout(tokens, torch.tensor([len(ids) for ids in prompts]), lengths)

    def program(texts):
        asked.append(texts)
        return [len(text) for _, text in texts]

    monkeypatch.setattr(reward_model, "reward_of", lambda name: program)
    scores, token_rewards = make_reward("count", None, tokenizer, 4)(rollout)
    assert asked == [rows]
    assert scores.tolist() == [len(text) for _, text in rows]
    assert token_rewards.shape == tokens[:, 1:].shape and not token_rewards.any()


@pytest.mark.parametrize("method", ["ppo", "grpo"])
def test_the_verifier_needs_no_reward_model(out, method, capsys):
    """A reward model that is trained first, and never asked; a fine for missing ends, under which
    J* is not that of a reward of 0 and 1; a value model that starts from nowhere."""
    shutil.rmtree(out / "cpu/reward_model")
    ppo.main(["--out", str(out), "--iterations", "2", "--reward", "verifier", "--method", method,
              *FLAGS, "--rollouts", "8", "--max_new_tokens", "4"])
    printed = capsys.readouterr().out
    assert "plan" not in printed and not (out / "cpu/reward_model").exists()
    assert "; reward: verifier\n" in printed
    models = "2 (policy, reference)"
    if method == "ppo":
        models = "3 (policy, reference, value_model)"
    assert f"models in memory: {models}" in printed
    assert "before and after on 33 held-out prompts: reward 0.00 → 0.00" in printed
    rows = metrics(out / "cpu/ppo/metrics.jsonl")
    assert [row["reward"] for row in rows] == [0.0, 0.0]
    assert read_torch(out / "cpu/ppo/checkpoint.pt")["missing_end_score"] == 0.0
    assert any(row["no_end"] > 0 for row in rows)


PROGRAM = """import json, os, sys
rows = [json.loads(line) for line in sys.stdin]
count = len(open({0!r}).readlines()) if os.path.exists({0!r}) else 0
open({0!r}, "a").write("run\\n")
if count == {1}:
    sys.exit("out of credit")
for row in rows:
    print(json.dumps(dict(reward=len(row["response"]) / 10)))
"""


def test_a_program_as_the_reward(out, tmp_path):
    """Rewards of a program that reach no policy; prompts of one's own that only a reward model may
    judge; a program that fails in the middle of a run, and takes it along."""
    prompts = tmp_path / "prompts.jsonl"
    program = tmp_path / "reward.py"
    write_jsonl(prompts, [{"prompt": f"Who sings {i}?"} for i in range(20)])
    argv = ["--out", str(out), "--iterations", "4", "--save", "1", "--data", str(prompts),
            "--reward", f"{sys.executable} {program}", *FLAGS]
    program.write_text(PROGRAM.format(str(tmp_path / "whole.txt"), -1))
    ppo.main(argv)
    whole = untimed(metrics(out / "cpu/ppo/metrics.jsonl"))
    assert len(whole) == 4 and any(row["reward"] > 0 for row in whole) and "gold" not in whole[0]
    # Once an iteration, and for before and after.
    assert (tmp_path / "whole.txt").read_text() == 6 * "run\n"
    program.write_text(PROGRAM.format(str(tmp_path / "killed.txt"), 2))
    with pytest.raises(InputError, match="gave 0 of .* answers and ended with status 1; it said: "
                                         "out of credit; "):
        ppo.main(argv)
    ppo.main([*argv, "--resume"])
    assert untimed(metrics(out / "cpu/ppo/metrics.jsonl")) == whole


def test_ppo_on_the_process_model(out, monkeypatch, capsys):
    """The outcome model's scores under the name of the process model; a stage that is missing, and
    is not trained."""
    loop = ppo.ppo
    seen = []

    def spy(policy, reference, value_model, task, config, run):
        path = out / "cpu/process_model/checkpoint.pt"
        weights, tokenizer, _ = load_checkpoint(path, "process_model", "cpu", gpt.get_device(),
                                                RewardModel)
        for trained, loaded in zip(value_model.parameters(), weights.parameters()):
            assert torch.equal(trained, loaded)
        prompt, = task.draw_prompts(1, random.Random(0))
        rollout = gpt.generate(policy, [prompt] * 4, 16, task.end_token, seed=1)
        expected, _ = reward_model.step_rewards(weights, rollout, tokenizer)
        scores, token_rewards = task.reward(rollout)
        assert torch.equal(token_rewards, expected) and not scores.any()
        seen.append(True)
        loop(policy, reference, value_model, task, config, run)

    monkeypatch.setattr(ppo, "ppo", spy)
    ppo.main(["--out", str(out), "--iterations", "2", "--reward", "process", *FLAGS])
    assert "plan    process_model → ppo, " in capsys.readouterr().out
    assert seen and len(metrics(out / "cpu/ppo/metrics.jsonl")) == 2


@pytest.mark.parametrize("flags, message", [
    ("--reward verifyer", "--reward verifyer: no such program"),
    ("--reward verifier --data {out}/demonstrations.jsonl",
     "--reward verifier: knows the little world only"),
    ("--reward process --data {out}/demonstrations.jsonl",
     "--reward process: knows the little world only")])
def test_a_reward_that_there_is_not_is_refused(out, flags, message):
    """A name that is mistyped, found after minutes of training; prompts that the annotator cannot
    judge."""
    before = snapshot(out)
    with pytest.raises(InputError, match=message):
        ppo.main(["--out", str(out), "--iterations", "1", *FLAGS, *flags.format(out=out).split()])
    assert snapshot(out) == before
