/** One run as its caller sees it: events that no broken connection ends. */
import { setTimeout as sleep } from "node:timers/promises";

import { clone, create } from "@bufbuild/protobuf";
import { BinaryReader } from "@bufbuild/protobuf/wire";
import { type Client as Calls, Code, ConnectError } from "@connectrpc/connect";
import { v7 as uuid } from "uuid";

import {
  type AttachStart,
  AttachRequestSchema,
  type Lost,
  type Output,
  type RunEvent,
  RunRequestSchema,
  type RunStart,
  RunStartSchema,
  type RuntimeService,
  Stream,
} from "./gen/polydev/runtime/v1/runtime_pb.js";
import { Gone, Input } from "./input.js";

/** Milliseconds that a run is tried to be reached again. */
const PATIENCE = 60_000;
/** As long as it is not known whether there is one. */
const PATIENCE_FIRST = 10_000;
/** Between two tries at first, and at most. */
const RETRY = 50;
const RETRY_MOST = 2000;
/** A longer prompt is the CLI's stdin, which the shim has from the first call alone. */
const PROMPT_IN_ARGV = 131_007;
/** A shim hands its runs over. */
const STOPPING = "STOPPING";
/** The connection's words, unless they have details, which are the shim's. */
const BROKEN = [Code.Unavailable, Code.Unknown, Code.Internal, Code.Canceled];

/** What has happened: `case` says what, `value` the rest. */
export type Event = Extract<RunEvent["event"], { case: string }>;

/** Bytes of the run are missing that nobody has declared lost. */
export class DataLoss extends Error {
  constructor(message: string) {
    super(message);
    this.name = "DataLoss";
  }
}

/** The shim's word for an error, such as NO_IDLE_SLOT; undefined if it is not the shim's. */
export function reason(error: unknown): string | undefined {
  const info = detail(error, "google.rpc.ErrorInfo");
  if (!info) {
    return undefined;
  }
  const reader = new BinaryReader(info);
  while (reader.pos < reader.len) {
    const [field, type] = reader.tag();
    if (field === 1) {
      return reader.string();
    }
    reader.skip(type);
  }
  return "";
}

function detail(error: unknown, type: string): Uint8Array | undefined {
  const details = error instanceof ConnectError ? error.details : [];
  for (const detail of details) {
    if ("type" in detail && "value" in detail && detail.type === type) {
      return detail.value as Uint8Array;
    }
  }
  return undefined;
}

/**
 * A run: an async iterable of its events. `accepted` comes once, every byte once and in order,
 * and `exited` last. When the connection breaks, or the shim is restarted, it goes on where it
 * was; after a minute without an answer (ten seconds, if it was not accepted yet) it throws the
 * last error. Leaving it (`leave`, or a `break` between two events) leaves the run to itself.
 */
export class Run implements AsyncIterable<Event> {
  /** `undefined` for a run that somebody else has started. */
  #request?: RunStart;
  readonly #calls: Calls<typeof RuntimeService>;
  readonly #userId: string;
  readonly #input: Input;
  /** The client is. */
  readonly #closed: AbortSignal;
  readonly #left = new AbortController();
  readonly #events: AsyncGenerator<Event>;
  #accepted = false;
  #started = false;
  #toldArtifacts = false;
  /** How much of stdout, stderr and artifacts the caller has. */
  #read: [bigint, bigint, bigint] = [0n, 0n, 0n];
  /** Since when the shim does not answer. */
  #broken?: number;
  #retry = RETRY;

  private constructor(
    calls: Calls<typeof RuntimeService>,
    closed: AbortSignal,
    /** The run's UUID. */
    readonly runId: string,
    userId: string,
    input: Input,
  ) {
    this.#calls = calls;
    this.#userId = userId;
    this.#input = input;
    this.#closed = closed;
    this.#events = this.#follow();
  }

