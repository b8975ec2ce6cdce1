#!/usr/bin/env bash
# The tests of the compiled core under AddressSanitizer and UndefinedBehaviorSanitizer, in a copy of the tree:
#   csrc/sanitize.sh [PYTHON] [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(command -v "${1:-python}")
[[ $python == /* ]] || python=$PWD/$python
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
cp -r setup.py pyproject.toml README.md sami_fast kernels configs csrc tests "$copy"
rm -f "$copy"/sami_fast/*.so

cd "$copy"
# Wrapping of integers is defined here (-fwrapv), and Python's own flags come first.
SAMI_FAST_CUDA=0 SAMI_FAST_CFLAGS="-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g1 -O1" \
    "$python" setup.py --quiet build_ext --inplace
[[ $(nm -D sami_fast/_C*.so) == *__asan_report* ]] || { echo "the core was built without the sanitizers"; exit 1; }

# The interpreter itself is not instrumented, so the runtimes come first, and leaks of the interpreter are not looked for.
export LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)"
export ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=1 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH="$copy"
"$python" -m pytest -q -p no:cacheprovider -k "not cuda and not triton" tests/test_core_*.py "${@:2}"
