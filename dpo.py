"""
dpo.py: direct preference optimization (Rafailov et al. 2023; CS 224R, Lecture 9, ch. 8; ECE 7115, "DPO Loss"), and what
followed it (CS 224R, ch. 10 and 11; ECE 7115, "DPO Variants"): IPO, KTO, SimPO, ORPO, online DPO.

The optimum of RLHF's objective is π*(y|x) = π_ref(y|x) exp(r(x, y)/β) / Z(x), so r(x, y) = β log π*(y|x)/π_ref(y|x) +
β log Z(x). Put into Bradley-Terry, Z(x) cancels, and the policy itself is fitted to the comparisons, with no reward
model and no sampling:

    L_DPO(θ) = -E[ log σ( β log π_θ(y_w|x)/π_ref(y_w|x) - β log π_θ(y_l|x)/π_ref(y_l|x) ) ]

Two models: the policy π_θ and the frozen reference π_ref, both from SFT. SimPO and ORPO need no reference: one model.

    python dpo.py                       on the comparisons that reward_model.py collected
    python dpo.py --data FILE.jsonl     on your own pairs: {"prompt", "chosen", "rejected"}
    python dpo.py --loss kto --data FILE.jsonl      single labels: {"prompt", "completion", "label": true or false}
    python dpo.py --loss orpo           SFT and alignment in one stage: starts from the base model
    python dpo.py --online 5            five rounds on samples of the current policy, compared by the reward model
    python dpo.py --prompt "…"          answer a prompt with the policy

Departures from the slides: none in DPO, whose log-probabilities are sums over the response (means would be SimPO's).
    SimPO: CS 224R adds γ to the implicit reward of both responses, where it cancels; it is the margin between the two.
    Online DPO: the judge chooses with Bradley-Terry's noise; ranked without, a pair's margin has no finite optimum.
"""

import math
import random
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from data import stories
from data.annotator import JUDGES, judge_of
from data.files import InputError, hold_out, read_comparisons, read_labels, read_pairs, run_script, write_jsonl
from data.run import (Run, announce, check_name, forget_rounds, parse_config, restore, show_models, stage_folder,
                      train_missing)
from data.tokenizer import encode_comparisons, encode_pairs
from gpt import (GPT, batches_by_length, get_device, learning_rate, load_checkpoint, make_optimizer, masked_logprobs,
                 optimizer_step, pad, response_mask, save_checkpoint)
from reward_model import RewardModel, collect_pairs, reward_model_judge, stages_until
from sft import answer, encode_demonstrations, prompts_with_room, show_before_and_after


@dataclass
class Config:
    size: Literal["auto", "cpu", "gpu", "gpt2"] = "auto"    # auto takes gpu where there is one; gpt2: of gpt.py --load
    out: str = "out"            # folder of all outputs; this stage writes to OUT/SIZE/NAME
    name: str = "dpo"           # name of this run's folder: dpo-… keeps an experiment apart
    seed: int = 1               # fixes the order of the pairs and the samples
    data: str = ""              # your own pairs, a .jsonl file, instead of the comparisons of the reward model's stage
    prompt: str = ""            # answer this prompt with the policy of --name, and stop
    temperature: float = 1.0    # of the answer to --prompt
    top_k: int = 0              # the answer to --prompt draws from the k likeliest tokens only; 0: from all
    loss: Literal["dpo", "ipo", "kto", "simpo", "orpo"] = "dpo"     # what is minimized; changes some of the defaults
    start: Literal["sft", "gpt"] = "sft"    # the policy starts as the SFT model or as the base model
    epochs: int = 1             # passes over the pairs
    batch: int = 32             # pairs in a step (KTO: labels)
    micro_batch: int = 32       # pairs in one forward pass; less memory, the same gradient
    lr: float = 2e-4            # peak learning rate (linear warm-up, cosine to zero)
    warmup: int = 10            # steps of warm-up
    beta: float = 0.2           # price of one nat of KL to the reference, in reward units; PPO's, for the same optimum
    gamma: float = 0.5          # SimPO's margin
    lam: float = 0.5            # ORPO's λ, the weight of the odds ratio beside the SFT loss
    online: int = 0             # rounds of online DPO; 0: on the comparisons that are there
    pairs: int = 2048           # fresh comparisons in a round
    judge: str = "reward_model"     # who labels them: reward_model, annotator, constitution, both, or a program: "COMMAND"
    sample_batch: int = 512     # prompts in one batch of sampling them
    max_new_tokens: int = 96    # the longest sampled response
    report: int = 64            # steps between two reports; the state for --resume is saved as often
    resume: bool = False        # go on with the run that was interrupted in this folder


