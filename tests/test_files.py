"""Reading people's files: thousands of damaged ones, each of which must end in one line that says
where and why."""

import contextlib
import errno
import bz2
import gzip
import io
import json
import lzma
import os
import random
import subprocess
import sys
import time

import pytest

from data import files
from data.files import (InputError, hold_out, lock_folder, read_chunks, read_demonstrations,
                        read_jsonl, read_labels, read_pairs, read_prompts, split_prompts,
                        write_atomic, write_jsonl)

FORMATS = {
    read_demonstrations: ("prompt", "completion"),
    read_pairs: ("prompt", "chosen", "rejected"),
    read_prompts: ("prompt",),
}
BOM = b"\xef\xbb\xbf"


def read_text(path, size=2 ** 20):
    """The whole text of a file, out of its pieces."""
    return "".join(read_chunks(path, size))


readers = pytest.mark.parametrize("reader", FORMATS, ids=lambda reader: reader.__name__)


def random_value(rng):
    """A text that a reader must take as it is: quotes, escapes, line ends inside, other scripts,
    U+2028, U+FEFF."""
    pieces = ["fox", " ", "a kite", '"', "\\", "\n", "\r\n", "\t", "é", "日本", "🦊", "\u2028", "\x85",
              "\ufeff", "{", "},"]
    return "x" + "".join(rng.choices(pieces, k=rng.randint(0, 8)))


def random_rows(rng, fields):
    return [{field: random_value(rng) for field in fields} for _ in range(rng.randint(1, 5))]


def as_line(rng, row):
    """A row as a line of JSON: escaped or not, with fields that nobody asked for, in any order."""
    items = list((row | {"id": rng.choice([7, None, [1, {}], "x"])}).items())
    rng.shuffle(items)
    return json.dumps(dict(items), ensure_ascii=rng.random() < 0.5).encode()


def as_file(rng, lines):
    """Lines in a file as editors leave them: BOM, CRLF, blank lines. Returns (bytes, the number of
    each line)."""
    end = rng.choice([b"\n", b"\r\n"])
    data, numbers, number = rng.choice([b"", BOM]), [], 0
    for line in lines:
        for _ in range(rng.choice([0, 0, 0, 1, 2])):
            data += rng.choice([b"", b" ", b"\t"]) + end
            number += 1
        data += line + end
        number += 1
        numbers.append(number)
    return (data if rng.random() < 0.5 else data.removesuffix(end)), numbers


def damaged_lines(rng, row):
    """Every kind of wrong line that can be made of a good row, each as bytes."""
    field = rng.choice(list(row))
    good = json.dumps(row, ensure_ascii=False).encode()
    nest = rng.choice([500, 5_000, 50_000])
    values = [3, -1.5, 10 ** 30, True, False, None, [], ["fox"], {}, {"role": "user"},  # not text
              float("nan"), "", " ", "\n\t ", "\u3000", "\0", "a\0b", "\ud83e", "a\udd8a",
              "\udd8a\ud83e"]
    return [json.dumps(row | {field: value}).encode() for value in values] + [
        json.dumps({key: value for key, value in row.items() if key != field}).encode(),
        json.dumps({key.upper(): value for key, value in row.items()}).encode(),
        good[:rng.randint(1, len(good) - 1)],                                           # cut off
        good[rng.randint(1, len(good) - 1):],
        good.replace(b'"', b"", 1), good.replace(b'"', b"'"), good[:-2] + b"}",          # quotes
        good + good, good + b",", b"[" + good + b"]", b"foo", b"3", b"null", b'"fox"', b"[]", b"{}",
        b"NaN",
        good[:-1] + b', "%s": "again"}' % field.encode(),               # keys that occur twice
        good[:-1] + b', "\\u0070rompt": "again"}',
        good[:-1] + b', "x": 1, "x": 2}',
        good[:-1] + b', "x": ' + b"9" * 5000 + b"}",                    # what hurts json.loads
        good[:-1] + b', "x": ' + b"[" * 50_000 + b"}",
        good[:-1] + b', "x": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
        b'{"prompt": ' + b'{"a":' * nest + b"1" + b"}" * nest + b"}",
        good[:-1] + b"\xff}", good[:-2] + b'\xc3"}',                        # not UTF-8
        good[:-2] + b'\xed\xa0\x80"}', good[:-2] + b'\xc0\x80"}',
        good[:-2] + b'\0"}', good + b"\0", b"\0" * 10,                  # raw control characters
        good[:-2] + b'\x07"}',
        good.decode().encode("utf-16-le"), b"\xff\xfe" + good.decode().encode("utf-16-le"),
        good[:-2] + b'\\x"}', good[:-2] + b'\\u12"}', good[:-2] + b'\\', BOM + BOM + good,
    ]


def expected(reader, rows):
    return list(dict.fromkeys(row["prompt"] for row in rows)) if reader is read_prompts else rows


def put(path, data):
    path.unlink(missing_ok=True)    # overwriting makes some file systems wait for the disk
    path.write_bytes(data)
    return path


