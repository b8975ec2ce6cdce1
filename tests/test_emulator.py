"""The emulator finds what is wrong with a CUDA kernel: faults planted into copies of the real ones, one by one."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from pathlib import Path

import emulator_counts
import pytest
import torch
from emulator import SHARED_LIMITS, Edit, Emulator
from emulator.rewrite import rewrite
from helpers import emulator, emulator_missing, normal, positive, relative_error
from test_attention import LIMITS, NAMES, launcher_inputs, run_launchers

ROOT = emulator_counts.ROOT
pytestmark = pytest.mark.skipif(emulator_missing() is not None, reason=str(emulator_missing()))
attention_twins = import_module("sami_fast.reference.attention")
norm_twins = import_module("sami_fast.reference.group_norm_silu")
loss_twins = import_module("sami_fast.reference.guided_loss")
noise_twins = import_module("sami_fast.reference.noise_sample")


# Calls at which faults show, each with a check of its results


def attention(cuda: Emulator, _: Path) -> None:
    """40 queries and 70 keys: several tiles, the last of them not full."""
    given = launcher_inputs(1, 40, 70, 2, 32, dtype=torch.float16)
    found, expected = (run_launchers(module, **given, scale=0.2, causal=False) for module in (cuda, attention_twins))
    for name, a, b in zip(NAMES, found, expected, strict=True):
        assert relative_error(a, b) < 2 * LIMITS[torch.float16], name


def far_tokens(cuda: Emulator, folder: Path) -> None:
    """Three tokens 2^30 elements apart, in a file that is a hole in between."""
    stride = 2**30
    with (folder / "sparse").open("wb") as file:
        file.truncate(2 * (2 * stride + 16))
    memory = torch.from_file(str(folder / "sparse"), shared=True, size=2 * stride + 16, dtype=torch.float16)
    x = memory.as_strided((1, 3, 1, 16), (1, stride, 1, 1))
    x.copy_(normal(1, 3, 1, 16, dtype=torch.float16))
    out, _ = cuda.in_place("attention_fwd", x, x, x, 0.2, False)
    assert relative_error(out, attention_twins.attention_fwd(x, x, x, 0.2, False)[0]) < 1e-3


def group_norm(cuda: Emulator, _: Path) -> None:
    """More channels than a tile has, so that sums over channels pass through the same shared memory twice."""
    x, g = normal(1, 40, 33, dtype=torch.float32), normal(1, 40, 33, seed=1, dtype=torch.float32)
    parameters = normal(40, seed=2, dtype=torch.float32), normal(40, seed=3, dtype=torch.float32)
    y, *statistics = cuda.group_norm_silu_fwd(x, *parameters, 1, 1e-5, True)
    found = y, *cuda.group_norm_silu_bwd(g, x, *parameters, *statistics, 1, True)
    y, *statistics = norm_twins.group_norm_silu_fwd(x, *parameters, 1, 1e-5, True)
    for a, b in zip(found, (y, *norm_twins.group_norm_silu_bwd(g, x, *parameters, *statistics, 1, True)), strict=True):
        assert relative_error(a, b) < 1e-5


def guided_loss(cuda: Emulator, _: Path) -> None:
    images = [normal(2, 3, 20, 21, seed=seed, dtype=torch.float32) for seed in range(3)]
    scalars = [positive(2, low=0.1, high=3.0, seed=seed, dtype=torch.float32) for seed in range(3)]
    arguments = *images, *scalars, None, 1, 0, 0, 0
    for a, b in zip(cuda.guided_loss_fwd(*arguments), loss_twins.guided_loss_fwd(*arguments), strict=True):
        assert relative_error(a, b) < 1e-6


def noise(cuda: Emulator, _: Path) -> None:
    for batch in (2, 0):
        arguments = (
            normal(batch, 3, 5, 7, dtype=torch.float32),
            torch.full((batch, 2), 0.6),
            torch.full((batch, 2), 0.8),
            torch.arange(batch),
        )
        for a, b in zip(
            cuda.noise_sample_fwd(*arguments, 1, 2, 3, True), noise_twins.noise_sample_fwd(*arguments, 1, 2, 3, True), strict=True
        ):
            assert torch.equal(a, b)


@dataclass(frozen=True)
class Fault:
    """In `file`, `new` instead of `old`, where PLANTED is true; `call` then says `found`, or, when that is empty, gives a wrong value."""

    file: str
    old: str
    new: str
    call: Callable[[Emulator, Path], None]
    found: str = ""


FAULTS = {
    "no barrier before shared memory is written again": Fault(
        "tiles.cuh",
        "work(start, stage);\n    __syncthreads();",
        "work(start, stage);\n    if (!PLANTED) __syncthreads();",
        attention,
        "attention_fwd_kernel.*race: writes shared memory that block ., thread .* reads with no barrier between",
    ),
    "no barrier before shared memory is read": Fault(
        "tiles.cuh",
        "__syncthreads();\n    work(start, stage);",
        "if (!PLANTED) __syncthreads();\n    work(start, stage);",
        attention,
        "(race: reads|reads shared memory that nobody wrote)",
    ),
    "a copy that is still on its way": Fault(
        "tiles.cuh",
        "    } else {\n      wait_for_all_but<0>();",
        "    } else {\n      PLANTED ? wait_for_all_but<1>() : wait_for_all_but<0>();",
        attention,
        "reads shared memory that nobody wrote",
    ),
    "fragments swapped": Fault(
        "tiles.cuh",
        "mma(x[m][j], a[m], b[0], b[1], kind);",
        "mma(x[m][j], a[m], b[PLANTED ? 1 : 0], b[PLANTED ? 0 : 1], kind);",
        attention,
    ),
    "no .trans": Fault(
        "tiles.cuh",
        "load_blocks_transposed(blocks, place + k * 8 * LD<T, D> + j);",
        "PLANTED ? load_blocks(blocks, place + k * 8 * LD<T, D> + j) : load_blocks_transposed(blocks, place + k * 8 * LD<T, D> + j);",
        attention,
    ),
    "a row of ldmatrix that is not aligned": Fault(
        "tiles.cuh",
        "LD<T, D> + lane / 16 * 8 + k);",
        "LD<T, D> + lane / 16 * 8 + k + PLANTED);",
        attention,
        "misaligned: ldmatrix",
    ),
    "a row too far": Fault(
        "tiles.cuh",
        "const int rows = end - start < ROWS ? static_cast<int>(end - start) : ROWS;",
        "const int rows = end - start < ROWS ? static_cast<int>(end - start) + PLANTED : ROWS;",
        attention,
        "out of bounds: reads 16 bytes, byte .* of a tensor of",
    ),
    "a tail that is not filled": Fault(
        "tiles.cuh",
        "copy_piece(tile + row * LD<T, D> + column,",
        "if (!PLANTED || row < rows) copy_piece(tile + row * LD<T, D> + column,",
        attention,
        "reads shared memory that nobody wrote",
    ),
    "too little shared memory": Fault(
        "attention.cu",
        "shared_bytes<T, D, COLUMNS<T, D>>(1, 2), view<T>(q)",
        "shared_bytes<T, D, COLUMNS<T, D>>(1, 2) - 32 * PLANTED, view<T>(q)",
        attention,
        "out of bounds: .* of shared memory",
    ),
    "offsets of 32 bits": Fault(
        "tiles.cuh",
        "there ? from + row * x.s + column",
        "there ? from + (PLANTED ? static_cast<int>(row * x.s) : row * x.s) + column",
        far_tokens,
        "out of bounds: memory that belongs to no tensor",
    ),
    "lanes that a shuffle names and that do not come": Fault(
        "tiles.cuh",
        "x = fmaxf(x, __shfl_xor_sync(FULL_WARP, x, 1));",
        "if (!PLANTED || threadIdx.x % 2) x = fmaxf(x, __shfl_xor_sync(FULL_WARP, x, 1));",
        attention,
        "meet at different instructions: __shfl_sync",
    ),
    "a mask without lanes that call": Fault(
        "tiles.cuh",
        "x += __shfl_xor_sync(FULL_WARP, x, 1);",
        "x += __shfl_xor_sync(PLANTED ? 0xffffu : FULL_WARP, x, 1);",
        attention,
        "mask 0000ffff is without",
    ),
    "no barrier between sums": Fault(
        "group_norm_silu.cu",
        "__syncthreads();  // the sums of the channels before have been read",
        "if (!PLANTED) __syncthreads();",
        group_norm,
        "group_norm_silu_bwd_kernel.*race",
    ),
    "a barrier that warps leave out": Fault(
        "guided_loss.cu",
        "__syncthreads();",
        "if (PLANTED && threadIdx.x >= 64) return; __syncthreads();",
        guided_loss,
        "deadlock: 192 threads left the kernel",
    ),
    "two barriers for one": Fault(
        "group_norm_silu.cu",
        "__syncthreads();  // what is there has been read",
        "if (PLANTED && threadIdx.x < 32) { __syncthreads(); } else {\n__syncthreads(); }",
        group_norm,
        "meet at different barriers",
    ),
    "all threads store one result": Fault(
        "guided_loss.cu",
        "if (threadIdx.x != 0) return;\n  guided = unguided",
        "if (threadIdx.x != 0 && !PLANTED) return;\n  guided = unguided",
        guided_loss,
        "race: writes global memory",
    ),
    "elements beyond the end": Fault(
        "noise_sample.cu",
        "if (start + lane >= size) break;",
        "if (start + lane >= size && !PLANTED) break;",
        noise,
        "(race|out of bounds): writes",
    ),
    "a grid of too many blocks": Fault(
        "noise_sample.cu",
        "kernel<<<grid(batch * blocks), THREADS",
        "kernel<<<PLANTED ? 0x80000000u : grid(batch * blocks), THREADS",
        noise,
        "a grid of 2147483648 blocks",
    ),
    "a grid of no blocks": Fault(
        "noise_sample.cu",
        "if (x_t.numel() == 0) return std::make_tuple(x_t, eps);",
        "if (x_t.numel() == 0 && !PLANTED) return std::make_tuple(x_t, eps);",
        noise,
        "a grid of 0 blocks",
    ),
}
# Of attention float16 with heads of 17 to 32 and of group norm float32 alone, which compile in seconds
SMALL = [
    Edit(
        "attention.cu",
        "if (size <= 16) {\n      f(kind, std::integral_constant<int, 16>());\n    } else if (size <= 32) {",
        "if constexpr (true) {",
    ),
    Edit("attention.cu", "    with(float{});", "    STD_TORCH_CHECK(false);"),
    Edit("attention.cu", "    with(__nv_bfloat16{});", "    STD_TORCH_CHECK(false);"),
    Edit("group_norm_silu.cu", "with_layout(__half{})", "STD_TORCH_CHECK(false)"),
    Edit("group_norm_silu.cu", "with_layout(__nv_bfloat16{})", "STD_TORCH_CHECK(false)"),
]


@cache
def copies() -> Emulator:
    """One build with all faults in it, each of which waits for its number."""
    edits = [Edit(f.file, f.old, f.new.replace("PLANTED", f"emulator::planted({i})")) for i, f in enumerate(FAULTS.values(), 1)]
    return Emulator(sorted({f.file for f in FAULTS.values()} - {"tiles.cuh"}), [*SMALL, *edits])


@pytest.fixture(params=[0, 1], ids=["one schedule", "another"])
def planted(request):
    cuda = copies()
    cuda.seed = request.param
    yield cuda
    cuda.planted, cuda.tracking = 0, True


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_found(planted, name, tmp_path):
    planted.planted, fault = 1 + list(FAULTS).index(name), FAULTS[name]
    with pytest.raises(RuntimeError if fault.found else AssertionError, match=fault.found or None):
        fault.call(planted, tmp_path)


@pytest.mark.parametrize("call", [attention, far_tokens, group_norm, guided_loss, noise])
@pytest.mark.parametrize("tracking", [True, False])
def test_without_a_fault_the_copies_pass(planted, call, tracking, tmp_path):
    planted.tracking = tracking
    call(planted, tmp_path)


def test_a_race_shows_as_other_bits_under_another_schedule(planted):
    """Without tracking, too."""
    planted.tracking, planted.planted = False, 1 + list(FAULTS).index("no barrier before shared memory is written again")
    q, k = (normal(1, tokens, 2, 32, dtype=torch.float16) for tokens in (40, 300))
    results = []
    for planted.seed in range(4):
        results.append(planted.attention_fwd(q, k, k, 0.2, False)[0])
    assert any(not torch.equal(results[0], other) for other in results[1:])


# The kernels themselves


@pytest.fixture
def cuda():
    """The emulator of the whole suite, with its settings as they were afterwards."""
    cuda = emulator()
    settings = {name: getattr(cuda, name) for name in ("seed", "tracking", "counting", "device")}
    yield cuda
    for name, value in settings.items():
        setattr(cuda, name, value)


def test_two_schedules_give_the_same_bits(cuda):
    """Every kernel in every dtype."""
    seen = set()
    for case in emulator_counts.cases():
        results = []
        for cuda.seed in (0, 1, 12345):
            cuda.clear()
            results.append(case.run(cuda))
            seen |= {name.split("<")[0] for name in cuda.counts}
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True)), case
    written = [re.findall(r"__global__.*?(\w+_kernel)\(", path.read_text(), re.DOTALL) for path in (ROOT / "csrc/cuda").glob("*.cu")]
    assert seen == {name for names in written for name in names}


def test_counts_stay_within_their_budgets(cuda):
    cuda.counting = True
    rows, lines = emulator_counts.count(cuda)
    assert not emulator_counts.exceeded(rows, emulator_counts.read_budgets())
    page = emulator_counts.PAGE.read_text().split(emulator_counts.MARKS[0])[1].split(emulator_counts.MARKS[1])[0].split("\n")
    for line, cells in zip(page[3:-1], lines, strict=True):
        shown = [cell.strip() for cell in line.strip("|").split("|")]
        assert [*shown[:3], shown[4], shown[6]] == [*cells[:3], cells[4], cells[6]]  # errors and conflicts depend on the compiler
        assert float(cells[3]) <= 2 * float(shown[3])


def test_attention_of_64_columns_uses_what_it_reads():
    """The budgets are what the kernels do, as the test above sees."""
    rows = [row for row in emulator_counts.read_budgets() if re.match(r"attention b?float16 1x64x64x1x64", row.case)]
    assert len(rows) == 2 * 7
    for row in rows:
        assert row.counts.conflicts == 0, row
        assert row.counts.mma >= 2.5 * row.counts.ldmatrix, row


def test_a_count_above_its_budget_is_a_fault():
    (row, *_), budgets = emulator_counts.read_budgets()[:1], emulator_counts.read_budgets()[:1]
    more = replace(row, counts=replace(row.counts, barriers=row.counts.barriers + 1))
    assert emulator_counts.exceeded([more], budgets) == [
        f"{row.case}, {row.kernel}: barriers {row.counts.barriers} -> {row.counts.barriers + 1}"
    ]
    assert not emulator_counts.exceeded([row], budgets)
    assert emulator_counts.exceeded([], budgets) == [f"{row.case}, {row.kernel}: no such launch any more"]
    other = replace(row, made_with="g++ 1", counts=replace(row.counts, global_read=row.counts.global_read + 1))
    assert not emulator_counts.exceeded([other], budgets)


@pytest.mark.parametrize("device", SHARED_LIMITS)
@pytest.mark.parametrize("dtype", list(LIMITS), ids=str)
@pytest.mark.parametrize("size", [16, 64, 65, 128])
def test_shared_memory_of_every_device_is_enough(cuda, device, dtype, size):
    cuda.device = device
    given = launcher_inputs(1, 9, 20, 1, size, dtype=dtype)
    found, expected = (run_launchers(module, **given, scale=size**-0.5, causal=False) for module in (cuda, attention_twins))
    for name, a, b in zip(NAMES, found, expected, strict=True):
        assert relative_error(a, b) < 2 * LIMITS[dtype], name


def test_a_kernel_is_told_of_its_shared_memory_once(cuda):
    q = normal(1, 9, 1, 24, dtype=torch.float32)
    cuda.attention_fwd(q, q, q, 1.0, False)
    before = cuda.attribute_calls
    cuda.attention_fwd(q, q, q, 1.0, False)
    assert cuda.attribute_calls == before


def test_tensors_of_more_than_one_device(cuda):
    image, scalar, index = torch.zeros(2, 1, 4, 4), torch.ones(2), torch.arange(2)
    row = torch.ones(2, 3)
    far = {"device": "meta"}
    for call in (
        lambda: cuda.noise_sample_fwd(image, scalar[:, None].to(**far), scalar[:, None], index, 0, 0, 0, True),
        lambda: cuda.noise_sample_fwd(image, scalar[:, None], scalar[:, None], index.to(**far), 0, 0, 0, True),
        lambda: cuda.guided_loss_fwd(image.to(**far), image, image, scalar, scalar, scalar, None, 1, 0, 0, 0),
        lambda: cuda.guided_loss_fwd(None, image, image, scalar, scalar, scalar, index.to(**far), 1, 0, 0, 0),
        lambda: cuda.guided_loss_fwd(image, image, image, scalar, scalar.to(**far), scalar, None, 1, 0, 0, 0),
        lambda: cuda.gaussian_log_prob_fwd(row, row.to(**far), row),
        lambda: cuda.gaussian_log_prob_bwd(scalar.to(**far), row, row, row),
        lambda: cuda.gaussian_log_prob_bwd_bwd(row, None, row.to(**far), scalar, row, row, row),
        lambda: cuda.attention_fwd(image, image, image.to(**far), 1.0, False),
    ):
        with pytest.raises(RuntimeError, match=r"tensors on more than one device|on another device than q"):
            call()


def test_levels_of_a_large_batch_take_work_in_proportion(cuda):
    """Blocks of threads, and bytes, grow with the batch and not with its square."""
    blocks = []
    for batch in (3000, 6000):
        cuda.clear()
        cuda.stratified_uniform(torch.arange(5), 2, batch, seed=0, step=0)
        blocks.append(sum(c.blocks for c in cuda.counts.values()))
        assert sum(c.global_write for c in cuda.counts.values()) == 8 * batch + 4 * 5 * 2
    assert blocks[1] <= 2 * blocks[0]


# The rewriter


def test_rewriting_keeps_lines_and_arguments():
    source = """__global__ void __launch_bounds__(32) f_kernel(float* x) {
  __shared__ float a[4], b[2][N];
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(address)
               : "memory");
}
void start() { f_kernel<T, N><<<grid(n), 32, 0, stream>>>(x); }
"""
    found = rewrite(source, "f.cu", "ns").splitlines()[1:]
    assert len(found) == len(source.splitlines())
    assert found[0].endswith("{ emulator::entered(__PRETTY_FUNCTION__);")
    assert 'float (&b)[2][N] = emulator::shared<float[2][N]>(&b_key, "b")' in found[1]
    assert found[2].strip() == "emulator::ldmatrix_sync_aligned_m8n8_x4_shared_b16(__LINE__, r[0], r[1], address);"
    assert 'emulator::start(__FILE__, __LINE__, "f_kernel", f_kernel<T, N>, grid(n), 32, 0, stream)(x);' in found[7]
