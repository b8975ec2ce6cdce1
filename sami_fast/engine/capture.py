"""The captured step: loss and gradients of a micro-batch as one straight line of operators, traced once and replayed.

A step calls the same operators every time; what differs are images, noise, beta and weights. Between two operators the plain step goes
through modules, checks, the graph of autograd and its backward pass, which for small images takes as long as a third of the arithmetic.
Here the operators are written down below autograd, those of the gradients among them, and a function of one line per operator calls them
again. Every tensor is freed after its last use.

    x_0, index, beta, known outputs of the denoiser    inputs of the line, tensors
    step, latent step                                  inputs too, whole numbers: of the operators that draw random numbers
    weights                                            read where they are; optimisers change them in place
    seed, shapes, settings                             the same for a whole run, part of the line

The first replays are compared with the plain step, and later one in 2000. What cannot be written down, or disagrees, stays plain.
"""

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import getitem
from typing import Any
from weakref import ref

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from ..config import Config
from ..environment import speaks
from ..errors import one_line
from ..ops.define import below_operators
from ..step import Draw
from .bank import Bank
from .memory import give_back_memory

WAIT = 30  # plain steps of a kind before it is written down, which takes as long as 20 steps and more
COMPARED = 2  # first replays: they differ in the step number, and the second has weights that were updated
AGAIN = 2000  # replays until the next comparison
TOLERANCE = 1e-4  # of a tensor's largest value, where sums run in another order
MOST_LINES = 8  # of a run: phases, and other sizes of batch
STEP, LATENT_STEP = (1 << 58) + 0x5A31, (1 << 58) + 0x5A32  # stand for the two while a step is traced: valid, and no run comes so far
WARM = 3  # runs before a CUDA graph is recorded

Denoiser = Callable[..., Tensor]
Result = tuple[Tensor, Tensor, list[Tensor | None]]
"""Loss, measured numbers, and the gradient of each trained parameter, None where it has none."""


def refusal(config: Config, device_type: str, world_size: int = 1) -> str | None:
    """Why a run's steps stay plain from the start, empty where nobody need be told; None where they are captured."""
    engine = config.engine
    if engine.capture == "off" or engine.compile != "none" or engine.zero_stage == 3:
        return ""
    if device_type != "cpu" and not engine.cuda_graphs:  # where nothing has been measured
        return ""
    if engine.checkpoint_activations:
        return "engine.capture: with engine.checkpoint_activations steps stay plain"
    if config.objective.free_bits and world_size > 1:  # ranks meet inside the step: each has to be where the others are
        return "engine.capture: with objective.free_bits on several ranks steps stay plain"
    return None


class NotCapturedError(Exception):
    """What a step does cannot be a straight line; the message says why."""


