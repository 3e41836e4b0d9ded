"""
ppo.py: RLHF with proximal policy optimization (Schulman et al. 2017; Ziegler et al. 2019; Ouyang et al. 2022;
ECE 7115, 13. RLHF, "RLHF Training with PPO"; CS 224R, Lecture 9, ch. 7; CME 295, Lecture 5).

    max_θ J(θ) = E_{x~D, y~π_θ} [ r_φ(x, y) ] - β · KL( π_θ(·|x) || π_ref(·|x) )

Four models: the policy π_θ, the frozen reference π_ref (SFT), the frozen reward model r_φ, the value model V.

    python ppo.py                       everything: a stage whose checkpoint is missing is trained first
    python ppo.py --data FILE.jsonl     prompts of your own, after sft.py and reward_model.py on your own data
    python ppo.py --prompt "…"          answer a prompt with the policy
    python ppo.py --beta 0 --iterations 80 --name ppo-beta0            over-optimization: reward rises, gold falls

The loop is the lecture's: 1 generate, 2 score, 3 estimate advantages, 4 update (K epochs), 5 repeat.

Departures from the slides, on purpose:
    The KL penalty stands in the rewards, token by token, as on the slide "Token-Level Returns" and in Ouyang et al. 2022,
    not in the loss as on the slide "RLHF Training with PPO"; with both it would count twice.
    For a negative advantage the clipped objective is (1-ε)A; the clipping slide prints 1+ε.
    `returns`, what the value model is fitted to, are λ-returns, A_t + V(s_t); the slides' G_t is the sum of the rewards.
    The advantages are whitened over the response tokens of a batch, and the value loss is clipped like the policy's
    (both from Ziegler et al. 2019's code); neither is on the slides.
    A response that hits the length limit never earned its score: it gets missing_end_score instead of the model's.
"""

import random
import time
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

import reward_model as reward_model_stage
from data.files import InputError, run_script, split_prompts
from data.run import Run, announce, check_name, parse_config, peak_memory, restore, stage_folder, train_missing
from gpt import (autocast, generate, get_device, load_checkpoint, make_optimizer, masked_logprobs, optimizer_step,
                 response_mask, save_checkpoint)
from reward_model import RewardModel, gold_rewards, show_before_and_after
from sft import answer, prompts_with_room, sample_prompts

EARLIER = {**reward_model_stage.EARLIER, "reward_model": reward_model_stage.main}  # the stages that this one builds on


@dataclass
class Config:
    size: Literal["auto", "cpu", "gpu"] = "auto"    # auto takes gpu where there is one
    out: str = "out"            # folder of all outputs; this stage writes to OUT/SIZE/NAME
    name: str = "ppo"           # name of this run's folder: ppo-… keeps an experiment apart
    seed: int = 1               # fixes prompts, samples and minibatches
    data: str = ""              # prompts of your own, a .jsonl file, instead of the little world's requests
    prompt: str = ""            # answer this prompt with the policy of --name, and stop
    top_k: int = 0              # the answer to --prompt draws from the k likeliest tokens only; 0: from all
    iterations: int = 40        # rollout batches
    rollouts: int = 64          # responses in a rollout batch
    epochs: int = 4             # K: passes over each rollout batch
    minibatch: int = 16         # responses in an optimizer step
    micro_batch: int = 8        # responses in one forward pass; less memory and padding, the same gradient
    lr: float = 2e-4            # the policy's learning rate, falling linearly to zero
    value_lr: float = 5e-4      # the value model's, likewise
    beta: float = 0.2           # price of one nat of KL to the reference, in reward units
    kl_target: float = 0.0      # > 0: adapt beta until the KL per response is this many nats (Ziegler et al. 2019)
    clip: float = 0.2           # ε of the policy's ratio
    value_clip: float = 0.5     # how far a value may move from the rollout's, in reward units
    gamma: float = 1.0          # discount: 1, the reward comes with the last token
    lam: float = 0.95           # λ of generalized advantage estimation
    temperature: float = 1.0    # of the policy that samples, and so of every log-probability; with --prompt: times that
    max_new_tokens: int = 96    # the longest response
    missing_end_score: float = -5.0     # score of a response without <|end|>, in place of the reward model's
    save: int = 10              # iterations between two saves of the state for --resume
    resume: bool = False        # go on with the run that was interrupted in this folder


