"""The answer key: how good the best policy and the best reward model could be, and our share of it.

The objective J(π) = E_π[r] - β KL(π || π_ref) has its maximum at

    π*(y|x) = π_ref(y|x) exp(r(x, y)/β) / Z(x)          J* = β log Z(x)

(CS 224R, Lecture 9, ch. 7). For y ~ π put w = r(x, y)/β - log π(y|x)/π_ref(y|x). Then J = β E[w]
and Z(x) = E_π[exp w], so β (log mean exp w - mean w) = β KL(π || π*) >= 0: samples of a policy give
its objective and its distance from the optimum.

Tensors in, numbers out: nothing in this file knows what a GPT is. There are M prompts, with N
samples of one policy; in a pool of K policies, with S samples together.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from data.table import Column, print_columns

# --------------------------------------------------------------------------------------------------
# The optimum of the objective


def optimality_gap(rewards, log_ratios, beta):
    """A policy's objective and its own estimate of the optimum, from its own samples, by prompt.

    rewards, log_ratios (M, N): r(x, y) and log π(y|x)/π_ref(y|x) of N samples y ~ π for each of M
    prompts. Returns (J, J_star), each (M,): J = β E[w] and J* = β log Z = β log E[exp w],
    w = r/β - log π/π_ref. J* - J = β KL(π || π*). A policy that dropped modes never samples them
    and underestimates J*: compare with the reference's own estimate (log_ratios = 0), or use
    pooled_optimum.
    """
    w = rewards / beta - log_ratios
    return beta * w.mean(dim=1), beta * (w.logsumexp(dim=1) - math.log(w.shape[1]))


def pooled_log_weights(rewards, log_ratios, beta, counts=None):
    """log w of samples from several policies, (M, S), such that

        Z(x) = Σ_i w_i     and     E_π*[f] = Σ_i w_i f(y_i) / Σ_i w_i

    The balance heuristic (Veach & Guibas 1995). rewards (M, S): S samples a prompt, n_k of them
    from policy k of K, the reference among them; counts: the n_k (None: equally many from each);
    log_ratios (M, S, K): log π_k(y|x)/π_ref(y|x) of every sample under every policy. All come from
    the mixture Σ_k n_k/S π_k, so Z = E_mixture[exp(r/β) π_ref/mixture]: no sample can weigh more
    than exp(r/β)/n_ref.
    """
    _, S, K = log_ratios.shape
    if counts is None:
        counts = [S / K] * K
    log_counts = torch.tensor(counts, dtype=log_ratios.dtype).log()
    return rewards / beta - (log_ratios + log_counts).logsumexp(dim=2)  # 1/S exp(r/β) π_ref/mixture


def pooled_optimum(rewards, log_ratios, beta, counts=None):
    """J* = β log Z(x) and KL(π* || π_ref), each (M,), from samples of several policies. Arguments:
    see pooled_log_weights."""
    log_weights = pooled_log_weights(rewards, log_ratios, beta, counts)
    log_z = log_weights.logsumexp(dim=1)
    optimum_rewards = log_weights.softmax(dim=1) * rewards / beta
    kl = optimum_rewards.sum(dim=1) - log_z  # E_π*[log π*/π_ref] = E_π*[r]/β - log Z
    return beta * log_z, kl


def judged_optimum(gold, rewards, log_ratios, beta, counts=None):
    """The exact optimum π* of one reward, judged by another: J under gold = E_π*[gold] -
    β KL(π* || π_ref).

    gold (M, S); the rest: see pooled_log_weights. Returns (J, the weights' effective sample size
    out of S), each (M,).
    """
    weights = pooled_log_weights(rewards, log_ratios, beta, counts).softmax(dim=1)
    _, kl = pooled_optimum(rewards, log_ratios, beta, counts)
    effective_samples = 1 / (weights ** 2).sum(dim=1)  # (Σw)²/Σw², Σw = 1
    return (weights * gold).sum(dim=1) - beta * kl, effective_samples


def verified_optimum(p, beta):
    """The best policy for a reward of 1 (with probability p under the reference) or 0: (J*, its own
    probability of 1).

    Z = E_ref[exp(r/β)] = 1 - p + p e^{1/β}, J* = β log Z, and π* is right with probability
    p e^{1/β}/Z (CS 224R, ch. 7). Right responses count three times here, Z = 0.75 + 0.25 · 3:

    >>> J_star, right = verified_optimum(0.25, 1 / math.log(3))
    >>> round(J_star * math.log(3), 3), right
    (0.405, 0.5)
    """
    if p == 0:
        return 0.0, 0.0
    wrong = math.exp(-1 / beta) if beta else 0.0
    z = p + (1 - p) * wrong  # Z e^{-1/β}: Z itself overflows for a small β
    return 1 + beta * math.log(z), p / z


# --------------------------------------------------------------------------------------------------
# Estimates from samples


def subset_weights(rewards, n):
    """Of all subsets of n out of a prompt's N samples, the share in which each sample is the best:
    (M, N) -> (M, N).

    So Σ_i weight_i x_i is the mean of x over all best-of-n's. Equal rewards share what they win;
    for n = 1 each weight is 1/N.

    >>> rewards = torch.tensor([[0.7, 0.3, 0.5, 0.2], [0.4, 0.8, 0.8, 0.5]])
    >>> (6 * subset_weights(rewards, 2)).round(decimals=1).tolist()
    [[3.0, 1.0, 2.0, 0.0], [0.0, 2.5, 2.5, 1.0]]
    """
    N = rewards.shape[1]
    ordered = rewards.sort(dim=1).values
    worse = torch.searchsorted(ordered, rewards)                    # (M, N): how many are worse
    not_better = torch.searchsorted(ordered, rewards, right=True)   # ... worse or equal

    # P(all n are among k given ones) = C(k, n) / C(N, n)
    among = [math.comb(k, n) / math.comb(N, n) for k in range(N + 1)]
    among = torch.tensor(among, dtype=rewards.dtype)
    return (among[not_better] - among[worse]) / (not_better - worse)


def pass_at_k(correct, n, k):
    """P(at least one of k samples is right), from `correct` right ones of n samples, without bias:
    1 - C(n - c, k)/C(n, k), the share of all subsets of k that hold one (Chen et al. 2021, eq. 1).

    >>> pass_at_k(1, 4, 1), pass_at_k(1, 4, 2), pass_at_k(0, 4, 4)
    (0.25, 0.5, 0.0)
    """
    return 1 - math.comb(n - correct, k) / math.comb(n, k)


def win_rate(gold, opponents):
    """P(gold of ours > gold of theirs) + ½ P(equal) of each sample against all opponents:
    (M, N), (M, K) -> (M, N)."""
    ours = gold[:, :, None]
    theirs = opponents[:, None, :]
    return ((ours > theirs).float() + 0.5 * (ours == theirs).float()).mean(dim=2)


def best_of_n_win_rate(rewards, gold, n):
    """Best-of-n's win rate against one more sample of the policy it draws from: rewards, gold
    (M, N), N > n -> (M,).

    The mean over every sample as the opponent and every subset of n of the others: none plays
    against itself, and none is only ever on one side. Best of 1 has exactly ½, since every pair
    meets both ways round.
    """
    N = gold.shape[1]
    rates = []
    for j in range(N):
        others = torch.arange(N) != j
        weights = subset_weights(rewards[:, others], n)
        wins = win_rate(gold[:, others], gold[:, j:j + 1])
        rates.append((weights * wins).sum(dim=1))
    return torch.stack(rates).mean(dim=0)


def process_scores(rewards, steps):
    """{rule: score (B,)} of responses, from their steps' rewards r_k: the smallest; the product of
    σ(r_k), which is the probability that all are good (Lightman et al. 2023), as a logarithm; the
    sum, an estimate of gold_reward + 0.5. rewards, steps (B, T): 0 except where a step ends."""
    return {"smallest": torch.where(steps, rewards, math.inf).amin(dim=1),
            "product": torch.where(steps, F.logsigmoid(rewards), 0.0).sum(dim=1),
            "sum": rewards.sum(dim=1)}


def selection_figures(rewards, kept):
    """What a selection favours: rewards (M, N), kept (K, 2), rows (prompt, completion) -> a dict.

    prompts: how many have a response among the kept; most: the most that one has; reward, spread:
    mean and standard deviation of the kept rewards; prompts_reward: the mean of all N responses to
    a kept one's prompt, and all_reward of all prompts: equal for the best per prompt, the first one
    larger if easy prompts are favoured (ECE 7115).
    """
    prompt, completion = kept.unbind(dim=1)
    best = rewards[prompt, completion]
    count = prompt.bincount()
    return {"prompts": (count > 0).sum().item(),
            "most": count.max().item(),
            "reward": best.mean().item(),
            "spread": best.std(correction=0).item(),
            "prompts_reward": rewards.mean(dim=1)[prompt].mean().item(),
            "all_reward": rewards.mean().item()}


def best_of_n_figures(figures, texts, n, judged):
    """The figures of best-of-n over a policy's samples, prompt by prompt: {figure: (M,)}; n = 1: of
    the policy itself. figures: {figure: (M, N)}; texts: M·N, prompt by prompt; judged (M, N): the
    scores by which the best is chosen.

    Means over all subsets of n of a prompt's samples; distinct_2, of the best of each prompt's
    first n, is one number, (1,).
    """
    weights = subset_weights(judged, n)
    means = {}
    for name, x in figures.items():
        means[name] = (weights * x).sum(dim=1)  # E[x of the best of n] = Σ_i weight_i x_i

    N = judged.shape[1]
    winners = judged[:, :n].argmax(dim=1).tolist()
    best_texts = [texts[N * prompt + j] for prompt, j in enumerate(winners)]
    means["distinct_2"] = torch.tensor([distinct_2(best_texts)])
    return means


def distinct_2(texts):
    """Different pairs of neighbouring words over all pairs: 1 if no two words ever meet twice."""
    pairs = []
    for text in texts:
        words = text.split()
        pairs += zip(words, words[1:])
    return len(set(pairs)) / max(1, len(pairs))


def mean_and_error(x):
    """The mean over prompts, x (M,), and its standard error (None for a single prompt)."""
    if len(x) == 1:
        return x.item(), None
    return x.mean().item(), standard_error(x)


def with_errors(figures):
    """{name: (M,)} -> {name: its mean, name_error: its standard error over prompts}."""
    means = {}
    for name, x in figures.items():
        means[name], means[f"{name}_error"] = mean_and_error(x)
    return means


def share_and_error(part, way):
    """mean(part) / mean(way) over prompts, both (M,), and the standard error of this ratio of two
    means (delta method). An estimate: it may exceed 1. (None, None) if there is no way to go."""
    if not way.mean() > 0:
        return None, None
    share = part.mean() / way.mean()
    _, error = mean_and_error((part - share * way) / way.mean())
    return share.item(), error


def standard_error(x):
    """The standard error of the mean of x (N,), 0 for a single number."""
    return (x.std() / math.sqrt(len(x))).item() if len(x) > 1 else 0.0


# --------------------------------------------------------------------------------------------------
# The reward model beside the best possible one


def reward_model_figures(margin, gold_margin):
    """How far a reward model is from the best one, on pairs whose true rewards are known.

    margin, gold_margin (N,): r(y_w) - r(y_l) of the model and of the annotator. Returns (figures,
    calibration_table), figures a dict:

    accuracy                    share of labels that the model guesses
    expected_accuracy           its expectation over the annotator's noise, E P(the model's choice):
                                the same thing with less variance, and what Bayes accuracy bounds
    bayes_accuracy              E σ(|Δgold|): the true reward's own accuracy on labels this noisy
    share_of_bayes              expected_accuracy / Bayes
    above_chance                (expected_accuracy - 0.5) / (Bayes - 0.5), because a coin is right
                                half of the time
    loss, annotator_loss        Bradley-Terry's; the annotator's own is its entropy,
                                E[-σ log σ - (1-σ) log(1-σ)]
    correlation, slope          of Δreward = slope · Δgold, least squares through the origin: a pair
                                counts in both orders, so both means are 0
    ..._error                   standard errors over the pairs
    """
    p = torch.sigmoid(gold_margin.double())
    agreed = torch.where(margin > 0, p, 1 - p)  # P(the annotator agrees with the model)
    best = torch.maximum(p, 1 - p)              # ... with the true reward
    figures = {
        "accuracy": (margin > 0).double().mean().item(),
        "expected_accuracy": agreed.mean().item(),
        "expected_accuracy_error": standard_error(agreed),
        "bayes_accuracy": best.mean().item(),
    }

    for name, chance in (("share_of_bayes", 0.0), ("above_chance", 0.5)):
        ours = agreed - chance
        most = best - chance
        share = (ours.mean() / most.mean().clamp(min=1e-9)).item()
        error = standard_error(ours - share * most)  # of a ratio of two means (delta method)
        figures[name] = share
        figures[f"{name}_error"] = error / max(most.mean().item(), 1e-9)

    norms = margin.norm() * gold_margin.norm()
    product = margin @ gold_margin
    figures["loss"] = -F.logsigmoid(margin.double()).mean().item()
    figures["annotator_loss"] = (torch.special.entr(p) + torch.special.entr(1 - p)).mean().item()
    figures["correlation"] = (product / norms.clamp(min=1e-9)).item()
    figures["slope"] = (product / (gold_margin @ gold_margin).clamp(min=1e-9)).item()
    return figures, calibration_table(margin)


def calibration_table(margin, bins=10):
    """How often a response that should win with probability p does: a list of (pairs, their mean
    p, the share that won), one for each bin of p that has any pairs. margin (N,): r(y_w) - r(y_l)
    of the model; a pair counts in both orders."""
    predicted = torch.sigmoid(torch.cat([margin, -margin]))
    won = torch.cat([torch.ones_like(margin), torch.zeros_like(margin)])
    bin_of = (predicted * bins).long().clamp(max=bins - 1)
    table = []
    for b in range(bins):
        inside = bin_of == b
        if inside.any():
            pairs = int(inside.sum())
            table.append((pairs, predicted[inside].mean().item(), won[inside].mean().item()))
    return table


def print_answer_key(figures, table):
    """Print what reward_model_figures found."""
    accuracy = cell(figures["expected_accuracy"], figures["expected_accuracy_error"])
    print(f"held-out accuracy {figures['accuracy']:.3f}, without the labels' noise {accuracy}; "
          f"Bayes {figures['bayes_accuracy']:.3f}")
    print(f"        {figures['share_of_bayes']:.1%} ± {figures['share_of_bayes_error']:.1%} of it; "
          f"above chance {figures['above_chance']:.1%} ± {figures['above_chance_error']:.1%}")
    print(f"loss {figures['loss']:.3f}, the annotator's own {figures['annotator_loss']:.3f}; "
          f"Δreward against Δgold: correlation {figures['correlation']:.3f}, "
          f"slope {figures['slope']:.3f}")
    print("calibration   pairs  predicted  observed")
    for pairs, predicted, observed in table:
        print(f"           {pairs:8d}  {predicted:9.3f}  {observed:8.3f}")


# --------------------------------------------------------------------------------------------------
# Tables


def cell(x, error=None, form=".3f"):
    """A figure and its standard error: "1.205 ± 0.021", "89.3 ± 0.9 %"; a whole number has no
    error, None is "-"."""
    if x is None:
        return "-"
    if error is None or ".0" in form:
        text = f"{x:{form}}"
    else:
        text = f"{x:{form}} ± {error:{form}}"
    if form.endswith("%"):
        return text.replace("%", "") + " %"
    return text


def print_table(rows, formats):
    """Print rows, dicts with a "policy" and figures, in columns: those of formats, each with its
    figure_error."""
    columns = [name for name in formats if name in rows[0]]
    lines = [[""] + columns]
    for row in rows:
        cells = [cell(row.get(name), row.get(f"{name}_error"), formats[name]) for name in columns]
        lines.append([row["policy"]] + cells)

    widths = []
    for i in range(len(columns) + 1):
        widths.append(max(len(line[i]) for line in lines))
    for line in lines:
        cells = [text.rjust(width) for text, width in zip(line[1:], widths[1:])]
        print("  ".join([line[0].ljust(widths[0])] + cells))


# --------------------------------------------------------------------------------------------------
# The yardstick's tables. per_prompt has the figures of every policy, best-of-N included, prompt by
# prompt: {policy: {figure: (M,)}}, "reward", "kl" and, if there is an annotator, "gold" among them;
# SFT, the reference, comes first. Rows are dicts, as they are printed and go to metrics.jsonl;
# under says by which reward.

FORMATS = {"reward": ".2f", "gold": ".2f", "win_rate": ".1%", "kl": ".2f", "length": ".0f",
           "distinct_2": ".2f", "ended": ".0%"}


def print_selection(figures, M, N, dropped):
    """Print the selection_figures of the M best of N responses to each of M prompts; dropped: a
    sentence about those that can't be learnt from."""
    print(f"kept    {M:,} of {M * N:,} responses, for {figures['prompts']:,} of {M:,} prompts, "
          f"at most {figures['most']} for one\n"
          f"        {dropped}\n"
          f"        reward {figures['reward']:.2f}, spread {figures['spread']:.2f}; of all "
          f"responses to these prompts {figures['prompts_reward']:.2f}, of all "
          f"{figures['all_reward']:.2f}", flush=True)


