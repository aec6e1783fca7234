"""The validation loss, early stopping and the best weights."""

import io
import json
import shutil
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from tests import tiny
from tests.comparing import assert_same_bits, measured, weights
from tests.launching import succeed
from tests.records import records_of
from tests.repository import ROOT
from utils.config.options import UserError
from utils.data.captions import CaptionOptions
from utils.data.class_labels import check_held_out_classes
from utils.data.source_options import DataOptions, LabelledSource, LabelOptions
from utils.data.sources import read_records
from utils.training.options import EarlyStoppingOptions
from utils.training.validation_loss import History, Measurement, measurement_of, relative_loss

COMMON = ["--validation_split", 0.3, "--validation_steps", 2, "--train_batch_size", 2, "--learning_rate", 1e-3]


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd2"])
def test_the_loss_before_the_first_step_is_that_of_an_independent_computation(train, pipelines, tmp_path, name):
    from diffusers import DDPMScheduler, DiffusionPipeline

    from utils.config.seeding import Stream, generator

    data = tmp_path / "held"
    data.mkdir()
    Image.new("RGB", (32, 32), (200, 50, 30)).save(data / "a.png")
    (data / "a.txt").write_text("a red square")
    flags = ["--validation_data_dir", data, "--num_validation_timesteps", 4, "--max_train_steps", 1]
    out = train(name, *flags, "--train_batch_size", 1, "--snr_gamma", 5, "--loss", "l1")
    pipe = DiffusionPipeline.from_pretrained(pipelines[name])
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    pixels = torch.from_numpy(np.asarray(Image.open(data / "a.png")).copy()).permute(2, 0, 1)[None]
    curve = []
    with torch.no_grad():
        moments = pipe.vae.encode(pixels / 127.5 - 1).latent_dist
        for place, timestep in enumerate((125, 375, 625, 875)):

            def noise(stream, place=place):
                drawn = generator(0, 0, place, stream).standard_normal((4, 16, 16), dtype=np.float32)
                return torch.from_numpy(drawn)[None]

            latents = moments.mean + moments.std * noise(Stream.HELD_OUT_POSTERIOR)
            latents = latents * pipe.vae.config.scaling_factor
            at, drawn = torch.tensor([timestep]), noise(Stream.HELD_OUT_NOISE)
            ids = pipe.tokenizer(["a red square"], padding="max_length", max_length=77, return_tensors="pt").input_ids
            added = {}
            if name == "sdxl":
                one = pipe.text_encoder(ids, output_hidden_states=True)
                two = pipe.text_encoder_2(ids, output_hidden_states=True)
                hidden = torch.cat([one.hidden_states[-2], two.hidden_states[-2]], dim=-1)
                sizes = torch.tensor([[32.0, 32, 0, 0, 32, 32]])
                added = {"added_cond_kwargs": {"text_embeds": two[0], "time_ids": sizes}}
            else:
                hidden = pipe.text_encoder(ids)[0]
            noisy = scheduler.add_noise(latents, drawn, at)
            target = scheduler.get_velocity(latents, drawn, at) if name == "sd2" else drawn
            curve.append(float((pipe.unet(noisy, at, hidden, **added).sample - target).square().mean()))
    assert measured(out)[0]["curve"] == pytest.approx(curve, rel=1e-4)


def test_the_same_number_twice_and_measuring_changes_nothing(train, tmp_path):
    data = tiny.make_images(tmp_path / "data", 10)
    flags = [*COMMON, "--max_train_steps", 6, "--use_ema", "--random_flip"]
    one, other = train("sd", *flags, data=data, out="one"), train("sd", *flags, data=data, out="other")
    assert measured(one) == measured(other)
    assert [line["step"] for line in measured(one)] == [0, 2, 4, 6]
    assert measured(one)[0]["relative_loss"] == 0
    flags[3] = 100
    rarely = train("sd", *flags, data=data, out="rarely")
    assert_same_bits(weights(one), weights(rarely))
    assert measured(rarely)[-1] == measured(one)[-1]