GPU = dict(iterations=100, rollouts=512, minibatch=128, micro_batch=128, lr=5e-5, value_lr=1e-4, max_new_tokens=128)

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
    kl = logprobs - ref_logprobs
    rewards = torch.where(mask, -beta * kl, 0.0)
    columns = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, columns, -1).amax(dim=1)  # (B,): where the last response token is emitted
    rewards[torch.arange(len(scores), device=mask.device), last] += scores
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


def kl_estimators(log_ratio):
    """Three estimates of KL(p || q) from samples of p, one by one (Schulman 2020, "Approximating KL Divergence").

    log_ratio = log p(y) - log q(y), y ~ p -> (k1, k2, k3) of its shape. k1 and k3 are unbiased, k2 is not; k2 and k3 are
    never negative. The shaped rewards need k1: its sum is the log-ratio of the whole response, which the objective holds.
    """
    k1 = log_ratio
    k2 = log_ratio ** 2 / 2
    k3 = (-log_ratio).exp() - 1 + log_ratio
    return k1, k2, k3


def adapt_beta(beta, kl, kl_target):
    """The adaptive KL controller (Ziegler et al. 2019, section 2.2): e = clip(KL/target - 1, ±0.2), β ← β(1 + 0.1 e)."""
    error = min(max(kl / kl_target - 1, -0.2), 0.2)
    return beta * (1 + 0.1 * error)


# ----------------------------------------------------------------------------------------------------------------------
# The steps of the loop


class Experience(NamedTuple):
    """What the update needs of a rollout batch: tokens (B, T), lengths (B,), prompt + response, all others (B, T-1)."""
    tokens: torch.Tensor
    lengths: torch.Tensor
    mask: torch.Tensor
    old_logprobs: torch.Tensor
    advantages: torch.Tensor
    old_values: torch.Tensor = None     # these two: of the value model, where there is one
    returns: torch.Tensor = None

    def pick(self, rows):
        """The Experience of some rows only, cut to the longest of them: what is cut off is padding."""
        tokens, lengths, *others = (None if tensor is None else tensor[rows] for tensor in self)
        T = int(lengths.max())
        return Experience(tokens[:, :T], lengths, *(None if tensor is None else tensor[:, :T - 1] for tensor in others))


@torch.inference_mode()
def score(policy, reference, reward_model, value_model, rollout, mask, config):
    """Step 2. What the four models say of a Rollout: (logprobs, ref_logprobs, values), each (B, T-1) and 0 where the mask
    is false, and the reward model's scores (B,)."""
    logprobs, ref_logprobs, values = torch.zeros(3, *mask.shape, device=mask.device)
    scores = torch.zeros(len(mask), device=mask.device)
    for rows in rollout.lengths.argsort().split(config.micro_batch):  # rows of one length together: little padding
        T = int(rollout.lengths[rows].max())
        tokens, part = rollout.tokens[rows, :T], mask[rows, :T - 1]
        logprobs[rows, :T - 1] = masked_logprobs(policy, tokens, part, config.temperature)
        ref_logprobs[rows, :T - 1] = masked_logprobs(reference, tokens, part, config.temperature)
        scores[rows] = reward_model.score(tokens, rollout.lengths[rows])
        if value_model:
            values[rows, :T - 1] = torch.where(part, value_model(tokens)[:, :-1], 0.0)  # column t: V(s_t)
    return logprobs, ref_logprobs, values, scores


def estimate_advantages(rewards, values, mask, config):
    """Step 3. (advantages, returns), each (B, T-1): what pushes the policy, and what the value model is fitted to."""
    advantages, returns = gae(rewards, values, mask, config.gamma, config.lam)
    return whiten(advantages, mask), returns


