"""What the stages read: pretraining text, demonstrations and prompts, of the little world or from
somebody's file. Everything is a list of ids or of texts; nothing here knows what a GPT is.
"""

import random
import zlib
from pathlib import Path
from typing import NamedTuple

from data import stories
from data.files import InputError, refuse_changed
from data.run import memory_mapped, progress
from data.tokenizer import Tokenizer, encode_file, remark_on_file, sample_text
from data.tokenizer import train as train_vocabulary

# --------------------------------------------------------------------------------------------------
# Pretraining text


class Corpus(NamedTuple):
    """What pretraining reads."""

    tokenizer: Tokenizer
    sequences: list         # to train on: lists of ids
    held_out: list          # likewise
    start: list             # the ids that every text begins with
    entropy: float | None   # the source's own, in nats per held-out token; None: unknown
    description: str


def text_corpus(path, tokenizer, vocab_size, block_size, count, seed, folder):
    """The Corpus of a text file: `count` random windows of it; the last tenth is held out.

    tokenizer: None learns one of vocab_size tokens from the file; folder: where its ids are kept.
    """
    if tokenizer is None:
        tokenizer = Tokenizer(train_vocabulary(sample_text(path), vocab_size))
    tokens, held_out, description = split_text(path, tokenizer, block_size, folder)
    description += remark_on_file(path)
    windows = draw_windows(tokens, count, block_size, random.Random(f"pretraining {seed}"))
    return Corpus(tokenizer, windows, held_out, [], None, description)


