"""The statistics and tables of data/answer_key.py against the lecture's numbers, enumeration and
brute force."""

import itertools
import math
import random
import re
import statistics

import numpy as np
import pytest
import torch

from data.answer_key import (FORMATS, Pool, best_of_n_figures, best_of_n_win_rate, cell,
                             close_to_the_best, distinct_2, frontier, judged_optimum,
                             mean_and_error, optimality_gap, optimum, pass_at_k, pool_samples,
                             pooled_optimum, print_optimum, print_table, process_scores,
                             reward_model_figures, selection_figures, share_and_error,
                             subset_weights, verified_optimum, where_gold_is_lost, win_rate,
                             with_errors)
from helpers import noise


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
    generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(p, count, replacement=True, generator=generator)


def world(seed, n=8):
    """(π_ref, rewards) over n responses, in float64."""
    return noise(seed, n).double().softmax(0), 2 * noise(seed + 100, n).double()


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
    beta = 2.0
    Z = (reference * (rewards / beta).exp()).sum().item()
    best = boltzmann(reference, rewards, beta)
    assert Z == pytest.approx(2.782, abs=1e-3)
    assert best.tolist() == pytest.approx([0.355, 0.645], abs=1e-3)
    J_best = (best * rewards).sum().item() - beta * kl(best, reference)
    assert J_best == pytest.approx(beta * math.log(Z))

    # Six and four of ten samples are exactly π_ref: its J is E[r], and its own estimate of J* is
    # exact.
    samples = torch.tensor([[0] * 6 + [1] * 4])
    J, J_star = optimality_gap(rewards[samples], torch.zeros(1, 10, dtype=torch.float64), beta)
    assert J.item() == pytest.approx(0.6 * 1 + 0.4 * 3) and J_star.item() == pytest.approx(J_best)

    # At the optimum w is the same for every response: one sample of either tells all.
    for i in (0, 1):
        log_ratio = (best / reference).log()[None, i:i + 1]
        J, J_star = optimality_gap(rewards[None, i:i + 1], log_ratio, beta)
        assert J.item() == pytest.approx(J_best) and J_star.item() == pytest.approx(J_best)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_gap_is_the_divergence_from_the_optimum(seed, beta):
    """w with the ratio's sign turned, or beta on one of its parts only: J* - J is then no beta
    KL(π || π*)."""
    reference, rewards = world(seed)
    policy = noise(seed + 50, 8).double().softmax(0)
    log_Z = (reference * (rewards / beta).exp()).sum().log()
    best = boltzmann(reference, rewards, beta)
    exact_J = ((policy * rewards).sum() - beta * kl(policy, reference)).item()
    exact_gap = beta * kl(policy, best)
    assert beta * log_Z.item() - exact_J == pytest.approx(exact_gap)

    M = 30
    N = 4000
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
    rewards = torch.full((1, 2), -1000.0)
    J_star, divergence = pooled_optimum(rewards, torch.zeros(1, 2, 1), beta=0.5)
    assert J_star.item() == -1000 and divergence.item() == 0


def test_dropped_mode_and_the_pooled_optimum():
    """A collapsed policy takes itself for the optimum: it never samples what it dropped. The pool
    sees it."""
    reference = double(0.5, 0.3, 0.2)
    rewards = double(1.0, 0.0, 3.0)
    beta = 1.0
    collapsed = double(1 - 2e-9, 1e-9, 1e-9)
    exact = beta * (reference * (rewards / beta).exp()).sum().log().item()
    log_ratio = (collapsed / reference).log()

    # Exact samples: all of the policy's are response 0; the reference's have its proportions.
    own = torch.zeros(1, 1000, dtype=torch.long)
    of_reference = torch.tensor([[0] * 500 + [1] * 300 + [2] * 200])
    J, J_star = optimality_gap(rewards[own], log_ratio[own], beta)
    assert J_star.item() == pytest.approx(J.item()) and J_star.item() < exact - 0.8
    samples = torch.cat([of_reference, own], dim=1)
    log_ratios = torch.stack([torch.zeros(3, dtype=torch.float64), log_ratio], dim=1)[samples]
    J_star, divergence = pooled_optimum(rewards[samples], log_ratios, beta)
    best = boltzmann(reference, rewards, beta)
    assert J_star.item() == pytest.approx(exact, abs=1e-6)
    assert divergence.item() == pytest.approx(kl(best, reference), abs=1e-6)


