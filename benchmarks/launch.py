"""Runs a training script as a user would, and records the timing of its steps from outside.

    python benchmarks/launch.py [--options] SCRIPT [the script's own flags]

benchmarks/train.py starts it for our script and for a peer's. The script itself is not changed. It times the calls in
`TIMED` below, which both sides make; for nested calls, the outermost counts. It never waits for a GPU: there, steps are
timed by events in its stream, which are read at the end.

A step is the time from the end of one optimizer step to the end of the next. Phases of a step, in seconds of the main
thread: `data` (next() of a DataLoader's iterator: with 0 workers that is loading itself), `encoders` (VAE and text
encoders), `forward` (only the denoiser), `backward`, `optimizer` (with clipping and zero_grad), `ema`. The rest is the
loop itself.

Synchronising calls are calls of the main thread that wait for a GPU, or would if the tensors were on one. On a GPU,
torch's debug mode counts them. On a CPU, calls of `SYNCHRONISING` are counted, except in the phases `data` and
`optimizer`, whose tensors are always on the CPU (pixels, AdamW's step numbers); indexing by masks and copies by `to`
are not detected there. This module imports only torch and the standard library, so the script's imports are timed.
"""

import argparse
import builtins
import cProfile
import functools
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import resource
import runpy
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

TIMED: dict[str, Sequence[tuple[str, str]]] = {
    "torch.autograd": [("backward", "backward")],
    "torch.nn.utils": [(name, "optimizer") for name in ("clip_grad_norm_", "clip_grads_with_norm_", "get_total_norm")],
    "torch.optim.optimizer": [("Optimizer.zero_grad", "optimizer")],
    "torch.utils.data.dataloader": [("_BaseDataLoaderIter.__next__", "data"), ("DataLoader.__iter__", "data")],
    "diffusers.models.unets.unet_2d": [("UNet2DModel.__call__", "forward")],
    "diffusers.models.unets.unet_2d_condition": [("UNet2DConditionModel.__call__", "forward")],
    "diffusers.models.autoencoders.autoencoder_kl": [("AutoencoderKL.encode", "encoders")],
    "diffusers.models.modeling_utils": [("ModelMixin.from_pretrained", "loading")],
    "diffusers.pipelines.pipeline_utils": [("DiffusionPipeline.from_pretrained", "loading")],
    "diffusers.training_utils": [("EMAModel.step", "ema")],
    "transformers.modeling_utils": [("PreTrainedModel.from_pretrained", "loading")],
    "transformers.models.clip.modeling_clip": [
        ("CLIPTextModel.__call__", "encoders"),
        ("CLIPTextModelWithProjection.__call__", "encoders"),
    ],
    "datasets.arrow_dataset": [("Dataset.map", "caching")],
    "datasets.load": [("load_dataset", "listing")],
    "utils.training.preparation": [
        ("DataPreparation.fill_cache", "caching"),
        ("DataPreparation.choose_images", "listing"),
    ],
    "utils.training.ema": [("MovingAverage.update", "ema")],
    "utils.training.speed_up": [("speed_up", "compiling")],
    "utils.training.backward": [("Gradients.rehearse", "rehearsing")],
}
"""Timed calls by module, with the phase that they count in. Names that a module does not have are skipped."""
SYNCHRONISING = (
    "item",
    "tolist",
    "cpu",
    "numpy",
    "nonzero",
    "masked_select",
    "__bool__",
    "__float__",
    "__int__",
    "__index__",
    "__array__",
)
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
LEFT_OUT_OF_COUNTING = ("data", "optimizer")


