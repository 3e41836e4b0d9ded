"""Reading people's own files, and writing ours without ever leaving half a file.

    corpus.txt             plain UTF-8 text, for pretraining
    demonstrations.jsonl   {"prompt": "...", "completion": "..."}                   one object a line
    pairs.jsonl            {"prompt": "...", "chosen": "...", "rejected": "..."}    one object a line
    labels.jsonl           {"prompt": "...", "completion": "...", "label": true}    one object a line, label true or false

A text may also be TRL's list of messages, [{"role": "user" or "assistant", "content": "..."}], a demonstration also
{"messages": [...]}; one exchange only (see plain). A .jsonl.gz is read as what it holds.

A file that is wrong ends in one line that says where and why, never in a traceback:

    reward_model.py: pairs.jsonl:17: "chosen" must be text, found the number 3; put it in quotes

Fields other than the ones asked for are ignored, and so are blank lines, a byte order mark and the line
ends of Windows. The texts themselves are taken as they are: nothing is stripped or normalised.
"""

import codecs
import functools
import gzip
import itertools
import json
import os
import random
import re
import sys
import zlib
from pathlib import Path

try:
    import fcntl
except ImportError:     # Windows has none
    fcntl = None
try:
    import msvcrt
except ImportError:     # and Unix not this one
    msvcrt = None


class InputError(ValueError):
    """Something that the user gave is wrong. The message is one line: file, line, value, what to do."""


# ----------------------------------------------------------------------------------------------------
# Reading

def read_chunks(path, size=2 ** 20):
    """Yield the text of a UTF-8 file in pieces of about `size` bytes, so that it never is in memory whole; line ends become
    "\\n". A piece ends behind a sign that is no white space, before one that is: there a tokenizer makes an end as well.

    InputError if the file is missing, empty, not UTF-8 or holds a NUL.
    """
    decoder, rest, offset, characters, empty, mark = codecs.getincrementaldecoder("utf-8")(), "", 0, 0, True, "\ufeff"
    for block in itertools.chain(read_blocks(path, size), [b""]):
        offset += len(block)
        try:
            rest += decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            offset -= len(error.object) - error.start
            raise InputError(f"{path}: not UTF-8: byte 0x{error.object[error.start]:02x} at offset {offset}; "
                             "save the file as UTF-8") from None
        if rest:
            rest, mark = rest.removeprefix(mark), ""  # a byte order mark, at the beginning
        end = re.match(r"(?s:.*)\S(?=[ \t\r\n])|", rest).end() if block else len(rest)
        text, rest = rest[:end].replace("\r\n", "\n").replace("\r", "\n"), rest[end:]
        if "\0" in text:
            raise InputError(f"{path}: holds a NUL at character {characters + text.index(chr(0)) + 1}; "
                             "save the file as UTF-8 text")
        characters, empty = characters + len(text), empty and not text.strip()
        if text:
            yield text
    if empty:
        raise InputError(f"{path}: the file is empty")


def read_jsonl(path, fields):
    """The rows of a JSON-lines file: a list of dicts with exactly these fields, all of them text.

    InputError "FILE:LINE: reason" for a line that isn't a JSON object, holds a key twice, lacks a field, or
    whose value isn't text, is blank, or holds a NUL or half a surrogate pair. InputError without any rows.
    """
    return [{field: text_of(row, field, where) for field in fields} for row, where in objects(path)]


def read_demonstrations(path):
    """Rows {"prompt", "completion"}. A row of a file of pairs will do: its "chosen" is the completion."""
    rows = []
    for row, where in objects(path):
        field = "chosen" if "chosen" in row and "completion" not in row else "completion"
        rows.append({"prompt": text_of(row, "prompt", where), "completion": text_of(row, field, where)})
    return rows


def read_pairs(path):
    """Rows {"prompt", "chosen", "rejected"}."""
    return read_jsonl(path, ("prompt", "chosen", "rejected"))


def read_comparisons(folder):
    """(rows to train on, held-out rows) that the reward model's stage, or an unfinished run of it, left in its folder."""
    return read_pairs(folder / "pairs.jsonl"), read_pairs(folder / "held_out.jsonl")


