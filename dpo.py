"""
dpo.py: direct preference optimization (Rafailov et al. 2023; CS 224R, Lecture 9, ch. 8; ECE 7115, "DPO Loss").

The optimum of RLHF's objective is π*(y|x) = π_ref(y|x) exp(r(x, y)/β) / Z(x), so r(x, y) = β log π*(y|x)/π_ref(y|x) +
β log Z(x). Put into Bradley-Terry, Z(x) cancels, and the policy itself is fitted to the comparisons, with no reward
model and no sampling:

    L_DPO(θ) = -E[ log σ( β log π_θ(y_w|x)/π_ref(y_w|x) - β log π_θ(y_l|x)/π_ref(y_l|x) ) ]

Two models: the policy π_θ and the frozen reference π_ref, both from SFT.

    python dpo.py                       on the comparisons that reward_model.py collected
    python dpo.py --data FILE.jsonl     on your own pairs: {"prompt", "chosen", "rejected"}
    python dpo.py --prompt "…"          answer a prompt with the policy

No departure from the slides: the log-probabilities are sums over the response (means would be SimPO's, another loss).
"""

import math
import random
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

import reward_model as reward_model_stage
from data import stories
from data.files import hold_out, read_pairs, run_script
from data.run import Run, announce, check_name, parse_config, restore, stage_folder, train_missing
from gpt import (batches_by_length, get_device, learning_rate, load_checkpoint, make_optimizer, masked_logprobs,
                 optimizer_step, pad, response_mask, save_checkpoint)
from reward_model import RewardModel, encode_comparisons, pair_lengths, read_comparisons, show_before_and_after
from sft import answer

EARLIER = {**reward_model_stage.EARLIER, "reward_model": reward_model_stage.main}  # the stages that this one builds on


@dataclass
class Config:
    size: Literal["auto", "cpu", "gpu"] = "auto"    # auto takes gpu where there is one
    out: str = "out"            # folder of all outputs; this stage writes to OUT/SIZE/NAME
    name: str = "dpo"           # name of this run's folder: dpo-… keeps an experiment apart
    seed: int = 1               # fixes the order of the pairs and the samples
    data: str = ""              # your own pairs, a .jsonl file, instead of the comparisons of the reward model's stage
    prompt: str = ""            # answer this prompt with the policy of --name, and stop
    temperature: float = 1.0    # of the answer to --prompt
    top_k: int = 0              # the answer to --prompt draws from the k likeliest tokens only; 0: from all
    epochs: int = 1             # passes over the pairs
    batch: int = 32             # pairs in a step
    micro_batch: int = 32       # pairs in one forward pass; less memory, the same gradient
    lr: float = 2e-4            # peak learning rate (linear warm-up, cosine to zero)
    warmup: int = 10            # steps of warm-up
    beta: float = 0.2           # price of one nat of KL to the reference, in reward units; PPO's, for the same optimum
    max_new_tokens: int = 96    # the longest sampled response
    report: int = 64            # steps between two reports; the state for --resume is saved as often
    resume: bool = False        # go on with the run that was interrupted in this folder


GPU = dict(batch=64, micro_batch=64, lr=5e-5, max_new_tokens=128)


def dpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta):
    """Direct preference optimization (Rafailov et al. 2023, eq. 7; CS 224R, ch. 8).

    All four arguments: (B,) log-probabilities in nats, summed over the response. Returns a scalar. With the implicit
    reward r̂ = β log π_θ/π_ref and the margin z = r̂(x, y_w) - r̂(x, y_l), the gradient weighs a pair by how wrong it is:
        ∇L = -β E[ σ(-z) (∇log π_θ(y_w|x) - ∇log π_θ(y_l|x)) ]          (CS 224R, "Understanding the DPO Gradient")
    Worked number of the lecture: dpo_loss(-15.2, -14.8, -16.0, -14.5, beta=0.1) = 0.640.
    """
    chosen = policy_chosen - ref_chosen        # log π_θ(y_w|x) / π_ref(y_w|x)
    rejected = policy_rejected - ref_rejected  # log π_θ(y_l|x) / π_ref(y_l|x)
    return -F.logsigmoid(beta * (chosen - rejected)).mean()


def response_logprobs(model, tokens, prompt_lengths, lengths, temperature=1.0):
    """log π(y|x) of every row: (B,), the sum over the response's tokens, <|end|> included; tokens (B, T)."""
    mask = response_mask(prompt_lengths, lengths, tokens.shape[1])
    return masked_logprobs(model, tokens, mask, temperature).sum(dim=1)


def pair_logprobs(policy, reference, pairs):
    """The four summed log-probabilities that dpo_loss takes, each (B,), in its order; π_ref gets no gradient."""
    device = policy.wte.weight.device
    tokens, lengths = pad([chosen for chosen, _, _ in pairs] + [rejected for _, rejected, _ in pairs], device)
    prompt_lengths = torch.tensor([length for _, _, length in pairs] * 2, device=device)
    policy_chosen, policy_rejected = response_logprobs(policy, tokens, prompt_lengths, lengths).chunk(2)
    with torch.inference_mode():
        ref_chosen, ref_rejected = response_logprobs(reference, tokens, prompt_lengths, lengths).chunk(2)
    return policy_chosen, policy_rejected, ref_chosen, ref_rejected


FIGURES = ("loss", "accuracy", "margin", "chosen_log_ratio", "rejected_log_ratio")