@pytest.mark.slow
def test_two_processes_measure_what_one_does(pipelines, tmp_path):
    import sys

    data = tiny.make_images(tmp_path / "data", 10)
    flags = ["--pretrained_model", pipelines["sd"], "--train_data_dir", data, "--resolution", 32, "--report_to", "none"]
    flags += ["--validation_split", 0.4, "--max_train_steps", 1, "--lr_warmup_steps", 0]
    script = str(ROOT / "train_text_to_image.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29623"]
    commands = {
        "one": [sys.executable, script, *flags, "--train_batch_size", 2],
        "two": [*launch, script, *flags, "--train_batch_size", 1],
    }
    for name, command in commands.items():
        command += ["--output_dir", tmp_path / name]
        succeed(command)
    first, second = measured(tmp_path / "one"), measured(tmp_path / "two")
    assert first[0] == second[0]
    assert first[1]["loss"] == pytest.approx(second[1]["loss"], rel=1e-4)


def test_early_stopping_on_a_run_that_overfits(train, tmp_path, pipelines):
    """A rate that is far too high: the loss rises, the run ends, and best/ holds the weights of the lowest loss."""
    from diffusers import DiffusionPipeline

    data = tiny.make_images(tmp_path / "data", 8)
    flags = ["--validation_split", 0.3, "--validation_steps", 1, "--train_batch_size", 2, "--learning_rate", 0.03]
    flags += ["--early_stopping_patience", 3, "--max_train_steps", 60, "--checkpointing_steps", 1]
    out = train("sd", *flags, data=data)
    lines = measured(out)
    losses = [line["loss"] for line in lines if line["step"]]
    best = 1 + losses.index(min(losses))
    assert len(losses) < 60
    assert lines[-1]["step"] == best + 3
    assert_same_bits(weights(out / "best"), weights(out / f"checkpoint-{best}"))
    DiffusionPipeline.from_pretrained(out / "best")
    assert_same_bits(weights(out), weights(out / f"checkpoint-{best + 3}"))
    longer = train("sd", *flags, "--resume_from_checkpoint", f"checkpoint-{best}", data=data)
    assert measured(longer) == lines


def test_the_best_of_a_lora_loads(train, tmp_path, pipelines):
    from diffusers import DiffusionPipeline

    data = tiny.make_images(tmp_path / "data", 8)
    out = train("sdxl", *COMMON, "--adaptation", "lora", "--max_train_steps", 4, "--cache_latents",
                "--cache_text_embeddings", data=data)  # fmt: skip
    pipeline = DiffusionPipeline.from_pretrained(pipelines["sdxl"])
    pipeline.load_lora_weights(out / "best")
    assert pipeline.get_list_adapters()


def test_the_held_out_images_are_not_trained_on(train, tmp_path):
    data = tiny.make_images(tmp_path / "data", 20)
    out = train("sd", *COMMON, "--max_train_steps", 2, data=data)
    report = json.loads((out / "data_report.json").read_text())
    assert 0 < report["trained"] < 20
    more = tiny.make_images(tmp_path / "more", 30)  # the same images and ten others
    from utils.data.plan import hold_out

    few, many = (hold_out(records_of(folder), 0.3, 0)[1] for folder in (data, more))
    names = [{records.key(index) for index in range(len(records))} for records in (few, many)]
    assert names[0] <= names[1]
    assert len(few) == 20 - report["trained"]


@pytest.mark.parametrize("kind", ["files", "long files", "rows"])
def test_copies_of_an_image_are_on_one_side(tmp_path, kind):
    """Also of files of which only pieces are compared, and of rows; images of equal length and size are no copies."""
    from datasets import Dataset

    from utils.data.duplicates import first_of_same
    from utils.data.plan import hold_out
    from utils.data.source_options import DataOptions, SourceOptions
    from utils.data.sources import read_records
    from utils.data.survey import survey

    edge = 600 if kind == "long files" else 8
    contents = []
    for number in range(10):
        pixels = np.random.default_rng(number).integers(0, 255, (edge, edge, 3), np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "BMP")
        contents += [file.getvalue()] * 3
    if kind == "rows":
        rows = {"image": [{"bytes": content, "path": None} for content in contents], "text": ["x"] * 30}
        Dataset.from_dict(rows).save_to_disk(tmp_path / "saved")
        source = SourceOptions(dataset_name=str(tmp_path / "saved"))
        records = read_records(DataOptions(), source, CaptionOptions(), 0)
    else:
        for number, content in enumerate(contents):
            (tmp_path / f"{number:02d}.bmp").write_bytes(content)
        records = records_of(tmp_path)
    firsts = first_of_same(records, survey(records, tmp_path / "memory"), tmp_path / "memory")
    assert len(np.unique(firsts)) == 10
    assert all(len(set(firsts[begin : begin + 3])) == 1 for begin in range(0, 30, 3))
    for seed in range(5):
        sides = hold_out(records, 0.3, seed, firsts)
        kept, held = ({contents[row] for row in side.rows} for side in sides)
        assert kept
        assert held
        assert not kept & held
    assert len(hold_out(records, 0.3, 0, np.zeros(30, int))[1]) == len(hold_out(records, 0.3, 0)[1])


