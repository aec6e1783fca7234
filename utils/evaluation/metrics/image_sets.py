"""Sets of images and what networks see in them; each feature is computed once, spread over the processes."""

import json
import logging
import signal
import struct
import zipfile
import zlib
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch

from utils.config.options import Stopped, UserError, first_line
from utils.config.tensor_files import read_arrays
from utils.config.terminal import progress_bar
from utils.config.user_files import CONFIG_LIMIT, FileError, parse_json
from utils.evaluation.metrics.distances import Failed, Moments, NotComputable, PairSums, as_features, moments
from utils.evaluation.metrics.features import DIFFERENT_SIZES, Network, Networks, Picture
from utils.runtime.atomic_files import replacing
from utils.runtime.memory import is_out_of_memory
from utils.runtime.stop_requests import StopRequests

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)
Result = TypeVar("Result")
SYMMETRY = 1e-6
POSITIVITY = 1e-6
STATISTICS_VERSION = 2  # 1: colours were not converted to sRGB
BROKEN_ARCHIVE = (  # what zipfile, zlib and numpy's parser of headers may raise of bytes that are damaged
    *(OSError, ValueError, KeyError, EOFError, TypeError, AttributeError, ArithmeticError, NotImplementedError),
    *(SyntaxError, MemoryError, RuntimeError, zipfile.BadZipFile, zlib.error, struct.error),
)


@dataclass(frozen=True)
class ImageSet:
    """Images to score.

    Attributes:
        pictures: in an order that does not depend on how they were made.
        prompts: the text of each image; None without texts.
        clusters: [N] the number of the prompt of each image.
        samples: [N] which of its prompt's images each one is.
        fingerprint: of what the images are.
    """

    pictures: Sequence[Picture]
    prompts: Sequence[str] | None
    clusters: np.ndarray
    samples: np.ndarray
    fingerprint: str = ""

    def __len__(self) -> int:
        return len(self.pictures)

    def is_like(self, other: "ImageSet") -> bool:
        """Whether image n of both is of the same prompt, and the same one of its images."""
        if len(self) != len(other) or list(self.prompts or ()) != list(other.prompts or ()):
            return False
        return bool((self.clusters == other.clusters).all() and (self.samples == other.samples).all())


class Interrupted(NotComputable):
    """A signal broke the computation off."""


