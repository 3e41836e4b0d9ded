"""
best_of_n.py: best-of-N and rejection sampling (ECE 7115, "Rejection Sampling", "Best-of-N
Sampling"; CME 295, Lecture 5), and the yardstick that compares all policies with the optimum.

Best-of-N samples N responses, scores them with the reward model and returns the best: no training,
N times the cost. Rejection-sampling fine-tuning (RSFT) spends that cost once, after which a single
answer should be as good as the winner of N. One round of it is

    1. select prompts
    2. generate       N completions of each from the current policy
    3. score          with the reward model; keep the best of each prompt, or the best of all
    4. fine-tune      on what was kept, with the SFT loss

    python best_of_n.py --prompt "Tell me ..." --n 16   the candidates and the winner, and how the
                                                        optimum weighs them for three β
    python best_of_n.py --finetune per_prompt           RSFT on the best response to every prompt
                                                        (with --prompt "...": ask its policy)
    python best_of_n.py --finetune overall              RSFT on the best of all
    python best_of_n.py                                 the yardstick: SFT, best-of-N, PPO, DPO
    python best_of_n.py --data FILE.jsonl               on prompts of your own, without gold columns
    python best_of_n.py --verify --policies ppo-verifier    right or wrong: pass@1, pass@16, J*
    python best_of_n.py --process                       best-of-N by the process reward model too

Where this differs from the slides: completions are counted from 0, and the k best overall come best
first. The statistics of the yardstick, J* among them, are in data/answer_key.py.

Everything up to "The yardstick" is the lecture's and can be read top to bottom.
"""

import copy
import math
import random
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from data.annotator import gold_rewards
from data.answer_key import (best_of_n_rows, compare_policies, last_with, optimality_gap,
                             print_selection, print_yardstick, process_scores,
                             selection_figures)
from data.corpus import draw_requests, encode_documents, held_out_documents, prompts_with_room
from data.files import (InputError, lock_folder, read_demonstrations, run_script, split_prompts,
                        write_jsonl)
from data.judges import verifier
from data.run import (Run, allow_flags, announce, check_name, complete, forget_rounds,
                      kind_of_policy, parse_config, progress, read_torch, refuse_flags,
                      refuse_stale, refused_if_broken, show_models, stage_folder, train_missing)
from data.stories import parse_request
from data.table import Column, print_columns
from data.tokenizer import encode_demonstrations
from gpt import (GPT, autocast, generate, get_device, held_out_loss, load_checkpoint,
                 memory_of_pieces, refuse_other_tokens, response_logprobs, response_texts,
                 save_checkpoint)
from reward_model import RewardModel, make_reward, step_rewards
from sft import fine_tune, refuse_own_text, show_before_and_after


@dataclass
class Config:
    # the objective
    beta: float = 0.2           # price of one nat of KL in J, in reward units
    missing_end_score: float = -5.0     # score of a response without <|end|>, as in ppo.py

    # sampling
    n: int = 16                 # N: candidates for one prompt, with --prompt and --finetune
    max_new_tokens: int = 96    # the longest response
    sample_batch: int = 256     # responses in one batch of sampling or scoring
    micro_batch: int = 32       # responses whose log-probabilities are computed at once, and with
                                # --finetune those of a forward pass; less memory, the same gradient

    # the yardstick
    policies: str = "ppo,dpo"   # the folders of the policies to compare, with commas between
    prompts: int = 32           # held-out prompts
    samples: int = 64           # samples per prompt and policy, twice as many from SFT; best-of-N
                                # is measured for N up to this
    verify: bool = False        # the verifier's reward too: who is right how often, pass@16, J*
    process: bool = False       # best-of-N by the process reward model too: by a response's
                                # smallest step, the steps' product, their sum

    # rejection-sampling fine-tuning
    finetune: Literal["no", "per_prompt", "overall"] = "no"     # RSFT on the best response to each
                                # prompt, or on the best of all
    name: str = ""              # its policy's folder, OUT/SIZE/NAME; its name begins with rsft
    rounds: int = 1             # each starts from the policy of the round before
    rsft_prompts: int = 1024    # prompts to train on in a round; as many responses are kept
    epochs: int = 4             # passes over the responses that a round kept
    batch: int = 32             # responses in a step
    lr: float = 3e-4            # peak learning rate of a round (linear warm-up, cosine to zero)
    warmup: int = 10            # steps of warm-up
    weight_decay: float = 0.1   # AdamW's, on matrices only

    # this run
    size: Literal["auto", "cpu", "gpu", "gpt2"] = "auto"    # auto: gpu if there is one; gpt2: the
                                # model of data/huggingface.py load
    out: str = "out"            # folder of all outputs; the yardstick writes to OUT/SIZE/best_of_n,
                                # RSFT to OUT/SIZE/NAME
    seed: int = 1               # fixes the samples; a missing stage is trained with it
    prompt: str = ""            # answer this prompt with best-of-N, and stop
    data: str = ""              # prompts of a .jsonl file instead of the little world's
    report: int = 16            # RSFT: steps between two reports; its state is saved as often
    resume: bool = False        # continue an interrupted --finetune, or missing stage


