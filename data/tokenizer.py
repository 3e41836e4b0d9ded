"""The tokenizer: byte-level BPE, trained here by hand and served by tiktoken; and the chat format.

Byte pair encoding (Sennrich et al. 2016; on bytes: Radford et al. 2019, GPT-2) starts from the 256
bytes and repeatedly gives a new id to the most frequent pair of neighbours. A worked example, the
merges of "banana bandana" up to a vocabulary of 262 = 256 bytes + 3 merges + 3 special tokens:

    banana | bandana          the text is split into words first; no merge crosses a border
    b an an a |  b an d an a  (a, n) occurs 4 times, more than any other         -> 256 = "an"
    ban an a |  ban d an a    (b, an) and (an, a) tie at 2; the smaller ids win  -> 257 = "ban"
    ban ana |  ban d ana      (an, a) occurs twice                               -> 258 = "ana"

    >>> tokenizer = Tokenizer(train("banana bandana", 262))
    >>> tokenizer.encode("banana bandana")
    [257, 258, 32, 257, 100, 258]
    >>> tokenizer.prompt("banana") + tokenizer.response("bandana")
    [259, 257, 258, 260, 257, 100, 258, 261]

The last line is the chat format, <|user|>PROMPT<|assistant|>RESPONSE<|end|>. The three special
tokens have the last three ids, and only prompt() and response() produce them: a text that spells
"<|end|>" is encoded as seven ordinary characters, so no user can end a turn by typing.
"""

import heapq
import itertools
import os
import re
import zlib
from array import array
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import regex
import tiktoken

from data.files import InputError, checksum, read_blocks, read_chunks
from data.run import counts, memory_mapped, progress

SPECIAL_TOKENS = ("<|user|>", "<|assistant|>", "<|end|>")

# A text may spell one of them, or GPT-2's.
SPELLED = re.compile(r"<\|(?:user|assistant|end|endoftext)\|>")
STAYS_TEXT = "that stays ordinary text, which the model learns to write; better remove it"

# A word, a number, or a run of other characters, each with the space before it; or white space:
# GPT-2's rule without its English contractions. White space is cut at 64 characters, because the
# look-ahead makes tiktoken panic (a stack overflow) on a run of a million blanks.
PATTERN = r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s{1,64}(?!\S)|\s{1,64}"

# GPT-2's own rule, for a vocabulary that was learnt with it. Its \s++$ changes no ids, but spares
# tiktoken the same panic where a text ends in white space; encode() splits texts at such places.
GPT2_PATTERN = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s++$|\s+(?!\S)|\s+")

# How a text is split before its pieces are merged.
PATTERNS = {"words": PATTERN, "gpt2": GPT2_PATTERN}

# Inside a long run of white space, the place before its last character.
LONG_RUN = regex.compile(
    r"(?=\p{White_Space}\P{White_Space})(?<=\p{White_Space}{1000})")

# How vocabulary files of GPT-2's kind write a byte: as its Latin-1 character if that is printable,
# otherwise as one of the characters from U+0100 on.
PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
UNPRINTABLE = [byte for byte in range(256) if byte not in PRINTABLE]
SIGNS = {byte: chr(byte) for byte in PRINTABLE}
SIGNS.update({byte: chr(0x100 + i) for i, byte in enumerate(UNPRINTABLE)})

BORDER = -1     # between two words, in training


