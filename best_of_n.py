"""
best_of_n.py: best-of-N and the selections of rejection sampling (ECE 7115, "Rejection Sampling", "Best-of-N Sampling";
CME 295, Lecture 5), and the yardstick that puts all policies side by side with the best that is possible.

Best-of-N samples N responses, scores them with the reward model and returns the best. No training; N times the cost.
Departures from the slides: completions are counted from 0, and the k best overall come best first.

    python best_of_n.py --prompt "Tell me a story about a shy fox and a kite." --n 16      candidates and the winner
    python best_of_n.py                     the yardstick: SFT, best-of-N, PPO, DPO over a fixed set of held-out prompts
    python best_of_n.py --data FILE.jsonl   the same over prompts of your own, without the gold columns

The answer key: the objective J(π) = E_π[r] - β KL(π || π_ref) has its maximum at
π*(y|x) = π_ref(y|x) exp(r(x, y)/β) / Z(x), and J* = β log Z(x) (CS 224R, Lecture 9, ch. 7). For y ~ π put
w = r(x, y)/β - log π(y|x)/π_ref(y|x). Then J = β E[w] and Z(x) = E_π[exp w], so β (log mean exp w - mean w) =
β KL(π || π*) >= 0: samples of a policy give its objective and its distance from the optimum.
"""

import json
import math
import random
import time
from dataclasses import dataclass
from typing import NamedTuple

import torch

import dpo
import ppo
from data import stories
from data.files import InputError, hold_out, read_prompts, run_script, write_jsonl
from data.run import announce, parse_config, stage_folder, train_missing
from gpt import autocast, generate, get_device, load_checkpoint, response_texts
from dpo import response_logprobs
from reward_model import RewardModel, gold_rewards
from reward_model import main as train_reward_model


@dataclass
class Config:
    size: str = "auto"          # cpu or gpu; auto takes gpu where there is one
    out: str = "out"            # folder of all outputs; this stage writes to OUT/SIZE/best_of_n
    seed: int = 1               # fixes the samples; a missing stage is trained with it
    prompt: str = ""            # answer this prompt with best-of-N, and stop
    n: int = 16                 # N: candidates for --prompt
    data: str = ""              # yardstick over the prompts of a .jsonl file instead of the little world's
    policies: str = "ppo,dpo"   # the folders of the policies to compare, with commas between
    prompts: int = 32           # held-out prompts of the yardstick
    samples: int = 64           # samples a prompt and policy; best-of-N for N up to this
    sample_batch: int = 256     # responses in one batch of sampling or scoring
    beta: float = 0.2           # price of one nat of KL in J, in reward units
    max_new_tokens: int = 96    # the longest response
    missing_end_score: float = -5.0     # score of a response without <|end|>, as in ppo.py
    resume: bool = False        # a missing stage that was interrupted goes on


GPU = dict(prompts=128, sample_batch=1024, max_new_tokens=128)

# ----------------------------------------------------------------------------------------------------------------------
# Selection


def best_of_n_kl(n):
    """The KL divergence of best-of-n from its reference in nats, an upper bound that is tight when ties are rare:
    log n - (n-1)/n (Stiennon et al. 2020, appendix G.3)."""
    return math.log(n) - (n - 1) / n


def top_per_prompt(rewards):
    """S(R) = [argmax_j r_1j, ..., argmax_j r_Mj]: rewards (M, N) -> (M,), counted from 0 (ECE 7115, "Rejection Sampling").

    >>> top_per_prompt(torch.tensor([[0.7, 0.3, 0.5, 0.2], [0.4, 0.8, 0.6, 0.5]])).tolist()
    [0, 1]
    """
    return rewards.argmax(dim=1)


