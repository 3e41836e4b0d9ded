"""
sft.py: stage 2, supervised fine-tuning (instruction finetuning; CS 224R, Lecture 9, ch. 4;
ECE 7115, step 1/3).

    max_θ  E_{(x,y)~D} [ Σ_t log π_θ(y_t | x, y_<t) ]

The same loss as in pretraining on other data: demonstrations of someone answering. Only the
response's tokens count, and <|end|> is one of them: a model that is not taught <|end|> never stops
talking.

    python sft.py                       fine-tune on demonstrations of the little world
    python sft.py --data FILE.jsonl     on your own: {"prompt", "completion"}, or pairs, whose
                                        "chosen" is taken
    python sft.py --base gpt-curated    start from a base model after mid-training (gpt.py --start)
    python sft.py --learning_curve      how many demonstrations it takes
    python sft.py --prompt "…"          answer a prompt
    python sft.py --explain             a held-out demonstration: the mask, -log π before and after

Departure from the slides: the loss is the sum over a batch's response tokens, divided by the mean
number of them in a batch of this training. So the learning rate does not depend on how long
people's answers are, and every token counts equally.
"""

import copy
import math
import random
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from data import stories
from data.annotator import answers, gold_rewards, scored
from data.answer_key import standard_error
from data.corpus import draw_demonstrations, draw_requests, has_room
from data.files import (InputError, checksum, hold_out, read_demonstrations, read_prompts,
                        refuse_changed, run_script)
from data.run import (Run, SilentRun, allow_flags, announce, check_name, complete, doublings,
                      kind_of_policy, parse_config, refuse_flags, refuse_stale, show, show_models,
                      stage_folder, train_missing, with_error)
from data.table import Column, print_columns
from data.tokenizer import encode_demonstrations, remarks
from gpt import (autocast, batches_by_length, excess, generate, get_device, held_out_loss,
                 learning_rate, load_checkpoint, make_optimizer, masked_logprobs, memory_of_pieces,
                 optimizer_step, pad, respond, response_mask, response_texts, save_checkpoint)


@dataclass
class Config:
    # what to train on
    data: str = ""              # your own demonstrations, a .jsonl file, instead of the world's
    base: str = "gpt"           # the base model's folder, OUT/SIZE/BASE: a --name of gpt.py
    demonstrations: int = 12288     # how many the world's writers give

    # optimization
    epochs: int = 1             # passes over the demonstrations
    batch: int = 32             # demonstrations in a step
    micro_batch: int = 32       # demonstrations in one forward pass; less memory, the same gradient
    lr: float = 2e-3            # peak learning rate (linear warm-up, cosine to zero)
    warmup: int = 10            # steps of warm-up
    weight_decay: float = 0.1   # AdamW's, on matrices only

    # sampling
    max_new_tokens: int = 96    # the longest sampled response
    questions: int = 200        # held-out requests put to the model before and after
    sample_batch: int = 256     # questions in one batch of sampling
    prompt: str = ""            # answer this prompt with the fine-tuned model, and stop
    temperature: float = 1.0    # of the answer to --prompt
    top_k: int = 0              # the answer to --prompt draws from the k likeliest tokens; 0: all

    # this run
    size: Literal["auto", "cpu", "gpu", "gpt2"] = "auto"    # auto: gpu if there is one; gpt2: see
                                                            # data/huggingface.py
    out: str = "out"            # folder of all outputs; this stage writes to OUT/SIZE/sft
    seed: int = 1               # fixes data and samples
    report: int = 64            # steps between two reports, and between two saves of the state
    resume: bool = False        # continue the run that was interrupted in this folder
    learning_curve: bool = False    # figures by number of demonstrations, from the base model each
                                    # time; saves nothing
    explain: bool = False       # print a held-out demonstration with its mask and -log π of every
                                # token, before and after, and stop


GPU = dict(demonstrations=65536, batch=128, micro_batch=128, lr=3e-4, max_new_tokens=128)
# batch: Stiennon et al. 2020, appendix B; lr: the default of TRL's SFTTrainer
GPT2 = dict(batch=128, micro_batch=8, lr=2e-5, max_new_tokens=128, sample_batch=128, report=16)


def default_lr(size):
    """The learning rate of SFT at this size, for what learns to answer elsewhere (ORPO)."""
    return {"cpu": Config.lr, "gpu": GPU["lr"], "gpt2": GPT2["lr"]}[size]


def response_tokens(demonstrations):
    """How many tokens the responses have, <|end|> included."""
    return sum(len(one.ids) - one.prompt_length for one in demonstrations)


