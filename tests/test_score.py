"""Three ways to the encoder's score and its gradients: the same numbers, the promised work, the promised memory."""

import copy

import pytest
import torch
from helpers import gradients, normal, relative_error, tiny_denoiser, tiny_encoder
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.counting import Meter
from benchmarks.measure import peak_bytes
from sami_fast import ops, score
from sami_fast.accelerate import accelerate
from sami_fast.errors import UserError
from sami_fast.models import Encoder
from sami_fast.models.layers import STYLES, AttentionBlock, ResBlock
from sami_fast.schedule import UniformLogsnr
from sami_fast.step import Draw, Objective, training_step
from sami_fast.sweeps import Chain, Conv2d, Identity, Layer, Linear, ReLU, Tape

METHODS = ("sweeps", "dual")
SCHEDULE = UniformLogsnr(-7.0, 5.0)


def cotangent(shape: torch.Size, dtype: torch.dtype = torch.float64) -> Tensor:
    return normal(*shape, seed=11, dtype=dtype)


def score_and_gradients(method: str, encoder: nn.Module, x: Tensor, z: Tensor) -> dict[str, Tensor]:
    """g, and the gradients of sum_S |g|^2 / 2 + <cotangent, g> in z and every parameter: v = g + cotangent depends on g."""
    z = z.clone().requires_grad_()
    extra = cotangent(x.shape, x.dtype)
    g = score.grad_log_q(encoder, x, z, method)
    loss = score.directional(encoder, x, z, g + extra).sum() if method == "dual" else (g.square() / 2 + extra * g).sum()
    named = {"z": z, **dict(encoder.named_parameters())}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    zeros = (torch.zeros_like(p) if f is None else f for p, f in zip(named.values(), found, strict=True))
    return {"g": g.detach(), **dict(zip(named, zeros, strict=True))}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    scale = max(value.abs().max().item() for value in expected.values())
    for name, want in expected.items():
        # A gradient that is zero by symmetry (a bias before a norm) is rounding error in both.
        assert (found[name] - want).abs().max().item() <= tolerance * max(want.abs().max().item(), 1e-3 * scale), name


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("blocks", [0, 2])
@pytest.mark.parametrize("attention", [[], [4], [4, 2]])
@pytest.mark.parametrize("method", METHODS)
def test_same_gradients(method: str, attention: list[int], blocks: int, style: str):
    encoder = tiny_encoder(attention=attention, blocks=blocks, style=style)
    x, z = normal(5, 1, 8, 8), normal(5, 3, seed=3)
    assert_equal(score_and_gradients(method, encoder, x, z), score_and_gradients("reverse", encoder, x, z))


@pytest.mark.parametrize("method", METHODS)
def test_one_image_and_a_trained_variance(method: str):
    """Variances far from one, a posterior that z lies far away from."""
    encoder = tiny_encoder()
    with torch.no_grad():
        encoder.raw_var.weight.mul_(30)
        encoder.raw_var.bias.fill_(-3.0)
    x, z = normal(1, 1, 8, 8), 5 * normal(1, 3, seed=3)
    assert_equal(score_and_gradients(method, encoder, x, z), score_and_gradients("reverse", encoder, x, z))


@pytest.mark.parametrize("method", METHODS)
def test_frozen_parameters_get_nothing(method: str):
    encoder = tiny_encoder()
    encoder.body[0].weight.requires_grad_(False)
    encoder.mu.bias.requires_grad_(False)
    x, z = normal(3, 1, 8, 8), normal(3, 3, seed=3)
    g = score.grad_log_q(encoder, x, z, method)
    loss = score.directional(encoder, x, z, g).sum() if method == "dual" else g.square().sum() / 2
    loss.backward()
    assert encoder.body[0].weight.grad is None
    assert encoder.mu.bias.grad is None
    assert encoder.body[0].bias.grad is not None


@pytest.mark.parametrize("method", ["reverse", "sweeps", "dual"])
def test_no_graph_without_gradients(method: str):
    """Sampling: the score is a number."""
    encoder = tiny_encoder()
    x, z = normal(3, 1, 8, 8), normal(3, 3, seed=3)
    with torch.no_grad():
        g = score.grad_log_q(encoder, x, z, method)
    assert not g.requires_grad
    assert relative_error(g, score.reverse(encoder, x, z)) < 1e-13


