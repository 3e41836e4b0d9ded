"""
dpo.py: direct preference optimization (Rafailov et al. 2023; CS 224R, Lecture 9, ch. 8; ECE 7115,
"DPO Loss"), and what followed it: IPO, KTO, SimPO, ORPO, online DPO.

The optimum of RLHF's objective is π*(y|x) = π_ref(y|x) exp(r(x, y)/β) / Z(x), so r(x, y) =
β log π*(y|x)/π_ref(y|x) + β log Z(x). Put into Bradley-Terry, Z(x) cancels, and the policy itself
is fitted to the comparisons, with no reward model and no sampling:

    L_DPO(θ) = -E[ log σ( β log π_θ(y_w|x)/π_ref(y_w|x) - β log π_θ(y_l|x)/π_ref(y_l|x) ) ]

Two models: the policy π_θ and the frozen reference π_ref, both from SFT.

    python dpo.py                       on the comparisons that reward_model.py collected
    python dpo.py --data FILE.jsonl     on your own pairs: {"prompt", "chosen", "rejected"}
    python dpo.py --loss kto --data FILE.jsonl      labels: {"prompt", "completion", "label": true}
    python dpo.py --loss orpo           SFT and alignment in one stage: starts from the base model
    python dpo.py --online 5            five rounds on samples of the current policy
    python dpo.py --start ppo --name dpo-ppo        go on from another policy
    python dpo.py --prompt "…"          answer a prompt with the policy
    python dpo.py --explain             a held-out pair: log-ratios token by token, r̂, z, σ(-z)

Everything up to "The family" is DPO and can be read top to bottom.

Departures from the slides: none in DPO, whose log-probabilities are sums over the response.
- SimPO: CS 224R adds γ to the implicit reward of both responses, where it cancels; it is the margin
  between the two.
- ORPO: CS 224R has the odds of the whole response; as in its paper, p = exp(mean log-probability).
- Online DPO: the judge chooses with Bradley-Terry's noise; without it a pair's margin has no finite
  optimum.
"""

import copy
import math
import random
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F

from data import stories
from data.annotator import gold_reward, read_texts
from data.corpus import draw_requests, prompts_with_room
from data.files import (InputError, checksum, hold_out, read_comparisons, read_labels, read_pairs,
                        read_prompts, refuse_changed, run_script, write_jsonl)
from data.judges import JUDGES, judge_of
from data.run import (Run, allow_flags, announce, check_name, complete, counts, forget_rounds,
                      parse_config, refuse_stale, show, show_models, stage_folder, train_missing)
from data.table import Column, print_columns
from data.tokenizer import (Label, Pair, encode_comparisons, encode_labels, encode_pairs,
                            labels_of)
from gpt import (GPT, batches_by_length, get_device, learning_rate, load_checkpoint, make_optimizer,
                 masked_logprobs, memory_of_pieces, optimizer_step, pad, refuse_other_tokens,
                 response_logprobs, response_mask, save_checkpoint)
from reward_model import RewardModel, collect_pairs, make_reward, reward_model_judge, score_all
from sft import answer, default_lr, load_policy, show_before_and_after


@dataclass
class Config:
    # the objective
    loss: Literal["dpo", "ipo", "kto", "simpo", "orpo"] = "dpo"     # what is minimized; changes
                                                                    # some of the defaults
    beta: float = 0.2           # price of one nat of KL to the reference, in reward units; PPO's,
                                # for the same optimum
    gamma: float = 0.5          # SimPO's margin
    lam: float = 0.5            # ORPO's λ, the weight of the odds ratio beside the SFT loss
    desirable_weight: float = 1.0       # KTO's λ_D, the weight of a good response
    undesirable_weight: float = 1.0     # KTO's λ_U, the weight of a bad one
    start: str = "sft"          # the policy starts as the SFT model, as the base model (gpt) or as
                                # the policy of another run (ppo, rsft-…); π_ref stays SFT's

    # the comparisons
    data: str = ""              # your own pairs, a .jsonl file, instead of reward_model.py's
    online: int = 0             # rounds of online DPO; 0: on existing comparisons
    pairs: int = 2048           # new comparisons in a round
    judge: str = "reward_model"     # who labels them: reward_model, annotator, constitution, both,
                                    # or a program: "COMMAND"
    sample_batch: int = 512     # prompts in one batch of sampling
    max_new_tokens: int = 96    # the longest sampled response

    # optimization
    epochs: int = 1             # passes over the pairs
    batch: int = 32             # pairs in a step (KTO: labels)
    micro_batch: int = 32       # pairs in one forward pass; less memory, the same gradient
    lr: float = 1.5e-4          # peak learning rate (linear warm-up, cosine to zero); SimPO: half
                                # of it, ORPO, which learns to answer too: sft.py's
    warmup: int = 10            # steps of warm-up

    # this run
    prompt: str = ""            # answer this prompt with the policy of --name, and stop
    temperature: float = 1.0    # of the answer to --prompt
    top_k: int = 0              # the answer to --prompt draws from the k likeliest tokens; 0: all
    size: Literal["auto", "cpu", "gpu", "gpt2"] = "auto"    # auto: gpu if there is one; gpt2: see
                                                            # data/huggingface.py
    out: str = "out"            # folder of all outputs; this stage writes to OUT/SIZE/NAME
    name: str = "dpo"           # name of this run's folder: dpo-… keeps an experiment apart
    seed: int = 1               # fixes the order of the pairs and the samples
    explain: bool = False       # print a held-out pair with every quantity of the loss, and stop
    report: int = 64            # steps between two reports, and between two saves of the state
    resume: bool = False        # continue the run that was interrupted in this folder


