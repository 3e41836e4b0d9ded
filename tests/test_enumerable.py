"""A world small enough to list every response: the exact optimum beside what the project's own
loops find.

Four ordinary tokens and an end token, at most three tokens to a response: 85 responses. π_ref is a
real GPT with random weights, the rewards are drawn once, and π*(y) = π_ref(y) exp(r(y)/β) / Z is
computed from the list.
"""

import itertools
import math
import random
from copy import deepcopy

import pytest
import torch

import dpo
import ppo
from best_of_n import best_of_n_kl, optimality_gap, top_per_prompt
from data.answer_key import pooled_optimum
from data.run import SilentRun
from gpt import GPT, generate, make_optimizer, masked_logprobs, pad, response_mask
from helpers import (BETA, END, LIMIT, PROMPT, RESPONSES, ROWS, UNFINISHED, Blocks, all_pairs,
                     bare_rollouts, enumerable_world, exact_logprobs, kl, make_model, optimize,
                     response_reward, table_reward, world_task)
from reward_model import RewardModel


def test_the_list_is_complete(world):
    """A list that lacks responses makes every 'exact' number below wrong; π_ref must also be far
    from uniform, and π* from π_ref."""
    _, ref, _, best, _ = world
    assert ref.exp().sum().item() == pytest.approx(1, abs=1e-6)
    assert kl(ref, torch.full_like(ref, -math.log(len(ref)))) > 0.3
    assert kl(ref, best) >= 0.5


def trained(reference, rewards, method, draw_documents=None, **flags):
    """log π(y|x) of all responses, after a copy of the reference was trained by one of ppo.py's
    methods with these flags."""
    settings = dict(beta=BETA, max_new_tokens=LIMIT, missing_end_score=rewards[-1].item(),
                    rollouts=512, micro_batch=512)
    settings.update(flags)
    config = ppo.Config(method=method, **settings)
    policy = deepcopy(reference)
    task = world_task(table_reward(rewards), draw_documents=draw_documents)
    optimize(policy, reference, make_model(RewardModel, seed=1), task, config)
    return exact_logprobs(policy)


@pytest.mark.parametrize("method, bound, flags", [
    ("ppo", 0.03, dict(iterations=18, minibatch=128, epochs=2, lr=2e-3, value_lr=4e-3, lam=0.95)),
    ("ppo_penalty", 0.03, dict(iterations=14, minibatch=128, epochs=2, lr=2e-3, value_lr=4e-3)),
    ("a2c", 0.03, dict(iterations=50, lr=2.5e-3, value_lr=5e-3)),
    ("rloo", 0.03, dict(iterations=50, lr=3e-3, group=8)),
    ("grpo_kl_in_rewards", 0.03,
     dict(iterations=32, minibatch=256, epochs=2, lr=2.5e-3, group=8))])
def test_who_finds_the_boltzmann_policy(world, method, bound, flags):
    """A method with a wrong sign, shift, mask, bootstrap or baseline still raises the reward; only
    a right one ends at π*.

    GRPO does so with the KL in the rewards and without the division, its mean per response
    notwithstanding. For where E_π[Â/|y| ∇log π(y)] = 0, and π can be anything, Â/|y| is the same
    for all responses: 0, as the mean of Â is 0; and where r - β log π/π_ref is the same for all, π
    is π*.
    """
    reference, ref, rewards, best, J_star = world
    found = trained(reference, rewards, method, **flags)
    print(f"\n{method}: KL(π || π*) {kl(ref, best):.3f} → {kl(found, best):.3f} nats")
    J = (found.exp() * (rewards - BETA * (found - ref))).sum().item()
    assert J_star - J == pytest.approx(BETA * kl(found, best), abs=1e-5)
    assert kl(found, best) <= bound


