"""Rooms and avatars: what they show, their factors and attributes, clips, and that they are rendered once."""

import multiprocessing
import os
import sys

import numpy as np
import pytest
import torch

from sami_fast.cli import main
from sami_fast.config import DataConfig, load_config
from sami_fast.data import Avatars, Rooms, open_dataset, rooms
from sami_fast.data.avatars import ATTRIBUTES, PARTS
from sami_fast.errors import UserError
from sami_fast.evaluation import evaluate
from sami_fast.plan import image_shape_of
from sami_fast.train import train

RANGES = {"size": (0.5, 1.0), "x": (-0.5, 0.5), "y": (-0.5, 0.5)} | dict.fromkeys(
    ("floor_hue", "wall_hue", "object_hue", "yaw"), (0.0, 1.0)
)
SHAPES = ("box", "ball", "cylinder", "cone")
PLAIN = {"floor_hue": 0.1, "wall_hue": 0.6, "object_hue": 0.9, "shape": 0.0, "size": 0.8, "x": 0.0, "y": 0.0, "yaw": 0.1}


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """The cache folder of this module."""
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def panda():
    pytest.importorskip("panda3d.core", reason="needs panda3d: pip install 'sami-fast[rooms]'")


@pytest.fixture
def faces():
    pytest.importorskip("resvg_py", reason="needs resvg-py: pip install 'sami-fast[avatars]'")
    return pytest.importorskip("python_avatars", reason="needs python-avatars: pip install 'sami-fast[avatars]'")


def make_rooms(kept, count=40, num_clips=3, shapes=SHAPES, ranges=RANGES, **options) -> Rooms:
    return Rooms(count, num_clips, shapes, ranges, **{"clip_length": 5, "image_size": 32, "cache_dir": kept} | options)


def shown(source: Rooms, **factors) -> torch.Tensor:
    """One room, [C, H, W] int."""
    return source.render(torch.tensor([[(PLAIN | factors)[name] for name in source.factor_order]]))[0].int()


