"""ppo.py against brute force, enumeration, autograd and the lecture's own table. Every test says which bug it is for."""

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
from data.annotator import TextReward
from data.files import InputError, write_jsonl
from data.run import read_torch
from data.tokenizer import Tokenizer, train as train_vocabulary
from gpt import load_checkpoint, pad, response_mask, save_checkpoint, token_logprobs
from helpers import (cpu_only, experience, metrics, noise, ragged_mask, snapshot, tiny_gpt, tiny_reward_model,
                     untimed)
from reward_model import RewardModel

V, END, LIMIT = 5, 4, 3  # the world that can be enumerated: tokens 0 to 3 and <|end|>, at most 3 tokens a response


def all_responses():
    """Every response of the world: it ends with END, or has LIMIT tokens without one."""
    short = [list(body) + [END] for n in range(LIMIT) for body in itertools.product(range(END), repeat=n)]
    return short + [list(body) for body in itertools.product(range(END), repeat=LIMIT)]


@torch.no_grad()
def exact_logprobs(model, prompt, responses, temperature=1.0):
    """log π(y|x) of each response in float64, one prefix at a time: no padding, no shift."""
    model = copy.deepcopy(model).double()
    totals = []
    for response in responses:
        total = 0.0
        for t, token in enumerate(response):
            logits = model(torch.tensor([prompt + response[:t]]))[0, -1] / temperature
            total += torch.log_softmax(logits, 0)[token].item()
        totals.append(total)
    return torch.tensor(totals, dtype=torch.float64)


# ----------------------------------------------------------------------------------------------------------------------
# Masked statistics


@pytest.mark.parametrize("junk", [0.0, 1e30, math.inf, -math.inf, math.nan])
def test_padding_never_counts(junk):
    """Whitening over the padding (lm-human-preferences), or 0 * nan = nan out of a product with the mask."""
    mask, _, _ = ragged_mask(0)
    x = 3 * noise(1, *mask.shape) + 7
    inside = x[mask].double().numpy()
    x[~mask] = junk
    assert ppo.masked_mean(x, mask).item() == pytest.approx(inside.mean(), rel=1e-5)
    white = ppo.whiten(x, mask)
    np.testing.assert_allclose(white[mask], (inside - inside.mean()) / inside.std(), rtol=1e-4, atol=1e-5)
    assert (white[~mask] == 0).all()


def test_whitening_equal_values_gives_zeros():
    """Division by a standard deviation of 0 when all advantages are the same."""
    mask, _, _ = ragged_mask(0)
    assert (ppo.whiten(torch.full(mask.shape, 0.5), mask) == 0).all()


# ----------------------------------------------------------------------------------------------------------------------
# Shaped rewards


def test_score_lands_on_the_last_response_token():
    """The score on the last column of the batch, or one beside <|end|>, where rows have other lengths."""
    mask, prompts, lengths = ragged_mask(3)
    logprobs, ref_logprobs, scores = noise(1, *mask.shape), noise(2, *mask.shape), 10 * noise(3, len(mask))
    logprobs[~mask], ref_logprobs[~mask] = math.nan, math.inf
    rewards = ppo.shaped_rewards(scores, logprobs, ref_logprobs, mask, beta=0.3)
    for b, (prompt, length) in enumerate(zip(prompts, lengths)):
        for t in range(mask.shape[1]):
            position = t + 1  # of the token that this column emits
            expected = -0.3 * (logprobs[b, t] - ref_logprobs[b, t]).item() if prompt <= position < length else 0.0
            expected += scores[b].item() if position == length - 1 else 0.0
            assert rewards[b, t].item() == pytest.approx(expected, abs=1e-5), (b, t)


def test_kl_penalty_sums_to_the_kl_divergence():
    """KL with the ratio upside down (rlhf-book): its expectation is then no divergence at all, but negative."""
    policy, reference, prompt, beta = tiny_gpt(1), tiny_gpt(2), [2, 0], 0.7
    responses = all_responses()
    log_p, log_q = exact_logprobs(policy, prompt, responses), exact_logprobs(reference, prompt, responses)
    p = log_p.exp()
    assert p.sum().item() == pytest.approx(1)  # nothing is missing from the enumeration
    kl = (p * (log_p - log_q)).sum().item()

    tokens, lengths = pad([prompt + response for response in responses])
    mask = response_mask(torch.full_like(lengths, len(prompt)), lengths, tokens.shape[1])
    with torch.no_grad():
        logprobs, ref_logprobs = token_logprobs(policy(tokens), tokens), token_logprobs(reference(tokens), tokens)
    rewards = ppo.shaped_rewards(torch.zeros(len(tokens)), logprobs, ref_logprobs, mask, beta)
    penalty = -(p * rewards.double().sum(dim=1)).sum().item() / beta
    assert kl > 0.01
    assert penalty == pytest.approx(kl, rel=1e-4)