@pytest.mark.parametrize("policies", [1, 2, 4])
def test_pooled_optimum_is_unbiased_for_z(policies):
    """Weights by the policy that drew the sample, or a sum over policies for their mean: Z is then
    off by K."""
    _, rewards = world(7)
    beta = 0.8
    counts = torch.tensor([3, 1, 2, 4, 1, 2, 1, 2])
    reference = counts.double() / 16  # multiples of 1/16, so 16 draws of each policy can be exact
    all_counts = [counts]
    for k in range(policies - 1):
        all_counts.append(counts[torch.randperm(8, generator=torch.Generator().manual_seed(k))])
    samples = [torch.repeat_interleave(torch.arange(8), count) for count in all_counts]
    samples = torch.cat(samples)[None]
    log_ratios = [(count.double() / 16 / reference).log() for count in all_counts]
    log_ratios = torch.stack(log_ratios, dim=1)[samples]
    exact = beta * (reference * (rewards / beta).exp()).sum().log().item()
    assert samples.shape == (1, 16 * policies)
    assert log_ratios.shape == (1, 16 * policies, policies)
    J_star, divergence = pooled_optimum(rewards[samples], log_ratios, beta)
    assert J_star.item() == pytest.approx(exact)
    best = boltzmann(reference, rewards, beta)
    assert divergence.item() == pytest.approx(kl(best, reference))

    # Three times as many samples of the reference: they must weigh a third each.
    more = torch.cat([samples[:, :16]] * 2 + [samples], dim=1)
    more_ratios = torch.cat([log_ratios[:, :16]] * 2 + [log_ratios], dim=1)
    counts = [48] + [16] * (policies - 1)
    again = pooled_optimum(rewards[more], more_ratios, beta, counts)
    assert again[0].item() == pytest.approx(exact)
    assert again[1].item() == pytest.approx(divergence.item())


def test_judged_optimum_of_the_lecture():
    """Weights that aren't normalized, made of the judge's reward, or a KL of the judge's own
    optimum. By hand: rewards 1 and 3 with beta 2 turn 0.6/0.4 into 0.3555/0.6445, which a judge of
    2 and -1 dislikes."""
    rewards = double(1.0, 3.0)
    gold = double(2.0, -1.0)
    samples = torch.tensor([[0] * 6 + [1] * 4])  # exactly π_ref
    log_ratios = torch.zeros(1, 10, 1, dtype=torch.float64)
    J, effective = judged_optimum(gold[samples], rewards[samples], log_ratios, beta=2.0)
    divergence = 0.3555 * math.log(0.3555 / 0.6) + 0.6445 * math.log(0.6445 / 0.4)
    assert J.item() == pytest.approx(0.3555 * 2 - 0.6445 * 1 - 2 * divergence, abs=1e-3)
    small = math.exp(1 / 2)
    large = math.exp(3 / 2)
    assert effective.item() == pytest.approx(
        (6 * small + 4 * large) ** 2 / (6 * small ** 2 + 4 * large ** 2))

    J, effective = judged_optimum(gold[samples], 0 * rewards[samples], log_ratios, beta=2.0)
    assert J.item() == pytest.approx(0.6 * 2 - 0.4)  # no reward: π_ref itself
    assert effective.item() == pytest.approx(10)


