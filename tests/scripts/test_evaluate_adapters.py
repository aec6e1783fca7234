"""evaluate_pipeline.py with adapters, sweeps of their scales, and single files."""

import json
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests import tiny
from tests.comparing import assert_same, images_in
from tests.conftest import message
from tests.launching import succeed
from tests.pretrained import kohya_names, write_lora

SHARED = ("--prompts", "a red square", "a dog", "--images_per_prompt", 2)


@pytest.fixture(scope="module")
def loras(pipelines, tmp_path_factory):
    """Two LoRAs, the second one with kohya's names."""
    root = tmp_path_factory.mktemp("loras")
    write_lora(root / "style", pipelines["sd"])
    tensors = write_lora(root / "other", pipelines["sd"], 1)
    save_file(kohya_names(tensors), root / "face.safetensors")
    return [root / "style", root / "face.safetensors"]


@pytest.fixture(scope="module")
def half(pipelines, tmp_path_factory):
    """A pipeline with weights of the variant fp16 only."""
    from diffusers import DiffusionPipeline

    folder = tmp_path_factory.mktemp("half")
    DiffusionPipeline.from_pretrained(pipelines["sd"]).save_pretrained(folder, variant="fp16")
    return folder


def text_of(folder, number=0):
    with Image.open(folder / f"00000_{number:05d}.png") as image:
        return image.info


def test_a_sweep_is_drawn_scored_and_shown_as_rows(evaluate, pipelines, loras, flags):
    """The same prompts and seeds at each scale, one of which is the base itself, bit for bit."""
    base, drawn = evaluate("--pipeline", pipelines["sd"], *SHARED, "--metrics", "clip_score", *flags, out="base")
    found, folder = evaluate(
        *("--pipeline", pipelines["sd"], "--lora", f"{loras[0]}=4", f"{loras[1]}=-2", "--lora_scales", 1, 0, 0.5),
        *("--baseline", pipelines["sd"], *SHARED, "--metrics", "clip_score", *flags),
    )

    # Entries: in the order given, each with its scores and its difference from the baseline.
    assert list(found["entries"]) == ["baseline", "scale-1", "scale-0", "scale-0.5"]
    assert found["sweep"]["scales"] == {"scale-1": 1.0, "scale-0": 0.0, "scale-0.5": 0.5}
    scores = {name: entry["scores"]["clip_score"]["value"] for name, entry in found["entries"].items()}
    assert scores["scale-0"] == scores["baseline"] == base["entries"]["pipeline"]["scores"]["clip_score"]["value"]
    half = found["entries"]["scale-0.5"]
    assert half["differences"]["clip_score"]["difference"] == pytest.approx(scores["scale-0.5"] - scores["baseline"])
    assert [each["scale"] for each in half["drawn_with"]["adapters"]] == [2.0, -1.0]

    # Images: those of scale 0 are the base's, byte for byte; the others name their adapters.
    images = folder / "images"
    for path in (drawn / "images" / "pipeline").glob("*.png"):
        assert path.read_bytes() == (images / "scale-0" / path.name).read_bytes()
        assert path.read_bytes() != (images / "scale-0.5" / path.name).read_bytes()
    assert text_of(images / "scale-0.5")["lora"] == "style=2, face=-1"
    assert 'LoRA: "style=2, face=-1"' in text_of(images / "scale-0.5")["parameters"]
    assert "LoRA" not in text_of(images / "scale-0")["parameters"]
    assert text_of(images / "scale-0.5")["seed"] == text_of(images / "scale-0")["seed"]

    # Report: one row for each prompt and seed, one column for each scale.
    rows = found["sweep"]["rows"]
    assert [(row["prompt"], row["sample"]) for row in rows] == [(p, s) for p in SHARED[1:3] for s in range(2)]
    assert all((folder / file).is_file() for row in rows for file in row["images"].values())
    page = (folder / "report.html").read_text()
    sweep = page[page.index("Scales side by side") : page.index("Worst by CLIP score")]
    assert sweep.count('src="data:image') == 4 * 4
    assert sweep.count("<figcaption>scale 0.5</figcaption>") == 2
    assert "Over the scales" in page
    assert "scale 0.5: style=2, face=-1" in page
    assert "http" not in page.replace("https://www.w3.org", "")


def test_the_images_of_another_scale_are_not_taken_for_those_of_this_one(evaluate, pipelines, loras, capsys):
    words = ["--pipeline", pipelines["sd"], "--metrics", "none", *SHARED, "--lora"]
    found, folder = evaluate(*words, loras[0], "--lora_scale", 3)
    assert found["entries"]["pipeline"]["drawn_with"]["adapters"] == [{"source": str(loras[0]), "scale": 3.0}]
    before = images_in(folder / "images" / "pipeline")
    evaluate(*words, f"{loras[0]}=0.5", expect=2)
    assert "drawn with another adapter_scales" in message(capsys)
    evaluate(*words, f"{loras[0]}=6", "--lora_scale", 0.5)
    assert_same(before, images_in(folder / "images" / "pipeline"))