def test_auto():
    encoder = tiny_encoder()
    assert score.pick(encoder) == "sweeps"
    assert score.pick(lambda x: encoder(x)) == "reverse"
    assert score.pick(nn.Sequential(encoder)) == "reverse"


def test_mistakes():
    encoder, x, z = tiny_encoder(), normal(2, 1, 8, 8), normal(2, 3, seed=3)
    with pytest.raises(ValueError, match="score: expected one of auto, reverse, sweeps, dual, found 'forward'"):
        score.grad_log_q(encoder, x, z, "forward")
    for method in METHODS:
        with pytest.raises(
            TypeError, match=f"score: {method} needs an encoder made of sami_fast.models layers.* function is not; use reverse"
        ):
            score.grad_log_q(lambda x: encoder(x), x, z, method)


def test_sweeps_are_differentiated_once():
    encoder, x, z = tiny_encoder(), normal(2, 1, 8, 8), normal(2, 3, seed=3)
    weight = encoder.body[0].weight
    loss = score.sweeps(encoder, x, z).square().sum()
    with pytest.raises(RuntimeError, match="create_graph=True asks for more: use the method reverse"):
        torch.autograd.grad(loss, weight, create_graph=True)
    loss = score.sweeps(encoder, x, z).square().sum()
    torch.autograd.grad(loss, weight, retain_graph=True)
    with pytest.raises(RuntimeError, match="frees its notes in its first backward pass"):
        torch.autograd.grad(loss, weight)


def test_a_parameter_changed_in_between_is_noticed():
    encoder, x, z = tiny_encoder(), normal(2, 1, 8, 8), normal(2, 3, seed=3)
    loss = score.sweeps(encoder, x, z).square().sum()
    with torch.no_grad():
        encoder.body[0].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_images_and_latents_changed_in_between_are_noticed():
    for place in (0, 1):
        encoder, inputs = tiny_encoder(), [normal(2, 1, 8, 8), normal(2, 3, seed=3)]
        loss = score.sweeps(encoder, *inputs).square().sum()
        inputs[place].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def _hooked(encoder: Encoder) -> None:
    encoder.body[0].register_forward_hook(lambda layer, inputs, out: 2 * out)


def _weight_normed(encoder: Encoder) -> None:
    nn.utils.parametrizations.weight_norm(encoder.body[0])


def _shared(encoder: Encoder) -> None:
    encoder.body[2].norm_2 = encoder.body[2].norm_1


def _replaced(encoder: Encoder) -> None:
    encoder.body[1] = nn.GroupNorm(2, 4).double()


def _patched(encoder: Encoder) -> None:
    plain = encoder.body[1].forward
    encoder.body[1].forward = lambda x, tx=None: 2 * plain(x)


@pytest.mark.parametrize("change", [_hooked, _weight_normed, _shared, _replaced, _patched])
def test_what_sweeps_would_not_see_goes_through_reverse(change):
    encoder, x, z = tiny_encoder(), normal(2, 1, 8, 8), normal(2, 3, seed=3)
    assert score.pick(encoder) == "sweeps"
    change(encoder)
    assert score.pick(encoder) == "reverse"
    with pytest.raises(TypeError, match="each used once, without hooks and parametrizations, Encoder is not; use reverse"):
        score.grad_log_q(encoder, x, z, "sweeps")
    assert_equal(score_and_gradients("auto", encoder, x, z), score_and_gradients("reverse", encoder, x, z), 0.0)


@pytest.mark.parametrize("z", [normal(1, 3), normal(2, 1), normal(3, 3), normal(3), normal(2, 3, dtype=torch.float32)])
@pytest.mark.parametrize("method", ["reverse", "sweeps"])
def test_latents_that_do_not_fit(method: str, z: Tensor):
    with pytest.raises((ValueError, TypeError), match=r"mu: expected|z: expected"):
        score.grad_log_q(tiny_encoder(), normal(2, 1, 8, 8), z, method)


def test_only_z_is_asked_for():
    """A frozen encoder: no gradient of its own, and none of the work for it."""
    encoder, x = tiny_encoder().requires_grad_(False), normal(2, 1, 8, 8)
    found = {}
    for method in ("reverse", "sweeps"):
        z = normal(2, 3, seed=3, grad=True)
        (found[method],) = torch.autograd.grad(score.grad_log_q(encoder, x, z, method).square().sum(), z)
    assert relative_error(found["sweeps"], found["reverse"]) < 1e-12


