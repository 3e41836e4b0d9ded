"""Reading people's files: thousands of damaged ones, each of which must end in one line that says
where and why. Writing ours, locks, and how a script ends."""

import bz2
import errno
import gzip
import io
import json
import lzma
import os
import random
import shlex
import subprocess
import sys

import pytest
import torch

from data import files
from data.files import (InputError, hold_out, lock_folder, prompt_checksum, read_chunks,
                        read_demonstrations, read_labels, read_pairs, read_prompts, run_script,
                        split_prompts, write_atomic, write_jsonl)

FIELDS = ("prompt", "chosen", "rejected")
BOM = b"\xef\xbb\xbf"


def read_text(path, size=2 ** 20):
    """The whole text of a file, out of its pieces."""
    return "".join(read_chunks(path, size))


def put(path, data):
    path.unlink(missing_ok=True)    # overwriting makes some file systems wait for the disk
    path.write_bytes(data)
    return path


def put_rows(path, *rows):
    return put(path, "\n".join(json.dumps(row) for row in rows).encode())


# --------------------------------------------------------------------------------------------------
# Lines of JSON


def row_of(line):
    """The pair that a line says, by json.loads; None if it must be refused."""
    try:
        row = json.loads(line.decode("utf-8"))
    except ValueError:
        return None
    if not isinstance(row, dict):
        return None
    row = {field: row.get(field) for field in FIELDS}
    for value in row.values():
        if not isinstance(value, str) or not value.strip() or "\0" in value:
            return None
        if value != value.encode("utf-8", "replace").decode():      # half a surrogate pair: "?"
            return None
    return row


ODD = ' x " \\ \r\n\t é 日本 🦊 \u2028 \x85 \ufeff {"a": 1}, '


def odd_files(rng):
    """A file of odd texts and of fields that nobody asked for: as it is, cut off anywhere, each of
    its bytes changed."""
    rows = [{"id": [1, {"prompt": None}], **dict.fromkeys(FIELDS, ODD)}, dict(zip(FIELDS, FIELDS))]
    lines = [json.dumps(rows[0], ensure_ascii=False), " ", "", *map(json.dumps, rows)]
    whole = BOM + "\r\n".join(lines).encode() + b"\n"
    yield whole
    for place in range(len(whole)):
        yield whole[:place]
        byte = rng.choice([rng.randrange(256), *b'{}[]":,\\\n\r\0 0u'])
        yield whole[:place] + bytes([byte]) + whole[place + 1:]


def test_rows_are_read_or_the_first_wrong_line_is_named(tmp_path):
    """A reader that strips, normalises, or splits at U+2028 trains on another text than the user's;
    half a file passes for a shorter one; a bad row let through. Compared with Python's json."""
    path = tmp_path / "rows.jsonl"
    read = 0
    for data in odd_files(random.Random("rows")):
        put(path, data)
        lines = data.removeprefix(BOM).split(b"\n")
        rows = {number: row_of(line) for number, line in enumerate(lines, start=1) if line.strip()}
        wrong = [number for number, row in rows.items() if row is None]
        if rows and not wrong:
            assert read_pairs(path) == list(rows.values())
            read += 1
            continue
        with pytest.raises(InputError) as error:
            read_pairs(path)
        message = str(error.value).encode().decode()    # it can be printed
        assert message.startswith(f"{path}:{wrong[0]}: " if wrong else f"{path}: "), data
        assert len(message.splitlines()) == 1 and len(message) < len(str(path)) + 250
    assert read > 70        # the test sees both sorts


def conversation(*turns):
    """Messages of the user and the assistant in turn."""
    roles = ["user", "assistant"] * len(turns)
    return [{"role": role, "content": text} for role, text in zip(roles, turns)]


LONG = conversation("q", "a", "b", "c")
SHORT = conversation("q", "a")
LABEL = {"prompt": "q", "completion": "a", "label": True}
PAIR = {"prompt": "q", "chosen": "a fox", "rejected": "a\nkite"}
TRL = {"prompt": conversation("q"), "chosen": conversation("q", "a fox")[1:],
       "rejected": conversation("q", "a\nkite")[1:]}