class Pool(NamedTuple):
    """The samples of K policies for M prompts put together, S a prompt: policy by policy."""
    names: list                 # the policies, the reference first
    counts: list                # how many of the S samples each of them gave
    scores: dict                # {"reward": (M, S), "gold": (M, S) if there is an annotator}
    log_ratios: torch.Tensor    # (M, S, K): log π_k/π_ref of every sample under every policy


def pool_samples(figures, log_ratios):
    """The Pool of all samples. figures: {policy: {figure: (M, N)}}, "reward" and "gold" among them;
    log_ratios: {policy: (M, N, K)}, of its samples under every policy."""
    names = list(figures)
    counts = [log_ratios[name].shape[1] for name in names]
    scores = {}
    for field in ("reward", "gold"):
        if field in figures[names[0]]:
            scores[field] = torch.cat([figures[name][field] for name in names], dim=1)
    return Pool(names, counts, scores, torch.cat([log_ratios[name] for name in names], dim=1))


def optimum(under, field, per_prompt, pool, beta):
    """How far each policy went from SFT to the optimum of J: a list of rows, one a policy.

    under: the name of the reward that judges; field: its key, "reward" or "gold". The share is
    split: share is what the policy gets; left_by_policy the rest of the way to the reward model's
    exact optimum, lost_to_reward_model from there to J*. own_J_star is a policy's own estimate of
    J*, None for best-of-N, whose density is not known.
    """
    judged = pool.scores[field]
    J_star, J_star_kl = pooled_optimum(judged, pool.log_ratios, beta, pool.counts)
    J_model, effective_samples = judged_optimum(
        judged, pool.scores["reward"], pool.log_ratios, beta, pool.counts)
    best = with_errors({"J_star": J_star, "J_star_kl": J_star_kl, "reward_model_J": J_model,
                        "effective_samples": effective_samples})

    own_J_star = {}
    own_scores = judged.split(pool.counts, dim=1)
    own_ratios = pool.log_ratios.split(pool.counts, dim=1)
    for k, name in enumerate(pool.names):
        _, estimate = optimality_gap(own_scores[k], own_ratios[k][:, :, k], beta)
        own_J_star[name] = estimate.mean().item()

    rows = []
    J_sft = per_prompt["sft"][field]  # (M,): its KL is 0
    for name, figures in per_prompt.items():
        J = figures[field] - beta * figures["kl"]  # (M,): J = E[r] - β KL(π || π_ref)
        row = {"under": under, **best, "policy": name, **with_errors({"J": J})}
        parts = {"share": J - J_sft,
                 "left_by_policy": J_model - J,
                 "lost_to_reward_model": J_star - J_model}
        for part, distance in parts.items():
            row[part], row[f"{part}_error"] = share_and_error(distance, J_star - J_sft)
        row["own_J_star"] = own_J_star.get(name)
        rows.append(row)
    return rows