def split_text(path, tokenizer, block_size, folder):
    """A text file, which may be larger than the memory, as tokens.

    Returns (an array of those to train on; held-out lists of ids, at most 1,000 or so from all of
    the last tenth; a description).
    """
    tokens = encode_file(path, tokenizer, folder)
    cut = len(tokens) * 9 // 10
    starts = range(cut, len(tokens) - 1, block_size)
    stride = max(1, len(starts) // 500)
    held_out = [tokens[start:start + block_size].tolist() for start in starts[::stride]]
    if cut < block_size or not held_out:
        raise InputError(f"{path}: {len(tokens)} tokens are too few for a context of {block_size}; "
                         "give a longer text, or pretrain with a smaller --block_size")
    description = (f"{path}: {cut:,} tokens to train on, the last {len(tokens) - cut:,} held out, "
                   f"{sum(map(len, held_out)):,} of them read")
    return tokens[:cut], held_out, description


def draw_windows(tokens, count, block_size, rng):
    """`count` windows of an array of tokens, from anywhere: views, no copies."""
    starts = rng.choices(range(len(tokens) - block_size + 1), k=count)
    return [tokens[start:start + block_size] for start in starts]


def world_corpus(tokenizer, vocab_size, block_size, count, seed, folder, curated=False):
    """The Corpus of the little world, or of its curated part: `count` documents, 500 held out.

    tokenizer: None learns one of vocab_size tokens; a given one is that of a model in mid-training,
    which draws other documents than its pretraining did. A row is one whole document, between two
    <|end|>: no row begins in the middle of a story, where one can't know whose story it is, so the
    loss compares with the source's entropy.
    """
    rng = random.Random(f"pretraining {seed}" if tokenizer is None else f"mid-training {seed}")
    world = stories.WORLD
    what = "the little world"
    if curated:
        world, _ = stories.curate()
        what = "the little world, curated"
    sample = "\n".join(stories.document(rng, world).text for _ in range(4000))

    # The file's name holds seed, amount, vocabulary and, in a checksum of the sample, the world.
    fingerprint = sample
    if tokenizer is None:
        tokenizer = Tokenizer(train_vocabulary(sample, vocab_size))
    else:
        fingerprint += "".join(tokenizer.to_strings())
    checksum = zlib.crc32(fingerprint.encode())
    name = f"documents-{seed}-{count}-{tokenizer.n_vocab}-{checksum:08x}.ids"

    documents = held_out_documents(world)
    held_out = encode_documents(documents, tokenizer)
    tokens = sum(len(ids) - 1 for ids in held_out)
    entropy = -sum(document.logprob for document in documents) / tokens

    def draw():
        drawn = []
        report = progress("documents drawn", count)
        while len(drawn) < count:
            drawn.append(stories.document(rng, world))
            report(len(drawn))
        return encode_documents(drawn, tokenizer)

    sequences = memory_mapped(folder / name, draw)
    for path in folder.glob("documents-*.ids"):  # of runs with another seed, amount or vocabulary
        if path.name != name:
            path.unlink()
    longest = max(map(len, held_out + sequences))
    if longest > block_size:
        raise InputError(f"--block_size {block_size}: the longest document has {longest} tokens; "
                         "pretrain with as many")
    description = (f"{what}: {len(sequences):,} fresh documents, {sum(map(len, sequences)):,} "
                   f"tokens; {len(documents)} documents held out")
    return Corpus(tokenizer, sequences, held_out, [tokenizer.end_token], entropy, description)


def encode_documents(documents, tokenizer):
    """Every document of the little world between two <|end|>, as ids."""
    end = [tokenizer.end_token]
    texts = [document.text for document in documents]
    return [end + ids + end for ids in tokenizer.encode_batch(texts)]


def held_out_documents(world=stories.WORLD):
    """The 500 documents of the little world that every run holds out."""
    rng = random.Random("held-out documents")
    return [stories.document(rng, world) for _ in range(500)]


def pretraining_text(checkpoint, path, tokenizer, block_size):
    """What a base model was trained on, for later stages.

    checkpoint: the model's, a dict, from the file path. Returns (draw(count, rng) -> lists of ids,
    held-out lists of ids, the files that they depend on). No list is longer than block_size.
    InputError if its text is not known, or is another one by now.
    """
    text = checkpoint["text"]
    if checkpoint.get("loaded"):
        raise InputError(f"{path}: came from {checkpoint['loaded']}; what that was trained on is "
                         "not known, so leave out --ptx")
    if text:
        refuse_changed(text, checkpoint.get("text_checksum"), path)
        tokens, held_out, _ = split_text(text, tokenizer, block_size, path.parent)

        def draw(count, rng):
            return draw_windows(tokens, count, block_size, rng)

        return draw, held_out, [path, Path(text)]

    world = stories.WORLD
    if checkpoint.get("curated"):
        world, _ = stories.curate()

    def draw(count, rng):
        drawn = []
        while len(drawn) < count:
            ids, = encode_documents([stories.document(rng, world)], tokenizer)
            if len(ids) <= block_size:  # as all that gpt.py drew, or it would have refused
                drawn.append(ids)
        return drawn

    return draw, encode_documents(held_out_documents(world), tokenizer), [path]


# --------------------------------------------------------------------------------------------------
# Demonstrations and prompts


def draw_demonstrations(rng, count, held_out=False):
    """(rows {"prompt", "completion"} drawn from the world, their stories' log-probabilities)."""
    rows = []
    logprobs = []
    for _ in range(count):
        request = stories.request(rng, held_out=held_out).text
        story = stories.story(rng, request)
        rows.append({"prompt": request, "completion": story.text})
        logprobs.append(story.logprob)
    return rows, logprobs


def has_room(prompt, tokenizer, max_new_tokens, block_size):
    """Whether a prompt leaves room in the context for max_new_tokens."""
    return len(tokenizer.prompt(prompt)) <= block_size - max_new_tokens


def prompts_with_room(prompts, origin, tokenizer, max_new_tokens, block_size):
    """(the prompts that leave room for a response, a sentence about them). InputError, naming their
    origin, if there is none."""
    fitting = []
    for prompt in prompts:
        if has_room(prompt, tokenizer, max_new_tokens, block_size):
            fitting.append(prompt)
    if not fitting:
        raise InputError(f"{origin}: no prompt leaves room for --max_new_tokens {max_new_tokens} "
                         f"in the context of {block_size}; lower it")
    dropped = len(prompts) - len(fitting)
    return fitting, (f"{origin}: {len(fitting)} prompts, dropped {dropped} that leave no room for "
                     f"{max_new_tokens} new tokens")


def draw_requests(count, rng, held_out=False):
    """`count` requests of the little world: held-out ones or the others."""
    return [stories.request(rng, held_out=held_out).text for _ in range(count)]
