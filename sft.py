"""
sft.py: stage 2, supervised fine-tuning (instruction finetuning; CS 224R, Lecture 9, ch. 4; ECE 7115, step 1/3).

    max_θ E_{(x,y)~D} [ Σ_t log π_θ(y_t | x, y_<t) ]

The same loss as pretraining on other data: demonstrations of somebody answering. Only the response's tokens count,
and <|end|> is one of them: a model that is not taught <|end|> never stops talking.

    python sft.py                       fine-tune on demonstrations of the little world
    python sft.py --data FILE.jsonl     on your own: {"prompt", "completion"}, or pairs, whose "chosen" is taken
    python sft.py --base gpt-curated    start from a base model after mid-training (gpt.py --start)
    python sft.py --learning_curve      how many demonstrations it takes
    python sft.py --prompt "…"          answer a prompt

Departure from the slides: the loss is the sum over a batch's response tokens, divided by the mean number of them in a
batch of the whole training: the learning rate does not depend on how long people's answers are, and every token counts
alike.
"""

import copy
import math
import random
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

import gpt
from data import stories
from data.annotator import answers, gold_rewards, scored, standard_error
from data.files import InputError, hold_out, read_demonstrations, run_script
from data.run import (Run, announce, check_name, complete, doublings, parse_config, restore, show, stage_folder,
                      train_missing, with_error)
from gpt import (autocast, batches_by_length, excess, generate, get_device, held_out_loss, learning_rate, load_checkpoint,
                 make_optimizer, masked_logprobs, optimizer_step, pad, respond, response_mask, response_texts,
                 save_checkpoint)

EARLIER = {"gpt": gpt.main}  # the stages that this one builds on


@dataclass
class Config:
    size: Literal["auto", "cpu", "gpu", "gpt2"] = "auto"    # auto takes gpu where there is one; gpt2: of gpt.py --load
    out: str = "out"            # folder of all outputs; this stage writes to OUT/SIZE/sft
    base: str = "gpt"           # the base model's folder, OUT/SIZE/BASE: the --name of a run of gpt.py
    seed: int = 1               # fixes data and samples
    data: str = ""              # your own demonstrations, a .jsonl file, instead of the little world's
    prompt: str = ""            # answer this prompt with the fine-tuned model, and stop
    temperature: float = 1.0    # of the answer to --prompt
    top_k: int = 0              # the answer to --prompt draws from the k likeliest tokens only; 0: from all
    demonstrations: int = 12288     # how many the world's writers give (one epoch)
    epochs: int = 1             # passes over the demonstrations
    batch: int = 32             # demonstrations in a step
    micro_batch: int = 32       # demonstrations in one forward pass; less memory, the same gradient
    lr: float = 2e-3            # peak learning rate (linear warm-up, cosine to zero)
    warmup: int = 10            # steps of warm-up
    weight_decay: float = 0.1   # AdamW's, on matrices only
    max_new_tokens: int = 96    # the longest sampled response
    questions: int = 200        # held-out requests put to the model before and after
    report: int = 64            # steps between two reports; the state for --resume is saved as often
    resume: bool = False        # go on with the run that was interrupted in this folder
    learning_curve: bool = False    # figures by number of demonstrations, from the base model each time; saves nothing


GPU = dict(demonstrations=65536, batch=128, micro_batch=128, lr=3e-4, max_new_tokens=128)
# batch: Stiennon et al. 2020, appendix B; lr: the default of TRL's SFTTrainer
PRESETS = {"size": {"gpt2": dict(batch=128, micro_batch=8, lr=2e-5, max_new_tokens=128, report=16)}}


def backward(model, sequences, prompt_lengths, tokens_per_batch, micro_batch):
    """Accumulate the gradient of the SFT loss of one batch, micro_batch sequences at a time. Returns the loss.

    sequences: lists of ids (prompt + response + <|end|>). The loss is -1/N Σ log π_θ(y_t | x, y_<t) over the response
    tokens of the whole batch, with N = tokens_per_batch, the mean number of them in a batch of this training: a token
    counts alike in whichever batch and micro-batch it stands. (A mean of the micro-batches' means, or of each batch of
    its own, would weigh a token of a short response more, because rows of one length stand in one batch.)
    """
    device = model.wte.weight.device
    total_loss = 0.0
    for start in range(0, len(sequences), micro_batch):
        tokens, lengths = pad(sequences[start:start + micro_batch], device)
        mask = response_mask(torch.tensor(prompt_lengths[start:start + micro_batch], device=device), lengths,
                             tokens.shape[1])
        loss = -masked_logprobs(model, tokens, mask).sum() / tokens_per_batch  # CS 224R, ch. 4
        loss.backward()
        total_loss += loss.detach()
    return total_loss


