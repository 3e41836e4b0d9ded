"""
ppo.py: RLHF with proximal policy optimization (Schulman et al. 2017; Ziegler et al. 2019; Ouyang et
al. 2022; ECE 7115, 13. RLHF; CS 224R, Lecture 9, ch. 7; CME 295, Lecture 5).

    max_θ J(θ) = E_{x~D, y~π_θ} [ r_φ(x, y) ]  -  β · KL( π_θ(·|x) || π_ref(·|x) )

Four models: the policy π_θ and the value model V, which are trained; the reference π_ref (the SFT
model) and the reward model r_φ, which are frozen. One iteration is the loop of the slide "RLHF
Training with PPO" (ECE 7115):

    1. generate               sample responses from π_θ
    2. score                  r_φ at the last token; log-probabilities under π_θ and π_ref
    3. estimate advantages    GAE over the token-level rewards
    4. update                 K epochs of clipped policy and value steps on the same rollouts
    5. repeat                 with new rollouts

    python ppo.py                       everything: a missing stage is trained first
    python ppo.py --data FILE.jsonl     prompts of your own, after sft.py and reward_model.py on it
    python ppo.py --prompt "…"          answer a prompt with the policy
    python ppo.py --explain             one response, token by token: KL_t, r_t, V(s_t), A_t, ρ_t
    python ppo.py --beta 0 --name ppo-beta0     over-optimization: reward rises, gold falls
    python ppo.py --reward verifier --name ppo-verifier     or process, "COMMAND" (CS 224R, ch. 11)
    python ppo.py --start rsft-per_prompt --name ppo-rsft   go on from another policy
    python ppo.py --method grpo --name ppo-grpo             the family, at the end of the file

Everything up to "The family" is the lecture's PPO and can be read top to bottom.

Departures from the slides, on purpose:
- The KL penalty is part of the token rewards (slide "Token-Level Returns"; Ouyang et al. 2022), not
  of the loss (slide "RLHF Training with PPO"). In both it would count twice.
- For a negative advantage the clipped objective is (1-ε)A; the clipping slide prints 1+ε.
- V is fitted to λ-returns, A_t + V(s_t); the slides fit it to the plain sum of rewards, G_t.
- Advantages are whitened, and the value loss is clipped (both from Ziegler et al. 2019's code).
- A response that hits the length limit has not earned its score: it gets missing_end_score.
- The slides update in K epochs, "typical: K = 2-4 gradient steps per batch"; at size cpu it is one
  epoch of 4 steps, so ρ_t stays near 1 and clips next to nothing. --epochs 4 --lr 2e-4 shows the
  clip at work.
"""

import math
import random
import shlex
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Callable, Literal, NamedTuple

import torch

import sft
from data.annotator import gold_rewards, read_texts, scored
from data.answer_key import optimality_gap
from data.corpus import draw_requests, pretraining_text, prompts_with_room
from data.files import InputError, run_script, split_prompts
from data.judges import reward_of
from data.run import (Run, SilentRun, allow_flags, announce, check_name, complete,
                      parse_config, refuse_stale, show, show_models, stage_folder, train_missing)
from data.table import Column, print_columns
from gpt import (autocast, generate, get_device, held_out_loss, load_checkpoint, make_optimizer,
                 masked_logprobs, memory_of_pieces, optimizer_step, pad, refuse_other_tokens,
                 response_mask, save_checkpoint)
from reward_model import load_reward_model, make_reward, start_from


@dataclass
class Config:
    # the objective
    method: Literal["ppo", "ppo_penalty", "a2c", "reinforce", "reinforce_baseline",
                    "reinforce_moving", "rloo", "grpo", "grpo_no_division", "grpo_kl_in_rewards",
                    "grpo_token_mean"] = "ppo"  # see "The family"
    reward: str = "reward_model"    # what is maximized: reward_model, process, verifier, or a
                                    # program: "COMMAND"
    beta: float = 0.2           # price of one nat of KL to the reference, in reward units
    kl_target: float = 0.0      # > 0: adapt beta until the KL per response is this many nats
    missing_end_score: float = -5.0     # score of a response without <|end|>, in place of r_φ's
    ptx: float = 0.0            # γ of PPO-ptx: price of a nat of pretraining text, in units of A_t

    # optimization
    iterations: int = 100       # rollout batches; where each serves one step (a2c, reinforce…,
                                # rloo): times rollouts / minibatch
    rollouts: int = 64          # responses in a rollout batch; where it serves one step: minibatch
    epochs: int = 1             # K: passes over each rollout batch; only the first is on-policy
    minibatch: int = 16         # responses in an optimizer step
    micro_batch: int = 8        # responses in one forward pass; less memory, the same gradient
    lr: float = 3e-4            # the policy's learning rate, decays linearly to zero
    value_lr: float = 5e-4      # the value model's, likewise
    clip: float = 0.2           # ε of the policy's ratio
    value_clip: float = 0.5     # how far a value may move from the rollout's, in reward units
    gamma: float = 1.0          # discount: 1, the reward comes with the last token
    lam: float = 0.9            # λ of generalized advantage estimation
    group: int = 1              # rloo, grpo: responses to the same prompt in a rollout batch
    penalty: float = 1.0        # ppo_penalty: first coefficient of KL(π_old || π_θ), which adapts
    penalty_target: float = 0.01    # the KL(π_old || π_θ) per token, in nats, that it adapts to

    # sampling
    data: str = ""              # prompts of your own, a .jsonl file, instead of the little world's
    max_new_tokens: int = 96    # the longest response
    sample_batch: int = 512     # responses in one batch of sampling; less memory, the same draws
    temperature: float = 1.0    # of the policy that samples and is scored; --prompt: times that
    prompt: str = ""            # answer this prompt with the policy of --name, and stop
    top_k: int = 0              # the answer to --prompt draws from the k likeliest tokens; 0: all

    # this run
    size: Literal["auto", "cpu", "gpu", "gpt2"] = "auto"    # auto: gpu if there is one; gpt2: see
                                                            # data/huggingface.py
    out: str = "out"            # folder of all outputs; this stage writes to OUT/SIZE/NAME
    name: str = "ppo"           # name of this run's folder: ppo-… keeps an experiment apart
    start: str = ""             # begin from this policy (dpo, rsft-…, another ppo-…), not from the
                                # SFT model, which stays π_ref
    seed: int = 1               # fixes prompts, samples and minibatches
    explain: bool = False       # print one response with every quantity of the slides, and stop
    save: int = 10              # iterations between two saves of the state for --resume
    resume: bool = False        # continue the run that was interrupted in this folder


