"""
ppo.py: RLHF with proximal policy optimization (Schulman et al. 2017; Ziegler et al. 2019; Ouyang et al. 2022;
ECE 7115, 13. RLHF, "RLHF Training with PPO"; CS 224R, Lecture 9, ch. 7; CME 295, Lecture 5).

    max_θ J(θ) = E_{x~D, y~π_θ} [ r_φ(x, y) ] - β · KL( π_θ(·|x) || π_ref(·|x) )

Four models: the policy π_θ, the frozen reference π_ref (SFT), the frozen reward model r_φ, the value model V.
    python ppo.py                       everything: a stage whose checkpoint is missing is trained first
    python ppo.py --data FILE.jsonl     prompts of your own, after sft.py and reward_model.py on your own data
    python ppo.py --prompt "…"          answer a prompt with the policy
    python ppo.py --beta 1e-6 --name ppo-beta0                         over-optimization: reward rises, gold falls
    python ppo.py --method grpo --name ppo-grpo                        the family, from REINFORCE to GRPO (PRESETS)
    python ppo.py --reward verifier --name ppo-verifier                CS 224R, ch. 11; or process, or "COMMAND"

Departures from the slides, on purpose:
    The KL penalty stands in the rewards, token by token, as on the slide "Token-Level Returns" and in Ouyang et al. 2022,
    not in the loss as on the slide "RLHF Training with PPO"; with both it would count twice.
    For a negative advantage the clipped objective is (1-ε)A; the clipping slide prints 1+ε.
    `returns`, what the value model is fitted to, are λ-returns, A_t + V(s_t); the slides' G_t is the sum of the rewards.
    The advantages are whitened over the response tokens of a batch, and the value loss is clipped like the policy's
    (both from Ziegler et al. 2019's code); neither is on the slides.
    A response that hits the length limit never earned its score: it gets missing_end_score instead of the model's.
    PPO-ptx takes as many documents as responses and one divisor for both: Ouyang et al.'s eq. 2, divided by a length.
"""

import random
import time
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch

import sft
from data.annotator import gold_rewards, reward_of
from data.files import InputError, run_script, split_prompts
from data.run import (Run, announce, check_name, parse_config, peak_memory, restore, show_models, stage_folder,
                      train_missing)
from gpt import (autocast, exact_kl, generate, get_device, kl_estimators, load_checkpoint, log_distribution, make_optimizer,
                 masked_logprobs, optimizer_step, pretraining_text, response_mask, save_checkpoint)
from reward_model import REWARDS, load_reward_model, rewarder, stages_until, start_from


@dataclass
class Config:
    size: Literal["auto", "cpu", "gpu", "gpt2"] = "auto"    # auto takes gpu where there is one; gpt2: of gpt.py --load
    out: str = "out"            # folder of all outputs; this stage writes to OUT/SIZE/NAME
    name: str = "ppo"           # name of this run's folder: ppo-… keeps an experiment apart
    seed: int = 1               # fixes prompts, samples and minibatches
    data: str = ""              # prompts of your own, a .jsonl file, instead of the little world's requests
    prompt: str = ""            # answer this prompt with the policy of --name, and stop
    top_k: int = 0              # the answer to --prompt draws from the k likeliest tokens only; 0: from all
    reward: str = "reward_model"    # what is maximized: of the reward_model, process, verifier, or a program: "COMMAND"
    method: Literal["ppo", "ppo_penalty", "a2c", "reinforce", "reinforce_baseline", "grpo"] = "ppo"   # sets other flags
    advantage: Literal["gae", "reward_to_go", "group"] = "gae"      # how A_t is estimated; gae alone has a value model
    baseline: Literal["none", "batch", "leave_one_out", "moving"] = "none"      # what G_t is compared with
    objective: Literal["clip", "penalty", "policy_gradient"] = "clip"           # what the update maximizes
    kl: Literal["rewards", "loss"] = "rewards"      # where β KL(π_θ || π_ref) stands; in the loss: k3
    mean: Literal["tokens", "responses"] = "tokens"     # of the policy's loss: over all tokens, or within responses first
    scale: bool = True          # divide advantages by their standard deviation; gae's are whitened, their mean taken off
    group: int = 1              # responses to the same prompt in a rollout batch
    iterations: int = 100       # rollout batches
    rollouts: int = 64          # responses in a rollout batch
    epochs: int = 1             # K: passes over each rollout batch; its samples are on-policy in the first only
    minibatch: int = 16         # responses in an optimizer step; more than rollouts: all
    micro_batch: int = 8        # responses in one forward pass; less memory and padding, the same gradient
    lr: float = 3e-4            # the policy's learning rate, falling linearly to zero
    value_lr: float = 5e-4      # the value model's, likewise
    beta: float = 0.2           # price of one nat of KL to the reference, in reward units; 0: no reference in memory
    kl_target: float = 0.0      # > 0: adapt beta until the KL per response is this many nats (Ziegler et al. 2019)
    clip: float = 0.2           # ε of the policy's ratio
    penalty: float = 1.0        # first coefficient of KL(π_old || π_θ), which adapts
    penalty_target: float = 0.01    # the KL(π_old || π_θ) per token, in nats, that it adapts to
    ptx: float = 0.0            # γ of PPO-ptx: price of a nat of a pretraining document, in the unit of the advantages
    value_clip: float = 0.5     # how far a value may move from the rollout's, in reward units
    gamma: float = 1.0          # discount: 1, the reward comes with the last token
    lam: float = 0.9            # λ of generalized advantage estimation
    temperature: float = 1.0    # of the policy that samples, and so of every log-probability; with --prompt: times that
    max_new_tokens: int = 96    # the longest response
    missing_end_score: float = -5.0     # score of a response without <|end|>, in place of the reward model's
    save: int = 10              # iterations between two saves of the state for --resume
    resume: bool = False        # go on with the run that was interrupted in this folder


