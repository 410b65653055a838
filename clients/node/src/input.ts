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

/** One stream of bytes: those of the run's files, then its stdin. */
export class Input {
  /** Where the first byte is in the stdin of a run that others have written to. */
  #origin?: number;
  /** The last of it, in pieces, none with bytes of files and of stdin. */
  #log: Uint8Array[] = [];
  #begin = 0;
  #end = 0;
  /** Up to here the call that is open has sent it; undefined until it is known where it begins. */
  #sent?: number;
  #call = 0;
  #closed = false;
  #closeSent = false;
  #over = false;
  #urgent: RunInput[] = [];
  #waiting: (() => void)[] = [];

  constructor(
    readonly files: number,
    from: "new" | "known" | "attached",
  ) {
    this.#isAttached = from === "attached";
    this.#sent = from === "new" ? 0 : undefined;
  }
  readonly #isAttached: boolean;

  async write(data: Uint8Array): Promise<void> {
    for (let at = 0; at < data.length; ) {
      if (this.#over || this.#closed) {
        throw new Closed();
      }
      if (this.#end - (this.#sent ?? this.#begin) >= WAITING_MOST) {
        await this.#changed();
        continue;
      }
      const filesLeft = this.files - this.#end;
      const size = filesLeft > 0 ? Math.min(filesLeft, CHUNK) : CHUNK;
      // A copy: the caller may use its buffer again.
      const piece = data.slice(at, at + size);
      at += piece.length;
      this.#end += piece.length;
      this.#log.push(piece);
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
      this.#sent = undefined;
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
    if (this.#sent === undefined) {
      if (has < this.#begin) {
        const kept = `those from ${this.#begin} on are kept`;
        throw new Gone(`the run has ${has} bytes of its input, and ${kept}`);
      }
      this.#sent = has;
    }
    this.#tell();
  }

  /**
   * What that call is to send next. Undefined only once `aborted`: the end of the messages
   * would close the command's stdin.
   */
  async next(call: number, aborted: AbortSignal): Promise<RunInput | undefined> {
    const wake = () => this.#tell();
    aborted.addEventListener("abort", wake);
    try {
      while (!aborted.aborted) {
        const message = this.#next(call);
        if (message) {
          this.#tell();
          return message;
        }
        await this.#changed();
      }
      return undefined;
    } finally {
      aborted.removeEventListener("abort", wake);
    }
  }

  #next(call: number): RunInput | undefined {
    if (call !== this.#call || this.#over) {
      return undefined;
    }
    const urgent = this.#urgent.shift();
    if (urgent || this.#sent === undefined) {
      return urgent;
    }
    // More, if the run has had it from an earlier caller.
    if (this.#sent >= this.#end) {
      if (!this.#closed || this.#closeSent) {
        return undefined;
      }
      this.#closeSent = true;
      return create(RunInputSchema, { input: { case: "closeStdin", value: {} } });
    }
    const isFile = this.#sent < this.files;
    const value = this.#pieceAt(this.#sent);
    this.#sent += value.length;
    for (
      let first = this.#log[0];
      first && this.#begin + first.length + KEPT <= this.#sent;
      first = this.#log[0]
    ) {
      this.#begin += first.length;
      this.#log.shift();
    }
    return create(RunInputSchema, { input: { case: isFile ? "files" : "stdin", value } });
  }

  #pieceAt(offset: number): Uint8Array {
    let begin = this.#begin;
    for (const piece of this.#log) {
      if (offset < begin + piece.length) {
        return piece.subarray(offset - begin);
      }
      begin += piece.length;
    }
    throw new Error("what is not sent is in the log");
  }

  #changed(): Promise<void> {
    return new Promise((resolve) => this.#waiting.push(resolve));
  }

  #tell(): void {
    const waiting = this.#waiting;
    this.#waiting = [];
    waiting.forEach((resolve) => resolve());
  }
}
