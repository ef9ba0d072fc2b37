#!/usr/bin/env bash
# What the build stage of docker/Dockerfile runs; BUILDARCH, TARGETARCH and TARGETVARIANT come from the builder.
#   docker/build.sh packages          installs the compiler and libraries, for the target where that is another architecture
#   docker/build.sh program OUT       builds the sources in the current folder, lays the image's /app out in OUT
set -euo pipefail

triple_of() {
  case "$1" in
    amd64) echo x86_64-linux-gnu ;;
    arm64 | arm64/v8) echo aarch64-linux-gnu ;;
    arm/v7) echo arm-linux-gnueabihf ;;
    *) echo "no image is made for '$1'; platforms: linux/amd64, linux/arm64, linux/arm/v7" >&2; exit 1 ;;
  esac
}
target=$TARGETARCH${TARGETVARIANT:+/$TARGETVARIANT}
triple=$(triple_of "$target")
sysroot=/sysroot

packages() {
  export DEBIAN_FRONTEND=noninteractive
  local wanted=(ca-certificates ccache cmake git make ninja-build pkg-config protobuf-compiler)
  if [ "$TARGETARCH" = "$BUILDARCH" ]; then
    wanted+=(g++ libboost1.81-dev libssl-dev libprotobuf-dev nlohmann-json3-dev libspdlog-dev libfmt-dev libpcre2-dev libutf8proc-dev
             libedit-dev libbsd-dev libzstd-dev mold)
  else
    wanted+=("g++-${triple//_/-}")
  fi
  apt-get update -qq
  apt-get install -y -qq --no-install-recommends "${wanted[@]}" >/dev/null
  rm -rf /var/lib/apt/lists/*
  [ "$TARGETARCH" = "$BUILDARCH" ] || "$(dirname "$0")/../scripts/sysroot.sh" "$(debian_of)" "$sysroot" libbsd-dev
}

debian_of() {
  case "$target" in
    arm/v7) echo armhf ;;
    *) echo "$TARGETARCH" ;;
  esac
}

# The licences of what is linked into the program.
licenses() {
  local root=/ package
  [ "$TARGETARCH" = "$BUILDARCH" ] || root=$sysroot
  mkdir -p "$1"
  for package in libboost1.81-dev libbsd-dev libedit-dev libfmt-dev libmd-dev libncurses-dev libpcre2-dev libprotobuf-dev libspdlog-dev \
                 libssl-dev libstdc++-12-dev libutf8proc-dev libzstd-dev nlohmann-json3-dev; do
    cp -L "$root/usr/share/doc/$package/copyright" "$1/$package"
  done
}

program() {
  local out=$1 build=build/release options=(-DCMAKE_BUILD_TYPE=Release -DCARAVAN_TESTS=OFF -DCARAVAN_STATIC=ON -DCMAKE_EXE_LINKER_FLAGS=-s)
  # Folders lie as in scripts/cross_test.sh, and paths do not count: a compiler cache of such builds helps here, with the same LANG.
  export CCACHE_BASEDIR=$PWD CCACHE_NOHASHDIR=1 LANG=C.UTF-8
  if [ "$TARGETARCH" != "$BUILDARCH" ]; then
    local name=${target/arm\/v7/armv7}
    build=build/$name
    mkdir -p build
    ln -sfn "$sysroot" "build/sysroot-$name"
    export CROSS_TRIPLE=$triple CROSS_SYSROOT=$PWD/build/sysroot-$name CROSS_PROCESSOR=${triple%%-*} CROSS_EMULATOR=
    export PKG_CONFIG_LIBDIR=$CROSS_SYSROOT/usr/lib/$triple/pkgconfig:$CROSS_SYSROOT/usr/share/pkgconfig PKG_CONFIG_SYSROOT_DIR=$CROSS_SYSROOT
    [ "$target" != arm/v7 ] || CROSS_PROCESSOR=armv7l
    options+=(-DCMAKE_TOOLCHAIN_FILE=cmake/cross.cmake -DProtobuf_PROTOC_EXECUTABLE=/usr/bin/protoc)
  fi
  [ "$target" != arm/v7 ] || options+=(-DCMAKE_CXX_FLAGS=-D_TIME_BITS=64)
  cmake -G Ninja -S . -B "$build" "${options[@]}" >/dev/null
  cmake --build "$build" --target caravan -j "${JOBS:-$(nproc)}"
  ccache --show-stats | head -n 3

  mkdir -p "$out/app/models" "$out/app/cache" "$out/app/secrets" "$out/app/share"
  cp "$build/apps/caravan" "$out/app/"
  local name
  for name in rpc-server llama-server llama-cli llama-embedding; do ln -s caravan "$out/app/$name"; done
  cp models/demo.gguf "$out/app/share/"
  cp LICENSE "$out/app/share/"
  licenses "$out/app/share/licenses"
  chmod 1777 "$out/app/cache" "$out/app/secrets"
}

"$@"
