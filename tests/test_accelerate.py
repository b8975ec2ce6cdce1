"""Accelerated models compute what they did, to second order; nothing is skipped silently; restore undoes everything."""

import copy
import io
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import KERNELS, assert_same_gradients, largest, normal
from torch import Tensor, nn
from torch.autograd import gradgradcheck
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

import sami_fast
from sami_fast.accelerate import Accelerated, accelerate

ATTENTION_BLOCKS = {"block_out_channels": (8, 16), "norm_num_groups": 4, "attention_head_dim": 8, "layers_per_block": 1}


class SelfAttention(nn.Module):
    """[B, S, C], as many write it by hand; a keyword decides what is asked of the attention."""

    def __init__(self, channels: int = 16, heads: int | None = 2) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, **settings: Any) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        if self.heads:
            q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, **settings)
        return self.out(out.transpose(1, 2).flatten(2) if self.heads else out)


def scaled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.7)


class CrossAttention(nn.Module):
    """Calls a function of its own file, which calls torch's."""

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        return scaled(q, k, k)


def convolutions() -> nn.Sequential:
    act = nn.SiLU()  # one for three places, one of which follows no norm
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.GroupNorm(4, 8),
        act,
        nn.Conv2d(8, 8, 3, padding=1),
        act,
        nn.GroupNorm(2, 8, eps=1e-3),
        act,
        nn.Conv2d(8, 4, 3, padding=1, stride=2),
        nn.GroupNorm(2, 4),
        nn.Flatten(),
    )


def unet() -> nn.Module:
    diffusers = pytest.importorskip("diffusers")
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    return diffusers.UNet2DModel(sample_size=8, in_channels=3, out_channels=3, **ATTENTION_BLOCKS, **blocks)


def conditional_unet() -> nn.Module:
    diffusers = pytest.importorskip("diffusers")
    blocks = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}
    return diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=3, out_channels=3, cross_attention_dim=12, **ATTENTION_BLOCKS, **blocks
    )


def mid_block(**changes: Any) -> nn.Module:
    blocks = pytest.importorskip("diffusers.models.unets.unet_2d_blocks")
    return blocks.UNetMidBlock2D(in_channels=16, temb_channels=6, resnet_groups=4, attention_head_dim=8, **changes)


def resnet_block(**changes: Any) -> nn.Module:
    resnet = pytest.importorskip("diffusers.models.resnet")
    return resnet.ResnetBlock2D(in_channels=8, out_channels=4, temb_channels=6, groups=2, **changes)


def encoder_layer() -> nn.Module:
    return nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)


# Model, shape of its input, and the arguments that follow the input.
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], Callable[[torch.dtype], tuple[Any, ...]]]] = {
    "convolutions": (convolutions, (2, 3, 8, 8), lambda dtype: ()),
    "self_attention": (SelfAttention, (2, 5, 16), lambda dtype: ()),
    "encoder_layer": (encoder_layer, (2, 5, 16), lambda dtype: ()),
    "unet": (unet, (2, 3, 8, 8), lambda dtype: (torch.tensor([3, 400]),)),
    "conditional_unet": (conditional_unet, (2, 3, 8, 8), lambda dtype: (torch.tensor([3, 400]), normal(2, 5, 12, seed=7, dtype=dtype))),
}
BLOCKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], Callable[[torch.dtype], tuple[Any, ...]]]] = {
    "resnet_block": (resnet_block, (2, 8, 3, 3), lambda dtype: (normal(2, 6, seed=7, dtype=dtype),)),
    "scaled_block": (
        lambda: resnet_block(time_embedding_norm="scale_shift"),
        (2, 8, 3, 3),
        lambda dtype: (normal(2, 6, seed=7, dtype=dtype),),
    ),
    "mid_block": (mid_block, (1, 16, 2, 3), lambda dtype: (normal(1, 6, seed=7, dtype=dtype),)),
    "cross_attention": (CrossAttention, (1, 3, 4, 8), lambda dtype: (normal(1, 3, 5, 8, seed=7, dtype=dtype),)),
    "one_head": (lambda: SelfAttention(8, None), (2, 4, 8), lambda dtype: ()),
}


def build(name: str, dtype: torch.dtype) -> tuple[nn.Module, Tensor, tuple[Any, ...]]:
    """A model in eval mode whose parameters are all away from 0 and 1, its input and the rest of its arguments."""
    make, shape, more = (MODELS | BLOCKS)[name]
    torch.manual_seed(0)
    model = make().to(dtype).eval()
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.add_(normal(*p.shape, seed=i, dtype=dtype), alpha=0.1)
    return model, normal(*shape, seed=99, dtype=dtype, grad=True), more(dtype)


