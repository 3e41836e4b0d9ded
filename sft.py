"""
sft.py: stage 2, supervised fine-tuning (instruction finetuning; CS 224R, Lecture 9, ch. 4; ECE 7115, step 1/3).

    max_θ E_{(x,y)~D} [ Σ_t log π_θ(y_t | x, y_<t) ]

The same loss as pretraining on other data: demonstrations of somebody answering. Only the response's tokens count,
and <|end|> is one of them: a model that is not taught <|end|> never stops talking.

    python sft.py                       fine-tune on demonstrations of the little world
    python sft.py --data FILE.jsonl     on your own: {"prompt", "completion"}, or pairs, whose "chosen" is taken

Departure from the slides: the loss is the mean over all response tokens of the batch, not the sum over a response,
so the learning rate does not depend on how long people's answers are.
"""

import random
from dataclasses import dataclass

import torch

import gpt
from data import stories
from data.files import InputError, hold_out, read_demonstrations, run_script
from gpt import (Run, announce, batches_by_length, get_device, held_out_loss, learning_rate, load_checkpoint,
                 make_optimizer, masked_logprobs, optimizer_step, pad, parse_config, respond, response_mask, restore,
                 save_checkpoint, show, stage_folder, train_if_missing)


@dataclass
class Config:
    size: str = "auto"          # cpu or gpu; auto takes gpu where there is one
    out: str = "out"            # folder of all outputs; this stage writes to OUT/SIZE/sft
    seed: int = 1               # fixes data and samples
    data: str = ""              # your own demonstrations, a .jsonl file, instead of the little world's
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


GPU = dict(demonstrations=65536, batch=128, micro_batch=128, lr=3e-4, max_new_tokens=128)


def backward(model, sequences, prompt_lengths, micro_batch):
    """Accumulate the gradient of the SFT loss of one batch, micro_batch sequences at a time. Returns the loss.

    sequences: lists of ids (prompt + response + <|end|>). The loss is -1/N Σ log π_θ(y_t | x, y_<t) over the N response
    tokens of the whole batch, however it is cut into micro-batches (a mean of the micro-batches' means would weigh
    a token of a short response more).
    """
    device = model.wte.weight.device
    total_tokens = sum(map(len, sequences)) - sum(prompt_lengths)
    total_loss = 0.0
    for start in range(0, len(sequences), micro_batch):
        tokens, lengths = pad(sequences[start:start + micro_batch], device)
        mask = response_mask(torch.tensor(prompt_lengths[start:start + micro_batch], device=device), lengths,
                             tokens.shape[1])
        loss = -masked_logprobs(model, tokens, mask).sum() / total_tokens  # CS 224R, ch. 4
        loss.backward()
        total_loss += loss.detach()
    return total_loss


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


def draw_demonstrations(rng, count):
    """(rows {"prompt", "completion"} drawn from the world, their stories' log-probabilities in nats)."""
    rows, logprobs = [], []
    for _ in range(count):
        request = stories.request(rng).text
        story = stories.story(rng, request)
        rows.append({"prompt": request, "completion": story.text})
        logprobs.append(story.logprob)
    return rows, logprobs


def answers(texts, ended):
    """How many of the responses are answers: (share with a story, share with a flawless one).

    A story: the response ended, and more than half of its sentences, two at least, are sentences of the world.
    Flawless: every sentence is, and the first is an opening (stories.is_story).
    """
    stories_told, flawless = 0, 0
    for text, end in zip(texts, ended):
        known = [stories.recognise(sentence) is not None for sentence in stories.split_sentences(text)]
        stories_told += end and sum(known) >= 2 and 2 * sum(known) > len(known)
        flawless += end and stories.is_story(text)
    return stories_told / len(texts), flawless / len(texts)


