"""
best_of_n.py: best-of-N and rejection sampling (ECE 7115, "Rejection Sampling", "Best-of-N Sampling"; CME 295, Lecture 5),
and the yardstick that puts all policies side by side with the best that is possible.

Best-of-N samples N responses, scores them with the reward model and returns the best. No training; N times the cost.
Rejection-sampling fine-tuning (RSFT) spends that cost once: it keeps the best of N responses to each of many prompts, and
fine-tunes the policy on them with the SFT loss. Its single answer should then be as good as the winner of N.
Departures from the slides: completions are counted from 0, and the k best overall come best first.

    python best_of_n.py --prompt "Tell me a story about a shy fox and a kite." --n 16      candidates and the winner
    python best_of_n.py --finetune per_prompt       RSFT on the best response to every prompt; --prompt "…" asks its policy
    python best_of_n.py --finetune overall          RSFT on as many responses, the best of all: easy prompts get more
    python best_of_n.py                     the yardstick: SFT, best-of-N, PPO, DPO over a fixed set of held-out prompts
    python best_of_n.py --data FILE.jsonl   the same over prompts of your own, without the gold columns
    python best_of_n.py --verify --policies ppo-verifier        right or wrong: pass@1, pass@16, J* of the verifier
    python best_of_n.py --process           best-of-N by a process reward model too (reward_model.py --process)

The answer key: the objective J(π) = E_π[r] - β KL(π || π_ref) has its maximum at
π*(y|x) = π_ref(y|x) exp(r(x, y)/β) / Z(x), and J* = β log Z(x) (CS 224R, Lecture 9, ch. 7). For y ~ π put
w = r(x, y)/β - log π(y|x)/π_ref(y|x). Then J = β E[w] and Z(x) = E_π[exp w], so β (log mean exp w - mean w) =
β KL(π || π*) >= 0: samples of a policy give its objective and its distance from the optimum.
"""

import copy
import math
import random
import re
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F

import dpo
import ppo
from data import stories
from data.annotator import gold_rewards, pass_at_k, verified_optimum, verifier
from data.files import InputError, read_demonstrations, run_script, split_prompts, write_jsonl
from data.run import (Run, announce, check_name, complete, forget_rounds, parse_config, progress, read_torch,
                      refused_if_broken, stage_folder, train_missing)
from dpo import response_logprobs
from gpt import (autocast, encode_documents, generate, get_device, held_out_documents, held_out_loss, load_checkpoint,
                 response_texts, save_checkpoint)
from reward_model import RewardModel, stages_until, step_rewards
from sft import encode_demonstrations, fit, prompts_with_room, sample_prompts, show_before_and_after


@dataclass
class Config:
    size: Literal["auto", "cpu", "gpu", "gpt2"] = "auto"    # auto takes gpu where there is one; gpt2: of gpt.py --load
    out: str = "out"            # folder of all outputs; this stage writes to OUT/SIZE/best_of_n, RSFT to OUT/SIZE/NAME
    seed: int = 1               # fixes the samples; a missing stage is trained with it
    prompt: str = ""            # answer this prompt with best-of-N, and stop
    n: int = 16                 # N: candidates for --prompt
    data: str = ""              # prompts of a .jsonl file instead of the little world's
    finetune: Literal["no", "per_prompt", "overall"] = "no"     # RSFT on the best response to each prompt, or of all
    name: str = ""              # name of its policy's folder: rsft-… keeps an experiment apart
    rounds: int = 1             # RSFT, repeated from the policy of the round before
    epochs: int = 4             # passes over the responses that a round kept
    batch: int = 32             # responses in a step
    micro_batch: int = 32       # responses in one forward pass; less memory, the same gradient
    lr: float = 3e-4            # peak learning rate of a round (linear warm-up, cosine to zero)
    warmup: int = 10            # steps of warm-up
    weight_decay: float = 0.1   # AdamW's, on matrices only
    report: int = 16            # steps between two reports; the state for --resume is saved as often
    policies: str = "ppo,dpo"   # the folders of the policies to compare, with commas between
    prompts: int = 32           # held-out prompts of the yardstick; RSFT: prompts to train on in a round, as many are kept
    samples: int = 64           # samples a prompt and policy, twice as many from SFT; best-of-N for N up to this; RSFT: N
    sample_batch: int = 256     # responses in one batch of sampling or scoring
    beta: float = 0.2           # price of one nat of KL in J, in reward units
    max_new_tokens: int = 96    # the longest response
    missing_end_score: float = -5.0     # score of a response without <|end|>, as in ppo.py
    verify: bool = False        # the verifier's reward too: who is right how often, pass@16, J* under it
    process: bool = False       # best-of-N by the process reward model too, by its smallest step, their product, their sum
    resume: bool = False        # --finetune, or a missing stage, that was interrupted goes on


