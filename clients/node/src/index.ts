/**
 * A client of polydev-shim.
 *
 * `Client.run` starts a command and is an async iterable of its events, which goes on over broken
 * connections and shims that are restarted: every byte comes once, in order. Every other call of
 * the API is in `Client.calls`, with the messages of `api`.
 */
export { Client, type Identity } from "./client.js";
export { Closed } from "./input.js";
export { DataLoss, reason, Run, type Event } from "./run.js";
export { Code, ConnectError } from "@connectrpc/connect";
export * as api from "./gen/polydev/runtime/v1/runtime_pb.js";
