"""Reading people's own files, and writing ours without ever leaving half a file.

    corpus.txt             plain UTF-8 text, for pretraining
    demonstrations.jsonl   {"prompt": "...", "completion": "..."}                  one object a line
    pairs.jsonl            {"prompt": "...", "chosen": "...", "rejected": "..."}
    labels.jsonl           {"prompt": "...", "completion": "...", "label": true}   or false

A text may also be TRL's list of messages, [{"role": "user" or "assistant", "content": "..."}], and
a demonstration {"messages": [...]}, but only one exchange (see plain). A .jsonl.gz, .jsonl.bz2 or
.jsonl.xz is unpacked; of Parquet, Arrow and others one line says how to convert them.

A wrong file ends the script with one line that says where and why, never with a traceback:

    reward_model.py: pairs.jsonl:17: "chosen" must be text, found the number 3; put it in quotes

Other fields are ignored, and so are blank lines, a byte order mark and the line ends of Windows.
The texts themselves are taken as they are: nothing is stripped or normalised.
"""

import bz2
import codecs
import contextlib
import errno
import gzip
import hashlib
import itertools
import json
import lzma
import os
import re
import shlex
import stat
import sys
import zlib
from pathlib import Path

try:
    import fcntl
except ImportError:     # Windows has none
    fcntl = None
try:
    import msvcrt
except ImportError:     # and Unix does not have this one
    msvcrt = None


class InputError(ValueError):
    """Something the user gave is wrong. The message is one line: file, line, value, what to do."""


# --------------------------------------------------------------------------------------------------
# Reading

# The last place where a text may be cut: (?s:.*) is greedy.
PIECE_END = re.compile(r"(?s:.*)\S(?=[ \t\r\n])")


def read_chunks(path, size=2 ** 20):
    """Yield the text of a UTF-8 file in pieces of about `size` bytes; its line ends become "\\n".

    So the file is never in memory as a whole. A piece ends after a character that is not white
    space and before one that is, where a tokenizer splits the text as well.
    InputError if the file is missing, empty, not UTF-8 or holds a NUL; it names the format if the
    file is of another one.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    start = b""         # of the file
    rest = ""           # decoded, but not yet yielded
    offset = 0          # bytes read
    characters = 0      # characters yielded
    at_start = True
    blank = True
    for block in itertools.chain(read_blocks(path, size), [b""]):
        last = block == b""
        start = start or block[:10]
        offset += len(block)
        searched = max(0, len(rest) - 1)    # but for its last character: a line may be very long
        try:
            rest += decoder.decode(block, final=last)
        except UnicodeDecodeError as error:
            offset -= len(error.object) - error.start
            refuse_other_formats(path, start)
            raise InputError(f"{path}: not UTF-8: byte 0x{error.object[error.start]:02x} at offset "
                             f"{offset}; save the file as UTF-8") from None
        if at_start and rest:
            rest = rest.removeprefix("\ufeff")  # a byte order mark
            at_start = False

        if last:
            end = len(rest)
        else:
            place = PIECE_END.match(rest, searched)
            end = place.end() if place else 0
        text = rest[:end].replace("\r\n", "\n").replace("\r", "\n")
        rest = rest[end:]
        if "\0" in text:
            refuse_other_formats(path, start)
            place = characters + text.index("\0") + 1
            raise InputError(f"{path}: holds a NUL at character {place}; "
                             "save the file as UTF-8 text")
        if text.strip():
            blank = False
        characters += len(text)
        if text:
            yield text
    if blank:
        raise InputError(f"{path}: the file is empty")


def read_jsonl(path, fields):
    """The rows of a JSON-lines file: a list of dicts with exactly these fields, all of them text.

    InputError "FILE:LINE: reason" for a line that isn't a JSON object, holds a key twice, lacks a
    field, or whose value isn't text, is blank, or holds a NUL or half a surrogate pair. InputError
    if there are no rows.
    """
    rows = []
    for row, where in objects(path, fields):
        rows.append({field: text_of(row, field, where) for field in fields})
    return rows


def read_demonstrations(path):
    """Rows {"prompt", "completion"}. In a row of a file of pairs, "chosen" is the completion.

    Rows with "label": false, which KTO has, are no demonstrations: they are left out, and a line
    says how many. InputError if no other is left, or for a label that is neither true nor false.
    """
    rows = []
    bad = 0
    for row, where in objects(path, ("prompt", "completion", "chosen")):
        label = row.get("label", True)
        if label not in (True, False):      # 1 and 0 are equal to them
            raise InputError(f'{where}: "label" must be true or false, found {kind(label)}')
        if not label:
            bad += 1
            continue
        field = "completion"
        if "completion" not in row and "chosen" in row:
            field = "chosen"
        rows.append({"prompt": text_of(row, "prompt", where),
                     "completion": text_of(row, field, where)})
    if bad and not rows:
        raise InputError(f'{path}: every row has "label": false; fine-tuning needs good answers')
    if bad:
        print(f'{path}: left out {bad:,} of {bad + len(rows):,} rows, whose "label" is false',
              flush=True)
    return rows


def read_pairs(path):
    """Rows {"prompt", "chosen", "rejected"}."""
    return read_jsonl(path, ("prompt", "chosen", "rejected"))


def read_comparisons(folder):
    """(rows to train on, held-out rows) in the folder of the reward model's stage or of its run."""
    rows = read_pairs(folder / "pairs.jsonl")
    held_out = read_pairs(folder / "held_out.jsonl")
    return rows, held_out


