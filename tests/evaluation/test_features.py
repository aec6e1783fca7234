"""Feature networks: their weights, how they see images, and the scores that are made of them."""

import hashlib
import itertools
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests import networks, tiny
from utils.config.options import UserError
from utils.evaluation.metrics.base import Case
from utils.evaluation.metrics.clip_score import clip_score
from utils.evaluation.metrics.comparison import differences
from utils.evaluation.metrics.distances import Failed, NotComputable
from utils.evaluation.metrics.diversity import lpips_diversity, memorisation
from utils.evaluation.metrics.features import (
    ClipFeatures,
    DinoFeatures,
    InceptionFeatures,
    LpipsFeatures,
    Networks,
    Picture,
    clean_resize,
    load_own_network,
    tensorflow_resize,
)
from utils.evaluation.metrics.fid import fid, inception
from utils.evaluation.metrics.image_sets import ImageSet, Subject, Workers
from utils.evaluation.metrics.inception import InceptionNetwork
from utils.evaluation.metrics.kid import kid, prdc
from utils.evaluation.metrics.lpips import TRUNKS, LpipsNetwork
from utils.evaluation.options import FeatureOptions, ScoreOptions

CPU = torch.device("cpu")
FID_KEYS = "98efe1f4"  # of the names and shapes in pt_inception-2015-12-05-6726825d.pth


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    return networks.make_inception(tmp_path_factory.mktemp("inception") / "weights.pth")


def picture(pixels, name="image"):
    image = Image.fromarray(np.asarray(pixels, np.uint8))
    return Picture(name, lambda: image)


def noise_pictures(count, size=64, seed=0, low=0, high=256):
    generator = np.random.default_rng(seed)
    return [picture(generator.integers(low, high, (size, size, 3)), f"{seed}-{index}") for index in range(count)]


def subject(pictures, prompts=None, clusters=None, **options):
    count = len(pictures)
    clusters = np.arange(count) if clusters is None else np.array(clusters)
    images = ImageSet(pictures, prompts, clusters, np.arange(count))
    return Subject(images, Networks(FeatureOptions(**options), CPU), Workers(None, 3))


def by_name(scores):
    return {score.name: score for score in scores}


def case(drawn, reference=None, training=None, **options):
    return Case(drawn, reference, training, ScoreOptions(**options))


def test_the_inception_network_has_pytorch_fids_names_and_shapes():
    """And, on random weights, its numbers to the bit, which was seen beside pytorch-fid 0.3.0."""
    with torch.device("meta"):
        state = InceptionNetwork().state_dict()
    assert len(state) == 566
    assert state["fc.weight"].shape == (1008, 2048)
    assert state["Mixed_7c.branch3x3dbl_3b.conv.weight"].shape == (384, 384, 3, 1)
    names = json.dumps([[name, list(tensor.shape)] for name, tensor in sorted(state.items())])
    assert hashlib.sha256(names.encode()).hexdigest()[:8] == FID_KEYS


def test_inception_weights_are_loaded_strictly_from_either_format(inception_file, tmp_path):
    state = torch.load(inception_file, weights_only=True)
    save_file(state, tmp_path / "weights.safetensors")
    pictures = noise_pictures(1)
    found = [
        InceptionFeatures(FeatureOptions(inception_weights=str(file)))(pictures, CPU)
        for file in (inception_file, tmp_path / "weights.safetensors")
    ]
    np.testing.assert_array_equal(*found)
    assert found[0].shape == (1, 2048)
    for name, change in (("missing", {}), ("unexpected", {"other.weight": torch.zeros(2)})):
        broken = {key: tensor for key, tensor in state.items() if name != "missing" or key != "fc.bias"} | change
        torch.save(broken, tmp_path / "broken.pth")
        with pytest.raises(UserError, match="not the weight file of pytorch-fid"):
            InceptionFeatures(FeatureOptions(inception_weights=str(tmp_path / "broken.pth")))


def test_a_weight_file_runs_no_code(tmp_path):
    import pickle

    marker = tmp_path / "ran"

    class Payload:
        def __reduce__(self):
            return (open, (str(marker), "w"))

    file = tmp_path / "payload.pth"
    file.write_bytes(pickle.dumps({"weight": Payload()}))
    with pytest.raises(UserError, match="--inception_weights"):
        InceptionFeatures(FeatureOptions(inception_weights=str(file)))
    assert not marker.exists()


