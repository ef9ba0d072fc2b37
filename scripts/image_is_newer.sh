#!/usr/bin/env bash
# Whether the tag `latest` may move: image_is_newer.sh NEW CURRENT. Exits 0 when NEW is a release (v1.2.3, no suffix) and not older than
# CURRENT, the version that `latest` has now ("" when there is none); 1 otherwise, saying why.
set -euo pipefail
new=${1#v} current=${2-}
current=${current#v}
release='^[0-9]+(\.[0-9]+)*$'
[[ $new =~ $release ]] || { echo "'$1' is no release"; exit 1; }
[[ $current =~ $release ]] || { echo "latest has no version ('$current')"; exit 0; }
newest=$(printf '%s\n%s\n' "$new" "$current" | sort -V | tail -n 1)
[ "$newest" = "$new" ] || { echo "latest is $current, newer than $new"; exit 1; }
echo "latest moves from $current to $new"