def test_reinforce_and_its_baseline(world):
    """The lecture's "if reward is +5, is this good? what if the average is +10?": with 6 added to
    every reward π* is the same, and the mean of the batch takes them off again. Without a baseline
    the same samples, of which nearly all are pushed up, bring a policy only part of the way: a
    difference of noise, for the expected gradient is the same."""
    reference, ref, rewards, best, _ = world
    plain, baselined = (kl(trained(reference, rewards + 6, method, iterations=45, lr=2e-3), best)
                        for method in ("reinforce", "reinforce_baseline"))
    print(f"\nKL(π || π*) {kl(ref, best):.3f} → reinforce {plain:.3f}, reinforce_baseline "
          f"{baselined:.3f} nats")
    assert baselined <= 0.03 < 0.06 < plain < kl(ref, best)


def test_several_passes_need_the_ratio_and_the_clip(world, monkeypatch):
    """The lecture's way to PPO, one step at a time, at 8 passes over each batch. Without the ratio
    the samples are another policy's from the second step on; with the ratio alone nothing stops a
    step that goes too far on the same few samples."""
    reference, _, rewards, best, _ = world
    distances = {}

    def without_ratio(logprobs, old_logprobs, advantages, mask, clip):
        return ppo.policy_gradient_loss(logprobs, advantages, mask), 0.0

    for name, clip in (("no ratio", 0.2), ("the ratio", 1e9), ("ratio and clip", 0.2)):
        with monkeypatch.context() as patch:
            if name == "no ratio":
                patch.setattr(ppo, "clipped_policy_loss", without_ratio)
            found = trained(reference, rewards, "ppo", iterations=7, rollouts=256, minibatch=64,
                            micro_batch=64, epochs=8, lr=2e-3, value_lr=4e-3, clip=clip)
        distances[name] = kl(found, best)
    figures = ", ".join(f"{name} {x:.3f}" for name, x in distances.items())
    print(f"\nKL(π || π*) after 8 passes over each batch: {figures}")
    assert distances["ratio and clip"] < 0.2
    assert min(distances["no ratio"], distances["the ratio"]) > 0.3


class AnyToken:
    """An end token that every token equals: then a response is one token, and has a reward of its
    own."""

    def __eq__(self, tokens):
        return torch.ones_like(tokens, dtype=torch.bool)


def zero_of(increasing, low, high):
    """Where increasing functions of tensors, a number each, are 0, by bisection."""
    for _ in range(100):
        middle = (low + high) / 2
        above = increasing(middle) > 0
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return low


