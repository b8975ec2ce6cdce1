"""What may be handed to a model: images of every common kind, and models of every dtype."""

import copy
import io

import numpy as np
import pytest
import torch
from helpers import KERNELS, normal, relative_error, tiny_denoiser, tiny_encoder
from PIL import Image, ImageCms, features
from torch import nn

from sami_fast import edit, interpolate, reconstruct, sample, traverse, use_backend
from sami_fast.config import DataConfig
from sami_fast.data import open_dataset
from sami_fast.latents.sampling import encode, invert, starting_noise
from sami_fast.methods import METHODS
from sami_fast.methods.inputs import as_images
from sami_fast.methods.sami import Sami
from sami_fast.ops.backend import BackendError
from sami_fast.pretrained import DiscreteTimeDenoiser
from sami_fast.schedule import Cosine

STEPS = {"num_steps": 2}
# Units of rounding. Held against float32, in which times lose the most: images were off by up to 7 units in 16 bits, 256 of float32's in
# float64; latents by up to 3.
ROUNDING = {torch.float16: 2**-10, torch.bfloat16: 2**-7, torch.float64: 2**-23}
ALLOWED = {torch.float16: 16, torch.bfloat16: 16, torch.float64: 600}


def pixels(channels: int, count: int = 2, height: int = 4, width: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, (count, channels, height, width), generator=generator, dtype=torch.uint8)


def pillow(image: torch.Tensor) -> Image.Image:
    """[C, H, W] uint8 -> a Pillow image."""
    array = image.permute(1, 2, 0).numpy()
    return Image.fromarray(array[..., 0] if image.shape[0] == 1 else array)