class Recorder:
    """The record of a run, step by step.

    Attributes:
        steps: seconds and phases of each optimizer step; the first has those of the start.
        denoiser: the network whose forward pass was called last.
    """

    def __init__(
        self,
        folder: Path,
        began: float,
        keeps_gradients: bool,
        profiled_steps: int,
        clock: str = "wall",
        last_step: int | None = None,
    ):
        self._folder = folder
        self._last_step = last_step
        self._clock, self._clock_of_steps = time.perf_counter, CLOCKS[clock]
        self._began = began
        self._keeps_gradients = keeps_gradients
        self._gradients: dict[str, Tensor] = {}
        self._thread = threading.get_ident()
        self._phase: str | None = None
        self._spent: Counter[str] = Counter()
        self._calls: Counter[str] = Counter()
        self._sites: Counter[str] = Counter()
        self._sites_now: Counter[str] = Counter()
        self._losses: list[tuple[int, Tensor]] = []
        self._events: list[torch.cuda.Event] = []
        self._depth = 0
        self._is_over = False
        self._memory_of_start = 0
        self._profile = cProfile.Profile() if profiled_steps else None
        self._profiled_steps = profiled_steps
        self.denoiser: nn.Module | None = None
        self.steps: list[dict[str, Any]] = []
        self.main_at: float | None = None
        self._last = 0.0

    def timed(self, phase: str, function: Callable) -> Callable:
        """Wraps a function so that its time counts in a phase, unless it is nested in another timed call."""

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if self._phase is not None or torch.compiler.is_compiling() or threading.get_ident() != self._thread:
                return function(*args, **kwargs)
            if phase == "forward":
                self.denoiser = args[0]
            elif phase == "optimizer":
                self._before_clipping()
            self._phase, began = phase, self._clock()
            try:
                return function(*args, **kwargs)
            finally:
                self._spent[phase] += self._clock() - began
                self._phase = None
                if phase == "backward":
                    self._after_backward(args)

        return call

    def counted(self, name: str, function: Callable) -> Callable:
        """Wraps a tensor method so that its calls count as synchronising."""

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if self._phase in LEFT_OUT_OF_COUNTING or threading.get_ident() != self._thread:
                return function(*args, **kwargs)
            began = self._clock()
            try:
                return function(*args, **kwargs)
            finally:
                self.synchronised(name, self._clock() - began)

        return call

    def synchronised(self, name: str, seconds: float = 0.0) -> None:
        """Counts a synchronising call and its place in the script or a library."""
        if self._is_over:
            return
        self._calls["synchronising"] += 1
        self._spent["blocked"] += seconds
        if len(self.steps) > 1:
            frame = sys._getframe(1)
            while frame.f_back is not None and frame.f_code.co_filename in (__file__, warnings.__file__):
                frame = frame.f_back
            self._sites_now[f"{name} in {Path(frame.f_code.co_filename).name}:{frame.f_lineno}"] += 1

    def _after_backward(self, args: Sequence[Any]) -> None:
        loss = args[0] if isinstance(args[0], Tensor) else args[0][0]
        self._losses.append((len(self.steps), loss.detach()))

    def _before_clipping(self) -> None:
        """Copies the gradients of the first step before clipping, which a fused kernel may do within the step."""
        if not self._keeps_gradients or self.steps or self._gradients or not self._losses or self.denoiser is None:
            return
        for name, parameter in self.denoiser.named_parameters():
            if parameter.grad is not None:
                self._gradients[name] = parameter.grad.detach().clone()

    def before_optimizer(self, *_: Any) -> None:
        """Marks the start of an optimizer step; a nested one does not count."""
        self._depth += 1
        if self._depth == 1:
            self._before_clipping()
            self._optimizer_began, self._phase = self._clock(), "optimizer"

    def after_optimizer(self, *_: Any) -> None:
        """Marks the end of an optimizer step, and with it of a training step."""
        self._depth -= 1
        if self._depth:
            return
        self._phase = None
        now = self._clock()
        self._spent["optimizer"] += now - self._optimizer_began
        seconds = now - self._last if self.steps else time.time() - self._began
        self.steps.append({"seconds": seconds, "phases": dict(self._spent), "calls": dict(self._calls)})
        self._sites.update(self._sites_now)
        for counter in (self._spent, self._calls, self._sites_now):
            counter.clear()
        if torch.cuda.is_available():
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._events.append(event)
        if len(self.steps) == 1:
            self._begin_steps()
        if self._profile is not None and len(self.steps) == self._profiled_steps:
            self._profile.disable()
        if len(self.steps) == self._last_step:
            self.finish()
            sys.stdout.flush()
            os._exit(0)  # skip checkpoint and export, which would take longer than the steps
        self._last = self._clock()

    def begin_main(self) -> None:
        """Marks the time when the script has parsed its options."""
        self._spent.clear()
        self._import = builtins.__import__
        builtins.__import__ = self.timed("importing", self._import)

    def _begin_steps(self) -> None:
        if self.main_at is not None:
            builtins.__import__ = self._import
        self._clock = self._clock_of_steps
        self._memory_of_start = peak_memory()
        forget_peak_memory()
        if torch.cuda.is_available():
            count_cuda_warnings(self)
        if self._profile is not None:
            self._profile.enable()

    def finish(self) -> None:
        """Writes record.json, gradients.safetensors and the profile."""
        self._is_over = True
        if self._profile is not None:
            self._profile.disable()
            self._profile.dump_stats(self._folder / "profile")
        record = {
            "main_seconds": None if self.main_at is None else self.main_at - self._began,
            "steps": self.steps,
            "device_seconds": [],
            "losses": self._summed_losses(),
            "sites": dict(self._sites.most_common(12)),
            "memory": self._memory(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
            "threads": torch.get_num_threads(),
        }
        if self._events:
            torch.cuda.synchronize()
            pairs = zip(self._events, self._events[1:], strict=False)
            record["device_seconds"] = [first.elapsed_time(second) / 1e3 for first, second in pairs]
        if self._gradients:
            from safetensors.torch import save_file

            tensors = {name: each.float().cpu().contiguous() for name, each in self._gradients.items()}
            save_file(tensors, self._folder / "gradients.safetensors")
        (self._folder / "record.json").write_text(json.dumps(record), encoding="utf-8")

    def _summed_losses(self) -> list[float]:
        sums: Counter[int] = Counter()
        if self._losses:
            for (step, _), loss in zip(self._losses, torch.stack([each for _, each in self._losses]), strict=True):
                sums[step] += loss.item()
        return [sums[step] for step in sorted(sums)]

    def _memory(self) -> dict[str, int]:
        """Peak memory in bytes: in the steps, and from the start to the first step."""
        if torch.cuda.is_available():
            return {"steps": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
        return {"steps": peak_memory(), "start": self._memory_of_start}


def peak_memory() -> int:
    """Returns the peak resident memory in bytes: VmHWM, because `ru_maxrss` of a child includes its parent's."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def forget_peak_memory() -> None:
    """Resets the peak memory if the system supports it."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def count_cuda_warnings(recorder: Recorder) -> None:
    """Makes torch warn of each call that waits for the GPU, and counts the warnings instead of showing them."""
    show = warnings.showwarning

    def count(message: Warning | str, *rest: Any, **more: Any) -> None:
        if "synchronizing" in str(message):
            recorder.synchronised("a wait for the GPU")
        else:
            show(message, *rest, **more)

    warnings.showwarning = count
    warnings.filterwarnings("always", message=".*synchronizing.*")
    torch.cuda.set_sync_debug_mode("warn")


class AfterImport(importlib.abc.MetaPathFinder):
    """Calls a function on certain modules as soon as they are imported."""

    def __init__(self, wanted: Mapping[str, Callable[[ModuleType], None]]):
        self._wanted = dict(wanted)

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Returns the module's own spec, extended to call the function after execution."""
        function = self._wanted.pop(name, None)
        spec = None if function is None else importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_call(module: ModuleType) -> None:
            execute(module)
            function(module)

        spec.loader.exec_module = execute_and_call
        return spec


def wrap(place: Any, name: str, change: Callable[[Callable], Callable]) -> None:
    """Replaces a function, method or class method by a changed one, if it exists."""
    *path, name = name.split(".")
    for part in path:
        place = getattr(place, part, None)
    original = None if place is None else vars(place).get(name, getattr(place, name, None))
    if original is None:
        return
    if isinstance(original, classmethod):
        setattr(place, name, classmethod(change(original.__func__)))
    else:
        setattr(place, name, change(original))


def instrument(recorder: Recorder) -> None:
    """Installs the recorder's functions, now or as soon as a module is imported."""

    def patch(module: ModuleType) -> None:
        for name, phase in TIMED[module.__name__]:
            wrap(module, name, functools.partial(recorder.timed, phase))

    for name in [name for name in TIMED if name in sys.modules]:
        patch(sys.modules[name])
    sys.meta_path.insert(0, AfterImport({name: patch for name in TIMED if name not in sys.modules}))
    register_optimizer_step_pre_hook(recorder.before_optimizer)
    register_optimizer_step_post_hook(recorder.after_optimizer)
    if not torch.cuda.is_available():
        for name in SYNCHRONISING:
            wrap(Tensor, name, functools.partial(recorder.counted, name))
    parse = argparse.ArgumentParser.parse_known_args

    def parse_and_note(*args: Any, **kwargs: Any) -> Any:
        if recorder.main_at is None:
            recorder.main_at = time.time()
            recorder.begin_main()
        return parse(*args, **kwargs)

    argparse.ArgumentParser.parse_known_args = parse_and_note


def give_weights(folder: Path) -> None:
    """Makes `UNet2DModel.from_config` load weights from a folder, because the peer's script has no option for that."""

    def patch(module: ModuleType) -> None:
        def change(original: Callable) -> Callable:
            def from_config(config: Any, **kwargs: Any) -> nn.Module:
                from safetensors.torch import load_file

                made = original(config, **kwargs)
                made.load_state_dict(load_file(folder / "diffusion_pytorch_model.safetensors"))
                return made

            return from_config

        module.UNet2DModel.from_config = staticmethod(change(module.UNet2DModel.from_config))

    sys.meta_path.insert(0, AfterImport({"diffusers.models.unets.unet_2d": patch}))


def import_torchvision() -> None:
    """Imports torchvision, even if built for another torch version: the peer needs only its Python code."""
    register = torch.library.register_fake

    def register_others(name: object, *rest: object, **more: object) -> Callable:
        if str(name).startswith("torchvision::"):
            return lambda function: function
        return register(name, *rest, **more)

    torch.library.register_fake = register_others
    try:
        import torchvision  # noqa: F401
    finally:
        torch.library.register_fake = register


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the script and exits with its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--record", type=Path, required=True, help="output folder for the record")
    parser.add_argument("--began", type=float, default=time.time(), help="start time in Unix seconds (default: now)")
    parser.add_argument("--keep_gradients", action="store_true", help="save the gradients of the first step")
    parser.add_argument(
        "--profile_steps", type=int, default=0, help="number of steps to profile, which slows them (default: 0)"
    )
    parser.add_argument("--stop_after", type=int, help="exit after N steps, without a result")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="clock for timing steps (default: wall)")
    parser.add_argument("--weights", type=Path, help="folder of a UNet2DModel whose weights a new one gets")
    parser.add_argument("--peer_path", help="folder of additional packages for the script, such as torchvision")
    parser.add_argument("script", type=Path)
    parser.add_argument("flags", nargs=argparse.REMAINDER)
    args = parser.parse_args(argv)
    recorder = Recorder(args.record, args.began, args.keep_gradients, args.profile_steps, args.clock, args.stop_after)
    if args.peer_path is not None:
        sys.path.append(args.peer_path)
        import_torchvision()
    instrument(recorder)
    if args.weights is not None:
        give_weights(args.weights)
    torch.manual_seed(0)
    sys.argv = [str(args.script), *args.flags]
    sys.path[0] = str(args.script.resolve().parent)
    try:
        runpy.run_path(str(args.script), run_name="__main__")
    finally:
        recorder.finish()


if __name__ == "__main__":
    main()
