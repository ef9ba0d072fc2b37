#!/usr/bin/env bash
# Unpacks the Debian packages that Caravan is built with for another architecture, without touching this system's own.
# Usage: scripts/sysroot.sh DEBIAN_ARCHITECTURE FOLDER [MORE_PACKAGES...]    e.g. arm64, armhf, amd64; nothing is done if FOLDER exists
set -euo pipefail
debian=$1 folder=$2
shift 2
[ ! -d "$folder" ] || exit 0
work=$(mktemp -d)
trap 'rm -rf "$work" "$folder.new"' EXIT
mkdir -p "$work/lists/partial" "$work/cache/archives/partial" "$folder.new"
: >"$work/status"
mirror=$(grep -hm1 -oP '^URIs: \K\S+|^deb (\[[^]]*\] )?\K\S+' /etc/apt/sources.list.d/debian.sources /etc/apt/sources.list 2>/dev/null | head -n 1 || true)
# shellcheck source=/dev/null
suite=$(. /etc/os-release && echo "$VERSION_CODENAME")
options=(-o "APT::Architecture=$debian" -o "APT::Architectures=$debian" -o Dir::State::lists="$work/lists" -o Dir::Cache="$work/cache"
         -o Dir::State::status="$work/status" -o Dir::Etc::sourcelist="$work/sources.list" -o Dir::Etc::sourceparts=/dev/null
         -o Dir::Etc::trusted=/dev/null -o APT::Sandbox::User=root)

# download SUITE_LINES PACKAGES...
download() {
  printf '%s\n' "$1" >"$work/sources.list"
  shift
  apt-get "${options[@]}" -qq --error-on=any update &&
    apt-get "${options[@]}" -qq -y --no-install-recommends --download-only install "$@" >/dev/null
}
packages=(libc6-dev libstdc++-12-dev libboost1.81-dev libssl-dev libprotobuf-dev nlohmann-json3-dev libspdlog-dev libfmt-dev
          libpcre2-dev libutf8proc-dev libedit-dev libzstd-dev "$@")
signed="deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg]"
main="$signed $mirror $suite main"
# The security suite of the smaller architectures is not always complete.
download "$main"$'\n'"$signed ${mirror%/}-security $suite-security main" "${packages[@]}" || {
  echo "$debian: no usable security suite, its packages come from $suite alone" >&2
  rm -rf "$work/cache/archives"
  mkdir -p "$work/cache/archives/partial"
  download "$main" "${packages[@]}"
}
for package in "$work"/cache/archives/*.deb; do dpkg-deb -x "$package" "$folder.new"; done
find "$folder.new" -type l -lname '/*' | while read -r link; do
  ln -sfn "$(realpath -m --relative-to="$(dirname "$link")" "$folder.new$(readlink "$link")")" "$link"
done
mv "$folder.new" "$folder"
