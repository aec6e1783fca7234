"""The layout of the code: its rooms, who may import whom, and what only one function may do."""

import ast
import importlib
import os
import pkgutil
import re
import subprocess
import sys
import tomllib

import pytest

import utils
from tests.launching import succeed
from tests.repository import ROOT
from utils.evaluation.metrics.lpips import TRUNKS
from utils.evaluation.metrics.table import METRICS
from utils.evaluation.options import LPIPS_NETWORKS
from utils.models.from_scratch import TRANSFORMER_SIZES, UNET_SIZES
from utils.models.options import MODEL_SIZES

SCRIPTS = ("train_text_to_image", "train_unconditional", "evaluate_pipeline")
TOOLS = ("convert", "merge", "extract", "resize")
OPTIONS_OF = {
    "train_text_to_image": "utils.training.text_to_image_options",
    "train_unconditional": "utils.training.unconditional_options",
    "evaluate_pipeline": "utils.evaluation.script_options",
}


def test_the_import_contracts_hold():
    code = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports())"
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
    )  # in here it would silence all loggers


def test_the_declared_rooms_are_those_on_disk():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    layers = settings["tool"]["importlinter"]["contracts"][0]["layers"]
    declared = {name.strip() for layer in layers for name in layer.split("|")}
    found = list(pkgutil.iter_modules(utils.__path__, "utils."))
    assert declared == {each.name for each in found}
    assert all(each.ispkg for each in found), "a module belongs in a room"


def test_every_init_is_empty():
    assert not [path for path in (ROOT / "utils").rglob("__init__.py") if path.read_text().strip()]


OTHER_FOLDERS = {  # of tests/, beside those that are called as the rooms that they test
    "scripts",  # whole runs of a script
    "faults",  # bad input, damaged files, full disks
    "layout",  # of the code, and what flags declare
    "golden",  # records of tests/golden.py
}


def test_the_tests_mirror_the_rooms():
    rooms = {each.name for each in pkgutil.iter_modules(utils.__path__)}
    folders = {path.relative_to(ROOT / "tests").parts for path in (ROOT / "tests").rglob("*.*") if path.is_file()}
    found = {parts[0] for parts in folders if len(parts) > 1 and "__pycache__" not in parts}
    assert found == rooms | OTHER_FOLDERS
    assert not list((ROOT / "tests").glob("test_*.py")), "a module of tests belongs in a folder"


def test_no_module_of_tests_is_long():
    counts = {path: len(path.read_text().splitlines()) for path in (ROOT / "tests").rglob("test_*.py")}
    assert not {path.name: count for path, count in counts.items() if count > 500}


def test_modules_of_tests_import_no_other():
    """What several need is in a module at the top of tests/, or in a conftest.py."""
    imported = re.compile(
        r"^ *(from|import) tests\.([a-z_]+\.)?test_|^ *from tests\.[a-z_]+ import .*\btest_", flags=re.M
    )
    assert not [path.name for path in (ROOT / "tests").rglob("*.py") if imported.search(path.read_text())]


def test_families_stay_in_their_place():
    words = ("time_ids", "text_encoder_2", "pooled", "0.18215", "0.13025", "is_sdxl")
    allowed = {"optimizer_options.py", "foreign_flags.py"}  # they have the flag --text_encoder_2_lr
    offences = [
        (path.name, word)
        for path in [*(ROOT / "utils").rglob("*.py"), *ROOT.glob("*.py")]
        if "models" not in path.parts and path.name not in allowed
        for word in words
        if word in path.read_text().replace("text_encoder_2_lr", "")
    ]
    assert not offences


def test_one_function_opens_images():
    """Formats, sizes and colours are judged there alone."""
    ways = re.compile(
        r"\bImage\s*\.\s*open\b|from PIL\.Image import|import PIL\.Image as|from PIL import .*Image as|\bImageFile\b|"
        r"\b(imread|imageio|cv2|skimage|load_image|decode_image|read_image|decode_jpeg|decode_png)\b"
    )
    found = {
        str(path.relative_to(ROOT)): ways.findall(path.read_text())
        for path in [*(ROOT / "utils").rglob("*.py"), *ROOT.glob("*.py")]
    }
    opened_in = {name: len(uses) for name, uses in found.items() if uses}
    assert opened_in == {"utils/data/images.py": 1}


