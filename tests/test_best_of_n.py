"""best_of_n.py against the lecture's matrix and numbers, enumeration and brute force."""

import copy
import itertools
import math
import random
import re
import shutil
import statistics

import numpy as np
import pytest
import torch

import best_of_n
import dpo
import gpt
import ppo
import reward_model
import sft
from best_of_n import (FORMATS, Samples, best_of_n_kl, best_of_n_win_rate, cell, close_to_the_best, distinct_2,
                       forgetting, frontier, judged_optimum, make_row, mean_and_error, optimality_gap, optimum, pooled_optimum,
                       print_table, process_scores, select, selection_figures, sequence_logprobs, share_and_error,
                       subset_weights, top_k_overall, top_per_prompt, where_gold_is_lost, win_rate, with_errors)
from data import stories
from data.annotator import step_ends
from data.files import InputError, hold_out, read_demonstrations, read_pairs, write_jsonl
from data.run import Run, read_torch, write_torch
from data.tokenizer import Tokenizer
from gpt import Rollout, load_checkpoint, pad, save_checkpoint, token_logprobs
from helpers import cpu_only, metrics, noise, snapshot, tiny_gpt
from reward_model import RewardModel

MATRIX = torch.tensor([[0.7, 0.3, 0.5, 0.2],        # ECE 7115, "Rejection Sampling": 5 prompts, 4 completions
                       [0.4, 0.8, 0.6, 0.5],
                       [0.9, 0.3, 0.4, 0.7],
                       [0.2, 0.5, 0.8, 0.6],
                       [0.5, 0.4, 0.3, 0.6]])


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def kl(p, q):
    return (p * (p / q).log()).sum().item()


def boltzmann(reference, rewards, beta):
    """π*, the optimum of the objective (CS 224R, ch. 7)."""
    weights = reference * (rewards / beta).exp()
    return weights / weights.sum()


def draw(p, count, seed):
    """`count` draws from the probabilities p, as indices."""
    return torch.multinomial(p, count, replacement=True, generator=torch.Generator().manual_seed(seed))


def world(seed, n=8):
    """(π_ref, rewards) over n responses, in float64."""
    return noise(seed, n).double().softmax(0), 2 * noise(seed + 100, n).double()


# ----------------------------------------------------------------------------------------------------------------------
# Selection


def test_top_per_prompt_of_the_lecture():
    """The best over the wrong axis: the slide has S(R) = [1, 2, 1, 3, 4], counted from 1."""
    assert (top_per_prompt(MATRIX) + 1).tolist() == [1, 2, 1, 3, 4]


def test_top_overall_of_the_lecture():
    """Worst for best, or row and column swapped: "Prompt 3 gets two completions (0.9 and 0.7), while prompt 5 gets
    none"."""
    best = top_k_overall(MATRIX, 5)
    rewards = [MATRIX[i, j].item() for i, j in best.tolist()]
    assert rewards == pytest.approx([0.9, 0.8, 0.8, 0.7, 0.7])
    prompts = (best[:, 0] + 1).tolist()
    assert prompts.count(3) == 2 and prompts.count(5) == 0
    assert {tuple(pair) for pair in best.tolist()} == {(2, 0), (1, 1), (3, 2), (0, 0), (2, 3)}
    assert len(top_k_overall(MATRIX, 20)) == 20  # all of them, each once
    assert len({tuple(pair) for pair in top_k_overall(MATRIX, 20).tolist()}) == 20


def coarse(seed, *shape):
    """Whole numbers with many ties among them."""
    return torch.randint(4, shape, generator=torch.Generator().manual_seed(seed)).float()


@pytest.mark.parametrize("n", [1, 2, 3, 6, 7])
def test_subset_weights_go_through_all_subsets(n):
    """C(i, n) for C(i, n-1), ranks from the wrong end, or a tie that goes to whichever sample happens to come first."""
    for rewards in (noise(n, 4, 7), coarse(n, 4, 7), torch.full((1, 7), -5.0)):
        subsets = list(itertools.combinations(range(7), n))
        expected = torch.zeros(rewards.shape)
        for row, weights in zip(rewards.tolist(), expected):
            for subset in subsets:
                best = [i for i in subset if row[i] == max(row[j] for j in subset)]
                weights[best] += 1 / (len(best) * len(subsets))
        found = subset_weights(rewards, n)
        assert found.dtype == rewards.dtype and torch.allclose(found, expected, atol=1e-6)
        order = torch.randperm(7, generator=torch.Generator().manual_seed(n))
        assert torch.equal(subset_weights(rewards[:, order], n), found[:, order])


def test_subset_weights_of_many_samples():
    """C(128, 64) = 2.4e37: a product in float32, or a difference of two of them, and the weights no longer sum to 1."""
    rewards = noise(0, 3, 128)
    for n in (1, 16, 64, 128):
        weights = subset_weights(rewards, n)
        assert (weights >= 0).all() and weights.sum(dim=1).tolist() == pytest.approx([1] * 3, abs=1e-5)
        rank = rewards.argsort(dim=1).argsort(dim=1)  # from 0: the i-th smallest is the best of C(i, n-1) subsets
        expected = [[math.comb(i, n - 1) / math.comb(128, n) for i in row] for row in rank.tolist()]
        assert torch.allclose(weights, torch.tensor(expected), atol=1e-6)


# ----------------------------------------------------------------------------------------------------------------------
# Best-of-n's divergence


def law_of_best_of_n(p, n):
    """The exact distribution of the best of n draws, by going through all of them; p in increasing order of reward."""
    law = torch.zeros_like(p)
    for draws in itertools.product(range(len(p)), repeat=n):
        law[max(draws)] += math.prod(p[i].item() for i in draws)
    return law


def test_best_of_n_kl_bounds_the_exact_one():
    """log n alone, or log n - 1 + n: the figure stands in the yardstick's tables as best-of-N's KL."""
    assert best_of_n_kl(1) == 0
    assert best_of_n_kl(4) == pytest.approx(math.log(4) - 0.75)
    for seed, n in itertools.product(range(3), (1, 2, 3, 4)):
        p, _ = world(seed, n=5)
        law = law_of_best_of_n(p, n)
        assert law.sum().item() == pytest.approx(1)
        assert kl(law, p) <= best_of_n_kl(n) + 1e-12
    for n in (2, 4, 16, 64):  # many equally likely responses: the bound is reached, from below
        size = 100_000
        rank = torch.arange(size + 1, dtype=torch.float64) / size
        law = (rank ** n).diff()  # P(best is the k-th) = F(k)^n - F(k-1)^n
        exact = kl(law, torch.full((size,), 1 / size, dtype=torch.float64))
        assert best_of_n_kl(n) - 0.01 < exact <= best_of_n_kl(n)


# ----------------------------------------------------------------------------------------------------------------------
# The answer key


def test_boltzmann_of_the_lecture():
    """r·β for r/β, or a log Z that isn't the objective's maximum: 0.6/0.4, rewards 1 and 3, beta 2 give Z = 2.782."""
    reference, rewards, beta = double(0.6, 0.4), double(1.0, 3.0), 2.0
    Z = (reference * (rewards / beta).exp()).sum().item()
    best = boltzmann(reference, rewards, beta)
    assert Z == pytest.approx(2.782, abs=1e-3)
    assert best.tolist() == pytest.approx([0.355, 0.645], abs=1e-3)
    J_best = (best * rewards).sum().item() - beta * kl(best, reference)
    assert J_best == pytest.approx(beta * math.log(Z))

    # Six and four of ten samples are exactly π_ref: its J is E[r], and its own estimate of J* is exact.
    samples = torch.tensor([[0] * 6 + [1] * 4])
    J, J_star = optimality_gap(rewards[samples], torch.zeros(1, 10, dtype=torch.float64), beta)
    assert J.item() == pytest.approx(0.6 * 1 + 0.4 * 3) and J_star.item() == pytest.approx(J_best)
    # At the optimum w is the same for every response: one sample of either tells all.
    for i in (0, 1):
        J, J_star = optimality_gap(rewards[None, i:i + 1], (best / reference).log()[None, i:i + 1], beta)
        assert J.item() == pytest.approx(J_best) and J_star.item() == pytest.approx(J_best)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_gap_is_the_divergence_from_the_optimum(seed, beta):
    """w with the ratio's sign turned, or beta on one of its parts only: J* - J is then no beta KL(π || π*)."""
    reference, rewards = world(seed)
    policy = noise(seed + 50, 8).double().softmax(0)
    log_Z = (reference * (rewards / beta).exp()).sum().log()
    best = boltzmann(reference, rewards, beta)
    exact_J = ((policy * rewards).sum() - beta * kl(policy, reference)).item()
    exact_gap = beta * kl(policy, best)
    assert beta * log_Z.item() - exact_J == pytest.approx(exact_gap)

    M, N = 30, 4000
    samples = draw(policy, M * N, seed).view(M, N)
    J, J_star = optimality_gap(rewards[samples], (policy / reference).log()[samples], beta)
    assert J.shape == J_star.shape == (M,)
    for estimate, exact in ((J, exact_J), (J_star - J, exact_gap)):
        error = estimate.std().item() / math.sqrt(M)
        assert estimate.mean().item() == pytest.approx(exact, abs=4 * error + 0.01 * beta)
        assert error < 0.05  # so the comparison means something
    assert (J_star >= J).all()


def test_huge_rewards_do_not_overflow():
    """log of the mean of exp(r/β) is inf from r/β = 89 on."""
    J, J_star = optimality_gap(torch.tensor([[1000.0, 1000.0]]), torch.zeros(1, 2), beta=0.5)
    assert J.item() == J_star.item() == 1000
    J_star, divergence = pooled_optimum(torch.full((1, 2), -1000.0), torch.zeros(1, 2, 1), beta=0.5)
    assert J_star.item() == -1000 and divergence.item() == 0