# ----------------------------------------------------------------------------------------------------------------------
# Generalized advantage estimation


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.8), (0.97, 1.0), (1.0, 0.0), (0.5, 0.0), (1.0, 1.0)])
@pytest.mark.parametrize("junk", [1e6, math.nan])
def test_gae_is_the_sum_of_residuals(gamma, lam, junk):
    """Bootstrapping from V at the padding, from the prompt's V or across <|end|>; gamma or lambda forgotten."""
    mask, prompts, lengths = ragged_mask(4, B=7)
    rewards = torch.where(mask, noise(1, *mask.shape), 0.0)
    values = noise(2, *mask.shape)
    values[~mask] = junk
    advantages, returns = ppo.gae(rewards, values, mask, gamma, lam)

    A = np.zeros(mask.shape)
    for b, (prompt, length) in enumerate(zip(prompts, lengths)):
        first, last = prompt - 1, length - 2  # the columns that emit the response's first and last token
        r, v = rewards[b].double().numpy(), values[b].double().numpy()
        for t in range(first, last + 1):
            for k in range(t, last + 1):
                delta = r[k] + (gamma * v[k + 1] if k < last else 0.0) - v[k]
                A[b, t] += (gamma * lam) ** (k - t) * delta
            if lam == 0:  # the residual alone
                assert A[b, t] == pytest.approx(r[t] + (gamma * v[t + 1] if t < last else 0) - v[t])
            if lam == 1:  # the Monte Carlo return minus V
                G = sum(gamma ** (k - t) * r[k] for k in range(t, last + 1))
                assert A[b, t] == pytest.approx(G - v[t])
    np.testing.assert_allclose(advantages, A, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(returns[mask], A[mask.numpy()] + values[mask].double().numpy(), rtol=1e-4, atol=1e-5)
    assert (returns[~mask] == 0).all()


# ----------------------------------------------------------------------------------------------------------------------
# The clipped losses


@pytest.mark.parametrize("ratio, advantage, stopped", [
    (0.5, 2.0, False), (1.1, 2.0, False), (1.5, 2.0, True),         # A > 0: only above 1+ε
    (0.5, -2.0, True), (0.9, -2.0, False), (1.5, -2.0, False),      # A < 0: only below 1-ε
    (0.5, 0.0, False), (1.0, 0.0, False), (1.5, 0.0, False),        # A = 0: no update, and nothing was stopped
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
    expected = [0.0 if stopped else -advantage * ratio / 3, 0.0, -0.3 / 3, 0.4 / 3]  # -A ρ / n
    torch.testing.assert_close(logprobs.grad, torch.tensor([expected]))
    bound = {True: 1.2, False: 0.8}[advantage > 0]
    objective = advantage * (bound if stopped else ratio) + 0.3 - 0.4
    assert loss.item() == pytest.approx(-objective / 3, abs=1e-6)
    assert clip_fraction.item() == pytest.approx(stopped / 3)


def test_ratio_of_padding_never_overflows():
    """exp of a difference of 1e4 at the padding is inf, and its gradient nan in every weight."""
    mask, _, _ = ragged_mask(5)
    old, advantages = noise(1, *mask.shape), noise(2, *mask.shape)
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
    total, gradient, stopped = 0.0, np.zeros(mask.shape), 0
    for b, t in mask.nonzero().tolist():
        v, o, g = values[b, t].item(), old[b, t].item(), returns[b, t].item()
        near = min(max(v, o - 0.5), o + 0.5)
        plain, clipped = 0.5 * (v - g) ** 2, 0.5 * (near - g) ** 2
        total += max(plain, clipped)
        gradient[b, t] = v - g if plain > clipped or near == v else 0.0
        stopped += gradient[b, t] == 0
    assert stopped > 0 and (gradient != 0).sum() > 0  # both cases occur
    assert loss.item() == pytest.approx(total / mask.sum().item(), rel=1e-5)
    np.testing.assert_allclose(values.grad, gradient / mask.sum().item(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kl, expected", [
    (6.0, 0.5), (6.6, 0.505), (5.4, 0.495),     # 10 % off the target of 6: 1 % of beta
    (7.2, 0.51), (60.0, 0.51), (0.0, 0.49),     # never more than 2 % in one step
])
def test_adaptive_beta(kl, expected):
    """A controller that lowers beta when the KL is too high, or whose step isn't clipped."""
    assert ppo.adapt_beta(0.5, kl, kl_target=6.0) == pytest.approx(expected)


# ----------------------------------------------------------------------------------------------------------------------
# One minibatch


def update_by_hand(policy, value_model, batch):
    """(gradients, figures) of the minibatch's loss at clip 0.2 and value_clip 0.5: the formulas, on all logits at once."""
    logprobs, values = token_logprobs(policy(batch.tokens), batch.tokens), value_model(batch.tokens)[:, :-1]
    ratio = (logprobs - batch.old_logprobs)[batch.mask].exp()
    A, G, old = batch.advantages[batch.mask], batch.returns[batch.mask], batch.old_values[batch.mask]
    policy_loss = -torch.minimum(ratio * A, ratio.clamp(0.8, 1.2) * A).mean()
    near = torch.minimum(torch.maximum(values[batch.mask], old - 0.5), old + 0.5)
    value_loss = 0.5 * torch.maximum((values[batch.mask] - G) ** 2, (near - G) ** 2).mean()
    gradients = torch.autograd.grad(policy_loss + value_loss, [*policy.parameters(), *value_model.parameters()])
    stopped = ((ratio > 1.2) & (A > 0)) | ((ratio < 0.8) & (A < 0))
    figures = [policy_loss, value_loss, stopped.float().mean(), (ratio - 1 - ratio.log()).mean()]
    return gradients, torch.stack(figures).detach()


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 4, 5])
def test_micro_batches_give_the_full_gradient(micro_batch):
    """The mean of the micro-batches' means: a token of a short response would weigh more (TRL, transformers 2024)."""
    policy, value_model = tiny_gpt(0), tiny_reward_model(1)
    batch = experience(policy, value_model)
    expected, figures = update_by_hand(policy, value_model, batch)
    found = ppo.backward(policy, value_model, batch, ppo.Config(micro_batch=micro_batch, clip=0.2, value_clip=0.5))
    assert 0 < figures[2] < 1
    torch.testing.assert_close(found, figures, rtol=1e-4, atol=1e-5)
    for parameter, gradient in zip([*policy.parameters(), *value_model.parameters()], expected):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-6)


def test_pick_keeps_the_rows_together():
    """An advantage beside the tokens of another row, or columns cut by the lengths of rows that were not picked."""
    batch = experience(tiny_gpt(0), tiny_reward_model(1))
    for rows in ([4], [5, 0], [2, 4, 0], [3, 1, 5, 0, 4, 2]):
        part = batch.pick(torch.tensor(rows))
        T = max(batch.lengths[row].item() for row in rows)
        assert part.lengths.tolist() == [batch.lengths[row].item() for row in rows]
        for name in set(batch._fields) - {"lengths"}:
            width = T if name == "tokens" else T - 1
            assert getattr(part, name).shape[:2] == (len(rows), width), name
            for i, row in enumerate(rows):
                assert torch.equal(getattr(part, name)[i], getattr(batch, name)[row, :width]), name
        assert part.mask.sum() == batch.mask[rows].sum()  # only padding was cut off