def changed(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Where two images differ, [H, W]."""
    return (one - other).abs().amax(0) > 8


# Rooms


def test_a_room_is_what_its_factors_say(panda, kept):
    source = make_rooms(kept, holdout=0.0)
    index = torch.arange(40)
    pixels, factors = source.pixels(index), source.factors(index)
    assert pixels.shape == (40, 3, 32, 32)
    assert pixels.dtype == torch.uint8
    assert factors.dtype == torch.float32
    assert source.factor_names == ("floor_hue", "wall_hue", "object_hue", "shape", "size", "x", "y", "yaw")
    assert torch.equal(pixels, source.render(factors))  # all factors are reported, so they are the whole state
    backwards = index.flip(0)
    assert torch.equal(source.pixels(backwards), pixels.flip(0))
    assert torch.equal(source.images(index[:2]), pixels[:2].float() / 127.5 - 1)
    for name, values in zip(source.factor_names, factors.T, strict=True):
        low, high = RANGES.get(name, (0, 3))
        assert low <= values.min() < low + 0.2 * (high - low)
        assert high - 0.2 * (high - low) < values.max() <= high
    assert set(factors[:, 3].tolist()) == {0, 1, 2, 3}


def test_other_seeds_show_other_rooms(panda, kept):
    assert not torch.equal(make_rooms(kept, seed=1).factors(torch.arange(5)), make_rooms(kept).factors(torch.arange(5)))


def test_splits_of_rooms_share_nothing(panda, kept):
    training, evaluation = (make_rooms(kept, holdout=0.25, split=split) for split in (0, 1))
    assert (training.size, evaluation.size, training.held_out) == (30, 10, True)
    assert training.fingerprint == evaluation.fingerprint
    both = torch.cat([source.factors(torch.arange(source.size)) for source in (training, evaluation)])
    everything = make_rooms(kept, holdout=0.0).factors(torch.arange(40))
    assert torch.equal(both[both[:, 5].argsort()], everything[everything[:, 5].argsort()])


def test_a_constant_is_no_factor(panda, kept):
    source = make_rooms(kept, count=4, shapes=["cone"], ranges=RANGES | {"yaw": (0.25, 0.25), "wall_hue": (0.5, 0.5)})
    assert source.factor_names == ("floor_hue", "object_hue", "size", "x", "y")
    assert source.factors(torch.arange(2)).shape == (2, 5)


def test_each_hue_colours_its_own_part(panda, kept):
    source = make_rooms(kept, image_size=64)
    parts = [changed(shown(source), shown(source, **{name: PLAIN[name] - 0.4})) for name in ("floor_hue", "wall_hue", "object_hue")]
    for part in parts:
        assert part.sum() > 200
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert (parts[one] & parts[other]).sum() < 150  # of 4096: pixels on a border show both
    assert not changed(shown(source), shown(source, floor_hue=1.1)).any()


@pytest.mark.parametrize("shape", range(4))
def test_the_object_moves_grows_and_turns(panda, kept, shape):
    source = make_rooms(kept, image_size=64)

    def seen(**factors) -> torch.Tensor:
        return changed(shown(source, shape=shape, **factors), shown(source, shape=shape, object_hue=0.4, **factors)).nonzero().float()

    (row, column), (lower, _), (_, right) = (seen(**at).mean(0) for at in ({}, {"y": -0.3}, {"x": 0.3}))
    assert 4 < right - column < 16
    assert 2 < lower - row < 16
    assert 1.5 < len(seen(size=1.0)) / len(seen(size=0.7)) < 2.5  # the square of the width
    assert len(seen(size=0.5)) > 50
    assert 0.75 < len(seen(y=0.5)) / len(seen(y=-0.5)) < 1.0  # seen from afar
    turns = [shown(source, shape=shape, yaw=turn / 8) for turn in range(8)]
    for one in range(8):
        for other in range(one):
            assert changed(turns[one], turns[other]).sum() > 15
    assert not changed(turns[0], shown(source, shape=shape, yaw=1.0)).any()


def test_all_of_the_largest_object_is_in_view(panda, kept):
    source = make_rooms(kept, image_size=64)
    for shape in range(4):
        for x in (-0.5, 0.5):
            for y in (-0.5, 0.5):
                at = {"shape": shape, "x": x, "y": y, "size": 1.0}
                where = changed(shown(source, **at), shown(source, **at | {"object_hue": 0.4}))
                assert where.sum() > 300
                assert not torch.cat((where[0], where[-1], where[:, 0], where[:, -1])).any()


def test_grey_rooms_are_not_rendered_anew(panda, kept, monkeypatch):
    colour = make_rooms(kept).pixels(torch.arange(4)).float()
    monkeypatch.setattr(Rooms, "_rendered", lambda self, numbers: pytest.fail("rendered again"))
    grey = make_rooms(kept, channels=1)
    assert grey.image_shape == (1, 32, 32)
    luma = 0.299 * colour[:, 0] + 0.587 * colour[:, 1] + 0.114 * colour[:, 2]
    assert (grey.pixels(torch.arange(4))[:, 0] - luma).abs().max() < 1


def test_unknown_shapes(kept):
    with pytest.raises(ValueError, match="shapes: expected some of box, ball, cylinder, cone, found"):
        make_rooms(kept, shapes=["torus"])
    with pytest.raises(ValueError, match="moving: expected some of floor_hue"):
        make_rooms(kept, moving=[])


# Clips of rooms


def test_clips_move_at_constant_velocity(panda, kept):
    source = make_rooms(kept, num_clips=3)
    assert (source.num_clips, source.clip_length) == (3, 5)
    index = torch.tensor([2, 0])
    clips, factors = source.clips(index), source.clip_factors(index)
    assert clips.shape == (2, 5, 3, 32, 32)
    assert factors.shape == (2, 5, 8)
    frames = source.render(factors.flatten(0, 1))
    assert torch.equal(clips.flatten(0, 1), frames.float() / 127.5 - 1)
    assert torch.allclose(factors.diff(dim=1).diff(dim=1), torch.zeros(2, 3, 8), atol=1e-6)
    moving = [name in ("size", "x", "y", "yaw") for name in source.factor_names]
    steps = factors.diff(dim=1).abs().sum(1)
    assert (steps[:, moving] > 0).all()
    assert (steps[:, [not moves for moves in moving]] == 0).all()
    assert torch.equal(clips, make_rooms(kept, num_clips=3, split=1).clips(index))
    still = source.factors(torch.arange(source.size))
    assert not (still[:, None, None, 5] == factors[None, :, :, 5]).any()


def test_other_factors_move_when_asked(panda, kept):
    source = make_rooms(kept, num_clips=2, moving=["wall_hue"])
    steps = source.clip_factors(torch.arange(2)).diff(dim=1).abs().sum((0, 1))
    assert [name for name, step in zip(source.factor_names, steps.tolist(), strict=True) if step] == ["wall_hue"]


# Avatars


def make_avatars(kept, count=120, **options) -> Avatars:
    return Avatars(count, **{"image_size": 32, "cache_dir": kept} | options)


def test_avatars(faces, kept):
    source = make_avatars(kept, holdout=0.0)
    index = torch.arange(120)
    pixels, attributes = source.pixels(index), source.factors(index)
    assert pixels.shape == (120, 3, 32, 32)
    assert len(pixels.flatten(1).unique(dim=0)) == 120
    assert attributes.shape == (120, 18)
    assert set(attributes.unique().tolist()) == {0.0, 1.0}
    assert source.attribute_names == set(source.factor_names) == set(ATTRIBUTES)
    assert (attributes.mean(0) > 0.05).all()
    assert (attributes.mean(0) < 0.7).all()
    again = make_avatars(kept, count=6, holdout=0.0)  # rendered by itself
    assert torch.equal(again.pixels(index[:6]), pixels[:6])
    assert torch.equal(again.factors(index[:6]), attributes[:6])
    assert not torch.equal(make_avatars(kept, count=6, holdout=0.0, seed=1).factors(index[:6]), attributes[:6])
    training, evaluation = (make_avatars(kept, holdout=0.25, split=split) for split in (0, 1))
    assert (training.size, evaluation.size) == (90, 30)
    assert len(torch.cat([part.pixels(torch.arange(part.size)) for part in (training, evaluation)]).flatten(1).unique(dim=0)) == 120


def test_attributes_say_what_can_be_seen(faces, kept):
    source = make_avatars(kept, holdout=0.0)
    chosen = source._chosen(torch.arange(120))
    for row in source.factors(torch.arange(120)).tolist():
        shows = {name for name, value in zip(source.factor_names, row, strict=True) if value}
        assert len(shows & {"eyeglasses", "sunglasses"}) < 2
        assert len(shows & {"hat", "bald", "long_hair"}) < 2
        assert len(shows & {"black_hair", "brown_hair", "blond_hair", "red_hair", "grey_hair"}) < 2
        assert not {"eyes_closed", "sunglasses"} <= shows
    rows = source.factors(torch.arange(120))
    hairless = rows[:, source.factor_names.index("hat")] * (
        1 - rows[:, [source.factor_names.index(n) for n in ("beard", "moustache")]].sum(1)
    )
    colours = [number for number, name in enumerate(source.factor_names) if name.endswith("_hair") and name != "long_hair"]
    assert hairless.sum() > 3
    assert not rows[hairless.bool()][:, colours].any()
    groups = [group for group, _ in chosen["facial_hair"]]
    assert rows[:, source.factor_names.index("beard")].tolist() == [float(group == "beard") for group in groups]


def test_every_part_shows_on_every_head(faces, kept, monkeypatch):
    """No top, whatever it is, hides glasses, beard or mouth; no value of a part is drawn like another."""
    source = make_avatars(kept, count=2, image_size=64)
    plain = {part: next((group, values[0]) for group, values in groups.items()) for part, groups in PARTS.items()}

    def drawn(**parts) -> np.ndarray:
        monkeypatch.setattr(source, "_chosen", lambda numbers: {part: [value] for part, value in (plain | parts).items()})
        return next(iter(source._rendered(torch.zeros(1, dtype=torch.int64)))).astype(int)

    def differ(one: np.ndarray, other: np.ndarray) -> int:
        return int((np.abs(one - other).max(-1) > 16).sum())

    for group, tops in PARTS["top"].items():
        for top in tops:
            bare = drawn(top=(group, top))
            for part, value in (
                ("facial_hair", ("beard", "BEARD_LIGHT")),
                ("accessory", ("eyeglasses", "ROUND")),
                ("accessory", ("sunglasses", "SUNGLASSES")),
                ("mouth", ("shout", "SCREAM_OPEN")),
                ("eyes", ("closed", "CLOSED")),
                ("clothing_color", ("light", "WHITE")),
            ):
                assert differ(bare, drawn(top=(group, top), **{part: value})) > 8, (top, value)
    for part, groups in PARTS.items():
        base = {"hair_color": {"top": ("short", "QUIFF")}, "hat_color": {"top": ("hat", "TURBAN")}}.get(part, {})
        images = [drawn(**base | {part: (group, value)}) for group, values in groups.items() for value in values]
        for number, image in enumerate(images):
            assert all(differ(image, other) > 2 for other in images[:number]), (part, number)


# Rendered once


def test_the_cache_is_used(panda, kept, monkeypatch, caplog):
    first = make_rooms(kept, count=7)
    assert "data.kind rooms: rendering 7 images into" in caplog.text
    monkeypatch.setitem(sys.modules, "panda3d.core", None)  # nor is the package needed any more
    caplog.clear()
    again = make_rooms(kept, count=7)
    assert not caplog.text
    assert torch.equal(first.pixels(torch.arange(6)), again.pixels(torch.arange(6)))
    assert again.fingerprint == first.fingerprint
    assert "7 images, once, into" in again.facts()["rendered"]


def test_half_a_file_is_rendered_anew(panda, tmp_path):
    first = make_rooms(str(tmp_path), count=5)
    expected = first.pixels(torch.arange(4))
    (file,) = (tmp_path / "rooms").glob("images-*.npy")
    os.truncate(file, file.stat().st_size // 2)
    assert torch.equal(make_rooms(str(tmp_path), count=5).pixels(torch.arange(4)), expected)


def test_of_several_processes_one_renders(panda, tmp_path, monkeypatch):
    render = Rooms._rendered

    def told(self, numbers):
        (tmp_path / f"rendered by {os.getpid()}").touch()
        return render(self, numbers)

    def open_one(queue) -> None:
        queue.put(int(make_rooms(str(tmp_path), count=300).array.sum(dtype=np.int64)))

    monkeypatch.setattr(Rooms, "_rendered", told)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    several = [context.Process(target=open_one, args=(queue,)) for _ in range(3)]
    for process in several:
        process.start()
    sums = [queue.get(timeout=60) for _ in several]
    for process in several:
        process.join()
    assert [process.exitcode for process in several] == [0, 0, 0]
    assert len({*sums}) == 1
    assert len([*tmp_path.glob("rendered by *")]) == 1
    assert len([*(tmp_path / "rooms").glob("*.npy")]) == 1
    assert not [*(tmp_path / "rooms").glob(".partial*")]


@pytest.mark.parametrize(
    ("kind", "package", "name"),
    [("rooms", "panda3d.core", "panda3d"), ("avatars", "python_avatars", "python-avatars"), ("avatars", "resvg_py", "resvg-py")],
)
def test_a_missing_package_is_named(tmp_path, monkeypatch, capsys, kind, package, name):
    rooms._scene.cache_clear()
    monkeypatch.setitem(sys.modules, package, None)
    if name == "resvg-py":
        pytest.importorskip("python_avatars", reason="needs python-avatars: pip install 'sami-fast[avatars]'")
    config = [f"data.kind={kind}", f"data.cache_dir={tmp_path}", "data.image_size=16", f"data.{kind}.images=2"]
    assert main(["data", "disks", *config, "--seconds", "0"]) == 2
    error = capsys.readouterr().err
    sentence = f"data.kind {kind} renders with {name}, which is not installed; `pip install 'sami-fast[{kind}]'`"
    assert error.count(sentence) == 1
    assert "Traceback" not in error
    assert not [*(tmp_path / kind).glob("*.npy")]


def test_a_cache_that_cannot_be_written(panda, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"data.cache_dir: cannot keep the images of data.kind rooms there"):
        make_rooms(str(tmp_path / "file"))


# Whole runs


def test_through_the_config(panda, kept):
    settings = ["data.kind=rooms", f"data.cache_dir={kept}", "data.rooms.images=30", "data.rooms.clips=2", "data.rooms.yaw=[0, 0]"]
    config = load_config(None, [*settings, "data.video.clip_length=4", "data.holdout=0.2", "seed=5"])
    training, evaluation = (open_dataset(config.data, config.seed, split) for split in (0, 1))
    assert training.image_shape == (3, 64, 64)
    assert (training.size, evaluation.size, evaluation.num_clips, evaluation.clip_length) == (24, 6, 2, 4)
    assert "yaw" not in training.factor_names
    assert open_dataset(config.data, 6).fingerprint == training.fingerprint  # the run's seed changes no image
    assert training.fingerprint != open_dataset(load_config(None, [*settings, "data.rooms.seed=1"]).data, 5).fingerprint


@pytest.mark.parametrize("kind", ["rooms", "avatars"])
def test_a_plan_renders_nothing(tmp_path, kind):
    config = load_config(kind, [f"data.cache_dir={tmp_path}", "data.channels=1"])
    assert image_shape_of(config) == (1, 64, 64)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("rooms.shapes=[box, box]", "data.rooms.shapes: expected some of box, ball, cylinder and cone, each once, found ['box', 'box']"),
        ("rooms.moving=[shape]", "data.rooms.moving: expected some of the ranges here, each once, found ['shape']"),
        ("rooms.x=[-2, 0]", "data.rooms.x: expected two numbers [low, high] with -0.5 <= low <= high <= 0.5, found [-2.0, 0.0]"),
        ("avatars.images=1", "data.avatars.images: expected at least 2, found 1"),
    ],
)
def test_settings(setting, sentence):
    with pytest.raises(UserError) as error:
        load_config(None, [f"data.{setting}"])
    assert str(error.value) == sentence


def run(tmp_path, kept, *settings):
    common = [f"runs_dir={tmp_path}", "report.images=40", "data.image_size=16", f"data.cache_dir={kept}", "data.holdout=0.5"]
    return train(load_config("tests/tiny.yaml", [*common, *settings]))


def test_a_run_on_rooms_is_scored_by_circles_and_straightness(panda, kept, tmp_path):
    settings = ["data.kind=rooms", "data.rooms.images=120", "data.rooms.clips=6", "data.video.clip_length=5"]
    scores = evaluate(run(tmp_path, kept, *settings), baselines=False)
    assert scores.scores["linear_r2"].keys() == set(Rooms.factor_order)
    assert Rooms.periods == dict.fromkeys(("floor_hue", "wall_hue", "object_hue", "yaw"), 1.0)
    assert scores.straightness["latents"]["clips"] == 6
    assert "tad_nashae" not in scores.scores


def test_a_run_on_avatars_is_scored_by_attributes(faces, kept, tmp_path):
    scores = evaluate(run(tmp_path, kept, "data.kind=avatars", "data.avatars.images=160", "report.images=80"), baselines=False).scores
    assert scores["attributes_scored"] == 18
    assert {"tad_nashae", "tad_infodiffusion", "latent_quality"} <= scores.keys()
    assert "linear_r2" not in scores


def test_defaults_of_the_config_are_those_of_the_classes():
    data = DataConfig()
    assert data.rooms.moving == ["size", "x", "y", "yaw"]
    assert {name: tuple(getattr(data.rooms, name)) for name in RANGES} == RANGES
    assert set(data.rooms.shapes) == set(rooms.SHAPES)