GPU = dict(rollouts=512, epochs=4, minibatch=128, micro_batch=128, lr=5e-5, value_lr=1e-4, lam=0.95, max_new_tokens=128)

# ----------------------------------------------------------------------------------------------------------------------
# The algorithm. Every tensor per token is (B, T-1), aligned with gpt.masked_logprobs: column t is the action
# a_t = tokens[:, t+1] in the state s_t = tokens[:, :t+1]. mask is true where a_t belongs to the response.


def masked_mean(x, mask):
    """The mean of x where mask is true; what stands elsewhere never counts, not even inf or nan.

    >>> masked_mean(torch.tensor([[1.0, 3.0, float("inf")]]), torch.tensor([[True, True, False]])).item()
    2.0
    """
    return torch.where(mask, x, 0.0).sum() / mask.sum()


def whiten(x, mask):
    """Shift and scale x to mean 0 and variance 1 over the mask (Ziegler et al. 2019); 0 elsewhere, or if all are equal."""
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    equal = variance <= (1e-6 * mean) ** 2  # what is left is rounding, and must not be blown up
    return torch.where(mask & ~equal, (x - mean) * (variance + 1e-8).rsqrt(), 0.0)


def shaped_rewards(scores, logprobs, ref_logprobs, mask, beta):
    """One reward per token out of one score per response (ECE 7115, "Token-Level Returns").

    scores (B,), the others (B, T-1) -> (B, T-1):
        KL_t = log π_θ(a_t|s_t) - log π_ref(a_t|s_t)
        r_t = -β KL_t, and at the last response token r_T = R(x, y) - β KL_T
    The ratio has the sampling policy on top: only then is the expectation of Σ_t KL_t the KL divergence, never negative.
    """
    rewards = torch.where(mask, -beta * (logprobs - ref_logprobs), 0.0)  # -β KL_t
    rewards[mask & (mask.cumsum(dim=1) == mask.sum(dim=1, keepdim=True))] += scores  # at the last response token of each
    return rewards


def gae(rewards, values, mask, gamma, lam):
    """Generalized advantage estimation (Schulman et al. 2016, eq. 16; ECE 7115, "Generalized Advantage Estimation").

    rewards, values, mask (B, T-1) -> (advantages, returns), both (B, T-1), 0 outside the mask. values[:, t] = V(s_t); the
    state after the last response token is terminal, V = 0: also for a response that hit the length limit.
        δ_t = r_t + γ V(s_{t+1}) - V(s_t)          A_t = δ_t + γλ A_{t+1}          returns = A_t + V(s_t)
    """
    values = torch.where(mask, values, 0.0)  # V(terminal) = 0
    advantages = torch.zeros_like(rewards)
    next_value, next_advantage = torch.zeros_like(rewards[:, 0]), torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]  # δ_t
        advantages[:, t] = torch.where(mask[:, t], delta + gamma * lam * next_advantage, 0.0)  # A_t
        next_value, next_advantage = values[:, t], advantages[:, t]
    return advantages, advantages + values


