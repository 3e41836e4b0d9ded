"""The statistics and tables of data/answer_key.py against enumeration and brute force."""

import itertools
import math
import re
import statistics

import numpy as np
import pytest
import torch

from data.answer_key import (Pool, best_of_n_win_rate, close_to_the_best, distinct_2, frontier,
                             judged_optimum, mean_and_error, optimality_gap, pass_at_k,
                             pooled_optimum, print_table, process_scores, reward_model_figures,
                             selection_figures, share_and_error, subset_weights,
                             verified_optimum, win_rate, with_errors)
from helpers import noise

BETA = 0.8
COUNTS = torch.tensor([[3, 1, 2, 4, 1, 2, 1, 2],    # of eight responses in 16 samples: π_ref's
                       [1, 4, 2, 1, 3, 2, 2, 1],    # and those of three policies
                       [2, 2, 1, 1, 1, 3, 2, 4],
                       [4, 1, 3, 2, 2, 1, 1, 2]])
REWARDS = 2 * noise(107, 8).double()
GOLD = REWARDS + noise(200, 8).double()     # the reward model errs


def kl(p, q):
    return (p * (p / q).log()).sum().item()


def sigma(x):
    return 1 / (1 + math.exp(-x))


def boltzmann(reference, rewards, beta):
    """(π*, J* = β log Z), the optimum of the objective (CS 224R, ch. 7)."""
    weights = reference * (rewards / beta).exp()
    return weights / weights.sum(), beta * weights.sum().log().item()


def exact_samples(counts):
    """Samples that are no estimate, but every policy's exact proportions p (K, responses): p, the
    responses (1, S) of all policies, and log π_k/π_ref of each under each policy, (1, S, K)."""
    samples = torch.cat([torch.arange(8).repeat_interleave(row) for row in counts])[None]
    p = counts.double() / 16
    return p, samples, (p / p[0]).log().T[samples]


def coarse(seed, *shape):
    """Whole numbers with many ties among them."""
    return torch.randint(4, shape, generator=torch.Generator().manual_seed(seed)).float()


def test_gap_is_the_divergence_from_the_optimum():
    """w with the ratio's sign turned, or beta on one part only: J* - J is no beta KL(π || π*) then.
    log of the mean of exp(r/β) is inf from r/β = 89 on."""
    p, samples, log_ratios = exact_samples(COUNTS)
    samples = samples.view(4, 16)   # a row for each policy
    own = log_ratios.view(4, 16, 4)[range(4), :, range(4)]
    for beta in (0.5, 2.0):
        best, _ = boltzmann(p[0], REWARDS, beta)
        J, J_star = optimality_gap(REWARDS[samples], own, beta)
        expected = [(q * REWARDS).sum().item() - beta * kl(q, p[0]) for q in p]
        assert J.tolist() == pytest.approx(expected)
        assert (J_star - J).tolist() == pytest.approx([beta * kl(q, best) for q in p])

    for reward in (-1000.0, 1000.0):
        rewards = torch.full((1, 2), reward)
        J, J_star = optimality_gap(rewards, torch.zeros(1, 2), beta=0.5)
        pooled, _ = pooled_optimum(rewards, torch.zeros(1, 2, 1), beta=0.5)
        assert J.item() == J_star.item() == pooled.item() == reward


def test_pooled_and_judged_optimum_are_exact():
    """Weights by the policy that drew the sample, or a sum over policies for their mean: Z is then
    off by K. Weights made of the judge's reward, or a KL of the judge's own optimum."""
    p, samples, log_ratios = exact_samples(COUNTS)
    best, exact = boltzmann(p[0], REWARDS, BETA)
    divergence = kl(best, p[0])
    exact_gold = (best * GOLD).sum().item() - BETA * divergence
    # Three times as many samples of the reference: they must weigh a third each.
    samples = torch.cat([samples[:, :16]] * 2 + [samples], dim=1)
    log_ratios = torch.cat([log_ratios[:, :16]] * 2 + [log_ratios], dim=1)
    counts = [48, 16, 16, 16]
    rewards = REWARDS[samples]
    J_star, found = pooled_optimum(rewards, log_ratios, BETA, counts)
    assert J_star.item() == pytest.approx(exact) and found.item() == pytest.approx(divergence)

    # The judge's reward up to a constant.
    J, effective = judged_optimum(GOLD[samples], rewards - 3, log_ratios, BETA, counts)
    assert J.item() == pytest.approx(exact_gold)
    share = torch.tensor(counts) / samples.shape[1]
    weights = ((REWARDS / BETA).exp() * p[0] / (share[:, None] * p).sum(dim=0))[samples]
    assert effective.item() == pytest.approx((weights.sum() ** 2 / (weights ** 2).sum()).item())