GPU = dict(batch=64, micro_batch=64, lr=5e-5, max_new_tokens=128)
# Rafailov et al. 2023, appendix B: batches of 64, lr 1e-6 (with RMSprop), 150 steps of warm-up
GPT2 = dict(batch=64, micro_batch=4, lr=1e-6, warmup=150, max_new_tokens=128, sample_batch=128)


def dpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta):
    """Direct preference optimization (Rafailov et al. 2023, eq. 7; CS 224R, ch. 8).

    All four arguments: (B,) log-probabilities in nats, summed over the response. Returns a scalar.
    With the implicit reward r̂ = β log π_θ/π_ref and the margin z = r̂(x, y_w) - r̂(x, y_l), the
    gradient weighs a pair by how wrong it is:
        ∇L = -β E[ σ(-z) (∇log π_θ(y_w|x) - ∇log π_θ(y_l|x)) ]
                                                        (CS 224R, "Understanding the DPO Gradient")
    Worked number of the lecture: dpo_loss(-15.2, -14.8, -16.0, -14.5, beta=0.1) = 0.640.
    """
    chosen_log_ratio = policy_chosen - ref_chosen        # log π_θ(y_w|x) / π_ref(y_w|x)
    rejected_log_ratio = policy_rejected - ref_rejected  # log π_θ(y_l|x) / π_ref(y_l|x)
    return -F.logsigmoid(beta * (chosen_log_ratio - rejected_log_ratio)).mean()


def pair_logprobs(model, pairs):
    """log π(y_w|x) and log π(y_l|x) of Pairs of ids, each (B,), in one forward pass."""
    sequences = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    tokens, lengths = pad(sequences, model.wte.weight.device)
    prompt_lengths = torch.tensor([pair.prompt_length for pair in pairs] * 2, device=tokens.device)
    return response_logprobs(model, tokens, prompt_lengths, lengths).chunk(2)


def pair_batches(pairs, config, rng):
    """The indices of the pairs of every optimizer step."""
    lengths = [max(len(pair.chosen), len(pair.rejected)) for pair in pairs]
    return batches_by_length(lengths, config.batch, rng, config.epochs)


def dpo(policy, reference, pairs, held_out, config, rng, run):
    """Fit the policy to the comparisons, in place. pairs, held_out: lists of Pair."""
    optimizer = make_optimizer(policy, weight_decay=0.0)
    batches = pair_batches(pairs, config, rng)

    for step in run.steps(len(batches), policy=policy, optimizer=optimizer):
        batch = [pairs[i] for i in batches[step]]
        for start in range(0, len(batch), config.micro_batch):
            part = batch[start:start + config.micro_batch]
            with torch.no_grad():
                ref_chosen, ref_rejected = pair_logprobs(reference, part)
            chosen, rejected = pair_logprobs(policy, part)

            loss = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, config.beta)
            (loss * len(part) / len(batch)).backward()

            chosen_log_ratio = chosen - ref_chosen
            rejected_log_ratio = rejected - ref_rejected
            margin = config.beta * (chosen_log_ratio - rejected_log_ratio)  # r̂(y_w) - r̂(y_l)
            run.log(step, len(part), loss=loss, accuracy=(margin > 0).float().mean(),
                    margin=margin.mean(), chosen_log_ratio=chosen_log_ratio.mean(),
                    rejected_log_ratio=rejected_log_ratio.mean())

        lr = learning_rate(step, len(batches), config.lr, config.warmup)
        optimizer_step(optimizer, policy, lr)
        if run.due(step):
            log_held_out(policy, reference, held_out, config, run, step)


@torch.no_grad()
def log_held_out(policy, reference, held_out, config, run, step):
    """Log DPO's loss and accuracy on held-out Pairs."""
    for start in range(0, len(held_out), config.micro_batch):
        part = held_out[start:start + config.micro_batch]
        ref_chosen, ref_rejected = pair_logprobs(reference, part)
        chosen, rejected = pair_logprobs(policy, part)
        loss = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, config.beta)
        margin = config.beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
        run.log(step, len(part), held_out_loss=loss, held_out_accuracy=(margin > 0).float().mean())


# --------------------------------------------------------------------------------------------------
# The family: other losses on pairs (CS 224R, ch. 10; ECE 7115, "DPO Variants"), KTO on single
# labels, and rounds on new samples (CS 224R, ch. 11). A student of DPO can close the file here.


def ipo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta):
    """Identity preference optimization (Azar et al. 2023, eq. 17; CS 224R, ch. 10): the difference
    h of log-ratios is drawn to 1/(2β), and not beyond. Arguments as dpo_loss's. Returns a scalar.

    By hand: ipo_loss(-15.2, -14.8, -16.0, -14.5, beta=0.5) = 0.01, with h = 1.1 and 1/(2β) = 1. Its
    β weighs probabilities, not rewards: smaller than DPO's.
    """
    h = (policy_chosen - ref_chosen) - (policy_rejected - ref_rejected)
    return ((h - 1 / (2 * beta)) ** 2).mean()  # E[(h - 1/(2β))²]


