#!/bin/bash
# Prints a folder with `prometheus`, `promtool` and `prometheus-alertmanager` of Debian's packages,
# which are unpacked into the cache and not installed: installed, they would start.
set -euo pipefail
cd "$(dirname "$0")/.."
. tests/lib.sh
alone prometheus
names=(prometheus prometheus-alertmanager)

found=$POLYDEV_CACHE/prometheus-$(sha256sum tests/prometheus.sh | cut -c1-16)
if [ ! -e "$found/complete" ]; then
    need apt-get "this needs Debian or Ubuntu"
    step "fetching Prometheus and Alertmanager"
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    # Only root may write to the folder.
    get=(apt-get -qq -o APT::Sandbox::User=root)
    (cd "$work" && { "${get[@]}" download "${names[@]}" || { "${get[@]}" update && "${get[@]}" download "${names[@]}"; }; } >&2)
    rm -rf "$POLYDEV_CACHE"/prometheus*
    mkdir -p "$found"
    for package in "$work"/*.deb; do dpkg-deb --extract "$package" "$found"; done
    touch "$found/complete"
fi
echo "$found/usr/bin"
