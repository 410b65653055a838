// plugin-host DRIVER: starts a task driver as a Nomad agent from 2.0.4 on does, over go-plugin,
// and calls what only these agents call. Prints a line for each step.
package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/go-plugin"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/emptypb"
)

const (
	service = "/hashicorp.nomad.plugins.drivers.proto.Driver/"
	// Nomad gives a plugin as long for its end.
	endTimeout = 2 * time.Second
)

// connection is what the host dispenses: the plain connection, because the messages are empty.
type connection struct {
	plugin.NetRPCUnsupportedPlugin
}

func (connection) GRPCServer(*plugin.GRPCBroker, *grpc.Server) error {
	return fmt.Errorf("this is a host")
}

func (connection) GRPCClient(_ context.Context, _ *plugin.GRPCBroker, conn *grpc.ClientConn) (any, error) {
	return conn, nil
}

func main() {
	if err := run(os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, "plugin-host:", err)
		os.Exit(1)
	}
}

func run(driver string) error {
	command := exec.Command(driver)
	client := plugin.NewClient(&plugin.ClientConfig{
		HandshakeConfig: plugin.HandshakeConfig{
			ProtocolVersion:  2,
			MagicCookieKey:   "NOMAD_PLUGIN_MAGIC_COOKIE",
			MagicCookieValue: "e4327c2e01eabfd75a8a67adb114fb34a757d57eee7728d857a8cec6e91a7255",
		},
		Plugins:          plugin.PluginSet{"driver": connection{}},
		Cmd:              command,
		AllowedProtocols: []plugin.Protocol{plugin.ProtocolGRPC},
		Logger:           hclog.NewNullLogger(),
	})
	defer client.Kill()
	protocol, err := client.Client()
	if err != nil {
		return err
	}
	dispensed, err := protocol.Dispense("driver")
	if err != nil {
		return err
	}
	conn := dispensed.(*grpc.ClientConn)
	for _, method := range []string{"Init", "TaskConfigSchema", "Shutdown"} {
		ctx, cancel := context.WithTimeout(context.Background(), endTimeout)
		err := conn.Invoke(ctx, service+method, &emptypb.Empty{}, &emptypb.Empty{})
		cancel()
		if err != nil {
			return fmt.Errorf("%s: %w", method, err)
		}
		fmt.Println(method)
	}
	began := time.Now()
	client.Kill()
	if took := time.Since(began); took > endTimeout {
		return fmt.Errorf("the driver took %v to end", took)
	}
	// A plugin that had to be killed has no status.
	if state := command.ProcessState; state == nil || !state.Success() {
		return fmt.Errorf("the driver ended with %v", state)
	}
	fmt.Println("ended")
	return nil
}
