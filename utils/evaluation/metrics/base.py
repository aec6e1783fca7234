"""What a metric is given, and the names that all of them use."""

from collections.abc import Sequence
from dataclasses import dataclass

from utils.evaluation.metrics.distances import NotComputable
from utils.evaluation.metrics.features import Network, Networks
from utils.evaluation.metrics.image_sets import Reference, Subject
from utils.evaluation.metrics.scores import Score
from utils.evaluation.options import ScoreOptions


@dataclass(frozen=True)
class Case:
    """Images to score, and what they are scored against.

    Attributes:
        reference: real images or their statistics; None without.
        training: the images that were trained on; None if they are not known.
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
        """The reference.

        Raises:
            NotComputable: if there is none.
        """
        if self.reference is None:
            raise NotComputable("it compares with real images; give --reference")
        return self.reference

    def reference_images(self) -> Subject:
        """The reference's images.

        Raises:
            NotComputable: if there is none, or statistics alone.
        """
        reference = self.needed_reference()
        if not isinstance(reference, Subject):
            raise NotComputable("it needs the reference's images, not their statistics")
        return reference

    def prompts(self) -> Sequence[str]:
        """The prompt of each image.

        Raises:
            NotComputable: if the images have none.
        """
        if self.subject.images.prompts is None:
            raise NotComputable("the images have no prompts")
        return self.subject.images.prompts

    def facts(self, name: str) -> dict[str, object]:
        """The network of a score and the images it was made of, as fields of `Score`."""
        network: Network = self.networks.get(name)
        return {"count": len(self.subject), "network": network.name, "weights": network.fingerprint}


Scores = list[Score]
