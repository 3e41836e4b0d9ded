"""What the real transformers makes of exported folders, compared with what the checkpoints give.
Not part of the test suite:

    pip install transformers
    python -m data.huggingface export FOLDER/NAME --stage NAME      for every stage, then
    python -m tests.huggingface.check OUT/SIZE FOLDER [NAME ...]

Of every stage: ids of 10,000 texts, odd Unicode among them, with and without the chat format;
which of them the assistant wrote; logits; greedy text, one by one and in a padded batch; of the
reward model its scores, likewise; of the process model its number for every token.
"""

import random
import sys

import jinja2
import torch
from transformers import (AutoModelForCausalLM, AutoModelForSequenceClassification,
                          AutoModelForTokenClassification, AutoTokenizer)

from gpt import GPT, load_checkpoint, pad, respond
from reward_model import RewardModel
from tests.huggingface.make import TEXT, texts

SPELLED = ["<|end|>", "<|assistant|><|end|>", "<|pad|>"]
ESCAPED = ["\ufdd0|", "<\ufdd0|end|>", "<<|end|>", "ÿ"]
REQUEST = "Tell me a story about a shy fox and a kite."


def check(path, stage, size, folder):
    """Print the largest differences between a checkpoint and its exported folder. True if there are
    none that count."""
    heads = {"reward_model": AutoModelForSequenceClassification,
             "process_model": AutoModelForTokenClassification}
    model, tokenizer, _ = load_checkpoint(path, stage, size,
                                          model_class=RewardModel if stage in heads else GPT)
    theirs = heads.get(stage, AutoModelForCausalLM).from_pretrained(folder).eval()
    their_tokenizer = AutoTokenizer.from_pretrained(folder)
    same_ids = check_ids(stage, tokenizer, their_tokenizer)

    prompts = [tokenizer.prompt(text) for text in (TEXT[:40], REQUEST[:40], "Hi", "12")]
    sequences = []
    for i, prompt in enumerate(prompts):
        sequences.append(prompt + tokenizer.response("Once there was a fox"[:3 * i]))
    tokens, lengths = pad(sequences)
    mask = torch.arange(tokens.shape[1]) < lengths[:, None]
    padded = torch.where(mask, tokens, their_tokenizer.pad_token_id)
    unequal = 0
    with torch.no_grad():
        ours = model(tokens)
        found = theirs(padded, attention_mask=mask).logits
        if stage == "reward_model":
            ours = model.score(tokens, lengths)[:, None]
            alone = [theirs(row[None, :n]).logits[0] for row, n in zip(tokens, lengths)]
            gap = max((ours - x).abs().max().item() for x in (found, torch.stack(alone)))
        else:
            gap = (ours - found.view(ours.shape))[mask].abs().max().item()
        if stage not in heads:
            unequal = greedy_texts(model, tokenizer, theirs, their_tokenizer, prompts)
    print(f"{stage}: logits or scores differ by {gap:.1e} at most; {unequal} greedy texts differ")
    return same_ids and gap < 1e-4 and unequal == 0


def greedy_texts(model, tokenizer, theirs, their_tokenizer, prompts):
    """How many greedy texts differ, one by one and in a batch, padded as their tokenizer pads."""
    room = min(64, model.config.block_size // 2)
    ours, _ = respond(model, tokenizer, prompts, room, seed=1, top_k=1)
    found = []
    for batch in [*([prompt] for prompt in prompts), prompts]:
        batch = their_tokenizer.pad({"input_ids": batch}, return_tensors="pt")
        rows = theirs.generate(**batch, do_sample=False, max_new_tokens=room)
        rows = rows[:, batch["input_ids"].shape[1]:]
        found += their_tokenizer.batch_decode(rows, skip_special_tokens=True)
    return sum(text != other for text, other in zip(ours + ours, found, strict=True))


def check_ids(stage, tokenizer, theirs):
    """Print how many of 10,000 texts, and of 2,000 chats, get other ids. True if none do."""
    odd = texts(random.Random(1), 10_000)
    wrong = sum(tokenizer.encode(text) != theirs(text, add_special_tokens=False)["input_ids"]
                for text in odd)
    chats = odd[:2000] + SPELLED + ESCAPED
    for text in chats:
        user = {"role": "user", "content": text}
        assistant = {"role": "assistant", "content": text}
        prompt = tokenizer.prompt(text)
        both = prompt + tokenizer.response(text)
        wrong += prompt != theirs.apply_chat_template([user], add_generation_prompt=True,
                                                      return_dict=False)
        found = theirs.apply_chat_template([user, assistant], return_dict=True,
                                           return_assistant_tokens_mask=True)
        written = [0] * len(prompt) + [1] * (len(both) - len(prompt))
        wrong += both != found["input_ids"] or written != found["assistant_masks"]
    for content in (None, 3, [{"type": "text", "text": "Hi"}]):
        try:
            theirs.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
            wrong += 1
        except jinja2.exceptions.TemplateError:
            pass

    plain = sum(tokenizer.encode(text) != theirs(text, split_special_tokens=True)["input_ids"]
                for text in SPELLED)
    print(f"{stage}: ids of {len(odd)} texts, {len(chats)} chats: {wrong} differ; specials spelled "
          f"in plain text, with split_special_tokens: {plain} differ")
    return wrong == 0 and plain == 0


def main():
    out, folder, *names = sys.argv[1:]
    size = out.split("/")[-1]
    stages = ("reward_model", "gpt", "sft", "ppo", "dpo", "rsft", "process_model")
    failed = []
    for name in names or stages[:-2]:
        stage = next(stage for stage in stages if name.startswith(stage))
        if not check(f"{out}/{name}/checkpoint.pt", stage, size, f"{folder}/{name}"):
            failed.append(name)
    if failed:
        sys.exit(f"not the same: {', '.join(failed)}")


if __name__ == "__main__":
    main()