def test_dropped_mode_and_the_pooled_optimum():
    """A collapsed policy takes itself for the optimum: it never samples what it dropped. The pool sees it."""
    reference, rewards, beta = double(0.5, 0.3, 0.2), double(1.0, 0.0, 3.0), 1.0
    collapsed = double(1 - 2e-9, 1e-9, 1e-9)
    exact = beta * (reference * (rewards / beta).exp()).sum().log().item()
    log_ratio = (collapsed / reference).log()
    N = 1000  # exact samples: all of the policy's are response 0; the reference's have its proportions
    own = torch.zeros(1, N, dtype=torch.long)
    of_reference = torch.tensor([[0] * 500 + [1] * 300 + [2] * 200])
    J, J_star = optimality_gap(rewards[own], log_ratio[own], beta)
    assert J_star.item() == pytest.approx(J.item()) and J_star.item() < exact - 0.8
    samples = torch.cat([of_reference, own], dim=1)
    log_ratios = torch.stack([torch.zeros(3, dtype=torch.float64), log_ratio], dim=1)[samples]
    J_star, divergence = pooled_optimum(rewards[samples], log_ratios, beta)
    assert J_star.item() == pytest.approx(exact, abs=1e-6)
    assert divergence.item() == pytest.approx(kl(boltzmann(reference, rewards, beta), reference), abs=1e-6)


@pytest.mark.parametrize("policies", [1, 2, 4])
def test_pooled_optimum_is_unbiased_for_z(policies):
    """Weights by the policy that drew the sample, or a sum over policies for their mean: Z is then off by K."""
    reference, rewards = world(7)
    beta, counts = 0.8, torch.tensor([3, 1, 2, 4, 1, 2, 1, 2])
    reference = counts.double() / 16  # multiples of 1/16, so 16 draws of each policy can be exact
    shuffled = [counts[torch.randperm(8, generator=torch.Generator().manual_seed(k))] for k in range(policies - 1)]
    all_counts = [counts, *shuffled]
    samples = torch.cat([torch.repeat_interleave(torch.arange(8), count) for count in all_counts])[None]
    log_ratios = torch.stack([(count.double() / 16 / reference).log() for count in all_counts], dim=1)[samples]
    exact = beta * (reference * (rewards / beta).exp()).sum().log().item()
    assert samples.shape == (1, 16 * policies) and log_ratios.shape == (1, 16 * policies, policies)
    J_star, divergence = pooled_optimum(rewards[samples], log_ratios, beta)
    assert J_star.item() == pytest.approx(exact)
    assert divergence.item() == pytest.approx(kl(boltzmann(reference, rewards, beta), reference))
    # Three times as many samples of the reference: they must weigh a third each.
    more, own = torch.cat([samples[:, :16]] * 2 + [samples], dim=1), log_ratios[:, :16]
    counts = [48] + [16] * (policies - 1)
    again = pooled_optimum(rewards[more], torch.cat([own, own, log_ratios], dim=1), beta, counts)
    assert again[0].item() == pytest.approx(exact) and again[1].item() == pytest.approx(divergence.item())


def test_judged_optimum_of_the_lecture():
    """Weights that aren't normalized, made of the judge's reward, or a KL of the judge's own optimum. By hand: rewards
    1 and 3 with beta 2 turn 0.6/0.4 into 0.3555/0.6445, which a judge of 2 and -1 dislikes."""
    rewards, gold = double(1.0, 3.0), double(2.0, -1.0)
    samples, log_ratios = torch.tensor([[0] * 6 + [1] * 4]), torch.zeros(1, 10, 1, dtype=torch.float64)  # exactly π_ref
    J, effective = judged_optimum(gold[samples], rewards[samples], log_ratios, beta=2.0)
    divergence = 0.3555 * math.log(0.3555 / 0.6) + 0.6445 * math.log(0.6445 / 0.4)
    assert J.item() == pytest.approx(0.3555 * 2 - 0.6445 * 1 - 2 * divergence, abs=1e-3)
    small, large = math.exp(1 / 2), math.exp(3 / 2)
    assert effective.item() == pytest.approx((6 * small + 4 * large) ** 2 / (6 * small ** 2 + 4 * large ** 2))
    J, effective = judged_optimum(gold[samples], 0 * rewards[samples], log_ratios, beta=2.0)
    assert J.item() == pytest.approx(0.6 * 2 - 0.4) and effective.item() == pytest.approx(10)  # no reward: π_ref itself


@pytest.mark.parametrize("seed", range(3))
def test_judged_optimum_against_the_list_of_all_responses(seed):
    """What gold loses to the reward model taken for what the optimizer left: here the optimum is known exactly."""
    reference, rewards = world(seed)
    gold, beta, M = rewards + noise(seed + 200, 8).double(), 0.7, 200  # the reward model errs
    policy = noise(seed + 50, 8).double().softmax(0)
    best = boltzmann(reference, rewards, beta)
    exact = ((best * gold).sum() - beta * kl(best, reference)).item()
    J_star = beta * (reference * (gold / beta).exp()).sum().log().item()
    assert exact < J_star - 0.05
    draws = [draw(p, M * n, seed).view(M, n) for p, n, seed in ((reference, 160, seed), (policy, 80, seed + 10))]
    samples = torch.cat(draws, dim=1)
    log_ratios = torch.stack([torch.zeros(8, dtype=torch.float64), (policy / reference).log()], dim=1)[samples]
    J, effective = judged_optimum(gold[samples], rewards[samples], log_ratios, beta, [160, 80])
    error = J.std().item() / math.sqrt(M)
    assert J.mean().item() == pytest.approx(exact, abs=4 * error + 0.01) and error < 0.03
    weights = ((rewards / beta).exp() * reference / (2 / 3 * reference + 1 / 3 * policy))[samples].numpy()
    assert effective.numpy() == pytest.approx(weights.sum(1) ** 2 / (weights ** 2).sum(1))
    # On the very same samples it is never above J*, and reaches it where the reward model is gold, up to a constant.
    J_stars, _ = pooled_optimum(gold[samples], log_ratios, beta, [160, 80])
    assert (J <= J_stars + 1e-9).all()
    agreed, _ = judged_optimum(gold[samples], gold[samples] - 3, log_ratios, beta, [160, 80])
    assert torch.allclose(agreed, J_stars)


def test_the_frontier_is_that_of_the_list():
    """A frontier of the wrong reward, of one β's KL beside another's rewards, or of samples weighed as if all were SFT's:
    of exactly drawn samples it is the list's, π*β by π*β. Every other policy lies below it."""
    reference, rewards = double(0.5, 0.25, 0.125, 0.125), double(0.0, 1.0, 2.0, -1.0)
    policy, gold = double(0.125, 0.25, 0.5, 0.125), double(1.0, -1.0, 0.5, 0.0)
    exactly = [torch.tensor([[i for i, share in enumerate(p) for _ in range(round(8 * share.item()))]])
               for p in (reference, policy)]
    samples = {name: Samples([], [], rewards[i], gold[i], None, None) for name, i in zip(("sft", "ppo"), exactly)}
    ratios = torch.stack([torch.zeros(4, dtype=torch.float64), (policy / reference).log()], dim=1)
    log_ratios = {name: ratios[i] for name, i in zip(samples, exactly)}
    for field, r in (("reward", rewards), ("gold", gold)):
        rows = frontier("any", field, samples, log_ratios)
        for row in rows:
            best = boltzmann(reference, r, row["beta"])
            assert row["kl"] == pytest.approx(kl(best, reference)) and row["kl_error"] is None
            assert row["reward"] == pytest.approx((best * rewards).sum().item())
            assert row["gold"] == pytest.approx((best * gold).sum().item())
        assert [row["beta"] for row in rows] == pytest.approx([0.05 * math.sqrt(2) ** k for k in range(15)])
        other, distance = (policy * r).sum().item(), kl(policy, reference)
        assert all(row[field] - row["beta"] * row["kl"] > other - row["beta"] * distance for row in rows)


# ----------------------------------------------------------------------------------------------------------------------
# The yardstick's figures


def test_mean_and_error_of_prompts():
    """The spread for the standard error, or nan for a single prompt, which is no JSON."""
    x = noise(3, 50)
    mean, error = np.mean(x.numpy()), np.std(x.numpy(), ddof=1) / math.sqrt(50)
    assert mean_and_error(x) == pytest.approx((mean, error))
    assert mean_and_error(x[:1]) == (x[0].item(), None)
    found = with_errors({"a": x[:1], "b": x})
    assert found == dict(a=x[0].item(), a_error=None, b=pytest.approx(mean), b_error=pytest.approx(error))


def test_error_of_a_share_is_its_spread():
    """An error that takes the way for exact, or for independent of the part: compare with the share's spread over many
    yardsticks. A share above 1 stays, and no way to go is no division by zero."""
    way = 2 + noise(0, 4000, 40)                       # (yardsticks, prompts)
    part = 0.8 * way + 0.3 * noise(1, 4000, 40) + 0.5  # most of the noise is shared
    found = [share_and_error(*pair) for pair in zip(part, way)]
    shares, errors = (np.array(column) for column in zip(*found))
    assert shares.mean() == pytest.approx(0.8 + 0.5 / 2, abs=0.01) and (shares > 1).any()
    assert errors.mean() == pytest.approx(shares.std(), rel=0.05)
    assert share_and_error(way[0], way[0]) == (1, pytest.approx(0, abs=1e-6))
    assert share_and_error(way[0], -way[0]) == share_and_error(way[0], 0 * way[0]) == (None, None)
    assert share_and_error(way[0, :1], way[0, :1]) == (1, None)


