"""Damaged files of every kind that is read: a run uses them or ends in one line; no traceback, hang or memory eaten.

python tests/fuzz.py [--rounds 1000] [--seed 0] [--only KIND ...]     each round in a process that may die of it
python tests/fuzz.py --seed 0 --round 17                             one round again, in this process, with what it says

A round copies what its kind reads, damages one file (bits, bytes, JSON and safetensors values, tokens that parsers
dislike, or the file becomes a folder, a link to a FIFO, a link to itself), and runs a script on it. What a round does
follows from the seed and its number alone.
"""

import argparse
import contextlib
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tarfile
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")

from tests import tiny  # noqa: E402
from tests.networks import make_own  # noqa: E402

SECONDS, MEGABYTES = 10, 500  # more than the same command takes with the file as it was
SPARSE = 5 * 10**9  # bytes of a file that takes no room on the disk
ODD_VALUES: tuple[object, ...] = (
    *(None, True, -1, 0, 3, 10**400, 1e308, float("nan"), float("inf"), "", "1000", "x" * 100_000, [], {}, [None]),
    *("../../etc/passwd", "/etc/hostname", "\x1b[2J\nerror: forged", "\ud800", "a\x00b", {"a": {"b": [1]}}, [[[]]]),
)
TOKENS = (
    *(b"[" * 200_000, b'{"a":' * 50_000, b"\x00" * 64, b"\xff\xfe", b"\xef\xbb\xbf", b"\r", b"\n\n", b'"', b"'", b",,"),
    *(b"a: &a [x]\nb: &b [*a,*a,*a,*a]\nc: [*b,*b,*b,*b]\n", b"!!python/object/apply:os.system ['true']\n", b"- *x\n"),
    *(
        b"1e999",
        b"9" * 5000,
        b"\x1b[31m",
        "é".encode("latin-1"),
        "\u202e".encode(),
        b"<?xml?><svg/>",
        b"../",
        b"%s%n{}",
    ),
)
FILES = (
    *(b"", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0"),
    *(
        b"PK\x03\x04" + b"\x00" * 100,
        b"\x80\x04\x95\x10cos\nsystem\n",
        b"GIF89a",
        b"RIFF\xff\xff\xff\xffWEBP",
        b"8BPS\x00\x01",
    ),
    *(
        b"\xff" * 8 + b"{}",
        (2**60).to_bytes(8, "little") + b"{}",
        b"PAR1",
        b"<html>404</html>",
        b"version https://git-lfs",
    ),
)


@dataclass(frozen=True)
class Kind:
    """What is damaged, and the command that reads it.

    Attributes:
        base: what is copied, below the world's folder.
        pattern: which of its files are damaged.
        command: (script, flags) for the copy's path and the folder of this round.
    """

    base: str
    pattern: str
    command: Callable[[Path, Path], tuple[str, Sequence[object]]]


class World:
    """Pipelines, data and results of all kinds, made once."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.made = folder / "made"
        tiny.make_sd(self.made / "sd")
        tiny.unconditional(self.made / "ddpm")
        make_own(self.made / "network.py")
        images = tiny.make_images(self.made / "images", 4)
        tiny.make_classes(images, self.made / "classes")
        files = sorted(images.glob("*.png"))
        for name in ("captioned", "listed", "mapped", "tarred", "masked", "rows"):
            (self.made / name).mkdir()
        for number, file in enumerate(files):
            for name in ("captioned", "listed", "masked"):
                shutil.copy(file, self.made / name)
            (self.made / "captioned" / f"{number:03d}.txt").write_text(f"picture {number}", encoding="utf-8")
            shutil.copy(file, self.made / "masked" / f"{file.stem}-masklabel.png")
        others = zip(files, ("JPEG", "WEBP", "TIFF", "GIF"), strict=True)
        for file, kind in others:
            from PIL import Image

            Image.open(file).save(self.made / "captioned" / f"{file.stem}-{kind}.{kind.lower()}", kind)
        rows = "".join(f'{file.name},"picture, {number}"\n' for number, file in enumerate(files))
        (self.made / "listed" / "metadata.csv").write_text("file_name,text\n" + rows, encoding="utf-8")
        shutil.copytree(images, self.made / "mapped" / "images")
        (self.made / "mapped" / "images" / "metadata.jsonl").unlink()
        captions = {file.name: [f"picture {number}", "other"] for number, file in enumerate(files)}
        (self.made / "mapped" / "captions.json").write_text(json.dumps(captions), encoding="utf-8")
        with tarfile.open(self.made / "tarred" / "train-0.tar", "w") as archive:
            for file in sorted((self.made / "captioned").iterdir()):
                archive.add(file, file.name)
        self._write_rows(files)
        (self.made / "sources").mkdir()
        shutil.copytree(images, self.made / "sources" / "dogs")
        (self.made / "sources" / "data.yaml").write_text(
            "- train_data_dir: dogs\n  repeats: 2\n  trigger_word: sks\n- train_data_dir: dogs\n  loss_weight: 0.5\n",
            encoding="utf-8",
        )
        (self.made / "prompts").mkdir()
        rows = [{"prompt": "a red square"}, {"prompt": "a blue square", "category": "x"}]
        (self.made / "prompts" / "prompts.json").write_text(json.dumps(rows), encoding="utf-8")
        (self.made / "prompts" / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        (self.made / "prompts" / "prompts.csv").write_text('prompt\n"a red, square"\nb\n', encoding="utf-8")
        (self.made / "prompts" / "prompts.txt").write_text("a red square\nb\n", encoding="utf-8")
        tiny.write_single_file(self.made / "sd", self.made / "sd.safetensors")
        (self.made / "single").mkdir()
        shutil.move(self.made / "sd.safetensors", self.made / "single" / "sd.safetensors")
        self._train()

    def _write_rows(self, files: Sequence[Path]) -> None:
        import pyarrow
        import pyarrow.parquet

        rows = [{"image": {"bytes": file.read_bytes(), "path": file.name}, "text": file.stem} for file in files]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), self.made / "rows" / "train.parquet")

    def _train(self) -> None:
        """Runs that leave caches, checkpoints, adapters and statistics."""
        run = self.made / "run"
        ended = [
            *(
                self.call(
                    "text", [*self.training(), "--output_dir", run, *self.short(2), "--use_ema", *self.cached(run)]
                ),
            ),
            self.call(
                "text", [*self.training(), "--output_dir", self.made / "lora", *self.short(1), "--adaptation", "lora"]
            ),
            self.call(
                "evaluate",
                [
                    *self.evaluating(),
                    "--output_dir",
                    self.made / "drawn",
                    "--save_reference",
                    self.made / "drawn" / "reference.npz",
                ],
            ),
        ]
        if any(status for status, _, _ in ended):
            raise SystemExit("\n".join(output for _, output, _ in ended))

    def training(self, pipeline: Path | None = None, data: Path | None = None) -> list[object]:
        """Flags of a text-to-image run."""
        model = ["--pretrained_model", pipeline or self.made / "sd"]
        source = ["--train_data_dir", data or self.made / "images"]
        return [
            *model,
            *source,
            "--resolution",
            32,
            "--report_to",
            "none",
            "--no_report",
            "--lr_warmup_steps",
            0,
            "--max_bad_fraction",
            1,
        ]

    def short(self, steps: int) -> list[object]:
        """Flags of a run of a few steps."""
        return ["--max_train_steps", steps, "--checkpointing_steps", 1]

    def cached(self, run: Path) -> list[object]:
        """Flags of a run with caches in its own folder."""
        return ["--cache_latents", "--cache_text_embeddings", "--encoding_cache_dir", run / "cache"]

    def evaluating(self, pipeline: Path | None = None, **more: object) -> list[object]:
        """Flags of an evaluation of two images."""
        flags = {"prompts": "a", "reference": self.made / "images", "metrics": "kid", "num_inference_steps": 1} | more
        words = [word for name, value in flags.items() for word in (f"--{name}", value)]
        features = self.made / "network.py"
        return [
            "--pipeline",
            pipeline or self.made / "sd",
            "--images_per_prompt",
            2,
            "--no_download",
            *words,
            "--feature_module",
            features,
        ]

    def call(self, script: str, flags: Sequence[object]) -> tuple[int, str, float]:
        """Runs a script in this process; returns its status, what it printed, and its seconds."""
        import evaluate_pipeline
        import train_text_to_image
        import train_unconditional
        from tests.conftest import reset_accelerate

        scripts = {"text": train_text_to_image, "unconditional": train_unconditional, "evaluate": evaluate_pipeline}
        reset_accelerate()
        began, out = time.monotonic(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            status = scripts[script].main([str(flag) for flag in flags])
        return status, out.getvalue(), time.monotonic() - began


def kinds(world: World) -> dict[str, Kind]:
    """All kinds of files that are read."""

    def dry(base: str, pattern: str = "*", *more: object) -> Kind:
        return Kind(
            base,
            pattern,
            lambda copy, out: ("text", [*world.training(data=copy), "--output_dir", out, "--dry_run", *more]),
        )

    def pipeline(pattern: str) -> Kind:
        return Kind(
            "sd",
            pattern,
            lambda copy, out: ("text", [*world.training(pipeline=copy), "--output_dir", out, "--dry_run"]),
        )

    def resumed(pattern: str) -> Kind:
        return Kind(
            "run",
            pattern,
            lambda copy, out: (
                "text",
                [
                    *world.training(),
                    "--output_dir",
                    copy,
                    *world.short(3),
                    "--use_ema",
                    *world.cached(copy),
                    "--resume_from_checkpoint",
                    "latest",
                ],
            ),
        )

    def prompts(name: str) -> Kind:
        return Kind(
            "prompts",
            name,
            lambda copy, out: (
                "evaluate",
                [
                    "--pipeline",
                    world.made / "sd",
                    "--prompts_file",
                    copy / name,
                    "--max_prompts",
                    3,
                    "--num_inference_steps",
                    1,
                    "--metrics",
                    "lpips_diversity",
                    "--no_download",
                    "--output_dir",
                    out,
                ],
            ),
        )

    return {
        "images": dry("captioned", "*.[!t]*"),
        "captions": dry("captioned", "*.txt"),
        "metadata.csv": dry("listed", "*.csv"),
        "metadata.jsonl": dry("images", "*.jsonl"),
        "captions.json": dry("mapped", "captions.json"),
        "tar": dry("tarred", "*.tar"),
        "masks": dry("masked", "*masklabel.png", "--mask_dir", world.made / "masked"),
        "parquet": dry("rows", "*.parquet"),
        "dataset file": Kind(
            "sources",
            "*.yaml",
            lambda copy, out: (
                "text",
                [
                    *world.training()[:2],
                    *world.training()[4:],
                    "--dataset_file",
                    copy / "data.yaml",
                    "--output_dir",
                    out,
                    "--dry_run",
                ],
            ),
        ),
        "configs": pipeline("**/*config.json"),
        "model_index.json": pipeline("model_index.json"),
        "tokenizer": pipeline("tokenizer/*"),
        "weights": pipeline("**/*.safetensors"),
        "single file": Kind(
            "single",
            "*",
            lambda copy, out: (
                "text",
                [
                    *world.training(pipeline=copy / "sd.safetensors"),
                    "--pretrained_model_config",
                    world.made / "sd",
                    "--output_dir",
                    out,
                    "--dry_run",
                ],
            ),
        ),
        "adapter": Kind(
            "lora",
            "*.safetensors",
            lambda copy, out: (
                "text",
                [*world.training(), "--adaptation", "lora", "--lora_weights", copy, "--output_dir", out, "--dry_run"],
            ),
        ),
        "cache": resumed("cache/**/*"),
        "checkpoint": resumed("checkpoint-*/**/*"),
        "records of a run": resumed("*.json*"),
        "unconditional": Kind(
            "ddpm",
            "**/*",
            lambda copy, out: (
                "unconditional",
                [
                    "--pretrained_model",
                    copy,
                    "--train_data_dir",
                    world.made / "images",
                    "--resolution",
                    16,
                    "--report_to",
                    "none",
                    "--no_report",
                    "--output_dir",
                    out,
                    "--dry_run",
                ],
            ),
        ),
        "prompts.txt": prompts("prompts.txt"),
        "prompts.json": prompts("prompts.json"),
        "prompts.jsonl": prompts("prompts.jsonl"),
        "prompts.csv": prompts("prompts.csv"),
        "statistics": Kind(
            "drawn",
            "reference.npz",
            lambda copy, out: ("evaluate", [*world.evaluating(reference=copy / "reference.npz"), "--output_dir", out]),
        ),
        "drawn images": Kind(
            "drawn", "**/*", lambda copy, out: ("evaluate", [*world.evaluating(), "--output_dir", copy])
        ),
    }


def damage(file: Path, drawn: random.Random) -> str:
    """Damages a file in one way; returns what was done."""
    content = file.read_bytes()
    ways = [flip_bits, cut_off, zero_range, remove_range, repeat_range, insert_token, other_content, become_another]
    if file.suffix in (".json", ".jsonl"):
        ways += [change_json] * 6
    if file.suffix == ".safetensors":
        ways += [change_header] * 4
    return drawn.choice(ways)(file, content, drawn)


def flip_bits(file: Path, content: bytes, drawn: random.Random) -> str:
    """Flips one to eight bits, of the first kilobyte in half of the cases."""
    changed = bytearray(content)
    reach = min(len(changed), 1024) if drawn.random() < 0.5 else len(changed)
    places = [drawn.randrange(reach) for _ in range(drawn.randint(1, 8))] if reach else []
    for place in places:
        changed[place] ^= 1 << drawn.randrange(8)
    file.write_bytes(changed)
    return f"bits flipped at {places}"


def cut_off(file: Path, content: bytes, drawn: random.Random) -> str:
    """Cuts the file off at some place."""
    end = drawn.randrange(len(content) + 1)
    file.write_bytes(content[:end])
    return f"cut off after {end} of {len(content)} bytes"


def _range(content: bytes, drawn: random.Random) -> tuple[int, int]:
    begin = drawn.randrange(len(content) + 1)
    return begin, min(len(content), begin + drawn.choice([1, 8, 100, 10_000]))


def zero_range(file: Path, content: bytes, drawn: random.Random) -> str:
    """Puts zero bytes in place of a range, as a power loss does."""
    begin, end = _range(content, drawn)
    file.write_bytes(content[:begin] + bytes(end - begin) + content[end:])
    return f"zeros at {begin} to {end}"


def remove_range(file: Path, content: bytes, drawn: random.Random) -> str:
    """Removes a range."""
    begin, end = _range(content, drawn)
    file.write_bytes(content[:begin] + content[end:])
    return f"without {begin} to {end}"


def repeat_range(file: Path, content: bytes, drawn: random.Random) -> str:
    """Repeats a range up to a thousand times."""
    begin, end = _range(content, drawn)
    times = drawn.choice([2, 10, 1000])
    file.write_bytes(content[:begin] + content[begin:end] * times + content[end:])
    return f"{begin} to {end} {times} times"


def insert_token(file: Path, content: bytes, drawn: random.Random) -> str:
    """Inserts what parsers dislike."""
    token, (begin, end) = drawn.choice(TOKENS), _range(content, drawn)
    end = drawn.choice([begin, end])
    file.write_bytes(content[:begin] + token + content[end:])
    return f"{token[:20]!r} ({len(token)} bytes) in place of {begin} to {end}"


def other_content(file: Path, content: bytes, drawn: random.Random) -> str:
    """Puts another file's content in its place, or makes it five gigabytes of zeros."""
    if drawn.random() < 0.2:
        with file.open("r+b") as opened:
            opened.truncate(SPARSE)
        return "followed by five gigabytes of zeros"
    chosen = drawn.choice(FILES)
    file.write_bytes(chosen)
    return f"replaced by {chosen[:20]!r}"


def become_another(file: Path, content: bytes, drawn: random.Random) -> str:
    """Makes the file a folder, a FIFO, a link to one, to itself, to nothing or to a device, or removes it."""
    file.unlink()
    what = drawn.choice(
        ["folder", "FIFO", "link to a FIFO", "link to itself", "link to nothing", "link to a device", "gone"]
    )
    if what == "folder":
        file.mkdir()
    elif what == "FIFO":
        os.mkfifo(file)
    elif what == "link to a FIFO":
        aside = file.parent.parent / f".fifo-{file.name}"
        os.mkfifo(aside)
        file.symlink_to(aside)
    elif what == "link to itself":
        file.symlink_to(file.name)
    elif what == "link to nothing":
        file.symlink_to("nothing")
    elif what == "link to a device":
        file.symlink_to("/dev/zero")
    return f"made a {what}"


def change_json(file: Path, content: bytes, drawn: random.Random) -> str:
    """Replaces, removes or adds a value of the JSON, or of one of its lines."""
    lines = (
        content.decode(errors="replace").split("\n") if file.suffix == ".jsonl" else [content.decode(errors="replace")]
    )
    number = drawn.randrange(len(lines))
    try:
        value = json.loads(lines[number])
    except ValueError:
        return insert_token(file, content, drawn)
    value, done = _changed(value, drawn)
    lines[number] = json.dumps(value)
    file.write_text("\n".join(lines), encoding="utf-8", errors="surrogatepass")
    return f"line {number}: {done}"


def change_header(file: Path, content: bytes, drawn: random.Random) -> str:
    """Changes a value in the header of a safetensors file, whose length follows."""
    length = int.from_bytes(content[:8], "little")
    value, done = _changed(json.loads(content[8 : 8 + length]), drawn)
    header = json.dumps(value).encode("utf-8", "replace")
    file.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    return f"header: {done}"


def _changed(value: object, drawn: random.Random) -> tuple[object, str]:
    """A JSON value with one value in it changed, and what was done."""
    places: list[tuple[dict | list, object]] = []
    todo = [value]
    while todo:
        each = todo.pop()
        if isinstance(each, dict | list):
            keys = list(each) if isinstance(each, dict) else range(len(each))
            places += [(each, key) for key in keys]
            todo += [each[key] for key in keys]
    odd = drawn.choice(ODD_VALUES)
    if not places or drawn.random() < 0.05:
        return odd, f"all of it {str(odd)[:40]!r}"
    holder, key = drawn.choice(places)
    if drawn.random() < 0.2:
        del holder[key]
        return value, f"without {str(key)[:40]!r}"
    holder[key] = odd
    return value, f"{str(key)[:40]!r} is {str(odd)[:40]!r}"


class Hang(BaseException):
    """A round took longer than it may."""


def _ring(*_: object) -> None:
    raise Hang


@contextlib.contextmanager
def bounded(seconds: float) -> Iterator[None]:
    """Context manager: raises `Hang` after so many seconds."""
    before = signal.signal(signal.SIGALRM, _ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def peak_megabytes() -> float:
    """The largest resident memory of this process since `forget_peak`."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def forget_peak() -> None:
    """Lets the peak of resident memory begin anew."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def fault_of(world: World, table: dict[str, Kind], seed: int, number: int, only: Sequence[str]) -> tuple[str, str]:
    """Runs a round; returns (its kind and what was damaged, what is wrong with how it ended: empty for nothing)."""
    drawn = random.Random(f"{seed} {number}")
    name = drawn.choice(only)
    kind = table[name]
    with tempfile.TemporaryDirectory(dir=world.folder) as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(world.made / kind.base, copy)
        files = sorted(file for file in copy.glob(kind.pattern) if file.is_file() and file.name != ".lock")
        file = drawn.choice(files)
        what = f"{name}: {file.relative_to(copy)}: {damage(file, drawn)}"
        forget_peak()
        before = peak_megabytes()
        try:
            with bounded(SECONDS):
                script, flags = kind.command(copy, Path(folder) / "out")
                status, output, _ = world.call(script, flags)
        except Hang:
            return what, f"took over {SECONDS} s\n{traceback.format_exc()}"
        except BaseException:  # noqa: BLE001  whatever comes is what is looked for
            return what, traceback.format_exc()
        grown = peak_megabytes() - before
    return what, judged(status, output, grown)


def judged(status: int, output: str, grown: float) -> str:
    """What is wrong with how a round ended; empty for nothing."""
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    if "Traceback (most recent call last)" in output:
        return "a traceback was printed:\n" + output
    if status not in (0, 1, 2):
        return f"ended with {status}\n{output}"
    if status == 2 and len(errors) != 1:
        return f"{len(errors)} lines of errors\n{output}"
    if any(len(line) > 3000 for line in output.splitlines()):
        return f"a line of {max(map(len, output.splitlines()))} characters"
    if any(not (each.isprintable() or each in "\n\t\r") for each in output):
        return "control codes reached the terminal"
    return f"took {grown:.0f} MB more" if grown > MEGABYTES else ""


def fuzz(
    world: World, seed: int, numbers: Sequence[int], only: Sequence[str] | None = None
) -> dict[int, tuple[str, str]]:
    """Runs rounds in this process; returns those that ended wrongly, by number."""
    table = kinds(world)
    found = {number: fault_of(world, table, seed, number, only or sorted(table)) for number in numbers}
    return {number: fault for number, fault in found.items() if fault[1]}


@contextlib.contextmanager
def watched(child: int) -> Iterator[Callable[[], None]]:
    """Context manager: ends a child that says nothing for long, whose own alarm a library's loop may never hear.

    Gives what puts the end off.
    """
    timers: list[threading.Timer] = []

    def ring_later() -> None:
        for timer in timers:
            timer.cancel()
        timers[:] = [threading.Timer(6 * SECONDS, os.kill, (child, signal.SIGKILL))]
        timers[0].start()

    ring_later()
    try:
        yield ring_later
    finally:
        timers[0].cancel()


def in_processes(
    world: World, seed: int, rounds: int, only: Sequence[str], together: int = 20
) -> Iterator[tuple[int, str, str]]:
    """Runs rounds in forked processes, some in each; yields (number, what was damaged, what is wrong) of all rounds."""
    table = kinds(world)
    number = 0
    while number < rounds:
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            with os.fdopen(writing, "w", encoding="utf-8") as lines:
                for each in range(number, min(number + together, rounds)):
                    print(json.dumps(["begin", each]), file=lines, flush=True)
                    print(json.dumps(["end", each, *fault_of(world, table, seed, each, only)]), file=lines, flush=True)
            os._exit(0)
        os.close(writing)
        begun = number
        with os.fdopen(reading, encoding="utf-8") as lines, watched(child) as ring_later:
            for line in lines:
                ring_later()
                kind, each, *rest = json.loads(line)
                begun = each
                if kind == "end":
                    number = each + 1
                    yield each, *rest
        _, status = os.waitpid(child, 0)
        if status:
            yield begun, "", f"the process died: {os.waitstatus_to_exitcode(status)}"
            number = begun + 1


def main() -> int:
    """Fuzzes; returns 1 if a round ended wrongly."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--round", type=int, help="run this round alone, in this process")
    parser.add_argument("--only", nargs="+", metavar="KIND", help="damage only files of these kinds")
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        os.environ["HF_HOME"] = str(Path(folder) / "home")
        world = World(Path(folder))
        only = options.only or sorted(kinds(world))
        if options.round is not None:
            what, wrong = fault_of(world, kinds(world), options.seed, options.round, only)
            print(what, wrong or "ended as it should", sep="\n")
            return bool(wrong)
        counts, faults = Counter(), 0
        for number, what, wrong in in_processes(world, options.seed, options.rounds, only):
            counts[what.partition(":")[0]] += 1
            if wrong:
                faults += 1
                print(f"--- round {number}: {what}\n{wrong}", flush=True)
        print(f"{options.rounds} rounds, {faults} ended wrongly; by kind: {dict(counts)}")
        return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
