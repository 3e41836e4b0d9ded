"""
ppo.py: RLHF with proximal policy optimization (Schulman et al. 2017; Ziegler et al. 2019; Ouyang et al. 2022;
ECE 7115, 13. RLHF, "RLHF Training with PPO"; CS 224R, Lecture 9, ch. 7; CME 295, Lecture 5).

    max_θ J(θ) = E_{x~D, y~π_θ} [ r_φ(x, y) ] - β · KL( π_θ(·|x) || π_ref(·|x) )

Four models: the policy π_θ, the frozen reference π_ref (SFT), the frozen reward model r_φ, the value model V.

    python ppo.py                       everything: a stage whose checkpoint is missing is trained first
    python ppo.py --data FILE.jsonl     prompts of your own, after sft.py and reward_model.py on your own data
    python ppo.py --beta 0 --iterations 80 --name ppo-beta0            over-optimization: reward rises, gold falls
    python ppo.py --bench               the seconds of an iteration, and how they grow

The loop is the lecture's: 1 generate, 2 score, 3 estimate advantages, 4 update (K epochs), 5 repeat.

Departures from the slides, on purpose:
    The KL penalty stands in the rewards, token by token, as on the slide "Token-Level Returns" and in Ouyang et al. 2022,
    not in the loss as on the slide "RLHF Training with PPO"; with both it would count twice.
    For a negative advantage the clipped objective is (1-ε)A; the clipping slide prints 1+ε.
    The advantages are whitened over the response tokens of a batch, and the value loss is clipped like the policy's
    (both from Ziegler et al. 2019's code); neither is on the slides.
    A response that hits the length limit never earned its score: it gets missing_end_score instead of the model's.
"""

import random
import statistics
import time
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F

import gpt
from data import stories
from data.files import InputError, hold_out, read_prompts, run_script
from gpt import (GPT, GPTConfig, Run, announce, autocast, check_name, chosen_logprobs, forward_flops, generate, get_device,
                 load_checkpoint, make_optimizer, masked_logits, masked_logprobs, matrix_rate, optimizer_step, parse_config,
                 peak_memory, place, respond, response_mask, restore, save_checkpoint, show, stage_folder, train_if_missing)
from reward_model import RewardModel, gold_rewards
from reward_model import main as train_reward_model


@dataclass
class Config:
    size: str = "auto"          # cpu or gpu; auto takes gpu where there is one
    out: str = "out"            # folder of all outputs; this stage writes to OUT/SIZE/NAME
    name: str = "ppo"           # name of this run's folder: ppo-… keeps an experiment apart
    seed: int = 1               # fixes prompts, samples and minibatches
    data: str = ""              # prompts of your own, a .jsonl file, instead of the little world's requests
    iterations: int = 40        # rollout batches
    rollouts: int = 64          # responses in a rollout batch
    epochs: int = 4             # K: passes over each rollout batch
    minibatch: int = 16         # responses in an optimizer step
    micro_batch: int = 16       # responses in one forward pass; less memory, the same gradient
    lr: float = 2e-4            # the policy's learning rate, falling linearly to zero
    value_lr: float = 5e-4      # the value model's, likewise
    beta: float = 0.2           # price of one nat of KL to the reference, in reward units
    kl_target: float = 0.0      # > 0: adapt beta until the KL per response is this many nats (Ziegler et al. 2019)
    clip: float = 0.2           # ε of the policy's ratio
    value_clip: float = 0.5     # how far a value may move from the rollout's, in reward units
    gamma: float = 1.0          # discount: 1, the reward comes with the last token
    lam: float = 0.95           # λ of generalized advantage estimation
    temperature: float = 1.0    # of the policy that samples, and so of every log-probability too
    max_new_tokens: int = 96    # the longest response
    missing_end_score: float = -5.0     # score of a response without <|end|>, in place of the reward model's
    save: int = 10              # iterations between two saves of the state for --resume
    resume: bool = False        # go on with the run that was interrupted in this folder
    bench: bool = False         # measure this machine and this code, train and write nothing