@pytest.mark.parametrize("method", ["grpo_no_division", "grpo", "grpo_kl_in_rewards"])
def test_where_grpo_ends(world, method):
    """GRPO as published does not aim at π*. Where it ends, for responses of one token:

    k3 = π_ref/π - log π_ref/π - 1, so ∇k3 = (1 - π_ref/π) ∇log π. The samples are π's, and Σ_y π
    ∇log π = 0: E[∇k3] = -Σ_y π_ref ∇log π = ∇KL(π_ref || π), the other direction. Let f(y) be the
    mean of y's advantage over the G - 1 others of its group. Training stands still where Σ_y [π f +
    β π_ref] ∇log π = 0: for a softmax, where the bracket is λ π. Summed over y, λ = β, as the
    advantages of a group sum to 0. So

        π(y) = β π_ref(y) / (β - f(y)).

    Without the division f = (1 - 1/G)(r - E_π[r]), for y itself is in the mean. With β' = β
    G/(G-1), λ = β' + E_π[r]:

        π(y) = β' π_ref(y) / (λ - r(y)),        λ > max r such that it sums to 1.

    With the division f depends on π, that has drawn the group. In the limit of large groups
    f = (r - E_π[r])/σ_π: the reward in units of its own deviation, or β σ_π for β, the smaller the
    surer the policy. For G = 4 the 125 groups are listed, and the equation is solved by following
    d log π = f - β + β π_ref/π.

    With the KL in the rewards and no division, f = (1 - 1/G)(r - β log π/π_ref - J): π*, for every
    G.
    """
    G = 4
    beta = 0.5
    reference = world[0]
    rewards = torch.tensor([1.0, 0.0, -1.0, 0.5, -0.5]).double()
    with torch.no_grad():
        ref = reference(torch.tensor([PROMPT]))[0, -1].double().log_softmax(0)
    best = (ref + rewards / beta).log_softmax(0)
    harmonic = beta * G / (G - 1)
    low = rewards.max()
    level = zero_of(lambda level: 1 - (harmonic * ref.exp() / (level - rewards)).sum(),
                    low, low + harmonic)
    without = (harmonic * ref.exp() / (level - rewards)).log()

    if method == "grpo_kl_in_rewards":
        target = best
    else:
        others = torch.tensor(list(itertools.product(range(5), repeat=G - 1)))  # (125, 3)
        first = rewards[:, None, None].expand(5, 125, 1)
        groups = torch.cat([first, rewards[others].expand(5, 125, 3)], dim=2)
        advantage = groups[..., 0] - groups.mean(dim=2)  # (5, 125): of the first
        if method == "grpo":
            deviation = groups.std(dim=2, correction=0)
            advantage = advantage / (deviation + (deviation == 0))
        target = ref
        for _ in range(2000):
            f = advantage @ target.exp()[others].prod(dim=1)
            step = f - beta + beta * (ref - target).exp()
            target = (target + 0.05 * step).log_softmax(0)
        assert (target.exp() * step).abs().max() < 1e-9
        assert (kl(target, without) < 1e-9) == (method == "grpo_no_division")
        assert kl(target, best) > 0.03

    policy = deepcopy(reference)
    config = ppo.Config(method=method, group=G, beta=beta, iterations=30, rollouts=512, epochs=1,
                        minibatch=256, micro_batch=256, lr=4e-3, max_new_tokens=1)
    reward = response_reward(lambda response: rewards[response[0]])
    optimize(policy, reference, None, world_task(reward, AnyToken()), config)
    with torch.no_grad():
        found = policy(torch.tensor([PROMPT]))[0, -1].double().log_softmax(0)
    print(f"\n{method}: {kl(found, target):.4f} nats from its fixed point, {kl(found, best):.4f} "
          f"from π*; π = {[round(p, 3) for p in found.exp().tolist()]}")
    assert kl(found, target) <= 0.003


def test_where_ppo_ptx_ends(world, monkeypatch):
    """Documents weighed against rewards by another divisor than the responses', or by γ/β: each has
    an optimum of its own. Eq. 2 of Ouyang et al., with documents PROMPT + y, y ~ q, is

        F(π) = E_π[r] - β KL(π || π_ref) + γ Σ_y q(y) log π(y),     concave in π.

    dF/dπ(y) = λ gives β log π(y) - γ q(y)/π(y) = r(y) + β log π_ref(y) - λ, whose left side
    increases with π(y); λ is such that π sums to 1. Both are found by bisection. The divisor: a
    minibatch has B responses of N tokens, B documents, and divides both sums by N. So the one has
    the mean B/N ∇(E_π[r] - β KL), the other B/N ∇ γ E_q[log π(y)].

    A document's tokens are all learnt, PROMPT's second one too: always the same, so soon certain,
    in a state where no response is. Nothing is whitened, which would weigh the rewards by what it
    divides by, and λ = 1 leaves the gradient without a bias.
    """
    reference, ref, rewards, best, _ = world
    gamma = 0.5
    generator = torch.Generator().manual_seed(9)
    log_q = 1.5 * torch.randn(len(ROWS), generator=generator, dtype=torch.float64)
    log_q = log_q.log_softmax(0)
    low = torch.full_like(ref, -60.0)
    high = torch.full_like(ref, 5.0)

    def policy_at(level):
        def slope(x):
            return BETA * x - gamma * (log_q - x).exp() - rewards - BETA * ref + level
        return zero_of(slope, low, high)

    level = zero_of(lambda level: 1 - policy_at(level).exp().sum(),
                    *torch.tensor([-50.0, 50.0]).double())
    optimum = policy_at(level)

    def objective(logp):
        reward = logp.exp() * (rewards - BETA * (logp - ref))
        return (reward + gamma * log_q.exp() * logp).sum().item()

    for _ in range(20):
        step = 0.01 * torch.randn(len(ROWS), generator=generator, dtype=torch.float64)
        assert objective((optimum + step).log_softmax(0)) < objective(optimum)

    def draw_documents(count, rng):
        return rng.choices(ROWS, log_q.exp().tolist(), k=count)

    monkeypatch.setattr(ppo, "whiten", lambda x, mask: torch.where(mask, x, 0.0))
    found = trained(reference, rewards, "ppo", draw_documents, ptx=gamma, iterations=40,
                    rollouts=256, minibatch=128, epochs=2, lr=3e-3, value_lr=5e-3, lam=1.0)
    print(f"\nPPO-ptx: KL(π || optimum) {kl(ref, optimum):.3f} → {kl(found, optimum):.3f} nats; "
          f"KL(π || π*) {kl(found, best):.3f}")
    assert kl(found, optimum) <= 0.03 < 0.12 < min(kl(optimum, best), kl(best, optimum))