def figures(loss, policy_chosen, policy_rejected, ref_chosen, ref_rejected, config):
    """The FIGURES of a batch of pairs, (5,): its loss, accuracy and margin of the implicit reward, both log-ratios."""
    chosen, rejected = policy_chosen - ref_chosen, policy_rejected - ref_rejected
    margin = config.beta * (chosen - rejected)  # r̂(x, y_w) - r̂(x, y_l), with r̂ = β log π_θ/π_ref (CS 224R, ch. 8)
    return torch.stack([loss, (margin > 0).float().mean(), margin.mean(), chosen.mean(), rejected.mean()]).detach()


def backward(policy, reference, pairs, config):
    """Accumulate the gradient of the loss of a batch of pairs, config.micro_batch pairs at a time. Returns its FIGURES."""
    total = torch.zeros(len(FIGURES), device=policy.wte.weight.device)
    for start in range(0, len(pairs), config.micro_batch):
        part = pairs[start:start + config.micro_batch]
        logprobs = pair_logprobs(policy, reference, part)
        loss = dpo_loss(*logprobs, config.beta)
        (loss * len(part) / len(pairs)).backward()
        total += figures(loss, *logprobs, config) * len(part) / len(pairs)
    return total


@torch.inference_mode()
def evaluate(policy, reference, pairs, config, rows=64):
    """The FIGURES on held-out pairs."""
    total = torch.zeros(len(FIGURES), device=policy.wte.weight.device)
    for start in range(0, len(pairs), rows):
        part = pairs[start:start + rows]
        logprobs = pair_logprobs(policy, reference, part)
        total += figures(dpo_loss(*logprobs, config.beta), *logprobs, config) * len(part) / len(pairs)
    return total


def fit(policy, reference, pairs, held_out, config, rng, saved=None):
    """Fit the policy to pairs, in place. A generator, after every step: (step, figures or None, state).

    figures come every config.report steps; state is what a later call needs as `saved`, with its "step", to go on.
    """
    saved = saved or {"step": 0}
    optimizer = make_optimizer(policy, weight_decay=0.0)
    lengths = pair_lengths(pairs)
    batches = [batch for epoch in range(config.epochs) for batch in batches_by_length(lengths, config.batch, rng)]
    steps = len(batches)
    rows = restore(saved, steps, policy=policy, optimizer=optimizer, figures=[])["figures"]
    for step in range(saved["step"], steps):
        row = backward(policy, reference, [pairs[i] for i in batches[step]], config)
        optimizer_step(optimizer, policy, learning_rate(step, steps, config.lr, config.warmup), row[0])
        rows, report = [*rows, row.tolist()], None
        if (step + 1) % config.report == 0 or step + 1 == steps:
            report = dict(zip(FIGURES, torch.tensor(rows).mean(dim=0).tolist()))
            held_out_figures = evaluate(policy, reference, held_out, config).tolist()
            report.update(held_out_loss=held_out_figures[0], held_out_accuracy=held_out_figures[1])
            rows = []
        yield step + 1, report, dict(policy=policy, optimizer=optimizer, figures=rows)


def train(config):
    """Fit the SFT policy to the comparisons and save it to OUT/SIZE/NAME/checkpoint.pt."""
    check_name(config.name, "dpo")
    split = hold_out(read_pairs(config.data), config.seed, config.data) if config.data else None  # before any training
    train_missing(config, reward_model_stage.EARLIER if config.data else EARLIER, config.name)
    folder, device = stage_folder(config, config.name), get_device()
    sft_path, reward_path = (stage_folder(config, stage) / "checkpoint.pt" for stage in ("sft", "reward_model"))
    policy, tokenizer, _ = load_checkpoint(sft_path, "sft", config.size, device)  # π_θ, trained
    reference, _, _ = load_checkpoint(sft_path, "sft", config.size, device)  # π_ref, frozen

    # 1. The comparisons: (x, y_w, y_l), y_w ≻ y_l.
    files = [] if config.data else [reward_path.with_name(name) for name in ("pairs.jsonl", "held_out.jsonl")]
    data = encode_comparisons(split or read_comparisons(reward_path.parent), config.data or files[0], tokenizer,
                              policy.config.block_size)
    announce(config.name, config, device, data.description, policy)

    # 2. Gradient steps on the loss.
    with Run(config.name, folder, config, config.report, [sft_path, *files]) as run:
        run.total = config.epochs * math.ceil(len(data.pairs) / config.batch)
        rng = random.Random(f"dpo {config.seed}")
        for step, row, state in fit(policy, reference, data.pairs, data.held_out, config, rng, run.saved):
            if row:
                run(step, **row)
            run.end_step(step, **state)

        # 3. Save; the same prompts before and after.
        save_checkpoint(run.folder / "checkpoint.pt", "dpo", config.size, policy, tokenizer, beta=config.beta,
                        metrics=run.figures())
        run.finish()
    reward_model = None
    if not config.data:  # for the scores on the screen only
        reward_model, _, _ = load_checkpoint(reward_path, "reward_model", config.size, device, RewardModel)
    held_out = list(dict.fromkeys(row["prompt"] for row in data.held_out_rows))
    world = not config.data and all(map(stories.parse_request, held_out))  # the stage's pairs may be somebody's own too
    show_before_and_after(None if world else held_out, reference, policy, tokenizer, config, reward_model)
    print(f"saved {folder / 'checkpoint.pt'}; next: python best_of_n.py", flush=True)


def main(argv=None):
    config = parse_config(Config, GPU, argv, "Fit the SFT policy to preference pairs with DPO.",
                          needs=dict(temperature="prompt", top_k="prompt"))
    if config.prompt:
        answer(config, "dpo", config.name)
    else:
        train(config)


if __name__ == "__main__":
    run_script(main)
