"""The museum of bugs: mistakes that implementations of RLHF really made, each put alone into the
right code, and the price that the answer key puts on it: how far from π* training then ends,
KL(π || π*) in the world that can be listed.

    python -m pytest -q -s tests/test_bug_museum.py         prints the prices, dearest first

Where π is π*, r - β log π/π_ref is the same for all responses, and every advantage is 0. A bug
that only weighs advantages, or adds noise to them, leaves that point where it is, and the distance
hardly sees it: SEEN_BY names the test that does. README.md says where each was found.
"""

import inspect
import textwrap
from copy import deepcopy
from pathlib import Path

import pytest
import torch

import dpo
import ppo
from data.run import SilentRun
from gpt import pad, token_logprobs
from helpers import (BETA, ENDED, ROWS, Blocks, all_pairs, exact_logprobs, kl,
                     make_model, world_config, world_task)
from reward_model import RewardModel, make_reward

BAR = 0.03  # nats: where the right code ends


class Code:
    """The code of the project, for one exhibit: it is right again after the test."""

    def __init__(self, monkeypatch):
        self.monkeypatch = monkeypatch
        self.sources = {}
        self.uncalled = set()   # what was replaced, and has not been called since

    def patch(self, module, name, wrong):
        """Put wrong in the place of a function; it gets the right one as its first argument."""
        right = getattr(module, name)
        self.put(module, name, lambda *arguments, **named: wrong(right, *arguments, **named))

    def edit(self, module, name, right, wrong):
        """Put wrong, a line or several, in the place of a line of a function."""
        lines = (self.sources.get(name) or inspect.getsource(getattr(module, name))).splitlines()
        places = [i for i, line in enumerate(lines) if line.partition("  #")[0].strip() == right]
        assert len(places) == 1, f"{module.__name__}.{name} has {len(places)} lines: {right}"
        line = lines[places[0]]
        indentation = line[:len(line) - len(line.lstrip())]
        lines[places[0]] = textwrap.indent(textwrap.dedent(wrong).strip(), indentation)
        self.sources[name] = "\n".join(lines)
        found = {}
        exec(compile(self.sources[name], module.__file__, "exec"), vars(module), found)
        self.put(module, name, found[name])

    def put(self, module, name, function):
        self.uncalled.add(name)

        def called(*arguments, **named):
            self.uncalled.discard(name)
            return function(*arguments, **named)

        self.monkeypatch.setattr(module, name, called)


def nothing(code):
    """The right code."""


def kl_upside_down(code):
    """KL estimated with the reference on top: the policy is paid for leaving it."""
    code.patch(ppo, "shaped_rewards", lambda right, scores, logprobs, ref_logprobs, mask, beta:
               right(scores, ref_logprobs, logprobs, mask, beta))


def penalty_twice(code):
    """The KL penalty in the rewards and in the loss."""
    code.edit(ppo, "ppo", "(weight * (policy_loss + value_loss)).backward()", """
        _, _, ref_k3 = kl_estimators(logprobs - batch.ref_logprobs)
        (weight * (policy_loss + beta * masked_mean(ref_k3, batch.mask) + value_loss)).backward()
        """)


def k2_for_k1(code):
    """½ (log π/π_ref)² in the rewards: never negative, and not the KL divergence."""
    code.patch(ppo, "shaped_rewards", lambda right, scores, logprobs, ref_logprobs, mask, beta:
               right(scores, (logprobs - ref_logprobs) ** 2 / 2, 0 * logprobs, mask, beta))


def reference_trains_along(code):
    """π_ref is the policy itself, not a copy of it: the penalty is always 0."""
    code.patch(ppo, "sample", lambda right, policy, reference, *others:
               right(policy, policy, *others))


def end_masked_out(code):
    """<|end|> is taken for padding and masked out of the loss: nothing teaches the policy when to
    stop."""
    code.edit(ppo, "ppo", "advantages = whiten(advantages, mask)", """
        advantages = whiten(advantages, mask)
        mask = mask & (rollouts.tokens[:, 1:] != task.end_token)
        rollouts = rollouts._replace(mask=mask)
        """)


def mask_too_long(code):
    """The mask is one token of padding too long, and the score is paid there."""
    code.patch(ppo, "response_mask", lambda right, prompt_lengths, lengths, T:
               right(prompt_lengths, lengths + 1, T))