def test_minibatch_without_a_value_model():
    """Nobody to ask for a value: the policy's gradient is the one it has beside a value model, the value loss 0."""
    policy, value_model = tiny_gpt(0), tiny_reward_model(1)
    batch = experience(policy, value_model)
    expected, figures = update_by_hand(policy, value_model, batch)
    batch = batch._replace(old_values=None, returns=None)
    found = ppo.backward(policy, None, batch, ppo.Config(micro_batch=4, clip=0.2))
    torch.testing.assert_close(found, figures * torch.tensor([1, 0, 1, 1]), rtol=1e-4, atol=1e-5)
    for parameter, gradient in zip(policy.parameters(), expected):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("micro_batch, widest", [(1, [4, 5, 7, 11, 15, 21]), (2, [5, 11, 21]), (3, [7, 21]), (6, [21])])
def test_rows_of_one_length_stand_together(micro_batch, widest):
    """Micro-batches cut from the rows as they come: half of what is computed is padding."""
    policy, value_model, shapes = tiny_gpt(0), tiny_reward_model(1), []
    batch = experience(policy, value_model)
    for model in (policy, value_model.trunk):
        model.wte.register_forward_hook(lambda module, inputs, output: shapes.append(inputs[0].shape))
    ppo.backward(policy, value_model, batch, ppo.Config(micro_batch=micro_batch))
    assert shapes == [(micro_batch, T) for T in widest for _ in range(2)]


@pytest.mark.parametrize("rows", [[4, 0, 2], [4], [1, 5], [0, 1, 2, 3, 4, 5]], ids=str)
@pytest.mark.parametrize("micro_batch", [1, 2, 6])
def test_trimmed_minibatches_give_the_untrimmed_gradient(rows, micro_batch):
    """Real tokens cut off with the padding, or a token mean over the columns that were cut: another gradient, no error."""
    policy, value_model = tiny_gpt(0), tiny_reward_model(1)
    batch = experience(policy, value_model)
    untrimmed = ppo.Experience(*(tensor[rows] for tensor in batch))
    assert untrimmed.tokens.shape == (len(rows), 21)
    expected, figures = update_by_hand(policy, value_model, untrimmed)
    found = ppo.backward(policy, value_model, batch.pick(torch.tensor(rows)),
                         ppo.Config(micro_batch=micro_batch, clip=0.2, value_clip=0.5))
    torch.testing.assert_close(found, figures, rtol=1e-4, atol=1e-5)
    for parameter, gradient in zip([*policy.parameters(), *value_model.parameters()], expected):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-6)


