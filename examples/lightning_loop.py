"""SAMI in Lightning: on one device, on many, with any of its loggers and callbacks.

python examples/lightning_loop.py         # some minutes on a CPU core
python examples/lightning_loop.py 4       # as many steps, to see it run
"""

import sys

import lightning
import torch
from torch.utils.data import DataLoader, TensorDataset

from sami_fast import Sami
from sami_fast.config import load_config
from sami_fast.data import open_dataset

NETWORKS = {
    "encoder": {"image_channels": 1, "image_size": 16, "channels": [64, 64, 64], "latent_size": 8},
    "denoiser": {"image_channels": 1, "image_size": 16, "channels": [8, 32, 64, 64]},
}


class Representation(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.sami = Sami.build(NETWORKS, {"kind": "uniform_logsnr", "logsnr_min": -7.0, "logsnr_max": 5.0})

    def training_step(self, batch, batch_index):
        (x,) = batch
        loss, terms = self.sami.training_step(x, kl_weight=0.1)
        self.log_dict({"loss_nats": loss, "kl_nats": terms["kl_nats"].mean()}, prog_bar=True)
        return loss

    def validation_step(self, batch, batch_index):
        (x,) = batch
        self.log("validation_nats", self.sami.loss(x, kl_weight=0.1))  # with the same noise each time

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3, betas=(0.9, 0.99))


steps = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
images = open_dataset(load_config("disks").data, seed=0).images(torch.arange(4096))  # or any torch Dataset of [C, H, W] in [-1, 1]
trainer = lightning.Trainer(max_steps=steps, logger=False, enable_checkpointing=False, enable_model_summary=False)
model = Representation()
held_out = DataLoader(TensorDataset(images[-64:]), 64)
trainer.fit(model, DataLoader(TensorDataset(images[:-64]), 64, shuffle=True), held_out)
trainer.validate(model, held_out)
model.sami.save_pretrained("lightning_loop")  # for sami_fast.load_model and the commands
