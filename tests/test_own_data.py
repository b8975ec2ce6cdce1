"""Data of one's own: every kind of object and class is the images it should be, trains, and resumes; what cannot be used is said."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import TINY, assert_same_weights, rows, tiny
from own_datasets import Augmented, Ours, Pixels, Stream, pixels
from PIL import Image
from ranks_worker import interrupt, train_until
from safetensors.torch import load_file
from torch import nn

from sami_fast import cli
from sami_fast.config import Config, DataConfig, load_config, to_yaml
from sami_fast.data import open_dataset
from sami_fast.data.own import EVALUATION, Source, as_dataset
from sami_fast.errors import UserError
from sami_fast.evaluation import open_run
from sami_fast.latents.sampling import sample
from sami_fast.methods.own_loop import LOSS_STEP
from sami_fast.methods.sami import Sami
from sami_fast.report import write_report
from sami_fast.schedule import Cosine
from sami_fast.stages import DENOISERS
from sami_fast.train import main, train

HERE = Path(__file__).resolve().parent
COUNT = 40
BYTES = torch.stack([pixels(index) for index in range(COUNT)])  # [40, 1, 8, 8] uint8
UNIT = BYTES.float() / 127.5 - 1
COLOUR = BYTES.expand(-1, 3, -1, -1)


def spec(name: str) -> str:
    return f"{HERE / 'own_datasets.py'}:{name}"


def given(images, split: int = 0, **settings):
    """An object as `train` makes a dataset of it; all images, unless `holdout` says otherwise."""
    return as_dataset(Source(images, "dataset"), DataConfig(kind="given", **{"holdout": 0.0, **settings}), split)


def png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def web_dataset(folder: Path):
    """A WebDataset of two shards, written anew."""
    webdataset = pytest.importorskip("webdataset", reason="needs webdataset")
    for shard in range(2):
        with webdataset.TarWriter(str(folder / f"{shard}.tar")) as sink:
            for index in range(20 * shard, 20 * shard + 20):
                sink.write({"__key__": f"{index:03}", "png": png(Image.fromarray(BYTES[index, 0].numpy()))})
    return webdataset.WebDataset([str(folder / f"{shard}.tar") for shard in range(2)], shardshuffle=False)


def hugging_face():
    datasets = pytest.importorskip("datasets", reason="needs Hugging Face datasets")
    images = [Image.fromarray(image.numpy()) for image in BYTES[:, 0]]
    return datasets.Dataset.from_dict(
        {"image": images, "label": list(range(COUNT))},
        features=datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")}),
    )


KINDS = {
    "torch dataset": lambda folder: Pixels(),
    "torch iterable": lambda folder: Stream(),
    "tensor of bytes": lambda folder: BYTES,
    "tensor of floats": lambda folder: UNIT,
    "bfloat16": lambda folder: UNIT.bfloat16(),
    "array (N, H, W)": lambda folder: BYTES[:, 0].numpy(),
    "array (N, H, W, C)": lambda folder: BYTES.permute(0, 2, 3, 1).numpy(),
    "whole numbers": lambda folder: BYTES.long(),
    "list of arrays": lambda folder: [image.numpy() for image in UNIT.double()],
    "tuples": lambda folder: [(image, "label") for image in BYTES],
    "tensor dataset": lambda folder: torch.utils.data.TensorDataset(BYTES, torch.arange(COUNT)),
    "subset": lambda folder: torch.utils.data.Subset(Pixels(100), range(COUNT)),
    "dicts": lambda folder: [{"label": 1, "image": image} for image in BYTES],
    "Pillow, grey": lambda folder: [Image.fromarray(image.numpy()) for image in BYTES[:, 0]],
    "Pillow, transparent": lambda folder: [{"img": Image.fromarray(image.numpy()).convert("LA")} for image in BYTES[:, 0]],
    "bytes of files": lambda folder: [(png(Image.fromarray(image.numpy())), 0) for image in BYTES[:, 0]],
    "generator": lambda folder: (image for image in BYTES),
    "loader": lambda folder: torch.utils.data.DataLoader(Pixels(), batch_size=None),
    "ours": lambda folder: Ours(),
    "WebDataset": web_dataset,
    "WebDataset, decoded": lambda folder: web_dataset(folder).decode("pil").to_tuple("png"),
    "Hugging Face": lambda folder: hugging_face(),
    "Hugging Face, a column": lambda folder: hugging_face()["image"],
    "Hugging Face, as tensors": lambda folder: hugging_face().with_format("torch"),
    "Hugging Face, a stream": lambda folder: hugging_face().to_iterable_dataset(),
}
IN_COLOUR = ("bytes of files", "Pillow, transparent", "WebDataset", "WebDataset, decoded")  # as files are decoded


@pytest.mark.parametrize("kind", KINDS)
def test_images_of_every_kind(tmp_path, kind):
    dataset = given(KINDS[kind](tmp_path))
    colour = kind in IN_COLOUR
    assert dataset.image_shape == (3 if colour else 1, 8, 8)
    assert dataset.size == COUNT
    index = torch.tensor([0, 39, 7, 7])
    images = dataset.images(index)
    expected = UNIT[index].expand(-1, 3 if colour else 1, -1, -1)
    assert images.dtype == torch.float32
    assert torch.allclose(images, expected, rtol=0, atol=4e-3 if kind == "bfloat16" else 1e-6)
    assert dataset.images(index[:0]).shape == (0, *dataset.image_shape)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_trains(tmp_path, kind):
    folder = train(
        TINY, dataset=KINDS[kind](tmp_path), settings={"runs_dir": tmp_path, "train.steps": 2, "data.channels": 1, "data": {"flip": True}}
    )
    assert [row["step"] for row in rows(folder)] == [1, 2]
    config = load_config(str(folder / "config.yaml"))
    assert (config.data.kind, config.data.flip) == ("given", True)
    same = train(TINY, dataset=UNIT, settings={"runs_dir": tmp_path / "same", "train.steps": 2, "data.flip": True})
    found, expected = (load_file(run / "model/model.safetensors") for run in (folder, same))
    for name in expected:
        assert torch.allclose(found[name], expected[name], atol=1e-3 if kind == "bfloat16" else 1e-5), name


# Splits, sizes, ranges


def test_what_evaluation_sees_is_held_out():
    train_part, evaluation = (given(BYTES, split, holdout=0.25) for split in (0, 1))
    assert (train_part.size, evaluation.size) == (30, 10)
    assert train_part.held_out
    seen = {tuple(image.flatten().tolist()) for part in (train_part, evaluation) for image in part.images(torch.arange(part.size))}
    assert len(seen) == COUNT
    assert not given(BYTES).held_out


def test_an_iterable_is_gone_through_once():
    source = Source(Stream(), "dataset")
    parts = [as_dataset(source, DataConfig(kind="given", holdout=0.25), split) for split in (0, 1)]
    assert source.given.rounds == 1
    assert sum(part.size for part in parts) == COUNT


def test_ours_are_split_by_their_images():
    whole, (first, second) = Ours(), (given(Ours(), split, holdout=0.25) for split in (0, 1))
    assert (first.size, second.size) == (30, 10)
    numbers = torch.cat([part.factors(torch.arange(part.size))[:, 0] for part in (first, second)])
    assert sorted(numbers.tolist()) == list(range(COUNT))
    assert torch.equal(second.images(torch.tensor([3])), whole.images(numbers[30:].long()[3:4]))
    assert first.factor_names == ("number",)
    assert "ours" != first.fingerprint != second.fingerprint
    endless = [given(Ours(endless=True), split) for split in (0, 1)]
    assert [part.size for part in endless] == [None, None]
    assert endless[0].factors(torch.tensor([5])).item() == 5
    assert endless[1].factors(torch.tensor([0])).item() == EVALUATION


class Moving(Ours):
    """With clips, an order of its own, and files that cannot be read; it counts from the end."""

    clip_length, num_clips = 3, 5

    def clips(self, index):
        return self.images(3 * index[:, None].add(torch.arange(3)).flatten()).unflatten(0, (-1, 3))

    def order(self, epoch, seed, batch_size):
        return torch.arange(self.size).roll(epoch)

    def in_order(self):
        return torch.arange(self.size).flip(0)

    def unreadable(self):
        return {"lost.png": "zero bytes"}


class Stills(Ours):
    """An epoch shows the first ten images alone."""

    epoch_size = 10

    def order(self, epoch, seed, batch_size):
        return torch.arange(10)


@pytest.mark.parametrize("split", [0, 1])
@pytest.mark.parametrize("holdout", [0.0, 0.25])
def test_all_that_ours_give_reaches_a_split(split, holdout):
    whole, part = Moving(), given(Moving(), split, holdout=holdout)
    assert (part.clip_length, part.num_clips) == (3, 5)
    index = torch.tensor([1, 4])
    assert torch.equal(part.clips(index), whole.clips(index))
    assert part.unreadable() == {"lost.png": "zero bytes"}
    assert part.epoch_size == part.size
    numbers = part.factors(torch.arange(part.size))[:, 0]
    for own, theirs in ((part.order(3, 0, 8), whole.order(3, 0, 8)), (part.in_order(), whole.in_order())):
        shown = part.factors(own)[:, 0].long().tolist()
        assert shown == [number for number in theirs.tolist() if number in numbers]
        assert len(shown) == part.size
    assert given(Ours(endless=True), split).epoch_size is None


def test_an_epoch_that_shows_a_part_is_not_divided():
    part = given(Stills())
    assert part.epoch_size == len(part.order(0, 0, 8)) == 10
    with pytest.raises(UserError, match=r"dataset: an epoch of Stills shows 10 of its 40 images, of which data.holdout cannot be taken"):
        given(Stills(), holdout=0.25)


@pytest.mark.parametrize("shape", [(5, 7), (9, 9), (16, 8)])
def test_images_of_several_sizes_become_one(shape):
    images = [BYTES[0], torch.full((1, *shape), 90, dtype=torch.uint8)]
    dataset = given(images, image_size=4, channels=3)
    assert dataset.image_shape == (3, 4, 4)
    assert torch.allclose(dataset.images(torch.tensor([1])), torch.full((1, 3, 4, 4), 90 / 127.5 - 1), atol=1e-6)
    assert given([COLOUR[0]], channels=1).images(torch.tensor([0])).shape == (1, 1, 8, 8)


def test_floats_from_zero_to_one(caplog):
    unit = (UNIT + 1) / 2
    assert torch.allclose(given(unit, range="unit").images(torch.arange(COUNT)), UNIT, atol=1e-6)
    assert not caplog.records
    assert torch.equal(given(unit).images(torch.arange(3)), unit[:3])
    assert "data.range=unit says that 0 is black" in caplog.text


def test_data_are_known_again_by_their_images(caplog):
    assert given(Pixels()).fingerprint == given(list(BYTES)).fingerprint
    assert given(Pixels()).fingerprint != given(Pixels(39)).fingerprint
    changed = BYTES.clone()
    changed[20] ^= 1
    assert given(changed).fingerprint != given(BYTES).fingerprint
    assert not caplog.records
    assert given(Augmented()).fingerprint == given(Augmented()).fingerprint  # of which one cannot know
    assert "an image differs each time it is read, as by random augmentation" in caplog.text


# By the name of a class


@pytest.mark.parametrize("name", ["Pixels", "Stream", "Ours", "Split", "sized"])
def test_a_class_trains_and_resumes_bit_for_bit(tmp_path, name):
    overrides = [f"data.class={spec(name)}"]
    if name == "sized":
        overrides = [f"data.class={spec('Pixels')}", "data.kwargs.count=23", "data.kwargs={side: 11}", "data.workers=2"]
    whole, stopped = (tiny(tmp_path, *overrides, f"name={which}") for which in ("whole", "stopped"))
    assert whole.data.kind == "class"
    train(whole)
    with pytest.raises(InterruptedError):
        train_until(stopped, 8, interrupt)
    assert load_config(str(stopped.run_dir / "config.yaml")) == stopped
    assert_same_weights(train(stopped, resume=True), whole.run_dir)
    assert [row["loss_nats"] for row in rows(stopped.run_dir)] == [row["loss_nats"] for row in rows(whole.run_dir)]


def test_a_class_of_ours_may_tell_splits_apart_itself():
    parts = [open_dataset(load_config(None, [f"data.class={spec('Split')}"]).data, 0, split) for split in (0, 1)]
    assert [part.size for part in parts] == [30, 10]
    assert torch.equal(parts[1].images(torch.tensor([2])), Ours().images(torch.tensor([102])))


def test_a_resumed_run_needs_the_same_images(tmp_path):
    with pytest.raises(InterruptedError):
        train_until(tiny(tmp_path, f"data.class={spec('Pixels')}"), 8, interrupt)
    with pytest.raises(UserError, match=r"belongs to a run with other settings: data.files .*, data.kwargs.count \(None there, 41 here\)"):
        train(tiny(tmp_path, f"data.class={spec('Pixels')}", "data.kwargs.count=41"), resume=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A tiny run on a class, through the command."""
    folder = tmp_path_factory.mktemp("runs")
    settings = [f"runs_dir={folder}", f"data.class={spec('Ours')}", "train.mode=staged", "train.denoiser_steps=4", "report.images=16"]
    assert main(["--config", TINY, *settings, "data.holdout=0.5"]) == 0
    return folder / "tiny"