def test_values_never_look_ahead():
    """V(s_t) read at the token that is only just being emitted: the baseline then knows the action."""
    model, mask_column = tiny_reward_model(0), 4
    tokens = torch.randint(V, (1, 10), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(tokens)[:, :-1]
        for changed in range(10):
            other = tokens.clone()
            other[0, changed] = (other[0, changed] + 1) % V
            same = model(other)[0, mask_column] == before[0, mask_column]
            assert same == (changed > mask_column)  # column t sees tokens[:, :t+1], all of it, and nothing else


# ----------------------------------------------------------------------------------------------------------------------
# Scoring


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("micro_batch", [1, 2, 4, 5, 64])
def test_score_is_what_the_full_logits_say(micro_batch, temperature):
    """Rows that come back in the order of their lengths; a score read at the padding, or where a longer row ends;
    a value where no response is. The oracle reads everything off one batch with all its padding."""
    policy, reference, scorer, value_model = tiny_gpt(0), tiny_gpt(1), tiny_reward_model(2), tiny_reward_model(3)
    prompts, lengths = torch.tensor([3, 1, 5, 2, 4, 1, 6]), torch.tensor([4, 15, 7, 11, 5, 21, 13])
    tokens = torch.randint(V, (7, 24), generator=torch.Generator().manual_seed(4))  # padding is any token
    mask = response_mask(prompts, lengths, 24)
    with torch.inference_mode():
        logprobs, ref_logprobs, values, scores = ppo.score(
            policy, reference, scorer, value_model, gpt.Rollout(tokens, prompts, lengths), mask,
            ppo.Config(micro_batch=micro_batch, temperature=temperature))
        logits, ref_logits = policy(tokens), reference(tokens)
        plain = [token_logprobs(logits, tokens, temperature), token_logprobs(ref_logits, tokens, temperature),
                 value_model(tokens)[:, :-1]]
        last = scorer(tokens)[range(7), lengths - 1]
    for fast, slow in zip((logprobs, ref_logprobs, values), plain):
        assert fast.shape == mask.shape and (fast[~mask] == 0).all() and slow[~mask].abs().min() > 0
        torch.testing.assert_close(fast[mask], slow[mask], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scores, last, rtol=1e-5, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# The loop, in the small world


PROMPTS = [[2, 0], [1], [3, 3, 0, 1, 2], [0, 1, 2]]


def draw_prompts(count, rng):
    return rng.choices(PROMPTS, k=count)


class Score:
    """A reward model by hand: a function of the response's ids."""

    def __init__(self, score):
        self.of_response = score

    def score(self, tokens, lengths):
        prompts = {prompt[0]: len(prompt) for prompt in PROMPTS}  # told apart by their first token
        return torch.tensor([float(self.of_response(row[prompts[row[0]]:n]))
                             for row, n in zip(tokens.tolist(), lengths.tolist())])


def run_loop(policy, reference, score, config, value_model):
    """All iterations of ppo.optimize: lists of rollouts and figures."""
    steps = ppo.optimize(policy, reference, Score(score), value_model, draw_prompts, END, config)
    rollouts, figures, _ = zip(*steps)
    return rollouts, figures


def first_minibatch(monkeypatch, config, policy, reference, score, value_model):
    """The first minibatch of the first epoch and its figures, with both models as they were before any step."""
    seen, backward = [], ppo.backward

    def spy(*args):
        seen.append((args[2], copy.deepcopy(policy), copy.deepcopy(value_model), backward(*args)))
        return seen[-1][-1]

    monkeypatch.setattr(ppo, "backward", spy)
    rollouts, figures = run_loop(policy, reference, score, config, value_model)
    return seen[0], rollouts, figures


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_first_minibatch_is_on_policy(monkeypatch, temperature):
    """Another temperature, position or padding in the scoring than in the sampling: the ratio starts off at 1 no more."""
    config = ppo.Config(iterations=1, rollouts=32, minibatch=32, micro_batch=5, epochs=1, max_new_tokens=LIMIT,
                        temperature=temperature)
    policy = tiny_gpt(0)
    (batch, policy, value_model, losses), _, figures = first_minibatch(
        monkeypatch, config, policy, copy.deepcopy(policy), len, tiny_reward_model(1))
    assert len(set(batch.mask.sum(dim=1).tolist())) > 1 and len(set(batch.mask.int().argmax(dim=1).tolist())) > 1
    with torch.no_grad():
        logprobs = token_logprobs(policy(batch.tokens), batch.tokens, temperature)
    assert ((logprobs - batch.old_logprobs)[batch.mask].exp() - 1).abs().max() < 1e-4
    _, _, clip_fraction, approx_kl = losses.tolist()
    assert clip_fraction == 0 and abs(approx_kl) < 1e-6
    assert figures[0]["kl"] == pytest.approx(0, abs=1e-5)  # the reference, the same model, at the same temperature
    everything = batch.advantages[batch.mask]  # all rollouts are in this minibatch, so its advantages are white
    assert everything.mean().item() == pytest.approx(0, abs=1e-5)
    assert everything.std(correction=0).item() == pytest.approx(1, abs=1e-4)
    assert figures[0]["length"] == pytest.approx(batch.mask.sum().item() / 32)
    assert figures[0]["entropy"] == pytest.approx(-batch.old_logprobs[batch.mask].mean().item(), rel=1e-5)

    # Every row alone, in float64: what was sampled, V of the prefix, and the entropy that a sample's -log π estimates.
    surprise, double = [], copy.deepcopy(policy).double()
    for row, mask, old, values in zip(batch.tokens.tolist(), batch.mask, batch.old_logprobs, batch.old_values):
        first, last = mask.nonzero()[[0, -1], 0].tolist()
        prompt, response = row[:first + 1], row[first + 1:last + 2]
        assert old[mask].sum().item() == pytest.approx(
            exact_logprobs(policy, prompt, [response], temperature).item(), abs=1e-4)
        with torch.no_grad():
            alone = [value_model(torch.tensor([row[:t + 1]]))[0, -1].item() for t in range(first, last + 1)]
            for t in range(first, last + 1):
                logits = double(torch.tensor([row[:t + 1]]))[0, -1] / temperature
                surprise.append(-old[t].item() - torch.distributions.Categorical(logits=logits).entropy().item())
        assert values[mask].tolist() == pytest.approx(alone, abs=1e-4)
    assert abs(np.mean(surprise)) < 4 * np.std(surprise) / len(surprise) ** 0.5


def test_rollouts_follow_the_scored_distribution(monkeypatch):
    """Rollouts sampled with top-k or at temperature 1, but scored at another: importance ratios of the wrong policy."""
    config = ppo.Config(iterations=1, rollouts=4000, minibatch=4000, micro_batch=4000, epochs=1, max_new_tokens=1,
                        temperature=0.5)
    monkeypatch.setattr(ppo, "backward", lambda *args: torch.zeros(4))
    monkeypatch.setattr(ppo, "optimizer_step", lambda *args: None)
    policy = tiny_gpt(0)
    rollouts, _ = run_loop(policy, copy.deepcopy(policy), len, config, None)
    rows = rollouts[0]
    for prompt in PROMPTS:
        p = exact_logprobs(policy, prompt, [[token] for token in range(V)], temperature=0.5).exp()
        drawn = [response[0] for row, response, n in zip(rows.tokens.tolist(), rows.responses(), rows.prompt_lengths.tolist())
                 if row[:n] == prompt]
        frequency = torch.bincount(torch.tensor(drawn), minlength=V) / len(drawn)
        error = (p * (1 - p) / len(drawn)).sqrt()
        assert ((frequency - p).abs() < 4.5 * error + 1e-3).all()


def test_response_without_end_is_terminal_and_fined(monkeypatch):
    """A cut response that keeps the reward model's score, or whose last return bootstraps from V."""
    config = ppo.Config(iterations=1, rollouts=64, minibatch=64, micro_batch=64, epochs=1, max_new_tokens=LIMIT,
                        missing_end_score=-3.0)
    policy, value_model = tiny_gpt(3), tiny_reward_model(1)
    torch.nn.init.constant_(value_model.head.bias, 100.0)  # a bootstrap would stand out
    (batch, *_), rollouts, figures = first_minibatch(monkeypatch, config, policy, copy.deepcopy(policy), lambda y: 7.0,
                                                     value_model)
    ended = torch.tensor([response[-1] == END for response in rollouts[0].responses()])
    assert 0 < ended.sum() < 64
    assert figures[0]["no_end"] == pytest.approx(1 - ended.float().mean().item())
    assert figures[0]["reward"] == pytest.approx(torch.where(ended, 7.0, -3.0).mean().item(), rel=1e-5)
    last = torch.where(batch.mask, torch.arange(batch.mask.shape[1]), -1).amax(dim=1, keepdim=True)
    ends = batch.tokens.gather(1, last + 1) == END
    torch.testing.assert_close(batch.returns.gather(1, last), torch.where(ends, 7.0, -3.0), rtol=0, atol=1e-3)


@pytest.mark.parametrize("factor", [0.0, 1.0, 0.5, -1.0, 3.0])
def test_value_explained_is_measured_against_what_came(monkeypatch, factor):
    """Values compared with λ-returns, which are half made of those values: whatever V says, it explains itself. Here
    every G_t is the response's score, and V = factor · G_t + 7 leaves (1 - factor)² of its variance."""
    score, config = ppo.score, ppo.Config(iterations=1, rollouts=32, epochs=1, max_new_tokens=LIMIT, lam=0.5, beta=0.0)

    def with_values(*args):
        rollout, mask, config = args[4:]
        logprobs, ref_logprobs, _, scores = score(*args)
        G = torch.where(rollout.ended(END), scores, config.missing_end_score)
        return logprobs, ref_logprobs, torch.where(mask, factor * G[:, None] + 7, 0.0), scores

    monkeypatch.setattr(ppo, "score", with_values)
    _, figures = run_loop(tiny_gpt(0), tiny_gpt(1), lambda response: 2 * len(response), config, tiny_reward_model(2))
    assert figures[0]["value_explained"] == pytest.approx(1 - (1 - factor) ** 2, abs=1e-4)


def test_value_explained_where_there_is_nothing_to_explain():
    """All responses earn the same: a rounding error over a rounding error, -1e8, in a column of seven characters."""
    config = ppo.Config(iterations=1, rollouts=8, epochs=1, max_new_tokens=LIMIT, beta=0.0, missing_end_score=1.0)
    _, figures = run_loop(tiny_gpt(0), tiny_gpt(1), lambda response: 1.0, config, tiny_reward_model(2))
    assert figures[0]["value_explained"] == 0


def test_advantages_without_a_value_model(monkeypatch):
    """An advantage that still subtracts or bootstraps from some V: without one it is the sum of what follows, each
    reward discounted by λ."""
    config = ppo.Config(iterations=1, rollouts=32, minibatch=32, epochs=1, max_new_tokens=LIMIT, lam=0.5)
    policy = tiny_gpt(0)
    (batch, *_), _, figures = first_minibatch(monkeypatch, config, policy, copy.deepcopy(policy), len, None)
    expected = torch.zeros(batch.mask.shape)
    for b, (row, mask) in enumerate(zip(batch.tokens.tolist(), batch.mask)):
        first, last = mask.nonzero()[[0, -1], 0].tolist()
        for t in range(first, last + 1):  # no KL to the reference yet: the score is all there is, at the last token
            expected[b, t] = (last - first + 1 if row[last + 1] == END else -5) * 0.5 ** (last - t)
    inside = expected[batch.mask]
    white = (inside - inside.mean()) / inside.std(correction=0)
    torch.testing.assert_close(batch.advantages[batch.mask], white, rtol=1e-4, atol=1e-4)
    assert not {"value_loss", "value_explained"} & figures[0].keys()


@pytest.mark.parametrize("valued", [True, False])
def test_a_loop_goes_on_from_its_state(valued):
    """A state that lacks a model, its momentum or the adapted beta, or asks for a value model where there is none."""
    config = ppo.Config(iterations=3, rollouts=8, minibatch=4, epochs=1, max_new_tokens=LIMIT, kl_target=1.0, lr=1e-2)

    def loop(saved=None):
        policy, value_model = tiny_gpt(0), tiny_reward_model(1) if valued else None
        return ppo.optimize(policy, tiny_gpt(2), Score(len), value_model, draw_prompts, END, config, saved)

    def state_dicts(state):
        return {name: x.state_dict() if hasattr(x, "state_dict") else x for name, x in state.items()}

    saved, whole = None, []
    for step, (_, figures, state) in enumerate(loop(), start=1):
        whole.append(untimed([figures]))
        if step == 2:
            saved = copy.deepcopy({"step": 2, "path": "state.pt", **state_dicts(state)})
    names = {"beta", "penalty", "moving", "policy", "policy_optimizer"}
    names |= {"value_model", "value_model_optimizer"} if valued else set()
    assert saved.keys() == names | {"step", "path"}
    (_, figures, resumed), = loop(saved)
    assert untimed([figures]) == whole[2]
    assert figures["beta"] == saved["beta"] != 0.2 and resumed["beta"] == state["beta"] != saved["beta"]
    for name in ("policy", "value_model")[:1 + valued]:
        assert all(torch.equal(p, q) for p, q in zip(resumed[name].parameters(), state[name].parameters()))


def objective(policy, reference, score, beta):
    """(J, J*, KL) by enumeration, means over the prompts; a response without END gets the fine of -5."""
    responses, figures = all_responses(), []
    r = torch.tensor([score(y) if y[-1] == END else -5.0 for y in responses], dtype=torch.float64)
    for prompt in PROMPTS:
        log_p, log_q = exact_logprobs(policy, prompt, responses), exact_logprobs(reference, prompt, responses)
        kl = (log_p.exp() * (log_p - log_q)).sum()
        figures.append(torch.stack([(log_p.exp() * r).sum() - beta * kl, beta * (log_q + r / beta).logsumexp(0), kl]))
    return torch.stack(figures).mean(dim=0).tolist()


def test_training_climbs_to_the_optimum_and_beta_holds_it_back():
    """A loss with the wrong sign, advantages of the wrong token, a KL penalty that pushes away from the reference."""
    def score(response):
        return 1.5 * response.count(2) - response.count(1)

    divergence = {}
    for beta in (0.5, 20.0):
        policy, reference = tiny_gpt(3), tiny_gpt(3)
        start, _, _ = objective(policy, reference, score, beta)
        config = ppo.Config(iterations=12, rollouts=96, minibatch=48, micro_batch=48, epochs=3, max_new_tokens=LIMIT,
                            lr=2e-3, value_lr=5e-3, beta=beta)
        _, figures = run_loop(policy, reference, score, config, RewardModel(policy.config))
        end, best, divergence[beta] = objective(policy, reference, score, beta)
        if beta == 0.5:
            assert (end - start) / (best - start) > 0.7
            assert figures[-1]["reward"] > figures[0]["reward"] + 1
    assert divergence[0.5] > 10 * divergence[20.0]


# ----------------------------------------------------------------------------------------------------------------------
# The script


FLAGS = "--rollouts 6 --minibatch 4 --micro_batch 3 --epochs 2 --max_new_tokens 16 --size cpu".split()


def test_main(out, capsys):
    """A run that cannot be repeated, a figure that the README explains and nobody logs, a checkpoint that won't load."""
    before = snapshot(out)
    runs = []
    for name in ("ppo", "ppo-again"):
        ppo.main(["--out", str(out), "--iterations", "3", "--name", name, *FLAGS])
        runs.append(metrics(out / "cpu" / name / "metrics.jsonl"))
    assert set(runs[0][0]) == {
        "step", "reward", "gold", "kl", "J", "beta", "entropy", "clip_fraction", "approx_kl", "value_explained", "value_loss",
        "length", "no_end", "memory_mb", "rollout_s", "scoring_s", "update_s", "seconds"}
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
    assert {path: after[path] for path in before} == before  # the stages before it are as they were
    printed = capsys.readouterr().out
    assert "next: python dpo.py" in printed
    header = next(line for line in printed.splitlines() if line.startswith("     step  ")).split()
    hidden = {"beta", "approx_kl", "value_loss", "memory_mb", "rollout_s", "scoring_s", "update_s", "seconds"}
    # The names' last words; what stands before them is in the line above.
    assert header == [name.split("_")[-1] for name in runs[0][0] if name not in hidden] + ["left"]

    ppo.main(["--out", str(out), "--iterations", "2", "--seed", "2", "--name", "ppo-other", *FLAGS])
    assert untimed(metrics(out / "cpu/ppo-other/metrics.jsonl"))[0] != untimed(runs[0])[0]  # the seed counts


def test_kl_target_moves_beta(out, monkeypatch):
    """A controller that is never called, or that sees another KL than the one that is logged; a checkpoint that names
    the first beta, not the last one, or does not say how its policy was trained; the same after a run that was killed
    once all iterations were done."""
    flags = "--iterations 3 --kl_target 3 --lr 1e-2 --temperature 0.8 --missing_end_score -3".split()
    ppo.main(["--out", str(out), *FLAGS, *flags])
    rows = metrics(out / "cpu/ppo/metrics.jsonl")
    betas = [row["beta"] for row in rows] + [load_checkpoint(out / "cpu/ppo/checkpoint.pt", "ppo", "cpu")[2]["beta"]]
    for row, following in zip(rows, betas[1:]):
        assert following == pytest.approx(ppo.adapt_beta(row["beta"], row["kl"], 3.0), rel=1e-5)
    assert betas[1] == pytest.approx(0.2 * 0.98) and len(set(betas)) == 4

    def killed(*args, **extra):
        raise KeyboardInterrupt

    monkeypatch.setattr(ppo, "save_checkpoint", killed)
    with pytest.raises(KeyboardInterrupt):
        ppo.main(["--out", str(out), "--name", "ppo-killed", *FLAGS, *flags])
    monkeypatch.undo()
    ppo.main(["--out", str(out), "--name", "ppo-killed", "--resume", *FLAGS, *flags])
    for name in ("ppo", "ppo-killed"):
        _, _, checkpoint = load_checkpoint(out / "cpu" / name / "checkpoint.pt", "ppo", "cpu")
        assert (checkpoint["beta"], checkpoint["temperature"], checkpoint["missing_end_score"]) == (betas[-1], 0.8, -3)
        assert untimed(checkpoint["metrics"]) == untimed(rows) == untimed(metrics(out / "cpu" / name / "metrics.jsonl"))


def test_no_held_out_request_is_trained_on(out, monkeypatch):
    """A held-out request that a demonstration, a pair or a rollout has shown before: drawn with another seed, a few of
    them occur in training all the same."""
    tokenizer, trained_on, held_out = load_checkpoint(out / "cpu/sft/checkpoint.pt", "sft", "cpu")[1], [], []
    data = sft.prepare(sft.Config(size="cpu", demonstrations=1500), None, tokenizer, 128)
    trained_on.append([ids[:length] for ids, length in zip(data.sequences, data.prompt_lengths)])
    held_out.append([ids[:length] for ids, length in zip(data.held_out, data.held_out_prompts)])
    assert list(map(tokenizer.prompt, data.questions)) == held_out[0][:200]

    def respond(model, tokenizer, prompts, *rest, **more):
        return list(map(str, range(len(prompts)))), [True] * len(prompts)

    with monkeypatch.context() as patch:
        patch.setattr(reward_model, "respond", respond)
        pairs = reward_model.collect(None, tokenizer, reward_model.Config(size="cpu", pairs=1500, held_out=150))
    for rows, prompts in zip(pairs, (trained_on, held_out)):
        prompts.append([tokenizer.prompt(row["prompt"]) for row in rows])

    def optimize(*args):
        trained_on.append(args[4](1500, random.Random(0)))
        return iter(())

    def generate(model, prompts, *rest, **more):
        held_out.append(prompts)
        return gpt.generate(model, prompts, *rest, **more)

    monkeypatch.setattr(ppo, "optimize", optimize)
    monkeypatch.setattr(sft, "generate", generate)
    ppo.main(["--out", str(out), *FLAGS])
    assert list(map(len, trained_on)) == [1500] * 3 and list(map(len, held_out)) == [500, 150, 33, 33]
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
    """--prompt that asks the SFT model whatever the stage and the --name, a --top_k that does not reach the sampler, a
    temperature that is not the trained one times the given one."""
    question, folders, answers = "Tell me a story about a shy fox and a kite.", ("sft", "ppo", "ppo-sharp", "dpo"), []
    policies = {}
    for k, name in enumerate(folders):
        policy, tokenizer, _ = load_checkpoint(out / "cpu/sft/checkpoint.pt", "sft", "cpu")
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter += 0.3 * noise(k, *parameter.shape)
        policies[name] = policy
    for name, policy in policies.items():
        (out / "cpu" / name).mkdir(exist_ok=True)
        save_checkpoint(out / "cpu" / name / "checkpoint.pt", name.partition("-")[0], "cpu", policy, tokenizer,
                        **({"temperature": 0.5} if name == "ppo-sharp" else {}))
    before, ids = snapshot(out), tokenizer.prompt(question)

    def ask(name, *flags):
        stage, flags = {"sft": sft, "ppo": ppo, "dpo": dpo}[name.partition("-")[0]], ["--out", str(out), *flags]
        flags += ["--size", "cpu", "--prompt", question, "--max_new_tokens", "12"] + ["--name", name] * (name != "sft")
        stage.main(flags)
        return capsys.readouterr().out.removesuffix("\n")

    def sampled(name, seed, temperature):
        return gpt.respond(policies[name], tokenizer, [ids], 12, seed, temperature)[0][0]

    for name in folders:
        trained = 0.5 if name == "ppo-sharp" else 1.0
        answers.append(ask(name))
        assert answers[-1] == sampled(name, 1, trained)
        assert ask(name, "--seed", "3", "--temperature", "2") == sampled(name, 3, 2 * trained) != sampled(name, 3, 2.5)
        assert ask(name, "--top_k", "1") == tokenizer.decode(greedy(policies[name], ids, 12, tokenizer.end_token))
        with pytest.raises(InputError, match="--temperature 0.0: must be positive"):
            ask(name, "--temperature", "0")
    assert len(set(answers)) == 4
    assert snapshot(out) == before


@pytest.mark.parametrize("stage, flag", [(sft, "top_k"), (sft, "temperature"), (ppo, "top_k"), (dpo, "top_k"),
                                         (dpo, "temperature")])
def test_a_flag_of_the_answer_without_a_prompt(out, stage, flag):
    """--top_k without --prompt: minutes of training, and whoever gave it believes that the rollouts were truncated."""
    before = snapshot(out)
    with pytest.raises(InputError, match=f"--{flag} 3.*goes with --prompt only"):
        stage.main(["--out", str(out), "--size", "cpu", f"--{flag}", "3"])
    assert snapshot(out) == before


def test_prompts_of_somebodys_own(out, tmp_path, capsys):
    """The annotator asked about prompts that it cannot judge; a prompt cut to fit, or that crashes the sampler."""
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"Who sings {i}?"} for i in range(20)] + [{"prompt": f"{i} " + "long " * 200} for i in range(20)]
    write_jsonl(path, rows + [{"prompt": "Who sings 3?", "chosen": "So."}])
    ppo.main(["--out", str(out), "--iterations", "2", "--data", str(path), *FLAGS])
    fitting, dropped = map(int, re.search(r": (\d+) prompts, dropped (\d+) that leave no room for 16 new",
                                          capsys.readouterr().out).groups())
    assert fitting + dropped == 36 and 16 <= fitting <= 20  # 4 of the 40 different prompts are held out
    assert all("gold" not in row and "reward" in row for row in metrics(out / "cpu/ppo/metrics.jsonl"))


