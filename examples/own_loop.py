"""A training loop of one's own, ten lines of it, and what the latents then know of the images: disks of which the loop sees pixels alone.

python examples/own_loop.py         # some minutes on a CPU core
python examples/own_loop.py 20      # as many steps, to see it run
"""

import sys

import torch

from sami_fast import Sami
from sami_fast.config import load_config
from sami_fast.data import open_dataset
from sami_fast.metrics.identifiability import linear_r2, mcc

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 3000
disks = open_dataset(load_config("disks").data, seed=0)
networks = {
    "encoder": {"image_channels": 1, "image_size": 16, "channels": [64, 64, 64], "latent_size": 8},
    "denoiser": {"image_channels": 1, "image_size": 16, "channels": [8, 32, 64, 64]},
}
torch.manual_seed(0)
model = Sami.build(networks, {"kind": "uniform_logsnr", "logsnr_min": -7.0, "logsnr_max": 5.0})

optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, betas=(0.9, 0.99))
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
for step in range(steps):
    x = disks.images(torch.arange(64 * step, 64 * (step + 1)))  # [64, 1, 16, 16] in [-1, 1]
    beta = 0.25 * 0.32 ** max(0.0, min(1.0, 1.5 * step / steps - 0.25))
    loss = model.loss(x, kl_weight=beta, phase="denoiser" if step < steps // 6 else "both")
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    scheduler.step()

model.eval()
index = torch.arange(2**32, 2**32 + 4000)  # images that the loop has not come to
with torch.no_grad():
    z = model.encode(disks.images(index)).draw(index, seed=0).numpy()  # [4000, 8]: drawn, since means can look better than they are
factors = disks.factors(index).numpy()
for name, r2 in zip(disks.factor_names, linear_r2(z, factors), strict=True):
    print(f"{name}: linear R2 {r2:.3f}")
print(f"MCC {mcc(z, factors)[0]:.3f}")
model.save_pretrained("own_loop")
