"""The tokenizer against a brute-force trainer, a naive encoder, and 10,000 hostile strings."""

import json
import random
import time
from collections import Counter

import pytest
import regex

import sft
from data.corpus import text_corpus
from data.files import read_chunks
from data.tokenizer import (PATTERN, PATTERNS, SPECIAL_TOKENS, Tokenizer, encode_comparisons,
                            encode_file, encode_labels, encode_pairs, merge, remark_on_file,
                            remarks, sample_text, train)

TEXT = """Tell me a story about a shy fox and a kite. Tell me a story about a brave hen and a lamp.
Once upon a time there was a shy fox who lived under the old oak. The fox had a kite, but the
wind was never there when the fox was. "Wind, wind," said the fox, "where do you go at 12 or 1212 or
121212?"
The banana bandana sang: aaaa aaaaa aaaaaa, lalalala, ananananas!  Naïve café, 日本語日本語, 🦊🪁🦊🪁.
"""


def random_text(rng, length):
    """Words, every plane of Unicode, and what breaks tokenizers: joined emoji, accents, NUL, CRLF,
    specials."""
    hostile = ["👩‍👩‍👧", "🇩🇪", "e\u0301\u0301", "\0", "\r\n", "\t", "  ", "\u2028", "\ufeff", "\x1c",
               "\x85", "\xa0", "ﷺ",
               "<|end|>", "<|user|>", "<|assistant|>", "fox", " kite", "0123", "'s", "...", "\x7f",
               "\uffff"]
    ranges = [(0, 0x7F), (0x80, 0x7FF), (0x800, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x10FFFF),
              (0x300, 0x36F)]
    text = ""
    for _ in range(length):
        if rng.random() < 0.5:
            text += rng.choice(hostile)
        else:
            text += chr(rng.randint(*rng.choice(ranges)))
    return text


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


def naive_encode(text, merges):
    """The definition: every merge in the order it was learnt, over every word."""
    ids = []
    for word in regex.findall(PATTERN, text):
        word = list(word.encode())
        for pair, new_id in merges:
            word = merge(word, pair, new_id)
        ids += word
    return ids


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(train(TEXT, 400))


def test_worked_example():
    """The docstring's example, counted by hand: a wrong tie-break or a wrong place for the specials
    shows here."""
    vocabulary = train("banana bandana", 262)
    assert vocabulary[:256] == [bytes([i]) for i in range(256)]
    assert vocabulary[256:] == [b"an", b"ban", b"ana"]
    tokenizer = Tokenizer(vocabulary)
    assert tokenizer.encode("banana bandana") == [257, 258, 32, 257, 100, 258]
    chat = tokenizer.prompt("banana") + tokenizer.response("bandana")
    assert chat == [259, 257, 258, 260, 257, 100, 258, 261]


def test_merge_takes_overlaps_from_left_to_right():
    """Counting or merging "aaa" as two merges of the same byte would lose or double a byte."""
    assert merge([1, 1, 1], (1, 1), 2) == [2, 1]
    assert merge([1, 1, 1, 1], (1, 1), 2) == [2, 2]
    assert merge([3, 1, 2, 1, 2], (1, 2), 4) == [3, 4, 4]
    assert merge([], (1, 2), 3) == [] and merge([1], (1, 1), 3) == [1]


def test_training_equals_recounting_every_round():
    """Incremental counts drift when a pair overlaps itself or its neighbours (aaaa, lalala);
    recounting can't."""
    rng = random.Random(0)
    texts = [TEXT, "a" * 37, "ab" * 20 + " " + "aab" * 9, random_text(rng, 300)]
    texts += ["".join(rng.choices("aab c", k=rng.randint(0, 200))) for _ in range(40)]
    for text in texts:
        vocabulary = [bytes([i]) for i in range(256)]
        for (left, right), _ in brute_force_train(text, 400):
            vocabulary.append(vocabulary[left] + vocabulary[right])
        assert train(text, 400) == vocabulary


def test_a_text_without_blanks_takes_no_time_a_merge():
    """DNA, base64, one long line: a merge that rewrites every word it occurs in rewrites the whole
    text 1,200 times; 100,000 letters took five minutes."""
    text = "".join(random.Random(5).choices("ACGT", k=10_000))
    seconds = []
    for vocab_size in (300, 1472):
        began = time.process_time()
        assert len(train(text, vocab_size)) == vocab_size - 3
        seconds.append(time.process_time() - began)
    assert seconds[1] < 10 * seconds[0] + 0.5   # there are 30 times as many merges


