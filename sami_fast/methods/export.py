"""An encoder as a program that other runtimes load: ONNX, TorchScript, or torch.export's own format.

The program is `images -> mu, var`: images [B, C, H, W] float32 in [-1, 1], any B; both results [B, Z] float32. It holds torch's own
operators alone, none of this package's, and its results are compared with the model's before it is kept.
"""

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from .. import ops
from ..errors import UserError, one_line
from ..files import write_whole
from .inputs import fitted
from .latent_model import LatentModel

FORMATS = {"onnx": ".onnx", "torchscript": ".pt", "torch.export": ".pt2"}  # and how their files are usually called
TOLERANCE = 1e-5  # of the largest result, or of 1
COMPARED = (1, 2, 7)  # images at a time; none of them is the number that the program is made with
MADE_WITH = 3

Program = Callable[[Tensor], tuple[Tensor, Tensor]]


class Exported(nn.Module):
    """images [B, C, H, W] float32 -> mu, var, [B, Z] float32, as `LatentModel.encode` gives them."""

    def __init__(self, model: LatentModel) -> None:
        super().__init__()
        self.encoder, self.deterministic = model.networks["encoder"], model.deterministic

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        mu, var = fitted(self.encoder, images)(images)
        return mu, torch.zeros_like(mu) if self.deterministic else var


@torch.no_grad()
def export_encoder(model: LatentModel, file: Path, form: str) -> float:
    """Write the encoder of a model as a program, if the program gives the model's results.

    Args:
        model: Of any method; it stays as it is.
        file: Replaced if it is there; nothing is written where the export fails.
        form: One of `FORMATS`.
    Returns:
        The largest difference between the results of the file, read again, and of the model, as a share of the largest result or of 1.
    Raises:
        UserError: onnx, onnxscript or onnxruntime is not installed; the encoder cannot be written in this form; or its results differ
            by more than `TOLERANCE`.
        OSError: from the system.
    """
    if "encoder" not in model.networks:
        raise UserError("export: expected an encoder that is a torch module, found a function")
    encoder = copy.deepcopy(Exported(model)).cpu().eval()
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(count, *model.image_shape, generator=generator) * 2 - 1 for count in (MADE_WITH, *COMPARED)]
    expected = [encoder(x) for x in images]
    difference = float("nan")

    def write(stream: BinaryIO) -> None:
        nonlocal difference
        try:
            with _plain():
                _WRITERS[form](encoder, images[0], stream)
            stream.flush()
            program = _READERS[form](Path(stream.name))
            differences = [_difference(program(x), results) for x, results in zip(images, expected, strict=True)]
            difference = float(torch.stack(differences).max())
        except (UserError, OSError):
            raise
        except Exception as error:  # of somebody's network: of many kinds
            raise UserError(f"export: this encoder cannot be written as {form} ({one_line(error)})") from None
        if not math.isfinite(difference):
            raise UserError(f"export: the {form} program or the encoder gives results that are not finite numbers")
        if difference > TOLERANCE:
            raise UserError(f"export: the {form} program differs from the encoder by {difference:.1e}, and {TOLERANCE:g} is allowed")

    if form == "onnx":
        _onnx_packages()
    write_whole(file, write)
    return difference


def _difference(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> Tensor:
    """The largest, as a share of the largest result or of 1; NaN where a result is NaN, which Python's own max would pass over."""
    return torch.stack([(a - b).abs().max() / b.abs().max().clamp(min=1) for a, b in zip(found, expected, strict=True)]).max()


@contextmanager
def _plain() -> Iterator[None]:
    """Ops in plain torch, and no warnings of tracers and of ways that torch will leave, which nobody who exports can do anything about."""
    with ops.use_backend("reference"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _onnx_packages() -> tuple[Any, Any]:
    """onnx and onnxruntime."""
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401 (torch asks for it)
    except ImportError as error:
        raise UserError(f"export: onnx needs {error.name}, which is not installed; `pip install 'sami-fast[export]'`") from None
    return onnx, onnxruntime


def _write_onnx(encoder: nn.Module, images: Tensor, stream: BinaryIO) -> None:
    names = {"input_names": ["images"], "output_names": ["mu", "var"]}
    any_batch: Any = {"images": {0: "batch"}}
    program = torch.onnx.export(encoder, (images,), dynamo=True, verbose=False, dynamic_shapes=any_batch, **names)
    assert program is not None
    proto = program.model_proto
    domains = {node.domain for node in proto.graph.node} | {function.domain for function in proto.functions}
    if foreign := domains - {"", "ai.onnx"}:
        raise ValueError(f"it needs operators of {', '.join(sorted(foreign))}")
    stream.write(proto.SerializeToString())


def _read_onnx(file: Path) -> Program:
    _, onnxruntime = _onnx_packages()
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])

    def program(images: Tensor) -> tuple[Tensor, Tensor]:
        mu, var = session.run(["mu", "var"], {"images": images.numpy()})
        return torch.from_numpy(mu), torch.from_numpy(var)

    return program


def _write_torchscript(encoder: nn.Module, images: Tensor, stream: BinaryIO) -> None:
    program: Any = torch.jit.trace(encoder, (images,), check_trace=False)
    _refuse_ours({node.kind() for node in program.inlined_graph.nodes()})
    torch.jit.save(program, stream)


def _read_torchscript(file: Path) -> Program:
    with _plain():
        return torch.jit.load(file)


def _write_torch_export(encoder: nn.Module, images: Tensor, stream: BinaryIO) -> None:
    program = torch.export.export(encoder, (images,), dynamic_shapes={"images": {0: torch.export.Dim("batch", min=1)}})
    _refuse_ours({str(node.target) for node in program.graph.nodes})
    torch.export.save(program, stream)


def _read_torch_export(file: Path) -> Program:
    return torch.export.load(file).module()


def _refuse_ours(operators: set[str]) -> None:
    """A ValueError where a program needs operators that only this package has."""
    if ours := [name for name in operators if name.startswith("sami_fast")]:
        raise ValueError(f"it needs the operators {', '.join(sorted(ours))}")


_WRITERS = {"onnx": _write_onnx, "torchscript": _write_torchscript, "torch.export": _write_torch_export}
_READERS = {"onnx": _read_onnx, "torchscript": _read_torchscript, "torch.export": _read_torch_export}