def simpo_loss(policy_chosen_mean, policy_rejected_mean, beta, gamma):
    """Simple preference optimization (Meng et al. 2024, eq. 6; ECE 7115, "DPO Variants"): no
    reference. Both (B,): the mean log-probability of a response's tokens. Returns a scalar."""
    z = beta * policy_chosen_mean - beta * policy_rejected_mean - gamma
    return -F.logsigmoid(z).mean()


def orpo_loss(chosen_mean, rejected_mean, lam):
    """Odds ratio preference optimization (Hong et al. 2024, eq. 6 and 7; CS 224R, ch. 10): the SFT
    loss of the chosen response and the log odds of both, of p = exp(mean log-probability). Both
    (B,). Returns a scalar."""
    log_odds_ratio = log_odds(chosen_mean) - log_odds(rejected_mean)
    return (-chosen_mean - lam * F.logsigmoid(log_odds_ratio)).mean()


def log_odds(logprob):
    """log p/(1-p) of p = exp(logprob)."""
    logprob = logprob.clamp(max=-1e-6)  # at p = 1 the odds are infinite
    return logprob - (-torch.expm1(logprob)).log()


def kto_loss(policy, ref, desirable, baseline, beta, desirable_weight=1.0, undesirable_weight=1.0):
    """Kahneman-Tversky optimization (Ethayarajh et al. 2024, eq. 7 and 8; CS 224R, ch. 10): single
    labels, no pairs.

    policy, ref (B,): log-probabilities summed over the response; desirable (B,), bool; baseline:
    z0 >= 0, in nats (see kto_baseline). Returns the mean of λ_y - v(x, y), a scalar.
    """
    log_ratio = policy - ref  # log π_θ(y|x) / π_ref(y|x)
    weight = torch.where(desirable, desirable_weight, undesirable_weight)  # λ_y: λ_D or λ_U
    gain = torch.where(desirable, log_ratio - baseline, baseline - log_ratio)
    v = weight * torch.sigmoid(beta * gain)  # λ_y σ(±β(log ratio - z0))
    return (weight - v).mean()


WITHOUT_REFERENCE = ("simpo", "orpo")


def pair_loss(policy, reference, pairs, config):
    """The loss config.loss of Pairs, and figures, see loss_of_logprobs."""
    logprobs = pair_logprobs(policy, pairs)
    ref_logprobs = None
    if config.loss not in WITHOUT_REFERENCE:
        with torch.no_grad():
            ref_logprobs = pair_logprobs(reference, pairs)
    return loss_of_logprobs(logprobs, ref_logprobs, pairs, config)


def loss_of_logprobs(logprobs, ref_logprobs, pairs, config):
    """The loss config.loss, and figures: accuracy and mean of the margin between chosen and
    rejected, in the implicit reward r̂ or, without a reference, in the mean log-probability.

    logprobs, ref_logprobs: pair_logprobs of the policy and of the reference, which may be None for
    a loss without one.
    """
    chosen, rejected = logprobs
    figures = {}
    if config.loss in WITHOUT_REFERENCE:
        chosen_lengths = [len(pair.chosen) - pair.prompt_length for pair in pairs]
        rejected_lengths = [len(pair.rejected) - pair.prompt_length for pair in pairs]
        chosen_mean = chosen / torch.tensor(chosen_lengths, device=chosen.device)
        rejected_mean = rejected / torch.tensor(rejected_lengths, device=chosen.device)
        margin = chosen_mean - rejected_mean
        if config.loss == "simpo":
            loss = simpo_loss(chosen_mean, rejected_mean, config.beta, config.gamma)
        else:
            loss = orpo_loss(chosen_mean, rejected_mean, config.lam)
    else:
        ref_chosen, ref_rejected = ref_logprobs
        figures["chosen_log_ratio"] = (chosen - ref_chosen).mean()
        figures["rejected_log_ratio"] = (rejected - ref_rejected).mean()
        margin = config.beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
        if config.loss == "ipo":
            loss = ipo_loss(chosen, rejected, ref_chosen, ref_rejected, config.beta)
        else:
            loss = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, config.beta)
    return loss, dict(accuracy=(margin > 0).float().mean(), margin=margin.mean(), **figures)


@torch.no_grad()
def log_pairs_held_out(policy, reference, held_out, config, run, step):
    """Log the loss config.loss and the accuracy on held-out Pairs."""
    for start in range(0, len(held_out), config.micro_batch):
        part = held_out[start:start + config.micro_batch]
        loss, figures = pair_loss(policy, reference, part, config)
        run.log(step, len(part), held_out_loss=loss, held_out_accuracy=figures["accuracy"])


def fit_pairs(policy, reference, pairs, held_out, optimizer, config, rng, run):
    """Minimize config.loss over pairs; DPO's too, online. The learning rate follows the steps of
    all rounds: those of earlier ones are run.before."""
    batches = pair_batches(pairs, config, rng)
    for step in run.steps(len(batches), policy=policy, optimizer=optimizer):
        batch = [pairs[i] for i in batches[step]]
        for start in range(0, len(batch), config.micro_batch):
            part = batch[start:start + config.micro_batch]
            loss, figures = pair_loss(policy, reference, part, config)
            (loss * len(part) / len(batch)).backward()
            run.log(step, len(part), loss=loss, **figures)

        lr = learning_rate(run.before + step, run.total, config.lr, config.warmup)
        optimizer_step(optimizer, policy, lr)
        if run.due(step):
            log_pairs_held_out(policy, reference, held_out, config, run, step)


