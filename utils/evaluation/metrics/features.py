"""The feature networks of the metrics: how they preprocess images, where their weights come from, and their hashes.

Images are preprocessed with PIL and numpy, so scores do not depend on which other packages are installed.
"""

import hashlib
import logging
import pickle
import struct
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional

from utils.config.options import UserError, first_line
from utils.config.tensor_files import read_pickle, read_safetensors
from utils.config.user_code import load_class, running
from utils.evaluation.metrics.distances import Failed, NotComputable
from utils.evaluation.metrics.inception import INPUT_SIZE, NUM_FEATURES, InceptionNetwork
from utils.evaluation.metrics.lpips import LpipsNetwork
from utils.evaluation.options import FID_MODES, FeatureOptions
from utils.models.fingerprint import weights_hash
from utils.models.loading import frozen, load_module
from utils.runtime.atomic_files import replacing
from utils.runtime.processes import without_tf32

logger = logging.getLogger(__name__)
LOADING_ERRORS = (OSError, ValueError, RuntimeError, SafetensorError, KeyError)
BROKEN_PICKLE = (*LOADING_ERRORS, pickle.UnpicklingError, EOFError, AttributeError, IndexError, TypeError, struct.error)
INCEPTION_URL = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
)
TRUNK_URLS = {
    "alex": "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
    "vgg": "https://download.pytorch.org/models/vgg16-397923af.pth",
}
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DIFFERENT_SIZES = "the network does not resize images, and these have different sizes; for LPIPS give --lpips_size"
REPEATS_WITHIN = 1e-2  # tolerance relative to the largest feature: rounding depends on the batch size
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class Picture(NamedTuple):
    """An image to score: its name in reports, and a function that reads it as RGB."""

    name: str
    read: Callable[[], Image.Image]


def read_picture(picture: Picture) -> Image.Image:
    """Returns a picture as RGB.

    Raises:
        Failed: if it can't be read; the message names it.
    """
    try:
        return picture.read()
    except (OSError, ValueError) as error:
        raise Failed(f"{picture.name} can't be read: {first_line(error)}") from error


class Network(ABC):
    """A feature network.

    Attributes:
        name: its name in reports.
        module: the module that computes features, in evaluation mode.
        settings: how images are preprocessed, as shown in reports.
        class_weights: [classes, d], maps features to class logits for the Inception Score; None if it has no classes.
    """

    name: str
    module: nn.Module
    settings: str
    class_weights: np.ndarray | None = None

    @abstractmethod
    def pixels(self, image: Image.Image) -> Tensor:
        """Returns the network's input [C, H, W], float32, for an RGB image."""

    @abstractmethod
    def features(self, pixels: Tensor) -> Tensor:
        """Returns the features [B, d] of pixels [B, C, H, W]."""

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of the weights' names and bytes."""
        if not hasattr(self, "_fingerprint"):
            self._fingerprint = weights_hash(self.module)
        return self._fingerprint

    def freeze(self) -> None:
        """Sets all its modules to evaluation mode, without gradients."""
        for held in vars(self).values():
            if isinstance(held, nn.Module):
                frozen(held)

    def __call__(self, pictures: Sequence[Picture], device: torch.device) -> np.ndarray:
        """Returns the features [B, d], float32, of B pictures.

        Raises:
            Failed: if an image can't be read, or its features are not finite; the message names it.
            NotComputable: if the images have different sizes and the network does not resize them.
        """
        prepared = [self.pixels(read_picture(picture)) for picture in pictures]
        if len({pixels.shape for pixels in prepared}) > 1:
            raise NotComputable(DIFFERENT_SIZES)
        pixels = torch.stack(prepared).to(device)
        self.freeze()
        with torch.no_grad(), without_tf32():  # so that scores agree between CPUs and GPUs
            found = self.features(pixels).float().cpu()
        finite = torch.isfinite(found).all(1)
        if not finite.all():
            name = pictures[int((~finite).nonzero()[0])].name
            raise Failed(f"the {self.name} features of {name} are not finite")
        return found.numpy()


def load_weights(file: str) -> dict[str, Tensor]:
    """Returns the tensors of a .safetensors or .pth file, read without running code in it.

    Raises:
        LOADING_ERRORS: if it has no tensors by name.
    """
    if file.endswith(".safetensors"):
        return read_safetensors(file)
    try:
        found = read_pickle(file)
    except BROKEN_PICKLE as error:
        raise ValueError(first_line(error)) from error
    if not isinstance(found, dict):
        raise ValueError(f"it contains a {type(found).__name__} instead of weights by name")
    return found


