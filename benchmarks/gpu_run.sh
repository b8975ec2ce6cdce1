#!/usr/bin/env bash
# Everything that waits for a GPU, for a machine that is there for minutes and has no network: nvcc, a C++ compiler, python with torch, triton,
# numpy, scipy, matplotlib, PyYAML, einops, setuptools, pytest and its plugins benchmark, xdist and timeout.
#
#   benchmarks/gpu_run.sh [options] OUTPUT_DIR [stage ...]          # all stages, in this order, where none is named
#
#   build       the core for this GPU; Python sources beside it in build/gpu_run/site, which PYTHONPATH names: nothing is installed
#   test        the GPU tests, then the tests of all kernels and ops, which run on the GPU here
#   sanitize    compute-sanitizer's memcheck and racecheck over every kernel at small odd sizes (sanitize.py)
#   ops, step   every op against its rivals and roofline; the joint step of CelebA-64 (test_ops.py, test_step.py)
#   deepspeed   the same networks through the launcher at every ZeRO stage (deepspeed_steps.py), where DeepSpeed is installed
#
#   --rehearse        no GPU: tiny sizes on Triton's interpreter, nvcc compiles; figures
#                     mean nothing. REHEARSE_SMALL=1: still fewer cases, with the sami-fast that is installed, for the test suite
#   --again           also what is done already with these very sources on this device
#   --minutes N       when the call has to be over (9.5); what is not done by then goes on in the next call
#   PYTHON=...        the interpreter, python3
#
# Three calls of under ten minutes:   build test sanitize   |   ops   |   step deepspeed      (again what says "partial")
# Files in OUTPUT_DIR: run.log, done.tsv, ops.jsonl, step.jsonl, deepspeed.jsonl. With them, a later call goes on,
# on a fresh machine too; it then builds first.
#
# Exit status: 0, 1 when a stage failed, 2 for wrong usage or without a GPU.
set -euo pipefail
{ # read to its end before anything runs: the file may be edited meanwhile

STAGES=(build test sanitize ops step deepspeed)
declare -A LIMIT=([build]=240 [test]=300 [sanitize]=240 [ops]=300 [step]=440 [deepspeed]=400)  # seconds
PARTIAL=75 UNBUILT=70 SKIPPED=76 # exit statuses of a stage that goes on in the next call, that finds nothing built, that is not for this machine

usage() { echo "gpu_run.sh: $1" >&2; exit 2; }

rehearse=0 again=0 minutes=9.5 small=0
while [[ ${1-} == -* ]]; do
    case $1 in
        --rehearse) rehearse=1 ;;
        --again) again=1 ;;
        --minutes) minutes=${2-}; shift; [[ $minutes =~ ^[0-9]+(\.[0-9]+)?$ ]] || usage "--minutes: expected a number, found '$minutes'" ;;
        -h | --help) sed -n '2,/^# Exit status/s/^# \{0,1\}//p' "$0"; exit 0 ;;
        *) usage "no such option: $1" ;;
    esac
    shift
