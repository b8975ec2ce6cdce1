"""Trains on a folder of videos on every rank of a real launcher and writes down what each rank was shown: `deepspeed feed_worker.py ...`.

Arguments: a file name to begin the records with, then what `sami_fast/train.py` takes. With DIE_AT_STEP set, every
rank dies at that step.
"""

import json
import os
import sys
import zlib

from sami_fast.data import Feed
from sami_fast.train import main as train_main


def main(records: str, arguments: list[str]) -> int:
    micro_batch = Feed.micro_batch

    def recorded(self: Feed, step: int, micro: int):
        x_0, place = micro_batch(self, step, micro)
        index, epoch = self.indices(step, micro)
        checksums = [zlib.crc32(image.numpy().tobytes()) for image in x_0]
        row = {"step": step, "place": place.tolist(), "index": index.tolist(), "epoch": epoch.tolist(), "pixels": checksums}
        with open(f"{records}_{os.environ['RANK']}.jsonl", "a") as shown:
            shown.write(json.dumps(row) + "\n")
        if str(step) == os.environ.get("DIE_AT_STEP"):
            os._exit(9)
        return x_0, place

    Feed.micro_batch = recorded
    return train_main(arguments)


if __name__ == "__main__":
    own = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    sys.exit(main(own[0], own[1:]))