class Workers:
    """The processes among which images are spread, and how many of them a network takes at once."""

    def __init__(self, accelerator: "Accelerator | None", batch_size: int, requests: StopRequests | None = None):
        self._accelerator = accelerator
        self.batch_size = batch_size
        self._requests = requests

    @property
    def _count(self) -> int:
        return 1 if self._accelerator is None else self._accelerator.num_processes

    def mine(self, items: Sequence) -> Sequence:
        """This process's share: a run of neighbours."""
        if self._accelerator is None:
            return items
        rank, count = self._accelerator.process_index, self._accelerator.num_processes
        return items[len(items) * rank // count : len(items) * (rank + 1) // count]

    def gather(self, result: object, error: NotComputable | None) -> list:
        """The results of all processes, in their order.

        Raises:
            NotComputable: on all, if one of them met it.
            Stopped: on all, if a signal to one of them broke it off.
        """
        if self._count == 1:
            if isinstance(error, Interrupted):
                raise self._stopped(error)
            if error is not None:
                raise error
            return [result]
        from accelerate.utils import gather_object

        found = gather_object([(result, None if error is None else (type(error), str(error)))])
        raised = next((raised for _, raised in found if raised is not None), None)
        if raised is not None and raised[0] is Interrupted:
            raise self._stopped(Interrupted(raised[1]))
        if raised is not None:
            raise raised[0](raised[1])
        return [each for each, _ in found]

    def run(self, name: str, compute: Callable[[], Result]) -> list[Result]:
        """What all processes compute with a network of that name, in their order.

        Raises:
            NotComputable, Stopped: as `gather` does.
        """
        result = error = None
        try:
            result = compute()
        except NotComputable as raised:
            error = raised
        except RuntimeError as raised:  # such as out of memory: the other processes must not wait for this one
            error = Failed(f"{name}: {first_line(raised)}")
        return self.gather(result, error)

    def _stopped(self, error: Interrupted) -> Stopped:
        return Stopped("stopped while scores were computed; the same command continues", int(str(error)))

    def batches(self, items: Sequence, label: str) -> Generator[Sequence, None, None]:
        """Batches of items, with a progress bar on the main process."""
        is_main = self._accelerator is None or self._accelerator.is_main_process
        with progress_bar(total=len(items), desc=label, unit="image", disable=not is_main, leave=False) as bar:
            for start in range(0, len(items), self.batch_size):
                if self._requests is not None and self._requests.is_asked:
                    raise Interrupted(str(self._requests.number or int(signal.SIGTERM)))
                yield items[start : start + self.batch_size]
                bar.update(len(items[start : start + self.batch_size]))


def in_pieces(network: Network, batch: Sequence[Picture], device: torch.device) -> np.ndarray:
    """[B, d] the network's features; of one half after the other where memory is short."""
    try:
        return network(batch, device)
    except (RuntimeError, MemoryError) as error:
        if len(batch) == 1 or not is_out_of_memory(error):
            raise
    if device.type == "cuda":
        torch.cuda.empty_cache()
    middle = len(batch) // 2
    return np.concatenate([in_pieces(network, part, device) for part in (batch[:middle], batch[middle:])])


class Subject:
    """A set of images, and features of them, which are computed when they are first asked for."""

    def __init__(self, images: ImageSet, networks: Networks, workers: Workers):
        self.images = images
        self.networks = networks
        self.workers = workers
        self._features: dict[str, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.images)

    def features(self, name: str) -> np.ndarray:
        """[N, d] of a network of `NETWORKS`.

        Raises:
            NotComputable: if the network is not there, or an image's features are not finite.
        """
        if name not in self._features:
            network = self.networks.get(name)
            parts = self.workers.run(network.name, partial(self._own_features, network))
            self._features[name] = np.concatenate([part for part in parts if part is not None])
        return self._features[name]

    def _own_features(self, network: Network) -> np.ndarray | None:
        """[n, d] of this process's share; None of no images."""
        mine = self.workers.mine(self.images.pictures)
        with closing(self.workers.batches(mine, f"{network.name} features")) as batches:  # the bar too, on an error
            rows = [in_pieces(network, batch, self.networks.device) for batch in batches]
        return np.concatenate(rows) if rows else None

    def moments(self, name: str) -> Moments:
        """Mean and covariance of a network's features."""
        return moments(self.features(name))

    def pair_sums(self, name: str) -> tuple[PairSums, np.ndarray, np.ndarray]:
        """(sums over all embeddings, mean distance of the pairs of each prompt that has pairs, those prompts' numbers).

        Embeddings are summed up as they come: they may be too large to keep.
        """
        network = self.networks.get(name)
        by_prompt: dict[int, list[Picture]] = {}
        for picture, cluster in zip(self.images.pictures, self.images.clusters.tolist(), strict=True):
            by_prompt.setdefault(cluster, []).append(picture)
        own = self.workers.mine(list(by_prompt.items()))
        found = self.workers.run(network.name, partial(self._sum_pairs, network, own))
        parts = [part for part in found if part[0] is not None]
        if not parts:
            raise NotComputable("there are no images")
        if len({len(total.vector) for total, _ in parts}) > 1:
            raise NotComputable(DIFFERENT_SIZES)
        total = parts[0][0]
        for other, _ in parts[1:]:
            total = total + other
        means = [pair for _, some in parts for pair in some]
        return total, np.array([mean for _, mean in means]), np.array([cluster for cluster, _ in means], int)

    def _sum_pairs(
        self, network: Network, prompts: Sequence[tuple[int, list[Picture]]]
    ) -> tuple[PairSums | None, list[tuple[int, float]]]:
        total, means = None, []
        flat = [(cluster, picture) for cluster, pictures in prompts for picture in pictures]
        open_cluster, open_sums = None, None
        for batch in self.workers.batches(flat, f"{network.name} features"):
            embeddings = in_pieces(network, [picture for _, picture in batch], self.networks.device)
            if total is not None and embeddings.shape[1] != len(total.vector):
                raise NotComputable(DIFFERENT_SIZES)
            for (cluster, _), embedding in zip(batch, embeddings, strict=True):
                sums = PairSums.of(embedding[None])
                total = sums if total is None else total + sums
                if cluster == open_cluster:
                    open_sums = open_sums + sums
                    continue
                if open_sums is not None and open_sums.count > 1:
                    means.append((open_cluster, open_sums.mean_distance))
                open_cluster, open_sums = cluster, sums
        if open_sums is not None and open_sums.count > 1:
            means.append((open_cluster, open_sums.mean_distance))
        return total, means


class Statistics:
    """Kept statistics of a reference under one network: what pytorch-fid and clean-fid read, and more where it is ours.

    Attributes:
        network: the name in `NETWORKS` that it is of.
    """

    def __init__(self, found: Moments, rows: np.ndarray | None, facts: dict[str, object] | None, source: str):
        self.network = "main"
        self._moments = found
        self._rows = rows
        self.facts = facts
        self.source = source

    def __len__(self) -> int:
        return self._moments.count

    @staticmethod
    def read(path: Path) -> "Statistics":
        """Reads an `.npz` file, of which nothing is unpickled.

        Raises:
            UserError: if it is no file of statistics, or one that can't be right.
        """
        flag = f"--reference {path}"
        try:
            found = read_arrays(path, ("mu", "sigma", "n", "feats", "fingerprint"))
        except BROKEN_ARCHIVE as error:
            raise UserError(f"{flag} can't be read as statistics: {first_line(error)}") from error
        mean, covariance = _mean_and_covariance(found, flag)
        rows = _features_of(found, flag, len(mean))
        count = 0 if rows is None else len(rows)
        if "n" in found:
            count = _whole_number(found["n"])
            if count is None:
                raise UserError(f"{flag}: n must be the number of images, got {first_line(ValueError(found['n']))}")
        return Statistics(Moments(mean, covariance, count), rows, _fingerprint_in(found, flag), str(path))

    def check(self, network: Network, num_features: int | None, may_differ: bool) -> None:
        """Refuses statistics of another network or preparation.

        Args:
            num_features: those of the network, where they are known.

        Raises:
            UserError: naming what differs.
        """
        d = len(self._moments.mean)
        if num_features is not None and d != num_features:
            raise UserError(
                f"--reference {self.source} has {d} features, the network {network.name} has {num_features}"
            )
        if self.facts is None:
            logger.warning(
                "--reference %s does not say which network and preparation it is of; it is taken for %s",
                self.source,
                network.settings,
            )
            return
        if self.facts.get("version") == 1:
            logger.warning(
                "--reference %s is from before colours were converted to sRGB; if its images have colour profiles "
                "of another space (Adobe RGB, Display P3), make it again from them",
                self.source,
            )
        ours = network_facts(network)
        differing = [name for name, value in ours.items() if self.facts.get(name) != value]
        if differing and not may_differ:
            name = differing[0]
            raise UserError(
                f"--reference {self.source} was made with another {name}: {self.facts.get(name)}, not {ours[name]}; "
                "make it anew from the images, or give --allow_stats_mismatch"
            )
        if differing:
            logger.warning("--reference %s was made with another %s", self.source, ", ".join(differing))

    def moments(self, name: str) -> Moments:
        """Mean and covariance."""
        self._check_name(name)
        return self._moments

    def features(self, name: str) -> np.ndarray:
        """[M, d] the features, where the file has them."""
        self._check_name(name)
        if self._rows is None:
            raise NotComputable(f"{self.source} holds mu and sigma alone; give the reference's images")
        return self._rows

    def _check_name(self, name: str) -> None:
        if name != self.network:
            raise NotComputable(f"{self.source} holds statistics of one network; give the reference's images")


def _mean_and_covariance(found: Mapping[str, np.ndarray], flag: str) -> tuple[np.ndarray, np.ndarray]:
    """([d], [d, d]) float64 of statistics.

    Raises:
        UserError: if they can't be a mean and a covariance.
    """
    absent = [name for name in ("mu", "sigma") if name not in found]
    if absent:
        raise UserError(f"{flag} holds no {absent[0]}; statistics have mu [d] and sigma [d, d]")
    mean, covariance = np.asarray(found["mu"]), np.asarray(found["sigma"])
    if mean.dtype.kind not in "fiu" or covariance.dtype.kind not in "fiu":
        raise UserError(f"{flag}: mu and sigma must be numbers")
    mean, covariance = mean.astype(np.float64), covariance.astype(np.float64)
    if not mean.size:
        raise UserError(f"{flag} holds statistics of no feature: mu is empty")
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise UserError(f"{flag}: mu {list(mean.shape)} and sigma {list(covariance.shape)} must be [d] and [d, d]")
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise UserError(f"{flag} holds numbers that are not finite")
    tolerance = SYMMETRY * max(np.abs(covariance).max(), 1e-12)
    if not np.allclose(covariance, covariance.T, rtol=SYMMETRY, atol=tolerance):
        raise UserError(f"{flag}: sigma is not symmetric, so it is no covariance")
    if (np.diag(covariance) < 0).any():
        raise UserError(f"{flag}: sigma has a negative variance, so it is no covariance")
    if not _is_positive(covariance):
        raise UserError(f"{flag}: sigma has a negative eigenvalue, so it is no covariance")
    return mean, covariance


def _features_of(found: Mapping[str, np.ndarray], flag: str, num_features: int) -> np.ndarray | None:
    """[n, d] the features of each image, where the file holds them."""
    if found.get("feats") is None:
        return None
    try:
        rows = as_features(found["feats"], 1)
    except (NotComputable, ValueError, TypeError) as error:
        raise UserError(f"{flag}: feats: {first_line(error)}") from error
    if rows.shape[1] != num_features:
        raise UserError(f"{flag}: feats have {rows.shape[1]} features, mu has {num_features}")
    return rows


def _fingerprint_in(found: Mapping[str, np.ndarray], flag: str) -> dict[str, object] | None:
    """Which network and preparation the statistics are of, where the file says it."""
    if "fingerprint" not in found:
        return None
    try:
        facts = parse_json(str(found["fingerprint"])[:CONFIG_LIMIT], flag)
    except FileError as error:
        raise UserError(f"{flag}: its fingerprint {error.reason}") from error
    if not isinstance(facts, dict):
        raise UserError(f"{flag}: its fingerprint must be a JSON object, got a {type(facts).__name__}")
    return facts


def _is_positive(covariance: np.ndarray) -> bool:
    """Whether a symmetric matrix [d, d] has no eigenvalue that is more negative than rounding makes it."""
    eigenvalues = np.linalg.eigvalsh(covariance)
    return bool(eigenvalues[0] >= -POSITIVITY * abs(eigenvalues[-1]))  # also false of NaN


def _whole_number(found: np.ndarray) -> int | None:
    """The whole number of 0 or more that an array of one element is; None of others."""
    if found.size != 1 or found.dtype.kind not in "fiu":
        return None
    value = found.item()
    return int(value) if 0 <= value < 2**63 and value == int(value) else None


def network_facts(network: Network) -> dict[str, str]:
    """What statistics depend on of a network."""
    return {"network": network.name, "settings": network.settings, "weights": network.fingerprint}


def write_statistics(path: Path, subject: Subject, name: str) -> None:
    """Keeps a set's statistics under a network: `mu`, `sigma`, `n`, `feats` and a fingerprint as JSON.

    Raises:
        UserError: if the file can't be written.
    """
    network, rows = subject.networks.get(name), subject.features(name)
    found = moments(rows)
    facts = network_facts(network) | {"images": subject.images.fingerprint, "version": STATISTICS_VERSION}
    arrays = {
        "mu": found.mean,
        "sigma": found.covariance,
        "n": np.int64(found.count),
        "feats": rows.astype(np.float32),
        "fingerprint": np.array(json.dumps(facts)),
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as aside, aside.open("wb") as file:
            np.savez(file, **arrays)
    except OSError as error:
        raise UserError(f"--save_reference {path} can't be written: {error.strerror or error}") from error


Reference = Subject | Statistics