def fit(model, sequences, prompt_lengths, config, rng, saved=None):
    """Fine-tune a model on responses, in place. A generator, after every step: (step, (loss since the last report, norm of
    the gradient) or None, state). state is what a later call needs as `saved`, with its "step", to go on."""
    saved, lengths = saved or {"step": 0}, list(map(len, sequences))
    batches = [batch for epoch in range(config.epochs) for batch in batches_by_length(lengths, config.batch, rng)]
    tokens_per_batch = config.epochs * (sum(lengths) - sum(prompt_lengths)) / len(batches)
    optimizer = make_optimizer(model, config.weight_decay)
    losses = restore(saved, len(batches), model=model, optimizer=optimizer, losses=[])["losses"]
    for step in range(saved["step"], len(batches)):
        loss = backward(model, [sequences[i] for i in batches[step]], [prompt_lengths[i] for i in batches[step]],
                        tokens_per_batch, config.micro_batch)
        norm = optimizer_step(optimizer, model, learning_rate(step, len(batches), config.lr, config.warmup), loss)
        losses, figures = [*losses, loss.item()], None
        if (step + 1) % config.report == 0 or step + 1 == len(batches):
            losses, figures = [], (sum(losses) / len(losses), norm)
        yield step + 1, figures, dict(model=model, optimizer=optimizer, losses=losses)


def draw_demonstrations(rng, count, held_out=False):
    """(rows {"prompt", "completion"} drawn from the world, their stories' log-probabilities in nats)."""
    rows, logprobs = [], []
    for _ in range(count):
        request = stories.request(rng, held_out=held_out).text
        story = stories.story(rng, request)
        rows.append({"prompt": request, "completion": story.text})
        logprobs.append(story.logprob)
    return rows, logprobs


def encode_demonstrations(rows, tokenizer, block_size):
    """Rows {"prompt", "completion"} -> (sequences, prompt lengths, dropped): whole ones only, never cut."""
    sequences, prompt_lengths = [], []
    for row in rows:
        prompt = tokenizer.prompt(row["prompt"])
        sequence = prompt + tokenizer.response(row["completion"])
        if len(sequence) <= block_size:
            sequences.append(sequence)
            prompt_lengths.append(len(prompt))
    return sequences, prompt_lengths, len(rows) - len(sequences)


class Demonstrations(NamedTuple):
    """What SFT reads: sequences (lists of ids) and prompt lengths, to train on and held out; questions, the held-out
    prompts that leave room for an answer; entropy, the world's own in nats per held-out token (None: unknown)."""
    sequences: list
    prompt_lengths: list
    held_out: list
    held_out_prompts: list
    questions: list
    entropy: float | None
    description: str


def prepare(config, split, tokenizer, block_size):
    """The Demonstrations of a user's rows, split = (to train on, held out), or of the little world (split None)."""
    entropy, origin = None, config.data or "the little world"
    if split:
        rows, held_out_rows = split
    else:
        rows, _ = draw_demonstrations(random.Random(f"demonstrations {config.seed}"), config.demonstrations)
        held_out_rows, logprobs = draw_demonstrations(random.Random("held-out demonstrations"), 500, held_out=True)
    sequences, prompt_lengths, dropped = encode_demonstrations(rows, tokenizer, block_size)
    held_out, held_out_prompts, held_out_dropped = encode_demonstrations(held_out_rows, tokenizer, block_size)
    dropped += held_out_dropped
    if not split and held_out_dropped:
        raise InputError(f"the context of {block_size} tokens is too short for the little world's stories: pretrain with a "
                         f"larger --block_size")
    if not sequences or not held_out:
        raise InputError(f"{origin}: no demonstration is left to {'hold out' if sequences else 'train on'}: "
                         f"{dropped} exceed the context of {block_size} tokens")
    if not split:
        entropy = -sum(logprobs) / (sum(map(len, held_out)) - sum(held_out_prompts))
    # A longer prompt is trained on, but leaves no room for a sample.
    questions = [row["prompt"] for row in held_out_rows if has_room(row["prompt"], tokenizer, config, block_size)]
    return Demonstrations(sequences, prompt_lengths, held_out, held_out_prompts, questions[:config.questions], entropy,
                          f"{origin}: {len(sequences):,} demonstrations, {len(held_out)} held out; dropped {dropped} "
                          f"longer than the context")