def test_few_bytes_are_read_to_find_copies_and_none_twice(tmp_path, monkeypatch):
    """Of files of one length and size a piece each, and all of those only that it does not tell apart."""
    from utils.data import duplicates as same_bytes
    from utils.data.survey import add_digests, survey

    monkeypatch.setattr("utils.data.image_facts.SETTLED_NANOSECONDS", 0)
    data, memory = tmp_path / "data", tmp_path / "memory"
    data.mkdir()
    for number in range(8):
        pixels = np.random.default_rng(number // 2).integers(0, 255, (64, 64, 3), np.uint8)
        pixels[:10] = number if number < 4 else number // 2  # far from the middle; the last two pairs are copies
        Image.fromarray(pixels).save(data / f"{number}.bmp")
    read: list[str] = []
    for name in ("_piece", "_whole"):
        original = getattr(same_bytes, name)

        def counted(image, name=name, original=original):
            return read.append(name) or original(image)

        monkeypatch.setattr(same_bytes, name, counted)
    records = records_of(data)
    known = survey(records, memory)
    for _ in range(2):
        firsts = same_bytes.first_of_same(records, known, memory)
        assert [len(set(firsts[begin : begin + 2].tolist())) for begin in range(0, 8, 2)] == [2, 2, 1, 1]
        assert (read.count("_piece"), read.count("_whole")) == (8, 8)
    halves = records.take(np.arange(0, 8, 2)), records.take(np.arange(1, 8, 2))
    of_halves = [survey(half, memory) for half in halves]
    shared = same_bytes.shared_with(halves[0], of_halves[0], halves[1], of_halves[1], memory)
    assert [halves[0].key(index) for index in shared] == ["4.bmp", "6.bmp"]
    read.clear()
    add_digests(known, records, np.ones(8, bool), memory)
    assert same_bytes.first_of_same(records, known, tmp_path / "other").tolist() == firsts.tolist()
    assert not read


@pytest.mark.slow
def test_a_run_from_before_copies_stayed_together_resumes_with_its_own_split(train, tmp_path, caplog, monkeypatch):
    """Its training images are what they were, also when it is resumed twice; a new run has the new split."""
    data = tiny.make_images(tmp_path / "data", 8)
    (data / "metadata.jsonl").unlink()  # in which the copies are not listed
    for number in range(4):
        shutil.copy(data / f"{number:03d}.png", data / f"copy{number}.png")
    flags = ["--validation_split", 0.3, "--train_batch_size", 1, "--checkpointing_steps", 1]
    with monkeypatch.context() as patch:
        patch.setattr("utils.training.resume._splits_by_content", lambda *_: False)
        train("sd", *flags, "--max_train_steps", 1, data=data)
    resumed = [*flags, "--resume_from_checkpoint", "latest", "--max_train_steps"]
    for more in ([2], [3, "--dry_run"]):
        caplog.clear()
        train("sd", *resumed, *more, data=data)
        assert "this run keeps that split" in caplog.text
        assert "byte-identical to another" not in caplog.text
    caplog.clear()
    train("sd", *flags, "--max_train_steps", 1, data=data, out="new")
    train("sd", *resumed, 2, "--dry_run", data=data, out="new")
    assert caplog.text.count("are byte-identical to another and stay on the same side") == 2
    assert "keeps that split" not in caplog.text


def test_held_out_copies_of_what_is_trained_on_are_named(train, tmp_path, caplog):
    data = tiny.make_images(tmp_path / "data" / "train", 6)
    held = tmp_path / "data" / "test"
    held.mkdir()
    shutil.copy(data / "003.png", held / "copy.png")
    Image.new("RGB", (40, 40), "red").save(held / "other.png")
    (held / "metadata.csv").write_text("file_name,text\ncopy.png,x\nother.png,y\n")
    for flags in (["--validation_split", "test"], ["--validation_data_dir", held]):
        caplog.clear()
        train("sd", "--max_train_steps", 1, *flags, "--dry_run", data=data if "dir" in flags[0] else tmp_path / "data")
        assert "1 of the 2 held-out images are byte-identical to training images, such as " in caplog.text
        assert "copy.png" in caplog.text


@pytest.mark.parametrize("is_dry", [True, False])
@pytest.mark.parametrize("form", ["folders", "loose", "split", "column"])
def test_held_out_classes_that_are_not_trained_on_are_refused(train, classes, tmp_path, capsys, form, is_dry):
    held, flags, data = tmp_path / "held", [], None
    for name in ("cat", "bird"):
        (held / name).mkdir(parents=True)
        shutil.copy(next((classes / "cat").glob("*.png")), held / name / "x.png")
    if form == "split":
        for split, folder in (("train", classes), ("test", held)):
            shutil.copytree(folder, tmp_path / "data" / split)
        data = tmp_path / "data"
    if form == "loose":
        shutil.move(held / "cat" / "x.png", held / "x.png")
        shutil.rmtree(held / "cat")
        shutil.rmtree(held / "bird")
    if form == "column":
        data, flags = tmp_path / "data", ["--label_column", "kind"]
        shutil.copytree(classes, data)
        for folder in (data, held):
            names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))
            rows = "".join(f"{name},{name.split('/')[0]}\n" for name in names)
            (folder / "metadata.csv").write_text(f"file_name,kind\n{rows}")
    where = ["--validation_split", "test"] if form == "split" else ["--validation_data_dir", held]
    flags += ["--dry_run"] if is_dry else []
    train("labels", "--max_train_steps", 1, *where, *flags, data=data, expect=2)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    unknown = "held" if form == "loose" else "bird"
    said = f"{where[0]} {where[1]}: 1 images have classes that are not trained on: {unknown} (such as "
    assert said in line
    assert "the trained classes are cat, dog; " in line