@pytest.mark.parametrize("reader, row, reason", [
    (read_demonstrations, {"prompt": "a", "completion": 3},
     '"completion" must be text, found the number 3; put it in quotes'),
    (read_pairs, {**PAIR, "prompt": "\n\u3000"}, '"prompt" is blank'),
    (read_pairs, {**PAIR, "rejected": "a\0b"}, '"rejected" holds a NUL character'),
    (read_demonstrations, {**LABEL, "label": "bad"}, '"label" must be true or false, found '),
    (read_labels, {"prompt": "a", "completion": "b"},
     'the field "label" is missing; true for a good completion, false for a bad one'),
    (read_pairs, {"chosen": "Human: q A: a", "rejected": "Human: q A: b"},  # as HH-RLHF has it
     "the field \"prompt\" is missing; found 'chosen', 'rejected'; if both texts begin with the "),
    (read_demonstrations, {"messages": LONG},
     "\"messages\" has the turns 'user, assistant, user, assistant', but only one exchange is "),
    (read_demonstrations, {"messages": [{"role": "system", "content": "be kind"}, *SHORT]},
     '"messages" has a system message, and the chat format here has none'),
    (read_demonstrations, {"prompt": "q", "messages": conversation("another", "a")},
     '"messages" begins with another prompt than the row has; keep one of them'),
    (read_demonstrations, {"messages": conversation("q", [{"type": "text", "text": "a"}])},
     'a content in "messages" is a list, not a text; write its parts as one string')])
def test_the_message_says_what_to_do(reader, row, reason, tmp_path):
    """ "KeyError: 'completion'" helps nobody: line, field, what stands there, what should. A
    dialogue cut to its last turn trains on something that nobody wrote."""
    good = {**PAIR, "completion": "b", "label": True}
    path = put(tmp_path / "d.jsonl", f"{json.dumps(good)}\n\n{json.dumps(row)}".encode())
    with pytest.raises(InputError, match=f"^{path}:3: {reason}"):
        reader(path)


def completions(*texts):
    return [{"prompt": "q", "completion": text} for text in texts]


@pytest.mark.parametrize("reader, rows, expected, printed", [
    # Whoever has only pairs can still fine-tune: on the chosen answer, never on the rejected one.
    (read_demonstrations, [{**PAIR, "completion": "c"}, PAIR], completions("c", "a fox"), ""),
    # SFT on KTO's labels: half of what the model is taught is what people called bad.
    (read_demonstrations, [LABEL, {**LABEL, "label": False}], completions("a"),
     'left out 1 of 2 rows, whose "label" is false\n'),
    # A label that is turned round; a rejected answer that is lost; KTO called the same answer good
    # and bad, in a pair of equal texts, which DPO drops.
    (read_labels, [{**LABEL, "label": False}, {**PAIR, "chosen": "same", "rejected": "same"}, PAIR],
     [{**LABEL, "label": False}, {**LABEL, "completion": "a fox"},
      {**LABEL, "completion": "a\nkite", "label": False}],
     "left out 1 pairs of two equal texts\n"),
    # A set would shuffle the prompts anew in every run.
    (read_prompts, [{"prompt": "b"}, {"prompt": "a"}, TRL, {"prompt": "q", "messages": LONG},
                    {"prompt": "b"}], ["b", "a", "q"], ""),
    (read_pairs, [TRL], [PAIR], ""),
    (read_demonstrations, [{"messages": SHORT}, {"prompt": "q", "messages": SHORT}],
     completions("a", "a"), "")])
def test_what_a_row_means(reader, rows, expected, printed, tmp_path, capsys):
    """One format's rows in another one's place: refused, or read as something that they do not
    say. The comments above name the bugs."""
    path = put_rows(tmp_path / "rows.jsonl", *rows)
    assert reader(path) == expected
    assert capsys.readouterr().out == (f"{path}: {printed}" if printed else "")