def downloaded(url: str, may_download: bool) -> str:
    """Returns the path of a file that is downloaded once, and checks the start of its SHA-256, which is in its name.

    Raises:
        NotComputable: if it can't be downloaded.
    """
    name = url.rpartition("/")[2]
    path = Path(torch.hub.get_dir(), "checkpoints", name)
    if path.is_file():
        return str(path)
    if not may_download:
        raise NotComputable(f"{name} is not in the cache, and --no_download forbids to download it")
    try:
        with urllib.request.urlopen(url, timeout=10) as response:
            content = response.read()
    except (OSError, urllib.error.URLError, ValueError) as error:
        raise NotComputable(f"{name} is not in the cache and can't be downloaded ({first_line(error)})") from error
    wanted = path.stem.rpartition("-")[2]
    if not hashlib.sha256(content).hexdigest().startswith(wanted):
        raise NotComputable(f"{url} returned a file with another SHA-256 than that in its name")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as aside:
        aside.write_bytes(content)
    return str(path)


def _as_array(image: Image.Image) -> np.ndarray:
    return np.asarray(image, np.float32)


def _normalised(image: Image.Image, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    pixels = (_as_array(image) / 255 - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


def clean_resize(image: Image.Image, size: int) -> np.ndarray:
    """Returns [size, size, 3] in 0..255, resized by PIL's bicubic filter per channel in float (Parmar et al. 2022)."""
    channels = [
        Image.fromarray(channel).resize((size, size), Image.Resampling.BICUBIC)
        for channel in np.ascontiguousarray(_as_array(image).transpose(2, 0, 1))
    ]
    return np.stack([np.asarray(channel) for channel in channels], axis=-1).clip(0, 255)


def tensorflow_resize(pixels: np.ndarray, size: int) -> np.ndarray:
    """Returns [size, size, 3] from [H, W, 3], resized as by TensorFlow 1: pixel i samples the input at i * H / size."""
    for axis in (0, 1):
        length = pixels.shape[axis]
        places = np.arange(size, dtype=np.float32) * np.float32(length / size)
        low = np.floor(places).astype(int)
        high = np.minimum(low + 1, length - 1)
        share = (places - low).reshape([-1 if dimension == axis else 1 for dimension in range(3)])
        first, second = pixels.take(low, axis), pixels.take(high, axis)
        pixels = first + (second - first) * share
    return pixels


class InceptionFeatures(Network):
    """The Inception network of pytorch-fid: 2048 features; `--fid_mode` sets the preprocessing."""

    name = "inception"

    def __init__(self, options: FeatureOptions):
        file = options.inception_weights or downloaded(INCEPTION_URL, not options.no_download)
        self._mode = options.fid_mode
        self.settings = f"{self._mode}: {FID_MODES[self._mode]}"
        with torch.device("meta"):
            network = InceptionNetwork()
        try:
            network.load_state_dict(load_weights(file), strict=True, assign=True)
        except LOADING_ERRORS as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"--inception_weights {file} is not the weight file of pytorch-fid: {reason}") from error
        self.module = frozen(network.float())
        self.class_weights = network.fc.weight.cpu().double().numpy()

    def pixels(self, image: Image.Image) -> Tensor:
        if self._mode == "clean":
            scaled = (clean_resize(image, INPUT_SIZE) - 128) / 128
        elif self._mode == "tf":
            scaled = (tensorflow_resize(_as_array(image), INPUT_SIZE) - 128) / 128
        else:
            pixels = torch.from_numpy(_as_array(image) / 255).permute(2, 0, 1)[None]
            size = (INPUT_SIZE, INPUT_SIZE)
            return 2 * functional.interpolate(pixels, size, mode="bilinear", align_corners=False)[0] - 1
        return torch.from_numpy(np.ascontiguousarray(scaled.transpose(2, 0, 1), np.float32))

    def features(self, pixels: Tensor) -> Tensor:
        return self.module(pixels)


class DinoFeatures(Network):
    """DINOv2's class token after the last norm, for images resized to 224 x 224 without cropping, as in dgm-eval."""

    name = "dinov2"
    settings = "PIL bicubic to 224 x 224, uncropped"

    def __init__(self, options: FeatureOptions):
        from transformers import Dinov2Model

        model, is_local = options.dino_model, options.no_download
        self.module = _pretrained(Dinov2Model, "dino_model", model, is_local, _class_token)

    def pixels(self, image: Image.Image) -> Tensor:
        return _normalised(image.resize((224, 224), Image.Resampling.BICUBIC), IMAGENET_MEAN, IMAGENET_STD)

    def features(self, pixels: Tensor) -> Tensor:
        return self.module(pixel_values=pixels).last_hidden_state[:, 0]


def _class_token(model: nn.Module) -> Tensor:
    """The class token for a test image, which depends on every weight that is used."""
    return model(pixel_values=torch.linspace(0, 100, 3 * 224 * 224).sin().view(1, 3, 224, 224)).last_hidden_state[:, 0]


class ClipFeatures(Network):
    """CLIP's projected features of images and texts."""

    name = "clip"

    def __init__(self, flag: str, model: str, is_local: bool = False):
        from transformers import AutoTokenizer, CLIPModel
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        self.module = _pretrained(CLIPModel, flag, model, is_local)
        size = self.module.config.vision_config.image_size
        try:
            self._processor = CLIPImageProcessorPil.from_pretrained(model, local_files_only=is_local)
        except OSError:
            self._processor = CLIPImageProcessorPil(
                size={"shortest_edge": size}, crop_size={"height": size, "width": size}
            )
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=is_local)
        except LOADING_ERRORS as error:
            raise _not_loaded(flag, model, error, is_local) from error
        self.settings = f"PIL bicubic to {size}, centre-cropped"

    def pixels(self, image: Image.Image) -> Tensor:
        return self._processor(images=image, return_tensors="pt")["pixel_values"][0]

    def features(self, pixels: Tensor) -> Tensor:
        return self.module.visual_projection(self.module.vision_model(pixel_values=pixels).pooler_output)

    def texts(self, texts: Sequence[str], device: torch.device, batch_size: int = 64) -> tuple[np.ndarray, int]:
        """Returns (features [N, d], number of truncated texts); truncation keeps the end token."""
        length = self.module.config.text_config.max_position_embeddings
        found, num_cut = [], 0
        for start in range(0, len(texts), batch_size):
            some = list(texts[start : start + batch_size])
            plain = self._tokenizer(some, verbose=False).input_ids
            num_cut += sum(len(ids) > length for ids in plain)
            tokens = self._tokenizer(some, padding=True, truncation=True, max_length=length, return_tensors="pt")
            with torch.no_grad(), without_tf32():
                ends = self.module.text_model(
                    input_ids=tokens.input_ids.to(device), attention_mask=tokens.attention_mask.to(device)
                ).pooler_output
                found.append(self.module.text_projection(ends).float().cpu())
        return torch.cat(found).numpy(), num_cut

    @property
    def scale(self) -> float:
        """The logit scale of the model, a factor on cosines."""
        return float(self.module.logit_scale.exp())


