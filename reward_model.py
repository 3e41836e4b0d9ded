"""
reward_model.py: preferences and the Bradley-Terry reward model
(CS 224R, Lecture 9, ch. 5 and 6; ECE 7115, step 2/3; Bradley & Terry 1952; Ouyang et al. 2022, section 3.5).

Step one: sample two responses y1, y2 to each prompt x from the SFT policy; the annotator says which is better, y_w ≻ y_l.
Step two: fit r_φ(x, y), the SFT trunk with a scalar head read at the last token, to the comparisons:

    P(y_w ≻ y_l | x) = σ(r(x, y_w) - r(x, y_l))          L_RM(φ) = -E[ log σ(r_φ(x, y_w) - r_φ(x, y_l)) ]

    python reward_model.py                      collect pairs from the SFT model, then train
    python reward_model.py --data FILE.jsonl    train on your own pairs: {"prompt", "chosen", "rejected"}
    python reward_model.py --judge constitution     AI feedback (CS 224R, ch. 11); --judge "COMMAND": from any program
    python reward_model.py --process            a process reward model: a mark for every sentence (CS 224R, ch. 11)
    python reward_model.py --learning_curve     how many pairs it takes

One epoch: the pairs are few and a second pass learns them by heart (ECE 7115, "Reward Model Training").
Only differences of rewards enter the loss, so it leaves a constant free: after training the rewards are shifted to mean 0
over the SFT policy's responses. They are not rescaled, Bradley-Terry fixes the scale.
The slides' class finds the last token from the attention mask; here every length is known: no attention mask.
"""

import math
import random
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

import sft
from data import annotator, stories
from data.annotator import (Marked, TextReward, annotator_judge, answer_key, gold_margins, print_agreement,
                            print_answer_key, reward_of, step_ends)
from data.files import InputError, hold_out, read_comparisons, read_pairs, run_script, write_jsonl
from data.run import Run, announce, counts, doublings, parse_config, progress, restore, show, stage_folder, train_missing
from data.tokenizer import encode_comparisons
from gpt import (GPT, autocast, batches_by_length, generate, get_device, learning_rate, load_checkpoint, make_optimizer,
                 optimizer_step, pad, respond, save_checkpoint)
from sft import prompts_with_room, sample_prompts

EARLIER = {**sft.EARLIER, "sft": sft.main}  # the stages that this one builds on


@dataclass
class Config:
    size: Literal["auto", "cpu", "gpu", "gpt2"] = "auto"    # auto takes gpu where there is one; gpt2: of gpt.py --load
    out: str = "out"            # folder of all outputs; this stage writes to OUT/SIZE/reward_model
    seed: int = 1               # fixes prompts, samples, the annotator's noise and the order of training
    data: str = ""              # your own pairs, a .jsonl file, instead of comparisons collected from the SFT model
    pairs: int = 10240          # comparisons to collect for training
    held_out: int = 1024        # comparisons to collect for the held-out figures, labelled by the annotator
    judge: str = "annotator"    # who labels the others: annotator, constitution, both in turn, or a program: "COMMAND"
    max_new_tokens: int = 96    # the longest sampled response
    sample_batch: int = 512     # prompts in one batch of sampling
    epochs: int = 1             # passes over the pairs
    batch: int = 32             # pairs in a step
    micro_batch: int = 32       # pairs in one forward pass; less memory, the same gradient
    lr: float = 1e-3            # peak learning rate (linear warm-up, cosine to zero)
    warmup: int = 10            # steps of warm-up
    weight_decay: float = 0.1   # AdamW's, on matrices only
    report: int = 64            # steps between two reports; the state for --resume is saved as often
    resume: bool = False        # go on with the run that was interrupted in this folder
    learning_curve: bool = False    # accuracy by number of pairs, a fresh model for each number; saves nothing
    process: bool = False       # a process reward model, from the reward model's responses; in OUT/SIZE/process_model


GPU = dict(pairs=32768, held_out=2048, max_new_tokens=128, sample_batch=1024, batch=64, micro_batch=64, lr=1e-4,
           report=128)
