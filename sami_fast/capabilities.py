"""What a run of each method can be: facts that a config is checked against before there is any network."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Capabilities:
    """Which settings a method can be combined with; its class in `methods` does the training."""

    modes: tuple[str, ...] = ("joint",)  # of train.mode: a denoiser that is told latents cannot be trained before there is an encoder
    warmup: bool = False  # whether the denoiser learns alone before the encoder joins in
    # Of engine.zero_stage. At 3 each network has its own engine, and no gradient reaches the encoder through z as an input of the other.
    max_zero_stage: int = 2
    recompute: bool = True  # whether there is a denoiser for engine.checkpoint_activations
    compile: bool = False  # whether engine.compile knows the method's step


CAPABILITIES = {
    "sami": Capabilities(modes=("joint", "denoiser", "frozen", "finetune", "staged"), warmup=True, max_zero_stage=3, compile=True),
    "beta_vae": Capabilities(recompute=False),
    "diffae": Capabilities(),
}
