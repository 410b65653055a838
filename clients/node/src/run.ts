/** One run as its caller sees it. Its events continue when a connection breaks. */
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

/** Milliseconds for which the client tries to reach an accepted run again. */
const PATIENCE = 60_000;
/** The same for a run that is not accepted yet, in milliseconds. */
const PATIENCE_FIRST = 10_000;
/** Milliseconds between two tries: the first value, and the largest. */
const RETRY = 50;
const RETRY_MOST = 2000;
/** Bytes. The CLI reads a longer prompt from stdin, and only the `run` call gives it to a shim. */
const PROMPT_IN_ARGV = 131_007;
/** Reason of a shim that is stopping: its runs continue through another shim. */
const STOPPING = "STOPPING";
/** Events that show that the shim has the run, before anything else is known of it. */
const CONNECTED = new Set<string | undefined>(["accepted", "queued", "approvalRequired"]);
/** Codes of a broken connection. With details, the error comes from the shim instead. */
const BROKEN = [Code.Unavailable, Code.Unknown, Code.Internal, Code.Canceled];

/** One event: `case` is its name, `value` its message. */
export type Event = Extract<RunEvent["event"], { case: string }>;

/** Bytes of the run are missing, and the shim has not reported them as `lost`. */
export class DataLoss extends Error {
  constructor(message: string) {
    super(message);
    this.name = "DataLoss";
  }
}

/** The shim's reason of an error, such as NO_IDLE_SLOT. Undefined if the shim did not send it. */
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
 * A run: an async iterable of its events. `accepted` comes once, every byte comes once and in
 * order, and `exited` comes last. When the connection breaks or the shim restarts, the events
 * continue where they stopped. After one minute without an answer it throws the last error; after
 * ten seconds, if the run was not accepted yet. When the caller leaves the events (`leave`, or a
 * `break` between two events), the run continues without the caller.
 */
