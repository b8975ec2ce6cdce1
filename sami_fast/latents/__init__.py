"""What is done with latents: images drawn from them, axes found among them, and the pictures and files that show both.

Names that the command line offers as well stand here, where they can be read without loading torch.
"""

from typing import Literal, get_args

Solver = Literal["ddim", "ancestral", "dpm2m"]
Start = Literal["random", "inverted"]
SOLVERS: tuple[str, ...] = get_args(Solver)
STARTS: tuple[str, ...] = get_args(Start)
DISCOVERY_METHODS = ("scale", "pca", "gradient", "ica", "level")  # ways to find axes (discovery.py); level alone looks at one noise level