def test_the_modes_are_three_numbers(inception_file):
    """Of one image, and `pytorch-fid` and `clean` alike only at 299 pixels, where neither resizes."""

    def seen(mode, size):
        network = InceptionFeatures(FeatureOptions(fid_mode=mode, inception_weights=str(inception_file)))
        return network.pixels(noise_pictures(1, size)[0].read()).numpy()

    for size in (64, 512):
        modes = [seen(mode, size) for mode in ("clean", "pytorch-fid", "tf")]
        assert all(np.abs(a - b).mean() > 0.005 for a, b in itertools.combinations(modes, 2))
        assert all(pixels.shape == (3, 299, 299) for pixels in modes)
    np.testing.assert_allclose(seen("clean", 299), seen("tf", 299), atol=1e-6)
    plain = noise_pictures(1, 299)[0].read()
    pixels = np.asarray(plain, np.float32).transpose(2, 0, 1)
    np.testing.assert_allclose(seen("pytorch-fid", 299), 2 * pixels / 255 - 1, atol=1e-6)


def test_resizing_rounds_nothing_and_is_tensorflows():
    """By hand: TensorFlow 1 doubles [0, 10] to [0, 5, 10, 10]; PIL on floats keeps what bytes would round."""
    row = np.array([0, 10], np.float32)[None, :, None]
    np.testing.assert_allclose(tensorflow_resize(row.repeat(2, 0), 4)[0, :, 0], [0, 5, 10, 10])
    image = Image.fromarray(np.tile(np.array([[0, 255], [255, 0]], np.uint8)[..., None], (8, 8, 3)))
    small = clean_resize(image, 5)
    assert small.shape == (5, 5, 3)
    assert np.abs(small - small.round()).max() > 0.01
    assert clean_resize(image, 64).min() >= 0


@pytest.mark.slow
def test_fid_of_worse_images_is_larger(inception_file):
    """The network is random, but of the true architecture: blurring and brightening must show."""
    from PIL import ImageFilter

    options = {"inception_weights": str(inception_file)}
    real, same = noise_pictures(4, 40, 1), noise_pictures(4, 40, 2)
    blurred = [Picture(each.name, lambda each=each: each.read().filter(ImageFilter.GaussianBlur(2))) for each in same]
    reference = subject(real, **options)
    scores = [by_name(fid(case(subject(each, **options), reference, fid_groups=2))) for each in (same, blurred)]
    assert scores[1]["fid"].value > 2 * scores[0]["fid"].value
    distances = [by_name(kid(case(subject(each, **options), reference))) for each in (same, blurred)]
    assert distances[1]["kid"].value > abs(distances[0]["kid"].value)
    logits = by_name(inception(case(subject(same, **options))))["inception_score"]
    assert logits.value >= 1
    assert logits.settings["classes"] == 1008


@pytest.mark.parametrize("name", TRUNKS)
def test_lpips_is_a_squared_distance_of_embeddings(name, tmp_path):
    """Against the definition: unit channels, weighted squared differences, means over places, summed over layers."""
    file = networks.make_trunk(tmp_path / "trunk.pth", name)
    network = LpipsFeatures(FeatureOptions(lpips_network=name, lpips_weights=str(file)))
    pictures = noise_pictures(2, 64)
    x, y = (network.pixels(each.read())[None] for each in pictures)
    assert x.min() >= -1
    assert x.min() < -0.9
    module: LpipsNetwork = network.module
    expected = 0.0
    a, b = ((each - module.shift) / module.scale for each in (x, y))
    for index, layer in enumerate(module.features):
        a, b = layer(a), layer(b)
        if index in TRUNKS[name][1]:
            head = getattr(module, f"head_{TRUNKS[name][1].index(index)}").view(1, -1, 1, 1)
            unit = [each / (each.square().sum(1, keepdim=True).sqrt() + 1e-10) for each in (a, b)]
            expected += ((unit[0] - unit[1]).square() * head).sum(1).mean().item()
    found = network(pictures, CPU)
    assert ((found[0] - found[1]) ** 2).sum() == pytest.approx(expected, rel=1e-5)


def test_lpips_diversity_is_the_mean_of_all_pairs(tmp_path):
    file = networks.make_trunk(tmp_path / "trunk.pth")
    pictures, clusters = noise_pictures(7), [0, 0, 0, 1, 1, 2, 2]
    scores = by_name(lpips_diversity(case(subject(pictures, clusters=clusters, lpips_weights=str(file)))))
    rows = LpipsFeatures(FeatureOptions(lpips_weights=str(file)))(pictures, CPU).astype(np.float64)
    distance = {(i, j): ((rows[i] - rows[j]) ** 2).sum() for i, j in itertools.combinations(range(7), 2)}
    assert scores["lpips_diversity"].value == pytest.approx(np.mean(list(distance.values())), rel=1e-6)
    within = [np.mean([distance[0, 1], distance[0, 2], distance[1, 2]]), distance[3, 4], distance[5, 6]]
    assert scores["lpips_within_prompts"].value == pytest.approx(np.mean(within), rel=1e-6)
    one = pictures[0]
    alike = by_name(lpips_diversity(case(subject([one] * 4, clusters=[0, 0, 1, 1], lpips_weights=str(file)))))
    assert alike["lpips_diversity"].value == pytest.approx(0, abs=1e-9)
    with pytest.raises(NotComputable, match="different sizes; for LPIPS give --lpips_size"):
        lpips_diversity(case(subject([*pictures, *noise_pictures(1, 80)], lpips_weights=str(file))))