GPU = dict(rollouts=512, epochs=4, minibatch=128, micro_batch=128, lr=5e-5, value_lr=1e-4, lam=0.95,
           max_new_tokens=128)
# Ziegler et al. 2019's code for GPT-2, 124M, stylistic tasks: lr 1e-5, 4 passes over 512 rollouts
GPT2 = dict(rollouts=512, epochs=4, minibatch=512, micro_batch=8, lr=1e-5, value_lr=1e-5,
            value_clip=0.2, lam=0.95, max_new_tokens=128, sample_batch=128)

# --------------------------------------------------------------------------------------------------
# The formulas. Every per-token tensor is (B, T-1): column t is the action a_t = tokens[:, t+1],
# taken in the state s_t = tokens[:, :t+1]. mask is true where a_t is part of the response.


def masked_mean(x, mask):
    """The mean of x where mask is true; what is elsewhere never counts, not even inf or nan.

    >>> x = torch.tensor([[1.0, 3.0, float("inf")]])
    >>> masked_mean(x, torch.tensor([[True, True, False]])).item()
    2.0
    """
    return torch.where(mask, x, 0.0).sum() / mask.sum()


def whiten(x, mask):
    """Shift and scale x to mean 0 and variance 1 over the mask (Ziegler et al. 2019); 0 elsewhere,
    and everywhere if all are equal."""
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    equal = variance <= (1e-6 * mean) ** 2  # only rounding is left, which must not be amplified
    return torch.where(mask & ~equal, (x - mean) * (variance + 1e-8).rsqrt(), 0.0)


def shaped_rewards(scores, logprobs, ref_logprobs, mask, beta):
    """One reward per token out of one score per response (ECE 7115, "Token-Level Returns").

    scores (B,), the others (B, T-1) -> (B, T-1):
        KL_t = log π_θ(a_t|s_t) - log π_ref(a_t|s_t)
        r_t = -β KL_t, and at the last response token r_T = R(x, y) - β KL_T
    The ratio has the sampling policy on top: only then is the expectation of Σ_t KL_t the KL
    divergence, which is never negative.
    """
    kl = logprobs - ref_logprobs  # KL_t
    last = mask & (mask.cumsum(dim=1) == mask.sum(dim=1, keepdim=True))  # the last response token
    return torch.where(mask, -beta * kl, 0.0) + torch.where(last, scores[:, None], 0.0)


def gae(rewards, values, mask, gamma, lam):
    """Generalized advantage estimation (Schulman et al. 2016, eq. 16; ECE 7115, "Generalized
    Advantage Estimation").

    rewards, values, mask (B, T-1) -> (advantages, returns), both (B, T-1), 0 outside the mask.
    values[:, t] = V(s_t); the state after the last response token is terminal, V = 0: also for a
    response that hit the length limit.
        δ_t = r_t + γ V(s_{t+1}) - V(s_t)      A_t = δ_t + γλ A_{t+1}      returns_t = A_t + V(s_t)
    """
    values = torch.where(mask, values, 0.0)  # V(terminal) = 0
    advantages = torch.zeros_like(rewards)
    next_value = torch.zeros_like(rewards[:, 0])
    next_advantage = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]  # δ_t
        advantages[:, t] = torch.where(mask[:, t], delta + gamma * lam * next_advantage, 0.0)  # A_t
        next_value = values[:, t]
        next_advantage = advantages[:, t]
    return advantages, advantages + values


def clipped_policy_loss(logprobs, old_logprobs, advantages, mask, clip):
    """PPO's clipped objective, negated (Schulman et al. 2017, eq. 7; ECE 7115, "PPO Clipped
    Objective").

    All (B, T-1) -> (loss, clip_fraction), token means. clip_fraction is the share of tokens whose
    gradient the clipping stops: ρ > 1+ε with A > 0, or ρ < 1-ε with A < 0.
    """
    ratio = torch.where(mask, logprobs - old_logprobs, 0.0).exp()  # ρ_t = π_θ(a|s) / π_old(a|s)
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - clip, 1 + clip) * advantages
    loss = -masked_mean(torch.min(unclipped, clipped), mask)  # -E_t[min(ρ_t A_t, clip(ρ_t) A_t)]
    return loss, masked_mean((clipped < unclipped).float(), mask)