def test_win_rate_of_best_of_n_goes_through_all_games():
    """A candidate that is its own opponent, one that best-of-n also chose from, or a winner picked by gold."""
    N = 6
    for gold in (noise(1, 3, N), coarse(1, 3, N)):
        rewards = coarse(0, 3, N) + 0.5 * noise(2, 3, N).round()
        for n in (1, 2, 5):
            expected = []
            for r, g in zip(rewards.tolist(), gold.tolist()):
                games = []
                for subset in itertools.combinations(range(N), n):
                    best = [i for i in subset if r[i] == max(r[j] for j in subset)]
                    for j in set(range(N)) - set(subset):
                        games.append(np.mean([(g[i] > g[j]) + 0.5 * (g[i] == g[j]) for i in best]))
                expected.append(np.mean(games))
            assert best_of_n_win_rate(rewards, gold, n).tolist() == pytest.approx(expected, abs=1e-6)
        assert best_of_n_win_rate(rewards, gold, 1).tolist() == pytest.approx([0.5] * 3)  # SFT against itself


@pytest.mark.parametrize("n", [1, 2, 4, 9])
def test_win_rate_of_best_of_n_where_gold_is_the_reward(n):
    """Best-of-n that plays against the candidates it was chosen from looks better than it is. The largest of n+1 draws
    is any of them with equal chances, so the best of n wins n/(n+1)."""
    gold = noise(0, 5, 10)
    assert best_of_n_win_rate(gold, gold, n).tolist() == pytest.approx([n / (n + 1)] * 5)
    against_its_own = (subset_weights(gold, n) * win_rate(gold, gold)).sum(dim=1)
    assert n == 1 or (against_its_own > n / (n + 1) + 0.01).all()


@pytest.mark.parametrize("figure, text", [
    ((1.2054, 0.0212), "1.205 ± 0.021"), ((1.2054,), "1.205"), ((None,), "-"), ((None, None, ".1%"), "-"),
    ((0.8931, 0.0092, ".1%"), "89.3 ± 0.9 %"), ((1.004, None, ".1%"), "100.4 %"), ((49.8, 1.3, ".0f"), "50"),
    ((0.9996, 0.01, ".0%"), "100 %"), ((-0.5, 0.25, ".2f"), "-0.50 ± 0.25")])
def test_cell(figure, text):
    """An error in other units than its figure, a share cut off at 100 %, or a traceback where there is no figure."""
    assert cell(*figure) == text


def test_sequence_logprobs_keep_the_order_of_the_samples():
    """Rows sorted by length and not put back, or a temperature left out: log π of another response or policy."""
    model, rollouts, expected = tiny_gpt(0, vocab=11), [], []
    with torch.no_grad():
        model.wte.weight *= 10  # so that a temperature matters
        for seed, size in ((0, 300), (1, 7)):
            rng = random.Random(seed)
            rows = [[rng.randrange(11) for _ in range(rng.randint(4, 32))] for _ in range(size)]
            prompt_lengths = [rng.randint(1, 3) for _ in rows]
            tokens, lengths = pad(rows)
            rollouts.append(Rollout(tokens, torch.tensor(prompt_lengths), lengths))
            for row, start in zip(rows, prompt_lengths):
                tokens = torch.tensor([row])
                expected.append([token_logprobs(model(tokens), tokens, temperature)[0, start - 1:].sum().item()
                                 for temperature in (1.0, 0.5)])
    expected = torch.tensor(expected)
    assert ((expected[:, 0] - expected[:, 1]).abs() > 0.01).float().mean() > 0.95
    for column, temperature in enumerate((1.0, 0.5)):
        assert torch.allclose(sequence_logprobs(model, temperature, rollouts), expected[:, column], rtol=1e-4)


def test_win_rate_counts_ties_half():
    """Ties as losses: SFT against itself then loses, most of all where the annotator's rewards are coarse."""
    gold, opponents = coarse(0, 3, 5), coarse(1, 3, 7)
    expected = [[np.mean([1.0 if a > b else 0.5 if a == b else 0.0 for b in theirs]) for a in ours]
                for ours, theirs in zip(gold.tolist(), opponents.tolist())]
    assert torch.allclose(win_rate(gold, opponents), torch.tensor(expected).float())
    assert win_rate(gold, gold).mean(dim=1).tolist() == pytest.approx([0.5] * 3)


@pytest.mark.parametrize("texts, share", [
    (["a b c", "a b d"], 3 / 4), (["a a a a"], 1 / 3), (["a b", "b a"], 1.0), (["a", "b"], 0.0), ([], 0.0),
    (["a b"] * 5, 0.2)])
def test_distinct_2_by_hand(texts, share):
    """Pairs that reach from one text into the next, or a division by zero for texts of one word."""
    assert distinct_2(texts) == pytest.approx(share)


def test_row_keeps_the_pieces_together():
    """The reward of one sample beside the gold or text of another, or the best chosen by gold."""
    M, N = 3, 8
    one = Samples([], ["a text"] * M * N, noise(0, M, N), noise(1, M, N), torch.arange(M * N).view(M, N).float(),
                  (noise(2, M, N) > 0).float())
    for n in (1, 3, 8):
        row = make_row(one, n, kl=torch.full((M,), 0.25), win_rate=torch.tensor([0.1, 0.2, 0.3]))
        assert list(row) == ["reward", "gold", "length", "ended", "kl", "win_rate", "distinct_2"]
        for i in range(M):
            subsets = itertools.combinations(range(N), n)
            best = [max(subset, key=one.reward[i].tolist().__getitem__) for subset in subsets]
            for key in ("reward", "gold", "length", "ended"):
                assert row[key][i].item() == pytest.approx(np.mean([getattr(one, key)[i, j] for j in best]), abs=1e-4)
        assert row["kl"].tolist() == [0.25] * M and row["win_rate"].tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert "gold" not in make_row(one._replace(gold=None), 4)

    winners = [max(range(3), key=one.reward[i].tolist().__getitem__) for i in range(M)]  # the best of the first three
    places = [(i, j) for i in range(M) for j in range(N)]
    for texts, share in (([f"a{i} b{i}" if j == winners[i] else "a a a a" for i, j in places], 1),
                         (["a a a a" if j == winners[i] else f"a{i} b{j}" for i, j in places], 1 / 9)):
        assert make_row(one._replace(texts=texts), 3)["distinct_2"].tolist() == pytest.approx([share])


def table_of(printed, heading):
    """The lines of the table under the first line that holds `heading`, up to a blank one."""
    lines = printed.splitlines()
    start = next(i for i, line in enumerate(lines) if heading in line)
    return list(itertools.takewhile(str.strip, lines[start + 1:]))


def test_close_to_the_best(capsys):
    """A share upside down (a loss should be small, an accuracy large), an accuracy measured from 0 where guessing has
    0.5, an error of the measured figure for that of the share, or a stage without figures that ends the table in a
    traceback."""
    accuracy = dict(expected_accuracy=0.75, expected_accuracy_error=0.012, bayes_accuracy=0.8,
                    share_of_bayes=0.9375, share_of_bayes_error=0.014, above_chance=0.8333, above_chance_error=0.038)
    stages = {"gpt": [dict(held_out=0.5, entropy=0.5), dict(held_out=0.8, entropy=0.6), dict(loss=1.0)],
              "sft": [dict(held_out=0.5, entropy=0.4)],
              "reward_model": [dict(loss=0.7), dict(accuracy, loss=0.5, annotator_loss=0.4)]}
    row = dict(under="gold", J=3.5, J_error=0.05, J_star=3.4, J_star_error=0.04, share=1.05, share_error=0.031)
    close_to_the_best(stages, [dict(policy="ppo", reward=1.0), dict(row, policy="sft"), dict(row, policy="ppo"),
                               dict(row, policy="dpo", share=None, share_error=None)])
    rows = [re.split(r"  +", line) for line in table_of(capsys.readouterr().out, "How close to the best")]
    assert rows == [
        ["", "measured", "possible", "share"],
        ["pretraining, nats per token", "0.800", "0.600", "75.0 %"],
        ["SFT, nats per token", "0.500", "0.400", "80.0 %"],
        ["reward model, accuracy", "0.750 ± 0.012", "0.800", "93.8 ± 1.4 %"],
        ["reward model, accuracy above chance", "0.250 ± 0.012", "0.300", "83.3 ± 3.8 %"],
        ["reward model, loss", "0.500", "0.400", "80.0 %"],
        ["ppo, J under gold", "3.500 ± 0.050", "3.400 ± 0.040", "105.0 ± 3.1 %"]]               # not cut off at 100 %
    close_to_the_best({"gpt": [], "sft": [], "reward_model": []}, [])
    assert capsys.readouterr().out == ""


def test_close_to_the_best_of_a_coin(capsys):
    """A reward model of exactly 0.5, or labels that nobody can guess, end the table in a division by zero."""
    margin, equal = torch.tensor([0.3, -0.3]), torch.zeros(2)
    for gold, possible in ((equal, "0.000"), (torch.ones(2), "0.231")):  # one right and one wrong guess
        figures, _ = reward_model.answer_key(margin, gold)
        close_to_the_best({"gpt": [], "sft": [], "reward_model": [figures]}, [])
        lines = table_of(capsys.readouterr().out, "How close to the best")
        assert re.match(rf"reward model, accuracy above chance +0\.000 ± \S+ +{possible} +0\.0 ± ", lines[2])