def test_one_function_writes_json_in_readable_letters():
    """It escapes what a terminal would act on."""
    uses = {
        str(path.relative_to(ROOT))
        for path in [*(ROOT / "utils").rglob("*.py"), *ROOT.glob("*.py")]
        if re.search(r"ensure_ascii\s*=\s*False", path.read_text())
    }
    tokenizers, parsed_again = "utils/models/pipeline_files.py", "utils/config/user_files.py"
    assert uses == {"utils/config/terminal.py", tokenizers, parsed_again}


OTHER_READS = {  # what is read past utils/config/user_files.py, and why that is no text of a user
    "utils/config/yaml_files.py": ("parse", "text that utils/config/user_files.py read"),
    "utils/training/adaptation.py": ("read_text loads", "the config that save_pretrained wrote a line before"),
    "utils/runtime/background_writer.py": ("read_text", "/proc/meminfo"),
    "utils/training/checkpoint.py": ("loads", "what was dumped in the same line"),
    "utils/data/cache.py": ("open", "the run's own files of tensors"),
    "utils/data/data_fingerprint.py": ("open", "shards, for a digest of their bytes"),
    "utils/runtime/atomic_files.py": ("open", "a file or folder, to sync it"),
    "utils/sampling/options.py": ("read_text", "the index of the package diffusers"),
    "utils/runtime/tracker_table.py": ("read_text", "the table of the package accelerate"),
    "utils/sampling/drawer.py": ("loads", "what was dumped in the same line"),
    "utils/evaluation/report.py": ("read_text", "the template beside the code"),
    "utils/reports/page.py": ("read_text", "template, style and script beside the code"),
    "utils/config/standard_streams.py": ("open", "the null device"),
    "evaluate_pipeline.py": ("read_text", "the report that was written a line before"),
}


def test_files_of_users_are_read_in_one_place_alone():
    """Only utils/config/user_files.py opens, decodes and parses text; others may not pass its bounds by."""
    found = set()
    for path in [*sorted((ROOT / "utils").rglob("*.py")), *(ROOT / f"{script}.py" for script in SCRIPTS)]:
        name = path.relative_to(ROOT).as_posix()
        if name == "utils/config/user_files.py":
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        own = {each.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for each in node.names}
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            kind = _read_by(call, own)
            if kind:
                found.add((name, kind))
    allowed = {(name, kind) for name, (kinds, _) in OTHER_READS.items() for kind in kinds.split()}
    assert found == allowed, "read these through utils/config/user_files.py, and list no others"


def test_files_of_tensors_are_opened_in_one_place_alone():
    """Only utils/config/tensor_files.py, which never waits for a pipe."""
    ways = re.compile(r"\b(safe_open|load_file|torch\.load|np\.load|load_model)\(")
    found = {
        path.relative_to(ROOT).as_posix()
        for path in [*sorted((ROOT / "utils").rglob("*.py")), *(ROOT / f"{script}.py" for script in SCRIPTS)]
        if ways.search(path.read_text(encoding="utf-8"))
    }
    assert found == {"utils/config/tensor_files.py"}


def test_files_that_may_be_there_are_added_to_in_one_place_alone():
    """Only `open_to_append` adds to a file: what has its name may be a pipe, which would wait for a reader."""
    added = re.compile(r"""open\([^)\n]*["'](a|ab|a\+|r\+|ab\+)["']|O_APPEND""")
    found = {
        path.relative_to(ROOT).as_posix(): len(list(added.finditer(path.read_text(encoding="utf-8"))))
        for path in [*sorted((ROOT / "utils").rglob("*.py")), *(ROOT / f"{script}.py" for script in SCRIPTS)]
    }
    assert {name: count for name, count in found.items() if count} == {"utils/config/user_files.py": 1}


def _read_by(call: ast.Call, imported: set[str]) -> str:
    """The function by which a call reads text or bytes of a file past utils/config/user_files.py, or ""."""
    function = call.func
    if isinstance(function, ast.Name):
        modes = [each.value for each in call.args[1:2] if isinstance(each, ast.Constant)] or ["r"]
        return "open" if function.id == "open" and not set(modes[0]) & set("wax") else ""
    if not isinstance(function, ast.Attribute):
        return ""
    of = function.value.id if isinstance(function.value, ast.Name) else ""
    if of in ("json", "yaml", "csv"):
        reads = ("load", "loads", "safe_load", "full_load", "unsafe_load", "load_all", "parse", "reader", "DictReader")
        is_shared = of == "csv" and "FileError" in imported  # utils/config/delimited.py, of text that was read
        return function.attr if function.attr in reads and not is_shared else ""
    if function.attr == "open" and of not in ("Image", "tarfile", "self", "store", "PIL"):
        modes = [each.value for each in call.args[:1] if isinstance(each, ast.Constant)] or ["r"]
        return "open" if isinstance(modes[0], str) and not set(modes[0]) & set("wax") else ""
    return function.attr if function.attr in ("read_text", "read_bytes") and of != "user_files" else ""


