"""Moving averages of weights, and their waits for the device."""

import pytest
import torch
from torch import nn

from utils.runtime.sharding import _exchanged
from utils.training import ema
from utils.training.ema import MovingAverage
from utils.training.options import EmaOptions


class TestAverages:
    """Averages on the host, of weights on a GPU."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_values_from_elsewhere_are_exchanged(self, dtype):
        parameter = nn.Parameter(torch.randn(3, 4).to(dtype))
        before, place = parameter.detach().clone(), parameter.data_ptr()
        average = torch.randn(3, 4)
        put_back = _exchanged(parameter, average)
        assert torch.equal(parameter.detach(), average)  # in float32 also of bfloat16 weights
        assert dtype != torch.float32 or parameter.data_ptr() == place
        put_back()
        assert parameter.dtype == dtype
        assert torch.equal(parameter.detach(), before)

    def test_they_are_lent_where_they_lie(self):
        parameters = [nn.Parameter(torch.randn(2, 2)) for _ in range(3)]
        average = MovingAverage(parameters, EmaOptions(use_ema=True, offload_ema=True))
        before = [each.data_ptr() for each in parameters]
        with average.lent():
            assert [each.data_ptr() for each in parameters] == [each.data_ptr() for each in average.averages]
        assert [each.data_ptr() for each in parameters] == before

    @pytest.mark.parametrize("foreach", [True, False])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("offload", [False, True])
    def test_chunks_average_the_same(self, monkeypatch, foreach, dtype, offload):
        found = []
        for chunk in (1 << 30, 40):  # bytes: one weight has more
            monkeypatch.setattr(ema, "CHUNK", chunk)
            torch.manual_seed(0)
            parameters = [nn.Parameter(torch.randn(size).to(dtype)) for size in (3, 4, 20, 1, 9, 9)]
            options = EmaOptions(use_ema=True, offload_ema=offload, foreach_ema=foreach)
            average = MovingAverage(parameters, options)
            for _ in range(3):
                for each in parameters:
                    each.data.add_(torch.randn_like(each))
                average.update()
            found.append(average.averages)
        assert all(torch.equal(*pair) for pair in zip(*found, strict=True))

    def test_staging_gives_the_values(self):
        class OnAGpu(torch.Tensor):
            device, is_cuda = torch.device("meta"), False

        values = [torch.randn(size) for size in ((2, 3), (5,), ())]
        staging = ema.Staging()
        for count in (3, 2):
            taken = staging.take([value.as_subclass(OnAGpu) for value in values[:count]])
            assert all(torch.equal(*pair) for pair in zip(taken, values[:count], strict=True))
            assert len({each.untyped_storage().data_ptr() for each in taken}) == 1


class TestMovingAverage:
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"offload_ema": True},
            {"foreach_ema": False},
            {"use_ema_warmup": True, "ema_inv_gamma": 2.0, "ema_power": 0.9},
        ],
    )
    def test_against_diffusers(self, options):
        from diffusers.training_utils import EMAModel

        torch.manual_seed(0)
        rise = {"use_ema_warmup": True, "inv_gamma": 2.0, "power": 0.9} if "use_ema_warmup" in options else {}
        parameters = [nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(5))]
        ours, theirs = MovingAverage(parameters, EmaOptions(use_ema=True, **options)), EMAModel(parameters, **rise)
        for _ in range(20):
            for parameter in parameters:
                parameter.data.add_(torch.randn_like(parameter))
            ours.update()
            theirs.step(parameters)
        for one, other in zip(ours.averages, theirs.shadow_params, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
        weights = [parameter.detach().clone() for parameter in parameters]
        with ours.in_place():
            assert torch.equal(parameters[0], ours.averages[0])
        assert all(torch.equal(weight, parameter) for weight, parameter in zip(weights, parameters, strict=True))

    @pytest.mark.parametrize("options", [{}, {"use_ema_warmup": True}, {"offload_ema": True}])
    def test_every_few_steps_by_the_decay_of_all_of_them(self, options):
        torch.manual_seed(0)
        parameter = nn.Parameter(torch.zeros(7))
        often = MovingAverage([parameter], EmaOptions(use_ema=True, **options))
        seldom = MovingAverage([parameter], EmaOptions(use_ema=True, ema_every=4, **options))
        for block in range(5):  # of weights that stand still within a block
            parameter.data.copy_(torch.randn(7))
            for step in range(4):
                before = seldom.averages[0].clone()
                often.update()
                seldom.update()
                assert torch.equal(seldom.averages[0], before) == (step < 3), (block, step)
            torch.testing.assert_close(often.averages[0], seldom.averages[0], rtol=1e-5, atol=1e-6)
        assert often.num_updates == seldom.num_updates == 20

    def test_every_few_steps_of_a_shorter_run_is_refused(self, refused):
        flags = ["--max_train_steps", 3]
        refused([*flags, "--use_ema", "--ema_every", 4], "--ema_every must be at most the run's 3 optimizer steps, got")
        refused([*flags, "--ema_every", 2], "--ema_every goes with --use_ema")
