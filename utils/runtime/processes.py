"""The processes of a run and the folder it writes to."""

import logging
import os
import platform
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlsplit

import torch
from filelock import FileLock, Timeout

from utils.config.library_messages import hear_libraries
from utils.config.options import UserError, end_at_once_on_errors, first_line, require
from utils.config.output_folder import refuse_used
from utils.config.terminal import json_text
from utils.config.user_files import FileError, read_json
from utils.runtime.atomic_files import MARKER, mark_as_own, or_without, usual_modes, write_text
from utils.runtime.engines import DTYPES, asked_engine, check_engine
from utils.runtime.heartbeat import watching
from utils.runtime.options import RuntimeOptions
from utils.runtime.trackers import Trackers

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".avif", ".heic", ".tif", ".tiff", ".bmp", ".gif")
OWN_FILES = ("run.json", "results.json", "dry_run_report.json")  # of which a folder that is a run's own has one
EXPANDABLE = "expandable_segments:True"
PACKAGES = ("torch", "accelerate", "diffusers", "transformers", "datasets", "peft", "safetensors", "numpy", "pillow")
Result = TypeVar("Result")


def start_processes(
    options: RuntimeOptions, accumulation_steps: int, trackers: list[str], output_dir: Path, logging_dir: str
) -> "Accelerator":
    """Joins the processes of this run, on GPUs where there are any.

    Raises:
        UserError: where accelerate would do in silence something else than what was asked for.
    """
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, ProjectConfiguration

    if options.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the GPU is first used
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # which costs a pass over each new tensor
        torch.backends.cudnn.benchmark = False
    _expand_segments()
    on_cpu = not (torch.cuda.is_available() or _other_accelerator())
    check_engine(on_cpu, options.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION"))
    handler = InitProcessGroupKwargs(timeout=timedelta(hours=2))
    if asked_engine() == "DEEPSPEED" and on_cpu:
        on_cpu = False  # with cpu=True accelerate passes over DeepSpeed in silence
        handler.backend = "gloo"
    # Gradients as views of what is sent spare a copy of them. Buffers are the same everywhere; sent before a forward
    # pass, a process that begins it again would send them while the others already share gradients
    sharing = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    try:
        accelerator = Accelerator(
            cpu=on_cpu,
            mixed_precision=options.mixed_precision,
            gradient_accumulation_steps=accumulation_steps,
            step_scheduler_with_optimizer=False,
            log_with=trackers or None,
            project_config=ProjectConfiguration(project_dir=str(output_dir), logging_dir=str(output_dir / logging_dir)),
            kwargs_handlers=[handler, sharing],
        )
    except (ValueError, ImportError, RuntimeError) as error:
        raise UserError(f"accelerate can't start with these settings: {first_line(error)}") from error
    if accelerator.num_processes > 1:
        end_at_once_on_errors()
    asked_processes = int(os.environ.get("WORLD_SIZE", "1"))
    if asked_processes != accelerator.num_processes:
        raise UserError(
            f"{asked_processes} processes were started but accelerate joined {accelerator.num_processes}: they would "
            "train apart; check the GPUs, or on a CPU launch with --multi_gpu or torchrun"
        )
    _check_precision(accelerator.mixed_precision, accelerator.device.type)
    if options.local_rank != -1 and accelerator.is_main_process:
        logger.warning("--local_rank is ignored: the launcher says it by the environment")
    if accelerator.device.type == "cpu" and (accelerator.mixed_precision != "no" or _wants_gpus()):
        _warn_of_cpu()
    allow_tf32(accelerator.mixed_precision != "no" if options.allow_tf32 is None else options.allow_tf32)
    hear_libraries()
    return accelerator


def _expand_segments() -> None:
    """Lets CUDA's allocator grow its pieces, unless the user chose: batches of many sizes leave fixed ones unused."""
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    if sys.platform != "linux" or any(name in os.environ for name in names):
        return
    os.environ[names[0]] = EXPANDABLE
    if torch.__version__ < (2, 12):  # which reads the older name alone
        os.environ[names[1]] = EXPANDABLE


def _wants_gpus() -> bool:
    """Whether `accelerate launch` was told to use GPUs."""
    return "ACCELERATE_MIXED_PRECISION" in os.environ and os.environ.get("ACCELERATE_USE_CPU", "false") == "false"


def _warn_of_cpu() -> None:
    """Says that a run that looks like one for a GPU trains on the CPU, and why."""
    if torch.version.cuda is None and torch.version.hip is None:
        cure = f"torch {torch.__version__} is built without CUDA; on a machine with a GPU install another build of it"
    else:
        cure = f"torch {torch.__version__} finds none; look at nvidia-smi and CUDA_VISIBLE_DEVICES"
    logger.warning("training on the CPU, without a GPU: %s (https://pytorch.org/get-started/locally)", cure)


def allow_tf32(is_allowed: bool) -> None:
    """Says whether float32 matrix products and convolutions are computed in TF32; of itself torch does the latter."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = is_allowed


def is_tf32_allowed() -> bool:
    """Whether some float32 arithmetic is in TF32."""
    return torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32


@contextmanager
def without_tf32() -> Iterator[None]:
    """Context manager: float32 arithmetic is in float32."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    allow_tf32(False)
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def _check_precision(precision: str, device: str) -> None:
    """Refuses a precision, whoever asked for it, that the device does not compute in."""
    require(precision in DTYPES, "mixed_precision", precision, f"be one of {', '.join(DTYPES)}")
    if device == "cpu":
        cure = "on a CPU fp16 is not computed"
        require(precision != "fp16", "mixed_precision", precision, "be no or bf16 without a GPU", cure)
    if device == "cuda" and precision == "bf16":
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        require(has_bfloat16, "mixed_precision", precision, "be no or fp16 on this GPU", "it has no bfloat16")


def _other_accelerator() -> bool:
    from accelerate.utils import is_mps_available, is_npu_available, is_xpu_available

    return is_mps_available() or is_npu_available() or is_xpu_available()


def weight_dtype(accelerator: "Accelerator") -> torch.dtype:
    """The dtype of frozen weights: that of the mixed precision, whoever asked for it."""
    return DTYPES[accelerator.mixed_precision]


def autocast(accelerator: "Accelerator") -> AbstractContextManager:
    """Arithmetic in the mixed precision, under any engine: accelerate's own leaves it out with DeepSpeed."""
    precision = accelerator.mixed_precision
    if precision == "no":
        return nullcontext()
    return torch.autocast(accelerator.device.type, DTYPES[precision])


class OutputFolder:
    """The folder of a run: locked while the run lives, and refused where it holds another.

    `run.json` in it records the run's options, and its outcome once it is at its end.
    """

    def __init__(self, path: str):
        self.path = Path(path)
        self._lock = FileLock(self.path / ".lock", timeout=0)  # the kernel lets go of it when the process ends

    def claim(self, resuming: bool, overwrite: bool) -> None:
        """Creates and locks the folder.

        Args:
            resuming: whether the run that the folder holds is to resume.
            overwrite: whether another run's folder may be written to.

        Raises:
            UserError: if it can't be written, is in use, or holds another run.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        except Timeout as error:
            raise UserError(f"--output_dir {self.path} is in use by another run; choose another folder") from error
        except OSError as error:
            raise UserError(f"--output_dir {self.path} can't be written: {error.strerror or error}") from error
        if not resuming and not overwrite:
            refuse_used(self.path)
        self._refuse_pictures()
        try:
            mark_as_own(self.path)
        except OSError as error:
            raise UserError(f"--output_dir {self.path} can't be written: {error.strerror or error}") from error

    def _refuse_pictures(self) -> None:
        """Refuses a folder of pictures that no run wrote: marked as a run's own, they would train nothing any more."""
        if any((self.path / name).exists() for name in (MARKER, *OWN_FILES)):
            return
        found = next((path.name for path in self.path.iterdir() if path.suffix.lower() in PICTURES), None)
        if found is not None:
            raise UserError(
                f"--output_dir {self.path} holds pictures that no run wrote, such as {found}; choose another folder"
            )

    def replace(self, name: str, write: Callable[[Path], None]) -> None:
        """Has `write` fill a folder aside, which then becomes `name` in place of what was there."""
        aside, old = self.path / f".tmp-{name}", self.path / f".tmp-{name}-replaced"
        for path in (aside, old):
            shutil.rmtree(path, ignore_errors=True)
        try:
            aside.mkdir()
            write(aside)
            usual_modes(aside)
            if (self.path / name).exists():
                os.replace(self.path / name, old)
            os.replace(aside, self.path / name)
        except OSError as error:
            raise UserError(f"{self.path / name} can't be written: {error}") from error
        shutil.rmtree(old, ignore_errors=True)

    def record(self, options: dict, versions: dict[str, str], command: list[str]) -> None:
        """Writes what the run was made with to `run.json`."""
        try:
            write_json(self.path / "run.json", {"options": options, "versions": versions, "command": command})
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"--output_dir {self.path}: run.json can't be written: {reason}") from error

    def add_to_record(self, **values: object) -> None:
        """Adds to `run.json`."""
        path = self.path / "run.json"
        try:
            known = read_json(path)
        except (OSError, FileError):
            known = {}
        with or_without(path):
            write_json(path, (known if isinstance(known, dict) else {}) | values)

    def release(self) -> None:
        """Unlocks the folder."""
        self._lock.release()


