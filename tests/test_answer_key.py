"""The statistics and tables of data/answer_key.py against the lecture's numbers, enumeration and
brute force."""

import itertools
import math
import re
import statistics

import numpy as np
import pytest
import torch

from data.answer_key import (Pool, best_of_n_figures, best_of_n_win_rate, cell, close_to_the_best,
                             compare_policies, distinct_2, frontier, judged_optimum,
                             mean_and_error, optimality_gap, pass_at_k, pooled_optimum,
                             print_table, print_yardstick, process_scores, reward_model_figures,
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


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def kl(p, q):
    return (p * (p / q).log()).sum().item()


def sigma(x):
    return 1 / (1 + math.exp(-x))


def boltzmann(reference, rewards, beta):
    """(π*, J* = β log Z), the optimum of the objective (CS 224R, ch. 7)."""
    weights = reference * (rewards / beta).exp()
    return weights / weights.sum(), beta * weights.sum().log().item()


def exact_samples(counts):
    """Samples that are no estimate, but every policy's exact proportions: the responses (1, S) of
    all policies (K, responses), and log π_k/π_ref of each under each policy, (1, S, K)."""
    samples = [torch.repeat_interleave(torch.arange(len(row)), row) for row in counts]
    samples = torch.cat(samples)[None]
    p = counts.double() / counts.sum(dim=1, keepdim=True)
    return samples, (p / p[0]).log().T[samples]


def coarse(seed, *shape):
    """Whole numbers with many ties among them."""
    return torch.randint(4, shape, generator=torch.Generator().manual_seed(seed)).float()


# --------------------------------------------------------------------------------------------------
# The optimum of the objective


def test_boltzmann_of_the_lecture():
    """r·β for r/β, or a log Z that isn't the objective's maximum: 0.6/0.4, rewards 1 and 3, beta 2
    give Z = 2.782."""
    reference = double(0.6, 0.4)
    rewards = double(1.0, 3.0)
    best, J_best = boltzmann(reference, rewards, 2.0)
    assert math.exp(J_best / 2) == pytest.approx(2.782, abs=1e-3)
    assert best.tolist() == pytest.approx([0.355, 0.645], abs=1e-3)
    assert (best * rewards).sum().item() - 2 * kl(best, reference) == pytest.approx(J_best)

    # Six and four of ten samples are exactly π_ref: its J is E[r], its own estimate of J* exact.
    samples, log_ratios = exact_samples(torch.tensor([[6, 4]]))
    J, J_star = optimality_gap(rewards[samples], log_ratios[:, :, 0], 2.0)
    assert J.item() == pytest.approx(0.6 * 1 + 0.4 * 3) and J_star.item() == pytest.approx(J_best)

    # At the optimum w is the same for every response: one sample of either tells all.
    for i in (0, 1):
        log_ratio = (best / reference).log()[None, i:i + 1]
        J, J_star = optimality_gap(rewards[None, i:i + 1], log_ratio, 2.0)
        assert J.item() == pytest.approx(J_best) and J_star.item() == pytest.approx(J_best)


def test_gap_is_the_divergence_from_the_optimum():
    """w with the ratio's sign turned, or beta on one of its parts only: J* - J is then no beta
    KL(π || π*)."""
    p = COUNTS.double() / 16
    samples, log_ratios = exact_samples(COUNTS)
    samples = samples.view(4, 16)   # a row for each policy
    own = log_ratios.view(4, 16, 4)[range(4), :, range(4)]
    for beta in (0.5, 2.0):
        best, _ = boltzmann(p[0], REWARDS, beta)
        J, J_star = optimality_gap(REWARDS[samples], own, beta)
        expected = [(q * REWARDS).sum().item() - beta * kl(q, p[0]) for q in p]
        assert J.tolist() == pytest.approx(expected)
        assert (J_star - J).tolist() == pytest.approx([beta * kl(q, best) for q in p])


def test_huge_rewards_do_not_overflow():
    """log of the mean of exp(r/β) is inf from r/β = 89 on."""
    J, J_star = optimality_gap(torch.tensor([[1000.0, 1000.0]]), torch.zeros(1, 2), beta=0.5)
    assert J.item() == J_star.item() == 1000
    rewards = torch.full((1, 2), -1000.0)
    J_star, divergence = pooled_optimum(rewards, torch.zeros(1, 2, 1), beta=0.5)
    assert J_star.item() == -1000 and divergence.item() == 0


def test_a_dropped_mode_and_the_pool():
    """A collapsed policy takes itself for the optimum: it never samples what it dropped. The pool
    sees it."""
    reference = double(0.5, 0.3, 0.2)
    rewards = double(1.0, 0.0, 3.0)
    log_ratio = (double(1 - 2e-9, 1e-9, 1e-9) / reference).log()
    _, exact = boltzmann(reference, rewards, 1.0)
    own = torch.zeros(1, 1000, dtype=torch.long)    # its samples: response 0, again and again
    J, J_star = optimality_gap(rewards[own], log_ratio[own], 1.0)
    assert J_star.item() == pytest.approx(J.item()) and J_star.item() < exact - 0.8

    samples = torch.cat([torch.tensor([[0] * 500 + [1] * 300 + [2] * 200]), own], dim=1)
    log_ratios = torch.stack([0 * log_ratio, log_ratio], dim=1)[samples]
    J_star, _ = pooled_optimum(rewards[samples], log_ratios, 1.0)
    assert J_star.item() == pytest.approx(exact, abs=1e-6)


@pytest.mark.parametrize("policies", [1, 2, 4])
def test_pooled_and_judged_optimum_are_exact(policies):
    """Weights by the policy that drew the sample, or a sum over policies for their mean: Z is then
    off by K. Weights made of the judge's reward, or a KL of the judge's own optimum: what gold
    loses to the reward model is then taken for what the optimizer left."""
    p = COUNTS[:policies].double() / 16
    best, exact = boltzmann(p[0], REWARDS, BETA)
    divergence = kl(best, p[0])
    exact_gold = (best * GOLD).sum().item() - BETA * divergence
    _, gold_star = boltzmann(p[0], GOLD, BETA)
    assert exact_gold < gold_star - 0.05

    samples, log_ratios = exact_samples(COUNTS[:policies])
    # Three times as many samples of the reference: they must weigh a third each.
    more = torch.cat([samples[:, :16]] * 2 + [samples], dim=1)
    more_ratios = torch.cat([log_ratios[:, :16]] * 2 + [log_ratios], dim=1)
    counts = [48] + [16] * (policies - 1)
    for samples, log_ratios, counts in ((samples, log_ratios, None), (more, more_ratios, counts)):
        rewards = REWARDS[samples]
        gold = GOLD[samples]
        assert log_ratios.shape == (1, samples.shape[1], policies)
        J_star, found = pooled_optimum(rewards, log_ratios, BETA, counts)
        assert J_star.item() == pytest.approx(exact) and found.item() == pytest.approx(divergence)

        J, effective = judged_optimum(gold, rewards, log_ratios, BETA, counts)
        assert J.item() == pytest.approx(exact_gold)
        share = torch.tensor(counts or [16] * policies) / samples.shape[1]
        weights = ((REWARDS / BETA).exp() * p[0] / (share[:, None] * p).sum(dim=0))[samples]
        size = weights.sum() ** 2 / (weights ** 2).sum()
        assert effective.item() == pytest.approx(size.item())

        # It reaches gold's own J* where the reward model is gold, up to a constant.
        J_star, _ = pooled_optimum(gold, log_ratios, BETA, counts)
        agreed, _ = judged_optimum(gold, gold - 3, log_ratios, BETA, counts)
        assert agreed.item() == pytest.approx(J_star.item()) == pytest.approx(gold_star)


def test_the_frontier_is_that_of_the_list():
    """A frontier of the wrong reward, of one β's KL beside another's rewards, or of samples weighed
    as if all were SFT's: of exactly drawn samples it is the list's, π*β by π*β. Every other policy
    lies below it."""
    p = COUNTS[:2].double() / 16
    samples, log_ratios = exact_samples(COUNTS[:2])
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
            other = (p[1] * r).sum().item() - row["beta"] * kl(p[1], p[0])
            assert row[field] - row["beta"] * row["kl"] > other


def test_the_optimum_of_a_verifiable_reward():
    """exp(1/β) that is too large a number, J* above 1, or the optimum's own share put for its
    objective."""
    for p in (1e-9, 0.3, 0.999):
        for beta in (0.01, 0.2, 5.0):
            best, J_star = boltzmann(double(1 - p, p), double(0.0, 1.0), beta)
            found = verified_optimum(p, beta)
            assert found == pytest.approx((J_star, best[1].item()), abs=1e-9)
        for beta in (0.0, 1e-6):    # without a price, always right, if the reference ever is
            assert verified_optimum(p, beta) == pytest.approx((1, 1), abs=1e-3)
    for beta in (0.0, 1e-6, 0.2, 5.0):
        assert verified_optimum(0.0, beta) == (0, 0) and verified_optimum(1.0, beta) == (1, 1)


# --------------------------------------------------------------------------------------------------
# Estimates from samples


def test_subset_weights_go_through_all_subsets():
    """C(i, n) for C(i, n-1), ranks from the wrong end, or a tie that goes to whichever sample
    happens to come first."""
    for n in (1, 2, 3, 6, 7):
        for rewards in (noise(n, 4, 7), coarse(n, 4, 7), torch.full((1, 7), -5.0)):
            subsets = list(itertools.combinations(range(7), n))
            expected = torch.zeros(rewards.shape)
            for row, weights in zip(rewards.tolist(), expected):
                for subset in subsets:
                    best = [i for i in subset if row[i] == max(row[j] for j in subset)]
                    weights[best] += 1 / (len(best) * len(subsets))
            found = subset_weights(rewards, n)
            assert found.dtype == rewards.dtype and torch.allclose(found, expected, atol=1e-6)


def test_subset_weights_of_many_samples():
    """C(128, 64) = 2.4e37: a product in float32, or a difference of two of them, and the weights no
    longer sum to 1."""
    rewards = noise(0, 3, 128)
    for n in (1, 16, 64, 128):
        weights = subset_weights(rewards, n)
        assert (weights >= 0).all()
        assert weights.sum(dim=1).tolist() == pytest.approx([1] * 3, abs=1e-5)
        rank = rewards.argsort(dim=1).argsort(dim=1)  # the i-th smallest wins C(i, n-1) subsets
        wins = torch.tensor([math.comb(i, n - 1) / math.comb(128, n) for i in range(128)])
        assert torch.allclose(weights, wins[rank], atol=1e-6)


def test_pass_at_k_goes_through_all_subsets():
    """1 - (1 - c/n)^k, as if the samples were drawn with replacement: too low, and most of all
    where k is near n."""
    for n in range(1, 7):
        for correct, k in itertools.product(range(n + 1), range(1, n + 1)):
            samples = [True] * correct + [False] * (n - correct)
            passed = [any(subset) for subset in itertools.combinations(samples, k)]
            assert pass_at_k(correct, n, k) == pytest.approx(statistics.mean(passed))


def test_win_rate_counts_ties_half():
    """Ties as losses: SFT against itself then loses, most of all where the annotator's rewards are
    coarse."""
    gold = coarse(0, 3, 5)
    opponents = coarse(1, 3, 7)
    found = win_rate(gold, opponents)
    for i, j in itertools.product(range(3), range(5)):
        won = (opponents[i] < gold[i, j]).sum() + 0.5 * (opponents[i] == gold[i, j]).sum()
        assert found[i, j].item() == pytest.approx(won.item() / 7)
    assert win_rate(gold, gold).mean(dim=1).tolist() == pytest.approx([0.5] * 3)


def test_win_rate_of_best_of_n_goes_through_all_games():
    """A candidate that is its own opponent, one that best-of-n also chose from, or a winner picked
    by gold."""
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
            found = best_of_n_win_rate(rewards, gold, n)
            assert found.tolist() == pytest.approx(expected, abs=1e-6)
        against_itself = best_of_n_win_rate(rewards, gold, 1)
        assert against_itself.tolist() == pytest.approx([0.5] * 3)


def test_process_scores_by_hand():
    """A smallest step that is the padding's 0, a product of rewards instead of probabilities, a
    mean for a sum."""
    rewards = torch.tensor([[0.0, 2.0, 0.0, -1.0], [0.5, 0.0, 0.0, 0.0], [3.0, 0.0, 1.0, 2.0]])
    steps = torch.tensor([[0, 1, 0, 1], [1, 0, 0, 0], [1, 0, 1, 1]]).bool()
    scores = process_scores(rewards, steps)
    p = [sigma(x) for x in (2, -1, 0.5, 3, 1, 2)]
    products = [p[0] * p[1], p[2], p[3] * p[4] * p[5]]
    assert scores["smallest"].tolist() == [-1, 0.5, 1] and scores["sum"].tolist() == [1, 0.5, 6]
    assert scores["product"].exp().tolist() == pytest.approx(products)


def test_figures_of_a_selection_by_brute_force():
    """A prompt counted once for each of its responses, the spread of all rewards, or the ease of
    every prompt once, however many of its responses were kept."""
    M = 6
    N = 5
    rewards = coarse(0, M, N) + noise(0, M, 1)
    flat = sorted(((rewards[i, j].item(), i, j) for i in range(M) for j in range(N)), reverse=True)
    per_prompt = [max(row for row in flat if row[1] == i) for i in range(M)]
    for chosen in (flat[:M], per_prompt, flat[:1]):
        found = selection_figures(rewards, torch.tensor([[i, j] for _, i, j in chosen]))
        values = [reward for reward, _, _ in chosen]
        prompts = [i for _, i, _ in chosen]
        expected = dict(prompts=len(set(prompts)), most=max(map(prompts.count, prompts)),
                        reward=np.mean(values), spread=np.std(values),
                        prompts_reward=np.mean([rewards[i].tolist() for i in prompts]),
                        all_reward=np.mean(rewards.tolist()))
        assert found == pytest.approx(expected, abs=1e-5)


def test_figures_of_best_of_n_keep_the_pieces_together():
    """The reward of one sample beside the gold or text of another, or the best chosen by gold."""
    M = 3
    N = 8
    samples = {"reward": noise(0, M, N), "gold": noise(1, M, N),
               "length": torch.arange(M * N).view(M, N).float(),
               "ended": (noise(2, M, N) > 0).float()}
    rewards = samples["reward"].tolist()
    for n in (1, 3, 8):
        found = best_of_n_figures(samples, ["a text"] * M * N, n, samples["reward"])
        assert list(found) == ["reward", "gold", "length", "ended", "distinct_2"]
        for i in range(M):
            subsets = itertools.combinations(range(N), n)
            best = [max(subset, key=rewards[i].__getitem__) for subset in subsets]
            for name, x in samples.items():
                expected = np.mean([x[i, j] for j in best])
                assert found[name][i].item() == pytest.approx(expected, abs=1e-4)

    # Only the best of the first three of each prompt have words of their own.
    texts = ["a a a a"] * M * N
    for i in range(M):
        texts[N * i + max(range(3), key=rewards[i].__getitem__)] = f"a{i} b{i}"
    found = best_of_n_figures(samples, texts, 3, samples["reward"])
    assert found["distinct_2"].tolist() == [1]


@pytest.mark.parametrize("texts, share", [
    (["a b c", "a b d"], 3 / 4), (["a a a a"], 1 / 3), (["a b", "b a"], 1.0), (["a", "b"], 0.0),
    ([], 0.0), (["a b"] * 5, 0.2)])
def test_distinct_2_by_hand(texts, share):
    """Pairs that reach from one text into the next, or a division by zero for texts of one word."""
    assert distinct_2(texts) == pytest.approx(share)


def test_mean_and_error_of_prompts():
    """The spread for the standard error, or nan for a single prompt, which is no JSON."""
    x = noise(3, 50)
    mean = np.mean(x.numpy())
    error = np.std(x.numpy(), ddof=1) / math.sqrt(50)
    assert mean_and_error(x) == pytest.approx((mean, error))
    assert mean_and_error(x[:1]) == (x[0].item(), None)
    found = with_errors({"a": x[:1], "b": x})
    assert found == dict(a=x[0].item(), a_error=None, b=pytest.approx(mean),
                         b_error=pytest.approx(error))


def test_error_of_a_share_is_its_spread():
    """An error that takes the way for exact, or for independent of the part: compare with the
    share's spread over many yardsticks. A share above 1 stays, and no way to go is no division by
    zero."""
    way = 2 + noise(0, 1000, 40)                       # (yardsticks, prompts)
    part = 0.8 * way + 0.3 * noise(1, 1000, 40) + 0.5  # most of the noise is shared
    shares, errors = np.array([share_and_error(*pair) for pair in zip(part, way)]).T
    assert shares.mean() == pytest.approx(0.8 + 0.5 / 2, abs=0.01) and (shares > 1).any()
    assert errors.mean() == pytest.approx(shares.std(), rel=0.1)
    assert share_and_error(way[0], way[0]) == (1, pytest.approx(0, abs=1e-6))
    assert share_and_error(way[0], -way[0]) == share_and_error(way[0], 0 * way[0]) == (None, None)
    assert share_and_error(way[0, :1], way[0, :1]) == (1, None)


# --------------------------------------------------------------------------------------------------
# The reward model beside the best possible one


def labels(gold, seed):
    """1 where an annotator with these margins between first and second response prefers the first,
    else -1."""
    u = torch.rand(gold.shape, generator=torch.Generator().manual_seed(seed))
    return torch.where(u < torch.sigmoid(gold), 1, -1)


def test_the_truth_a_coin_and_a_model_that_is_too_sure():
    """A Bayes accuracy that the truth itself does not reach, or surpasses; a share of it alone, of
    which a coin has two thirds; a scale that nobody sees: a model twice too sure has the same
    accuracy and correlation."""
    delta = 2 * noise(12, 40000)
    gold = labels(delta, 1012) * delta
    truth, table = reward_model_figures(gold, gold)
    bayes = truth["bayes_accuracy"]
    assert truth["accuracy"] == pytest.approx(bayes, abs=4 * 0.5 / 200)     # 40,000 labels' 4 sigma
    assert truth["expected_accuracy"] == pytest.approx(bayes) and 0.7 < bayes < 0.9
    assert truth["loss"] == pytest.approx(truth["annotator_loss"], abs=0.02)
    for name in ("above_chance", "share_of_bayes", "slope", "correlation"):
        assert truth[name] == pytest.approx(1)
    for name in ("above_chance_error", "share_of_bayes_error"):
        assert truth[name] == pytest.approx(0, abs=1e-9)
    assert sum(count for count, _, _ in table) == 2 * len(gold) and len(table) == 10
    for count, predicted, observed in table:    # both orders: not independent
        assert observed == pytest.approx(predicted, abs=4 * math.sqrt(2 * 0.25 / count))

    coin, _ = reward_model_figures(noise(14, 40000), gold)
    assert abs(coin["above_chance"]) < 4 * coin["above_chance_error"] < 0.08
    assert abs(coin["share_of_bayes"] - 0.5 / bayes) < 4 * coin["share_of_bayes_error"]
    wrong, _ = reward_model_figures(-gold, gold)
    assert wrong["above_chance"] == pytest.approx(-1)

    sure, table = reward_model_figures(2 * gold, gold)
    assert sure["slope"] == pytest.approx(2) and sure["loss"] > truth["loss"] + 0.02
    for name in ("accuracy", "expected_accuracy", "correlation"):   # the last two know no noise
        assert sure[name] == pytest.approx(truth[name])
    between = [observed - predicted for _, predicted, observed in table if 0.6 < predicted < 0.95]
    assert max(between) < -0.02


def test_standard_errors_are_the_spread_of_repeated_measurements():
    """An error of a ratio as if its two means came from different pairs, a variance for its root, a
    forgotten 1/√n."""
    measured = []
    for seed in range(400):
        delta = 2 * noise(seed, 200)
        sign = labels(delta, seed + 1000)
        figures, _ = reward_model_figures(sign * (delta + 2 * noise(seed + 2000, 200)),
                                          sign * delta)
        measured.append(figures)
    for name in ("expected_accuracy", "share_of_bayes", "above_chance"):
        spread = statistics.stdev(figures[name] for figures in measured)    # to 1 / √800, 3.5 %
        error = statistics.mean(figures[f"{name}_error"] for figures in measured)
        assert error == pytest.approx(spread, rel=0.14)


def test_a_reward_models_figures_by_hand():
    """Two pairs, and every figure from its definition."""
    gold = torch.tensor([2.0, -0.5])
    figures, table = reward_model_figures(torch.tensor([0.5, -1.0]), gold)
    entropies = [-sigma(g) * math.log(sigma(g)) - sigma(-g) * math.log(sigma(-g))
                 for g in gold.tolist()]
    covariance = 0.5 * 2 + 1 * 0.5
    assert figures == pytest.approx({
        "accuracy": 0.5,
        # the model prefers y_w in the first, y_l in the second pair
        "expected_accuracy": (sigma(2.0) + sigma(0.5)) / 2,
        "expected_accuracy_error": (sigma(2.0) - sigma(0.5)) / 2 / math.sqrt(2),
        "bayes_accuracy": (sigma(2.0) + sigma(0.5)) / 2,
        "share_of_bayes": 1, "share_of_bayes_error": 0, "above_chance": 1, "above_chance_error": 0,
        "loss": -(math.log(sigma(0.5)) + math.log(sigma(-1.0))) / 2,
        "annotator_loss": sum(entropies) / 2,
        "correlation": covariance / math.sqrt((0.25 + 1) * (4 + 0.25)),
        "slope": covariance / (4 + 0.25)})

    # predictions 0.622 (won), 0.378 (lost), 0.269 (won), 0.731 (lost), by bins of a tenth
    predicted = [sigma(-1.0), sigma(-0.5), sigma(0.5), sigma(1.0)]
    assert [row[0] for row in table] == [1, 1, 1, 1]
    assert [row[1] for row in table] == pytest.approx(predicted)
    assert [row[2] for row in table] == [1, 0, 1, 0]

    # An untrained model, an annotator who sees no difference; probabilities of exactly 0 and 1.
    figures, _ = reward_model_figures(torch.zeros(2), torch.zeros(2))
    assert all(math.isfinite(value) for value in figures.values())
    assert figures["loss"] == pytest.approx(math.log(2))
    _, (low, high) = reward_model_figures(torch.tensor([50.0, 40.0]), gold)
    assert low == pytest.approx((2, 0, 0)) and high == pytest.approx((2, 1, 1))


# --------------------------------------------------------------------------------------------------
# Tables


@pytest.mark.parametrize("figure, text", [
    ((1.2054, 0.0212), "1.205 ± 0.021"), ((1.2054,), "1.205"), ((None,), "-"),
    ((None, None, ".1%"), "-"), ((0.8931, 0.0092, ".1%"), "89.3 ± 0.9 %"),
    ((1.004, None, ".1%"), "100.4 %"), ((49.8, 1.3, ".0f"), "50"),
    ((0.9996, 0.01, ".0%"), "100 %"), ((-0.5, 0.25, ".2f"), "-0.50 ± 0.25")])
def test_cell(figure, text):
    """An error in other units than its figure, a share cut off at 100 %, or a traceback where there
    is no figure."""
    assert cell(*figure) == text


def test_close_to_the_best(capsys):
    """A share upside down (a loss should be small, an accuracy large), an accuracy measured from 0
    where guessing has 0.5, an error of the measured figure for that of the share, or a stage
    without figures that ends the table in a traceback."""
    accuracy = dict(expected_accuracy=0.75, expected_accuracy_error=0.012, bayes_accuracy=0.8,
                    share_of_bayes=0.9375, share_of_bayes_error=0.014, above_chance=0.8333,
                    above_chance_error=0.038)
    stages = {"gpt": [dict(held_out=0.5, entropy=0.5), dict(held_out=0.8, entropy=0.6),
                      dict(loss=1.0)],
              "sft": [dict(held_out=0.5, entropy=0.4)],
              "reward_model": [dict(loss=0.7), dict(accuracy, loss=0.5, annotator_loss=0.4)]}
    row = dict(under="gold", J=3.5, J_error=0.05, J_star=3.4, J_star_error=0.04, share=1.05,
               share_error=0.031)
    close_to_the_best(stages, [dict(policy="ppo", reward=1.0), dict(row, policy="sft"),
                               dict(row, policy="ppo"),
                               dict(row, policy="dpo", share=None, share_error=None)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["", "How close to the best"]
    assert [re.split(r"  +", line) for line in lines[2:]] == [
        ["", "measured", "possible", "share"],
        ["pretraining, nats per token", "0.800", "0.600", "75.0 %"],
        ["SFT, nats per token", "0.500", "0.400", "80.0 %"],
        ["reward model, accuracy", "0.750 ± 0.012", "0.800", "93.8 ± 1.4 %"],
        ["reward model, accuracy above chance", "0.250 ± 0.012", "0.300", "83.3 ± 3.8 %"],
        ["reward model, loss", "0.500", "0.400", "80.0 %"],
        ["ppo, J under gold", "3.500 ± 0.050", "3.400 ± 0.040", "105.0 ± 3.1 %"]]   # not cut off
    close_to_the_best({"gpt": [], "sft": [], "reward_model": []}, [])
    assert capsys.readouterr().out == ""

    # A reward model of exactly 0.5, or labels that can't be guessed, are no division by zero.
    for gold, possible in ((torch.zeros(2), "0.000"), (torch.ones(2), "0.231")):
        figures, _ = reward_model_figures(torch.tensor([0.3, -0.3]), gold)
        close_to_the_best({"gpt": [], "sft": [], "reward_model": [figures]}, [])
        above_chance = rf"\nreward model, accuracy above chance +0\.000 ± \S+ +{possible} +0\.0 ± "
        assert re.search(above_chance, capsys.readouterr().out)


def test_tables_fit_100_columns(capsys):
    """A table that the terminal wraps as soon as its figures have two digits before the point, or a
    policy a name."""
    M = 16
    samples = {}
    texts = {}
    log_ratios = {}
    for k, (name, N) in enumerate((("sft", 128), ("ppo-beta0", 64), ("dpo", 64))):
        reward = -12 + 9 * noise(k, M, 1) + noise(k + 10, M, N)
        gold = -12 + 9 * noise(20 + k, M, 1) + noise(20 + k + 10, M, N)
        samples[name] = {"reward": reward, "gold": gold, "length": torch.full((M, N), 128.0),
                         "ended": torch.ones(M, N)}
        texts[name] = ["a b c"] * M * N
        log_ratios[name] = 12 + 9 * noise(40 + k, M, 1, 1) + noise(50 + k, M, N, 3)
        log_ratios[name][:, :, 0] = 0
    per_prompt = compare_policies(samples, texts, log_ratios, {"": samples["sft"]["reward"]},
                                  {16: 12.3, 64: 45.6})
    accuracy, _ = reward_model_figures(noise(60, 100), noise(61, 100))
    loss = dict(held_out=12.345, entropy=10.123)
    stages = {"gpt": [loss], "sft": [loss], "reward_model": [accuracy]}
    print_yardstick(per_prompt, samples, log_ratios, {"base": 12.345, "sft": 12.345}, stages, 0.05)

    lines = capsys.readouterr().out.splitlines()
    longest = ("best of 64", "reward model, accuracy above chance")
    assert sum(line.startswith(longest) for line in lines) == 7
    wide = r"-\d\d\.\d\d ± \d\.\d\d .*\d\d\.\d\d ± \d\.\d\d "
    assert any(re.search(wide, line) for line in lines)
    assert max(map(len, lines)) <= 100, max(lines, key=len)


def test_a_figure_that_only_some_rows_have(capsys):
    """best_of_n.py --verify --samples 8: 16 samples of SFT have a pass@16, 8 of the others none;
    the table ended in a KeyError after all the sampling."""
    print_table([dict(policy="sft", pass_16=0.5), dict(policy="ppo")], {"pass_16": ".1%"})
    assert capsys.readouterr().out.splitlines()[1:] == ["sft   50.0 %", "ppo        -"]