GPU = dict(prompts=128, sample_batch=1024, max_new_tokens=128, batch=64, micro_batch=64, lr=5e-5)
PRESETS = {"size": {"gpt2": dict(sample_batch=128, max_new_tokens=128, micro_batch=8, lr=5e-5)},
           "finetune": {kind: dict(name=f"rsft-{kind}", prompts=1024, samples=16) for kind in ("per_prompt", "overall")}}

# ----------------------------------------------------------------------------------------------------------------------
# Selection


def best_of_n_kl(n):
    """The KL divergence of best-of-n from its reference in nats, an upper bound that is tight when ties are rare:
    log n - (n-1)/n (Stiennon et al. 2020, appendix G.3)."""
    return math.log(n) - (n - 1) / n


def top_per_prompt(rewards):
    """S(R) = [argmax_j r_1j, ..., argmax_j r_Mj]: (M, N) -> (M,), counted from 0 (ECE 7115, "Rejection Sampling").

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


def subset_weights(rewards, n):
    """Of all subsets of n out of a prompt's N samples, the share in which each sample is the best: (M, N) -> (M, N).

    So Σ_i weight_i x_i is the mean of x over all best-of-n's. Equal rewards share what they win; n = 1: 1/N each.

    >>> (6 * subset_weights(torch.tensor([[0.7, 0.3, 0.5, 0.2], [0.4, 0.8, 0.8, 0.5]]), 2)).round(decimals=1).tolist()
    [[3.0, 1.0, 2.0, 0.0], [0.0, 2.5, 2.5, 1.0]]
    """
    N, ordered = rewards.shape[1], rewards.sort(dim=1).values
    worse = torch.searchsorted(ordered, rewards)                    # (M, N): how many samples are worse
    not_better = torch.searchsorted(ordered, rewards, right=True)   # ... worse or equal
    # P(all n are among k given ones) = C(k, n) / C(N, n)
    among = torch.tensor([math.comb(k, n) / math.comb(N, n) for k in range(N + 1)], dtype=rewards.dtype)
    return (among[not_better] - among[worse]) / (not_better - worse)


def process_scores(rewards, steps):
    """{rule: score (B,)} of responses, from their steps' rewards r_k: the smallest, the product of σ(r_k), which is the
    probability that all are good (Lightman et al. 2023), as a logarithm, and the sum, an estimate of gold_reward + 0.5."""
    return {"smallest": torch.where(steps, rewards, math.inf).amin(dim=1),
            "product": torch.where(steps, F.logsigmoid(rewards), 0.0).sum(dim=1), "sum": rewards.sum(dim=1)}


# ----------------------------------------------------------------------------------------------------------------------
# The answer key


def optimality_gap(rewards, log_ratios, beta):
    """A policy's objective and its own estimate of the optimum, from its own samples, prompt by prompt.

    rewards, log_ratios (M, N): r(x, y) and log π(y|x)/π_ref(y|x) of N samples y ~ π for each of M prompts.
    Returns (J, J_star), each (M,): J = β E[w] and J* = β log Z = β log E[exp w], w = r/β - log π/π_ref. J* - J =
    β KL(π || π*). A policy that dropped modes never samples them and underestimates J*: compare with the reference's
    own estimate (log_ratios = 0), or use pooled_optimum.
    """
    w = rewards / beta - log_ratios
    return beta * w.mean(dim=1), beta * (w.logsumexp(dim=1) - math.log(w.shape[1]))


def pooled_log_weights(rewards, log_ratios, beta, counts=None):
    """log w of samples from several policies, such that Z(x) = Σ_i w_i and E_π*[f] = Σ_i w_i f(y_i) / Σ_i w_i: (M, S).

    The balance heuristic (Veach & Guibas 1995). rewards (M, S): S samples a prompt, n_k of them from policy k of K, the
    reference among them; counts: the n_k (None: as many from each); log_ratios (M, S, K): log π_k(y|x)/π_ref(y|x) of
    every sample under every policy. All come from the mixture Σ_k n_k/S π_k, so Z = E_mixture[exp(r/β) π_ref/mixture]:
    no sample can weigh more than exp(r/β)/n_ref.
    """
    S, K = log_ratios.shape[1:]
    counts = torch.tensor(counts or [S / K] * K, dtype=log_ratios.dtype)
    return rewards / beta - (log_ratios + counts.log()).logsumexp(dim=2)  # w = 1/S exp(r/β) π_ref/mixture


def pooled_optimum(rewards, log_ratios, beta, counts=None):
    """J* = β log Z(x) and KL(π* || π_ref), each (M,), from samples of several policies: see pooled_log_weights."""
    log_weights = pooled_log_weights(rewards, log_ratios, beta, counts)
    log_z = log_weights.logsumexp(dim=1)
    kl = (log_weights.softmax(dim=1) * rewards / beta).sum(dim=1) - log_z  # E_π*[log π*/π_ref] = E_π*[r]/β - log Z
    return beta * log_z, kl


def judged_optimum(gold, rewards, log_ratios, beta, counts=None):
    """The exact optimum π* of one reward, judged by another: J under gold = E_π*[gold] - β KL(π* || π_ref).

    gold (M, S); the rest: pooled_log_weights. Returns (J, the weights' effective sample size out of S), each (M,).
    """
    weights = pooled_log_weights(rewards, log_ratios, beta, counts).softmax(dim=1)
    _, kl = pooled_optimum(rewards, log_ratios, beta, counts)
    return (weights * gold).sum(dim=1) - beta * kl, 1 / (weights ** 2).sum(dim=1)  # (Σw)²/Σw², Σw = 1


def mean_and_error(x):
    """The mean over prompts, x (M,), and its standard error (None for a single prompt)."""
    return x.mean().item(), (x.std() / math.sqrt(len(x))).item() if len(x) > 1 else None


def share_and_error(part, way):
    """mean(part) / mean(way) over prompts, both (M,), and the standard error of this ratio of two means (delta method).
    An estimate: it may exceed 1. (None, None) if there is no way to go."""
    if not way.mean() > 0:
        return None, None
    share = part.mean() / way.mean()
    _, error = mean_and_error((part - share * way) / way.mean())
    return share.item(), error


# ----------------------------------------------------------------------------------------------------------------------
# Rejection-sampling fine-tuning


class Samples(NamedTuple):
    """N responses to each of M prompts: rollouts (batches), texts prompt by prompt, the rest (M, N); gold or None."""
    rollouts: list
    texts: list
    reward: torch.Tensor
    gold: torch.Tensor
    length: torch.Tensor
    ended: torch.Tensor
    verified: torch.Tensor = None


def draw(name, policy, reward_model, tokenizer, prompts, count, config, gold, rng, temperature=1.0):
    """`count` responses to every prompt, with their scores; gold: whether to ask the annotator too."""
    device, shape = policy.wte.weight.device, (len(prompts), count)
    ids = [tokenizer.prompt(prompt) for prompt in prompts for _ in range(count)]
    rollouts, texts, columns, report = [], [], [], progress(f"sampled {name}", len(ids))
    for start in range(0, len(ids), config.sample_batch):
        with autocast(device), torch.no_grad():
            rollout = generate(policy, ids[start:start + config.sample_batch], config.max_new_tokens,
                               tokenizer.end_token, temperature, seed=rng.getrandbits(48))
            scores = reward_model.score(rollout.tokens, rollout.lengths)
        ended = rollout.ended(tokenizer.end_token)
        golds = gold_rewards(rollout, tokenizer) if gold else torch.zeros(len(scores))
        columns.append(torch.stack([torch.where(ended, scores, config.missing_end_score).cpu(), golds, ended.cpu(),
                                    (rollout.lengths - rollout.prompt_lengths).cpu()]))
        rollouts.append(rollout)
        texts += response_texts(rollout, tokenizer)
        report(len(texts))
    rewards, golds, ended, lengths = torch.cat(columns, dim=1).view(4, *shape)
    asked = zip([prompt for prompt in prompts for _ in range(count)], texts)
    verified = torch.tensor(verifier(asked)).view(shape) * ended if config.verify else None
    return Samples(rollouts, texts, rewards, golds if gold else None, lengths, ended, verified)


def selection_figures(rewards, kept):
    """What a selection favours: rewards (M, N), kept (K, 2) -> name -> number.

    prompts: how many have a response among the kept; most: the most that one has; reward, spread: mean and standard
    deviation of the kept rewards; prompts_reward: the mean of all N responses to a kept one's prompt, and all_reward of all
    prompts: equal for the best per prompt, the first one larger where easy prompts are favoured (ECE 7115)."""
    rows, best, count = kept[:, 0], rewards[kept[:, 0], kept[:, 1]], kept[:, 0].bincount()
    return dict(prompts=(count > 0).sum().item(), most=count.max().item(), reward=best.mean().item(),
                spread=best.std(correction=0).item(), prompts_reward=rewards.mean(dim=1)[rows].mean().item(),
                all_reward=rewards.mean().item())


def select(prompts, one, tokenizer, config, block_size):
    """The responses to train on, of the Samples to these M prompts the M best ones, per prompt or overall: (rows {"prompt",
    "completion"}, selection_figures). Some can't be learnt from: they are counted, and dropped here or by
    encode_demonstrations. InputError if none is left."""
    M, N = one.reward.shape
    kept = (top_k_overall(one.reward, M) if config.finetune == "overall" else
            torch.stack([torch.arange(M), top_per_prompt(one.reward)], dim=1))
    ended = [(prompts[i], one.texts[N * i + j]) for i, j in kept.tolist() if one.ended[i, j]]
    rows = [{"prompt": prompt, "completion": text} for prompt, text in ended if text.strip() and "\0" not in text]
    _, _, longer = encode_demonstrations(rows, tokenizer, block_size)
    dropped = f"dropped {M - len(rows)} without an end or a text, {longer} longer than the context"
    if len(rows) == longer:
        raise InputError(f"of the {M} best responses {dropped}: none is left to train on; train SFT longer")
    found = selection_figures(one.reward, kept)
    print("kept    {:,} of {:,} responses, for {prompts:,} of {:,} prompts, at most {most} for one\n        {}\n"
          "        reward {reward:.2f}, spread {spread:.2f}; of all responses to these prompts {prompts_reward:.2f}, "
          "of all {all_reward:.2f}".format(M, M * N, M, dropped, **found), flush=True)
    return rows, found


def finetune(config):
    """Rejection-sampling fine-tuning (ECE 7115, "Rejection Sampling Fine-Tuning (RSFT)") of the SFT model, its stages
    numbered as there. Saved to OUT/SIZE/NAME: checkpoint.pt, and of every round the responses that it kept."""
    check_name(config.name, "rsft")
    own, held_out = split_prompts(config.data, config.seed) if config.data else (None, None)  # before minutes of training
    policies, reward_model, tokenizer = load_policies(config, [], config.name)
    reference, folder, step = policies["sft"][0], stage_folder(config, config.name), 0
    policy, block_size = copy.deepcopy(reference), reference.config.block_size
    own, data = prompts_with_room(own, tokenizer, config, block_size)
    M = min(config.prompts, len(own)) if own else config.prompts
    announce(config.name, config, get_device(), f"{data}; {config.rounds} rounds of {config.samples} responses to each of "
             f"{M:,}", policy)
    sources = [stage_folder(config, stage) / "checkpoint.pt" for stage in ("sft", "reward_model")]
    with Run(config.name, folder, config, config.report, sources) as run:
        run.total = config.rounds * config.epochs * math.ceil(M / config.batch)  # fewer if responses are dropped
        for number in range(1, config.rounds + 1):
            path, rng = run.folder / f"kept-{number}.jsonl", random.Random(f"rsft {config.seed} round {number}")
            if run.saved["step"] <= step:  # else the run goes on behind this
                # 1. Select prompts. 2. Generate N completions per prompt from the current model. 3. Score all completions.
                prompts = rng.sample(own, M) if own else sample_prompts(None, M, rng)
                one = draw(f"round {number}", policy, reward_model, tokenizer, prompts, config.samples, config, False, rng)
                rows, found = select(prompts, one, tokenizer, config, block_size)
                write_jsonl(path, rows)
                run.record(step, round=number, **found)

            # 4. Fine-tune on the top completions (same SFT loss).
            sequences, prompt_lengths, _ = encode_demonstrations(read_demonstrations(path), tokenizer, block_size)
            steps, done = config.epochs * math.ceil(len(sequences) / config.batch), max(0, run.saved["step"] - step)
            order = random.Random(f"rsft {config.seed} order {number}")
            if done <= steps:
                for i, figures, state in fit(policy, sequences, prompt_lengths, config, order, {**run.saved, "step": done}):
                    if figures:
                        run(step + i, loss=figures[0], grad_norm=figures[1])
                    run.end_step(step + i, **state)
            step += steps
        save_checkpoint(run.folder / "checkpoint.pt", "rsft", config.size, policy, tokenizer, metrics=run.figures(),
                        missing_end_score=config.missing_end_score, distils=config.samples ** config.rounds)
        run.finish()
    forget_rounds(folder, "kept", config.rounds)
    show_before_and_after(held_out, reference, policy, tokenizer, config, reward_model)
    print(f"saved {folder / 'checkpoint.pt'}; next: python best_of_n.py --policies ppo,dpo,{config.name}", flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# The yardstick


@torch.no_grad()
def sequence_logprobs(policy, temperature, rollouts):
    """log π(y|x) of every sampled response under a policy: (M·N,)."""
    logprobs = []
    for tokens, prompt_lengths, lengths in rollouts:
        logprobs.append(torch.empty(len(lengths), device=lengths.device))
        for rows in lengths.argsort().split(128):  # rows of one length together: little padding
            part = tokens[rows, :int(lengths[rows].max())]
            logprobs[-1][rows] = response_logprobs(policy, part, prompt_lengths[rows], lengths[rows], temperature)
    return torch.cat(logprobs).cpu()


def win_rate(gold, opponents):
    """P(gold of ours > gold of theirs) + ½ P(equal) of each sample against all opponents: (M, N), (M, K) -> (M, N)."""
    ours, theirs = gold[:, :, None], opponents[:, None, :]
    return ((ours > theirs).float() + 0.5 * (ours == theirs).float()).mean(dim=2)


def best_of_n_win_rate(rewards, gold, n):
    """Best-of-n's win rate against one more sample of the policy it draws from: rewards, gold (M, N), N > n -> (M,).

    The mean over every sample as the opponent and every subset of n of the others: none plays against itself, and none
    is spent on one side only. Best of 1 has exactly ½, since every pair meets both ways round.
    """
    rates = []
    for j in range(gold.shape[1]):
        others = torch.arange(gold.shape[1]) != j
        rates.append((subset_weights(rewards[:, others], n) * win_rate(gold[:, others], gold[:, j:j + 1])).sum(dim=1))
    return torch.stack(rates).mean(dim=0)


def distinct_2(texts):
    """Different pairs of neighbouring words over all pairs: 1 where no two words ever meet twice."""
    pairs = [pair for text in texts for pair in zip(text.split(), text.split()[1:])]
    return len(set(pairs)) / max(1, len(pairs))


def yardstick(config):
    """Sample every policy on the same held-out prompts and print how good each is, and how good it could be."""
    held_out = split_prompts(config.data, config.seed)[1] if config.data else None  # before minutes of training
    names = list(dict.fromkeys(name for name in config.policies.split(",") if name))
    path = stage_folder(config, "process_model") / "checkpoint.pt"
    if config.process:
        process_model, _, _ = load_checkpoint(path, "process_model", config.size, get_device(), RewardModel)
    policies, reward_model, tokenizer = load_policies(config, names, "best_of_n")
    gold, reference = not config.data, policies["sft"][0]
    stages = {stage: stage_metrics(config, stage) for stage in ("gpt", "sft", "reward_model") if gold}

    # 1. Held-out prompts: the world's, or those that every stage held out of the user's own.
    fitting, data = prompts_with_room(held_out, tokenizer, config, reference.config.block_size)
    prompts = (sample_prompts(None, config.prompts, random.Random("yardstick prompts"), held_out=True) if gold else
               fitting[:config.prompts])
    data = f"the little world: {len(prompts)} held-out prompts" if gold else f"held out of {data}; {len(prompts)} of them"
    announce("best_of_n", config, get_device(), f"{data}; {config.samples} samples each, {2 * config.samples} of SFT",
             reference)

    # 2. The same number of samples from every policy, twice as many from SFT: its samples are everybody's opponents and
    # best-of-N's candidates, and best-of-N plays against those that it did not choose from.
    rng, samples = random.Random(f"yardstick {config.seed}"), {}
    for name, (policy, temperature, _) in policies.items():
        count = config.samples * (2 if name == "sft" else 1)
        samples[name] = draw(name, policy, reward_model, tokenizer, prompts, count, config, gold, rng, temperature)

    # 3. log π_k/π_ref of every sample under every policy: (M, N, K) for the N samples of each.
    log_ratios, report = {}, progress("log-probabilities under every policy", len(samples) * len(policies))
    for name, one in samples.items():
        x = []
        for policy, temperature, _ in policies.values():
            x.append(sequence_logprobs(policy, temperature, one.rollouts))
            report(len(log_ratios) * len(policies) + len(x))
        x = torch.stack(x, dim=1)
        log_ratios[name] = (x - x[:, :1]).view(*one.reward.shape, len(policies))  # SFT comes first

    # 4. Best-of-N picks among SFT's samples by the reward model; best of 1 is SFT. Then the tables.
    rows, sft = {}, samples["sft"]
    judged = {"": sft.reward, **(judge_steps(sft, process_model, tokenizer) if config.process else {})}
    for n in sorted(n for n in {1, 4, 16, 64, *(n for _, _, n in policies.values())} if n <= config.samples):
        for rule, scores in judged.items():
            wins = dict(win_rate=best_of_n_win_rate(scores, sft.gold, n)) if gold else {}
            kl = torch.full((len(prompts),), best_of_n_kl(n))
            rows["sft" if n == 1 else f"best of {n}{rule}"] = make_row(sft, n, scores, **wins, kl=kl)
    for i, name in list(enumerate(policies))[1:]:
        wins = dict(win_rate=win_rate(samples[name].gold, sft.gold).mean(dim=1)) if gold else {}
        rows[name] = make_row(samples[name], 1, **wins, kl=log_ratios[name][:, :, i].mean(dim=1))
    folder = stage_folder(config, "best_of_n")
    folder.mkdir(parents=True, exist_ok=True)
    figures = [dict(policy=name, **with_errors(row)) for name, row in rows.items()]
    print()
    print_table(figures, FORMATS)
    if gold and last_with(stages["gpt"], "entropy"):  # it was pretrained on the world's text
        figures += forgetting(stages["gpt"], policies, tokenizer)
    for kind, field in [("reward model", "reward")] + [("gold", "gold")] * gold:
        figures += optimum(kind, field, rows, samples, log_ratios, config.beta)
    if config.verify:
        figures += verified_figures(rows, samples, config.beta)
    if gold:
        where_gold_is_lost([row for row in figures if row.get("under") == "gold"])
        close_to_the_best(stages, figures)
    for kind, field in [("reward model", "reward")] + [("gold", "gold")] * gold:
        figures += frontier(kind, field, samples, log_ratios)
    for n in [2 ** k for k in range(7) if 2 ** k <= config.samples]:  # one more frontier, not printed either
        row = with_errors(make_row(sft, n, kl=torch.full((len(prompts),), best_of_n_kl(n))))
        figures.append(dict(under="best of N", policy=f"best of {n}", **row))
    write_jsonl(folder / "metrics.jsonl", figures)
    print(f"\nsaved {folder / 'metrics.jsonl'}")


def judge_steps(one, process_model, tokenizer):
    """process_scores of a policy's Samples, each (M, N); -inf for a response without <|end|> or without a sentence."""
    scores = {}
    for rollout in one.rollouts:
        rewards, steps = step_rewards(process_model, rollout, tokenizer)
        whole = rollout.ended(tokenizer.end_token) & steps.any(dim=1)
        for rule, score in process_scores(rewards, steps).items():
            scores.setdefault(f", {rule}", []).append(torch.where(whole, score, -math.inf).cpu())
    return {rule: torch.cat(parts).view(one.reward.shape) for rule, parts in scores.items()}


def forgetting(stage, policies, tokenizer):
    """Print and return every policy's loss on the held-out pretraining text, nats a token, beside the base model's own: what
    alignment forgets (CME 295, "catastrophic forgetting"; Ouyang et al. 2022). stage: gpt's stage_metrics."""
    documents = encode_documents(held_out_documents(), tokenizer)
    losses = {"base": last_with(stage, "held_out")["held_out"],
              **{name: held_out_loss(policy, documents, 1) for name, (policy, _, _) in policies.items()}}
    print("\npretraining loss: " + ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items()) + " nats a token")
    return [dict(under="pretraining", policy=name, loss=loss) for name, loss in losses.items()]


