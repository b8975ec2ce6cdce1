"""The feed: batches prepared ahead are the batches that would have been made on the spot, whatever goes wrong on the way."""

import gc
import threading
import time
import weakref

import pytest
import torch

from sami_fast.data import Feed
from sami_fast.data.dataset import EightBit
from sami_fast.data.order import pooled_order
from sami_fast.errors import UserError

# nothing here may hang
pytestmark = [pytest.mark.usefixtures("no_thread_is_left"), pytest.mark.timeout(60)]

CPU = torch.device("cpu")


class Numbers(EightBit):
    """Image n holds n in two bytes, brighter on its left, so that a mirrored one can be told. Made by `workers` threads."""

    image_shape = (1, 2, 2)

    def __init__(self, size: int, workers: int = 0, ahead: int = 0, seconds: float = 0.0, fails: int = -1) -> None:
        self.size, self.workers, self.ahead, self.seconds, self.fails = size, workers, ahead, seconds, fails
        self.lock, self.read, self.running, self.most = threading.Lock(), 0, 0, 0
        self.alive = weakref.WeakSet()

    def pixels(self, index: torch.Tensor) -> torch.Tensor:
        with self.lock:
            self.read += 1
            self.running += 1
            self.most = max(self.most, self.running)
        time.sleep(self.seconds * (1 + int(index[0]) % 3))  # later batches may be ready first
        with self.lock:
            self.running -= 1
        if (index == self.fails).any():
            raise UserError(f"image {self.fails} is broken")
        found = torch.stack((index % 100 + 100, index // 100), -1)[:, None, None].expand(-1, 1, 2, 2).to(torch.uint8)
        self.alive.add(found)
        return found


class Pooled(Numbers):
    """With an order and an epoch of its own, as videos have."""

    epoch_size = 50

    def order(self, epoch: int, seed: int, batch_size: int) -> torch.Tensor:
        return pooled_order(torch.arange(50) // 10, seed, epoch, 50, batch_size, 20) + 50 * (epoch % 2)


def opened(dataset, batch: int = 6, micro_batches: int = 1, rank: int = 0, world: int = 1, seed: int = 0, flip: bool = False) -> Feed:
    return Feed(dataset, batch, micro_batches, rank, world, seed, CPU, flip)


def numbers(images: torch.Tensor) -> list[int]:
    """Which images these are, mirrored or not."""
    levels = ((images[:, 0, 0] + 1) * 127.5).round().long()
    return (levels.max(1).values - 100 + 100 * levels.min(1).values).tolist()


def mirrored(images: torch.Tensor) -> list[bool]:
    return (images[:, 0, 0, 0] < images[:, 0, 0, 1]).tolist()


def batches(feed: Feed, steps) -> list[torch.Tensor]:
    try:
        return [torch.cat([feed.micro_batch(step, micro)[0] for micro in range(feed.micro_batches)]) for step in steps]
    finally:
        feed.close()


def same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return len(found) == len(expected) and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("kind", [Numbers, Pooled])
@pytest.mark.parametrize(("workers", "ahead"), [(1, 0), (2, 40), (3, 400)])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_preparing_ahead_changes_nothing(kind, workers, ahead, micro_batches):
    """Through many epochs, which also end inside a batch."""
    plain = batches(opened(kind(100), micro_batches=micro_batches, flip=True), range(60))
    dataset = kind(100, workers, ahead, seconds=1e-4)
    assert same(batches(opened(dataset, micro_batches=micro_batches, flip=True), range(60)), plain)
    assert dataset.most <= workers


@pytest.mark.parametrize("kind", [Numbers, Pooled])
def test_a_batch_is_a_function_of_the_step(kind):
    plain = batches(opened(kind(100), flip=True), range(40))
    for steps in ([7, 7, 3, 39, 0, 1, 2, 20, 19, 18], range(11, 40), range(39, -1, -1)):
        assert same(batches(opened(kind(100, 2, 50), flip=True), steps), [plain[step] for step in steps])


def test_micro_batches_in_any_order():
    plain, feed = opened(Numbers(100), 8, 4), opened(Numbers(100, 2), 8, 4)
    for step, micro in ((0, 3), (0, 0), (2, 1), (2, 2), (1, 0), (1, 0)):
        assert torch.equal(feed.micro_batch(step, micro)[0], plain.micro_batch(step, micro)[0])
        assert torch.equal(feed.micro_batch(step, micro)[1], plain.micro_batch(step, micro)[1])
    feed.close()


@pytest.mark.parametrize(("world", "micro_batches"), [(2, 1), (2, 3), (3, 2), (6, 2)])
def test_ranks_share_each_epoch(world, micro_batches):
    dataset = Pooled(100, 2, 20)
    seen: list[tuple[int, int]] = []  # position, image
    for rank in range(world):
        feed = opened(dataset, 12, micro_batches, rank, world)
        for step in range(25):
            for micro in range(micro_batches):
                images, place = feed.micro_batch(step, micro)
                seen += zip((12 * step + place).tolist(), numbers(images), strict=True)
        feed.close()
    seen.sort()
    assert [position for position, _ in seen] == list(range(300))
    for epoch in range(6):
        assert sorted(n for _, n in seen[50 * epoch : 50 * epoch + 50]) == [n + 50 * (epoch % 2) for n in range(50)]
    assert [n for _, n in seen] == [n for batch in batches(opened(dataset, 12), range(25)) for n in numbers(batch)]


def test_half_of_the_images_are_mirrored():
    class Sided(Numbers):
        def pixels(self, index: torch.Tensor) -> torch.Tensor:
            found = super().pixels(index).clone()
            return torch.stack((found[..., 0], torch.zeros_like(found[..., 0])), -1)

    def flips(seed: int, batch: int, epoch: int) -> dict[int, bool]:
        found: dict[int, bool] = {}
        steps = range(2000 * epoch // batch, 2000 * (epoch + 1) // batch)
        feed = opened(Sided(2000, 2), batch, seed=seed, flip=True)
        for step, images in zip(steps, batches(feed, steps), strict=True):
            found |= dict(zip(feed.indices(step, 0)[0].tolist(), mirrored(images), strict=True))
        return found

    first = flips(0, 50, 0)
    assert len(first) == 2000
    assert 0.45 < sum(first.values()) / 2000 < 0.55
    assert flips(0, 200, 0) == first  # a function of seed, epoch and image, not of the batch
    for other in (flips(0, 50, 1), flips(1, 50, 0)):
        assert 0.4 < sum(other[n] != first[n] for n in first) / 2000 < 0.6
    unflipped = batches(opened(Sided(2000, 2), 50), range(40))
    assert not any(flip for images in unflipped for flip in mirrored(images))


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_an_error_reaches_whoever_asks(workers):
    dataset = Numbers(60, workers, seconds=1e-3, fails=17)
    feed = opened(dataset)
    bad = next(step for step in range(10) if 17 in feed.indices(step, 0)[0].tolist())
    for step in range(bad):
        feed.micro_batch(step, 0)
    for _ in range(2):  # and again, rather than a batch with something else in it
        with pytest.raises(UserError, match=r"^image 17 is broken$"):
            feed.micro_batch(bad, 0)
    assert numbers(feed.micro_batch(bad + 1, 0)[0]) == feed.indices(bad + 1, 0)[0].tolist()
    feed.close()


def test_after_an_error_nothing_more_is_read():
    dataset = Numbers(6000, 1, ahead=3000, seconds=0.003, fails=0)
    feed = opened(dataset)
    feed.dataset.fails = int(feed.indices(0, 0)[0][0])
    with pytest.raises(UserError, match="is broken"):
        feed.micro_batch(0, 0)
    time.sleep(0.1)
    read = dataset.read
    time.sleep(0.05)
    assert dataset.read == read < 300  # of the 500 that were under way
    feed.close()


def test_closing_drops_the_batches_that_are_waiting():
    dataset = Numbers(6000, 3, ahead=3000, seconds=0.01)
    feed = opened(dataset)
    feed.micro_batch(0, 0)
    begun = dataset.read
    feed.close()
    assert dataset.read <= begun + 3 < 500  # of the 500 asked for, each thread may finish the one that it has in hand
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("feed")]
    feed.close()  # twice does no harm
    opened(Numbers(10)).close()  # nor without threads


def test_a_feed_that_is_forgotten_ends_its_threads():
    feed = opened(Numbers(100, 2))
    feed.micro_batch(0, 0)
    del feed
    gc.collect()
    deadline = time.perf_counter() + 10
    while [thread for thread in threading.enumerate() if thread.name.startswith("feed")]:
        assert time.perf_counter() < deadline
        time.sleep(0.01)


def test_time_spent_waiting():
    slow = opened(Numbers(600, 1, seconds=0.02))
    for step in range(5):
        slow.micro_batch(step, 0)
    slow.close()
    assert slow.waited >= 0.09
    fast = opened(Numbers(600, 2))
    for step in range(20):
        fast.micro_batch(step, 0)
        if step == 3:
            before = fast.waited
        time.sleep(0.005)  # a step of training
    fast.close()
    assert fast.waited - before < 0.04
    alone = opened(Numbers(600, 0, seconds=0.01))
    alone.micro_batch(0, 0)
    assert alone.waited >= 0.009  # without threads all of it


def test_what_is_held_does_not_grow():
    dataset = Numbers(6000, 2, ahead=60)
    feed = opened(dataset)
    most = 0
    for step in range(300):
        feed.micro_batch(step, 0)
        most = max(most, len(dataset.alive))
    assert most <= feed._ahead + 4
    assert len(feed._prepared) == feed._ahead
    for step in range(0, 3000, 500):  # nor by jumps
        feed.micro_batch(step, 0)
        assert len(feed._prepared) == feed._ahead
    assert len(feed._orders) <= 2
    feed.close()


def test_each_epoch_is_ordered_once():
    """Also where many epochs are under way at a time."""

    class Counted(Pooled):
        orders = 0

        def order(self, *arguments) -> torch.Tensor:
            self.orders += 1
            return super().order(*arguments)

    dataset = Counted(100, 2, ahead=500)
    feed = opened(dataset)
    for step in range(100):  # 12 epochs, and 10 ahead
        feed.micro_batch(step, 0)
    feed.close()
    assert dataset.orders <= 12 + 10 + 2


@pytest.mark.parametrize(("size", "batch"), [(1, 4), (3, 12), (5, 7), (8, 8)])
def test_a_batch_above_the_dataset(size, batch):
    shown = [n for images in batches(opened(Numbers(size, 2), batch), range(10)) for n in numbers(images)]
    for epoch in range(10 * batch // size):
        assert sorted(shown[size * epoch : size * (epoch + 1)]) == list(range(size))
