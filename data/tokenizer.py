"""The tokenizer: byte-level BPE, trained here by hand and served by tiktoken; and the chat format.

Byte pair encoding (Sennrich et al. 2016; on bytes: Radford et al. 2019, GPT-2) starts from the 256 bytes
and again and again gives a new id to the most frequent pair of neighbours. A worked example, merges of
"banana bandana" up to a vocabulary of 262 = 256 bytes + 3 merges + 3 special tokens:

    banana | bandana         the text is split into words first; no merge crosses a border
    b an an a |  b an d an a     (a, n) stands 4 times, most of all                  -> 256 = "an"
    ban an a |  ban d an a       (b, an) and (an, a) tie at 2; the smaller ids win   -> 257 = "ban"
    ban ana |  ban d ana         (an, a) stands twice                                -> 258 = "ana"

    >>> tokenizer = Tokenizer(train("banana bandana", 262))
    >>> tokenizer.encode("banana bandana")
    [257, 258, 32, 257, 100, 258]
    >>> tokenizer.prompt("banana") + tokenizer.response("bandana")
    [259, 257, 258, 260, 257, 100, 258, 261]

The last line is the chat format, <|user|>PROMPT<|assistant|>RESPONSE<|end|>. The three special tokens
have the last three ids, and only prompt() and response() produce them: a text that spells "<|end|>" is
encoded as the seven characters that it is, so no user can end a turn by typing.
"""

import heapq
import itertools
import os
import zlib
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import regex
import tiktoken

from data.files import InputError, checksum, read_blocks, read_chunks
from data.run import counts, memory_mapped, progress

SPECIAL_TOKENS = ("<|user|>", "<|assistant|>", "<|end|>")

# A word, a number, or a run of other signs, each with the space before it; or white space: GPT-2's rule
# without its English contractions. White space is cut at 64, because the look-ahead makes tiktoken panic
# (a stack overflow) on a run of a million blanks.
PATTERN = r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s{1,64}(?!\S)|\s{1,64}"

# How a text is split before its pieces are merged. gpt2: GPT-2's own rule, for a vocabulary that was learnt with it; \s++$
# changes nothing, but spares tiktoken that panic where the text ends in white space, and encode() ends it there.
PATTERNS = {"words": PATTERN,
            "gpt2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s++$|\s+(?!\S)|\s+"}
LONG_RUN = regex.compile(r"(?=\p{White_Space}\P{White_Space})(?<=\p{White_Space}{1000})")

# How vocabulary files of GPT-2's kind write a byte: as the sign that it is in Latin-1 where that is a printable one, else
# as one from U+0100 on.
PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
SIGNS = dict(zip([*PRINTABLE, *(byte for byte in range(256) if byte not in PRINTABLE)],
                 map(chr, [*PRINTABLE, *range(0x100, 0x144)])))


def train(text, vocab_size):
    """Learn a vocabulary from text: a list of bytes in rank order, the 256 single bytes, then a merge each.

    vocab_size includes the three special tokens, which aren't in the list: it has vocab_size - 3 entries,
    or fewer where the text runs out of pairs to merge. Pairs are counted with their overlaps ("aaa" holds
    two) and merged from left to right; of equally frequent pairs the one with the smaller ids wins, so the
    result depends on the text alone. ValueError if vocab_size < 259, or if text holds a lone surrogate.
    """
    if vocab_size < 256 + len(SPECIAL_TOKENS):
        raise ValueError(f"vocab_size is {vocab_size}; 256 bytes and 3 special tokens need at least 259")
    vocabulary = [bytes([i]) for i in range(256)]

    # Every distinct word once, as a list of ids, with its number of occurrences.
    occurrences = Counter(regex.findall(PATTERN, text))
    words = [list(word.encode("utf-8")) for word in occurrences]
    weights = list(occurrences.values())
    counts = Counter()              # pair of ids -> how often it stands in the text
    places = defaultdict(set)       # pair of ids -> indices of the words that hold it (or once did)
    for i, word in enumerate(words):
        for pair in zip(word, word[1:]):
            counts[pair] += weights[i]
            places[pair].add(i)

    # A heap finds the best pair. A count that changes is pushed anew; its older entries are skipped when
    # they come up. (-count, pair) sorts as wanted: most frequent first, then smaller ids.
    heap = [(-count, pair) for pair, count in counts.items()]
    heapq.heapify(heap)
    while heap and len(vocabulary) < vocab_size - len(SPECIAL_TOKENS):
        count, pair = heapq.heappop(heap)
        if counts[pair] != -count:
            continue
        new_id = len(vocabulary)
        vocabulary.append(vocabulary[pair[0]] + vocabulary[pair[1]])
        changed = set()
        for i in places.pop(pair):
            before, after = words[i], merge(words[i], pair, new_id)
            words[i] = after
            for old in zip(before, before[1:]):
                counts[old] -= weights[i]
                changed.add(old)
            for new in zip(after, after[1:]):
                counts[new] += weights[i]
                places[new].add(i)
                changed.add(new)
        for other in changed:
            if counts[other] > 0:
                heapq.heappush(heap, (-counts[other], other))
    return vocabulary


