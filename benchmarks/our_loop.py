"""Our training loop, in turns: the command that trains, held up before each step. python -m benchmarks.our_loop ADDRESS arguments ..."""

import sys
from typing import Any

from sami_fast.config import Config
from sami_fast.engine.processes import init_distributed
from sami_fast.train import Trainer, main

from .turns import Turns


def run(address: str, arguments: list[str]) -> int:
    class InTurns(Trainer):
        def __init__(self, config: Config, **options: Any) -> None:
            init_distributed(config.engine.patience)  # its modules are loaded before memory is counted
            self.turns = Turns(address, self._averaged)
            super().__init__(config, **options)

        def update(self) -> tuple[float, Any]:
            self.turns()
            kl_weight, measured = super().update()
            self.turns.saw(lambda: measured.read()[0])
            return kl_weight, measured

        def _averaged(self) -> dict[str, Any]:
            with self.engine.averaged_weights():
                return self.engine.weights()

    sys.modules[Trainer.__module__].Trainer = InTurns
    return main([*arguments, "--no-report"])


if __name__ == "__main__":
    sys.exit(run(sys.argv[1], sys.argv[2:]))