@pytest.mark.parametrize("seed", range(3))
def test_judged_optimum_against_the_list_of_all_responses(seed):
    """What gold loses to the reward model taken for what the optimizer left: here the optimum is
    known exactly."""
    reference, rewards = world(seed)
    gold = rewards + noise(seed + 200, 8).double()  # the reward model errs
    beta = 0.7
    M = 200
    policy = noise(seed + 50, 8).double().softmax(0)
    best = boltzmann(reference, rewards, beta)
    exact = ((best * gold).sum() - beta * kl(best, reference)).item()
    J_star = beta * (reference * (gold / beta).exp()).sum().log().item()
    assert exact < J_star - 0.05

    of_reference = draw(reference, M * 160, seed).view(M, 160)
    of_policy = draw(policy, M * 80, seed + 10).view(M, 80)
    samples = torch.cat([of_reference, of_policy], dim=1)
    log_ratios = [torch.zeros(8, dtype=torch.float64), (policy / reference).log()]
    log_ratios = torch.stack(log_ratios, dim=1)[samples]
    J, effective = judged_optimum(gold[samples], rewards[samples], log_ratios, beta, [160, 80])
    error = J.std().item() / math.sqrt(M)
    assert J.mean().item() == pytest.approx(exact, abs=4 * error + 0.01) and error < 0.03
    mixture = 2 / 3 * reference + 1 / 3 * policy
    weights = ((rewards / beta).exp() * reference / mixture)[samples].numpy()
    assert effective.numpy() == pytest.approx(weights.sum(1) ** 2 / (weights ** 2).sum(1))

    # On the very same samples it is never above J*, and reaches it where the reward model is gold,
    # up to a constant.
    J_stars, _ = pooled_optimum(gold[samples], log_ratios, beta, [160, 80])
    assert (J <= J_stars + 1e-9).all()
    agreed, _ = judged_optimum(gold[samples], gold[samples] - 3, log_ratios, beta, [160, 80])
    assert torch.allclose(agreed, J_stars)


def test_the_frontier_is_that_of_the_list():
    """A frontier of the wrong reward, of one β's KL beside another's rewards, or of samples weighed
    as if all were SFT's: of exactly drawn samples it is the list's, π*β by π*β. Every other policy
    lies below it."""
    reference = double(0.5, 0.25, 0.125, 0.125)
    policy = double(0.125, 0.25, 0.5, 0.125)
    rewards = double(0.0, 1.0, 2.0, -1.0)
    gold = double(1.0, -1.0, 0.5, 0.0)
    samples = []
    for p in (reference, policy):
        samples.append(torch.repeat_interleave(torch.arange(4), (8 * p).long()))
    samples = torch.cat(samples)[None]
    ratios = torch.stack([torch.zeros(4, dtype=torch.float64), (policy / reference).log()], dim=1)
    pool = Pool(["sft", "ppo"], [8, 8], {"reward": rewards[samples], "gold": gold[samples]},
                ratios[samples])
    for field, r in (("reward", rewards), ("gold", gold)):
        rows = frontier("any", field, pool)
        for row in rows:
            best = boltzmann(reference, r, row["beta"])
            assert row["kl"] == pytest.approx(kl(best, reference)) and row["kl_error"] is None
            assert row["reward"] == pytest.approx((best * rewards).sum().item())
            assert row["gold"] == pytest.approx((best * gold).sum().item())
        betas = [0.05 * math.sqrt(2) ** k for k in range(15)]
        assert [row["beta"] for row in rows] == pytest.approx(betas)
        other = (policy * r).sum().item()
        distance = kl(policy, reference)
        for row in rows:
            assert row[field] - row["beta"] * row["kl"] > other - row["beta"] * distance


@pytest.mark.parametrize("p", [0.0, 1e-9, 0.3, 1.0])
@pytest.mark.parametrize("beta", [0.0, 1e-6, 0.01, 0.2, 5.0])
def test_the_optimum_of_a_verifiable_reward(p, beta):
    """exp(1/β) that is too large a number, J* above 1, or the optimum's own share put for its
    objective."""
    def J_of(q):
        """The objective of a policy that is right with probability q."""
        divergence = 0.0
        for ours, theirs in ((q, p), (1 - q, 1 - p)):
            if ours:
                divergence += ours * math.log(ours / theirs)
        return q - beta * divergence

    J_star, right = verified_optimum(p, beta)
    assert 0 <= right <= 1 and J_star <= right + 1e-12
    if beta <= 0.005:       # without a price, always right, if the reference ever is
        assert J_star == pytest.approx(float(p > 0), abs=1e-3)
        assert right == pytest.approx(float(p > 0), abs=1e-3)
    else:                   # among all policies, which differ in how often they are right
        assert J_star == pytest.approx(J_of(right), abs=1e-9)
        others = [q / 50 for q in range(51) if 0 < p < 1 or q / 50 == p]
        assert J_star >= max(J_of(q) for q in others) - 1e-9


# --------------------------------------------------------------------------------------------------
# Estimates from samples