def read_labels(path):
    """Rows {"prompt", "completion", "label"}, label true for a good response; a pair makes two.

    Pairs of equal texts are left out, and a line says how many.
    """
    rows = []
    equal = 0
    for row, where in objects(path, ("prompt", "completion", "chosen", "rejected")):
        if "label" not in row and "completion" in row:
            raise InputError(f'{where}: the field "label" is missing; true for a good completion, '
                             "false for a bad one")
        if not isinstance(row.get("label", True), bool):
            raise InputError(f'{where}: "label" must be true or false, found {kind(row["label"])}')

        if "label" in row:
            labels = {"completion": row["label"]}
        else:
            labels = {"chosen": True, "rejected": False}
        found = []
        for field, label in labels.items():
            found.append({"prompt": text_of(row, "prompt", where),
                          "completion": text_of(row, field, where),
                          "label": label})
        if len(found) == 2 and found[0]["completion"] == found[1]["completion"]:
            equal += 1
        else:
            rows += found
    if equal and not rows:
        raise InputError(f"{path}: every pair has two equal texts, which say nothing")
    if equal:
        print(f"{path}: left out {equal:,} pairs of two equal texts", flush=True)
    return rows


def read_prompts(path):
    """The distinct prompts of a file whose rows have a "prompt", in order of first appearance."""
    rows = read_jsonl(path, ("prompt",))
    return list(dict.fromkeys(row["prompt"] for row in rows))


