"""train_unconditional.py on pretrained pipelines, and on with the same classes."""

import json
import shutil
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
import torch
from PIL import Image

from tests import tiny
from tests.comparing import losses, weights
from tests.conftest import message, mostly_slow
from tests.unconditional_runs import SHORT, drawn, load, samples, small_unet, three_levels
from utils.training.checkpoint import read_state


@pytest.mark.parametrize("name", ["pixels", "flow", "labels", "latents", "labelled latents"])
def test_fine_tuning_begins_with_the_pretrained_weights(train, name, pipelines, images, classes, tmp_path):
    from tests.conftest import reset_accelerate
    from train_unconditional import main

    first = train(name, *SHORT, out="first")
    reset_accelerate()
    is_labelled = "label" in name
    argv = ["--pretrained_model", first, "--train_data_dir", classes if is_labelled else images, "--resolution", 32]
    argv += ["--output_dir", tmp_path / "second", *SHORT, "--learning_rate", 1e-12, "--report_to", "none"]
    argv += [*tiny.SMALL_DRAWING, *(["--class_conditional", "--guidance_scale", 2] if is_labelled else [])]
    assert main([str(word) for word in argv]) == 0
    part = "transformer" if name == "labelled latents" else "unet"
    before, after = weights(first, part), weights(tmp_path / "second", part)
    assert before.keys() == after.keys()
    for key in before:
        torch.testing.assert_close(before[key], after[key], rtol=0, atol=1e-8)
    assert type(load(first).scheduler) is type(load(tmp_path / "second").scheduler)


def put_classes(folder: Path, *names: str) -> Path:
    """Two images in a folder for each class."""
    for number, name in enumerate(names):
        for each in range(2):
            path = folder / name / f"{number}{each}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32), (40 * number, 90 * each, 60)).save(path)
    return folder


def fine_tuned(first: Path, data: Path, out: Path, *flags: object, expect: int = 0) -> Path:
    from tests.conftest import reset_accelerate
    from train_unconditional import main

    reset_accelerate()
    words = ["--pretrained_model", first, "--train_data_dir", data, "--output_dir", out, "--class_conditional", *SHORT]
    words += [*tiny.SMALL_DRAWING, "--resolution", 32, "--report_to", "none", *flags]
    assert main([str(word) for word in words]) == expect
    return out


def test_classes_keep_the_numbers_by_which_they_were_learnt(train, tmp_path):
    """Of a DiT, to which classes are added, and of which a subset is trained."""
    first = train("labelled latents", *SHORT, data=put_classes(tmp_path / "a", "cat", "dog"), out="first")
    more = fine_tuned(first, put_classes(tmp_path / "b", "ant", "cat", "dog", "10"), tmp_path / "more")
    assert load(more).labels == {"cat": 0, "dog": 1, "10": 2, "ant": 3}
    drawn_of = json.loads((more / "samples" / "final" / "samples.json").read_text())["samples"]
    assert [each["of"] for each in drawn_of] == ["cat", "dog"]
    fewer = fine_tuned(more, put_classes(tmp_path / "c", "ant", "dog"), tmp_path / "fewer")
    assert load(fewer).labels == load(more).labels
    drawn_of = json.loads((fewer / "samples" / "final" / "samples.json").read_text())["samples"]
    assert [each["of"] for each in drawn_of] == ["dog", "ant"]


def test_a_run_that_adds_classes_resumes_with_the_same_numbers(train, tmp_path):
    first = train("labelled latents", *SHORT, data=put_classes(tmp_path / "a", "cat", "dog"), out="first")
    data = put_classes(tmp_path / "b", "dog", "owl")
    more = fine_tuned(first, data, tmp_path / "more", "--checkpointing_steps", 1)
    assert read_state(more / "checkpoint-1").facts.structure["class_numbers"] == {"dog": 1, "owl": 2}
    fine_tuned(first, data, tmp_path / "more", "--checkpointing_steps", 1, "--resume_from_checkpoint", "checkpoint-1")