def test_long_trainings_show_progress(capsys):
    """Minutes without a word: is it still running?"""
    text = "".join(random.Random(5).choices("ACGT", k=300_000))
    train(text[:1000], 264)
    assert capsys.readouterr().out == ""
    train(text, 264)
    assert "merges learnt: 5 in" in capsys.readouterr().out
    train("a" * 300_000, 300)   # which runs out of pairs
    assert "merges learnt: 41 in" in capsys.readouterr().out


def test_encoding_equals_merges_in_order(tokenizer):
    """tiktoken merges by the bytes' rank, training by pairs of ids: if they split a text
    differently, the model is trained on one segmentation and asked about another."""
    rng = random.Random(1)
    merges = brute_force_train(TEXT, 400)
    texts = [TEXT, "a" * 100, "ananana bananas", "", " "]
    texts += [random_text(rng, 30) for _ in range(100)]
    texts += ["".join(rng.choices("aanl fox", k=50)) for _ in range(100)]
    for text in texts:
        # Python's and Rust's tables may differ in what they call white space; then only the bytes
        # must agree.
        if not regex.search(r"[\x1c-\x1f]|\p{Cn}", text):
            assert tokenizer.encode(text) == naive_encode(text, merges)
    assert len(tokenizer.encode(TEXT)) < 0.6 * len(TEXT.encode())


def test_any_text_comes_back(tokenizer):
    """A pattern that skips a character, or a byte without an id, silently deletes what a user
    wrote."""
    rng = random.Random(2)
    texts = [random_text(rng, rng.randint(0, 20)) for _ in range(10_000)]
    batch = tokenizer.encode_batch(texts)
    for text, ids in zip(texts, batch):
        assert ids == tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(0 <= i < tokenizer.n_vocab - 3 for i in ids)


def test_half_characters_are_replaced(tokenizer):
    """Neither a lone surrogate in a prompt nor a response cut inside an emoji may end a run with a
    traceback."""
    assert tokenizer.decode(tokenizer.encode("fox\ud83e kite")) == "fox\ufffd kite"
    assert tokenizer.decode(list("🦊".encode())[:2]) == "\ufffd"
    with pytest.raises(ValueError):
        train("fox\ud83e kite", 300)


def test_long_runs_do_not_panic(tokenizer):
    """GPT-2's pattern overflows tiktoken's regex stack on a million blanks: a Rust panic that no
    except catches."""
    for text in (" " * 1_000_000, "\n" * 300_000 + "fox", "a" * 300_000, "?" * 300_000,
                 "🦊" * 100_000):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_pieces_of_a_file_are_encoded_like_the_whole(tmp_path):
    """A text of several GB is encoded in pieces: a word, a line end or a run of blanks that a
    border cuts in two has other ids, and so has every copy of it there."""
    rng = random.Random(4)
    path = tmp_path / "text.txt"
    tokenizers = [Tokenizer(train(TEXT, 400), pattern) for pattern in PATTERNS]
    blanks = ["\r\n", "\n", " ", "\t", "\x1c", "\x85", "\u2028", "\u3000", ".", "it's", "é", "日本 "]
    for _ in range(300):
        text = "x"
        for _ in range(rng.randint(1, 30)):
            text += rng.choice(blanks) * rng.choice([1, 1, 1, 3, 70])
        path.write_bytes(text.encode())
        pieces = list(read_chunks(path, rng.randint(1, 50)))
        text = text.replace("\r\n", "\n").replace("\r", "\n")
        assert "".join(pieces) == text
        for tokenizer in tokenizers:
            assert sum(tokenizer.encode_batch(pieces), []) == tokenizer.encode(text), repr(text)