def test_variance_of_the_gradient():
    """The lecture's table of what may stand in R(y)'s place, in numbers: an advantage that is paid
    for with a bias that it should not have (a baseline that knows the action, a V that λ < 1
    trusts), or that lowers no variance.

    One response's estimate of the gradient is Σ_t Â_t ∇log π(a_t|s_t). The trace of its covariance,
    and how far its mean is from ∇J, are exact: of all 85 responses, with the gradients of all 105
    log-probabilities. Where Â depends on other responses too, 1500 batches of 8 are drawn, and the
    trace is 8 times that of the batch's mean. Two layers and β = 0.5, as in assets/figures.json.

    The lecture's order holds, from the total reward over the reward to go, a baseline and V down to
    the TD residual, with two exceptions. A baseline of few samples has noise of its own:
    leave-one-out of 8 is noisier than the mean of the batch, which buys that with a bias, 1/8 of
    the gradient; and where the mean return is near 0 it is noisier than no baseline. And a V that
    is wrong by half a reward unit in every state is worse at λ = 1 than an average that costs
    nothing; what a smaller λ saves with it is paid for with a bias of a quarter of the gradient,
    and of half.
    """
    B = 8
    M = 1500
    reference, _, rewards, _, _ = enumerable_world(n_layer=2)
    reference = reference.double()
    policy = make_model(GPT, seed=5, n_layer=2).double()
    tokens, lengths = pad(ROWS)
    prompt_lengths = torch.full_like(lengths, len(PROMPT))
    mask = response_mask(prompt_lengths, lengths, tokens.shape[1])  # (85, T-1)
    states = []  # 21
    for n in range(LIMIT):
        states += [PROMPT + list(words) for words in itertools.product(range(4), repeat=n)]
    state = torch.zeros(mask.shape, dtype=torch.long)
    for row, t in mask.nonzero().tolist():
        state[row, t] = states.index(ROWS[row][:t + 1])
    action = 5 * state + tokens[:, 1:]  # (85, T-1): which of the 105
    prefixes, ends = pad(states)
    logprobs = policy(prefixes)[range(len(states)), ends - 1].log_softmax(dim=1).flatten()
    gradients = []
    for logprob in logprobs:
        parts = torch.autograd.grad(logprob, list(policy.parameters()), retain_graph=True)
        gradients.append(torch.cat([x.flatten() for x in parts]))
    gradients = torch.stack(gradients)
    gram = gradients @ gradients.T  # (105, 105)
    with torch.no_grad():
        logprobs = masked_logprobs(policy, tokens, mask).double()
        ref_logprobs = masked_logprobs(reference, tokens, mask).double()
    p = logprobs.sum(dim=1).exp()
    weights = p[:, None] * mask

    def coefficients(advantages, rows=slice(None)):
        """(rows, 105): what each log-probability's gradient is multiplied by."""
        found = torch.zeros(len(advantages), len(gram)).double()
        return found.scatter_add(1, action[rows], advantages * mask[rows])

    def table(rewards):
        """{estimate: (variance, bias)}, in units of |∇J|² and |∇J|."""
        r = ppo.shaped_rewards(rewards, logprobs, ref_logprobs, mask, beta=0.5)
        G = ppo.returns_to_go(r, mask, 1.0)
        total = r.sum(dim=1, keepdim=True).expand_as(r)
        true = p @ coefficients(total)  # ∇J: the policy gradient theorem
        sums = torch.zeros(2, len(states)).double()
        sums.index_add_(1, state.flatten(), torch.stack([weights * G, weights]).flatten(1))
        V = sums[0] / sums[1]  # E[G_t | s]
        wrong = V + 0.5 * torch.randn(len(V), generator=torch.Generator().manual_seed(0)).double()
        figures = {}

        def add(name, c, probabilities, size=1):
            mean = probabilities @ c
            squares = ((c - mean) @ gram * (c - mean)).sum(dim=1)
            squared_bias = ((mean - true) @ gram @ (mean - true)).clamp(min=0)
            unit = true @ gram @ true
            figures[name] = ((size * (probabilities @ squares) / unit).item(),
                             (squared_bias / unit).sqrt().item())

        def estimate(method, rows=slice(None), mean=0.0, group=1):
            config = ppo.Config(method=method, group=group)
            return ppo.estimate_advantages(r[rows], bare_rollouts(mask[rows]), mean, config)[0]

        add("total reward", coefficients(total), p)
        add("reward to go", coefficients(estimate("reinforce")), p)
        average = ((weights * G).sum() / weights.sum()).item()
        add("- moving average, settled",
            coefficients(estimate("reinforce_moving", mean=average)), p)

        draws = p.multinomial(B * M, replacement=True, generator=torch.Generator().manual_seed(1))
        even = torch.full((M,), 1 / M).double()
        A = torch.cat([estimate("reinforce_baseline", rows) for rows in draws.split(B)])
        add("- mean of the batch of 8", coefficients(A, draws).view(M, B, -1).mean(dim=1), even, B)
        A = estimate("rloo", draws, group=B)
        add("- mean of the 7 others", coefficients(A, draws).view(M, B, -1).mean(dim=1), even, B)
        for name, values in (("exact V", V), ("wrong V", wrong)):
            for lam in (1.0, 0.95, 0.5, 0.0):
                A, _ = ppo.gae(r, values[state], mask, 1.0, lam)
                add(f"GAE, {name}, λ = {lam:g}", coefficients(A), p)
        pairs = torch.cartesian_prod(torch.arange(len(ROWS)), torch.arange(len(ROWS)))
        rows = pairs.flatten()  # all batches of 2
        c = coefficients(estimate("rloo", rows, group=2), rows).view(len(pairs), 2, -1)
        add("- the other one of 2", c.mean(dim=1), p[pairs].prod(dim=1), 2)
        return figures

    figures = table(rewards)        # a mean return of -1.7
    centred = table(rewards + 2)    # and of 0.3
    print(f"\n{'in units of |∇J|² and |∇J|':26s}  variance    bias   "
          "variance with 2 added to every reward")
    for name, (variance, bias) in figures.items():
        noise = ""
        if " of the " in name:
            noise = f"   bias ± {math.sqrt(variance / B / M):.1%}: sampled"
        print(f"{name:26s}  {variance:8.1f}  {bias:6.1%}   {centred[name][0]:8.1f}{noise}")

    variance = {name: figure for name, (figure, _) in figures.items()}
    bias = {name: figure for name, (_, figure) in figures.items()}
    order = ["total reward", "reward to go", "- mean of the 7 others", "- moving average, settled",
             "GAE, exact V, λ = 1", "GAE, exact V, λ = 0.95", "GAE, exact V, λ = 0.5",
             "GAE, exact V, λ = 0"]
    assert sorted(order, key=variance.get, reverse=True) == order
    wrong = [f"GAE, wrong V, λ = {lam}" for lam in ("1", "0.95", "0.5", "0")]
    assert sorted(wrong, key=variance.get, reverse=True) == wrong == sorted(wrong, key=bias.get)
    assert bias[wrong[3]] > 0.1
    sampled = math.sqrt(variance["- mean of the 7 others"] / B / M)
    assert bias["- mean of the 7 others"] < 2 * sampled
    assert abs(bias["- mean of the batch of 8"] - 1 / B) < 2 * sampled
    for name in order + [wrong[0], "- the other one of 2"]:
        assert bias[name] < 1e-5 or name == "- mean of the 7 others"
    # The exceptions.
    settled = variance["- moving average, settled"]
    assert variance["- mean of the batch of 8"] < settled < variance[wrong[0]]
    assert centred["- mean of the 7 others"][0] > centred["reward to go"][0]