def test_a_baseline_has_adapters_and_configs_of_its_own(evaluate, pipelines, loras, tmp_path):
    """A single file with its marks, compared with a folder whose adapter acts twice as much."""
    file = tiny.write_single_file(pipelines["sd"], tmp_path / "model.safetensors", {"v_pred": torch.zeros(0)})
    found, folder = evaluate(
        *("--pipeline", pipelines["sd"], "--lora", f"{loras[0]}=2", "--lora_scale", 2, "--metrics", "none", *SHARED),
        *("--baseline", file, "--baseline_config", pipelines["sd"], "--baseline_lora", f"{loras[0]}=4"),
        *("--baseline_lora", f"{loras[1]}=1", "--labels", "before", "after"),
    )
    entries = found["entries"]
    assert [each["scale"] for each in entries["before"]["drawn_with"]["adapters"]] == [4.0, 1.0]
    assert [each["scale"] for each in entries["after"]["drawn_with"]["adapters"]] == [4.0]
    configs = [entries[name]["drawn_with"]["scheduler_config"] for name in ("before", "after")]
    assert configs[0] != configs[1]
    assert "before: style=4, face=1" in (folder / "report.md").read_text()


def test_a_single_file_draws_what_its_folder_draws(evaluate, pipelines, tmp_path):
    file = tiny.write_single_file(pipelines["sd"], tmp_path / "model.safetensors")
    shared = ["--metrics", "none", *SHARED]
    _, whole = evaluate("--pipeline", pipelines["sd"], *shared, out="whole")
    _, single = evaluate("--pipeline", file, "--pipeline_config", pipelines["sd"], *shared, out="single")
    assert_same(images_in(whole / "images" / "pipeline"), images_in(single / "images" / "pipeline"))


def test_adapters_are_checked_before_anything_is_drawn(evaluate, pipelines, loras, tmp_path, capsys):
    write_lora(tmp_path / "xl", pipelines["sdxl"])
    evaluate(
        *("--pipeline", pipelines["sd"], "--baseline", pipelines["sd"], "--metrics", "none", *SHARED),
        *("--lora", loras[0], f"{tmp_path / 'xl'}=0.5", "--lora_scales", 0, 1),
        expect=2,
    )
    assert f"--lora {tmp_path / 'xl'} can't be loaded: it is a LoRA for another" in message(capsys)
    assert not list((tmp_path / "out").rglob("*.png"))


