#!/usr/bin/env bash
# Brings docker-compose.yml up with the image of scripts/image_test.sh and without a container engine: podman serves Docker's API, and
# `docker compose` does the rest. Three backends; one question; two of them are killed; another question. Needs root, the Docker client and
# its compose plugin. Usage: scripts/compose_test.sh [IMAGE]    CARAVAN_IMAGE_DIR as of image_test.sh
set -euo pipefail
cd "$(dirname "$0")/.."
state=${CARAVAN_IMAGE_DIR:-$PWD/build/image}
image=${1:-localhost/caravan-$(dpkg --print-architecture)}
if [ -z "${CARAVAN_COMPOSE_NAMESPACE:-}" ]; then
  docker compose version >/dev/null 2>&1 || { echo "compose_test.sh needs the Docker client with its compose plugin (version 2)" >&2; exit 2; }
  [ -d "$state/storage" ] || { echo "no image in $state: scripts/image_test.sh makes one" >&2; exit 2; }
  for package in podman crun netavark aardvark-dns iptables; do
    dpkg-query -W "$package" >/dev/null 2>&1 || apt-get install -y -qq --no-install-recommends "$package" >/dev/null
  done
  CARAVAN_COMPOSE_NAMESPACE=1 exec unshare --mount "$0" "$image"
fi

umount /sys/fs/cgroup/unified 2>/dev/null || true
cat >"$state/containers.conf" <<'CONF'
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
[network]
network_backend = "netavark"
CONF
cat >"$state/storage.conf" <<CONF
[storage]
driver = "overlay"
graphroot = "$state/storage"
runroot = "$state/run"
CONF
export CONTAINERS_CONF=$state/containers.conf CONTAINERS_STORAGE_CONF=$state/storage.conf
export DOCKER_HOST=unix://$state/podman.sock CARAVAN_IMAGE=$image COMPOSE_PROJECT_NAME=caravantest
rm -f "$state/podman.sock"
podman system service --time=0 "$DOCKER_HOST" >"$state/podman.log" 2>&1 &
service=$!
# An engine looks at health by itself; podman leaves that to systemd.
while sleep 2; do for container in $(podman ps -q); do podman healthcheck run "$container" >/dev/null 2>&1 || true; done; done &
health=$!
cleanup() {
  docker compose down -v -t 10 >/dev/null 2>&1 || true
  kill "$health" "$service" 2>/dev/null || true
}
trap cleanup EXIT
until [ -S "$state/podman.sock" ]; do sleep 0.1; done

ask() {
  for _ in $(seq 120); do
    curl -fs http://127.0.0.1:8080/health >/dev/null && break
    sleep 1
  done
  curl --fail-with-body -s http://127.0.0.1:8080/completion -H 'Content-Type: application/json' \
    -d '{"prompt": "Once upon a time there was a fox named Lily.", "n_predict": 16, "temperature": 0}' |
    python3 -c 'import json, sys; print(json.load(sys.stdin)["content"])'
}
stages() { curl -fs http://127.0.0.1:8080/props | python3 -c 'import json, sys; print(*(s["device"] for s in json.load(sys.stdin)["plan"]["stages"]))'; }

export APP_PLAN=memory  # by speed one backend would do for the demo model
docker compose up -d --no-build --scale backend=3
first=$(ask)
echo "over $(stages): $first"
[ "$(stages | wc -w)" = 3 ] || { echo "not over three backends"; docker compose logs server; exit 1; }
docker kill caravantest-backend-1 caravantest-backend-2 >/dev/null
sleep 1
second=$(ask)
echo "after two backends were killed, over $(stages): $second"
[ "$first" = "$second" ] || { echo "the answers differ"; docker compose logs server; exit 1; }
docker compose ps
docker compose stop -t 10 server
status=$(docker inspect -f '{{.State.ExitCode}}' caravantest-server-1)
[ "$status" = 0 ] || { echo "the server ended with $status"; exit 1; }
echo "compose: passed"
