#!/usr/bin/env bash
# go-plugin and a plugin that is dead while its child lives.
#
# Version: github.com/hashicorp/go-plugin 1.7.0 (Go module), which Nomad 1.11 uses. Needs
# bash, go.
#
# A good guess: `Client.Exited()` says whether the plugin's process has ended, so it becomes
# true at once when the plugin is killed.
# Seen: it becomes true only when the plugin's stdout and stderr reach their end. A child
# that inherited one of them keeps the dead plugin "running" until the child ends as well.
# If the child's output goes to /dev/null, `Exited()` is true at once.
#
# Where it matters: an agent would not start a killed driver again as long as one of its
# children holds the pipe. Whatever the driver starts gets a stdout and stderr of its own
# (driver/src/firewall.rs).
set -euo pipefail

work=$(mktemp -d)
finish() {
    chmod -R u+w "$work"
    rm -rf "$work"
}
trap finish EXIT

cat >"$work/plugin.sh" <<'SH'
#!/bin/sh
# The child lives for six seconds.
case $CHILD in
inherits) sleep 6 >/dev/null & ;;
detached) sleep 6 >/dev/null 2>&1 & ;;
esac
echo '1|2|tcp|127.0.0.1:9|grpc'
exec sleep 60
SH
chmod +x "$work/plugin.sh"

cat >"$work/go.mod" <<'MOD'
module finding.invalid

go 1.24

require github.com/hashicorp/go-plugin v1.7.0
MOD
cat >"$work/main.go" <<'GO'
package main

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"syscall"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/go-plugin"
)

// afterKill starts a plugin, kills it, and returns how long it does not count as exited.
func afterKill(child string) (time.Duration, error) {
	command := exec.Command("./plugin.sh")
	command.Env = append(os.Environ(), "CHILD="+child)
	client := plugin.NewClient(&plugin.ClientConfig{
		HandshakeConfig: plugin.HandshakeConfig{
			ProtocolVersion: 2, MagicCookieKey: "COOKIE", MagicCookieValue: "yes",
		},
		Plugins:          plugin.PluginSet{},
		Cmd:              command,
		AllowedProtocols: []plugin.Protocol{plugin.ProtocolGRPC},
		Logger:           hclog.New(&hclog.LoggerOptions{Output: io.Discard}),
	})
	if _, err := client.Start(); err != nil {
		return 0, err
	}
	if err := syscall.Kill(command.Process.Pid, syscall.SIGKILL); err != nil {
		return 0, err
	}
	killed := time.Now()
	for !client.Exited() {
		if time.Since(killed) > 30*time.Second {
			return 0, fmt.Errorf("not exited after 30 s")
		}
		time.Sleep(20 * time.Millisecond)
	}
	return time.Since(killed), nil
}

func main() {
	for _, child := range []string{"detached", "inherits"} {
		took, err := afterKill(child)
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		when := "at once"
		if took > 3*time.Second {
			when = "when the child has ended"
		}
		fmt.Printf("%s: exited %s\n", child, when)
	}
}
GO

cd "$work"
GOFLAGS=-mod=mod timeout 600 go build -o host . >&2
seen=$(timeout 90 ./host | paste -s -d ';')
recorded="detached: exited at once;inherits: exited when the child has ended"
echo "expected: detached: exited at once;inherits: exited at once"
echo "seen: $seen"
if [ "$seen" != "$recorded" ]; then
    echo "CHANGED: recorded was: $recorded" >&2
    exit 1
fi