@readers
def test_good_files_are_read_exactly(reader, tmp_path):
    """A reader that strips, normalises, or splits at U+2028 trains on another text than the
    user's."""
    rng = random.Random(3)
    for _ in range(300):
        rows = random_rows(rng, FORMATS[reader])
        data, _ = as_file(rng, [as_line(rng, row) for row in rows])
        assert reader(put(tmp_path / "good.jsonl", data)) == expected(reader, rows)


@readers
def test_every_wrong_line_is_named(reader, tmp_path):
    """A traceback, the wrong line number, or a bad row let through: the user can mend a file only
    if told where."""
    rng = random.Random(4)
    for _ in range(10):
        rows = random_rows(rng, FORMATS[reader])
        i = rng.randrange(len(rows))
        for bad in damaged_lines(rng, rows[i]):
            lines = [as_line(rng, row) for row in rows]
            lines[i] = bad
            data, numbers = as_file(rng, lines)
            path = put(tmp_path / "bad.jsonl", data)
            with pytest.raises(InputError) as error:
                reader(path)
                pytest.fail(f"{bad[:200]} was read")
            message = str(error.value)
            assert message.startswith(f"{path}:{numbers[i]}: "), (bad[:200], message)
            assert len(message.splitlines()) == 1 and len(message) < len(str(path)) + 250
            message.encode()    # can be printed


@readers
def test_truncated_files(reader, tmp_path):
    """A copy that stopped half way must not pass for a shorter file, unless it stopped between two
    rows."""
    rng = random.Random(5)
    for _ in range(600):
        rows = random_rows(rng, FORMATS[reader])
        lines = [json.dumps(row).encode() for row in rows]
        data = b"\n".join(lines)[:rng.randint(0, 400)]
        whole = [row for row, line in zip(rows, data.split(b"\n")) if line in lines]
        last = data.split(b"\n")[-1]
        path = put(tmp_path / "cut.jsonl", data)
        if whole and (not last or last in lines):
            assert reader(path) == expected(reader, whole)
        else:
            with pytest.raises(InputError) as error:
                reader(path)
            where = f"{path}:{data.count(bytes([10])) + 1}" if data else f"{path}"
            assert str(error.value).startswith(f"{where}: ")


@readers
def test_flipped_and_random_bytes(reader, tmp_path):
    """Whatever the bytes, only InputError may come out, or exactly what Python's own json reads
    there."""
    rng = random.Random(6)
    read = 0
    for n in range(1200):
        data, _ = as_file(rng, [as_line(rng, row) for row in random_rows(rng, FORMATS[reader])])
        data = bytearray(data if n % 4 else rng.randbytes(rng.randint(0, 60)))
        for _ in range(rng.randint(1, 3) if data else 0):
            byte = rng.choice([rng.randrange(256), *b'{}[]":,\\\n\r\0 0u'])
            data[rng.randrange(len(data))] = byte
        path = put(tmp_path / "noise.jsonl", bytes(data))
        try:
            result = reader(path)
        except InputError as error:
            assert str(error).startswith(f"{path}:") and len(str(error).splitlines()) == 1
        else:
            lines = [line for line in bytes(data).decode("utf-8-sig").split("\n") if line.strip()]
            rows = [{field: json.loads(line)[field] for field in FORMATS[reader]} for line in lines]
            assert result == expected(reader, rows)
            for row in rows:
                assert all(isinstance(value, str) and value.strip() for value in row.values())
            read += 1
    assert 50 < read < 900      # the test sees both outcomes


def test_the_message_says_what_to_do(tmp_path):
    """ "KeyError: 'completion'" helps nobody: line, field, what stands there, what should."""
    path = put(tmp_path / "d.jsonl", b'{"prompt": "a", "completion": "b"}\n\n'
                                     b'{"prompt": "a", "completion": 3}\n')
    with pytest.raises(InputError) as error:
        read_demonstrations(path)
    reason = '"completion" must be text, found the number 3; put it in quotes'
    assert str(error.value) == f"{path}:3: {reason}"
    put(path, b'{"prompt": "a", "answer": "b"}')
    with pytest.raises(InputError) as error:
        read_demonstrations(path)
    reason = "the field \"completion\" is missing; found 'prompt', 'answer'"
    assert str(error.value) == f"{path}:1: {reason}"


def test_pairs_serve_as_demonstrations(tmp_path):
    """Whoever has only pairs can still fine-tune: on the chosen answer, never on the rejected
    one."""
    rows = [{"prompt": "p", "chosen": "good", "rejected": "bad"},
            {"prompt": "q", "completion": "c", "rejected": "bad"},
            {"prompt": "r", "completion": "c", "chosen": "good"}]
    write_jsonl(tmp_path / "mixed.jsonl", rows)
    assert read_demonstrations(tmp_path / "mixed.jsonl") == [
        {"prompt": "p", "completion": "good"}, {"prompt": "q", "completion": "c"},
        {"prompt": "r", "completion": "c"}]