def output(model: nn.Module, x: Tensor, more: tuple[Any, ...] = (), **settings: Any) -> Tensor:
    y = model(x, *more, **settings)
    y = getattr(y, "sample", y)
    return y[0] if isinstance(y, tuple) else y


def two_orders(model: nn.Module, x: Tensor, more: tuple[Any, ...] = (), **settings: Any) -> dict[str, Tensor]:
    """The result, the first gradients of a projection of it, and the gradients of the penalty on its gradient in x."""
    named = {"x": x, **dict(model.named_parameters())}
    y = output(model, x, more, **settings)
    projection = (y * normal(*y.shape, seed=5, dtype=y.dtype)).sum()
    first = torch.autograd.grad(projection, list(named.values()), create_graph=True, allow_unused=True)
    second = torch.autograd.grad(first[0].square().sum(), list(named.values()), allow_unused=True)
    found = {"y": y.detach()}
    for order, values in (("first", first), ("second", second)):
        found |= {
            f"{order} {name}": torch.zeros_like(p) if g is None else g.detach() for (name, p), g in zip(named.items(), values, strict=True)
        }
    return found


def plain(model: nn.Module, x: Tensor, more: tuple[Any, ...] = (), **settings: Any) -> dict[str, Tensor]:
    """`two_orders` of torch, whose fast attention has no second derivative."""
    with sdpa_kernel(SDPBackend.MATH):
        return two_orders(model, x, more, **settings)


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], rtol: float) -> None:
    """Each within rtol of its own largest entry, or of a tenth of that of the largest of its kind (result, first, second)."""
    assert found.keys() == expected.keys()
    for name, want in expected.items():
        kind = largest(value for other, value in expected.items() if other.split()[0] == name.split()[0])
        error, scale = (found[name] - want).abs().max().item(), want.abs().max().item()
        assert error <= rtol * max(scale, 0.1 * kind), f"{name}: off by {error:.3g} of {scale:.3g}"


def names(entries: tuple[Any, ...], kind: str | None = None) -> set[str]:
    return {entry.name for entry in entries if kind in (None, entry.kind)}


# Values and derivatives


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_values_and_gradients_to_second_order(name, backend):
    if backend == "triton" and "unet" in name:
        pytest.skip("minutes in Triton's interpreter")
    model, x, more = build(name, torch.float32)
    expected = plain(model, x, more)
    report = accelerate(model)
    assert report.changed
    with warnings.catch_warnings(), sami_fast.use_backend(backend):
        warnings.simplefilter("error")
        assert_close(two_orders(model, x, more), expected, 1e-3 if backend == "triton" else 1e-4)


@pytest.mark.parametrize("name", [*MODELS, *BLOCKS])
def test_float64(name):
    model, x, more = build(name, torch.float64)
    expected = plain(model, x, more)
    accelerate(model)
    found = two_orders(model, x, more)
    assert largest(found.values()) > 0.1
    assert_close(found, expected, 1e-11)


@pytest.mark.parametrize("name", ["resnet_block", "mid_block", "cross_attention", "one_head", "self_attention", "encoder_layer"])
def test_gradgradcheck(name):
    model, x, more = build(name, torch.float64)
    accelerate(model)
    few = [(name, p) for name, p in model.named_parameters() if p.numel() <= 16][:2]

    def run(x: Tensor, *values: Tensor) -> Tensor:
        replaced = {name: value for (name, _), value in zip(few, values, strict=True)}
        return torch.func.functional_call(model, replaced, (x, *more))

    assert gradgradcheck(run, (x, *(p for _, p in few)), atol=1e-6)


def test_gradgradcheck_of_a_unet():
    model, x, more = build("unet", torch.float64)
    accelerate(model)
    assert gradgradcheck(lambda x: output(model, x, more), (x,), fast_mode=True, atol=1e-6)


