#!/usr/bin/env bash
# Prompt and generation speed of a 1.1B model of random weights in several types, each beside the machine's limits.
# Usage: scripts/bench.sh CARAVAN_EXECUTABLE [TYPE...]
set -euo pipefail
caravan=$1
shift
[ $# -gt 0 ] || set -- Q4_0 Q4_K_M Q8_0 F16
folder=build/bench
mkdir -p "$folder"
for type in "$@"; do
  model=$folder/tinyllama-1.1b-$type.gguf
  [ -f "$model" ] || "$caravan" synth --shape tinyllama-1.1b --type "$type" -o "$model"
  "$caravan" bench -m "$model" -p 256 -n 64 -t "$(nproc)"
  echo
done