def print_optimum(rows, pool, beta):
    """Print the rows of optimum."""
    best = rows[0]
    print(f"\nunder the {best['under']}, beta {beta}: "
          f"J* = {cell(best['J_star'], best['J_star_error'])}, "
          f"{cell(best['J_star_kl'], best['J_star_kl_error'], '.2f')} nats from the reference")
    print(f"(J* = beta log Z, from the {sum(pool.counts)} samples a prompt of "
          f"{', '.join(pool.names)} pooled)")
    print_table(rows, {"J": ".3f", "share": ".1%", "own_J_star": ".3f"})

    estimates = [best["J_star"]]
    for row in rows:
        if row["own_J_star"] is not None:
            estimates.append(row["own_J_star"])
    print("the estimates of J*, pooled and of each policy's own, lie within "
          f"{max(estimates) - min(estimates):.3f}")


def where_gold_is_lost(rows):
    """Print the parts of the way from SFT to J* under gold: what a policy got, what it left of that
    which the reward model's exact optimum gets, and what no optimizer of this reward model can get.
    rows: optimum's, SFT first, which left all of it. Best-of-N's J is a lower bound; DPO optimizes
    the labels, not this reward model."""
    sft = rows[0]
    reachable = cell(sft["left_by_policy"], sft["left_by_policy_error"], ".1%")
    J = cell(sft["reward_model_J"], sft["reward_model_J_error"])
    print("\nwhere gold is lost, of the way from SFT to J*: the reward model's exact optimum gets "
          f"{reachable}")
    print(f"(J = {J} under gold; effective sample size of its weights: "
          f"{sft['effective_samples']:.0f} a prompt)")
    print_table(rows, {"share": ".1%", "left_by_policy": ".1%", "lost_to_reward_model": ".1%"})