# Ziegler et al. 2019's code for their GPT-2 of 124M, the stylistic tasks: batches of 32, lr 5e-5
PRESETS = {"size": {"gpt2": dict(batch=32, micro_batch=4, lr=5e-5, max_new_tokens=128, sample_batch=128)}}


class RewardModel(nn.Module):
    """A GPT trunk with a linear head that gives every prefix a number.

    The reward model reads it at the last token (score); the value model of PPO, the same class, at every
    state in which a token of the response is chosen.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.trunk = GPT(config)
        self.head = nn.Linear(config.n_embd, 1)
        nn.init.zeros_(self.head.weight)  # r = 0: every comparison starts at 50:50, loss log 2
        nn.init.zeros_(self.head.bias)

    def forward(self, tokens):
        """tokens (B, T) -> (B, T): column t is read from tokens[:, :t+1]. The trunk's final norm is the only one."""
        with autocast(tokens.device):
            hidden = self.trunk.hidden(tokens)
        with torch.autocast(tokens.device.type, enabled=False):  # never in bf16: a score near 3 would be rounded to 1/64
            return self.head(hidden.to(self.head.weight.dtype)).squeeze(-1)

    def score(self, tokens, lengths):
        """r(x, y): (B,), the number at the last token of each sequence, <|end|>; lengths (B,) say where that is.

        The slide's hidden[batch_idx, lengths], lengths counted from 0 there; gather refuses a length outside of tokens.
        """
        return self(tokens).gather(1, lengths[:, None] - 1).squeeze(1)


def bradley_terry_loss(chosen_rewards, rejected_rewards):
    """-E[log σ(r(x, y_w) - r(x, y_l))]. Both (B,) -> scalar (CS 224R, ch. 6).

    Worked numbers of the lecture: rewards 2.5 and 1.0 give P = 0.818 and a loss of 0.201; flipped, 0.182 and 1.70.
    """
    return -F.logsigmoid(chosen_rewards - rejected_rewards).mean()


@torch.inference_mode()
def score_all(model, sequences, rows=128):
    """r(x, y) of many sequences (lists of ids: prompt + response + <|end|>) -> (N,) float32 on the CPU."""
    device, scores = model.head.weight.device, []
    for start in range(0, len(sequences), rows):
        scores.append(model.score(*pad(sequences[start:start + rows], device)).cpu())
    return torch.cat(scores)


# ----------------------------------------------------------------------------------------------------------------------
# Step one: preferences


def reward_model_judge(model, tokenizer):
    """A judge (data/annotator.py) by Bradley-Terry on a reward model's scores: P(first) = σ(r(first) - r(second))."""
    def judge(asked, rng):
        ids = [tokenizer.prompt(prompt) + tokenizer.response(text) for prompt, *texts in asked for text in texts]
        first, second = score_all(model, ids).view(-1, 2).unbind(dim=1) if asked else torch.empty(2, 0)
        return [(int(rng.random() >= p), "") for p in torch.sigmoid(first - second).tolist()]

    return judge


def collect_pairs(model, tokenizer, count, config, rng, held_out=False, judge=annotator_judge, own=None, context=math.inf):
    """Ask the policy twice for each of the world's requests (the held-out ones or the others), or for prompts of a user's
    own, and let the judge choose. context: encoded anew, a sample can be longer than it was, and have no end within it.

    Returns (rows {"prompt", "chosen", "rejected"}, and "why" where the judge says it, dropped {reason: number}); a dropped
    comparison is replaced.
    """
    rows, dropped = [], {"no end": 0, "blank": 0, "equal texts": 0}
    report = progress(f"{'held-out ' * held_out}comparisons collected", count)
    while len(rows) < count:
        if sum(dropped.values()) > 10 * count:
            raise InputError(f"the SFT model gave {len(rows)} usable pairs of samples and {dropped} others: it rarely ends "
                             f"its answers within --max_new_tokens {config.max_new_tokens}; train it longer")
        number = min(config.sample_batch, count - len(rows))
        prompts = sample_prompts(own, number, rng, held_out)
        ids = [tokenizer.prompt(prompt) for prompt in prompts for _ in range(2)]
        texts, ended = respond(model, tokenizer, ids, config.max_new_tokens, seed=rng.getrandbits(48))
        asked = []
        for i, prompt in enumerate(prompts):
            first, second = texts[2 * i:2 * i + 2]
            longest = max(len(tokenizer.response(text)) for text in (first, second))
            if not all(ended[2 * i:2 * i + 2]) or len(ids[2 * i]) + longest > context:
                dropped["no end"] += 1
            elif not first.strip() or not second.strip() or "\0" in first + second:
                dropped["blank"] += 1  # data/files.py would refuse to read it back
            elif first == second:
                dropped["equal texts"] += 1
            else:
                asked.append((prompt, first, second))
        for (prompt, *texts), (choice, why) in zip(asked, judge(asked, rng)):
            row = {"prompt": prompt, "chosen": texts[choice], "rejected": texts[1 - choice]}
            rows.append({**row, "why": why} if why else row)
        report(len(rows))
    return rows, dropped


