"""R2 of all pixels from codes, and the verdict on latents that overlook what is largest in the images."""

import numpy as np
import pytest
import torch

from sami_fast.evaluation.health import OVERLOOKED, diagnose
from sami_fast.metrics.pixels import pixel_r2


def batches(codes: np.ndarray, pixels: np.ndarray, size: int = 7):
    return [(codes[at : at + size], pixels[at : at + size]) for at in range(0, len(codes), size)]


def test_known_answers():
    generator = np.random.default_rng(0)
    factors, noise = generator.normal(size=(2, 4000, 2)) * [[[3.0, 1.0]], [[1.0, 1.0]]]
    pixels = np.column_stack((5 + factors, -factors[:, 0], np.full(4000, 2.0)))  # variances 9, 1, 9, 0
    first, second = slice(0, 2000), slice(2000, None)

    def read(codes: np.ndarray) -> float:
        return pixel_r2(batches(codes[first], pixels[first]), batches(codes[second], pixels[second]))

    assert read(factors @ [[1.0, 2.0], [0.5, -1.0]] + 7) == pytest.approx(1.0)  # any linear map of everything
    assert read(factors[:, :1]) == pytest.approx(18 / 19, abs=0.01)
    assert read(factors[:, 1:]) == pytest.approx(1 / 19, abs=0.01)
    assert read(factors[:, :1] + 3 * noise[:, :1]) == pytest.approx(9 / 19, abs=0.02)  # half of what it says is noise
    assert read(noise) == pytest.approx(0.0, abs=0.01)
    assert read(np.column_stack((factors, factors))) == pytest.approx(1.0)  # codes that say the same
    whole = pixel_r2([(factors[first], pixels[first])], [(factors[second], pixels[second])])
    assert read(factors) == pytest.approx(whole)


@pytest.mark.parametrize(
    ("fitted", "scored", "sentence"),
    [
        ([], [(np.ones((3, 1)), np.eye(3))], "fitted: expected images, found none"),
        ([(np.ones((3, 1)), np.eye(3))], [(np.ones((3, 1)), np.ones((3, 3)))], "scored: expected images that vary, found none"),
        ([(np.ones((3, 1)), np.eye(3))], [], "scored: expected images that vary, found none"),
        ([(np.ones((2, 1)), np.eye(3))], [], "pixels: expected 2 rows, as codes has, found 3"),
        ([(np.full((3, 1), np.nan), np.eye(3))], [], "codes: expected finite numbers, found NaN or infinity"),
    ],
)
def test_refusals(fitted, scored, sentence):
    with pytest.raises(ValueError, match=sentence):
        pixel_r2(fitted, scored)


@pytest.mark.parametrize(
    ("read", "word"), [(0.02, "overlooking"), (0.26, "overlooking"), (0.28, "healthy"), (0.9, "healthy"), (None, "healthy")]
)
def test_latents_that_overlook_what_is_largest_are_not_healthy(read, word):
    assert pytest.approx(0.27) == OVERLOOKED * 0.9
    health = diagnose(np.full(4, 3.0), 12.5, gain=10.0, other=-5.0, pixel_r2=read, pixel_r2_of_components=0.9)
    assert health.word == word
    if word == "overlooking":
        assert f"reads {read:.0%} of the pixels' variance from them, and 90% from as many principal components" in health.reason
        assert health.remedy


def test_a_run_is_measured_beside_its_principal_components(tmp_path):
    """Bright and dark images, and an encoder that sees nothing but how bright they are; then one that sees one pixel's own noise."""
    from sami_fast import Sami
    from sami_fast.evaluation.scores import pixel_scores
    from sami_fast.schedule import build_schedule

    class Source:
        image_shape = (1, 4, 4)

        def images(self, index: torch.Tensor) -> torch.Tensor:
            noise = torch.stack([torch.randn(1, 4, 4, generator=torch.Generator().manual_seed(int(i))) for i in index])
            return 0.1 * noise + (index % 7 - 3.0).view(-1, 1, 1, 1) / 4

    class Run:
        evaluation, batch_size, num_train, count = Source(), 50, 400, 300
        config = type("Config", (), {"seed": 0})

        def __init__(self, see):
            schedule = build_schedule({"kind": "uniform_logsnr", "logsnr_min": -5.0, "logsnr_max": 5.0})
            encoder = lambda x: (see(x), torch.full((len(x), 1), 1e-6))  # noqa: E731
            self.model = Sami(encoder, lambda x, t: x, schedule, image_shape=(1, 4, 4), latent_size=1)

        def train_images(self, index):
            return Source().images(index)

        def images(self, index):
            return Source().images(index + 1000)

    bright = pixel_scores(Run(lambda x: x.mean((1, 2, 3))[:, None]))
    assert bright["pixel_r2"] == pytest.approx(bright["pixel_r2_of_components"], abs=0.01)
    assert bright["pixel_r2"] > 0.9
    blind = pixel_scores(Run(lambda x: (x[:, 0, 0, 0] - x.mean((1, 2, 3)))[:, None]))
    assert blind["pixel_r2"] < 0.1
    few = Run(lambda x: x.mean((1, 2, 3))[:, None])
    few.num_train = 3
    assert pixel_scores(few) == {}