def mean_tokens(demonstrations, batch):
    """The mean number of response tokens in a batch of these demonstrations."""
    return response_tokens(demonstrations) / math.ceil(len(demonstrations) / batch)


def fine_tune(model, demonstrations, held_out, entropy, config, rng, run):
    """Supervised fine-tuning, in place.

    demonstrations, held_out: lists of Demonstration (held_out may be empty); entropy: the source's
    own, in nats per held-out response token (None: unknown).
    """
    device = model.wte.weight.device
    optimizer = make_optimizer(model, config.weight_decay)
    sizes = [len(one.ids) for one in demonstrations]
    batches = batches_by_length(sizes, config.batch, rng, config.epochs)

    # Every batch is divided by the same number. By its own number of tokens, a token of a batch of
    # short responses would count more than one of a batch of long ones.
    tokens_per_batch = mean_tokens(demonstrations, config.batch)

    for step in run.steps(len(batches), model=model, optimizer=optimizer):
        batch = [demonstrations[i] for i in batches[step]]
        for start in range(0, len(batch), config.micro_batch):
            part = batch[start:start + config.micro_batch]
            tokens, lengths = pad([one.ids for one in part], device)  # (B, T)
            prompt_lengths = torch.tensor([one.prompt_length for one in part], device=device)
            mask = response_mask(prompt_lengths, lengths, tokens.shape[1])  # (B, T-1)

            loss = -masked_logprobs(model, tokens, mask).sum()  # -Σ_t log π_θ(y_t | x, y_<t)
            (loss / tokens_per_batch).backward()
            run.log(step, weight=mask.sum(), loss=loss / mask.sum())  # nats a token

        lr = learning_rate(step, len(batches), config.lr, config.warmup)
        norm = optimizer_step(optimizer, model, lr)
        if run.due(step):
            if held_out:
                run.log(step, **held_out_figures(model, held_out, entropy, config.micro_batch))
            run.log(step, grad_norm=norm)


def held_out_figures(model, held_out, entropy, at_once):
    """Nats per response token of held-out Demonstrations, at_once of them in one forward pass,
    beside their source's entropy."""
    ids = [one.ids for one in held_out]
    loss = held_out_loss(model, ids, [one.prompt_length for one in held_out], at_once)
    return dict(held_out=loss, **excess(loss, entropy))


# --------------------------------------------------------------------------------------------------
# The stage


class Data(NamedTuple):
    """What the stage reads."""
    demonstrations: list        # to train on
    held_out: list
    questions: list             # held-out prompts that leave room for an answer
    entropy: float | None       # the world's own in nats per held-out response token; None: unknown
    description: str


def read_data(config, split, tokenizer, block_size):
    """The Data of a user's rows, split = (to train on, held out), or of the little world (None)."""
    logprobs = None
    if split is None:
        rng = random.Random(f"demonstrations {config.seed}")
        rows, _ = draw_demonstrations(rng, config.demonstrations)
        rng = random.Random("held-out demonstrations")
        held_out_rows, logprobs = draw_demonstrations(rng, 500, held_out=True)
    else:
        rows, held_out_rows = split
    demonstrations, dropped = encode_demonstrations(rows, tokenizer, block_size)
    held_out, held_out_dropped = encode_demonstrations(held_out_rows, tokenizer, block_size)

    origin = config.data or "the little world"
    if split is None and held_out_dropped:
        raise InputError(f"the context of {block_size} tokens is too short for the little world's "
                         "stories: pretrain with a larger --block_size")
    dropped += held_out_dropped
    if not demonstrations or not held_out:
        what = "hold out" if demonstrations else "train on"
        raise InputError(f"{origin}: no demonstration is left to {what}: {dropped} exceed the "
                         f"context of {block_size} tokens")
    entropy = None
    if logprobs:
        entropy = -sum(logprobs) / response_tokens(held_out)

    questions = []
    for row in held_out_rows:  # a longer prompt is trained on, but leaves no room for a sample
        if has_room(row["prompt"], tokenizer, config.max_new_tokens, block_size):
            questions.append(row["prompt"])
    description = (f"{origin}: {len(demonstrations):,} demonstrations, {len(held_out)} held out; "
                   f"dropped {dropped} longer than the context")
    without_room = len(held_out_rows) - len(questions)
    if split is None and not questions:
        raise InputError(f"{origin}: no request leaves room for --max_new_tokens "
                         f"{config.max_new_tokens} in the context of {block_size}; lower it")
    if without_room:
        description += (f"; {without_room} held-out prompts are not asked, as they leave no room "
                        f"for --max_new_tokens {config.max_new_tokens}")
    description += remarks(rows + held_out_rows)
    return Data(demonstrations, held_out, questions[:config.questions], entropy, description)