def label_logprobs(model, labels):
    """log π(y|x) of Labels: (B,)."""
    tokens, lengths = pad([label.ids for label in labels], model.wte.weight.device)
    prompt_lengths = torch.tensor([label.prompt_length for label in labels], device=tokens.device)
    return response_logprobs(model, tokens, prompt_lengths, lengths)


@torch.inference_mode()
def kto_baseline(policy, reference, labels, rows=64):
    """KTO's z0, an estimate of KL(π_θ || π_ref) in nats: the mean log-ratio of a batch's prompts,
    each with the next label's response, but not below 0. Left out: couples longer than the context,
    and responses to that very prompt. rows: couples in one forward pass."""
    couples = []
    for i, label in enumerate(labels):
        other = labels[(i + 1) % len(labels)]
        prompt = label.ids[:label.prompt_length]
        response = other.ids[other.prompt_length:]
        fits = len(prompt) + len(response) <= policy.config.block_size
        if prompt != other.ids[:other.prompt_length] and fits:
            couples.append(Label(prompt + response, len(prompt), True))
    if not couples:
        return 0.0
    total = 0.0
    for start in range(0, len(couples), rows):
        part = couples[start:start + rows]
        total += (label_logprobs(policy, part) - label_logprobs(reference, part)).sum().item()
    return max(0.0, total / len(couples))


def kto_part(policy, reference, labels, z0, config):
    """(loss, margin (B,)) of Labels: how far each is on its right side of z0, in reward units."""
    desirable = torch.tensor([label.desirable for label in labels], device=policy.wte.weight.device)
    with torch.no_grad():
        ref = label_logprobs(reference, labels)
    logprobs = label_logprobs(policy, labels)
    loss = kto_loss(logprobs, ref, desirable, z0, config.beta, config.desirable_weight,
                    config.undesirable_weight)
    log_ratio = (logprobs - ref).detach()
    gain = torch.where(desirable, log_ratio - z0, z0 - log_ratio)
    return loss, config.beta * gain


def kto(policy, reference, labels, held_out, paired, optimizer, config, rng, run):
    """Minimize KTO's loss over Labels. paired: held_out are the labels_of pairs, and the accuracy
    is theirs; else it is the share of labels on the right side of z0."""
    lengths = [len(label.ids) for label in labels]
    batches = batches_by_length(lengths, config.batch, rng, config.epochs)
    for step in run.steps(len(batches), policy=policy, optimizer=optimizer):
        batch = [labels[i] for i in batches[step]]
        z0 = kto_baseline(policy, reference, batch, config.micro_batch)
        for start in range(0, len(batch), config.micro_batch):
            part = batch[start:start + config.micro_batch]
            loss, margin = kto_part(policy, reference, part, z0, config)
            (loss * len(part) / len(batch)).backward()
            run.log(step, len(part), loss=loss, accuracy=(margin > 0).float().mean(),
                    margin=margin.mean())

        lr = learning_rate(run.before + step, run.total, config.lr, config.warmup)
        optimizer_step(optimizer, policy, lr)
        if run.due(step):
            log_kto_held_out(policy, reference, held_out, paired, config, run, step)


@torch.no_grad()
def log_kto_held_out(policy, reference, held_out, paired, config, run, step):
    """Log KTO's loss and accuracy on held-out Labels."""
    z0 = kto_baseline(policy, reference, held_out, config.micro_batch)
    margins = []
    for start in range(0, len(held_out), config.micro_batch):
        part = held_out[start:start + config.micro_batch]
        loss, margin = kto_part(policy, reference, part, z0, config)
        run.log(step, len(part), held_out_loss=loss)
        margins.append(margin)
    margin = torch.cat(margins)
    if paired:  # first the chosen, then the rejected, which have the sign turned: z0 cancels
        chosen, rejected = margin.chunk(2)
        margin = chosen + rejected  # r̂(x, y_w) - r̂(x, y_l)
    run.log(step, held_out_accuracy=(margin > 0).float().mean())


def online(policy, reference, draw_pairs, held_out, paired, config, rng, run):
    """Online DPO (CS 224R, ch. 11): config.online rounds, each on new samples of the policy.

    draw_pairs(number of the round) -> Pairs; held_out: Pairs, or Labels for KTO.
    """
    optimizer = make_optimizer(policy, weight_decay=0.0)
    for number in range(config.online):
        pairs = draw_pairs(number)
        if config.loss == "kto":
            kto(policy, reference, labels_of(pairs), held_out, paired, optimizer, config, rng, run)
        else:
            fit_pairs(policy, reference, pairs, held_out, optimizer, config, rng, run)


# --------------------------------------------------------------------------------------------------
# The stage


def load(config, stage, model_class=GPT, beside=None):
    """(a stage's model, its tokenizer). InputError if it reads other tokens than the policy, whose
    tokenizer is beside."""
    path = stage_folder(config, stage) / "checkpoint.pt"
    model, tokenizer, _ = load_checkpoint(path, stage, config.size, get_device(), model_class)
    if beside:
        refuse_other_tokens(path, tokenizer, beside)
    return model, tokenizer


class Data(NamedTuple):
    """What the stage reads."""
    items: list             # to train on: Pairs, or Labels for KTO
    held_out: list
    paired: bool            # KTO: held_out are the labels_of pairs, so its accuracy is one of pairs
    own: list               # the user's prompts to train on; None: the little world's
    questions: list         # likewise held out
    description: str