FORMS = {
    "tensor": lambda p: p,
    "floats": lambda p: p / 127.5 - 1,
    "channels last": lambda p: p.permute(0, 2, 3, 1),
    "array": lambda p: p.numpy(),
    "array, channels last": lambda p: p.permute(0, 2, 3, 1).numpy(),
    "array of the other byte order": lambda p: (p / 127.5 - 1).numpy().astype(">f4"),
    "array that may not be written": lambda p: np.frombuffer(p.numpy().tobytes(), np.uint8).reshape(p.shape),
    "array turned twice": lambda p: p.numpy()[:, :, ::-1].copy()[:, :, ::-1],
    "wide floats": lambda p: (p.double() / 127.5 - 1).numpy().astype(np.longdouble),
    "Pillow": lambda p: [pillow(image) for image in p],
    "list of tensors": list,
    "list of arrays, channels last": lambda p: [image.permute(1, 2, 0).numpy() for image in p],
    "tuple of batches": lambda p: (p[:1], p[1:]),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_form_is_the_same_batch(channels, form):
    given = pixels(channels)
    found = as_images(FORMS[form](given), (channels, 4, 6))
    torch.testing.assert_close(found.float(), given / 127.5 - 1, rtol=0, atol=1e-7)
    assert found.dtype == (torch.float64 if form == "wide floats" else torch.float32)


@pytest.mark.parametrize(
    "one",
    [
        *(lambda p: p[0], lambda p: p[0].permute(1, 2, 0), lambda p: p[0].numpy(), lambda p: pillow(p[0])),
        *(lambda p: p[0, 0], lambda p: p[0, 0].numpy()),  # grey ones without a channel
    ],
)
def test_one_image_is_a_batch_of_one(one):
    given = pixels(1)
    assert torch.equal(as_images(one(given), (1, 4, 6)), given[:1] / 127.5 - 1)
    assert torch.equal(as_images(given[:, 0], (1, 4, 6)), given / 127.5 - 1)


def test_what_fits_stays_what_it_is():
    x = normal(2, 3, 3, 3, dtype=torch.float32).clamp(-1, 1).requires_grad_()
    assert as_images(x, (3, 3, 3)) is x  # and is not taken for channels last
    assert as_images(x, None) is x
    last = torch.rand(2, 4, 6, 3, requires_grad=True)
    assert as_images(last, (3, 4, 6)).data_ptr() == last.data_ptr()
    as_images(last, (3, 4, 6)).sum().backward()
    assert torch.equal(last.grad, torch.ones_like(last))
    assert as_images(x.detach().half(), (3, 3, 3)).dtype == torch.float32
    assert as_images(x.detach(), (3, 3, 3), least=torch.float64).dtype == torch.float64


def test_pillow_images_take_the_colours_of_the_model():
    colours, grey = pixels(3)[0], pixels(1)[0]
    assert as_images(pillow(colours), (1, 4, 6)).shape == (1, 1, 4, 6)
    assert torch.equal(as_images(pillow(grey), (3, 4, 6)), (grey / 127.5 - 1).expand(1, 3, 4, 6))
    clear = pillow(torch.cat((colours, torch.zeros(1, 4, 6, dtype=torch.uint8))))
    assert torch.equal(as_images(clear, (3, 4, 6)), torch.full((1, 3, 4, 6), -1.0))  # all of it is transparent
    assert as_images(clear, (4, 4, 6)).shape == (1, 4, 4, 6)
    turned, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # a camera held upright
    pillow(colours.rot90(1, (1, 2))).save(turned, format="PNG", exif=exif)
    assert torch.equal(as_images(Image.open(turned), (3, 4, 6)), colours[None] / 127.5 - 1)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_file_has_the_pixels_that_training_sees(tmp_path, channels):
    """Of colours with a profile in which red is blue, transparent or not, of 16 bits, and of grey."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = profile.replace(b"rXYZ", b"?XYZ").replace(b"bXYZ", b"rXYZ").replace(b"?XYZ", b"bXYZ")
    colours = pixels(3, 1, 16, 16)[0]
    clear = torch.cat((colours, pixels(1, 1, 16, 16)[0]))
    sixteen = Image.fromarray(257 * colours[0].numpy().astype(np.uint16))
    made = {"a": pillow(colours), "b": pillow(clear), "c": sixteen, "d": pillow(colours[:1]), "e": pillow(colours).convert("P")}
    for name, image in made.items():
        image.save(tmp_path / f"{name}.png", **({"icc_profile": swapped} if name in "ab" else {}))
    data = DataConfig(kind="image_folder", path=str(tmp_path), channels=channels, image_size=16, holdout=0.0)
    training = open_dataset(data, 0).images(torch.arange(5))
    for file, expected in zip(sorted(tmp_path.glob("*.png")), training, strict=True):
        assert torch.equal(as_images(Image.open(file), (channels, 16, 16))[0], expected), file
    if channels == 3 and features.check("littlecms2"):
        assert (training[0] - (colours.flip(0) / 127.5 - 1)).abs().max() < 0.02


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.zeros(2, 1, 8, 8), ValueError, r"x: expected \[N, 3, 4, 6\], found \[2, 1, 8, 8\]; images are not resized"),
        (torch.zeros(2, 4, 4, 6), ValueError, r"expected \[N, 3, 4, 6\], found \[2, 4, 4, 6\]"),
        (torch.zeros(4, 6), ValueError, r"found \[4, 6\]"),
        (torch.zeros(0), ValueError, r"found \[0\]"),
        (255 * torch.ones(1, 3, 4, 6), ValueError, r"x: expected values in \[-1, 1\], found 255; of pixels in 0 to 255 give uint8"),
        (torch.full((1, 3, 4, 6), float("nan")), ValueError, "found nan"),
        (np.full((3, 4, 6), -np.inf), ValueError, "found inf"),
        (torch.zeros(1, 3, 4, 6, dtype=torch.int64), TypeError, r"x: expected floating-point .* in \[-1, 1\] or uint8, found torch.int64"),
        (torch.zeros(1, 3, 4, 6, dtype=torch.bool), TypeError, "found torch.bool"),
        (np.zeros((3, 4, 6), np.int32), TypeError, "found int32"),
        (np.array(["a"]), TypeError, "found <U1"),
        (Image.new("RGB", (5, 4)), ValueError, r"found \[3, 4, 5\]"),
        (Image.new("F", (6, 4)), ValueError, "x: a Pillow image of mode F cannot be used .floating-point pixels without a known range"),
        ([], ValueError, "x: expected images, found an empty list"),
        ([torch.zeros(3, 4, 6), torch.zeros(3, 4, 5)], ValueError, r"x\[1\]: expected \[N, 3, 4, 6\], found \[3, 4, 5\]"),
        ("photo.png", TypeError, "x: expected images as a tensor, a NumPy array, Pillow images or a list of these, found str"),
        (None, TypeError, "found NoneType"),
    ],
)
def test_what_is_no_image_is_said_in_a_sentence(images, error, message):
    with pytest.raises(error, match=message):
        as_images(images, (3, 4, 6), name="x")


def test_pillow_images_need_a_model_of_known_colours():
    with pytest.raises(ValueError, match="expected an array or a tensor for a model of 2 channels, found a Pillow image"):
        as_images(Image.new("L", (6, 4)), (2, 4, 6))


@pytest.fixture(scope="module")
def model() -> Sami:
    return Sami(tiny_encoder(), tiny_denoiser(), Cosine(-7.0, 5.0)).float().eval()


DOORS = {
    "x": lambda m, x: m.encode(x).mu,
    "x_0": lambda m, x: encode(m, x).mu,
    "x_0 of reconstruct": lambda m, x: reconstruct(m, x, seed=0, **STEPS),
    "x_0 of an inverted one": lambda m, x: reconstruct(m, x, seed=0, x_T="inverted", **STEPS),
    "x_0 of invert": lambda m, x: invert(m, x, **STEPS),
    "start": lambda m, x: traverse(m, x, 0, [0.0, 1.0], seed=0, **STEPS),
    "x_0 of edit": lambda m, x: edit(m, x, 0, [0.0, 1.0], **STEPS),
    "a": lambda m, x: interpolate(m, x, torch.zeros(1, 1, 8, 8), 3, **STEPS),
    "b": lambda m, x: interpolate(m, torch.zeros(1, 1, 8, 8), x, 3, x_T="random", **STEPS),
}


@pytest.mark.parametrize("door", DOORS)
def test_every_door_takes_images_as_they_come(model, door):
    """One uint8 image is taken by every door, as a Pillow image and as an array; of another size, or from 0 to 255, it is refused."""
    call, given = DOORS[door], pixels(1, 1, 8, 8)
    with torch.no_grad():
        expected = call(model, given / 127.5 - 1)
        for form in (given[0].permute(1, 2, 0).numpy(), pillow(given[0]), given):
            assert torch.equal(call(model, form), expected)
    for wrong, found in ((given[..., :-1], r"expected \[N, 1, 8, 8\], found"), (given.float(), "expected values .* found 25")):
        with pytest.raises(ValueError, match=f"^{door.partition(' ')[0]}: {found}"):
            call(model, wrong)


def test_a_latent_is_no_image(model):
    z = normal(1, 3, dtype=torch.float32)
    expected = traverse(model, z, 0, [0.5], seed=0, **STEPS)
    for form in (z[0], z.double(), z.numpy(), z[0].numpy()):
        assert torch.equal(traverse(model, form, 0, [0.5], seed=0, **STEPS), expected)
    assert torch.equal(sample(model, 1, seed=0, z=z.double(), **STEPS), sample(model, 1, seed=0, z=z, **STEPS))
    with pytest.raises(ValueError, match=r"start: expected one image or latent \[1, 3\], found \[1, 4\]"):
        traverse(model, torch.zeros(1, 4), 0, [0.5], seed=0, **STEPS)


def test_noisy_images_are_encoded_and_transforms_pass(model):
    x = 3 * normal(2, 1, 8, 8, dtype=torch.float32)
    expected = torch.stack([model.encode(image[None]).mu[0] for image in x])
    found = torch.func.vmap(lambda image: model.encode(image[None]).mu[0])(x)
    torch.testing.assert_close(found, expected)
    jacobian = torch.func.jacrev(lambda image: model.encode(image).mu)(x[:1])
    assert jacobian.shape == (1, 3, 1, 1, 8, 8)


# Models of other dtypes

UNKNOWN = {"cpp": (torch.float16, torch.bfloat16), "triton": (torch.float64,), "cuda": (torch.float64,)}  # not asked for, others stand in


def results(model, x: torch.Tensor, quick: bool) -> dict[str, torch.Tensor]:
    """What every door, or two of them, makes of x with a model: images and latents."""
    posterior = model.encode(x)
    found = {"mu": posterior.mu, "var": posterior.var, "z": posterior.draw(torch.arange(len(x)), seed=0)}
    found |= {} if model.deterministic else {"kl": posterior.kl}
    found["reconstruct"] = reconstruct(model, x, seed=0, **STEPS)
    if quick:
        return {name: value.detach() for name, value in found.items()}
    found["sample"] = sample(model, 2, seed=0, **STEPS)
    found["traverse"] = traverse(model, x[:1], 0, [-0.5, 0.5], seed=0, **STEPS)
    found["edit"] = edit(model, x, 0, [0.3], x_T="random", **STEPS)
    return {name: value.detach() for name, value in found.items()}


def build(method: str, dtype: torch.dtype):
    """A model of any method with weights that are the same in every dtype but for rounding."""
    torch.manual_seed(0)
    image = {"image_channels": 1, "image_size": 8}
    partner = image | {"channels": [8, 8]} | ({} if METHODS[method].decodes else {"embedding_size": 8, "attention": [4]})
    partner |= {} if METHODS[method].guides else {"latent_size": 3}
    networks = {"encoder": image | {"latent_size": 3, "channels": [8, 8], "attention": [4]}, METHODS[method].partner: partner}
    model = METHODS[method].build(networks, {"kind": "cosine", "logsnr_min": -3.0, "logsnr_max": 3.0}).eval()
    if "denoiser" in model.networks:
        nn.init.normal_(model.denoiser.out.weight, std=0.1)
    return model.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("backend", ["reference", *KERNELS])
@pytest.mark.parametrize("method", METHODS)
def test_models_of_every_dtype_agree(method, backend, dtype):
    """The networks' rounding is in the results, and no more: latents, noise and sums are those of float32."""
    interpreted = backend == "triton" and not torch.cuda.is_available()  # which takes its time
    if interpreted and method != "sami":
        pytest.skip("the interpreter runs the same kernels for this method as for sami")
    x = pixels(1, 1 if interpreted else 2, 8, 8) / 127.5 - 1
    expected = results(build(method, torch.float32), x, interpreted)
    model = build(method, dtype)
    with use_backend(backend):
        if dtype in UNKNOWN.get(backend, ()):
            message = f"{backend} .use_backend. cannot run here: it takes .*, not {str(dtype)[6:]}; what can: "
            with pytest.raises(BackendError, match=message):
                results(model, x, interpreted)
            return
        found = results(model, x, interpreted)
    for name, value in found.items():
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32), name
        error = relative_error(value, expected[name]) / ROUNDING[dtype]
        assert error < (ALLOWED[dtype] if value.dim() > 2 else 10), (name, error)  # found: 8.2, of float32 itself
    assert model.encode(x.to(dtype)).mu.dtype == found["mu"].dtype


