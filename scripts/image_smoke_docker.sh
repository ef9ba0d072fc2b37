#!/usr/bin/env bash
# Tries an image with a container engine: two backends and a server, as little allowed as possible, answer one question.
# Usage: scripts/image_smoke_docker.sh IMAGE [PLATFORM]    e.g. linux/arm64; other platforms need qemu's binfmt
set -euo pipefail
image=$1 platform=(${2:+--platform "$2"})
id=caravan-smoke-$$
cleanup() {
  docker rm -f "$id-backend1" "$id-backend2" "$id-server" >/dev/null 2>&1 || true
  docker network rm "$id" >/dev/null 2>&1 || true
}
trap cleanup EXIT
# start NAME ARGUMENTS...
start() {
  local name=$1
  shift
  docker run -d --name "$id-$name" "${platform[@]}" --network "$id" --read-only --cap-drop ALL --security-opt no-new-privileges \
    -e APP_RPC_TOKEN="$token" "$@" >/dev/null
}

token=$(docker run --rm "${platform[@]}" "$image" token)
docker network create "$id" >/dev/null
start backend1 -e APP_MEM=256 "$image"
start backend2 -e APP_MEM=256 "$image"
start server -e APP_MODE=server -e APP_RPC_BACKENDS="$id-backend1:50052,$id-backend2:50052" -p 127.0.0.1::8080 "$image"
port=$(docker port "$id-server" 8080/tcp | sed 's/.*://;q')
for _ in $(seq 300); do
  curl -fs "http://127.0.0.1:$port/health" >/dev/null && break
  sleep 1
done
answer=$(curl -fs "http://127.0.0.1:$port/completion" -H 'Content-Type: application/json' \
  -d '{"prompt": "Once upon a time there was a fox named Lily.", "n_predict": 16, "temperature": 0}') || { docker logs "$id-server"; exit 1; }
echo "$answer"
docker exec "$id-server" /app/caravan health
docker exec "$id-backend1" /app/caravan health
docker stop -t 10 "$id-server" "$id-backend1" "$id-backend2" >/dev/null
for name in server backend1 backend2; do
  status=$(docker inspect -f '{{.State.ExitCode}}' "$id-$name")
  [ "$status" = 0 ] || { echo "$name ended with $status"; docker logs "$id-$name"; exit 1; }
done