def hold_out(rows, path="the rows", prompts=()):
    """Rows with a "prompt" -> (training rows, held-out rows): about a tenth of the prompts is held
    out, at least one. prompts: those of the whole file, where rows leave some out.

    Whether a prompt is held out depends on its own text alone (a checksum), not on the seed or on
    the other rows: no stage is measured on what an earlier one was trained on, even if the file has
    grown since. Only where no prompt of a small file would be, the one with the smallest checksum
    is. InputError, naming path, if there is only one prompt.
    """
    prompts = {row["prompt"] for row in rows}.union(prompts)
    if len(prompts) < 2:
        raise InputError(f"{path}: all have the same prompt; at least two prompts are needed, to "
                         "hold one out")
    by_checksum = sorted(prompts, key=prompt_checksum)
    held_out_prompts = {prompt for prompt in prompts if prompt_checksum(prompt) < 2 ** 32 // 10}
    if not held_out_prompts:
        held_out_prompts = {by_checksum[0]}
    if held_out_prompts == prompts:
        held_out_prompts.remove(by_checksum[-1])

    train_rows = [row for row in rows if row["prompt"] not in held_out_prompts]
    held_out_rows = [row for row in rows if row["prompt"] in held_out_prompts]
    return train_rows, held_out_rows


def prompt_checksum(prompt):
    """32 bits of a prompt's SHA-256. (A CRC is not even over texts that hardly differ.)"""
    return int.from_bytes(hashlib.sha256(prompt.encode("utf-8")).digest()[:4], "big")


def split_prompts(path):
    """The distinct prompts of a file -> (training prompts, held-out ones), split as by hold_out."""
    rows = [{"prompt": prompt} for prompt in read_prompts(path)]
    train_rows, held_out_rows = hold_out(rows, path)
    return [row["prompt"] for row in train_rows], [row["prompt"] for row in held_out_rows]


def read_blocks(path, size=2 ** 20):
    """Yield the bytes of a file, `size` at a time; InputError if it is missing or unreadable, or a
    pipe: files are read more than once, also to see whether they are the same when a run resumes.
    """
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise InputError(f"{path}: is a pipe or a device, but will be read more than once; "
                             "save its content as a file and name that")
        with open(path, "rb") as file:
            while block := file.read(size):
                yield block
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise InputError(f"{path}: is a folder; name a file in it") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


def read_bytes(path):
    """The bytes of a file; InputError if it is missing or unreadable."""
    return b"".join(read_blocks(path, -1))


def checksum(path):
    """The CRC-32 of a file's bytes, without holding them all in memory."""
    crc = 0
    for block in read_blocks(path):
        crc = zlib.crc32(block, crc)
    return crc


def refuse_changed(path, known, trained):
    """InputError if the file path is another one than the checkpoint `trained` was made from.
    known: its checksum at that time, None where there is none."""
    if known is not None and known != checksum(path):
        raise InputError(f"{path}: has changed since {trained} was made from it; restore it, or "
                         "train that stage again")


def objects(path, fields):
    """Yield (row, "FILE:LINE") for each line that isn't blank; messages become plain texts.

    fields: the texts that are wanted. InputError if a line is not a JSON object, or if there is
    none.
    """
    data = unpacked(path, read_bytes(path))
    refuse_other_formats(path, data)
    data = data.removeprefix(b"\xef\xbb\xbf")

    found = False
    # Bytes are split, not text: str.splitlines would also cut at U+2028, which may be in a string.
    for number, line in enumerate(data.split(b"\n"), start=1):
        if line.strip():
            found = True
            where = f"{path}:{number}"
            yield plain(parse_object(line, where), where, fields), where
    if not found:
        raise InputError(f"{path}: the file is empty; each line must be one JSON object")


# How compressed files begin.
GZIP = b"\x1f\x8b"
BZIP2 = re.compile(rb"BZh[1-9]1AY&SY")
XZ = b"\xfd7zXZ\0"
ZSTD = b"\x28\xb5\x2f\xfd"
ZIP = b"PK\x03\x04"


def unpacked(path, data):
    """The content of a gzip, bzip2 or xz file; other data as it is. InputError if it is damaged."""
    name = "gzip"
    try:
        if data.startswith(GZIP):
            return gzip.decompress(data)
        if BZIP2.match(data):
            name = "bzip2"
            return bz2.decompress(data)
        if data.startswith(XZ):
            name = "xz"
            return lzma.decompress(data)
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        raise InputError(f"{path}: not a whole {name} file ({error}); copy it again") from None
    return data


def refuse_other_formats(path, data):
    """InputError with the command that converts a file, if data, its first bytes, are not those of
    a text but of a format that people's texts come in."""
    quoted = shlex.quote(str(path))
    command = None
    if data.startswith(GZIP):
        name, command = "gzip", "gzip -dk"
    elif BZIP2.match(data):
        name, command = "bzip2", "bzip2 -dk"
    elif data.startswith(XZ):
        name, command = "xz", "xz -dk"
    elif data.startswith(ZSTD):
        name, command = "zstd", "zstd -dk"
    elif data.startswith(ZIP):
        name, command = "zip", "unzip"
    if command:
        raise InputError(f"{path}: is a {name} file; unpack it: {command} {quoted}")

    read = None
    if data.startswith(b"PAR1"):
        name, read = "Parquet", "pandas.read_parquet(sys.argv[1])"
    elif data.startswith(b"ARROW1"):
        name, read = "Arrow", "pandas.read_feather(sys.argv[1])"
    elif data.startswith(b"\xff\xff\xff\xff"):
        name = "Arrow"
        read = "pyarrow.ipc.open_stream(open(sys.argv[1], 'rb')).read_pandas()"
    if read:
        new_path = shlex.quote(str(Path(path).with_suffix(".jsonl")))
        raise InputError(f"{path}: is {name}; convert it (pip install pandas pyarrow): python -c "
                         f"\"import sys, pandas, pyarrow; {read}.to_json(sys.argv[2], "
                         f"orient='records', lines=True)\" {quoted} {new_path}")


def plain(row, where, fields):
    """A row whose texts may be TRL's lists of messages -> the row with plain texts in their place.

    A "prompt" is one message of the user. The other texts are one message of the assistant, perhaps
    after one of the user, which then is the prompt; "messages" is the "completion" of a row without
    other answers. Nothing is cut: InputError if there are more turns, another role, or two
    different prompts. Texts that are not wanted, not in fields, may be anything.
    """
    row = dict(row)
    no_answers = not row.keys() & {"completion", "chosen", "rejected"}
    from_messages = no_answers and isinstance(row.get("messages"), list)
    if from_messages:
        row["completion"] = row["messages"]
    for field in ("prompt", "completion", "chosen", "rejected"):
        turns = row.get(field)
        wanted = field in fields or "prompt" not in row
        if not wanted or not is_conversation(turns):
            continue

        name = "messages" if from_messages and field == "completion" else field
        exchange = ["user"] if field == "prompt" else ["user", "assistant"]
        roles = [turn["role"] for turn in turns]
        if "system" in roles or "developer" in roles:
            raise InputError(f'{where}: "{name}" has a system message, and the chat format here '
                             "has none; write its text at the beginning of the user's, or remove "
                             "it")
        if roles != exchange and roles != exchange[-1:]:
            found = shown(", ".join(map(str, roles)))
            raise InputError(f'{where}: "{name}" has the turns {found}, but only one exchange is '
                             f'supported, {" then ".join(exchange)}; keep its first one, or remove '
                             "the line")

        if len(turns) == 2:
            prompt = turns[0]["content"]
            if row.get("prompt", prompt) != prompt:
                raise InputError(f'{where}: "{name}" begins with another prompt than the row has; '
                                 "keep one of them")
            row["prompt"] = prompt
        row[field] = turns[-1]["content"]
        if not isinstance(row[field], str):
            raise InputError(f'{where}: a content in "{name}" is {kind(row[field])}, not a text; '
                             "write its parts as one string")
    return row


def is_conversation(turns):
    """Whether a JSON value is a list of messages {"role": ..., "content": ...}."""
    if not isinstance(turns, list) or not turns:
        return False
    for turn in turns:
        if not isinstance(turn, dict) or "role" not in turn or "content" not in turn:
            return False
    return True


def parse_object(line, where):
    """The JSON object in a line of bytes; InputError "WHERE: reason" if it is not one."""
    try:
        row = json.loads(line.decode("utf-8"), object_pairs_hook=dict_of_distinct_keys)
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8: byte 0x{line[error.start]:02x}; "
                         "save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        near = shown(error.doc[max(0, error.pos - 15):error.pos + 15])
        raise InputError(f"{where}: not JSON: {error.msg} (character {error.pos + 1}, near "
                         f"{near}); each line must be one JSON object") from None
    except RecursionError:
        raise InputError(f"{where}: the JSON is nested too deeply") from None
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    except ValueError:      # what int() says of more than 4,300 digits
        raise InputError(f"{where}: a number has too many digits") from None
    if not isinstance(row, dict):
        raise InputError(f"{where}: found {kind(row)}; each line must be one JSON object")
    return row


def dict_of_distinct_keys(pairs):
    """A JSON object as a dict. Python would silently keep the last of two equal keys."""
    row = {}
    for key, value in pairs:
        if key in row:
            raise InputError(f"the key {shown(key)} occurs twice in one object; remove one")
        row[key] = value
    return row


def text_of(row, field, where):
    """row[field] if it is text that a tokenizer can take; InputError if it is not."""
    if field not in row:
        found = ", ".join(shown(key) for key in list(row)[:5]) or "an empty object"
        if field == "prompt" and "chosen" in row:
            found += "; if both texts begin with the prompt, cut it off and give it by itself"
        raise InputError(f'{where}: the field "{field}" is missing; found {found}')
    value = row[field]
    if not isinstance(value, str):
        advice = "write it as a string"
        if isinstance(value, (int, float)):
            advice = "put it in quotes"
        raise InputError(f'{where}: "{field}" must be text, found {kind(value)}; {advice}')
    if not value.strip():
        raise InputError(f'{where}: "{field}" is blank; give it a text or remove the line')
    bad = re.search("[\0\ud800-\udfff]", value)
    if bad:
        name = f"half a surrogate pair, U+{ord(bad[0]):04X},"
        if bad[0] == "\0":
            name = "a NUL character"
        raise InputError(f'{where}: "{field}" holds {name} at character {bad.start() + 1}; '
                         "remove it")
    return value


def kind(value):
    """What a JSON value is, in words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return "a string"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, dict):
        return "an object"
    return f"the number {shown(value)}"


def shown(value):
    """A string or a number for a message: one line, text in quotes, cut at 40 characters."""
    if not isinstance(value, str):
        return f"{value!r:.40}"
    if len(value) > 40:
        value = value[:37] + "..."
    return repr(value)


# --------------------------------------------------------------------------------------------------
# Writing

def write_atomic(path, data):
    """Write a file so that path holds the old file or all of the new one, never a part.

    data: bytes, a str (written as UTF-8), or a function that writes to the open file.
    The data goes to a temporary file in the same folder, to the disk, and then takes the old file's
    name. If anything fails, the old file is intact, the temporary one is gone, and the error is
    raised.
    """
    if isinstance(data, str):
        data = data.encode("utf-8")
    path = os.path.realpath(path)       # a link stays a link
    if os.path.exists(path) and not os.path.isfile(path):
        raise InputError(f"{path}: is a folder or a device; name a file")
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            if callable(data):
                data(file)
            else:
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        if os.path.exists(temporary):
            os.remove(temporary)
        if isinstance(error, OSError):
            error.filename = path       # a full disk names no file
        raise


def write_jsonl(path, rows):
    """Write rows, JSON-safe dicts, one a line and all or nothing: read_jsonl gives them back."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    write_atomic(path, "".join(lines))


def lock_folder(folder):
    """Claim a folder for this process. Returns an open file to keep: closing it, or the end of the
    process, releases the folder.

    InputError if another process has it. Where files can't be locked, a line says so. Half-written
    files of processes that have ended are removed.
    """
    file = open(os.path.join(folder, "lock"), "w")
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        elif msvcrt:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            print(f"{folder}: this system locks no files; start no second run in this folder",
                  flush=True)
    except OSError as error:
        if error.errno in NO_LOCKS:
            print(f"{folder}: this file system locks no files; start no second run in this folder",
                  flush=True)
        else:
            file.close()
            raise InputError(f"{folder}: another run is using this folder; wait for it, or choose "
                             "another one") from None
    for path in Path(folder).rglob("*.tmp"):
        writer = re.search(r"\.(\d+)\.tmp$", path.name)    # see write_atomic
        if writer and not is_running(int(writer[1])):
            with contextlib.suppress(FileNotFoundError, PermissionError):
                path.unlink()   # Windows refuses while a process has it open
    return file


# What file systems say that have no locks: Lustre without -o flock, NFS without a lock daemon, some
# of FUSE.
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP)