class Calls(TorchDispatchMode):
    """Counts the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", KERNELS)
def test_the_ops_are_ours(backend):
    model, x, more = build("mid_block", torch.float32)
    accelerate(model)
    with Calls() as calls, sami_fast.use_backend(backend):
        two_orders(model, x, more)
    counts = calls.counts
    norms = sum(isinstance(m, nn.GroupNorm) for m in model.modules())
    assert counts["group_norm_silu"] == norms == 5
    assert counts["attention"] == counts["attention_bwd_bwd"] == 1
    assert counts["native_group_norm"] == 0
    assert counts["silu"] == 2  # of the time embedding, once in every block: none after a norm


def test_torchs_attention_has_no_second_derivative():
    """Else there would be nothing to do here."""
    model, x, more = build("mid_block", torch.float32)
    with pytest.raises(RuntimeError, match="not implemented"):
        two_orders(model, x, more)


def test_torch_func_and_checkpointing():
    model, x, more = build("unet", torch.float64)
    expected = plain(model, x, more)
    accelerate(model)
    projection = normal(*expected["y"].shape, seed=5)
    grad = torch.func.grad(lambda x: (output(model, x, more) * projection).sum())(x)
    assert_close({"first x": grad.detach()}, {"first x": expected["first x"]}, 1e-11)
    model.enable_gradient_checkpointing()
    model.train()
    found = torch.autograd.grad((output(model, x, more) * projection).sum(), x)[0]
    assert_close({"first x": found}, {"first x": expected["first x"]}, 1e-11)


# What is changed, and what is not


@pytest.mark.parametrize("name", ["unet", "conditional_unet"])
def test_every_layer_of_a_unet_is_accounted_for(name):
    model, *_ = build(name, torch.float32)
    attention = sys.modules["diffusers.models.attention_processor"].Attention
    kinds = (nn.GroupNorm, nn.SiLU, nn.Conv2d, attention)
    expected = {name: type(m).__name__ for name, m in model.named_modules() if isinstance(m, kinds)}
    report = accelerate(model)
    found = {entry.name: entry.kind for entry in (*report.changed, *report.skipped) if expected.get(entry.name) == entry.kind}
    assert found == expected
    assert all(entry.note for entry in (*report.changed, *report.skipped))
    assert names(report.changed, "GroupNorm") == {name for name, kind in expected.items() if kind == "GroupNorm"}
    assert names(report.changed, "Attention") == {name for name, kind in expected.items() if kind == "Attention"}
    assert names(report.changed, "Conv2d") == {name for name, kind in expected.items() if kind == "Conv2d"}
    assert not names(report.changed) & names(report.skipped)
    printed = str(report)
    assert all(entry.name in printed and entry.note in printed for entry in (*report.changed, *report.skipped))
    assert f"{len(report.changed)} changed, {len(report.skipped)} left alone" in printed


class LinearAttention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


class RMSNorm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1)


def test_what_is_left_alone_has_a_reason():
    replaced = nn.GroupNorm(2, 4)
    replaced.forward = lambda x: x
    model = nn.ModuleDict(
        {
            "replaced": replaced,
            "reflect": nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
            "strided": nn.Conv2d(4, 4, 3, padding=1, stride=(1, 2)),
            "linear_attention": LinearAttention(),
            "rms": RMSNorm(),
        }
    )
    before = {name: type(m) for name, m in model.items()}
    report = accelerate(model)
    assert not report.changed
    assert names(report.skipped) == set(model)
    assert {name: type(m) for name, m in model.items()} == before
    assert model["strided"].weight.is_contiguous()
    notes = {entry.name: entry.note for entry in report.skipped}
    assert "replaced" in notes["replaced"]
    assert "alike in both directions" in notes["strided"]
    assert "no F.scaled_dot_product_attention" in notes["linear_attention"]
    assert "RMS norm" in notes["rms"]


def form_weights(model: nn.Module) -> dict[nn.Module, Any]:
    """The processors of diffusers that write attention out, in place of those that leave it to torch."""
    home = sys.modules["diffusers.models.attention_processor"]
    processors = {m: home.AttnProcessor() for m in model.modules() if isinstance(m, home.Attention)}
    assert len(processors) == 4
    for m, processor in processors.items():
        m.set_processor(processor)
    return processors


def test_a_processor_that_forms_the_weights_is_replaced_and_put_back():
    model, x, more = build("unet", torch.float64)
    processors = form_weights(model)
    expected = plain(model, x, more)
    report = accelerate(model)
    assert {type(m.processor).__name__ for m in processors} == {"AttnProcessor2_0"}
    assert_close(two_orders(model, x, more), expected, 1e-5)  # theirs takes the softmax in float32, whatever the dtype
    report.restore()
    assert all(m.processor is p for m, p in processors.items())


def test_a_processor_that_computes_something_else_stays():
    model, *_ = build("unet", torch.float64)
    form_weights(model)
    model.mid_block.attentions[0].scale = 0.5
    report = accelerate(model)
    assert "mid_block.attentions.0" in names(report.skipped)
    assert type(model.mid_block.attentions[0].processor).__name__ == "AttnProcessor"


# Two layers in one pass


def seen_by_hooks(model: nn.Module, where: str, x: Tensor, more: tuple[Any, ...]) -> list[Tensor]:
    seen: list[Tensor] = []
    handle = model.get_submodule(where).register_forward_hook(lambda module, args, result: seen.extend([args[0], result]))
    seen.append(output(model, x, more))
    handle.remove()
    return seen


@pytest.mark.parametrize(("name", "norm", "act"), [("convolutions", "1", "2"), ("resnet_block", "norm1", "nonlinearity")])
@pytest.mark.parametrize("early", [False, True])
def test_hooks_see_what_they_saw(name, norm, act, early):
    model, x, more = build(name, torch.float64)
    expected = [*seen_by_hooks(model, norm, x, more), *seen_by_hooks(model, act, x, more)]
    if early:
        model.get_submodule(norm).register_forward_pre_hook(lambda module, args: None)
    accelerate(model)
    found = [*seen_by_hooks(model, norm, x, more), *seen_by_hooks(model, act, x, more)]
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_a_hook_may_change_what_lies_between():
    model, x, more = build("resnet_block", torch.float64)
    accelerated = copy.deepcopy(model)
    accelerate(accelerated)
    results = []
    for m in (model, accelerated):
        m.norm1.register_forward_hook(lambda module, args, result: 2 * result + 1)
        results.append(output(m, x, more))
    torch.testing.assert_close(*results, rtol=1e-11, atol=1e-11)


def test_backward_hooks_work():
    """They wrap what enters and leaves a module in C++ code."""

    def seen_by_backward_hooks(where: str, accelerated: bool) -> list[Tensor]:
        seen: list[Tensor] = []
        model, x, more = build("resnet_block", torch.float64)
        if accelerated:
            accelerate(model)
        model.get_submodule(where).register_full_backward_hook(lambda module, grads, _: seen.append(grads[0]))
        output(model, x, more).sum().backward()
        return seen

    for where in ("norm1", "nonlinearity", "conv1"):
        found, expected = (seen_by_backward_hooks(where, accelerated) for accelerated in (True, False))
        assert found
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_dropout_between_keeps_them_apart():
    model = nn.Sequential(nn.GroupNorm(2, 4), nn.Dropout(0.5), nn.SiLU())
    report = accelerate(model)
    assert names(report.changed) == {"0"}
    assert type(model) is nn.Sequential


def passes(model: nn.Module, x: Tensor, more: tuple[Any, ...] = ()) -> tuple[int, int]:
    """Group norms of ours, and SiLUs of torch's, that a call runs."""
    with Calls() as calls:
        output(model, x, more)
    return calls.counts["group_norm_silu"], calls.counts["silu"]