HEAVY = {"torch", "transformers", "diffusers", "numpy", "PIL", "accelerate", "datasets", "peft", "pyarrow"}
LOADED = """
import atexit, runpy, sys
atexit.register(lambda: print("loaded", *sorted({heavy} & set(sys.modules)), file=sys.stderr))
sys.argv = {argv}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(
    ("script", "words", "status", "said"),
    [
        *((script, ["--help"], 0, "") for script in SCRIPTS),
        *((script, ["--no_such_flag"], 2, "unknown argument --no_such_flag") for script in SCRIPTS),
        *((script, ["--seed", "many"], 2, "--seed") for script in SCRIPTS),
        ("train_text_to_image", [], 2, "--pretrained_model is missing"),
        ("train_text_to_image", ["--pretrained_model", "a/b"], 2, "no data to train on"),
        ("train_text_to_image", ["--pretrained_model", "a/b", "--train_data_dir", "no/folder"], 2, "--train_data_dir"),
        ("train_text_to_image", ["--pretrained_model=a/b", "--dataset_name=c/d", "--unmasked_weight=1"], 2, "masks"),
        ("train_text_to_image", ["--pretrained_model=a/b", "--dataset_name=c/d", "--output_dir=."], 2, "another run"),
        ("train_unconditional", [], 2, "no data to train on"),
        ("train_unconditional", ["--dataset_name", "a/b", "--guidance_scale", "2"], 2, "--class_conditional"),
        ("train_unconditional", ["--dataset_name", "a/b", "--hub_model_id", "c"], 2, "--push_to_hub"),
        ("evaluate_pipeline", [], 2, "give one of --pipeline"),
        ("evaluate_pipeline", ["--pipeline", "a/b", "--best_by", "fid"], 2, "--checkpoints"),
        *((f"utils/tools/{tool}", ["--help"], 0, "") for tool in TOOLS),
        ("utils/tools/convert", ["in"], 2, "OUT"),
        ("utils/tools/convert", ["no", "out", "--to", "folder"], 2, "IN no does not exist"),
        ("utils/tools/convert", ["run.json", "out", "--to", "folder"], 2, "IN run.json is a .json file"),
        ("utils/tools/merge", ["--pipeline", "no"], 2, "--pipeline no"),
        ("utils/tools/extract", ["--base", ".", "--tuned", ".", "--out", "a"], 2, "--rank"),
        ("utils/tools/resize", ["a.ckpt", "b.safetensors", "--rank", "1"], 2, "IN a.ckpt needs unpickling"),
    ],
)
def test_help_and_errors_of_flags_come_before_anything_heavy_is_loaded(script, words, status, said, tmp_path):
    (tmp_path / "run.json").touch()
    code = LOADED.format(heavy=HEAVY, argv=[str(ROOT / f"{script}.py"), *words])
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    *lines, loaded = found.stderr.splitlines()
    assert found.returncode == status
    assert loaded == "loaded"
    assert said in "".join(lines)
    assert len(lines) == (status == 2)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_says_types_and_defaults(script, capsys):
    with pytest.raises(SystemExit):
        importlib.import_module(script).main(["--help"])
    said = capsys.readouterr().out
    assert "--seed INT" in said
    assert "(default: 0)" in said
    assert "default: None" not in said


def test_modules_of_options_load_nothing_heavy():
    modules = [path for path in sorted((ROOT / "utils").rglob("*options.py")) if "option(" in path.read_text()]
    assert len(modules) > 8
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in modules]
    code = f"import sys, {', '.join(names)}; print({HEAVY} & set(sys.modules))"
    assert succeed([sys.executable, "-c", code]) == "set()\n"


def test_names_that_flags_offer_have_something_behind_them():
    """The choices stand in modules without torch, the tables that use them beside their functions."""
    assert tuple(TRUNKS) == LPIPS_NETWORKS
    assert tuple(UNET_SIZES) == tuple(TRANSFORMER_SIZES) == MODEL_SIZES
    for metric in METRICS.values():
        assert callable(metric.compute.value)


def product_calls() -> list[tuple[str, str]]:
    """(module, name of what is called) of each call in the product's code."""
    calls = []
    for path in [*(ROOT / "utils").rglob("*.py"), *ROOT.glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                calls.append((path.stem, ast.unparse(node.func)))
    return calls


def test_one_module_writes_to_the_terminal():
    """Else a file's name could move the cursor or forge a line; ruff's T20 forbids print."""
    writers = {
        "sys.stderr.write",
        "sys.stdout.write",
        "logging.StreamHandler",
        "logging.basicConfig",
        "tqdm",
        "tqdm.write",
    }
    assert not [call for call in product_calls() if call[1] in writers and call[0] != "terminal"]


LOADERS = {"from_pretrained", "from_single_file", "load_lora_weights", "load_lora_adapter", "load_adapter"}
NO_MODULES = {  # where a loader loads no module, or one whose weights are looked at there
    "utils/models/loading.py": 2,  # modules; what of a pipeline is no module
    "utils/models/single_file.py": 2,
    "utils/models/lora_files.py": 1,
    "utils/models/pipeline_files.py": 1,  # an image processor
    "utils/sampling/pipelines.py": 2,  # schedulers of our own pipelines; adapters, compared with their file
    "utils/training/adaptation.py": 1,  # adapters that were written a line above
    "utils/exports/drawing.py": 3,  # results, loaded as a user would to draw from them
    "utils/evaluation/metrics/features.py": 2,  # configs, processors, tokenizers
}


def test_modules_are_loaded_in_one_place_alone():
    found = {}
    for path in [*(ROOT / "utils").rglob("*.py"), *ROOT.glob("*.py")]:
        calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        count = sum(isinstance(call, ast.Attribute) and call.attr in LOADERS for call in calls)
        if count:
            found[str(path.relative_to(ROOT))] = count
    assert found == NO_MODULES


def test_no_assertion_carries_meaning():
    """`python -O` leaves assertions out, and -OO docstrings too."""
    for path in [*(ROOT / "utils").rglob("*.py"), *ROOT.glob("*.py")]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert not [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Assert)], path
        names = [node for node in ast.walk(tree) if isinstance(node, ast.Name | ast.Attribute)]
        assert "__doc__" not in {node.id if isinstance(node, ast.Name) else node.attr for node in names}, path


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_a_script_is_for_is_said_alike(script):
    purpose = importlib.import_module(OPTIONS_OF.get(script, script)).PURPOSE
    assert importlib.import_module(script).__doc__.splitlines()[0] == purpose


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_help_without_docstrings(script):
    plain, optimized = (
        subprocess.run([sys.executable, *more, f"{script}.py", "--help"], cwd=ROOT, capture_output=True, text=True)
        for more in ([], ["-OO"])
    )
    assert optimized.returncode == 0, optimized.stderr
    assert optimized.stdout == plain.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_without_docstrings_a_script_ends_in_one_line(script):
    """transformers, and so diffusers, can't be imported without them."""
    words = [sys.executable, "-OO", f"{script}.py"]
    found = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert (found.returncode, found.stderr.count("\n")) == (2, 1)
    assert "python -O" in found.stderr


