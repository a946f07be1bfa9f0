"""The U-Net of DDPM: predicts the noise in a noisy image at a timestep.

Source: Ho, Jain, Abbeel, DDPM, NeurIPS 2020, arXiv 2006.11239, Appendix B, as diffusers' UNet2DModel.
Differs from it: attention without the fused kernel (which has no second derivative), and a time embedding in float64.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedattack.errors import FedattackError, must
from fedattack.models.layers import shape3


class TimeProjection(nn.Module):
    """τ(t) = (cos tω_i, sin tω_i), ω_i = 10000^(−i/n): (B,) -> (B, 2n) float64; t may be real, differentiable.

    Diffusers' Timesteps(flip_sin_to_cos=True, downscale_freq_shift=0) has the same formula in float32, where t·ω near
    t = 1000 is off by 3e-5: too coarse for attacks in float64. It has no weights, so checkpoints fit both.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.frequencies = channels // 2

    def forward(self, timesteps: Tensor) -> Tensor:
        order = torch.arange(self.frequencies, dtype=torch.float64, device=timesteps.device)
        phase = timesteps.to(torch.float64)[:, None] * torch.exp(-math.log(10000.0) / self.frequencies * order)
        return torch.cat([phase.cos(), phase.sin()], dim=1)


def twice_differentiable(unet: Any) -> Any:
    """A diffusers U-Net in place, with attention that has a second derivative and timesteps as exact as its precision."""
    from diffusers.models.attention_processor import Attention, AttnProcessor

    for module in unet.modules():
        if isinstance(module, Attention):
            module.set_processor(AttnProcessor())
            module.upcast_softmax = False  # "up" to float32: a rounding of 1e-8 in a float64 model
    config = unet.config
    if config.time_embedding_type == "positional" and config.flip_sin_to_cos and config.freq_shift == 0:
        unet.time_proj = TimeProjection(config.block_out_channels[0])
    return unet


class UNet(nn.Module):
    """(images (B,C,H,W) as the task scales them, timesteps (B,) integer or real) -> predicted noise (B,C,H,W).

    `attention` names the levels (0 = full size) that have attention blocks, `mid_attention` the one at the bottom. Each
    level but the last halves the sides. `.unet` is the diffusers model: save it with `.unet.save_pretrained(folder)`.
    There is no normalising layer: the diffusion task works on 2·images − 1. `num_classes` is ignored.
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        num_classes: int | None = None,
        block_out_channels: Sequence[int] = (32, 64),
        layers_per_block: int = 1,
        attention: Sequence[int] = (1,),
        mid_attention: bool = True,
        attention_head_dim: int = 8,
        norm_num_groups: int = 8,
        dropout: float = 0.0,
    ) -> None:
        from diffusers import UNet2DModel

        super().__init__()
        channels, height, width = shape3(image_shape)
        levels = len(block_out_channels)
        divisor = 2 ** (levels - 1)
        if levels == 0 or height % divisor or width % divisor:
            rule = f"a multiple of {divisor} (block_out_channels has {levels} levels)"
            raise FedattackError(must("image height and width of the U-Net", rule, (height, width)))
        if not set(attention) <= set(range(levels)):
            raise FedattackError(must("attention", f"levels in 0 … {levels - 1}", attention))
        if block_out_channels[0] % 2 or any(c % norm_num_groups for c in block_out_channels):
            rule = f"even and divisible by norm_num_groups ({norm_num_groups})"
            raise FedattackError(must("block_out_channels", rule, block_out_channels))
        down = ["AttnDownBlock2D" if i in attention else "DownBlock2D" for i in range(levels)]
        up = ["AttnUpBlock2D" if i in attention else "UpBlock2D" for i in reversed(range(levels))]
        unet = UNet2DModel(
            sample_size=height if height == width else (height, width),
            in_channels=channels,
            out_channels=channels,
            down_block_types=tuple(down),
            up_block_types=tuple(up),
            block_out_channels=tuple(block_out_channels),
            layers_per_block=layers_per_block,
            attention_head_dim=attention_head_dim,
            norm_num_groups=norm_num_groups,
            dropout=dropout,
            add_attention=mid_attention,
        )
        self.unet = twice_differentiable(unet)

    def forward(self, images: Tensor, timesteps: Tensor) -> Tensor:
        output: Tensor = self.unet(images, timesteps, return_dict=False)[0]
        return output
