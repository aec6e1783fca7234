"""Runs all checks and measurements that need a GPU, with one command in about nine minutes.

    python benchmarks/gpu.py [--deadline 540] [--only NAME ...] [--peer FOLDER] [--out FOLDER]
    python benchmarks/gpu.py --tiny     rehearse it on a CPU, without the parts that need CUDA

It has not been run on a GPU yet. Sections run in order of importance. Each prints a line and writes its JSON when it
ends. If a section fails, runs out of memory or takes twice its time, the next one starts; a section is skipped if too
little time is left. At the end it prints a table and writes it to summary.md. Our code runs in this process, with
pipelines created on the device, without files. The peers, diffusers' example scripts, run in their own processes.

The exit status is 1 if a section failed.
"""

import argparse
import gc
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# torch and the Hub client read these on import
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import torch  # noqa: E402

from benchmarks import gpu_proofs, gpu_speed  # noqa: E402
from benchmarks.gpu_runs import FAILED, SKIPPED, Bench, Finding, settings_kept  # noqa: E402


class Section(NamedTuple):
    """A part of the checks.

    Attributes:
        seconds: the time that it takes on a GPU, roughly; it is stopped after twice that time.
        needs_cuda: whether it can't run on a CPU at all.
        function: runs it and returns its findings.
    """

    name: str
    seconds: float
    needs_cuda: bool
    function: Callable[[Bench], Finding]


SECTIONS = (
    Section("machine", 15, False, gpu_proofs.machine),
    Section("parity", 45, False, gpu_proofs.parity),
    Section("resumes", 50, False, gpu_proofs.resumes),
    Section("waits", 20, True, gpu_proofs.waits),
    Section("memory", 30, False, gpu_proofs.memory),
    Section("gates", 60, False, gpu_proofs.gates),
    Section("attention", 25, False, gpu_proofs.attention),
    Section("sd", 90, False, gpu_speed.sd),
    Section("sdxl", 95, False, gpu_speed.sdxl),
    Section("sdxl-lora", 55, False, gpu_speed.sdxl_lora),
    Section("pixels", 35, False, gpu_speed.pixels),
    Section("peers", 85, False, gpu_speed.peers),
)
LEAST = 0.3  # share of a section's time that must be left to start it
PATIENCE = 2.0  # multiple of a section's time after which it is stopped
SLOW = 4.0  # multiple of all times without a GPU


class CutOff(BaseException):
    """A section ran out of time. It is not an `Exception`, which our code would handle as its own."""


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Context manager: raises `CutOff` after some seconds, as soon as a running native call returns.

    A timer that was set before continues afterwards.
    """

    def cut_off(number: int, frame: object) -> None:
        raise CutOff(f"cut off after {seconds:.0f} s")

    handler = signal.signal(signal.SIGALRM, cut_off)
    began, (before, interval) = time.monotonic(), signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if before:
            signal.setitimer(signal.ITIMER_REAL, max(0.01, before - (time.monotonic() - began)), interval)


def run_section(section: Section, bench: Bench) -> Finding:
    """Runs a section; returns its findings, or the reason why it was skipped or failed."""
    if section.needs_cuda and bench.device.type != "cuda":
        return Finding(SKIPPED, "needs CUDA, and there is none")
    usual = section.seconds * (1 if bench.device.type == "cuda" else SLOW)
    left = bench.left()
    if left < LEAST * usual:
        return Finding(SKIPPED, f"it takes about {usual:.0f} s, and {left:.0f} s were left")
    try:
        with within(min(PATIENCE * usual, left)), settings_kept():
            return section.function(bench)
    except CutOff as error:
        return Finding(FAILED, f"{error}; {bench.last_said}", {"traceback": traceback.format_exc()})
    except (Exception, SystemExit) as error:  # noqa: BLE001 - the next section runs in any case
        first = str(error).strip().splitlines() or [""]
        return Finding(FAILED, f"{type(error).__name__}: {first[0][:200]}", {"traceback": traceback.format_exc()})
    finally:
        free()


def free() -> None:
    """Frees what a section left on the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def run_all(sections: Sequence[Section], bench: Bench) -> dict[str, Finding]:
    """Runs sections in order; after each one prints its line and writes all findings so far."""
    found: dict[str, Finding] = {}
    for section in sections:
        began = time.perf_counter()
        finding = found[section.name] = run_section(section, bench)
        seconds = time.perf_counter() - began
        print(f"{section.name:10} {finding.verdict:8} {seconds:6.1f} s  {finding.says}", flush=True)
        write(bench.out / f"{section.name}.json", finding._asdict() | {"seconds": seconds})
        write(bench.out / "summary.json", {name: [each.verdict, each.says] for name, each in found.items()})
        (bench.out / "summary.md").write_text(summary(found), encoding="utf-8")
    return found


def write(path: Path, value: object) -> None:
    """Writes JSON; values of other types become strings."""
    path.write_text(json.dumps(value, indent=1, default=str) + "\n", encoding="utf-8")


def summary(found: Mapping[str, Finding]) -> str:
    """Returns the tables at the end, in Markdown: all verdicts, and the speeds compared with the peers."""
    lines = ["| section | verdict | |", "|---|---|---|"]
    lines += [f"| {name} | {each.verdict} | {one_cell(each.says)} |" for name, each in found.items()]
    rows = [row for each in found.values() for row in each.facts.get("speeds", ())]
    if rows:
        head = ("case", "batch", "what", "images/s", "ms per step", "host ms", "peak GB", "MFU", "times the peer's")
        lines += ["", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        lines += [f"| {' | '.join(one_cell(str(each)) for each in gpu_speed.cells(row, rows))} |" for row in rows]
    return "\n".join(lines) + "\n"


def one_cell(text: str) -> str:
    """Returns text escaped and shortened for a table cell."""
    return " ".join(text.replace("|", "/").split())


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deadline", type=float, default=540.0, help="time limit in seconds (default: 540)")
    parser.add_argument("--tiny", action="store_true", help="use tiny models everywhere, as a rehearsal")
    parser.add_argument("--only", nargs="+", choices=[section.name for section in SECTIONS], help="these sections")
    parser.add_argument("--out", type=Path, default=Path("gpu-proof"), help="output folder (default: gpu-proof)")
    parser.add_argument("--peer", type=Path, help="folder with diffusers' example scripts")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the checks and returns the exit status."""
    args = parsed(argv)
    has_cuda = torch.cuda.is_available()
    if not has_cuda and not args.tiny:
        print("error: there is no GPU with CUDA; use --tiny for a rehearsal on a CPU", file=sys.stderr)
        return 2
    if not has_cuda:
        torch.set_num_threads(1)  # with tiny models, threads would only wait for each other
    args.out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda", torch.cuda.current_device()) if has_cuda else torch.device("cpu")
    chosen = [section for section in SECTIONS if args.only is None or section.name in args.only]
    ends_at = time.monotonic() + args.deadline
    with tempfile.TemporaryDirectory(prefix="gpu-proof-") as folder:
        bench = Bench(Path(folder), args.out, device, args.tiny, ends_at, args.peer)
        found = run_all(chosen, bench)
    print(f"\n{summary(found)}", flush=True)
    return int(any(each.verdict == FAILED for each in found.values()))


if __name__ == "__main__":
    sys.exit(main())