def test_labels_and_pairs_as_two_labels(tmp_path):
    """A label that is turned round or always true; a rejected answer that is lost; a label beside a
    pair overruled."""
    rows = [{"prompt": "p", "completion": " c\n", "label": True},
            {"label": False, "completion": "d", "prompt": "q", "n": 1},
            {"prompt": "r", "chosen": "good", "rejected": "bad"},
            {"prompt": "s", "completion": "e", "label": False, "chosen": "good", "rejected": "bad"}]
    write_jsonl(tmp_path / "labels.jsonl", rows)
    assert read_labels(tmp_path / "labels.jsonl") == [
        {"prompt": "p", "completion": " c\n", "label": True},
        {"prompt": "q", "completion": "d", "label": False},
        {"prompt": "r", "completion": "good", "label": True},
        {"prompt": "r", "completion": "bad", "label": False},
        {"prompt": "s", "completion": "e", "label": False}]


def test_bad_completions_are_no_demonstrations(tmp_path, capsys):
    """SFT on KTO's labels: half of what the model is taught is what people called bad."""
    path = tmp_path / "labels.jsonl"
    rows = [{"prompt": f"p{i}", "completion": f"c{i}", "label": label}
            for i, label in enumerate([True, False, 0, None, "fable"])]
    write_jsonl(path, rows)
    assert [row["completion"] for row in read_demonstrations(path)] == ["c0", "c3", "c4"]
    assert capsys.readouterr().out == f'{path}: left out 2 of 5 rows, whose "label" is false\n'
    write_jsonl(path, rows[1:3])
    with pytest.raises(InputError, match='labels.jsonl: every row has "label": false'):
        read_demonstrations(path)
    write_jsonl(path, rows[:1])
    read_demonstrations(path)
    assert capsys.readouterr().out == ""


def test_pairs_of_equal_texts_are_no_labels(tmp_path, capsys):
    """DPO drops a pair of equal texts; KTO called the same answer good and bad."""
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": "p1", "chosen": "same", "rejected": "same"},
            {"prompt": "p2", "chosen": "a", "rejected": "b"}]
    write_jsonl(path, rows)
    assert [row["completion"] for row in read_labels(path)] == ["a", "b"]
    assert capsys.readouterr().out == f"{path}: left out 1 pairs of two equal texts\n"
    write_jsonl(path, rows[:1])
    with pytest.raises(InputError, match="pairs.jsonl: every pair has two equal texts"):
        read_labels(path)


@pytest.mark.parametrize("row, reason", [
    ({"completion": "b", "label": 1}, '"label" must be true or false, found the number 1'),
    ({"completion": "b", "label": "true"}, '"label" must be true or false, found a string'),
    ({"completion": "b", "label": None}, '"label" must be true or false, found null'),
    ({"chosen": "b", "rejected": "c", "label": 0},
     '"label" must be true or false, found the number 0'),
    ({"completion": "b"},
     'the field "label" is missing; true for a good completion, false for a bad one'),
    ({"label": True}, "the field \"completion\" is missing; found 'prompt', 'label'"),
    ({"completion": " ", "label": True},
     '"completion" is blank; give it a text or remove the line'),
    ({"chosen": "b"}, "the field \"rejected\" is missing; found 'prompt', 'chosen'"),
    ({"chosen": "b", "rejected": 3},
     '"rejected" must be text, found the number 3; put it in quotes')])
def test_wrong_labels_are_named(tmp_path, row, reason):
    """A 0 or a "false" that is taken for true, as every text is; a KeyError that names no line."""
    good = {"prompt": "a", "completion": "b", "label": False}
    write_jsonl(tmp_path / "l.jsonl", [good, {"prompt": "a", **row}])
    with pytest.raises(InputError) as error:
        read_labels(tmp_path / "l.jsonl")
    assert str(error.value) == f"{tmp_path / 'l.jsonl'}:2: {reason}"


def test_prompts_are_distinct_and_in_order(tmp_path):
    """A set would shuffle them anew in every run, and one seed would no longer reproduce it."""
    rows = [{"prompt": prompt} for prompt in ["b", "a", "b", "c", "a", "a "]]
    write_jsonl(tmp_path / "p.jsonl", rows)
    assert read_prompts(tmp_path / "p.jsonl") == ["b", "a", "c", "a "]


def test_no_prompt_on_both_sides_of_the_split():
    """Two pairs of one prompt share a text: held-out accuracy then measures what was learnt by
    heart."""
    rng = random.Random(8)
    rows = [{"prompt": f"{rng.randrange(60)}", "chosen": f"{i}", "rejected": ""}
            for i in range(300)]
    train, held_out = hold_out(rows)
    prompts = [{row["prompt"] for row in part} for part in (train, held_out)]
    assert not prompts[0] & prompts[1] and all(prompts)
    for part in (train, held_out):  # rows as they were, in the file's order, none lost, none twice
        assert part == [row for row in rows if row in part]
    assert sorted(int(row["chosen"]) for row in train + held_out) == list(range(300))


