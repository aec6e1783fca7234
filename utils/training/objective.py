"""The training loss as a function of only the weights and the batch."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from utils.config.batch import Batch, Conditioning, Noised, Predicted
from utils.diffusion.losses import masked_mean, weighted_loss
from utils.diffusion.noise import ForwardProcess, rectify
from utils.diffusion.options import LossOptions, NoiseOptions
from utils.models.base import Family
from utils.models.loss_terms import LossTerm, added_losses
from utils.training.encoding import EncodedBatch


class Objective(nn.Module):
    """Maps an encoded batch to the loss of each sample. Its parameters are the trained modules and loss terms."""

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
        """Returns the weighted loss of each sample, [B] float32."""
        batch = encoded.batch
        latents = self._family.latent_space.latents(encoded.mean, encoded.std, batch.posterior_noise)
        noised, conditioning = self._noised(batch, latents), self._conditioning(encoded)
        # DREAM: adjust the noise by the model's own prediction error.
        if self._noise_options.dream_training:
            with torch.no_grad():
                estimate = self._predict(noised, conditioning)
            noised = rectify(noised, estimate, self._noise_options.dream_detail_preservation)
        # The loss of the prediction, and loss terms on the clean latents estimated from it.
        prediction = self._predict(noised, conditioning)
        losses = weighted_loss(prediction, noised, self._process.prediction_type, self._loss_options, batch.masks)
        if self.terms:
            estimate, prediction = self._process.estimate(noised, prediction), prediction.float()
            states, crops = conditioning.states, conditioning.crops
            predicted = Predicted(estimate, latents, prediction, noised, states, crops, batch.masks)
            losses = losses + sum(added_losses(term, predicted) for term in self.terms)
        return losses * batch.loss_weights

    def plain_losses(self, encoded: EncodedBatch) -> Tensor:
        """Returns the mean squared error of each prediction, [B] float32, whatever the training loss and weighting.

        Masks apply as in training.
        """
        prediction, noised, _ = self.predicted(encoded)
        return self.mean((prediction - noised.target.float()).square(), encoded.batch)

    def predicted(self, encoded: EncodedBatch) -> tuple[Tensor, Noised, Tensor]:
        """Returns (prediction [B, C, h, w] float32, the model's input and target, clean latents [B, C, h, w])."""
        batch = encoded.batch
        latents = self._family.latent_space.latents(encoded.mean, encoded.std, batch.posterior_noise)
        noised = self._noised(batch, latents)
        return self._predict(noised, self._conditioning(encoded)).float(), noised, latents

    def mean(self, values: Tensor, batch: Batch) -> Tensor:
        """Returns [B]: the mean of each sample's values [B, C, h, w], weighted by its mask as in training."""
        return masked_mean(values, batch.masks, self._loss_options)

    def _noised(self, batch: Batch, latents: Tensor) -> Noised:
        return self._process.apply(latents, batch.noise, batch.timesteps, batch.input_perturbation)

    def _predict(self, noised: Noised, conditioning: Conditioning) -> Tensor:
        denoiser = self.trained[self._family.denoiser_name]
        return self._family.predict(denoiser, noised.noisy, noised.timesteps, conditioning)

    def _conditioning(self, encoded: EncodedBatch) -> Conditioning:
        """Returns the denoiser's conditioning; computes text states here if the text encoders train."""
        batch, states = encoded.batch, encoded.states
        if states is None:
            states = self._family.encode_text(batch.input_ids, batch.caption_dropped)
        return Conditioning(states, batch.crops)