def test_the_frontier_is_that_of_the_list():
    """A frontier of the wrong reward, of one β's KL beside another's rewards, or of samples weighed
    as if all were SFT's: of exactly drawn samples it is the list's, π*β by π*β."""
    p, samples, log_ratios = exact_samples(COUNTS[:2])
    scores = {"reward": REWARDS[samples], "gold": GOLD[samples]}
    pool = Pool(["sft", "ppo"], [16, 16], scores, log_ratios)
    for field, r in (("reward", REWARDS), ("gold", GOLD)):
        rows = frontier("any", field, pool)
        betas = [0.05 * math.sqrt(2) ** k for k in range(15)]
        assert [row["beta"] for row in rows] == pytest.approx(betas)
        for row in rows:
            best, _ = boltzmann(p[0], r, row["beta"])
            assert row["kl"] == pytest.approx(kl(best, p[0])) and row["kl_error"] is None
            assert row["reward"] == pytest.approx((best * REWARDS).sum().item())
            assert row["gold"] == pytest.approx((best * GOLD).sum().item())


def test_the_optimum_of_a_verifiable_reward():
    """exp(1/β) that is too large a number, J* above 1, or the optimum's share for its objective."""
    for beta in (0.01, 0.2, 5.0):
        for p in (1e-9, 0.3, 0.999):
            p_ref = torch.tensor([1 - p, p], dtype=torch.float64)
            best, J_star = boltzmann(p_ref, torch.tensor([0.0, 1.0]).double(), beta)
            assert verified_optimum(p, beta) == pytest.approx((J_star, best[1].item()), abs=1e-9)
        assert verified_optimum(0.0, beta) == (0, 0) and verified_optimum(1.0, beta) == (1, 1)


def test_subset_weights_go_through_all_subsets():
    """C(i, n) for C(i, n-1), ranks from the wrong end, or a tie that goes to whichever sample
    happens to come first."""
    for n in (1, 2, 3, 7):
        for rewards in (noise(n, 4, 7), coarse(n, 4, 7)):
            subsets = list(itertools.combinations(range(7), n))
            expected = torch.zeros(rewards.shape)
            for row, weights in zip(rewards.tolist(), expected):
                for subset in subsets:
                    best = [i for i in subset if row[i] == max(row[j] for j in subset)]
                    weights[best] += 1 / (len(best) * len(subsets))
            assert torch.allclose(subset_weights(rewards, n), expected, atol=1e-6)

    rewards = noise(0, 3, 128)      # C(128, 64) = 2.4e37: too much for a product in float32
    rank = rewards.argsort(dim=1).argsort(dim=1)  # the i-th smallest wins C(i, n-1) subsets
    wins = torch.tensor([math.comb(i, 63) / math.comb(128, 64) for i in range(128)])
    assert torch.allclose(subset_weights(rewards, 64), wins[rank], atol=1e-6)


def test_pass_at_k_goes_through_all_subsets():
    """1 - (1 - c/n)^k, as if the samples were drawn with replacement: too low, and most of all
    where k is near n."""
    for n in range(1, 7):
        for correct, k in itertools.product(range(n + 1), range(1, n + 1)):
            samples = [True] * correct + [False] * (n - correct)
            passed = [any(subset) for subset in itertools.combinations(samples, k)]
            assert pass_at_k(correct, n, k) == pytest.approx(statistics.mean(passed))


