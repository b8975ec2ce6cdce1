"""An encoder beside a denoiser that diffusers has trained: train it, draw with it, save it to be shared.

python examples/diffusers_checkpoint.py --checkpoint my_ddpm data.kind=image_folder data.path=photos   # a folder, or a hub id
python examples/diffusers_checkpoint.py                                                                # a small one made here, untrained

A checkpoint is what `save_pretrained` of a DDPMPipeline writes, or of a UNet2DModel and its scheduler into one folder.
"""

import argparse
from pathlib import Path
from typing import Any

import torch

import sami_fast
from sami_fast.latents.images import image_grid, write_png


def small_checkpoint(folder: Path) -> Path:
    """A UNet of diffusers for 16x16 images of one channel, and its scheduler. Nobody trained it, so its latents will mean little."""
    from diffusers import DDPMScheduler, UNet2DModel

    blocks = {"down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"]}
    torch.manual_seed(0)
    unet: Any = UNet2DModel(16, 1, 1, block_out_channels=[16, 32], layers_per_block=1, norm_num_groups=8, attention_head_dim=8, **blocks)
    scheduler: Any = DDPMScheduler()
    for part in (unet, scheduler):
        part.save_pretrained(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="a folder or a hub id; made here when left out")
    parser.add_argument("--output", type=Path, default=Path("runs"), help="folder of the run and of what is written beside it")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings of the run: train.steps=1000")
    arguments = parser.parse_intermixed_args()
    checkpoint = arguments.checkpoint or small_checkpoint(arguments.output / "small_unet")

    # The denoiser stays as it is, the encoder alone learns; train.mode=finetune trains both. Image size and channels are the denoiser's.
    about_denoiser = [f"denoiser.pretrained={checkpoint}", "train.mode=frozen"]
    about_run = ["name=beside_diffusers", f"runs_dir={arguments.output}", "train.steps=30", "train.batch_size=32"]
    config = sami_fast.load_config(None, [*about_denoiser, *about_run, *arguments.settings])
    run = sami_fast.train(config)

    model = sami_fast.load_model(run)
    images = torch.rand(4, *model.image_shape) * 2 - 1  # yours: [N, C, H, W] in [-1, 1], uint8, NumPy arrays or Pillow images
    print(model.encode(images).mu.shape)
    pictures = sami_fast.traverse(model, images[0], axis=0, values=[-2.0, 0.0, 2.0], seed=0, num_steps=10)
    with open(arguments.output / "traversal.png", "wb") as file:
        write_png(file, image_grid(pictures, columns=3))

    # For others: half the size, with a model card. `model.push_to_hub("me/faces", run=run)` puts the same on the Hugging Face hub.
    model.half().save_pretrained(arguments.output / "shared", variant="fp16", run=run)
    again = sami_fast.load_model(arguments.output / "shared", variant="fp16")
    print(f"{arguments.output / 'shared'}: {sum(p.numel() for p in again.parameters())} weights")


if __name__ == "__main__":
    main()
