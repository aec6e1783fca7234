"""A pipeline for class-conditional images in pixel space. It needs only diffusers, and is saved with its weights:

DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
"""

import inspect

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, UNet2DModel
from diffusers.utils.torch_utils import randn_tensor


class ConditionalDDPMPipeline(DiffusionPipeline):
    """Denoises pixels with a class-conditional `UNet2DModel`.

    Attributes:
        labels: class numbers by name.
    """

    model_cpu_offload_seq = "unet"

    def __init__(self, unet: UNet2DModel, scheduler, id2label=None):
        """Args:
        unet: a UNet with one more class embedding than there are classes; the last one means no class.
        scheduler: any scheduler of diffusers that needs no other inputs.
        id2label: class names by number. It has no annotation, since diffusers 0.35 can't read unions.
        """
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self.register_to_config(id2label={str(number): name for number, name in (id2label or {}).items()})
        self.labels = {name: int(number) for number, name in self.config.id2label.items()}

    def get_label_ids(self, label: str | list[str]) -> list[int]:
        """Returns the numbers of classes given by name."""
        names = [label] if isinstance(label, str) else list(label)
        unknown = [name for name in names if name not in self.labels]
        if unknown:
            raise ValueError(f"{unknown[0]} is not a class of this pipeline; it has {', '.join(self.labels)}")
        return [self.labels[name] for name in names]

    @torch.no_grad()
    def __call__(
        self,
        class_labels: list[int] | torch.Tensor,
        guidance_scale: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int = 50,
        eta: float = 0.0,
        output_type: str | None = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Samples an image for each class.

        Args:
            class_labels: class numbers; the number of the last embedding samples without a class.
            guidance_scale: classifier-free guidance if above 1 (https://arxiv.org/abs/2207.12598).
            generator: one generator, or one per image.
            num_inference_steps: number of denoising steps.
            eta: fraction of fresh noise per step, for schedulers such as DDIM; must be 0 for others.
            output_type: pil, np ([B, H, W, C] in [0, 1]) or pt ([B, C, H, W] in [0, 1]).

            return_dict: whether to return an `ImagePipelineOutput` instead of a tuple.
        Returns:
            The images, as `images` of the output or the tuple's only entry.
        """
        # Labels and initial noise.
        config, device = self.unet.config, self._execution_device
        labels = torch.as_tensor(class_labels, device=device).reshape(-1)
        size = config.sample_size
        shape = (len(labels), config.in_channels, *((size, size) if isinstance(size, int) else size))
        image = randn_tensor(shape, generator=generator, device=device, dtype=self.unet.dtype)
        guided = guidance_scale > 1
        if guided:
            labels = torch.cat([labels, torch.full_like(labels, config.num_class_embeds - 1)])

        # Scheduler, and the arguments that its step accepts.
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        image = image * getattr(self.scheduler, "init_noise_sigma", 1.0)
        known = inspect.signature(self.scheduler.step).parameters
        if eta and "eta" not in known:
            raise ValueError(f"{type(self.scheduler).__name__} has no eta; use DDIMScheduler, or eta=0")
        # without use_clipped_model_output, DDIM keeps the noise of the unclipped estimate, and images wash out
        given = {"eta": eta, "generator": generator, "use_clipped_model_output": True}
        extra = {name: value for name, value in given.items() if name in known}

        # Denoising.
        for t in self.progress_bar(self.scheduler.timesteps):
            seen = torch.cat([image, image]) if guided else image
            if hasattr(self.scheduler, "scale_model_input"):
                seen = self.scheduler.scale_model_input(seen, t)
            output = self.unet(seen, t, class_labels=labels).sample
            if guided:
                with_class, without = output.chunk(2)
                output = without + guidance_scale * (with_class - without)
            image = self.scheduler.step(output, t, image, **extra).prev_sample

        # Images in the requested format.
        image = (image / 2 + 0.5).clamp(0, 1)
        if output_type != "pt":
            image = image.float().cpu().permute(0, 2, 3, 1).numpy()
            if output_type == "pil":
                image = self.numpy_to_pil(image)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=image) if return_dict else (image,)