  /** @internal */
  static start(calls: Calls<typeof RuntimeService>, closed: AbortSignal, start: RunStart): Run {
    const runId = start.runId || start.leaseId || uuid();
    // An id that was given may have been tried before, unless it is said that it was not.
    const attempt = start.attempt || (start.runId ? 2 : 1);
    const sizes = start.files.map(({ source }) => (source.case === "size" ? source.value : 0n));
    const files = Number(sizes.reduce((sum, size) => sum + size, 0n));
    const input = new Input(files, attempt === 1 ? "new" : "known");
    const run = new Run(calls, closed, runId, start.userId, input);
    run.#request = create(RunStartSchema, { ...start, runId, attempt });
    return run;
  }

  /** @internal */
  static attach(
    calls: Calls<typeof RuntimeService>,
    closed: AbortSignal,
    start: AttachStart,
  ): Run {
    const run = new Run(calls, closed, start.runId, start.userId, new Input(0, "attached"));
    run.#read = [start.stdoutOffset, start.stderrOffset, start.artifactOffset];
    return run;
  }

  /**
   * The bytes of the files whose `size` the run was told, one file's after the other's, and then
   * the command's stdin. Waits while 1 MiB has not been sent, which happens only while somebody
   * asks for the run's events: write more than that beside it. Throws `Closed` once the run is
   * over or its stdin closed. For a run that was attached to it is stdin, from `stdinOffset` of
   * its `accepted` on: who goes on with what an earlier caller sent begins there, and not after
   * what that one had sent.
   */
  write(data: Uint8Array | string): Promise<void> {
    return this.#input.write(typeof data === "string" ? new TextEncoder().encode(data) : data);
  }

  /** No more follows: the command reads end of file. */
  closeStdin(): void {
    this.#input.close();
  }

  /** A signal for the command, before whatever of its stdin is still to be sent. */
  signal(number: number): void {
    this.#input.send({ case: "signal", value: { number } });
  }

  /** The terminal has another size. */
  resize(rows: number, columns: number): void {
    this.#input.send({ case: "resize", value: { rows, columns } });
  }

  /** Ends the run: SIGTERM at once, SIGKILL after its kill timeout. */
  async cancel(): Promise<void> {
    await this.#calls.cancelRun({ runId: this.runId, userId: this.#userId });
  }

  /** Leaves the run to itself: its events end. */
  leave(): void {
    this.#left.abort();
    this.#input.end();
  }

  [Symbol.asyncIterator](): AsyncGenerator<Event> {
    return this.#events;
  }