GPU = dict(iterations=100, rollouts=512, minibatch=128, micro_batch=128, lr=5e-5, value_lr=1e-4, max_new_tokens=128)

# ----------------------------------------------------------------------------------------------------------------------
# The algorithm. Every tensor per token is (B, T-1), aligned with gpt.token_logprobs: column t is the action
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


def token_entropy(logits, temperature=1.0):
    """The entropy of the next-token distributions softmax(logits / temperature), in nats: logits (..., V) -> (...)."""
    logprobs = (logits.float() / temperature).log_softmax(dim=-1)
    return -(logprobs.exp() * logprobs).sum(dim=-1)


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
    """½ (V(s_t) - G_t)², the worse of the plain and the clipped one (ECE 7115, "Value Function"; Ziegler et al. 2019).

    All (B, T-1) -> scalar, a token mean.
    """
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
# One minibatch


class Experience(NamedTuple):
    """What the update needs of a rollout batch: tokens (B, T), lengths (B,), prompt + response, all others (B, T-1)."""
    tokens: torch.Tensor
    lengths: torch.Tensor
    mask: torch.Tensor
    old_logprobs: torch.Tensor
    old_values: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor

    def pick(self, rows):
        """The Experience of some rows only, cut to the longest of them: what is cut off is padding."""
        tokens, lengths, *others = (tensor[rows] for tensor in self)
        T = int(lengths.max())
        return Experience(tokens[:, :T], lengths, *(tensor[:, :T - 1] for tensor in others))


def masked_values(value_model, tokens, mask):
    """V(s_t) where mask is true, and 0 elsewhere: tokens (B, T), mask (B, T-1) -> (B, T-1)."""
    with autocast(tokens.device):
        return place(value_model(tokens, F.pad(mask, (0, 1))), mask)  # the state after the last token needs no value


def backward(policy, value_model, batch, config):
    """Accumulate the gradient of both losses over one minibatch (an Experience), config.micro_batch rows at a time.

    Every micro-batch counts by its share of the minibatch's response tokens, so the gradient is the minibatch's token
    mean, however it is cut. Returns figures (policy_loss, value_loss, clip_fraction, approx_kl), token means too.
    """
    total = torch.zeros(4, device=batch.tokens.device)
    for rows in torch.arange(len(batch.tokens), device=batch.tokens.device).split(config.micro_batch):
        part = batch.pick(rows)
        share = part.mask.sum() / batch.mask.sum()
        logprobs = masked_logprobs(policy, part.tokens, part.mask, config.temperature)
        values = masked_values(value_model, part.tokens, part.mask)
        policy_loss, clip_fraction = clipped_policy_loss(logprobs, part.old_logprobs, part.advantages, part.mask,
                                                         config.clip)
        value_loss = clipped_value_loss(values, part.old_values, part.returns, part.mask, config.value_clip)
        (share * (policy_loss + value_loss)).backward()  # two models, no shared parameter: the sum needs no coefficient
        _, _, k3 = kl_estimators((part.old_logprobs - logprobs).detach())
        approx_kl = masked_mean(k3, part.mask)  # KL(π_old || π_θ): the samples are π_old's
        total += share * torch.stack([policy_loss.detach(), value_loss.detach(), clip_fraction, approx_kl])
    return total


# ----------------------------------------------------------------------------------------------------------------------
# The loop


