/** The connection to a shim, and who its caller is. */
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

/** Milliseconds between pings, and for the answer to one: the other machine may have died. */
const ALIVE = 20_000;

export interface Identity {
  /** File with the authorities that speak for the shim, in PEM; for https. */
  tlsCa?: string;
  /** File with the caller's certificate. */
  tlsCert?: string;
  /** File with the key of it. */
  tlsKey?: string;
  /** A token; asked for with each call. */
  token?: () => string | Promise<string>;
  /** What goes with each call, such as the place in a trace (`traceparent`). */
  metadata?: Record<string, string>;
}

/**
 * A connection to a shim, or to whatever stands in front of several. When it breaks, the next
 * call makes a new one. `address` is unix:///PATH, http://127.0.0.1:PORT or https://HOST:PORT.
 */
export class Client {
  /** Every call of the API, as it is. */
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
   * Runs a command. Without a `runId` it gets one here, of this machine's clock, so that it is
   * started once however often the connection breaks. One that is given may have been tried
   * before, by another process: every node is asked first, unless `attempt` is 1, which says
   * that it was not. Nothing is sent before its events are asked for.
   */
  run(start: MessageInitShape<typeof RunStartSchema>): Run {
    return Run.start(this.calls, this.#closed.signal, create(RunStartSchema, start));
  }

  /** Goes on with a run, from those offsets. */
  attach(start: MessageInitShape<typeof AttachStartSchema>): Run {
    return Run.attach(this.calls, this.#closed.signal, create(AttachStartSchema, start));
  }

  /** Breaks off the calls that go on. Their runs are left to themselves. */
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

/** What goes with each call. */
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