def reward_too_early(code):
    """The score is paid at the token before the last one: the last action earns nothing."""
    def early(right, scores, logprobs, ref_logprobs, mask, beta):
        rewards = right(torch.zeros_like(scores), logprobs, ref_logprobs, mask, beta)
        before_last = (mask.sum(dim=1, keepdim=True) - 1).clamp(min=1)
        rewards[mask & (mask.cumsum(dim=1) == before_last)] += scores
        return rewards
    code.patch(ppo, "shaped_rewards", early)


def score_of_padding(code):
    """The reward model's score is read at the last column, padding or not."""
    code.patch(RewardModel, "score", lambda right, model, tokens, lengths:
               right(model, tokens, torch.full_like(lengths, tokens.shape[1])))


def unshifted(code):
    """Logits and labels one step apart: a token's probability in the state that holds it."""
    def late(right, model, tokens, mask, temperature):
        logprobs = token_logprobs(model(tokens).roll(-1, dims=1), tokens, temperature)
        return torch.where(mask, logprobs, 0.0)
    code.patch(ppo, "masked_logprobs", late)


def sampled_colder(code):
    """Sampled at temperature 0.5, scored at 1."""
    code.patch(ppo, "generate", lambda right, model, prompts, new, end, temperature, **named:
               right(model, prompts, new, end, 0.5 * temperature, **named))


def top_k_rollouts(code):
    """Rollouts from the 2 likeliest tokens, scored as if from all."""
    code.patch(ppo, "generate", lambda right, model, prompts, new, end, temperature, **named:
               right(model, prompts, new, end, temperature, top_k=2, **named))


def ratio_of_one(code):
    """The old log-probabilities are computed anew in every step: ρ is 1, nothing is clipped."""
    code.patch(ppo, "clipped_policy_loss", lambda right, logprobs, old_logprobs, *others:
               right(logprobs, logprobs.detach(), *others))


def advantages_with_gradient(code):
    """A = G - V without a detach: the policy's loss, -ρA with ρ near 1, trains V as well, to be
    small."""
    code.patch(ppo, "clipped_value_loss", lambda right, values, old_values, returns, mask, clip:
               right(values, old_values, returns, mask, clip) + ppo.masked_mean(values, mask))


def bootstrapped_past_the_end(code):
    """V(terminal) is not 0 but what the last state was worth: an end that is no end."""
    def bootstrapped(right, rewards, values, mask, gamma, lam):
        last = mask & (mask.cumsum(dim=1) == mask.sum(dim=1, keepdim=True))
        return right(rewards + torch.where(last, gamma * values, 0.0), values, mask, gamma, lam)
    code.patch(ppo, "gae", bootstrapped)


def value_after_the_action(code):
    """V read one column late, in the state that the action led to: a baseline that knows the
    action."""
    code.edit(ppo, "all_values",
              "values[rows, :T - 1] = value_model(rollout.tokens[rows, :T])[:, :-1]",
              "values[rows, :T - 1] = value_model(rollout.tokens[rows, :T])[:, 1:]")
    code.edit(ppo, "ppo", "values = value_model(batch.tokens)[:, :-1]",
              "values = value_model(batch.tokens)[:, 1:]")


def returns_for_advantages(code):
    """The policy's loss gets the returns: no baseline."""
    code.edit(ppo, "ppo", "advantages = whiten(advantages, mask)",
              "advantages = whiten(returns, mask)")


def whitened_over_padding(code):
    """Mean and deviation of the advantages are taken over the padding too."""
    code.patch(ppo, "whiten", lambda right, x, mask:
               torch.where(mask, right(x, torch.ones_like(mask)), 0.0))


def mean_of_means(code):
    """Every micro-batch's token mean counts alike: a token among short responses weighs more."""
    code.edit(ppo, "ppo", "for part in rows.split(config.micro_batch):",
              "for part in rows.chunk(4):")
    code.edit(ppo, "ppo", "weight = batch.mask.sum() / tokens_in_batch", "weight = 1 / 4")


def averaged_in_dpo(code):
    """Mean log-probabilities in DPO's loss, not sums."""
    code.patch(dpo, "response_logprobs", lambda right, model, tokens, prompt_lengths, lengths:
               right(model, tokens, prompt_lengths, lengths) / (lengths - prompt_lengths))


def end_masked_out_of_dpo(code):
    """<|end|> cut off from DPO's sums."""
    def cut(right, model, tokens, prompt_lengths, lengths):
        shorter = torch.maximum(lengths - 1, prompt_lengths + 1)  # a token must be left
        return right(model, tokens, prompt_lengths, shorter)
    code.patch(dpo, "response_logprobs", cut)