def train(config):
    """Fine-tune the base model and save it to OUT/SIZE/sft/checkpoint.pt."""
    # Read the user's file first, so that a bad one fails before any training.
    split = None
    data_checksum = None
    if config.data:
        split = hold_out(read_demonstrations(config.data), config.data, read_prompts(config.data))
        data_checksum = checksum(config.data)
    check_name(config.base, "gpt", "base")
    complete(stage_folder(config, config.base))
    refuse_stale(stage_folder(config, config.base))
    train_missing(config, ["gpt"] if config.base == "gpt" else [], "sft")
    device = get_device()
    base_path = stage_folder(config, config.base) / "checkpoint.pt"
    model, tokenizer, base = load_checkpoint(base_path, "gpt", config.size, device)

    # 1. Demonstrations: prompts and the answers that someone wrote. What is held out.
    data = read_data(config, split, tokenizer, model.config.block_size)
    if config.learning_curve:
        learning_curve(model, tokenizer, data, config)
        return
    announce("sft", config, device, data.description, model)
    pieces = memory_of_pieces(model.config, config.micro_batch, config.sample_batch)
    show_models(("policy",), pieces, policy=model)

    # A base model has never seen the chat format: it is asked in plain text, a line on a page.
    start = [] if base["text"] else [tokenizer.end_token]
    plain = [start + tokenizer.encode(question + "\n") for question in data.questions]
    before = ask(model, tokenizer, plain, config)

    # 2. Next-token prediction on the responses.
    rng = random.Random(f"demonstrations' order {config.seed}")
    folder = stage_folder(config, "sft")
    with Run("sft", folder, config, config.report, [base_path]) as run:
        fine_tune(model, data.demonstrations, data.held_out, data.entropy, config, rng, run)

        # 3. Save; the same questions before and after.
        chat = [tokenizer.prompt(question) for question in data.questions]
        after = ask(model, tokenizer, chat, config)
        if not config.data:
            record_answers(run, before, after)
        own_text = base["text"] or base.get("loaded", "")
        save_checkpoint(run.folder / "checkpoint.pt", "sft", config.size, model, tokenizer,
                        metrics=run.figures(), made_from=run.made_from(), own_text=own_text,
                        base=config.base, data=config.data, data_checksum=data_checksum,
                        demonstrations=len(data.demonstrations), batch=config.batch,
                        tokens_per_batch=mean_tokens(data.demonstrations, config.batch))
        run.finish()
    base_texts, _ = before
    texts, _ = after
    for i, question in enumerate(data.questions[:3]):
        show(("prompt", question), ("before", scored(question, base_texts[i])),
             ("after", scored(question, texts[i])))
    print(f"saved {folder / 'checkpoint.pt'}; next: python reward_model.py", flush=True)


def ask(model, tokenizer, prompts, config):
    """(texts, ended) of a response to each prompt, lists of ids; there may be none."""
    if not prompts:
        return [], []
    return respond(model, tokenizer, prompts, config.max_new_tokens, config.seed,
                   at_once=config.sample_batch)


def record_answers(run, before, after):
    """Print and record how many of the little world's requests got a story, before and after."""
    base_told, base_flawless = answers(*before)
    told, flawless = answers(*after)
    run.record(base_answers=base_told, answers=told, base_flawless=base_flawless, flawless=flawless)
    count = len(after[0])
    print(f"answers {count} held-out requests with a story: base model "
          f"{with_error(base_told, count)}, SFT {with_error(told, count)}; with a flawless one: "
          f"{with_error(base_flawless, count)}, {with_error(flawless, count)}")


def learning_curve(model, tokenizer, data, config):
    """How many demonstrations does it take? Fine-tune the base model on the first 512, 1,024, ...,
    and print a row for each."""
    head = "demonstrations  held out, nats a token"
    if data.entropy:
        head += "  excess  answers with a story  with a flawless one"
    print(f"data    {data.description}\n{head}", flush=True)
    base = copy.deepcopy(model.state_dict())
    for count in doublings(512, len(data.demonstrations)):
        model.load_state_dict(base)
        rng = random.Random(f"demonstrations' order {config.seed}")
        run = SilentRun()
        fine_tune(model, data.demonstrations[:count], data.held_out, data.entropy, config, rng, run)
        figures = run.rows[-1]
        row = f"{count:14,d}  {figures['held_out']:22.3f}"
        if data.entropy:
            chat = [tokenizer.prompt(question) for question in data.questions]
            told, flawless = answers(*ask(model, tokenizer, chat, config))
            row += (f"  {figures['excess']:6.1%}  {with_error(told, len(chat)):>20s}"
                    f"  {with_error(flawless, len(chat)):>20s}")
        print(row, flush=True)


