"""Sets of images and their features; features are computed once, distributed over the processes."""

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
BROKEN_ARCHIVE = (  # what zipfile, zlib and numpy's header parser may raise for a damaged file
    *(OSError, ValueError, KeyError, EOFError, TypeError, AttributeError, ArithmeticError, NotImplementedError),
    *(SyntaxError, MemoryError, RuntimeError, zipfile.BadZipFile, zlib.error, struct.error),
)


@dataclass(frozen=True)
class ImageSet:
    """Images to score.

    Attributes:
        pictures: the images, in an order that does not depend on how they were drawn.
        prompts: the prompt of each image; None if they have none.
        clusters: [N], the number of the prompt of each image.
        samples: [N], the number of each image among those of its prompt.
        fingerprint: a hash of the images' content; empty if unknown.
    """

    pictures: Sequence[Picture]
    prompts: Sequence[str] | None
    clusters: np.ndarray
    samples: np.ndarray
    fingerprint: str = ""

    def __len__(self) -> int:
        return len(self.pictures)

    def is_like(self, other: "ImageSet") -> bool:
        """Whether image n of both sets has the same prompt and the same sample number."""
        if len(self) != len(other) or list(self.prompts or ()) != list(other.prompts or ()):
            return False
        return bool((self.clusters == other.clusters).all() and (self.samples == other.samples).all())


class Interrupted(NotComputable):
    """A signal interrupted the computation; the message is its number."""