def prompt_in_dpo(code):
    """The prompt's tokens in DPO's sums: the same in both responses, so they cancel."""
    code.patch(dpo, "response_logprobs", lambda right, model, tokens, prompt_lengths, lengths:
               right(model, tokens, torch.ones_like(prompt_lengths), lengths))


OF_PPO = [nothing, kl_upside_down, penalty_twice, k2_for_k1, reference_trains_along, end_masked_out,
          mask_too_long, reward_too_early, score_of_padding, unshifted, sampled_colder,
          top_k_rollouts, ratio_of_one, advantages_with_gradient, bootstrapped_past_the_end,
          value_after_the_action, returns_for_advantages, whitened_over_padding, mean_of_means]
OF_DPO = [nothing, averaged_in_dpo, end_masked_out_of_dpo, prompt_in_dpo]
SEEN_BY = {returns_for_advantages: "test_ppo.py::test_gae_is_the_sum_of_residuals",
           advantages_with_gradient: "test_policy_gradients.py::test_the_gradient_of_every_loss",
           whitened_over_padding: "test_ppo.py::test_padding_never_counts",
           penalty_twice: "test_policy_gradients.py::test_the_gradient_of_every_loss",
           mean_of_means: "test_policy_gradients.py::test_the_gradient_of_every_loss",
           prompt_in_dpo: "test_dpo.py::test_logprobs_are_sums_token_by_token"}


def ppo_distance(world):
    """KL(π || π*) of all 85 responses after PPO on a reward model that gives exactly the list's
    rewards."""
    reference, _, rewards, best, _ = world
    policy = deepcopy(reference)
    value_model = make_model(RewardModel, seed=1)
    reward_model = make_model(RewardModel, seed=0)
    count = len(ENDED)
    tokens, lengths = pad(ROWS[:count])
    with torch.no_grad():  # 21 equations for the head's 24 weights
        hidden = reward_model.trunk.hidden(tokens)[range(count), lengths - 1].double()
        solution = torch.linalg.lstsq(hidden, rewards[:count, None]).solution
        reward_model.head.weight[0] = solution[:, 0]
    config = world_config(iterations=16, epochs=2, lr=4e-3, value_lr=1.2e-2, lam=0.8)
    reward = make_reward("reward_model", reward_model, None, config.micro_batch)
    ppo.ppo(policy, reference, value_model, world_task(reward), config, SilentRun())
    return kl(exact_logprobs(policy), best)


def dpo_distance(world):
    """KL(π || π*) of the 21 responses with an <|end|> after DPO on all their pairs."""
    reference, _, rewards, best, _ = world
    policy = deepcopy(reference)
    count = len(ENDED)
    pairs = all_pairs(rewards[:count], copies=8)
    config = dpo.Config(epochs=6, batch=128, micro_batch=128, lr=3e-3, beta=BETA)
    dpo.dpo(policy, reference, pairs, [], config, Blocks(0, 8), SilentRun())
    return kl(exact_logprobs(policy)[:count].log_softmax(0), best[:count].log_softmax(0))


EXHIBITS = [(ppo_distance, exhibit) for exhibit in OF_PPO]
EXHIBITS += [(dpo_distance, exhibit) for exhibit in OF_DPO]


@pytest.fixture(scope="module")
def prices():
    """{(run, exhibit): nats}, which the tests fill; the table at the end."""
    found = {}
    yield found
    print("\n\nKL(π || π*) in nats, dearest first")
    for (run, exhibit), price in sorted(found.items(), key=lambda item: -item[1]):
        name = exhibit.__name__.replace("_", " ")
        print(f"{price:8.3f}  {run}  {name:26s}  {SEEN_BY.get(exhibit, '')}".rstrip())


@pytest.mark.parametrize("run, exhibit", EXHIBITS, ids=lambda function: function.__name__)
def test_the_price(run, exhibit, world, prices, monkeypatch):
    """A bug that nothing sees. And an exhibit without its bug: a patch in a place that nothing
    calls, an edit of a line that is no longer there."""
    code = Code(monkeypatch)
    exhibit(code)
    price = run(world)
    prices[run.__name__[:3], exhibit] = price
    assert not code.uncalled
    if exhibit in SEEN_BY:
        file, test = SEEN_BY[exhibit].split("::")
        assert f"\ndef {test}(" in (Path(__file__).parent / file).read_text()
    elif exhibit is nothing:
        assert price <= BAR
    else:
        assert price > 2 * BAR
