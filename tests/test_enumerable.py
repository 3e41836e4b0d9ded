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
from gpt import (GPT, generate, make_optimizer, masked_logprobs, optimizer_step, pad, response_mask)
from helpers import (BETA, END, ENDED, LIMIT, PROMPT, RESPONSES, ROWS, Blocks, all_pairs,
                     bare_rollouts, exact_logprobs, kl, make_model, noise, optimize,
                     response_reward, table_reward, world_config, world_task)
from reward_model import RewardModel

TOKENS, LENGTHS = pad(ROWS)
MASK = response_mask(torch.full_like(LENGTHS, len(PROMPT)), LENGTHS, TOKENS.shape[1])  # (85, T-1)
STATES = [row[:-1] for row in ROWS[:len(ENDED)]]  # 21
STATE = torch.zeros(MASK.shape, dtype=torch.long)  # (85, T-1): which of the 21
for row, t in MASK.nonzero().tolist():
    STATE[row, t] = STATES.index(ROWS[row][:t + 1])
ACTION = 5 * STATE + TOKENS[:, 1:]  # (85, T-1): which of the 105


def token_logprobs(policy):
    """log π(a_t|s_t) of all responses, in float64: (85, T-1)."""
    return masked_logprobs(policy, TOKENS, MASK).double()


def mean_by(index, x, weights):
    """The weighted mean of x for each value of index, and the weights' sums."""
    sums = torch.zeros(2, int(index.max()) + 1).double()
    sums.index_add_(1, index.flatten(), torch.stack([weights * x, weights]).flatten(1))
    return sums[0] / sums[1], sums[1]


def flat_gradient(x, model):
    """The gradient of x by all parameters, as one vector."""
    parts = torch.autograd.grad(x, list(model.parameters()), retain_graph=True)
    return torch.cat([part.flatten() for part in parts])


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
    policy = deepcopy(reference)
    task = world_task(table_reward(rewards), draw_documents=draw_documents)
    optimize(policy, reference, make_model(RewardModel, seed=1), task,
             world_config(method=method, missing_end_score=rewards[-1].item(), **flags))
    return exact_logprobs(policy)


@pytest.mark.parametrize("method, flags", [
    ("ppo", {}), ("ppo_penalty", dict(iterations=14)), ("a2c", dict(iterations=32)),
    ("rloo", dict(iterations=40, group=8)), ("grpo_kl_in_rewards", dict(group=8))])
def test_who_finds_the_boltzmann_policy(world, method, flags):
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
    assert kl(found, best) <= 0.03