def top_k_overall(rewards, k):
    """S_K(R_flat), the k best of all: rewards (M, N) -> (k, 2), rows (prompt, completion), best first, counted from 0.

    >>> top_k_overall(torch.tensor([[0.9, 0.3], [0.2, 0.5]]), 2).tolist()
    [[0, 0], [1, 1]]
    """
    best = rewards.flatten().argsort(descending=True, stable=True)[:k]
    return torch.stack([best // rewards.shape[1], best % rewards.shape[1]], dim=1)


# ----------------------------------------------------------------------------------------------------------------------
# The answer key


def log_mean_exp(x, dim):
    """log of the mean of exp(x) along dim, without overflow."""
    return x.logsumexp(dim) - math.log(x.shape[dim])


def optimality_gap(rewards, log_ratios, beta):
    """A policy's objective and its own estimate of the optimum, from its own samples, prompt by prompt.

    rewards, log_ratios (M, N): r(x, y) and log π(y|x)/π_ref(y|x) of N samples y ~ π for each of M prompts.
    Returns (J, J_star), each (M,): J = β E[w] and J* = β log Z = β log E[exp w], w = r/β - log π/π_ref. J* - J =
    β KL(π || π*). A policy that dropped modes never samples them and underestimates J*: compare with the reference's
    own estimate (log_ratios = 0), or use pooled_optimum.
    """
    w = rewards / beta - log_ratios
    return beta * w.mean(dim=1), beta * log_mean_exp(w, dim=1)


def pooled_optimum(rewards, log_ratios, beta):
    """J* = β log Z(x) and KL(π* || π_ref) from samples of several policies (balance heuristic; Veach & Guibas 1995).

    rewards (M, S): S samples a prompt, the same number from each of K policies, the reference among them; log_ratios
    (M, S, K): log π_k(y|x)/π_ref(y|x) of every sample under every policy. The samples come from the mixture of the K
    policies, so Z = E_mixture[exp(r/β) π_ref / mixture]: no sample can weigh more than K exp(r/β). Returns (M,), (M,).
    """
    log_mixture = log_mean_exp(log_ratios, dim=2)  # log mixture(y|x)/π_ref(y|x)
    log_weights = rewards / beta - log_mixture
    log_z = log_mean_exp(log_weights, dim=1)
    kl = (log_weights.softmax(dim=1) * rewards / beta).sum(dim=1) - log_z  # E_π*[log π*/π_ref] = E_π*[r]/β - log Z
    return beta * log_z, kl


def mean_and_error(x):
    """The mean over prompts, x (M,), and its standard error (None for a single prompt)."""
    return x.mean().item(), (x.std() / math.sqrt(len(x))).item() if len(x) > 1 else None


# ----------------------------------------------------------------------------------------------------------------------
# The yardstick


class Samples(NamedTuple):
    """N responses to each of M prompts: rollouts (batches) and texts prompt by prompt, the rest float (M, N); gold may be
    None."""
    rollouts: list
    texts: list
    rewards: torch.Tensor
    gold: torch.Tensor
    lengths: torch.Tensor
    ended: torch.Tensor


def draw(policy, reward_model, tokenizer, prompts, count, config, gold, rng):
    """`count` responses to every prompt, with their scores; gold: whether to ask the annotator too."""
    device, shape = policy.wte.weight.device, (len(prompts), count)
    ids = [tokenizer.prompt(prompt) for prompt in prompts for _ in range(count)]
    rollouts, texts, columns = [], [], []
    for start in range(0, len(ids), config.sample_batch):
        with autocast(device), torch.no_grad():
            rollout = generate(policy, ids[start:start + config.sample_batch], config.max_new_tokens,
                               tokenizer.end_token, seed=rng.getrandbits(48))
            scores = reward_model.score(rollout.tokens, rollout.lengths)
        ended = rollout.ended(tokenizer.end_token)
        golds = gold_rewards(rollout, tokenizer) if gold else torch.zeros(len(scores))
        columns.append(torch.stack([torch.where(ended, scores, config.missing_end_score).cpu(), golds, ended.cpu(),
                                    (rollout.lengths - rollout.prompt_lengths).cpu()]))
        rollouts.append(rollout)
        texts += response_texts(rollout, tokenizer)
    rewards, golds, ended, lengths = torch.cat(columns, dim=1).view(4, *shape)
    return Samples(rollouts, texts, rewards, golds if gold else None, lengths, ended)


@torch.no_grad()
def sequence_logprobs(policy, rollouts):
    """log π(y|x) of every sampled response under a policy: (M·N,)."""
    return torch.cat([response_logprobs(policy, rollout.tokens, rollout.prompt_lengths, rollout.lengths).cpu()
                      for rollout in rollouts])


def win_rate(gold, opponents):
    """P(gold of ours > gold of theirs) + ½ P(equal), all against all of one prompt: (M, N), (M, K) -> (M,)."""
    ours, theirs = gold[:, :, None], opponents[:, None, :]
    return ((ours > theirs).float() + 0.5 * (ours == theirs).float()).mean(dim=(1, 2))


def distinct_2(texts):
    """Different pairs of neighbouring words over all pairs: 1 where no two words ever meet twice."""
    pairs = [pair for text in texts for pair in zip(text.split(), text.split()[1:])]
    return len(set(pairs)) / max(1, len(pairs))


def yardstick(config):
    """Sample every policy on the same held-out prompts and print how good each is, and how good it could be."""
    if config.data:  # first: a wrong file is found before minutes of training
        _, rows = hold_out([{"prompt": prompt} for prompt in read_prompts(config.data)], config.seed, config.data)
    names = [name for name in config.policies.split(",") if name]
    for name, main in (("ppo", ppo.main), ("dpo", dpo.main)):
        if name in names:
            train_if_missing(name, main, config)
    policies, reward_model, tokenizer = load_policies(config, names)

    # 1. Held-out prompts: the world's, or those that every stage held out of the user's own.
    room = policies["sft"].config.block_size - config.max_new_tokens
    rng = random.Random("yardstick prompts")
    if config.data:
        fitting = [row["prompt"] for row in rows if len(tokenizer.prompt(row["prompt"])) <= room]
        prompts = fitting[:config.prompts]
        if not prompts:
            raise InputError(f"{config.data}: no held-out prompt leaves room for --max_new_tokens {config.max_new_tokens} "
                             f"in the context of {policies['sft'].config.block_size}")
        data = (f"{config.data}: {len(prompts)} of {len(fitting)} held-out prompts, dropped {len(rows) - len(fitting)} that "
                f"leave no room for {config.max_new_tokens} new tokens")
    else:
        prompts = [stories.request(rng).text for _ in range(config.prompts)]
        data = f"the little world: {len(prompts)} held-out prompts"
    gold = not config.data
    announce("best_of_n", config, get_device(), f"{data}; {config.samples} samples each", policies["sft"])

    # 2. The same number of samples from every policy; other samples of SFT, to win against.
    rng, samples = random.Random(f"yardstick {config.seed}"), {}
    for name, policy in policies.items():
        start = time.perf_counter()
        samples[name] = draw(policy, reward_model, tokenizer, prompts, config.samples, config, gold, rng)
        print(f"sampled {name} in {time.perf_counter() - start:.0f} s", flush=True)
    opponents = draw(policies["sft"], reward_model, tokenizer, prompts, 16, config, gold, rng).gold if gold else None

    # 3. log π_k/π_ref of every sample under every policy: (M, S, K), with S = K · config.samples.
    logprobs = [torch.stack([sequence_logprobs(policy, one.rollouts) for policy in policies.values()], dim=1)
                for one in samples.values()]
    log_ratios = [(x - x[:, :1]).view(len(prompts), config.samples, len(policies)) for x in logprobs]  # SFT comes first

    # 4. Best-of-N picks among SFT's samples by the reward model. Then the tables.
    rows = {}
    for i, (name, one) in enumerate(samples.items()):
        rows[name] = Row(one.rewards, one.gold, log_ratios[i][:, :, i], one.lengths, one.ended,
                         one.texts[::config.samples])
        if name == "sft":
            rows.update({f"best of {n}": best_of_n_row(one, n) for n in (4, 16, 64) if n <= config.samples})
    folder = stage_folder(config, "best_of_n")
    folder.mkdir(parents=True, exist_ok=True)
    figures = [compare(name, row, opponents) for name, row in rows.items()]
    print()
    print_table(figures)
    kinds = [("reward model", "rewards")] + [("gold", "gold")] * gold
    for kind, field in kinds:
        figures += optimum(kind, {name: (getattr(row, field), row.log_ratios) for name, row in rows.items()},
                           torch.cat([getattr(one, field) for one in samples.values()], dim=1),
                           torch.cat(log_ratios, dim=1), list(policies), config.beta)
    if gold:
        close_to_the_best(config, figures)
    write_jsonl(folder / "metrics.jsonl", figures)
    print(f"\nsaved {folder / 'metrics.jsonl'}")


class Row(NamedTuple):
    """What the tables need of a policy: (M, N) tensors (log_ratios of best-of-N: the bound), one text a prompt."""
    rewards: torch.Tensor
    gold: torch.Tensor
    log_ratios: torch.Tensor
    lengths: torch.Tensor
    ended: torch.Tensor
    texts: list


def best_of_n_row(one, n):
    """Best-of-n out of SFT's samples (M, N): every n of them are a draw of their own, so there are N // n a prompt."""
    M, N = one.rewards.shape
    groups = N // n
    best = one.rewards[:, :groups * n].view(M, groups, n).argmax(dim=2) + n * torch.arange(groups)  # (M, groups)
    gold = None if one.gold is None else one.gold.gather(1, best)
    texts = [one.texts[N * prompt + j] for prompt, j in enumerate(best[:, 0].tolist())]
    return Row(one.rewards.gather(1, best), gold, torch.full(best.shape, best_of_n_kl(n)), one.lengths.gather(1, best),
               one.ended.gather(1, best), texts)


def compare(name, row, opponents):
    """The yardstick's figures of one policy."""
    figures = dict(policy=name, reward=row.rewards.mean().item())
    if row.gold is not None:
        figures.update(gold=row.gold.mean().item(), win_rate=win_rate(row.gold, opponents).mean().item())
    return dict(**figures, kl=row.log_ratios.mean().item(), length=row.lengths.float().mean().item(),
                distinct_2=distinct_2(row.texts), ended=row.ended.float().mean().item())


def print_table(rows):
    """Dicts with the same keys, a name and then numbers (None where there is none), as a table with headings."""
    print("  ".join([f"{'':14s}"] + [f"{key:>12s}" for key in list(rows[0])[1:]]))
    for first, *values in (row.values() for row in rows):
        print("  ".join([f"{first:14s}"] + [f"{'-':>12s}" if value is None else f"{value:12.3f}" for value in values]))


def optimum(kind, rows, rewards, log_ratios, names, beta):
    """Print and return how far each policy went from SFT to the optimum of the objective under one reward.

    rows: name -> (rewards, log_ratios) of its samples; rewards (M, S), log_ratios (M, S, K): all policies' samples pooled.
    """
    J_stars, kls = pooled_optimum(rewards, log_ratios, beta)
    best, best_error = mean_and_error(J_stars)
    gaps = {name: optimality_gap(*pair, beta) for name, pair in rows.items()}
    starts, _ = gaps["sft"]
    way = J_stars - starts  # (M,): from SFT to the optimum
    error = "" if best_error is None else f" ± {best_error:.3f}"
    print(f"\nunder the {kind}, beta {beta}: J* = beta log Z = {best:.3f}{error}, {kls.mean():.2f} nats from the "
          f"reference, from the samples of {', '.join(names)} pooled")
    figures = []
    for name, (J, J_star) in gaps.items():
        share, share_error = None, None
        if way.mean() > 0:
            share = ((J - starts).mean() / way.mean()).item()
            _, share_error = mean_and_error((J - starts - share * way) / way.mean())  # of a ratio of two means
        J, error = mean_and_error(J)
        own = J_star.mean().item() if name in names else None  # best-of-N's density is not known, only its KL's bound
        figures.append(dict(policy=name, J=J, error=error, share=share, share_error=share_error, own_J_star=own))
    print_table(figures)
    estimates = [best, *(row["own_J_star"] for row in figures if row["own_J_star"] is not None)]
    print(f"the estimates of J*, pooled and from each policy's own samples, lie within "
          f"{max(estimates) - min(estimates):.3f}")
    optimum_kl = kls.mean().item()
    return [dict(under=kind, J_star=best, J_star_error=best_error, J_star_kl=optimum_kl, **row) for row in figures]


def close_to_the_best(config, figures):
    """Print the table of all stages: what was measured, what is possible, and the share."""
    rows = []
    for stage, what, measured, possible in (("gpt", "pretraining, nats per token", "held_out", "entropy"),
                                            ("sft", "SFT, nats per token", "held_out", "entropy"),
                                            ("reward_model", "reward model, accuracy", "expected_accuracy",
                                             "bayes_accuracy"),
                                            ("reward_model", "reward model, loss", "loss", "annotator_loss")):
        path = stage_folder(config, stage) / "metrics.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        lines = [line for line in lines if measured in line and possible in line]
        if lines:
            x, best = lines[-1][measured], lines[-1][possible]
            rows.append((what, x, best, x / best if measured == "expected_accuracy" else best / x))
    for row in figures:
        if row.get("share") is not None and row["policy"] != "sft":
            rows.append((f"{row['policy']}, J under {row['under']}", row["J"], row["J_star"], row["share"]))
    print(f"\nHow close to the best\n{'':36s}{'measured':>10s}{'possible':>10s}{'share':>8s}")
    for what, measured, possible, share in rows:
        print(f"{what:36s}{measured:10.3f}{possible:10.3f}{share:8.1%}")


def load_policies(config, names):
    """({"sft": GPT, name: GPT, ...}, reward model, tokenizer); InputError if their vocabularies differ."""
    train_if_missing("reward_model", train_reward_model, config)
    device, policies = get_device(), {}
    path = stage_folder(config, "reward_model") / "checkpoint.pt"
    reward_model, tokenizer, _ = load_checkpoint(path, "reward_model", config.size, device, RewardModel)
    for name in ["sft", *names]:
        stage = next((stage for stage in ("sft", "ppo", "dpo") if name.startswith(stage)), None)
        if stage is None:
            raise InputError(f"--policies {name}: must begin with ppo or dpo")
        policy_path = stage_folder(config, name) / "checkpoint.pt"
        policies[name], policy_tokenizer, checkpoint = load_checkpoint(policy_path, stage, config.size, device)
        if checkpoint.get("beta", config.beta) != config.beta:
            print(f"{name} was trained with beta {checkpoint['beta']}; J and J* below are those of beta {config.beta}")
        if policy_tokenizer.vocabulary != tokenizer.vocabulary:
            raise InputError(f"{policy_path}: its vocabulary is not that of {path}; train the stages again")
    return policies, reward_model, tokenizer


def answer(config):
    """Best-of-N for one prompt: print the candidates, best first, and the winner."""
    policies, reward_model, tokenizer = load_policies(config, [])
    gold = stories.parse_request(config.prompt) is not None  # the annotator judges the world's own requests only
    rng = random.Random(f"candidates {config.seed}")
    one = draw(policies["sft"], reward_model, tokenizer, [config.prompt], config.n, config, gold, rng)
    for _, j in top_k_overall(one.rewards, config.n).tolist():
        print(f"{one.rewards[0, j]:+7.3f}" + (f"  gold {one.gold[0, j]:+7.3f}" if gold else "") + f"  {one.texts[j]}")
    print(f"\nwinner of {config.n}: {one.texts[top_per_prompt(one.rewards)[0]]}")


def main(argv=None):
    config = parse_config(Config, GPU, argv, "Best-of-N for one prompt, or the yardstick that compares all policies.")
    if config.prompt:
        answer(config)
    else:
        yardstick(config)


if __name__ == "__main__":
    run_script(main)
