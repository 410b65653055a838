#!/bin/sh
# Answers HTTP at some ports in place of Qdrant or Grafana.
set -eu
mkdir -p /www/api
echo ok >/www/api/health
for port; do busybox httpd -p "$port" -h /www; done
echo "stand-in: listening at $*"
trap 'exit 0' TERM
sleep infinity &
wait