def is_running(process):
    """Whether a process with this number is running. (On Windows never: os.kill would end it.)"""
    if os.name == "nt":
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:     # it is another user's
        return True
    return True


# --------------------------------------------------------------------------------------------------
# Running a script

def with_home(arguments):
    """Command-line arguments with the home folder in place of ~ in paths. The shell does that in
    "--out ~/x", but leaves "--out=~/x", and nobody wants a folder named ~."""
    replaced = []
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if flag in ("--out", "--text", "--data", "--start"):
            argument = flag + equals + os.path.expanduser(value)
        elif replaced and replaced[-1] in ("--out", "--text", "--data", "--start"):
            argument = os.path.expanduser(argument)
        replaced.append(argument)
    return replaced


def is_out_of_memory(error):
    """Whether an exception says that there is no memory left: Python's, the system's, or one of
    torch's, on a GPU or not."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    text = str(error).lower()
    said = any(words in text for words in OUT_OF_MEMORY)
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and said)


OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory",
                 "not enough memory", "bad alloc", "bad_alloc", "alloc_failed",
                 "can't start new thread")


def memory_advice(error):
    """One line about an error that is_out_of_memory."""
    asked = re.search(r"tried to allocate [\d.]+ \w+", str(error), re.IGNORECASE)
    found = f" ({asked[0].replace('Tried', 'tried')})" if asked else ""
    return (f"out of memory{found}: lower --micro_batch, --sample_batch or --rollouts (gpt.py: "
            "--batch), or take a smaller model; no file is damaged")


def prepare_output():
    """Printing never fails: what the terminal's encoding does not have becomes "?", and a standard
    output that is closed (`python ppo.py >&-`) becomes the null device."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8", errors="replace"))
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def run_script(main):
    """Run a script's main(). What the user can fix becomes one line and exit status 1.

    That is InputError, OSError, FloatingPointError of a training run that went wrong, and memory
    that runs out. Ctrl-C exits with 130. Every other exception is a bug of ours and keeps its
    traceback.
    """
    status = 1
    prepare_output()
    sys.argv[1:] = with_home(sys.argv[1:])
    try:
        main()
        sys.stdout.flush()
        return
    except BrokenPipeError:     # `python ppo.py | head`
        # The flush at exit must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        reason = "no one reads the output any more"
    except (InputError, FloatingPointError) as error:
        reason = str(error)
    except (OSError, MemoryError, RuntimeError) as error:
        reason = str(error)
        if is_out_of_memory(error):
            reason = memory_advice(error)
        elif not isinstance(error, OSError):
            raise
        elif error.filename:
            reason = f"{error.filename}: {error.strerror}"
    except KeyboardInterrupt as interrupt:
        reason = str(interrupt) or "interrupted"
        status = 130
    print(f"{os.path.basename(sys.argv[0])}: {' '.join(reason.split())}", file=sys.stderr)
    sys.exit(status)