export class Run implements AsyncIterable<Event> {
  /** Undefined for a run that the client has attached to. */
  #request?: RunStart;
  readonly #calls: Calls<typeof RuntimeService>;
  readonly #userId: string;
  readonly #input: Input;
  /** Aborted when the client is closed. */
  readonly #closed: AbortSignal;
  readonly #left = new AbortController();
  readonly #events: AsyncGenerator<Event>;
  #accepted = false;
  #started = false;
  #toldArtifacts = false;
  #toldApiErrors = 0n;
  #toldDenied = 0;
  /** How many bytes of stdout, stderr, artifacts and agent events the caller has. */
  #read: [bigint, bigint, bigint, bigint] = [0n, 0n, 0n, 0n];
  /** Time since which the shim does not answer. */
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
    // A given id may have been tried before, unless the caller says that it was not.
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
    run.#read = [
      start.stdoutOffset,
      start.stderrOffset,
      start.artifactOffset,
      start.eventOffset,
    ];
    return run;
  }

  /**
   * Writes input: the bytes of the files that have their `size` in the start message, one file
   * after the other, and then the command's stdin. Waits while 1 MiB of input is unsent. Input is
   * sent only while the caller reads the run's events, so write more than 1 MiB concurrently with
   * reading. Throws `Closed` when the run has ended or its stdin is closed. For a run that the
   * client has attached to, the input is stdin from `stdinOffset` of `accepted` on. A caller that
   * continues the input of an earlier caller must start at this offset, even if the earlier caller
   * had sent more.
   */
  write(data: Uint8Array | string): Promise<void> {
    return this.#input.write(typeof data === "string" ? new TextEncoder().encode(data) : data);
  }

  /**
   * Writes the next prompt of a conversation to its stdin. An empty model is that of the prompt
   * before. Await one line before the next: those of two callers would be mixed.
   */
  prompt(text: string, model = ""): Promise<void> {
    return this.write(`${JSON.stringify({ prompt: { text, model } })}\n`);
  }

  /** Ends the answer to the prompt before. */
  cancelTurn(): Promise<void> {
    return this.write('{"cancel_turn":{}}\n');
  }

  /** Closes the input: the command reads end of file. */
  closeStdin(): void {
    this.#input.close();
  }

  /** Sends a signal to the command, before any stdin that is not sent yet. */
  signal(number: number): void {
    this.#input.send({ case: "signal", value: { number } });
  }

  /** Sets the size of the terminal. */
  resize(rows: number, columns: number): void {
    this.#input.send({ case: "resize", value: { rows, columns } });
  }

  /** Ends the run: SIGTERM at once, SIGKILL after its kill timeout. */
  async cancel(): Promise<void> {
    await this.#calls.cancelRun({ runId: this.runId, userId: this.#userId });
  }

  /** Ends the events. The run continues without the caller. */
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
            if (CONNECTED.has(event?.event.case)) {
              this.#broken = undefined;
            }
            const news = event && this.#news(event);
            if (news) {
              // Only news resets the pause: a call that breaks before any news is not repeated
              // at once.
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
          // The next call reports which of the two was aborted.
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
    // `run` also attaches to a run that exists, from its first byte. A prompt that is stdin needs
    // `run` again: the previous shim may have died before it had passed the whole prompt on.
    if (request && (!this.#started || isReadByTheShim(request))) {
      const start = clone(RunStartSchema, request);
      // Whatever happens to this call, the next call is another try.
      request.attempt += 1;
      async function* requests() {
        yield create(RunRequestSchema, { message: { case: "start", value: start } });
        for (let value; (value = await input.next(call)); ) {
          yield create(RunRequestSchema, { message: { case: "input", value } });
        }
      }
      return this.#calls.run(requests(), { signal });
    }
    const [stdoutOffset, stderrOffset, artifactOffset, eventOffset] = this.#read;
    const offsets = { stdoutOffset, stderrOffset, artifactOffset, eventOffset };
    const start = { runId: this.runId, userId: this.#userId, ...offsets };
    async function* requests() {
      yield create(AttachRequestSchema, { message: { case: "start", value: start } });
      for (let value; (value = await input.next(call)); ) {
        yield create(AttachRequestSchema, { message: { case: "input", value } });
      }
    }
    return this.#calls.attach(requests(), { signal });
  }

  /** The part of an event that the caller does not have yet; undefined if there is none. */
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
      case "approvalRequired":
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
      case "apiErrors": {
        const count = event.value.errors.reduce((sum, error) => sum + error.count, 0n);
        if (count <= this.#toldApiErrors) {
          return undefined;
        }
        this.#toldApiErrors = count;
        return event;
      }
      case "egressDenied": {
        event.value.destinations.splice(0, this.#toldDenied);
        this.#toldDenied += event.value.destinations.length;
        return event.value.destinations.length > 0 ? event : undefined;
      }
      case "stdout":
        return this.#hasMore(0, event.value) ? event : undefined;
      case "stderr":
        return this.#hasMore(1, event.value) ? event : undefined;
      case "artifactData":
        return this.#hasMore(2, event.value) ? event : undefined;
      case "agentEvents": {
        // A caller gets whole ones, and continues after the last.
        const end = event.value.endOffset;
        if (end <= this.#read[3]) {
          return undefined;
        }
        this.#read[3] = end;
        return event;
      }
      case "lost":
        return this.#isLost(event.value) ? event : undefined;
      case "exited":
        return event;
      default:
        return undefined;
    }
  }

  /** Removes the bytes that the caller already has; whether any are left. */
  #hasMore(stream: 0 | 1 | 2, output: Output): boolean {
    const read = this.#read[stream];
    const end = output.offset + BigInt(output.data.length);
    if (output.offset > read) {
      throw new DataLoss(`the shim continues at byte ${output.offset} after byte ${read}`);
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
    const known = [Stream.STDOUT, Stream.STDERR, Stream.ARTIFACTS, Stream.EVENTS];
    const stream = known.indexOf(lost.stream) as -1 | 0 | 1 | 2 | 3;
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

  /** Whether another call may succeed after this error. */
  #mayGoOn(error: unknown): boolean {
    if (!(error instanceof ConnectError)) {
      return false;
    }
    const isOurs = reason(error) !== undefined;
    const isBroken = BROKEN.includes(error.code) && !isOurs;
    // Either the shim has lost the node, and the client must ask what happened to the run; or the
    // library reports a connection that was reset.
    const isUnclear = error.code === Code.Aborted;
    // Repeat the call for a run that exists. The caller decides whether to repeat a first call.
    const exists = this.#accepted || this.#broken || reason(error) === STOPPING;
    const again = exists && detail(error, "google.rpc.RetryInfo") !== undefined;
    const patience = this.#accepted ? PATIENCE : PATIENCE_FIRST;
    const isEarly = !this.#broken || Date.now() - this.#broken < patience;
    return isEarly && (isBroken || isUnclear || again === true);
  }
}

/** Whether the prompt is the command's stdin: the shim then sends it, also after the start. */
function isReadByTheShim({ command }: RunStart): boolean {
  const text = command.case === "prompt" ? command.value.text : "";
  return Buffer.byteLength(text) > PROMPT_IN_ARGV;
}