def make_row(one, n, scores=None, **given):
    """The figures of best-of-n over a policy's Samples, prompt by prompt: name -> (M,); n = 1: of the policy itself.

    Means over all subsets of n of a prompt's samples; distinct_2, of the best of each prompt's first n, is one number,
    (1,). scores (M, N): what the best is chosen by (None: the reward). given: figures that are known already.
    """
    scores = one.reward if scores is None else scores
    weights, N = subset_weights(scores, n), one.reward.shape[1]
    means = {key: (weights * getattr(one, key)).sum(dim=1)  # E[x of the best of n] = Σ_i weight_i x_i
             for key in ("reward", "gold", "length", "ended") if getattr(one, key) is not None}
    winners = [one.texts[N * prompt + j] for prompt, j in enumerate(top_per_prompt(scores[:, :n]).tolist())]
    return dict(**means, **given, distinct_2=torch.tensor([distinct_2(winners)]))


def with_errors(row):
    """name -> (M,) becomes name -> its mean and name_error -> its standard error over prompts."""
    return {key: value for name, x in row.items() for key, value in zip((name, f"{name}_error"), mean_and_error(x))}


FORMATS = dict(reward=".2f", gold=".2f", win_rate=".1%", kl=".2f", length=".0f", distinct_2=".2f", ended=".0%")


