#!/usr/bin/env bash
# sanitize.sh KIND TEST...: build _cpu with -fsanitize=KIND in a copy of the tree, and run tests/TEST.py there.
# A rank that finds something ends, so its test fails; what it found is on stderr, or printed last.
set -euo pipefail
cd "$(dirname "$0")/.."
kind=$1
shift
python=$(command -v "${PYTHON:-.venv/bin/python}")
copy=build/sanitize-${kind%%,*}
mkdir -p "$copy"
rm -rf "$copy/ep_megatron" "$copy/tests" "$copy/csrc"
cp -rp ep_megatron csrc tests setup.py pyproject.toml README.md LICENSE "$copy/"
rm -f "$copy"/ep_megatron/*.so
cd "$copy"
EP_SANITIZE=$kind "$python" setup.py -q build_ext --inplace
library=lib${kind%%,*}.so
case $kind in address*) library=libasan.so ;; thread*) library=libtsan.so ;; esac
# Python leaks by design, and is not instrumented itself.
reports=$PWD/report
rm -f "$reports".*
export ASAN_OPTIONS=detect_leaks=0:abort_on_error=1:log_path=$reports
export UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1:log_path=$reports
export TSAN_OPTIONS=halt_on_error=1:ignore_noninstrumented_modules=1:log_path=$reports
export PYTHONPATH=$PWD
# Else the sanitizer does not find what C++ throws with.
preload="$(gcc -print-file-name=$library) $(gcc -print-file-name=libstdc++.so)"
for test in "$@"; do  # one by one: a rank of theirs takes up to 7 GB, and lives as long as pytest
  echo "$test"
  LD_PRELOAD=$preload "$python" -m pytest -q --capture=sys -p no:cacheprovider "tests/$test.py" || failed=1
done
if compgen -G "$reports.*" > /dev/null; then
  cat "$reports".*
  failed=1
fi
exit ${failed:-0}