def fitted(reference, pairs, rng, **flags):
    """A copy of the reference, trained by dpo.py's loop for all losses of pairs."""
    policy = deepcopy(reference)
    optimizer = make_optimizer(policy, weight_decay=0.0)
    config = dpo.Config(**{"lr": 3e-3, "batch": 256, "micro_batch": 256, **flags})
    dpo.fit_pairs(policy, reference, pairs, [], optimizer, config, rng, SilentRun())
    return policy, config


def test_dpo_finds_the_same_policy(world):
    """The lecture's claim that DPO and RLHF share one optimum; averaged log-probs or a lost <|end|>
    would move DPO's."""
    reference, _, rewards, best, _ = world
    copies = 4
    pairs = all_pairs(rewards, copies)
    policy = deepcopy(reference)
    run = SilentRun()
    config = dpo.Config(epochs=4, batch=256, micro_batch=256, lr=3e-3, beta=BETA)
    dpo.dpo(policy, reference, pairs, pairs[::4000], config, Blocks(0, copies), run)
    figures, = run.rows
    print(f"\ndpo: KL(π || π*) {kl(exact_logprobs(policy), best):.4f}")
    assert figures["step"] == 4 * math.ceil(len(pairs) / 256)
    assert figures["loss"] < math.log(2)
    assert kl(exact_logprobs(policy), best) <= 0.02


