"""The networks whose features the scores are made of: how each sees an image, where its weights come from, their hash.

Pixels go through PIL and numpy, so a number does not depend on which other packages are installed.
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
DIFFERENT_SIZES = "the network takes images as they are, and these have different sizes; for LPIPS give --lpips_size"
REPEATS_WITHIN = 1e-2  # of the largest feature: kernels for other batch sizes round otherwise
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class Picture(NamedTuple):
    """An image to score: the name by which it is reported, and how it is read as RGB."""

    name: str
    read: Callable[[], Image.Image]


def read_picture(picture: Picture) -> Image.Image:
    """A picture as RGB.

    Raises:
        Failed: if it can't be read, naming it.
    """
    try:
        return picture.read()
    except (OSError, ValueError) as error:
        raise Failed(f"{picture.name} can't be read: {first_line(error)}") from error


class Network(ABC):
    """A feature network.

    Attributes:
        name: as reports call it.
        module: what computes, in evaluation mode.
        settings: how images are prepared for it, as reports say it.
        class_weights: [classes, d] weights that make class scores of features, for the Inception Score; None without.
    """

    name: str
    module: nn.Module
    settings: str
    class_weights: np.ndarray | None = None

    @abstractmethod
    def pixels(self, image: Image.Image) -> Tensor:
        """[C, H, W] float32 what the network takes for an RGB image."""

    @abstractmethod
    def features(self, pixels: Tensor) -> Tensor:
        """[B, d] of pixels [B, C, H, W]."""

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of the weights' names and bytes."""
        if not hasattr(self, "_fingerprint"):
            self._fingerprint = weights_hash(self.module)
        return self._fingerprint

    def freeze(self) -> None:
        """Puts all modules that it holds in evaluation mode, their weights not trained."""
        for held in vars(self).values():
            if isinstance(held, nn.Module):
                frozen(held)

    def __call__(self, pictures: Sequence[Picture], device: torch.device) -> np.ndarray:
        """[B, d] float32.

        Raises:
            Failed: if an image can't be read, or its features are not finite, naming it.
        NotComputable: if the images have different sizes and the network takes them as they are.
        """
        prepared = [self.pixels(read_picture(picture)) for picture in pictures]
        if len({pixels.shape for pixels in prepared}) > 1:
            raise NotComputable(DIFFERENT_SIZES)
        pixels = torch.stack(prepared).to(device)
        self.freeze()
        with torch.no_grad(), without_tf32():  # so that scores are the same on a CPU and on any GPU
            found = self.features(pixels).float().cpu()
        finite = torch.isfinite(found).all(1)
        if not finite.all():
            name = pictures[int((~finite).nonzero()[0])].name
            raise Failed(f"{self.name} gives features of {name} that are not finite")
        return found.numpy()


def load_weights(file: str) -> dict[str, Tensor]:
    """The tensors of a .safetensors or .pth file, read without running what it holds.

    Raises:
        LOADING_ERRORS: if it holds none.
    """
    if file.endswith(".safetensors"):
        return read_safetensors(file)
    try:
        found = read_pickle(file)
    except BROKEN_PICKLE as error:
        raise ValueError(first_line(error)) from error
    if not isinstance(found, dict):
        raise ValueError(f"it holds a {type(found).__name__}, no weights by name")
    return found


def downloaded(url: str, may_download: bool) -> str:
    """The path of a file that is downloaded once; its name holds the beginning of its SHA-256, which is checked.

    Raises:
        NotComputable: if it can't be had.
    """
    name = url.rpartition("/")[2]
    path = Path(torch.hub.get_dir(), "checkpoints", name)
    if path.is_file():
        return str(path)
    if not may_download:
        raise NotComputable(f"{name} is not here, and --no_download leaves it there")
    try:
        with urllib.request.urlopen(url, timeout=10) as response:
            content = response.read()
    except (OSError, urllib.error.URLError, ValueError) as error:
        raise NotComputable(f"{name} is not here and can't be downloaded ({first_line(error)})") from error
    wanted = path.stem.rpartition("-")[2]
    if not hashlib.sha256(content).hexdigest().startswith(wanted):
        raise NotComputable(f"{url} gave another file than {name}")
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
    """[H, W, 3] in 0..255 by PIL's bicubic on each channel as floats (Parmar et al. 2022): nothing is rounded."""
    channels = [
        Image.fromarray(channel).resize((size, size), Image.Resampling.BICUBIC)
        for channel in np.ascontiguousarray(_as_array(image).transpose(2, 0, 1))
    ]
    return np.stack([np.asarray(channel) for channel in channels], axis=-1).clip(0, 255)


def tensorflow_resize(pixels: np.ndarray, size: int) -> np.ndarray:
    """[size, size, 3] of [H, W, 3] by TensorFlow 1's bilinear: pixel i reads input i * H / size, not its middle."""
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
    """pytorch-fid's Inception network: 2048 features; the images' preparation is that of `--fid_mode`."""

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
            raise UserError(f"--inception_weights {file} is not pytorch-fid's weight file: {reason}") from error
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
    """DINOv2's class token behind the last norm, of images of 224 x 224 by PIL's bicubic, uncropped, as in dgm-eval."""

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
    """What is read of DINOv2, of an image of noise."""
    return model(pixel_values=torch.linspace(0, 100, 3 * 224 * 224).sin().view(1, 3, 224, 224)).last_hidden_state[:, 0]