def cell(x, error=None, form=".3f"):
    """A figure and its standard error: "1.205 ± 0.021", "89.3 ± 0.9 %"; a whole number goes without, None is "-"."""
    if x is None:
        return "-"
    text = f"{x:{form}}" if error is None or ".0" in form else f"{x:{form}} ± {error:{form}}"
    return text.replace("%", "") + " %" if form.endswith("%") else text


def print_table(rows, formats):
    """Print rows, dicts with a "policy" and figures, in columns: those of formats, each with its figure_error."""
    columns = [key for key in formats if key in rows[0]]
    table = [["", *columns]] + [[row["policy"], *(cell(row[key], row.get(f"{key}_error"), formats[key]) for key in columns)]
                                for row in rows]
    widths = [max(map(len, column)) for column in zip(*table)]
    for name, *cells in table:
        print("  ".join([name.ljust(widths[0]), *(text.rjust(width) for text, width in zip(cells, widths[1:]))]))


def optimum(kind, field, rows, samples, log_ratios, beta):
    """Print and return how far each policy went from SFT to the optimum of the objective under one reward.

    field: "reward" or "gold"; rows: name -> make_row's; samples: name -> Samples; log_ratios: name -> (M, N, K). With
    each share come the rest of the way to the reward model's exact optimum, and from there to J*.
    """
    pool = torch.cat(list(log_ratios.values()), dim=1), beta, [x.shape[1] for x in log_ratios.values()]
    rewards, judged = (torch.cat([getattr(one, key) for one in samples.values()], dim=1) for key in ("reward", field))
    J_stars, kls = pooled_optimum(judged, *pool)
    J_models, effective = judged_optimum(judged, rewards, *pool)
    best = with_errors(dict(J_star=J_stars, J_star_kl=kls, reward_model_J=J_models, effective_samples=effective))
    print(f"\nunder the {kind}, beta {beta}: J* = {cell(best['J_star'], best['J_star_error'])}, "
          f"{cell(best['J_star_kl'], best['J_star_kl_error'], '.2f')} nats from the reference\n"
          f"(J* = beta log Z, from the {judged.shape[1]} samples a prompt of {', '.join(samples)} pooled)")
    own = {name: optimality_gap(getattr(one, field), log_ratios[name][:, :, i], beta)[1].mean().item()
           for i, (name, one) in enumerate(samples.items())}  # not of best-of-N: its density is not known
    figures, starts = [], rows["sft"][field]  # (M,): J of SFT, whose KL is 0
    for name, row in rows.items():
        J = row[field] - beta * row["kl"]  # (M,): J = E[r] - β KL(π || π_ref)
        figures.append(dict(under=kind, **best, policy=name, **with_errors(dict(J=J))))
        for part, x in (("share", J - starts), ("left_by_policy", J_models - J),
                        ("lost_to_reward_model", J_stars - J_models)):
            figures[-1][part], figures[-1][f"{part}_error"] = share_and_error(x, J_stars - starts)
        figures[-1]["own_J_star"] = own.get(name)
    print_table(figures, dict(J=".3f", share=".1%", own_J_star=".3f"))
    estimates = best["J_star"], *own.values()
    print(f"the estimates of J*, pooled and of each policy's own, lie within {max(estimates) - min(estimates):.3f}")
    return figures


