"""Calls the raw launchers of the compiled core with whatever comes, in a process that may die of it: `launchers_worker.py seed calls`.

Each call is written to the standard output before it is made, so that the last line of a process that died says what killed it.
"""

import json
import random
import resource
import sys

import torch

from sami_fast import _C  # noqa: F401 (registers them)

MEMORY = 8 << 30  # bytes of address space: what asks for more gets an error, and not the machine
SIZES = (0, 1, 2, 3, 4, 5, 8, 16, 17, 33)
NUMBERS = (-(2**63), -(2**62) - 1, -1, 0, 1, 2, 3, 4, 8, 16, 255, 2**31, 2**32, 2**40, 2**61, 2**62 + 1, 2**63 - 2, 2**63 - 1)
REALS = (0.0, -1.0, 1e-5, 1.0, 1e300, float("inf"), float("nan"))
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.complex64)


def tensor(chance: random.Random, shape: list[int], dtype: torch.dtype) -> torch.Tensor:
    """Of this shape and dtype, in any layout that a tensor can have on a CPU, or on no device at all."""
    values = torch.randn(shape).mul(3).to(dtype)
    kind = chance.randrange(12)
    if kind == 0 and len(shape) > 1:
        values = values.transpose(0, -1).contiguous().transpose(0, -1)
    elif kind == 1 and len(shape) == 4:
        values = values.contiguous(memory_format=torch.channels_last)
    elif kind == 2 and shape:
        values = torch.cat((values, values), -1)[..., : shape[-1]]
    elif kind == 3 and shape:
        values = values[:1].expand(shape) if shape[0] else values
    elif kind == 4 and chance.random() < 0.3:
        values = values.to("meta")
    elif kind == 5 and chance.random() < 0.3:
        values = values.to_sparse()
    elif kind == 6 and dtype.is_floating_point:
        values = values.fill_(chance.choice((float("nan"), float("inf"), 0.0)))
    return values


# What fits: sizes of tensors by letters, of one call the same everywhere; numbers by letters too.
FITTING = {
    "random_normal": {"index": "B", "size": "W"},
    "random_uniform": {"index": "B", "size": "W"},
    "stratified_uniform": {"index": "B", "levels": "K", "global_batch": "B"},
    "noise_sample_fwd": {"x_0": "BCHW", "alpha_t": "BK", "sigma_t": "BK", "index": "B"},
    "guided_loss_fwd": dict.fromkeys(("eps", "eps_pred", "grad_log_q"), "BCHW")
    | dict.fromkeys(("sigma_t", "weight", "unconditional_weight", "index"), "B")
    | {"levels": "1"},
    "gaussian_log_prob": dict.fromkeys(("z", "mu", "var", "ggz", "ggmu", "ggvar"), "BC") | {"grad": "B"},
    "group_norm_silu": dict.fromkeys(("x", "tx", "grad_y", "ggx", "y_bar"), "BCHW")
    | dict.fromkeys(("weight", "bias", "ggweight", "ggbias"), "C")
    | dict.fromkeys(("mean", "rstd"), "BC")
    | {"num_groups": "C"},
    "attention": dict.fromkeys(("q", "grad_out", "out", "tq", "ggq", "tout", "out_bar"), "BSND")
    | dict.fromkeys(("k", "v", "tk", "tv", "ggk", "ggv"), "BSND")
    | {"lse": "2BNS", "tau": "BNS"},
    "conv2d": {"x": "BCHW", "grad_y": "BCHW", "weight": "CC33", "bias": "C"}
    | {"stride": "1", "padding": "1", "height": "H", "width": "W", "size": "3"},
    "yuv_to_rgb": {"y": "HH", "u": "HH", "v": "HH", "top": "0", "left": "0", "side": "H", "size": "W"},
}


def call(chance: random.Random, schema: torch._C.FunctionSchema) -> tuple[str, dict]:
    """A launcher's name and arguments: half of them fit, of the others a few do not."""
    name = schema.name.partition("::")[2]
    sizes = {letter: chance.choice(SIZES) for letter in "BCHWKSND"} | {digit: int(digit) for digit in "0123"}
    fitting = next(shapes for start, shapes in FITTING.items() if name.startswith(start))
    strange = chance.choice((0.0, 0.0, 0.05, 0.3))  # share of arguments
    dtype = chance.choice(DTYPES) if chance.random() < strange else chance.choice(DTYPES[:2])
    arguments = {}
    for argument in schema.arguments:
        kind, odd = str(argument.type), chance.random() < strange
        letters = fitting.get(argument.name, "")
        if "Tensor" in kind:
            if kind != "Tensor" and chance.random() < 0.3:
                arguments[argument.name] = None
                continue
            shape = [sizes[letter] for letter in letters]
            if odd and shape:
                shape[chance.randrange(len(shape))] = chance.choice(SIZES)
                shape = chance.choice((shape, shape[1:], [*shape, 2]))
            own = torch.int64 if argument.name == "index" else torch.uint8 if name == "yuv_to_rgb" else dtype
            own = torch.float32 if name.startswith("conv2d") and not odd else own
            arguments[argument.name] = tensor(chance, shape, chance.choice(DTYPES) if odd and chance.random() < 0.3 else own)
        elif kind == "int":
            arguments[argument.name] = chance.choice((*NUMBERS, *SIZES)) if odd else sizes[letters] if letters else chance.randrange(3)
        else:
            arguments[argument.name] = chance.choice(REALS if odd else REALS[2:4]) if kind == "float" else chance.random() < 0.5
    return name, arguments


def shown(value: object) -> str:
    return f"{list(value.shape)} {value.dtype} {value.device} {value.layout}" if isinstance(value, torch.Tensor) else repr(value)


SCHEMAS = [schema for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("sami_fast_C::")]


def main() -> None:
    seed, calls = map(int, sys.argv[1:3])
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    chance, ran = random.Random(seed), {schema.name.partition("::")[2]: 0 for schema in SCHEMAS}
    for number in range(calls):
        name, arguments = call(chance, SCHEMAS[number % len(SCHEMAS)])
        print(name, ", ".join(f"{key}={shown(value)}" for key, value in arguments.items()), flush=True)
        try:
            getattr(torch.ops.sami_fast_C, name)(**arguments)
            ran[name] += 1
        except (RuntimeError, ValueError, NotImplementedError, MemoryError):
            continue
    print(json.dumps(ran), flush=True)  # how often which did not refuse


if __name__ == "__main__":
    main()