class ClipFeatures(Network):
    """CLIP's projected features of images, and of texts."""

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
        """([N, d] features, how many texts were too long). What is too long is cut before its end token."""
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
        """The factor that the model puts on cosines."""
        return float(self.module.logit_scale.exp())


class CmmdFeatures(ClipFeatures):
    """CLIP's features of the centre square at the model's size by PIL's bicubic, as CMMD's code takes them."""

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
    """The embedding whose squared distances are LPIPS; its size depends on the images'."""

    name = "lpips"

    def __init__(self, options: FeatureOptions):
        file = options.lpips_weights or downloaded(TRUNK_URLS[options.lpips_network], not options.no_download)
        network = LpipsNetwork(options.lpips_network)
        try:
            network.load_trunk(load_weights(file))
        except LOADING_ERRORS as error:
            reason = " ".join(str(error).split())[:200]
            kind = options.lpips_network
            raise UserError(f"--lpips_weights {file} is no weight file of torchvision's {kind}: {reason}") from error
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
    """What to raise for a model that can't be loaded: a local one was meant, one of the Hub may be out of reach."""
    if Path(model).is_dir():
        return UserError(f"--{flag} {model} can't be loaded: {first_line(error)}")
    if is_local:
        return NotComputable(f"{model} is not here, and --no_download leaves it there; --{flag} FOLDER gives another")
    return NotComputable(
        f"{model} is not here and was not found on the Hub ({first_line(error)}); give --{flag} FOLDER"
    )


def _pretrained(
    model_class: type,
    flag: str,
    model: str,
    is_local: bool,
    reads: Callable[[nn.Module], Tensor] | None = None,
) -> nn.Module:
    """A model of transformers from a folder or the Hub, in float32, of whose weights none that is read is missing."""
    weights = {"use_safetensors": True, "local_files_only": is_local}
    try:
        return frozen(load_module(model_class, model, f"--{flag} {model}", flag, torch.float32, reads, **weights))
    except UserError as error:
        if error.__cause__ is None:  # it was loaded, and its weights are another kind of model's
            raise
        raise _not_loaded(flag, model, error.__cause__, is_local) from error


def load_own_network(file: str) -> Network:
    """The network in the file that `--feature_module` names.

    Raises:
        UserError: if the file can't be run, or holds not one subclass of `Network` that takes no arguments.
    """
    kind = load_class("feature_module", file, Network)
    with running("feature_module", file):
        network = kind()
        network.freeze()
    return network


def check_repeats(network: Network, flag: str) -> None:
    """Refuses a network whose features of an image depend on the images beside it, or change when it is asked again.

    Raises:
        UserError: naming the flag.
    """
    generator = np.random.default_rng(0)
    levels = (64, 256)  # images of different brightness: statistics of a batch must show
    images = [Image.fromarray(generator.integers(0, level, (64, 64, 3), dtype=np.uint8)) for level in levels]
    pictures = [Picture(f"noise {number}", lambda image=image: image) for number, image in enumerate(images)]
    device = next((each.device for each in network.module.parameters()), torch.device("cpu"))
    before = {name: each.clone() for name, each in network.module.named_buffers()}
    try:
        together, again = network(pictures, device), network(pictures, device)
        alone = np.concatenate([network([picture], device) for picture in pictures])
    except Failed:  # of noise; whether the features of real images are finite is seen when they are computed
        return
    if any(not torch.equal(before[name], each) for name, each in network.module.named_buffers() if name in before):
        raise UserError(f"--{flag}: the network changes its own buffers when it is run; it must not")
    scale = np.abs(together).max()
    if max(np.abs(together - again).max(), np.abs(together - alone).max()) > REPEATS_WITHIN * scale:
        raise UserError(
            f"--{flag}: the features of an image depend on the images beside it, or change when they are computed "
            "again; use no dropout and no statistics of the batch, which functions of torch.nn.functional may take"
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
        raise NotComputable(f"its model is not named; give --{flag}")
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
    """The networks of an evaluation, each loaded when it is first asked for; why one is not there is remembered too."""

    def __init__(self, options: FeatureOptions, device: torch.device, table: dict[str, Callable] | None = None):
        self.options = options
        self.device = device
        self._table = NETWORKS if table is None else table
        self._loaded: dict[str, Network] = {}
        self._missing: dict[str, str] = {}

    def get(self, name: str) -> Any:
        """The network of a name in `NETWORKS`, on the device.

        Raises:
            NotComputable: if its weights can't be had.
            UserError: if weights that were named are not of this network.
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
        """Moves all networks to the CPU, to leave the device to what draws."""
        for network in self._loaded.values():
            network.module.to("cpu")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