def frontier(kind, field, samples, log_ratios):
    """The frontier of all policies, no policy has more of the field at less KL: for every β from 0.05 to 6.4 a row with
    KL(π*β || π_ref), E_π*β[reward] and E_π*β[gold]. Arguments as optimum's. Where few effective_samples are left, the
    estimate is a poor one. Not printed."""
    counts, ratios = [x.shape[1] for x in log_ratios.values()], torch.cat(list(log_ratios.values()), dim=1)
    columns = {key: torch.cat([getattr(one, key) for one in samples.values()], dim=1)  # (M, S)
               for key in ("reward", "gold") if samples["sft"].gold is not None or key == "reward"}
    rows = []
    for beta in (0.05 * 2 ** (k / 2) for k in range(15)):
        weights = pooled_log_weights(columns[field], ratios, beta, counts).softmax(dim=1)  # π*β(y_i|x)
        row = {key: (weights * x).sum(dim=1) for key, x in columns.items()}
        row.update(kl=pooled_optimum(columns[field], ratios, beta, counts)[1], effective_samples=1 / (weights ** 2).sum(dim=1))
        rows.append(dict(under=kind, policy="frontier", beta=beta, **with_errors(row)))
    return rows


def verified_figures(rows, samples, beta):
    """Print and return how often each policy is right, how often one of 16 of its responses is (pass@16, from the counts),
    and its J under the verifier beside J*, which is exact given how often SFT is right on each prompt. Arguments as
    optimum's."""
    figures, starts = [], samples["sft"].verified.mean(dim=1)  # (M,): J of SFT, whose KL is 0
    J_stars, right = torch.tensor([verified_optimum(p, beta) for p in starts.tolist()]).unbind(dim=1)  # each (M,)
    for name, one in samples.items():
        n, p = one.verified.shape[1], one.verified.mean(dim=1)
        row = dict(verified=p, J=p - beta * rows[name]["kl"])
        if n >= 16:
            row["pass_16"] = torch.tensor([pass_at_k(int(count), n, 16) for count in one.verified.sum(dim=1)])
        figures.append(dict(under="verifier", policy=name, **with_errors(dict(**row, kl=rows[name]["kl"], J_star=J_stars))))
        figures[-1]["share"], figures[-1]["share_error"] = share_and_error(row["J"] - starts, J_stars - starts)
    print(f"\nunder the verifier, beta {beta}: J* = {cell(*mean_and_error(J_stars))}, from how often SFT is right on each "
          f"prompt;\nthe optimum is right {cell(*mean_and_error(right), '.1%')}")
    print_table(figures, dict(verified=".1%", pass_16=".1%", kl=".2f", J=".3f", share=".1%"))
    return figures


