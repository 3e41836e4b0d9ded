"""The museum of bugs: mistakes that implementations of RLHF really made, each put alone into the right code, and the price
that the answer key puts on it: how far from π* training then ends, KL(π || π*) in the world that can be listed.

    python -m pytest -q -s tests/test_bug_museum.py         prints the prices, dearest first

Where π is π*, r - β log π/π_ref is the same for all responses, and every advantage is 0. A bug that only weighs advantages,
or adds noise to them, leaves that point where it is, and the distance hardly sees it: SEEN_BY names the test that does.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import dpo
import ppo
from gpt import masked_logprobs, pad, token_logprobs
from helpers import (BETA, END, LIMIT, PROMPT, ROWS, UNFINISHED, Blocks, all_pairs, copy_of, exact_logprobs, kl, make_model)
from reward_model import RewardModel

BAR = 0.02  # nats: where the right code ends
FINISHED = 21  # the responses with an <|end|>, the first ones of the list

# An exhibit is a function of patch; patch(module, name, wrong) puts wrong in the place of a function, and wrong gets the
# right one as its first argument.


def nothing(patch):
    """The right code."""


def kl_upside_down(patch):
    """KL estimated with the reference on top: the policy is paid for leaving it. Found in nebuly-ai/optimate#298."""
    patch(ppo, "shaped_rewards", lambda right, scores, logprobs, ref_logprobs, mask, beta:
          right(scores, ref_logprobs, logprobs, mask, beta))


def penalty_twice(patch):
    """The KL penalty in the rewards and in the loss. Discussed in verl-project/verl#265."""
    patch(ppo, "backward", lambda right, policy, value_model, batch, config, *documents:
          right(policy, value_model, batch, replace(config, kl="loss"), *documents))


def k2_for_k1(patch):
    """½ (log π/π_ref)² in the rewards: never negative, and not the KL divergence. An option in huggingface/trl#486."""
    patch(ppo, "shaped_rewards", lambda right, scores, logprobs, ref_logprobs, mask, beta:
          right(scores, (logprobs - ref_logprobs) ** 2 / 2, torch.zeros_like(logprobs), mask, beta))


def reference_trains_along(patch):
    """π_ref is the policy itself, not a copy of it: the penalty is always 0. Found in huggingface/trl#2046."""
    patch(ppo, "score", lambda right, policy, reference, *others: right(policy, reference and policy, *others))


def end_masked_out(patch):
    """<|end|> is taken for padding and masked out of the loss: nothing teaches the policy when to stop. Found in
    rasbt/reasoning-from-scratch#185."""
    patch(ppo, "backward", lambda right, policy, value_model, batch, *others:
          right(policy, value_model, batch._replace(mask=batch.mask & (batch.tokens[:, 1:] != END)), *others))


def mask_too_long(patch):
    """The mask goes on for one token of padding, and the score stands there. Found in CarperAI/trlx#433."""
    patch(ppo, "response_mask", lambda right, prompt_lengths, lengths, T: right(prompt_lengths, lengths + 1, T))


def reward_too_early(patch):
    """The score stands at the token before the last one: the last action earns nothing."""
    def early(right, scores, logprobs, ref_logprobs, mask, beta):
        rewards = right(torch.zeros_like(scores), logprobs, ref_logprobs, mask, beta)
        rewards[mask & (mask.cumsum(dim=1) == (mask.sum(dim=1, keepdim=True) - 1).clamp(min=1))] += scores
        return rewards
    patch(ppo, "shaped_rewards", early)


def score_of_padding(patch):
    """The reward model's score is read at the last column, padding or not. Found in EleutherAI/gpt-neox#1285."""
    patch(RewardModel, "score", lambda right, model, tokens, lengths:
          right(model, tokens, torch.full_like(lengths, tokens.shape[1])))


def unshifted(patch):
    """Logits and labels one step apart: the probability of a token in the state that already holds it. Found in
    lucidrains/PaLM-rlhf-pytorch#31."""
    patch(ppo, "masked_logprobs", lambda right, model, tokens, mask, temperature:
          torch.where(mask, token_logprobs(model(tokens).roll(-1, dims=1), tokens, temperature), 0.0))


def sampled_colder(patch):
    """Sampled at temperature 0.7, scored at 1. Found in OpenRLHF/OpenRLHF#853."""
    patch(ppo, "generate", lambda right, model, prompts, new, end, temperature, seed:
          right(model, prompts, new, end, 0.7 * temperature, seed=seed))