def test_scale_and_shift_keep_them_apart():
    model, x, more = build("scaled_block", torch.float64)
    accelerate(model)
    assert passes(model, x, more) == (2, 2)  # one SiLU after the scale and shift, one of the time embedding


class CastingNorm(nn.GroupNorm):
    """As in guided diffusion and what came of it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(torch.promote_types(x.dtype, torch.float32))).type(x.dtype)


class TwoNorms(nn.Module):
    """Functions in the code: a norm with a SiLU, one without, one that is used twice, and a sum in between."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.weight = CastingNorm(2, 8), nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.norm(x))
        both = torch.nn.functional.group_norm(h, 4, weight=self.weight)
        h = both + F.silu(both, inplace=False)
        return F.silu(F.group_norm(h, 2) + 1) + self.norm(h)


class PlusOne(nn.GroupNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


FUNCTIONS = {
    "two norms": (TwoNorms, (5, 1)),  # that which is used twice, with its SiLU and without; a sum before the last SiLU
    "casting norms": (lambda: nn.Sequential(CastingNorm(2, 8), nn.SiLU(), CastingNorm(4, 8)), (2, 0)),
    "another norm": (lambda: nn.Sequential(PlusOne(2, 8), nn.SiLU()), (1, 1)),
    "no weight": (lambda: nn.Sequential(nn.GroupNorm(2, 8, affine=False), nn.SiLU()), (1, 0)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_norms_in_other_peoples_code(name):
    make, expected_passes = FUNCTIONS[name]
    model, x = make().double(), normal(2, 8, 3, 5, grad=True)
    expected = two_orders(model, x)
    report = accelerate(model)
    assert_close(two_orders(model, x), expected, 1e-11)
    assert passes(model, x) == expected_passes
    assert type(model(x)) is Tensor
    report.restore()
    assert not any(isinstance(m, Accelerated) for m in model.modules())


def test_a_layer_called_by_itself_is_what_it_was():
    model, x, _ = build("resnet_block", torch.float64)
    norm, act = model.norm1(x), model.nonlinearity(x)
    accelerate(model)
    torch.testing.assert_close(model.norm1(x), norm)
    torch.testing.assert_close(model.nonlinearity(x), act)
    layers, x, _ = build("convolutions", torch.float64)
    half = layers[:2](x)
    accelerate(layers)
    torch.testing.assert_close(layers[:2](x), half)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_results_lie_in_memory_as_torchs(layout):
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU()).to(memory_format=layout)
    x = torch.randn(2, 8, 8, 8).contiguous(memory_format=layout)
    strides = [model[:n](x).stride() for n in (1, 2, 3)]
    accelerate(model)
    assert [model[:n](x).stride() for n in (1, 2, 3)] == strides


# What our attention does not take


def fallbacks() -> dict[str, tuple[nn.Module, tuple[Any, ...], dict[str, Any], str]]:
    """Model, further arguments, keywords, and what the warning says."""
    x = normal(2, 5, 16, seed=3)
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    mha = nn.MultiheadAttention
    fewer = {"need_weights": False}
    return {
        "mask": (SelfAttention(), (), {"attn_mask": mask}, "mask"),
        "float mask": (SelfAttention(), (), {"attn_mask": normal(5, 5)}, "mask"),
        "dropout": (SelfAttention(), (), {"dropout_p": 0.4}, "dropout"),
        "mha weights": (mha(16, 2, batch_first=True), (x, x), {}, "need_weights=True"),
        "mha mask": (mha(16, 2, batch_first=True), (x, x), {"attn_mask": ~mask, **fewer}, "mask"),
        "mha padding": (mha(16, 2, batch_first=True), (x, x), {"key_padding_mask": padding, **fewer}, "mask"),
        "mha dropout": (mha(16, 2, dropout=0.3, batch_first=True), (x, x), fewer, "dropout"),
        "mha bias": (mha(16, 2, add_bias_kv=True, batch_first=True), (x, x), fewer, "add_bias_kv"),
    }


@pytest.mark.parametrize("name", fallbacks())
def test_fallbacks_are_right_and_say_so_once(name):
    torch.manual_seed(0)
    model, more, settings, says = fallbacks()[name]
    model = nn.Sequential(model).double()[0].train()
    x = normal(2, 5, 16, grad=True)
    torch.manual_seed(1)
    expected = plain(model, x, more, **settings)
    accelerate(model)
    torch.manual_seed(1)
    with pytest.warns(UserWarning, match=f"{type(model).__name__}: .*{says}") as caught:
        found = two_orders(model, x, more, **settings)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        output(model, x, more, **settings)
    assert_close(found, expected, 1e-11)


def test_the_warning_names_the_module():
    model = nn.ModuleDict({"inner": nn.ModuleList([SelfAttention()])})
    accelerate(model)
    with pytest.warns(UserWarning, match=r"^ModuleDict\.inner\.0: attention is torch's"):
        model["inner"][0](torch.randn(1, 4, 16), attn_mask=torch.zeros(4, 4))


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("case", ["self", "causal", "cross", "other sizes", "unbatched"])
def test_multihead_attention(case, batch_first):
    torch.manual_seed(0)
    sizes = {"kdim": 6, "vdim": 7} if case == "other sizes" else {}
    model = nn.MultiheadAttention(16, 2, bias=case != "cross", batch_first=batch_first, **sizes).double().eval()
    shape = (5, 16) if case == "unbatched" else (2, 5, 16) if batch_first else (5, 2, 16)
    x = normal(*shape, grad=True)
    settings: dict[str, Any] = {"need_weights": False}
    if case in ("self", "causal", "unbatched"):
        more = (x, x)
    else:
        lengths = (2, 4) if batch_first else (4, 2)
        more = (normal(*lengths, sizes.get("kdim", 16), seed=3), normal(*lengths, sizes.get("vdim", 16), seed=4))
    if case == "causal":
        settings |= {"is_causal": True, "attn_mask": nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)}
    expected = plain(model, x, more, **settings)
    accelerate(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_close(two_orders(model, x, more, **settings), expected, 1e-11)


def test_causal_and_unequal_shapes():
    model, x, _ = build("self_attention", torch.float64)
    expected = plain(model, x, is_causal=True, scale=0.3)
    accelerate(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_close(two_orders(model, x, is_causal=True, scale=0.3), expected, 1e-11)
    cross, q, _ = build("cross_attention", torch.float64)
    one_for_all = normal(1, 1, 5, 8, seed=7)  # broadcast over the heads
    expected = plain(cross, q, (one_for_all,))
    accelerate(cross)
    with pytest.warns(UserWarning, match="CrossAttention: .*shapes"):
        assert_close(two_orders(cross, q, (one_for_all,)), expected, 1e-11)


def test_autocast():
    model, x, more = build("unet", torch.float32)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        expected = output(model, x, more)
        accelerate(model)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = output(model, x, more)
        features = normal(2, 8, 4, 4, dtype=torch.bfloat16)
        norm = accelerate(nn.Sequential(nn.GroupNorm(2, 8))).module[0]
        assert norm(features).dtype == nn.GroupNorm(2, 8)(features).dtype
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


# There and back


def test_parameters_and_state_dict():
    model, *_ = build("unet", torch.float32)
    untouched = copy.deepcopy(model)
    keys, parameters, hooks = list(model.state_dict()), list(model.parameters()), []
    model.conv_out.register_forward_hook(lambda *args: hooks.append(1))
    accelerate(model)
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    with torch.no_grad():
        model.conv_out.weight.mul_(2)
    untouched.load_state_dict(model.state_dict())
    model.load_state_dict(untouched.state_dict())
    assert torch.equal(untouched.conv_out.weight, model.conv_out.weight)
    output(model, *build("unet", torch.float32)[1:])
    assert hooks == [1]


def test_a_saved_model_is_a_diffusers_model(tmp_path):
    model, x, more = build("unet", torch.float32)
    kind, expected = type(model), output(model, x, more)
    accelerate(model)
    model.save_pretrained(tmp_path)
    loaded = kind.from_pretrained(tmp_path)
    assert type(loaded) is kind
    assert '"_class_name": "UNet2DModel"' in (tmp_path / "config.json").read_text()
    assert torch.equal(output(loaded, x, more), expected)


def test_a_pickled_model_is_still_accelerated():
    model, x, more = build("unet", torch.float64)
    report = accelerate(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert [type(m) for m in loaded.modules()] == [type(m) for m in model.modules()]
    assert torch.equal(output(loaded, x, more), output(model, x, more))
    report.restore()
    assert any(isinstance(m, Accelerated) for m in loaded.modules())


@pytest.mark.parametrize("name", MODELS)
def test_restore_undoes_everything(name):
    model, x, more = build(name, torch.float32)
    expected = output(model, x, more)
    before = [(type(m), sorted(vars(m)), getattr(m, "processor", None)) for m in model.modules()]
    report = accelerate(model)
    assert [type(m) for m in model.modules()] != [kind for kind, *_ in before]
    accelerate(model)
    output(model, x, more)
    report.restore()
    assert [(type(m), sorted(vars(m)), getattr(m, "processor", None)) for m in model.modules()] == before
    assert torch.equal(output(model, x, more), expected)
    report.restore()


def test_accelerate_twice_is_accelerate_once():
    model, x, more = build("unet", torch.float64)
    first = accelerate(model)
    kinds, expected = [type(m) for m in model.modules()], output(model, x, more)
    second = accelerate(model)
    assert (second.changed, second.skipped) == (first.changed, first.skipped)
    assert [type(m) for m in model.modules()] == kinds
    assert torch.equal(output(model, x, more), expected)


@pytest.mark.parametrize("name", ["unet", "self_attention", "encoder_layer", "convolutions"])
def test_a_copy_is_restored_by_itself(name):
    model, x, more = build(name, torch.float32)
    kinds, expected = [type(m) for m in model.modules()], output(model, x, more)
    report = accelerate(model)
    ours = [type(m) for m in model.modules()]
    twin = copy.deepcopy(model)
    assert [type(m) for m in twin.modules()] == ours
    torch.testing.assert_close(output(twin, x, more), output(model, x, more), rtol=0, atol=0)
    accelerate(twin).restore()
    assert [type(m) for m in twin.modules()] == kinds
    assert torch.equal(output(twin, x, more), expected)
    assert [type(m) for m in model.modules()] == ours
    report.restore()
    assert [type(m) for m in model.modules()] == kinds


def test_training_then_restore():
    model, x, more = build("convolutions", torch.float32)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    report = accelerate(model)
    for _ in range(2):
        optimizer.zero_grad()
        output(model, x, more).square().mean().backward()
        optimizer.step()
    model.to(torch.float64)
    report.restore()
    fresh = convolutions().double()
    fresh.load_state_dict(model.state_dict())
    assert [type(m) for m in model.modules()] == [type(m) for m in fresh.modules()]
    assert torch.equal(output(model, x.double()), output(fresh, x.double()))


# Channels-last memory


def channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def test_images_are_channels_last_inside_and_lie_outside_as_they_did():
    model, x, more = build("unet", torch.float32)
    expected = output(model, x, more)
    inside: list[bool] = []
    for part in model.modules():
        if isinstance(part, (nn.Conv2d, nn.GroupNorm)):
            part.register_forward_hook(lambda module, args, y: inside.append(channels_last(y) or y.dim() != 4))
    accelerate(model)
    found = output(model.train(), x, more)  # in training ResnetBlock2D asks for contiguous images
    assert inside
    assert all(inside)
    assert found.stride() == expected.stride()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    given = x.detach().contiguous(memory_format=torch.channels_last)
    assert channels_last(output(model, given, more))


class Viewer(nn.Module):
    """Takes for granted that the result of a convolution is contiguous."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(4, 8, 3, padding=1), nn.Linear(8 * 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        return self.linear(h.view(len(x), -1)) + h.contiguous().view((len(x), 8, -1)).mean((1, 2))[:, None]


def test_code_that_views_images():
    model, x = Viewer().double(), normal(2, 4, 4, 4, grad=True)
    expected = two_orders(model, x)
    accelerate(model)
    assert channels_last(model.conv.weight)
    assert_close(two_orders(model, x), expected, 1e-11)


@pytest.mark.parametrize("optimizer", [{"fused": True}, {"foreach": True}, {"foreach": False}])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_an_optimizer_made_before_goes_on(kind, optimizer):
    """Its state lies otherwise than the weights do afterwards, which torch's fused ones would not notice; and back again."""
    trained = []
    for accelerated in (False, True):
        model, x, _ = build("convolutions", torch.float32)
        steps = kind(model.parameters(), lr=0.1, **optimizer, **({"momentum": 0.9} if kind is torch.optim.SGD else {}))
        for step in range(6):
            if step == 2 and accelerated:
                report = accelerate(model)
                assert channels_last(model[0].weight)
            if step == 4 and accelerated:
                report.restore()
                assert model[0].weight.is_contiguous()
            if step in (0, 5):
                steps.zero_grad()  # else gradients add up, through a change of the layout
            output(model, x).square().mean().backward()
            steps.step()
        trained.append({name: p.detach().clone() for name, p in model.named_parameters()})
    assert_same_gradients(*reversed(trained), rtol=2e-3)


# What people do next


def test_parametrizations_before_and_after():
    weight_norm, remove = nn.utils.parametrizations.weight_norm, nn.utils.parametrize.remove_parametrizations
    x = normal(2, 4, 5, 6, grad=True)
    model = nn.Sequential(weight_norm(nn.Conv2d(4, 8, 3, padding=1)), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 4, 3, padding=1)).double()
    plain_one = copy.deepcopy(model)
    kinds = [type(m).__mro__[1] for m in model.modules()]
    report = accelerate(model)
    assert names(report.changed, "ParametrizedConv2d") == {"0"}
    for m in (model, plain_one):
        weight_norm(m[3])
    expected = two_orders(plain_one, x)
    assert_close(two_orders(model, x), expected, 1e-11)
    accelerate(model)
    assert_close(two_orders(model, x), expected, 1e-11)
    assert_close(two_orders(copy.deepcopy(model), x), expected, 1e-11)
    report.restore()
    assert not any(isinstance(m, Accelerated) for m in model.modules())
    assert [type(m).__mro__[1] for m in model.modules() if m is not model[3]][: len(kinds) - 1]
    assert_close(two_orders(model, x), expected, 1e-11)
    remove(model[0], "weight")
    assert type(model[0]) is nn.Conv2d
    accelerate(model)
    remove(model[3], "weight")
    assert isinstance(model[3], Accelerated)
    torch.testing.assert_close(model(x), plain_one(x), rtol=1e-11, atol=1e-11)


def test_slices_and_new_layers_of_an_accelerated_model():
    model, x, _ = build("convolutions", torch.float64)
    expected = [model[:n](x) for n in range(1, len(model) + 1)]
    accelerate(model)
    for n, want in enumerate(expected, 1):
        found = model[:n](x)
        torch.testing.assert_close(found, want, rtol=1e-11, atol=1e-11)
        assert found.stride() == want.stride()
    torch.testing.assert_close(model[3:](model[:3](x)), expected[-1], rtol=1e-11, atol=1e-11)
    conv, strided = type(model[0])(3, 4, 3, padding=1), type(model[0])(3, 4, 3, stride=2, dilation=2)
    laid_out = x.float().contiguous(memory_format=torch.channels_last)  # where torch adds up in another order on some processors
    assert torch.equal(strided(x.float()), F.conv2d(laid_out, strided.weight, strided.bias, 2, 0, 2))
    torch.testing.assert_close(conv(x.float()), F.conv2d(x.float(), conv.weight, conv.bias, 1, 1))
    circular = type(model[0])(3, 4, 3, padding=1, padding_mode="circular")
    torch.testing.assert_close(circular(x.float()), nn.Conv2d.forward(circular, x.float()))
    torch.testing.assert_close(type(model[1])(3, 3)(x.float()), F.group_norm(x.float(), 3))
    norm_and_act = type(model)(nn.GroupNorm(3, 3), nn.SiLU())
    torch.testing.assert_close(norm_and_act(x.float()), F.silu(F.group_norm(x.float(), 3)))
    attention = accelerate(nn.Sequential(nn.MultiheadAttention(8, 2))).module[0]
    with pytest.warns(UserWarning, match="a module made of an accelerated one: attention is torch's"):
        type(attention)(8, 2)(*[torch.randn(3, 1, 8)] * 3)


def test_on_the_meta_device():
    given, x, more = build("unet", torch.float32)
    with torch.device("meta"):
        model = unet()
    report = accelerate(model.eval())
    assert output(model, x.to("meta"), (more[0].to("meta"),)).shape == x.shape
    model.to_empty(device="cpu")
    assert channels_last(model.conv_out.weight)
    model.load_state_dict(given.state_dict())
    torch.testing.assert_close(output(model, x, more), output(given, x, more), rtol=1e-4, atol=1e-5)
    report.restore()
    assert torch.equal(output(model, x, more), output(given, x, more))
    assert [p.stride() for p in model.parameters()] == [p.stride() for p in given.parameters()]


@pytest.mark.parametrize("backend", ["native", "_native_math"])
def test_diffusers_attention_backends(backend):
    model, x, more = build("unet", torch.float64)
    expected = plain(model, x, more)
    accelerate(model)
    model.set_attention_backend(backend)
    with Calls() as calls:
        assert_close(two_orders(model, x, more), expected, 1e-11)
    assert calls.counts["attention"] == 4
    form_weights(model)
    assert_close(two_orders(model, x, more), expected, 1e-5)  # theirs takes the softmax in float32


@pytest.mark.parametrize("product", [torch.autograd.functional.hvp, torch.autograd.functional.vhp])
@pytest.mark.parametrize("name", ["resnet_block", "mid_block", "encoder_layer", "convolutions"])
def test_hessian_vector_products(name, product):
    model, x, more = build(name, torch.float64)
    x, along = x.detach(), normal(*x.shape, seed=4)

    def value(x: Tensor) -> Tensor:
        y = output(model, x, more)
        return (y * normal(*y.shape, seed=5)).sin().sum()

    with sdpa_kernel(SDPBackend.MATH):
        expected = product(value, x, along)[1]
    accelerate(model)
    torch.testing.assert_close(product(value, x, along)[1], expected, rtol=1e-9, atol=1e-9)


# Compiled


@pytest.mark.parametrize("name", ["convolutions", "self_attention", "encoder_layer", "mid_block"])
def test_compiled(name):
    model, x, more = build(name, torch.float64)
    accelerate(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    parameters = [x, *model.parameters()]
    found, expected = output(compiled, x, more), output(model, x, more)
    torch.testing.assert_close(found, expected)
    both = [dict(zip(range(len(parameters)), torch.autograd.grad(y.square().sum(), parameters), strict=True)) for y in (found, expected)]
    assert_same_gradients(*both, rtol=1e-9)


def test_a_compiled_penalty():
    model, x, _ = build("convolutions", torch.float64)
    expected = plain(model, x)
    accelerate(model)
    projection = normal(*expected["y"].shape, seed=5)

    def penalty(x: Tensor) -> Tensor:
        return torch.func.grad(lambda x: (model(x) * projection).sum())(x).square().sum()

    found = torch.autograd.grad(torch.compile(penalty, fullgraph=True, backend="aot_eager")(x), x)[0]
    assert_close({"second x": found}, {"second x": expected["second x"]}, 1e-10)


def test_a_compiled_fallback():
    model, x, _ = build("self_attention", torch.float64)
    mask = normal(5, 5, seed=2)
    expected = model(x, attn_mask=mask)
    accelerate(model)
    with pytest.warns(UserWarning, match="mask"):
        found = torch.compile(model, fullgraph=True, backend="aot_eager")(x, attn_mask=mask)
    torch.testing.assert_close(found, expected)


# The name


@pytest.mark.parametrize("first", ["", "import sami_fast.accelerate", "from sami_fast.accelerate import Report"])
def test_the_name_is_callable_and_diffusers_is_not_imported(first):
    code = f"""
import sys, sami_fast
from torch import nn
{first}
for _ in range(2):
    report = sami_fast.accelerate(nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU()))
    assert len(report.changed) == 2, report
from sami_fast import accelerate
accelerate(report.module)
assert "diffusers" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
