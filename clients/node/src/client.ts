/** The connection to a shim, and the identity of its caller. */
import { readFileSync } from "node:fs";
import { connect } from "node:net";

import { create, type MessageInitShape } from "@bufbuild/protobuf";
import { createClient, type Client as Calls, type Interceptor } from "@connectrpc/connect";
import { createGrpcTransport, Http2SessionManager } from "@connectrpc/connect-node";

import {
  AttachStartSchema,
  RunStartSchema,
  RuntimeService,
} from "./gen/polydev/runtime/v1/runtime_pb.js";
import { Run } from "./run.js";

/** Milliseconds between pings, and to wait for an answer: the other machine may be down. */
const ALIVE = 20_000;

export interface Identity {
  /** PEM file with the authorities that may sign the shim's certificate. Only for https. */
  tlsCa?: string;
  /** PEM file with the caller's certificate. */
  tlsCert?: string;
  /** PEM file with the key of the caller's certificate. */
  tlsKey?: string;
  /** Returns the caller's token. The client calls it for each call of the API. */
  token?: () => string | Promise<string>;
  /** Metadata to send with each call, such as the trace context (`traceparent`). */
  metadata?: Record<string, string>;
}

/**
 * A connection to a shim, or to a proxy in front of several shims. When the connection breaks, the
 * next call makes a new one. `address` is unix:///PATH, http://127.0.0.1:PORT or
 * https://HOST:PORT.
 */
export class Client {
  /** Every call of the API, without the handling of `Run`. */
  readonly calls: Calls<typeof RuntimeService>;
  readonly #sessions: Http2SessionManager;
  readonly #closed = new AbortController();

  constructor(address: string, identity: Identity = {}) {
    const { baseUrl, options } = target(address, identity);
    const pings = { pingIntervalMs: ALIVE, pingTimeoutMs: ALIVE };
    this.#sessions = new Http2SessionManager(baseUrl, pings, options);
    const transport = createGrpcTransport({
      baseUrl,
      sessionManager: this.#sessions,
      interceptors: [added(identity)],
    });
    this.calls = createClient(RuntimeService, transport);
  }

  /**
   * Runs a command. If `runId` is empty, the client makes one from this machine's clock, so that
   * the command is started once, however often the connection breaks. A given `runId` may have been
   * tried before by another process, so the shim asks every node first. `attempt: 1` says that the
   * id was never tried, and the shim does not ask. The client sends nothing until the caller asks
   * for the events.
   */
  run(start: MessageInitShape<typeof RunStartSchema>): Run {
    return Run.start(this.calls, this.#closed.signal, create(RunStartSchema, start));
  }

  /** Continues a run from the given offsets. */
  attach(start: MessageInitShape<typeof AttachStartSchema>): Run {
    return Run.attach(this.calls, this.#closed.signal, create(AttachStartSchema, start));
  }

  /** Ends all active calls. Their runs continue. */
  close(): void {
    this.#closed.abort();
    this.#sessions.abort();
  }
}

function target(address: string, { tlsCa, tlsCert, tlsKey }: Identity) {
  const unix = /^unix:\/\/(\/.+)$/.exec(address)?.[1];
  if (unix !== undefined) {
    return { baseUrl: "http://localhost", options: { createConnection: () => connect(unix) } };
  }
  const url = URL.canParse(address) ? new URL(address) : undefined;
  const isBare = url?.pathname === "/" && url.search === "" && url.username === "";
  const isLoopback = ["127.0.0.1", "[::1]", "localhost"].includes(url?.hostname ?? "");
  if (url && isBare && (url.protocol === "https:" || (url.protocol === "http:" && isLoopback))) {
    const read = (path?: string) => (path === undefined ? undefined : readFileSync(path));
    const options = { ca: read(tlsCa), cert: read(tlsCert), key: read(tlsKey) };
    return { baseUrl: url.origin, options: url.protocol === "https:" ? options : {} };
  }
  throw new TypeError(
    `\`${address}\` is neither unix:///PATH nor http://127.0.0.1:PORT nor https://HOST:PORT`,
  );
}

/** Adds metadata and token to each call. */
function added({ token, metadata = {} }: Identity): Interceptor {
  return (next) => async (request) => {
    for (const [name, value] of Object.entries(metadata)) {
      request.header.set(name, value);
    }
    if (token) {
      request.header.set("authorization", `Bearer ${await token()}`);
    }
    return next(request);
  };
}