def train(text, vocab_size):
    """Learn a vocabulary from text: a list of bytes in rank order, 256 single bytes, then merges.

    vocab_size includes the three special tokens, which aren't in the list: it has vocab_size - 3
    entries, or fewer if the text runs out of pairs to merge. Pairs are counted with their overlaps
    ("aaa" holds two) and merged from left to right; of equally frequent pairs the one with the
    smaller ids wins, so the result depends on the text alone.
    Raises ValueError if vocab_size < 259, or if text holds a lone surrogate.
    """
    if vocab_size < 256 + len(SPECIAL_TOKENS):
        raise ValueError(f"vocab_size is {vocab_size}; "
                         "256 bytes and 3 special tokens need at least 259")
    vocabulary = [bytes([i]) for i in range(256)]

    # Every distinct word once, as ids in one array, with a border before and after it. Every place
    # in the array is linked to its neighbours, so a merge costs only the places where it happens,
    # even if the whole text is one word (DNA, base64).
    occurrences = Counter(regex.findall(PATTERN, text))
    ids = array("i", [BORDER])
    weight = array("i", [0])        # how often the word at this place occurs in the text
    for word, count in occurrences.items():
        word_ids = word.encode("utf-8")
        ids.extend(word_ids)
        ids.append(BORDER)
        weight.extend([count] * (len(word_ids) + 1))
    before = array("i", range(-1, len(ids) - 1))
    after = array("i", range(1, len(ids) + 1))

    frequency = Counter()           # pair of ids -> how often it occurs in the text
    places = defaultdict(lambda: array("i"))    # pair of ids -> the places of its first id
    for i in range(1, len(ids) - 1):
        pair = (ids[i], ids[i + 1])
        if BORDER not in pair:
            frequency[pair] += weight[i]
            places[pair].append(i)

    merges = vocab_size - len(vocabulary) - len(SPECIAL_TOKENS)
    report = None
    if len(ids) > 2 ** 18:          # this takes more than a few seconds
        report = progress("merges learnt", merges)

    # A heap finds the best pair. When a frequency changes, the pair is pushed again; its outdated
    # entries are skipped when they come up. (-frequency, pair) sorts as we want: the most frequent
    # first, then the smaller ids.
    heap = [(-count, pair) for pair, count in frequency.items()]
    heapq.heapify(heap)
    while heap and len(vocabulary) < 256 + merges:
        negative_count, pair = heapq.heappop(heap)
        if frequency[pair] != -negative_count:
            continue
        first, second = pair
        new_id = len(vocabulary)
        vocabulary.append(vocabulary[first] + vocabulary[second])

        changed = set()
        for i in sorted(places.pop(pair)):      # from left to right
            j = after[i]
            if ids[i] != first or ids[j] != second:
                continue                        # the merge just before took one of the two
            left = before[i]
            right = after[j]
            for old in ((ids[left], first), pair, (second, ids[right])):
                frequency[old] -= weight[i]
                changed.add(old)

            ids[i] = new_id                     # and the place j is skipped from now on
            ids[j] = BORDER
            after[i] = right
            before[right] = i
            for place, new in ((left, (ids[left], new_id)), (i, (new_id, ids[right]))):
                frequency[new] += weight[i]
                places[new].append(place)
                changed.add(new)
        for other in changed:
            if frequency[other] > 0 and BORDER not in other:
                heapq.heappush(heap, (-frequency[other], other))
        if report:
            report(len(vocabulary) - 256)
    if report and len(vocabulary) < 256 + merges:
        report(merges)              # the text ran out of pairs
    return vocabulary


def merge(ids, pair, new_id):
    """Replace each occurrence of the pair by new_id, from left to right.

    >>> merge([1, 1, 1], (1, 1), 2)
    [2, 1]
    """
    merged = []
    i = 0
    while i < len(ids):
        if i + 1 < len(ids) and (ids[i], ids[i + 1]) == pair:
            merged.append(new_id)
            i += 2
        else:
            merged.append(ids[i])
            i += 1
    return merged