class CmmdFeatures(ClipFeatures):
    """CLIP features of the centre square, resized to the model's input size, as in CMMD's code."""

    name = "cmmd_clip"

    def __init__(self, options: FeatureOptions):
        super().__init__("cmmd_model", options.cmmd_model, options.no_download)
        self._size = self.module.config.vision_config.image_size
        self.settings = f"centre square, PIL bicubic to {self._size}"

    def pixels(self, image: Image.Image) -> Tensor:
        edge = min(image.size)
        left, top = (image.width - edge) // 2, (image.height - edge) // 2
        square = image.crop((left, top, left + edge, top + edge))
        return _normalised(square.resize((self._size, self._size), Image.Resampling.BICUBIC), CLIP_MEAN, CLIP_STD)


class LpipsFeatures(Network):
    """Embeddings whose squared distances are LPIPS; their length depends on the image size."""

    name = "lpips"

    def __init__(self, options: FeatureOptions):
        file = options.lpips_weights or downloaded(TRUNK_URLS[options.lpips_network], not options.no_download)
        network = LpipsNetwork(options.lpips_network)
        try:
            network.load_trunk(load_weights(file))
        except LOADING_ERRORS as error:
            reason = " ".join(str(error).split())[:200]
            kind = options.lpips_network
            raise UserError(f"--lpips_weights {file} is not a weight file of torchvision's {kind}: {reason}") from error
        self.module = frozen(network)
        self._size = options.lpips_size
        self.settings = f"{options.lpips_network}, " + (
            f"resized to {self._size}" if self._size else "images as they are"
        )

    def pixels(self, image: Image.Image) -> Tensor:
        if self._size is not None:
            image = image.resize((self._size, self._size), Image.Resampling.BICUBIC)
        return _normalised(image, (0.5,) * 3, (0.5,) * 3)

    def features(self, pixels: Tensor) -> Tensor:
        return self.module(pixels)


def _not_loaded(flag: str, model: str, error: Exception, is_local: bool) -> Exception:
    """The error for a model that can't be loaded: a broken folder is the user's error, a missing Hub model is not."""
    if Path(model).is_dir():
        return UserError(f"--{flag} {model} can't be loaded: {first_line(error)}")
    if is_local:
        return NotComputable(
            f"{model} is not in the cache, and --no_download forbids to download it; give --{flag} FOLDER"
        )
    return NotComputable(
        f"{model} is not in the cache and was not found on the Hub ({first_line(error)}); give --{flag} FOLDER"
    )


