#!/usr/bin/env bash
# Builds the C++ algorithms with AddressSanitizer and UndefinedBehaviorSanitizer and runs pytest on them.
#   PYTHON=python BUILD=build/sanitize tests/sanitize.sh tests/test_backends.py ...
# Leaks are not looked for: Python and torch keep what they have until they end. Memory is the sanitizer's, not ours.
set -euo pipefail
cd "$(dirname "$0")/.."
flags="-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -O1 -g1"
build=$PWD/$BUILD
cmake -S . -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=None -DACQCORE_CUDA=OFF -DCMAKE_CXX_FLAGS="$flags" \
	-DPython_EXECUTABLE="$(command -v "$PYTHON")" \
	-Dpybind11_DIR="${PYBIND11_DIR:-$("$PYTHON" -m pybind11 --cmakedir)}" >"$build.log" || { cat "$build.log"; exit 1; }
cmake --build "$build" >>"$build.log" || { tail -40 "$build.log"; exit 1; }
# The package with this extension in it, instead of the installed one.
rm -rf "$build/site" && mkdir -p "$build/site/acqcore"
ln -s "$PWD"/acqcore/* "$PWD/kernels" "$build"/_core*.so "$build/site/acqcore/"
ln -s "$PWD/python/acqsynth" "$build/site/"
compiler=$(sed -n 's/^CMAKE_CXX_COMPILER:[A-Z]*=//p' "$build/CMakeCache.txt")
preload=$("$compiler" -print-file-name=libasan.so):$("$compiler" -print-file-name=libubsan.so):$("$compiler" -print-file-name=libstdc++.so)
echo "[sanitize] $("$compiler" --version | head -1)"
ASAN_OPTIONS=detect_leaks=0:abort_on_error=1:detect_stack_use_after_return=1 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 \
	LD_PRELOAD=$preload PYTHONSAFEPATH=1 PYTHONPATH=$build/site \
	"$PYTHON" -m pytest --import-mode=importlib -q -k "cpu and not memory and not never_hold" "$@"
