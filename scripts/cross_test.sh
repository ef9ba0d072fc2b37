#!/usr/bin/env bash
# Builds for another architecture on an amd64 Debian machine and runs tests under emulation, on a CPU without and one with the optional
# instructions that the kernels look for. Needs root once, for packages.
# Usage: scripts/cross_test.sh arm64|armv7 [TEST_TARGET...]    default: formats, kernels, models, stages and the wire
set -euo pipefail
cd "$(dirname "$0")/.."
case "${1:-}" in
  arm64) debian=arm64 compiler=g++-aarch64-linux-gnu qemu=qemu-aarch64-static cpus="cortex-a72 max" flags=""
         export CROSS_PROCESSOR=aarch64 CROSS_TRIPLE=aarch64-linux-gnu ;;
  armv7) debian=armhf compiler=g++-arm-linux-gnueabihf qemu=qemu-arm-static cpus="cortex-a15" flags="-D_TIME_BITS=64"
         export CROSS_PROCESSOR=armv7l CROSS_TRIPLE=arm-linux-gnueabihf ;;
  *) echo "usage: $0 arm64|armv7 [TEST_TARGET...]" >&2; exit 2 ;;
esac
arch=$1; shift
[ $# -gt 0 ] || set -- test_base test_tensor test_gguf test_vocab test_device test_models test_stage test_remote
export CROSS_EMULATOR=$qemu CROSS_SYSROOT=$PWD/build/sysroot-$arch

for package in "$compiler" qemu-user-static; do
  dpkg-query -W "$package" >/dev/null 2>&1 || apt-get install -y -qq --no-install-recommends "$package" >/dev/null
done

scripts/sysroot.sh "$debian" "$CROSS_SYSROOT" libgtest-dev libgmock-dev

export PKG_CONFIG_LIBDIR=$CROSS_SYSROOT/usr/lib/$CROSS_TRIPLE/pkgconfig:$CROSS_SYSROOT/usr/share/pkgconfig PKG_CONFIG_SYSROOT_DIR=$CROSS_SYSROOT
cmake -G Ninja -S . -B "build/$arch" -DCMAKE_BUILD_TYPE=Release -DCMAKE_TOOLCHAIN_FILE=cmake/cross.cmake -DCMAKE_CXX_FLAGS="$flags" \
  -DProtobuf_PROTOC_EXECUTABLE=/usr/bin/protoc >/dev/null
cmake --build "build/$arch" -j "$(nproc)" --target caravan "$@" | tail -n 1
libraries=$CROSS_SYSROOT/lib/$CROSS_TRIPLE:$CROSS_SYSROOT/usr/lib/$CROSS_TRIPLE
for cpu in $cpus; do
  for test in "$@"; do
    echo "$arch, $test on qemu's $cpu:"
    "$qemu" -cpu "$cpu" -L "$CROSS_SYSROOT" -E "LD_LIBRARY_PATH=$libraries" "build/$arch/tests/$test" --gtest_brief=1 | tail -n 2
  done
done
