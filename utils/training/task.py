"""The task of a run: a pipeline, which of its weights train, and the loss of a batch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

from torch import nn

from utils.diffusion.noise import ForwardProcess
from utils.models.base import Family
from utils.models.loss_terms import LossTerm, TermFacts, load_term
from utils.models.perceptual_loss import PerceptualLoss
from utils.training.adaptation import Adaptation
from utils.training.exporting import check_export
from utils.training.learning_rates import LearningRates
from utils.training.objective import Objective
from utils.training.optimizers import NamedParameter
from utils.training.options import TrainingOptions
from utils.training.session import Session


@dataclass(frozen=True)
class Task:
    """A pipeline, which of its weights train, and the loss they are trained on.

    Attributes:
        family: the pipeline and how its kind encodes and predicts.
        adaptation: which weights train, and how they are saved.
        process: the forward process: how noise is added, and the prediction type.
        objective: maps an encoded batch to the losses of its samples.
        own_parameters: trained parameters of loss terms.
        trains_text_encoders: whether the text encoders train, so that text states are computed in each step.
        origin: description of the initial weights.
        method: description of how they train.
        structure: settings of the model that must equal the checkpoint's, by flag.
    """

    family: Family
    adaptation: Adaptation
    process: ForwardProcess
    objective: Objective
    own_parameters: list[NamedParameter]
    trains_text_encoders: bool
    origin: str
    method: str
    structure: Mapping[str, object] = field(default_factory=dict)

    @classmethod
    def define(
        cls,
        options: TrainingOptions,
        adaptation: Adaptation,
        process: ForwardProcess,
        rates: LearningRates,
        origin: str,
        method: str,
    ) -> Self:
        """Prepares the pipeline according to the options, and builds the loss with its terms.

        Args:
            origin, method: see the attributes.

        Raises:
            UserError: for --layer_rates that match no weight, loss terms that can't be built, or a single file of a
                pipeline that has none.
        """
        family = adaptation.family
        check_export(options.export, family)
        family.use_attention()
        family.save_memory()
        if options.speed.channels_last:
            family.use_channels_last(vae=not options.cache.cache_latents)
        terms = _loss_terms(options, family, process)
        adaptation.named_parameters(rates.optimizer)  # refuses --layer_rates that match no weight, also in a dry run
        own = _own_parameters(options, terms, rates)
        objective = Objective(family, adaptation.modules, process, options.noise, options.loss, terms)
        trains_text = options.adaptation.train_text_encoder
        return cls(family, adaptation, process, objective, own, trains_text, origin, method)

    @property
    def terms(self) -> list[LossTerm]:
        """The terms added to the loss of the prediction."""
        return list(self.objective.terms)

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """The modules that train, by name."""
        return self.adaptation.modules

    def move_to_device(self, options: TrainingOptions, session: Session) -> None:
        """Moves the pipeline and loss terms to the device, and turns on gradient checkpointing if requested."""
        for part in (self.family, *self.terms):
            part.to(session.device)
        if options.model.gradient_checkpointing or session.engine.checkpoints_activations:
            vae = bool(self.terms) and bool(self.family.coder_names)
            self.family.use_gradient_checkpointing(self.trains_text_encoders, vae=vae)


def _loss_terms(options: TrainingOptions, family: Family, process: ForwardProcess) -> list[LossTerm]:
    """Builds the loss terms that the options request."""
    space = family.latent_space
    facts = TermFacts(space.channels, process.num_timesteps, space.decode)
    terms: list[LossTerm] = []
    if options.perceptual.perceptual_weight is not None:
        terms.append(PerceptualLoss(facts, options.perceptual))
    if options.term.loss_module is not None:
        terms.append(load_term(options.term, facts))
    return terms


def _own_parameters(options: TrainingOptions, terms: Sequence[LossTerm], rates: LearningRates) -> list[NamedParameter]:
    """Returns the trained parameters of the loss terms."""
    own_rate = options.term.loss_module_lr
    rate = rates.optimizer.learning_rate if own_rate is None else own_rate * rates.scale
    return [
        NamedParameter(f"loss_module.{name}", parameter, rate)
        for term in terms
        for name, parameter in term.named_parameters()
        if parameter.requires_grad
    ]