class Tokenizer:
    """Text to ids and back, for a vocabulary from train() or GPT-2's.

    Ids run from 0 to n_vocab - 1; the last three are the special tokens.
    """

    def __init__(self, vocabulary, pattern="words"):
        """vocabulary: list of bytes in rank order; pattern: a name in PATTERNS.

        Raises ValueError if some text could not be encoded, or if there is no such pattern.
        """
        vocabulary = list(vocabulary)
        wrong = [token for token in vocabulary if not isinstance(token, bytes) or not token]
        if wrong:
            raise ValueError(f"the vocabulary holds {wrong[0]!r:.60}; "
                             "every entry must be bytes, at least one")
        twice = [token for token, count in Counter(vocabulary).items() if count > 1]
        if twice:
            raise ValueError(f"the vocabulary holds {twice[0]!r:.60} twice")
        missing = {bytes([i]) for i in range(256)} - set(vocabulary)
        if missing:
            raise ValueError(f"the vocabulary lacks the single byte {min(missing)!r}")
        if pattern not in PATTERNS:
            raise ValueError(f"the vocabulary's pattern is {pattern!r:.60}; "
                             f"known are {', '.join(PATTERNS)}")

        self.vocabulary = vocabulary
        self.pattern = pattern
        self.n_vocab = len(vocabulary) + len(SPECIAL_TOKENS)
        self.user_token = len(vocabulary)
        self.assistant_token = len(vocabulary) + 1
        self.end_token = len(vocabulary) + 2
        self._encoding = tiktoken.Encoding(
            name="rlhf",
            pat_str=PATTERNS[pattern],
            mergeable_ranks={token: rank for rank, token in enumerate(vocabulary)},
            special_tokens=dict(zip(SPECIAL_TOKENS, range(len(vocabulary), self.n_vocab))),
            explicit_n_vocab=self.n_vocab,
        )

    def encode(self, text):
        """Text to a list of ids, never a special one. A lone surrogate becomes U+FFFD."""
        if len(text) <= 100_000:
            return self._encoding.encode_ordinary(text)
        ids = []
        for part in LONG_RUN.split(text):
            ids += self._encoding.encode_ordinary(part)
        return ids

    def encode_batch(self, texts, num_threads=2):
        """[encode(text) for text in texts], in threads."""
        with ThreadPoolExecutor(num_threads) as pool:
            return list(pool.map(self.encode, texts))

    def decode(self, ids):
        """A list of ids to text. Special tokens are spelled out; invalid UTF-8 becomes U+FFFD."""
        return self._encoding.decode(ids)

    def pieces(self, ids):
        """The bytes of each id, a list; those of a special token spell its name."""
        return self._encoding.decode_tokens_bytes(ids)

    def shown(self, ids):
        """Each id as a short text for a table, a list: blanks as "·", line ends as "\\n"."""
        texts = []
        for piece in self.pieces(ids):
            text = piece.decode("utf-8", "backslashreplace")
            texts.append(text.replace(" ", "·").replace("\n", "\\n"))
        return texts

    def prompt(self, text):
        """The ids of <|user|>TEXT<|assistant|>."""
        return [self.user_token, *self.encode(text), self.assistant_token]

    def response(self, text):
        """The ids of TEXT<|end|>."""
        return [*self.encode(text), self.end_token]

    def merges(self):
        """For each token of several bytes, in rank order, the two tokens that it is merged from.

        They are what BPE makes of the token's bytes with the merges before it. Raises ValueError if
        that is one token, or more than two.

        tiktoken merges by the rank of the result, transformers by this list of pairs. Both do the
        same: whenever two neighbours spell a token, they are the pair of that token.
        """
        ranks = {token: rank for rank, token in enumerate(self.vocabulary)}
        pairs = []
        for token, rank in ranks.items():
            parts = [bytes([value]) for value in token]
            while len(parts) > 2:
                merged_ranks = []
                for left, right in zip(parts, parts[1:]):
                    merged_ranks.append(ranks.get(left + right, rank))
                best = min(merged_ranks)
                if best >= rank:
                    raise ValueError(f"the vocabulary holds {token!r:.60}, "
                                     "which no merge of two others makes")
                i = merged_ranks.index(best)
                parts[i:i + 2] = [parts[i] + parts[i + 1]]
            if len(parts) == 2:
                pairs.append(tuple(parts))
        return pairs

    def to_strings(self):
        """The vocabulary as strings for JSON or a checkpoint, a character for each byte."""
        return [token.decode("latin-1") for token in self.vocabulary]

    @classmethod
    def from_strings(cls, strings, pattern="words"):
        """The tokenizer whose to_strings() this is; ValueError if it is no such list."""
        try:
            return cls([string.encode("latin-1") for string in strings], pattern)
        except (AttributeError, TypeError, UnicodeEncodeError) as error:
            raise ValueError(f"not a vocabulary written by to_strings(): {error}") from None


