/**
 * A client of polydev-shim.
 *
 * `Client.run` starts a command and returns an async iterable of its events. The events continue
 * when a connection breaks or a shim restarts: every byte comes once and in order. Every other call
 * of the API is in `Client.calls`. The messages are in `api`.
 */
export { Client, type Identity } from "./client.js";
export { Closed } from "./input.js";
export { DataLoss, reason, Run, type Event } from "./run.js";
export { Code, ConnectError } from "@connectrpc/connect";
export * as api from "./gen/polydev/runtime/v1/runtime_pb.js";
