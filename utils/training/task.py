"""What a run trains: a pipeline's family, which of its weights, and the loss of a batch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

from torch import nn

from utils.diffusion.noise import ForwardProcess
from utils.models.base import Family
from utils.models.loss_terms import LossTerm, TermFacts, load_term
from utils.models.perceptual_loss import PerceptualLoss
from utils.training.adaptation import Adaptation
from utils.training.learning_rates import LearningRates
from utils.training.objective import Objective
from utils.training.optimizers import NamedParameter
from utils.training.options import TrainingOptions
from utils.training.session import Session


@dataclass(frozen=True)
class Task:
    """A pipeline, the weights of it that train, and the loss they are trained on.

    Attributes:
        family: the pipeline with what its kind computes.
        adaptation: which weights train, and how they are saved.
        process: adds noise to an image and says what is predicted.
        objective: maps an encoded batch to the losses of its samples.
        own_parameters: what loss terms train themselves.
        trains_text_encoders: whether text states are computed in each step.
        origin: what is trained from, in words.
        method: how it is trained, in words.
        structure: what the model adds to that which a checkpoint can only be resumed with, by flag.
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
        """Prepares the pipeline as the options ask, and adds loss terms.

        Args:
            origin, method: as of the attributes.

        Raises:
            UserError: for rates of weights that are not there, and loss terms that can't be made.
        """
        family = adaptation.family
        family.use_attention()
        family.save_memory()
        if options.speed.channels_last:
            family.use_channels_last(vae=not options.cache.cache_latents)
        terms = _loss_terms(options, family, process)
        adaptation.named_parameters(rates.optimizer)  # refuses --layer_rates of no weight, in a dry run too
        own = _own_parameters(options, terms, rates)
        objective = Objective(family, adaptation.modules, process, options.noise, options.loss, terms)
        trains_text = options.adaptation.train_text_encoder
        return cls(family, adaptation, process, objective, own, trains_text, origin, method)

    @property
    def terms(self) -> list[LossTerm]:
        """What is added to the loss of the prediction."""
        return list(self.objective.terms)

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """The modules that train, by name."""
        return self.adaptation.modules

    def move_to_device(self, options: TrainingOptions, session: Session) -> None:
        """Moves the pipeline and the loss terms to the device, and checkpoints activations where that is asked for."""
        for part in (self.family, *self.terms):
            part.to(session.device)
        if options.model.gradient_checkpointing or session.engine.checkpoints_activations:
            vae = bool(self.terms) and bool(self.family.coder_names)
            self.family.use_gradient_checkpointing(self.trains_text_encoders, vae=vae)


def _loss_terms(options: TrainingOptions, family: Family, process: ForwardProcess) -> list[LossTerm]:
    """What is added to the loss, as the options ask."""
    space = family.latent_space
    facts = TermFacts(space.channels, process.num_timesteps, space.decode)
    terms: list[LossTerm] = []
    if options.perceptual.perceptual_weight is not None:
        terms.append(PerceptualLoss(facts, options.perceptual))
    if options.term.loss_module is not None:
        terms.append(load_term(options.term, facts))
    return terms


def _own_parameters(options: TrainingOptions, terms: Sequence[LossTerm], rates: LearningRates) -> list[NamedParameter]:
    """What the terms themselves train."""
    own_rate = options.term.loss_module_lr
    rate = rates.optimizer.learning_rate if own_rate is None else own_rate * rates.scale
    return [
        NamedParameter(f"loss_module.{name}", parameter, rate)
        for term in terms
        for name, parameter in term.named_parameters()
        if parameter.requires_grad
    ]