def test_tables_fit_100_columns(capsys):
    """A table that the terminal wraps as soon as its figures have two digits before the point, or a policy a name."""
    M, names = 16, ["sft", "ppo-beta0", "dpo"]
    samples, log_ratios = {}, {}
    for k, name in enumerate(names):
        N = 128 if name == "sft" else 64
        reward, gold = (-12 + 9 * noise(seed + k, M, 1) + noise(seed + k + 10, M, N) for seed in (0, 20))
        samples[name] = Samples([], ["a b c"] * M * N, reward, gold, torch.full((M, N), 128.0), torch.ones(M, N))
        log_ratios[name] = 12 + 9 * noise(40 + k, M, 1, 1) + noise(50 + k, M, N, 3)
        log_ratios[name][:, :, 0] = 0
    known = dict(win_rate=1 - torch.tensor([0.0, 0.3]).repeat(M // 2), kl=log_ratios["dpo"][:, :, 2].mean(dim=1))
    rows = {name: make_row(samples.get(name, samples["sft"]), n, **known)
            for name, n in (("sft", 1), ("best of 16", 16), ("best of 64", 64), ("ppo-beta0", 1), ("dpo", 1))}
    figures = [dict(policy=name, **with_errors(row)) for name, row in rows.items()]
    print_table(figures, FORMATS)
    for kind, field in (("reward model", "reward"), ("gold", "gold")):
        figures += optimum(kind, field, rows, samples, log_ratios, beta=0.05)
    where_gold_is_lost([row for row in figures if row.get("under") == "gold"])
    accuracy, _ = reward_model.answer_key(noise(60, 100), noise(61, 100))
    loss = dict(held_out=12.345, entropy=10.123)
    close_to_the_best({"gpt": [loss], "sft": [loss], "reward_model": [accuracy]}, figures)
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith(("best of 64", "reward model, accuracy above chance")) for line in lines) == 7
    assert any(re.search(r"-\d\d\.\d\d ± \d\.\d\d .*\d\d\.\d\d ± \d\.\d\d ", line) for line in lines)
    assert max(map(len, lines)) <= 100, max(lines, key=len)


# ----------------------------------------------------------------------------------------------------------------------
# The script


@pytest.fixture(scope="module")
def trained(stages, tmp_path_factory):
    """A folder with all stages, PPO and DPO too."""
    out = shutil.copytree(stages, tmp_path_factory.mktemp("trained") / "out")
    common = ["--out", str(out), "--size", "cpu", "--max_new_tokens", "16"]
    ppo.main(common + "--iterations 2 --rollouts 8 --minibatch 4 --lr 1e-3".split())
    dpo.main(common + "--batch 8".split())
    return out


def run(out, capsys, *flags):
    best_of_n.main(["--out", str(out), "--size", "cpu", "--max_new_tokens", "16", *flags])
    return capsys.readouterr().out


def without_seconds(printed):
    """What the yardstick printed, without the seconds that it took."""
    return re.sub(r" in \d+ s$", "", printed, flags=re.M)


def test_prompt_prints_candidates_and_the_winner(trained, capsys):
    """A winner that isn't the best candidate, or an annotator asked for a prompt that it cannot judge."""
    for prompt, gold in (("Tell me a story about a shy fox and a kite.", True), ("Who are you?", False)):
        printed = run(trained, capsys, "--prompt", prompt, "--n", "6")
        candidates = re.findall(r"^ *([+-]\d+\.\d{3})(  gold +[+-]\d+\.\d{3})?  (.*)$", printed, re.M)
        rewards = [float(reward) for reward, _, _ in candidates]
        assert len(rewards) == 6 and rewards == sorted(rewards, reverse=True)
        assert all(bool(found) == gold for _, found, _ in candidates)
        assert f"winner of 6: {candidates[0][2]}\n" in printed


def test_candidates_of_no_prompt(tmp_path):
    """--n without a prompt, which starts the minutes of the yardstick, whose N it does not set."""
    with pytest.raises(InputError, match="--n 4: goes with --prompt only"):
        best_of_n.main(["--out", str(tmp_path), "--size", "cpu", "--n", "4", "--data", "found-wrong-later.jsonl"])


def test_prompt_that_does_not_fit(trained, capsys):
    """A long prompt ends in a traceback out of the sampler."""
    with pytest.raises(InputError, match="a prompt of .* exceed the context of 128"):
        run(trained, capsys, "--prompt", "long " * 200)


@cpu_only
def test_yardstick(trained, capsys):
    """A table that changes from run to run, a policy left out, a stage written over, nan in the figures."""
    before = snapshot(trained)
    flags = "--prompts 3 --samples 8 --sample_batch 5".split()  # batches that end in the middle of a prompt
    printed = run(trained, capsys, *flags)
    rows = metrics(trained / "cpu/best_of_n/metrics.jsonl")
    table = {row["policy"]: row for row in rows if "under" not in row}
    assert list(table) == ["sft", "best of 4", "ppo", "dpo"]
    assert table["sft"]["kl"] == 0 and table["best of 4"]["kl"] == pytest.approx(best_of_n_kl(4))
    assert table["best of 4"]["reward"] > table["sft"]["reward"]
    for row in table.values():
        figures = {"reward", "gold", "win_rate", "kl", "length", "distinct_2", "ended"}
        assert set(row) == {"policy"} | figures | {f"{name}_error" for name in figures}
        assert (row["distinct_2_error"] is None) and all(row[f"{name}_error"] >= 0 for name in figures - {"distinct_2"})
        assert 0 <= row["win_rate"] <= 1 and 0 <= row["ended"] <= 1 and 1 <= row["length"] <= 16
    assert sum(row["policy"] == "frontier" for row in rows) == 30
    ladder = {row["policy"]: row for row in rows if row.get("under") == "best of N"}
    assert list(ladder) == [f"best of {n}" for n in (1, 2, 4, 8)]
    assert all(ladder["best of 4"][name] == table["best of 4"][name] for name in ("reward", "gold", "kl", "length"))
    optima = [row for row in rows if row.get("under") in ("reward model", "gold") and row["policy"] != "frontier"]
    assert [(row["under"], row["policy"]) for row in optima] == [
        (kind, name) for kind in ("reward model", "gold") for name in table]
    for row in optima:
        figure = table[row["policy"]]["reward" if row["under"] == "reward model" else "gold"]
        assert row["J"] == pytest.approx(figure - 0.2 * table[row["policy"]]["kl"], abs=1e-4)  # the README's beta
        assert all(row[f"{name}_error"] >= 0 for name in ("J", "J_star", "J_star_kl", "share", "left_by_policy",
                                                          "lost_to_reward_model", "reward_model_J"))
        assert row["share"] + row["left_by_policy"] + row["lost_to_reward_model"] == pytest.approx(1, abs=1e-4)
        assert row["lost_to_reward_model"] > -1e-6 and 1 <= row["effective_samples"] <= 32
        if row["under"] == "reward model":
            assert row["reward_model_J"] == pytest.approx(row["J_star"], abs=1e-5)
        else:
            block = re.search(r"where gold is lost(.|\n)*?\n\n", printed).group()
            assert f"J = {cell(row['reward_model_J'], row['reward_model_J_error'])} under gold" in block
            parts = [cell(row[name], row[f"{name}_error"], ".1%")
                     for name in ("share", "left_by_policy", "lost_to_reward_model")]
            assert re.search(rf"^{row['policy']} +{' +'.join(parts)}$", block, re.M)
    loss = {row["policy"]: row["loss"] for row in rows if row.get("under") == "pretraining"}
    assert list(loss) == ["base", "sft", "ppo", "dpo"] and ", ".join(f"{name} {x:.3f}" for name, x in loss.items()) in printed
    assert loss["base"] == read_torch(trained / "cpu/gpt/checkpoint.pt")["metrics"][-1]["held_out"]
    sft_row = table["sft"]
    assert (sft_row["win_rate"], sft_row["win_rate_error"]) == (pytest.approx(0.5), pytest.approx(0, abs=1e-6))
    assert "How close to the best" in printed and all(name in printed for name in table)
    assert "the little world: 3 held-out prompts; 8 samples each, 16 of SFT" in printed
    tables = printed[printed.index("sampled dpo"):printed.index("\nsaved ")]
    assert max(map(len, tables.splitlines())) <= 100
    assert re.search(r"^ +reward +gold +win_rate +kl +length +distinct_2 +ended$", tables, re.M)
    assert re.search(r"^sft +-?\d\.\d\d ± \d\.\d\d .* 50\.0 ± 0\.0 % +0\.00 ± 0\.00 +\d+ +[01]\.\d\d +\d+ %$", tables,
                     re.M)
    assert re.findall(r"^(.*) in \d+ s$", printed, re.M) == [
        "sampled sft: 48", "sampled ppo: 24", "sampled dpo: 24", "log-probabilities under every policy: 9"]
    after = snapshot(trained)
    assert {path: after[path] for path in before} == before
    assert without_seconds(run(trained, capsys, *flags)) == without_seconds(printed)
    assert snapshot(trained) == after
    base, tokenizer, _ = load_checkpoint(trained / "cpu/gpt/checkpoint.pt", "gpt", "cpu")
    _, again = forgetting([dict(held_out=0.0)], {"gpt": (base, 1.0, 1)}, tokenizer)
    assert again["loss"] == pytest.approx(loss["base"])  # on the same documents as pretraining


def test_the_yardstick_asks_reserved_requests(trained, capsys, monkeypatch):
    """Requests that may have occurred in training, one in 32 of them at least, or others for every seed."""
    asked, draw_samples = [], best_of_n.draw
    monkeypatch.setattr(best_of_n, "draw", lambda *arguments: asked.append(arguments[4]) or draw_samples(*arguments))
    for seed in "1", "2":
        run(trained, capsys, *f"--prompts 40 --samples 1 --policies , --seed {seed}".split())
    assert asked[0] == asked[1] and len(set(asked[0])) == 40 and all(map(stories.is_held_out, asked[0]))


@cpu_only
def test_yardstick_figures_are_of_the_samples(trained, tmp_path, monkeypatch):
    """One policy's gold beside another's, ours and theirs swapped in the win rate, all rows of best-of-N with the same
    N, or an own J* with the log-ratios of another policy."""
    out = shutil.copytree(trained, tmp_path / "out")
    drawn, draw_samples = [], best_of_n.draw
    monkeypatch.setattr(best_of_n, "draw", lambda *arguments: drawn.append(draw_samples(*arguments)) or drawn[-1])
    monkeypatch.setattr(best_of_n, "gold_rewards",  # the annotator likes none of these models: let it have a taste
                        lambda rollout, tokenizer: torch.tensor([sum(row) % 17 / 4 for row in rollout.responses()]))
    best_of_n.main(["--out", str(out), "--size", "cpu", *"--max_new_tokens 16 --prompts 3 --samples 16".split()])
    rows = metrics(out / "cpu/best_of_n/metrics.jsonl")
    found = {(row.get("under"), row["policy"]): row for row in rows}
    models = [load_checkpoint(out / "cpu" / name / "checkpoint.pt", name, "cpu")[0] for name in ("sft", "ppo", "dpo")]
    one, *others = drawn
    assert [samples.gold.shape for samples in drawn] == [(3, 32), (3, 16), (3, 16)] and one.gold.std() > 0.5
    for name, n in (("sft", 1), ("best of 4", 4), ("best of 16", 16)):
        expected = best_of_n_win_rate(one.reward, one.gold, n).mean().item()
        assert found[None, name]["win_rate"] == pytest.approx(expected)
        expected = (subset_weights(one.reward, n) * one.gold).sum(dim=1).mean().item() - 0.2 * best_of_n_kl(n)
        assert found["gold", name]["J"] == pytest.approx(expected)
    for name, model, other in zip(("ppo", "dpo"), models[1:], others):
        assert found[None, name]["win_rate"] == pytest.approx(win_rate(other.gold, one.gold).mean().item())
        log_ratios = sequence_logprobs(model, 1.0, other.rollouts) - sequence_logprobs(models[0], 1.0, other.rollouts)
        for kind, rewards in (("gold", other.gold), ("reward model", other.reward)):
            J, J_star = optimality_gap(rewards, log_ratios.view(3, 16), 0.2)
            assert found[kind, name]["J"] == pytest.approx(J.mean().item(), abs=1e-5)
            assert found[kind, name]["own_J_star"] == pytest.approx(J_star.mean().item(), abs=1e-5)


def test_who_is_right_how_often(trained, tmp_path, monkeypatch, capsys):
    """A pass@16 of the mean over all prompts, where easy ones make up for hard ones; J* of SFT's mean rate instead of each
    prompt's; an unfinished response that is right."""
    M, N, right = 3, 16, []
    draw_samples = best_of_n.draw

    def verifier(asked):
        asked = list(asked)
        right.append([float(len(text) % (2 + len(prompt) % 3) == 0) for prompt, text in asked])
        return right[-1]

    drawn = []
    monkeypatch.setattr(best_of_n, "draw", lambda *arguments: drawn.append(draw_samples(*arguments)) or drawn[-1])
    monkeypatch.setattr(best_of_n, "verifier", verifier)
    out = shutil.copytree(trained, tmp_path / "out")
    printed = run(out, capsys, *f"--verify --policies ppo --prompts {M} --samples {N} --beta 0.5".split())
    found = {row["policy"]: row for row in metrics(out / "cpu/best_of_n/metrics.jsonl") if row.get("under") == "verifier"}
    kl = next(row["kl"] for row in metrics(out / "cpu/best_of_n/metrics.jsonl") if row["policy"] == "ppo")
    verified = [torch.tensor(x).view(M, -1) * one.ended for x, one in zip(right, drawn)]
    assert [x.shape[1] for x in verified] == [32, 16] and list(found) == ["sft", "ppo"]
    p = verified[0].mean(dim=1).tolist()
    J_star = statistics.mean(0.5 * math.log(1 - x + x * math.exp(2)) for x in p)
    for (name, row), x in zip(found.items(), verified):
        rates = x.mean(dim=1).tolist()
        passed = [1 - math.comb(round(x.shape[1] * (1 - q)), 16) / math.comb(x.shape[1], 16) for q in rates]
        assert row["verified"] == pytest.approx(statistics.mean(rates)) and 0.05 < row["verified"] < 0.95
        assert row["pass_16"] == pytest.approx(statistics.mean(passed), abs=1e-6)
        assert row["J_star"] == pytest.approx(J_star, abs=1e-5) and len(set(p)) > 1
        assert row["J"] == pytest.approx(row["verified"] - 0.5 * kl * (name == "ppo"), abs=1e-5)
    block = printed.split("under the verifier")[1]
    assert "pass_16" in block and "ppo, J under verifier" in printed
    assert "verified" not in run(out, capsys, *"--policies ppo --prompts 3 --samples 4".split())


def test_process_scores_by_hand():
    """A smallest step that is the padding's 0, a product of rewards instead of probabilities, a mean for a sum."""
    rewards = torch.tensor([[0.0, 2.0, 0.0, -1.0], [0.5, 0.0, 0.0, 0.0], [3.0, 0.0, 1.0, 2.0]])
    scores = process_scores(rewards, torch.tensor([[0, 1, 0, 1], [1, 0, 0, 0], [1, 0, 1, 1]]).bool())
    p = [1 / (1 + math.exp(-x)) for x in (2, -1, 0.5, 3, 1, 2)]
    assert scores["smallest"].tolist() == [-1, 0.5, 1] and scores["sum"].tolist() == [1, 0.5, 6]
    assert scores["product"].exp().tolist() == pytest.approx([p[0] * p[1], p[2], p[3] * p[4] * p[5]])


@cpu_only
def test_best_of_n_by_the_process_model(trained, tmp_path, monkeypatch, capsys):
    """Candidates chosen by one model's score of other samples, or shown with the process model's scores as the reward; an
    unfinished answer whose few steps are all good wins."""
    out = shutil.copytree(trained, tmp_path / "out")
    model, tokenizer, _ = load_checkpoint(out / "cpu/reward_model/checkpoint.pt", "reward_model", "cpu",
                                          model_class=RewardModel)
    torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(70))
    (out / "cpu/process_model").mkdir()
    save_checkpoint(out / "cpu/process_model/checkpoint.pt", "process_model", "cpu", model, tokenizer)
    drawn, draw_samples = [], best_of_n.draw
    monkeypatch.setattr(best_of_n, "draw", lambda *arguments: drawn.append(draw_samples(*arguments)) or drawn[-1])
    monkeypatch.setattr(best_of_n, "gold_rewards",
                        lambda rollout, tokenizer: torch.tensor([sum(row) % 17 / 4 for row in rollout.responses()]))
    run(out, capsys, *"--process --policies , --prompts 3 --samples 8".split())
    found = {row["policy"]: row for row in metrics(out / "cpu/best_of_n/metrics.jsonl") if "under" not in row}
    assert list(found) == ["sft", *(f"best of 4{rule}" for rule in ("", ", smallest", ", product", ", sum"))]
    one, = drawn
    ids = [row[:length] for rollout in one.rollouts for row, length in zip(rollout.tokens.tolist(), rollout.lengths.tolist())]
    starts = [start for rollout in one.rollouts for start in rollout.prompt_lengths.tolist()]
    scores = []         # the sum of the steps, response by response
    for row, start in zip(ids, starts):
        whole = row[-1] == tokenizer.end_token
        ends = step_ends(tokenizer.pieces(row[start:-1])) if whole else []
        with torch.no_grad():
            values = model(torch.tensor([row]))[0]
        scores.append(sum(values[start + end].item() for end in ends) if ends else -math.inf)
    scores = torch.tensor(scores).view(one.reward.shape)
    assert 0 < scores.isinf().sum() < scores.numel()
    weights = subset_weights(scores, 4)
    for key in ("reward", "gold", "ended"):
        expected = (weights * getattr(one, key)).sum(dim=1).mean().item()
        assert found["best of 4, sum"][key] == pytest.approx(expected, abs=1e-4)
    with pytest.raises(InputError, match="--process True: goes without --data only"):
        run(out, capsys, "--process", "--data", str(tmp_path / "prompts.jsonl"))
    shutil.rmtree(out / "cpu/process_model")
    with pytest.raises(InputError, match="process_model/checkpoint.pt: no such checkpoint"):
        run(out, capsys, "--process")