def verified_rows(figures, per_prompt, beta):
    """How often each policy is right, how often one of 16 of its responses is (pass@16, from the
    counts), and its J under the verifier beside J*: (a list of rows, how often the optimum is
    right, (M,)). J* is exact given how often SFT is right on each prompt.

    figures: {policy: {figure: (M, N)}}, among them "verified", 1 for a right response, else 0.
    """
    J_sft = figures["sft"]["verified"].mean(dim=1)  # (M,): its KL is 0
    optima = torch.tensor([verified_optimum(p, beta) for p in J_sft.tolist()])
    J_star, right = optima.unbind(dim=1)  # each (M,)

    rows = []
    for name in figures:
        correct = figures[name]["verified"]
        N = correct.shape[1]
        kl = per_prompt[name]["kl"]
        J = correct.mean(dim=1) - beta * kl
        means = {"verified": correct.mean(dim=1), "J": J}
        if N >= 16:
            passed = [pass_at_k(int(count), N, 16) for count in correct.sum(dim=1)]
            means["pass_16"] = torch.tensor(passed)
        means["kl"] = kl
        means["J_star"] = J_star
        row = {"under": "verifier", "policy": name, **with_errors(means)}
        row["share"], row["share_error"] = share_and_error(J - J_sft, J_star - J_sft)
        rows.append(row)
    return rows, right