def test_no_prompt_is_left(out, tmp_path):
    """An empty pool of prompts ends in a traceback out of random.choices."""
    before, path = snapshot(out), tmp_path / "prompts.jsonl"
    for rows, reason in (([{"prompt": f"{i} " + "long " * 200} for i in range(9)], "max_new_tokens 16"),
                         ([{"prompt": "Why?"}] * 9, "same prompt")):
        write_jsonl(path, rows)
        with pytest.raises(InputError, match=f"prompts.jsonl.*{reason}"):
            ppo.main(["--out", str(out), "--iterations", "1", "--data", str(path), *FLAGS])
    assert snapshot(out) == before


@pytest.mark.parametrize("flags, reason", [
    (["--name", name], "--name .*must be ppo") for name in ("sft", "reward_model", "dpo", "my-ppo", "../ppo", "ppo/../sft")] + [
    (["--temperature", "0"], "--temperature 0.0: must be positive"),
    (["--beta", "0", "--kl_target", "6"], "--kl_target 6.0: goes with --beta only")])
def test_flags_that_would_cost_another_stage(out, flags, reason):
    """--name sft: the policy takes the reference's place. --temperature 0: a division by zero in the first rollout.
    --beta 0 with a KL target: a controller that multiplies 0, and holds nothing back."""
    before = snapshot(out)
    with pytest.raises(InputError, match=reason):
        ppo.main(["--out", str(out), "--iterations", "1", *FLAGS, *flags])
    assert snapshot(out) == before


