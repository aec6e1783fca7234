"""A training step's loss as a function of the weights and the batch alone."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from utils.config.batch import Batch, Noised, Predicted
from utils.diffusion.losses import masked_mean, weighted_loss
from utils.diffusion.noise import ForwardProcess, rectify
from utils.diffusion.options import LossOptions, NoiseOptions
from utils.models.base import Family, TextStates
from utils.models.loss_terms import LossTerm, added_losses
from utils.training.encoding import EncodedBatch


class Objective(nn.Module):
    """Maps an encoded batch to the loss of each of its samples. Its parameters are the modules and terms that train."""

    def __init__(
        self,
        family: Family,
        trained: dict[str, nn.Module],
        process: ForwardProcess,
        noise_options: NoiseOptions,
        loss_options: LossOptions,
        terms: Sequence[LossTerm] = (),
    ):
        super().__init__()
        self.trained = nn.ModuleDict(trained)
        self.terms = nn.ModuleList(terms)
        self._family = family
        self._process = process
        self._noise_options = noise_options
        self._loss_options = loss_options

    def forward(self, encoded: EncodedBatch) -> Tensor:
        """[B] float32 weighted losses."""
        batch, family = encoded.batch, self._family
        latents = family.latent_space.latents(encoded.mean, encoded.std, batch.posterior_noise)
        noised, states = self._noised(batch, latents), self._states(encoded)
        if self._noise_options.dream_training:
            with torch.no_grad():
                estimate = family.predict(
                    self.trained[self._family.denoiser_name], noised.noisy, noised.timesteps, states, batch.crops
                )
            noised = rectify(noised, estimate, self._noise_options.dream_detail_preservation)
        prediction = family.predict(
            self.trained[self._family.denoiser_name], noised.noisy, noised.timesteps, states, batch.crops
        )
        losses = weighted_loss(prediction, noised, self._process.prediction_type, self._loss_options, batch.masks)
        if self.terms:
            estimate, prediction = self._process.estimate(noised, prediction), prediction.float()
            predicted = Predicted(estimate, latents, prediction, noised, states, batch.crops, batch.masks)
            losses = losses + sum(added_losses(term, predicted) for term in self.terms)
        return losses * batch.loss_weights

    def plain_losses(self, encoded: EncodedBatch) -> Tensor:
        """[B] float32 mean squared errors of the prediction, whatever loss and weighting are trained with.

        Masks count as they do in training.
        """
        batch, unet = encoded.batch, self.trained[self._family.denoiser_name]
        latents = self._family.latent_space.latents(encoded.mean, encoded.std, batch.posterior_noise)
        noised = self._noised(batch, latents)
        prediction = self._family.predict(unet, noised.noisy, noised.timesteps, self._states(encoded), batch.crops)
        return masked_mean((prediction.float() - noised.target.float()).square(), batch.masks, self._loss_options)

    def _noised(self, batch: Batch, latents: Tensor) -> Noised:
        return self._process.apply(latents, batch.noise, batch.timesteps, batch.input_perturbation)

    def _states(self, encoded: EncodedBatch) -> TextStates:
        """The text states, computed here where the text encoders train."""
        if encoded.states is not None:
            return encoded.states
        return self._family.encode_text(encoded.batch.input_ids, encoded.batch.caption_dropped)