# --------------------------------------------------------------------------------------------------
# Talking to a policy, for every stage from here on


def refuse_own_text(path, checkpoint):
    """InputError where the little world's requests would be put to an SFT model of another text."""
    if checkpoint.get("own_text"):
        raise InputError(f"{path}: comes from {checkpoint['own_text']}, not from the little world; "
                         "give its prompts with --data FILE.jsonl")


def answer(config, stage, name):
    """Print the answer of a stage's policy to config.prompt. name: its folder, OUT/SIZE/NAME.

    config.temperature multiplies the policy's own: 1 is the policy itself, 0.5 sharpens it.
    """
    allow_flags(config, ("name", "temperature", "top_k", "max_new_tokens", "seed", "size", "out"),
                "prompt")
    check_name(name, stage)
    complete(stage_folder(config, name))
    path = stage_folder(config, name) / "checkpoint.pt"
    policy, tokenizer, checkpoint = load_checkpoint(path, stage, config.size, get_device())
    temperature = config.temperature * checkpoint.get("temperature", 1.0)
    texts, _ = respond(policy, tokenizer, [tokenizer.prompt(config.prompt)], config.max_new_tokens,
                       config.seed, temperature, config.top_k or None)
    print(texts[0])


def load_policy(config, temperature=1.0):
    """(the policy of --start, its tokenizer, its checkpoint), for a run of ppo.py or dpo.py that
    goes on from it. temperature: of the training. InputError if it cannot go on here."""
    stage = kind_of_policy(config.start)
    if not stage or config.start == config.name:
        raise InputError(f"--start {config.start}: must be the --name of a run of ppo.py, dpo.py "
                         f"or RSFT, and not this run's own, {config.name}")
    path = stage_folder(config, config.start) / "checkpoint.pt"
    complete(path.parent)
    refuse_stale(path.parent)
    policy, tokenizer, checkpoint = load_checkpoint(path, stage, config.size, get_device())
    trained = checkpoint.get("temperature", 1.0)
    if trained != temperature:
        raise InputError(f"--start {config.start}: was trained with --temperature {trained}, not "
                         f"{temperature}")
    return policy, tokenizer, checkpoint