def test_what_is_held_out_depends_on_the_prompt_alone():
    """One more row in the file, another order or another stage's seed, and a prompt that one stage
    holds out is trained on by the next."""
    rng = random.Random(9)
    rows = [{"prompt": f"{rng.randrange(400)}", "chosen": f"{i}"} for i in range(900)]

    def prompts(rows):
        return {row["prompt"] for row in hold_out(rows)[1]}

    expected = prompts(rows)
    for _ in range(5):
        random.seed()
        assert prompts(rng.sample(rows, 900)) == expected
    distinct = {row["prompt"] for row in rows}
    assert prompts([{"prompt": prompt} for prompt in distinct]) == expected
    assert prompts(rows + rows[:7] + [{"prompt": "a new one"}]) - {"a new one"} == expected
    assert prompts(rows[:500]) == expected & {row["prompt"] for row in rows[:500]}


def test_prompts_are_split_as_the_rows_are(tmp_path):
    """PPO trained on the prompts that the reward model's stage held out of the same file; a prompt
    counted twice."""
    rng = random.Random(10)
    rows = [{"prompt": f"{rng.randrange(60)}", "chosen": f"{i}", "rejected": "no"}
            for i in range(300)]
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    for found, part in zip(split_prompts(tmp_path / "pairs.jsonl"), hold_out(rows)):
        assert found == list(dict.fromkeys(row["prompt"] for row in part))


def test_a_tenth_of_the_prompts_but_one_at_least():
    """Nothing held out of a small file, and a mean over no rows; or everything, and nothing to
    train on."""
    for count in range(2, 40):
        for start in range(0, 400, 40):
            prompts = [f"{start + i}" for i in range(count)]
            train, held_out = hold_out([{"prompt": prompt} for prompt in prompts])
            assert train and held_out
    _, held_out = hold_out([{"prompt": f"{i}"} for i in range(5000)])
    assert 400 < len(held_out) < 600


@pytest.mark.parametrize("rows", [1, 3])
def test_a_single_prompt_cannot_be_held_out(rows):
    """Trained on and measured on the same prompt, or a traceback about an empty batch."""
    with pytest.raises(InputError, match="all have the same prompt") as error:
        hold_out([{"prompt": "a"}] * rows)
    assert "\n" not in str(error.value)


def conversation(*turns):
    """Messages of the user and the assistant in turn."""
    roles = ["user", "assistant"] * len(turns)
    return [{"role": role, "content": text} for role, text in zip(roles, turns)]


def test_the_forms_of_trl(tmp_path):
    """Somebody's preference file for TRL: refused, or its prompt trained on as a part of the
    answer."""
    chosen, rejected = "a fox", "a\nkite"
    pair = {"prompt": "q", "chosen": chosen, "rejected": rejected}
    asked = conversation("q")
    good = conversation("q", chosen)
    bad = conversation("q", rejected)
    for row in ({"prompt": asked, "chosen": good[1:], "rejected": bad[1:]},
                {"chosen": good, "rejected": bad},
                {"prompt": "q", "chosen": good, "rejected": bad, "messages": bad},
                {**pair, "messages": None}):
        path = put(tmp_path / "trl.jsonl", as_line(random.Random(0), row))
        assert read_pairs(path) == [pair] and read_prompts(path) == ["q"]
        assert read_demonstrations(path) == [{"prompt": "q", "completion": chosen}]
    for row in ({"messages": good}, {"prompt": asked, "completion": good[1:], "label": True}):
        path = put(tmp_path / "trl.jsonl", as_line(random.Random(0), row))
        assert read_demonstrations(path) == [{"prompt": "q", "completion": chosen}]
        assert read_prompts(path) == ["q"]
    assert read_labels(path) == [{"prompt": "q", "completion": chosen, "label": True}]


def test_a_prompt_beside_messages(tmp_path):
    """The rows of ultrachat and no_robots were refused for a "completion" that they lack. Of a long
    dialogue, the prompt alone can still be used; a text that nobody wants may be anything."""
    path = tmp_path / "trl.jsonl"
    row = {"prompt": "q", "prompt_id": "a1", "messages": conversation("q", "a")}
    put(path, json.dumps(row).encode())
    assert read_demonstrations(path) == [{"prompt": "q", "completion": "a"}]
    put(path, json.dumps({**row, "label": True}).encode())
    assert read_labels(path) == [{"prompt": "q", "completion": "a", "label": True}]
    put(path, json.dumps({**row, "messages": conversation("q", "a", "b", "c")}).encode())
    assert read_prompts(path) == ["q"]
    with pytest.raises(InputError, match='"messages" has the turns'):
        read_demonstrations(path)
    put(path, json.dumps({**row, "messages": conversation("another", "a")}).encode())
    with pytest.raises(InputError, match='"messages" begins with another prompt'):
        read_demonstrations(path)
    pair = {"prompt": "q", "chosen": "a", "rejected": conversation("q", "a", "b", "c")}
    put(path, json.dumps(pair).encode())
    assert read_demonstrations(path) == [{"prompt": "q", "completion": "a"}]