def test_yardstick_on_somebodys_own_prompts(trained, tmp_path, capsys, monkeypatch):
    """Gold columns for prompts that the annotator cannot judge; prompts too long for the context, or trained on."""
    rows = [{"prompt": f"Who sings {i}?"} for i in range(20)] + [{"prompt": f"{i} " + "long " * 200} for i in range(20)]
    write_jsonl(tmp_path / "prompts.jsonl", rows)
    held_out = hold_out(rows, 1)[1]
    short = [row["prompt"] for row in held_out if "long" not in row["prompt"]]
    assert len(held_out) == 4 and 0 < len(short) < 4  # so the test sees both kinds
    asked, draw_samples = [], best_of_n.draw
    monkeypatch.setattr(best_of_n, "draw", lambda *arguments: asked.append(arguments[4]) or draw_samples(*arguments))
    printed = run(trained, capsys, "--data", str(tmp_path / "prompts.jsonl"), "--samples", "4", "--policies", "dpo")
    assert asked == [short] * 2  # SFT and DPO, each once
    assert (f"held out of {tmp_path / 'prompts.jsonl'}: {len(short)} prompts, dropped {4 - len(short)} that leave no "
            f"room for 16 new tokens; {len(short)} of them; 4 samples each, 8 of SFT\n") in printed
    assert "gold" not in printed and "win_rate" not in printed
    rows = metrics(trained / "cpu/best_of_n/metrics.jsonl")
    assert [row["policy"] for row in rows if "under" not in row] == ["sft", "best of 4", "dpo"]
    assert {row["under"] for row in rows if "under" in row} == {"reward model", "best of N"}

    before = snapshot(trained)
    for rows, reason in (([{"prompt": f"{i} " + "long " * 200} for i in range(9)], "no prompt leaves room"),
                         ([{"prompt": "Why?"}] * 9, "same prompt")):
        write_jsonl(tmp_path / "prompts.jsonl", rows)
        with pytest.raises(InputError, match=f"prompts.jsonl.*{reason}"):
            run(trained, capsys, "--data", str(tmp_path / "prompts.jsonl"), "--samples", "4", "--policies", "dpo")
    assert snapshot(trained) == before