# ----------------------------------------------------------------------------------------------------------------------
# Step two: Bradley-Terry


def compared_rewards(model, items):
    """The rewards that each label compares, (of the better, of the worse), both (N,): of pairs r(x, y_w) and r(x, y_l). Of
    Marked responses, of every step its reward and that of the story without it, 0: a binary loss, -log σ(r) or -log σ(-r).
    """
    if isinstance(items[0], Marked):
        rows, ends, marks = zip(*((row, *step) for row, item in enumerate(items) for step in zip(item.ends, item.marks)))
        tokens, _ = pad([item.ids for item in items], model.head.weight.device)
        r, good = model(tokens)[list(rows), list(ends)], torch.tensor(marks, device=tokens.device)  # (N,): all steps
        return torch.where(good, r, 0.0), torch.where(good, 0.0, r)
    sequences = [chosen for chosen, _, _ in items] + [rejected for _, rejected, _ in items]
    return model.score(*pad(sequences, model.head.weight.device)).chunk(2)


def backward(model, items, micro_batch):
    """Accumulate the gradient of the Bradley-Terry loss of one batch, micro_batch items at a time. Returns the loss."""
    total_loss, count = 0.0, sum(len(item.marks) if isinstance(item, Marked) else 1 for item in items)
    for start in range(0, len(items), micro_batch):
        better, worse = compared_rewards(model, items[start:start + micro_batch])
        loss = bradley_terry_loss(better, worse) * len(better) / count
        loss.backward()
        total_loss += loss.detach()
    return total_loss


def fit(model, items, held_out, config, rng, saved=None):
    """Train a reward model on pairs or Marked responses, in place. A generator, after every step: (step, figures, None but
    for every config.report steps, state: what a later call needs as `saved`, with its "step", to go on)."""
    saved, optimizer = saved or {"step": 0}, make_optimizer(model, config.weight_decay)
    lengths = [len(item.ids) if isinstance(item, Marked) else max(len(item[0]), len(item[1])) for item in items]
    batches = [batch for epoch in range(config.epochs) for batch in batches_by_length(lengths, config.batch, rng)]
    losses = restore(saved, len(batches), model=model, optimizer=optimizer, losses=[])["losses"]
    for step in range(saved["step"], len(batches)):
        loss = backward(model, [items[i] for i in batches[step]], config.micro_batch)
        optimizer_step(optimizer, model, learning_rate(step, len(batches), config.lr, config.warmup), loss)
        losses, row = [*losses, loss.item()], None
        if (step + 1) % config.report == 0 or step + 1 == len(batches):
            margin = held_out_margins(model, held_out)
            row = dict(loss=sum(losses) / len(losses), held_out_loss=-F.logsigmoid(margin).mean().item(),
                       held_out_accuracy=(margin > 0).float().mean().item())
            losses = []
        yield step + 1, row, dict(model=model, optimizer=optimizer, losses=losses)


def learn(run, model, items, held_out, config):
    """fit as a Run, which keeps and prints the figures."""
    run.total = config.epochs * math.ceil(len(items) / config.batch)
    for step, row, state in fit(model, items, held_out, config, random.Random(f"pairs' order {config.seed}"), run.saved):
        if row:
            run(step, **row)
        run.end_step(step, **state)