def test_networks_of_others_get_the_dtype_of_their_weights():
    """An encoder in half precision that ends in float32 by itself, beside a denoiser without weights; neither says a shape."""

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(64, 6).half()

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            assert x.dtype == torch.float16
            mu, raw_var = self.linear(x.flatten(1)).float().chunk(2, 1)
            return mu, raw_var.exp()

    def denoiser(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        assert x_t.dtype == t.dtype == torch.float32
        return 0.5 * x_t

    sami = Sami(Encoder(), denoiser, Cosine(-3.0, 3.0))
    assert sami.encode(torch.zeros(2, 1, 8, 8, dtype=torch.uint8)).mu.dtype == torch.float32
    with pytest.raises(ValueError, match=r"x: expected \[N, C, H, W\], found \[8, 8\]"):
        sami.encode(torch.zeros(8, 8))
    sami = Sami(sami.encoder, denoiser, sami.schedule, image_shape=(1, 8, 8), latent_size=3)
    drawn = reconstruct(sami, np.zeros((8, 8), np.uint8), seed=0, **STEPS)
    assert drawn.dtype == torch.float32
    assert drawn.shape == (1, 1, 8, 8)
    assert drawn.isfinite().all()


def test_noise_does_not_depend_on_the_dtype(model):
    expected = starting_noise(model, 2, seed=1)
    assert torch.equal(starting_noise(copy.deepcopy(model).half(), 2, seed=1), expected)
    assert torch.equal(starting_noise(copy.deepcopy(model).double(), 2, seed=1), expected.double())


class Echo(nn.Module):
    """Predicts the timestep that it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x_t: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return timestep.view(-1, 1, 1, 1).expand(x_t.shape)


def test_noise_levels_of_a_discrete_denoiser_keep_their_precision():
    alphas = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    denoiser = DiscreteTimeDenoiser(Echo(), alphas, Cosine(-7.0, 5.0))
    x_t, t = torch.zeros(11, 1, 1, 1, dtype=torch.float64), torch.linspace(0, 1, 11)
    expected, levels = denoiser(x_t, t), denoiser.levels.clone()
    assert len(expected.unique()) == 11
    for convert, dtype in ((nn.Module.half, torch.float16), (nn.Module.bfloat16, torch.bfloat16), (nn.Module.float, torch.float32)):
        assert convert(denoiser).network.weight.dtype == dtype
        assert torch.equal(denoiser.levels, levels)
        assert torch.equal(denoiser(x_t, t), expected)
    assert denoiser.to("meta").network.weight.is_meta
