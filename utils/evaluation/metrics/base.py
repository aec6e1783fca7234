"""The input of a metric: images to score, and what to compare them with."""

from collections.abc import Sequence
from dataclasses import dataclass

from utils.evaluation.metrics.distances import NotComputable
from utils.evaluation.metrics.features import Network, Networks
from utils.evaluation.metrics.image_sets import Reference, Subject
from utils.evaluation.metrics.scores import Score
from utils.evaluation.options import ScoreOptions


@dataclass(frozen=True)
class Case:
    """Images to score, and what to compare them with.

    Attributes:
        reference: real images or their statistics; None if not given.
        training: the training images; None if not given.
    """

    subject: Subject
    reference: Reference | None
    training: Subject | None
    options: ScoreOptions

    @property
    def networks(self) -> Networks:
        """The feature networks."""
        return self.subject.networks

    def needed_reference(self) -> Reference:
        """Returns the reference.

        Raises:
            NotComputable: if there is no reference.
        """
        if self.reference is None:
            raise NotComputable("it compares with real images; give --reference")
        return self.reference

    def reference_images(self) -> Subject:
        """Returns the images of the reference.

        Raises:
            NotComputable: if there is no reference, or only its statistics.
        """
        reference = self.needed_reference()
        if not isinstance(reference, Subject):
            raise NotComputable("it needs the reference's images, not their statistics")
        return reference

    def prompts(self) -> Sequence[str]:
        """Returns the prompt of each image.

        Raises:
            NotComputable: if the images have none.
        """
        if self.subject.images.prompts is None:
            raise NotComputable("the images have no prompts")
        return self.subject.images.prompts

    def facts(self, name: str) -> dict[str, object]:
        """Returns fields of `Score`: the number of images, and the network with its fingerprint."""
        network: Network = self.networks.get(name)
        return {"count": len(self.subject), "network": network.name, "weights": network.fingerprint}


Scores = list[Score]