def score(policy, reference, reward_model, value_model, rollout, mask, config):
    """What the four models say of a Rollout: (logprobs, ref_logprobs, values) each (B, T-1) and 0 where the mask is false,
    the reward model's scores (B,), and the policy's mean entropy over the response tokens."""
    tokens, lengths = rollout.tokens, rollout.lengths
    logprobs, ref_logprobs, values = torch.zeros(3, *mask.shape, device=mask.device)
    scores, entropy = torch.zeros(len(tokens), device=mask.device), 0.0
    for rows in lengths.argsort().split(config.micro_batch):  # rows of one length together: little padding
        T = int(lengths[rows].max())
        part, part_mask = tokens[rows, :T], mask[rows, :T - 1]
        logits, chosen = masked_logits(policy, part, part_mask)  # (N, V), (N,)
        entropy += token_entropy(logits, config.temperature).sum() / mask.sum()
        logprobs[rows, :T - 1] = place(chosen_logprobs(logits, chosen, config.temperature), part_mask)
        ref_logprobs[rows, :T - 1] = masked_logprobs(reference, part, part_mask, config.temperature)
        values[rows, :T - 1] = masked_values(value_model, part, part_mask)
        with autocast(mask.device):
            scores[rows] = reward_model.score(part, lengths[rows])
    return logprobs, ref_logprobs, values, scores, float(entropy)


def optimize(policy, reference, reward_model, value_model, draw_prompts, end_token, config, saved=None):
    """PPO's loop. Trains policy and value_model in place; a generator, after every iteration: (rollout, figures, state).

    reward_model: anything with score(tokens, lengths) -> (B,); draw_prompts(count, rng) -> lists of ids; figures: name ->
    number, all that can be known without the annotator; state: what a later call needs as `saved`, with its "step", the
    number of iterations done, to go on from there.
    """
    device, saved = policy.wte.weight.device, saved or {"step": 0}
    optimizer = make_optimizer(policy, weight_decay=0.0)
    value_optimizer = make_optimizer(value_model, weight_decay=0.0)
    beta = restore(saved, config.iterations, policy=policy, value_model=value_model, optimizer=optimizer,
                   value_optimizer=value_optimizer, beta=config.beta)["beta"]
    for iteration in range(saved["step"], config.iterations):
        started, rng = time.perf_counter(), random.Random(f"ppo {config.seed} {iteration}")

        # 1. Generate: sample prompts, generate completions with π_θ, from its full distribution.
        prompts = draw_prompts(config.rollouts, rng)
        with autocast(device):
            rollout = generate(policy, prompts, config.max_new_tokens, end_token, config.temperature,
                               seed=rng.getrandbits(48))
        tokens, lengths, ended = rollout.tokens, rollout.lengths, rollout.ended(end_token)
        mask = response_mask(rollout.prompt_lengths, lengths, tokens.shape[1])
        generated = time.perf_counter()

        # 2. Score: the reward model at the last token; log-probabilities under π_θ and π_ref for the KL penalty.
        with torch.inference_mode():
            logprobs, ref_logprobs, values, scores, entropy = score(policy, reference, reward_model, value_model, rollout,
                                                                    mask, config)
        scores = torch.where(ended, scores, config.missing_end_score)
        rewards = shaped_rewards(scores, logprobs, ref_logprobs, mask, beta)
        scored = time.perf_counter()

        # 3. Estimate advantages.
        advantages, returns = gae(rewards, values, mask, config.gamma, config.lam)
        experience = Experience(tokens, lengths, mask, logprobs, values, whiten(advantages, mask), returns)

        # 4. Update: K epochs of minibatches on the same rollouts.
        falling = 1 - iteration / config.iterations  # near the optimum the advantages are noise, which whitening blows up
        losses = []
        for epoch in range(config.epochs):
            order = torch.tensor(rng.sample(range(len(tokens)), len(tokens)), device=device)
            for rows in order.split(config.minibatch):
                losses.append(backward(policy, value_model, experience.pick(rows), config))
                optimizer_step(optimizer, policy, falling * config.lr, losses[-1][0])
                optimizer_step(value_optimizer, value_model, falling * config.value_lr, losses[-1][1])
        policy_loss, value_loss, clip_fraction, approx_kl = torch.stack(losses).mean(dim=0).tolist()
        updated = time.perf_counter()

        # 5. Repeat with a new batch: the next rollouts come from the updated policy, π_old ← π_θ.
        kl = torch.where(mask, logprobs - ref_logprobs, 0.0).sum(dim=1)  # (B,): log π_θ(y|x) / π_ref(y|x)
        spread, unexplained = returns[mask].var(correction=0), (returns - values)[mask].var(correction=0)
        figures = dict(
            reward=scores.mean().item(), kl=kl.mean().item(), J=(scores - beta * kl).mean().item(), beta=beta,
            entropy=entropy, clip_fraction=clip_fraction, approx_kl=approx_kl,
            value_explained=1 - (unexplained / spread.clamp(min=1e-8)).item(), value_loss=value_loss,
            length=mask.sum(dim=1).float().mean().item(), no_end=1 - ended.float().mean().item(),
            memory_mb=peak_memory(device), rollout_s=generated - started, scoring_s=scored - generated,
            update_s=updated - scored)
        if config.kl_target:
            beta = adapt_beta(beta, kl.mean().item(), config.kl_target)
        yield rollout, figures, dict(policy=policy, value_model=value_model, optimizer=optimizer,
                                     value_optimizer=value_optimizer, beta=beta)


