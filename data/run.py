"""What every stage script needs and no algorithm does: the command line, lines on the screen, what a run leaves on disk.

A stage's folder OUT/SIZE/STAGE holds what its last finished run left, all of one run:

    checkpoint.pt  metrics.jsonl        and what else the stage writes (reward_model.py: its comparisons)
    unfinished/                         a run that is not over: its state.pt for --resume, labels.jsonl (what a program of the
                                        user's has said so far as a judge), and the files that it will leave
    finished/                           a run that is over and was killed while its files took their places (complete)
    lock                                held by the one process that may write here

Nothing in this file knows what a GPT is.
"""

import argparse
import contextlib
import inspect
import io
import itertools
import math
import os
import pickle
import re
import shutil
import signal
import sys
import time
import typing
import zipfile
import zlib
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import torch

from data.files import InputError, checksum, lock_folder, write_atomic, write_jsonl

try:
    import resource
except ImportError:  # Windows has none
    resource = None

# ----------------------------------------------------------------------------------------------------------------------
# The command line


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (see --help)\n")


def parse_config(Config, gpu, argv, description, needs={}, presets={}):
    """Build a Config from the command line. Every field is a flag; the comment on its line is its help.

    gpu: what --size gpu changes of the defaults; presets: {flag: {its value: what this changes of them, also of gpu's}};
    needs: {flag: (another flag, values)}: the flag means something only where the other one has one of these values,
    or, where none is listed, is set at all ("": is not set). Fields must have the type int, float, str, bool or a Literal
    of strings, whose values are the flag's choices. TypeError, a bug of ours, for a field without a comment.
    """
    comments = dict(re.findall(r"^    (\w+): .*?# (.*)$", inspect.getsource(Config), re.M))
    parser = _Parser(description=description, allow_abbrev=False)
    for field in fields(Config):
        if field.name not in comments:
            raise TypeError(f"{Config.__module__}.{Config.__name__}.{field.name} has no comment on its line to be its help")
        changed = [("gpu", gpu), *(row for rows in presets.values() for row in rows.items())]
        default = "; ".join([f"{field.default!r}", *(f"{name}: {row[field.name]!r}" for name, row in changed
                                                     if field.name in row)])
        if field.type is bool:
            kind = dict(action=argparse.BooleanOptionalAction)
        elif typing.get_origin(field.type) is typing.Literal:
            kind = dict(choices=typing.get_args(field.type))
        else:
            kind = dict(type=field.type)
        parser.add_argument(f"--{field.name}", default=None, **kind,
                            help=f"{comments[field.name]} (default: {default})".replace("%", "%%"))
    given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    preset = {name: value for flag, rows in presets.items()
              for name, value in rows.get(given.get(flag, getattr(Config, flag)), {}).items()}
    for name, (other, *values) in needs.items():
        found = {**preset, **given}.get(other, getattr(Config, other))
        if name in given and not (found in values if values else found):
            raise InputError(f"--{name} {given[name]}: goes without --{other} only" if values == [""] else
                             f"--{name} {given[name]}: goes with --{other}{' ' * bool(values)}{' or '.join(values)} only")
    size = given.get("size", "auto")
    if size == "auto":
        size = "gpu" if torch.cuda.is_available() else "cpu"
    config = Config(**{**(gpu if size == "gpu" else {}), **preset, **given, "size": size})
    for field in fields(Config):
        value = getattr(config, field.name)
        if field.type is int and value < (0 if field.name == "seed" or field.default == 0 else 1):
            raise InputError(f"--{field.name} {value}: must be positive")
        if field.name == "seed" and value >= 2 ** 63:
            raise InputError(f"--seed {value}: is too large; 63 bits are the most")
        if field.type is float and (not math.isfinite(value) or value < 0 <= field.default):
            raise InputError(f"--{field.name} {value}: must be a number, and not negative")
        if field.name == "temperature" and value == 0:
            raise InputError(f"--temperature {value}: must be positive; --top_k 1 is greedy")
        if given.get(field.name) == "":  # an unset variable of the shell's must not mean another job
            raise InputError(f"--{field.name}: is empty; leave the flag away or give it a value")
    return config


def stage_folder(config, stage):
    """out/<size>/<stage>: where a stage keeps its checkpoint, metrics.jsonl and data."""
    return Path(config.out) / config.size / stage


