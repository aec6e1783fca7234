"""Models with first weights: built-in sizes and config files."""

import math

import pytest
import torch
from torch import nn

from tests import tiny
from tests.comparing import weights
from tests.conftest import message
from tests.unconditional_runs import SHORT, load, three_levels
from utils.config.options import UserError
from utils.models.from_scratch import unet_config
from utils.models.options import ShapeOptions

SIZES = {8: 2, 16: 3, 32: 4, 64: 5, 128: 6, 256: 6}


@pytest.mark.parametrize("edge", SIZES)
def test_a_built_in_size_has_no_level_under_4(edge):
    from utils.models.from_scratch import unet_config
    from utils.models.options import ShapeOptions

    config = unet_config(ShapeOptions(), edge, 3, None)
    assert len(config["block_out_channels"]) == SIZES[edge]
    assert edge // 2 ** (SIZES[edge] - 1) >= 4


@pytest.mark.parametrize("init", ["default", "xavier_kaiming"])
@pytest.mark.parametrize("name", ["UNet2DModel", "DiTTransformer2DModel"])
def test_first_weights(name, init):
    from utils.models.from_scratch import make_denoiser, transformer_config, unet_config
    from utils.models.options import ShapeOptions

    torch.manual_seed(0)
    options = ShapeOptions(model_size="tiny", weight_init=init)
    config = unet_config(options, 16, 3, None) if name == "UNet2DModel" else transformer_config(options, 16, 3)
    model = make_denoiser(name, config, init)
    classes = {} if name == "UNet2DModel" else {"class_labels": torch.tensor([0])}
    output = model(torch.randn(1, 3, 16, 16), torch.tensor([10]), **classes).sample
    assert bool(output.any()) == (init != "default")  # zeroed last layers predict nothing
    linear = next(module for module in model.modules() if isinstance(module, nn.Linear) and module.weight.any())
    if init == "xavier_kaiming":
        bound = math.sqrt(6 / (linear.in_features + linear.out_features))
        assert 0.9 * bound < float(linear.weight.detach().abs().max()) <= bound


def test_a_config_file_says_the_shape(train, tmp_path):
    first = train("pixels", *SHORT, out="first")
    from tests.conftest import reset_accelerate
    from train_unconditional import main

    reset_accelerate()
    words = ["--model_config_name_or_path", first, "--train_data_dir", train.images, "--output_dir", tmp_path / "out"]
    words += [*SHORT, *tiny.SMALL_DRAWING, "--resolution", 16, "--report_to", "none"]
    assert main([str(word) for word in words]) == 0
    assert weights(first).keys() == weights(tmp_path / "out").keys()
    assert load(tmp_path / "out").unet.config.sample_size == 16


def test_a_configs_levels_stay_at_4_or_over(train, tmp_path, capsys):
    from tests.conftest import reset_accelerate
    from train_unconditional import main

    three_levels().save_config(tmp_path / "config")
    reset_accelerate()
    words = ["--train_data_dir", train.images, "--output_dir", tmp_path / "out", "--resolution", 8]
    words += ["--model_config_name_or_path", tmp_path / "config"]
    assert main([str(word) for word in words]) == 2
    line = message(capsys)
    assert "--model_config_name_or_path has 3 levels, the last of which would be 2x2 for 8 pixels" in line
    assert "an edge of at least 16" in line
    with pytest.raises(UserError, match=r"--model_size has 1 level,.*at least 4"):
        unet_config(ShapeOptions(model_size="tiny"), 2, 4, None)
    with pytest.raises(UserError, match=r"try an edge of 16$"):
        unet_config(ShapeOptions(model_config_name_or_path=str(tmp_path / "config")), 10, 3, None)
