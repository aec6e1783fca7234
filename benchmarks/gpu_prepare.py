"""Downloads what benchmarks/gpu.py needs on a machine that has a GPU and torch, but no network.

    python benchmarks/gpu_prepare.py

Wheels are saved in .whl/, with the versions of constraints.txt and for the Python that runs this. bitsandbytes has
kernels for each version of CUDA; only those of one version are kept. Then, on that machine:

    python3 -m pip install --no-index --no-deps --upgrade --target SITE .whl/*.whl
    PYTHONPATH=SITE python3 benchmarks/gpu.py --peer .peer
"""

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WHEELS, PEER = ROOT / ".whl", ROOT / ".peer"
PACKAGES = ("diffusers", "datasets", "dill", "multiprocess", "peft", "prodigyopt", "schedulefree", "importlib_metadata")
BITSANDBYTES, CUDA = "bitsandbytes", "cuda130"
SCRIPTS = (
    *("train_text_to_image.py", "train_text_to_image_sdxl.py", "train_text_to_image_lora_sdxl.py"),
    "train_unconditional.py",
)
MOST = 64 * 2**20  # maximum size of both folders in bytes


def strip(wheel: Path, cuda: str) -> None:
    """Removes the kernels of all other CUDA versions from a wheel."""
    aside = wheel.with_suffix(".stripped")
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(aside, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            if not entry.filename.endswith((".so", ".dll")) or cuda in entry.filename or "_cpu" in entry.filename:
                target.writestr(entry, source.read(entry))
    aside.replace(wheel)


def size_of(*folders: Path) -> int:
    """Returns the size in bytes of all files in some folders."""
    return sum(file.stat().st_size for folder in folders for file in folder.rglob("*") if file.is_file())


def main() -> int:
    """Downloads the wheels and prints what is still missing; returns the exit status."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", WHEELS, "-c", ROOT / "constraints.txt"]
    command += ["--only-binary", ":all:", *PACKAGES, BITSANDBYTES]
    done = subprocess.run([str(word) for word in command], check=False)
    if done.returncode:
        return done.returncode
    for wheel in WHEELS.glob(f"{BITSANDBYTES}-*.whl"):
        strip(wheel, CUDA)
    missing = [name for name in SCRIPTS if not (PEER / name).exists()]
    print(f"{WHEELS} and {PEER}: {size_of(WHEELS, PEER) / 2**20:.1f} MiB")
    if missing:
        print(f"For the comparison, put these diffusers example scripts into {PEER}: {', '.join(missing)}")
    if size_of(WHEELS, PEER) > MOST:
        print(f"error: they are over {MOST / 2**20:.0f} MiB together", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