def clipped_value_loss(values, old_values, returns, mask, clip):
    """½ (V(s_t) - returns_t)², the worse of the plain and the clipped one (ECE 7115, "Value
    Function", whose G_t is returns_t here; Ziegler et al. 2019): all (B, T-1) -> scalar, a token
    mean."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * masked_mean(torch.max((values - returns) ** 2, (clipped - returns) ** 2), mask)


def returns_to_go(rewards, mask, gamma):
    """G_t = Σ_{k>=t} γ^{k-t} r_k (ECE 7115, "Value Function"): rewards, mask (B, T-1) -> (B, T-1),
    0 outside the mask."""
    returns = torch.zeros_like(rewards)
    G = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        G = torch.where(mask[:, t], rewards[:, t] + gamma * G, 0.0)
        returns[:, t] = G
    return returns


def kl_estimators(log_ratio):
    """Three estimates of KL(p || q) from samples of p (Schulman 2020, "Approximating KL
    Divergence").

    log_ratio = log p(y) - log q(y), y ~ p -> (k1, k2, k3) of its shape. k1 and k3 are unbiased, k2
    is not; k2 and k3 are never negative. The shaped rewards need k1: its sum is the log-ratio of
    the whole response, which is in the objective.
    """
    k1 = log_ratio
    k2 = log_ratio ** 2 / 2
    k3 = (-log_ratio).exp() - 1 + log_ratio
    return k1, k2, k3


def adapt_beta(beta, kl, kl_target):
    """The adaptive KL controller (Ziegler et al. 2019, section 2.2): e = clip(KL/target - 1, ±0.2),
    β ← β(1 + 0.1 e)."""
    error = min(max(kl / kl_target - 1, -0.2), 0.2)
    return beta * (1 + 0.1 * error)


# --------------------------------------------------------------------------------------------------
# The loop


class Task(NamedTuple):
    """What the policy is asked, and what its answers earn."""
    draw_prompts: Callable      # (count, rng) -> lists of ids
    reward: Callable            # rollout -> (scores (B,), token_rewards (B, T-1)), see make_reward
    end_token: int
    gold: Callable = None       # rollout -> (B,), the annotator's true reward: for the log only
    draw_documents: Callable = None     # PPO-ptx: (count, rng) -> lists of ids


class Rollouts(NamedTuple):
    """A batch of responses. tokens (B, T); lengths, ended, scores (B,); all others (B, T-1)."""
    tokens: torch.Tensor
    lengths: torch.Tensor           # prompt + response
    mask: torch.Tensor
    ended: torch.Tensor             # whether the response has its <|end|>
    scores: torch.Tensor            # of whole responses
    token_rewards: torch.Tensor     # of single actions, which add to R(x, y); 0 of r_φ
    old_logprobs: torch.Tensor      # log π_old(a_t|s_t), of the policy that sampled
    ref_logprobs: torch.Tensor      # log π_ref(a_t|s_t)
    old_values: torch.Tensor        # V(s_t), of the value model at that time; 0 without one
    advantages: torch.Tensor = None
    returns: torch.Tensor = None

    def pick(self, rows):
        """These rows only, cut to the longest of them: what is cut off is padding."""
        T = int(self.lengths[rows].max())
        picked = {}
        for name, x in self._asdict().items():
            picked[name] = x[rows]
            if name == "tokens":
                picked[name] = x[rows, :T]
            elif x.dim() == 2:
                picked[name] = x[rows, :T - 1]
        return Rollouts(**picked)


@torch.inference_mode()
def all_logprobs(model, rollout, mask, micro_batch, temperature=1.0):
    """log π(a_t|s_t) of a whole batch, micro_batch rows at a time: (B, T-1), 0 outside the mask."""
    logprobs = torch.zeros(mask.shape, device=mask.device)
    for rows in rollout.lengths.argsort().split(micro_batch):  # by length: little padding
        T = int(rollout.lengths[rows].max())
        logprobs[rows, :T - 1] = masked_logprobs(
            model, rollout.tokens[rows, :T], mask[rows, :T - 1], temperature)
    return logprobs


@torch.inference_mode()
def all_values(value_model, rollout, mask, micro_batch):
    """V(s_t) likewise; 0 without a value model."""
    values = torch.zeros(mask.shape, device=mask.device)
    if value_model:
        for rows in rollout.lengths.argsort().split(micro_batch):
            T = int(rollout.lengths[rows].max())
            values[rows, :T - 1] = value_model(rollout.tokens[rows, :T])[:, :-1]  # column t: V(s_t)
    return torch.where(mask, values, 0.0)


def sample(policy, reference, value_model, task, prompts, config, rng, run):
    """Steps 1 and 2: a response to each prompt, scored. value_model: None for methods without V."""
    # 1. Generate completions with π_θ, from its full distribution.
    with autocast(policy.wte.weight.device):
        rollout = generate(policy, prompts, config.max_new_tokens, task.end_token,
                           config.temperature, seed=rng.getrandbits(48),
                           at_once=config.sample_batch)
    run.time("rollout_s")

    # 2. Score: R(x, y), and log-probabilities under π_θ, from now on π_old, and π_ref, which is the
    #    SFT model itself, whatever the policy's temperature.
    mask = response_mask(rollout.prompt_lengths, rollout.lengths, rollout.tokens.shape[1])
    ended = rollout.ended(task.end_token)
    scores, token_rewards = task.reward(rollout)
    rollouts = Rollouts(
        rollout.tokens, rollout.lengths, mask, ended,
        scores=torch.where(ended, scores, config.missing_end_score),
        token_rewards=torch.where(ended[:, None], token_rewards, 0.0),
        old_logprobs=all_logprobs(policy, rollout, mask, config.micro_batch, config.temperature),
        ref_logprobs=all_logprobs(reference, rollout, mask, config.micro_batch),
        old_values=all_values(value_model, rollout, mask, config.micro_batch))
    run.time("scoring_s")
    return rollouts


def minibatches(count, epochs, size, rng, device):
    """The rows of every optimizer step: `epochs` passes over `count` rows, each in a new order."""
    batches = []
    for epoch in range(epochs):
        order = torch.tensor(rng.sample(range(count), count), device=device)
        batches += order.split(size)
    return batches


def log_rollouts(run, iteration, rollouts, rewards, beta, value_model, task, config):
    """Log what a batch of rollouts says of the policy and, if there is one, of V."""
    R = rollouts.scores + rollouts.token_rewards.sum(dim=1)  # R(x, y)
    if R[rollouts.ended].mean() < config.missing_end_score:
        run.note("finished responses score less than unfinished ones: never ending pays; lower "
                 f"--missing_end_score {config.missing_end_score}")
    kl = (rollouts.old_logprobs - rollouts.ref_logprobs).sum(dim=1)  # log π_θ(y|x) / π_ref(y|x)
    if task.gold:
        run.log(iteration, gold=task.gold(rollouts).mean())
    run.log(iteration, reward=R.mean(), kl=kl.mean(), J=(R - beta * kl).mean(), beta=beta,
            entropy=-masked_mean(rollouts.old_logprobs, rollouts.mask),
            length=rollouts.mask.sum(dim=1).float().mean(),
            no_end=1 - rollouts.ended.float().mean())

    if value_model:
        G = returns_to_go(rewards, rollouts.mask, config.gamma)[rollouts.mask]
        V = rollouts.old_values[rollouts.mask]
        explained = 1 - (G - V).var(correction=0) / G.var(correction=0)
        nothing = G.var(correction=0) < 1e-8  # only rounding is left to explain
        run.log(iteration, value_explained=torch.where(nothing, 0.0, explained))


def ptx_backward(policy, documents, tokens_in_batch, config):
    """PPO-ptx: accumulate the gradient of -γ E[log π_θ(x)] (Ouyang et al. 2022, eq. 2) over as many
    documents, lists of ids, as responses, divided by the number of the responses' tokens."""
    for start in range(0, len(documents), config.micro_batch):
        tokens, lengths = pad(documents[start:start + config.micro_batch], tokens_in_batch.device)
        mask = response_mask(torch.ones_like(lengths), lengths, tokens.shape[1])
        loss = -masked_logprobs(policy, tokens, mask, config.temperature).sum()
        (config.ptx * loss / tokens_in_batch).backward()


def ppo(policy, reference, value_model, task, config, run):
    """The lecture's PPO. Trains policy and value_model in place."""
    policy_optimizer = make_optimizer(policy, weight_decay=0.0)
    value_optimizer = make_optimizer(value_model, weight_decay=0.0)
    adaptive = {"beta": config.beta}  # changes only with --kl_target

    for iteration in run.steps(config.iterations, policy=policy, value_model=value_model,
                               policy_optimizer=policy_optimizer,
                               value_optimizer=value_optimizer, adaptive=adaptive):
        rng = random.Random(f"ppo {config.seed} {iteration}")
        beta = adaptive["beta"]
        # Near the optimum advantages are mostly noise, and whitening amplifies it: decay.
        decay = 1 - iteration / config.iterations

        # 1. Generate.  2. Score.
        prompts = task.draw_prompts(config.rollouts, rng)
        rollouts = sample(policy, reference, value_model, task, prompts, config, rng, run)
        mask = rollouts.mask

        # 3. Estimate advantages.
        rewards = shaped_rewards(
            rollouts.scores, rollouts.old_logprobs, rollouts.ref_logprobs, mask, beta)
        rewards = rewards + rollouts.token_rewards
        advantages, returns = gae(rewards, rollouts.old_values, mask, config.gamma, config.lam)
        advantages = whiten(advantages, mask)
        rollouts = rollouts._replace(advantages=advantages, returns=returns)
        log_rollouts(run, iteration, rollouts, rewards, beta, value_model, task, config)

        # 4. Update: K epochs of minibatches on the same rollouts.
        for rows in minibatches(config.rollouts, config.epochs, config.minibatch, rng,
                                mask.device):
            tokens_in_batch = mask[rows].sum()
            rows = rows[rollouts.lengths[rows].argsort()]  # by length: little padding in a part
            for part in rows.split(config.micro_batch):
                batch = rollouts.pick(part)
                weight = batch.mask.sum() / tokens_in_batch  # the parts add up to a token mean

                logprobs = masked_logprobs(policy, batch.tokens, batch.mask, config.temperature)
                policy_loss, clip_fraction = clipped_policy_loss(
                    logprobs, batch.old_logprobs, batch.advantages, batch.mask, config.clip)

                values = value_model(batch.tokens)[:, :-1]  # column t: V(s_t)
                value_loss = clipped_value_loss(
                    values, batch.old_values, batch.returns, batch.mask, config.value_clip)

                # Two models without a shared parameter: the sum needs no coefficient.
                (weight * (policy_loss + value_loss)).backward()
                _, _, k3 = kl_estimators((batch.old_logprobs - logprobs).detach())
                run.log(iteration, weight, clip_fraction=clip_fraction, value_loss=value_loss,
                        approx_kl=masked_mean(k3, batch.mask))  # KL(π_old || π_θ) per token

            if task.draw_documents:
                documents = task.draw_documents(len(rows), rng)
                ptx_backward(policy, documents, tokens_in_batch, config)
            optimizer_step(policy_optimizer, policy, decay * config.lr)
            optimizer_step(value_optimizer, value_model, decay * config.value_lr)
        run.time("update_s")

        # 5. Repeat with new rollouts, from the updated policy.
        if config.kl_target:
            kl = (rollouts.old_logprobs - rollouts.ref_logprobs).sum(dim=1).mean().item()
            adaptive["beta"] = adapt_beta(beta, kl, config.kl_target)


# --------------------------------------------------------------------------------------------------
# The family: what other methods have in the place of the value model, of the clipped objective and
# of the KL penalty in the rewards. A student of PPO can close the file here.

# Without a ratio a batch may be used for one step only: after it the samples are no longer the
# current policy's (ECE 7115, "Two Old Policies").
ONE_STEP = ("a2c", "reinforce", "reinforce_baseline", "reinforce_moving", "rloo")
GRPO = ("grpo", "grpo_no_division", "grpo_kl_in_rewards", "grpo_token_mean")
KL_IN_LOSS = ("grpo", "grpo_no_division")
WITH_VALUES = ("ppo", "ppo_penalty", "a2c")


def leave_one_out(returns, group):
    """RLOO's baseline (Kool et al. 2019; Ahmadian et al. 2024): the mean return of the other
    responses to the same prompt, which does not depend on the response itself. (B,) -> (B,).

    >>> leave_one_out(torch.tensor([1.0, 3.0, 8.0]), group=3).tolist()
    [5.5, 4.5, 2.0]
    """
    total = returns.view(-1, group).sum(dim=1).repeat_interleave(group)
    return (total - returns) / (group - 1)


def group_advantages(scores, group, scale=True):
    """GRPO's Â = (R - mean)/std over the responses to one prompt (Shao et al. 2024, section 4.1.2):
    (B,) -> (B,).

    Rows i·group to (i+1)·group - 1 belong to one prompt. Without scale only the mean is subtracted.
    Equal scores give 0.
    >>> group_advantages(torch.tensor([1.0, 3.0, 7.0, 7.0]), group=2).tolist()
    [-1.0, 1.0, 0.0, 0.0]
    """
    rows = scores.view(-1, group)
    advantages = rows - rows.mean(dim=1, keepdim=True)
    if scale:
        variance = rows.var(dim=1, keepdim=True, correction=0)
        advantages = advantages / (variance + 1e-8).sqrt()  # 1e-8: rounding is not amplified
    equal = (rows == rows[:, :1]).all(dim=1, keepdim=True)  # their mean may be rounded
    return torch.where(equal, 0.0, advantages).flatten()


def policy_gradient_loss(logprobs, advantages, mask):
    """REINFORCE and A2C, -E_t[A_t log π_θ(a_t|s_t)], a token mean (ECE 7115, "REINFORCE"): all
    (B, T-1) -> scalar."""
    return -masked_mean(advantages * torch.where(mask, logprobs, 0.0), mask)


def penalty_policy_loss(logprobs, old_logprobs, advantages, kl, mask, coefficient):
    """PPO without clipping, -E_t[ρ_t A_t - c KL(π_old(·|s_t) || π_θ(·|s_t))] (Schulman et al. 2017,
    eq. 8), a token mean: all (B, T-1), kl that divergence or an estimate of it -> scalar."""
    ratio = torch.where(mask, logprobs - old_logprobs, 0.0).exp()  # ρ_t
    return -masked_mean(ratio * advantages - coefficient * kl, mask)


def adapt_penalty(coefficient, kl, target):
    """c ← 2c after an update of more than 1.5 times the target, c/2 below 1/1.5 of it (Schulman et
    al. 2017, section 4)."""
    if kl > 1.5 * target:
        return coefficient * 2
    if kl < target / 1.5:
        return coefficient / 2
    return coefficient


def at_first_token(x, mask):
    """x (B, T-1) at the first token of every response: (B,)."""
    first = mask.int().argmax(dim=1, keepdim=True)  # argmax finds the first 1
    return x.gather(1, first).squeeze(1)


def estimate_advantages(rewards, rollouts, mean, config):
    """Step 3 of every method: (advantages, returns), both (B, T-1).

    mean: reinforce_moving's baseline, in training the mean return of the batches before.
    """
    mask = rollouts.mask
    returns = returns_to_go(rewards, mask, config.gamma)
    G_0 = at_first_token(returns, mask)  # (B,): of the whole response
    if config.method in WITH_VALUES:
        advantages, returns = gae(rewards, rollouts.old_values, mask, config.gamma, config.lam)
        advantages = whiten(advantages, mask)
    elif config.method == "reinforce":
        advantages = returns
    elif config.method == "reinforce_baseline":
        advantages = returns - masked_mean(returns, mask)
    elif config.method == "reinforce_moving":
        advantages = returns - mean
    elif config.method == "rloo":
        advantages = returns - leave_one_out(G_0, config.group)[:, None]
    else:  # GRPO: every token has its response's
        divide = config.method == "grpo"
        advantages = group_advantages(G_0, config.group, divide)[:, None]
    return torch.where(mask, advantages, 0.0), returns


def policy_gradients(policy, reference, value_model, task, config, run):
    """PPO with a KL penalty, A2C, REINFORCE and its baselines, RLOO, GRPO: the same five steps.

    value_model: of ppo_penalty and a2c, None for the others. The three variants of GRPO leave off
    its departures from PPO one after the other: no division by the group's spread; also the KL in
    the rewards, not in the loss; also a mean over tokens, not within each response first.
    """
    method = config.method
    kl_in_loss = method in KL_IN_LOSS
    epochs = config.epochs
    size = config.minibatch
    if method in ONE_STEP:
        epochs = 1
        size = config.rollouts
    trained = {"policy": policy, "policy_optimizer": make_optimizer(policy, weight_decay=0.0)}
    if value_model:
        trained["value_model"] = value_model
        trained["value_optimizer"] = make_optimizer(value_model, weight_decay=0.0)
    adaptive = {"penalty": config.penalty, "mean": 0.0}

    for iteration in run.steps(config.iterations, **trained, adaptive=adaptive):
        rng = random.Random(f"ppo {config.seed} {iteration}")
        decay = 1 - iteration / config.iterations

        # 1. Generate `group` responses to every prompt.  2. Score.
        prompts = []
        for prompt in task.draw_prompts(config.rollouts // config.group, rng):
            prompts += [prompt] * config.group
        rollouts = sample(policy, reference, value_model, task, prompts, config, rng, run)
        mask = rollouts.mask

        # 3. Estimate advantages.
        beta = 0.0 if kl_in_loss else config.beta
        rewards = shaped_rewards(
            rollouts.scores, rollouts.old_logprobs, rollouts.ref_logprobs, mask, beta)
        rewards = rewards + rollouts.token_rewards
        advantages, returns = estimate_advantages(rewards, rollouts, adaptive["mean"], config)
        rollouts = rollouts._replace(advantages=advantages, returns=returns)
        log_rollouts(run, iteration, rollouts, rewards, config.beta, value_model, task, config)

        # 4. Update.
        for rows in minibatches(config.rollouts, epochs, size, rng, mask.device):
            tokens_in_batch = mask[rows].sum()
            rows = rows[rollouts.lengths[rows].argsort()]
            for part in rows.split(config.micro_batch):
                batch = rollouts.pick(part)
                weight = batch.mask.sum() / tokens_in_batch
                logprobs = masked_logprobs(policy, batch.tokens, batch.mask, config.temperature)
                _, _, k3 = kl_estimators(batch.old_logprobs - logprobs)  # ρ - 1 - log ρ

                if method in ONE_STEP:
                    loss = policy_gradient_loss(logprobs, batch.advantages, batch.mask)
                elif method == "ppo_penalty":
                    loss = penalty_policy_loss(logprobs, batch.old_logprobs, batch.advantages, k3,
                                               batch.mask, adaptive["penalty"])
                else:
                    # 1/B Σ_i 1/|y_i| Σ_t = 1/N Σ_i Σ_t N/(B |y_i|), of N tokens: a factor for each
                    # response, which is positive and may stand inside the minimum.
                    factor = tokens_in_batch / (len(rows) * batch.mask.sum(dim=1, keepdim=True))
                    if method == "grpo_token_mean":
                        factor = torch.ones_like(factor)
                    loss, clip_fraction = clipped_policy_loss(
                        logprobs, batch.old_logprobs, factor * batch.advantages, batch.mask,
                        config.clip)
                    run.log(iteration, weight, clip_fraction=clip_fraction)
                    if kl_in_loss:  # β KL(π_θ || π_ref) by its k3 (Shao et al. 2024, eq. 4)
                        _, _, ref_k3 = kl_estimators(logprobs - batch.ref_logprobs)
                        loss = loss + config.beta * masked_mean(factor * ref_k3, batch.mask)
                if value_model:
                    values = value_model(batch.tokens)[:, :-1]
                    value_loss = clipped_value_loss(
                        values, batch.old_values, batch.returns, batch.mask, config.value_clip)
                    run.log(iteration, weight, value_loss=value_loss)
                    loss = loss + value_loss
                (weight * loss).backward()
                run.log(iteration, weight, approx_kl=masked_mean(k3, batch.mask))

            optimizer_step(trained["policy_optimizer"], policy, decay * config.lr)
            if value_model:
                optimizer_step(trained["value_optimizer"], value_model, decay * config.value_lr)
        run.time("update_s")

        # 5. Repeat.
        if method == "ppo_penalty":  # how far the whole update went
            logprobs = all_logprobs(policy, rollouts, mask, config.micro_batch, config.temperature)
            _, _, k3 = kl_estimators(rollouts.old_logprobs - logprobs)
            kl = masked_mean(k3, mask).item()
            run.log(iteration, update_kl=kl, penalty=adaptive["penalty"])
            adaptive["penalty"] = adapt_penalty(adaptive["penalty"], kl, config.penalty_target)
        if method == "reinforce_moving":
            rate = 0.1 if iteration else 1.0
            adaptive["mean"] += rate * (masked_mean(returns, mask).item() - adaptive["mean"])


# --------------------------------------------------------------------------------------------------
# The stage


def train(config):
    """Optimize the SFT policy against the reward and save it to OUT/SIZE/NAME/checkpoint.pt."""
    check_name(config.name, "ppo")
    least = 2 if config.method in ("rloo", *GRPO) else 1
    if config.group < least or config.rollouts % config.group:
        raise InputError(f"--group {config.group}: must be at least {least} and divide --rollouts "
                         f"{config.rollouts}")
    if config.kl_target and not config.beta:
        raise InputError(f"--kl_target {config.kl_target}: cannot be used with --beta 0")
    reward_of(config.reward, config.data)  # refused before minutes of training
    own = None
    held_out = None
    if config.data:
        own, held_out = split_prompts(config.data)
    needed = ["gpt", "sft"]
    if config.reward in ("reward_model", "process"):
        needed.append("reward_model")
    if config.reward == "process":
        needed.append("process_model")
    train_missing(config, needed, config.name)

    # The four models. V starts as that of --start, as r_φ (--reward process: as that model) or, if
    # there is neither, as the policy with a new head.
    device = get_device()
    sources = [stage_folder(config, "sft") / "checkpoint.pt"]
    reference, tokenizer, checkpoint = load_checkpoint(sources[0], "sft", config.size, device)
    if not config.data:
        sft.refuse_own_text(sources[0], checkpoint)
    policy = deepcopy(reference)
    start_checkpoint = {}
    if config.start:
        policy, start_tokenizer, start_checkpoint = sft.load_policy(config, config.temperature)
        sources.append(stage_folder(config, config.start) / "checkpoint.pt")
        refuse_other_tokens(sources[-1], start_tokenizer, tokenizer)
    reward_model = None
    if "reward_model" in needed:
        reward_model, path = load_reward_model(config, tokenizer)
        sources.append(path)
    value_model = None
    if config.method in WITH_VALUES:
        value_model = deepcopy(reward_model) if reward_model else start_from(policy)
        if "value_model" in start_checkpoint:
            value_model.load_state_dict(start_checkpoint["value_model"])

    data = "fresh requests of the little world"
    if own:
        own, data = prompts_with_room(own, config.data, tokenizer, config.max_new_tokens,
                                      policy.config.block_size)
    if config.reward != "reward_model":
        data += f"; reward: {config.reward}"
    announce(config.name, config, device, data, policy)
    learners = 2 if value_model else 1
    pieces = memory_of_pieces(policy.config, config.micro_batch,
                              min(config.sample_batch, config.rollouts), learners)
    show_models(("policy", "value_model"), pieces, policy=policy, reference=reference,
                reward_model=reward_model, value_model=value_model)

    def draw_prompts(count, rng):
        texts = rng.choices(own, k=count) if own else draw_requests(count, rng)
        return [tokenizer.prompt(text) for text in texts]

    def gold(rollouts):
        return gold_rewards(rollouts, tokenizer)

    documents = []
    draw_documents = None
    if config.ptx:
        path = stage_folder(config, checkpoint.get("base", "gpt")) / "checkpoint.pt"
        _, _, base = load_checkpoint(path, "gpt", config.size)
        draw_documents, documents, files = pretraining_text(base, path, tokenizer,
                                                            policy.config.block_size)
        sources += files
    task = Task(draw_prompts,
                make_reward(config.reward, reward_model, tokenizer, config.micro_batch),
                tokenizer.end_token, None if own else gold, draw_documents)

    folder = stage_folder(config, config.name)
    unprinted = ("beta", "approx_kl", "value_loss", "rollout_s", "scoring_s", "update_s")
    report = max(1, config.iterations // 100)
    with Run(config.name, folder, config, report, sources, save=config.save,
             unprinted=unprinted) as run:
        loop = ppo if config.method == "ppo" else policy_gradients
        loop(policy, reference, value_model, task, config, run)
        more = {name: getattr(config, name) for name in KEPT}
        if value_model:
            more["value_model"] = value_model.state_dict()
        beta = run.rows[-1]["beta"] if config.kl_target else config.beta
        save_checkpoint(run.folder / "checkpoint.pt", "ppo", config.size, policy, tokenizer,
                        beta=beta, metrics=run.figures(),
                        made_from=run.made_from(), **more)
        run.finish()

    if documents:
        before = held_out_loss(reference, documents, 1, config.micro_batch)
        after = held_out_loss(policy, documents, 1, config.micro_batch, config.temperature)
        print(f"pretraining loss {before:.3f} → {after:.3f} nats per token")
    sft.show_before_and_after(held_out, reference, policy, tokenizer, config, task.reward,
                              config.temperature, config.missing_end_score)
    print(f"saved {folder / 'checkpoint.pt'}; next: python dpo.py, then python best_of_n.py",
          flush=True)


# --------------------------------------------------------------------------------------------------
# One response with every number of the slides

# What a checkpoint keeps of its run for this.
KEPT = ("method", "reward", "data", "max_new_tokens", "gamma", "lam", "clip", "group", "lr",
        "temperature", "missing_end_score")


def explain(config):
    """Print a response of the policy of --name with every quantity of steps 2 to 4, a row a token.

    It is the first of a batch of 64 responses, rounded up to whole groups, to one prompt: --prompt,
    or a held-out one.
    """
    allow_flags(config, ("prompt", "reward", "name", "seed", "size", "out"), "explain")
    check_name(config.name, "ppo")
    path = stage_folder(config, config.name) / "checkpoint.pt"
    complete(path.parent)
    refuse_stale(path.parent)
    policy, tokenizer, checkpoint = load_checkpoint(path, "ppo", config.size, get_device())
    if "method" not in checkpoint:
        raise InputError(f"{path}: does not say how it was trained; train it again with ppo.py")
    trained_with = checkpoint["reward"]
    if "reward" in config.given and config.reward != trained_with:
        raise InputError(f"--reward {config.reward}: {path} was trained with {trained_with}")
    if "reward" not in config.given and trained_with not in ("reward_model", "process", "verifier"):
        raise InputError(f"{path}: was trained with a program, which this would run; if you trust "
                         f"it, give --reward {shlex.quote(trained_with)} too")
    config = replace(config, **{name: checkpoint[name] for name in KEPT})
    samples = math.ceil(64 / config.group) * config.group
    sft_path = stage_folder(config, "sft") / "checkpoint.pt"
    reference, _, sft_checkpoint = load_checkpoint(sft_path, "sft", config.size, get_device())
    reward_model = None
    if config.reward in ("reward_model", "process"):
        reward_model, _ = load_reward_model(config, tokenizer)
    value_model = None
    if config.method in WITH_VALUES:
        value_model = start_from(policy)
        value_model.load_state_dict(checkpoint["value_model"])

    prompt = config.prompt
    if not prompt and config.data:
        prompts, _ = prompts_with_room(split_prompts(config.data)[1], config.data, tokenizer,
                                       config.max_new_tokens, policy.config.block_size)
        prompt = prompts[0]
    elif not prompt:
        sft.refuse_own_text(sft_path, sft_checkpoint)
        prompt = draw_requests(1, random.Random(f"explain {config.seed}"), held_out=True)[0]

    # 1. Generate.  2. Score.
    task = Task(None, make_reward(config.reward, reward_model, tokenizer, config.micro_batch),
                tokenizer.end_token)
    rng = random.Random(f"explain {config.seed}")
    rollouts = sample(policy, reference, value_model, task, [tokenizer.prompt(prompt)] * samples,
                      config, rng, SilentRun())
    mask = rollouts.mask

    # 3. Estimate advantages.
    beta = checkpoint["beta"]
    beta_in_rewards = 0.0 if config.method in KL_IN_LOSS else beta
    rewards = shaped_rewards(
        rollouts.scores, rollouts.old_logprobs, rollouts.ref_logprobs, mask, beta_in_rewards)
    rewards = rewards + rollouts.token_rewards
    G = returns_to_go(rewards, mask, config.gamma)
    mean = masked_mean(G, mask).item()  # in the place of that of the batches before
    advantages, returns = estimate_advantages(rewards, rollouts, mean, config)
    rollouts = rollouts._replace(advantages=advantages, returns=returns)

    _, text = read_texts(rollouts.tokens[:1], rollouts.lengths[:1], tokenizer)[0]
    R = rollouts.scores + rollouts.token_rewards.sum(dim=1)  # R(x, y)
    show(("prompt", prompt), ("response", scored(prompt, text, R[0])))
    actions = Column("a_t", tokenizer.shown(rollouts.tokens[0, 1:][mask[0]].tolist()))
    print_rewards(actions, rewards, G, rollouts, config)
    print_sums(R, rewards, rollouts, beta_in_rewards, beta)
    if config.method in ("rloo", *GRPO):
        print_group(R, rewards, rollouts, config)
    if config.method == "ppo":
        print_update(actions, policy, rollouts, config)


def column(name, x, rollouts, signed=True):
    """x (B, T-1) of the first response as a column."""
    return Column(name, x[0, rollouts.mask[0]].tolist(), ".3f", signed)


def print_rewards(actions, rewards, G, rollouts, config):
    """Steps 2 and 3 for the first response, a row a token."""
    columns = [actions,
               column("log π_θ", rollouts.old_logprobs, rollouts, signed=False),
               column("log π_ref", rollouts.ref_logprobs, rollouts, signed=False),
               column("KL_t", rollouts.old_logprobs - rollouts.ref_logprobs, rollouts),
               column("r_t", rewards, rollouts)]
    legend = ['KL_t, r_t: ECE 7115, "Token-Level Returns" (shaped_rewards).']
    if config.method in WITH_VALUES:
        V = rollouts.old_values
        deltas, _ = gae(rewards, V, rollouts.mask, config.gamma, lam=0.0)
        estimates, _ = gae(rewards, V, rollouts.mask, config.gamma, config.lam)
        columns += [column("V(s_t)", V, rollouts),
                    column("δ_t", deltas, rollouts),
                    column("A_t", estimates, rollouts),
                    column("G_t - V", G - V, rollouts),
                    column("whitened", rollouts.advantages, rollouts)]
        legend += [f'A_t with λ = {config.lam}: "Generalized Advantage Estimation" (gae); δ_t has '
                   "λ = 0, G_t - V has λ = 1."]
    else:
        columns += [column("G_t", G, rollouts),
                    column("Â_t", rollouts.advantages, rollouts)]
        legend += [f'G_t: "Value Function" (returns_to_go); Â_t: --method {config.method} '
                   "(estimate_advantages)."]
        if config.method == "reinforce_moving":
            legend += ["Its baseline is the mean of these responses here, not of batches before."]
    print()
    print_columns(columns, legend)


def print_sums(R, rewards, rollouts, beta_in_rewards, beta):
    """What the columns add up to, beside what it must be, and the prompt's optimum."""
    logprob = rollouts.old_logprobs.sum(dim=1)
    ref_logprob = rollouts.ref_logprobs.sum(dim=1)
    log_ratio = logprob - ref_logprob
    print(f"\nΣ KL_t = {log_ratio[0]:.3f} = log π_θ(y|x) - log π_ref(y|x) = {logprob[0]:.3f} - "
          f"({ref_logprob[0]:.3f})\n"
          f"Σ r_t = {rewards[0].sum():.3f} = R(x, y) - β Σ KL_t = {R[0]:.3f} - "
          f"{beta_in_rewards:.3f} · ({log_ratio[0]:.3f})")
    if not rollouts.ended[0]:
        print("R(x, y) is --missing_end_score: the response has no <|end|>")
    if beta:
        J, J_star = optimality_gap(R[None], log_ratio[None], beta)
        print(f"w = R/β - Σ KL_t = {R[0] / beta - log_ratio[0]:.3f}; over {len(R)} responses to "
              f"this prompt J = β E[w] = {J.item():.3f},\n"
              f"J* = β log Z = β log E[exp w] = {J_star.item():.3f}")


def print_group(R, rewards, rollouts, config):
    """What the first response is compared with, a row a response of its group."""
    group = slice(config.group)
    totals = rewards.sum(dim=1)
    advantages = at_first_token(rollouts.advantages, rollouts.mask)
    columns = [Column("response", list(range(1, config.group + 1)), "d"),
               Column("|y|", rollouts.mask[group].sum(dim=1).tolist(), "d"),
               Column("R(x, y)", R[group].tolist(), ".3f"),
               Column("Σ r_t", totals[group].tolist(), ".3f")]
    if config.method == "rloo":
        baselines = leave_one_out(totals, config.group)
        columns += [Column("mean of the others", baselines[group].tolist(), ".3f")]
    columns += [Column("Â_1", advantages[group].tolist(), ".3f", signed=True)]
    print()
    print_columns(columns)
    print(f"mean {totals[group].mean():.3f}, spread {totals[group].std(correction=0):.3f}")


def print_update(actions, policy, rollouts, config):
    """Step 4 for the first response: a copy of the policy takes one step on 16 responses."""
    count = 16
    updated = deepcopy(policy)
    optimizer = make_optimizer(updated, weight_decay=0.0)
    tokens_in_batch = rollouts.mask[:count].sum()
    for part in torch.arange(count, device=rollouts.mask.device).split(config.micro_batch):
        batch = rollouts.pick(part)
        logprobs = masked_logprobs(updated, batch.tokens, batch.mask, config.temperature)
        loss, _ = clipped_policy_loss(
            logprobs, batch.old_logprobs, batch.advantages, batch.mask, config.clip)
        (batch.mask.sum() / tokens_in_batch * loss).backward()
    optimizer_step(optimizer, updated, config.lr)

    logprobs = all_logprobs(updated, rollouts, rollouts.mask, config.micro_batch,
                            config.temperature)
    objectives = []
    clipped = []
    for t in rollouts.mask[0].nonzero():  # the loss of one token alone
        one = torch.zeros_like(rollouts.mask[:1])
        one[0, t] = True
        loss, clip_fraction = clipped_policy_loss(
            logprobs[:1], rollouts.old_logprobs[:1], rollouts.advantages[:1], one, config.clip)
        objectives.append(-loss.item())
        clipped.append("clipped" if clip_fraction else "")
    print()
    print_columns(
        [actions,
         column("log π_old", rollouts.old_logprobs, rollouts, signed=False),
         column("log π_θ", logprobs, rollouts, signed=False),
         column("ρ_t", (logprobs - rollouts.old_logprobs).exp(), rollouts, signed=False),
         column("Â_t", rollouts.advantages, rollouts),
         Column("min(…)", objectives, ".3f", signed=True),
         Column("", clipped)],
        [f"After one step with --lr {config.lr} on {count} responses. min(ρ_t Â_t, clip(ρ_t) Â_t), "
         f"ε = {config.clip}:",
         'ECE 7115, "PPO Clipped Objective" (clipped_policy_loss); Â_t is A_t, whitened.'])


def main(argv=None):
    with_values = ("method", *WITH_VALUES)
    with_ratio = ("method", "ppo", "ppo_penalty", *GRPO)
    penalty = ("method", "ppo_penalty")
    needs = {"top_k": ("prompt",), "kl_target": ("method", "ppo"), "ptx": ("method", "ppo"),
             "clip": ("method", "ppo", *GRPO), "group": ("method", "rloo", *GRPO),
             "lam": with_values, "value_lr": with_values, "value_clip": with_values,
             "epochs": with_ratio, "minibatch": with_ratio,
             "penalty": penalty, "penalty_target": penalty,
             "gamma": ("method", "ppo", "ppo_penalty", *ONE_STEP)}
    methods = {"rloo": dict(group=4)}
    for method in GRPO:
        methods[method] = dict(group=8)
    presets = {"size": {"gpt2": GPT2}, "method": methods,
               "reward": {"verifier": dict(missing_end_score=0.0)}}
    config = parse_config(Config, GPU, argv, "Optimize the SFT policy against the reward model.",
                          needs, presets)
    if config.method in ONE_STEP and "rollouts" not in config.given:
        # As many responses and steps as PPO's first passes: a batch is one of PPO's minibatches.
        if "iterations" not in config.given:
            config.iterations *= config.rollouts // config.minibatch
        config.rollouts = config.minibatch
    if config.explain:
        explain(config)
    elif config.prompt:
        sft.answer(config, "ppo", config.name)
    else:
        train(config)


if __name__ == "__main__":
    run_script(main)
