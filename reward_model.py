"""
reward_model.py: preferences and the Bradley-Terry reward model (CS 224R, Lecture 9, ch. 5 and 6;
ECE 7115, step 2/3; Bradley & Terry 1952; Ouyang et al. 2022, section 3.5).

Step one: sample two responses y1, y2 to each prompt x from the SFT policy; the annotator says which
is better, y_w ≻ y_l. Step two: fit r_φ(x, y), the SFT trunk with a scalar head that is read at the
last token, to the comparisons:

    P(y_w ≻ y_l | x) = σ(r(x, y_w) - r(x, y_l))
    L_RM(φ) = -E[ log σ(r_φ(x, y_w) - r_φ(x, y_l)) ]

    python reward_model.py                      collect pairs from the SFT model, then train
    python reward_model.py --data FILE.jsonl    your own pairs: {"prompt", "chosen", "rejected"}
    python reward_model.py --judge constitution     AI feedback (CS 224R, ch. 11), or "COMMAND"
    python reward_model.py --process            a process reward model: a mark for every sentence
    python reward_model.py --learning_curve     how many pairs it takes
    python reward_model.py --explain            a held-out pair: r_φ beside the annotator's rubric
    python reward_model.py --prompt "…" --response "…"      the same of your own text

One epoch, as the slide "Reward Model Training" (ECE 7115) advises against overfitting.
Only differences of rewards enter the loss, so a constant is free: after training the rewards are
shifted to mean 0 over the SFT policy's responses. They are not rescaled, Bradley-Terry fixes the
scale. The slides' class finds the last token from the attention mask; here every length is known.
"""

import random
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

from data import stories
from data.annotator import (encode_steps, gold_margins, gold_reward, mark, mark_response, rubric,
                            scored, step_ends)
from data.answer_key import print_answer_key, reward_model_figures
from data.corpus import draw_requests, prompts_with_room
from data.files import (InputError, hold_out, read_comparisons, read_pairs, run_script,
                        write_jsonl)
from data.judges import TextReward, annotator_judge, judge_of, print_agreement, reward_of
from data.run import (Run, SilentRun, allow_flags, announce, complete, counts, doublings,
                      parse_config, progress, refuse_flags, refuse_stale, show, show_models,
                      stage_folder, train_missing)
from data.table import Column, print_columns
from data.tokenizer import encode_comparisons
from gpt import (GPT, autocast, batches_by_length, generate, get_device, learning_rate,
                 load_checkpoint, make_optimizer, memory_of_pieces, optimizer_step, pad,
                 refuse_other_tokens, respond, save_checkpoint)
from sft import refuse_own_text


@dataclass
class Config:
    # the comparisons
    data: str = ""              # your own pairs, a .jsonl file, instead of SFT samples compared
    pairs: int = 10240          # comparisons to collect for training
    held_out: int = 1024        # comparisons for the held-out figures, labelled by the annotator
    judge: str = "annotator"    # who labels the others: annotator, constitution, both in turn, or a
                                # program: "COMMAND"
    process: bool = False       # a process reward model, from the reward model's responses; in
                                # OUT/SIZE/process_model

    # sampling
    max_new_tokens: int = 96    # the longest sampled response
    sample_batch: int = 512     # prompts in one batch of sampling, two responses to each

    # optimization
    epochs: int = 1             # passes over the pairs
    batch: int = 32             # pairs in a step
    micro_batch: int = 32       # pairs in one forward pass; less memory, the same gradient
    lr: float = 1e-3            # peak learning rate (linear warm-up, cosine to zero)
    warmup: int = 10            # steps of warm-up
    weight_decay: float = 0.1   # AdamW's, on matrices only

    # this run
    size: Literal["auto", "cpu", "gpu", "gpt2"] = "auto"    # auto: gpu if there is one; gpt2: see
                                                            # data/huggingface.py
    out: str = "out"            # folder of all outputs; this stage writes to OUT/SIZE/reward_model
    seed: int = 1               # fixes prompts, samples, the annotator's noise, the order of pairs
    report: int = 64            # steps between two reports, and between two saves of the state
    resume: bool = False        # continue the run that was interrupted in this folder
    learning_curve: bool = False    # accuracy by number of pairs, a fresh model for each number;
                                    # saves nothing

    # one example
    explain: bool = False       # print what the model gives a held-out pair, sentence by sentence,
                                # beside the annotator's rubric, and stop
    prompt: str = ""            # explain the --response to this prompt instead
    response: str = ""          # any text; the rubric is for answers to the world's requests only