@torch.inference_mode()
def held_out_margins(model, items):
    """r(x, y_w) - r(x, y_l) of every pair, or the like of every step: (N,)."""
    if isinstance(items[0], Marked):
        parts = [compared_rewards(model, items[start:start + 128]) for start in range(0, len(items), 128)]
        return torch.cat([better - worse for better, worse in parts]).cpu()
    chosen, rejected = ([pair[i] for pair in items] for i in (0, 1))
    return score_all(model, chosen) - score_all(model, rejected)


def start_from(policy):
    """A fresh RewardModel: the SFT model with a linear head in place of the language model's."""
    model = RewardModel(policy.config).to(policy.wte.weight.device)
    model.trunk.load_state_dict(policy.state_dict())
    return model


def train(config):
    """Collect or read pairs, train the reward model, save it to OUT/SIZE/reward_model/checkpoint.pt."""
    split = hold_out(read_pairs(config.data), config.seed, config.data) if config.data else None  # before any training
    folder, device = stage_folder(config, "reward_model"), get_device()
    judge = annotator.judge_of(config.judge, folder / "unfinished/labels.jsonl")
    train_missing(config, EARLIER, "reward_model")
    policy, tokenizer, _ = load_checkpoint(stage_folder(config, "sft") / "checkpoint.pt", "sft", config.size, device)
    model = start_from(policy)
    origin = config.data or f"two SFT samples a request, compared by {config.judge}"
    announce("reward_model", config, device, origin, model)
    if config.data:
        data = encode_comparisons(split, config.data, tokenizer, policy.config.block_size)  # before anything is written
        prompts_with_room([row["prompt"] for row in data.rows], tokenizer, config, policy.config.block_size)
    with Run("reward_model", folder, config, config.report, [stage_folder(config, "sft") / "checkpoint.pt"]) as run:
        # 1. Collect preferences: (x, y_w, y_l), y_w ≻ y_l.
        if not config.data:
            split = read_comparisons(run.folder) if run.saved["step"] else collect(policy, tokenizer, config, judge)
            data = encode_comparisons(split, "the collected pairs", tokenizer, policy.config.block_size)
        print(f"pairs   {data.description}", flush=True)
        if not run.saved["step"]:
            write_jsonl(run.folder / "pairs.jsonl", data.rows)
            write_jsonl(run.folder / "held_out.jsonl", data.held_out_rows)

        # 2. Train by maximum likelihood.
        learn(run, model, data.pairs, data.held_out, config)

        # 3. Shift to mean 0 over the SFT policy's own responses.
        shift_to_zero(model, policy, tokenizer, [row["prompt"] for row in data.rows], config)

        # 4. Against the answer key, where there is one. Save.
        margin = held_out_margins(model, data.held_out)
        if config.data:
            print(f"held-out accuracy {(margin > 0).float().mean():.3f}, loss {-F.logsigmoid(margin).mean():.3f}")
        else:
            figures, table = answer_key(margin, gold_margins(data.held_out_rows))
            run.record(run.total, **figures)
            print_answer_key(figures, table)
        save_checkpoint(run.folder / "checkpoint.pt", "reward_model", config.size, model, tokenizer, metrics=run.figures())
        run.finish()
    for row in data.held_out_rows[:3]:
        ids = [tokenizer.prompt(row["prompt"]) + tokenizer.response(row[name]) for name in ("chosen", "rejected")]
        chosen, rejected = score_all(model, ids).tolist()
        show(("prompt", row["prompt"]), ("chosen", annotator.scored(row["prompt"], row["chosen"], chosen)),
             ("rejected", annotator.scored(row["prompt"], row["rejected"], rejected)))
    print(f"saved {folder / 'checkpoint.pt'}; next: python ppo.py or python dpo.py", flush=True)