def test_adapters_and_scales_act_on_checkpoints_too(evaluate, train, loras):
    """On top of the LoRA of each checkpoint, which the factor of all scales as well."""
    training = train("sd", "--adaptation", "lora", "--max_train_steps", 1, "--checkpointing_steps", 1, out="training")
    words = ["--checkpoints", training, "--prompts", "a", "--images_per_prompt", 1, "--metrics", "none"]
    plain, folder = evaluate(*words, out="plain")
    more, other = evaluate(*words, "--lora", f"{loras[0]}=5", out="more")
    _, off = evaluate(*words, "--lora", f"{loras[0]}=5", "--lora_scale", 0, out="off")
    assert list(plain["entries"]) == list(more["entries"]) == ["base", "checkpoint-1"]
    file = "images/checkpoint-1/00000_00000.png"
    assert (folder / file).read_bytes() != (other / file).read_bytes()
    assert_same(images_in(off / "images" / "checkpoint-1"), images_in(folder / "images" / "base"))


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--lora", "{lora}"], "give one of --pipeline PATH"),
        (["--images", "{sd}", "--lora", "{lora}"], "--lora needs a pipeline to load into"),
        (["--pipeline", "{sd}", "--lora_scales", "0", "1"], "--lora_scales needs the adapters to scale; give --lora"),
        (["--pipeline", "{sd}", "--lora", "{lora}", "--lora_scales", "0", "nan"], "--lora_scales must be finite"),
        (["--pipeline", "{sd}", "--lora", "{lora}", "--lora_scales", "0,0.5"], "separate values by spaces: 0 0.5"),
        (
            ["--pipeline", "{sd}", "--lora", "{lora}=50%"],
            "{lora}=50%: what follows = is not a number; write {lora}=0.8",
        ),
        (["--pipeline", "{sd}", "--lora", "{lora}= 0.5"], "what follows = is not a number; write {lora}=0.5"),
        (["--pipeline", "{sd}", "--lora", "{sd}"], "it is a whole pipeline; give the file or folder of an adapter"),
        (
            ["--pipeline", "{file}"],
            "it has no model.diffusion_model.input_blocks.0.0.weight; give a LoRA file to --lora",
        ),
        (["--pipeline", "{sd}", "--baseline_variant", "fp16"], "--baseline_variant needs the pipeline that it is for"),
        (["--pipeline", "{sd}", "--baseline", "{half}"], "of the variant fp16; add --baseline_variant fp16"),
        (["--pipeline", "{sd}", "--lora", "{lora}=inf"], "the scale must be a finite number"),
        (["--pipeline", "{sd}", "--lora", "{lora}", "{lora}=0.5"], "twice; give it once, such as {lora}=1.5"),
        (["--pipeline", "{sd}", "--lora", "{lora}", "--lora", "{lora}"], "twice; give it once"),
        (["--pipeline", "{sd}", "--lora", "/no/where=0.5"], "--lora /no/where does not exist"),
        (["--pipeline", "{sd}", "--baseline_lora", "{lora}"], "--baseline_lora needs the pipeline that it is for"),
        (["--images", "{sd}", "--baseline", "{sd}", "--baseline_lora", "{lora}"], "remove --baseline_lora"),
        (
            ["--checkpoints", "{sd}", "--lora", "{lora}", "--lora_scales", "0", "1"],
            "--lora_scales and --checkpoints exclude each other",
        ),
        (
            ["--pipeline", "{sd}", "--lora", "{lora}", "--lora_scales", "0", "1", "--labels", "a"],
            "--labels must be 2 different names: one for each of the 2 scales, got a",
        ),
        (["--pipeline", "x.ckpt"], "--pipeline x.ckpt does not exist"),
    ],
)
def test_bad_combinations_end_in_one_line(evaluate, pipelines, loras, half, capsys, words, named):
    values = {"sd": pipelines["sd"], "lora": loras[0], "file": loras[1], "half": half}
    evaluate(*[word.format(**values) for word in words], *(["--prompts", "a"] * ("--images" not in words)), expect=2)
    assert named.format(**values) in message(capsys)


def test_a_baseline_has_a_variant_of_its_own(evaluate, pipelines, half):
    words = ["--prompts", "a", "--images_per_prompt", 1, "--metrics", "none", "--baseline", half]
    evaluate("--pipeline", pipelines["sd"], *words, "--baseline_variant", "fp16", out="own")
    evaluate("--pipeline", half, *words, "--variant", "fp16", out="shared")


def test_scales_add_up_and_a_whole_file_is_no_adapter(pipelines, tmp_path, loras):
    from utils.evaluation.script_options import read_options
    from utils.formats.adapter_files import read_adapter

    words = ["--pipeline", str(pipelines["sd"]), "--lora", str(loras[0]), "--prompts", "a"]
    found = read_options([*words, "--lora_scales", "0", "--lora_scales", "1", "0.5"])
    assert found.pipeline.factors == (0.0, 1.0, 0.5)
    file = tiny.write_single_file(pipelines["sd"], tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="it is a whole pipeline"):
        read_adapter(file, [])


def test_adapters_of_the_command_line_replace_those_of_a_config_file(pipelines, loras, tmp_path):
    """All of the command line's count, where its flag is given twice."""
    from utils.evaluation.script_options import read_options

    (tmp_path / "flags.yaml").write_text(f"pipeline: {pipelines['sd']}\nlora: [{loras[0]}=0.5]\n")
    words = ["--config", str(tmp_path / "flags.yaml")]
    assert [each.label for each in read_options(words).pipeline.adapters] == ["style=0.5"]
    words += ["--lora", f"{loras[1]}=2", "--lora", f"{loras[0]}=3"]
    found = read_options(words).pipeline.adapters
    assert [each.label for each in found] == ["face=2", "style=3"]


@pytest.mark.nightly
def test_a_sweep_of_several_processes_is_that_of_one(evaluate, pipelines, loras, tmp_path):
    words = ["--pipeline", pipelines["sd"], "--lora", f"{loras[0]}=4", "--lora_scales", 0, 1, "--metrics", "none"]
    _, one = evaluate(*words, *SHARED)
    two = tmp_path / "two"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "evaluate_pipeline.py"]
    succeed([*command, *words, *SHARED, "--num_inference_steps", 2, "--output_dir", two], OMP_NUM_THREADS="1")
    assert list(json.loads((two / "results.json").read_text())["entries"]) == ["scale-0", "scale-1"]
    for name in ("scale-0", "scale-1"):
        assert_same(images_in(one / "images" / name), images_in(two / "images" / name))