def print_verified(rows, right, beta):
    """Print what verified_rows found."""
    J_star = cell(rows[0]["J_star"], rows[0]["J_star_error"])
    print(f"\nunder the verifier, beta {beta}: J* = {J_star}, from how often SFT is right on each "
          f"prompt;\nthe optimum is right {cell(*mean_and_error(right), '.1%')}")
    print_table(rows, {"verified": ".1%", "pass_16": ".1%", "kl": ".2f", "J": ".3f",
                       "share": ".1%"})


def frontier(under, field, pool):
    """The frontier that no policy can cross, more of the field at less KL: a row for every β from
    0.05 to 6.4 with KL(π*β || π_ref), E_π*β[reward] and E_π*β[gold]. Arguments as optimum's. If few
    effective_samples are left, the estimate is poor."""
    rows = []
    for k in range(15):
        beta = 0.05 * 2 ** (k / 2)
        log_weights = pooled_log_weights(pool.scores[field], pool.log_ratios, beta, pool.counts)
        weights = log_weights.softmax(dim=1)  # π*β(y_i|x)
        _, kl = pooled_optimum(pool.scores[field], pool.log_ratios, beta, pool.counts)

        figures = {name: (weights * x).sum(dim=1) for name, x in pool.scores.items()}
        figures["kl"] = kl
        figures["effective_samples"] = 1 / (weights ** 2).sum(dim=1)
        rows.append({"under": under, "policy": "frontier", "beta": beta, **with_errors(figures)})
    return rows