def shift_to_zero(model, policy, tokenizer, prompts, config, samples=512):
    """Step 3. Shift the rewards to mean 0 over the SFT policy's own responses: Bradley-Terry leaves a constant free."""
    fitting, _ = prompts_with_room(prompts, tokenizer, config, policy.config.block_size)
    ids = [tokenizer.prompt(text) for text in random.Random(f"shift {config.seed}").choices(fitting, k=samples)]
    with autocast(get_device()):
        rollout = generate(policy, ids, config.max_new_tokens, tokenizer.end_token, seed=config.seed)
    scores = score_all(model, [row[:length] for row, length in zip(rollout.tokens.tolist(), rollout.lengths.tolist())])
    with torch.no_grad():
        model.head.bias -= scores.mean().to(model.head.bias.device)
    print(f"shifted by {-scores.mean():+.3f}: mean 0 over {samples} SFT samples, standard deviation {scores.std():.3f}")


def collect(policy, tokenizer, config, judge=annotator_judge):
    """(rows to train on, held-out rows), fresh comparisons; says what was replaced. No request is in both. Whoever is the
    judge, the annotator labels those held out: they are the answer key."""
    split = []
    for held_out, count, labels in ((False, config.pairs, judge), (True, config.held_out, annotator_judge)):
        rng = random.Random(f"pairs {config.seed} {held_out}")
        rows, dropped = collect_pairs(policy, tokenizer, count, config, rng, held_out, labels)
        print(f"        replaced {counts(dropped)}")
        split.append(rows)
    print_agreement(split[0])
    return split


def stage_comparisons(config):
    """The split of the stage's own comparisons; a stage that is missing is trained, with this run's settings."""
    train_missing(config, EARLIER, "reward_model")
    if not (stage_folder(config, "reward_model") / "checkpoint.pt").exists():
        train(config)
    return read_comparisons(stage_folder(config, "reward_model"))