def sample_text(path, size=2 ** 24):
    """The text of a file to learn a vocabulary from.

    All of it, or of a file larger than `size` bytes, about that much in pieces from everywhere; of
    a piece that is larger still, a line without blanks, the beginning.
    """
    file_size = 0
    for block in read_blocks(path):
        file_size += len(block)
    every = 1 + file_size // size

    sample = []
    for number, text in enumerate(read_chunks(path)):
        if number % every == 0:
            sample.append(text[:max(size, 2 ** 20)])
    return "".join(sample)


def encode_file(path, tokenizer, folder):
    """The ids of a text file, which may be larger than the memory, as one array.

    The array is a view of a memory-mapped file in folder. That file is made in threads, and only
    once for each text and vocabulary.
    """
    def encode():
        threads = os.cpu_count()
        report = progress("bytes of text encoded", os.path.getsize(path))
        done = 0
        chunks = read_chunks(path)
        while group := list(itertools.islice(chunks, threads)):
            yield from tokenizer.encode_batch(group, threads)
            done += sum(len(text.encode("utf-8")) for text in group)
            report(done)

    vocabulary = zlib.crc32(repr((tokenizer.vocabulary, tokenizer.pattern)).encode())
    name = f"text-{checksum(path):08x}-{vocabulary:08x}.ids"
    return memory_mapped(folder / name, encode, joined=True)[0]


def remark_on_file(path):
    """What to say about the text of a file before a model is trained on it: a line, or "".

    Many texts separate their documents with a spelled <|endoftext|>.
    """
    spelled = Counter()
    for text in read_chunks(path):  # no piece ends inside of one
        spelled.update(SPELLED.findall(text))
    if not spelled:
        return ""
    found = ", ".join(f"{name} {count:,} times" for name, count in spelled.most_common())
    return f"\n        spells {found}: {STAYS_TEXT}"


# --------------------------------------------------------------------------------------------------
# Pairs in the chat format: whole ones only, never cut


def remarks(rows):
    """What to say about rows of texts before a model is trained on them: lines that end a
    description, or "". Special tokens that somebody spelled out, and answers that begin with their
    prompt, which the chat format has before them already."""
    spelling = 0
    repeating = 0
    spelled = set()
    for row in rows:
        answers = [row[field] for field in ("completion", "chosen", "rejected") if field in row]
        found = SPELLED.findall("\n".join([row["prompt"], *answers]))
        spelled.update(found)
        spelling += bool(found)
        repeating += all(answer.startswith(row["prompt"]) for answer in answers)
    lines = ""
    if spelling:
        names = ", ".join(sorted(spelled))
        lines += f"\n        {spelling:,} of {len(rows):,} rows spell {names}: {STAYS_TEXT}"
    if repeating:
        lines += (f"\n        {repeating:,} of {len(rows):,} rows repeat their prompt at the "
                  "beginning of the answers, so it is read twice;\n        cut it off: "
                  "answer.removeprefix(prompt)")
    return lines


class Pair(NamedTuple):
    """Two responses to one prompt; each of chosen and rejected is the ids of prompt + response."""
    chosen: list
    rejected: list
    prompt_length: int