def test_held_out_classes_that_are_trained_on_pass(tmp_path):
    """Few of them, in another normal form, and images without one."""
    trained, held = tmp_path / "trained", tmp_path / "held"
    for name in ("caf\u00e9", "dog"):
        (trained / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(trained / name / "x.png")
    (held / "cafe\u0301").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(held / "cafe\u0301" / "x.png")
    labels = LabelOptions(class_conditional=True)
    both = []
    for folder in (trained, held):
        source = LabelledSource(train_data_dir=str(folder))
        both.append(read_records(DataOptions(), source, labels.for_source(source), 0))
    check_held_out_classes(*both, "--validation_data_dir held")
    with pytest.raises(UserError, match="--flag: 1 images have classes that are not trained on: dog "):
        check_held_out_classes(*both[::-1], "--flag")


def test_a_stream_names_held_out_images_that_it_trains_on(train, tmp_path, caplog):
    """Also on a dry run, and once whatever their number; the report counts them."""
    data = tiny.make_images(tmp_path / "data", 6)
    held = tmp_path / "held"
    held.mkdir()
    with tarfile.open(tmp_path / "shard.tar", "w") as archive:
        for number in range(6):
            archive.add(data / f"{number:03d}.png", f"{number}.png")
            (held / f"{number}.txt").write_text("x")
            archive.add(held / f"{number}.txt", f"{number}.txt")
    Image.new("RGB", (40, 40), "red").save(held / "5.png")
    flags = ["--max_train_steps", 3, "--streaming", "--validation_data_dir", held]
    train("sd", *flags, data=tmp_path / "shard.tar", out="none")
    assert "is a copy of the held-out image" not in caplog.text
    for number in range(3):
        shutil.copy(data / f"{number:03d}.png", held / f"{number}.png")
    for out, dry in (("dry", ["--dry_run"]), ("copies", [])):
        caplog.clear()
        folder = train("sd", *flags, *dry, data=tmp_path / "shard.tar", out=out)
        assert caplog.text.count("is a copy of the held-out image ") == 1
    assert json.loads((folder / "data_report.json").read_text())["held_out_copies"] == 3


def test_relative_loss_and_history(tmp_path):
    assert relative_loss([1.0, 2.0], [2.0, 1.0]) == pytest.approx(0)
    assert relative_loss([1.0, 1.0], [2.0, 2.0]) == pytest.approx(-np.log(2))
    history = History(tmp_path, 0, EarlyStoppingOptions(early_stopping_patience=2, early_stopping_threshold=0.05))
    over = []
    for step, loss in enumerate([9.0, 1.0, 0.97, 0.94, 0.93, 0.92, 0.91]):
        history.add(measurement_of(step, np.array([loss, loss]), None), write=True)
        over.append(history.is_over())
    assert history.best().step == 3
    assert over == [False, False, False, False, False, True, True]
    resumed = History(tmp_path, 4, EarlyStoppingOptions())
    assert resumed.measurements == [
        Measurement(step, loss, [loss, loss]) for step, loss in enumerate([9.0, 1.0, 0.97, 0.94, 0.93])
    ]


def test_reduce_on_plateau_against_torch(tmp_path):
    losses = [5.0, 4.0, 4.5, 4.2, 4.1, 3.0, 3.5, 3.4, 3.3, 3.2, 3.1, 3.05, 2.0]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=2, threshold=0)
    history = History(tmp_path, 0, EarlyStoppingOptions())
    for step, loss in enumerate(losses):
        history.add(measurement_of(step, np.array([loss]), None), write=False)
        scheduler.step(loss)
        assert 0.5 ** history.reductions(2) == optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--validation_split", 0], "--validation_split must be between 0 and 1"),
        (["--validation_split", 0.1, "--validation_data_dir", "x"], "give one"),
        (["--validation_data_dir", "/nowhere"], "--validation_data_dir must be a folder that exists"),
        (["--early_stopping_patience", 3], "give --validation_split"),
        (["--lr_scheduler", "reduce_on_plateau"], "give --validation_split"),
        (["--validation_split", 0.1, "--streaming"], "--validation_data_dir"),
        (["--validation_split", "nothing"], "--validation_split nothing"),
    ],
)
def test_what_does_not_go(refused, flags, named):
    refused(flags, named)