def show_before_and_after(prompts, before, after, tokenizer, config, reward=None, temperature=1.0,
                          missing_end_score=None):
    """Two policies answer the same prompts (None: 33 held-out requests of the world) with one seed,
    the second one at the temperature at which it was trained. Prints the mean scores of both, and
    both texts for the prompt with the median gain, in gold if it is known, else in reward.

    reward: a function of a rollout, see reward_model.make_reward, or None. missing_end_score: what
    a response without <|end|> gets instead, or None.
    """
    if prompts is None:
        prompts = draw_requests(33, random.Random("before and after"), held_out=True)
    block_size = after.config.block_size
    prompts = [prompt for prompt in prompts
               if has_room(prompt, tokenizer, config.max_new_tokens, block_size)][:33]
    if not prompts:
        return
    world = all(stories.parse_request(prompt) for prompt in prompts)
    old = scored_answers(prompts, before, tokenizer, config, reward, 1.0, missing_end_score, world)
    new = scored_answers(prompts, after, tokenizer, config, reward, temperature, missing_end_score,
                         world)

    means = []
    gains = torch.zeros(len(prompts))
    for name in ("reward", "gold"):  # gold last: where it is known, its gains choose the prompt
        if name in new:
            gains = new[name] - old[name]
            means.append(f"{name} {old[name].mean():.2f} → {new[name].mean():.2f} "
                         f"(± {standard_error(gains):.2f})")
    line = f"before and after on {len(prompts)} held-out prompts"
    if means:
        line += ": " + "; ".join(means)
    print(line)
    median = gains.argsort(stable=True)[len(gains) // 2].item()
    show(("prompt", prompts[median]))
    for label, found in (("before", old), ("after", new)):
        score = found["reward"][median] if reward else None
        show((label, scored(prompts[median], found["texts"][median], score)))


def scored_answers(prompts, policy, tokenizer, config, reward, temperature, missing_end_score,
                   world):
    """{"texts": a policy's answers, "reward": (N,) if there is one, "gold": (N,) if the prompts are
    the world's}."""
    ids = [tokenizer.prompt(prompt) for prompt in prompts]
    found = {}
    with autocast(get_device()):
        rollout = generate(policy, ids, config.max_new_tokens, tokenizer.end_token, temperature,
                           seed=config.seed, at_once=config.sample_batch)
    if reward:
        scores, token_rewards = reward(rollout)
        R = scores + token_rewards.sum(dim=1)
        if missing_end_score is not None:
            R = torch.where(rollout.ended(tokenizer.end_token), R, missing_end_score)
        found["reward"] = R.cpu()
    found["texts"] = response_texts(rollout, tokenizer)
    if world:
        found["gold"] = gold_rewards(rollout, tokenizer)
    return found


def explain(config):
    """Print a held-out demonstration, token by token: the mask, and -log π before (the base model)
    and after (SFT)."""
    allow_flags(config, ("seed", "size", "out"), "explain")
    path = stage_folder(config, "sft") / "checkpoint.pt"
    complete(path.parent)
    refuse_stale(path.parent)
    policy, tokenizer, checkpoint = load_checkpoint(path, "sft", config.size, get_device())
    if "base" not in checkpoint:
        raise InputError(f"{path}: does not say how it was trained; train it again with sft.py")
    base_path = stage_folder(config, checkpoint["base"]) / "checkpoint.pt"
    base, _, _ = load_checkpoint(base_path, "gpt", config.size, get_device())

    # The demonstrations that training has never seen; one of them.
    if checkpoint["data"]:
        own = checkpoint["data"]
        refuse_changed(own, checkpoint.get("data_checksum"), path)
        _, rows = hold_out(read_demonstrations(own), own, read_prompts(own))
    else:
        rows, _ = draw_demonstrations(random.Random("held-out demonstrations"), 500, held_out=True)
    demonstrations, _ = encode_demonstrations(rows, tokenizer, policy.config.block_size)
    one = random.Random(f"demonstration {config.seed}").choice(demonstrations)
    prompt = tokenizer.decode(one.ids[1:one.prompt_length - 1])
    response = tokenizer.decode(one.ids[one.prompt_length:-1])
    show(("prompt", prompt), ("response", response))

    tokens, lengths = pad([one.ids], get_device())  # (1, T)
    mask = response_mask(torch.tensor([one.prompt_length], device=tokens.device), lengths,
                         tokens.shape[1])  # (1, T-1)
    everywhere = torch.ones_like(mask)
    with torch.inference_mode():
        before = -masked_logprobs(base, tokens, everywhere)  # (1, T-1)
        after = -masked_logprobs(policy, tokens, everywhere)
    print_columns(
        [Column("token", tokenizer.shown(one.ids[1:])),
         Column("mask", mask[0].int().tolist(), "d"),
         Column("-log π before", before[0].tolist(), ".3f"),
         Column("after", after[0].tolist(), ".3f"),
         Column("gained", (before - after)[0].tolist(), ".3f", signed=True)],
        ["-log π_θ(y_t | x, y_<t) of the base model and after SFT, nats; it counts where the mask",
         "is 1: CS 224R, Lecture 9, ch. 4 (response_mask, masked_logprobs). Nothing trains the",
         "prompt's tokens, which may get less likely."])

    n = int(mask.sum())
    print(f"Σ over the mask: {before[mask].sum():.3f} → {after[mask].sum():.3f} nats over {n} "
          f"tokens, {before[mask].mean():.4f} → {after[mask].mean():.4f} a token")
    if not checkpoint["data"]:
        log_p = stories.log_probability(prompt, response)
        print(f"-log p(y|x) = {-log_p:.3f} nats, the source's own, {-log_p / n:.4f} a token")
    print(f"In training {checkpoint['batch']} such sums are added and divided by "
          f"{checkpoint['tokens_per_batch']:.1f}, the mean number of tokens in a batch")


def main(argv=None):
    config = parse_config(Config, GPU, argv, "Fine-tune the base model on demonstrations.",
                          needs={"temperature": ("prompt",), "top_k": ("prompt",)},
                          presets={"size": {"gpt2": GPT2}})
    if config.explain:
        explain(config)
    elif config.prompt:
        answer(config, "sft", "sft")
    else:
        if config.data:
            refuse_flags(config, ("demonstrations",), "is of the little world; leave out --data")
        if config.learning_curve:
            refuse_flags(config, ("resume",), "cannot be used with --learning_curve")
        train(config)


if __name__ == "__main__":
    run_script(main)