def test_a_prompt_inside_both_texts(tmp_path):
    """HH-RLHF has no "prompt": chosen and rejected both begin with it."""
    path = put(tmp_path / "hh.jsonl", b'{"chosen": "Human: q A: a", "rejected": "Human: q A: b"}')
    with pytest.raises(InputError, match="\"prompt\" is missing; .*; if both texts begin with the "
                                         "prompt, cut it off"):
        read_pairs(path)


def test_more_turns_than_one_are_refused(tmp_path):
    """A dialogue cut to its last turn, or a system's message left out, trains on something that
    nobody wrote."""
    long = conversation("q", "a", "b", "c")
    system = [{"role": "system", "content": "be kind"}]
    pair = {"prompt": conversation("q"), "chosen": conversation("q", "a")[1:],
            "rejected": conversation("q", "b")[1:]}
    for reader, row, match in (
            (read_demonstrations, {"messages": long},
             '"messages" has the turns .user, assistant, user, assistant., but only one exchange '
             "is supported, user then assistant"),
            (read_demonstrations, {"messages": system + conversation("q", "a")},
             '"messages" has a system message, and the chat format here has none'),
            (read_demonstrations, {"messages": conversation("q")},
             '"messages" has the turns .user.'),
            (read_pairs, {**pair, "prompt": system + pair["prompt"]},
             '"prompt" has a system message'),
            (read_pairs, {**pair, "chosen": long}, '"chosen" has the turns'),
            (read_pairs, {**pair, "prompt": long[:3]}, '"prompt" has the turns'),
            (read_pairs, {**pair, "rejected": conversation("another", "b")},
             "begins with another prompt"),
            (read_pairs, {**pair, "chosen": [{"role": "assistant", "content": 3}]},
             "must be text, found the number 3"),
            (read_pairs, {**pair, "chosen": [{"role": "assistant", "content": " "}]}, "blank"),
            (read_pairs, {**pair, "chosen": [{"from": "gpt", "value": "a"}]},
             "must be text, found a list")):
        with pytest.raises(InputError, match=match) as error:
            reader(put(tmp_path / "trl.jsonl", json.dumps(row).encode()))
        message = str(error.value)
        assert message.startswith(f"{tmp_path / 'trl.jsonl'}:1: ") and "\n" not in message


@pytest.mark.parametrize("name, module, magic", [("gzip", gzip, 3), ("bzip2", bz2, 11),
                                                 ("xz", lzma, 7)])