def print_frontier(rows):
    """Print every other row of frontier, those of a β and of its doubles, the ones under the reward
    model beside those under gold, if there is any."""
    columns = []
    for under in dict.fromkeys(row["under"] for row in rows):
        found = [row for row in rows if row["under"] == under][::2]
        if not columns:
            columns.append(Column("β", [row["beta"] for row in found], ".2f"))
        columns.append(Column(f"{under}:", [""] * len(found)))
        for name, form in (("kl", ".2f"), ("reward", ".2f"), ("gold", ".2f"),
                           ("effective_samples", ".0f")):
            if name in found[0]:
                heading = name.replace("effective_samples", "n_eff")
                columns.append(Column(heading, [row[name] for row in found], form))
    print("\nthe frontier that no policy can cross: the exact optimum of each reward for every β, "
          "from greedy\n(β → 0) to the reference (β → ∞): CS 224R, ch. 7, \"KL Penalty Effect\"; "
          "n_eff: effective samples")
    print_columns(columns)


def last_with(rows, *names):
    """The last row with all these figures, or None."""
    for row in reversed(rows):
        if all(name in row for name in names):
            return row
    return None


def close_row(what, rows, measured, possible, share=None, chance=0.0):
    """A stage's line of close_to_the_best, from the last row that has both figures: a list of one
    dict, or of none. share: the name of the share, if it is not possible / measured; chance: what
    guessing gets, subtracted from both."""
    row = last_with(rows, measured, possible)
    if row is None:
        return []
    x = row[measured] - chance
    best = row[possible] - chance
    return [{"policy": what, "measured": x, "measured_error": row.get(f"{measured}_error"),
             "possible": best, "share": row[share] if share else best / x,
             "share_error": row.get(f"{share}_error")}]


