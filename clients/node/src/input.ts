/** What a caller sends to a run: kept until no broken connection can lose it any more. */
import { create, type MessageInitShape } from "@bufbuild/protobuf";

import { type Accepted, type RunInput, RunInputSchema } from "./gen/polydev/runtime/v1/runtime_pb.js";

/** The most the API takes in one message. */
const CHUNK = 64 << 10;
/** Bytes that wait to be sent before whoever writes more has to wait. */
const WAITING_MOST = 1 << 20;
/**
 * Bytes that are kept after they were sent: more than lie between caller and command, with all
 * windows on the way full.
 */
const KEPT = 8 << 20;
/** Signals that wait to be sent; further ones are left out. */
const SIGNALS_MOST = 64;

/** The run takes no more input. */
export class Closed extends Error {
  constructor() {
    super("the run takes no more input");
    this.name = "Closed";
  }
}

/** Bytes that a broken connection has lost. */
export class Gone extends Error {}

/** Bytes that were sent, in a buffer that may have room for more. */
interface Kept {
  bytes: Uint8Array;
  length: number;
}

/** One stream of bytes: those of the run's files, then its stdin. */
export class Input {
  readonly #isAttached: boolean;
  /** Where the first byte is in the stdin of a run that others have written to. */
  #origin?: number;
  /**
   * The last of what was sent, in pieces, none with bytes of files and of stdin; from `#begin` to
   * `#sent`, where what waits begins.
   */
  #kept: Kept[] = [];
  #waiting: Uint8Array[] = [];
  #begin = 0;
  #sent = 0;
  #end = 0;
  /** The run has so much more than was written here, from an earlier caller. */
  #skip = 0;
  /** It is known how much the run has, so that what waits may be sent. */
  #known: boolean;
  #call = 0;
  #closed = false;
  #closeSent = false;
  #over = false;
  #urgent: RunInput[] = [];
  /** The last size of the terminal, for the next call to tell again. */
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
      // A copy: the caller may use its buffer again.
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

  /** A message that goes before any bytes. */
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
   * Begins another call, in place of the one that broke; it is not known yet how much the run
   * has, unless it is the first.
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

  /** The run has so much, and the call goes on from there. */
  goOn(accepted: Accepted): void {
    const stdin = Number(accepted.stdinOffset);
    let has = Math.min(Number(accepted.filesOffset), this.files) + stdin;
    if (this.#isAttached) {
      this.#origin ??= stdin;
      // It has more if others send as well.
      has = Math.min(Math.max(stdin - this.#origin, 0), this.#end);
    }
    if (!this.#known) {
      this.#seek(has);
    }
    this.#tell();
  }

  /**
   * What that call is to send next; undefined once there is another call or the run is over.
   * Otherwise it waits: the end of the messages would close the command's stdin.
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

  /** The run has so much: what follows waits to be sent. */
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

  /** What the run has of what waits need not be sent. */
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
      // Many small ones would take more than their bytes.
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