class Captured:
    """The step of a training module, replayed where it can be.

    Args:
        module: Holds the networks; `module.plain(x_0, draw, kl_weight, phase, denoiser)` gives (loss, measured numbers), the plain step.
        cuda_graphs: Replay on a GPU as CUDA graphs.
    Attributes:
        parameters: The trained ones as `module.parameters()` orders them; gradients come in this order.
        wait: Steps of a kind that are plain before it is written down.
    """

    wait = WAIT

    def __init__(self, module: nn.Module, cuda_graphs: bool = False) -> None:
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self._module = ref(module)  # which holds this object
        self._cuda_graphs = cuda_graphs
        self._lines: dict[tuple[Any, ...], _Line | None] = {}

    def __call__(self, x_0: Tensor, draw: Draw, kl_weight: float, phase: str, denoiser: Denoiser | None = None) -> Result:
        """Loss, measured numbers and gradients of a batch, from the line if there is one; `.grad` stays as it is.

        Args:
            x_0, draw, kl_weight, phase: As `LatentModel.training_loss` takes them.
            denoiser: Takes the place of the module's own. With a `Bank` that knows its outputs a step can be a line, with others not.
        """
        replayed = self._replayed(x_0, draw, kl_weight, phase, denoiser)
        return self._differentiated(x_0, draw, kl_weight, phase, denoiser) if replayed is None else replayed

    def loss(self, x_0: Tensor, draw: Draw, kl_weight: float, phase: str, denoiser: Denoiser | None = None) -> tuple[Tensor, Tensor]:
        """Loss and measured numbers; whoever calls backward on the loss gets the gradients that came with it."""
        replayed = self._replayed(x_0, draw, kl_weight, phase, denoiser)
        if replayed is None:
            return self._plain(x_0, draw, kl_weight, phase, denoiser)
        loss, measured, gradients = replayed
        return _Differentiated.apply(loss, gradients, *self.parameters), measured

    def _plain(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        return self._inside().plain(*arguments)

    def _inside(self) -> Any:
        module = self._module()
        assert module is not None, "a captured step of a module that is no more"
        return module

    def _differentiated(
        self, x_0: Tensor, draw: Draw, kl_weight: float | Tensor, phase: str, denoiser: Denoiser | None, idle_gradients: bool = True
    ) -> Result:
        loss, measured = self._plain(x_0, draw, kl_weight, phase, denoiser, idle_gradients)
        return loss.detach(), measured, list(torch.autograd.grad(loss, self.parameters, allow_unused=True))

    def _replayed(self, x_0: Tensor, draw: Draw, kl_weight: float, phase: str, denoiser: Denoiser | None) -> Result | None:
        known = denoiser.known() if isinstance(denoiser, Bank) and phase == "encoder" else None
        if (denoiser is not None and known is None) or torch._C._are_functorch_transforms_active():
            return None
        kind = x_0.shape, x_0.stride(), x_0.dtype, phase, draw.seed, draw.global_batch, known is None
        if kind not in self._lines and len(self._lines) < MOST_LINES:
            self._lines[kind] = _Line()
        line = self._lines.get(kind)
        if line is None or line.waited < self.wait:
            if line is not None:
                line.waited += 1
            return None
        beta = torch.full((), kl_weight, dtype=x_0.dtype, device=x_0.device)
        tensors = (x_0, draw.index, beta) if known is None else (x_0, draw.index, beta, known)
        numbers = draw.step, draw.step if draw.latent_step is None else draw.latent_step
        if line.taken >= COMPARED and line.taken % AGAIN:
            line.taken += 1
            return line(tensors, numbers, self.parameters)
        expected = self._differentiated(x_0, draw, kl_weight, phase, denoiser)
        if not torch.isfinite(expected[0]):  # the run ends with its own words
            return expected
        try:
            if line.run is None:
                line.run = self._traced(tensors, draw, phase)
                line.idle = [g is not None and not g.any() for g in expected[2]]
            found = line(tensors, numbers, self.parameters)
            _require_equal(found, expected)
        except Exception as error:  # torch has many kinds for what cannot be traced
            self._lines[kind] = None
            if speaks():
                print(f"engine.capture: this step stays plain ({one_line(error)})", flush=True)
            return expected
        line.taken += 1
        return found

    def _traced(self, tensors: Sequence[Tensor], draw: Draw, phase: str) -> "StraightLine | CUDAGraph":
        def step(x_0: Tensor, index: Tensor, kl_weight: Tensor, *known: Tensor) -> list[Tensor | None]:
            denoiser = (lambda x_t, _: known[0].to(x_t.dtype)) if known else None
            traced = Draw(draw.seed, STEP, index, draw.global_batch, LATENT_STEP)
            loss, measured, gradients = self._differentiated(x_0, traced, kl_weight, phase, denoiser, idle_gradients=False)
            return [loss, measured, *gradients]

        modules = list(self._inside().modules())[1:]  # without the one that engines wrap
        for layer in modules:
            if layer._forward_hooks or layer._forward_pre_hooks:
                raise NotCapturedError(f"{type(layer).__name__} has hooks, which a captured step would not call")
        before = [_python_state(layer) for layer in modules]
        line = StraightLine(step, tensors, (STEP, LATENT_STEP))
        for layer, state in zip(modules, before, strict=True):
            if changed := [name for name, value in _python_state(layer).items() if state.get(name, layer) != value]:
                raise NotCapturedError(f"{type(layer).__name__}.{changed[0]} changes from call to call")
        run = CUDAGraph(line) if self._cuda_graphs and tensors[0].is_cuda else line
        line.forget_graph()
        return run


class _Line:
    """How to run a step, and how often that agreed with the plain step."""

    def __init__(self) -> None:
        self.run: Callable[..., list[Any]] | None = None
        self.idle: list[bool] = []  # parameters whose gradient is zero in the plain step; the line need not compute those
        self.waited = self.taken = 0  # steps before it was written down, and since

    def __call__(self, tensors: Sequence[Tensor], numbers: Sequence[int], parameters: Sequence[Tensor]) -> Result:
        assert self.run is not None
        loss, measured, *gradients = self.run(tensors, numbers)
        for place, idle in enumerate(self.idle):
            if idle and gradients[place] is None:
                gradients[place] = torch.zeros_like(parameters[place])
        return loss, measured, gradients


class _Differentiated(torch.autograd.Function):
    """A loss that came with its gradients."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: list[Tensor | None], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override] (one output, one cotangent)
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("engine.capture: a captured step gives its gradients once")
        if cotangent.is_cuda or cotangent.item() != 1.0:  # to read it, a GPU would be waited for
            gradients = [None if g is None else g * cotangent for g in gradients]
        return None, None, *gradients


def _require_equal(found: Result, expected: Result) -> None:
    """NotCapturedError unless two results agree."""
    for what, of_line, of_step in zip(("loss", "measurements", "gradients"), found, expected, strict=True):
        ours, theirs = ([x] if isinstance(x, Tensor) else x for x in (of_line, of_step))
        largest = max((float(b.abs().max()) for b in theirs if b is not None), default=0.0)
        for a, b in zip(ours, theirs, strict=True):
            if a is None or b is None:
                agree = a is b
            else:  # a gradient that is zero but for rounding has no size of its own
                agree = torch.equal(a, b) or float((a - b).abs().max()) <= TOLERANCE * max(float(b.abs().max()), 1e-2 * largest)
            if not agree:
                raise NotCapturedError(f"other {what} than without capture")


class StraightLine:
    """A function of tensors, written down as the operators that it calls below autograd.

    Called with tensors and numbers it gives what the function gives. Nothing on the way waits for a GPU.

    Args:
        function: tensors -> a list of tensors and None. It may read other tensors, such as weights, and changes none.
        tensors: Example inputs; the line takes others of their shapes, strides and dtypes.
        numbers: Whole numbers among the arguments of operators, in whose place the line takes others; the first is one for certain.
    Raises:
        NotCapturedError: the function does more than to compute its results from its inputs.
        Exception: of many kinds; what it does cannot be traced.
    """

    def __init__(self, function: Callable[..., Any], tensors: Sequence[Tensor], numbers: Sequence[int]) -> None:
        with torch.autograd.set_multithreading_enabled(False):
            self._module = make_fx(function, decomposition_table=below_operators())(*tensors)
        graph, self._numbers = self._module.graph, numbers
        _refuse_side_effects(graph)
        if not any(_holds(node, numbers[:1]) for node in graph.nodes):
            raise NotCapturedError("its random numbers are drawn by plain torch, not by the compiled core")
        _drop_repeated_views(graph)
        self._inputs = [node for node in graph.nodes if node.op == "placeholder"]
        outputs: Any = graph.output_node().args[0]
        self._outputs = outputs
        self._nodes = _needed(graph)
        _add_in_place(self._nodes, _nodes_in(outputs))
        self._run = self._function(self._nodes, self._inputs, numbers, self._outputs)

    def __call__(self, tensors: Sequence[Tensor], numbers: Sequence[int]) -> list[Any]:
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return self._run(*tensors, *numbers)

    def forget_graph(self) -> None:
        """Free what the line was made from; it can still be called."""
        del self._module, self._inputs, self._outputs, self._nodes
        gc.collect()
        give_back_memory()

    def parts(self) -> tuple[Callable[..., list[Tensor]], Callable[..., list[Any]]]:
        """The line in two functions: (*tensors, *numbers) -> all that takes the numbers, with the tensors; and of these, the results.

        Raises:
            NotCapturedError: a number is taken late, by what weights have a part in.
        """
        early: set[fx.Node] = set()
        for node in reversed(self._nodes):
            if node in early or _holds(node, self._numbers):
                early |= {node, *node.all_input_nodes}
        if any(node.op == "get_attr" or _mutates(node) for node in early):
            raise NotCapturedError("CUDA graphs need engine.store_eps=true, or noise is drawn at the end of a step, too")
        early |= {node for node in self._nodes if node.target is getitem and node.args[0] in early}
        late = [node for node in self._nodes if node not in early]
        read = dict.fromkeys(x for node in (*late, self._module.graph.output_node()) for x in node.all_input_nodes)
        between = [x for x in read if x in early or x.op == "placeholder"]
        first = self._function([node for node in self._nodes if node in early], self._inputs, self._numbers, between)
        return first, self._function(late, between, (), self._outputs)

    def _function(
        self, nodes: Sequence[fx.Node], inputs: Sequence[fx.Node], taken: Sequence[int], outputs: Any
    ) -> Callable[..., list[Any]]:
        """Nodes as a Python function, of the tensors of `inputs` and of the numbers."""
        known: dict[str, Any] = {}
        names = {node: f"x{place}" for place, node in enumerate((*inputs, *nodes))}
        numbers = {number: f"n{place}" for place, number in enumerate(taken)}

        def constant(value: Any) -> str:
            known[name := f"c{id(value)}"] = value  # it is kept, so no other has its id
            return name

        def text(value: Any) -> str:
            if isinstance(value, fx.Node):
                return names[value] if value.op != "get_attr" else constant(_attribute(self._module, value))
            if isinstance(value, list | tuple):
                return f"[{', '.join(map(text, value))}]"
            if type(value) is int and value in numbers:
                return numbers[value]
            return repr(value) if value is None or type(value) in (int, bool, str) else constant(value)

        last = {x: node for node in nodes for x in (node, *node.all_input_nodes) if x.op != "get_attr"}
        ended: dict[fx.Node, list[str]] = {}
        for x in last.keys() - set(_nodes_in(outputs)):
            ended.setdefault(last[x], []).append(names[x])
        lines = [f"def run({', '.join((*(names[x] for x in inputs), *numbers.values()))}):"]
        for node in nodes:
            if node.op == "call_function":
                function = getattr(node.target, "_op", node.target)  # without the Python around an operator
                arguments = [*map(text, node.args), *(f"{key}={text(value)}" for key, value in node.kwargs.items())]
                lines.append(f"    {names[node]} = {constant(function)}({', '.join(arguments)})")
            if node in ended:
                lines.append(f"    del {', '.join(ended[node])}")
        exec("\n".join((*lines, f"    return {text(outputs)}")), known)
        return known["run"]


class CUDAGraph:
    """A straight line on a GPU as a CUDA graph: one launch. What is random is drawn before, into the tensors that the graph reads.

    Not run on a GPU yet.
    """

    def __init__(self, line: StraightLine) -> None:
        self._draw, self._rest = line.parts()
        self._recorded: tuple[torch.cuda.CUDAGraph, list[Tensor], list[Tensor | None]] | None = None

    def __call__(self, tensors: Sequence[Tensor], numbers: Sequence[int]) -> list[Any]:
        with torch._C._AutoDispatchBelowADInplaceOrView():
            drawn = self._draw(*tensors, *numbers)
            if self._recorded is None:
                self._recorded = self._record([x.clone() for x in drawn])
            graph, read, written = self._recorded
            torch._foreach_copy_(read, drawn)
            graph.replay()
            return [None if x is None else x.clone() for x in written]  # the next replay writes to the same memory

    def _record(self, read: list[Tensor]) -> tuple[torch.cuda.CUDAGraph, list[Tensor], list[Tensor | None]]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # in their first runs libraries choose, compile and allocate, which must not be recorded
            for _ in range(WARM):
                self._rest(*read)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.empty_cache()  # the graph has memory of its own
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads load images in the meantime
            written = self._rest(*read)
        return graph, read, written


def _python_state(layer: nn.Module) -> dict[str, Any]:
    """What a call of a layer may change without any operator: plain values, and which tensors are its buffers."""
    plain = {name: value for name, value in vars(layer).items() if isinstance(value, bool | int | float | str)}
    return plain | {name: id(value) for name, value in layer._buffers.items()}


def _attribute(module: nn.Module, node: fx.Node) -> Tensor:
    value: Any = module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value


def _nodes_in(values: Iterable[Any]) -> list[fx.Node]:
    return [value for value in values if isinstance(value, fx.Node)]


def _holds(node: fx.Node, numbers: Sequence[int]) -> bool:
    """Whether one of the numbers is an argument."""
    return any(type(value) is int and value in numbers for value in (*node.args, *node.kwargs.values()))


def _mutates(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _needed(graph: fx.Graph) -> list[fx.Node]:
    """The nodes that results depend on, in order."""
    needed: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op == "output" or node in needed or _mutates(node):
            needed |= {node, *node.all_input_nodes}
    return [node for node in graph.nodes if node in needed and node.op in ("call_function", "get_attr")]


def _aliased(node: fx.Node) -> Iterator[tuple[fx.Node, bool]]:
    """Tensors in whose memory a result may lie, and whether the operator writes to it."""
    if node.target is getitem:
        yield node.args[0], False  # pyrefly: ignore[invalid-yield] (of several results, one)
    if not isinstance(node.target, torch._ops.OpOverload):
        return
    for place, argument in enumerate(node.target._schema.arguments):
        if argument.alias_info is not None:
            value = node.args[place] if place < len(node.args) else node.kwargs.get(argument.name)
            for x in _nodes_in(value if isinstance(value, list | tuple) else (value,)):
                yield x, argument.alias_info.is_write


def _refuse_side_effects(graph: fx.Graph) -> None:
    """NotCapturedError where a tensor that is not the line's own is written to, or torch's own generator is asked."""
    foreign: set[fx.Node] = set()  # inputs, weights and views of them
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            foreign.add(node)
        if _draws(node):
            raise NotCapturedError(f"{node.target} draws random numbers that are not the run's own, as dropout does")
        for x, written in _aliased(node):
            if x in foreign:
                if written:
                    raise NotCapturedError(f"{node.target} changes what lasts beyond the step, as batch norm does in training")
                foreign.add(node)


def _draws(node: fx.Node) -> bool:
    """Whether an operator asks torch's own generator. Fused attention carries the tag of those that do, and does so with dropout alone."""
    if not isinstance(node.target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded not in node.target.tags:
        return False
    place = next((i for i, argument in enumerate(node.target._schema.arguments) if argument.name == "dropout_p"), None)
    if place is None:
        return True
    default = node.target._schema.arguments[place].default_value
    return bool((node.args[place] if place < len(node.args) else node.kwargs.get("dropout_p", default)) != 0)


def _add_in_place(nodes: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> None:
    """Sums of two tensors of which one is never used again go into its memory: the same bits, and less of it to fetch."""
    place = {node: number for number, node in enumerate(nodes)}
    memory: dict[fx.Node, fx.Node] = {}  # whose operator made the memory that a result lies in
    end: dict[fx.Node, int] = {}  # by that node: the last use of anything that lies there
    for node in nodes:
        shown = next((x for x, _ in _aliased(node)), node)
        base = memory.get(shown, shown)
        memory[node] = node if node.target is getitem and base is shown else base  # of several new results, each has its own
        last = len(nodes) if node in outputs else max((place[user] for user in node.users if user in place), default=-1)
        end[memory[node]] = max(last, end.get(memory[node], -1))
    for node in nodes:
        if node.target is not torch.ops.aten.add.Tensor or node.kwargs or len(node.args) != 2:
            continue
        pair: list[Any] = list(node.args)
        for first, second in (pair, pair[::-1]):
            made = memory.get(first) if isinstance(first, fx.Node) and isinstance(second, fx.Node) else None
            if made is None or made.op != "call_function" or end[made] != place[node]:
                continue
            into, other, out = (x.meta["val"] for x in (first, second, node))
            if other.dtype == out.dtype and _alike(into, out):
                node.target, node.args = torch.ops.aten.add_.Tensor, (first, second)
                break


def _alike(one: Tensor, other: Tensor) -> bool:
    return (one.shape, one.stride(), one.dtype, one.device) == (other.shape, other.stride(), other.dtype, other.device)


SAME_PLACE = {"permute", "t", "transpose", "view", "_unsafe_view", "reshape", "unsqueeze", "squeeze", "expand", "detach", "alias"}


def _drop_repeated_views(graph: fx.Graph) -> None:
    """One view in place of all that show the same memory in the same way, such as the two transpositions to channels-last and back."""
    shown: dict[Any, fx.Node] = {}  # by the tensor that is viewed, shape, strides and dtype
    viewed: dict[fx.Node, fx.Node] = {}
    for node in list(graph.nodes):
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            continue
        of = node.args[0] if _stem(node) in SAME_PLACE else None
        viewed[node] = viewed.get(of, node) if isinstance(of, fx.Node) else node
        same = shown.setdefault((viewed[node], value.shape, value.stride(), value.dtype), node)
        if same is not node:
            node.replace_all_uses_with(same)
            graph.erase_node(node)


def _stem(node: fx.Node) -> str:
    """`permute` of aten.permute.default."""
    return node.target._schema.name.removeprefix("aten::") if isinstance(node.target, torch._ops.OpOverload) else ""