@pytest.fixture(scope="module")
def trained_clip(tmp_path_factory):
    """A small CLIP that has learnt which colour is which."""
    folder = networks.make_clip(tmp_path_factory.mktemp("clip"))
    clip = ClipFeatures("clip_model", str(folder))
    texts = [f"a {name} square" for name in tiny.COLOURS]
    pixels = torch.stack([clip.pixels(Image.new("RGB", (48, 48), colour)) for colour in tiny.COLOURS.values()])
    tokens = clip._tokenizer(texts, padding=True, return_tensors="pt")
    model = clip.module.requires_grad_(True).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(60):
        noisy = pixels + 0.2 * torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))
        logits = model(pixel_values=noisy, **tokens).logits_per_image
        loss = torch.nn.functional.cross_entropy(logits, torch.arange(4)) + torch.nn.functional.cross_entropy(
            logits.T, torch.arange(4)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    return folder


def test_a_matching_caption_scores_higher_than_a_wrong_one(trained_clip):
    pictures = [picture(np.full((48, 48, 3), colour)) for colour in tiny.COLOURS.values()]
    right = [f"a {name} square" for name in tiny.COLOURS]
    scores = [
        by_name(clip_score(case(subject(pictures, texts, clip_model=str(trained_clip)))))
        for texts in (right, right[1:] + right[:1])
    ]
    assert scores[0]["clip_score"].value > scores[1]["clip_score"].value + 10
    assert scores[0]["clip_r_precision"].value == 1
    assert scores[1]["clip_r_precision"].value == 0
    assert (scores[0]["clip_score"].by_image > scores[1]["clip_score"].by_image).all()
    assert scores[0]["clip_score_hessel"].value == pytest.approx(scores[0]["clip_score"].value * 2.5 / 100)


def test_clip_score_is_the_models_own_cosine_and_not_a_softmax(trained_clip):
    pictures, text = noise_pictures(3, 40), "a red square"
    found = by_name(clip_score(case(subject(pictures, [text] * 3, clip_model=str(trained_clip)))))
    clip = ClipFeatures("clip_model", str(trained_clip))
    pixels = torch.stack([clip.pixels(each.read()) for each in pictures])
    tokens = clip._tokenizer([text], return_tensors="pt")
    with torch.no_grad():
        cosines = clip.module(pixel_values=pixels, **tokens).logits_per_image[:, 0] / clip.module.logit_scale.exp()
    np.testing.assert_allclose(found["clip_score"].by_image, 100 * cosines.clamp(min=0).numpy(), atol=1e-4)
    assert found["clip_score"].value < 99
    assert found["clip_r_precision"].value is None


def test_a_long_prompt_keeps_its_end(trained_clip):
    clip = ClipFeatures("clip_model", str(trained_clip))
    long = "a very long prompt " * 20
    features, num_cut = clip.texts([long, "a cat"], CPU)
    assert num_cut == 1
    ids = clip._tokenizer([long], verbose=False).input_ids[0]
    kept = torch.tensor([[*ids[:76], ids[-1]]])
    with torch.no_grad():
        expected = clip.module.text_projection(clip.module.text_model(input_ids=kept).pooler_output)
    np.testing.assert_allclose(features[0], expected[0].numpy(), atol=1e-4)
    alone, _ = clip.texts(["a cat"], CPU)
    np.testing.assert_allclose(features[1], alone[0], atol=1e-4)


def test_dino_sees_the_whole_image(tmp_path):
    """Resized to 224 x 224 without a crop: what stands in a corner counts."""
    network = DinoFeatures(FeatureOptions(dino_model=str(networks.make_dino(tmp_path / "dino"))))
    pixels = np.zeros((100, 300, 3), np.uint8)
    cornered = pixels.copy()
    cornered[:10, :10] = 255
    plain, other = (network.pixels(Image.fromarray(each)) for each in (pixels, cornered))
    assert plain.shape == (3, 224, 224)
    assert (plain - other).abs().max() > 1
    found = network([picture(pixels)], CPU)
    with torch.no_grad():
        expected = network.module(pixel_values=plain[None]).last_hidden_state[:, 0]
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)