def clipped_policy_loss(logprobs, old_logprobs, advantages, mask, clip):
    """PPO's clipped objective, negated (Schulman et al. 2017, eq. 7; ECE 7115, "PPO Clipped Objective").

    All (B, T-1) -> (loss, clip_fraction), token means. clip_fraction is the share of tokens whose gradient the clipping
    stops: ρ > 1+ε with A > 0, or ρ < 1-ε with A < 0.
    """
    ratio = torch.where(mask, logprobs - old_logprobs, 0.0).exp()  # ρ_t = π_θ(a_t|s_t) / π_old(a_t|s_t)
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - clip, 1 + clip) * advantages
    loss = -masked_mean(torch.min(unclipped, clipped), mask)  # L^CLIP = E_t[min(ρ_t A_t, clip(ρ_t, 1-ε, 1+ε) A_t)]
    return loss, masked_mean((clipped < unclipped).float(), mask)


def clipped_value_loss(values, old_values, returns, mask, clip):
    """½ (V(s_t) - G_t)², the worse of the plain and the clipped one (ECE 7115, "Value Function"; Ziegler et al. 2019): all
    (B, T-1) -> scalar, a token mean."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * masked_mean(torch.max((values - returns) ** 2, (clipped - returns) ** 2), mask)


def adapt_beta(beta, kl, kl_target):
    """The adaptive KL controller (Ziegler et al. 2019, section 2.2): e = clip(KL/target - 1, ±0.2), β ← β(1 + 0.1 e)."""
    return beta * (1 + 0.1 * min(max(kl / kl_target - 1, -0.2), 0.2))


# ----------------------------------------------------------------------------------------------------------------------
# The family: what other methods have in the place of GAE, of the clipped objective and of the KL penalty in the rewards.

ONE_PASS = dict(objective="policy_gradient", epochs=1)  # over a batch: then it is another policy's
PRESETS = {"size": {  # Ziegler et al. 2019's code for GPT-2, 124M, stylistic tasks: lr 1e-5, 4 passes over 512 rollouts
    "gpt2": dict(rollouts=512, epochs=4, minibatch=512, micro_batch=8, lr=1e-5, value_lr=1e-5, value_clip=0.2, lam=0.95,
                 max_new_tokens=128)}, "method": {
    "ppo": {},
    "ppo_penalty": dict(objective="penalty"),
    "a2c": ONE_PASS,
    "reinforce": dict(ONE_PASS, advantage="reward_to_go"),
    "reinforce_baseline": dict(ONE_PASS, advantage="reward_to_go", baseline="batch"),
    "grpo": dict(advantage="group", group=8, kl="loss", mean="responses")},
    "reward": {"verifier": dict(missing_end_score=0.0)}}
NEEDS = {  # flags that mean nothing without another one's value
    **dict.fromkeys(("lam", "value_lr", "value_clip"), ("advantage", "gae")), "gamma": ("advantage", "gae", "reward_to_go"),
    "baseline": ("advantage", "reward_to_go"), "scale": ("advantage", "gae", "group"), "clip": ("objective", "clip"),
    **dict.fromkeys(("penalty", "penalty_target"), ("objective", "penalty")), "kl": ("beta",), "kl_target": ("beta",),
    "top_k": ("prompt",)}


def returns_to_go(rewards, mask, gamma):
    """G_t = Σ_{k>=t} γ^{k-t} r_k (ECE 7115, "Value Function"): rewards, mask (B, T-1) -> (B, T-1), 0 outside the mask."""
    return gae(rewards, torch.zeros_like(rewards), mask, gamma, lam=1.0)[1]  # δ_t = r_t where V = 0


def group_advantages(scores, group, scale=True):
    """GRPO's Â = (R - mean)/std over the responses to one prompt (Shao et al. 2024, section 4.1.2): (B,) -> (B,).

    Rows i·group to (i+1)·group - 1 belong to one prompt. Without scale only the mean goes. Equal scores give 0.
    >>> group_advantages(torch.tensor([1.0, 3.0, 7.0, 7.0]), group=2).tolist()
    [-1.0, 1.0, 0.0, 0.0]
    """
    rows = scores.view(-1, group)
    equal = (rows == rows[:, :1]).all(dim=1, keepdim=True)  # their mean may be rounded
    spread = (rows.var(dim=1, keepdim=True, correction=0) + 1e-8).sqrt() if scale else 1.0  # 1e-8: rounding isn't blown up
    return torch.where(equal, 0.0, (rows - rows.mean(dim=1, keepdim=True)) / spread).flatten()


def policy_gradient_loss(logprobs, advantages, mask):
    """REINFORCE and A2C, -E_t[A_t log π_θ(a_t|s_t)], a token mean (ECE 7115, "Policy Gradient"): all (B, T-1) -> scalar."""
    return -masked_mean(advantages * torch.where(mask, logprobs, 0.0), mask)


def penalty_policy_loss(logprobs, old_logprobs, advantages, kl, mask, coefficient):
    """PPO without clipping, -E_t[ρ_t A_t - c KL(π_old(·|s_t) || π_θ(·|s_t))] (Schulman et al. 2017, eq. 8), a token mean:
    all (B, T-1), kl that divergence, exact -> scalar."""
    ratio = torch.where(mask, logprobs - old_logprobs, 0.0).exp()  # ρ_t
    return -masked_mean(ratio * advantages - coefficient * kl, mask)


def adapt_penalty(coefficient, kl, target):
    """c ← 2c after an update of more than 1.5 times the target, c/2 below 1/1.5 of it (Schulman et al. 2017, section 4)."""
    return coefficient * 2 if kl > 1.5 * target else coefficient / 2 if kl < target / 1.5 else coefficient


# ----------------------------------------------------------------------------------------------------------------------
# The steps of the loop


class Experience(NamedTuple):
    """What the update needs of a rollout batch: tokens (B, T), lengths (B,), all others (B, T-1), or None if unused."""
    tokens: torch.Tensor
    lengths: torch.Tensor
    mask: torch.Tensor
    old_logprobs: torch.Tensor
    advantages: torch.Tensor
    old_values: torch.Tensor = None
    returns: torch.Tensor = None
    ref_logprobs: torch.Tensor = None
    old_distribution: torch.Tensor = None   # (B, T-1, V): log π_old(·|s_t)

    def pick(self, rows):
        """The Experience of some rows only, cut to the longest of them: what is cut off is padding."""
        tokens, lengths, *others = (None if tensor is None else tensor[rows] for tensor in self)
        T = int(lengths.max())
        return Experience(tokens[:, :T], lengths, *(None if tensor is None else tensor[:, :T - 1] for tensor in others))


@torch.inference_mode()
def score(policy, reference, reward_model, value_model, rollout, mask, config):
    """Step 2. What the models say of a Rollout: (logprobs, ref_logprobs, values), each (B, T-1) and 0 where the mask is
    false or the model is None, and the reward model's scores (B,)."""
    logprobs, ref_logprobs, values = torch.zeros(3, *mask.shape, device=mask.device)
    scores = torch.zeros(len(mask), device=mask.device)
    for rows in rollout.lengths.argsort().split(config.micro_batch):  # rows of one length together: little padding
        T = int(rollout.lengths[rows].max())
        tokens, part = rollout.tokens[rows, :T], mask[rows, :T - 1]
        logprobs[rows, :T - 1] = masked_logprobs(policy, tokens, part, config.temperature)
        if reward_model:
            scores[rows] = reward_model.score(tokens, rollout.lengths[rows])
        if reference:
            ref_logprobs[rows, :T - 1] = masked_logprobs(reference, tokens, part, config.temperature)
        if value_model:
            values[rows, :T - 1] = torch.where(part, value_model(tokens)[:, :-1], 0.0)  # column t: V(s_t)
    return logprobs, ref_logprobs, values, scores


