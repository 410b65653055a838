// A run of `cat` whose shim is killed on the way: prints `running`, waits for a line, and says
// whether every byte came back.
import assert from "node:assert/strict";
import { randomBytes } from "node:crypto";
import { once } from "node:events";

import { Client } from "polydev-client";

const data = randomBytes(3_000_000);
const client = new Client(process.env.POLYDEV_ADDRESS);
const command = { case: "argv", value: { text: ["cat"] } };
const run = client.run({ userId: "node", provider: "anthropic", command, stdin: true });

async function feed() {
  await run.write(data.subarray(0, 1_500_000));
  await once(process.stdin, "data");
  await run.write(data.subarray(1_500_000));
  run.closeStdin();
}

const feeding = feed();
const kinds = [];
const written = [];
for await (const { case: kind, value } of run) {
  kinds.push(kind);
  if (kind === "started") {
    console.log("running");
  } else if (kind === "stdout") {
    written.push(value.data);
  }
}
await feeding;
const times = (kind) => kinds.filter((seen) => seen === kind).length;
assert.deepEqual(["accepted", "started", "exited"].map(times), [1, 1, 1]);
assert.equal(kinds.at(-1), "exited");
assert(data.equals(Buffer.concat(written)));
console.log("whole");
client.close();
process.stdin.destroy();