@pytest.mark.parametrize("stage", [sft, reward_model, ppo, dpo, best_of_n], ids=lambda stage: stage.__name__)
def test_a_wrong_file_is_found_before_anything_is_trained(stage, tmp_path):
    """A typing error in the file's name that comes out after the minutes which the missing stages took."""
    for argv in (["--data", str(tmp_path / "none.jsonl")], ["--data", str(tmp_path)]):
        with pytest.raises(InputError, match=str(tmp_path)):
            stage.main(["--out", str(tmp_path / "out"), "--size", "cpu", *argv])
    assert not (tmp_path / "out").exists()


def test_every_stage_holds_out_the_same_prompts(trained, tmp_path, capsys, monkeypatch):
    """A prompt that one stage trains on and another one measures itself on: its figure is what was learnt by heart."""
    path, names = tmp_path / "pairs.jsonl", [f"Who sings {i}?" for i in range(30)]
    rows = [{"prompt": name, "chosen": "Yes." if i else "Yes. " * 200, "rejected": "No."}
            for name in random.Random(0).sample(names, 30) for i in (0, 1) if i or name.endswith("7?")]
    write_jsonl(path, rows)  # three prompts have two rows, one of them too long for all but PPO
    out = shutil.copytree(trained, tmp_path / "out")
    common = ["--out", str(out), "--size", "cpu", "--max_new_tokens", "4", "--data", str(path)]
    seen = {name: set() for name in ("sft", "reward_model", "ppo", "dpo")}

    def prompt_of(ids):
        return tokenizer.decode(ids[1:ids.index(tokenizer.assistant_token)])

    def spy(module, name, stage, sequences):
        original = getattr(module, name)

        def spying(*arguments, **keywords):
            seen[stage].update(map(prompt_of, sequences(arguments)))
            return original(*arguments, **keywords)

        monkeypatch.setattr(module, name, spying)

    tokenizer = load_checkpoint(out / "cpu/sft/checkpoint.pt", "sft", "cpu")[1]
    spy(sft, "backward", "sft", lambda arguments: arguments[1])
    spy(reward_model, "backward", "reward_model", lambda arguments: [ids for pair in arguments[1] for ids in pair[:2]])
    spy(dpo, "backward", "dpo", lambda arguments: [ids for pair in arguments[2] for ids in pair[:2]])
    spy(ppo, "generate", "ppo", lambda arguments: arguments[1])
    sft.main(common)
    reward_model.main(common)
    ppo.main(common + "--iterations 1 --rollouts 400 --minibatch 400 --micro_batch 400 --epochs 1".split())
    dpo.main(common)
    held_out = {stage: set(names) - prompts for stage, prompts in seen.items()}
    assert len(held_out["sft"]) == 3 and all(prompts == held_out["sft"] for prompts in held_out.values())
    assert {row["prompt"] for row in read_pairs(out / "cpu/reward_model/held_out.jsonl")} == held_out["sft"]

    asked, draw_samples = [], best_of_n.draw
    monkeypatch.setattr(best_of_n, "draw",
                        lambda *arguments: asked.append(set(arguments[4])) or draw_samples(*arguments))
    best_of_n.main(common + ["--samples", "4"])
    assert asked == [held_out["sft"]] * 3  # SFT, PPO and DPO are compared on prompts that none of them has seen


def test_draws_come_from_the_given_generator(trained, monkeypatch):
    """One seed for every batch, or for every policy: the samples are then copies, and their errors hidden."""
    policy, tokenizer, _ = load_checkpoint(trained / "cpu/sft/checkpoint.pt", "sft", "cpu")
    path = trained / "cpu/reward_model/checkpoint.pt"
    scorer, _, _ = load_checkpoint(path, "reward_model", "cpu", model_class=RewardModel)
    config = best_of_n.Config(size="cpu", max_new_tokens=16, sample_batch=4)
    seeds, generate = [], best_of_n.generate
    monkeypatch.setattr(best_of_n, "generate",
                        lambda *arguments, seed: seeds.append(seed) or generate(*arguments, seed=seed))

    def texts(rng):
        return best_of_n.draw("sft", policy, scorer, tokenizer, ["Who sings?"] * 2, 6, config, False, rng).texts

    rng = random.Random(0)
    first, second = texts(rng), texts(rng)
    assert len(first) == 12 and len(set(seeds)) == len(seeds) == 6  # 3 batches each
    assert first[:4] != first[4:8] and first != second
    random.seed()
    assert texts(random.Random(0)) == first and seeds[6:] == seeds[:3]


def test_policies_are_compared_at_their_own_temperature(trained, tmp_path, capsys, monkeypatch):
    """A policy that was trained at one temperature, sampled or scored at another: its J is that of a policy nobody
    trained. And shares that were reached under another price or penalty, with no word about it. A policy that is named
    twice is one."""
    out = shutil.copytree(trained, tmp_path / "out")
    model, tokenizer, _ = load_checkpoint(out / "cpu/sft/checkpoint.pt", "sft", "cpu")
    for name, settings in (("ppo", {}), ("ppo-hot", dict(temperature=1.5, missing_end_score=-2.0, beta=0.3))):
        (out / "cpu" / name).mkdir(exist_ok=True)
        save_checkpoint(out / "cpu" / name / "checkpoint.pt", "ppo", "cpu", model, tokenizer, **settings)
    asked, generate = [], best_of_n.generate
    monkeypatch.setattr(best_of_n, "generate",
                        lambda *arguments, seed: asked.append(arguments[4]) or generate(*arguments, seed=seed))
    printed = run(out, capsys, "--prompts", "4", "--samples", "16", "--policies", "ppo,ppo-hot,ppo,ppo-hot")
    assert asked == [1.0, 1.0, 1.5]
    rows = {row["policy"]: row for row in metrics(out / "cpu/best_of_n/metrics.jsonl") if "under" not in row}
    hot = rows["ppo-hot"]
    assert rows["ppo"]["kl"] == 0 and hot["kl"] > 5 * hot["kl_error"] > 0  # both have SFT's weights
    assert re.findall(r"^.* was trained with .*$", printed, re.M) == [
        "ppo-hot was trained with beta 0.3; J and J* are those of beta 0.2",
        "ppo-hot was trained with missing_end_score -2.0; J and J* are those of missing_end_score -5.0"]