def write_json(path: Path, value: object) -> None:
    """Writes JSON so that the file is at any moment either the old or the new one."""
    write_text(path, json_text(value, indent=2) + "\n")


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that a run's numbers depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def use_hub_cache_if_offline() -> None:
    """Where the Hub can't be reached, has what is in the cache used at once, not after half a minute of retries."""
    import huggingface_hub.constants
    from huggingface_hub.constants import ENDPOINT

    has_proxy = any(name.lower() in ("http_proxy", "https_proxy", "all_proxy") for name in os.environ)
    if has_proxy or huggingface_hub.constants.HF_HUB_OFFLINE:
        return
    address = urlsplit(ENDPOINT)
    try:
        socket.create_connection((address.hostname, address.port or 443), timeout=5).close()
    except OSError:
        import datasets.config

        logger.warning("%s can't be reached; only what was downloaded before is used", ENDPOINT)
        huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True


def on_main_process(accelerator: "Accelerator", action: Callable[[], Result]) -> Result:
    """Runs `action` on the main process alone, and gives on all what it gave.

    A user's error there is raised on all, so that none waits for it.
    """
    from accelerate.utils import broadcast_object_list

    error = result = None
    if accelerator.is_main_process:
        try:
            result = action()
        except UserError as raised:
            error = raised
    message, result = broadcast_object_list([None if error is None else str(error), result])
    if message is not None:
        raise UserError(message) from error
    return result


@contextmanager
def ending(accelerator: "Accelerator", folder: OutputFolder, peer_timeout: float) -> Iterator[None]:
    """Whatever happens within it, trackers are closed and the folder is unlocked; the processes watch each other.

    The process group is left to the process's end (`options.leave`): gloo's threads let go of a tensor under the
    interpreter's lock, and tearing the group down holds that lock while it waits for them (seen with three processes).
    """
    try:
        with watching(accelerator.process_index, accelerator.num_processes, peer_timeout):
            yield
    finally:
        try:
            Trackers(accelerator).finish()
        finally:
            folder.release()
