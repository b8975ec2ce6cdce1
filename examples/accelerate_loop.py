"""SAMI in Hugging Face accelerate, which finds the devices and the processes.

python examples/accelerate_loop.py                    # some minutes on a CPU core
python examples/accelerate_loop.py 4                  # as many steps, to see it run
accelerate launch examples/accelerate_loop.py         # on what `accelerate config` says
"""

import sys

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset

from sami_fast import Sami
from sami_fast.config import load_config
from sami_fast.data import open_dataset

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
images = open_dataset(load_config("disks").data, seed=0).images(torch.arange(4096))  # or any torch Dataset of [C, H, W] in [-1, 1]
networks = {
    "encoder": {"image_channels": 1, "image_size": 16, "channels": [64, 64, 64], "latent_size": 8},
    "denoiser": {"image_channels": 1, "image_size": 16, "channels": [8, 32, 64, 64]},
}
sami = Sami.build(networks, {"kind": "uniform_logsnr", "logsnr_min": -7.0, "logsnr_max": 5.0})

accelerator = Accelerator()
optimizer = torch.optim.Adam(sami.parameters(), lr=1e-3, betas=(0.9, 0.99))
model, optimizer, loader = accelerator.prepare(sami, optimizer, DataLoader(TensorDataset(images), 64, shuffle=True, drop_last=True))


def forever(loader):
    while True:
        yield from loader


for step, (x,) in zip(range(1, steps + 1), forever(loader), strict=False):
    loss = model(x, kl_weight=0.1)  # called, it is the loss: so DistributedDataParallel, which this may be, averages gradients
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    if step % 100 == 0 or step == steps:
        accelerator.print(f"step {step}: {loss.item():.1f} nats")
if accelerator.is_main_process:
    sami.save_pretrained("accelerate_loop")  # for sami_fast.load_model and the commands
