"""What a run of each method can be: facts that a config is checked against before there is any network."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Capabilities:
    """Which settings a method can be combined with. A class of `methods` does the training; this only says what may be asked of it.

    Attributes:
        modes: Possible values of train.mode. A denoiser that is told latents cannot be trained before there is an encoder.
        warmup: Whether the denoiser learns alone before the encoder joins in (train.denoiser_warmup).
        max_zero_stage: The largest engine.zero_stage. Stage 3 gives each network an engine of its own, and then no gradient reaches the
            encoder through the inputs of the other network.
        recompute: Whether engine.checkpoint_activations has something to recompute: a denoiser.
        compile: Whether engine.compile knows this method's step.
    """

    modes: tuple[str, ...] = ("joint",)
    warmup: bool = False
    max_zero_stage: int = 2
    recompute: bool = True
    compile: bool = False


CAPABILITIES = {
    "sami": Capabilities(modes=("joint", "frozen", "finetune"), warmup=True, max_zero_stage=3, compile=True),
    "beta_vae": Capabilities(recompute=False),
    "diffae": Capabilities(),
}