def encode_pairs(rows, tokenizer, block_size):
    """Rows -> (list of Pair, the rows of these pairs, {why a row was dropped: how many})."""
    pairs = []
    kept = []
    dropped = {"longer than the context": 0, "equal texts": 0}
    for row in rows:
        prompt = tokenizer.prompt(row["prompt"])
        chosen = prompt + tokenizer.response(row["chosen"])
        rejected = prompt + tokenizer.response(row["rejected"])
        if row["chosen"] == row["rejected"]:
            dropped["equal texts"] += 1
        elif max(len(chosen), len(rejected)) > block_size:
            dropped["longer than the context"] += 1
        else:
            pairs.append(Pair(chosen, rejected, len(prompt)))
            kept.append(row)
    return pairs, kept, dropped


class Comparisons(NamedTuple):
    """What the reward model and DPO read: pairs to train on, pairs held out, and their rows."""
    pairs: list
    rows: list
    held_out: list
    held_out_rows: list
    description: str


def encode_comparisons(split, origin, tokenizer, block_size):
    """The Comparisons of split = (rows to train on, held-out rows).

    Raises InputError, naming origin, if no pair is left of one of the two.
    """
    train_rows, held_out_rows = split
    about = remarks(train_rows + held_out_rows)
    pairs, train_rows, dropped = encode_pairs(train_rows, tokenizer, block_size)
    held_out, held_out_rows, held_out_dropped = encode_pairs(held_out_rows, tokenizer, block_size)
    if not pairs or not held_out:
        purpose = "hold out" if pairs else "train on"
        raise InputError(f"{origin}: no pair is left to {purpose}; dropped {counts(dropped)} "
                         f"and {counts(held_out_dropped)}; the context has {block_size} tokens")
    description = (f"{origin}\n"
                   f"        {len(pairs):,} pairs, dropped {counts(dropped)}\n"
                   f"        {len(held_out):,} held out, dropped {counts(held_out_dropped)}{about}")
    return Comparisons(pairs, train_rows, held_out, held_out_rows, description)


class Demonstration(NamedTuple):
    """A prompt and the answer that someone wrote; ids: prompt + response + <|end|>."""
    ids: list
    prompt_length: int


def encode_demonstrations(rows, tokenizer, block_size):
    """Rows {"prompt", "completion"} -> (Demonstrations, how many were longer than the context)."""
    demonstrations = []
    for row in rows:
        prompt = tokenizer.prompt(row["prompt"])
        ids = prompt + tokenizer.response(row["completion"])
        if len(ids) <= block_size:
            demonstrations.append(Demonstration(ids, len(prompt)))
    return demonstrations, len(rows) - len(demonstrations)


class Label(NamedTuple):
    """A response that is good or not; ids: prompt + response + <|end|>."""
    ids: list
    prompt_length: int
    desirable: bool


def labels_of(pairs):
    """Pairs as Labels, the chosen first."""
    chosen = [Label(pair.chosen, pair.prompt_length, True) for pair in pairs]
    rejected = [Label(pair.rejected, pair.prompt_length, False) for pair in pairs]
    return chosen + rejected


def encode_labels(split, origin, tokenizer, block_size):
    """(Labels to train on, held-out Labels, a sentence about them) of split = (rows {"prompt",
    "completion", "label"}, held-out rows).

    Raises InputError, naming origin, if none is left of one of the two.
    """
    encoded = []
    dropped = 0
    for rows in split:
        labels = []
        for row in rows:
            demonstrations, longer = encode_demonstrations([row], tokenizer, block_size)
            dropped += longer
            for one in demonstrations:
                labels.append(Label(one.ids, one.prompt_length, row["label"]))
        encoded.append(labels)
    labels, held_out = encoded
    if not labels or not held_out:
        purpose = "hold out" if labels else "train on"
        raise InputError(f"{origin}: no label is left to {purpose}; dropped {dropped} longer than "
                         f"the context of {block_size} tokens")
    description = (f"{origin}: {len(labels):,} labels, {len(held_out):,} held out; dropped "
                   f"{dropped} longer than the context{remarks(split[0] + split[1])}")
    return labels, held_out, description
