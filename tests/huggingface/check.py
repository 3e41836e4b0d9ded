"""What the real transformers makes of exported folders, compared with what the checkpoints give. Not part of the suite:

    pip install transformers && python gpt.py --export FOLDER/NAME --stage NAME      for every stage, then
    python -m tests.huggingface.check OUT/SIZE FOLDER [names]

Of every stage: ids of 10,000 texts, odd Unicode among them, with and without the chat format; logits; greedy text; of the
reward model its scores, one by one and padded.
"""

import random
import sys

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from gpt import load_checkpoint, pad, respond
from reward_model import RewardModel
from tests.huggingface.make import TEXT, texts


def check(path, stage, size, folder):
    """Print the largest differences between a checkpoint and its exported folder; True if there are none that count."""
    reward = stage == "reward_model"
    model, tokenizer, _ = load_checkpoint(path, stage, size, model_class=RewardModel) if reward else load_checkpoint(
        path, stage, size)
    theirs = (AutoModelForSequenceClassification if reward else AutoModelForCausalLM).from_pretrained(folder).eval()
    other, odd = AutoTokenizer.from_pretrained(folder), texts(random.Random(1), 10_000)
    print(f"{stage}: ids of {len(odd)} texts", end="")
    wrong = sum(tokenizer.encode(text) != other(text, add_special_tokens=False)["input_ids"] for text in odd)
    odd = odd[:2000] + ["<|end|>", "<|assistant|><|end|>", "<|pad|>", "\ufdd0|", "<\ufdd0|end|>", "<<|end|>", "ÿ"]
    for text in odd:
        chat = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
        prompt, both = tokenizer.prompt(text), tokenizer.prompt(text) + tokenizer.response(text)
        wrong += prompt != other.apply_chat_template(chat[:1], add_generation_prompt=True, return_dict=False)
        wrong += both != other.apply_chat_template(chat, return_dict=False)
    plain = sum(tokenizer.encode(text) != other(text, split_special_tokens=True)["input_ids"] for text in odd[-7:-4])
    print(f", {len(odd)} chats: {wrong} differ; specials spelled in plain text, with split_special_tokens: {plain} differ")

    prompts = [tokenizer.prompt(text[:40]) for text in (TEXT, "Tell me a story about a shy fox and a kite.", "Hi", "12")]
    tokens, lengths = pad([prompt + tokenizer.response("Once there was a fox"[:3 * i]) for i, prompt in enumerate(prompts)])
    mask = torch.arange(tokens.shape[1]) < lengths[:, None]
    padded = torch.where(mask, tokens, other.pad_token_id)
    with torch.no_grad():
        if reward:
            gap = (model.score(tokens, lengths) - theirs(padded, attention_mask=mask).logits[:, 0]).abs().max().item()
            one = [theirs(row[None, :length]).logits[0, 0] for row, length in zip(tokens, lengths)]
            gap = max(gap, (model.score(tokens, lengths) - torch.stack(one)).abs().max().item())
            print(f"{stage}: scores differ by {gap:.1e} at most")
            return not wrong and not plain and gap < 1e-4
        gap = (model(tokens) - theirs(padded, attention_mask=mask).logits)[mask].abs().max().item()
        room, unequal = min(64, model.config.block_size // 2), 0
        ours, _ = respond(model, tokenizer, prompts, room, seed=1, top_k=1)
        for prompt, text in zip(prompts, ours):
            found = theirs.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=room)[0, len(prompt):]
            unequal += text != other.decode(found, skip_special_tokens=True)
    print(f"{stage}: logits differ by {gap:.1e} at most; {unequal} of {len(prompts)} greedy texts differ")
    return not wrong and not plain and gap < 1e-4 and not unequal


if __name__ == "__main__":
    out, folder, *names = sys.argv[1:]
    kinds = ("reward_model", "gpt", "sft", "ppo", "dpo")
    found = [check(f"{out}/{name}/checkpoint.pt", next(kind for kind in kinds if name.startswith(kind)), out.split("/")[-1],
                   f"{folder}/{name}") for name in names or kinds]
    sys.exit(not all(found))