done
[[ $# -ge 1 ]] || usage "expected OUTPUT_DIR [stage ...], where stages are ${STAGES[*]}"
out=$1; shift
wanted=("$@")
[[ $# -gt 0 ]] || wanted=("${STAGES[@]}")
for stage in "${wanted[@]}"; do
    [[ -v LIMIT[$stage] ]] || usage "no such stage: $stage; expected some of ${STAGES[*]}"
done
mkdir -p "$out" 2>/dev/null && [[ -w $out ]] || usage "cannot write to $out"
out=$(cd "$out" && pwd)
root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root"
python=${PYTHON:-python3}
command -v "$python" >/dev/null || usage "no interpreter $python"
lacking=$("$python" -c "
from importlib.util import find_spec
needed = 'torch triton numpy scipy matplotlib yaml einops setuptools pytest pytest_benchmark xdist pytest_timeout'.split()
print(*(name for name in needed if find_spec(name) is None))")
[[ -z $lacking ]] || usage "$python lacks $lacking"

# A folder in the path of every process hides what is installed, and the checkout's own sami_fast lacks kernels/.
export PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1
unset SAMI_FAST_BACKEND TRITON_INTERPRET
device=$("$python" -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "")') || usage "$python cannot import torch"
if [[ $rehearse == 1 ]]; then
    device="rehearsal on the CPU" arch=9.0 work=$root/build/gpu_rehearsal
    for stage in "${STAGES[@]}"; do LIMIT[$stage]=3600; done # --minutes alone bounds it: such a machine is slow
    export CUDA_VISIBLE_DEVICES=
    [[ -n ${REHEARSE_SMALL-} ]] && small=1 work=$out/work
    echo "no GPU: nothing measured here is a GPU figure"
else
    [[ -n $device ]] || usage "there is no GPU that torch can use; --rehearse does without"
    arch=$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())') work=$root/build/gpu_run
fi
site=$work/site log=$out/run.log
mkdir -p "$work"
exec 9>"$work/lock"
flock -n 9 || usage "another run is building in $work"
cores=$(nproc)
# What decides about results. A checkout that was copied has no commit.
revision=$(find sami_fast kernels configs csrc benchmarks tests setup.py pyproject.toml -type f -not -path '*/__pycache__/*' \
    -not -path 'benchmarks/results/*' -not -name '*.so' -print0 | sort -z | xargs -0 sha256sum | sha256sum | cut -c1-12)
commit=$(git rev-parse HEAD 2>/dev/null) || commit=
export SAMI_FAST_COMMIT=${SAMI_FAST_COMMIT:-${commit:+$commit, }sources $revision}
started=$SECONDS
left() { "$python" -S -c "print(max(0, int(60 * $minutes) - $((SECONDS - started))))"; }
total=$(left)

say() { echo "$*" | tee -a "$log"; }

# bounded COMMAND...: as long as the stage has time; output goes to the log
bounded() {
    local seconds=$((deadline - SECONDS))
    [[ $seconds -ge 5 ]] || return 124
    echo "+ $*" >>"$log"
    timeout --signal=INT --kill-after=15 "$seconds" "$@" >>"$log" 2>&1
}

is_done() { [[ $again == 0 ]] && grep -qxF "$revision"$'\t'"$device"$'\t'"$1" "$out/done.tsv" 2>/dev/null; }
set_done() { printf '%s\t%s\t%s\n' "$revision" "$device" "$1" >>"$out/done.tsv"; }

# once LABEL COMMAND...: bounded, unless it succeeded before
once() {
    local label=$1; shift
    is_done "$label" && return
    bounded "$@" || return $?
    set_done "$label"
}

# unfinished STATUS: that of a stage whose parts are done once each; out of time is no failure, the next call goes on with the others
unfinished() { [[ $1 == 124 || $1 == 137 ]] && echo "$PARTIAL" || echo "$1"; }

# --- stages -------------------------------------------------------------------------------------------------------------------------

sources() { # the Python part of the site; seconds
    rm -rf "$site/sami_fast"
    "$python" setup.py --quiet egg_info --egg-base "$work" build_py --build-lib "$site" >>"$log" 2>&1 || return 1
    rm -rf "$work"/*.egg-info
    cp "$work"/core/sami_fast/_C*.so "$site/sami_fast/"
}

core() { # core FOLDER CUDA: the compiled part into a folder, unless its sources, torch and architecture are those of last time
    local folder=$1 cuda=$2 stamp
    stamp=$({ find csrc setup.py -type f -print0 | sort -z | xargs -0 sha256sum; "$python" -c 'import torch; print(torch.__version__)'; echo "$arch $cuda"; } |
        sha256sum)
    [[ -f $folder.stamp && $(<"$folder.stamp") == "$stamp" ]] && return
    rm -rf "$folder" "$folder.stamp"
    SAMI_FAST_CUDA=$cuda TORCH_CUDA_ARCH_LIST=$arch bounded "$python" setup.py --quiet build_ext --build-lib "$folder" --build-temp "$folder.objects"
    [[ -n $(find "$folder" -name '_C*.so') ]] || { say "the core was not built: see the last lines of $log"; return 1; }
    echo "$stamp" >"$folder.stamp"
}

stage_build() {
    local cuda
    cuda=$("$python" -c 'import torch; print(int(torch.version.cuda is not None))')
    [[ $rehearse == 1 ]] && ! command -v nvcc >/dev/null && cuda=0
    core "$work/core" "$cuda" || return 1 # errexit is off where a stage builds first
    # With CUDA a core does not load beside a torch without: it is compiled, and that is all.
    if [[ $rehearse == 1 && $cuda == 0 ]] && command -v nvcc >/dev/null; then core "$work/core_with_cuda" 1 || return 1; fi
    sources || return 1
    PYTHONPATH=$site bounded "$python" -c "$LOADS" "$site" "$cuda" || return 1
    note "core for $arch $([[ $cuda == 1 ]] && echo with || echo without) CUDA, sources $revision"
}

LOADS='
import sys, torch, sami_fast, sami_fast.kernels
from sami_fast.ops.backend import refusal
assert sami_fast.__file__.startswith(sys.argv[1]), sami_fast.__file__
devices = {"cpp": "cpu"} | ({"triton": "cuda", "cuda": "cuda"} if torch.cuda.is_available() else {})
reasons = {name: refusal(name, device, torch.float32) for name, device in devices.items()}
assert not any(reasons.values()), reasons
assert torch._C._dispatch_has_kernel_for_dispatch_key("sami_fast_C::attention_fwd", "CUDA") == (sys.argv[2] == "1")
'

# Where torch, another build or another machine has come in between, a stage builds first.
ensure_build() {
    mkdir -p "$site"
    ln -sfn "$root/benchmarks" "$site/benchmarks" # the checkout itself in the path would hide the site's sami_fast
    export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
    [[ $small == 1 || $built == 1 ]] || stage_build || exit "$UNBUILT"
}

stage_test() {
    local files workers=$((cores > 16 ? 8 : (cores + 1) / 2)) flags=(-q -o pythonpath=tests -p no:cacheprovider --dist worksteal --timeout 200)
    mapfile -t files < <(grep -lE 'mark\.gpu' tests/test_*.py)
    local ops=(tests/test_{attention,group_norm_silu,guided_loss,noise_sample,gaussian_log_prob,random,stratified_uniform,ops}.py)
    [[ $rehearse == 1 ]] && ops=(tests/test_gaussian_log_prob.py) workers=1
    local status=0
    once "test gpu" "$python" -m pytest -m gpu -n "$workers" "${flags[@]}" "${files[@]}" || status=$?
    once "test ops" "$python" -m pytest -m "not gpu" -n "$workers" "${flags[@]}" "${ops[@]}" || status=$?
    note "$(grep -E '^(=+ )?[0-9]+ (passed|failed|skipped|error).* in [0-9.]+s' "$log" | tail -2 | sed 's/=//g' | paste -sd';')"
    return "$(unfinished $status)"
}

stage_sanitize() {
    local tool backend status=0 sanitizer every=1 backends=(triton cuda) interpret=()
    sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null || true)
    [[ $rehearse == 1 ]] && every=$((small ? 60 : 12)) backends=(triton cpp) interpret=(env TRITON_INTERPRET=1)
    local cases=("${interpret[@]}" "$python" -m benchmarks.sanitize --every "$every")
    # First without: values are checked, and Triton compiles into its cache.
    once values "${cases[@]}" "${backends[@]}" || status=$?
    if [[ -z $sanitizer || $rehearse == 1 ]]; then
        note "values only: no compute-sanitizer here"
        [[ $rehearse == 1 ]] || status=1
        return $status
    fi
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1 # every tensor in memory of its own, so that no access beyond it goes unnoticed
    for tool in memcheck racecheck; do
        for backend in "${backends[@]}"; do
            once "$tool $backend" "$sanitizer" --tool "$tool" --error-exitcode 9 --print-limit 20 "${cases[@]}" "$backend" || {
                status=$?
                say "$tool $backend: status $status"
            }
        done
    done
    note "$(grep -E 'ERROR SUMMARY|RACECHECK SUMMARY' "$log" | tail -4 | sed 's/=* *//' | paste -sd';')"
    return "$(unfinished $status)"
}

TEST='benchmarks/test_[a-z_]+\.py::[A-Za-z0-9_]+(\[[^]]*\])?'

benchmark() { # benchmark ROWS TEST...: rows are appended as they are measured, and the next call goes on after them
    local rows=$1 status=0 attempt offset culprit left_out=(); shift
    local flags=(-v -o pythonpath=tests -p no:cacheprovider --rows "$rows" --resume)
    [[ $rehearse == 1 ]] && flags+=(--tiny --device cpu --seconds 0.01)
    for attempt in 1 2 3 4; do
        status=0 offset=$(wc -l <"$log")
        bounded "$python" -m pytest "${flags[@]}" "$@" || status=$?
        # One that takes the process down, or CUDA with it, takes its turn from all after it: they get another, without it.
        if [[ $status -gt 128 && $status != 137 ]]; then
            culprit=$(tail -n +$((offset + 1)) "$log" | grep -oE "$TEST" | tail -1) || break
        elif [[ $status == 1 ]] && tail -n +$((offset + 1)) "$log" | grep -q 'CUDA error'; then
            culprit=$(tail -n +$((offset + 1)) "$log" | grep -E "^$TEST (FAILED|ERROR)" | head -1 | grep -oE "$TEST") || break
        else
            break
        fi
        say "status $status: left out from here on: $culprit"
        flags+=(--deselect "$culprit") left_out+=("$culprit")
    done
    [[ $status == 0 && ${#left_out[@]} -gt 0 ]] && status=1
    [[ -f $rows ]] && "$python" -m benchmarks.table --short "$rows" | cut -c1-160 | tail -40
    note "$([[ -f $rows ]] && wc -l <"$rows" || echo 0) rows in $(basename "$rows")${left_out[*]:+, without ${left_out[*]}}"
    # Out of time, by our own clock or through the interrupt that pytest answers with 2.
    [[ $status == 124 || $status == 137 || ($status == 2 && $SECONDS -ge $((deadline - 2))) ]] && return "$PARTIAL"
    return $status
}

stage_ops() { benchmark "$out/ops.jsonl" benchmarks/test_ops.py; }
stage_step() { benchmark "$out/step.jsonl" benchmarks/test_step.py -k celeba64; }

stage_deepspeed() {
    local status=0 flags=()
    "$python" -c 'import deepspeed' 2>/dev/null || { note "DeepSpeed is not installed"; return "$SKIPPED"; }
    [[ $rehearse == 1 ]] && flags=(--tiny --steps 2 --stages 1)
    bounded "$python" -m benchmarks.deepspeed_steps --rows "$out/deepspeed.jsonl" "${flags[@]}" || status=$?
    grep -E '^ZeRO [0-3] ' "$log" | tail -4 || true
    note "$(tail -1 "$log")"
    return $status
}

# --- all of them --------------------------------------------------------------------------------------------------------------------

note() { echo "$*" >"$work/note"; }

built=0 broken=0 failed=0 rows=()
echo "== $(date -u +%FT%TZ) $device, $SAMI_FAST_COMMIT: ${wanted[*]}" >>"$log"
for stage in "${wanted[@]}"; do
    begin=$SECONDS
    if is_done "$stage" && [[ $stage != build || -d $site/sami_fast ]]; then
        rows+=("$stage"$'\t'"done before"$'\t'0$'\t'"")
        continue
    fi
    if [[ $broken == 1 ]]; then
        rows+=("$stage"$'\t'"not built"$'\t'0$'\t'"")
        continue
    fi
    remaining=$((total - (SECONDS - started) - 12)) # the tables take seconds too
    if [[ $remaining -lt 30 ]]; then
        rows+=("$stage"$'\t'"no time left"$'\t'0$'\t'"call again")
        continue
    fi
    deadline=$((SECONDS + (LIMIT[$stage] < remaining ? LIMIT[$stage] : remaining)))
    lines=$(wc -l <"$log")
    : >"$work/note"
    say "-- $stage, until second $((deadline - started))"
    set +e
    (
        set -e
        if [[ $stage == build ]]; then export PYTHONPATH=$site; else ensure_build; fi
        "stage_$stage"
    )
    status=$?
    set -e
    [[ -d $site/sami_fast ]] && built=1
    case $status in
        0) verdict=ok; set_done "$stage" ;;
        "$PARTIAL") verdict=partial ;;
        "$SKIPPED") verdict=skipped ;;
        *)
            [[ $status == 124 || $status == 137 ]] && verdict="out of time" || verdict="failed ($status)"
            failed=1
            [[ $stage == build || $status == "$UNBUILT" ]] && broken=1
            tail -n +$((lines + 1)) "$log" | tail -25 | cut -c1-300
            ;;
    esac
    rows+=("$stage"$'\t'"$verdict"$'\t'$((SECONDS - begin))$'\t'"$(cut -c1-160 <"$work/note" | head -1)")
done

echo
{
    [[ $rehearse == 1 ]] && echo "no GPU: nothing measured here is a GPU figure"
    echo "$device, $SAMI_FAST_COMMIT"
    for row in $'stage\tstatus\tseconds\twhat' "${rows[@]}"; do
        IFS=$'\t' read -r stage verdict seconds what <<<"$row"
        printf '%-10s %-13s %8s  %s\n' "$stage" "$verdict" "$seconds" "$what"
    done
} | tee -a "$log"
exit "$failed"
}