def train(config):
    """Fine-tune the base model and save it to OUT/SIZE/sft/checkpoint.pt."""
    if config.data:
        rows, held_out_rows = hold_out(read_demonstrations(config.data), config.seed, config.data)  # before any training
    train_if_missing("gpt", gpt.main, config)
    folder, device = stage_folder(config, "sft"), get_device()
    base_path = stage_folder(config, "gpt") / "checkpoint.pt"
    model, tokenizer, base = load_checkpoint(base_path, "gpt", config.size, device)
    block_size = model.config.block_size
    rng = random.Random(f"demonstrations {config.seed}")

    # 1. Demonstrations: prompts and the answers that somebody wrote. What is held out.
    source = None
    if config.data:
        origin = config.data
    else:
        rows, _ = draw_demonstrations(rng, config.demonstrations)
        held_out_rows, held_out_logprobs = draw_demonstrations(random.Random("held-out demonstrations"), 500)
        origin = "the little world"
    sequences, prompt_lengths, dropped = encode_demonstrations(rows, tokenizer, block_size)
    held_out, held_out_prompts, held_out_dropped = encode_demonstrations(held_out_rows, tokenizer, block_size)
    if not config.data and held_out_dropped:
        raise InputError(f"the context of {block_size} tokens is too short for the little world's stories: pretrain with a "
                         f"larger --block_size")
    if not sequences or not held_out:
        raise InputError(f"{origin}: no demonstration is left to {'train on' if not sequences else 'hold out'}: "
                         f"{dropped + held_out_dropped} exceed the context of {block_size} tokens")
    if not config.data:
        source = -sum(held_out_logprobs) / (sum(map(len, held_out)) - sum(held_out_prompts))
    announce("sft", config, device, f"{origin}: {len(sequences):,} demonstrations, {len(held_out)} held out; dropped "
             f"{dropped + held_out_dropped} longer than the context", model)
    room = block_size - config.max_new_tokens  # a longer prompt is trained on, but leaves no room for a sample
    questions = [row["prompt"] for row in held_out_rows if len(tokenizer.prompt(row["prompt"])) <= room][:config.questions]
    # A base model has never seen the chat format: it is asked in plain text, a line on a page.
    start = [] if base["text"] else [tokenizer.end_token]
    plain = [start + tokenizer.encode(question + "\n") for question in questions]
    chat = [tokenizer.prompt(question) for question in questions]
    before, before_ended = respond(model, tokenizer, plain, config.max_new_tokens, config.seed) if plain else ([], [])

    # 2. Next-token prediction on the responses.
    lengths, order = list(map(len, sequences)), random.Random(f"demonstrations' order {config.seed}")
    batches = [batch for epoch in range(config.epochs) for batch in batches_by_length(lengths, config.batch, order)]
    optimizer = make_optimizer(model, config.weight_decay)
    with Run("sft", folder, config, config.report, [base_path]) as run:
        run.total = len(batches)
        losses = restore(run.saved, run.total, model=model, optimizer=optimizer, losses=[])["losses"]
        for step in range(run.saved["step"], len(batches)):
            loss = backward(model, [sequences[i] for i in batches[step]], [prompt_lengths[i] for i in batches[step]],
                            config.micro_batch)
            norm = optimizer_step(optimizer, model, learning_rate(step, len(batches), config.lr, config.warmup), loss)
            losses.append(loss.item())
            if (step + 1) % config.report == 0 or step + 1 == len(batches):
                held_out_nats = held_out_loss(model, held_out, held_out_prompts)
                row = dict(loss=sum(losses) / len(losses), held_out=held_out_nats)
                if source:
                    row.update(entropy=source, excess=held_out_nats / source - 1)
                run(step + 1, **row, grad_norm=norm)
                losses = []
            run.end_step(step + 1, model=model, optimizer=optimizer, losses=losses)

        # 3. Save; the same questions before and after.
        after, after_ended = respond(model, tokenizer, chat, config.max_new_tokens, config.seed) if chat else ([], [])
        if not config.data and questions:
            (base_told, base_flawless), (told, flawless) = answers(before, before_ended), answers(after, after_ended)
            run.record(len(batches), base_answers=base_told, answers=told, base_flawless=base_flawless, flawless=flawless)
            print(f"answers {len(questions)} held-out requests with a story: base model {base_told:.1%}, SFT {told:.1%}; "
                  f"with a flawless one: {base_flawless:.1%}, {flawless:.1%}")
        save_checkpoint(folder / "checkpoint.pt", "sft", config.size, model, tokenizer)
        run.finish()
    for question, base_text, text in list(zip(questions, before, after))[:3]:
        show(("prompt", question), ("before", base_text), ("after", text))
    print(f"saved {folder / 'checkpoint.pt'}; next: python reward_model.py", flush=True)


def main(argv=None):
    train(parse_config(Config, GPU, argv, "Fine-tune the base model on demonstrations, loss on the response only."))


if __name__ == "__main__":
    run_script(main)
