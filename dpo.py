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
    python dpo.py --prompt "…"          answer a prompt with the policy

Everything up to "The family" is DPO and can be read top to bottom.

Departures from the slides: none in DPO, whose log-probabilities are sums over the response.
- SimPO: CS 224R adds γ to the implicit reward of both responses, where it cancels; it is the margin
  between the two.
- Online DPO: the judge chooses with Bradley-Terry's noise; without it a pair's margin has no finite
  optimum.
"""

import math
import random
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F

from data import stories
from data.corpus import draw_requests, prompts_with_room
from data.files import (InputError, hold_out, read_comparisons, read_labels, read_pairs, run_script,
                        write_jsonl)
from data.judges import JUDGES, judge_of
from data.run import (Run, announce, check_name, forget_rounds, parse_config, show_models,
                      stage_folder, train_missing)
from data.tokenizer import (Label, Pair, encode_comparisons, encode_labels, encode_pairs,
                            labels_of)
from gpt import (GPT, batches_by_length, get_device, learning_rate, load_checkpoint, make_optimizer,
                 memory_of_pieces, optimizer_step, pad, response_logprobs, save_checkpoint)
from reward_model import RewardModel, collect_pairs, make_reward, reward_model_judge
from sft import answer, default_lr, show_before_and_after


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
    start: Literal["sft", "gpt"] = "sft"    # the policy starts as the SFT model or the base model

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
    lr: float = 2e-4            # peak learning rate (linear warm-up, cosine to zero); SimPO: half
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
    chosen = policy_chosen - ref_chosen        # log π_θ(y_w|x) / π_ref(y_w|x)
    rejected = policy_rejected - ref_rejected  # log π_θ(y_l|x) / π_ref(y_l|x)
    return -F.logsigmoid(beta * (chosen - rejected)).mean()


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
        margin = (chosen - ref_chosen) - (rejected - ref_rejected)
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
    margin = beta * policy_chosen_mean - beta * policy_rejected_mean - gamma
    return -F.logsigmoid(margin).mean()


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
    r = policy - ref  # r̂ = log π_θ(y|x) / π_ref(y|x)
    weight = torch.where(desirable, desirable_weight, undesirable_weight)  # λ_y: λ_D or λ_U
    gain = torch.where(desirable, r - baseline, baseline - r)
    v = weight * torch.sigmoid(beta * gain)  # λ_y σ(±β(r̂ - z0))
    return (weight - v).mean()


def pair_loss(policy, reference, pairs, config):
    """The loss config.loss of Pairs, and figures: accuracy and mean of the margin between chosen
    and rejected, in the implicit reward r̂ or, without a reference, in the mean log-probability."""
    chosen, rejected = pair_logprobs(policy, pairs)
    figures = {}
    if config.loss in ("dpo", "ipo"):
        with torch.no_grad():
            ref_chosen, ref_rejected = pair_logprobs(reference, pairs)
        figures["chosen_log_ratio"] = (chosen - ref_chosen).mean()
        figures["rejected_log_ratio"] = (rejected - ref_rejected).mean()
        margin = config.beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
        if config.loss == "dpo":
            loss = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, config.beta)
        else:
            loss = ipo_loss(chosen, rejected, ref_chosen, ref_rejected, config.beta)
    else:
        chosen_lengths = [len(pair.chosen) - pair.prompt_length for pair in pairs]
        rejected_lengths = [len(pair.rejected) - pair.prompt_length for pair in pairs]
        chosen_mean = chosen / torch.tensor(chosen_lengths, device=chosen.device)
        rejected_mean = rejected / torch.tensor(rejected_lengths, device=chosen.device)
        margin = chosen_mean - rejected_mean
        if config.loss == "simpo":
            loss = simpo_loss(chosen_mean, rejected_mean, config.beta, config.gamma)
        else:
            loss = orpo_loss(chosen_mean, rejected_mean, config.lam)
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
    """(loss, r̂ - z0 in reward units (B,), desirable (B,)) of Labels."""
    desirable = torch.tensor([label.desirable for label in labels], device=policy.wte.weight.device)
    with torch.no_grad():
        ref = label_logprobs(reference, labels)
    logprobs = label_logprobs(policy, labels)
    loss = kto_loss(logprobs, ref, desirable, z0, config.beta, config.desirable_weight,
                    config.undesirable_weight)
    return loss, config.beta * (logprobs - ref - z0).detach(), desirable


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
            loss, r, desirable = kto_part(policy, reference, part, z0, config)
            (loss * len(part) / len(batch)).backward()
            margin = torch.where(desirable, r, -r)
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
        loss, r, desirable = kto_part(policy, reference, part, z0, config)
        run.log(step, len(part), held_out_loss=loss)
        margins.append(torch.where(desirable, r, -r))
    margin = torch.cat(margins)
    if paired:
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


def load(config, stage, model_class=GPT):
    """(a stage's model, its tokenizer)."""
    path = stage_folder(config, stage) / "checkpoint.pt"
    model, tokenizer, _ = load_checkpoint(path, stage, config.size, get_device(), model_class)
    return model, tokenizer


def refuse_other_tokens(config, tokenizer, stage, other):
    """InputError if another stage's model reads other tokens than the policy."""
    if other.vocabulary != tokenizer.vocabulary:
        raise InputError(f"{stage_folder(config, stage) / 'checkpoint.pt'}: its vocabulary is not "
                         f"that of the {config.start} model; train {stage} again")


class Data(NamedTuple):
    """What the stage reads."""
    items: list             # to train on: Pairs, or Labels for KTO
    held_out: list
    paired: bool            # whether held-out Labels are the labels_of pairs
    own: list               # the user's prompts to train on; None: the little world's
    questions: list         # likewise held out
    description: str


def read_data(config, split, origin, tokenizer, block_size):
    """The Data of split = (rows to train on, held-out rows), read from origin. KTO takes a pair as
    two labels."""
    paired = config.loss == "kto" and not config.data
    if config.loss == "kto" and config.data:
        items, held_out, description = encode_labels(split, origin, tokenizer, block_size)
    else:
        comparisons = encode_comparisons(split, origin, tokenizer, block_size)
        items = comparisons.pairs
        held_out = comparisons.held_out
        description = comparisons.description
        if paired:
            items = labels_of(items)
            held_out = labels_of(held_out)

    if config.loss == "kto" and not config.online:
        good = config.desirable_weight * sum(label.desirable for label in items)
        bad = config.undesirable_weight * sum(not label.desirable for label in items)
        if good > 4 * bad or bad > 4 * good:
            print(f"note    good labels weigh {good:g}, bad ones {bad:g}: KTO wants about as much "
                  "of both (--desirable_weight, --undesirable_weight)", flush=True)

    rows, held_out_rows = split
    own = list(dict.fromkeys(row["prompt"] for row in rows))
    questions = list(dict.fromkeys(row["prompt"] for row in held_out_rows))
    if not config.data and all(stories.parse_request(prompt) for prompt in questions):
        own = None  # but the stage's pairs may be somebody's own too
        questions = None
    if config.online:
        asked = "fresh requests of the little world"
        if own:
            if not config.data:
                raise InputError(f"{origin}: is not of the little world; --online needs its "
                                 "prompts, with --data")
            own, asked = prompts_with_room(own, origin, tokenizer, config.max_new_tokens,
                                           block_size)
        description = (f"{asked}\n        {config.online} rounds of {config.pairs:,} pairs, by the "
                       f"{config.judge}; held out: {description}")
    return Data(items, held_out, paired, own, questions, description)


def train(config):
    """Fit the policy to the comparisons and save it to OUT/SIZE/NAME/checkpoint.pt."""
    check_name(config.name, "dpo")
    if config.online and config.data and config.judge in JUDGES:
        raise InputError(f"--judge {config.judge}: knows the little world only, not the prompts of "
                         f"{config.data}")
    if config.beta == 0:
        raise InputError("--beta 0.0: must be positive; with 0 no comparison would move the policy")
    folder = stage_folder(config, config.name)
    judged = bool(config.online) and config.judge == "reward_model"
    judge = None
    if config.online and not judged:
        judge = judge_of(config.judge, folder / "unfinished/labels.jsonl")
    if config.data:  # before any training
        read = read_labels if config.loss == "kto" else read_pairs
        split = hold_out(read(config.data), config.data)
    needed = ["gpt", "sft"]
    if judged or not config.data:
        needed.append("reward_model")
    train_missing(config, needed, config.name)

    # The models: π_θ, trained; π_ref, frozen; online, perhaps r_φ as the judge.
    policy, tokenizer = load(config, config.start)
    used = [config.start]
    reference = None
    if config.loss not in ("simpo", "orpo"):
        reference, reference_tokenizer = load(config, "sft")
        refuse_other_tokens(config, tokenizer, "sft", reference_tokenizer)
        used.append("sft")
    reward_model = None
    if judged:
        reward_model, reward_tokenizer = load(config, "reward_model", RewardModel)
        refuse_other_tokens(config, tokenizer, "reward_model", reward_tokenizer)
        judge = reward_model_judge(reward_model, reward_tokenizer, 4 * config.micro_batch)
        used.append("reward_model")
    sources = [stage_folder(config, stage) / "checkpoint.pt" for stage in used]

    # 1. The comparisons: (x, y_w, y_l), y_w ≻ y_l.
    origin = config.data
    if not config.data:
        stage = stage_folder(config, "reward_model")
        split = read_comparisons(stage)
        origin = stage / "pairs.jsonl"
        sources += [origin, stage / "held_out.jsonl"]
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
            rows, _ = collect_pairs(policy, tokenizer, draw_prompts, config.pairs, judge, config,
                                    rng)
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
        extra = {}
        if config.loss in ("dpo", "kto"):  # the others' beta is no price of KL
            extra["beta"] = config.beta
        save_checkpoint(run.folder / "checkpoint.pt", "dpo", config.size, policy, tokenizer,
                        metrics=run.figures(), made_from=run.made_from(), **extra)
        run.finish()
    forget_rounds(folder, "pairs", config.online)

    if reward_model is None and not config.data:
        reward_model, _ = load(config, "reward_model", RewardModel)
    reward = None
    if reward_model is not None:
        reward = make_reward("reward_model", reward_model, tokenizer, config.micro_batch)
    if reference is None:
        reference, _ = load(config, "sft")
    show_before_and_after(data.questions, reference, policy, tokenizer, config, reward)
    print(f"saved {folder / 'checkpoint.pt'}; next: python best_of_n.py", flush=True)


def main(argv=None):
    needs = {"temperature": ("prompt",), "top_k": ("prompt",), "gamma": ("loss", "simpo"),
             "beta": ("loss", "dpo", "ipo", "kto", "simpo"), "lam": ("loss", "orpo"),
             "desirable_weight": ("loss", "kto"), "undesirable_weight": ("loss", "kto"),
             "pairs": ("online",), "judge": ("online",),
             "online": ("start", "sft")}  # a base model can't answer
    losses = {"ipo": dict(beta=0.05), "kto": dict(batch=64, micro_batch=64),
              "simpo": dict(beta=10.0), "orpo": dict(start="gpt", lam=2.0)}
    config = parse_config(Config, GPU, argv, "Fit a policy to preferences: DPO and its family.",
                          needs, presets={"loss": losses, "size": {"gpt2": GPT2}})
    if "lr" not in config.given:
        if config.loss == "simpo":
            config.lr /= 2
        elif config.loss == "orpo":
            config.lr = default_lr(config.size)
    if config.prompt:
        answer(config, "dpo", config.name)
    else:
        train(config)


if __name__ == "__main__":
    run_script(main)
