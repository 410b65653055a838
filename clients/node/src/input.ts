/** The input that a caller sends to a run. It is kept until no broken connection can lose it. */
import { create, type MessageInitShape } from "@bufbuild/protobuf";

import { type Accepted, type RunInput, RunInputSchema } from "./gen/polydev/runtime/v1/runtime_pb.js";

/** Most bytes that the API accepts in one message. */
const CHUNK = 64 << 10;
/** Most bytes that may wait to be sent. A caller that writes more has to wait. */
const WAITING_MOST = 1 << 20;
/**
 * Bytes that are kept after they were sent. This is more than the path from the caller to the
 * command holds when all windows on it are full.
 */
const KEPT = 8 << 20;
/** Most signals and sizes that may wait to be sent. Further ones are dropped. */
const SIGNALS_MOST = 64;

/** The run accepts no more input. */
export class Closed extends Error {
  constructor() {
    super("the run takes no more input");
    this.name = "Closed";
  }
}

/** A broken connection has lost bytes that are no longer kept. */
export class Gone extends Error {}

/** Sent bytes, in a buffer that may have room for more. */
interface Kept {
  bytes: Uint8Array;
  length: number;
}

/** One stream of bytes: the run's files, and then its stdin. */
export class Input {
  readonly #isAttached: boolean;
  /** Offset of the first byte in the run's stdin, if others have written to the run before. */
  #origin?: number;
  /**
   * The last bytes that were sent, from `#begin` to `#sent`, in pieces. No piece has bytes of both
   * files and stdin. The bytes in `#waiting` follow at `#sent`.
   */
  #kept: Kept[] = [];
  #waiting: Uint8Array[] = [];
  #begin = 0;
  #sent = 0;
  #end = 0;
  /** How many bytes the run has beyond those written here: an earlier caller sent them. */
  #skip = 0;
  /** Whether it is known how much input the run has. Only then may waiting bytes be sent. */
  #known: boolean;
  #call = 0;
  #closed = false;
  #closeSent = false;
  #over = false;
  #urgent: RunInput[] = [];
  /** The last size of the terminal. The next call sends it again. */
  #size?: MessageInitShape<typeof RunInputSchema>["input"];
  #waiters: (() => void)[] = [];

  constructor(
    readonly files: number,
    from: "new" | "known" | "attached",
  ) {
    this.#isAttached = from === "attached";
    this.#known = from === "new";
  }

  async write(data: Uint8Array): Promise<void> {
    for (let at = 0; at < data.length; ) {
      if (this.#over || this.#closed) {
        throw new Closed();
      }
      if (this.#end - this.#sent >= WAITING_MOST) {
        await this.#changed();
        continue;
      }
      const filesLeft = this.files - this.#end;
      const size = filesLeft > 0 ? Math.min(filesLeft, CHUNK) : CHUNK;
      // A copy, because the caller may reuse its buffer.
      const piece = new Uint8Array(data.subarray(at, at + size));
      at += piece.length;
      this.#end += piece.length;
      this.#waiting.push(piece);
      if (this.#skip > 0) {
        this.#pass(this.#sent + this.#skip);
      }
      this.#tell();
    }
  }

  close(): void {
    this.#closed = true;
    this.#tell();
  }

  /** Sends a message before any waiting bytes. */
  send(input: MessageInitShape<typeof RunInputSchema>["input"]): void {
    if (input?.case === "resize") {
      this.#size = input;
      this.#urgent = this.#urgent.filter((waiting) => waiting.input.case !== "resize");
    }
    if (this.#urgent.length < SIGNALS_MOST) {
      this.#urgent.push(create(RunInputSchema, { input }));
    }
    this.#tell();
  }

  end(): void {
    this.#over = true;
    this.#tell();
  }