def test_files_of_tensors_are_written_in_one_place():
    """safetensors writes files that nobody but their owner can read, whatever the umask says."""
    found = {path.name for path in (ROOT / "utils").rglob("*.py") if "save_file" in path.read_text(encoding="utf-8")}
    assert found == {"atomic_files.py"}


OPTIONAL = {"clearml", "IPython", "deepspeed", "torch_npu", "xformers"}
"""Packages that are imported only where a user who has them asks for them."""
PACKAGES = {"PIL": "pillow", "yaml": "pyyaml"}
"""The names of packages whose modules are called otherwise."""


def test_requirements_name_each_package_that_is_imported():
    from tests.environments import requirements

    imported = set()
    for file in [*(ROOT / "utils").rglob("*.py"), *ROOT.glob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
            imported |= {name.partition(".")[0] for name in names}
    own = {path.stem for path in ROOT.glob("*.py")} | {"utils"}
    others = {PACKAGES.get(name, name) for name in imported - own - OPTIONAL - sys.stdlib_module_names}
    assert not others - set(requirements())


def test_environments_have_the_bounds_of_the_requirements():
    from tests.environments import packages, tested_torch

    floors, newest = packages("floors"), packages("newest")
    assert floors[0] == newest[0] == tested_torch()
    assert all("==" in line for line in floors)
    assert "datasets==5.2.0" in floors  # earlier ones read ../x.png of a folder given as --dataset_name
    assert len(floors) == len(newest)
    assert not any("torch" in line for line in floors[1:])