def test_what_is_held_out_depends_on_the_prompt_alone(tmp_path):
    """One more row in the file, another order or stage, and a prompt that was held out is trained
    on; two pairs of one prompt on either side. Of a small file nothing held out, or everything."""
    rng = random.Random(9)
    rows = [{"prompt": f"{rng.randrange(400)}", "chosen": f"{i}"} for i in range(900)]
    train, held_out = hold_out(rows)
    expected = {row["prompt"] for row in held_out}
    assert held_out == [row for row in rows if row["prompt"] in expected]   # in the file's order
    assert train == [row for row in rows if row["prompt"] not in expected]

    random.seed()
    other_file = rng.sample(rows, 500) + [{"prompt": "a new one"}]
    there = {row["prompt"] for row in other_file}
    found = {row["prompt"] for row in hold_out(other_file)[1]}
    assert found - {"a new one"} == expected & there
    for found, part in zip(split_prompts(put_rows(tmp_path / "a", *rows)), (train, held_out)):
        assert found == list(dict.fromkeys(row["prompt"] for row in part))

    # A tenth of the prompts, but one at least.
    train, held_out = hold_out([{"prompt": f"{i}"} for i in range(5000)])
    assert 400 < len(held_out) < 600
    for rows in (train[:20], held_out[:20]):
        assert sorted(map(len, hold_out(rows))) == [1, 19]
    _, (one,) = hold_out(train[:20])
    assert one["prompt"] == min((row["prompt"] for row in train[:20]), key=prompt_checksum)
    rest = [row for row in train[:20] if row != one]
    assert hold_out(rest, "x", [one["prompt"]]) == (rest, [])   # KTO's reader left out its row
    with pytest.raises(InputError, match="^x: all have the same prompt"):
        hold_out([{"prompt": "a"}] * 3, "x")


# --------------------------------------------------------------------------------------------------
# Files of other kinds, and texts