def test_every_command_works_on_it(run, tmp_path, capsys):
    assert (run / "report/index.html").is_file()  # training writes it, who has just been told the class
    words = spec("Ours")
    commands = {
        "encode": ["encode", str(run), "--output", str(tmp_path / "latents.npz")],
        "traverse": ["traverse", str(run), "--output", str(tmp_path / "traverse.png"), "--steps", "2"],
        "evaluate": ["evaluate", str(run), "--output", str(tmp_path / "table.json"), "--images", "16", "--jobs", "1"],
        "report": ["report", str(run)],
    }
    for name, command in commands.items():
        assert cli.main(command) == 2, name
        assert f"{run}/config.yaml: data.class: {words}, whose code would be imported and run; if you tr" in capsys.readouterr().err
        assert cli.main([*command, "--trust"]) == 0, name
    encoded = np.load(tmp_path / "latents.npz")
    assert encoded["mu"].shape == (20, 4)
    assert encoded["factors"].shape == (20, 1)
    (row,) = json.loads((tmp_path / "table.json").read_text())
    assert row["config"]["data"]["class"] == words
    assert "number" in row["linear_r2"]
    assert cli.main(["data", str(run / "config.yaml"), "--seconds", "0"]) == 0  # a config that the user has named
    assert "20 images" in capsys.readouterr().out
    assert cli.main(["plan", str(run / "config.yaml"), "--gpus", "1"]) == 0
    sample = ["sample", str(run), "--output", str(tmp_path / "sample.png"), "--count", "2", "--steps", "2"]
    assert cli.main(sample) == 0  # needs no images


