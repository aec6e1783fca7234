"""Pipelines as they are loaded: their classes, LoRAs on top of them, and what checkpoints hold of them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.comparing import CPU, images_in
from tests.conftest import mostly_slow
from tests.pretrained import write_lora
from tests.tiny import unconditional
from utils.config.options import UserError
from utils.models.scaled_adapters import ScaledAdapter
from utils.sampling.controls import SamplingControls
from utils.sampling.drawer import Drawer, complete_prompts
from utils.sampling.options import GenerationOptions, PromptOptions
from utils.sampling.pipelines import PipelineSpec, indexed_names, load_pipeline, pipeline_class
from utils.sampling.prompts import Prompt, plan_tasks


@pytest.fixture(scope="module")
def loras(pipelines, tmp_path_factory) -> list[Path]:
    folders = [tmp_path_factory.mktemp("lora") for _ in range(2)]
    for seed, folder in enumerate(folders):
        write_lora(folder, pipelines["sd"], seed)
    return folders


def unet_weights(pipelines, *adapters, scale=1.0):
    """The weights of the UNet with adapters in them."""
    spec = PipelineSpec(str(pipelines["sd"]), tuple(ScaledAdapter(str(path), each) for path, each in adapters), scale)
    pipeline = load_pipeline(spec, torch.float32)
    if adapters and pipeline.get_list_adapters():
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
    return pipeline.unet.state_dict()


def test_scales_multiply_the_changes_of_adapters_and_several_add_up(pipelines, loras):
    """Scales of their own, negative ones and the factor of all."""
    base = unet_weights(pipelines)
    first, second = (unet_weights(pipelines, (folder, 1.0)) for folder in loras)
    both = unet_weights(pipelines, (loras[0], 0.8), (loras[1], -0.5), scale=2.0)
    one = unet_weights(pipelines, (loras[0], 0.0), (loras[1], -0.5), scale=2.0)
    changed = [name for name in base if not torch.equal(base[name], first[name])]
    assert changed
    for name in base:
        sum_of_both = base[name] + 1.6 * (first[name] - base[name]) - (second[name] - base[name])
        assert torch.allclose(both[name], sum_of_both, atol=1e-5), name
        assert torch.allclose(one[name], 2 * base[name] - second[name], atol=1e-5), name


def test_a_scale_of_0_leaves_the_base(pipelines, loras):
    base = unet_weights(pipelines)
    off = unet_weights(pipelines, (loras[0], 0.8), (loras[1], -0.5), scale=0.0)
    assert list(base) == list(off)
    assert all(torch.equal(base[name], off[name]) for name in base)


def test_a_lora_of_scale_0_is_checked_too(pipelines, tmp_path):
    write_lora(tmp_path, pipelines["sdxl"])
    with pytest.raises(UserError, match=r"--baseline_lora .* it is a LoRA for another model"):
        load_pipeline(
            PipelineSpec(str(pipelines["sd"]), (ScaledAdapter(str(tmp_path), 0.0),), flag="--baseline"), torch.float32
        )


def test_the_classes_of_pipelines_are_never_code_of_their_folder(more_pipelines, tmp_path):
    folder = tmp_path / "own"
    folder.mkdir()
    marker = tmp_path / "ran"
    (folder / "pipeline.py").write_text(f"open({str(marker)!r}, 'w')")
    for name in (["pipeline", "MyPipeline"], "MyPipeline", ["conditional_ddpm", "Other"]):
        (folder / "model_index.json").write_text(json.dumps({"_class_name": name}))
        with pytest.raises(UserError, match="does not know"):
            pipeline_class(PipelineSpec(str(folder)))
    assert not marker.exists()
    with pytest.raises(UserError, match=r"no model_index\.json"):
        pipeline_class(PipelineSpec(str(tmp_path)))


@pytest.mark.parametrize("index_name", [["conditional_ddpm", "ConditionalDDPMPipeline"], "ConditionalDDPMPipeline"])
def test_our_own_pipelines_are_assembled_and_the_code_beside_them_is_not_run(tmp_path, monkeypatch, index_name):
    """The class of this name may not be built in yet: here one like it stands for it."""
    import sys
    from types import ModuleType

    from diffusers import DDPMScheduler, DiffusionPipeline, ImagePipelineOutput, UNet2DModel
    from diffusers.utils.torch_utils import randn_tensor

    from utils.sampling.pipelines import OWN_PIPELINES

    class ConditionalDDPMPipeline(DiffusionPipeline):
        def __init__(self, unet, scheduler, id2label=None):
            super().__init__()
            self.register_modules(unet=unet, scheduler=scheduler)
            self.labels = {}

        def __call__(self, class_labels, num_inference_steps=5, generator=None, output_type="pil"):
            image = randn_tensor((len(class_labels), 3, 16, 16), generator=generator)
            self.scheduler.set_timesteps(num_inference_steps)
            for t in self.scheduler.timesteps:
                output = self.unet(image, t, class_labels=torch.tensor(class_labels)).sample
                image = self.scheduler.step(output, t, image, generator=generator).prev_sample
            return ImagePipelineOutput(images=(image / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy())

    module = ModuleType(OWN_PIPELINES["ConditionalDDPMPipeline"])
    module.ConditionalDDPMPipeline = ConditionalDDPMPipeline
    monkeypatch.setitem(sys.modules, module.__name__, module)
    folder, marker = tmp_path / "own", tmp_path / "ran"
    unconditional(folder)
    UNet2DModel.from_config(UNet2DModel.load_config(folder / "unet"), num_class_embeds=4).save_pretrained(
        folder / "unet"
    )
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": index_name, "id2label": {}}))
    (folder / "conditional_ddpm.py").write_text(f"open({str(marker)!r}, 'w')")
    assert pipeline_class(PipelineSpec(str(folder))) is ConditionalDDPMPipeline
    pipeline = load_pipeline(PipelineSpec(str(folder)), torch.float32)
    assert isinstance(pipeline.scheduler, DDPMScheduler)
    drawer = Drawer(pipeline, GenerationOptions(num_inference_steps=3, batch_size=2), SamplingControls(), 0, CPU)
    tasks = plan_tasks(complete_prompts(pipeline, [], None), PromptOptions(images_per_prompt=1))
    drawer.draw(tasks, tmp_path / "images")
    assert len(images_in(tmp_path / "images")) == 3  # the fourth embedding is that of no class
    assert not marker.exists()


def test_all_classes_are_drawn_under_their_names(more_pipelines):
    pipeline = load_pipeline(PipelineSpec(str(more_pipelines["dit"])), torch.float32)
    assert len(complete_prompts(pipeline, [], None)) == 1000
    pipeline.labels = {"tench": 0, "shark": 2, "goldfish": 1}
    found = complete_prompts(pipeline, [], None)
    assert [(prompt.label, prompt.text) for prompt in found] == [(0, "tench"), (1, "goldfish"), (2, "shark")]
    with pytest.raises(UserError, match="--class_labels must be among"):
        complete_prompts(pipeline, [], ["3"])


def test_classes_are_chosen_by_number_and_by_name(more_pipelines, caplog):
    pipeline = load_pipeline(PipelineSpec(str(more_pipelines["dit"])), torch.float32)
    pipeline.labels = {"tench": 0, "tinca": 0, "2": 1, "great shark": 2}
    found = complete_prompts(pipeline, [], ["great shark", "0", "tinca", "2"])
    assert [prompt.label for prompt in found] == [2, 0, 0, 1]
    assert "--class_labels 2: using the class of this name, which has number 1" in caplog.text
    with pytest.raises(UserError, match=r"tensh is not one of the pipeline's 4 class names.*did you mean tench\?"):
        complete_prompts(pipeline, [], ["tensh"])
    pipeline.labels = {"0": 0, "1": 1, "2": 2, "10": 3, "11": 4}  # folders that are called by numbers
    assert [prompt.label for prompt in complete_prompts(pipeline, [], ["10", "2"])] == [3, 2]
    with pytest.raises(UserError, match=r"3 is not one of the pipeline's 5 class names; they are 0, 1, 2, 10, 11"):
        complete_prompts(pipeline, [], ["3"])
    pipeline.labels = {}
    with pytest.raises(UserError, match=r"not one of the pipeline's 0 class names.*give numbers"):
        complete_prompts(pipeline, [], ["tench"])
    with pytest.raises(UserError, match="--class_labels must be names, or numbers from 0, got -1"):
        PromptOptions(class_labels=["-1"])
    index = {"_class_name": "DiTPipeline", "id2label": {"0": "tench, tinca", "1": "shark"}}
    assert indexed_names(index) == {"tench": 0, "tinca": 0, "shark": 1}
    ours = {"_class_name": ["pipeline", "ConditionalDDPMPipeline"], "id2label": {"0": "tench, tinca"}}
    assert indexed_names(ours) == {"tench, tinca": 0}
    assert indexed_names({"_class_name": "DiTPipeline", "id2label": None}) == {}


def test_a_pipelines_own_number_of_steps_fits_a_short_schedule(more_pipelines, tmp_path, caplog):
    """DDPMPipeline's 1000 steps are more than this schedule's 50."""
    caplog.set_level("INFO")
    pipeline = load_pipeline(PipelineSpec(str(more_pipelines["ddpm"])), torch.float32)
    tasks = plan_tasks(complete_prompts(pipeline, [], None), PromptOptions(num_images=1))
    drawn = {}
    for steps in (None, 50, 51):
        drawer = Drawer(pipeline, GenerationOptions(num_inference_steps=steps), SamplingControls(), 0, CPU)
        if steps == 51:
            with pytest.raises(UserError, match="51"):
                drawer.draw(tasks, tmp_path)
        else:
            drawn[steps] = drawer.call(tasks)
    assert np.array_equal(drawn[None], drawn[50])
    assert "50 denoising steps, the length of the noise schedule" in caplog.text


@pytest.mark.parametrize("adaptation", mostly_slow(["lora", "loha"], "lora"))
def test_a_checkpoints_adapters_are_taken_their_averages_first(more_pipelines, train, tmp_path, adaptation):
    from safetensors.torch import load_file, save_file

    folder = train("sd", "--adaptation", adaptation, "--use_ema", "--max_train_steps", 1, "--checkpointing_steps", 1)
    checkpoint = folder / "checkpoint-1"
    name = "pytorch_lora_weights.safetensors" if adaptation == "lora" else "adapter_model.safetensors"
    files = [checkpoint / "unet_ema" / name, checkpoint / ("" if adaptation == "lora" else "unet") / name]
    for seed, file in enumerate(files):
        torch.manual_seed(seed)
        save_file({key: torch.randn_like(tensor) for key, tensor in load_file(file).items()}, file)

    def drawn_with(parts, scale=1.0):
        pipeline = load_pipeline(PipelineSpec(str(more_pipelines["sd"]), scale=scale, parts=parts), torch.float32)
        drawer = Drawer(pipeline, GenerationOptions(num_inference_steps=2), SamplingControls(), 0, CPU)
        return drawer.call(plan_tasks([Prompt("a")], PromptOptions(images_per_prompt=1)))

    base, average = drawn_with(None), drawn_with(checkpoint)
    assert np.abs(base - average).max() > 0.01
    assert np.array_equal(drawn_with(checkpoint, 0.0), base)
    half = drawn_with(checkpoint, 0.5)
    assert min(np.abs(half - other).max() for other in (base, average)) > 0.001
    tensors = load_file(files[0])
    save_file({f"other.{key}": tensor for key, tensor in tensors.items()}, files[0])
    with pytest.raises(UserError, match="can't be loaded"):
        drawn_with(checkpoint)
    files[0].unlink()
    load_pipeline(PipelineSpec(str(more_pipelines["sd"]), parts=checkpoint), torch.bfloat16)
    raw = drawn_with(checkpoint)
    assert min(np.abs(raw - other).max() for other in (base, average)) > 0.01
    files[1].unlink()
    with pytest.raises(UserError, match="has no weights for"):
        drawn_with(checkpoint)
