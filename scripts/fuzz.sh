#!/usr/bin/env bash
# Runs every fuzz target for some seconds, starting from its seed corpus; fails if one finds something.
# Usage: scripts/fuzz.sh BUILD_FOLDER SECONDS_EACH
set -euo pipefail
build=$1 seconds=$2
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

# fuzz_one TARGET: runs one target, prints one line.
fuzz_one() {
  local name log
  name=$(basename "$1")
  log=$folder/$name.log
  mkdir -p "$folder/$name"
  if ! "$1" -max_total_time="$seconds" -rss_limit_mb=2048 -timeout=10 -artifact_prefix="$folder/$name/" \
      -print_final_stats=1 "$folder/$name" "fuzz/corpus/${name#fuzz_}" >"$log" 2>&1; then
    echo "$name found a defect:"
    tail -n 40 "$log"
    touch "$folder/failed"
    return
  fi
  echo "$name: $(sed -n 's/stat::number_of_executed_units: *//p' "$log") runs in $seconds s, nothing found"
}

# One target per core at a time.
found=0
for target in "$build"/fuzz/fuzz_*; do
  if [ ! -f "$target" ] || [ ! -x "$target" ]; then continue; fi
  while [ "$(jobs -rp | wc -l)" -ge "$(nproc)" ]; do wait -n; done
  fuzz_one "$target" &
  found=$((found + 1))
done
wait
[ "$found" -gt 0 ] || { echo "no fuzz target in $build/fuzz" >&2; exit 1; }
[ ! -e "$folder/failed" ]