GPU = dict(batch=64, micro_batch=64, lr=5e-5, max_new_tokens=128)
PRESETS = {"loss": dict(ipo=dict(beta=0.05), kto=dict(batch=64, micro_batch=64), simpo=dict(beta=10.0, lr=1e-4),
                        orpo=dict(start="gpt", lr=2e-3, lam=2.0)),
           # Rafailov et al. 2023, appendix B: batches of 64, lr 1e-6 (with RMSprop), 150 steps of warm-up
           "size": {"gpt2": dict(batch=64, micro_batch=4, lr=1e-6, warmup=150, max_new_tokens=128, sample_batch=128)}}


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


def ipo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta):
    """Identity preference optimization (Azar et al. 2023, eq. 17; CS 224R, ch. 10): the difference h of log-ratios is
    drawn to 1/(2β), and not beyond. Arguments as dpo_loss's. Returns a scalar. By hand: ipo_loss(-15.2, -14.8, -16.0,
    -14.5, beta=0.5) = 0.01, with h = 1.1 and 1/(2β) = 1. Its β weighs probabilities, not rewards: smaller than DPO's."""
    h = (policy_chosen - ref_chosen) - (policy_rejected - ref_rejected)
    return ((h - 1 / (2 * beta)) ** 2).mean()  # E[(h - 1/(2β))²]


def kto_loss(policy, ref, desirable, baseline, beta, desirable_weight=1.0, undesirable_weight=1.0):
    """Kahneman-Tversky optimization (Ethayarajh et al. 2024, eq. 7 and 8; CS 224R, ch. 10): single labels, no pairs.

    policy, ref (B,): log-probabilities summed over the response; desirable (B,), bool; baseline: z0 >= 0, in nats (see
    kto_baseline). Returns the mean of λ_y - v(x, y), a scalar."""
    r = policy - ref  # r̂ = log π_θ(y|x) / π_ref(y|x)
    weight = torch.where(desirable, desirable_weight, undesirable_weight)  # λ_y: λ_D or λ_U
    v = weight * torch.sigmoid(beta * torch.where(desirable, r - baseline, baseline - r))  # λ_y σ(±β(r̂ - z0))
    return (weight - v).mean()


def simpo_loss(policy_chosen_mean, policy_rejected_mean, beta, gamma):
    """Simple preference optimization (Meng et al. 2024, eq. 6; ECE 7115, "DPO Variants"): no reference. Both (B,): the
    mean log-probability of a response's tokens. Returns a scalar."""
    return -F.logsigmoid(beta * policy_chosen_mean - beta * policy_rejected_mean - gamma).mean()


def orpo_loss(chosen_mean, rejected_mean, lam):
    """Odds ratio preference optimization (Hong et al. 2024, eq. 6 and 7; CS 224R, ch. 10): the SFT loss of the chosen
    response and the log odds of both, of p = exp(mean log-probability). Both (B,). Returns a scalar."""
    means = (mean.clamp(max=-1e-6) for mean in (chosen_mean, rejected_mean))  # at p = 1 the odds are infinite
    chosen, rejected = (mean - (-torch.expm1(mean)).log() for mean in means)  # log p/(1-p)
    return (-chosen_mean - lam * F.logsigmoid(chosen - rejected)).mean()