def backward(policy, value_model, batch, config):
    """Step 4. Accumulate the gradient of both losses over one minibatch (an Experience), config.micro_batch rows at a time,
    each counting by its share of the response tokens: the gradient is the minibatch's token mean, however it is cut.
    Returns figures (policy_loss, value_loss, clip_fraction, approx_kl), token means too."""
    total = torch.zeros(4, device=batch.tokens.device)
    for rows in batch.lengths.argsort().split(config.micro_batch):  # rows of one length together: little padding
        part = batch.pick(rows)
        logprobs = masked_logprobs(policy, part.tokens, part.mask, config.temperature)
        loss, clip_fraction = clipped_policy_loss(logprobs, part.old_logprobs, part.advantages, part.mask, config.clip)
        value_loss = torch.zeros_like(loss)
        if value_model:
            values = value_model(part.tokens)[:, :-1]  # column t: V(s_t)
            value_loss = clipped_value_loss(values, part.old_values, part.returns, part.mask, config.value_clip)
        share = part.mask.sum() / batch.mask.sum()
        (share * (loss + value_loss)).backward()  # two models, no shared parameter: the sum needs no coefficient
        _, _, k3 = kl_estimators((part.old_logprobs - logprobs).detach())  # of KL(π_old || π_θ): the samples are π_old's
        total += share * torch.stack([loss.detach(), value_loss.detach(), clip_fraction, masked_mean(k3, part.mask)])
    return total


def optimize(policy, reference, reward_model, value_model, draw_prompts, end_token, config, saved=None):
    """PPO's loop. Trains policy and value_model in place; a generator, after every iteration: (rollout, figures, state).

    reward_model: anything with score(tokens, lengths) -> (B,); draw_prompts(count, rng) -> lists of ids; figures: name ->
    number, without the annotator's; state: what a later call needs as `saved`, with its "step" (iterations), to go on.
    """
    device, saved = policy.wte.weight.device, saved or {"step": 0}
    models = dict(policy=policy, value_model=value_model) if value_model else dict(policy=policy)
    optimizers = {f"{name}_optimizer": make_optimizer(model, weight_decay=0.0) for name, model in models.items()}
    state = dict(**models, **optimizers, beta=config.beta)
    state.update(restore(saved, config.iterations, **state))
    for iteration in range(saved["step"], config.iterations):
        started, rng, beta = time.perf_counter(), random.Random(f"ppo {config.seed} {iteration}"), state["beta"]

        # 1. Generate: sample prompts, generate completions with π_θ, from its full distribution.
        with autocast(device):
            rollout = generate(policy, draw_prompts(config.rollouts, rng), config.max_new_tokens, end_token,
                               config.temperature, seed=rng.getrandbits(48))
        tokens, lengths, ended = rollout.tokens, rollout.lengths, rollout.ended(end_token)
        mask = response_mask(rollout.prompt_lengths, lengths, tokens.shape[1])
        generated = time.perf_counter()

        # 2. Score: the reward model at the last token; log-probabilities under π_θ and π_ref for the KL penalty.
        #    π_old ← π_θ: the policy that has sampled stays, as its log-probabilities, while π_θ moves on.
        old_logprobs, ref_logprobs, values, scores = score(policy, reference, reward_model, value_model, rollout, mask,
                                                           config)
        scores = torch.where(ended, scores, config.missing_end_score)
        rewards = shaped_rewards(scores, old_logprobs, ref_logprobs, mask, beta)
        scored = time.perf_counter()

        # 3. Estimate advantages.
        advantages, returns = estimate_advantages(rewards, values, mask, config)
        experience = Experience(tokens, lengths, mask, old_logprobs=old_logprobs, advantages=advantages, old_values=values,
                                returns=returns)

        # 4. Update: K epochs of minibatches on the same rollouts.
        falling = 1 - iteration / config.iterations  # near the optimum the advantages are noise, which whitening blows up
        rates, losses = (falling * config.lr, falling * config.value_lr), []
        for epoch in range(config.epochs):
            order = torch.tensor(rng.sample(range(len(tokens)), len(tokens)), device=device)
            for rows in order.split(config.minibatch):
                losses.append(backward(policy, value_model, experience.pick(rows), config))
                for model, optimizer, lr, loss in zip(models.values(), optimizers.values(), rates, losses[-1]):
                    optimizer_step(optimizer, model, lr, loss)
        policy_loss, value_loss, clip_fraction, approx_kl = torch.stack(losses).mean(dim=0).tolist()
        updated = time.perf_counter()

        # 5. Repeat with a new batch: the next rollouts come from the updated policy.
        kl = (old_logprobs - ref_logprobs).sum(dim=1)  # (B,): log π_θ(y|x) / π_ref(y|x), both 0 outside the mask
        G = gae(rewards, torch.zeros_like(values), mask, config.gamma, lam=1.0)[1][mask]  # the slides' G_t: V plays no part
        spread, unexplained = G.var(correction=0), (G - values[mask]).var(correction=0)
        figures = dict(
            reward=scores.mean().item(), kl=kl.mean().item(), J=(scores - beta * kl).mean().item(), beta=beta,
            entropy=-masked_mean(old_logprobs, mask).item(), clip_fraction=clip_fraction, approx_kl=approx_kl,
            value_explained=(1 - unexplained / spread).item() if spread > 1e-8 else 0.0, value_loss=value_loss,
            length=mask.sum(dim=1).float().mean().item(), no_end=1 - ended.float().mean().item(), **peak_memory(device),
            rollout_s=generated - started, scoring_s=scored - generated, update_s=updated - scored)
        if config.kl_target:
            state["beta"] = adapt_beta(beta, kl.mean().item(), config.kl_target)
        yield rollout, figures, state