def test_ipo_finds_another_policy(world):
    """IPO with a mean for the sum, or with another target than 1/(2β), ends elsewhere. Where it
    should end:

    Let u = log π/π_ref, c = 1/(2β), p = P(y ≻ y'). A pair's expected loss, p (u(y) - u(y') - c)² +
    (1-p) (u(y') - u(y) - c)², is (u(y) - u(y') - c (2p - 1))² + const. With all pairs equally
    often, the gradient by u(y) is 0 where Σ_y' [u(y) - u(y') - c (2p(y ≻ y') - 1)] = 0, that is
    u(y) = c · mean over y' of (2p(y ≻ y') - 1) + const. The mean is over all 85 responses, y itself
    among them with 2p - 1 = 0: over the 84 others c would have to be 84/85 of it.
    """
    reference, ref, rewards, dpos, _ = world
    copies = 2
    beta = 0.25
    p = torch.sigmoid(rewards[:, None] - rewards)
    best = (ref + (2 * p - 1).mean(dim=1) / (2 * beta)).log_softmax(0)
    policy, _ = fitted(reference, all_pairs(rewards, copies), Blocks(0, copies), loss="ipo",
                       epochs=5, beta=beta)
    print(f"\nipo: {kl(exact_logprobs(policy), best):.4f} from its optimum, DPO's "
          f"{kl(dpos, best):.3f}, the reference {kl(ref, best):.3f}")
    assert kl(exact_logprobs(policy), best) <= 0.01 < 0.1 < min(kl(ref, best), kl(dpos, best))