LOSSES = {  # --loss: of what responses() returns, of KTO's z0 and the settings; chunk(2): chosen, rejected
    "dpo": lambda policy, ref, lengths, good, z0, c: dpo_loss(*policy.chunk(2), *ref.chunk(2), c.beta),
    "ipo": lambda policy, ref, lengths, good, z0, c: ipo_loss(*policy.chunk(2), *ref.chunk(2), c.beta),
    "kto": lambda policy, ref, lengths, good, z0, c: kto_loss(policy, ref, good, z0, c.beta),
    "simpo": lambda policy, ref, lengths, good, z0, c: simpo_loss(*(policy / lengths).chunk(2), c.beta, c.gamma),
    "orpo": lambda policy, ref, lengths, good, z0, c: orpo_loss(*(policy / lengths).chunk(2), c.lam),
}
WITHOUT_REFERENCE = ("simpo", "orpo")


def response_logprobs(model, tokens, prompt_lengths, lengths, temperature=1.0):
    """log π(y|x) of every row: (B,), the sum over the response's tokens, <|end|> included; tokens (B, T)."""
    mask = response_mask(prompt_lengths, lengths, tokens.shape[1])
    return masked_logprobs(model, tokens, mask, temperature).sum(dim=1)


def labels_of(items):
    """Items as labels (ids, prompt length, good or not): of pairs (chosen, rejected, prompt length) the chosen first."""
    if isinstance(items[0][2], bool):
        return items
    return [(chosen, n, True) for chosen, _, n in items] + [(rejected, n, False) for _, rejected, n in items]


def responses(policy, reference, labels):
    """(log π_θ(y|x), log π_ref(y|x) or None for no reference, length in tokens, good or not) of R labels, each (R,)."""
    sequences, *columns = zip(*labels)
    tokens, lengths = pad(sequences, policy.wte.weight.device)
    prompt_lengths, good = (torch.tensor(column, device=tokens.device) for column in columns)
    with torch.inference_mode():  # π_ref gets no gradient
        ref = response_logprobs(reference, tokens, prompt_lengths, lengths) if reference else None
    return response_logprobs(policy, tokens, prompt_lengths, lengths), ref, lengths - prompt_lengths, good


@torch.inference_mode()
def kto_baseline(policy, reference, labels, rows=64):
    """KTO's z0, an estimate of KL(π_θ || π_ref): the mean log-ratio of a batch's prompts, each with the next label's
    response, but not below 0. Left out: couples longer than the context, and responses to that very prompt."""
    couples = [(ids[:n] + other[m:], n, True) for (ids, n, _), (other, m, _) in zip(labels, labels[1:] + labels[:1])
               if ids[:n] != other[:m] and n + len(other) - m <= policy.config.block_size]
    parts = [responses(policy, reference, couples[start:start + rows]) for start in range(0, len(couples), rows)]
    return max(0.0, sum((logp - ref).sum().item() for logp, ref, *_ in parts) / max(1, len(couples)))


def backward(policy, reference, items, config):
    """Accumulate the gradient of the loss of a batch of items, config.micro_batch at a time. Returns name -> number:
    the loss; accuracy and margin of the implicit reward r̂, of pairs the chosen one's over the rejected one's, of labels
    on the right side of z0; log-ratios. r̂ is β log π_θ/π_ref (CS 224R, ch. 8), and without a reference the mean
    log-probability, by which SimPO and ORPO rank."""
    z0, total = kto_baseline(policy, reference, labels_of(items)) if config.loss == "kto" else 0.0, 0.0
    for start in range(0, len(items), config.micro_batch):
        part = items[start:start + config.micro_batch]
        logp, ref, lengths, good = found = responses(policy, reference, labels_of(part))
        loss = LOSSES[config.loss](*found, z0, config)
        if torch.is_grad_enabled():
            (loss * len(part) / len(items)).backward()
        r = config.beta * (logp - ref - z0) if reference else logp / lengths
        pairs = not isinstance(part[0][2], bool)
        margin = torch.sub(*r.chunk(2)) if pairs else torch.where(good, r, -r)  # r̂(x, y_w) - r̂(x, y_l)
        row = dict(loss=loss, accuracy=(margin > 0).float(), margin=margin)
        if pairs and reference:
            row.update(zip(("chosen_log_ratio", "rejected_log_ratio"), (logp - ref).chunk(2)))
        total += torch.stack([x.detach().mean() for x in row.values()]).cpu() * len(part) / len(items)
    return dict(zip(row, total.tolist()))