def estimate_advantages(rewards, values, mask, config, moving=0.0):
    """Step 3. (advantages, returns), each (B, T-1): what pushes the policy, and what the value model is fitted to.
    moving: the mean return of the batches before, a baseline."""
    if config.advantage == "gae":
        advantages, returns = gae(rewards, values, mask, config.gamma, config.lam)
        return whiten(advantages, mask) if config.scale else advantages, returns
    returns = returns_to_go(rewards, mask, config.gamma)
    whole = returns.gather(1, mask.int().argmax(dim=1, keepdim=True))  # (B, 1): G_0, of the whole response
    if config.advantage == "group":  # every token of a response has its advantage
        advantages = group_advantages(whole[:, 0], config.group, config.scale)[:, None]
    elif config.baseline == "leave_one_out":  # the mean G_0 of the prompt's other responses: not a function of the action
        others = whole.view(-1, config.group).sum(dim=1).repeat_interleave(config.group)[:, None] - whole
        advantages = returns - others / (config.group - 1)
    else:
        advantages = returns - dict(none=0.0, batch=masked_mean(returns, mask), moving=moving)[config.baseline]
    return torch.where(mask, advantages, 0.0), returns


def backward(policy, value_model, batch, config, documents=()):
    """Step 4. Accumulate the gradient of all losses over one minibatch (an Experience), config.micro_batch rows at a time,
    each counting by its share of the response tokens: the gradient is the minibatch's token mean, however it is cut.
    documents: as many lists of ids as responses (PPO-ptx). Returns (policy_loss, value_loss, clip_fraction, approx_kl)."""
    total, count, sizes = torch.zeros(4, device=batch.mask.device), batch.mask.sum(), batch.mask.sum(dim=1, keepdim=True)
    # In the token mean a response's tokens weigh 1, or N/(B |y_i|): 1/N Σ_i Σ_t N/(B |y_i|) = 1/B Σ_i 1/|y_i| Σ_t.
    weight = count / (len(sizes) * sizes) if config.mean == "responses" else torch.ones_like(sizes)
    batch = batch._replace(advantages=weight * batch.advantages)
    for rows in batch.lengths.argsort().split(config.micro_batch):  # rows of one length together: little padding
        part, w = batch.pick(rows), weight[rows]
        value_loss, clip_fraction = torch.zeros(2, device=total.device)
        if config.objective == "penalty":
            new = log_distribution(policy, part.tokens, part.mask, config.temperature)  # (B, T-1, V)
            logprobs, step_kl = new.gather(2, part.tokens[:, 1:, None]).squeeze(2), exact_kl(part.old_distribution, new)
            loss = penalty_policy_loss(logprobs, part.old_logprobs, part.advantages, w * step_kl, part.mask, config.penalty)
        else:
            logprobs = masked_logprobs(policy, part.tokens, part.mask, config.temperature)
            _, _, step_kl = kl_estimators((part.old_logprobs - logprobs).detach())  # k3: the samples are π_old's
        if config.objective == "clip":
            loss, clip_fraction = clipped_policy_loss(logprobs, part.old_logprobs, part.advantages, part.mask, config.clip)
        elif config.objective == "policy_gradient":
            loss = policy_gradient_loss(logprobs, part.advantages, part.mask)
        if config.kl == "loss" and config.beta:  # β k3 of KL(π_θ || π_ref)   (Shao et al. 2024, eq. 4)
            loss = loss + config.beta * masked_mean(w * kl_estimators(logprobs - part.ref_logprobs)[2], part.mask)
        if value_model:
            values = value_model(part.tokens)[:, :-1]  # column t: V(s_t)
            value_loss = clipped_value_loss(values, part.old_values, part.returns, part.mask, config.value_clip)
        share = part.mask.sum() / count
        (share * (loss + value_loss)).backward()  # two models, no shared parameter: the sum needs no coefficient
        total += share * torch.stack([loss, value_loss, clip_fraction, masked_mean(step_kl, part.mask)]).detach()
    if documents:  # PPO-ptx: -γ E[log π_θ(x)]   (Ouyang et al. 2022, eq. 2)
        total[0] += sft.backward(policy, documents, [1] * len(documents), count / config.ptx, config.micro_batch)
    return total


