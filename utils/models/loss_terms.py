"""Further terms of the loss, of a user's own making too, with what they learn from."""

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
    """What a term may need to know when it is made.

    Attributes:
        latent_channels: C of the latents.
        num_timesteps: length of the noise schedule.
        decode: latents [B, C, h, w] to images [B, 3, H, W], about [-1, 1]; gradients flow through it.
    """

    latent_channels: int
    num_timesteps: int
    decode: Callable[[Tensor], Tensor]


class LossTerm(nn.Module, ABC):
    """What is added to the loss of each sample.

    A term may have parameters of its own, such as a discriminator's: they learn from `own_losses` alone, in the same
    backward pass and by the same optimizer, and are kept in the checkpoints. A file given as `--loss_module` holds one
    subclass, which is made with the facts and the words of `--loss_module_args`.
    """

    def __init__(self, facts: TermFacts):
        super().__init__()

    def train(self, mode: bool = True) -> "LossTerm":
        """Puts what learns in training mode; frozen networks within the term stay in evaluation mode."""
        super().train(mode)
        for module in self.children():
            _rest_what_is_frozen(module)
        return self

    @abstractmethod
    def forward(self, predicted: Predicted) -> Tensor:
        """[B] what is added to the losses, its weight included. Its own parameters get no gradient from it."""

    def own_losses(self, predicted: Predicted) -> Tensor | None:
        """[B] what its own parameters learn from, if it has any; the model gets no gradient from it."""
        return None


def _rest_what_is_frozen(module: nn.Module) -> None:
    """Puts modules without a weight that learns in evaluation mode, unless they are layers of one that learns."""
    if not any(each.requires_grad for each in module.parameters()):
        module.eval()
        return
    for child in module.children():
        if any(True for _ in child.parameters()):
            _rest_what_is_frozen(child)


def load_term(options: TermOptions, facts: TermFacts) -> LossTerm:
    """The term in the file that `--loss_module` names.

    Raises:
        UserError: if the file can't be run, holds not one subclass of `LossTerm`, or refuses its arguments.
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
    """[B] what a term adds. Its own losses add nothing to the value, but their gradient to its parameters."""
    # copies: where weights step inside the backward pass, they change while what was computed with them is needed
    frozen = {name: each.detach().clone() for name, each in term.named_parameters() if each.requires_grad}
    losses = functional_call(term, frozen, (predicted,)) if frozen else term(predicted)
    own = term.own_losses(predicted.detached()) if frozen else None
    for found in (losses, own):
        if found is not None and found.shape != predicted.latents.shape[:1]:
            name, wanted = type(term).__name__, len(predicted.latents)
            raise UserError(f"{name} must give one loss a sample, [{wanted}], it gave {list(found.shape)}")
    return losses if own is None else losses + (own - own.detach())