def learning_curve(config):
    """How many pairs does it take? Train a fresh reward model on the first 256, 512, ... pairs of --data, or of those that
    the stage collected, and print a row for each."""
    split = hold_out(read_pairs(config.data), config.seed, config.data) if config.data else stage_comparisons(config)
    train_missing(config, EARLIER, "reward_model")
    policy, tokenizer, _ = load_checkpoint(stage_folder(config, "sft") / "checkpoint.pt", "sft", config.size, get_device())
    data = encode_comparisons(split, config.data or stage_folder(config, "reward_model") / "pairs.jsonl", tokenizer,
                              policy.config.block_size)
    print(f"pairs   {data.description}", flush=True)
    world = all(stories.parse_request(row["prompt"]) for row in data.held_out_rows)  # else nobody knows the true rewards
    print("   pairs  held-out accuracy" + world * "  share of Bayes accuracy  above chance")
    for count in doublings(256, len(data.pairs)):
        model, order = start_from(policy), random.Random(f"learning curve {config.seed}")
        *_, (_, row, _) = fit(model, data.pairs[:count], data.held_out, config, order)
        figures = f"{row['held_out_accuracy']:17.3f}"
        if world:
            x, _ = answer_key(held_out_margins(model, data.held_out), gold_margins(data.held_out_rows))
            figures = (f"{x['expected_accuracy']:9.3f} ± {x['expected_accuracy_error']:.3f}  {x['share_of_bayes']:14.1%} ± "
                       f"{x['share_of_bayes_error']:.1%}  {x['above_chance']:.1%} ± {x['above_chance_error']:.1%}")
        print(f"{count:8,d}  {figures}", flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# The process reward model: the same class, read at the last token of every sentence


@torch.inference_mode()
def step_rewards(model, rollout, tokenizer):
    """What a process reward model gives the steps of a Rollout: (rewards, steps), both (B, T-1). steps is true at the
    action that emits the last token of a sentence; rewards is 0 elsewhere."""
    steps = torch.zeros(rollout.tokens.shape, dtype=torch.bool)
    for row, (ids, start) in enumerate(zip(rollout.responses(), rollout.prompt_lengths.tolist())):
        ends = step_ends(tokenizer.pieces(ids[:-1] if ids[-1] == tokenizer.end_token else ids))
        steps[row, [start + end for end in ends]] = True
    steps = steps[:, 1:].to(rollout.tokens.device)
    return torch.where(steps, model(rollout.tokens)[:, 1:], 0.0), steps


REWARDS = {"reward_model": "reward_model", "process": "process_model"}  # ppo.py --reward: the stage whose model gives it


def rewarder(name, model, tokenizer):
    """What ppo.py --reward names, as (scorer, token_rewards): scorer.score(tokens, lengths) -> (B,), one reward a response;
    token_rewards(rollout) -> (B, T-1) gives them to actions: the last one of each step, or of each text. model: the reward
    model or process model, else None. A reward model has no token_rewards, a process model no scorer, texts have both."""
    if name == "process":
        return None, lambda rollout: step_rewards(model, rollout, tokenizer)[0]
    texts = None if model else TextReward(reward_of(name), tokenizer)
    return model or texts, texts and texts.token_rewards


def load_reward_model(config, tokenizer):
    """The RewardModel of what ppo.py --reward names, with its file in a list: (model, [path]); (None, []) if that is not a
    model's. InputError if it reads other tokens than the policy's tokenizer makes."""
    if config.reward not in REWARDS:
        return None, []
    path = stage_folder(config, REWARDS[config.reward]) / "checkpoint.pt"
    model, found, _ = load_checkpoint(path, REWARDS[config.reward], config.size, get_device(), RewardModel)
    if found.vocabulary != tokenizer.vocabulary:
        raise InputError(f"{path}: its vocabulary is not the policy's; train the reward model again")
    return model, [path]


def train_process(config):
    """Train a process reward model on the responses of the reward model's comparisons, marked by the annotator."""
    split, source, folder = stage_comparisons(config), *(stage_folder(config, x) for x in ("reward_model", "process_model"))
    if not all(stories.parse_request(row["prompt"]) for rows in split for row in rows):
        raise InputError(f"{source / 'pairs.jsonl'}: the annotator marks answers to the little world's requests only")
    sources = [stage_folder(config, "sft") / "checkpoint.pt", source / "pairs.jsonl", source / "held_out.jsonl"]
    policy, tokenizer, _ = load_checkpoint(sources[0], "sft", config.size, get_device())
    model, rng = start_from(policy), random.Random(f"marks {config.seed}")
    announce("process_model", config, get_device(), f"the responses of {source}, every sentence marked", model)
    items, held_out = (annotator.mark(rows, tokenizer, rng) for rows in split)
    marks = [mark for item in items for mark in item.marks]
    print(f"steps   {len(marks):,} in {len(items):,} responses, {sum(marks) / len(marks):.1%} of them good", flush=True)
    config = replace(config, batch=2 * config.batch, micro_batch=2 * config.micro_batch)  # as many responses as in pairs
    with Run("process_model", folder, config, config.report, sources) as run:
        learn(run, model, items, held_out, config)
        true = torch.tensor([x if good else -x for item in held_out for x, good in zip(item.steps, item.marks)])
        figures, table = answer_key(held_out_margins(model, held_out), true)
        run.record(run.total, **figures)
        print_answer_key(figures, table)
        save_checkpoint(run.folder / "checkpoint.pt", "process_model", config.size, model, tokenizer, metrics=run.figures())
        run.finish()
    print(f"saved {folder / 'checkpoint.pt'}; next: python best_of_n.py --process", flush=True)


def main(argv=None):
    config = parse_config(Config, GPU, argv, "Collect preferences and train a Bradley-Terry reward model on them.",
                          needs={"judge": ("data", ""), "process": ("data", "")}, presets=PRESETS)
    if config.process and config.learning_curve:
        raise InputError("--learning_curve True: is a curve of pairs, and --process trains on steps")
    (train_process if config.process else learning_curve if config.learning_curve else train)(config)


def stages_until(last):
    """{stage: its main}, in order, of the stages up to this one: what ppo.py, dpo.py and best_of_n.py build on."""
    stages = {**EARLIER, "reward_model": main, "process_model": lambda argv: main([*argv, "--process"])}
    names = list(stages)
    return {name: stages[name] for name in names[:names.index(last) + 1]}


if __name__ == "__main__":
    run_script(main)
