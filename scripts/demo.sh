#!/usr/bin/env bash
# Shows the whole thing on one machine: two backends and a server on loopback share a model; one question is asked over HTTP
# and the answer streamed to the terminal. Usage: scripts/demo.sh CARAVAN_EXECUTABLE MODEL
set -euo pipefail
caravan=$1 model=$2
logs=$(mktemp -d)
pids=()
cleanup() {
  for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null || true; done
  wait 2>/dev/null || true
  rm -rf "$logs"
}
trap cleanup EXIT

# wait_for FILE PATTERN: prints what the sed pattern takes from the first line that has it.
wait_for() {
  local found
  for _ in $(seq 100); do
    found=$(sed -n "s/$2/\1/p" "$1" 2>/dev/null | head -n 1)
    if [ -n "$found" ]; then echo "$found"; return; fi
    sleep 0.1
  done
  echo "nothing happened within 10 s; the log says:" >&2
  cat "$1" >&2
  return 1
}

token=$(head -c 24 /dev/urandom | base64 | tr -d '/+=')
export APP_RPC_TOKEN=$token
ports=()
for i in 1 2; do
  "$caravan" backend --host 127.0.0.1 --port 0 --mem 512 -t 1 >"$logs/backend$i" 2>&1 &
  pids+=($!)
  ports+=("$(wait_for "$logs/backend$i" '.*backend on 127.0.0.1:\([0-9]*\).*')")
done
"$caravan" server -m "$model" --rpc "127.0.0.1:${ports[0]},127.0.0.1:${ports[1]}" -ngl 99 --plan memory --host 127.0.0.1 --port 0 \
  >"$logs/server" 2>&1 &
pids+=($!)
port=$(wait_for "$logs/server" '.*listening on http:\/\/127.0.0.1:\([0-9]*\).*')
for _ in $(seq 150); do
  "$caravan" health --port "$port" >/dev/null 2>&1 && break
  sleep 0.1
done

python3 - "$port" <<'PYTHON'
import json, sys, urllib.request

base = f"http://127.0.0.1:{sys.argv[1]}"
try:
    props = json.load(urllib.request.urlopen(f"{base}/props"))
except OSError as error:
    sys.exit(f"the server does not answer: {error}")
print("The model is shared by:")
for stage in props["plan"]["stages"]:
    first, end = stage["layers"]
    print(f"  backend {stage['device']}: layers {first} to {end - 1}, {stage['weight_bytes'] / 1e6:.1f} MB of weights")

body = {"prompt": "Once upon a time there was a fox named Lily.", "n_predict": 96, "temperature": 0, "stream": True}
print(f"\nPOST /completion {json.dumps(body)}\n\n{body['prompt']}", end="", flush=True)
request = urllib.request.Request(f"{base}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"})
for line in urllib.request.urlopen(request):
    if not line.startswith(b"data: "):
        continue
    event = json.loads(line[6:])
    if "error" in event:
        sys.exit(f"\nthe server answered: {event['error']['message']}")
    print(event["content"], end="", flush=True)
    if event["stop"]:
        times = event["timings"]
        print(f"\n\nprompt: {times['prompt_n']} tokens, {times['prompt_per_second']:.0f} tokens/s; "
              f"answer: {times['predicted_n']} tokens, {times['predicted_per_second']:.0f} tokens/s")
PYTHON