def check_name(name, stage, flag="name"):
    """--name of a run begins with its stage: no run can overwrite another stage's folder."""
    if not re.fullmatch(rf"{stage}[\w.-]*", name):
        raise InputError(f"--{flag} {name}: must be {stage}, or {stage} and letters, digits, '.', '_' or '-' behind it")


MINUTES = {"gpt": 2.0, "sft": 1.0, "reward_model": 2.0, "process_model": 2.0, "ppo": 2.0, "dpo": 2.5, "best_of_n": 1.5,
           "rsft": 3.0}  # size cpu, two cores


def train_missing(config, earlier, stage):
    """Before a stage begins: train what it builds on and is not there, with this run's size, folder and seed.

    earlier: {stage: its main}, in order; what comes before the last checkpoint that is there is not asked for.
    """
    for name in [*earlier, stage]:
        complete(stage_folder(config, name))
    missing = list(itertools.takewhile(lambda name: not (stage_folder(config, name) / "checkpoint.pt").exists(),
                                       reversed(earlier)))[::-1]
    if missing:
        minutes = sum(MINUTES[name] for name in MINUTES if name in missing or stage.startswith(name))
        time_needed = f", about {minutes:.0f} minutes on two cores" if config.size == "cpu" else ""
        print(f"plan    {' → '.join([*missing, stage])}{time_needed}", flush=True)
    for name in missing:
        earlier[name](["--size", config.size, "--out", config.out, "--seed", str(config.seed)]
                      + ["--resume"] * config.resume)


# ----------------------------------------------------------------------------------------------------------------------
# The screen


def announce(stage, config, device, data, model):
    """The first lines of every stage: device, size, data and where it saves."""
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    parameters = sum(p.numel() for p in model.parameters())
    print(f"\n== {stage} ==\ndevice  {where}, size {config.size}, seed {config.seed}\n"
          f"model   {parameters:,} parameters, context {model.config.block_size}\n"
          f"data    {data}\nsaves   {stage_folder(config, stage)}", flush=True)


def show_models(trained, **models):
    """How many models (None: it has none) a stage holds, and how much memory. trained: the names of those that learn.
    InputError if the GPU has less."""
    models = {name: model for name, model in models.items() if model}
    size = sum(x.numel() * x.element_size() * (4 if name in trained else 1)  # itself, its gradient, Adam's two moments
               for name, model in models.items() for x in model.parameters())
    print(f"models in memory: {len(models)} ({', '.join(models)}), {size / 2 ** 20:.0f} MB with gradients and optimizer",
          flush=True)
    # What is needed besides hangs on --micro_batch.
    room = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else math.inf
    if size > room:
        raise InputError(f"{len(models)} models of {size / 2 ** 20:.0f} MB do not fit the GPU's {room / 2 ** 20:.0f}: begin "
                         "with a smaller GPT-2, or export the stages and go on with several GPUs (README)")


def show(*lines):
    """Print (label, text) pairs, the texts in one column."""
    for label, text in lines:
        print(f"{label:9s}" + text.replace("\n", "\n" + 9 * " "), flush=True)


def counts(dropped):
    """{reason: number} as text: "0 equal texts, 3 longer than the context"."""
    return ", ".join(f"{number} {reason}" for reason, number in dropped.items())


def doublings(first, total):
    """first, twice first, ... as far as they are below total, and total: the numbers of a learning curve.

    >>> doublings(256, 1000)
    [256, 512, 1000]
    """
    return [first << k for k in range(total.bit_length()) if first << k < total] + [total]


def with_error(share, count):
    """A share of `count` independent cases in per cent, with its standard error.

    >>> with_error(0.8, 100)
    '80.0 ± 4.0 %'
    """
    return f"{100 * share:.1f} ± {100 * math.sqrt(share * (1 - share) / count):.1f} %"


def progress(what, total):
    """What to call with the number done so far: it prints that and the time left, and at `total` the time that it took.

    On a terminal one line is written over and over, twice a second; elsewhere there is a line every 30 seconds.
    """
    terminal, began = sys.stdout.isatty(), time.perf_counter()
    shown = began

    def report(done):
        nonlocal shown
        now = time.perf_counter()
        if done >= total:
            print("\r" * terminal + f"{what}: {total:,} in {now - began:.0f} s" + 20 * " " * terminal, flush=True)
        elif now - shown > (0.5 if terminal else 30):
            shown = now
            left = "" if done == 0 else f", {clock((now - began) * (total - done) / done)} left"
            print("\r" * terminal + f"{what}: {done:,} of {total:,}{left}   ", end="" if terminal else "\n", flush=True)

    return report