@pytest.mark.parametrize("name, module", [("gzip", gzip), ("bzip2", bz2), ("xz", lzma)])
def test_packed_files(tmp_path, name, module):
    """A packed file whose download broke off is not a shorter file."""
    rows = [{**PAIR, "chosen": f"{i}"} for i in range(90)]
    whole = module.compress("\n".join(json.dumps(row) for row in rows).encode())
    path = put(tmp_path / "pairs.jsonl.packed", whole)
    assert read_pairs(path) == rows
    with pytest.raises(InputError, match=f"is a {name} file; unpack it: {name} -dk "):
        read_text(path)
    damaged = whole[:40] + bytes([whole[40] ^ 1]) + whole[41:]
    for data in (whole[:-1], whole[:len(whole) // 2], damaged):
        with pytest.raises(InputError, match=f"pairs.jsonl.packed: not a whole {name} file"):
            read_pairs(put(path, data))


@pytest.mark.parametrize("name, start, command", [
    ("zstd", b"\x28\xb5\x2f\xfd\x04\0", "zstd -dk"), ("zip", b"PK\x03\x04\x14\0", "unzip"),
    ("Parquet", b"PAR1\x15\x04\0", "read_parquet"), ("Arrow", b"ARROW1\0\0", "read_feather"),
    ("Arrow", b"\xff\xff\xff\xff\x10\0", "open_stream")])
def test_other_formats_are_named(tmp_path, name, start, command):
    """Parquet's bytes are no wrong UTF-8: "save the file as UTF-8" ruins it. And the command that
    converts it was none in a folder with an apostrophe."""
    path = tmp_path / "it's $HOME" / "rows.data"
    path.parent.mkdir()
    put(path, start + bytes(100))
    for reader in (read_text, read_pairs):
        with pytest.raises(InputError, match=f"is .*{name}") as error:
            reader(path)
        words = shlex.split(str(error.value).removeprefix(f"{path}: ").partition(": ")[2])
        assert str(path) in words and command in " ".join(words)
        if words[0] == "python":
            compile(words[2], "the advice", "exec")


def test_files_that_are_none(tmp_path):
    """Missing, a folder, empty, blank: the commonest mistakes of all, each one line that names the
    file. --text <(...): the first reading gets the text, the next one nothing or waits for ever."""
    os.mkfifo(tmp_path / "pipe")
    for path, reason in ((tmp_path / "missing", "no such file"), (tmp_path, "is a folder"),
                         (put(tmp_path / "b", b" \r\n\n\t"), "the file is empty"),
                         (put(tmp_path / "c", BOM), "the file is empty"),
                         (tmp_path / "pipe", "is a pipe or a device")):
        for reader in (read_text, read_pairs):
            with pytest.raises(InputError, match=f"^{path}: {reason}.*$"):
                reader(path)


@pytest.mark.parametrize("data", [
    b"a fox\r\nb\rc\r\r\n\n", BOM + BOM + "\x0b\x1c\x85\u2028日本🦊<|end|>".encode(),
    b"a fox\r\n" * 9 + b"\xff", BOM + b"a fox\xed\xa0\x80", b"a\xc0\x80", "a🦊".encode()[:-1],
    "日\r\nb\0".encode()])
def test_text_is_read_or_refused(data, tmp_path):
    """Line ends of other systems, separators, NULs, cut characters, a wrong byte far behind: the
    first wrong byte or NUL is named, or the text is what Python decodes; in pieces of any size."""
    path = put(tmp_path / "corpus.txt", data)
    message = ""
    try:
        text = io.StringIO(data.decode("utf-8-sig"), newline=None).read()   # as open() does
        if "\0" in text:
            message = f"holds a NUL at character {text.index(chr(0)) + 1}; save the file as UTF-8"
    except UnicodeDecodeError as wrong:
        start = wrong.start + 3 * data.startswith(BOM)      # Python counts from behind it
        message = f"not UTF-8: byte 0x{data[start]:02x} at offset {start}; save the file as UTF-8"
    for size in (*range(1, 15), 2 ** 20):
        if not message:
            assert read_text(path, size) == text
            continue
        with pytest.raises(InputError, match=f"^{path}: {message}"):
            read_text(path, size)


# --------------------------------------------------------------------------------------------------
# Writing


def test_write_replaces_and_leaves_nothing_behind(tmp_path):
    """Bytes and text go in unchanged (no CRLF on Windows), rows come back, legibly, and a link goes
    on pointing to the file; os.replace would turn a device into a file."""
    path = tmp_path / "rows.jsonl"
    link = tmp_path / "latest.jsonl"
    link.symlink_to(path)
    for data in (b"\0\xff\r\n", "é\r\n🦊\n"):
        write_atomic(link, data)
        assert path.read_bytes() == (data.encode() if isinstance(data, str) else data)
    rows = [dict.fromkeys(PAIR, ODD), PAIR]
    write_jsonl(path, rows)
    assert read_pairs(path) == rows and "日本" in path.read_text(encoding="utf-8")
    assert sorted(os.listdir(tmp_path)) == ["latest.jsonl", "rows.jsonl"] and link.is_symlink()
    with pytest.raises(InputError, match="is a folder or a device"):
        write_atomic(os.devnull, b"x")


def test_a_file_system_without_locks(tmp_path, monkeypatch, capsys):
    """NFS without a lock daemon, Lustre without -o flock: "another run is using this folder" of
    every folder there, and nothing can be trained."""
    for number in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
        def refuse(*arguments):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(files.fcntl, "flock", refuse)
        lock_folder(tmp_path).close()
        assert "this file system locks no files; start no second run" in capsys.readouterr().out


def test_half_written_files_of_processes_that_have_ended_are_removed(tmp_path):
    """What a killed run left half written stays for ever; or the second one of two runs removes
    the file that the first one is writing, which dies with a traceback."""
    (tmp_path / "unfinished").mkdir()
    for name in (f"a.{2 ** 30}.tmp", f"unfinished/b.{10 ** 30}.tmp", "mine.tmp"):
        (tmp_path / name).write_bytes(b"half")

    def write(file):
        lock_folder(tmp_path).close()
        found = sorted(path.name for path in tmp_path.rglob("*.tmp"))
        assert found == ["mine.tmp", f"state.pt.{os.getpid()}.tmp"]
        file.write(b"whole")

    write_atomic(tmp_path / "state.pt", write)
    assert (tmp_path / "state.pt").read_bytes() == b"whole"


# --------------------------------------------------------------------------------------------------
# How a script ends


MEMORY = ("lower --micro_batch, --sample_batch or --rollouts (gpt.py: --batch), or take a smaller "
          "model; no file is damaged")


@pytest.mark.parametrize("error, status, message", [
    (InputError("two\nlines"), 1, "two lines"),
    (FileNotFoundError(2, "No such file", "/no/such"), 1, "/no/such: No such file"),
    (FloatingPointError("norm nan"), 1, "norm nan"),
    (KeyboardInterrupt("saved; --resume"), 130, "saved; --resume"),
    (MemoryError(), 1, f"out of memory: {MEMORY}"),
    (OSError(12, "Cannot allocate memory"), 1, f"out of memory: {MEMORY}"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total "
                            "capacity of 7.60 GiB\nof which"), 1,
     f"out of memory (tried to allocate 2.00 GiB): {MEMORY}"),
    (RuntimeError("shapes (2, 3) and (4, 5)"), None, "")])
def test_a_script_ends_in_one_line(error, status, message, monkeypatch, capsys):
    """A user's mistake is a line and a status that a shell script can test, a lack of memory the
    flags that help. But a bug, ours or torch's, must not pass for it: it keeps its traceback."""
    def main():
        raise error

    monkeypatch.setattr(sys, "argv", ["/x/script.py"])
    with pytest.raises(SystemExit if status else type(error)) as stop:
        run_script(main)
    if status is None:
        assert stop.value is error
    else:
        assert stop.value.code == status
        assert capsys.readouterr().err == f"script.py: {message}\n"


def test_torchs_own_words_for_a_lack_of_memory():
    """A new torch that says it in other words: a traceback."""
    with pytest.raises(RuntimeError) as error:
        torch.empty(2 ** 55)
    assert files.is_out_of_memory(error.value)


def test_home_in_a_path(monkeypatch):
    """--out=~/x: the shell replaces ~ only at the beginning of a word, and we made a folder ~."""
    home = os.path.expanduser("~")
    flags = ["--out=~/x", "--data", "~/y.jsonl", "--prompt=~/no", "--seed=1", "~"]
    monkeypatch.setattr(sys, "argv", ["script.py", *flags])
    run_script(lambda: None)
    assert sys.argv == ["script.py", f"--out={home}/x", "--data", f"{home}/y.jsonl",
                        "--prompt=~/no", "--seed=1", "~"]


def run(body, tmp_path, shell):
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


def test_printing_never_fails(tmp_path):
    """On cp1252, LANG=C, a closed output: a traceback on "→", after the training and before the
    saving. `python ppo.py | head -1` ends in Python's complaint about flushing at exit."""
    body = "print('sft → ppo'); print('caf\\udce9.jsonl'); raise InputError('Δ \\udce9')"
    for encoding, arrow, delta in (("cp1252", "?", "?"), ("utf-8:strict", "→", "Δ")):
        found = run(body, tmp_path, f"PYTHONIOENCODING={encoding} {{}}")
        assert found == (1, f"sft {arrow} ppo\ncaf?.jsonl\n", f"script.py: {delta} ?\n")
    assert run("print('lost'); raise InputError('no')", tmp_path, "{} >&- 2>&-") == (1, "", "")
    _, *found = run("for i in range(100_000): print('step', i)", tmp_path, "{} | head -1")
    assert found == ["step 0\n", "script.py: no one reads the output any more\n"]
