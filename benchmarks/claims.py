"""What is claimed of learning, in one table: what must be seen, what was seen, and whether that is enough; what does not hold comes first.

python -m benchmarks.claims                    # trains and scores everything, with one thread per run: many hours on two cores
python -m benchmarks.claims --only rooms pretrained
python -m benchmarks.claims --only             # trains nothing: judges the committed rows
"""

import argparse
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from sami_fast.evaluation.table import spread

from .methods import DATA, scored_once
from .rows import ROOT, Row, committed
from .table import markdown

RIVALS = {"beta_vae": "beta-VAE", "beta_vae_falling": "beta-VAE with falling beta", "diffae": "DiffAE"}
FACES = ("carphone", "interview", "webcam")  # sources of clips that show someone talking
METHODS = ("sami", *RIVALS)
COMPARED = {"rooms": 5, "avatars": 3, "stills": 3}  # by data, the seeds that each of METHODS is compared on
HEALTHY = 5  # seeds of SAMI on one's own images that have to end healthy


@dataclass(frozen=True)
class Claim:
    """One line of the table."""

    what: str
    needed: str
    command: list[str]  # the module of benchmarks that measures it, and its arguments
    judged: Callable[[], tuple[bool, str]]  # whether it holds, and what was measured; ValueError: no row


def ahead(ours: Sequence[float], theirs: Sequence[float]) -> bool:
    """Whether our mean over seeds is ahead by more than the larger standard deviation over seeds."""
    return min(len(ours), len(theirs)) > 1 and mean(ours) - mean(theirs) > max(stdev(ours), stdev(theirs))


def seeds_passing(config: str, least: int, minutes: float = math.inf) -> Callable[[], tuple[bool, str]]:
    """Whether so many of ten seeds recover every factor, each within these CPU minutes."""

    def judged() -> tuple[bool, str]:
        rows = committed("recovery.jsonl", config=config, settings="")
        used = [row["cpu_seconds"] / 60 for row in rows if "cpu_seconds" in row]
        passing = sum(row["passes"] and row.get("cpu_seconds", 0.0) <= 60 * minutes for row in rows)
        worst = min(min(row["linear_r2"].values()) for row in rows), min(row["mcc"] for row in rows)
        enough = passing >= least and len(rows) == 10
        told = f"{passing} of {len(rows)} seeds; least R2 {worst[0]:.3f}, least MCC {worst[1]:.3f}"
        if minutes == math.inf:
            return enough, told
        told += f"; {max(used):.1f} CPU minutes at most" if used else ""
        unknown = len(rows) - len(used)
        told += f"; CPU minutes of {unknown} seeds not measured" if unknown else ""
        return enough and not unknown, told

    return judged


def compared(data: str) -> list[Row]:
    """The rows of a comparison: SAMI may have been run on more seeds."""
    return [row for row in committed("methods.jsonl", data=data, settings="") if row["seed"] < COMPARED[data]]


def missing_seeds(data: str, found: dict[str, int]) -> str:
    """Which have fewer seeds than they are compared on, in words, given how many they have; empty where none has."""
    needed = COMPARED[data]
    few = [f"{RIVALS.get(name, name)} has {count} of {needed}" for name, count in found.items() if count < needed]
    if len(few) == len(found) > 1 and len({*found.values()}) == 1:
        few = [f"there are {min(found.values())} of {needed}"]
    return f"; seeds missing: {', '.join(few)}" if few else ""


def _scores(data: str, key: str) -> dict[str, list[float]]:
    """A score over seeds, by method and baseline."""
    found: dict[str, list[float]] = {}
    for row in scored_once(compared(data)):
        found.setdefault(row["method"], []).append(row[key])
        for name, scores in row["baselines"].items():
            if scores.get(key) is not None:
                found.setdefault(name, []).append(scores[key])
    return found


def leads(data: str, key: str, others: Sequence[str]) -> Callable[[], tuple[bool, str]]:
    """Whether SAMI's score is ahead of all others'."""

    def judged() -> tuple[bool, str]:
        found = _scores(data, key)
        missing = missing_seeds(data, {name: len(found.get(name, ())) for name in ("sami", *others)})
        told = ", ".join(f"{RIVALS.get(name, name)} {spread(values, 3)}" for name, values in found.items())
        return not missing and all(ahead(found["sami"], found[name]) for name in others), told + missing

    return judged