  async *#follow(): AsyncGenerator<Event> {
    try {
      for (;;) {
        const aborter = new AbortController();
        const signals = [aborter.signal, this.#left.signal, this.#closed];
        try {
          for await (const { event } of this.#open(AbortSignal.any(signals))) {
            if (event?.event.case === "accepted" || event?.event.case === "queued") {
              this.#broken = undefined;
            }
            const news = event && this.#news(event);
            if (news) {
              // One that breaks again and again before there is anything is not asked at once.
              this.#retry = RETRY;
              const isLast = news.case === "exited";
              if (isLast) {
                this.#input.end();
              }
              yield news;
              if (isLast) {
                return;
              }
            }
          }
          const words = "the shim ended the stream before the run's end";
          throw new ConnectError(words, Code.Unavailable);
        } catch (error) {
          if (this.#left.signal.aborted) {
            return;
          }
          if (this.#closed.aborted || !this.#mayGoOn(error)) {
            throw error;
          }
        } finally {
          aborter.abort();
        }
        this.#broken ??= Date.now();
        this.#retry = Math.min(this.#retry * 2, RETRY_MOST);
        const wait = this.#retry * (0.5 + Math.random() / 2);
        await sleep(wait, undefined, { signal: AbortSignal.any([this.#left.signal, this.#closed]) })
          // The next call says which.
          .catch(() => undefined);
      }
    } finally {
      this.#input.end();
    }
  }

  #open(signal: AbortSignal): AsyncIterable<{ event?: RunEvent }> {
    const call = this.#input.nextCall();
    const input = this.#input;
    const request = this.#request;
    // A run that exists is attached to by `run` as well, from its first byte. The shim that
    // broke may have had some of what it reads.
    if (request && (!this.#started || isReadByTheShim(request))) {
      const start = clone(RunStartSchema, request);
      // Whatever becomes of this call, the next one is another try.
      request.attempt += 1;
      async function* requests() {
        yield create(RunRequestSchema, { message: { case: "start", value: start } });
        for (let value; (value = await input.next(call)); ) {
          yield create(RunRequestSchema, { message: { case: "input", value } });
        }
      }
      return this.#calls.run(requests(), { signal });
    }
    const [stdoutOffset, stderrOffset, artifactOffset] = this.#read;
    const offsets = { stdoutOffset, stderrOffset, artifactOffset };
    const start = { runId: this.runId, userId: this.#userId, ...offsets };
    async function* requests() {
      yield create(AttachRequestSchema, { message: { case: "start", value: start } });
      for (let value; (value = await input.next(call)); ) {
        yield create(AttachRequestSchema, { message: { case: "input", value } });
      }
    }
    return this.#calls.attach(requests(), { signal });
  }

  /** What of an event the caller does not have yet. */
  #news({ event }: RunEvent): Event | undefined {
    switch (event.case) {
      case "accepted": {
        try {
          this.#input.goOn(event.value);
        } catch (error) {
          throw error instanceof Gone ? new DataLoss(error.message) : error;
        }
        const isFirst = !this.#accepted;
        this.#accepted = true;
        return isFirst ? event : undefined;
      }
      case "queued":
        return this.#accepted ? undefined : event;
      case "started": {
        const isFirst = !this.#started;
        this.#started = true;
        return isFirst ? event : undefined;
      }
      case "artifacts": {
        const isFirst = !this.#toldArtifacts;
        this.#toldArtifacts = true;
        return isFirst ? event : undefined;
      }
      case "stdout":
        return this.#hasMore(0, event.value) ? event : undefined;
      case "stderr":
        return this.#hasMore(1, event.value) ? event : undefined;
      case "artifactData":
        return this.#hasMore(2, event.value) ? event : undefined;
      case "lost":
        return this.#isLost(event.value) ? event : undefined;
      case "exited":
        return event;
      default:
        return undefined;
    }
  }

  /** Takes off what the caller has. */
  #hasMore(stream: 0 | 1 | 2, output: Output): boolean {
    const read = this.#read[stream];
    const end = output.offset + BigInt(output.data.length);
    if (output.offset > read) {
      throw new DataLoss(`the shim goes on at byte ${output.offset} after byte ${read}`);
    }
    if (end <= read) {
      return false;
    }
    output.data = output.data.subarray(Number(read - output.offset));
    output.offset = read;
    this.#read[stream] = end;
    return true;
  }

  #isLost(lost: Lost): boolean {
    const known = [Stream.STDOUT, Stream.STDERR, Stream.ARTIFACTS];
    const stream = known.indexOf(lost.stream) as -1 | 0 | 1 | 2;
    if (stream === -1) {
      return true;
    }
    const read = this.#read[stream];
    if (lost.to <= read) {
      return false;
    }
    lost.from = lost.from > read ? lost.from : read;
    this.#read[stream] = lost.to;
    return true;
  }

  /** Whether another call may bring what this one did not. */
  #mayGoOn(error: unknown): boolean {
    if (!(error instanceof ConnectError)) {
      return false;
    }
    const isOurs = reason(error) !== undefined;
    const isBroken = BROKEN.includes(error.code) && !isOurs;
    // The shim has lost the node, and what became of the run is to be asked for; or the library's
    // word for a connection that was reset.
    const isUnclear = error.code === Code.Aborted;
    // Worth another try for a run that exists; a first call is its caller's to repeat.
    const exists = this.#accepted || this.#broken || reason(error) === STOPPING;
    const again = exists && detail(error, "google.rpc.RetryInfo") !== undefined;
    const patience = this.#accepted ? PATIENCE : PATIENCE_FIRST;
    const isEarly = !this.#broken || Date.now() - this.#broken < patience;
    return isEarly && (isBroken || isUnclear || again === true);
  }
}

/** The shim has input of its own for it, also after it has started. */
function isReadByTheShim({ command }: RunStart): boolean {
  const text = command.case === "prompt" ? command.value.text : "";
  return Buffer.byteLength(text) > PROMPT_IN_ARGV;
}
