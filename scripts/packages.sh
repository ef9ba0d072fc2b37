#!/usr/bin/env bash
# Debian 12 / Ubuntu 24.04 packages that Caravan needs: installs the missing ones as root, otherwise prints the line to run.
# Usage: scripts/packages.sh [build|check]    build (default): to compile, run and test; check: also format, lint, fuzz and test with clients.
set -euo pipefail

# Debian 12's default Boost is 1.74, but it also has 1.81, which knows what we use; later systems' default is newer.
boost=libboost-dev
if grep -qs '^VERSION_ID="12"' /etc/os-release && grep -qs '^ID=debian' /etc/os-release; then boost=libboost1.81-dev; fi

wanted=(ca-certificates cmake ninja-build g++ ccache mold make pkg-config python3 curl "$boost" libssl-dev
        libprotobuf-dev protobuf-compiler nlohmann-json3-dev libspdlog-dev libfmt-dev libpcre2-dev
        libutf8proc-dev libedit-dev libgtest-dev libgmock-dev libbenchmark-dev)
if [ "${1:-build}" = check ]; then
  wanted+=(clang-19 clang-format-19 clang-tidy-19 libclang-rt-19-dev shellcheck)
  # Large, and often there from elsewhere.
  command -v node >/dev/null || wanted+=(nodejs)
  command -v npm >/dev/null || wanted+=(npm)
fi

missing=()
for package in "${wanted[@]}"; do
  status=$(dpkg-query -W -f='${Status}' "$package" 2>/dev/null || true)
  [ "$status" = "install ok installed" ] || missing+=("$package")
done
[ ${#missing[@]} -eq 0 ] && exit 0

if [ "$(id -u)" = 0 ]; then
  echo "installing: ${missing[*]}"
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq
  apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
else
  echo "Some packages are missing. Run this line, then again what you ran:" >&2
  echo "  sudo apt-get install -y --no-install-recommends ${missing[*]}" >&2
  exit 1
fi