def test_win_rates_go_through_all_games():
    """Ties as losses: SFT against itself then loses. Of best-of-n: a candidate that is its own
    opponent, one that best-of-n also chose from, a winner picked by gold."""
    found = win_rate(torch.tensor([[1.0, 2.0], [0.0, 5.0]]), torch.tensor([[1, 1, 2], [3, 6, 4]]))
    assert (6 * found).flatten().tolist() == pytest.approx([2, 5, 0, 4])

    N = 6
    gold = coarse(1, 3, N)
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


def test_process_scores_by_hand():
    """A smallest step that is the padding's 0, a product of rewards for probabilities, a mean."""
    rewards = torch.tensor([[0.0, 2.0, 0.0, -1.0], [0.5, 0.0, 0.0, 0.0], [3.0, 0.0, 1.0, 2.0]])
    scores = process_scores(rewards, rewards != 0)
    p = [sigma(x) for x in (2, -1, 0.5, 3, 1, 2)]
    products = [p[0] * p[1], p[2], p[3] * p[4] * p[5]]
    assert scores["smallest"].tolist() == [-1, 0.5, 1] and scores["sum"].tolist() == [1, 0.5, 6]
    assert scores["product"].exp().tolist() == pytest.approx(products)


def test_figures_of_a_selection_by_hand():
    """A prompt counted once for each of its responses, the spread of all rewards, or every prompt's
    ease once. Pairs of words that reach into the next text, or are none in texts of one word."""
    rewards = torch.tensor([[9.0, 7.0, 5.0], [1.0, 2.0, 6.0], [0.0, 3.0, 0.0]])
    found = selection_figures(rewards, torch.tensor([[0, 0], [0, 1], [1, 2]]))  # 9, 7 and 6
    assert found == pytest.approx(dict(
        prompts=2, most=2, reward=22 / 3, spread=statistics.pstdev([9, 7, 6]),
        prompts_reward=(7 + 7 + 3) / 3, all_reward=33 / 9))
    assert [distinct_2(["a b c", "a b d"]), distinct_2(["a", "b"])] == [3 / 4, 0]


def test_errors_of_means_and_shares():
    """The spread for the standard error, or nan for a single prompt, which is no JSON. An error
    that takes the way for exact, or for independent of the part: compare with the share's spread
    over many yardsticks. No way to go is no division by zero."""
    x = noise(3, 50)
    expected = np.mean(x.numpy()), np.std(x.numpy(), ddof=1) / math.sqrt(50)
    assert mean_and_error(x) == pytest.approx(expected)
    assert with_errors({"a": x[:1]}) == {"a": x[0].item(), "a_error": None}

    way = 2 + noise(0, 1000, 40)                       # (yardsticks, prompts)
    part = 0.8 * way + 0.3 * noise(1, 1000, 40) + 0.5  # most of the noise is shared
    shares, errors = np.array([share_and_error(*pair) for pair in zip(part, way)]).T
    assert shares.mean() == pytest.approx(0.8 + 0.5 / 2, abs=0.01)
    assert errors.mean() == pytest.approx(shares.std(), rel=0.1)
    assert share_and_error(way[0], 0 * way[0]) == (None, None)


def test_standard_errors_are_the_spread_of_repeated_measurements():
    """An error of a ratio as if its two means came from different pairs, a variance for its root, a
    forgotten 1/√n."""
    measured = []
    for seed in range(400):
        delta = 2 * noise(seed, 200)
        generator = torch.Generator().manual_seed(seed + 1000)
        prefers_first = torch.rand(200, generator=generator) < torch.sigmoid(delta)
        sign = torch.where(prefers_first, 1, -1)    # of the labels
        figures, _ = reward_model_figures(sign * (delta + 2 * noise(seed + 2000, 200)),
                                          sign * delta)
        truth, _ = reward_model_figures(sign * delta, sign * delta)
        figures["unexplained"] = truth["accuracy"] - truth["bayes_accuracy"]
        measured.append(figures)
    for name in ("expected_accuracy", "share_of_bayes", "above_chance"):
        spread = statistics.stdev(figures[name] for figures in measured)    # to 1 / √800, 3.5 %
        error = statistics.mean(figures[f"{name}_error"] for figures in measured)
        assert error == pytest.approx(spread, rel=0.14)
    x = torch.tensor([figures["unexplained"] for figures in measured])
    assert abs(x.mean()) < 4 * x.std() / 20