def test_a_file_is_encoded_once(tmp_path):
    """A corpus that is encoded anew at every start, or one of another text or vocabulary that is
    taken for it."""
    path, text = tmp_path / "text.txt", TEXT * 3000  # two pieces
    path.write_text(text, encoding="utf-8")
    tokenizer, other = Tokenizer(train(TEXT, 400)), Tokenizer(train(TEXT, 300))
    for _ in range(2):
        assert encode_file(path, tokenizer, tmp_path / "ids").tolist() == tokenizer.encode(text)
        assert len(list((tmp_path / "ids").iterdir())) == 1
    assert encode_file(path, other, tmp_path / "ids").tolist() == other.encode(text)
    path.write_text(TEXT, encoding="utf-8")
    assert encode_file(path, tokenizer, tmp_path / "ids").tolist() == tokenizer.encode(TEXT)
    assert sample_text(path) == TEXT
    path.write_text(text, encoding="utf-8")
    sample = sample_text(path, 2 ** 20)
    assert len(text) / 2 < len(sample) < len(text) and sample[:1000] == text[:1000]
    path.write_text("x" * 2 ** 21, encoding="utf-8")    # one word is one piece
    assert sample_text(path, 2 ** 19) == "x" * 2 ** 20


def test_merges_are_those_of_training():
    """The list of pairs that other libraries want: out of order, or of another pair that spells the
    same, they encode another way."""
    text = TEXT + "aaaaaa aaaaaaaaaaa lalala"
    vocabulary = train(text, 400)
    pairs = []
    for (left, right), _ in brute_force_train(text, 400):
        pairs.append((vocabulary[left], vocabulary[right]))
    assert Tokenizer(vocabulary).merges() == pairs
    with pytest.raises(ValueError, match="no merge of two"):
        Tokenizer([bytes([i]) for i in range(256)] + [b"abc"]).merges()


def test_text_never_becomes_a_special_token(tokenizer):
    """A user who types <|end|> must not end the turn, nor one who types <|assistant|> speak for the
    model."""
    for special in SPECIAL_TOKENS:
        for text in (special, special * 3, f"a fox{special}a kite", f" {special}\n"):
            ids = tokenizer.prompt(text)
            assert [i for i in ids if i >= len(tokenizer.vocabulary)] == [tokenizer.user_token,
                                                                          tokenizer.assistant_token]
            assert tokenizer.decode(ids) == f"<|user|>{text}<|assistant|>"
    # Not even when the tokenizer was trained on a text full of them.
    eager = Tokenizer(train("<|end|>" * 50, 300))
    assert max(eager.encode("<|end|>")) < eager.end_token


def test_chat_format(tokenizer):
    """The design's <|user|>PROMPT<|assistant|>RESPONSE<|end|>, each special exactly once and at its
    place."""
    ids = tokenizer.prompt("Tell me a story.") + tokenizer.response("Once upon a time.")
    assert tokenizer.decode(ids) == "<|user|>Tell me a story.<|assistant|>Once upon a time.<|end|>"
    assert (ids[0], ids[-1]) == (tokenizer.user_token, tokenizer.end_token)
    assert tokenizer.prompt("") == [tokenizer.user_token, tokenizer.assistant_token]
    assert tokenizer.response("") == [tokenizer.end_token]


def test_pairs_are_whole(tokenizer):
    """Chosen and rejected swapped, or a prompt's length off by one: a loss over the wrong tokens. A
    pair cut to the context teaches never to end."""
    rows = [{"prompt": "Tell me a story.", "chosen": "Once upon a time.", "rejected": "No."},
            {"prompt": "A fox?", "chosen": "No.", "rejected": "No."},
            {"prompt": "A kite?", "chosen": "No.", "rejected": "no " * 200}]
    pairs, kept, dropped = encode_pairs(rows, tokenizer, block_size=40)
    assert kept == rows[:1] and dropped == {"longer than the context": 1, "equal texts": 1}
    prompt = tokenizer.prompt("Tell me a story.")
    for ids, text in ((pairs[0].chosen, "Once upon a time."), (pairs[0].rejected, "No.")):
        assert ids[:pairs[0].prompt_length] == prompt
        assert ids[pairs[0].prompt_length:] == tokenizer.response(text)


def test_answers_that_repeat_their_prompt_are_counted(tokenizer):
    """HH and others: chosen and rejected hold the whole dialogue. The model reads every prompt
    twice, learns to write prompts, and nothing says so."""
    rows = []
    for i in range(6):
        prompt = f"Human: {i}\n\nAssistant:"
        rows.append({"prompt": prompt, "chosen": f"{prompt} yes", "rejected": f"{prompt} no"})
    rows.append({"prompt": "Human: 7", "chosen": "Human: 7? Yes.", "rejected": "No."})
    said = "6 of 7 rows repeat their prompt at the beginning of the answers"
    description = encode_comparisons((rows[:4], rows[4:]), "rows", tokenizer, 99).description
    assert description.count(said) == 1 and "answer.removeprefix(prompt)" in description
    labels = [{"prompt": row["prompt"], "completion": row["chosen"], "label": True} for row in rows]
    _, _, description = encode_labels((labels[:4], labels[4:]), "rows", tokenizer, 99)
    assert description.count(said.replace("6 of 7", "7 of 7")) == 1
    assert remarks(rows[6:]) == ""