evaluate = torch.no_grad()(backward)  # the figures of held-out items


def steps_of(items, config):
    """Optimizer steps of fit, all rounds together."""
    count = config.pairs * (1 + (config.loss == "kto")) if config.online else len(items)
    return max(1, config.online) * config.epochs * math.ceil(count / config.batch)


def fit(policy, reference, items, held_out, config, rng, saved=None):
    """Fit the policy to items in place. A generator, after every step: (step, figures or None, state). items: a list, or
    for config.online a function, number of the round from 0 -> its list, called when the policy is ready for that round
    (when a run goes on, for the rounds before it too). figures come every config.report steps; state is what a later call
    needs as `saved`, with its "step", to go on."""
    saved, step, steps = saved or {"step": 0}, 0, steps_of(items, config)
    optimizer = make_optimizer(policy, weight_decay=0.0)
    rows = restore(saved, steps, policy=policy, optimizer=optimizer, figures=[])["figures"]
    for number in range(max(1, config.online)):
        drawn = items(number) if config.online else items
        lengths = [max(len(ids) for ids, _, _ in labels_of([item])) for item in drawn]
        for batch in sum((batches_by_length(lengths, config.batch, rng) for _ in range(config.epochs)), []):
            step += 1
            if step <= saved["step"]:
                continue
            row = backward(policy, reference, [drawn[i] for i in batch], config)
            lr = learning_rate(step - 1, steps, config.lr, config.warmup)
            optimizer_step(optimizer, policy, lr, torch.tensor(row["loss"], device=policy.wte.weight.device))
            rows, report = [*rows, list(row.values())], None
            if step % config.report == 0 or step == steps:
                found = evaluate(policy, reference, held_out, config)
                rows, report = [], dict(zip(row, torch.tensor(rows).mean(dim=0).tolist()), held_out_loss=found["loss"],
                                        held_out_accuracy=found["accuracy"])
            yield step, report, dict(policy=policy, optimizer=optimizer, figures=rows)


def read_items(split, config, origin, tokenizer, block_size):
    """(items, held-out items, what to say of them) of split = (rows to train on, held-out rows). KTO takes a pair as
    two labels; held-out pairs stay pairs. InputError, naming origin, if nothing is left."""
    if "label" not in split[0][0]:
        data = encode_comparisons(split, origin, tokenizer, block_size)
        return labels_of(data.pairs) if config.loss == "kto" else data.pairs, data.held_out, data.description
    parts = [[(ids, n, row["label"]) for row in rows
              for ids, n in zip(*encode_demonstrations([row], tokenizer, block_size)[:2])] for rows in split]
    dropped = f"dropped {sum(map(len, split)) - sum(map(len, parts))} longer than the context"
    if not all(parts):
        raise InputError(f"{origin}: no label is left to {'hold out' if parts[0] else 'train on'}; {dropped}")
    return *parts, f"{origin}: {len(parts[0]):,} labels, {len(parts[1]):,} held out; {dropped}"


def load(config, stage, kind=GPT):
    """(a stage's model, its tokenizer)."""
    return load_checkpoint(stage_folder(config, stage) / "checkpoint.pt", stage, config.size, get_device(), kind)[:2]


def fresh_pairs(number, policy, tokenizer, judge, own, folder, config):
    """A round of online DPO, counted from 0: samples of the policy, compared by the judge. The pairs are kept in folder."""
    path, block_size = folder / f"pairs-{number + 1}.jsonl", policy.config.block_size
    if not path.exists():  # else the run goes on, and was sampled before
        rng = random.Random(f"dpo {config.seed} round {number}")
        write_jsonl(path, collect_pairs(policy, tokenizer, config.pairs, config, rng, False, judge, own, block_size)[0])
    pairs, _, _ = encode_pairs(read_pairs(path), tokenizer, block_size)
    return labels_of(pairs) if config.loss == "kto" else pairs