def top_k_rollouts(patch):
    """Rollouts from the 2 likeliest tokens, scored as if from all. Found in NVIDIA/NeMo-Aligner#46."""
    patch(ppo, "generate", lambda right, model, prompts, new, end, temperature, seed:
          right(model, prompts, new, end, temperature, top_k=2, seed=seed))


def ratio_of_one(patch):
    """The old log-probabilities are computed anew in every step: ρ is always 1, and nothing is ever clipped. Found in
    tensorforce/tensorforce#312."""
    def anew(right, policy, value_model, batch, config, *documents):
        with torch.no_grad():
            logprobs = masked_logprobs(policy, batch.tokens, batch.mask, config.temperature)
        return right(policy, value_model, batch._replace(old_logprobs=logprobs), config, *documents)
    patch(ppo, "backward", anew)


def advantages_with_gradient(patch):
    """A = G - V without a detach: the policy's loss, -ρA with ρ near 1, trains V as well, to be small. Found in
    keras-team/keras-io#194."""
    patch(ppo, "clipped_value_loss", lambda right, values, old_values, returns, mask, clip:
          right(values, old_values, returns, mask, clip) + ppo.masked_mean(values, mask))


def bootstrapped_past_the_end(patch):
    """V(terminal) is not 0 but what the last state was worth: an end that goes on. Found in RoboVerseOrg/RoboVerse#814."""
    def bootstrapped(right, rewards, values, mask, gamma, lam):
        last = mask & (mask.cumsum(dim=1) == mask.sum(dim=1, keepdim=True))
        return right(rewards + torch.where(last, gamma * values, 0.0), values, mask, gamma, lam)
    patch(ppo, "gae", bootstrapped)


def value_after_the_action(patch):
    """V read one column late, in the state that the action led to: a baseline that knows the action. Found in
    verl-project/verl#1758."""
    def late(model):
        return model and (lambda tokens: model(tokens).roll(-1, dims=1))
    patch(ppo, "score", lambda right, policy, reference, reward_model, value_model, *others:
          right(policy, reference, reward_model, late(value_model), *others))
    patch(ppo, "backward", lambda right, policy, value_model, *others: right(policy, late(value_model), *others))


def returns_for_advantages(patch):
    """The policy's loss gets the returns: no baseline. Found in bentrevett/pytorch-rl#2."""
    patch(ppo, "gae", lambda right, *arguments, **lam: 2 * right(*arguments, **lam)[1:])


def whitened_over_padding(patch):
    """Mean and deviation of the advantages are taken over the padding too. Found in NovaSky-AI/SkyRL#1305."""
    patch(ppo, "whiten", lambda right, x, mask: torch.where(mask, right(x, torch.ones_like(mask)), 0.0))


def mean_of_means(patch):
    """Every micro-batch's token mean counts alike: a token among short responses weighs more. Found in
    allenai/open-instruct#1161."""
    def weighed(right, policy, value_model, batch, *others):
        weight = torch.ones(len(batch.lengths), 1)
        for rows in batch.lengths.argsort().chunk(4):
            weight[rows] = batch.mask.sum() / (4 * batch.mask[rows].sum())
        return right(policy, value_model, batch._replace(advantages=weight * batch.advantages), *others)
    patch(ppo, "backward", weighed)


def averaged_in_dpo(patch):
    """Mean log-probabilities in DPO's loss, not sums. Found in jingyaogong/minimind#298."""
    patch(dpo, "response_logprobs", lambda right, model, tokens, prompt_lengths, lengths:
          right(model, tokens, prompt_lengths, lengths) / (lengths - prompt_lengths))


def end_masked_out_of_dpo(patch):
    """<|end|> cut off from DPO's sums. An option in PaddlePaddle/PaddleFormers#4909."""
    patch(dpo, "response_logprobs", lambda right, model, tokens, prompt_lengths, lengths:
          right(model, tokens, prompt_lengths, torch.where(lengths > prompt_lengths + 1, lengths - 1, lengths)))


def prompt_in_dpo(patch):
    """The prompt's tokens in DPO's sums: the same in both responses, so they cancel. Found in OpenRLHF/OpenRLHF#235."""
    patch(dpo, "response_logprobs", lambda right, model, tokens, prompt_lengths, lengths:
          right(model, tokens, torch.ones_like(prompt_lengths), lengths))