  /**
   * Begins a new call in place of the call that broke. Except for the first call, it is not known
   * yet how much input the run has.
   */
  nextCall(): number {
    this.#call += 1;
    if (this.#call > 1) {
      this.#known = false;
      if (this.#size) {
        this.send(this.#size);
      }
    }
    this.#closeSent = false;
    this.#tell();
    return this.#call;
  }

  /** Continues the call after the input that the run has according to `accepted`. */
  goOn(accepted: Accepted): void {
    const stdin = Number(accepted.stdinOffset);
    let has = Math.min(Number(accepted.filesOffset), this.files) + stdin;
    if (this.#isAttached) {
      this.#origin ??= stdin;
      // The run has more if others send input as well.
      has = Math.min(Math.max(stdin - this.#origin, 0), this.#end);
    }
    if (!this.#known) {
      this.#seek(has);
    }
    this.#tell();
  }

  /**
   * The next message of the given call; undefined when a new call has begun or the run has ended.
   * In all other cases it waits for a message, because the end of the messages would close the
   * command's stdin.
   */
  async next(call: number): Promise<RunInput | undefined> {
    while (call === this.#call && !this.#over) {
      const message = this.#next();
      if (message) {
        this.#tell();
        return message;
      }
      await this.#changed();
    }
    return undefined;
  }

  #next(): RunInput | undefined {
    const urgent = this.#urgent.shift();
    if (urgent || !this.#known) {
      return urgent;
    }
    const value = this.#waiting.shift();
    if (!value) {
      if (!this.#closed || this.#closeSent) {
        return undefined;
      }
      this.#closeSent = true;
      return create(RunInputSchema, { input: { case: "closeStdin", value: {} } });
    }
    const isFile = this.#sent < this.files;
    this.#keep(value);
    return create(RunInputSchema, { input: { case: isFile ? "files" : "stdin", value } });
  }

  /** Moves to the offset `has`: the bytes from there on wait to be sent. */
  #seek(has: number): void {
    if (has < this.#begin) {
      const kept = `those from ${this.#begin} on are kept`;
      throw new Gone(`the run has ${has} bytes of its input, and ${kept}`);
    }
    for (let piece; has < this.#sent && (piece = this.#kept.pop()); ) {
      const begin = this.#sent - piece.length;
      const had = Math.max(has - begin, 0);
      if (had > 0) {
        this.#kept.push({ bytes: piece.bytes.slice(0, had), length: had });
      }
      this.#sent = begin + had;
      this.#waiting.unshift(piece.bytes.subarray(had, piece.length));
    }
    this.#pass(has);
    this.#known = true;
  }

  /** Skips waiting bytes that the run already has. */
  #pass(has: number): void {
    for (let piece; this.#sent < has && (piece = this.#waiting.shift()); ) {
      const had = Math.min(has - this.#sent, piece.length);
      if (had < piece.length) {
        this.#waiting.unshift(piece.subarray(had));
      }
      this.#keep(piece.subarray(0, had));
    }
    this.#skip = Math.max(has - this.#sent, 0);
  }

  #keep(piece: Uint8Array): void {
    const isFirstOfStdin = this.#sent === this.files;
    this.#sent += piece.length;
    const last = this.#kept.at(-1);
    if (last && last.length + piece.length <= last.bytes.length && !isFirstOfStdin) {
      last.bytes.set(piece, last.length);
      last.length += piece.length;
    } else {
      // Many small pieces would take more memory than their bytes.
      const bytes = new Uint8Array(Math.max(piece.length, CHUNK));
      bytes.set(piece);
      this.#kept.push({ bytes, length: piece.length });
    }
    for (
      let first = this.#kept[0];
      first && this.#begin + first.length + KEPT <= this.#sent;
      first = this.#kept[0]
    ) {
      this.#begin += first.length;
      this.#kept.shift();
    }
  }

  #changed(): Promise<void> {
    return new Promise((resolve) => this.#waiters.push(resolve));
  }

  #tell(): void {
    const waiters = this.#waiters;
    this.#waiters = [];
    waiters.forEach((resolve) => resolve());
  }
}
