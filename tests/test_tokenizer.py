"""The tokenizer against a brute-force trainer, a naive encoder, and hostile strings."""

import random
import time
from collections import Counter

import pytest
import regex

import sft
from data.corpus import text_corpus
from data.files import read_chunks
from data.tokenizer import (PATTERN, PATTERNS, SPECIAL_TOKENS, Pair, Tokenizer, encode_comparisons,
                            encode_demonstrations, encode_file, encode_labels, encode_pairs, merge,
                            remarks, sample_text, train)

TEXT = """Tell me a story about a shy fox and a kite. Tell me a story about a brave hen and a lamp.
Once upon a time there was a shy fox who lived under the old oak. The fox had a kite, but the
wind was never there when the fox was. "Wind, wind," said the fox, "where do you go at 12 or 1212 or
121212?"
The banana bandana sang: aaaa aaaaa aaaaaa, lalalala, ananananas!  Naïve café, 日本語日本語, 🦊🪁🦊🪁.
"""


def random_text(rng, length):
    """Words, every plane of Unicode, and what breaks tokenizers: joined emoji, NUL, specials."""
    hostile = ["👩‍👩‍👧", "e\u0301\u0301", "\0", "\r\n", "\t", "  ", "\u2028", "\ufeff", "\x1c",
               *SPECIAL_TOKENS, "fox", " kite", "0123", "'s", "...", "\x7f"]
    ranges = [(0, 0x7F), (0x80, 0x7FF), (0x800, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x10FFFF)]
    pieces = []
    for _ in range(length):
        pieces += [rng.choice(hostile), chr(rng.randint(*rng.choice(ranges)))]
    return "".join(pieces)


def brute_force_train(text, vocab_size):
    """The definition: count every pair anew in each round. Returns the list of (pair, new id)."""
    words = [list(word.encode()) for word in regex.findall(PATTERN, text)]
    merges = []
    while 256 + len(merges) + 3 < vocab_size:
        counts = Counter(pair for word in words for pair in zip(word, word[1:]))
        if not counts:
            break
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append((best, 256 + len(merges)))
        words = [merge(word, *merges[-1]) for word in words]
    return merges


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(train(TEXT, 400))


def test_training_equals_recounting_every_round():
    """Incremental counts drift when a pair overlaps itself or its neighbours (aaaa, lalala);
    recounting can't. vocab_size includes bytes and specials."""
    rng = random.Random(0)
    texts = [TEXT, "a" * 37, "ab" * 20 + " " + "aab" * 9, random_text(rng, 150), ""]
    texts += ["".join(rng.choices("aab c", k=rng.randint(0, 200))) for _ in range(30)]
    for text in texts:
        vocabulary = [bytes([i]) for i in range(256)]
        pairs = []
        for (left, right), _ in brute_force_train(text, 400):
            pairs.append((vocabulary[left], vocabulary[right]))
            vocabulary.append(vocabulary[left] + vocabulary[right])
        assert train(text, 400) == vocabulary
        assert Tokenizer(vocabulary).merges() == pairs  # what other libraries want
        assert train(text, 260) == vocabulary[:257]
        assert train(text, 259) == vocabulary[:256]  # the smallest: no merge


def test_a_text_without_blanks_takes_no_time_a_merge(capsys):
    """DNA, base64, one long line: a merge that rewrites every word it occurs in rewrites the whole
    text 1,200 times; 100,000 letters took five minutes, without a word."""
    text = "".join(random.Random(5).choices("ACGT", k=10_000))
    seconds = []
    for vocab_size in (300, 1472):
        began = time.process_time()
        assert len(train(text, vocab_size)) == vocab_size - 3
        seconds.append(time.process_time() - began)
    assert seconds[1] < 10 * seconds[0] + 0.5   # there are 30 times as many merges
    train("a" * 300_000, 300)   # which runs out of pairs
    assert "merges learnt: 41 in" in capsys.readouterr().out


def test_encoding_equals_merges_in_order(tokenizer):
    """tiktoken merges by the bytes' rank, training by pairs of ids: they split a text differently.
    A pattern that skips a character, a lone surrogate, half an emoji; a million blanks, on which
    GPT-2's pattern overflows tiktoken's regex stack: a Rust panic that no except catches."""
    rng = random.Random(1)
    merges = brute_force_train(TEXT, 400)
    texts = [TEXT, "a" * 100, "ananana bananas", "", " "]
    texts += [random_text(rng, rng.randint(0, 20)) for _ in range(300)]
    texts += ["".join(rng.choices("aanl fox", k=50)) for _ in range(100)]
    for text, ids in zip(texts, tokenizer.encode_batch(texts)):
        assert tokenizer.decode(ids) == text and tokenizer.encode(text) == ids
        # Python's and Rust's tables may differ in what they call white space.
        if not regex.search(r"[\x1c-\x1f]|\p{Cn}", text):
            expected = []
            for word in regex.findall(PATTERN, text):
                word = list(word.encode())
                for pair, new_id in merges:
                    word = merge(word, pair, new_id)
                expected += word
            assert ids == expected
    assert len(tokenizer.encode(TEXT)) < 0.6 * len(TEXT.encode())

    assert tokenizer.decode(tokenizer.encode("fox\ud83e kite")) == "fox\ufffd kite"
    assert tokenizer.decode(list("🦊".encode())[:2]) == "\ufffd"
    for text in (" " * 1_000_000, "\n" * 300_000 + "fox", "a" * 300_000):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_pieces_of_a_file_are_encoded_like_the_whole(tmp_path):
    """A word, a line end or a run of blanks that a border between the pieces of a large text cuts
    in two: it has other ids."""
    rng = random.Random(4)
    path = tmp_path / "text.txt"
    tokenizers = [Tokenizer(train(TEXT, 400), pattern) for pattern in PATTERNS]
    blanks = ["\r\n", "\n", " ", "\t", "\x1c", "\x85", "\u2028", "\u3000", ".", "it's", "é", "日本 "]
    for _ in range(150):
        text = "x"
        for _ in range(rng.randint(1, 30)):
            text += rng.choice(blanks) * rng.choice([1, 1, 1, 3, 70])
        path.write_bytes(text.encode())
        pieces = list(read_chunks(path, rng.randint(1, 50)))
        text = text.replace("\r\n", "\n")
        for tokenizer in tokenizers:
            assert sum(tokenizer.encode_batch(pieces), []) == tokenizer.encode(text), repr(text)