def clock(seconds):
    """Seconds as minutes:seconds.

    >>> clock(125.4)
    '2:05'
    """
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"


def peak_memory(device):
    """{"memory_mb": MB}: on a GPU the most that was allocated there, else the most that the process has held.

    Empty where the system does not say (Windows).
    """
    if device.type == "cuda":
        return {"memory_mb": torch.cuda.max_memory_allocated() / 2 ** 20}
    if resource is None:
        return {}
    unit = 2 ** 20 if sys.platform == "darwin" else 2 ** 10  # bytes there, kilobytes elsewhere
    return {"memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit}


# How a figure is printed, in a row of 100 columns; all others with three decimals. metrics.jsonl has them in full.
FORMATS = {"lr": ".1e", "excess": ".1%", "accuracy": ".1%", "held_out_accuracy": ".1%", "reward": ".2f", "gold": ".2f",
           "kl": ".2f", "J": ".2f", "entropy": ".2f", "clip_fraction": ".1%", "value_explained": ".2f", "length": ".0f",
           "no_end": ".0%", "margin": ".2f", "chosen_log_ratio": ".2f", "rejected_log_ratio": ".2f", "grad_norm": ".2f"}


# ----------------------------------------------------------------------------------------------------------------------
# A run and its folder


class Run:
    """What a training stage keeps in its folder: a lock, metrics.jsonl and, until it has ended, state.pt for --resume.

        with Run("sft", folder, config, every=64) as run:
            run.total = steps
            restore(run.saved, steps, model=model, optimizer=optimizer)
            for step in range(run.saved["step"], steps):
                ...
                run(step + 1, loss=loss)            # prints a row, and writes it to metrics.jsonl
                run.end_step(step + 1, model=model, optimizer=optimizer)     # saves these, if it is time to
            save_checkpoint(run.folder / "checkpoint.pt", ...)
            run.finish()

    run.folder is folder/unfinished: until finish(), what an earlier run left in the folder stays whole. All that comes
    before the loop follows from the settings, the seed among them, so it is done again; the state holds the rest. It is
    there from the start of a run until finish(). sources: files of earlier stages, without which the run can't go on as it
    began; unprinted: figures that go to metrics.jsonl only.
    """

    def __init__(self, stage, folder, config, every, sources=(), unprinted=()):
        self.stage, self.home, self.config, self.every, self.unprinted = stage, folder, config, every, unprinted
        self.folder, self.sources = folder / "unfinished", sources
        self.total, self.step, self.rows, self.header, self.interrupted = 0, 0, [], False, False
        self.pace = None  # (step, time) after the first step of this process

    def __enter__(self):
        self.home.mkdir(parents=True, exist_ok=True)
        self.lock = lock_folder(self.home)
        try:
            self.begin()
        except BaseException:
            self.lock.close()
            raise
        self.handler = signal.signal(signal.SIGINT, self.interrupt)
        return self

    def begin(self):
        """Read the state of the run to resume, or write that of one that begins."""
        self.start, self.path = time.perf_counter(), self.folder / "state.pt"
        move_finished(self.home)
        settings = {name: value for name, value in asdict(self.config).items() if name not in ("resume", "out")}
        for name in ("text", "data"):  # a file may have changed under its name
            if settings.get(name):
                settings[name] += f" (checksum {checksum(settings[name]):08x})"
        sources = {f"{path.parent.name}/{path.name}": checksum(path) for path in self.sources}
        self.saved = dict(stage=self.stage, settings=settings, sources=sources, step=0, seconds=0.0, rows=[],
                          path=str(self.path))
        if self.path.exists() and self.config.resume:
            with refused_if_broken(self.path, "begin anew without --resume"):
                found = read_torch(self.path)
                if any(type(found[name]) is not type(value) for name, value in self.saved.items()) or found["step"] < 0:
                    raise ValueError("its values are not those of a run")
                if found["stage"] != self.stage:
                    raise InputError(f"{self.path}: is the state of a run of {found['stage']}, but {self.stage} is wanted")
                changed = [name for name, value in settings.items() if found["settings"].get(name) != value]
                if changed:
                    name = changed[0]
                    raise InputError(f"{self.path}: the run began with --{name} {found['settings'].get(name)}, not "
                                     f"{settings[name]}; resume it with its settings, or begin anew without --resume")
                changed = [name for name in {**sources, **found["sources"]}
                           if found["sources"].get(name) != sources.get(name)]
                if changed:
                    raise InputError(f"{self.path}: the run began with another {changed[0]}; begin anew without --resume")
                if not all(isinstance(value, (int, float)) for row in found["rows"] for value in row.values()):
                    raise ValueError("its rows are not figures")
            self.saved = {**found, "path": str(self.path)}
            self.step, self.rows = found["step"], found["rows"]
            self.start -= found["seconds"]
            print(f"{self.stage}: goes on after step {self.step}", flush=True)
        elif self.config.resume and (self.home / "checkpoint.pt").exists():
            raise InputError(f"{self.home / 'checkpoint.pt'}: is finished, nothing to resume; without --resume it is "
                             f"trained anew")
        else:
            if self.config.resume:
                print(f"{self.stage}: nothing to resume in {self.home}, begins anew", flush=True)
            elif self.path.exists():
                print(f"{self.stage}: begins anew and gives up an unfinished run (--resume would go on with it)", flush=True)
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir()
        self.write_metrics()
        write_torch(self.path, self.saved)

    def __exit__(self, kind, error, traceback):
        signal.signal(signal.SIGINT, self.handler)
        self.lock.close()
        if kind is FloatingPointError:
            last = ", ".join(f"{name} {value:.4g}" for name, value in self.rows[-1].items()) if self.rows else "none yet"
            raise FloatingPointError(f"{self.stage}, step {self.step + 1}: {error}; last figures: {last}") from error

    def interrupt(self, number, frame):
        """Ctrl-C: the step at work is finished and saved; outside of the steps, or pressed twice, it stops at once."""
        if self.interrupted or not 0 < self.step < self.total:
            raise KeyboardInterrupt
        self.interrupted = True
        print(f"\n{self.stage}: stops after this step (press again to stop at once)", flush=True)

    def __call__(self, step, **row):
        """Keep and print a row, name -> number. Names are printed once, above the columns, cut in two at the last "_";
        left is the time still needed."""
        self.record(step, **row)
        row = {name: value for name, value in row.items() if name not in self.unprinted}
        heads = [name.rpartition("_")[::2] for name in row]
        widths = [max(7, *map(len, head)) for head in heads]  # -123.45 and 1.5e-05 fit
        if not self.header:
            self.header = True
            print(9 * " " + "".join(f"  {first:>{width}s}" for (first, _), width in zip(heads, widths)).rstrip() + "\n"
                  + "     step" + "".join(f"  {last:>{width}s}" for (_, last), width in zip(heads, widths)) + "   left")
        first, since = self.pace or (0, self.start)
        left = clock((time.perf_counter() - since) / max(1, step - first) * (self.total - step))
        columns = "".join(f"  {value:{width}{FORMATS.get(name, '.3f')}}"
                          for (name, value), width in zip(row.items(), widths))
        print(f"{step:4d}/{self.total:<4d}{columns}  {left:>5s}", flush=True)

    def record(self, step, **row):
        """Keep a row without printing it. seconds: since the run began, pauses not counted."""
        self.rows.append({"step": step, **row, "seconds": round(time.perf_counter() - self.start, 2)})
        self.write_metrics()

    def figures(self):
        """The rows without what hangs on the machine: what a checkpoint keeps, so that one seed gives one file."""
        machine = ("seconds", "rollout_s", "scoring_s", "update_s", "memory_mb")
        return [{name: value for name, value in row.items() if name not in machine} for row in self.rows]

    def write_metrics(self):
        """Write all rows so far, atomically: a killed run leaves no half line, and a resumed one repeats none."""
        write_jsonl(self.folder / "metrics.jsonl", self.rows)

    def end_step(self, step, **state):
        """To be called after every step. state: all that the next step depends on, models and optimizers or plain values.

        Saves it when it is due. Raises KeyboardInterrupt, once all is saved, if Ctrl-C was pressed in the meantime.
        """
        self.step, self.pace = step, self.pace or (step, time.perf_counter())
        if step % self.every == 0 or step == self.total or self.interrupted:
            state = {name: x.state_dict() if hasattr(x, "state_dict") else x for name, x in state.items()}
            write_torch(self.path, {**self.saved, **state, "step": step, "rows": self.rows,
                                    "seconds": time.perf_counter() - self.start})
        if self.interrupted:
            raise KeyboardInterrupt(f"{self.stage}: saved after step {step} of {self.total}; --resume goes on")

    def finish(self):
        """All files are written: they take the place of the run before, and nothing is left to resume."""
        os.rename(self.folder, self.home / "finished")  # from here on the run is over, also for one that is killed
        move_finished(self.home)


def move_finished(folder):
    """The files of a finished run take their places in the folder, whose lock the caller holds."""
    finished = folder / "finished"
    if finished.exists():
        for name in ("state.pt", "labels.jsonl"):
            (finished / name).unlink(missing_ok=True)
        for path in sorted(finished.iterdir()):
            os.replace(path, folder / path.name)
        finished.rmdir()


def forget_rounds(folder, name, rounds):
    """Remove the files NAME-N.jsonl of rounds N > rounds: a run before this one had more of them."""
    for path in folder.glob(f"{name}-*.jsonl"):
        if int(path.stem.removeprefix(f"{name}-")) > rounds:
            path.unlink()


def complete(folder):
    """Whoever reads a stage's files calls this first: it completes a run that was killed while its files took their places."""
    if (folder / "finished").exists():
        with lock_folder(folder):
            move_finished(folder)


def restore(saved, steps, **state):
    """Load what a Run saved into models and optimizers, by name. Returns the plain values among `state`, as saved.

    A run that begins (saved["step"] is 0) loads nothing, and its plain values are as given. InputError if the state is
    not one of such a run of `steps` steps.
    """
    plain = {name: x for name, x in state.items() if not hasattr(x, "load_state_dict")}
    if saved["step"] == 0:
        return plain
    with refused_if_broken(saved["path"], "begin anew without --resume"):
        if saved["step"] > steps:
            raise ValueError(f"it is at step {saved['step']} of {steps}")
        for name, x in state.items():
            if name not in plain:
                x.load_state_dict(saved[name])
            elif type(saved[name]) is not type(x) or not torch.tensor(saved[name], dtype=torch.float64).isfinite().all():
                raise ValueError(f"its {name} are not numbers")
        return {name: saved[name] for name in plain}


# ----------------------------------------------------------------------------------------------------------------------
# Files


def write_torch(path, values):
    """torch.save, atomic."""
    buffer = io.BytesIO()  # torch.save to a file that has no room says so in forty lines
    torch.save(values, buffer)
    write_atomic(path, buffer.getvalue())


def read_torch(path):
    """What write_torch wrote, with the checksum of every record verified; a pickle that would run code is refused."""
    with zipfile.ZipFile(path) as archive:  # torch's format is a zip archive
        # No checksum covers these two: torch would skip a record with such attributes, and never compresses one.
        if any(record.external_attr or record.compress_type for record in archive.infolist()) or archive.testzip():
            raise zipfile.BadZipFile("checksum error")
    return torch.load(path, map_location="cpu", weights_only=True)


@contextlib.contextmanager
def refused_if_broken(path, advice, of="this project"):
    """Whatever a damaged file makes torch or us raise becomes an InputError, one line that names the file."""
    try:
        yield
    except InputError:
        raise
    except (zipfile.BadZipFile, pickle.UnpicklingError, OSError, RuntimeError, ValueError, LookupError, TypeError, EOFError,
            ArithmeticError, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: not a whole file of {of} ({reason}); delete it and {advice}") from error


def memory_mapped(path, draw, joined=False):
    """The sequences of ids that draw() yields, as views of a memory-mapped file (joined: as one); where the file is, draw
    is not called. They are never in memory together.

    The file holds int32s, all tokens, then the length of each sequence and how many they are, and a checksum. Atomic.
    """
    def write(file):
        lengths, crc = [], 0
        for numbers in itertools.chain(draw(), [lengths]):
            lengths.append(len(numbers))  # at the end, their own number
            data = np.array(numbers, dtype=np.int32).tobytes()
            crc = zlib.crc32(data, crc)
            file.write(data)
        file.write(crc.to_bytes(4, "little"))

    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, write)
    with refused_if_broken(path, "run the stage again"):
        content = np.memmap(path, np.uint8, mode="r")
        if zlib.crc32(content[:-4]) != int.from_bytes(content[-4:].tobytes(), "little"):
            raise ValueError("checksum error")
        data = np.memmap(path, np.int32, mode="c", shape=len(content) // 4 - 1)  # copy on write: torch wants to be able to
        tokens, lengths = np.split(data[:-1], [len(data) - 1 - data[-1]])
        return [tokens] if joined else [tokens[end - length:end] for length, end in zip(lengths, np.cumsum(lengths))]