def test_held_out_images_that_cannot_be_read_are_named(train, tmp_path, caplog):
    data = tiny.make_images(tmp_path / "held", 4)
    (data / "x.png").write_bytes(b"junk")
    (data / "metadata.jsonl").unlink()
    (data / "000.txt").write_text("a")
    train("sd", "--max_train_steps", 1, "--no_final_checkpoint", "--validation_data_dir", data)
    assert "left out of the validation loss: x.png" in caplog.text


def test_a_held_out_list_that_cannot_be_read_is_one_line(refused, tmp_path):
    data = tiny.make_images(tmp_path / "held", 2)
    (data / "metadata.jsonl").unlink()
    (data / "metadata.csv").write_text('file_name,text\n000.png,"open\n')
    refused(["--max_train_steps", 1, "--validation_data_dir", data], "metadata.csv")


def test_the_best_of_another_run_is_set_aside(train, tmp_path):
    flags = ["--validation_split", 0.34, "--validation_steps", 1, "--checkpointing_steps", 1, "--learning_rate", 1e-3]
    out = train("sd", *flags, "--max_train_steps", 2)
    (out / "best" / "mine.txt").write_text("first")
    (out / "validation.jsonl").write_text("".join((out / "validation.jsonl").read_text().splitlines(True)[:2]))
    kept = History(out, 1, EarlyStoppingOptions())
    assert kept.has_best
    assert not History(out, 0, EarlyStoppingOptions()).has_best
    train("sd", *flags, "--max_train_steps", 1, "--overwrite_output_dir")
    assert (out / "abandoned-best" / "mine.txt").read_text() == "first"