def train(config):
    """Optimize the SFT policy against the reward model and save it to OUT/SIZE/NAME/checkpoint.pt."""
    check_name(config.name, "ppo")
    if config.temperature <= 0:
        raise InputError(f"--temperature {config.temperature}: must be positive")
    if config.data:  # first: a wrong file is found before minutes of training
        rows, _ = hold_out([{"prompt": prompt} for prompt in read_prompts(config.data)], config.seed, config.data)
    train_if_missing("reward_model", train_reward_model, config)
    folder, device = stage_folder(config, config.name), get_device()
    sft_path = stage_folder(config, "sft") / "checkpoint.pt"
    policy, tokenizer, _ = load_checkpoint(sft_path, "sft", config.size, device)  # π_θ, trained
    reference, _, _ = load_checkpoint(sft_path, "sft", config.size, device)  # π_ref, frozen
    reward_path = stage_folder(config, "reward_model") / "checkpoint.pt"
    reward_model, reward_tokenizer, _ = load_checkpoint(reward_path, "reward_model", config.size, device, RewardModel)
    value_model, _, _ = load_checkpoint(reward_path, "reward_model", config.size, device, RewardModel)  # V starts as r_φ
    reference.requires_grad_(False).eval()
    reward_model.requires_grad_(False).eval()
    if reward_tokenizer.vocabulary != tokenizer.vocabulary:
        raise InputError(f"{reward_path}: its vocabulary is not that of {sft_path}; train the reward model again")

    if config.data:
        room = policy.config.block_size - config.max_new_tokens
        pool = [row["prompt"] for row in rows]
        fitting = [ids for ids in map(tokenizer.prompt, pool) if len(ids) <= room]
        if not fitting:
            raise InputError(f"{config.data}: no prompt leaves room for --max_new_tokens {config.max_new_tokens} in the "
                             f"context of {policy.config.block_size}")
        data = (f"{config.data}: {len(fitting)} prompts, dropped {len(pool) - len(fitting)} that leave no room for "
                f"{config.max_new_tokens} new tokens")
    else:
        data = "fresh requests of the little world"
    announce(config.name, config, device, data, policy)

    def draw_prompts(count, rng):
        if config.data:
            return rng.choices(fitting, k=count)
        return [tokenizer.prompt(stories.request(rng).text) for _ in range(count)]

    costs = ("memory_mb", "rollout_s", "scoring_s", "update_s")
    with Run(config.name, folder, config, config.save, [sft_path, reward_path], ("beta", "value_loss", *costs)) as run:
        run.total = config.iterations
        loop = optimize(policy, reference, reward_model, value_model, draw_prompts, tokenizer.end_token, config, run.saved)
        for iteration, (rollout, figures, state) in enumerate(loop, start=run.saved["step"] + 1):
            if config.data:
                run(iteration, **figures)
            else:
                run(iteration, gold=gold_rewards(rollout, tokenizer).mean().item(), **figures)
            run.end_step(iteration, **state)
        memory = [row["memory_mb"] for row in run.rows]
        print(f"peak memory {memory[len(memory) // 10]:,.0f} MB after a tenth of the iterations, {memory[-1]:,.0f} MB at "
              f"the end")
        save_checkpoint(folder / "checkpoint.pt", "ppo", config.size, policy, tokenizer, beta=config.beta)
        run.finish()

    prompts = draw_prompts(3, random.Random("samples"))
    before, _ = respond(reference, tokenizer, prompts, config.max_new_tokens, config.seed)
    after, _ = respond(policy, tokenizer, prompts, config.max_new_tokens, config.seed)
    for prompt, *texts in zip(prompts, before, after):
        show(("prompt", tokenizer.decode(prompt[1:-1])), ("before", texts[0]), ("after", texts[1]))
    print(f"saved {folder / 'checkpoint.pt'}; next: python dpo.py, then python best_of_n.py", flush=True)