def test_packed_files(tmp_path, name, module, magic):
    """A packed file whose download broke off is not a shorter file."""
    rows = random_rows(random.Random(0), FORMATS[read_pairs]) * 20
    whole = module.compress(b"\n".join(as_line(random.Random(0), row) for row in rows))
    path = put(tmp_path / "pairs.jsonl.packed", whole)
    assert read_pairs(path) == rows
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 1
    for data in (whole[:-1], whole[:len(whole) // 2], whole[:magic], bytes(damaged)):
        with pytest.raises(InputError, match=f"pairs.jsonl.packed: not a whole {name} file"):
            read_pairs(put(path, data))
    with pytest.raises(InputError, match=f"is a {name} file; unpack it: {name} -dk "):
        read_text(put(path, whole))


FOREIGN = [("zstd", b"\x28\xb5\x2f\xfd\x04\0", "zstd -dk"), ("zip", b"PK\x03\x04\x14\0", "unzip"),
           ("Parquet", b"PAR1\x15\x04\0", "read_parquet"), ("Arrow", b"ARROW1\0\0", "read_feather"),
           ("Arrow", b"\xff\xff\xff\xff\x10\0", "open_stream")]
PANDAS = """
import sys
class Table:
    def read_pandas(self):
        return self
    def to_json(self, path, **how):
        open(path, "w").write(repr(how))
def read_parquet(path):
    assert open(path, "rb")
    return Table()
read_feather = read_parquet
class ipc:
    def open_stream(file):
        return Table()
"""


@pytest.mark.parametrize("reader", [read_text, *FORMATS], ids=lambda reader: reader.__name__)
@pytest.mark.parametrize("name, start, command", FOREIGN)
def test_other_formats_are_named(tmp_path, reader, name, start, command):
    """Parquet's bytes are no wrong UTF-8: "save the file as UTF-8" ruins it. And the command that
    converts it was none in a folder with an apostrophe."""
    folder = tmp_path / "it's $HOME"
    folder.mkdir()
    path = put(folder / "rows.data", start + bytes(100))
    with pytest.raises(InputError) as error:
        reader(path)
    message = str(error.value)
    assert f"{path}: is " in message and name in message and command in message
    assert "\n" not in message
    if "pandas" in message:
        for module in ("pandas", "pyarrow"):
            (tmp_path / f"{module}.py").write_text(PANDAS)
        line = message.partition("pyarrow): ")[2].replace("python", sys.executable, 1)
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        subprocess.run(["bash", "-c", line], check=True, env=environment)
        assert (folder / "rows.jsonl").read_text() == "{'orient': 'records', 'lines': True}"


def test_a_text_may_begin_like_another_format(tmp_path):
    """A story of a BZh and a PAR1, refused for its first letters."""
    for text in ("PAR1 was his name.", "BZh91 said the fox.", "ARROW1", "PK"):
        assert read_text(put(tmp_path / "text.txt", text.encode())) == text


@pytest.mark.parametrize("reader", [read_text, *FORMATS], ids=lambda reader: reader.__name__)
def test_pipes_are_named(tmp_path, reader):
    """--text <(...): the first of several readings gets the text, the next one nothing, and "the
    file is empty". A pipe that nobody writes to is waited for without end."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", os.devnull):
        with pytest.raises(InputError) as error:
            reader(path)
        assert str(error.value).startswith(f"{path}: is a pipe or a device")
        assert "save its content as a file" in str(error.value)


def test_a_line_of_many_blocks(tmp_path):
    """One line without a blank: every block that is read searches all those before it again."""
    path = put(tmp_path / "dna.txt", b"ACGT" * 2 ** 19)
    began = time.process_time()
    assert read_text(path, 2 ** 10) == "ACGT" * 2 ** 19
    assert time.process_time() - began < 5


def test_huge_line(tmp_path):
    """A line of many megabytes is a line."""
    rows = [{"prompt": "x" * 5_000_000, "note": 1}, {"prompt": "y", "note": 2}]
    write_jsonl(tmp_path / "huge.jsonl", rows)
    found = read_jsonl(tmp_path / "huge.jsonl", ["prompt"])
    assert found == [{"prompt": row["prompt"]} for row in rows]


@pytest.mark.parametrize("reader", [read_text, *FORMATS], ids=lambda reader: reader.__name__)
def test_files_that_are_not_there(reader, tmp_path):
    """Missing, a folder, empty, blank: the commonest mistakes of all, each one line that names the
    file."""
    cases = [tmp_path / "missing", tmp_path, put(tmp_path / "a", b""),
             put(tmp_path / "b", b" \r\n\n\t"), put(tmp_path / "c", BOM),
             put(tmp_path / "d", b"") / "below"]
    for path in cases:
        for given in (path, str(path)):
            with pytest.raises(InputError) as error:
                reader(given)
            assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


def test_text_is_read_or_refused(tmp_path):
    """Random bytes and cut characters: InputError that names the first wrong byte or NUL, or what
    Python decodes."""
    rng = random.Random(7)
    path = tmp_path / "corpus.txt"
    refused = nuls = 0
    for n in range(1500):
        data = rng.choice([b"", BOM])
        data += rng.choice([random_value(rng) * 3, "fox\r\nkite\rhen\n"]).encode()
        if n % 3 == 0:
            data = rng.randbytes(rng.randint(0, 8))
        elif n % 3 == 1:
            data = data[:rng.randint(0, len(data))]
            data += rng.choice([b"", b"\xff", b"\xed\xa0\x80", b"\xc0\x80"])
        put(path, data)
        try:
            # newline=None: Python's own treatment of line ends.
            good = io.StringIO(data.decode("utf-8-sig"), newline=None).read()
        except UnicodeDecodeError:
            with pytest.raises(InputError) as error:
                read_text(path, rng.randint(1, 20))
            refused += 1
            if "holds a NUL" in str(error.value):       # in a piece before that
                assert b"\0" in data
                continue
            offset = int(str(error.value).split("offset ")[1].split(";")[0])
            data[:offset].decode()
            with pytest.raises(UnicodeDecodeError):
                data[:offset + 4].decode()
            assert str(error.value).startswith(f"{path}: not UTF-8: byte 0x{data[offset]:02x} ")
        else:
            if "\0" in good:
                place = good.index("\0") + 1
                with pytest.raises(InputError, match=f": holds a NUL at character {place};"):
                    read_text(path, rng.randint(1, 20))
                nuls += 1
            elif good.strip():
                assert read_text(path, rng.randint(1, 20)) == good
            else:
                with pytest.raises(InputError, match="empty"):
                    read_text(path)
    assert 500 < refused < 1200 and nuls > 0


def test_written_rows_come_back(tmp_path):
    """What a stage writes, the next one reads: escapes, other scripts and line ends included, and
    legibly."""
    rng = random.Random(8)
    rows = [row for _ in range(100) for row in random_rows(rng, ("prompt", "chosen", "rejected"))]
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    assert read_pairs(tmp_path / "pairs.jsonl") == rows
    assert "日本" in (tmp_path / "pairs.jsonl").read_text(encoding="utf-8")


def test_write_replaces_and_leaves_nothing_behind(tmp_path):
    """Bytes and text go in unchanged (no CRLF on Windows), and a link goes on pointing to the
    file."""
    path, link = tmp_path / "model.pt", tmp_path / "latest.pt"
    for data in (b"\0\xff\r\n", "é\r\n🦊\n", b""):
        write_atomic(path, data)
        assert path.read_bytes() == (data.encode() if isinstance(data, str) else data)
    link.symlink_to(path)
    write_atomic(link, b"new")
    assert link.is_symlink() and path.read_bytes() == b"new"
    assert sorted(os.listdir(tmp_path)) == ["latest.pt", "model.pt"]
    with pytest.raises(InputError):
        write_atomic(tmp_path, b"a folder")
    with pytest.raises(InputError):
        write_atomic(os.devnull, b"os.replace would turn the device into a file")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch, step, error):
    """A full disk or Ctrl-C in the middle of a save must not cost the last good checkpoint."""
    path = put(tmp_path / "model.pt", b"old")

    def fail(*args):
        raise error
    monkeypatch.setattr(files.os, step, fail)
    with pytest.raises(type(error)):
        write_atomic(path, b"new" * 1000)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["model.pt"]


def test_rows_that_cannot_be_written_leave_the_old_file(tmp_path):
    """The same when the data is at fault: a row that fails, an object JSON can't hold, half a
    surrogate pair."""
    path = put(tmp_path / "rows.jsonl", b"old")

    def rows():
        yield {"prompt": "fine"}
        raise RuntimeError
    for bad, kind in [(rows(), RuntimeError),
                      ([{"prompt": object()}], TypeError), ([{"prompt": "\ud83e"}], ValueError)]:
        with pytest.raises(kind):
            write_jsonl(path, bad)
    with pytest.raises(TypeError):
        write_atomic(path, None)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["rows.jsonl"]


NO_PROCESS = 2 ** 30     # larger than a process's number can be


def test_a_lock_is_held_until_it_is_closed(tmp_path):
    """Two runs in one folder; a folder that stays locked; what a killed run left half written,
    there for ever."""
    (tmp_path / "unfinished").mkdir()
    for name in (f"a.{NO_PROCESS}.tmp", f"unfinished/b.{NO_PROCESS + 1}.tmp"):
        (tmp_path / name).write_bytes(b"half")
    lock = lock_folder(tmp_path)
    assert not list(tmp_path.rglob("*.tmp"))
    (tmp_path / "c.9.tmp").write_bytes(b"the first run is writing this")
    with pytest.raises(InputError, match="another run is using this folder; wait for it") as error:
        lock_folder(tmp_path)
    assert "\n" not in str(error.value) and (tmp_path / "c.9.tmp").exists()
    lock.close()
    lock_folder(tmp_path).close()


WINDOWS = """
import fcntl as unix, sys, types
def locking(descriptor, mode, size):
    print("locking", mode, size)
    unix.flock(descriptor, unix.LOCK_EX | unix.LOCK_NB)
sys.modules.update(fcntl=None, msvcrt=types.SimpleNamespace(LK_NBLCK=2, locking=locking))
from data.files import InputError, lock_folder
first = lock_folder(sys.argv[1])
try:
    lock_folder(sys.argv[1])
except InputError as error:
    print(error)
first.close()
lock_folder(sys.argv[1])
"""


def test_windows_locks_too(tmp_path):
    """Where there is no fcntl: an ImportError in every script, or two runs in one folder that never
    see each other."""
    done = subprocess.run([sys.executable, "-c", WINDOWS, tmp_path], capture_output=True, text=True)
    refused = f"{tmp_path}: another run is using this folder; wait for it, or choose another one"
    assert done.stderr == ""
    assert done.stdout.splitlines() == ["locking 2 1", "locking 2 1", refused, "locking 2 1"]


def run(body, tmp_path, shell="{}"):
    """Run a script whose main() is this body; returns (exit status, stdout, stderr)."""
    script = put(tmp_path / "script.py", f"""
import sys; sys.path.insert(0, {os.getcwd()!r})
from data.files import InputError, run_script
def main():
    {body}
run_script(main)
""".encode())
    command = shell.format(f"'{sys.executable}' '{script}'")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environment)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("body, status, message", [
    ("print('fine')", 0, ""),
    ("raise InputError('pairs.jsonl:3: no')", 1, "script.py: pairs.jsonl:3: no\n"),
    ("raise InputError('two\\nlines')", 1, "script.py: two lines\n"),
    ("open('/no/such/file')", 1, "script.py: /no/such/file: No such file or directory\n"),
    ("raise OSError('disk')", 1, "script.py: disk\n"),
    ("raise FloatingPointError('norm nan: no step')", 1, "script.py: norm nan: no step\n"),
    ("raise KeyboardInterrupt", 130, "script.py: interrupted\n"),
    ("raise KeyboardInterrupt('saved; --resume')", 130, "script.py: saved; --resume\n"),
    ("sys.exit(2)", 2, ""),
])
def test_script_ends_in_one_line(tmp_path, body, status, message):
    """A user's mistake is a line and a status that a shell script can test, not twenty lines of our
    code."""
    assert run(body, tmp_path)[::2] == (status, message)


def test_home_in_a_path(tmp_path):
    """--out=~/x: the shell replaces ~ only at the beginning of a word, and we made a folder ~."""
    home = os.path.expanduser("~")
    shell = "{} --out=~/x --data='~/y.jsonl' --text '~/z' --prompt=~/no --seed=1 '~'"
    status, printed, _ = run("print(sys.argv[1:])", tmp_path, shell)
    expected = [f"--out={home}/x", f"--data={home}/y.jsonl", "--text", f"{home}/z",
                "--prompt=~/no", "--seed=1", "~"]
    assert status == 0 and printed == f"{expected}\n"


def test_our_bugs_keep_their_traceback(tmp_path):
    """InputError is a ValueError, but a ValueError of torch or of ours must not pass for the user's
    mistake."""
    status, _, stderr = run("raise ValueError('a bug')", tmp_path)
    assert status == 1 and stderr.startswith("Traceback") and stderr.endswith("ValueError: a bug\n")


def test_closed_pipe(tmp_path):
    """`python ppo.py | head -1` ends in one line, not in Python's complaint about flushing at
    exit."""
    _, stdout, stderr = run("for i in range(100_000): print('step', i)", tmp_path, "{} | head -1")
    assert stdout == "step 0\n" and stderr == "script.py: no one reads the output any more\n"
    # A short output stays in the buffer until the end, and meets the closed pipe only there.
    _, _, stderr = run("import time; time.sleep(0.5); print('step')", tmp_path, "{} | true")
    assert stderr == "script.py: no one reads the output any more\n"


@pytest.mark.parametrize("body, found", [
    ("raise MemoryError", ""),
    ("raise OSError(12, 'Cannot allocate memory')", ""),
    ("import torch; torch.empty(2 ** 55)", " (tried to allocate 144115188075855872 bytes)"),
    ("import torch; raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB. "
     "GPU 0 has a total capacity of 7.60 GiB\\nof which')", " (tried to allocate 2.00 GiB)"),
    ("raise RuntimeError('std::bad_alloc')", ""),
])
def test_out_of_memory_is_one_line_with_the_flags_that_help(tmp_path, body, found):
    """Twenty lines of traceback where a smaller --micro_batch would do; or the last good checkpoint
    deleted, because the message says nothing about files."""
    status, _, stderr = run(body, tmp_path)
    assert status == 1 and stderr == (
        f"script.py: out of memory{found}: lower --micro_batch, --sample_batch or --rollouts "
        "(gpt.py: --batch), or take a smaller model; no file is damaged\n")


def test_other_runtime_errors_keep_their_traceback(tmp_path):
    """Every RuntimeError of torch, a wrong shape too, would pass for a lack of memory."""
    status, _, stderr = run("raise RuntimeError('shapes (2, 3) and (4, 5)')", tmp_path)
    assert status == 1 and stderr.startswith("Traceback") and "out of memory" not in stderr


def test_printing_never_fails(tmp_path):
    """A redirect on Windows (cp1252), LANG=C, a closed output, a path that is not UTF-8: a traceback
    on "→" or "Δ", after the training and before the saving, and again with --resume."""
    body = "print('sft → ppo'); print('caf\\udce9.jsonl'); raise InputError('Δ \\udce9')"
    for encoding, arrow in (("cp1252", "?"), ("ascii", "?"), ("utf-8:strict", "→")):
        status, stdout, stderr = run(body, tmp_path, f"PYTHONIOENCODING={encoding} {{}}")
        delta = "Δ" if arrow == "→" else "?"
        assert status == 1 and stdout == f"sft {arrow} ppo\ncaf?.jsonl\n"
        assert stderr == f"script.py: {delta} ?\n"
    put(tmp_path / "kept", b"")
    body = "print('lost'); file = open('{}', 'w'); file.write('kept'); file.close()"
    assert run(body.format(tmp_path / "kept"), tmp_path, "{} >&-") == (0, "", "")
    assert (tmp_path / "kept").read_text() == "kept"
    assert run("raise InputError('no')", tmp_path, "{} >&- 2>&-") == (1, "", "")


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(tmp_path, monkeypatch, capsys, number):
    """NFS without a lock daemon, Lustre without -o flock: "another run is using this folder" of
    every folder there, and nothing can be trained."""
    def refuse(*arguments):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    lock_folder(tmp_path).close()
    printed = capsys.readouterr().out
    assert printed == (f"{tmp_path}: this file system locks no files; start no second run in this "
                       "folder\n")


def test_what_a_running_process_writes_is_not_removed(tmp_path):
    """Two runs are started in one folder; the second one has the lock first, and removes the file
    that the other one is writing: that one dies with a traceback."""
    body = "from data.files import write_atomic; import sys, time; " \
           "write_atomic(sys.argv[1], lambda file: (file.write(b'half'), file.flush(), " \
           "print(flush=True), sys.stdin.read()))"
    path = tmp_path / "documents.ids"
    writer = subprocess.Popen([sys.executable, "-c", body, path], stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE)
    writer.stdout.readline()    # now it is writing
    (tmp_path / f"state.pt.{NO_PROCESS}.tmp").write_bytes(b"of a killed run")
    (tmp_path / "mine.tmp").write_bytes(b"somebody else's")
    with contextlib.closing(lock_folder(tmp_path)):
        assert sorted(os.listdir(tmp_path)) == [f"documents.ids.{writer.pid}.tmp", "lock",
                                                "mine.tmp"]
    writer.communicate()
    assert writer.returncode == 0 and path.read_bytes() == b"half"