def read_labels(path):
    """Rows {"prompt", "completion", "label"}, label true for a good response. A pair, without a label, serves as two."""
    rows = []
    for row, where in objects(path):
        if "label" not in row and "completion" in row:
            raise InputError(f'{where}: the field "label" is missing; true for a good completion, false for a bad one')
        if not isinstance(row.get("label", True), bool):
            raise InputError(f'{where}: "label" must be true or false, found {kind(row["label"])}')
        texts = {"completion": row["label"]} if "label" in row else {"chosen": True, "rejected": False}
        rows += [{"prompt": text_of(row, "prompt", where), "completion": text_of(row, field, where), "label": label}
                 for field, label in texts.items()]
    return rows


def read_prompts(path):
    """The distinct prompts of any file whose rows have a "prompt", in order of first appearance."""
    return list(dict.fromkeys(row["prompt"] for row in read_jsonl(path, ("prompt",))))


def hold_out(rows, seed, path="the rows"):
    """Rows with a "prompt" -> (training rows, held-out rows). A tenth of the prompts, at least one, is held out whole.

    Every stage that reads the same file with the same seed holds out the same prompts, so none is measured on what
    an earlier one was trained on. InputError, naming path, if there is only one prompt.
    """
    prompts = sorted({row["prompt"] for row in rows})
    if len(prompts) < 2:
        raise InputError(f"{path}: all have the same prompt; two prompts at least are needed to hold one out")
    random.Random(f"held-out prompts {seed}").shuffle(prompts)
    held_out = set(prompts[:max(1, len(prompts) // 10)])
    return ([row for row in rows if row["prompt"] not in held_out],
            [row for row in rows if row["prompt"] in held_out])


def split_prompts(path, seed):
    """The distinct prompts of a file -> (training prompts, held-out prompts), as hold_out splits its rows."""
    rows = [{"prompt": prompt} for prompt in read_prompts(path)]
    return [[row["prompt"] for row in part] for part in hold_out(rows, seed, path)]


def read_blocks(path, size=2 ** 20):
    """Yield the bytes of a file, `size` at a time; InputError if there is no such file or it cannot be read."""
    try:
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
    """The bytes of a file; InputError if there is no such file or it cannot be read."""
    return b"".join(read_blocks(path, -1))


def checksum(path):
    """The CRC-32 of a file's bytes, without holding them all."""
    return functools.reduce(lambda crc, block: zlib.crc32(block, crc), read_blocks(path), 0)


def objects(path):
    """Yield (row, "FILE:LINE") for each line that isn't blank, messages as plain texts; InputError if it is no object."""
    data = read_bytes(path)
    if data.startswith(b"PAR1"):
        raise InputError(f"{path}: is a Parquet file; convert it (pip install pandas pyarrow): python -c \"import pandas; "
                         f"pandas.read_parquet('{path}').to_json('{Path(path).with_suffix('.jsonl')}', orient='records', "
                         "lines=True)\"")
    if data.startswith(b"\x1f\x8b"):
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(f"{path}: not a whole gzip file ({error}); copy it again") from None
    data = data.removeprefix(b"\xef\xbb\xbf")
    where = None
    # Bytes are split, not text: str.splitlines would also cut at U+2028, which may stand inside a string.
    for number, line in enumerate(data.split(b"\n"), start=1):
        if line.strip():
            where = f"{path}:{number}"
            yield plain(parse_object(line, where), where), where
    if where is None:
        raise InputError(f"{path}: the file is empty; each line must be one JSON object")


def plain(row, where):
    """A row whose texts may be TRL's lists of messages, with strings in their place. A "prompt" is a message of the user,
    the others are one of the assistant, perhaps after one of the user, which then is the prompt. Nothing is cut:
    InputError if there are more turns, another role, or two prompts that differ."""
    if isinstance(row.get("messages"), list) and not {"prompt", "completion", "chosen", "rejected"} & row.keys():
        row = {**row, "completion": row["messages"]}
    for field in ("prompt", "completion", "chosen", "rejected"):
        turns, wanted = row.get(field), ["user"] if field == "prompt" else ["user", "assistant"]
        if not isinstance(turns, list) or not turns or not all(
                isinstance(turn, dict) and {"role", "content"} <= turn.keys() for turn in turns):
            continue
        roles = [turn["role"] for turn in turns]
        if roles not in (wanted, wanted[-1:]):
            raise InputError(f'{where}: "{field}" has the turns {shown(", ".join(map(str, roles)))}, but must be one '
                             f'exchange, {" then ".join(wanted)}; make a row of each')
        if len(turns) == 2 and row.get("prompt", turns[0]["content"]) != turns[0]["content"]:
            raise InputError(f'{where}: "{field}" begins with another prompt than the row has; keep one of them')
        row = {**row, **({"prompt": turns[0]["content"]} if len(turns) == 2 else {}), field: turns[-1]["content"]}
    return row


def parse_object(line, where):
    """The JSON object that a line, bytes, is; else InputError "WHERE: reason"."""
    try:
        row = json.loads(line.decode("utf-8"), object_pairs_hook=dict_of_distinct_keys)
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8: byte 0x{line[error.start]:02x}; save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        near = shown(error.doc[max(0, error.pos - 15):error.pos + 15])
        raise InputError(f"{where}: not JSON: {error.msg} (character {error.pos + 1}, near {near}); "
                         "each line must be one JSON object") from None
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
    """A JSON object as a dict. Python would keep the last of two equal keys and say nothing."""
    row = {}
    for key, value in pairs:
        if key in row:
            raise InputError(f"the key {shown(key)} stands twice in one object; remove one")
        row[key] = value
    return row


def text_of(row, field, where):
    """row[field] if it is text that a tokenizer can take, else InputError."""
    if field not in row:
        found = ", ".join(shown(key) for key in list(row)[:5]) or "an empty object"
        raise InputError(f'{where}: the field "{field}" is missing; found {found}')
    value = row[field]
    if not isinstance(value, str):
        advice = "put it in quotes" if isinstance(value, (int, float)) else "write it as a string"
        raise InputError(f'{where}: "{field}" must be text, found {kind(value)}; {advice}')
    if not value.strip():
        raise InputError(f'{where}: "{field}" is blank; give it a text or remove the line')
    bad = re.search("[\0\ud800-\udfff]", value)
    if bad:
        name = "a NUL character" if bad.group() == "\0" else f"half a surrogate pair, U+{ord(bad.group()):04X},"
        raise InputError(f'{where}: "{field}" holds {name} at character {bad.start() + 1}; remove it')
    return value


def kind(value):
    """What a JSON value is, in words."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, (int, float)):
        return f"the number {shown(value)}"
    return {str: "a string", list: "a list", dict: "an object"}[type(value)]


def shown(value):
    """A string or a number for a message: one line, in quotes where it is text, cut at 40 characters."""
    if isinstance(value, str):
        return repr(value if len(value) <= 40 else value[:37] + "...")
    return f"{value!r:.40}"


# ----------------------------------------------------------------------------------------------------
# Writing

def write_atomic(path, data):
    """Write bytes, a str as UTF-8, or what a function of the open file writes, so that path holds the old file or all of
    the new one, never a part.

    The data goes to a temporary file in the same folder, to the disk, and then takes the old file's name.
    If anything fails, the old file is intact, the temporary one is gone, and the error goes on its way.
    """
    if isinstance(data, str):
        data = data.encode("utf-8")
    path = os.path.realpath(path)       # a link stays a link
    if os.path.exists(path) and not os.path.isfile(path):
        raise InputError(f"{path}: is a folder or a device; name a file")
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            data(file) if callable(data) else file.write(data)
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
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def lock_folder(folder):
    """Claim a folder for this process: an open file, to be kept; closing it, or the process's end, gives the folder back.

    InputError if another process has it. Half-written files that a killed run left there are removed.
    """
    file = open(os.path.join(folder, "lock"), "w")
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        elif msvcrt:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            print(f"{folder}: this system locks no files; start no second run in this folder", flush=True)
    except OSError:
        file.close()
        raise InputError(f"{folder}: another run is using this folder; wait for it, or choose another one") from None
    for path in Path(folder).rglob("*.tmp"):
        path.unlink()
    return file


# ----------------------------------------------------------------------------------------------------
# Running a script

def run_script(main):
    """Run a script's main(). What the user can mend (InputError, FloatingPointError of a training
    run that went wrong, OSError) becomes one line and exit status 1.

    Ctrl-C exits with 130. Every other exception is a bug of ours and keeps its traceback.
    """
    try:
        main()
        sys.stdout.flush()
        return
    except BrokenPipeError:     # `python ppo.py | head`: nobody reads on, and the flush at exit must not fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        reason, status = "nobody reads the output any more", 1
    except (InputError, FloatingPointError) as error:
        reason, status = str(error), 1
    except OSError as error:
        reason, status = f"{error.filename}: {error.strerror}" if error.filename else str(error), 1
    except KeyboardInterrupt as interrupt:
        reason, status = str(interrupt) or "interrupted", 130
    print(f"{os.path.basename(sys.argv[0])}: {' '.join(reason.split())}", file=sys.stderr)
    sys.exit(status)