def test_certain_labels_run_away_with_dpo_and_not_with_ipo(world):
    """The lecture's claim: where the label is always the same, σ(margin) → 1 has no finite optimum
    and β no say, while IPO's log-ratios stop 1/(2β) apart. A square around another target, or a
    logistic loss, does not."""
    reference, _, rewards, _, _ = world
    order = rewards.argsort(descending=True).tolist()
    pairs = []  # no response is in two of them
    for i, j in zip(order[:8], order[-8:]):
        pairs.append(dpo.Pair(ROWS[i], ROWS[j], len(PROMPT)))

    def log_ratios_apart(loss, beta, epochs):
        policy, config = fitted(reference, pairs, random.Random(0), loss=loss, epochs=epochs,
                                beta=beta, batch=8)
        with torch.no_grad():
            found, figures = dpo.pair_loss(policy, reference, pairs, config)
        return figures["margin"].item() / beta, found.item()

    for beta in (0.5, 0.1):
        short, _ = log_ratios_apart("dpo", beta, epochs=60)
        long, _ = log_ratios_apart("dpo", beta, epochs=240)
        assert long > 1.25 * short > 1.25 * 1.5 / (2 * beta)
        # IPO's loss is the mean square of the distance to 1/(2β).
        mean, loss = log_ratios_apart("ipo", beta, epochs=240)
        assert mean == pytest.approx(1 / (2 * beta), rel=0.02)
        assert loss < (0.05 / (2 * beta)) ** 2


def test_value_model_learns_the_expected_return(world):
    """A value read one column off, or bootstrapped past the end, learns another function than
    E[return | prefix]."""
    reference, ref, rewards, _, _ = world
    policy = make_model(GPT, seed=5)
    value_model = make_model(RewardModel, seed=1)
    logprobs = exact_logprobs(policy)
    config = ppo.Config(iterations=30, rollouts=512, epochs=3, minibatch=128, micro_batch=128,
                        lr=0.0, value_lr=5e-3, beta=BETA, lam=1.0, value_clip=100.0,
                        max_new_tokens=LIMIT, missing_end_score=UNFINISHED)
    optimize(policy, reference, value_model, world_task(table_reward(rewards)), config)
    assert torch.equal(exact_logprobs(policy), logprobs)

    def ratio(inside):
        """log π/π_ref of a prefix's tokens, of the responses that begin with it."""
        return logprobs[inside].logsumexp(0) - ref[inside].logsumexp(0)

    exact = []
    values = []
    weights = []
    for n in range(LIMIT):
        for words in itertools.product(range(4), repeat=n):
            prefix = PROMPT + list(words)
            inside = torch.tensor([row[:len(prefix)] == prefix for row in ROWS])
            rest = (logprobs - ref)[inside] - ratio(inside)  # of the tokens from here on
            p = logprobs[inside].exp()
            exact.append((p * (rewards[inside] - BETA * rest)).sum() / p.sum())
            weights.append(p.sum())
            with torch.no_grad():
                values.append(value_model(torch.tensor([prefix]))[0, -1].double())
    exact, values, weights = (torch.stack(x) for x in (exact, values, weights))
    error = (weights * (values - exact) ** 2).sum()
    spread = (weights * (exact - exact[0]) ** 2).sum()  # exact[0]: the mean return
    print(f"\nvalue model: error {error:.4f}, spread {spread:.3f}")
    assert spread > 0.1 and error < 0.05 * spread


def test_optimality_identity_is_exact(world):
    """J* - J = β KL(π||π*): a β too many, or the log-ratio upside down, and 'distance to the
    optimum' is noise."""
    _, ref, rewards, best, J_star = world
    # A policy whose probabilities are whole numbers: each response is drawn as often as that.
    counts = torch.randint(0, 4, (len(ROWS),), generator=torch.Generator().manual_seed(1))
    samples = torch.repeat_interleave(torch.arange(len(ROWS)), counts)
    policy = (counts.double() / counts.sum()).log()
    J, _ = optimality_gap(rewards[samples][None], (policy - ref)[samples][None], BETA)
    kept = counts > 0
    expected = BETA * kl(policy[kept], best[kept])
    assert J_star - J.item() == pytest.approx(expected, abs=1e-9)


