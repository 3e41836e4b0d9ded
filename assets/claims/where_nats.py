"""Where a policy spends its nats: log π/π_ref of its own samples by the part of the story, and
after an ending, where SFT's stories stop (CS 224R, Lecture 9, ch. 9: what no pair speaks of).

    python -m assets.claims.where_nats --out OUT [--seed S]     after ppo.py and dpo.py
"""

import random

import torch

from assets.claims.writers import load_policy, read_arguments
from data.answer_key import cell, mean_and_error
from data.corpus import draw_requests
from data.files import read_pairs, run_script, write_jsonl
from data.run import stage_folder
from data.stories import recognise, split_sentences
from data.table import Column, print_columns
from gpt import generate, masked_logprobs, response_mask

PLACES = ("the opening", "the wish", "the turns", "the ending", "after an ending",
          "no sentence of the world", "<|end|>")
PLACE = {"opening": "the opening", "wish": "the wish", "kind": "the turns", "unkind": "the turns",
         "neutral": "the turns", "happy": "the ending", "sad": "the ending"}


def places(pieces):
    """The place of every token of a response, from the texts of its tokens."""
    text = "".join(pieces)
    ends = []           # where each sentence ends in the text, and its place
    position = 0
    over = False
    for sentence in split_sentences(text):
        position = text.index(sentence, position) + len(sentence)
        found = recognise(sentence)
        place = PLACE[found.part] if found else "no sentence of the world"
        ends.append((position, "after an ending" if over else place))
        over = over or place == "the ending"

    named = []
    position = 0
    for piece in pieces:
        position += len(piece)
        while len(ends) > 1 and position > ends[0][0]:
            ends.pop(0)
        named.append(ends[0][1] if ends else "no sentence of the world")
    return named


@torch.no_grad()
def log_ratios(policy, temperature, reference, rollouts, micro_batch):
    """(log π(a_t|s_t) - log π_ref(a_t|s_t), the mask of the responses), (B, T-1) each.
    temperature: the policy's."""
    mask = response_mask(rollouts.prompt_lengths, rollouts.lengths, rollouts.tokens.shape[1])
    parts = []
    for start in range(0, len(mask), micro_batch):
        rows = slice(start, start + micro_batch)
        logprobs = masked_logprobs(policy, rollouts.tokens[rows], mask[rows], temperature)
        ref_logprobs = masked_logprobs(reference, rollouts.tokens[rows], mask[rows])
        parts.append(logprobs - ref_logprobs)
    return torch.cat(parts), mask


def nats(policy, temperature, reference, tokenizer, rollouts, micro_batch):
    """{place: the nats that every sampled response spends there, (B,)}."""
    ratios, mask = log_ratios(policy, temperature, reference, rollouts, micro_batch)
    ratios = ratios.cpu()
    found = {place: torch.zeros(len(ratios)) for place in PLACES}
    for row in range(len(ratios)):
        columns = mask[row].nonzero().flatten().tolist()
        ids = rollouts.tokens[row, 1:][mask[row]].tolist()
        ended = ids[-1] == tokenizer.end_token
        pieces = [tokenizer.decode([token]) for token in (ids[:-1] if ended else ids)]
        named = places(pieces) + (["<|end|>"] if ended else [])
        for column, place in zip(columns, named):
            found[place][row] += ratios[row, column]
    return found


def main(argv=None):
    arguments, config = read_arguments(__doc__, 512, argv)
    reference, tokenizer, _ = load_policy(config, "sft")
    prompts = draw_requests(arguments.questions, random.Random("where nats"), held_out=True)
    ids = [tokenizer.prompt(prompt) for prompt in prompts]

    rows = []
    for name in arguments.policies.split(","):
        policy, _, checkpoint = load_policy(config, name)
        temperature = checkpoint.get("temperature", 1.0)
        with torch.no_grad():
            rollouts = generate(policy, ids, config.max_new_tokens, tokenizer.end_token,
                                temperature, seed=config.seed, at_once=config.sample_batch)
        spent = nats(policy, temperature, reference, tokenizer, rollouts, 64)
        spent["in all"] = sum(spent.values())
        row = {"what": name}
        for place, x in spent.items():
            row[place], row[f"{place}_error"] = mean_and_error(x)
        rows.append(row)

    columns = [Column("place", [*PLACES, "in all"])]
    for row in rows:
        cells = [cell(row[place], row[f"{place}_error"], ".2f") for place in (*PLACES, "in all")]
        columns.append(Column(row["what"], cells))
    texts = []
    for pair in read_pairs(stage_folder(config, "reward_model") / "pairs.jsonl"):
        texts += [pair["chosen"], pair["rejected"]]
    count = sum(places([text]) == ["after an ending"] for text in texts)  # of the last sentence
    print_columns(columns, [
        f"nats to the SFT model of one answer to each of {len(prompts)} held-out requests; ± "
        "standard error.",
        f"Of the {len(texts):,} responses in reward_model's pairs {count} go on after an ending."])
    folder = stage_folder(config, "claim-where_nats")
    folder.mkdir(exist_ok=True)
    write_jsonl(folder / "metrics.jsonl", rows)


if __name__ == "__main__":
    run_script(main)