def test_reward_model_of_another_vocabulary(out):
    """Ids of one tokenizer scored by a model of another: numbers come out, and they mean nothing."""
    ppo.main(["--out", str(out), "--iterations", "1", *FLAGS])  # an earlier result that must survive
    path = out / "cpu/reward_model/checkpoint.pt"
    model, tokenizer, _ = load_checkpoint(path, "reward_model", "cpu", model_class=RewardModel)
    strings = tokenizer.vocabulary[:-2] + tokenizer.vocabulary[-1:] + tokenizer.vocabulary[-2:-1]  # the same size
    save_checkpoint(path, "reward_model", "cpu", model, Tokenizer(strings))
    before = snapshot(out)
    with pytest.raises(InputError, match="reward_model.checkpoint.pt: its vocabulary"):
        ppo.main(["--out", str(out), "--iterations", "1", *FLAGS])
    assert snapshot(out) == before


# ----------------------------------------------------------------------------------------------------------------------
# Other rewards


def test_a_process_reward_stands_at_its_steps(monkeypatch):
    """A dense reward that is whitened away, paid once more at the end, or paid to a response that never ended; the
    reward on the screen that is not what the policy got. No score stands anywhere else."""
    config = ppo.Config(iterations=1, rollouts=32, minibatch=32, max_new_tokens=LIMIT, beta=0.3, missing_end_score=-4.0)
    policy, reference, estimate, seen = tiny_gpt(0), tiny_gpt(1), ppo.estimate_advantages, []

    def dense(rollout):
        return noise(7, len(rollout.tokens), rollout.tokens.shape[1] - 1) * (rollout.tokens[:, 1:] == 2)  # steps end on a 2

    monkeypatch.setattr(ppo, "estimate_advantages", lambda *arguments: seen.append(arguments) or estimate(*arguments))
    loop = ppo.optimize(policy, reference, None, tiny_reward_model(1), draw_prompts, END, config, token_rewards=dense)
    (rollout, figures, _), = loop
    (rewards, _, mask, *_), = seen
    ended, scores = rollout.ended(END), []
    assert 0 < ended.sum() < 32
    with torch.no_grad():
        kl = token_logprobs(tiny_gpt(0)(rollout.tokens), rollout.tokens) - token_logprobs(reference(rollout.tokens),
                                                                                           rollout.tokens)
    for row in range(32):
        expected = torch.where(mask[row], -0.3 * kl[row], 0.0)
        scores.append(dense(rollout)[row].sum().item() if ended[row] else -4.0)
        if ended[row]:
            expected += dense(rollout)[row]
        else:
            expected[rollout.lengths[row] - 2] -= 4.0
        torch.testing.assert_close(rewards[row], expected, atol=1e-5, rtol=1e-4)
    assert figures["reward"] == pytest.approx(statistics.mean(scores), abs=1e-5)