@pytest.mark.parametrize("n", [1, 2, 3, 6, 7])
def test_subset_weights_go_through_all_subsets(n):
    """C(i, n) for C(i, n-1), ranks from the wrong end, or a tie that goes to whichever sample
    happens to come first."""
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
        for correct in range(n + 1):
            samples = [True] * correct + [False] * (n - correct)
            for k in range(1, n + 1):
                passed = [any(subset) for subset in itertools.combinations(samples, k)]
                assert pass_at_k(correct, n, k) == pytest.approx(statistics.mean(passed))

    # And so without bias: the mean over draws of n samples is that of fresh ones of k.
    rng = random.Random(7)
    p = 0.1
    estimates = []
    for _ in range(4000):
        correct = sum(rng.random() < p for _ in range(20))
        estimates.append(pass_at_k(correct, 20, 16))
    error = statistics.stdev(estimates) / 4000 ** 0.5
    assert statistics.mean(estimates) == pytest.approx(1 - (1 - p) ** 16, abs=4 * error)


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


@pytest.mark.parametrize("n", [1, 2, 4, 9])
def test_win_rate_of_best_of_n_where_gold_is_the_reward(n):
    """Best-of-n that plays against the candidates it was chosen from looks better than it is. The
    largest of n+1 draws is any of them with equal chances, so the best of n wins n/(n+1)."""
    gold = noise(0, 5, 10)
    assert best_of_n_win_rate(gold, gold, n).tolist() == pytest.approx([n / (n + 1)] * 5)
    against_its_own = (subset_weights(gold, n) * win_rate(gold, gold)).sum(dim=1)
    assert n == 1 or (against_its_own > n / (n + 1) + 0.01).all()


def test_process_scores_by_hand():
    """A smallest step that is the padding's 0, a product of rewards instead of probabilities, a
    mean for a sum."""
    rewards = torch.tensor([[0.0, 2.0, 0.0, -1.0], [0.5, 0.0, 0.0, 0.0], [3.0, 0.0, 1.0, 2.0]])
    steps = torch.tensor([[0, 1, 0, 1], [1, 0, 0, 0], [1, 0, 1, 1]]).bool()
    scores = process_scores(rewards, steps)
    p = [1 / (1 + math.exp(-x)) for x in (2, -1, 0.5, 3, 1, 2)]
    products = [p[0] * p[1], p[2], p[3] * p[4] * p[5]]
    assert scores["smallest"].tolist() == [-1, 0.5, 1] and scores["sum"].tolist() == [1, 0.5, 6]
    assert scores["product"].exp().tolist() == pytest.approx(products)


@pytest.mark.parametrize("seed", range(4))
def test_figures_of_a_selection_by_brute_force(seed):
    """A prompt counted once for each of its responses, the spread of all rewards, or the ease of
    every prompt once, however many of its responses were kept."""
    M = 6
    N = 5
    rewards = coarse(seed, M, N) + noise(seed, M, 1)
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

    # The best of the first three of each prompt, and the others.
    winners = [max(range(3), key=rewards[i].__getitem__) for i in range(M)]
    different = ["a a a a"] * M * N
    same = [f"a{i} b{j}" for i in range(M) for j in range(N)]
    for i, j in enumerate(winners):
        different[N * i + j] = f"a{i} b{i}"
        same[N * i + j] = "a a a a"
    for texts, share in ((different, 1), (same, 1 / 9)):
        found = best_of_n_figures(samples, texts, 3, samples["reward"])
        assert found["distinct_2"].tolist() == pytest.approx([share])


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
    way = 2 + noise(0, 4000, 40)                       # (yardsticks, prompts)
    part = 0.8 * way + 0.3 * noise(1, 4000, 40) + 0.5  # most of the noise is shared
    found = [share_and_error(*pair) for pair in zip(part, way)]
    shares = np.array([share for share, _ in found])
    errors = np.array([error for _, error in found])
    assert shares.mean() == pytest.approx(0.8 + 0.5 / 2, abs=0.01) and (shares > 1).any()
    assert errors.mean() == pytest.approx(shares.std(), rel=0.05)
    assert share_and_error(way[0], way[0]) == (1, pytest.approx(0, abs=1e-6))
    assert share_and_error(way[0], -way[0]) == (None, None)
    assert share_and_error(way[0], 0 * way[0]) == (None, None)
    assert share_and_error(way[0, :1], way[0, :1]) == (1, None)


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


