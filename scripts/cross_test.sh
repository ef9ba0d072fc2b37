#!/usr/bin/env bash
# Builds for arm64 on an amd64 Debian machine and runs tests under emulation, with and without the dot-product instructions.
# Needs root once, for packages. Usage: scripts/cross_test.sh [TEST_TARGET...]    default: the kernels, models and stages
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -gt 0 ] || set -- test_tensor test_device test_models test_stage
arch=arm64
export CROSS_PROCESSOR=aarch64 CROSS_TRIPLE=aarch64-linux-gnu CROSS_EMULATOR=qemu-aarch64-static
export CROSS_SYSROOT=$PWD/build/sysroot-$arch

for package in g++-aarch64-linux-gnu qemu-user-static; do
  dpkg-query -W "$package" >/dev/null 2>&1 || apt-get install -y -qq --no-install-recommends "$package" >/dev/null
done

# Debian packages of the other architecture, unpacked without touching this system's own.
if [ ! -d "$CROSS_SYSROOT" ]; then
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  mkdir -p "$work/lists/partial" "$work/cache/archives/partial" "$CROSS_SYSROOT.new"
  : >"$work/status"
  mirror=$(grep -hm1 -oP '^URIs: \K\S+|^deb (\[[^]]*\] )?\K\S+' /etc/apt/sources.list.d/debian.sources /etc/apt/sources.list 2>/dev/null | head -n 1 || true)
  # shellcheck source=/dev/null
  suite=$(. /etc/os-release && echo "$VERSION_CODENAME")
  echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $suite main" >"$work/sources.list"
  options=(-o "APT::Architecture=$arch" -o "APT::Architectures=$arch" -o Dir::State::lists="$work/lists" -o Dir::Cache="$work/cache"
           -o Dir::State::status="$work/status" -o Dir::Etc::sourcelist="$work/sources.list" -o Dir::Etc::sourceparts=/dev/null
           -o APT::Sandbox::User=root)
  apt-get "${options[@]}" -qq update
  apt-get "${options[@]}" -qq -y --no-install-recommends --download-only install libc6-dev libstdc++-12-dev libboost1.81-dev \
    libssl-dev libprotobuf-dev nlohmann-json3-dev libspdlog-dev libfmt-dev libpcre2-dev libutf8proc-dev libedit-dev libgtest-dev libgmock-dev >/dev/null
  for package in "$work"/cache/archives/*.deb; do dpkg-deb -x "$package" "$CROSS_SYSROOT.new"; done
  find "$CROSS_SYSROOT.new" -type l -lname '/*' | while read -r link; do
    ln -sfn "$(realpath -m --relative-to="$(dirname "$link")" "$CROSS_SYSROOT.new$(readlink "$link")")" "$link"
  done
  mv "$CROSS_SYSROOT.new" "$CROSS_SYSROOT"
fi

export PKG_CONFIG_LIBDIR=$CROSS_SYSROOT/usr/lib/$CROSS_TRIPLE/pkgconfig PKG_CONFIG_SYSROOT_DIR=$CROSS_SYSROOT
cmake -G Ninja -S . -B build/$arch -DCMAKE_BUILD_TYPE=Release -DCMAKE_TOOLCHAIN_FILE=cmake/cross.cmake \
  -DProtobuf_PROTOC_EXECUTABLE=/usr/bin/protoc >/dev/null
cmake --build build/$arch -j "$(nproc)" --target caravan "$@" | tail -n 1
for cpu in cortex-a72 max; do
  for test in "$@"; do
    echo "$test on qemu's $cpu:"
    qemu-aarch64-static -cpu "$cpu" -L "$CROSS_SYSROOT" "build/$arch/tests/$test" --gtest_brief=1 | tail -n 2
  done
done