def optimize(policy, reference, reward_model, value_model, draw_prompts, end_token, config, saved=None,
             draw_documents=None, token_rewards=None):
    """The loop. Trains policy and value_model in place; a generator, after every iteration: (rollout, figures, state).

    reference, value_model: never called, may be None, where config has no use for them; reward_model: anything with
    score(tokens, lengths) -> (B,), or None and in its place token_rewards(rollout) -> (B, T-1), see reward_model.rewarder;
    draw_prompts(count, rng), draw_documents(count, rng) (PPO-ptx): lists of ids; figures: name -> number, without the
    annotator's; state: what a later call needs as `saved`, with its "step", to go on."""
    device, saved, penalized = policy.wte.weight.device, saved or {"step": 0}, config.objective == "penalty"
    distribution = torch.no_grad()(log_distribution)
    reference, value_model = reference if config.beta else None, value_model if config.advantage == "gae" else None
    models = dict(policy=policy, value_model=value_model) if value_model else dict(policy=policy)
    optimizers = {f"{name}_optimizer": make_optimizer(model, weight_decay=0.0) for name, model in models.items()}
    state = dict(**models, **optimizers, beta=config.beta, penalty=config.penalty, moving=0.0)
    state.update(restore(saved, config.iterations, **state))
    for iteration in range(saved["step"], config.iterations):
        started, rng = time.perf_counter(), random.Random(f"ppo {config.seed} {iteration}")
        config = replace(config, beta=state["beta"], penalty=state["penalty"])

        # 1. Generate: sample prompts, generate completions with π_θ, from its full distribution.
        prompts = [prompt for prompt in draw_prompts(config.rollouts // config.group, rng) for _ in range(config.group)]
        with autocast(device):
            rollout = generate(policy, prompts, config.max_new_tokens, end_token, config.temperature,
                               seed=rng.getrandbits(48))
        tokens, lengths, ended = rollout.tokens, rollout.lengths, rollout.ended(end_token)
        mask = response_mask(rollout.prompt_lengths, lengths, tokens.shape[1])
        generated = time.perf_counter()

        # 2. Score: the reward model at the last token; log-probabilities under π_θ and π_ref for the KL penalty.
        #    π_old ← π_θ: the policy that has sampled stays, as its log-probabilities, while π_θ moves on.
        old_logprobs, ref_logprobs, values, scores = score(policy, reference, reward_model, value_model, rollout, mask,
                                                           config)
        scores = torch.where(ended, scores, config.missing_end_score)
        rewards = shaped_rewards(scores, old_logprobs, ref_logprobs, mask, config.beta if config.kl == "rewards" else 0.0)
        if token_rewards:  # a response that never ended has earned none
            earned = torch.where(ended[:, None], token_rewards(rollout), 0.0)
            rewards, scores = rewards + earned, scores + earned.sum(dim=1)
        scored = time.perf_counter()

        # 3. Estimate advantages.
        advantages, returns = estimate_advantages(rewards, values, mask, config, state["moving"])
        old_distribution = distribution(policy, tokens, mask, config.temperature) if penalized else None
        experience = Experience(tokens, lengths, mask, old_logprobs=old_logprobs, advantages=advantages, old_values=values,
                                returns=returns, ref_logprobs=ref_logprobs, old_distribution=old_distribution)

        # 4. Update: K epochs of minibatches on the same rollouts.
        falling = 1 - iteration / config.iterations  # near the optimum the advantages are noise, which whitening blows up
        rates, losses = (falling * config.lr, falling * config.value_lr), []
        for epoch in range(config.epochs):
            for rows in torch.tensor(rng.sample(range(len(mask)), len(mask)), device=device).split(config.minibatch):
                documents = draw_documents(len(rows), rng) if draw_documents else ()
                losses.append(backward(policy, value_model, experience.pick(rows), config, documents))
                for model, optimizer, lr, loss in zip(models.values(), optimizers.values(), rates, losses[-1]):
                    optimizer_step(optimizer, model, lr, loss)
        _, value_loss, clip_fraction, approx_kl = torch.stack(losses).mean(dim=0).tolist()
        if penalized:  # how far the whole update went
            step_kl = exact_kl(old_distribution, distribution(policy, tokens, mask, config.temperature))
            approx_kl = masked_mean(step_kl, mask).item()
            state["penalty"] = adapt_penalty(config.penalty, approx_kl, config.penalty_target)
        updated = time.perf_counter()

        # 5. Repeat with a new batch: the next rollouts come from the updated policy.
        kl = (old_logprobs - ref_logprobs).sum(dim=1)  # (B,): log π_θ(y|x) / π_ref(y|x), both 0 outside the mask
        G = returns_to_go(rewards, mask, config.gamma)[mask]  # the slides' G_t: V plays no part
        spread, unexplained = G.var(correction=0), (G - values[mask]).var(correction=0)
        figures = dict(
            reward=scores.mean().item(), kl=kl.mean().item(), J=(scores - config.beta * kl).mean().item(), beta=config.beta,
            entropy=-masked_mean(old_logprobs, mask).item(), clip_fraction=clip_fraction, approx_kl=approx_kl,
            penalty=config.penalty, value_explained=1 - (unexplained / spread).item() if spread > 1e-8 else 0.0,
            value_loss=value_loss, length=mask.sum(dim=1).float().mean().item(), no_end=1 - ended.float().mean().item(),
            **peak_memory(device), rollout_s=generated - started, scoring_s=scored - generated, update_s=updated - scored)
        known = dict(kl=reference, J=reference, value_explained=value_model, value_loss=value_model, penalty=penalized,
                     clip_fraction=config.objective == "clip")
        state["beta"] = adapt_beta(config.beta, kl.mean().item(), config.kl_target) if config.kl_target else config.beta
        state["moving"] += (0.1 if iteration else 1.0) * (G.mean().item() - state["moving"])
        yield rollout, {name: x for name, x in figures.items() if known.get(name, True)}, state


def load_models(config, device):
    """({name: model, None where the method or the reward has no use for it}, tokenizer, the files they come from)."""
    path = stage_folder(config, "sft") / "checkpoint.pt"
    policy, tokenizer, _ = load_checkpoint(path, "sft", config.size, device)  # π_θ, trained
    reward_model, found = load_reward_model(config, tokenizer)
    # V starts as r_φ, or where there is none as the policy with a new head, 0.
    value_model = (deepcopy(reward_model) or start_from(policy)) if config.advantage == "gae" else None
    return dict(policy=policy, reference=deepcopy(policy) if config.beta else None, reward_model=reward_model,
                value_model=value_model), tokenizer, [path, *found]


def train(config):
    """Optimize the SFT policy against the reward model and save it to OUT/SIZE/NAME/checkpoint.pt."""
    check_name(config.name, "ppo")
    least = 2 if config.advantage == "group" or config.baseline == "leave_one_out" else 1
    if config.group < least or config.rollouts % config.group:
        raise InputError(f"--group {config.group}: must be at least {least} and divide --rollouts {config.rollouts}")
    reward_of(config.reward, config.data)  # refused before minutes of training
    own, held_out = split_prompts(config.data, config.seed) if config.data else (None, None)
    train_missing(config, stages_until(REWARDS.get(config.reward, "sft")), config.name)
    folder, device = stage_folder(config, config.name), get_device()
    models, tokenizer, sources = load_models(config, device)
    policy, reference, reward_model, value_model = models.values()
    scorer, token_rewards = rewarder(config.reward, reward_model, tokenizer)
    fitting, data = sft.prompts_with_room(own, tokenizer, config, policy.config.block_size)
    announce(config.name, config, device, data + f"; reward: {config.reward}" * (config.reward != "reward_model"), policy)
    show_models(trained=("policy", "value_model"), **models)
    draw_prompts = lambda count, rng: [tokenizer.prompt(text) for text in sft.sample_prompts(fitting, count, rng)]
    draw_documents, documents, texts = pretraining_text(config, tokenizer, policy) if config.ptx else (None, [], [])
    unprinted = ("beta", "approx_kl", "value_loss", "memory_mb", "rollout_s", "scoring_s", "update_s")
    with Run(config.name, folder, config, config.save, sources + texts, unprinted) as run:
        run.total, state = config.iterations, run.saved
        loop = optimize(policy, reference, None if token_rewards else scorer, value_model, draw_prompts,
                        tokenizer.end_token, config, run.saved, draw_documents, token_rewards)
        for iteration, (rollout, figures, state) in enumerate(loop, start=run.saved["step"] + 1):
            gold = {} if config.data else dict(gold=gold_rewards(rollout, tokenizer).mean().item())
            run(iteration, **gold, **figures)
            run.end_step(iteration, **state)
        save_checkpoint(run.folder / "checkpoint.pt", "ppo", config.size, policy, tokenizer,
                        beta=state.get("beta", config.beta), temperature=config.temperature,
                        missing_end_score=config.missing_end_score, metrics=run.figures())
        run.finish()

    reference = reference or load_checkpoint(sources[0], "sft", config.size, device)[0]
    sft.show_before_and_after(held_out, reference, policy, tokenizer, config, scorer, config.temperature, documents)
    print(f"saved {folder / 'checkpoint.pt'}; next: python dpo.py, then python best_of_n.py", flush=True)


def main(argv=None):
    config = parse_config(Config, GPU, argv, "Optimize the SFT policy against the reward model with PPO.", NEEDS, PRESETS)
    if config.prompt:
        return sft.answer(config, "ppo", config.name)
    train(config)


if __name__ == "__main__":
    run_script(main)