OF_PPO = [kl_upside_down, penalty_twice, k2_for_k1, reference_trains_along, end_masked_out, mask_too_long, reward_too_early,
          score_of_padding, unshifted, sampled_colder, top_k_rollouts, ratio_of_one, advantages_with_gradient,
          bootstrapped_past_the_end, value_after_the_action, returns_for_advantages, whitened_over_padding, mean_of_means]
OF_DPO = [averaged_in_dpo, end_masked_out_of_dpo, prompt_in_dpo]
SEEN_BY = {returns_for_advantages: "test_ppo.py::test_gae_is_the_sum_of_residuals",
           advantages_with_gradient: "test_policy_gradients.py::test_the_gradient_of_every_loss",
           whitened_over_padding: "test_ppo.py::test_padding_never_counts",
           mean_of_means: "test_policy_gradients.py::test_the_gradient_of_every_loss",
           prompt_in_dpo: "test_dpo.py::test_response_logprobs_are_sums_token_by_token"}


def ppo_distance(world):
    """KL(π || π*) of all 85 responses after PPO on a reward model that gives exactly the list's rewards."""
    reference, _, rewards, best, _ = world
    policy, value_model, reward_model = copy_of(reference), make_model(RewardModel, seed=1), make_model(RewardModel, seed=0)
    tokens, lengths = pad(ROWS[:FINISHED])
    with torch.no_grad():  # 21 equations for the head's 32 weights
        hidden = reward_model.trunk.hidden(tokens)[range(FINISHED), lengths - 1]
        reward_model.head.weight[0] = torch.linalg.lstsq(hidden.double(), rewards[:FINISHED, None]).solution[:, 0]
    config = ppo.Config(iterations=30, rollouts=512, epochs=2, minibatch=128, micro_batch=512, lr=3e-3, value_lr=4e-3,
                        lam=0.95, beta=BETA, max_new_tokens=LIMIT, missing_end_score=UNFINISHED)
    for _ in ppo.optimize(policy, reference, reward_model, value_model, lambda n, rng: [PROMPT] * n, END, config):
        pass
    with torch.no_grad():
        return kl(exact_logprobs(policy), best)


def dpo_distance(world):
    """KL(π || π*) of the 21 responses with an <|end|> after DPO on all their pairs."""
    reference, _, rewards, best, _ = world
    policy, pairs = copy_of(reference), all_pairs(rewards[:FINISHED], copies=8)
    config = dpo.Config(epochs=6, batch=128, micro_batch=128, lr=3e-3, beta=BETA, report=100_000)
    for _ in dpo.fit(policy, reference, pairs, pairs[:1], config, Blocks(0, 8)):
        pass
    with torch.no_grad():
        return kl(exact_logprobs(policy)[:FINISHED].log_softmax(0), best[:FINISHED].log_softmax(0))


@pytest.fixture(scope="module")
def prices():
    """{(run, exhibit): nats}, which the tests fill; the table at the end."""
    found = {}
    yield found
    print("\n\nKL(π || π*) in nats, dearest first")
    for (run, exhibit), price in sorted(found.items(), key=lambda item: -item[1]):
        print(f"{price:8.3f}  {run}  {exhibit.__name__.replace('_', ' '):26s}  {SEEN_BY.get(exhibit, '')}".rstrip())


@pytest.mark.parametrize("run, exhibit", [(run, exhibit) for run, exhibits in (
    (ppo_distance, OF_PPO), (dpo_distance, OF_DPO)) for exhibit in [nothing, *exhibits]], ids=lambda f: f.__name__)
def test_the_price(run, exhibit, world, prices, monkeypatch):
    """A bug that nobody sees. And an exhibit without its bug: a patch in a place that nothing calls."""
    uncalled = set()

    def patch(module, name, wrong):
        right = getattr(module, name)
        uncalled.add(name)

        def called(*arguments, **named):
            uncalled.discard(name)
            return wrong(right, *arguments, **named)

        monkeypatch.setattr(module, name, called)

    exhibit(patch)
    price = prices[run.__name__[:3], exhibit] = run(world)
    assert not uncalled
    if exhibit in SEEN_BY:
        file, test = SEEN_BY[exhibit].split("::")
        assert f"\ndef {test}(" in (Path(__file__).parent / file).read_text()
    else:
        assert price <= BAR if exhibit is nothing else price > 3 * BAR