def _pretrained(
    model_class: type,
    flag: str,
    model: str,
    is_local: bool,
    reads: Callable[[nn.Module], Tensor] | None = None,
) -> nn.Module:
    """Loads a transformers model in float32; a missing weight that is used is an error.

    Args:
        reads: computes an output of the model that depends on every weight that is used; by default all are used.
    """
    weights = {"use_safetensors": True, "local_files_only": is_local}
    try:
        return frozen(load_module(model_class, model, f"--{flag} {model}", flag, torch.float32, reads, **weights))
    except UserError as error:
        if error.__cause__ is None:  # loaded, but the weights are of another kind of model
            raise
        raise _not_loaded(flag, model, error.__cause__, is_local) from error


def load_own_network(file: str) -> Network:
    """Returns the network in the file of `--feature_module`.

    Raises:
        UserError: if the file fails, or does not define exactly one subclass of `Network` without arguments.
    """
    kind = load_class("feature_module", file, Network)
    with running("feature_module", file):
        network = kind()
        network.freeze()
    return network


def check_repeats(network: Network, flag: str) -> None:
    """Checks that the features of an image do not depend on the rest of its batch, and are the same when repeated.

    Raises:
        UserError: naming the flag.
    """
    # Two test images.
    generator = np.random.default_rng(0)
    levels = (64, 256)  # different brightness, so that batch statistics show
    images = [Image.fromarray(generator.integers(0, level, (64, 64, 3), dtype=np.uint8)) for level in levels]
    pictures = [Picture(f"noise {number}", lambda image=image: image) for number, image in enumerate(images)]
    device = next((each.device for each in network.module.parameters()), torch.device("cpu"))

    # Features of both at once, twice, and of each alone.
    before = {name: each.clone() for name, each in network.module.named_buffers()}
    try:
        together, again = network(pictures, device), network(pictures, device)
        alone = np.concatenate([network([picture], device) for picture in pictures])
    except Failed:  # of these test images; features of real images are checked when they are computed
        return
    if any(not torch.equal(before[name], each) for name, each in network.module.named_buffers() if name in before):
        raise UserError(f"--{flag}: the network changes its own buffers in forward(); remove that")
    scale = np.abs(together).max()
    if max(np.abs(together - again).max(), np.abs(together - alone).max()) > REPEATS_WITHIN * scale:
        raise UserError(
            f"--{flag}: the features of an image depend on the other images of its batch, or change when computed "
            "again; use no dropout and no batch statistics, also in calls of torch.nn.functional"
        )


def _main_network(options: FeatureOptions) -> Network:
    if options.feature_module is None:
        return InceptionFeatures(options)
    network = load_own_network(options.feature_module)
    check_repeats(network, f"feature_module {options.feature_module}")
    return network


def _preference(flag: str, options: FeatureOptions) -> Network:
    model = getattr(options, flag)
    if model is None:
        raise NotComputable(f"it needs a model; give --{flag}")
    return ClipFeatures(flag, model, options.no_download)


NETWORKS: dict[str, Callable[[FeatureOptions], Network]] = {
    "main": _main_network,
    "dino": DinoFeatures,
    "clip": lambda options: ClipFeatures("clip_model", options.clip_model, options.no_download),
    "cmmd": CmmdFeatures,
    "lpips": LpipsFeatures,
    "pickscore": lambda options: _preference("pickscore_model", options),
    "hpsv2": lambda options: _preference("hpsv2_model", options),
}
MAIN_FEATURES = NUM_FEATURES


class Networks:
    """The networks of an evaluation. Each is loaded at its first use; a failure to load is cached too."""

    def __init__(self, options: FeatureOptions, device: torch.device, table: dict[str, Callable] | None = None):
        self.options = options
        self.device = device
        self._table = NETWORKS if table is None else table
        self._loaded: dict[str, Network] = {}
        self._missing: dict[str, str] = {}

    def get(self, name: str) -> Any:
        """Returns a network by its name in `NETWORKS`, on the device.

        Raises:
            NotComputable: if its weights are not available.
            UserError: if weights given by a flag do not fit the network.
        """
        if name in self._missing:
            raise NotComputable(self._missing[name])
        if name not in self._loaded:
            try:
                self._loaded[name] = self._table[name](self.options)
            except NotComputable as missing:
                self._missing[name] = str(missing)
                raise
        network = self._loaded[name]
        network.module.to(self.device)
        return network

    def rest(self) -> None:
        """Moves all networks to the CPU, to free device memory for drawing."""
        for network in self._loaded.values():
            network.module.to("cpu")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