def test_a_class_for_which_there_is_no_room_is_refused(train, tmp_path, capsys):
    first = train("labels", *SHORT, data=put_classes(tmp_path / "a", "cat", "dog"), out="first")
    fine_tuned(first, put_classes(tmp_path / "b", "ant", "cat"), tmp_path / "more", expect=2)
    line = message(capsys)
    assert "room for 2 classes" in line
    assert "ant" in line
    fewer = fine_tuned(first, put_classes(tmp_path / "c", "dog", "cat"), tmp_path / "same")
    assert load(fewer).labels == {"cat": 0, "dog": 1}


def test_names_of_classes_that_a_dit_can_not_list(train, tmp_path, caplog, capsys):
    names = ["small, grey", "small, red", " spaced ", "10", "naïve"]
    out = train("labelled latents", *SHORT, data=put_classes(tmp_path / "a", *names), out="first")
    labels = load(out).labels
    numbers = {name: number for number, name in enumerate(sorted(name.strip() for name in names))}
    shown = {name.replace(",", ";"): number for name, number in numbers.items()}
    assert labels == shown
    assert "the class 'small, grey' is called 'small; grey' in the result" in caplog.text
    assert load(out).get_label_ids(["small; red", "spaced", "naïve"]) == [
        shown[n] for n in ("small; red", "spaced", "naïve")
    ]
    again = fine_tuned(out, tmp_path / "a", tmp_path / "again")
    assert load(again).labels == shown
    data = put_classes(tmp_path / "b", "a, b", "a; b")
    train("labelled latents", *SHORT, data=data, out="second", expect=2)
    assert "two classes called 'a; b'" in message(capsys)
    pixels = train("labels", *SHORT, data=put_classes(tmp_path / "c", *names), out="third")
    assert load(pixels).labels == numbers


def small_dit(**more):
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    shape = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "sample_size": 8, "in_channels": 4}
    slots = {"num_embeds_ada_norm": 1000, "norm_type": "ada_norm_zero"}
    return DiTTransformer2DModel(**shape | slots | more)


def own_pipeline(name: str):
    import diffusers

    if name == "dit":  # with a learned variance and names of classes, as the published ones have them
        names = {"0": "dog, hound", "5": "cat"}
        pipeline = diffusers.DiTPipeline(small_dit(out_channels=8), tiny.vae(), diffusers.DDIMScheduler(), names)
        pipeline.register_to_config(id2label=names)
        return pipeline
    if name == "variance":
        scheduler = diffusers.DDPMScheduler(variance_type="learned_range")
        return diffusers.DDPMPipeline(small_unet(out_channels=6), scheduler)
    return diffusers.DDIMPipeline(small_unet(), diffusers.DDIMScheduler(beta_schedule="squaredcos_cap_v2"))


@pytest.mark.parametrize("name", mostly_slow(["ddim", "variance", "dit"], "dit"))
def test_pipelines_that_others_made_are_fine_tuned(name, images, classes, tmp_path):
    from tests.conftest import reset_accelerate
    from train_unconditional import main

    first, out = tmp_path / "first", tmp_path / "out"
    own_pipeline(name).save_pretrained(first)
    reset_accelerate()
    words = ["--pretrained_model", first, "--output_dir", out, "--max_train_steps", 20, "--train_batch_size", 4]
    words += ["--learning_rate", 3e-3, "--lr_warmup_steps", 0, *tiny.SMALL_DRAWING, "--num_inference_steps", 3]
    words += ["--report_to", "none", "--adam_weight_decay", 0, "--train_data_dir", classes if name == "dit" else images]
    words += ["--class_conditional", "--guidance_scale", 2] if name == "dit" else []
    assert main([str(word) for word in words]) == 0
    assert np.mean(losses(out)[-5:]) < np.mean(losses(out)[:5])
    pipeline = load(out)
    kind = json.loads((first / "model_index.json").read_text())["_class_name"]  # of which a DDIMPipeline draws wrongly
    assert type(pipeline).__name__ == ("DDPMPipeline" if kind == "DDIMPipeline" else kind)
    assert samples(out / "samples" / "final").shape[1] == 16  # what the pipeline drew before
    more = {"class_labels": [0, 5], "guidance_scale": 2} if name == "dit" else {"batch_size": 2}
    assert np.array_equal(drawn(pipeline, 0, **more), samples(out / "samples" / "final"))
    part, last = ("transformer", "proj_out_2.bias") if name == "dit" else ("unet", "conv_out.bias")
    before, after = weights(first, part)[last], weights(out, part)[last]
    if name == "variance":
        assert torch.equal(before[3:], after[3:])
    assert not torch.equal(before[:3], after[:3])


