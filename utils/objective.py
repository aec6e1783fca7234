"""A training step's loss as a function of the weights and the batch alone."""

import torch
from torch import Tensor, nn

from utils.encoding import EncodedBatch
from utils.families.base import Family, TextStates
from utils.losses import LossOptions, weighted_loss
from utils.noise import ForwardProcess, NoiseOptions, rectify
from utils.records import Noised


class Objective(nn.Module):
    """Maps an encoded batch to the loss of each of its samples. Its parameters are the modules that train."""

    def __init__(
        self,
        family: Family,
        trained: dict[str, nn.Module],
        process: ForwardProcess,
        noise_options: NoiseOptions,
        loss_options: LossOptions,
    ):
        super().__init__()
        self.trained = nn.ModuleDict(trained)
        self._family = family
        self._process = process
        self._noise_options = noise_options
        self._loss_options = loss_options

    def forward(self, encoded: EncodedBatch) -> Tensor:
        """[B] float32 weighted losses."""
        batch, family = encoded.batch, self._family
        noised, states = self._noised(encoded)
        if self._noise_options.dream_training:
            with torch.no_grad():
                estimate = family.predict(self.trained["unet"], noised.noisy, noised.timesteps, states, batch.crops)
            noised = rectify(noised, estimate, self._noise_options.dream_detail_preservation)
        prediction = family.predict(self.trained["unet"], noised.noisy, noised.timesteps, states, batch.crops)
        losses = weighted_loss(prediction, noised, self._process.prediction_type, self._loss_options)
        return losses * batch.loss_weights

    def plain_losses(self, encoded: EncodedBatch) -> Tensor:
        """[B] float32 mean squared errors of the prediction, whatever loss and weighting are trained with."""
        noised, states = self._noised(encoded)
        crops, unet = encoded.batch.crops, self.trained["unet"]
        prediction = self._family.predict(unet, noised.noisy, noised.timesteps, states, crops)
        return (prediction.float() - noised.target.float()).square().flatten(1).mean(1)

    def _noised(self, encoded: EncodedBatch) -> tuple[Noised, TextStates]:
        """The batch's noised latents, and its text states."""
        batch, family = encoded.batch, self._family
        states = encoded.states
        if states is None:
            states = family.encode_text(batch.input_ids, batch.caption_dropped)
        latents = family.latent_space.latents(encoded.mean, encoded.std, batch.posterior_noise)
        return self._process.apply(latents, batch.noise, batch.timesteps, batch.input_perturbation), states
