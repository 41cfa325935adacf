#!/usr/bin/env bash
# The CPU image built and run where there is no container engine: the Dockerfile by buildah, on Debian's own Python in place
# of the official image (that of a registry), then its command as its user, without capabilities, on a read-only tree.
#
#   deploy/replay-image.sh [BUILDAH-BUD-OPTION ...]     as root; Debian: apt-get install buildah debootstrap curl
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# Images and containers of this run alone: the base has the name of the official image and is not it.
export BUILDAH_ISOLATION=chroot CONTAINERS_STORAGE_CONF=$work/storage.conf
printf '[storage]\ndriver = "vfs"\ngraphroot = "%s"\nrunroot = "%s"\n' "$work/images" "$work/run" > "$CONTAINERS_STORAGE_CONF"

debootstrap --variant=minbase --include=python3-venv,ca-certificates bookworm "$work/base" > "$work/log"
ln -s python3 "$work/base/usr/bin/python"
base=$(buildah from scratch)
buildah add --quiet "$base" "$work/base" / > "$work/log"
buildah commit --quiet "$base" docker.io/library/python:3.12-slim-bookworm
# How packages are reached here is lent to the build, and no part of the image.
{ echo '[global]'; for name in $(compgen -e PIP_ || true); do key=${name#PIP_}; key=${key,,}; echo "${key//_/-} = ${!name}"; done; } > "$work/pip.conf"
buildah bud --layers=false --network host --volume "$work/pip.conf:/etc/pip.conf:ro" --volume /etc/ssl/certs:/etc/ssl/certs:ro \
  --build-arg VARIANT=cpu --tag entrgi-server:cpu "$@" . > "$work/log" 2>&1 ||
  { tail -n 20 "$work/log"; exit 1; }

tree=$(buildah mount "$(buildah from entrgi-server:cpu)")
buildah images localhost/entrgi-server:cpu
mapfile -t image < <(buildah inspect --format '{{range .OCIv1.Config.Env}}{{println .}}{{end}}' entrgi-server:cpu | grep =)
# In the image as its user, in an environment that is the image's alone.
inside=(
  chroot "$tree" setpriv --reuid 10001 --regid 10001 --clear-groups --inh-caps=-all --bounding-set=-all --no-new-privs
  env -i "${image[@]}" HOME=/home/entrgi ENTRGI_HOST=127.0.0.1 ENTRGI_PORT=18765 sh -c 'cd /app && exec "$@"' sh
)
{ declare -p inside tree; cat << 'INSIDE'; } > "$work/inside"
mount --bind "$tree" "$tree"
mount -o remount,bind,ro "$tree"
mount -t tmpfs tmpfs "$tree/tmp"
mount -t tmpfs -o uid=10001,gid=10001 tmpfs "$tree/home/entrgi/.cache"
mount --rbind /dev "$tree/dev"
mount --rbind /proc "$tree/proc"
! "${inside[@]}" touch /app/file || exit 1
"${inside[@]}" grep -E '^(Uid|CapEff|NoNewPrivs)' /proc/self/status
"${inside[@]}" python -m server & server=$!
trap 'kill $server 2> /dev/null || true' EXIT
until "${inside[@]}" python deploy/healthcheck.py; do kill -0 $server; sleep 1; done
until curl --silent --fail 127.0.0.1:18765/ready; do kill -0 $server; sleep 1; done
curl --silent --fail --json '{"prompt": "The", "max_tokens": 8, "seed": 1, "guidance": "entrgi"}' 127.0.0.1:18765/v1/completions
curl --silent --fail 127.0.0.1:18765/version
kill -TERM $server
wait $server
INSIDE
unshare --mount bash -eu "$work/inside"
echo "the image serves, and ends when it is told to"