@pytest.mark.parametrize("name", ["ddim", "score"])
def test_a_flow_is_refused_where_the_pipeline_has_its_own_noise(name, images, tmp_path, capsys):
    from diffusers import ScoreSdeVePipeline, ScoreSdeVeScheduler

    from tests.conftest import reset_accelerate
    from train_unconditional import main

    made = own_pipeline(name) if name == "ddim" else ScoreSdeVePipeline(small_unet(), ScoreSdeVeScheduler())
    made.save_pretrained(tmp_path / "first")
    reset_accelerate()
    words = ["--pretrained_model", tmp_path / "first", "--train_data_dir", images, "--output_dir", tmp_path / "out"]
    assert main([str(word) for word in [*words, "--flow_matching"]]) == 2
    assert "--flow_matching" in message(capsys)


def test_a_score_pipeline_is_fine_tuned(images, tmp_path):
    from diffusers import ScoreSdeVePipeline, ScoreSdeVeScheduler

    from tests.conftest import reset_accelerate
    from train_unconditional import main

    unet = small_unet(layers_per_block=1, time_embedding_type="fourier")
    scheduler = ScoreSdeVeScheduler(num_train_timesteps=50, sigma_max=20.0)
    ScoreSdeVePipeline(unet=unet, scheduler=scheduler).save_pretrained(tmp_path / "score")
    reset_accelerate()
    argv = ["--pretrained_model", tmp_path / "score", "--train_data_dir", images, "--output_dir", tmp_path / "out"]
    argv += ["--max_train_steps", 30, "--train_batch_size", 4, "--learning_rate", 3e-3, "--lr_warmup_steps", 0]
    argv += [*tiny.SMALL_DRAWING, "--num_inference_steps", 3, "--report_to", "none"]
    assert main([str(word) for word in argv]) == 0
    assert np.mean(losses(tmp_path / "out")[-5:]) < np.mean(losses(tmp_path / "out")[:5])
    pipeline = load(tmp_path / "out")
    assert np.array_equal(drawn(pipeline, 0, batch_size=2), samples(tmp_path / "out" / "samples" / "final"))


@pytest.mark.parametrize("said", ["nothing", "null"])
def test_a_vae_without_a_scaling_has_one_measured(train, pipelines, said, tmp_path):
    folder = shutil.copytree(pipelines["vae"], tmp_path / "bare")
    config = json.loads((folder / "config.json").read_text())
    del config["scaling_factor"]
    config |= {"scaling_factor": None} if said == "null" else {}
    (folder / "config.json").write_text(json.dumps(config))
    flags = ("--vae", folder, "--lr_scheduler", "constant", "--train_batch_size", 2)
    out = train("latents", *flags, "--max_train_steps", 2)
    factor = json.loads((out / "latent_scaling.json").read_text())["scaling_factor"]
    exported = load(out)
    assert exported.vqvae.config.scaling_factor == factor
    pixels = torch.stack([torch.from_numpy(np.asarray(_centre(path))) for path in sorted(train.images.glob("*.png"))])
    with torch.no_grad():
        posterior = exported.vqvae.encode(pixels.permute(0, 3, 1, 2).float() / 127.5 - 1).latent_dist
    assert factor * posterior.sample(torch.Generator().manual_seed(0)).std() == pytest.approx(1, rel=0.03)
    (out / "latent_scaling.json").write_text(json.dumps({"scaling_factor": 0.5}))
    train("latents", *flags, "--max_train_steps", 3, "--resume_from_checkpoint", "latest")
    assert load(out).vqvae.config.scaling_factor == 0.5  # a resumed run measures nothing anew


def _centre(path: Path) -> Image.Image:
    from utils.config.batch import RecordPass
    from utils.data.crop_plan import make_cut, plan_cut
    from utils.data.options import ImageOptions

    image, options = Image.open(path).convert("RGB"), ImageOptions(center_crop=True)
    cut = plan_cut(image.size, (32, 32), options, 0, RecordPass(0, 0))
    return Image.fromarray(make_cut(image, cut, options).transpose(1, 2, 0))