def read_rows(config):
    """((rows to train on, held-out rows), the file that they come from)."""
    if config.data:
        read = read_labels if config.loss == "kto" else read_pairs
        rows = read(config.data)
        return hold_out(rows, config.data, read_prompts(config.data)), config.data
    folder = stage_folder(config, "reward_model")
    return read_comparisons(folder), folder / "pairs.jsonl"


def encode_rows(config, split, origin, tokenizer, block_size):
    """(items, held_out, paired, description), see Data. KTO takes a pair as two labels."""
    if config.loss == "kto" and config.data:
        items, held_out, description = encode_labels(split, origin, tokenizer, block_size)
        return items, held_out, False, description
    found = encode_comparisons(split, origin, tokenizer, block_size)
    if config.loss == "kto":
        return labels_of(found.pairs), labels_of(found.held_out), True, found.description
    return found.pairs, found.held_out, False, found.description


def note_balance(labels, config):
    """Say so where good and bad Labels weigh very differently."""
    good = config.desirable_weight * sum(label.desirable for label in labels)
    bad = config.undesirable_weight * sum(not label.desirable for label in labels)
    if good > 4 * bad or bad > 4 * good:
        print(f"note    good labels weigh {good:g}, bad ones {bad:g}: KTO wants about as much "
              "of both (--desirable_weight, --undesirable_weight)", flush=True)


def prompts_of(config, split):
    """The user's own prompts, (to train on, held out); None, None if they are the world's."""
    rows, held_out_rows = split
    own = list(dict.fromkeys(row["prompt"] for row in rows))
    questions = list(dict.fromkeys(row["prompt"] for row in held_out_rows))
    if not config.data and all(stories.parse_request(prompt) for prompt in questions):
        return None, None  # but the stage's pairs may be somebody's own too
    return own, questions


def online_prompts(config, own, origin, tokenizer, block_size):
    """(those of the user's own prompts that leave room for a response, a sentence about them)."""
    if not own:
        return own, "fresh requests of the little world"
    if not config.data:
        raise InputError(f"{origin}: is not of the little world; --online needs its prompts, with "
                         "--data")
    return prompts_with_room(own, origin, tokenizer, config.max_new_tokens, block_size)


def read_data(config, split, origin, tokenizer, block_size):
    """The Data of split, see read_rows."""
    items, held_out, paired, description = encode_rows(
        config, split, origin, tokenizer, block_size)
    own, questions = prompts_of(config, split)
    if config.online:
        own, asked = online_prompts(config, own, origin, tokenizer, block_size)
        description = (f"{asked}\n        {config.online} rounds of {config.pairs:,} pairs, by the "
                       f"{config.judge}; its held-out ones are those of {description}")
    elif config.loss == "kto":
        note_balance(items, config)
    return Data(items, held_out, paired, own, questions, description)