def load_models(config, device):
    """(policy, reference, reward model, value model, tokenizer, the files they come from)."""
    sft_path, reward_path = (stage_folder(config, stage) / "checkpoint.pt" for stage in ("sft", "reward_model"))
    policy, tokenizer, _ = load_checkpoint(sft_path, "sft", config.size, device)  # π_θ, trained
    reference, _, _ = load_checkpoint(sft_path, "sft", config.size, device)  # π_ref, frozen
    reward_model, reward_tokenizer, _ = load_checkpoint(reward_path, "reward_model", config.size, device, RewardModel)
    value_model, _, _ = load_checkpoint(reward_path, "reward_model", config.size, device, RewardModel)  # V starts as r_φ
    if reward_tokenizer.vocabulary != tokenizer.vocabulary:
        raise InputError(f"{reward_path}: its vocabulary is not that of {sft_path}; train the reward model again")
    return policy, reference, reward_model, value_model, tokenizer, [sft_path, reward_path]


def train(config):
    """Optimize the SFT policy against the reward model and save it to OUT/SIZE/NAME/checkpoint.pt."""
    check_name(config.name, "ppo")
    if config.kl_target and not config.beta:
        raise InputError(f"--kl_target {config.kl_target}: multiplies beta, and --beta 0 stays 0; give a --beta above 0")
    own, held_out = split_prompts(config.data, config.seed) if config.data else (None, None)  # before minutes of training
    train_missing(config, EARLIER, config.name)
    folder, device = stage_folder(config, config.name), get_device()
    policy, reference, reward_model, value_model, tokenizer, sources = load_models(config, device)
    fitting, data = prompts_with_room(own, tokenizer, config, policy.config.block_size)
    announce(config.name, config, device, data, policy)

    def draw_prompts(count, rng):
        return [tokenizer.prompt(text) for text in sample_prompts(fitting, count, rng)]

    unprinted = ("beta", "approx_kl", "value_loss", "memory_mb", "rollout_s", "scoring_s", "update_s")
    with Run(config.name, folder, config, config.save, sources, unprinted) as run:
        run.total, state = config.iterations, run.saved
        loop = optimize(policy, reference, reward_model, value_model, draw_prompts, tokenizer.end_token, config, run.saved)
        for iteration, (rollout, figures, state) in enumerate(loop, start=run.saved["step"] + 1):
            gold = {} if config.data else dict(gold=gold_rewards(rollout, tokenizer).mean().item())
            run(iteration, **gold, **figures)
            run.end_step(iteration, **state)
        save_checkpoint(run.folder / "checkpoint.pt", "ppo", config.size, policy, tokenizer,
                        beta=state.get("beta", config.beta), temperature=config.temperature,
                        missing_end_score=config.missing_end_score, metrics=run.figures())
        run.finish()

    show_before_and_after(held_out, reference, policy, tokenizer, config, reward_model, config.temperature)
    print(f"saved {folder / 'checkpoint.pt'}; next: python dpo.py, then python best_of_n.py", flush=True)


def main(argv=None):
    config = parse_config(Config, GPU, argv, "Optimize the SFT policy against the reward model with PPO.",
                          needs={"top_k": ("prompt",)})
    if config.prompt:
        answer(config, "ppo", config.name)
    else:
        train(config)


if __name__ == "__main__":
    run_script(main)