def test_what_a_fine_tuned_pipeline_does_otherwise_is_said(train, tmp_path, caplog):
    """A level under 4x4, and samples by another sampler than the result's; nothing where there is neither."""
    from diffusers import DDPMPipeline, DDPMScheduler

    from tests.conftest import reset_accelerate
    from train_unconditional import main

    DDPMPipeline(three_levels(), DDPMScheduler()).save_pretrained(tmp_path / "first")
    words = ["--pretrained_model", tmp_path / "first", "--train_data_dir", train.images, "--dry_run"]
    words += ["--output_dir", tmp_path / "out", *tiny.SMALL_DRAWING, "--report_to", "none"]
    for flags, is_small, is_other in (([], False, False), (["--resolution", 8, "--sampler", "ddim"], True, True)):
        reset_accelerate()
        caplog.clear()
        assert main([str(word) for word in [*words, *flags]]) == 0
        assert ("is then 2x2, under 4x4" in caplog.text) == is_small
        said = "samples with DPMSolverMultistepScheduler, but the exported pipeline has DDPMScheduler"
        assert (said in caplog.text) == is_other


def test_a_model_of_classes_goes_on_with_the_same_classes_alone(train, classes, tmp_path, capsys):
    train("labels", *SHORT)
    resume = ("--resume_from_checkpoint", "latest")
    train("labels", *SHORT, *resume, "--class_folders", "inner")  # which is what it did unasked
    train("labels", *SHORT, *resume, "--class_folders", "outer", expect=2)
    assert "--class_folders outer (the checkpoint used None)" in message(capsys)
    more = shutil.copytree(classes, tmp_path / "more")
    shutil.copytree(more / "cat", more / "mouse")
    train("labels", *SHORT, "--resume_from_checkpoint", "latest", data=more, expect=2)
    assert "--classes" in message(capsys)


@pytest.mark.parametrize("is_column", mostly_slow([True, False], True))
def test_a_model_whose_classes_had_another_spelling_goes_on(train, tmp_path, monkeypatch, is_column):
    """Classes keep the numbers by which they were learnt, though e with an accent now comes behind f."""
    names, data = ("cafe\u0301", "caff", "cat"), tmp_path / "data"
    put_classes(data, *names)
    flags = [*SHORT, "--class_conditional"]
    if is_column:
        rows = [{"file_name": str(file.relative_to(data)), "kind": file.parent.name} for file in data.glob("*/*.png")]
        (data / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
        flags += ["--label_column", "kind"]
    with monkeypatch.context() as earlier:
        earlier.setattr("utils.data.class_folders.same_text", lambda name: name)
        train("labels", *flags, data=data)
    out = train("labels", *flags, "--max_train_steps", 4, "--resume_from_checkpoint", "latest", data=data)
    assert load(out).labels == {"caf\u00e9": 0, "caff": 1, "cat": 2}


EARLIER_FOLDERS = {
    "twins": (("cafe\u0301", "caf\u00e9", "dog"), {"cafe\u0301", "caf\u00e9", "dog"}),
    "loose": ((".", "cat", "dog"), {"data", "cat", "dog"}),
    "two places": (("a/x", "b/x", "c/y"), {"x", "y"}),
    "all": ((".", "a/x", "b/x", "cafe\u0301", "caf\u00e9", "dog "), {"data", "x", "cafe\u0301", "caf\u00e9", "dog "}),
}


@pytest.mark.parametrize("case", mostly_slow(EARLIER_FOLDERS, "twins"))
def test_a_model_of_folders_that_are_refused_today_goes_on(train, tmp_path, monkeypatch, case):
    names, classes = EARLIER_FOLDERS[case]
    data = put_classes(tmp_path / "data", *names)
    flags = [*SHORT, "--class_conditional", "--checkpointing_steps", 2]
    with monkeypatch.context() as earlier:
        for module in ("utils.training.classes", "utils.data.class_folders"):
            earlier.setattr(f"{module}.same_text", lambda name: name)
        by_own_name = {folder: PurePosixPath(folder).name or "data" for folder in ("", *names)}
        earlier.setattr("utils.data.class_folders.names_of_folders", lambda *_: by_own_name)
        out = train("labels", *flags, data=data)
    assert set(read_state(out / "checkpoint-2").facts.structure["classes"]) == classes
    train("labels", *flags, "--max_train_steps", 4, "--resume_from_checkpoint", "latest", data=data)