def table_of(printed, heading):
    """The lines of the table under the first line that holds `heading`, up to a blank one."""
    lines = printed.splitlines()
    start = next(i for i, line in enumerate(lines) if heading in line)
    return list(itertools.takewhile(str.strip, lines[start + 1:]))


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
    lines = table_of(capsys.readouterr().out, "How close to the best")
    assert [re.split(r"  +", line) for line in lines] == [
        ["", "measured", "possible", "share"],
        ["pretraining, nats per token", "0.800", "0.600", "75.0 %"],
        ["SFT, nats per token", "0.500", "0.400", "80.0 %"],
        ["reward model, accuracy", "0.750 ± 0.012", "0.800", "93.8 ± 1.4 %"],
        ["reward model, accuracy above chance", "0.250 ± 0.012", "0.300", "83.3 ± 3.8 %"],
        ["reward model, loss", "0.500", "0.400", "80.0 %"],
        ["ppo, J under gold", "3.500 ± 0.050", "3.400 ± 0.040", "105.0 ± 3.1 %"]]   # not cut off
    close_to_the_best({"gpt": [], "sft": [], "reward_model": []}, [])
    assert capsys.readouterr().out == ""


def test_close_to_the_best_of_a_coin(capsys):
    """A reward model of exactly 0.5, or labels that can't be guessed, end the table in a division
    by zero."""
    margin = torch.tensor([0.3, -0.3])  # one right and one wrong guess
    for gold, possible in ((torch.zeros(2), "0.000"), (torch.ones(2), "0.231")):
        figures, _ = reward_model_figures(margin, gold)
        close_to_the_best({"gpt": [], "sft": [], "reward_model": [figures]}, [])
        lines = table_of(capsys.readouterr().out, "How close to the best")
        above_chance = rf"reward model, accuracy above chance +0\.000 ± \S+ +{possible} +0\.0 ± "
        assert re.match(above_chance, lines[2])


def test_tables_fit_100_columns(capsys):
    """A table that the terminal wraps as soon as its figures have two digits before the point, or a
    policy a name."""
    M = 16
    samples = {}
    log_ratios = {}
    for k, name in enumerate(["sft", "ppo-beta0", "dpo"]):
        N = 128 if name == "sft" else 64
        reward = -12 + 9 * noise(k, M, 1) + noise(k + 10, M, N)
        gold = -12 + 9 * noise(20 + k, M, 1) + noise(20 + k + 10, M, N)
        samples[name] = {"reward": reward, "gold": gold, "length": torch.full((M, N), 128.0),
                         "ended": torch.ones(M, N)}
        log_ratios[name] = 12 + 9 * noise(40 + k, M, 1, 1) + noise(50 + k, M, N, 3)
        log_ratios[name][:, :, 0] = 0

    per_prompt = {}
    for name, n in (("sft", 1), ("best of 16", 16), ("best of 64", 64), ("ppo-beta0", 1),
                    ("dpo", 1)):
        x = samples.get(name, samples["sft"])
        figures = best_of_n_figures(x, ["a b c"] * x["reward"].numel(), n, x["reward"])
        figures["win_rate"] = 1 - torch.tensor([0.0, 0.3]).repeat(M // 2)
        figures["kl"] = log_ratios["dpo"][:, :, 2].mean(dim=1)
        per_prompt[name] = figures

    rows = [dict(policy=name, **with_errors(figures)) for name, figures in per_prompt.items()]
    print_table(rows, FORMATS)
    pool = pool_samples(samples, log_ratios)
    for under, field in (("reward model", "reward"), ("gold", "gold")):
        optima = optimum(under, field, per_prompt, pool, beta=0.05)
        print_optimum(optima, pool, beta=0.05)
        rows += optima
    where_gold_is_lost(optima)
    accuracy, _ = reward_model_figures(noise(60, 100), noise(61, 100))
    loss = dict(held_out=12.345, entropy=10.123)
    close_to_the_best({"gpt": [loss], "sft": [loss], "reward_model": [accuracy]}, rows)
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