def test_a_reward_of_texts_is_asked_once_a_batch():
    """A program that is started for every few responses, or asked about some of them in another order."""
    rng, asked = random.Random(8), []
    tokenizer = Tokenizer(train_vocabulary("a b c d e f", 270))
    rows = [(f"{i}?", " ".join(rng.choices("abcdef", k=rng.randint(1, 9)))) for i in range(20)]
    tokens, lengths = gpt.pad([tokenizer.prompt(prompt) + tokenizer.response(text) for prompt, text in rows])
    rollout = gpt.Rollout(tokens, torch.tensor([len(tokenizer.prompt(prompt)) for prompt, _ in rows]), lengths)
    reward = TextReward(lambda texts: asked.append(texts) or [len(text) for _, text in texts], tokenizer)
    rewards = reward.token_rewards(rollout)
    assert asked == [rows] and rewards.shape == tokens[:, 1:].shape and rewards.count_nonzero() == len(rows)
    for row, length, (_, text) in zip(rewards, lengths, rows):
        assert row[length - 2] == len(text)  # a_t = tokens[t + 1]: the action that emits <|end|>


@pytest.mark.parametrize("method", ["ppo", "grpo"])
def test_the_verifier_needs_no_reward_model(out, method, capsys):
    """A reward model that is trained first, and never asked; a fine for missing ends, under which J* is not that of a
    reward of 0 and 1; a value model that starts from nowhere."""
    shutil.rmtree(out / "cpu/reward_model")
    ppo.main(["--out", str(out), "--iterations", "2", "--reward", "verifier", "--method", method, *FLAGS, "--rollouts", "8",
              "--max_new_tokens", "4"])
    printed = capsys.readouterr().out
    assert "plan" not in printed and not (out / "cpu/reward_model").exists() and "; reward: verifier\n" in printed
    assert f"models in memory: {2 + (method == 'ppo')} (policy, reference" in printed
    assert "before and after on 33 held-out prompts: reward 0.00 → 0.00" in printed
    rows, checkpoint = metrics(out / "cpu/ppo/metrics.jsonl"), read_torch(out / "cpu/ppo/checkpoint.pt")
    assert [row["reward"] for row in rows] == [0.0, 0.0] and checkpoint["missing_end_score"] == 0.0
    assert any(row["no_end"] > 0 for row in rows)


