"""CONTRIBUTING's table of what can be added: a dummy of each row, in a copy, works."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.repository import ROOT

LOSS = """

def _dummy(difference: "Tensor", c: "Tensor") -> "Tensor":
    return difference.square() * 2
"""
WEIGHTING = """

def _dummy_weight(snr: "Tensor", prediction_type: str, options: "LossOptions") -> "Tensor":
    return snr.new_ones(snr.shape)
"""
OPTIMIZER = """

def _dummy(groups: list[dict], options: "OptimizerOptions") -> "torch.optim.Optimizer":
    import torch

    return torch.optim.SGD(groups)
"""
ADAPTER = """
from utils.training.adaptation import PeftAdaptation


class DummyAdaptation(PeftAdaptation):
    prefix = "hada_"
    config_class_name = "LoHaConfig"
"""
SOURCE = """
from utils.data.sources import read_pairs


def read_dummy(options, cache_dir, listing, folder_is_class):
    return read_pairs(options, cache_dir, listing, folder_is_class)
"""
METRIC = """
from utils.evaluation.metrics.scores import Score


def dummy(case):
    return [Score("dummy", 1.0, better="higher")]
"""
FAMILY = """
from utils.models.sd import StableDiffusion


class Dummy(StableDiffusion):
    pipeline_class_name = "StableDiffusionImg2ImgPipeline"
"""
USE = """
import sys
from train_text_to_image import main
from utils.evaluation.metrics.registry import METRICS

assert [score.name for score in METRICS["dummy"].compute(None)] == ["dummy"]
sys.exit(main(sys.argv[1:]))
"""
ROWS = {  # of CONTRIBUTING's table: (new code, its file, the table's row, its file, what the row stands behind)
    "a loss": (LOSS, "utils/diffusion/losses.py", '    "dummy": _dummy,\n', "utils/diffusion/losses.py", "LOSSES: "),
    "a weighting over timesteps": (
        *(WEIGHTING, "utils/diffusion/losses.py", '    "dummy": _dummy_weight,\n'),
        *("utils/diffusion/losses.py", "WEIGHTINGS: "),
    ),
    "an optimizer": (
        *(
            OPTIMIZER,
            "utils/training/optimizer_table.py",
            '    "dummy": OptimizerSpec(_dummy, state_bytes=0, reads=()),\n',
        ),
        *("utils/training/optimizer_table.py", "OPTIMIZERS: "),
    ),
    "an adapter": (
        *(ADAPTER, "utils/training/dummy_adapter.py"),
        '    "dummy": AdaptationSpec(Late("utils.training.dummy_adapter", "DummyAdaptation")),\n',
        *("utils/training/adapters.py", "ADAPTATIONS: "),
    ),
    "a data source": (
        *(SOURCE, "utils/data/dummy_source.py", '    "dummy": Late("utils.data.dummy_source", "read_dummy"),\n'),
        *("utils/data/source_kinds.py", "SOURCES: "),
    ),
    "a metric": (
        *(METRIC, "utils/evaluation/metrics/dummy.py"),
        '    "dummy": Metric(_of("dummy", "dummy"), "main", False, False, ("dummy",), "nothing"),\n',
        *("utils/evaluation/metrics/table.py", "METRICS: "),
    ),
    "a family of pipelines": (
        *(FAMILY, "utils/models/dummy.py", "    Dummy,\n"),
        *("utils/models/registry.py", "FAMILIES_OF_TEXT = "),
    ),
}


def test_the_table_names_every_row_and_its_file():
    table = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("| To add |")[2].partition("\n\n")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    assert [row[0] for row in rows] == [*ROWS, "a flag"]
    for what, _, behind in rows[:-1]:
        name, place = ROWS[what][4], ROWS[what][3]
        assert name.rstrip(": =").rstrip() in behind or name.startswith("FAMILIES")
        assert place in behind or "there" in behind


def add(root: Path, code: str, file: str, row: str, table_file: str, table: str) -> None:
    """Adds code to a file, and a row to a table, as its first."""
    path, holder = root / file, root / table_file
    text = holder.read_text(encoding="utf-8")
    at = re.search(rf"^{re.escape(table)}[^\n]*[({{]\n", text, flags=re.M).end()
    holder.write_text(text[:at] + row + text[at:], encoding="utf-8")
    if path == holder:
        text = path.read_text(encoding="utf-8")
        at = text.index(f"\n{table}")
        path.write_text(text[:at].rstrip() + "\n" + code + "\n" + text[at:], encoding="utf-8")
    else:
        path.write_text(code, encoding="utf-8")


@pytest.mark.slow
def test_a_dummy_of_each_row_works(pipelines, images, tmp_path):
    copy, model = tmp_path / "copy", tmp_path / "model"
    shutil.copytree(ROOT / "utils", copy / "utils", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "train_text_to_image.py", copy)
    for row in ROWS.values():
        add(copy, *row)
    registry = copy / "utils" / "models" / "registry.py"
    registry.write_text("from utils.models.dummy import Dummy\n" + registry.read_text(encoding="utf-8"), "utf-8")
    shutil.copytree(pipelines["sd"], model)
    index = model / "model_index.json"
    index.write_text(index.read_text().replace("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline"))
    flags = ["--loss", "dummy", "--weighting", "dummy", "--optimizer", "dummy", "--adaptation", "dummy"]
    flags += ["--data_format", "dummy", "--pretrained_model", model, "--train_data_dir", images, "--resolution", 32]
    flags += ["--max_train_steps", 2, "--train_batch_size", 2, "--report_to", "none", "--output_dir", tmp_path / "out"]
    words = [sys.executable, "-c", USE, *map(str, flags)]
    found = subprocess.run(words, cwd=copy, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert (tmp_path / "out" / "pytorch_lora_weights.safetensors").exists() or list((tmp_path / "out").glob("unet*"))
