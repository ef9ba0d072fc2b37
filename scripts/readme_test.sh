#!/usr/bin/env bash
# Does what README.md says, to the letter, with Docker's engine in a clean clone: the commands of "Two containers that answer", then
# docker compose and the workflow's smoke test. The engine (Debian's docker.io, unpacked beside, not installed) runs in namespaces of its
# own, so that the machine's network and services stay as they are. Needs root, and docker's compose plugin for compose.
# Usage: scripts/readme_test.sh    CARAVAN_IMAGE_DIR as of image_test.sh, whose base image is used where no registry is reached
set -euo pipefail
cd "$(dirname "$0")/.."
state=${CARAVAN_IMAGE_DIR:-$PWD/build/image}
engine=$state/engine
base=docker.io/library/debian:bookworm-slim
mkdir -p "$engine"

if [ "${1:-}" != --inside ]; then
  for package in iptables libdevmapper1.02.1 slirp4netns; do
    dpkg-query -W "$package" >/dev/null 2>&1 || apt-get install -y -qq --no-install-recommends "$package" >/dev/null
  done
  if [ ! -x "$engine/root/usr/sbin/dockerd" ]; then
    (cd "$engine" && apt-get download -qq docker.io containerd runc 2>/dev/null && for deb in *.deb; do dpkg-deb -x "$deb" root; done)
  fi
  rm -rf "$engine/clone" "$engine/ready"
  git clone -q . "$engine/clone"
  mkfifo "$engine/ready"
  unshare --mount --net --pid --fork --kill-child --mount-proc "$0" --inside &
  inside=$!
  read -r <"$engine/ready"
  # Joins the new network to the outside as a process would, without a rule of the firewall here.
  slirp4netns --configure --mtu=65520 "$inside" tap0 >"$engine/slirp.log" 2>&1 &
  network=$!
  trap 'kill "$inside" "$network" 2>/dev/null || true; rm -f "$engine/ready"' EXIT
  wait "$inside"
  exit 0
fi

echo >"$engine/ready"
until ip link show tap0 >/dev/null 2>&1; do sleep 0.1; done
umount /sys/fs/cgroup/unified 2>/dev/null || true
ip link set lo up
sysctl -qw net.ipv4.ip_forward=1
echo "nameserver 10.0.2.3" >"$engine/resolv.conf"
mount --bind "$engine/resolv.conf" /etc/resolv.conf
export PATH=$engine/root/usr/sbin:$engine/root/usr/bin:$PATH DOCKER_HOST=unix://$engine/docker.sock DOCKER_BUILDKIT=1
rm -f "$engine/docker.pid"
dockerd --data-root "$engine/data" --exec-root "$engine/exec" --host "$DOCKER_HOST" --pidfile "$engine/docker.pid" --dns 10.0.2.3 \
  >"$engine/log" 2>&1 &
dockerd=$!
remove_containers() {
  docker ps -aq | xargs -r docker rm -f >/dev/null 2>&1 || true
  docker network rm caravan >/dev/null 2>&1 || true
}
cleanup() {
  remove_containers
  kill "$dockerd"
  wait "$dockerd" || true
}
trap cleanup EXIT
for _ in $(seq 100); do docker info >/dev/null 2>&1 && break; sleep 0.2; done
docker info >/dev/null || { tail -n 20 "$engine/log" >&2; exit 1; }
remove_containers
if [ -z "$(docker images -q "${base#docker.io/library/}")" ] && [ -d "$state/storage" ]; then
  buildah --root "$state/storage" --runroot "$state/run" --storage-driver overlay push -q "$base" "docker-archive:$engine/base.tar:$base"
  docker load -q -i "$engine/base.tar" >/dev/null
  rm "$engine/base.tar"
fi
cd "$engine/clone"

echo "== README.md: two containers that answer"
awk '/^## / { here = $0 == "## Two containers that answer" } here && /^```/ { if (++fence == 2) exit; next } here && fence == 1' README.md \
  >"$engine/commands"
grep -q '^docker run' "$engine/commands" || { echo "README.md has no commands there" >&2; exit 1; }
bash -euo pipefail "$engine/commands" 2>"$engine/commands.log" | tee "$engine/answer" | tail -c 300 ||
  { tail -n 30 "$engine/commands.log" >&2; exit 1; }
echo
grep -q '"tokens_predicted":32' "$engine/answer"
docker stop -t 10 server backend >/dev/null
[ "$(docker inspect -f '{{.State.ExitCode}}' server backend | tr '\n' ' ')" = "0 0 " ] || { docker logs server; exit 1; }
docker rm server backend >/dev/null
echo "README: passed"

echo "== scripts/image_smoke_docker.sh"
scripts/image_smoke_docker.sh caravan | tail -n 2
if docker compose version >/dev/null 2>&1; then
  for arguments in "-f docker-compose.yml up -d --build --scale backend=2" "-f docker-compose.dist.yml up -d"; do
    echo "== docker compose $arguments"
    # shellcheck disable=SC2086  # words
    docker compose $arguments >"$engine/compose.log" 2>&1 || { tail -n 30 "$engine/compose.log" >&2; exit 1; }
    until curl -fs http://localhost:8080/health; do sleep 1; done
    echo
    docker ps --format '{{.Names}}: {{.Status}}'
    curl -fs http://localhost:8080/completion -H 'Content-Type: application/json' -d '{"prompt": "Once upon a time", "n_predict": 8}' | head -c 100
    echo
    docker compose down -v -t 10 --remove-orphans >/dev/null 2>&1
  done
  echo "compose: passed"
else
  echo "docker has no compose plugin here: compose was not tried"
fi