def merge(ids, pair, new_id):
    """Replace each occurrence of the pair by new_id, from left to right: merge([1, 1, 1], (1, 1), 2) is [2, 1]."""
    merged, i = [], 0
    while i < len(ids):
        if i + 1 < len(ids) and (ids[i], ids[i + 1]) == pair:
            merged.append(new_id)
            i += 2
        else:
            merged.append(ids[i])
            i += 1
    return merged


class Tokenizer:
    """Text to ids and back, for a vocabulary from train() or GPT-2's. Ids run from 0 to n_vocab - 1, specials last."""

    def __init__(self, vocabulary, pattern="words"):
        """vocabulary: list of bytes in rank order; pattern: one of PATTERNS' names. ValueError if it isn't one that can
        encode every text, or there is no such pattern."""
        vocabulary = list(vocabulary)
        wrong = [token for token in vocabulary if not isinstance(token, bytes) or not token]
        if wrong:
            raise ValueError(f"the vocabulary holds {wrong[0]!r:.60}; every entry must be bytes, at least one")
        twice = [token for token, count in Counter(vocabulary).items() if count > 1]
        if twice:
            raise ValueError(f"the vocabulary holds {twice[0]!r:.60} twice")
        missing = {bytes([i]) for i in range(256)} - set(vocabulary)
        if missing:
            raise ValueError(f"the vocabulary lacks the single byte {min(missing)!r}")
        if pattern not in PATTERNS:
            raise ValueError(f"the vocabulary's pattern is {pattern!r:.60}; known are {', '.join(PATTERNS)}")

        self.vocabulary, self.pattern = vocabulary, pattern
        self.n_vocab = len(vocabulary) + len(SPECIAL_TOKENS)
        self.user_token, self.assistant_token, self.end_token = range(len(vocabulary), self.n_vocab)
        self._encoding = tiktoken.Encoding(
            name="rlhf",
            pat_str=PATTERNS[pattern],
            mergeable_ranks={token: rank for rank, token in enumerate(vocabulary)},
            special_tokens=dict(zip(SPECIAL_TOKENS, range(len(vocabulary), self.n_vocab))),
            explicit_n_vocab=self.n_vocab,
        )

    def encode(self, text):
        """Text to a list of ids, never a special one. A lone surrogate, which isn't text, becomes U+FFFD."""
        parts = LONG_RUN.split(text) if len(text) > 100_000 else [text]
        first, *rest = map(self._encoding.encode_ordinary, parts)
        return sum(rest, first)

    def encode_batch(self, texts, num_threads=2):
        """[encode(text) for text in texts], in threads."""
        with ThreadPoolExecutor(num_threads) as pool:
            return list(pool.map(self.encode, texts))

    def decode(self, ids):
        """A list of ids to text. Special tokens are spelled out; bytes that aren't UTF-8 become U+FFFD."""
        return self._encoding.decode(ids)

    def pieces(self, ids):
        """The bytes of each id, a list; those of a special token spell its name."""
        return self._encoding.decode_tokens_bytes(ids)

    def prompt(self, text):
        """The ids of <|user|>TEXT<|assistant|>."""
        return [self.user_token, *self.encode(text), self.assistant_token]

    def response(self, text):
        """The ids of TEXT<|end|>."""
        return [*self.encode(text), self.end_token]

    def merges(self):
        """The two tokens that each token of several bytes is merged of, in rank order: what BPE makes of its bytes with the
        merges before it. ValueError if that is one token, or more than two.

        To merge by the rank of what comes out, as tiktoken does, is therefore to merge by this list of pairs, as
        transformers does: whenever two neighbours spell a token, they are the pair of that token.
        """
        ranks, pairs = {token: rank for rank, token in enumerate(self.vocabulary)}, []
        for token, rank in ranks.items():
            parts = [token[i:i + 1] for i in range(len(token))]
            while len(parts) > 2:
                found = [ranks.get(left + right, rank) for left, right in zip(parts, parts[1:])]
                i = found.index(min(found))
                if found[i] >= rank:
                    raise ValueError(f"the vocabulary holds {token!r:.60}, which no merge of two others makes")
                parts[i:i + 2] = [parts[i] + parts[i + 1]]
            if len(parts) == 2:
                pairs.append(tuple(parts))
        return pairs

    def to_strings(self):
        """The vocabulary as a list of strings for JSON or a checkpoint, a character U+0000 to U+00FF a byte."""
        return [token.decode("latin-1") for token in self.vocabulary]

    @classmethod
    def from_strings(cls, strings, pattern="words"):
        """The tokenizer that to_strings() wrote down. ValueError if these strings aren't such a list."""
        try:
            return cls([string.encode("latin-1") for string in strings], pattern)
        except (AttributeError, TypeError, UnicodeEncodeError) as error:
            raise ValueError(f"not a vocabulary written by to_strings(): {error}") from None