def test_under_torch_func():
    """Inside a transform `auto` is reverse, by torch.func.grad."""
    encoder, x, z = tiny_encoder(), normal(3, 1, 8, 8), normal(3, 3, seed=3)
    found = torch.func.grad(lambda z: score.grad_log_q(encoder, x, z).square().sum())(z)
    leaf = z.clone().requires_grad_()
    (want,) = torch.autograd.grad(score.reverse(encoder, x, leaf).square().sum(), leaf)
    assert relative_error(found, want) < 1e-12
    each = torch.func.vmap(lambda x, z: score.grad_log_q(encoder, x[None], z[None])[0])(x, z)
    assert relative_error(each, score.reverse(encoder, x, z)) < 1e-12


def test_a_compiled_score_cannot_lose_its_gradient_unnoticed():
    encoder, x, z = tiny_encoder(), normal(2, 1, 8, 8), normal(2, 3, seed=3)
    torch._dynamo.reset()
    compiled = torch.compile(lambda: score.grad_log_q(encoder, x, z), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"ask for 'dual' and add score\.directional"):
        compiled()
    with torch.no_grad():
        assert relative_error(compiled(), score.reverse(encoder, x, z)) < 1e-12


def test_sweeps_stand_between_compiled_graphs():
    encoder, x, z, graphs = tiny_encoder(), normal(2, 1, 8, 8), normal(2, 3, seed=3), []

    def kept(graph: torch.fx.GraphModule, _) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(lambda x: score.grad_log_q(encoder, x + 1, z, "sweeps").sin(), backend=kept)
    value = compiled(x)
    assert relative_error(value, score.reverse(encoder, x + 1, z).sin()) < 1e-12
    called = [str(node.target) for graph in graphs for node in graph.graph.nodes if node.op.startswith("call")]
    assert len(graphs) == 2
    assert not any("conv" in name or "sami_fast" in name for name in called)
    assert_equal(gradients(value.sum(), encoder), gradients(score.reverse(encoder, x + 1, z).sin().sum(), encoder))


def test_convolutions_that_cannot_be_swept():
    for settings in ({"padding": "same"}, {"padding": 1, "padding_mode": "circular"}):
        with pytest.raises(ValueError, match="padding: expected numbers of zeros"):
            Conv2d(2, 2, 3, **settings)


def test_a_shared_encoder_can_be_scored_twice_before_the_backward_pass():
    encoder = tiny_encoder()
    x, z = normal(4, 1, 8, 8), normal(4, 3, seed=3)
    whole = gradients(score.sweeps(encoder, x, z).square().sum(), encoder)
    halves = score.sweeps(encoder, x[:2], z[:2]), score.sweeps(encoder, x[2:], z[2:])
    parts = gradients(sum(half.square().sum() for half in halves), encoder)
    for name, want in whole.items():
        assert relative_error(parts[name], want) < 1e-11, name


# Single layers against autograd: what a new type of layer has to pass.

LAYERS = {
    "conv": (lambda: Conv2d(3, 4, 3, 2, 1), (2, 3, 7, 7)),
    "conv without bias": (lambda: Conv2d(3, 4, 1, bias=False), (2, 3, 5, 5)),
    "linear": (lambda: Linear(6, 4), (3, 6)),
    "relu": (lambda: ReLU(), (3, 6)),
    "identity": (lambda: Identity(), (3, 6)),
    "residual": (lambda: ResBlock(4, 6, 2, STYLES[0]), (2, 4, 5, 5)),
    "attention": (lambda: AttentionBlock(6, 2, STYLES[0]), (2, 6, 3, 5)),
    "chain": (lambda: Chain(Conv2d(2, 4, 3), ReLU(), ResBlock(4, 4, 2, STYLES[0])), (2, 2, 7, 7)),
}


