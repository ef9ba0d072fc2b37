#!/usr/bin/env bash
# Builds docker/Dockerfile without a container engine (buildah, on a base that debootstrap makes) and tries the image: a backend and a
# server start through the entrypoint from its file system, read-only, as its user, as process 1 without capabilities; one question
# is answered; SIGTERM ends both. Needs root; other architectures run under qemu-user.
# Usage: scripts/image_test.sh [amd64|arm64|arm/v7 ...]    default: all three. CARAVAN_IMAGE_DIR: where images are kept (build/image)
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -gt 0 ] || set -- amd64 arm64 arm/v7
state=${CARAVAN_IMAGE_DIR:-$PWD/build/image}
suite=bookworm
mirror=$(grep -hm1 -oP '^URIs: \K\S+|^deb (\[[^]]*\] )?\K\S+' /etc/apt/sources.list.d/debian.sources /etc/apt/sources.list 2>/dev/null | head -n 1 || true)
builder=$(dpkg --print-architecture)
mkdir -p "$state"
buildah() { command buildah --root "$state/storage" --runroot "$state/run" --storage-driver overlay "$@"; }

tools() {
  local missing=() package
  for package in buildah debootstrap crun qemu-user-static; do
    dpkg-query -W "$package" >/dev/null 2>&1 || missing+=("$package")
  done
  [ ${#missing[@]} -eq 0 ] || apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
}

# Lets the kernel run programs of another architecture. NAME: aarch64 or arm.
emulate() {
  [ -e /proc/sys/fs/binfmt_misc/register ] || mount -t binfmt_misc binfmt_misc /proc/sys/fs/binfmt_misc
  [ -e "/proc/sys/fs/binfmt_misc/qemu-$1" ] || cat "/usr/lib/binfmt.d/qemu-$1.conf" >/proc/sys/fs/binfmt_misc/register
}

# base DEBIAN_ARCHITECTURE IMAGE: what the registry's bookworm-slim is. Of another architecture packages are only unpacked, which is
# enough: no package's script has to run for what the image needs.
base() {
  buildah images -q "$2" >/dev/null 2>&1 && return
  echo "making the base $2"
  local root foreign=()
  root=$(mktemp -d "$state/base.XXXXXX")
  [ "$1" = "$builder" ] || foreign=(--foreign)
  debootstrap --variant=minbase --arch="$1" "${foreign[@]}" "$suite" "$root" "$mirror" >"$state/debootstrap.log" 2>&1 ||
    { tail -n 20 "$state/debootstrap.log" >&2; return 1; }
  rm -rf "$root"/var/cache/apt/* "$root"/var/lib/apt/lists/* "$root"/usr/share/{man,info,locale}/* "$root/debootstrap"
  find "$root/usr/share/doc" -type f ! -name copyright -delete
  # For another architecture debootstrap leaves a link to itself there.
  [ ! -L "$root/proc" ] || { rm "$root/proc"; mkdir "$root/proc"; }
  mkdir -p "$root/var/cache/apt/archives/partial" "$root/var/lib/apt/lists/partial"
  printf 'deb %s %s main\ndeb %s-security %s-security main\n' "$mirror" "$suite" "${mirror%/}" "$suite" >"$root/etc/apt/sources.list"
  local container
  container=$(buildah from --arch "${1/armhf/arm}" scratch)
  buildah add -q "$container" "$root" / >/dev/null
  buildah commit -q "$container" "$2" >/dev/null
  buildah rm "$container" >/dev/null
  rm -rf "$root"
}

# build PLATFORM IMAGE BASE
build() {
  local variant=
  [ "$1" != arm/v7 ] || variant=v7
  buildah bud --isolation chroot --layers --pull-never --format docker --file docker/Dockerfile --tag "$2" \
    --build-arg "BUILDPLATFORM=linux/$builder" --build-arg "BUILDARCH=$builder" \
    --build-arg "TARGETPLATFORM=linux/$1" --build-arg "TARGETARCH=${1%/*}" --build-arg "TARGETVARIANT=$variant" \
    --build-arg "BASE_IMAGE=$3" ${JOBS:+--build-arg "JOBS=$JOBS"} . >"$state/build.log" 2>&1 ||
    { tail -n 40 "$state/build.log" >&2; return 1; }
}

# check_size PLATFORM IMAGE: what a registry would send, layers compressed.
check_size() {
  local bytes
  rm -rf "$state/push"
  buildah push -q "$2" "dir:$state/push" >/dev/null
  bytes=$(cat "$state/push"/* | wc -c)
  rm -rf "$state/push"
  echo "$1: $((bytes / 1000000)) MB compressed"
  [ "$bytes" -le 60000000 ] || { echo "$1: an image may have 60 MB" >&2; return 1; }
}

tools
for platform; do
  case "$platform" in
    amd64) debian=amd64 qemu="" ;;
    arm64) debian=arm64 qemu=aarch64 ;;
    arm/v7) debian=armhf qemu=arm ;;
    *) echo "unknown platform '$platform'; accepted: amd64, arm64, arm/v7" >&2; exit 2 ;;
  esac
  base "$builder" docker.io/library/debian:bookworm-slim
  base_image=docker.io/library/debian:bookworm-slim
  if [ "$debian" != "$builder" ]; then
    emulate "$qemu"
    base_image=localhost/debian-$debian:bookworm-slim
    base "$debian" "$base_image"
  fi
  image=localhost/caravan-$debian
  echo "$platform: building"
  build "$platform" "$image" "$base_image"
  check_size "$platform" "$image"
  buildah inspect --type image "$image" >"$state/config.json"
  container=$(buildah from --pull-never "$image")
  scripts/image_smoke.py "$(buildah mount "$container")" "$state/config.json" "$platform" || status=$?
  buildah rm "$container" >/dev/null
  [ "${status:-0}" = 0 ] || exit "$status"
  echo "$platform: passed"
done