def close_to_the_best(stages, rows):
    """Print for every stage what was measured, what is possible, and the share. stages: {stage: its
    rows}; rows: optimum's and verified_rows', others are ignored."""
    table = close_row("pretraining, nats per token", stages["gpt"], "held_out", "entropy")
    table += close_row("SFT, nats per token", stages["sft"], "held_out", "entropy")
    pairs = stages["reward_model"]
    table += close_row("reward model, accuracy", pairs, "expected_accuracy", "bayes_accuracy",
                       share="share_of_bayes")
    table += close_row("reward model, accuracy above chance", pairs, "expected_accuracy",
                       "bayes_accuracy", share="above_chance", chance=0.5)
    table += close_row("reward model, loss", pairs, "loss", "annotator_loss")

    for row in rows:
        if row.get("share") is not None and row["policy"] != "sft":
            table.append({"policy": f"{row['policy']}, J under {row['under']}",
                          "measured": row["J"], "measured_error": row["J_error"],
                          "possible": row["J_star"], "possible_error": row["J_star_error"],
                          "share": row["share"], "share_error": row["share_error"]})
    if table:
        print("\nHow close to the best")
        print_table(table, {"measured": ".3f", "possible": ".3f", "share": ".1%"})


def compare_policies(figures, texts, log_ratios, judges, kls):
    """Every policy's figures, prompt by prompt, in the order of the table: SFT, best-of-N among its
    samples, the other policies. Returns per_prompt: {policy: {figure: (M,)}}.

    figures, log_ratios: see pool_samples; texts: {policy: M·N texts, prompt by prompt}; judges:
    {name: scores (M, N) of SFT's samples} by which best-of-N chooses, "" for the reward model; kls:
    {N: KL of best-of-N}.
    """
    sft = figures["sft"]
    per_prompt = {"sft": best_of_n_among(sft, texts["sft"], 1, sft["reward"], 0.0)}
    for n, kl in kls.items():
        for name, judged in judges.items():
            policy = f"best of {n}, {name}" if name else f"best of {n}"
            per_prompt[policy] = best_of_n_among(sft, texts["sft"], n, judged, kl)

    for k, name in enumerate(figures):
        if name != "sft":
            means = best_of_n_figures(figures[name], texts[name], 1, figures[name]["reward"])
            means["kl"] = log_ratios[name][:, :, k].mean(dim=1)
            if "gold" in sft:
                means["win_rate"] = win_rate(figures[name]["gold"], sft["gold"]).mean(dim=1)
            per_prompt[name] = means
    return per_prompt