def test_the_estimates_of_the_optimum_agree(world):
    """A policy that dropped modes underestimates Z from its own samples; pooled with the
    reference's it must not."""
    _, ref, rewards, best, J_star = world
    M = 40
    N = 1000
    generator = torch.Generator().manual_seed(0)
    lost = RESPONSES[int(best.argmax())][0]
    kept = torch.tensor([response[0] != lost for response in RESPONSES])
    narrow = torch.where(kept, best, -math.inf).log_softmax(0)  # π* without one first token
    draws = []
    for logp in (ref, narrow):
        p = logp.exp().expand(M, -1)
        draws.append(p.multinomial(N, replacement=True, generator=generator))
    pooled = torch.cat(draws, dim=1)
    none = torch.zeros_like(pooled, dtype=torch.float64)
    log_ratios = torch.stack([none, (narrow - ref)[pooled]], dim=2)
    estimates, kls = pooled_optimum(rewards[pooled], log_ratios, BETA)
    _, own = optimality_gap(rewards[draws[1]], (narrow - ref)[draws[1]], BETA)
    assert own.max() < J_star - 0.1
    assert abs(kls.mean().item() - kl(best, ref)) < 4 * kls.std().item() / math.sqrt(M) + 0.01
    assert abs(estimates.mean().item() - J_star) < 4 * estimates.std().item() / math.sqrt(M) + 0.005


def test_best_of_n_has_its_exact_law(world):
    """The law of best-of-N, P(y) = F(y)^N - F(<y)^N, against the project's sampler and selection;
    the KL bound holds."""
    reference, ref, rewards, _, _ = world
    rewards = rewards + 1e-6 * torch.arange(len(ROWS))  # no ties
    order = rewards.argsort()
    cumulative = ref.exp()[order].cumsum(0)
    n = 4
    groups = 2000
    law = torch.zeros_like(ref)
    law[order] = cumulative ** n - torch.cat([torch.zeros(1), cumulative[:-1]]) ** n
    assert kl(law.log(), ref) <= best_of_n_kl(n)
    rollout = generate(reference, [PROMPT] * n * groups, LIMIT, END, seed=0)
    scores, _ = table_reward(rewards)(rollout)
    drawn = scores.view(groups, n)
    won = drawn.gather(1, top_per_prompt(drawn)[:, None])
    error = won.std().item() / math.sqrt(groups)
    assert abs(won.mean().item() - (law * rewards).sum().item()) < 4 * error
    # In the limit of many responses, all rare, the bound is tight.
    many = torch.arange(1, 100_001, dtype=torch.float64) / 100_000
    law = many ** n - torch.cat([torch.zeros(1), many[:-1]]) ** n
    even = torch.full_like(law, -math.log(100_000))
    assert kl(law.log(), even) == pytest.approx(best_of_n_kl(n), abs=1e-4)


def test_kl_estimators(world):
    """KL with the ratio upside down is unbiased for nothing; by enumeration k1 and k3 are unbiased,
    k2 is not."""
    _, ref, _, best, _ = world
    true = kl(best, ref)
    p = best.exp()
    figures = {}
    for name, k in zip(("k1", "k2", "k3"), ppo.kl_estimators(best - ref)):
        mean = (p * k).sum().item()
        figures[name] = (mean, (p * (k - mean) ** 2).sum().sqrt().item(), k.min().item())
    print(f"\nKL(π* || π_ref) = {true:.3f} nats\n      mean    bias  standard deviation  smallest")
    for name, (mean, deviation, smallest) in figures.items():
        bias = round(mean - true, 3) + 0.0
        print(f"{name}  {mean:6.3f}  {bias:6.3f}  {deviation:18.3f}  {smallest:8.3f}")
    assert figures["k1"][0] == pytest.approx(true, abs=1e-9)
    assert figures["k3"][0] == pytest.approx(true, abs=1e-6)
    assert abs(figures["k2"][0] - true) > 0.05
    near = (0.99 * ref + 0.01 * best).log_softmax(0)
    for k in ppo.kl_estimators(near - ref):  # where they are small, k2 too is right
        assert (near.exp() * k).sum().item() == pytest.approx(kl(near, ref), rel=0.05)
    assert figures["k1"][2] < 0 <= min(figures["k2"][2], figures["k3"][2])