def train(config):
    """Fit the policy to the comparisons and save it to OUT/SIZE/NAME/checkpoint.pt."""
    check_name(config.name, "dpo")
    if config.online and config.start == "gpt":
        raise InputError(f"--online {config.online}: a base model cannot answer; it needs another "
                         "--start than gpt")
    if config.online and config.data and config.judge in JUDGES:
        raise InputError(f"--judge {config.judge}: knows the little world only, not the prompts of "
                         f"{config.data}; give a program: --judge \"COMMAND\"")
    if config.beta == 0:
        raise InputError("--beta 0.0: must be positive; with 0 no comparison would move the policy")
    folder = stage_folder(config, config.name)
    by_model = bool(config.online) and config.judge == "reward_model"
    labels_path = folder / "unfinished/labels.jsonl"
    if config.online and not by_model:
        judge_of(config.judge, labels_path)  # a mistyped program is refused before any training
    data_checksum = None
    if config.data:  # before any training
        split, origin = read_rows(config)
        data_checksum = checksum(config.data)
    needed = ["gpt", "sft"]
    if by_model or not config.data:
        needed.append("reward_model")
    train_missing(config, needed, config.name)

    # The models: π_θ, trained; π_ref, frozen; online, perhaps r_φ as the judge.
    sft_path = stage_folder(config, "sft") / "checkpoint.pt"
    reference, tokenizer, checkpoint = load_checkpoint(sft_path, "sft", config.size, get_device())
    used = [config.start]
    if config.start == "sft":
        policy = copy.deepcopy(reference)
    elif config.start == "gpt":  # the base model that SFT began from
        used = [checkpoint.get("base", "gpt")]
        path = stage_folder(config, used[0]) / "checkpoint.pt"
        policy, start_tokenizer, _ = load_checkpoint(path, "gpt", config.size, get_device())
        refuse_other_tokens(sft_path, tokenizer, start_tokenizer)
    else:
        policy, start_tokenizer, _ = load_policy(config)
        refuse_other_tokens(stage_folder(config, config.start) / "checkpoint.pt", start_tokenizer,
                            tokenizer)
    if config.loss in WITHOUT_REFERENCE:
        reference = None
    else:
        used.append("sft")
    reward_model = None
    if by_model:
        reward_model, _ = load(config, "reward_model", RewardModel, tokenizer)
        used.append("reward_model")
    sources = [stage_folder(config, stage) / "checkpoint.pt" for stage in used]

    # 1. The comparisons: (x, y_w, y_l), y_w ≻ y_l.
    if not config.data:
        split, origin = read_rows(config)
        sources += [origin, origin.with_name("held_out.jsonl")]
    data = read_data(config, split, origin, tokenizer, policy.config.block_size)
    announce(config.name, config, get_device(), data.description, policy)
    sequences = config.micro_batch if config.loss == "kto" else 2 * config.micro_batch
    pieces = memory_of_pieces(policy.config, sequences,
                              2 * config.sample_batch if config.online else 0)
    show_models(("policy",), pieces, policy=policy, reference=reference, reward_model=reward_model)

    def draw_prompts(count, rng):
        return rng.choices(data.own, k=count) if data.own else draw_requests(count, rng)

    def draw_pairs(number):  # online, those of every round are new samples of the policy
        path = folder / "unfinished" / f"pairs-{number + 1}.jsonl"
        if not path.exists():  # else the run was interrupted in this round or after it
            rng = random.Random(f"dpo {config.seed} round {number}")
            if by_model:
                judge = reward_model_judge(reward_model, tokenizer, 4 * config.micro_batch)
            else:
                judge = judge_of(config.judge, labels_path)  # new: "both" begins with the annotator
            rows, dropped = collect_pairs(policy, tokenizer, draw_prompts, config.pairs, judge,
                                          config, rng)
            print(f"        replaced {counts(dropped)}", flush=True)
            write_jsonl(path, rows)
        pairs, _, _ = encode_pairs(read_pairs(path), tokenizer, policy.config.block_size)
        return pairs

    # 2. Gradient steps on the loss.
    count = len(data.items)
    if config.online:
        count = config.pairs * (2 if config.loss == "kto" else 1)
    total = max(1, config.online) * config.epochs * math.ceil(count / config.batch)
    rng = random.Random(f"dpo {config.seed}")
    with Run(config.name, folder, config, config.report, sources, total) as run:
        if config.online:
            online(policy, reference, draw_pairs, data.held_out, data.paired, config, rng, run)
        elif config.loss == "dpo":
            dpo(policy, reference, data.items, data.held_out, config, rng, run)
        elif config.loss == "kto":
            optimizer = make_optimizer(policy, weight_decay=0.0)
            kto(policy, reference, data.items, data.held_out, data.paired, optimizer, config, rng,
                run)
        else:
            optimizer = make_optimizer(policy, weight_decay=0.0)
            fit_pairs(policy, reference, data.items, data.held_out, optimizer, config, rng, run)

        # 3. Save; the same prompts before and after.
        extra = {"objective": {name: getattr(config, name) for name in OBJECTIVE}}
        if config.loss in ("dpo", "kto"):  # the others' beta is no price of KL
            extra["beta"] = config.beta
        save_checkpoint(run.folder / "checkpoint.pt", "dpo", config.size, policy, tokenizer,
                        metrics=run.figures(), made_from=run.made_from(), data=config.data,
                        data_checksum=data_checksum, **extra)
        run.finish()
    forget_rounds(folder, "pairs", config.online)

    if reward_model is None and not config.data:
        reward_model, _ = load(config, "reward_model", RewardModel, tokenizer)
    reward = None
    if reward_model is not None:
        reward = make_reward("reward_model", reward_model, tokenizer, config.micro_batch)
    if reference is None:
        reference, _ = load(config, "sft")
    show_before_and_after(data.questions, reference, policy, tokenizer, config, reward)
    print(f"saved {folder / 'checkpoint.pt'}; next: python best_of_n.py", flush=True)


# --------------------------------------------------------------------------------------------------
# One example


# The loss, its β and what else is its own.
OBJECTIVE = ("loss", "beta", "gamma", "lam", "desirable_weight", "undesirable_weight")