def has_room(prompt, tokenizer, config, block_size):
    """Whether a prompt leaves room in the context for config.max_new_tokens."""
    return len(tokenizer.prompt(prompt)) <= block_size - config.max_new_tokens


def prompts_with_room(prompts, tokenizer, config, block_size):
    """(the prompts that leave room for a response, what to say of them). InputError if none does. None stands for the
    little world: all of its requests do."""
    if prompts is None:
        return None, "fresh requests of the little world"
    fitting = [prompt for prompt in prompts if has_room(prompt, tokenizer, config, block_size)]
    if not fitting:
        raise InputError(f"{config.data or 'the little world'}: no prompt leaves room for --max_new_tokens "
                         f"{config.max_new_tokens} in the context of {block_size}")
    return fitting, (f"{config.data}: {len(fitting)} prompts, dropped {len(prompts) - len(fitting)} that leave no room for "
                     f"{config.max_new_tokens} new tokens")


def sample_prompts(own, count, rng, held_out=False):
    """`count` prompts of a user's own, or requests of the little world (own None): held-out ones or the others."""
    return rng.choices(own, k=count) if own else [stories.request(rng, held_out=held_out).text for _ in range(count)]


def train(config):
    """Fine-tune the base model and save it to OUT/SIZE/sft/checkpoint.pt."""
    # First: a wrong file is found before minutes of training.
    split = hold_out(read_demonstrations(config.data), config.seed, config.data) if config.data else None
    check_name(config.base, "gpt", "base")
    complete(stage_folder(config, config.base))
    train_missing(config, EARLIER if config.base == "gpt" else {}, "sft")
    folder, device = stage_folder(config, "sft"), get_device()
    base_path = stage_folder(config, config.base) / "checkpoint.pt"
    model, tokenizer, base = load_checkpoint(base_path, "gpt", config.size, device)

    # 1. Demonstrations: prompts and the answers that somebody wrote. What is held out.
    data = prepare(config, split, tokenizer, model.config.block_size)
    if config.learning_curve:
        return learning_curve(model, tokenizer, data, config)
    announce("sft", config, device, data.description, model)
    # A base model has never seen the chat format: it is asked in plain text, a line on a page.
    start = [] if base["text"] else [tokenizer.end_token]
    plain = [start + tokenizer.encode(question + "\n") for question in data.questions]
    chat = [tokenizer.prompt(question) for question in data.questions]
    before = respond(model, tokenizer, plain, config.max_new_tokens, config.seed) if plain else ([], [])

    # 2. Next-token prediction on the responses.
    order = random.Random(f"demonstrations' order {config.seed}")
    with Run("sft", folder, config, config.report, [base_path]) as run:
        run.total = config.epochs * math.ceil(len(data.sequences) / config.batch)
        for step, figures, state in fit(model, data.sequences, data.prompt_lengths, config, order, run.saved):
            if figures:
                held_out = held_out_loss(model, data.held_out, data.held_out_prompts)
                run(step, loss=figures[0], held_out=held_out, **excess(held_out, data.entropy), grad_norm=figures[1])
            run.end_step(step, **state)

        # 3. Save; the same questions before and after.
        after = respond(model, tokenizer, chat, config.max_new_tokens, config.seed) if chat else ([], [])
        if not config.data and data.questions:
            (base_told, base_flawless), (told, flawless) = answers(*before), answers(*after)
            run.record(run.total, base_answers=base_told, answers=told, base_flawless=base_flawless, flawless=flawless)
            print(f"answers {len(chat)} held-out requests with a story: base model {with_error(base_told, len(chat))}, SFT "
                  f"{with_error(told, len(chat))}; with a flawless one: {with_error(base_flawless, len(chat))}, "
                  f"{with_error(flawless, len(chat))}")
        save_checkpoint(run.folder / "checkpoint.pt", "sft", config.size, model, tokenizer, metrics=run.figures())
        run.finish()
    for question, base_text, text in list(zip(data.questions, before[0], after[0]))[:3]:
        show(("prompt", question), ("before", scored(question, base_text)), ("after", scored(question, text)))
    print(f"saved {folder / 'checkpoint.pt'}; next: python reward_model.py", flush=True)


