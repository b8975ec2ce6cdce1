#!/usr/bin/env bash
# Ops, steps and networks against the oldest and the newest torch that pyproject.toml allows, on the CPU. Each comes with the triton it
# needs, and with the oldest or newest numpy and diffusers. A copy of the tree is installed, with its core, into an environment of its own
# in build/versions/: some GB each, less where the package index has torch for CPUs alone.
#
#   tests/versions.sh                             both
#   tests/versions.sh newest tests/test_ops.py    one of them, and other arguments for pytest
set -euo pipefail
cd "$(dirname "$0")/.."

only=${1:-oldest newest}
tests=("${@:2}")
(( ${#tests[@]} )) || tests=(tests/test_{ops,step,score,schedule,models,pretrained}.py)

allowed() { sed -nE "s/.*\"($1>=[^\";]+).*/\1/p" pyproject.toml | head -n 1; }
lowest() { allowed "$1" | sed -E 's/>=([0-9.]+).*/==\1.*/'; }

status=0
for which in $only; do
    case $which in
    oldest) packages=("$(lowest torch)" "$(lowest numpy)" "$(lowest diffusers)") ;;
    newest) packages=("$(allowed torch)" "$(allowed numpy)" "$(allowed diffusers)") ;;
    *) echo "versions.sh: expected oldest or newest, found $which" >&2; exit 2 ;;
    esac
    home=build/versions/$which
    rm -rf "$home/tree"
    mkdir -p "$home/tree"
    git ls-files -z --cached --others --exclude-standard | tar --null --files-from - --create | tar -x -C "$home/tree"
    python=$PWD/$home/venv/bin/python
    [[ -x $python ]] || "${PYTHON:-python3}" -m venv "$home/venv"
    # Before the rest, so that the core is built against this torch and no other.
    "$python" -m pip install --quiet --upgrade "${packages[@]}" "setuptools>=65" wheel
    (
        cd "$home/tree"
        SAMI_FAST_CUDA=0 "$python" -m pip install --quiet --no-build-isolation --editable ".[pretrained]" "${packages[@]}" \
            av h5py pytest pytest-benchmark pytest-timeout
        "$python" -c 'import diffusers, numpy, torch, triton
print("'"$which"':", *(f"{package.__name__} {package.__version__}" for package in (torch, triton, numpy, diffusers)))'
        OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} "$python" -m pytest -q "${tests[@]}"
    ) || status=1
done
exit $status