@pytest.mark.parametrize("need_input", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_layer_by_layer(name: str, need_input: bool):
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    layer: Layer = make().double()
    x, tx = normal(*shape, grad=True), normal(*shape, seed=2)
    y, ty = torch.func.jvp(layer, (x.detach(),), (tx,))
    grad_y, y_bar = normal(*y.shape, seed=3), normal(*y.shape, seed=4)
    (grad_x,) = torch.autograd.grad(layer(x), x, grad_y, create_graph=True)
    # <grad_y, ty> = <grad_x, tx>
    parameters = list(layer.parameters())
    wanted = torch.autograd.grad((y_bar * layer(x)).sum() + (grad_x * tx).sum(), [x, *parameters])

    tape = Tape()
    with torch.no_grad():
        assert relative_error(layer.sweep_forward(x.detach(), tape), y) < 1e-13
        assert relative_error(layer.sweep_adjoint(grad_y, tape), grad_x) < 1e-12
        assert relative_error(layer.sweep_tangent(tx, tape), ty) < 1e-12
        x_bar = layer.sweep_joint(y_bar, tape, need_input)
    if need_input:
        assert relative_error(x_bar, wanted[0]) < 1e-12
    for parameter, want in zip(parameters, wanted[1:], strict=True):
        assert relative_error(tape.gradients[parameter], want) < 1e-11

    dual_y, dual_ty = layer(x.detach(), tx)
    assert relative_error(dual_y, y) < 1e-13
    assert relative_error(dual_ty, ty) < 1e-12


# Work: convolutions, counted by torch's own formula in units of one encoder forward.


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize(("method", "expected"), [("reverse", 6), ("dual", 8), ("sweeps", 6)])
def test_convolution_flops(method: str, expected: int, backend: str):
    """6F, 8F, 6F; without the stem's input gradient in the last pass, which is why the image has few channels."""
    torch.manual_seed(0)
    encoder = Encoder(1, 16, 4, [16, 24], blocks=1, attention=[8])
    x, z = normal(2, 1, 16, 16, dtype=torch.float32), normal(2, 4, seed=3, dtype=torch.float32)
    with ops.use_backend(backend):
        with Meter() as forward, torch.no_grad():
            encoder(x)
        with Meter() as whole:
            score_and_gradients(method, encoder, x, z)
    assert whole.convolution_flops / forward.convolution_flops == pytest.approx(expected, rel=0.05)


# The whole step


def whole_step(method: str, encoder: nn.Module, denoiser: nn.Module, **settings) -> tuple[Tensor, dict[str, Tensor]]:
    index = torch.arange(4)
    draw = Draw(seed=1, step=2, index=index, global_batch=4)
    objective = Objective(noise_levels=2, unconditional_weight=0.1)
    x_0 = normal(4, *encoder.image_shape).clamp(-1, 1).to(next(encoder.parameters()).dtype)
    loss, _ = training_step(encoder, denoiser, SCHEDULE, x_0, draw, objective, 0.5, score_method=method, **settings)
    return loss, gradients(loss, encoder, denoiser)


@pytest.mark.parametrize("store_eps", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_step_has_the_same_loss_and_gradients(method: str, store_eps: bool):
    encoder, denoiser = tiny_encoder(), tiny_denoiser()
    loss, found = whole_step(method, encoder, denoiser, store_eps=store_eps)
    expected_loss, expected = whole_step("reverse", encoder, denoiser)
    assert relative_error(loss, expected_loss) < 1e-12
    assert_equal(found, expected)


@pytest.mark.parametrize("method", METHODS)
def test_odd_sides_have_the_same_loss_and_gradients(method: str):
    encoder, denoiser = tiny_encoder(image_size=7), tiny_denoiser(image_size=7)
    loss, found = whole_step(method, encoder, denoiser)
    expected_loss, expected = whole_step("reverse", encoder, denoiser)
    assert relative_error(loss, expected_loss) < 1e-12
    assert_equal(found, expected)


@pytest.mark.parametrize("method", METHODS)
def test_step_under_autocast(method: str):
    """bfloat16 convolutions: as far from float32 as reverse is, every parameter gradient in float32."""
    encoder, denoiser = tiny_encoder().float(), tiny_denoiser().float()
    _, exact = whole_step("reverse", copy.deepcopy(encoder).double(), copy.deepcopy(denoiser).double())
    with torch.autocast("cpu", torch.bfloat16):
        _, found = whole_step(method, encoder, denoiser)
        _, rival = whole_step("reverse", encoder, denoiser)
    for name, want in exact.items():
        assert found[name].dtype == torch.float32
        error, allowed = ((got.double() - want).norm().item() for got in (found[name], rival[name]))
        # A bias before a norm has gradient zero, up to bfloat16's rounding of what is summed there.
        zero_by_symmetry = want.norm().item() < 1e-9 * exact["0.body.0.weight"].norm().item()
        floor = 0.2 * exact[name.replace("bias", "weight")].norm().item() if zero_by_symmetry else 0.04 * want.norm().item()
        assert error <= 3 * allowed + floor, name


def test_autocast_leaves_float64_alone():
    encoder, x, z = tiny_encoder(), normal(3, 1, 8, 8), normal(3, 3, seed=3)
    with torch.autocast("cpu", torch.bfloat16):
        assert_equal(score_and_gradients("sweeps", encoder, x, z), score_and_gradients("reverse", encoder, x, z))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_step(compiler: str):
    """The whole step as one graph, second derivative included. The networks are small where C++ has to be compiled for every kernel, and
    have one channel per group, which torch 2.13 compiles wrongly if written in another order."""
    torch._dynamo.reset()
    small = {} if compiler == "aot_eager" else {"channels": [4], "blocks": 0, "groups": 4, "attention": []}
    encoder, denoiser = tiny_encoder(**small), tiny_denoiser(**{name: value for name, value in small.items() if name != "attention"})
    index = torch.arange(4)
    draw, objective = Draw(seed=1, step=2, index=index, global_batch=4), Objective(noise_levels=2, unconditional_weight=0.1)
    x_0 = normal(4, 1, 8, 8).clamp(-1, 1)

    def step(x_0: Tensor) -> Tensor:
        return training_step(encoder, denoiser, SCHEDULE, x_0, draw, objective, 0.5)[0]

    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    loss = compiled(x_0)
    expected_loss, expected = whole_step("reverse", encoder, denoiser)
    assert relative_error(loss, expected_loss) < 1e-12
    assert_equal(gradients(loss, encoder, denoiser), expected)


# Memory


def peak_of_score(method: str, side: int) -> int:
    """Peak of the score and its gradients, above what was there before; attention over side^2 tokens."""
    torch.manual_seed(0)
    encoder = Encoder(1, 2 * side, 4, [8], attention=[side])
    x, z = normal(1, 1, 2 * side, 2 * side, dtype=torch.float32), normal(1, 4, seed=3, dtype=torch.float32)
    return peak_bytes(lambda: score_and_gradients(method, encoder, x, z))


def test_memory_of_sweeps_is_linear_in_the_tokens():
    """From 1024 to 4096 tokens: 4 times the memory. Autograd of the reference keeps the attention matrices, 16 times as large."""
    for name in ("auto", "reference"):
        with ops.use_backend(name):
            few, many = peak_of_score("sweeps", 32), peak_of_score("sweeps", 64)
        assert many < 1.1 * 4 * few
    with ops.use_backend("reference"):
        assert peak_of_score("reverse", 64) > 4 * many


class FusedAttention(nn.Module):
    """Torch's, which on a CPU has one derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.heads = nn.Linear(8, 24), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = self.qkv(x.flatten(2).mT).unsqueeze(1).chunk(3, -1)
        mu, raw = self.heads(nn.functional.scaled_dot_product_attention(q, k, v).mean((1, 2))).chunk(2, 1)
        return mu, raw.exp()


def test_an_encoder_without_a_second_derivative_is_told_the_cure():
    """By whoever asks for that derivative, and not before; after the cure all is as torch's mathematical attention has it."""
    encoder, x, z = FusedAttention().double(), normal(2, 8, 3, 3), normal(2, 2, seed=1)
    for _ in range(2):
        g = score.grad_log_q(encoder, x, z)
        with pytest.raises(UserError, match=r"^FusedAttention: .* no second derivative; sami_fast\.accelerate\(encoder\) puts one in"):
            g.square().sum().backward()
    draw = Draw(0, 0, torch.arange(2), 2)
    loss, _ = training_step(encoder, lambda x, t: 0 * x, SCHEDULE, x, draw, Objective(), 1.0)
    with pytest.raises(UserError, match="accelerate"):
        loss.backward()
    with sdpa_kernel(SDPBackend.MATH):
        expected = score_and_gradients("reverse", encoder, x, z)
    accelerate(encoder)
    assert_equal(score_and_gradients("reverse", encoder, x, z), expected, 1e-10)