def bench(config):
    """Print the seconds of a PPO iteration, beside the least that its matrix products take, and how the cost grows."""
    base = parse_config(gpt.Config, gpt.GPU, ["--size", config.size], "")
    shape = GPTConfig(base.vocab_size, base.block_size, base.n_layer, base.n_head, base.n_embd)
    device, prompt = get_device(), base.block_size // 4
    policy, reference = GPT(shape).to(device), GPT(shape).to(device)
    reward_model, value_model = RewardModel(shape).to(device), RewardModel(shape).to(device)
    announce("ppo", config, device, f"random prompts of {prompt} tokens; nothing is saved", policy)
    rate = matrix_rate(device)
    print(f"matrix product {rate / 1e9:,.0f} GFLOP/s\n"
          f"rollouts  response   rollout   scoring    update     total     bound    tokens/s")

    def draw_prompts(count, rng):
        return [rng.choices(range(shape.vocab_size), k=prompt) for _ in range(count)]

    n, longest = config.rollouts, config.max_new_tokens
    few, half, quarter = max(1, n // 4), max(1, longest // 2), max(1, longest // 4)
    for rollouts, response in ((few, half), (n, half), (4 * n, half), (n, quarter), (n, longest)):
        one = replace(config, rollouts=rollouts, max_new_tokens=response, iterations=4)
        # The end token -1 never comes: all responses have full length.
        loop = optimize(policy, reference, reward_model, value_model, draw_prompts, -1, one)
        rows = [[figures[name] for name in ("rollout_s", "scoring_s", "update_s")] for _, figures, _ in loop]
        parts = [statistics.median(column) for column in zip(*rows[1:])]
        total = statistics.median(map(sum, rows[1:]))
        tokens, emitted, seen = rollouts * (prompt + response), rollouts * response, (prompt + response) / 2
        language = forward_flops(shape, tokens, seen, emitted, shape.vocab_size)
        value, reward = forward_flops(shape, tokens, seen, emitted, 1), forward_flops(shape, tokens, seen, rollouts, 1)
        # Sampling, four scoring passes, and in each epoch a forward and a backward pass (twice its cost) of two models.
        bound = (language + 2 * language + value + reward + config.epochs * 3 * (language + value)) / rate
        print(f"{rollouts:8d}{response:10d}" + "".join(f"{seconds:10.2f}" for seconds in (*parts, total, bound))
              + f"{emitted / total:12,.0f}")
    weights = sum(p.numel() for p in policy.parameters())
    print(f"peak memory {peak_memory(device):,.0f} MB, of which weights, gradients and AdamW's moments of the four models "
          f"{(4 + 4 + 1 + 1) * 4 * weights / 2 ** 20:,.0f} MB")


def main(argv=None):
    config = parse_config(Config, GPU, argv, "Optimize the SFT policy against the reward model with PPO.")
    if config.bench:
        bench(config)
    else:
        train(config)


if __name__ == "__main__":
    run_script(main)