def where_gold_is_lost(figures):
    """Print the parts of the way from SFT to J* under gold: what a policy got, what it left of that which the reward
    model's exact optimum gets, and what no optimizer of this reward model can get. figures: optimum's, SFT first, which
    left all of it. Best-of-N's J is a lower bound; DPO optimizes the labels, not this reward model."""
    sft = figures[0]
    print(f"\nwhere gold is lost, of the way from SFT to J*: the reward model's exact optimum gets "
          f"{cell(sft['left_by_policy'], sft['left_by_policy_error'], '.1%')}\n"
          f"(J = {cell(sft['reward_model_J'], sft['reward_model_J_error'])} under gold; effective sample size of its "
          f"weights: {sft['effective_samples']:.0f} a prompt)")
    print_table(figures, dict(share=".1%", left_by_policy=".1%", lost_to_reward_model=".1%"))


def stage_metrics(config, stage):
    """The figures in a stage's checkpoint: a list of dicts, empty if there is none. InputError if damaged."""
    path = stage_folder(config, stage) / "checkpoint.pt"
    if not path.exists():
        return []
    with refused_if_broken(path, "train the stage again"):
        return read_torch(path)["metrics"]


def last_with(rows, *keys):
    """The last row with all these figures, or None."""
    return next((row for row in reversed(rows) if all(key in row for key in keys)), None)


