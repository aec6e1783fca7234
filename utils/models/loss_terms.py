"""Additional loss terms, including user-defined ones."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn
from torch.func import functional_call

from utils.config.batch import Predicted
from utils.config.options import UserError, first_line
from utils.config.user_code import load_class
from utils.models.options import TermOptions


@dataclass(frozen=True)
class TermFacts:
    """Facts about the run that a term may need when it is created.

    Attributes:
        latent_channels: C of the latents.
        num_timesteps: length of the noise schedule.
        decode: maps latents [B, C, h, w] to images [B, 3, H, W], roughly in [-1, 1]; gradients flow through it.
    """

    latent_channels: int
    num_timesteps: int
    decode: Callable[[Tensor], Tensor]


class LossTerm(nn.Module, ABC):
    """A term added to the loss of each sample.

    A term may have its own parameters, such as a discriminator's. They are trained by `own_losses` only, in the same
    backward pass and by the same optimizer, and are saved in checkpoints. A file given as `--loss_module` defines one
    subclass, which is created with the facts and the arguments of `--loss_module_args`.
    """

    def __init__(self, facts: TermFacts):
        super().__init__()

    def train(self, mode: bool = True) -> "LossTerm":
        """Puts trainable modules in training mode; frozen networks within the term stay in evaluation mode."""
        super().train(mode)
        for module in self.children():
            _rest_what_is_frozen(module)
        return self

    @abstractmethod
    def forward(self, predicted: Predicted) -> Tensor:
        """Returns [B] values added to the losses, already weighted. They do not train the term's own parameters."""

    def own_losses(self, predicted: Predicted) -> Tensor | None:
        """Returns [B] losses of the term's own parameters, or None; they do not train the model."""
        return None


def _rest_what_is_frozen(module: nn.Module) -> None:
    """Puts frozen modules in evaluation mode, unless they are layers of a module that is trained."""
    if not any(each.requires_grad for each in module.parameters()):
        module.eval()
        return
    for child in module.children():
        if any(True for _ in child.parameters()):
            _rest_what_is_frozen(child)


def load_term(options: TermOptions, facts: TermFacts) -> LossTerm:
    """Creates the term defined in the file of `--loss_module`.

    Raises:
        UserError: if the file can't be run, does not define one subclass of `LossTerm`, or rejects its arguments.
    """
    kind = load_class("loss_module", options.loss_module, LossTerm)
    if inspect.isabstract(kind):
        raise UserError(f"--loss_module {options.loss_module}: its {kind.__name__} must define forward")
    try:
        return kind(facts, **options.arguments).train()
    except (TypeError, ValueError, RuntimeError) as error:
        message = f"--loss_module {options.loss_module} with --loss_module_args: {first_line(error)}"
        raise UserError(message) from error


def added_losses(term: LossTerm, predicted: Predicted) -> Tensor:
    """Returns [B] values that a term adds to the losses. Its own losses add a gradient but no value."""
    # copied: with --optimizer_in_backward weights change during the backward pass that still needs them
    frozen = {name: each.detach().clone() for name, each in term.named_parameters() if each.requires_grad}
    losses = functional_call(term, frozen, (predicted,)) if frozen else term(predicted)
    own = term.own_losses(predicted.detached()) if frozen else None
    for found in (losses, own):
        if found is not None and found.shape != predicted.latents.shape[:1]:
            name, wanted = type(term).__name__, len(predicted.latents)
            raise UserError(f"{name} must return one loss per sample, [{wanted}], it returned {list(found.shape)}")
    return losses if own is None else losses + (own - own.detach())
