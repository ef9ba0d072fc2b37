#!/usr/bin/env bash
# What takes longer than every change should: a build without warnings by clang 19, unit tests under ThreadSanitizer, tests on
# arm64 and armv7 under emulation, and five minutes of each fuzz target.
set -euo pipefail
cd "$(dirname "$0")/.."
step() { printf '\n== %s (%s s since start)\n' "$1" "$SECONDS"; }
scripts/packages.sh check

step "clang 19 without warnings"
cmake --preset clang >/dev/null
cmake --build build/clang -j "$(nproc)" | tail -n 1
scripts/run_tests.py build/clang --units-only

step "a hundred kills under eight streams"
cmake --preset release >/dev/null
cmake --build build/release -j "$(nproc)" --target caravan | tail -n 1
bench/chaos.py build/release/apps/caravan --kills 100

step "unit tests under ThreadSanitizer"
cmake --preset tsan >/dev/null
cmake --build build/tsan -j "$(nproc)" | tail -n 1
TSAN_OPTIONS="halt_on_error=1 suppressions=$PWD/scripts/tsan.supp" scripts/run_tests.py build/tsan --units-only

step "arm64 and armv7 under emulation"
scripts/cross_test.sh arm64
scripts/cross_test.sh armv7

step "fuzz targets: 300 s each"
cmake --preset asan >/dev/null
cmake --build build/asan -j "$(nproc)" --target fuzz_targets | tail -n 1
scripts/fuzz.sh build/asan 300