def sample_text(path, size=2 ** 24):
    """The text of a file to learn a vocabulary from: all of it or, of a larger one, pieces from everywhere, `size` bytes
    or so together."""
    return "".join(itertools.islice(read_chunks(path), 0, None, 1 + sum(map(len, read_blocks(path))) // size))


def encode_file(path, tokenizer, folder):
    """The ids of a text file, which may be larger than the memory, as one array: a view of a memory-mapped file in folder,
    made in threads, and only once for a text and a vocabulary."""
    def draw():
        chunks, threads, done = read_chunks(path), os.cpu_count(), 0
        report = progress("bytes of text encoded", os.path.getsize(path))
        while group := list(itertools.islice(chunks, threads)):
            yield from tokenizer.encode_batch(group, threads)
            report(done := done + sum(len(text.encode("utf-8")) for text in group))

    vocabulary = zlib.crc32(repr((tokenizer.vocabulary, tokenizer.pattern)).encode())
    return memory_mapped(folder / f"text-{checksum(path):08x}-{vocabulary:08x}.ids", draw, joined=True)[0]


# ----------------------------------------------------------------------------------------------------
# Rows in the chat format: whole ones only, never cut

def encode_pairs(rows, tokenizer, block_size):
    """Rows -> (pairs (chosen ids, rejected ids, prompt length), kept rows, dropped {reason: number}); never cut."""
    pairs, kept, dropped = [], [], {"longer than the context": 0, "equal texts": 0}
    for row in rows:
        prompt = tokenizer.prompt(row["prompt"])
        chosen, rejected = (prompt + tokenizer.response(row[name]) for name in ("chosen", "rejected"))
        if row["chosen"] == row["rejected"]:
            dropped["equal texts"] += 1
        elif max(len(chosen), len(rejected)) > block_size:
            dropped["longer than the context"] += 1
        else:
            pairs.append((chosen, rejected, len(prompt)))
            kept.append(row)
    return pairs, kept, dropped


class Comparisons(NamedTuple):
    """What the reward model and DPO read: pairs as encode_pairs makes them and their rows, to train on and held out."""
    pairs: list
    rows: list
    held_out: list
    held_out_rows: list
    description: str


def encode_comparisons(split, origin, tokenizer, block_size):
    """The Comparisons of split = (rows to train on, held-out rows). InputError, naming origin, if one keeps nothing."""
    pairs, rows, dropped = encode_pairs(split[0], tokenizer, block_size)
    held_out, held_out_rows, held_out_dropped = encode_pairs(split[1], tokenizer, block_size)
    if not pairs or not held_out:
        raise InputError(f"{origin}: no pair is left to {'hold out' if pairs else 'train on'}; dropped {counts(dropped)} "
                         f"and {counts(held_out_dropped)}")
    return Comparisons(pairs, rows, held_out, held_out_rows,
                       f"{origin}\n        {len(pairs):,} pairs, dropped {counts(dropped)}\n"
                       f"        {len(held_out):,} held out, dropped {counts(held_out_dropped)}")