def _interval(rows: Sequence[Row], source: str, codes: str, key: str) -> tuple[float, float, float] | None:
    """Mean and 95 % interval over clips, averaged over the seeds."""
    found = [row["straightness_by_source"].get(source, {}).get(codes, {}) for row in rows]
    ends = [[scores[f"{key}{end}"] for scores in found if f"{key}{end}" in scores] for end in ("", "_low", "_high")]
    return (mean(ends[0]), mean(ends[1]), mean(ends[2])) if all(ends) else None


def straightest(data: str, source: str) -> Callable[[], tuple[bool, str]]:
    """Whether curvature through SAMI's means, raw, is the least, its interval apart from that of pixels and of two trained rivals."""
    beside = ("pixels", "pca", "untrained", "imagenet")

    def judged() -> tuple[bool, str]:
        rows = [row for row in compared(data) if source in row["straightness_by_source"]]
        of_method = {name: [row for row in rows if row["method"] == name] for name in METHODS}
        found = {name: _interval(of_method[name], source, "latents", "curvature") for name in of_method}
        found |= {name: _interval(of_method["sami"], source, name, "curvature") for name in beside}
        known = {name: interval for name, interval in found.items() if interval is not None}
        if not {"sami", *beside} <= known.keys():
            raise ValueError(f"{data} {source}: no row")
        high = known["sami"][2]
        apart = [name for name, interval in known.items() if high < interval[1]]
        least = min(known, key=lambda name: known[name][0]) == "sami"
        told = ", ".join(f"{RIVALS.get(name, name)} {i[0]:.0f} ({i[1]:.0f} to {i[2]:.0f})" for name, i in known.items())
        missing = missing_seeds(data, {name: len(rows) for name, rows in of_method.items()})
        return not missing and least and "pixels" in apart and len({*RIVALS} & {*apart}) >= 2, told + missing

    return judged


def all_healthy(data: str, latents: int, nats: float) -> Callable[[], tuple[bool, str]]:
    """Whether every seed ends healthy, with so many latents of so much information on images that training never saw."""

    def judged() -> tuple[bool, str]:
        rows = committed("methods.jsonl", data=data, method="sami", settings="")
        counts = [sum(value >= nats for value in row["information_per_dim"]) for row in rows]
        words = [row["health"]["word"] for row in rows]
        told = f"{', '.join(words)}; {', '.join(map(str, counts))} latents of {nats:g} nats"
        return len(rows) >= HEALTHY and {*words} == {"healthy"} and min(counts) >= latents, told

    return judged


def pretrained() -> tuple[bool, str]:
    rows = committed("pretrained.jsonl", data="disks", settings="")
    least, shares = ([f"{value(row):.2f}" for row in rows] for value in (lambda row: min(row["r2"].values()), lambda row: row["share"]))
    told = f"least R2 {', '.join(least)}; share of the joint run's time {', '.join(shares)}"
    return len(rows) >= 5 and all(row["passes"] for row in rows), told


def found_axes(data: str, key: str, raw: str) -> Callable[[], tuple[bool, str]]:
    """Whether axes found without labels score above the latents as they are, by any method of finding them; told beside rivals on the axes
    that are best for them."""

    def judged() -> tuple[bool, str]:
        found: dict[str, dict[str, list[float]]] = {}
        for row in compared(data):
            if row.get(key):  # of one latent there are no axes to find
                of_method = found.setdefault(row["method"], {})
                for name, score in {"as they are": row[raw], **row[key]}.items():
                    of_method.setdefault(name, []).append(score)
        if "sami" not in found:
            raise ValueError(f"{data} {key}: no row")
        ours = found.pop("sami")
        best = max((name for name in ours if name != "as they are"), key=lambda name: mean(ours[name]))
        told = ", ".join(f"{name} {spread(values, 3)}" for name, values in ours.items())
        for rival, theirs in found.items():
            name = max(theirs, key=lambda name: mean(theirs[name]))
            told += f"; {RIVALS[rival]} at its best, {name}, {spread(theirs[name], 3)}"
        missing = missing_seeds(data, {"sami": len(ours[best])})
        return not missing and mean(ours[best]) > mean(ours["as they are"]), told + missing

    return judged