def test_a_dataset_beside_a_run_that_names_its_own(run):
    for read in (open_run, write_report):
        with pytest.raises(UserError, match=f"^dataset: expected none, {run} was trained on data of its config, data.kind class$"):
            read(run, dataset=Ours(), trust_remote_code=True)


def test_the_command_names_a_file_from_where_it_stands(tmp_path):
    (tmp_path / "mine.py").write_text((HERE / "own_datasets.py").read_text())
    script = Path(sys.modules[train.__module__].__file__)
    command = [sys.executable, str(script), "--config", TINY, "train.steps=2", "--no-report"]
    for place in ("mine.py", "mine"):
        done = subprocess.run(
            [*command, f"data.class={place}:Pixels", f"name={place}"], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    assert load_config(str(tmp_path / "runs/mine.py/config.yaml")).data.class_ == f"{tmp_path / 'mine.py'}:Pixels"


# Mistakes


@pytest.mark.parametrize(
    ("images", "settings", "words"),
    [
        ([], {}, "dataset: expected images, found none"),
        (Stream(0), {}, "dataset: expected images, found none"),
        (3, {}, "dataset: expected a torch Dataset, images in a sequence or an iterable, or a sami_fast.data.Dataset, found int"),
        ("photos", {}, "dataset: expected a torch Dataset, .* found str"),
        ({"train": BYTES, "test": BYTES}, {}, "found dict; choose one of its train, test"),
        ([BYTES[0].int() * 2], {}, "dataset: image 0 cannot be used .expected whole numbers from 0 to 255, found [0-9]+ to [3-5][0-9]+"),
        ([BYTES[0].int() - 300], {}, "image 0 cannot be used .expected whole numbers from 0 to 255, found -"),
        ([BYTES[0].float()], {}, r"dataset: expected floats in \[-1, 1\], found values from [0-9.]+ to 2[0-9.]+ in image 0; bytes are"),
        ([UNIT[0]], {"range": "unit"}, r"dataset: expected floats in \[0, 1\], found values from -"),
        ([UNIT[0], UNIT[1] / 0], {}, r"found values from -?inf to inf in image 1"),
        ([UNIT[0], UNIT[1] * float("nan")], {}, r"found values from nan to nan in image 1"),
        (
            [BYTES[0], BYTES[1, :, :7, :7]],
            {},
            "dataset: expected images of one size, found 7 x 7 pixels in image 1 and 8 x 8 in image 0",
        ),
        ([BYTES[0, :, :7]], {}, "dataset: expected square images, found 7 x 8 pixels; data.image_size cuts their central squares"),
        ([BYTES[0], COLOUR[1][:2]], {}, r"dataset: expected 1 channel\(s\), found 2 in image 1"),
        ([COLOUR[0]], {"channels": 5}, "data.channels: expected 3 or 1 for dataset, found 5"),
        ([torch.zeros(8)], {}, r"image 0 cannot be used .expected an image \(C, H, W\), \(H, W, C\) or \(H, W\), found shape \[8\]"),
        ([torch.zeros(1, 0, 8)], {}, r"found shape \[1, 0, 8\]"),
        ([torch.zeros(1, 8, 8, dtype=torch.bool)], {}, "expected bytes or floats, found torch.bool"),
        ([object()], {}, "expected a tensor, an array or a Pillow image, found object"),
        ([{"picture": 1, "label": 2}], {}, "expected one of the keys image, pixel_values, .*, found picture, label"),
        ([b"no image"], {}, "dataset: image 0 cannot be used .cannot identify image file"),
        (({"label": n} for n in range(3)), {}, "dataset: image 0 cannot be used .* found label"),
        ((BYTES[0 // (n < 2)] for n in range(3)), {}, "dataset: image 2 cannot be used .ZeroDivisionError"),
        (
            Stream(),
            {"cache_gib": 1e-6},
            "dataset: an iterable is read into memory, and 17 images of this one need more than data.cac",
        ),
    ],
)
def test_what_cannot_be_used(images, settings, words):
    with pytest.raises(UserError, match=words):
        given(images, **settings)


class Lacks(Ours):
    def __init__(self) -> None:
        """No size."""


class Bright(Ours):
    def images(self, index):
        return super().images(index) + 1


class Wide(Ours):
    image_shape = (1, 8, 9)


class Raises(Ours):
    def images(self, index):
        return {}[index]


@pytest.mark.parametrize(
    ("cls", "words"),
    [
        (Lacks, "dataset: Lacks must give image_shape, size and images, and has no size"),
        (Bright, r"dataset: expected values in \[-1, 1\] from Bright.images, found"),
        (Wide, r"dataset: expected \[1, 1, 8, 9\] torch.float32 from Wide.images of one index, found \[1, 1, 8, 8\] torch.float32"),
        (Raises, "dataset: Raises.images fails .*Error"),
    ],
)
def test_a_dataset_that_breaks_its_contract(cls, words):
    with pytest.raises(UserError, match=words):
        given(cls())


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.class=nowhere:Images"], "data.class: no module nowhere"),
        ([f"data.class={spec('Nothing')}"], "data.class: .*own_datasets.py has no Nothing"),
        ([f"data.class={spec('NOTHING')}"], "data.class: .* cannot be made with data.kwargs {} .*not callable"),
        (
            [f"data.class={spec('Pixels')}", "data.kwargs.colour=red"],
            "data.kwargs {'colour': 'red'} .*unexpected keyword argument",
        ),
        (
            [f"data.class={spec('fails')}"],
            "data.class: .*:fails cannot be made .*FileNotFoundError: no such archive at .*own_datasets.py",
        ),
        (
            [f"data.class={spec('broken')}", "data.image_size=0"],
            "data.class: expected images of one size, found 9 x 9 pixels in image 39 and 8 x 8 in image 0",
        ),
        ([f"data.class={spec('Late')}", "train.steps=60"], "image 7 cannot be used .OSError: disk gone at .*own_datasets.py, line"),
        (["data.kind=given"], "data.kind: given stands for an object that was given to sami_fast.train, and here is none"),
        (["data.kind=class"], "data.class: data.kind class needs it"),
        (["data.class=a:b", "data.kind=disks"], "data.class: has no effect with data.kind disks; it is for class"),
        (["data.kwargs.a=1"], "data.kwargs: has no effect with data.kind disks; it is for class"),
        (["data.class=a:b", "data.path=photos"], "data.path: has no effect with data.kind class"),
        (["data.class=ab"], "data.class: expected package.module:Name or path/to/file.py:Name, found 'ab'"),
    ],
)
def test_mistakes_of_a_config(tmp_path, capsys, overrides, words):
    assert main(["--config", TINY, f"runs_dir={tmp_path}", *overrides, "--no-report"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("sami-fast: ")
    assert message.count("\n") == 1
    with pytest.raises(UserError, match=words):
        raise UserError(message.removeprefix("sami-fast: ").strip())


def test_settings_of_a_class_survive_their_file(tmp_path):
    config = load_config(None, {"data.class": "a:b", "data": {"kwargs": {"n": "1", "deep": [1, None, {"x": 1e-3}]}, "holdout": 0.5}})
    assert config.data.kind == "class"
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_config(str(tmp_path / "config.yaml")) == config
    assert config.data.kwargs == {"n": "1", "deep": [1, None, {"x": 1e-3}]}
    assert load_config("images", ["data.class=a:b"]).data.kind == "class"  # what is asked for goes before what the file says
    assert isinstance(load_config(None, {"train": {"steps": 7}, "optimizer.betas": (0.5, 0.6)}), Config)
    with pytest.raises(UserError, match=r"train.steps: expected a whole number, found 'many' \(settings\)"):
        load_config(None, {"train": {"steps": "many"}})


# Networks that are objects


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.SiLU(), nn.Linear(16, 6))

    def forward(self, x):
        mu, raw = self.layers(x).chunk(2, 1)
        return mu, nn.functional.softplus(raw) + 1e-3


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 3, padding=1)

    def forward(self, x_t, t):
        return self.conv(torch.cat((x_t, t[:, None, None, None].expand_as(x_t)), 1))


class Deeper(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Denoiser()

    def forward(self, x_t, t):
        return self.inner(x_t, t)


class Tied(Encoder):
    def __init__(self) -> None:
        super().__init__()
        self.twice = self.layers[1]


class Holding(nn.Module):
    """With what networks hold beside weights: a mask that does not lie in a row, and a number that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.full((3, 4), -torch.inf).triu(1).T)
        self.register_buffer("scratch", torch.zeros(2), persistent=False)
        self.number = 3

    def get_extra_state(self):
        return {"number": self.number}

    def set_extra_state(self, state):
        self.number = state["number"]


class RichEncoder(Encoder, Holding):
    def __init__(self) -> None:
        super().__init__()
        self.layers.insert(2, nn.BatchNorm1d(16))
        self.layers.insert(3, nn.Dropout(0.5))


class RichDenoiser(Denoiser, Holding):
    pass


def rich() -> Sami:
    torch.manual_seed(0)
    model = Sami(RichEncoder(), RichDenoiser(), Cosine(-6.0, 4.0))
    model.encoder.number = 5
    model.encoder.layers[2].running_mean.normal_()
    return model


def foreign(seed: int = 0) -> Sami:
    torch.manual_seed(seed)
    return Sami(Encoder(), Denoiser(), Cosine(-6.0, 4.0))


STAGED = {"train.mode": "staged", "train.denoiser_steps": 4, "train.bank_steps": 3}
MODES = {"joint": {}, "staged": STAGED, "accumulated": {"engine.gradient_accumulation": 2}, "zero2": {"engine.zero_stage": 2}}


@pytest.mark.parametrize("mode", MODES)
def test_any_networks_train_from_python(tmp_path, mode):
    model = foreign()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    settings = {"runs_dir": tmp_path, **MODES[mode]}
    folder = train(TINY, model, Pixels(), settings=settings)
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    stored = load_file(folder / "model/model.safetensors")
    assert all(torch.equal(p, stored[name]) for name, p in model.named_parameters())
    assert not model.training
    assert (model.image_shape, model.latent_size) == ((1, 8, 8), 3)
    model.train().loss(UNIT[:4]).backward()  # it is an ordinary module still
    run = open_run(folder, 8, model=model, dataset=Pixels())
    assert run.images(torch.arange(2)).shape == (2, 1, 8, 8)
    assert cli.main(["encode", str(folder), "--output", str(tmp_path / "latents.npz")]) == 2


@pytest.mark.parametrize("mode", ["joint", "staged"])
def test_they_resume_bit_for_bit(tmp_path, monkeypatch, mode):
    settings = {"runs_dir": tmp_path, **MODES[mode]}
    whole = train(TINY, foreign(), Pixels(), settings=settings | {"name": "whole"})
    from sami_fast.engine.base import BaseEngine

    save = BaseEngine.save

    def save_and_stop(self, folder, step, state, facts):
        save(self, folder, step, state, facts)
        if step == 8:
            raise InterruptedError

    with monkeypatch.context() as patched:
        patched.setattr(BaseEngine, "save", save_and_stop)
        with pytest.raises(InterruptedError):
            train(TINY, foreign(), Pixels(), settings=settings | {"name": "stopped"})
    model = foreign(seed=1)  # its weights come from the checkpoints
    stopped = train(TINY, model, Pixels(), settings=settings | {"name": "stopped"}, resume=True)
    assert_same_weights(whole, stopped)
    if mode == "staged":
        other = foreign()
        other.denoiser = Deeper()
        with pytest.raises(UserError, match=r"holds no inner.conv.weight of this model's denoiser: it is of another model"):
            train(TINY, other, Pixels(), settings=settings | {"name": "stopped"}, resume=True)
        assert {folder.name for folder in (tmp_path / DENOISERS).iterdir()} == {"whole", "stopped"}


@pytest.mark.parametrize("mode", ["joint", "staged", "zero2"])
def test_what_networks_hold_beside_weights(tmp_path, monkeypatch, mode):
    """It is saved, it stays as it is, and a resumed run with norms over the batch and dropout is the same bit for bit."""
    settings = {"runs_dir": tmp_path, **MODES[mode]}
    model, before = rich(), dict(rich().named_buffers())
    whole = train(TINY, model, Pixels(), settings=settings | {"name": "whole"})
    assert before.keys() == dict(model.named_buffers()).keys()
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())
    assert (model.encoder.number, model.denoiser.number) == (5, 3)
    stored = load_file(whole / "model/model.safetensors")
    assert stored.keys() == model.state_dict().keys() - {"encoder._extra_state", "denoiser._extra_state", LOSS_STEP}
    assert all(torch.equal(stored[name], value) for name, value in before.items() if "scratch" not in name)
    train(TINY, rich(), Pixels(), settings=settings | {"name": "again"})
    assert_same_weights(whole, tmp_path / "again")
    shutil.rmtree(tmp_path / "again/model")
    shutil.rmtree(tmp_path / "again/checkpoints/step_12")
    assert_same_weights(whole, train(TINY, rich(), Pixels(), settings=settings | {"name": "again"}, resume=True))


def test_sizes_are_found_without_changing_a_network():
    model = rich()
    before = {name: value.clone() for name, value in model.state_dict().items() if "_extra" not in name}
    for what in ("image_shape", "latent_size"):
        with pytest.raises(
            AttributeError, match=rf"{what}: the encoder does not say it; give it to the model, Sami\(\.\.\., {what}=\.\.\.\)"
        ):
            getattr(model, what)
    with pytest.raises(AttributeError, match="the encoder does not say it"):
        sample(model, 2, seed=0)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = model.nothing
    model.know_sizes(UNIT[:1])
    assert (model.image_shape, model.latent_size) == ((1, 8, 8), 3)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert sample(model.eval(), 2, seed=0, num_steps=2).shape == (2, 1, 8, 8)


def test_a_report_on_objects(tmp_path):
    model = foreign()
    folder = train(TINY, model, Ours(), settings={"runs_dir": tmp_path, "report.images": 16, "data.holdout": 0.5})
    model = foreign(seed=1)  # made again; what it lacks is seen in the data
    model.load_state_dict(load_file(folder / "model/model.safetensors"))
    page = write_report(folder, model=model, dataset=Ours())
    assert (model.image_shape, model.latent_size, model.training) == ((1, 8, 8), 3, False)
    assert "number" in json.loads((page.parent / "metrics.json").read_text())["linear_r2"]


def test_networks_of_this_package_can_be_given_and_loaded_again(tmp_path):
    built = Sami.build(
        {
            "encoder": {"image_channels": 1, "image_size": 8, "channels": [8, 8], "latent_size": 2},
            "denoiser": {"image_channels": 1, "image_size": 8, "channels": [4, 8], "embedding_size": 16},
        },
        {"kind": "cosine", "logsnr_min": -5.0, "logsnr_max": 4.0},
    )
    folder = train(TINY, built, Pixels(), settings={"runs_dir": tmp_path})
    loaded = Sami.from_pretrained(folder)
    assert loaded.latent_size == 2
    assert loaded.schedule.settings == built.schedule.settings
    assert torch.equal(loaded.encode(UNIT[:2]).mu, built.encode(UNIT[:2]).mu)
    assert load_config(str(folder / "config.yaml")).schedule.kind == "cosine"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"model": nn.Linear(2, 2)}, "model: expected a Sami"),
        (
            {"model": foreign(), "settings": {"train.mode": "frozen", "denoiser.pretrained": "x"}},
            "train.mode: expected joint, denoiser or",
        ),
        (
            {"model": Sami(Encoder(), Denoiser(), Cosine(-6.0, 4.0), image_shape=(1, 9, 9))},
            r"dataset: expected images of shape \[1, 9, 9\]",
        ),
        (
            {"model": Sami(Tied(), Denoiser(), Cosine(-6.0, 4.0)), "settings": {"engine.zero_stage": 1}},
            "model: expected each weight under one name, found encoder.layers.1.weight again as encoder.twice.weight",
        ),
        ({"model": foreign(), "settings": {"engine.score": "dual"}}, "engine.score: dual needs an encoder made of sami_fast.models"),
        ({"config": Config(), "settings": {"train.steps": 3}}, "settings: expected none beside a Config"),
        ({"config": {"data.kind": "disks"}, "dataset": 3}, "dataset: expected a torch Dataset"),
        ({"config": {"data": {"kind": "disks"}}}, "data.kind: expected once, found twice"),
        ({"config": "nowhere"}, "--config: no file nowhere|--config: .*nowhere"),
        ({"dataset": []}, "dataset: expected images, found none"),
    ],
)
def test_mistakes_from_python(tmp_path, arguments, words):
    config = arguments.get("config", TINY)
    settings = {} if isinstance(config, Config) else {"runs_dir": tmp_path}
    with pytest.raises(UserError, match=words):
        train(**{"dataset": Pixels(), **arguments, "config": config, "settings": settings | arguments.get("settings", {})})
    assert not (tmp_path / "tiny").exists()
