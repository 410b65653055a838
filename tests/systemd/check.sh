#!/bin/bash
# Runs in the virtual machine, after it has booted. Ends with PASSED, or with what is wrong.
exec >/dev/ttyS0 2>&1
set -uo pipefail
unit=polydev-shim.service
problems=0
expect() { "${@:2}" || { echo "FAILED: $1"; problems=$((problems + 1)); }; }
socket() { curl --silent --max-time 10 --unix-socket /run/polydev/shim.sock "http://shim$1"; }
user_of_shim() { [ "$(ps -o user= -p "$(systemctl show --value --property MainPID $unit)")" = polydev-shim ]; }
exposure() { systemd-analyze security --no-pager $unit | sed -n 's/.*Overall exposure level for [^:]*: \([0-9.]*\).*/\1/p'; }

expect "it starts and says that it is ready" systemctl start $unit
expect "it is a user of its own" user_of_shim
expect "it answers at its socket" test "$(socket /v1/openapi.json | head -c 1)" = '{'
expect "it is asked by its own commands" polydev-shim credentials list
expect "it keeps credentials" test -s /var/lib/polydev-shim/credentials.db
expect "it keeps a record" test -s /var/lib/polydev-shim/audit/head
expect "its exposure is at most 2.5, and not $(exposure)" \
    awk -v found="$(exposure)" 'BEGIN { exit !(found != "" && found <= 2.5) }'
expect "it stops when it is told to" systemctl stop $unit
expect "it has not failed" test "$(systemctl show --value --property Result $unit)" = success
if [ $problems = 0 ]; then
    echo PASSED
else
    systemctl status --no-pager --lines 30 $unit
fi
systemctl poweroff --force