def test_a_reward_models_figures_by_hand():
    """A share of Bayes accuracy for one above chance; a scale that nobody sees. Two pairs, and
    every figure from its definition."""
    gold = torch.tensor([2.0, -0.5])
    figures, table = reward_model_figures(torch.tensor([-0.5, 1.0]), gold)
    expected = (sigma(-2.0) + sigma(-0.5)) / 2  # the model prefers y_l once
    bayes = (sigma(2.0) + sigma(0.5)) / 2
    entropies = [-sigma(g) * math.log(sigma(g)) - sigma(-g) * math.log(sigma(-g))
                 for g in gold.tolist()]
    covariance = -0.5 * 2 - 1 * 0.5
    by_hand = {
        "accuracy": 0.5,
        "expected_accuracy": expected,
        "expected_accuracy_error": (sigma(-0.5) - sigma(-2.0)) / 2,
        "bayes_accuracy": bayes,
        "share_of_bayes": expected / bayes,
        "above_chance": (expected - 0.5) / (bayes - 0.5),
        "loss": -(math.log(sigma(-0.5)) + math.log(sigma(1.0))) / 2,
        "annotator_loss": sum(entropies) / 2,
        "correlation": covariance / math.sqrt((0.25 + 1) * (4 + 0.25)),
        "slope": covariance / (4 + 0.25)}
    assert {name: figures[name] for name in by_hand} == pytest.approx(by_hand)

    # Of either order of a pair the prediction, by bins of a tenth, and whether it won.
    rows = [(1, sigma(-1.0), 0), (1, sigma(-0.5), 1), (1, sigma(0.5), 0), (1, sigma(1.0), 1)]
    np.testing.assert_allclose(table, rows, rtol=1e-6)
    # An untrained model, an annotator who sees no difference.
    figures, _ = reward_model_figures(torch.zeros(2), torch.zeros(2))
    assert all(map(math.isfinite, figures.values()))


def test_close_to_the_best(capsys):
    """A share upside down, or measured from 0 where guessing has 0.5; a traceback for a stage with
    no figures, or for a figure that only some rows have (best_of_n.py --verify --samples 8)."""
    accuracy = dict(expected_accuracy=0.75, expected_accuracy_error=0.012, bayes_accuracy=0.8,
                    share_of_bayes=0.9375, share_of_bayes_error=0.014, above_chance=0.8333,
                    above_chance_error=0.038)
    stages = {"gpt": [dict(held_out=0.5, entropy=0.5), dict(held_out=0.8, entropy=0.6)], "sft": [],
              "reward_model": [dict(accuracy, loss=0.5, annotator_loss=0.4)]}
    row = dict(under="gold", policy="ppo", J=3.5, J_error=0.05, J_star=3.4, J_star_error=0.04,
               share=1.05, share_error=0.031)
    close_to_the_best(stages, [row])
    assert [re.split(r"  +", line) for line in capsys.readouterr().out.splitlines()[3:]] == [
        ["pretraining, nats per token", "0.800", "0.600", "75.0 %"],
        ["reward model, accuracy", "0.750 ± 0.012", "0.800", "93.8 ± 1.4 %"],
        ["reward model, accuracy above chance", "0.250 ± 0.012", "0.300", "83.3 ± 3.8 %"],
        ["reward model, loss", "0.500", "0.400", "80.0 %"],
        ["ppo, J under gold", "3.500 ± 0.050", "3.400 ± 0.040", "105.0 ± 3.1 %"]]   # not cut off

    print_table([dict(policy="sft", pass_16=0.5), dict(policy="ppo")], {"pass_16": ".1%"})
    assert capsys.readouterr().out.splitlines()[1:] == ["sft   50.0 %", "ppo        -"]