def test_another_kind_of_model_is_refused(trained_clip, tmp_path):
    with pytest.raises(UserError, match=r"--dino_model .* (lacks|can't be loaded)"):
        DinoFeatures(FeatureOptions(dino_model=str(trained_clip)))
    folder = networks.make_dino(tmp_path / "dino")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="can't be loaded"):
        DinoFeatures(FeatureOptions(dino_model=str(folder)))


def test_a_nan_feature_names_its_image(tmp_path):
    network = load_own_network(str(networks.make_own(tmp_path / "own.py")))
    network.module[0].weight.data.fill_(float("nan"))
    with pytest.raises(Failed, match="the small features of 0-0 are not finite"):
        network(noise_pictures(2), CPU)


def test_memorised_images_are_found(tmp_path):
    own = str(networks.make_own(tmp_path / "own.py"))
    training = subject(noise_pictures(6, seed=1), feature_module=own)
    drawn = subject([*noise_pictures(3, seed=2), training.images.pictures[4]], feature_module=own)
    score = memorisation(case(drawn, training=training))[0]
    nearest = score.details["nearest_pairs"][0]
    assert (nearest["image_index"], nearest["training_image"]) == (3, "1-4")
    assert nearest["cosine"] == pytest.approx(1)
    assert score.by_image[3] > score.by_image[:3].max()


def test_fewer_real_than_features_and_copies_are_remarked(tmp_path):
    own = str(networks.make_own(tmp_path / "own.py"))
    real = noise_pictures(10, seed=1)
    scores = by_name(
        prdc(case(subject(noise_pictures(10), feature_module=own), subject([*real, *real[:3]], feature_module=own)))
    )
    assert "skipped 3 duplicates in the reference" in scores["precision"].remark
    assert "fewer than 50 images" in scores["recall"].remark


def test_the_interval_of_fids_difference_is_of_the_difference_that_is_shown(tmp_path):
    """Of all images there is but one distance; the mean of groups has a difference with an interval around it."""
    own = str(networks.make_own(tmp_path / "own.py"))
    real = subject(noise_pictures(30, seed=1), feature_module=own)
    before = fid(case(subject(noise_pictures(30, seed=2), feature_module=own), real))
    after = fid(case(subject(noise_pictures(30, seed=3, high=128), feature_module=own), real))
    found = {each.name: each for each in differences(before, after, are_paired=True)}
    assert (found["fid"].interval, found["fid"].verdict) == (None, "")
    groups = found["fid_mean_of_groups"]
    assert groups.value == pytest.approx(groups.after - groups.before)
    assert (groups.interval.low + groups.interval.high) / 2 == pytest.approx(groups.value)
    assert by_name(after)["fid_mean_of_groups"].details["images_of_a_group"] == 6


TRAINING_NETWORK = '''
import numpy as np
import torch
from torch import nn
from torch.nn import functional

from utils.evaluation.metrics.features import Network


class Loud(Network):
    """A network that is left in training mode, in two modules."""

    name = "loud"
    settings = "resized to 32"

    def __init__(self):
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Conv2d(3, 12, 8, 8), nn.BatchNorm2d(12), nn.Dropout(0.5))
        self.module = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.Dropout(0.5))
        self.module.train()

    def pixels(self, image):
        pixels = np.asarray(image.resize((32, 32)), np.float32) / 255
        return torch.from_numpy(pixels.transpose(2, 0, 1).copy())

    def features(self, pixels):
        return self.module(self.trunk(pixels))EXTRA
'''


def test_a_network_left_in_training_mode_scores_alike_in_any_batch(tmp_path):
    (tmp_path / "own.py").write_text(TRAINING_NETWORK.replace("EXTRA", ""))
    networks_of = Networks(FeatureOptions(feature_module=str(tmp_path / "own.py")), CPU)
    network = networks_of.get("main")
    buffers = {name: each.clone() for name, each in network.trunk.named_buffers()}
    pictures = noise_pictures(6)
    together = network(pictures, CPU)
    alone = np.concatenate([network([each], CPU) for each in pictures])
    assert np.allclose(together, alone, atol=1e-5)
    assert np.array_equal(together, network(pictures, CPU))
    assert all(torch.equal(each, buffers[name]) for name, each in network.trunk.named_buffers())
    assert not any(each.requires_grad for part in (network.trunk, network.module) for each in part.parameters())


@pytest.mark.parametrize(
    "extra",
    [
        " * torch.rand(1)",
        " - pixels.mean()",
        " + functional.dropout(pixels[:, 0, 0, :8])",
    ],
)
def test_a_network_whose_features_vary_is_refused(tmp_path, extra):
    (tmp_path / "own.py").write_text(TRAINING_NETWORK.replace("EXTRA", extra))
    with pytest.raises(UserError, match=r"--feature_module .*own\.py: the features of an image depend"):
        Networks(FeatureOptions(feature_module=str(tmp_path / "own.py")), CPU).get("main")