GPU = {"prompts": 128, "sample_batch": 1024, "max_new_tokens": 128, "batch": 64, "micro_batch": 64,
       "lr": 5e-5}
PRESETS = {
    "size": {"gpt2": {"sample_batch": 128, "max_new_tokens": 128, "micro_batch": 8, "lr": 5e-5}},
    "finetune": {"per_prompt": {"name": "rsft-per_prompt"}, "overall": {"name": "rsft-overall"}},
}

# --------------------------------------------------------------------------------------------------
# Selection


def best_of_n_kl(n):
    """The KL divergence of best-of-n from its reference in nats, an upper bound that is tight when
    ties are rare: log n - (n-1)/n (Stiennon et al. 2020, appendix G.3)."""
    return math.log(n) - (n - 1) / n


def top_per_prompt(rewards):
    """S(R) = [argmax_j r_1j, ..., argmax_j r_Mj]: (M, N) -> (M,), counted from 0 (ECE 7115,
    "Rejection Sampling").

    >>> top_per_prompt(torch.tensor([[0.7, 0.3, 0.5, 0.2], [0.4, 0.8, 0.6, 0.5]])).tolist()
    [0, 1]
    """
    return rewards.argmax(dim=1)


def top_k_overall(rewards, k):
    """S_K(R_flat), the k best of all: rewards (M, N) -> (k, 2), rows (prompt, completion), best
    first, counted from 0.

    >>> top_k_overall(torch.tensor([[0.9, 0.3], [0.2, 0.5]]), 2).tolist()
    [[0, 0], [1, 1]]
    """
    best = rewards.flatten().argsort(descending=True, stable=True)[:k]
    return torch.stack([best // rewards.shape[1], best % rewards.shape[1]], dim=1)


# --------------------------------------------------------------------------------------------------
# Best-of-N


class Policy(NamedTuple):
    """A policy that is sampled."""
    model: GPT
    temperature: float = 1.0    # at which it was trained
    distils: int = 1            # N of the best-of-N that it distils; 1: none. With --finetune
                                # overall too: one sample in N is kept


class Samples(NamedTuple):
    """N responses to each of M prompts."""
    rollouts: list      # the batches in which they were sampled
    texts: list         # M·N texts, prompt by prompt
    figures: dict       # (M, N) each: "reward", "length" in tokens, "ended" (1 or 0); "gold" if the
                        # annotator was asked; "verified", right (1) or wrong (0), with --verify


def load_policies(config, names, stage):
    """({name: Policy}, reward model, tokenizer) for a stage: SFT and the policies of these names.
    What is missing is trained. InputError if the vocabularies differ."""
    needed = ["gpt", "sft", "reward_model"]
    kinds = {"sft": "sft"}
    for name in names:
        path = stage_folder(config, name) / "checkpoint.pt"
        complete(path.parent)
        kind = kind_of_policy(name)
        if not kind or not path.exists():
            if name not in ("ppo", "dpo"):
                raise InputError(f"--policies {name}: must be ppo or dpo, or the --name of a "
                                 "finished run of them or RSFT")
            needed.append(name)
        else:
            refuse_stale(path.parent)
        kinds[name] = kind
    train_missing(config, needed, stage)

    device = get_device()
    reward_path = stage_folder(config, "reward_model") / "checkpoint.pt"
    reward_model, tokenizer, _ = load_checkpoint(
        reward_path, "reward_model", config.size, device, RewardModel)
    policies = {}
    for name, kind in kinds.items():
        path = stage_folder(config, name) / "checkpoint.pt"
        model, policy_tokenizer, checkpoint = load_checkpoint(path, kind, config.size, device)
        policies[name] = Policy(model, checkpoint.get("temperature", 1.0),
                                checkpoint.get("distils", 1))
        if name == "sft" and not config.data and not config.prompt:
            refuse_own_text(path, checkpoint)
        for setting in ("beta", "missing_end_score"):
            ours = getattr(config, setting)
            theirs = checkpoint.get(setting, ours)
            if theirs != ours:
                print(f"{name} was trained with {setting} {theirs}; J and J* are those of "
                      f"{setting} {ours}")
        refuse_other_tokens(path, policy_tokenizer, tokenizer)
    return policies, reward_model, tokenizer


def draw(name, policy, reward_model, tokenizer, prompts, count, config, gold, rng):
    """`count` responses of a Policy to every prompt, with their scores: Samples. gold: whether to
    ask the annotator."""
    asked = []
    for prompt in prompts:
        asked += [prompt] * count
    ids = [tokenizer.prompt(prompt) for prompt in asked]
    rollouts = []
    texts = []
    scores = []
    report = progress(f"sampled {name}", len(ids))
    for start in range(0, len(ids), config.sample_batch):
        batch = ids[start:start + config.sample_batch]
        with autocast(get_device()), torch.no_grad():
            rollout = generate(policy.model, batch, config.max_new_tokens, tokenizer.end_token,
                               policy.temperature, seed=rng.getrandbits(48))
            scores.append(reward_model.score(rollout.tokens, rollout.lengths))
        rollouts.append(rollout)
        texts += response_texts(rollout, tokenizer)
        report(len(texts))

    ended = torch.cat([rollout.ended(tokenizer.end_token) for rollout in rollouts])
    scores = torch.cat(scores)
    if scores[ended].mean() < config.missing_end_score:
        print(f"note    {name}: finished responses score less than unfinished ones; lower "
              f"--missing_end_score {config.missing_end_score}", flush=True)
    lengths = torch.cat([rollout.lengths - rollout.prompt_lengths for rollout in rollouts])
    figures = {"reward": torch.where(ended, scores, config.missing_end_score),
               "length": lengths.float(),
               "ended": ended.float()}
    if gold:
        golds = [gold_rewards(rollout, tokenizer) for rollout in rollouts]
        figures["gold"] = torch.cat(golds)
    if config.verify:
        right = torch.tensor(verifier(zip(asked, texts)))
        figures["verified"] = right * ended.cpu()  # an unfinished response is never right
    figures = {figure: x.cpu().view(-1, count) for figure, x in figures.items()}
    return Samples(rollouts, texts, figures)


@torch.no_grad()
def sequence_logprobs(policy, rollouts, micro_batch=128):
    """log π(y|x) of every sampled response under a Policy, micro_batch in one forward pass:
    (M·N,)."""
    logprobs = []
    for tokens, prompt_lengths, lengths in rollouts:
        part = torch.empty(len(lengths), device=lengths.device)
        for rows in lengths.argsort().split(micro_batch):  # by length: little padding
            longest = int(lengths[rows].max())
            part[rows] = response_logprobs(policy.model, tokens[rows, :longest],
                                           prompt_lengths[rows], lengths[rows], policy.temperature)
        logprobs.append(part)
    return torch.cat(logprobs).cpu()


def log_ratios_of(drawn, policies, micro_batch):
    """log π_k/π_ref of every sample under each of K policies, SFT first: {policy that drew it:
    (M, N, K)}."""
    log_ratios = {}
    report = progress("log-probabilities under every policy", len(drawn) * len(policies))
    for name, samples in drawn.items():
        logprobs = []
        for policy in policies.values():
            logprobs.append(sequence_logprobs(policy, samples.rollouts, micro_batch))
            report(len(log_ratios) * len(policies) + len(logprobs))
        logprobs = torch.stack(logprobs, dim=1)     # (M·N, K)
        ratios = logprobs - logprobs[:, :1]
        log_ratios[name] = ratios.view(*samples.figures["reward"].shape, len(policies))
    return log_ratios


def answer(config):
    """Best-of-N for one prompt: print the candidates, best first, and the winner. They are SFT's,
    with how the optimum weighs them, or with --finetune those of the fine-tuned policy."""
    if config.name and not is_trained(config, config.name):
        raise InputError(f"--finetune {config.finetune}: {config.name} is not trained yet; without "
                         "--prompt this command trains it")
    name = config.name or "sft"
    names = [config.name] if config.name else []
    if name == "sft" and is_trained(config, "ppo"):
        names.append("ppo")
    policies, reward_model, tokenizer = load_policies(config, names, "best_of_n")
    gold = parse_request(config.prompt) is not None  # the annotator knows the world's requests only
    rng = random.Random(f"candidates {config.seed}")
    samples = draw(name, policies[name], reward_model, tokenizer, [config.prompt], config.n, config,
                   gold, rng)

    rewards = samples.figures["reward"]  # (1, N)
    for _, j in top_k_overall(rewards, config.n).tolist():
        line = f"{rewards[0, j]:+7.3f}"
        if gold:
            line += f"  gold {samples.figures['gold'][0, j]:+7.3f}"
        print(f"{line}  {samples.texts[j]}")
    print(f"\nwinner of {config.n}: {samples.texts[top_per_prompt(rewards)[0]]}")

    if name == "sft":
        log_ratios = log_ratios_of({name: samples}, policies, config.micro_batch)[name]  # (1, N, K)
        ppo_log_ratios = log_ratios[:, :, 1] if "ppo" in policies else None
        print_weights(samples, ppo_log_ratios, config.beta)


def is_trained(config, name):
    """Whether a policy has a checkpoint. One that was made from others than those beside it is none
    here, and a line says so."""
    folder = stage_folder(config, name)
    complete(folder)
    try:
        refuse_stale(folder)
    except InputError as error:
        print(f"note    {error}; it is left out here", flush=True)
        return False
    return (folder / "checkpoint.pt").exists()


def print_weights(samples, ppo_log_ratios, beta):
    """SFT's candidates, best first, with their Boltzmann weights softmax(r/β) in the optimum π* for
    β/4, β and 4β, and with their weights in PPO's policy, if there is one. Below, the means under
    these weights. ppo_log_ratios (1, N): log π/π_ref under PPO, or None."""
    rewards = samples.figures["reward"]  # (1, N)
    N = rewards.shape[1]
    order = top_k_overall(rewards, N)[:, 1]
    columns = [Column("candidate", [samples.texts[j] for j in order])]
    scores = {"r": rewards}
    if "gold" in samples.figures:
        scores["gold"] = samples.figures["gold"]
    for name, x in scores.items():
        columns.append(Column(name, x[0, order].tolist(), ".2f"))

    winner = torch.zeros(1, N)
    winner[0, order[0]] = 1.0
    weights = {f"best of {N}": winner}  # (1, N) each
    kls = {f"best of {N}": best_of_n_kl(N), "π_ref": 0.0}
    optima = {}
    for b in (beta / 4, beta, 4 * beta):
        name = f"β = {b:g}"
        weights[name] = (rewards / b).softmax(dim=1)
        _, J_star = optimality_gap(rewards, torch.zeros_like(rewards), b)  # β log E_π_ref[exp(r/β)]
        optima[name] = J_star.item()
        mean = (weights[name] * rewards).sum().item()
        kls[name] = (mean - optima[name]) / b  # E[r]/β - log Z
        columns.append(Column(name, weights[name][0, order].tolist(), ".3f"))
    weights["π_ref"] = torch.full((1, N), 1 / N)
    if ppo_log_ratios is not None:
        weights["PPO"] = ppo_log_ratios.softmax(dim=1)
        columns.append(Column("PPO", weights["PPO"][0, order].tolist(), ".3f"))
        columns.append(Column("log π_PPO/π_ref", ppo_log_ratios[0, order].tolist(), ".2f",
                              signed=True))
    print()
    print_columns(columns)

    entropies = [torch.special.entr(x).sum().item() for x in weights.values()]
    columns = [Column("", list(weights))]
    for name, x in scores.items():
        means = [(w * x).sum().item() for w in weights.values()]
        columns.append(Column(f"E[{name}]", means, ".2f"))
    columns += [Column("entropy", entropies, ".3f"),
                Column("KL to π_ref", [kls.get(name) for name in weights], ".3f"),
                Column("β log Z", [optima.get(name) for name in weights], ".3f")]
    print()
    print_columns(columns, [
        f"β = …: the optimum π*, weights softmax(r/β) of {N} samples of π_ref. β → 0 is greedy, "
        "β → ∞",
        'π_ref: CS 224R, ch. 7, "Boltzmann Intuition". KL = log N - entropy, '
        f"log {N} = {math.log(N):.3f};",
        f"best of {N}: log N - (N-1)/N (best_of_n_kl). β log Z = E[r] - β KL = J*."])


# --------------------------------------------------------------------------------------------------
# Rejection-sampling fine-tuning (ECE 7115, "Rejection Sampling Fine-Tuning (RSFT)")


def select(prompts, samples, how, tokenizer, block_size):
    """The responses to train on: of the Samples to these M prompts the M best ones, "per_prompt" or
    "overall". Returns (rows {"prompt", "completion"}, selection_figures). Some can't be learnt
    from: they are counted, and dropped here or by encode_demonstrations. InputError if none is
    left."""
    rewards = samples.figures["reward"]
    M, N = rewards.shape
    if how == "overall":
        kept = top_k_overall(rewards, M)
    else:
        kept = torch.stack([torch.arange(M), top_per_prompt(rewards)], dim=1)

    rows = []
    for i, j in kept.tolist():
        text = samples.texts[N * i + j]
        if samples.figures["ended"][i, j] and text.strip() and "\0" not in text:
            rows.append({"prompt": prompts[i], "completion": text})
    _, longer = encode_demonstrations(rows, tokenizer, block_size)
    dropped = f"dropped {M - len(rows)} without an end or a text, {longer} longer than the context"
    if len(rows) == longer:
        raise InputError(f"of the {M} best responses {dropped}: none is left to train on; train "
                         "SFT longer")

    figures = selection_figures(rewards, kept)
    print_selection(figures, M, N, dropped)
    return rows, figures


def rsft(policy, reward_model, tokenizer, own, count, config, run):
    """The rounds of RSFT. Trains the policy in place. own: the user's prompts, [] for requests of
    the little world; count: how many of them in a round. Every round writes the responses it kept
    to kept-N.jsonl in run.folder; a resumed run samples only the rounds that it has no row of."""
    block_size = policy.config.block_size
    for number in range(1, config.rounds + 1):
        path = run.folder / f"kept-{number}.jsonl"
        sampled = [row.get("round") for row in run.rows]
        if number not in sampled:
            # 1. Select prompts.
            rng = random.Random(f"rsft {config.seed} round {number}")
            if own:
                prompts = rng.sample(own, count)
            else:
                prompts = draw_requests(count, rng)

            # 2. Generate N completions per prompt from the current model. 3. Score all completions.
            samples = draw(f"round {number}", Policy(policy), reward_model, tokenizer, prompts,
                           config.n, config, False, rng)
            rows, figures = select(prompts, samples, config.finetune, tokenizer, block_size)
            write_jsonl(path, rows)
            run.record(round=number, **figures)

        # 4. Fine-tune on the top completions (same SFT loss).
        rows = read_demonstrations(path)
        demonstrations, _ = encode_demonstrations(rows, tokenizer, block_size)
        order = random.Random(f"rsft {config.seed} order {number}")
        fine_tune(policy, demonstrations, [], None, config, order, run)


def finetune(config):
    """RSFT of the SFT model. Saved to OUT/SIZE/NAME: checkpoint.pt, every round's kept-N.jsonl."""
    check_name(config.name, "rsft")
    own = []
    held_out = None     # of the little world
    if config.data:
        own, held_out = split_prompts(config.data)  # first: a bad file fails here
    policies, reward_model, tokenizer = load_policies(config, [], config.name)
    reference = policies["sft"].model
    policy = copy.deepcopy(reference)

    count = config.rsft_prompts
    data = "fresh requests of the little world"
    if config.data:
        own, data = prompts_with_room(own, config.data, tokenizer, config.max_new_tokens,
                                      reference.config.block_size)
        count = min(count, len(own))
    announce(config.name, config, get_device(),
             f"{data}; {config.rounds} rounds of {config.n} responses to each of {count:,}", policy)

    folder = stage_folder(config, config.name)
    sources = [stage_folder(config, stage) / "checkpoint.pt" for stage in ("sft", "reward_model")]
    total = config.rounds * config.epochs * math.ceil(count / config.batch)  # or less, if dropped
    with Run(config.name, folder, config, config.report, sources, total=total) as run:
        rsft(policy, reward_model, tokenizer, own, count, config, run)
        save_checkpoint(run.folder / "checkpoint.pt", "rsft", config.size, policy, tokenizer,
                        metrics=run.figures(), made_from=run.made_from(),
                        missing_end_score=config.missing_end_score,
                        distils=config.n ** config.rounds)
        run.finish()
    forget_rounds(folder, "kept", config.rounds)
    reward = make_reward("reward_model", reward_model, tokenizer, config.micro_batch)
    show_before_and_after(held_out, reference, policy, tokenizer, config, reward,
                          missing_end_score=config.missing_end_score)
    print(f"saved {folder / 'checkpoint.pt'}; next: python best_of_n.py --policies "
          f"ppo,dpo,{config.name}", flush=True)


# --------------------------------------------------------------------------------------------------
# The yardstick: all policies beside the optimum. A student of best-of-N and rejection sampling can
# close the file here.


def stage_metrics(config, stage):
    """The figures in a stage's checkpoint: a list of dicts, empty if there is none. InputError if
    it is damaged."""
    path = stage_folder(config, stage) / "checkpoint.pt"
    if not path.exists():
        return []
    with refused_if_broken(path, "train the stage again"):
        return read_torch(path)["metrics"]


def judge_steps(samples, process_model, tokenizer, micro_batch):
    """process_scores of Samples, each (M, N); -inf for a response without <|end|> or a sentence."""
    parts = {"smallest": [], "product": [], "sum": []}
    for rollout in samples.rollouts:
        rewards, steps = step_rewards(process_model, rollout, tokenizer, micro_batch)
        whole = rollout.ended(tokenizer.end_token) & steps.any(dim=1)
        for rule, scores in process_scores(rewards, steps).items():
            parts[rule].append(torch.where(whole, scores, -math.inf).cpu())
    shape = samples.figures["reward"].shape
    return {rule: torch.cat(scores).view(shape) for rule, scores in parts.items()}


def forgetting(policies, tokenizer, micro_batch=64):
    """The loss of every policy, and of the base model among them, on the held-out pretraining text,
    nats a token: what alignment forgets (CME 295, "catastrophic forgetting"; Ouyang et al. 2022).
    """
    documents = encode_documents(held_out_documents(), tokenizer)
    losses = {}
    for name, policy in policies.items():
        losses[name] = held_out_loss(policy.model, documents, 1, micro_batch, policy.temperature)
    return losses


def yardstick(config):
    """Sample every policy on the same held-out prompts and print how good each is, and how good it
    could be."""
    if config.data:
        _, own = split_prompts(config.data)  # first: a bad file fails here
    if config.process:
        path = stage_folder(config, "process_model") / "checkpoint.pt"
        complete(path.parent)
        refuse_stale(path.parent)
        process_model, _, _ = load_checkpoint(
            path, "process_model", config.size, get_device(), RewardModel)
    names = [name for name in dict.fromkeys(config.policies.replace(" ", "").split(",")) if name]
    policies, reward_model, tokenizer = load_policies(config, names, "best_of_n")
    path = stage_folder(config, "best_of_n") / "metrics.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with lock_folder(path.parent):  # a folder that can't be written to fails before the sampling
        pass
    reference = policies["sft"].model
    gold = not config.data  # the annotator knows the world's requests only
    stages = {}
    if gold:
        base = read_torch(stage_folder(config, "sft") / "checkpoint.pt").get("base", "gpt")
        for stage, name in (("gpt", base), ("sft", "sft"), ("reward_model", "reward_model")):
            stages[stage] = stage_metrics(config, name)

    # 1. Held-out prompts: the world's, or those that every stage held out of the user's own.
    if gold:
        prompts = draw_requests(config.prompts, random.Random("yardstick prompts"), held_out=True)
        data = f"the little world: {len(prompts)} held-out prompts"
    else:
        own, description = prompts_with_room(own, config.data, tokenizer, config.max_new_tokens,
                                             reference.config.block_size)
        prompts = own[:config.prompts]
        data = f"held out of {description}; {len(prompts)} of them"
    announce("best_of_n", config, get_device(),
             f"{data}; {config.samples} samples each, {2 * config.samples} of SFT", reference)
    models = {name: policy.model for name, policy in policies.items()}
    show_models((), memory_of_pieces(reference.config, 0, config.sample_batch),
                reward_model=reward_model, **models)

    # 2. The same number of samples from every policy, twice as many from SFT: its samples are
    # best-of-N's candidates and all policies' opponents, and best-of-N plays against those that it
    # did not choose from.
    rng = random.Random(f"yardstick {config.seed}")
    drawn = {}
    for name, policy in policies.items():
        count = 2 * config.samples if name == "sft" else config.samples
        drawn[name] = draw(name, policy, reward_model, tokenizer, prompts, count, config, gold, rng)

    # 3. log π_k/π_ref of every sample under every policy.
    log_ratios = log_ratios_of(drawn, policies, config.micro_batch)

    # 4. Best-of-N picks among SFT's samples, by the reward model.
    sft = drawn["sft"]
    judges = {"": sft.figures["reward"]}
    if config.process:
        judges.update(judge_steps(sft, process_model, tokenizer, config.micro_batch))
    sizes = {4, 16, 64}
    sizes.update(policy.distils for policy in policies.values() if policy.distils > 1)
    kls = {n: best_of_n_kl(n) for n in sorted(sizes) if n <= config.samples}
    figures = {name: samples.figures for name, samples in drawn.items()}
    texts = {name: samples.texts for name, samples in drawn.items()}
    per_prompt = compare_policies(figures, texts, log_ratios, judges, kls)

    # 5. The tables.
    losses = {}
    if gold and last_with(stages["gpt"], "entropy"):  # it was pretrained on the world's text
        base_path = stage_folder(config, base) / "checkpoint.pt"
        model, _, _ = load_checkpoint(base_path, "gpt", config.size, get_device())
        losses = forgetting({"base": Policy(model), **policies}, tokenizer, config.micro_batch)
    rows = print_yardstick(per_prompt, figures, log_ratios, losses, stages, config.beta)
    powers = {n: best_of_n_kl(n) for n in (1, 2, 4, 8, 16, 32, 64) if n <= config.samples}
    rows += best_of_n_rows(sft.figures, sft.texts, powers)
    write_jsonl(path, rows)
    print(f"\nsaved {path}")


def main(argv=None):
    needs = {"process": ("data", ""), "verify": ("data", "")}
    for flag in ("policies", "prompts", "samples", "beta"):
        needs[flag] = ("finetune", "no")
    for flag in ("name", "rounds", "rsft_prompts", "epochs", "batch", "lr", "warmup",
                 "weight_decay", "report"):
        needs[flag] = ("finetune", "per_prompt", "overall")
    description = ("Best-of-N for one prompt, rejection-sampling fine-tuning, or the yardstick "
                   "that compares all policies.")
    config = parse_config(Config, GPU, argv, description, needs, PRESETS)
    if config.finetune != "no" and (config.process or config.verify):
        raise InputError(f"--finetune {config.finetune}: cannot be used with --process or --verify")
    if config.beta == 0:
        raise InputError("--beta 0.0: must be positive; the optimum for 0 has no finite J*")
    if config.prompt:
        allow_flags(config, ("finetune", "name", "n", "beta", "max_new_tokens", "missing_end_score",
                             "sample_batch", "micro_batch", "seed", "size", "out", "resume"),
                    "prompt")
        answer(config)
    elif config.finetune != "no":
        finetune(config)
    else:
        refuse_flags(config, ("n",), "goes with --prompt or --finetune only")
        yardstick(config)


if __name__ == "__main__":
    run_script(main)
