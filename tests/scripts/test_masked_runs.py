"""Runs with a masked loss."""

import io
import json
import tarfile
import time
from pathlib import Path

import pytest
from PIL import Image

from tests import tiny
from tests.comparing import assert_same_bits, files, losses, weights
from tests.masked import STILL, mask_image, masked_folder


class TestRuns:
    def test_what_is_masked_does_not_train(self, train, pipelines, tmp_path):
        """Transparent images leave the weights as they are, and with a weight for them do not."""
        data = tmp_path / "data"
        data.mkdir()
        for number in range(4):
            image = Image.new("RGBA", (32, 64), (60 * number, 99, 0, 0))
            image.paste((0, 0, 0, 255), (0, 0, 32, 8))  # which is cropped away
            image.save(data / f"{number}.png")
        flags = [*STILL, "--center_crop"]
        still = train("sd", *flags, "--alpha_mask", data=data)
        assert_same_bits(weights(still), weights(Path(pipelines["sd"])))
        moved = train("sd", *flags, "--alpha_mask", "--unmasked_weight", 0.5, data=data, out="moved")
        plain = train("sd", *flags, data=data, out="plain")
        assert losses(moved)[0] == pytest.approx(0.5 * losses(plain)[0], rel=1e-5)

    def test_a_cached_run_is_a_live_one_and_masks_encode_no_image_again(self, train, tmp_path):
        data = masked_folder(tmp_path / "data")
        cache = tmp_path / "cache"
        flags = [*STILL, "--center_crop", "--encoding_cache_dir", cache]
        plain = train("sd", *flags, "--cache_latents", data=data, out="plain")
        before = files(cache / "latents")
        masked = [*flags, "--mask_dir", tmp_path / "masks"]
        live = train("sd", *masked, data=data, out="live")
        cached = train("sd", *masked, "--cache_latents", data=data, out="cached")
        assert files(cache / "latents") == before
        assert losses(cached) == pytest.approx(losses(live), rel=1e-5)
        assert losses(cached) != pytest.approx(losses(plain), rel=1e-2)
        known = files(cache / "masks")
        mask_image(box=(0, 0, 120, 90)).save(tmp_path / "masks" / "3.png")
        changed = train("sd", *masked, "--cache_latents", data=data, out="changed")
        assert known.items() <= files(cache / "masks").items()
        assert len(files(cache / "masks")) == len(known) + 1
        assert losses(changed) != losses(cached)

    def test_alpha_and_a_stream_of_them(self, train, tmp_path):
        data, alpha = masked_folder(tmp_path / "data"), masked_folder(tmp_path / "alpha", in_alpha=True)
        flags = [*STILL, "--center_crop", "--validation_split", 0.3]
        from_files = train("sd", *flags, "--mask_dir", tmp_path / "masks", data=data, out="files")
        from_alpha = train("sd", *flags, "--alpha_mask", data=alpha, out="from alpha")
        shown = [json.loads((out / "data_report.json").read_text())["masked"] for out in (from_files, from_alpha)]
        assert shown == [json.loads((from_files / "data_report.json").read_text())["trained"]] * 2
        with tarfile.open(tmp_path / "shard.tar", "w") as archive:
            for number in range(6):
                for file, name in (
                    (data / f"{number}.webp", f"{number}.webp"),
                    (data / f"{number}.txt", f"{number}.txt"),
                ):
                    archive.add(file, name)
                content = (tmp_path / "masks" / f"{number}.png").read_bytes()
                member = tarfile.TarInfo(f"{number}.mask.png")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        streamed = [*STILL, "--streaming", "--center_crop", "--shuffle_buffer_size", 1]
        shard = tmp_path / "shard.tar"
        masked = train("sd", *streamed, "--mask_column", "mask.png", data=shard, out="masked")
        plain = train("sd", *streamed, data=shard, out="plain")
        assert losses(masked)[0] < 0.8 * losses(plain)[0]

    def test_other_masks_of_the_same_shards_are_read_anew(self, train, tmp_path):
        data = masked_folder(tmp_path / "data", 4)
        edge = io.BytesIO()
        mask_image(box=(0, 0, 8, 90)).save(edge, "PNG")  # which is cropped away
        with tarfile.open(tmp_path / "shard.tar", "w") as archive:
            for number in range(4):
                archive.add(data / f"{number}.webp", f"{number}.webp")
                left = (tmp_path / "masks" / f"{number}.png").read_bytes()
                for name, content in (("left", left), ("none", edge.getvalue())):
                    member = tarfile.TarInfo(f"{number}.{name}.png")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
        time.sleep(2.1)  # the facts of a newer file would not be remembered
        flags = [*STILL, "--center_crop", "--cache_latents", "--encoding_cache_dir", tmp_path / "cache"]
        left = train("sd", *flags, "--mask_column", "left.png", data=tmp_path / "shard.tar", out="left")
        none = train("sd", *flags, "--mask_column", "none.png", data=tmp_path / "shard.tar", out="none")
        assert losses(left)[0] > 0
        assert losses(none)[0] == 0

    def test_a_run_that_goes_on_without_its_masks_is_refused(self, train, refused, tmp_path):
        data = masked_folder(tmp_path / "data")
        train("sd", *STILL, "--mask_dir", tmp_path / "masks", data=data)
        resumed = [*STILL, "--max_train_steps", 5, "--resume_from_checkpoint", "latest"]
        refused(resumed, "--masks none (the checkpoint used folder)", "--allow_changed_options", data=data)

    def test_where_no_image_has_one(self, refused, tmp_path):
        data = tiny.make_images(tmp_path / "data", 4)
        refused([*STILL, "--alpha_mask"], "no image has a mask", data=data)
        (tmp_path / "others").mkdir()
        mask_image().save(tmp_path / "others" / "x.png")
        refused([*STILL, "--mask_dir", tmp_path / "others"], "no image has a mask", data=data)

    def test_bad_masks_are_named(self, train, tmp_path, capsys):
        data = masked_folder(tmp_path / "data")
        (tmp_path / "masks" / "1.png").write_bytes(b"no image")
        mask_image((90, 120)).save(tmp_path / "masks" / "2.png")
        flags = [*STILL, "--mask_dir", tmp_path / "masks"]
        train("sd", *flags, data=data, expect=2)
        error = capsys.readouterr().err
        assert "1.webp: its mask can't be read" in error
        assert "2.webp: its mask of 90x120 does not have the shape of 120x90" in error
        out = train("sd", *flags, "--max_bad_fraction", 0.5, data=data)
        assert sorted(json.loads((out / "data_report.json").read_text())["unreadable"]) == ["1.webp", "2.webp"]

    @pytest.mark.parametrize(
        ("flags", "named"),
        [
            (["--alpha_mask", "--mask_dir", "."], "give one"),
            (["--mask_dir", "/nowhere"], "--mask_dir must be a folder that exists"),
            (["--mask_column", "mask"], "--mask_column mask is not a column of the data"),
            (["--unmasked_weight", 0.5], "--unmasked_weight needs images with masks"),
            (["--alpha_mask", "--unmasked_weight", 2], "--unmasked_weight must be"),
        ],
    )
    def test_what_does_not_go(self, refused, flags, named):
        refused(flags, named)