def test_a_file_is_encoded_once(tmp_path):
    """A corpus that is encoded anew at every start, or one of another text or vocabulary that is
    taken for it. A vocabulary that is learnt from the beginning of a text only."""
    path = tmp_path / "text.txt"
    long = TEXT * 3000  # two pieces
    one = Tokenizer(train(TEXT, 400))
    other = Tokenizer(train(TEXT, 300))
    listings = []
    for text, tokenizer in ((TEXT, one), (long, one), (long, one), (long, other)):
        path.write_text(text, encoding="utf-8")
        assert encode_file(path, tokenizer, tmp_path / "ids").tolist() == tokenizer.encode(text)
        listings.append({file: file.stat().st_mtime_ns for file in (tmp_path / "ids").iterdir()})
    assert listings[0] != listings[1] == listings[2] != listings[3]
    sample = sample_text(path, 2 ** 20)
    assert len(long) / 2 < len(sample) < len(long) and sample[:1000] == long[:1000]


def test_rows_are_encoded_whole(tokenizer):
    """Chosen and rejected swapped, or a prompt's length off by one: a loss over the wrong tokens. A
    text cut to the context teaches to stop in the middle, or never to end."""
    rows = [{"prompt": "Tell me a story.", "chosen": "Once upon a time.", "rejected": "No."},
            {"prompt": "A fox?", "chosen": "No.", "rejected": "No."},
            {"prompt": "A kite?", "chosen": "No.", "rejected": "no " * 200}]
    prompt = tokenizer.prompt("Tell me a story.")
    chosen = prompt + tokenizer.response("Once upon a time.")
    rejected = prompt + tokenizer.response("No.")
    for block_size, reasons in ((len(chosen), (1, 1)), (len(chosen) - 1, (2, 1))):
        pairs, kept, dropped = encode_pairs(rows, tokenizer, block_size)
        assert tuple(dropped.values()) == reasons
        assert kept == rows[:2 - reasons[0]]
        assert pairs == [Pair(chosen, rejected, len(prompt))] * len(kept)
        row = {"prompt": "Tell me a story.", "completion": "Once upon a time."}
        found = encode_demonstrations([row], tokenizer, block_size)
        assert found == ([(chosen, len(prompt))] * len(kept), reasons[0] - 1)


def test_repeated_prompts_and_spelled_special_tokens_are_counted(tokenizer, tmp_path):
    """HH and others: chosen and rejected hold the whole dialogue, and the model learns to write
    prompts. Texts whose end is spelled "<|endoftext|>": every answer ends in half of that."""
    rows = [{"prompt": "A kite?", "chosen": "A kite? <|end|>", "rejected": "A kite? No."},
            {"prompt": "<|user|>A fox?", "chosen": "<|user|>A fox? Yes.", "rejected": "No."},
            {"prompt": "A <|hen|>?", "chosen": "Yes.", "rejected": "No."}]
    said = remarks(rows)
    assert "2 of 3 rows spell <|end|>, <|user|>: that stays ordinary text" in said
    assert "1 of 3 rows repeat their prompt at the beginning of the answers" in said
    assert remarks(rows[2:]) == ""
    assert encode_comparisons((rows[:2], rows[2:]), "", tokenizer, 99).description.endswith(said)

    labels = [{"prompt": row["prompt"], "completion": row["chosen"], "label": True} for row in rows]
    split = (labels[:2], labels[2:])
    said = said.replace("1 of 3", "2 of 3")
    assert encode_labels(split, "rows", tokenizer, 99)[2].endswith(said)
    assert sft.read_data(sft.Config(data="rows"), split, tokenizer, 99).description.endswith(said)

    path = tmp_path / "text.txt"
    path.write_text("A story.\n<|endoftext|>\n" * 3000 + "<|end|>", encoding="utf-8")
    said = "spells <|endoftext|> 3,000 times, <|end|> 1 times: that stays ordinary text"
    assert said in text_corpus(path, tokenizer, None, 32, 4, 1, tmp_path).description