def train(config):
    """Fit the policy to the comparisons and save it to OUT/SIZE/NAME/checkpoint.pt."""
    check_name(config.name, "dpo")
    judged = bool(config.online) and config.judge == "reward_model"
    if config.online and config.data and config.judge in JUDGES:
        raise InputError(f"--judge {config.judge}: knows the little world only, not the prompts of {config.data}")
    if config.loss == "ipo" and config.beta == 0:
        raise InputError("--beta 0.0: IPO's margin, 1/(2β), must be finite")
    folder, stage = stage_folder(config, config.name), stage_folder(config, "reward_model")
    judge = judge_of(config.judge, folder / "unfinished/labels.jsonl") if config.online and not judged else None
    read = read_labels if config.loss == "kto" else read_pairs
    split = hold_out(read(config.data), config.seed, config.data) if config.data else None  # before any training
    train_missing(config, stages_until("reward_model" if judged or not config.data else "sft"), config.name)
    policy, tokenizer = load(config, config.start)  # π_θ, trained
    reference, _ = (None, None) if config.loss in WITHOUT_REFERENCE else load(config, "sft")  # π_ref, frozen
    r_phi, own_tokenizer = load(config, "reward_model", RewardModel) if judged else (None, None)
    judge = reward_model_judge(r_phi, own_tokenizer) if judged else judge

    # 1. The comparisons: (x, y_w, y_l), y_w ≻ y_l; online, those of every round are fresh samples of the policy.
    files = [] if config.data else [stage / "pairs.jsonl", stage / "held_out.jsonl"]
    split, origin = split or read_comparisons(stage), config.data or files[0]
    items, held_out, data = read_items(split, config, origin, tokenizer, policy.config.block_size)
    own, prompts = (list(dict.fromkeys(row["prompt"] for row in rows)) for rows in split)
    world = not config.data and all(map(stories.parse_request, prompts))  # the stage's pairs may be somebody's own too
    if config.online:
        if not world and not config.data:
            raise InputError(f"{origin}: is not of the little world; --online needs its prompts, with --data")
        own, asked = prompts_with_room(None if world else own, tokenizer, config, policy.config.block_size)
        items = lambda number: fresh_pairs(number, policy, tokenizer, judge, own, folder / "unfinished", config)
        data = f"{asked}\n        {config.online} rounds of {config.pairs:,} pairs, by the {config.judge}; held out: {data}"
    announce(config.name, config, get_device(), data, policy)
    show_models(trained=("policy",), policy=policy, reference=reference, reward_model=r_phi)

    # 2. Gradient steps on the loss.
    used = [config.start] + ["sft"] * bool(reference) + ["reward_model"] * judged
    sources = [stage_folder(config, name) / "checkpoint.pt" for name in used] + files
    with Run(config.name, folder, config, config.report, sources) as run:
        run.total, rng = steps_of(items, config), random.Random(f"dpo {config.seed}")
        for step, row, state in fit(policy, reference, items, held_out, config, rng, run.saved):
            if row:
                run(step, **row)
            run.end_step(step, **state)

        # 3. Save; the same prompts before and after.
        save_checkpoint(run.folder / "checkpoint.pt", "dpo", config.size, policy, tokenizer, metrics=run.figures(),
                        **{"beta": config.beta} if config.loss in ("dpo", "kto") else {})  # IPO's, SimPO's: no price of KL
        run.finish()
    forget_rounds(folder, "pairs", config.online)
    r_phi = r_phi if judged or config.data else load(config, "reward_model", RewardModel)[0]  # for the screen
    show_before_and_after(None if world else prompts, reference or load(config, "sft")[0], policy, tokenizer, config, r_phi)
    print(f"saved {folder / 'checkpoint.pt'}; next: python best_of_n.py", flush=True)


def main(argv=None):
    needs = {"temperature": ("prompt",), "top_k": ("prompt",), "beta": ("loss", "dpo", "ipo", "kto", "simpo"),
             "gamma": ("loss", "simpo"), "lam": ("loss", "orpo"), "pairs": ("online",), "judge": ("online",),
             "sample_batch": ("online",), "online": ("start", "sft")}  # a base model can't answer
    config = parse_config(Config, GPU, argv, "Fit a policy to preferences: DPO, IPO, KTO, SimPO, ORPO.", needs, PRESETS)
    if config.prompt:
        return answer(config, "dpo", config.name)
    train(config)


if __name__ == "__main__":
    run_script(main)