def learning_curve(model, tokenizer, data, config):
    """How many demonstrations does it take? Fine-tune a model on the first 512, 1,024, ..., and print a row for each."""
    print(f"data    {data.description}\ndemonstrations  held out, nats a token"
          + ("  excess  answers with a story  with a flawless one" if data.entropy else ""), flush=True)
    base, chat = copy.deepcopy(model.state_dict()), [tokenizer.prompt(question) for question in data.questions]
    for count in doublings(512, len(data.sequences)):
        model.load_state_dict(base)
        order = random.Random(f"demonstrations' order {config.seed}")
        for _ in fit(model, data.sequences[:count], data.prompt_lengths[:count], config, order):
            pass
        held_out = held_out_loss(model, data.held_out, data.held_out_prompts)
        found = answers(*respond(model, tokenizer, chat, config.max_new_tokens, config.seed)) if data.entropy else ()
        print(f"{count:14,d}  {held_out:22.3f}" + (f"  {excess(held_out, data.entropy)['excess']:6.1%}" if found else "")
              + "".join(f"  {with_error(share, len(chat)):>20s}" for share in found), flush=True)


def answer(config, stage, name):
    """Print the answer of a stage's policy to config.prompt. name: its folder, OUT/SIZE/NAME.

    config.temperature counts from the policy as it was trained: 1 is the policy itself, 0.5 sharpens it.
    """
    check_name(name, stage)
    complete(stage_folder(config, name))
    policy, tokenizer, checkpoint = load_checkpoint(stage_folder(config, name) / "checkpoint.pt", stage, config.size,
                                                    get_device())
    texts, _ = respond(policy, tokenizer, [tokenizer.prompt(config.prompt)], config.max_new_tokens, config.seed,
                       config.temperature * checkpoint.get("temperature", 1.0), config.top_k or None)
    print(texts[0])


def show_before_and_after(prompts, before, after, tokenizer, config, reward_model=None, temperature=1.0, documents=()):
    """Two policies answer the same prompts (None: 33 held-out requests of the world), with one seed, the second one at the
    temperature at which it was trained: prints the mean scores of both, and both texts for the prompt whose gain is the
    median, in gold where it is known, else in reward. documents: lists of ids, of which both tell the loss."""
    if documents:
        print(f"pretraining loss {held_out_loss(before, documents, 1):.3f} → {held_out_loss(after, documents, 1):.3f} "
              "nats per token")
    if prompts is None:
        prompts = sample_prompts(None, 33, random.Random("before and after"), held_out=True)
    prompts = [prompt for prompt in prompts if has_room(prompt, tokenizer, config, after.config.block_size)][:33]
    if not prompts:
        return
    ids, texts, scores = [tokenizer.prompt(prompt) for prompt in prompts], [], {"reward": [], "gold": []}
    for policy, at in ((before, 1.0), (after, temperature)):
        with autocast(get_device()), torch.inference_mode():
            rollout = generate(policy, ids, config.max_new_tokens, tokenizer.end_token, at, seed=config.seed)
            if reward_model:
                scores["reward"].append(reward_model.score(rollout.tokens, rollout.lengths).cpu())
        texts.append(response_texts(rollout, tokenizer))
        if all(map(stories.parse_request, prompts)):
            scores["gold"].append(gold_rewards(rollout, tokenizer))
    scores = {name: torch.stack(pair) for name, pair in scores.items() if pair}  # each (2, N)
    means = [f"{name} {x.mean():.2f} → {y.mean():.2f} (± {standard_error(y - x):.2f})"
             for name, (x, y) in scores.items()]
    print(f"before and after on {len(prompts)} held-out prompts" + ": " * bool(means) + "; ".join(means))
    gains = next((y - x for x, y in reversed(scores.values())), torch.zeros(len(prompts)))
    median = gains.argsort(stable=True)[len(gains) // 2].item()
    rewards = scores.get("reward", [[None] * len(prompts)] * 2)
    show(("prompt", prompts[median]), *[(label, scored(prompts[median], texts[i][median], rewards[i][median]))
                                        for i, label in enumerate(("before", "after"))])


def main(argv=None):
    config = parse_config(Config, GPU, argv, "Fine-tune the base model on demonstrations, loss on the response only.",
                          needs={"temperature": ("prompt",), "top_k": ("prompt",)}, presets=PRESETS)
    if config.prompt:
        answer(config, "sft", "sft")
    else:
        train(config)


if __name__ == "__main__":
    run_script(main)