def close_to_the_best(stages, figures):
    """Print of every stage what was measured, what is possible, and the share. stages: name -> stage_metrics."""
    rows = []
    for stage, what, measured, possible, share, chance in (
            ("gpt", "pretraining, nats per token", "held_out", "entropy", None, 0),
            ("sft", "SFT, nats per token", "held_out", "entropy", None, 0),
            ("reward_model", "reward model, accuracy", "expected_accuracy", "bayes_accuracy", "share_of_bayes", 0),
            ("reward_model", "reward model, accuracy above chance", "expected_accuracy", "bayes_accuracy",
             "above_chance", 0.5),
            ("reward_model", "reward model, loss", "loss", "annotator_loss", None, 0)):
        line = last_with(stages[stage], measured, possible)
        if line:
            x, best = line[measured] - chance, line[possible] - chance
            rows.append(dict(policy=what, measured=x, measured_error=line.get(f"{measured}_error"), possible=best,
                             share=line[share] if share else best / x, share_error=line.get(f"{share}_error")))
    for row in figures:
        if row.get("share") is not None and row["policy"] != "sft":
            rows.append(dict(row, policy=f"{row['policy']}, J under {row['under']}", measured=row["J"],
                             measured_error=row["J_error"], possible=row["J_star"], possible_error=row["J_star_error"]))
    if rows:
        print("\nHow close to the best")
        print_table(rows, dict(measured=".3f", possible=".3f", share=".1%"))