@pytest.mark.parametrize("damage", [
    lambda data: b"",
    lambda data: data[:len(data) // 2],
    lambda data: data[:len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1:],
    lambda data: b'{"step": 20, "held_out": 0.7, "entropy": 0.6}\n',
    None], ids=["empty", "cut off", "one bit", "of another kind", "no figures"])
def test_damaged_checkpoint_of_a_stage(trained, tmp_path, capsys, damage):
    """A file that was cut off ends the yardstick in a traceback, after its minutes of sampling, with nothing saved."""
    out = shutil.copytree(trained, tmp_path / "out")
    path = out / "cpu/gpt/checkpoint.pt"  # none but the table of all stages reads it
    if damage:
        path.write_bytes(damage(path.read_bytes()))
    else:
        write_torch(path, {key: value for key, value in read_torch(path).items() if key != "metrics"})
    before = snapshot(out)
    with pytest.raises(InputError, match="gpt.checkpoint.pt: .*train the stage again") as error:
        run(out, capsys, "--prompts", "2", "--samples", "4")
    assert "\n" not in str(error.value) and "sampled" not in capsys.readouterr().out and snapshot(out) == before


def test_missing_figures_of_a_stage(trained, tmp_path, capsys):
    """A stage whose checkpoint was removed, text of one's own, of which nobody knows the entropy, or a single prompt,
    whose figures have no errors, ends the yardstick."""
    out = shutil.copytree(trained, tmp_path / "out")
    shutil.rmtree(out / "cpu/gpt")
    assert not any("entropy" in row for row in read_torch(out / "cpu/sft/checkpoint.pt")["metrics"])
    table = table_of(run(out, capsys, *"--prompts 1 --samples 4 --policies ppo".split()), "How close to the best")
    rows = [re.split(r"  +", line)[0] for line in table]
    assert rows[:4] == ["", "reward model, accuracy", "reward model, accuracy above chance", "reward model, loss"]
    assert not (out / "cpu/gpt").exists()


def test_figures_are_those_of_the_checkpoint_that_is_there(trained, tmp_path, capsys, monkeypatch):
    """A new run of an earlier stage emptied its metrics.jsonl at once: interrupted, it left the loss of an untrained
    model in it, and "How close to the best" printed that beside the old checkpoint."""
    def close():
        return table_of(run(out, capsys, *"--prompts 2 --samples 4 --policies dpo".split()), "How close to the best")

    def interrupted(*arguments, **state):
        raise KeyboardInterrupt

    out = shutil.copytree(trained, tmp_path / "out")
    table = close()
    figures = read_torch(out / "cpu/gpt/checkpoint.pt")["metrics"][-1]
    assert re.match(f"pretraining, nats per token +{figures['held_out']:.3f} +{figures['entropy']:.3f} ", table[1])
    monkeypatch.setattr(Run, "end_step", interrupted)
    for stage, flags in ((gpt, "--steps 2 --batch 8 --n_layer 1 --n_head 2 --n_embd 32"),
                         (reward_model, "--pairs 8 --held_out 4 --batch 4 --max_new_tokens 16")):
        with pytest.raises(KeyboardInterrupt):
            stage.main(["--out", str(out), "--size", "cpu", "--report", "1", *flags.split()])
        folder = out / "cpu" / stage.__name__
        begun = (folder / "unfinished/metrics.jsonl").read_bytes()
        assert b'"step": 1, "loss"' in begun
        (folder / "metrics.jsonl").write_bytes(begun)  # where it stood at that time
    assert close() == table
    (out / "cpu/gpt/metrics.jsonl").write_bytes(b'{"held_out": \xff')  # nobody reads it
    assert close() == table


def test_a_run_that_was_killed_in_its_last_moment_is_completed_first(trained, tmp_path, capsys):
    """A run that is over, but was killed before its files took their places: the yardstick compares the policy of the
    run before it, or trains a stage anew that is there."""
    out, flags = shutil.copytree(trained, tmp_path / "out"), "--prompts 2 --samples 4 --policies ppo,dpo-late".split()
    shutil.copytree(out / "cpu/dpo", out / "cpu/dpo-late")
    printed, before = run(out, capsys, *flags), snapshot(out)
    model, tokenizer, _ = load_checkpoint(out / "cpu/sft/checkpoint.pt", "sft", "cpu")
    for name in ("gpt", "reward_model", "ppo", "dpo-late"):
        folder = out / "cpu" / name
        (folder / "finished").mkdir()
        for path in folder.iterdir():
            if path.is_file() and path.name != "lock":
                path.rename(folder / "finished" / path.name)
        (folder / "finished/state.pt").write_bytes(b"")
    save_checkpoint(out / "cpu/dpo-late/checkpoint.pt", "dpo", "cpu", model, tokenizer)  # the run before
    assert without_seconds(run(out, capsys, *flags)) == without_seconds(printed)
    assert snapshot(out) == before


def test_all_that_is_missing_is_trained_under_one_plan(trained, tmp_path, capsys, monkeypatch):
    """A plan that names PPO's minutes and not DPO's, a policy trained again that is there, or a name that is none and
    is found after these minutes."""
    out, asked = tmp_path / "out", []

    def main_of(name):
        def main(argv):
            asked.append((name, *argv))
            shutil.copytree(trained / "cpu" / name, out / "cpu" / name)
        return main

    monkeypatch.setattr(best_of_n, "stages_until", lambda last: {name: main_of(name) for name in ("gpt", "sft", last)})
    monkeypatch.setattr(ppo, "main", main_of("ppo"))
    monkeypatch.setattr(dpo, "main", main_of("dpo"))
    for name, folder in (("foo", out), ("ppo-none", out), ("sft", trained), ("gpt", trained)):  # trained has them
        with pytest.raises(InputError, match=f"--policies {name}: must be ppo or dpo, or the --name"):
            run(folder, capsys, "--policies", f"ppo,{name}")
    assert not asked and not out.exists()

    flags = ["--prompts", "2", "--samples", "4", "--seed", "7"]
    assert re.findall(r"^plan .*$", run(out, capsys, *flags), re.M) == [
        "plan    gpt → sft → reward_model → ppo → dpo → best_of_n, about 11 minutes on two cores"]
    argv = ("--size", "cpu", "--out", str(out), "--seed", "7")
    assert asked == [(name, *argv) for name in ("gpt", "sft", "reward_model", "ppo", "dpo")]
    shutil.rmtree(out / "cpu/ppo")
    shutil.rmtree(out / "cpu/gpt")  # no policy needs it any more
    assert "plan    ppo → best_of_n, about 4 minutes" in run(out, capsys, *flags)
    assert asked[5:] == [("ppo", *argv)]
    assert "plan" not in run(out, capsys, *flags)


def test_policy_of_another_vocabulary(trained, tmp_path, capsys):
    """Log-ratios of two policies whose ids mean different words."""
    out = shutil.copytree(trained, tmp_path / "out")
    model, tokenizer, _ = load_checkpoint(out / "cpu/ppo/checkpoint.pt", "ppo", "cpu")
    strings = [token.decode("latin-1") for token in tokenizer.vocabulary]
    strings[-2:] = strings[:-3:-1]
    save_checkpoint(out / "cpu/ppo/checkpoint.pt", "ppo", "cpu", model, Tokenizer.from_strings(strings))
    before = snapshot(out)
    with pytest.raises(InputError, match="ppo.checkpoint.pt: its vocabulary"):
        run(out, capsys, "--prompts", "2", "--samples", "4")
    assert snapshot(out) == before


# ----------------------------------------------------------------------------------------------------------------------
# Rejection-sampling fine-tuning


def samples_of(rewards, ended=None, texts=None):
    """Samples with these rewards (M, N); the text of (i, j) is "i j"."""
    M, N = rewards.shape
    return Samples([], texts or [f"{i} {j}" for i in range(M) for j in range(N)], rewards, None, torch.ones(M, N),
                   torch.ones(M, N) if ended is None else ended)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer([bytes([i]) for i in range(256)])


@pytest.mark.parametrize("seed", range(4))
def test_figures_of_a_selection_by_brute_force(seed):
    """A prompt counted once for every response of its, the spread of all rewards, or the ease of every prompt once,
    however many of its responses were kept."""
    M, N = 6, 5
    rewards = coarse(seed, M, N) + noise(seed, M, 1)
    flat = sorted(((rewards[i, j].item(), i, j) for i in range(M) for j in range(N)), reverse=True)[:M]
    per_prompt = [max((rewards[i, j].item(), i, j) for j in range(N)) for i in range(M)]
    for chosen in (flat, per_prompt, flat[:1]):
        found = selection_figures(rewards, torch.tensor([[i, j] for _, i, j in chosen]))
        values, prompts = [r for r, _, _ in chosen], [i for _, i, _ in chosen]
        expected = dict(prompts=len(set(prompts)), most=max(map(prompts.count, prompts)), reward=np.mean(values),
                        spread=np.std(values), prompts_reward=np.mean([rewards[i].tolist() for i in prompts]),
                        all_reward=np.mean(rewards.tolist()))
        assert found == pytest.approx(expected, abs=1e-5)


def test_the_best_overall_favour_easy_prompts(tokenizer, capsys):
    """Both selections the same, or of another size; the lecture: the best overall are better, but "can bias toward easy
    prompts"."""
    M, N = 12, 8
    easy = torch.tensor([3.0] * 3 + [0.0] * 9)[:, None]  # three easy prompts, whose every response is better
    one, prompts = samples_of(easy + 0.5 * noise(0, M, N).clamp(-2, 2)), [f"prompt {i}" for i in range(M)]
    kept, found = {}, {}
    for how in ("per_prompt", "overall"):
        kept[how], found[how] = select(prompts, one, tokenizer, best_of_n.Config(finetune=how), 128)
    by_hand = [{"prompt": f"prompt {i}", "completion": f"{i} {max(range(N), key=one.reward[i].tolist().__getitem__)}"}
               for i in range(M)]
    assert kept["per_prompt"] == by_hand
    assert len(kept["overall"]) == M and {row["prompt"] for row in kept["overall"]} == set(prompts[:3])
    assert len({row["completion"] for row in kept["overall"]}) == M  # none twice
    assert all(row["prompt"] == f"prompt {row['completion'].split()[0]}" for row in kept["overall"])
    assert (found["per_prompt"]["prompts"], found["per_prompt"]["most"], found["overall"]["prompts"]) == (M, 1, 3)
    assert found["per_prompt"]["prompts_reward"] == pytest.approx(found["per_prompt"]["all_reward"], abs=1e-5)
    assert found["overall"]["prompts_reward"] > found["overall"]["all_reward"] + 2
    assert found["overall"]["reward"] > found["per_prompt"]["reward"] + 1
    assert found["overall"]["spread"] < found["per_prompt"]["spread"] and 4 <= found["overall"]["most"] <= N
    printed = capsys.readouterr().out
    assert "kept    12 of 96 responses, for 12 of 12 prompts, at most 1 for one\n        dropped 0 without" in printed
    assert f"kept    12 of 96 responses, for 3 of 12 prompts, at most {found['overall']['most']} for one\n" in printed


def test_what_cannot_be_learnt_from_is_counted(tokenizer, capsys):
    """A response cut off at the limit, learnt as if it ended there; one that data/files.py refuses to read back, and
    --resume can't go on; a sequence beyond the context; all of them, and a division by zero."""
    texts = ["fine", "cut", " \n", "N\0", "long " * 50, "fine too"]
    one = samples_of(torch.zeros(6, 1), torch.tensor([1.0, 0, 1, 1, 1, 1])[:, None], texts)
    rows, _ = select(list("abcdef"), one, tokenizer, best_of_n.Config(finetune="per_prompt"), 64)
    assert [(row["prompt"], row["completion"]) for row in rows if len(row["completion"]) < 64] == [
        ("a", "fine"), ("f", "fine too")]
    assert "\n        dropped 3 without an end or a text, 1 longer than the context\n" in capsys.readouterr().out
    rest = Samples(*(None if x is None else x[1:5] for x in one))
    with pytest.raises(InputError, match="of the 4 best responses dropped 3 without .*, 1 longer .*: none is left"):
        select(list("bcde"), rest, tokenizer, best_of_n.Config(finetune="overall"), 64)


def rsft(out, *flags, how="per_prompt"):
    small = "--prompts 12 --samples 4 --max_new_tokens 16 --batch 4 --epochs 2 --report 4 --lr 1e-2 --warmup 1".split()
    best_of_n.main(["--out", str(out), "--size", "cpu", "--finetune", how, *small, *flags])


def equal(a, b):
    return all(torch.equal(x.cpu(), b[name].cpu()) for name, x in a.items())


def watch(monkeypatch):
    """What every round does from here on: [[prompts, Samples, weights that sampled, sequences that were learnt], ...]."""
    rounds, draw_samples, backward = [], best_of_n.draw, sft.backward

    def drawing(name, policy, scorer, tokenizer, prompts, *arguments):
        one = draw_samples(name, policy, scorer, tokenizer, prompts, *arguments)
        rounds.append([prompts, one, copy.deepcopy(policy.state_dict()), []])
        return one

    monkeypatch.setattr(best_of_n, "draw", drawing)
    monkeypatch.setattr(sft, "backward", lambda model, sequences, *rest: (
        rounds[-1][3].extend(map(tuple, sequences)) or backward(model, sequences, *rest)))
    return rounds


@pytest.mark.parametrize("how", ["per_prompt", "overall"])
def test_rounds_of_finetuning(how, out, monkeypatch, capsys):
    """Every round on samples of the SFT model; the worst of N, or all; held-out requests; another stage written over; a
    policy that learns from other responses than those beside its checkpoint; after for before on the screen."""
    before, rounds, shown = snapshot(out), watch(monkeypatch), []
    monkeypatch.setattr(best_of_n, "show_before_and_after", lambda *arguments: shown.extend(arguments))
    rsft(out, "--rounds", "2", how=how)
    printed, folder = capsys.readouterr().out, out / "cpu" / f"rsft-{how}"
    assert {path: data for path, data in snapshot(out).items() if folder not in path.parents} == before
    reference, tokenizer, _ = load_checkpoint(out / "cpu/sft/checkpoint.pt", "sft", "cpu")
    assert len(rounds) == 2 and equal(reference.state_dict(), rounds[0][2])
    assert not equal(rounds[0][2], rounds[1][2]) and not set(rounds[0][0]) & set(rounds[1][0])
    for number, (prompts, one, _, learnt) in enumerate(rounds, start=1):
        assert one.reward.shape == (12, 4) and not any(map(stories.is_held_out, prompts))
        rows = read_demonstrations(folder / f"kept-{number}.jsonl")
        sequences, _, _ = sft.encode_demonstrations(rows, tokenizer, 128)
        assert sorted(learnt) == sorted(2 * list(map(tuple, sequences)))  # two epochs
        flat = sorted(((one.reward[i, j].item(), i, j) for i in range(12) for j in range(4)), reverse=True)
        best = flat[:12] if how == "overall" else [max(row for row in flat if row[1] == i) for i in range(12)]
        kept = [(prompts[i], one.texts[4 * i + j]) for _, i, j in best if one.ended[i, j]]
        assert sorted((row["prompt"], row["completion"]) for row in rows) == sorted(kept) and len(kept) > 6
        found = next(row for row in metrics(folder / "metrics.jsonl") if row.get("round") == number)
        assert found["reward"] == pytest.approx(np.mean([reward for reward, _, _ in best]), abs=1e-5)
    steps = sum(2 * math.ceil(len(learnt) / 2 / 4) for *_, learnt in rounds)
    rows = metrics(folder / "metrics.jsonl")
    assert rows[-1]["step"] == steps and [row["round"] for row in rows if "round" in row] == [1, 2]
    learnt = [row["loss"] for row in rows if "loss" in row]
    assert learnt[-1] < learnt[0]
    assert "fresh requests of the little world; 2 rounds of 4 responses to each of 12\n" in printed
    assert printed.count("kept    12 of 48 responses, for ") == 2
    policy, _, checkpoint = load_checkpoint(folder / "checkpoint.pt", "rsft", "cpu")
    assert checkpoint["distils"] == 16 and not equal(policy.state_dict(), rounds[1][2])
    assert equal(shown[1].state_dict(), rounds[0][2]) and equal(shown[2].state_dict(), checkpoint["model"])


@pytest.mark.parametrize("where, n, report", [
    ("end_step", 1, 4), ("end_step", 4, 4), ("end_step", 6, 4), ("end_step", 6, 3), ("end_step", 11, 4), ("draw", 1, 4),
    ("draw", 2, 4), ("write_jsonl", 1, 4), ("write_jsonl", 2, 3)])
def test_finetuning_goes_on_bit_for_bit(where, n, report, out, monkeypatch):
    """A round that is sampled anew from a policy further on, or learnt twice; figures of a round that are lost or stand
    there twice; a schedule that begins again. Rounds end after step 6, the state is saved every `report` steps."""
    argv = ["--rounds", "2", "--report", str(report), "--name"]
    rsft(out, *argv, "rsft-whole")
    owner = Run if where == "end_step" else best_of_n
    calls, original = [], getattr(owner, where)

    def interrupted(*arguments, **keywords):
        result = original(*arguments, **keywords)
        calls.append(where)
        if len(calls) == n:
            raise KeyboardInterrupt
        return result

    with monkeypatch.context() as patch:
        patch.setattr(owner, where, interrupted)
        with pytest.raises(KeyboardInterrupt):
            rsft(out, *argv, "rsft-killed")
    assert not (out / "cpu/rsft-killed/checkpoint.pt").exists()
    rsft(out, *argv, "rsft-killed", "--resume")
    whole, killed = (out / "cpu" / name for name in ("rsft-whole", "rsft-killed"))
    found, expected = (read_torch(folder / "checkpoint.pt") for folder in (killed, whole))
    assert equal(found["model"], expected["model"]) and found["metrics"] == expected["metrics"]
    assert sorted(path.name for path in killed.iterdir()) == sorted(path.name for path in whole.iterdir())
    for name in ("kept-1.jsonl", "kept-2.jsonl"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()


def test_fewer_rounds_leave_no_responses_of_a_run_before(out):
    """kept-2.jsonl of last week beside the checkpoint of a run of one round."""
    for rounds in (2, 1):
        rsft(out, "--rounds", str(rounds), "--epochs", "1")
        assert len(list((out / "cpu/rsft-per_prompt").glob("kept-*.jsonl"))) == rounds


def test_finetuning_on_somebodys_own_prompts(out, tmp_path, monkeypatch, capsys):
    """Held-out prompts that are learnt; the world's requests put to a policy of other prompts; a prompt asked twice and
    another one never; prompts too long to answer, left out without a word."""
    rows = [{"prompt": f"Who sings {i}?"} for i in range(20)] + [{"prompt": f"{i} " + "long " * 200} for i in range(20)]
    write_jsonl(tmp_path / "prompts.jsonl", rows)
    short = [row["prompt"] for row in hold_out(rows, 1)[0] if "long" not in row["prompt"]]
    rounds = watch(monkeypatch)
    rsft(out, "--data", str(tmp_path / "prompts.jsonl"), "--prompts", "999", "--rounds", "2")
    assert [sorted(prompts) for prompts, *_ in rounds] == [sorted(short)] * 2 and len(short) < 20
    assert (f"prompts.jsonl: {len(short)} prompts, dropped {36 - len(short)} that leave no room for 16 new tokens; 2 "
            f"rounds of 4 responses to each of {len(short)}\n") in capsys.readouterr().out
    rsft(out, "--data", str(tmp_path / "prompts.jsonl"), "--prompts", "7")
    assert len(set(rounds[-1][0])) == 7 and set(rounds[-1][0]) < set(short)
    before = snapshot(out)
    for rows, reason in (([{"prompt": f"{i} " + "long " * 200} for i in range(9)], "no prompt leaves room"),
                         ([{"prompt": "Why?"}] * 9, "same prompt")):
        write_jsonl(tmp_path / "prompts.jsonl", rows)
        with pytest.raises(InputError, match=f"prompts.jsonl.*{reason}"):
            rsft(out, "--data", str(tmp_path / "prompts.jsonl"))
    assert snapshot(out) == before


@pytest.mark.parametrize("argv, message", [
    *((f"--{flag}", f"--{flag.split()[0]} .*: goes with --finetune per_prompt or overall only$") for flag in (
        "name rsft-x", "rounds 2", "epochs 2", "batch 8", "micro_batch 8", "lr 0.1", "warmup 1", "weight_decay 0.0",
        "report 2")),
    *((f"--finetune overall --{flag}", f"--{flag.split()[0]} .*: goes with --finetune no only$") for flag in (
        "policies ppo", "beta 0.2")),
    ("--finetune overall --n 4", "--n 4: goes with --prompt only$"),
    ("--finetune overall --rounds 0", "--rounds 0: must be positive"),
    ("--finetune overall --name rsft/../sft", "--name .*: must be rsft"),
    ("--finetune overall --name ppo", "--name ppo: must be rsft"),
    ("--finetune overall --name best_of_n", "--name best_of_n: must be rsft"),
    ("--finetune overall --data none.jsonl", "none.jsonl: no such file"),
    ("--finetune overall --prompt Why?", "--policies rsft-overall: must be ppo or dpo, or the --name of a finished run")])
def test_what_finetuning_would_ignore_is_refused(argv, message, tmp_path):
    """A sweep over a flag that changes nothing; the reference written over; minutes of training before a refusal."""
    with pytest.raises(InputError, match=message) as error:
        best_of_n.main(["--size", "cpu", "--out", str(tmp_path / "out"), *argv.split()])
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_a_finetuned_policy_stands_in_the_yardstick(trained, tmp_path, capsys):
    """A policy that the yardstick does not find, or takes for another stage's; the best-of-N that it distils, which the
    table leaves out unless N is 4, 16 or 64; --prompt that asks the SFT model whatever was fine-tuned."""
    out = shutil.copytree(trained, tmp_path / "out")
    rsft(out, "--samples", "3")
    rsft(out, "--rounds", "2", "--samples", "3", "--name", "rsft-2", how="overall")
    capsys.readouterr()
    printed = run(out, capsys, *"--prompts 3 --samples 8 --policies rsft-2,ppo,rsft-per_prompt".split())
    rows = metrics(out / "cpu/best_of_n/metrics.jsonl")
    names = ["sft", "best of 3", "best of 4", "rsft-2", "ppo", "rsft-per_prompt"]  # best of 9 would need --samples 9
    for under in (None, "reward model", "gold"):
        assert [row["policy"] for row in rows if row.get("under") == under and row["policy"] != "frontier"] == names
    table = {row["policy"]: row for row in rows if "under" not in row}
    assert table["rsft-per_prompt"]["kl"] != 0 and table["best of 3"]["kl"] == pytest.approx(best_of_n_kl(3))
    assert "rsft-per_prompt, J under gold" in printed
    asked, draw_samples = [], best_of_n.draw
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(best_of_n, "draw", lambda *arguments: asked.append(arguments) or draw_samples(*arguments))
        printed = run(out, capsys, "--finetune", "per_prompt", "--prompt", "Who are you?", "--n", "2")
    name, policy, *_ = asked[0]
    assert name == "rsft-per_prompt" and "winner of 2: " in printed
    assert equal(policy.state_dict(), read_torch(out / "cpu/rsft-per_prompt/checkpoint.pt")["model"])
