"""A world small enough to list every response: the exact optimum beside what the project's own loops find.

Four ordinary tokens and an end token, at most three tokens to a response: 85 responses. π_ref is a real GPT with random
weights, the rewards are drawn once, and π*(y) = π_ref(y) exp(r(y)/β) / Z is computed from the list.
"""

import itertools
import math
import random

import pytest
import torch

import dpo
import ppo
from best_of_n import best_of_n_kl, optimality_gap, pooled_optimum, top_per_prompt
from dpo import response_logprobs
from gpt import GPT, GPTConfig, generate, pad
from reward_model import RewardModel

END, PROMPT, LIMIT, BETA = 4, [1, 2], 3, 0.5
SHAPE = GPTConfig(vocab_size=5, block_size=5, n_layer=2, n_head=2, n_embd=32)
RESPONSES = [(*words, END) for n in range(LIMIT) for words in itertools.product(range(4), repeat=n)]
RESPONSES += list(itertools.product(range(4), repeat=LIMIT))  # these hit the limit without an end
ROWS = [PROMPT + list(response) for response in RESPONSES]
UNFINISHED = -1.0  # their reward: ppo.Config.missing_end_score


def make_model(cls, seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return cls(SHAPE)


def exact_logprobs(policy):
    """log π(y|x) of all 85 responses, in float64."""
    tokens, lengths = pad(ROWS)
    return response_logprobs(policy, tokens, torch.full_like(lengths, len(PROMPT)), lengths).double()


def draw_rewards(seed=0):
    rewards = torch.randn(len(ROWS), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.where(torch.tensor([response[-1] == END for response in RESPONSES]), rewards, UNFINISHED)


def kl(logp, logq):
    return (logp.exp() * (logp - logq)).sum().item()


class TableReward:
    """A reward model that looks the reward up in the list."""

    def __init__(self, rewards):
        self.rewards = {tuple(row): reward for row, reward in zip(ROWS, rewards.tolist())}

    def score(self, tokens, lengths):
        return torch.tensor([self.rewards[tuple(row[:n])] for row, n in zip(tokens.tolist(), lengths.tolist())])


@pytest.fixture(scope="module")
def world():
    """(reference, its log-probabilities, rewards, log π*, J*)."""
    reference = make_model(GPT, seed=3)
    with torch.no_grad():
        reference.wte.weight *= 1.5  # sharpen it
        ref = exact_logprobs(reference)
    rewards = draw_rewards()
    log_z = (ref + rewards / BETA).logsumexp(0)
    return reference, ref, rewards, ref + rewards / BETA - log_z, BETA * log_z.item()


def copy_of(model):
    other = make_model(type(model), seed=0)
    other.load_state_dict(model.state_dict())
    return other


def test_the_list_is_complete(world):
    """A list that lacks responses makes every 'exact' number below wrong; π_ref must also be far from uniform."""
    ref = world[1]
    assert ref.exp().sum().item() == pytest.approx(1, abs=1e-6)
    assert kl(ref, torch.full_like(ref, -math.log(len(ref)))) > 0.3


def test_ppo_finds_the_boltzmann_policy(world):
    """PPO with a wrong sign, shift, mask, bootstrap or baseline still raises the reward; only a right one ends at π*."""
    reference, ref, rewards, best, J_star = world
    policy, value_model = copy_of(reference), make_model(RewardModel, seed=1)
    assert kl(ref, best) >= 0.5
    config = ppo.Config(iterations=200, rollouts=128, epochs=4, minibatch=32, micro_batch=32, lr=2e-3, value_lr=2e-3, beta=BETA,
                        lam=0.95, max_new_tokens=LIMIT, missing_end_score=UNFINISHED)
    for _ in ppo.optimize(policy, reference, TableReward(rewards), value_model, lambda n, rng: [PROMPT] * n, END, config):
        pass
    with torch.no_grad():
        found = exact_logprobs(policy)
    J = (found.exp() * (rewards - BETA * (found - ref))).sum().item()
    assert J_star - J == pytest.approx(BETA * kl(found, best), abs=1e-5)
    assert kl(found, best) <= 0.02


def test_ppo_without_a_value_model_climbs_too(world):
    """The same loop as REINFORCE, V = 0: a baseline or a second optimizer that the algorithm cannot do without."""
    reference, ref, rewards, best, J_star = world
    policy = copy_of(reference)
    config = ppo.Config(iterations=60, rollouts=128, epochs=2, minibatch=64, micro_batch=64, lr=2e-3, beta=BETA,
                        lam=1.0, max_new_tokens=LIMIT, missing_end_score=UNFINISHED)
    for _ in ppo.optimize(policy, reference, TableReward(rewards), None, lambda n, rng: [PROMPT] * n, END, config):
        pass
    with torch.no_grad():
        found = exact_logprobs(policy)
    assert kl(found, best) <= 0.1 * kl(ref, best)  # J* - J = β KL(π||π*): nine tenths of the way


class Blocks(random.Random):
    """Shuffles blocks of `size` only: all copies of a pair come in one batch, whose labels then are as mixed as they should
    be. (Drawn one by one, labels are noise, and it takes ten times as many pairs to average it out.)"""

    def __init__(self, seed, size):
        super().__init__(seed)
        self.size = size

    def sample(self, population, k):
        blocks = [population[start:start + self.size] for start in range(0, k, self.size)]
        self.shuffle(blocks)
        return [i for block in blocks for i in block]


def all_pairs(rewards, copies):
    """Every pair of responses, as often either way as Bradley-Terry says, in whole numbers: `copies` of it in a row."""
    pairs, rest = [], 0.0
    for i, j in itertools.combinations(range(len(ROWS)), 2):
        wins = copies * torch.sigmoid(rewards[i] - rewards[j]).item() + rest
        rest = wins - round(wins)  # what one pair's rounding loses, the next one gets
        pairs += [(ROWS[i], ROWS[j], len(PROMPT))] * round(wins)
        pairs += [(ROWS[j], ROWS[i], len(PROMPT))] * (copies - round(wins))
    assert len(pairs) == copies * 85 * 84 / 2
    return pairs


def test_dpo_finds_the_same_policy(world):
    """The lecture's claim that DPO and RLHF share one optimum; averaged log-probs or a lost <|end|> would move DPO's."""
    reference, ref, rewards, best, _ = world
    policy, pairs, copies = copy_of(reference), all_pairs(rewards, copies=8), 8
    assert kl(ref, best) >= 0.5
    config = dpo.Config(epochs=6, batch=256, micro_batch=256, lr=3e-3, beta=BETA, report=100_000)
    *_, (step, report, _) = dpo.fit(policy, reference, pairs, pairs[::4000], config, Blocks(0, copies))
    assert step == 6 * math.ceil(len(pairs) / 256) and report["loss"] < math.log(2)
    with torch.no_grad():
        assert kl(exact_logprobs(policy), best) <= 0.005


def test_ipo_finds_another_policy(world):
    """IPO with a mean for the sum, or with another target than 1/(2β), ends elsewhere. Where it should end:

    Let u = log π/π_ref, c = 1/(2β), p = P(y ≻ y'). A pair's expected loss, p (u(y) - u(y') - c)² + (1-p) (u(y') - u(y) - c)²,
    is (u(y) - u(y') - c (2p - 1))² + const. With all pairs equally often, the gradient by u(y) is 0 where
    Σ_y' [u(y) - u(y') - c (2p(y ≻ y') - 1)] = 0, that is u(y) = c · mean over y' of (2p(y ≻ y') - 1) + const. The mean
    is over all 85 responses, y itself among them with 2p - 1 = 0: over the 84 others c would have to be 84/85 of it.
    """
    reference, ref, rewards, dpos, _ = world
    policy, copies, beta = copy_of(reference), 4, 0.15
    p = torch.sigmoid(rewards[:, None] - rewards)
    best = (ref + (2 * p - 1).mean(dim=1) / (2 * beta)).log_softmax(0)
    config = dpo.Config(loss="ipo", epochs=6, batch=256, micro_batch=256, lr=3e-3, beta=beta, report=100_000)
    pairs = all_pairs(rewards, copies)
    for _ in dpo.fit(policy, reference, pairs, pairs[::4000], config, Blocks(0, copies)):
        pass
    with torch.no_grad():
        assert kl(exact_logprobs(policy), best) <= 0.005 < 0.1 < min(kl(ref, best), kl(dpos, best))


def test_certain_labels_run_away_with_dpo_and_not_with_ipo(world):
    """The lecture's claim: where the label is always the same, σ(margin) → 1 has no finite optimum and β no say, while
    IPO's log-ratios stop 1/(2β) apart. A square around another target, or a logistic loss, does not."""
    reference, _, rewards, _, _ = world
    order = rewards.argsort(descending=True).tolist()
    pairs = [(ROWS[i], ROWS[j], len(PROMPT)) for i, j in zip(order[:8], order[-8:])]  # no response in two of them

    def log_ratios_apart(loss, beta, epochs):
        policy = copy_of(reference)
        config = dpo.Config(loss=loss, epochs=epochs, batch=8, micro_batch=8, lr=3e-3, beta=beta, report=100_000)
        for _ in dpo.fit(policy, reference, pairs, pairs, config, random.Random(0)):
            pass
        found = dpo.evaluate(policy, reference, pairs, config)
        return found["margin"] / beta, found["loss"]

    for beta in (0.5, 0.1):
        (short, _), (long, _) = (log_ratios_apart("dpo", beta, epochs) for epochs in (100, 400))
        assert long > 1.25 * short > 1.25 * 1.5 / (2 * beta)
        for epochs in (100, 400):
            mean, loss = log_ratios_apart("ipo", beta, epochs)  # loss: the mean square of the distance to 1/(2β)
            assert mean == pytest.approx(1 / (2 * beta), rel=0.02) and loss < (0.05 / (2 * beta)) ** 2


def test_value_model_learns_the_expected_return(world):
    """A value read one column off, or bootstrapped past the end, learns another function than E[return | prefix]."""
    reference, ref, rewards, _, _ = world
    policy, value_model = make_model(GPT, seed=5), make_model(RewardModel, seed=1)
    with torch.no_grad():
        logprobs = exact_logprobs(policy)
    before = {name: x.clone() for name, x in policy.state_dict().items()}
    config = ppo.Config(iterations=100, rollouts=256, epochs=4, minibatch=64, micro_batch=64, lr=0.0, value_lr=3e-3, beta=BETA,
                        lam=1.0, value_clip=100.0, max_new_tokens=LIMIT, missing_end_score=UNFINISHED)
    for _ in ppo.optimize(policy, reference, TableReward(rewards), value_model, lambda n, rng: [PROMPT] * n, END, config):
        pass
    assert all(torch.equal(x, before[name]) for name, x in policy.state_dict().items())

    def token_log_ratio(row, t):
        """log π/π_ref of the t-th response token: the difference of the log-probabilities of two sets of responses."""
        def mass(logp, prefix):
            return torch.stack([p for p, other in zip(logp, ROWS) if other[:len(prefix)] == prefix]).logsumexp(0)
        end = len(PROMPT) + t
        return (mass(logprobs, row[:end + 1]) - mass(logprobs, row[:end])
                - mass(ref, row[:end + 1]) + mass(ref, row[:end])).item()

    errors, spread = 0.0, 0.0
    mean = None
    for n in range(LIMIT):
        for words in itertools.product(range(4), repeat=n):
            prefix = PROMPT + list(words)
            inside = [i for i, row in enumerate(ROWS) if row[:len(prefix)] == prefix]
            p = (logprobs[inside] - logprobs[inside].logsumexp(0)).exp()
            returns = [rewards[i].item() - BETA * sum(token_log_ratio(ROWS[i], t) for t in range(n, len(RESPONSES[i])))
                       for i in inside]
            exact = sum(a * b for a, b in zip(p.tolist(), returns))  # E[Σ_{k>=t} r_k | prefix]
            weight = logprobs[inside].exp().sum().item()
            with torch.no_grad():
                value = value_model(torch.tensor([prefix]))[0, -1].item()
            mean = exact if mean is None else mean  # the empty prefix: the mean return
            errors += weight * (value - exact) ** 2
            spread += weight * (exact - mean) ** 2
    assert spread > 0.1 and errors < 0.02 * spread + 0.005


def test_optimality_identity_is_exact(world):
    """J* - J = β KL(π||π*): a β too many, or the log-ratio upside down, and 'distance to the optimum' is noise."""
    reference, ref, rewards, best, J_star = world
    counts = torch.randint(0, 4, (len(ROWS),), generator=torch.Generator().manual_seed(1))  # a policy of whole numbers
    samples = torch.repeat_interleave(torch.arange(len(ROWS)), counts)  # each response as often as its probability says
    policy = (counts.double() / counts.sum()).log()
    J, _ = optimality_gap(rewards[samples][None], (policy - ref)[samples][None], BETA)
    kept = counts > 0
    assert J_star - J.item() == pytest.approx(BETA * (policy[kept].exp() * (policy - best)[kept]).sum().item(), abs=1e-9)


def test_the_estimates_of_the_optimum_agree(world):
    """A policy that dropped modes underestimates Z from its own samples; pooled with the reference's it must not."""
    reference, ref, rewards, best, J_star = world
    M, N = 40, 1000
    generator = torch.Generator().manual_seed(0)
    kept = torch.tensor([response[0] != RESPONSES[int(best.argmax())][0] for response in RESPONSES])
    narrow = torch.where(kept, best, -math.inf).log_softmax(0)  # π* without the first token of its best response
    draws = [logp.exp().expand(M, -1).multinomial(N, replacement=True, generator=generator) for logp in (ref, narrow)]
    pooled = torch.cat(draws, dim=1)
    log_ratios = torch.stack([torch.zeros_like(pooled, dtype=torch.float64), (narrow - ref)[pooled]], dim=2)
    estimates, kls = pooled_optimum(rewards[pooled], log_ratios, BETA)
    _, own = optimality_gap(rewards[draws[1]], (narrow - ref)[draws[1]], BETA)
    assert own.max() < J_star - 0.1
    assert abs(kls.mean().item() - kl(best, ref)) < 4 * kls.std().item() / math.sqrt(M) + 0.01
    assert abs(estimates.mean().item() - J_star) < 4 * estimates.std().item() / math.sqrt(M) + 0.005


def test_best_of_n_has_its_exact_law(world):
    """The law of best-of-N, P(y) = F(y)^N - F(<y)^N, against the project's sampler and selection; the KL bound holds."""
    reference, ref, rewards, _, _ = world
    rewards = draw_rewards() + 1e-6 * torch.arange(len(ROWS))  # no ties
    order = rewards.argsort()
    cumulative = ref.exp()[order].cumsum(0)
    n, groups = 4, 4000
    law = torch.zeros_like(ref)
    law[order] = cumulative ** n - torch.cat([torch.zeros(1), cumulative[:-1]]) ** n
    assert kl(law.log(), ref) <= best_of_n_kl(n)
    rollout = generate(reference, [PROMPT] * n * groups, LIMIT, END, seed=0)
    drawn = TableReward(rewards).score(rollout.tokens, rollout.lengths).view(groups, n)
    won = drawn.gather(1, top_per_prompt(drawn)[:, None])
    assert abs(won.mean().item() - (law * rewards).sum().item()) < 4 * won.std().item() / math.sqrt(groups)
    # In the limit of many responses, all rare, the bound is tight.
    many = torch.arange(1, 100_001, dtype=torch.float64) / 100_000
    law = many ** n - torch.cat([torch.zeros(1), many[:-1]]) ** n
    assert kl(law.log(), torch.full_like(law, -math.log(100_000))) == pytest.approx(best_of_n_kl(n), abs=1e-4)


def test_kl_estimators(world):
    """KL with the ratio upside down is unbiased for nothing; by enumeration k1 and k3 are unbiased, k2 is not."""
    _, ref, _, best, _ = world
    true = kl(best, ref)
    p = best.exp()
    figures = {}
    for name, k in zip(("k1", "k2", "k3"), ppo.kl_estimators(best - ref)):
        mean = (p * k).sum().item()
        figures[name] = mean, (p * (k - mean) ** 2).sum().sqrt().item(), k.min().item()
    print(f"\nKL(π* || π_ref) = {true:.3f} nats\n      mean    bias  standard deviation  smallest")
    for name, (mean, deviation, smallest) in figures.items():
        print(f"{name}  {mean:6.3f}  {round(mean - true, 3) + 0.0:6.3f}  {deviation:18.3f}  {smallest:8.3f}")
    assert figures["k1"][0] == pytest.approx(true, abs=1e-9) and figures["k3"][0] == pytest.approx(true, abs=1e-6)
    assert abs(figures["k2"][0] - true) > 0.05
    assert figures["k1"][2] < 0 <= min(figures["k2"][2], figures["k3"][2])