def load_policies(config, names, stage):
    """({name: (GPT, temperature of its training, N of the best-of-N that it distils, else 1)}, reward model, tokenizer) for
    a stage; InputError if the vocabularies differ."""
    mains, earlier, kinds = {"ppo": ppo.main, "dpo": dpo.main}, stages_until("reward_model"), {"sft": "sft"}
    for name in names:
        complete(stage_folder(config, name))
        kinds[name] = re.match("ppo|dpo|rsft|", name).group()
        if not (kinds[name] and (stage_folder(config, name) / "checkpoint.pt").exists()):
            if name not in mains:  # before minutes of training
                raise InputError(f"--policies {name}: must be ppo or dpo, or the --name of a finished run of them or RSFT")
            earlier[name] = mains[name]
    train_missing(config, earlier, stage)
    device, policies = get_device(), {}
    path = stage_folder(config, "reward_model") / "checkpoint.pt"
    reward_model, tokenizer, _ = load_checkpoint(path, "reward_model", config.size, device, RewardModel)
    for name, kind in kinds.items():
        policy_path = stage_folder(config, name) / "checkpoint.pt"
        policy, policy_tokenizer, checkpoint = load_checkpoint(policy_path, kind, config.size, device)
        policies[name] = policy, checkpoint.get("temperature", 1.0), checkpoint.get("distils", 1)
        for key in ("beta", "missing_end_score"):
            ours = getattr(config, key)
            if checkpoint.get(key, ours) != ours:
                print(f"{name} was trained with {key} {checkpoint[key]}; J and J* are those of {key} {ours}")
        if policy_tokenizer.vocabulary != tokenizer.vocabulary:
            raise InputError(f"{policy_path}: its vocabulary is not that of {path}; train the stages again")
    return policies, reward_model, tokenizer


def answer(config):
    """Best-of-N for one prompt: print the candidates, best first, and the winner. They are SFT's, or with --finetune those
    of the fine-tuned policy."""
    name = config.name or "sft"
    policies, reward_model, tokenizer = load_policies(config, [name] * bool(config.name), "best_of_n")
    gold = stories.parse_request(config.prompt) is not None  # the annotator judges the world's own requests only
    rng = random.Random(f"candidates {config.seed}")
    policy, temperature, _ = policies[name]
    one = draw(name, policy, reward_model, tokenizer, [config.prompt], config.n, config, gold, rng, temperature)
    for _, j in top_k_overall(one.reward, config.n).tolist():
        print(f"{one.reward[0, j]:+7.3f}" + (f"  gold {one.gold[0, j]:+7.3f}" if gold else "") + f"  {one.texts[j]}")
    print(f"\nwinner of {config.n}: {one.texts[top_per_prompt(one.reward)[0]]}")


def main(argv=None):
    needs = {"n": ("prompt",), "policies": ("finetune", "no"), "beta": ("finetune", "no"), "process": ("data", ""),
             "verify": ("data", "")}
    for flag in ("name", "rounds", "epochs", "batch", "micro_batch", "lr", "warmup", "weight_decay", "report"):
        needs[flag] = ("finetune", "per_prompt", "overall")
    config = parse_config(Config, GPU, argv, "Best-of-N for one prompt, rejection-sampling fine-tuning, or the yardstick "
                                             "that compares all policies.", needs, PRESETS)
    if config.finetune != "no" and (config.process or config.verify):
        raise InputError(f"--finetune {config.finetune}: goes without --process and --verify")
    if config.prompt:
        answer(config)
    elif config.finetune != "no":
        finetune(config)
    else:
        yardstick(config)


if __name__ == "__main__":
    run_script(main)