def explain(config):
    """Print a held-out pair, for KTO two labels or one, with every quantity of the loss that the
    policy of --name was trained with."""
    allow_flags(config, (*OBJECTIVE, "data", "name", "seed", "size", "out"), "explain")
    check_name(config.name, "dpo")
    folder = stage_folder(config, config.name)
    reward_folder = stage_folder(config, "reward_model")
    for path in (folder, reward_folder):
        complete(path)
        refuse_stale(path)
    path = folder / "checkpoint.pt"
    policy, tokenizer, checkpoint = load_checkpoint(path, "dpo", config.size, get_device())
    for name, value in checkpoint.get("objective", {}).items():
        if name in config.given and getattr(config, name) != value:
            raise InputError(f"--{name} {getattr(config, name)}: {path} was trained with {value}")
        setattr(config, name, value)
    if not config.data:
        config.data = checkpoint.get("data", "")
        if config.data:
            refuse_changed(config.data, checkpoint.get("data_checksum"), path)
    reference = None
    if config.loss not in WITHOUT_REFERENCE:
        reference, _ = load(config, "sft", beside=tokenizer)
    reward_model = None
    if (reward_folder / "checkpoint.pt").exists():
        reward_model, _ = load(config, "reward_model", RewardModel, tokenizer)

    # A held-out pair (x, y_w, y_l), also as two labels.
    split, origin = read_rows(config)
    _, held_out, paired, _ = encode_rows(
        config, split, origin, tokenizer, policy.config.block_size)
    rng = random.Random(f"explain {config.seed}")
    if config.loss != "kto":
        pair = rng.choice(held_out)
        labels = labels_of([pair])
    elif paired:
        i = rng.randrange(len(held_out) // 2)
        labels = [held_out[i], held_out[i + len(held_out) // 2]]
    else:
        labels = [rng.choice(held_out)]
    names = ["y_w", "y_l"] if len(labels) == 2 else ["y"]

    texts = read_texts(*pad([label.ids for label in labels]), tokenizer)
    show(("prompt", texts[0][0]), *zip(names, [text for _, text in texts]))
    print_tokens(names, labels, policy, reference, tokenizer)
    rewards = {}
    if config.loss == "kto":
        batch = rng.sample(held_out, min(64, len(held_out)))  # to estimate z0 from
        print_labels(names, labels, batch, policy, reference, config)
    else:
        rewards = print_pair(pair, policy, reference, config)
    print_rewards(rewards, names, labels, texts, reward_model)


@torch.no_grad()
def print_tokens(names, labels, policy, reference, tokenizer):
    """log π_θ of every token of Labels, side by side; with a reference log π_ref too, and the
    log-ratio. Under them the sums."""
    tokens, lengths = pad([label.ids for label in labels], policy.wte.weight.device)
    prompt_lengths = torch.tensor([label.prompt_length for label in labels], device=tokens.device)
    mask = response_mask(prompt_lengths, lengths, tokens.shape[1])
    figures = {"log π_θ": masked_logprobs(policy, tokens, mask)}  # (B, T-1) each
    if reference is not None:
        figures["log π_ref"] = masked_logprobs(reference, tokens, mask)
        figures["log ratio"] = figures["log π_θ"] - figures["log π_ref"]

    rows = int(mask.sum(dim=1).max())
    columns = []
    sums = []
    for i, name in enumerate(names):
        texts = tokenizer.shown(tokens[i, 1:][mask[i]].tolist())
        missing = rows - len(texts)
        columns.append(Column(name, texts + [""] * missing))
        for figure, x in figures.items():
            values = x[i, mask[i]].tolist() + [None] * missing
            columns.append(Column(figure, values, ".3f", signed=figure == "log ratio"))
        parts = [f"Σ {figure} = {x[i].sum():.3f}" for figure, x in figures.items()]
        sums.append(f"{name}: {', '.join(parts)}")
    print()
    print_columns(columns, [*sums, "The sums over a response, <|end|> included, are log π(y|x) "
                            "(masked_logprobs, response_logprobs)."])


def print_pair(pair, policy, reference, config):
    """The loss of a Pair, what it is made of, and its gradient in the two log-probabilities.
    Returns the policy's own rewards of the two, {name: r̂}, if the loss gives it any."""
    ref_logprobs = None
    with torch.no_grad():
        logprobs = pair_logprobs(policy, [pair])
        if reference is not None:
            ref_logprobs = pair_logprobs(reference, [pair])
    for x in logprobs:
        x.requires_grad_()
    loss, figures = loss_of_logprobs(logprobs, ref_logprobs, [pair], config)
    gradient = torch.cat(torch.autograd.grad(loss, logprobs))

    # From here on (2,): y_w, y_l.
    logprobs = torch.cat(logprobs).detach().cpu()
    lengths = torch.tensor([len(pair.chosen), len(pair.rejected)]) - pair.prompt_length
    columns = [Column("|y|", lengths.tolist(), "d"),
               Column("log π_θ(y|x)", logprobs.tolist(), ".3f")]
    if reference is not None:
        ref_logprobs = torch.cat(ref_logprobs).cpu()
        log_ratios = logprobs - ref_logprobs
        columns += [Column("log π_ref(y|x)", ref_logprobs.tolist(), ".3f"),
                    Column("log ratio", log_ratios.tolist(), ".3f")]
    else:
        means = logprobs / lengths
        columns += [Column("log π_θ(y|x)/|y|", means.tolist(), ".3f")]

    rewards = {}
    lines = [f"loss {loss:.3f}"]
    beta = config.beta
    margin = figures["margin"]
    if config.loss == "dpo":
        rewards = {"r̂ = β log ratio": beta * log_ratios}
        weight = torch.sigmoid(-margin)
        lines = [f"z = r̂(x, y_w) - r̂(x, y_l) = {margin:.3f}, β = {beta}; loss -log σ(z) = "
                 f"{loss:.3f}",
                 f"weight of its gradient σ(-z) = {weight:.3f}; β σ(-z) = {beta * weight:.4f}",
                 'CS 224R, ch. 8, "Understanding the DPO Gradient"; ECE 7115, "DPO Loss" '
                 "(dpo_loss)."]
    elif config.loss == "ipo":
        h = log_ratios[0] - log_ratios[1]
        target = 1 / (2 * beta)
        lines = [f"h, the difference of the log ratios, = {h:.3f}, is drawn to 1/(2β) = "
                 f"{target:.3f}, β = {beta}",
                 f"loss (h - 1/(2β))² = {loss:.3f}; weight of its gradient 2 (h - 1/(2β)) = "
                 f"{2 * (h - target):.4f}",
                 'CS 224R, ch. 10, "IPO: Identity Preference Optimization" (ipo_loss).']
    elif config.loss == "simpo":
        rewards = {"r̂ = β log π_θ(y|x)/|y|": beta * means}
        z = beta * margin - config.gamma
        weight = torch.sigmoid(-z)
        lines = [f"z = r̂(x, y_w) - r̂(x, y_l) - γ = {z:.3f}, β = {beta}, γ = {config.gamma}; "
                 f"loss -log σ(z) = {loss:.3f}",
                 f"weight of its gradient σ(-z) = {weight:.3f}; β σ(-z)/|y| = "
                 f"{beta * weight / lengths[0]:.4f} and {beta * weight / lengths[1]:.4f}",
                 'ECE 7115, "DPO Variants" (simpo_loss).']
    elif config.loss == "orpo":
        odds = log_odds(means)
        columns += [Column("log odds", odds.tolist(), ".3f")]
        ratio = odds[0] - odds[1]
        lines = [f"loss -log π_θ(y_w|x)/|y_w| - λ log σ(log odds ratio) = {-means[0]:.3f} + "
                 f"{config.lam} · {-F.logsigmoid(ratio):.3f} = {loss:.3f}",
                 f"log odds ratio {ratio:.3f}, the odds are those of exp(log π_θ(y|x)/|y|)",
                 'CS 224R, ch. 10, "ORPO: Odds Ratio Preference Optimization" (orpo_loss).']
    for name, x in rewards.items():
        columns += [Column(name, x.tolist(), ".3f")]
    columns += [Column("∂L/∂log π_θ(y|x)", gradient.tolist(), ".4f", signed=True)]
    print()
    print_columns([Column("", ["y_w", "y_l"]), *columns], lines)
    return rewards


def print_labels(names, labels, batch, policy, reference, config):
    """KTO's loss of Labels, what it is made of, and its gradient in each log-probability. batch:
    the Labels that z0 is estimated from."""
    z0 = kto_baseline(policy, reference, batch, config.micro_batch)
    with torch.no_grad():
        logprobs = label_logprobs(policy, labels)
        ref_logprobs = label_logprobs(reference, labels)
    logprobs.requires_grad_()
    losses = []
    for i, label in enumerate(labels):
        losses.append(kto_loss(logprobs[i:i + 1], ref_logprobs[i:i + 1],
                               torch.tensor([label.desirable], device=logprobs.device), z0,
                               config.beta, config.desirable_weight, config.undesirable_weight))
    losses = torch.stack(losses)
    gradient, = torch.autograd.grad(losses.sum(), logprobs)
    log_ratios = (logprobs - ref_logprobs).detach()
    print()
    print_columns(
        [Column("", names),
         Column("label", ["good" if label.desirable else "bad" for label in labels]),
         Column("log π_θ(y|x)", logprobs.tolist(), ".3f"),
         Column("log π_ref(y|x)", ref_logprobs.tolist(), ".3f"),
         Column("log ratio", log_ratios.tolist(), ".3f"),
         Column("log ratio - z0", (log_ratios - z0).tolist(), ".3f", signed=True),
         Column("loss λ_y - v", losses.tolist(), ".3f"),
         Column("∂L/∂log π_θ(y|x)", gradient.tolist(), ".4f", signed=True)],
        [f"z0 = {z0:.3f} nats, the mean log-ratio of {len(batch)} held-out prompts with others' "
         "responses (kto_baseline);",
         "v = λ_D σ(β (log ratio - z0)) if good, λ_U σ(β (z0 - log ratio)) if bad; "
         f"β = {config.beta}, λ_D = {config.desirable_weight}, λ_U = {config.undesirable_weight}",
         'CS 224R, ch. 10, "KTO: Kahneman-Tversky Optimization" (kto_loss).'])


def print_rewards(rewards, names, labels, texts, reward_model):
    """The same responses by other rewards than the policy's own: the reward model's and, where the
    prompt is the world's, the annotator's."""
    rewards = dict(rewards)
    legend = []
    if reward_model is not None:
        rewards["r_φ(x, y)"] = score_all(reward_model, [label.ids for label in labels])
    if stories.parse_request(texts[0][0]):
        golds = [gold_reward(prompt, text) for prompt, text in texts]
        rewards["gold(x, y)"] = torch.tensor(golds)
        legend = ["gold: the annotator's true reward."]
    if not rewards:
        return
    x = torch.stack(list(rewards.values()))  # (rewards, responses)
    columns = [Column("", list(rewards))]
    for i, name in enumerate(names):
        columns.append(Column(name, x[:, i].tolist(), ".3f"))
    if len(names) == 2:
        margins = x[:, 0] - x[:, 1]
        columns += [Column("y_w - y_l", margins.tolist(), ".3f"),
                    Column("P(y_w ≻ y_l) = σ(y_w - y_l)", margins.sigmoid().tolist(), ".3f")]
        legend = ["P: CS 224R, ch. 6, Bradley-Terry.", *legend]
    print()
    print_columns(columns, legend)


def main(argv=None):
    losses = get_args(Config.__annotations__["loss"])
    needs = {"temperature": ("prompt",), "top_k": ("prompt",), "gamma": ("loss", "simpo"),
             "beta": ("loss", *[loss for loss in losses if loss != "orpo"]),
             "lam": ("loss", "orpo"),
             "desirable_weight": ("loss", "kto"), "undesirable_weight": ("loss", "kto"),
             "pairs": ("online",), "judge": ("online",)}
    changes = {"ipo": dict(beta=0.05), "kto": dict(batch=64, micro_batch=64),
              "simpo": dict(beta=10.0), "orpo": dict(start="gpt", lam=2.0)}
    config = parse_config(Config, GPU, argv, "Fit a policy to preferences: DPO and its family.",
                          needs, presets={"loss": changes, "size": {"gpt2": GPT2}})
    if "lr" not in config.given:
        if config.loss == "simpo":
            config.lr /= 2
        elif config.loss == "orpo":
            config.lr = default_lr(config.size)
    if config.explain:
        explain(config)
    elif config.prompt:
        answer(config, "dpo", config.name)
    else:
        train(config)


if __name__ == "__main__":
    run_script(main)
