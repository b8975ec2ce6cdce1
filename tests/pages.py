"""The pages' blocks of code, where they stand and what a comment above them says, which readers of a page do not see; and how tests shorten
the training that they ask for.
"""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Block:
    """A block of code and where it stands."""

    page: str
    line: int
    language: str  # "" of an indented block
    text: str
    comment: str  # the HTML comment right above, "" where there is none

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    def said(self, what: str) -> str | None:
        """What stands in a comment `<!-- what: ... -->` above the block."""
        found = re.fullmatch(rf"{what}:(.*)", self.comment, re.DOTALL)
        return found[1].strip() if found else None


def split(page: str) -> tuple[str, list[Block]]:
    """The prose of a page, and its blocks of code."""
    prose, blocks = [], []
    lines = (ROOT / page).read_text().splitlines()
    at = 0
    while at < len(lines):
        start, line = at, lines[at]
        fence, indented = (
            re.match(r"```(\w*)$", line),
            line.startswith("    ") and (not at or not lines[at - 1].strip() or lines[at - 1].endswith("-->")),
        )
        if not fence and not indented:
            prose.append(line)
            at += 1
            continue
        at += 1
        while at < len(lines) and (not lines[at].startswith("```") if fence else lines[at].startswith("    ") or not lines[at]):
            at += 1
        text = "\n".join(lines[start + 1 : at] if fence else (inner[4:] for inner in lines[start:at]))
        at += bool(fence)
        above = re.search(r"<!--((?:(?!-->).)*)-->\s*\Z", "\n".join(lines[:start]), re.DOTALL)
        blocks.append(Block(page, start + 1, fence[1] if fence else "", text, above[1].strip() if above else ""))
    return "\n".join(prose), blocks


TRAINING = r"(?:sami_fast/train\.py|sami-fast train) [^#\n']*?(?= *(?:#|'|$))"  # a command that trains

SMALL = {  # networks of one small layer, two steps
    "data.image_size": "8",
    "encoder.channels": "[8]",
    # With norms of four groups and without smooth kernels some latent is live, of so few pixels and after two steps.
    "encoder.style": "group_norm_silu",
    "encoder.groups": "4",
    "encoder.smooth": "0",
    "denoiser.channels": "[4]",
    "train.mode": "joint",
    "train.minutes": "0",
    "train.steps": "2",
    "train.batch_size": "8",
    "train.bank_steps": "0",
    "kl_weight.kind": "constant",
    "engine.precision": "fp32",
    "checkpoint.validation_images": "4",
}
OF_A_CONFIG = {  # sets that are rendered, and a denoiser that would be fetched
    "rooms": {"data.rooms.images": "16", "data.rooms.clips": "2"},
    "avatars": {"data.avatars.images": "16"},
    "celeba64": {f"{network}.{key}": value for network in ("encoder", "denoiser") for key, value in (("attention", "[]"), ("groups", "4"))},
    "celebahq256": {"denoiser.pretrained": "my_ddpm", "encoder.attention": "[]", "encoder.groups": "4"},
}


def shorter_training(command: re.Match[str]) -> str:
    """Settings of a training command that it does not have itself, and no report."""
    words = command[0].split()
    config = words[words.index("--config") + 1]
    settings = SMALL | OF_A_CONFIG.get(config, {})
    printed = {word.partition("=")[0] for word in words}
    if "denoiser.pretrained" in printed | settings.keys():
        for key in ("data.image_size", "denoiser.channels", "train.mode"):
            settings.pop(key)
    if config == "examples/own_networks.yaml" or "data.class" in printed:  # sizes are the classes' own
        for key in (
            "data.image_size",
            *(
                ("encoder.channels", "encoder.groups", "encoder.style", "encoder.smooth", "denoiser.channels")
                if config.endswith(".yaml")
                else ()
            ),
        ):
            settings.pop(key)
    if "method=diffae" in words:  # which has no KL
        settings.pop("kl_weight.kind")
    if config == "celebahq256":
        settings["data.image_size"] = "8"
    return " ".join([command[0], *(f"{key}={value}" for key, value in settings.items() if key not in printed), "--no-report"])