def test_a_program_as_the_reward(out, tmp_path):
    """Rewards of a program that reach no policy; prompts of one's own that only a reward model may judge; a program that
    fails in the middle of a run, and takes it along."""
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"Who sings {i}?"} for i in range(20)])
    body = """import json, os, sys
rows = [json.loads(line) for line in sys.stdin]
count = len(open({0!r}).readlines()) if os.path.exists({0!r}) else 0
open({0!r}, "a").write("run\\n")
if count == {1}:
    sys.exit("out of credit")
for row in rows:
    print(json.dumps(dict(reward=len(row["response"]) / 10)))
"""
    argv = ["--out", str(out), "--iterations", "4", "--save", "1", "--data", str(tmp_path / "prompts.jsonl"), "--reward",
            f"{sys.executable} {tmp_path / 'reward.py'}", *FLAGS]
    (tmp_path / "reward.py").write_text(body.format(str(tmp_path / "whole.txt"), -1))
    ppo.main(argv)
    whole = untimed(metrics(out / "cpu/ppo/metrics.jsonl"))
    assert len(whole) == 4 and any(row["reward"] > 0 for row in whole) and "gold" not in whole[0]
    assert (tmp_path / "whole.txt").read_text() == 6 * "run\n"      # an iteration each, and before and after
    (tmp_path / "reward.py").write_text(body.format(str(tmp_path / "killed.txt"), 2))
    with pytest.raises(InputError, match="gave 0 of .* answers and ended with status 1; it said: out of credit; "):
        ppo.main(argv)
    ppo.main([*argv, "--resume"])
    assert untimed(metrics(out / "cpu/ppo/metrics.jsonl")) == whole


def test_ppo_on_the_process_model(out, monkeypatch, capsys):
    """The outcome model's scores under the name of the process model; a stage that is missing, and is not trained."""
    trained, optimize = [], ppo.optimize

    def process(argv):
        trained.append(argv)
        reward_model.main([*argv, "--process"])

    def spy(policy, reference, scores, value_model, *arguments):
        path = out / "cpu/process_model/checkpoint.pt"
        weights, _, _ = load_checkpoint(path, "process_model", "cpu", gpt.get_device(), RewardModel)
        assert scores is None and all(torch.equal(*both) for both in zip(weights.parameters(), value_model.parameters()))
        torch.manual_seed(0)
        rollout = gpt.generate(policy, [arguments[0](1, random.Random(0))[0]] * 4, 16, arguments[1], seed=1)
        tokenizer = load_checkpoint(out / "cpu/sft/checkpoint.pt", "sft", "cpu")[1]
        expected, _ = reward_model.step_rewards(weights, rollout, tokenizer)
        assert torch.equal(arguments[-1](rollout), expected)
        return optimize(policy, reference, scores, value_model, *arguments)

    monkeypatch.setattr(ppo, "stages_until", lambda last: {**reward_model.stages_until(last), "process_model": process})
    monkeypatch.setattr(ppo, "optimize", spy)
    ppo.main(["--out", str(out), "--iterations", "2", "--reward", "process", *FLAGS])
    assert len(trained) == 1 and "plan    process_model → ppo, " in capsys.readouterr().out
    assert len(metrics(out / "cpu/ppo/metrics.jsonl")) == 2


@pytest.mark.parametrize("flags, message", [
    ("--reward verifyer", "--reward verifyer: no such program"),
    ("--reward verifier --data {out}/demonstrations.jsonl", "--reward verifier: knows the little world only"),
    ("--reward process --data {out}/demonstrations.jsonl", "--reward process: knows the little world only")])
def test_a_reward_that_there_is_not_is_refused(out, flags, message):
    """A name that is mistyped, found after minutes of training; prompts that the annotator cannot judge."""
    before = snapshot(out)
    with pytest.raises(InputError, match=message):
        ppo.main(["--out", str(out), "--iterations", "1", *FLAGS, *flags.format(out=out).split()])
    assert snapshot(out) == before