class Workers:
    """Distributes images over the processes, in batches."""

    def __init__(self, accelerator: "Accelerator | None", batch_size: int, requests: StopRequests | None = None):
        self._accelerator = accelerator
        self.batch_size = batch_size
        self._requests = requests

    @property
    def _count(self) -> int:
        return 1 if self._accelerator is None else self._accelerator.num_processes

    def mine(self, items: Sequence) -> Sequence:
        """Returns this process's share: consecutive items."""
        if self._accelerator is None:
            return items
        rank, count = self._accelerator.process_index, self._accelerator.num_processes
        return items[len(items) * rank // count : len(items) * (rank + 1) // count]

    def gather(self, result: object, error: NotComputable | None) -> list:
        """Returns the results of all processes, in order of rank. All processes must call it.

        Raises:
            NotComputable: on all processes, if one of them raised it.
            Stopped: on all processes, if a signal interrupted one of them.
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
        """Runs `compute` on all processes and returns their results, in order of rank.

        Args:
            name: the name of the network, for error messages.

        Raises:
            NotComputable, Stopped: as `gather`.
        """
        result = error = None
        try:
            result = compute()
        except NotComputable as raised:
            error = raised
        except RuntimeError as raised:  # such as out of memory: the other processes must not wait forever
            error = Failed(f"{name}: {first_line(raised)}")
        return self.gather(result, error)

    def _stopped(self, error: Interrupted) -> Stopped:
        return Stopped("stopped while computing scores; run the same command to continue", int(str(error)))

    def batches(self, items: Sequence, label: str) -> Generator[Sequence, None, None]:
        """Yields batches of items, with a progress bar on the main process.

        Raises:
            Interrupted: if a signal arrives.
        """
        is_main = self._accelerator is None or self._accelerator.is_main_process
        with progress_bar(total=len(items), desc=label, unit="image", disable=not is_main, leave=False) as bar:
            for start in range(0, len(items), self.batch_size):
                if self._requests is not None and self._requests.is_asked:
                    raise Interrupted(str(self._requests.number or int(signal.SIGTERM)))
                yield items[start : start + self.batch_size]
                bar.update(len(items[start : start + self.batch_size]))


def in_pieces(network: Network, batch: Sequence[Picture], device: torch.device) -> np.ndarray:
    """Returns the network's features [B, d]; halves the batch if it runs out of memory."""
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
    """A set of images with their features, which are computed at their first use."""

    def __init__(self, images: ImageSet, networks: Networks, workers: Workers):
        self.images = images
        self.networks = networks
        self.workers = workers
        self._features: dict[str, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.images)

    def features(self, name: str) -> np.ndarray:
        """Returns the features [N, d] of a network, by its name in `NETWORKS`.

        Raises:
            NotComputable: if the network is not available, or features of an image are not finite.
        """
        if name not in self._features:
            network = self.networks.get(name)
            parts = self.workers.run(network.name, partial(self._own_features, network))
            self._features[name] = np.concatenate([part for part in parts if part is not None])
        return self._features[name]

    def _own_features(self, network: Network) -> np.ndarray | None:
        """The features [n, d] of this process's share; None if it has no images."""
        mine = self.workers.mine(self.images.pictures)
        with closing(self.workers.batches(mine, f"{network.name} features")) as batches:  # closes the bar on errors
            rows = [in_pieces(network, batch, self.networks.device) for batch in batches]
        return np.concatenate(rows) if rows else None

    def moments(self, name: str) -> Moments:
        """Returns mean and covariance of a network's features."""
        return moments(self.features(name))

    def pair_sums(self, name: str) -> tuple[PairSums, np.ndarray, np.ndarray]:
        """Returns (sums over all embeddings, mean pair distance of each prompt with pairs, numbers of those prompts).

        Embeddings are added to sums as they are computed: they may be too large to keep.
        """
        # Each process takes whole prompts.
        network = self.networks.get(name)
        by_prompt: dict[int, list[Picture]] = {}
        for picture, cluster in zip(self.images.pictures, self.images.clusters.tolist(), strict=True):
            by_prompt.setdefault(cluster, []).append(picture)
        own = self.workers.mine(list(by_prompt.items()))
        found = self.workers.run(network.name, partial(self._sum_pairs, network, own))

        # Add up the sums of all processes.
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
        """(sums over all embeddings or None, [(prompt number, mean pair distance)]) of this process's prompts."""
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
    """Saved reference statistics for one network: the format of pytorch-fid and clean-fid, with optional extra fields.

    Attributes:
        network: the name of the network in `NETWORKS`.
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
        """Reads an `.npz` file without unpickling.

        Raises:
            UserError: if it is not a file of statistics, or its values are impossible.
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
        """Checks that the statistics are of this network and preprocessing.

        Args:
            num_features: the number of features of the network; None if unknown.
            may_differ: warn about a difference instead of raising.

        Raises:
            UserError: naming what differs.
        """
        # The number of features, which can always be compared.
        d = len(self._moments.mean)
        if num_features is not None and d != num_features:
            raise UserError(
                f"--reference {self.source} has {d} features, but the network {network.name} has {num_features}; give "
                "statistics of that network"
            )

        # What the file says about its network; files of other programs say nothing.
        if self.facts is None:
            logger.warning(
                "--reference %s does not say which network and preprocessing it is for; assuming %s",
                self.source,
                network.settings,
            )
            return
        if self.facts.get("version") == 1:
            logger.warning(
                "--reference %s was saved by a version that did not convert colours to sRGB; if its images have other "
                "colour profiles (Adobe RGB, Display P3), create it again from the images",
                self.source,
            )
        ours = network_facts(network)
        differing = [name for name, value in ours.items() if self.facts.get(name) != value]
        if differing and not may_differ:
            name = differing[0]
            raise UserError(
                f"--reference {self.source} was created with other {name}: {self.facts.get(name)}, not {ours[name]}; "
                "create it again from the images, or give --allow_stats_mismatch"
            )
        if differing:
            logger.warning("--reference %s was created with other %s", self.source, ", ".join(differing))

    def moments(self, name: str) -> Moments:
        """Returns mean and covariance."""
        self._check_name(name)
        return self._moments

    def features(self, name: str) -> np.ndarray:
        """Returns the features [M, d].

        Raises:
            NotComputable: if the file has none.
        """
        self._check_name(name)
        if self._rows is None:
            raise NotComputable(f"{self.source} has only mu and sigma; give --reference the images")
        return self._rows

    def _check_name(self, name: str) -> None:
        if name != self.network:
            raise NotComputable(f"{self.source} has statistics of another network; give --reference the images")


def _mean_and_covariance(found: Mapping[str, np.ndarray], flag: str) -> tuple[np.ndarray, np.ndarray]:
    """(mean [d], covariance [d, d]) in float64.

    Raises:
        UserError: if they are not a mean and a covariance.
    """
    # Names, types and shapes.
    absent = [name for name in ("mu", "sigma") if name not in found]
    if absent:
        raise UserError(f"{flag} has no {absent[0]}; statistics need mu [d] and sigma [d, d]")
    mean, covariance = np.asarray(found["mu"]), np.asarray(found["sigma"])
    if mean.dtype.kind not in "fiu" or covariance.dtype.kind not in "fiu":
        raise UserError(f"{flag}: mu and sigma must be numbers")
    mean, covariance = mean.astype(np.float64), covariance.astype(np.float64)
    if not mean.size:
        raise UserError(f"{flag} has no features: mu is empty")
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise UserError(f"{flag}: mu {list(mean.shape)} and sigma {list(covariance.shape)} must be [d] and [d, d]")

    # A covariance is finite, symmetric and positive semidefinite.
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise UserError(f"{flag} has values that are not finite")
    tolerance = SYMMETRY * max(np.abs(covariance).max(), 1e-12)
    if not np.allclose(covariance, covariance.T, rtol=SYMMETRY, atol=tolerance):
        raise UserError(f"{flag}: sigma is not symmetric, so it is not a covariance")
    if (np.diag(covariance) < 0).any():
        raise UserError(f"{flag}: sigma has a negative variance, so it is not a covariance")
    if not _is_positive(covariance):
        raise UserError(f"{flag}: sigma has a negative eigenvalue, so it is not a covariance")
    return mean, covariance


def _features_of(found: Mapping[str, np.ndarray], flag: str, num_features: int) -> np.ndarray | None:
    """The features [n, d] of each image; None if the file has none."""
    if found.get("feats") is None:
        return None
    try:
        rows = as_features(found["feats"], 1)
    except (NotComputable, ValueError, TypeError) as error:
        raise UserError(f"{flag}: feats: {first_line(error)}") from error
    if rows.shape[1] != num_features:
        raise UserError(f"{flag}: feats has {rows.shape[1]} features, but mu has {num_features}")
    return rows


def _fingerprint_in(found: Mapping[str, np.ndarray], flag: str) -> dict[str, object] | None:
    """The network and preprocessing of the statistics; None if the file does not say."""
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
    """Whether a symmetric matrix [d, d] is positive semidefinite, up to rounding."""
    eigenvalues = np.linalg.eigvalsh(covariance)
    return bool(eigenvalues[0] >= -POSITIVITY * abs(eigenvalues[-1]))  # false for NaN


def _whole_number(found: np.ndarray) -> int | None:
    """The value of a one-element array if it is an integer of at least 0; else None."""
    if found.size != 1 or found.dtype.kind not in "fiu":
        return None
    value = found.item()
    return int(value) if 0 <= value < 2**63 and value == int(value) else None


def network_facts(network: Network) -> dict[str, str]:
    """Returns the properties of a network that statistics depend on."""
    return {"network": network.name, "settings": network.settings, "weights": network.fingerprint}


def write_statistics(path: Path, subject: Subject, name: str) -> None:
    """Writes the statistics of a set for a network: `mu`, `sigma`, `n`, `feats` and a fingerprint as JSON.

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