def test_reinforce_and_its_baseline(world):
    """The lecture's "if reward is +5, is this good? what if the average is +10?": with 6 added to
    every reward π* is the same, and the mean of the batch takes them off again. Without a baseline
    the same samples, of which nearly all are pushed up, bring a policy only part of the way: a
    difference of noise, for the expected gradient is the same."""
    reference, ref, rewards, best, _ = world
    plain, baselined = (kl(trained(reference, rewards + 6, method, iterations=40), best)
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
            found = trained(reference, rewards, "ppo", iterations=6, rollouts=256, epochs=8,
                            lr=4e-3, value_lr=8e-3, clip=clip)
        distances[name] = kl(found, best)
    figures = ", ".join(f"{name} {x:.3f}" for name, x in distances.items())
    print(f"\nKL(π || π*) after 8 passes over each batch: {figures}")
    assert distances["ratio and clip"] < 0.2
    assert min(distances["no ratio"], distances["the ratio"]) > 0.3


def test_the_ratio_of_whole_responses_is_exact(world):
    """A ratio upside down. E_old[ρ A ∇log π] is the new policy's gradient where ρ is the ratio of
    the whole response. PPO's ρ_t is that of one token and leaves out how often its state is reached
    and what follows: how far that is from it. The rewards are the old policy's, V its exact value.
    """
    reference, _, rewards, _, _ = world
    policy = make_model(GPT, seed=5)
    old_logprobs = token_logprobs(policy).detach()
    old = old_logprobs.sum(dim=1, keepdim=True).exp()  # (85, 1)
    r = ppo.shaped_rewards(rewards, old_logprobs, token_logprobs(reference).detach(), MASK, BETA)
    V, _ = mean_by(STATE, ppo.returns_to_go(r, MASK, 1.0), old * MASK)
    A, _ = ppo.gae(r, V[STATE], MASK, gamma=1.0, lam=1.0)
    optimizer = make_optimizer(policy, weight_decay=0.0)

    print("\nsteps  KL(π_old || π)  bias of ρ(y)  of ρ_t")
    for step in range(9):
        logprobs = token_logprobs(policy)
        ratio = (logprobs - old_logprobs).sum(dim=1, keepdim=True).exp()  # ρ(y)
        loss, _ = ppo.clipped_policy_loss(logprobs, old_logprobs, old * A, MASK, clip=1e9)
        true = flat_gradient((old * ratio * r).sum(), policy)  # of Σ_y π(y) R(y)
        whole = flat_gradient((old * ratio.detach() * A * logprobs).sum(), policy)
        per_token = flat_gradient(-MASK.sum() * loss, policy)
        whole, per_token = (((g - true).norm() / true.norm()).item() for g in (whole, per_token))
        if step in (0, 1, 2, 4, 8):
            distance = kl(old_logprobs.sum(dim=1), logprobs.sum(dim=1))
            print(f"{step:5d}  {distance:14.3f}  {whole:12.1%}  {per_token:6.1%}")
        assert whole < 1e-4
        assert per_token < 1e-4 if step == 0 else per_token > 0.01
        loss.backward()
        optimizer_step(optimizer, policy, 3e-4)


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


@pytest.mark.parametrize("method", ["grpo_no_division", "grpo"])
def test_where_grpo_ends(world, method):
    """GRPO as published does not aim at π*. Where it ends, for responses of one token:

    ∇k3 = (1 - π_ref/π) ∇log π, and Σ_y π ∇log π = 0: on π's samples E[∇k3] = -Σ_y π_ref ∇log π =
    ∇KL(π_ref || π), the other direction. With f(y) the mean of y's advantage over the others of its
    group, training stands still where Σ_y [π f + β π_ref] ∇log π = 0: where the bracket is λ π.
    Summed over y, λ = β, as a group's advantages sum to 0: π(y) = β π_ref(y) / (β - f(y)).

    Without the division f = (1 - 1/G)(r - E_π[r]), so with β' = β G/(G-1) π(y) = β' π_ref(y) / (λ -
    r(y)), λ > max r such that it sums to 1. With the division f depends on π, that has drawn the
    group; of large groups f = (r - E_π[r])/σ_π, or β σ_π for β, the smaller the surer the policy.
    For G = 4 the 125 groups are listed, and the equation is solved by following d log π = f - β +
    β π_ref/π.
    """
    G = 4
    beta = 0.5
    reference = world[0]
    rewards = torch.tensor([1.0, 0.0, -1.0, 0.5, -0.5]).double()

    def one_token(policy):
        with torch.no_grad():
            return policy(torch.tensor([PROMPT]))[0, -1].double().log_softmax(0)

    ref = one_token(reference)
    best = (ref + rewards / beta).log_softmax(0)
    weights = beta * G / (G - 1) * ref.exp()  # β' π_ref
    level = zero_of(lambda level: 1 - (weights / (level - rewards)).sum(),
                    rewards.max(), rewards.max() + weights.sum())
    without = (weights / (level - rewards)).log()

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
    config = world_config(method=method, group=G, beta=beta, max_new_tokens=1)
    reward = response_reward(lambda response: rewards[response[0]])
    optimize(policy, reference, None, world_task(reward, AnyToken()), config)
    found = one_token(policy)
    print(f"\n{method}: {kl(found, target):.4f} nats from its fixed point, {kl(found, best):.4f} "
          f"from π*; π = {[round(p, 3) for p in found.exp().tolist()]}")
    assert kl(found, target) <= 0.003


def test_where_ppo_ptx_ends(world, monkeypatch):
    """Documents weighed against rewards by another divisor than the responses', or by γ/β: each has
    an optimum of its own. Eq. 2 of Ouyang et al., with documents PROMPT + y, y ~ q, is

        F(π) = E_π[r] - β KL(π || π_ref) + γ Σ_y q(y) log π(y),     concave in π.

    dF/dπ(y) = λ gives β log π(y) - γ q(y)/π(y) = r(y) + β log π_ref(y) - λ, whose left side
    increases with π(y), and λ is such that π sums to 1: bisection. Both losses of a minibatch are
    sums over B responses or documents, by the responses' tokens. Nothing is whitened, which would
    weigh the rewards by what it divides by, and λ = 1 leaves the gradient without a bias.
    """
    reference, ref, rewards, best, _ = world
    gamma = 0.5
    log_q = (1.5 * noise(9, len(ROWS)).double()).log_softmax(0)

    def policy_at(level):
        def slope(x):
            return BETA * x - gamma * (log_q - x).exp() - rewards - BETA * ref + level
        return zero_of(slope, torch.full_like(ref, -60.0), torch.full_like(ref, 5.0))

    level = zero_of(lambda level: 1 - policy_at(level).exp().sum(),
                    *torch.tensor([-50.0, 50.0]).double())
    optimum = policy_at(level)

    def objective(logp):
        reward = logp.exp() * (rewards - BETA * (logp - ref))
        return (reward + gamma * log_q.exp() * logp).sum().item()

    for seed in range(20):
        step = 0.01 * noise(seed, len(ROWS))
        assert objective((optimum + step).log_softmax(0)) < objective(optimum)

    def draw_documents(count, rng):
        return rng.choices(ROWS, log_q.exp().tolist(), k=count)

    monkeypatch.setattr(ppo, "whiten", lambda x, mask: torch.where(mask, x, 0.0))
    found = trained(reference, rewards, "ppo", draw_documents, ptx=gamma, iterations=28, lam=1.0)
    print(f"\nPPO-ptx: KL(π || optimum) {kl(ref, optimum):.3f} → {kl(found, optimum):.3f} nats; "
          f"KL(π || π*) {kl(found, best):.3f}")
    assert kl(found, optimum) <= 0.03 < 0.12 < min(kl(optimum, best), kl(best, optimum))


def test_variance_of_the_gradient(world):
    """The lecture's table of what may stand in R(y)'s place, in numbers: an advantage that is paid
    for with a bias that it should not have (a baseline that knows the action, a V that λ < 1
    trusts), or that lowers no variance.

    One response's estimate of the gradient is Σ_t Â_t ∇log π(a_t|s_t). The trace of its covariance,
    and how far its mean is from ∇J, are exact: of all 85 responses, with the gradients of all 105
    log-probabilities. Where Â depends on other responses too, 1500 batches of 8 are drawn, and the
    trace is 8 times that of the batch's mean. Two layers and β = 0.5, as in assets/figures.json.

    The lecture's order holds, but a baseline of few samples has noise of its own: leave-one-out of
    8 is noisier than the mean of the batch, which is biased by 1/8 of the gradient, and where the
    mean return is near 0 than no baseline. And a V that is wrong by half a reward unit in every
    state is worse at λ = 1 than an average that costs nothing; a smaller λ saves with it what a
    bias of half the gradient pays for.
    """
    B = 8
    M = 1500
    beta = 0.5
    steps = {1: "TD residual Â^(1)", 2: "Â^(2)", 4: "Â^(4)"}
    reference = make_model(GPT, seed=3, n_layer=2, n_embd=32)
    with torch.no_grad():
        reference.wte.weight *= 1.5
    policy = make_model(GPT, seed=5, n_layer=2, n_embd=32).double()
    prefixes, ends = pad(STATES)
    every = policy(prefixes)[range(len(STATES)), ends - 1].log_softmax(dim=1).flatten()  # (105,)
    gradients = torch.stack([flat_gradient(x, policy) for x in every])
    gram = gradients @ gradients.T  # (105, 105)
    logprobs = token_logprobs(policy).detach()
    ref_logprobs = token_logprobs(reference.double()).detach()
    p = logprobs.sum(dim=1).exp()
    weights = p[:, None] * MASK

    def coefficients(advantages, rows=slice(None)):
        """(rows, 105): what each log-probability's gradient is multiplied by."""
        found = torch.zeros(len(advantages), len(gram)).double()
        return found.scatter_add(1, ACTION[rows], advantages * MASK[rows])

    def table(rewards):
        """{estimate: (variance, bias)}, in units of |∇J|² and |∇J|."""
        r = ppo.shaped_rewards(rewards, logprobs, ref_logprobs, MASK, beta)
        G = ppo.returns_to_go(r, MASK, 1.0)
        total = r.sum(dim=1, keepdim=True).expand_as(r)
        true = p @ coefficients(total)  # ∇J: the policy gradient theorem
        Q, _ = mean_by(ACTION, G, weights)  # E[G_t | s, a]
        V, _ = mean_by(STATE, G, weights)
        wrong = V + 0.5 * noise(0, len(V)).double()
        figures = {}

        # The log-derivative trick: ∇J by autograd, of Σ_y π(y) (r(y) - β log π(y)/π_ref(y)).
        logp = (every[ACTION] * MASK).sum(dim=1)
        J = (logp.exp() * (rewards - beta * (logp - ref_logprobs.sum(dim=1)))).sum()
        gradient = flat_gradient(J, policy)
        error = ((true @ gradients - gradient).norm() / gradient.norm()).item()

        def add(name, c, probabilities, size=1):
            mean = probabilities @ c
            squares = ((c - mean) @ gram * (c - mean)).sum(dim=1)
            squared_bias = ((mean - true) @ gram @ (mean - true)).clamp(min=0)
            unit = true @ gram @ true
            figures[name] = ((size * (probabilities @ squares) / unit).item(),
                             (squared_bias / unit).sqrt().item())

        def estimate(method, rows=slice(None), mean=0.0, group=1):
            config = ppo.Config(method=method, group=group)
            return ppo.estimate_advantages(r[rows], bare_rollouts(MASK[rows]), mean, config)[0]

        add("total reward", coefficients(total), p)
        add("reward to go", coefficients(estimate("reinforce")), p)
        add("Q, exact", coefficients(Q[ACTION]), p)
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
                A, _ = ppo.gae(r, values[STATE], MASK, 1.0, lam)
                add(f"GAE, {name}, λ = {lam:g}", coefficients(A), p)
            residuals = A  # λ = 0
            ahead = A
            for k in (1, 2, 3, 4):  # Â^(k) = δ_t + … + δ_{t+k-1}
                if k in steps:
                    add(f"{steps[k]}, {name}", coefficients(ahead), p)
                ahead = residuals + torch.nn.functional.pad(ahead[:, 1:], (0, 1))
        pairs = torch.cartesian_prod(torch.arange(len(ROWS)), torch.arange(len(ROWS)))
        rows = pairs.flatten()  # all batches of 2
        c = coefficients(estimate("rloo", rows, group=2), rows).view(len(pairs), 2, -1)
        add("- the other one of 2", c.mean(dim=1), p[pairs].prod(dim=1), 2)
        return figures, error

    rewards = world[2]
    figures, error = table(rewards)     # a mean return of -1.7
    centred, _ = table(rewards + 2)     # and of 0.3
    print(f"\n∇J by autograd of Σ_y π(y) R(y), and E[R ∇log π]: {error:.0e} apart\n"
          f"{'in units of |∇J|² and |∇J|':26s}  variance    bias   "
          "variance with 2 added to every reward")
    for name, (variance, bias) in figures.items():
        sampled = ""
        if " of the " in name:
            sampled = f"   bias ± {math.sqrt(variance / B / M):.1%}: sampled"
        print(f"{name:26s}  {variance:8.1f}  {bias:6.1%}   {centred[name][0]:8.1f}{sampled}")

    variance = {name: figure for name, (figure, _) in figures.items()}
    bias = {name: figure for name, (_, figure) in figures.items()}
    assert error < 1e-6
    order = ["total reward", "reward to go", "Q, exact", "- mean of the 7 others",
             "- moving average, settled", "GAE, exact V, λ = 1", "GAE, exact V, λ = 0.95",
             "GAE, exact V, λ = 0.5", "GAE, exact V, λ = 0"]
    assert sorted(order, key=variance.get, reverse=True) == order
    wrong = [f"GAE, wrong V, λ = {lam}" for lam in ("1", "0.95", "0.5", "0")]
    for names in (wrong, [f"{steps[k]}, wrong V" for k in (4, 2, 1)]):
        assert sorted(names, key=variance.get, reverse=True) == names == sorted(names, key=bias.get)
    for k, lam in ((1, 0), (4, 1)):  # the ends of λ
        for V in ("exact V", "wrong V"):
            gae = figures[f"GAE, {V}, λ = {lam}"]
            assert figures[f"{steps[k]}, {V}"] == pytest.approx(gae, abs=1e-6)
    assert bias[wrong[3]] > 0.1
    sampled = math.sqrt(variance["- mean of the 7 others"] / B / M)
    assert bias["- mean of the 7 others"] < 2 * sampled
    assert abs(bias["- mean of the batch of 8"] - 1 / B) < 2 * sampled
    for name in order + [wrong[0], "Â^(2), exact V", "- the other one of 2"]:
        assert bias[name] < 1e-5 or name == "- mean of the 7 others"
    settled = variance["- moving average, settled"]
    assert variance["- mean of the batch of 8"] < settled < variance[wrong[0]]
    assert centred["- mean of the 7 others"][0] > centred["reward to go"][0]


def fitted(reference, pairs, rng, **flags):
    """A copy of the reference, trained by dpo.py's loop for all losses of pairs; its figures at
    every step."""
    policy = deepcopy(reference)
    run = SilentRun(report=1)
    config = dpo.Config(**{"lr": 4e-3, "batch": 256, "micro_batch": 256, **flags})
    dpo.fit_pairs(policy, reference, pairs, [], make_optimizer(policy, weight_decay=0.0), config,
                  rng, run)
    return policy, run.rows


def test_dpo_finds_the_same_policy(world):
    """The lecture's claim that DPO and RLHF share one optimum; averaged log-probs or a lost <|end|>
    would move DPO's."""
    reference, ref, rewards, best, _ = world
    copies = 4
    pairs = all_pairs(rewards, copies)
    policy = deepcopy(reference)
    run = SilentRun()
    config = dpo.Config(epochs=4, batch=512, micro_batch=512, lr=5e-3, beta=BETA)
    dpo.dpo(policy, reference, pairs, pairs[::4000], config, Blocks(0, copies), run)
    figures, = run.rows
    found = exact_logprobs(policy)
    print(f"\ndpo: KL(π || π*) {kl(ref, best):.3f} → {kl(found, best):.4f} nats")
    assert figures["step"] == 4 * math.ceil(len(pairs) / 512)
    assert figures["loss"] < math.log(2)
    assert kl(found, best) <= 0.02


def test_ipo_finds_another_policy(world):
    """IPO with a mean for the sum, or with another target than 1/(2β), ends elsewhere. Where it
    should end: let u = log π/π_ref, c = 1/(2β), p = P(y ≻ y'). A pair's expected loss is (u(y) -
    u(y') - c (2p - 1))² + const. With all pairs equally often, its gradient by u(y) is 0 where u(y)
    = c · mean over y' of (2p - 1) + const: over all 85 responses, y itself among them with 0.
    """
    reference, ref, rewards, dpos, _ = world
    copies = 2
    beta = 0.25
    p = torch.sigmoid(rewards[:, None] - rewards)
    best = (ref + (2 * p - 1).mean(dim=1) / (2 * beta)).log_softmax(0)
    policy, _ = fitted(reference, all_pairs(rewards, copies), Blocks(0, copies), loss="ipo",
                       epochs=3, beta=beta)
    found = exact_logprobs(policy)
    print(f"\nipo: {kl(found, best):.4f} from its optimum, DPO's {kl(dpos, best):.3f}, the "
          f"reference {kl(ref, best):.3f}")
    assert kl(found, best) <= 0.01 < 0.1 < min(kl(ref, best), kl(dpos, best))


def test_certain_labels_run_away_with_dpo_and_not_with_ipo(world):
    """The lecture's claim: where the label is always the same, σ(margin) → 1 has no finite optimum
    and β no say, while IPO's log-ratios stop 1/(2β) apart. A square around another target, or a
    logistic loss, does not."""
    reference, _, rewards, _, _ = world
    order = rewards.argsort(descending=True).tolist()
    pairs = []  # no response is in two of them
    for i, j in zip(order[:8], order[-8:]):
        pairs.append(dpo.Pair(ROWS[i], ROWS[j], len(PROMPT)))

    print("\nlog-ratios apart after 20, 40 and 80 steps")
    for beta in (0.5, 0.1):
        limit = 1 / (2 * beta)
        apart = {}
        for loss in ("dpo", "ipo"):
            _, rows = fitted(reference, pairs, random.Random(0), loss=loss, epochs=80, beta=beta,
                             batch=8, lr=5e-3)
            apart[loss] = [rows[step - 1]["margin"] / beta for step in (20, 40, 80)]
            shown = ", ".join(f"{x:.2f}" for x in apart[loss])
            print(f"β = {beta}, 1/(2β) = {limit:g}: {loss} {shown}")
        assert apart["dpo"][2] > 1.25 * apart["dpo"][0] > 1.25 * 1.5 * limit
        # IPO's loss is the mean square of the distance to 1/(2β).
        assert apart["ipo"][2] == pytest.approx(limit, rel=0.02)
        assert rows[-1]["loss"] < (0.05 * limit) ** 2


def test_value_model_learns_the_expected_return(world):
    """A value read one column off, or bootstrapped past the end, learns another function than
    E[return | prefix]."""
    reference, ref, rewards, _, _ = world
    policy = make_model(GPT, seed=5)
    value_model = make_model(RewardModel, seed=1)
    logprobs = token_logprobs(policy).detach()
    config = world_config(epochs=2, lr=0.0, lam=1.0, value_clip=100.0)
    optimize(policy, reference, value_model, world_task(table_reward(rewards)), config)
    assert torch.equal(token_logprobs(policy), logprobs)

    to_go = (logprobs - token_logprobs(reference).detach()).flip(1).cumsum(1).flip(1)
    weights = logprobs.sum(dim=1, keepdim=True).exp() * MASK
    exact, weights = mean_by(STATE, rewards[:, None] - BETA * to_go, weights)
    prefixes, ends = pad(STATES)
    with torch.no_grad():
        values = value_model(prefixes)[range(len(STATES)), ends - 1].double()
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
    assert J_star - J.item() == pytest.approx(BETA * kl(policy[kept], best[kept]), abs=1e-9)


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
    the KL bound holds, and is tight in the limit of many responses, all rare."""
    reference, ref, rewards, _, _ = world
    rewards = rewards + 1e-6 * torch.arange(len(ROWS))  # no ties
    n = 4
    groups = 2000

    def law_of(p):
        """From the probabilities of responses, the worst first."""
        return (torch.cat([torch.zeros(1), p.cumsum(0)]) ** n).diff()

    order = rewards.argsort()
    law = law_of(ref.exp()[order])
    even = torch.full((100_000,), 1e-5).double()
    here = kl(law.log(), ref[order])
    limit = kl(law_of(even).log(), even.log())
    print(f"\nbest of {n}: KL to π_ref {here:.4f} nats, of 100,000 equal responses {limit:.4f}; "
          f"bound {best_of_n_kl(n):.4f}")
    assert here <= best_of_n_kl(n) == pytest.approx(limit, abs=1e-4)

    rollout = generate(reference, [PROMPT] * n * groups, LIMIT, END, seed=0)
    scores, _ = table_reward(rewards)(rollout)
    drawn = scores.view(groups, n)
    won = drawn.gather(1, top_per_prompt(drawn)[:, None])
    error = won.std().item() / math.sqrt(groups)
    assert abs(won.mean().item() - (law * rewards[order]).sum().item()) < 4 * error


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
