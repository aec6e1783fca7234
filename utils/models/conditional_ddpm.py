"""A pipeline that draws images of classes in pixels. It stands on diffusers alone, and is saved beside its weights:

DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
"""

import inspect

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, UNet2DModel
from diffusers.utils.torch_utils import randn_tensor


class ConditionalDDPMPipeline(DiffusionPipeline):
    """Denoises pixels with a `UNet2DModel` that reads a class.

    Attributes:
        labels: the classes' numbers by their names.
    """

    model_cpu_offload_seq = "unet"

    def __init__(self, unet: UNet2DModel, scheduler, id2label=None):
        """Args:
        unet: with one class embedding more than there are classes, the last of which stands for no class.
        scheduler: any of diffusers' that steps by itself.
        id2label: names of the classes by their numbers; without an annotation, since diffusers 0.35 reads no unions.
        """
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self.register_to_config(id2label={str(number): name for number, name in (id2label or {}).items()})
        self.labels = {name: int(number) for number, name in self.config.id2label.items()}

    def get_label_ids(self, label: str | list[str]) -> list[int]:
        """The numbers of classes by their names."""
        names = [label] if isinstance(label, str) else list(label)
        unknown = [name for name in names if name not in self.labels]
        if unknown:
            raise ValueError(f"{unknown[0]} is no class of this pipeline; it has {', '.join(self.labels)}")
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
        """Draws an image for each class.

        Args:
            class_labels: numbers of classes; the last embedding's number draws without one.
            guidance_scale: over 1 the difference that the class makes is enlarged (https://arxiv.org/abs/2207.12598).
            generator: one, or one for each image.
            eta: of schedulers that know it, the share of noise that is drawn anew at each step. Others take 0 alone.
            output_type: pil, np ([B, H, W, C] in [0, 1]) or pt ([B, C, H, W] in [0, 1]).

        Returns:
            `images`, in a tuple if `return_dict` is false.
        """
        config, device = self.unet.config, self._execution_device
        labels = torch.as_tensor(class_labels, device=device).reshape(-1)
        size = config.sample_size
        shape = (len(labels), config.in_channels, *((size, size) if isinstance(size, int) else size))
        image = randn_tensor(shape, generator=generator, device=device, dtype=self.unet.dtype)
        guided = guidance_scale > 1
        if guided:
            labels = torch.cat([labels, torch.full_like(labels, config.num_class_embeds - 1)])
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        image = image * getattr(self.scheduler, "init_noise_sigma", 1.0)
        known = inspect.signature(self.scheduler.step).parameters
        if eta and "eta" not in known:
            raise ValueError(f"eta is DDIM's; {type(self.scheduler).__name__} draws no noise of its own share")
        # without the last, DDIM clips the estimate but keeps the noise of the unclipped one, and images wash out
        given = {"eta": eta, "generator": generator, "use_clipped_model_output": True}
        extra = {name: value for name, value in given.items() if name in known}
        for t in self.progress_bar(self.scheduler.timesteps):
            seen = torch.cat([image, image]) if guided else image
            if hasattr(self.scheduler, "scale_model_input"):
                seen = self.scheduler.scale_model_input(seen, t)
            output = self.unet(seen, t, class_labels=labels).sample
            if guided:
                with_class, without = output.chunk(2)
                output = without + guidance_scale * (with_class - without)
            image = self.scheduler.step(output, t, image, **extra).prev_sample
        image = (image / 2 + 0.5).clamp(0, 1)
        if output_type != "pt":
            image = image.float().cpu().permute(0, 2, 3, 1).numpy()
            if output_type == "pil":
                image = self.numpy_to_pil(image)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=image) if return_dict else (image,)