def _compared(data: str) -> list[str]:
    return ["methods", "--data", data, "--seeds", *map(str, range(COMPARED[data])), "--methods", *METHODS]


CLAIMS = {
    "disks": Claim("disks 16x16: every factor recovered", "10 of 10 seeds", ["recovery"], seeds_passing("disks", 10)),
    "disks32": Claim(
        "disks 32x32: the same", "9 of 10 seeds in 8 CPU minutes", ["recovery", "--config", "disks32"], seeds_passing("disks32", 9, 8)
    ),
    "rooms": Claim("rooms: MCC", "ahead of all", _compared("rooms"), leads("rooms", "mcc", [*RIVALS, "pca"])),
    "rooms dci": Claim("rooms: DCI disentanglement", "ahead of all", _compared("rooms"), leads("rooms", "dci_d", [*RIVALS, "pca"])),
    "avatars": Claim("avatars: TAD", "ahead of the trained ones", _compared("avatars"), leads("avatars", "tad_nashae", [*RIVALS])),
    "rooms straight": Claim(
        "moving rooms: curvature, degrees",
        "least, apart from pixels and two trained ones",
        _compared("rooms"),
        straightest("rooms", "moving rooms"),
    ),
    **{
        f"stills {source}": Claim(
            f"unseen clips, {source}{', talking' if source in FACES else ''}: curvature, degrees",
            "least, apart from pixels and two trained ones",
            _compared("stills"),
            straightest("stills", source),
        )
        for source in (*FACES, "bikes", "bigbuckbunny")
    },
    **{
        data: Claim(
            f"{DATA[data].config}, {what}",
            f"healthy on {HEALTHY} seeds, {latents} latents of {nats:g} nats",
            ["methods", "--data", data, "--seeds", *map(str, range(HEALTHY)), "--methods", "sami"],
            all_healthy(data, latents, nats),
        )
        for data, what, latents, nats in (
            ("faces", "people never seen", 8, 1.0),
            ("wallpapers", "patches of wallpapers", 5, 0.5),
            ("patches", "patches of photographs never seen", 5, 0.5),
            ("mixed", "mixed snapshots", 5, 0.5),
            ("stills", "a folder of videos", 5, 0.5),
        )
    },
    "pretrained": Claim("an encoder on a pretrained UNet", "R2 >= 0.9 in a third of the time, 5 seeds", ["pretrained"], pretrained),
    "rooms axes": Claim(
        "rooms: MCC on axes found without labels",
        "above the raw axes",
        _compared("rooms"),
        found_axes("rooms", "mcc_axes", "mcc"),
    ),
    "avatars axes": Claim(
        "avatars: TAD on axes found without labels",
        "above the raw axes",
        _compared("avatars"),
        found_axes("avatars", "tad_axes", "tad_nashae"),
    ),
}


def generated(what: str) -> str:
    """The table of docs/results.md: what does not hold, what was not measured, what holds."""
    lines: list[tuple[int, list[str]]] = []
    for claim in CLAIMS.values():
        try:
            holds, measured = claim.judged()
            lines.append((2 if holds else 0, [claim.what, claim.needed, measured, "yes" if holds else "**no**"]))
        except ValueError:
            lines.append((1, [claim.what, claim.needed, "", "not measured"]))
    return markdown(["claim", "needed", "measured", "holds"], [cells for _, cells in sorted(lines, key=lambda line: line[0])])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=CLAIMS, default=list(CLAIMS), metavar="CLAIM", help=f"some of {', '.join(CLAIMS)}")
    arguments = parser.parse_args()
    commands = {" ".join(CLAIMS[name].command): CLAIMS[name].command for name in arguments.only}
    for module, *options in commands.values():
        subprocess.run([sys.executable, "-m", f"benchmarks.{module}", *options], cwd=ROOT, check=module != "pretrained")
    print(generated(""))


if __name__ == "__main__":
    main()