GPU = dict(pairs=32768, held_out=2048, max_new_tokens=128, sample_batch=1024, batch=64,
           micro_batch=64, lr=1e-4, report=128)
# Ziegler et al. 2019's code for their GPT-2 of 124M, the stylistic tasks: batches of 32, lr 5e-5
GPT2 = dict(batch=32, micro_batch=4, lr=5e-5, max_new_tokens=128, sample_batch=128)
COLLECTING = ("judge", "pairs", "held_out", "sample_batch", "max_new_tokens")  # flags of step one


class RewardModel(nn.Module):
    """A GPT trunk with a linear head that gives every prefix a number.

    The reward model reads it at the last token (score); the value model of PPO, the same class, in
    every state in which a token of the response is chosen.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.trunk = GPT(config)
        self.head = nn.Linear(config.n_embd, 1)
        nn.init.zeros_(self.head.weight)  # r = 0: every comparison starts at 50:50, loss log 2
        nn.init.zeros_(self.head.bias)

    def forward(self, tokens):
        """tokens (B, T) -> (B, T): column t is read from tokens[:, :t+1]."""
        with autocast(tokens.device):
            hidden = self.trunk.hidden(tokens)  # (B, T, C), normalized by the trunk
        with torch.autocast(tokens.device.type, enabled=False):  # bf16 would round 3 to 1/64
            return self.head(hidden.to(self.head.weight.dtype)).squeeze(-1)

    def score(self, tokens, lengths):
        """r(x, y): (B,), the number at the last token of each sequence, <|end|>; lengths (B,).

        The slide's hidden[batch_idx, lengths], with lengths that are indices there; gather refuses
        one outside of tokens.
        """
        return self(tokens).gather(1, lengths[:, None] - 1).squeeze(1)


def bradley_terry_loss(chosen_rewards, rejected_rewards):
    """-E[log σ(r(x, y_w) - r(x, y_l))]. Both (B,) -> scalar (CS 224R, ch. 6).

    Worked numbers of the lecture: rewards 2.5 and 1.0 give P = 0.818 and a loss of 0.201; flipped,
    0.182 and 1.70.
    """
    return -F.logsigmoid(chosen_rewards - rejected_rewards).mean()


@torch.inference_mode()
def score_all(model, sequences, at_once=128):
    """r(x, y) of many sequences (lists of ids: prompt + response + <|end|>), at_once of them in one
    forward pass: (N,) on the CPU."""
    device = model.head.weight.device
    scores = []
    for start in range(0, len(sequences), at_once):
        tokens, lengths = pad(sequences[start:start + at_once], device)
        scores.append(model.score(tokens, lengths).cpu())
    return torch.cat(scores)


# --------------------------------------------------------------------------------------------------
# Step one: preferences


def sample_comparisons(policy, tokenizer, prompts, max_new_tokens, seed):
    """Ask a policy twice for each prompt (texts).

    Returns (comparisons [(prompt, first response, second response)], {reason: how many of the
    others can't be compared}). A sample is encoded again later, and may then be longer than it was.
    """
    ids = []
    for prompt in prompts:
        ids += [tokenizer.prompt(prompt)] * 2
    texts, ended = respond(policy, tokenizer, ids, max_new_tokens, seed)

    comparisons = []
    dropped = {"no end": 0, "blank": 0, "equal texts": 0, "longer than the context": 0}
    for i, prompt in enumerate(prompts):
        first, second = texts[2 * i:2 * i + 2]
        longest = max(len(tokenizer.response(first)), len(tokenizer.response(second)))
        if not ended[2 * i] or not ended[2 * i + 1]:
            dropped["no end"] += 1
        elif len(ids[2 * i]) + longest > policy.config.block_size:
            dropped["longer than the context"] += 1
        elif not first.strip() or not second.strip() or "\0" in first + second:
            dropped["blank"] += 1  # data/files.py would refuse to read it back
        elif first == second:
            dropped["equal texts"] += 1
        else:
            comparisons.append((prompt, first, second))
    return comparisons, dropped


def collect_pairs(policy, tokenizer, draw_prompts, count, judge, config, rng):
    """Sample comparisons until there are `count`, and let the judge (data/judges.py) choose.

    draw_prompts(number, rng) -> texts. Returns (rows {"prompt", "chosen", "rejected"}, and "why" if
    the judge says it; dropped {reason: number}). A dropped comparison is replaced.
    """
    rows = []
    dropped = {}
    report = progress("comparisons collected", count)
    while len(rows) < count:
        if sum(dropped.values()) > 10 * count:
            raise InputError(f"of the policy's pairs of samples {len(rows)} can be compared, "
                             f"dropped {counts(dropped)}: train it longer; if its answers have no "
                             f"end, raise --max_new_tokens {config.max_new_tokens}; if they are "
                             "longer than the context, lower it")
        prompts = draw_prompts(min(config.sample_batch, count - len(rows)), rng)
        asked, unusable = sample_comparisons(policy, tokenizer, prompts, config.max_new_tokens,
                                             seed=rng.getrandbits(48))
        for reason, number in unusable.items():
            dropped[reason] = dropped.get(reason, 0) + number

        labels = judge(asked, rng)
        for (prompt, first, second), (choice, why) in zip(asked, labels):
            row = {"prompt": prompt, "chosen": first, "rejected": second}
            if choice == 1:
                row = {"prompt": prompt, "chosen": second, "rejected": first}
            if why:
                row["why"] = why
            rows.append(row)
        report(len(rows))
    return rows, dropped


def reward_model_judge(model, tokenizer, at_once=128):
    """A judge (data/judges.py) by Bradley-Terry on a reward model's scores, at_once in one forward
    pass: P(first) = σ(r(first) - r(second))."""
    def judge(asked, rng):
        if not asked:
            return []
        ids = []
        for prompt, first, second in asked:
            ids.append(tokenizer.prompt(prompt) + tokenizer.response(first))
            ids.append(tokenizer.prompt(prompt) + tokenizer.response(second))
        scores = score_all(model, ids, at_once)
        p_first = torch.sigmoid(scores[0::2] - scores[1::2])
        return [(int(rng.random() >= p), "") for p in p_first.tolist()]

    return judge


# --------------------------------------------------------------------------------------------------
# Step two: Bradley-Terry


def fit(model, pairs, held_out, config, rng, run):
    """Train a reward model on Pairs of ids by maximum likelihood, in place."""
    device = model.head.weight.device
    optimizer = make_optimizer(model, config.weight_decay)
    sizes = [max(len(pair.chosen), len(pair.rejected)) for pair in pairs]
    batches = batches_by_length(sizes, config.batch, rng, config.epochs)

    for step in run.steps(len(batches), model=model, optimizer=optimizer):
        batch = [pairs[i] for i in batches[step]]
        for start in range(0, len(batch), config.micro_batch):
            part = batch[start:start + config.micro_batch]
            sequences = [pair.chosen for pair in part] + [pair.rejected for pair in part]
            tokens, lengths = pad(sequences, device)
            chosen_rewards, rejected_rewards = model.score(tokens, lengths).chunk(2)

            loss = bradley_terry_loss(chosen_rewards, rejected_rewards)
            (loss * len(part) / len(batch)).backward()
            run.log(step, weight=len(part), loss=loss)

        lr = learning_rate(step, len(batches), config.lr, config.warmup)
        optimizer_step(optimizer, model, lr)
        if run.due(step):
            margin = held_out_margins(model, held_out, 4 * config.micro_batch)
            run.log(step, held_out_loss=-F.logsigmoid(margin).mean(),
                    held_out_accuracy=(margin > 0).float().mean())


def held_out_margins(model, pairs, at_once=128):
    """r(x, y_w) - r(x, y_l) of every Pair, at_once sequences in one forward pass: (N,). Callers
    take twice those of a micro-batch of pairs: without gradients they need less."""
    chosen = score_all(model, [pair.chosen for pair in pairs], at_once)
    rejected = score_all(model, [pair.rejected for pair in pairs], at_once)
    return chosen - rejected


def start_from(policy):
    """A new RewardModel: the SFT model with a linear head in place of the language model's."""
    model = RewardModel(policy.config).to(policy.wte.weight.device)
    model.trunk.load_state_dict(policy.state_dict())
    return model


def shift_to_zero(model, policy, tokenizer, prompts, config, samples=512):
    """Shift the rewards to mean 0 over the SFT policy's own responses to those of these prompts
    (texts) that leave room for one."""
    fitting, found = prompts_with_room(prompts, "the pairs", tokenizer, config.max_new_tokens,
                                       policy.config.block_size)
    if len(fitting) < len(prompts):
        print(f"shift over {found}")
    asked = random.Random(f"shift {config.seed}").choices(fitting, k=samples)
    prompt_ids = [tokenizer.prompt(prompt) for prompt in asked]
    with autocast(get_device()):
        rollout = generate(policy, prompt_ids, config.max_new_tokens, tokenizer.end_token,
                           seed=config.seed, at_once=config.sample_batch)
    sequences = []
    for ids, length in zip(rollout.tokens.tolist(), rollout.lengths.tolist()):
        sequences.append(ids[:length])  # without the padding
    scores = score_all(model, sequences, 4 * config.micro_batch)
    with torch.no_grad():
        model.head.bias -= scores.mean().to(model.head.bias.device)
    print(f"shifted by {-scores.mean():+.3f}: mean 0 over {samples} SFT samples, standard "
          f"deviation {scores.std():.3f}")


# --------------------------------------------------------------------------------------------------
# The stage


def train(config):
    """Collect or read pairs, train the reward model, save it to OUT/SIZE/reward_model."""
    if config.data:  # before any training
        users_pairs = hold_out(read_pairs(config.data), config.data)
    folder = stage_folder(config, "reward_model")
    judge = judge_of(config.judge, folder / "unfinished/labels.jsonl")
    train_missing(config, ["gpt", "sft"], "reward_model")
    device = get_device()
    sft_path = stage_folder(config, "sft") / "checkpoint.pt"
    policy, tokenizer, checkpoint = load_checkpoint(sft_path, "sft", config.size, device)
    if not config.data:
        refuse_own_text(sft_path, checkpoint)
    block_size = policy.config.block_size
    model = start_from(policy)
    origin = config.data or f"two SFT samples a request, compared by {config.judge}"
    announce("reward_model", config, device, origin, model)
    pieces = memory_of_pieces(model.config, 2 * config.micro_batch,
                              0 if config.data else 2 * config.sample_batch)
    show_models(("reward_model",), pieces, policy=policy, reward_model=model)
    if config.data:  # before anything is written
        data = encode_comparisons(users_pairs, config.data, tokenizer, block_size)
        prompts = [row["prompt"] for row in data.rows]
        prompts_with_room(prompts, config.data, tokenizer, config.max_new_tokens, block_size)

    with Run("reward_model", folder, config, config.report, [sft_path]) as run:
        # 1. Collect preferences: (x, y_w, y_l), y_w ≻ y_l.
        interrupted = (run.folder / "held_out.jsonl").exists()  # after this step
        if not config.data:
            if interrupted:
                comparisons = read_comparisons(run.folder)
            else:
                comparisons = collect(policy, tokenizer, judge, config)
            data = encode_comparisons(comparisons, "the collected pairs", tokenizer, block_size)
        print(f"pairs   {data.description}", flush=True)
        if not interrupted:
            write_jsonl(run.folder / "pairs.jsonl", data.rows)
            write_jsonl(run.folder / "held_out.jsonl", data.held_out_rows)

        # 2. Train by maximum likelihood.
        rng = random.Random(f"pairs' order {config.seed}")
        fit(model, data.pairs, data.held_out, config, rng, run)

        # 3. Shift to mean 0 over the SFT policy's own responses.
        prompts = [row["prompt"] for row in data.rows]
        shift_to_zero(model, policy, tokenizer, prompts, config)

        # 4. Compare with the answer key, if there is one. Save.
        margin = held_out_margins(model, data.held_out, 4 * config.micro_batch)
        if config.data:
            print(f"held-out accuracy {(margin > 0).float().mean():.3f}, "
                  f"loss {-F.logsigmoid(margin).mean():.3f}")
        else:
            figures, table = reward_model_figures(margin, gold_margins(data.held_out_rows))
            run.record(**figures)
            print_answer_key(figures, table)
        save_checkpoint(run.folder / "checkpoint.pt", "reward_model", config.size, model, tokenizer,
                        metrics=run.figures(), made_from=run.made_from())
        run.finish()

    for row in data.held_out_rows[:3]:
        prompt = row["prompt"]
        show(("prompt", prompt))
        for kind in ("chosen", "rejected"):
            ids = tokenizer.prompt(prompt) + tokenizer.response(row[kind])
            show((kind, scored(prompt, row[kind], score_all(model, [ids]).item())))
    print(f"saved {folder / 'checkpoint.pt'}; next: python ppo.py or python dpo.py", flush=True)


def collect(policy, tokenizer, judge, config):
    """(rows to train on, held-out rows): comparisons of new samples. No request is in both. Whoever
    the judge is, the annotator labels those held out: they are the answer key."""
    def draw_held_out(count, rng):
        return draw_requests(count, rng, held_out=True)

    rng = random.Random(f"pairs {config.seed} False")
    rows, dropped = collect_pairs(policy, tokenizer, draw_requests, config.pairs, judge, config,
                                  rng)
    print(f"        replaced {counts(dropped)}")

    rng = random.Random(f"pairs {config.seed} True")
    held_out, dropped = collect_pairs(policy, tokenizer, draw_held_out, config.held_out,
                                      annotator_judge, config, rng)
    print(f"        replaced {counts(dropped)}")
    print_agreement(rows)
    return rows, held_out


def stage_comparisons(config):
    """(rows, held-out rows) of the stage's own comparisons; a stage that is missing is trained,
    with this run's settings."""
    train_missing(config, ["gpt", "sft"], "reward_model")
    folder = stage_folder(config, "reward_model")
    if (folder / "checkpoint.pt").exists():
        refuse_stale(folder)
        # A run of --process that trained the stage first is resumed with its flags.
        unfinished = stage_folder(config, "process_model") / "unfinished"
        if not (config.resume and unfinished.exists()):
            refuse_flags(config, COLLECTING, f"{folder} has its comparisons already")
    else:
        stage = replace(config, learning_curve=False)
        stage.given = config.given
        train(stage)
    return read_comparisons(folder)


def learning_curve(config):
    """How many pairs does it take? Train a new reward model on the first 256, 512, ... pairs of
    --data, or of those that the stage collected, and print a row for each."""
    if config.data:
        split = hold_out(read_pairs(config.data), config.data)
    else:
        split = stage_comparisons(config)
    train_missing(config, ["gpt", "sft"], "reward_model")
    policy, tokenizer, _ = load_checkpoint(stage_folder(config, "sft") / "checkpoint.pt", "sft",
                                           config.size, get_device())
    origin = config.data or stage_folder(config, "reward_model") / "pairs.jsonl"
    data = encode_comparisons(split, origin, tokenizer, policy.config.block_size)
    world = all(stories.parse_request(row["prompt"]) for row in data.held_out_rows)
    head = "   pairs  held-out accuracy"
    if world:
        head += "  share of Bayes accuracy  above chance"
    print(f"pairs   {data.description}\n{head}", flush=True)

    for count in doublings(256, len(data.pairs)):
        model = start_from(policy)
        rng = random.Random(f"learning curve {config.seed}")
        fit(model, data.pairs[:count], data.held_out, config, rng, SilentRun())
        margin = held_out_margins(model, data.held_out, 4 * config.micro_batch)
        row = f"{(margin > 0).float().mean():17.3f}"
        if world:  # the true rewards are known
            x, _ = reward_model_figures(margin, gold_margins(data.held_out_rows))
            row = (f"{x['expected_accuracy']:9.3f} ± {x['expected_accuracy_error']:.3f}"
                   f"  {x['share_of_bayes']:14.1%} ± {x['share_of_bayes_error']:.1%}"
                   f"  {x['above_chance']:.1%} ± {x['above_chance_error']:.1%}")
        print(f"{count:8,d}  {row}", flush=True)


# --------------------------------------------------------------------------------------------------
# The process reward model: the same class, read at the last token of every sentence


def fit_process(model, responses, held_out, config, rng, run):
    """Train a process reward model on Marked responses, in place: a binary cross-entropy for every
    step, P(good) = σ(r) (Lightman et al. 2023)."""
    optimizer = make_optimizer(model, config.weight_decay)
    sizes = [len(response.ids) for response in responses]
    responses_in_batch = 2 * config.batch  # as many as there are in a batch of pairs
    batches = batches_by_length(sizes, responses_in_batch, rng, config.epochs)

    for step in run.steps(len(batches), model=model, optimizer=optimizer):
        batch = [responses[i] for i in batches[step]]
        marks_in_batch = sum(len(response.marks) for response in batch)
        for start in range(0, len(batch), 2 * config.micro_batch):
            part = batch[start:start + 2 * config.micro_batch]
            r, good = rewards_at_steps(model, part)
            loss = F.binary_cross_entropy_with_logits(r, good)  # -log P(mark), a mean over steps
            (loss * len(r) / marks_in_batch).backward()
            run.log(step, weight=len(r), loss=loss)

        lr = learning_rate(step, len(batches), config.lr, config.warmup)
        optimizer_step(optimizer, model, lr)
        if run.due(step):
            margin = step_margins(model, held_out, 4 * config.micro_batch)
            run.log(step, held_out_loss=-F.logsigmoid(margin).mean(),
                    held_out_accuracy=(margin > 0).float().mean())


def rewards_at_steps(model, responses):
    """(rewards, marks: 1.0 good or 0.0), both (N,), of all steps of Marked responses."""
    tokens, _ = pad([response.ids for response in responses], model.head.weight.device)
    rows = []
    ends = []
    marks = []
    for row, response in enumerate(responses):
        rows += [row] * len(response.ends)
        ends += response.ends
        marks += response.marks
    return model(tokens)[rows, ends], torch.tensor(marks, dtype=torch.float, device=tokens.device)


@torch.inference_mode()
def step_margins(model, responses, at_once=128):
    """The reward of every step, negated where it was marked bad: (N,)."""
    margins = []
    for start in range(0, len(responses), at_once):
        r, good = rewards_at_steps(model, responses[start:start + at_once])
        margins.append(torch.where(good > 0, r, -r).cpu())
    return torch.cat(margins)


@torch.inference_mode()
def step_rewards(model, rollout, tokenizer, at_once=128):
    """What a process reward model gives the steps of a Rollout, at_once in one forward pass:
    (rewards, steps), both (B, T-1). steps is true at the action that emits the last token of a
    sentence; rewards is 0 elsewhere."""
    steps = torch.zeros(rollout.tokens.shape, dtype=torch.bool)
    starts = rollout.prompt_lengths.tolist()
    for row, ids in enumerate(rollout.responses()):
        if ids[-1] == tokenizer.end_token:
            ids = ids[:-1]
        for end in step_ends(tokenizer.pieces(ids)):
            steps[row, starts[row] + end] = True
    steps = steps[:, 1:].to(rollout.tokens.device)
    values = torch.cat([model(tokens) for tokens in rollout.tokens.split(at_once)])  # (B, T)
    return torch.where(steps, values[:, 1:], 0.0), steps


def train_process(config):
    """Train a process reward model on the responses of the reward model's comparisons, each
    sentence marked by the annotator; save it to OUT/SIZE/process_model."""
    split = stage_comparisons(config)
    source = stage_folder(config, "reward_model")
    for row in split[0] + split[1]:
        if not stories.parse_request(row["prompt"]):
            raise InputError(f"{source / 'pairs.jsonl'}: the annotator marks answers to the little "
                             "world's requests only; --process is not for pairs of your own")
    sft_path = stage_folder(config, "sft") / "checkpoint.pt"
    sources = [sft_path, source / "pairs.jsonl", source / "held_out.jsonl"]
    device = get_device()
    policy, tokenizer, _ = load_checkpoint(sft_path, "sft", config.size, device)
    model = start_from(policy)
    announce("process_model", config, device, f"the responses of {source}, every sentence marked",
             model)

    rng = random.Random(f"marks {config.seed}")
    responses = mark(split[0], tokenizer, rng)
    held_out = mark(split[1], tokenizer, rng)
    steps = sum(len(response.marks) for response in responses)
    good = sum(sum(response.marks) for response in responses)
    print(f"steps   {steps:,} in {len(responses):,} responses, {good / steps:.1%} of them good",
          flush=True)

    folder = stage_folder(config, "process_model")
    with Run("process_model", folder, config, config.report, sources) as run:
        rng = random.Random(f"pairs' order {config.seed}")
        fit_process(model, responses, held_out, config, rng, run)

        true_margins = []
        for response in held_out:
            for reward, is_good in zip(response.steps, response.marks):
                true_margins.append(reward if is_good else -reward)
        margin = step_margins(model, held_out, 4 * config.micro_batch)
        figures, table = reward_model_figures(margin, torch.tensor(true_margins))
        run.record(**figures)
        print_answer_key(figures, table)
        save_checkpoint(run.folder / "checkpoint.pt", "process_model", config.size, model,
                        tokenizer, metrics=run.figures(), made_from=run.made_from())
        run.finish()
    print(f"saved {folder / 'checkpoint.pt'}; next: python best_of_n.py --process", flush=True)


# --------------------------------------------------------------------------------------------------
# What ppo.py --reward names


def load_reward_model(config, tokenizer):
    """(the model of --reward reward_model or process, its file). InputError if it reads other
    tokens than the policy's tokenizer makes."""
    stage = "process_model" if config.reward == "process" else "reward_model"
    path = stage_folder(config, stage) / "checkpoint.pt"
    model, found, _ = load_checkpoint(path, stage, config.size, get_device(), RewardModel)
    refuse_other_tokens(path, found, tokenizer)
    return model, path


def make_reward(name, model, tokenizer, micro_batch):
    """The reward of this name as a function: rollout -> (scores (B,) of whole responses, rewards
    (B, T-1) of single actions). model: the reward model or process model, None for others."""
    texts = None
    if model is None:
        texts = TextReward(reward_of(name), tokenizer)

    @torch.inference_mode()
    def reward(rollout):
        device = rollout.tokens.device
        scores = torch.zeros(len(rollout.tokens), device=device)
        token_rewards = torch.zeros(rollout.tokens[:, 1:].shape, device=device)
        if texts:
            scores = texts.score(rollout.tokens, rollout.lengths)
        elif name == "process":
            token_rewards, _ = step_rewards(model, rollout, tokenizer, micro_batch)
        else:
            for part in rollout.lengths.argsort().split(micro_batch):  # little padding
                T = int(rollout.lengths[part].max())
                scores[part] = model.score(rollout.tokens[part, :T], rollout.lengths[part])
        return scores, token_rewards

    return reward


# --------------------------------------------------------------------------------------------------
# One example, for --explain


def explain(config):
    """Print what the model gives a held-out pair, or --response to --prompt, sentence by sentence,
    beside the annotator's truth."""
    flags = ("process", "prompt", "response", "size", "out")
    if config.process or not config.prompt:
        flags += ("seed",)  # which pair; the annotator's marks
    allow_flags(config, flags, "explain")
    stage = "process_model" if config.process else "reward_model"
    path = stage_folder(config, stage) / "checkpoint.pt"
    complete(path.parent)
    refuse_stale(path.parent)
    model, tokenizer, _ = load_checkpoint(path, stage, config.size, get_device(), RewardModel)

    rng = random.Random(f"pair {config.seed}")
    prompt = config.prompt
    texts = {"response": config.response}
    if not prompt:
        _, held_out = read_comparisons(stage_folder(config, "reward_model"))
        row = rng.choice(held_out)
        prompt = row["prompt"]
        texts = {"chosen": row["chosen"], "rejected": row["rejected"]}
    encoded = [encode_steps(prompt, text, tokenizer) for text in texts.values()]
    tokens, lengths = pad([ids for ids, _ in encoded], get_device())  # (1 or 2, T)
    if tokens.shape[1] > model.config.block_size:
        raise InputError(f"--prompt and --response: {tokens.shape[1]} tokens exceed the context of "
                         f"{model.config.block_size}")

    show(("prompt", prompt))
    with torch.inference_mode():
        values = model(tokens).cpu()  # (1 or 2, T): the number at every token
        r = model.score(tokens, lengths).cpu()  # (1 or 2,): the one at <|end|>
    for i, (kind, text) in enumerate(texts.items()):
        _, ends = encoded[i]
        if config.process:
            explain_steps(prompt, kind, text, values[i, ends], tokenizer, rng)
        else:
            explain_score(prompt, kind, text, [*values[i, ends].tolist(), r[i].item()])
    if not config.process:
        explain_rubric(prompt, texts, r)


def lines_of(text):
    """The sentences of a text, each on one line."""
    return [" ".join(sentence.split()) for sentence in stories.split_sentences(text)]


def explain_score(prompt, kind, text, r):
    """r_φ, and gold if it is known, of a response as far as it is written: at the end of each
    sentence and, the last of r, at <|end|>."""
    sentences = stories.split_sentences(text)
    columns = [Column(kind, [*lines_of(text), "<|end|>"]), Column("r_φ", r, ".3f", signed=True)]
    if stories.parse_request(prompt):
        gold = [gold_reward(prompt, " ".join(sentences[:k + 1])) for k in range(len(sentences))]
        columns.append(Column("gold", [*gold, gold_reward(prompt, text)], ".3f", signed=True))
    print()
    print_columns(columns)


def explain_rubric(prompt, texts, r):
    """r_φ(x, y) beside the annotator's rubric part by part; of a pair also σ(Δr) and the loss."""
    quantities = {}  # name -> a number for each text
    if stories.parse_request(prompt):
        rubrics = [rubric(prompt, text) for text in texts.values()]
        for part in rubrics[0]:
            quantities[part] = [parts[part] for parts in rubrics]
        quantities["gold"] = [gold_reward(prompt, text) for text in texts.values()]
    quantities["r_φ"] = r.tolist()

    columns = [Column("", list(quantities))]
    for i, kind in enumerate(texts):
        numbers = [row[i] for row in quantities.values()]
        columns.append(Column(kind, numbers, ".3f", signed=True))
    if len(texts) == 2:
        margins = [chosen - rejected for chosen, rejected in quantities.values()]
        columns.append(Column("Δ", margins, ".3f", signed=True))
    print()
    print_columns(columns, [
        'r_φ(x, y) is the one at <|end|>, the only one that is trained: ECE 7115, "Reward Model',
        'Training" (RewardModel.score). Its mean over SFT samples is 0; only differences count.'])
    if "gold" in quantities:
        print("gold, so far or of the whole response: the sum of the parts (rubric in "
              "data/annotator.py)")
    else:
        print("no gold: the prompt is not one of the little world's requests")
    if len(texts) == 1:
        return
    print()
    for name, meaning in (("r_φ", "P(y_w ≻ y_l | x), L_RM: CS 224R, ch. 6 (bradley_terry_loss)"),
                          ("gold", "how often the annotator, noisy as it is, prefers y_w")):
        if name in quantities:
            chosen, rejected = torch.tensor(quantities[name]).split(1)
            print(f"σ(Δ{name}) = {(chosen - rejected).sigmoid().item():.3f}, -log σ(Δ{name}) = "
                  f"{bradley_terry_loss(chosen, rejected):.3f}: {meaning}")


def explain_steps(prompt, kind, text, r, tokenizer, rng):
    """Process rewards r (N,) of a response's N sentences, beside what each really adds to gold, and
    a mark of the annotator, if the prompt is the world's."""
    columns = [Column(kind, lines_of(text)),
               Column("r_φ", r.tolist(), ".3f", signed=True),
               Column("σ(r_φ)", r.sigmoid().tolist(), ".3f")]
    if stories.parse_request(prompt):
        marked = mark_response(prompt, text, tokenizer, rng)
        true_steps = torch.tensor(marked.steps)
        good = torch.tensor(marked.marks, dtype=torch.float)
        losses = F.binary_cross_entropy_with_logits(r, good, reduction="none")
        columns += [Column("Δgold", marked.steps, ".3f", signed=True),
                    Column("σ(Δgold)", true_steps.sigmoid().tolist(), ".3f"),
                    Column("mark", ["good" if x else "bad" for x in marked.marks]),
                    Column("-log P", losses.tolist(), ".3f")]
    print()
    print_columns(columns)
    if stories.parse_request(prompt):
        print(f"Σ Δgold = {true_steps.sum():.3f} = gold - gold of no text = "
              f"{gold_reward(prompt, text):.3f} - ({gold_reward(prompt, ''):.3f}); mean -log P = "
              f"{losses.mean():.3f}")
    if kind != "chosen":  # below the last table
        print("σ(r_φ) = P(the sentence is marked good), read at its last token (rewards_at_steps)")
        if stories.parse_request(prompt):
            print("Δgold: what the sentence adds to gold. The annotator marks it good with "
                  "probability σ(Δgold);\n-log P: of its mark, the loss (fit_process): CS 224R, "
                  "Lecture 9, ch. 11")


def main(argv=None):
    config = parse_config(Config, GPU, argv,
                          "Collect preferences and train a Bradley-Terry reward model on them.",
                          needs={"process": ("data", ""), "prompt": ("response",),
                                 "response": ("prompt",)},
                          presets={"size": {"gpt2": GPT2}})
    if config.explain or config.prompt:
        explain(config)
        return
    if config.data:
        unused = COLLECTING if config.learning_curve else ("judge", "pairs", "held_out")
        refuse_flags(config, unused, "compares nothing where --data has the pairs")
    if config.process and config.learning_curve:
        raise InputError("--learning_curve True: is a curve of pairs, but --process trains on "
                         "steps")
    if config.learning_curve:
        refuse_flags(config, ("resume",), "cannot be used with --learning_curve")
    if config.process:
        train_process(config)
    elif config.learning_curve:
        learning_curve(config)
    else:
        train(config)


if __name__ == "__main__":
    run_script(main)