def best_of_n_among(figures, texts, n, judged, kl):
    """best_of_n_figures, with best-of-n's KL and its win rate against the policy that it chooses
    from."""
    means = best_of_n_figures(figures, texts, n, judged)
    means["kl"] = torch.full((len(judged),), kl)
    if "gold" in figures:
        means["win_rate"] = best_of_n_win_rate(judged, figures["gold"], n)
    return means


def best_of_n_rows(figures, texts, kls):
    """Best-of-N by the reward model for every N of kls, {N: KL}: a list of rows, not printed."""
    rows = []
    for n, kl in kls.items():
        means = best_of_n_among(figures, texts, n, figures["reward"], kl)
        rows.append({"under": "best of N", "policy": f"best of {n}", **with_errors(means)})
    return rows


def print_yardstick(per_prompt, figures, log_ratios, losses, stages, beta):
    """Print the yardstick's tables. Returns all their rows, and all of the frontier's.

    figures, log_ratios: see pool_samples; losses: {policy: nats per token of the pretraining text},
    {} if unknown; stages: see close_to_the_best.
    """
    pool = pool_samples(figures, log_ratios)
    rows = []
    for name, x in per_prompt.items():
        rows.append({"policy": name, **with_errors(x)})
    print()
    print_table(rows, FORMATS)

    if losses:
        text = ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
        print(f"\npretraining loss: {text} nats a token")
        for name, loss in losses.items():
            rows.append({"under": "pretraining", "policy": name, "loss": loss})

    judges = {"reward model": "reward"}
    if "gold" in pool.scores:
        judges["gold"] = "gold"
    for under, field in judges.items():
        optima = optimum(under, field, per_prompt, pool, beta)
        print_optimum(optima, pool, beta)
        rows += optima
    if "verified" in figures["sft"]:
        verified, right = verified_rows(figures, per_prompt, beta)
        print_verified(verified, right, beta)
        rows += verified
    ladder = []
    for under, field in judges.items():
        ladder += frontier(under, field, pool)
    print_frontier(ladder)
    if "gold" in pool.scores:
        where_gold_is_lost(optima)
        close_to_the_best(stages, rows)
    return rows + ladder