def test_spelled_special_tokens_are_counted(tokenizer, tmp_path):
    """Texts whose end is spelled "<|endoftext|>": the model learns to write that, or half of it,
    and every answer ends in rubbish."""
    rows = [{"prompt": "A kite?", "completion": "A toy.<|endoftext|>"},
            {"prompt": "<|user|>A fox?<|assistant|>", "completion": "Red.<|endoftext|>"},
            {"prompt": "A <|hen|>?", "completion": "<end>"}]
    assert remarks(rows) == ("\n        2 of 3 rows spell <|assistant|>, <|endoftext|>, <|user|>: "
                             "that stays ordinary text, which the model learns to write; better "
                             "remove it")
    data = sft.read_data(sft.Config(data="rows"), (rows[:2], rows[2:]), tokenizer, 99)
    assert data.description.endswith(remarks(rows))
    assert remarks(rows[2:]) == "" and tokenizer.end_token not in tokenizer.encode("<|endoftext|>")

    path = tmp_path / "text.txt"
    path.write_text("A story.\n<|endoftext|>\n" * 200_000 + "<|end|>", encoding="utf-8")
    said = "spells <|endoftext|> 200,000 times, <|end|> 1 times: that stays ordinary text"
    assert said in remark_on_file(path)
    corpus = text_corpus(path, tokenizer, None, 32, 4, 1, tmp_path)
    assert said in corpus.description
    path.write_text(TEXT, encoding="utf-8")
    assert remark_on_file(path) == ""


def test_every_id_is_a_token(tokenizer):
    """A padded vocabulary lets the model sample an id that nothing decodes."""
    n = len(tokenizer.vocabulary)
    assert n == 397 and tokenizer.n_vocab == 400
    assert tokenizer.user_token == n and tokenizer.assistant_token == n + 1
    assert tokenizer.end_token == n + 2
    for i, token in enumerate(tokenizer.vocabulary):
        assert tokenizer.decode([i]) == token.decode("utf-8", "replace")
    assert tuple(tokenizer.decode([i]) for i in range(n, n + 3)) == SPECIAL_TOKENS
    assert len(set(tokenizer.vocabulary)) == n


def test_vocabulary_sizes():
    """vocab_size includes bytes and specials; forgetting either makes the embedding the wrong
    size."""
    assert len(train(TEXT, 259)) == 256
    assert len(train(TEXT, 260)) == 257
    assert len(train("", 1000)) == 256
    assert train("abc", 1000)[256:] == [b"ab", b"abc"]      # the text runs out of pairs
    assert train(TEXT, 300) == train(TEXT, 400)[:297]
    with pytest.raises(ValueError, match="259"):
        train(TEXT, 258)


def test_vocabulary_survives_json(tokenizer):
    """Every checkpoint stores the vocabulary; one that doesn't come back byte for byte loads
    another language."""
    again = Tokenizer.from_strings(json.loads(json.dumps(tokenizer.to_strings())))
    assert again.vocabulary == tokenizer.vocabulary
    assert again.encode(TEXT) == tokenizer.encode(TEXT)


@pytest.mark.parametrize("damage", [
    lambda v: v[1:], lambda v: v[:255], lambda v: v + [v[-1]], lambda v: v + [b"a"],
    lambda v: v + [b""], lambda v: v + ["ab"], lambda v: v + [None], lambda v: v + [7],
    lambda v: v + [[1]], lambda v: [],
])
def test_wrong_vocabulary(tokenizer, damage):
    """A damaged checkpoint must say so, in one line, before a byte that has no id is met in a
    text."""
    with pytest.raises(ValueError) as error:
        Tokenizer(damage(tokenizer.vocabulary))
    assert "vocabulary" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("strings", [None, 3, ["a", 3], ["日"], [], "abc", {"a": 1}, [None]])
def test_wrong_strings(strings):
    """The same for the strings of a checkpoint that another program wrote."""
    with pytest.raises(ValueError, match="vocabulary"):
        Tokenizer.from_strings(strings)
