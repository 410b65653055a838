// Makes every call of polydev.runtime.v1 against a real shim, and prints the name of each one
// that has answered as it should.
import assert from "node:assert/strict";

import { api, Client, reason } from "polydev-client";

const userId = "node";
const name = { userId, provider: "anthropic" };
const client = new Client(process.env.POLYDEV_ADDRESS);
const { calls } = client;
const done = (...names) => console.log(names.join("\n"));

/** What a run writes, until it ends; and its end. */
async function text(run) {
  let written = "";
  for await (const { case: what, value } of run) {
    if (what === "stdout") {
      written += new TextDecoder().decode(value.data);
    } else if (what === "exited") {
      return [written, value];
    }
  }
}

async function last(events) {
  let last;
  for await (const { event } of events) {
    last = event.case;
  }
  return last;
}

const status = await calls.getClusterStatus({});
assert.deepEqual(status.nodes.map((node) => node.reachable), [true]);
const { pools } = await calls.listPools({});
assert.deepEqual(pools.map((pool) => pool.provider), ["anthropic", "google", "openai", "python"]);
const { pool, slots } = await calls.getPool({ provider: "claude_code" });
assert(pool.slots > 0 && pool.slots === slots.length);
for await (const watched of calls.watchPools({})) {
  assert.equal(watched.pools.length, 4);
  break;
}
done("GetClusterStatus", "ListPools", "GetPool", "WatchPools");
const listed = await calls.listImages({});
assert(listed.nodes[0].images.some((image) => image.inUse));
const prune = await calls.pruneImages({ all: true });
assert(prune.nodes[0].images.every((image) => !image.inUse));
done("ListImages", "PruneImages");
assert.equal(await last(calls.scalePool({ provider: "google", size: 0 })), "scaled");
assert.equal(await last(calls.drainPool({ provider: "google" })), "drained");
assert.equal(await last(calls.resumePool({ provider: "google" })), "scaled");
done("ScalePool", "DrainPool", "ResumePool");

const environment = { variables: { SECRET: "of the store" } };
const secret = { kind: { case: "environment", value: environment } };
const put = { ...name, credential: { source: { case: "secret", value: secret } } };
assert.equal((await calls.putCredential(put)).credential.version, 1n);
const { credentials } = await calls.listCredentials({ userId });
assert.deepEqual(credentials.map((kept) => kept.kind), [api.CredentialKind.ENVIRONMENT]);
assert.equal((await calls.rotateCredentials({})).left, 0n);
done("PutCredential", "ListCredentials", "RotateCredentials");

const watching = calls.watchRuns({ userId })[Symbol.asyncIterator]();
await watching.next();
const script = 'read line; echo "$line $SECRET"; exec sleep 300';
const run = client.run({
  ...name,
  command: { case: "argv", value: { text: ["sh", "-c", script] } },
  credential: { source: { case: "stored", value: {} } },
  stdin: true,
});
await run.write("line\n");
const events = run[Symbol.asyncIterator]();
for (let event; event?.case !== "stdout"; ) {
  event = (await events.next()).value;
  if (event.case === "stdout") {
    assert.equal(new TextDecoder().decode(event.value.data), "line of the store\n");
  }
}
for (let seen = []; !seen.some(({ runId }) => runId === run.runId); ) {
  seen = (await watching.next()).value.runs;
}
await watching.return?.();
const { run: shown } = await calls.getRun({ runId: run.runId, userId });
assert.equal(shown.state, api.RunState.RUNNING);
const { runs } = await calls.listRuns({ userId });
assert.deepEqual(runs.map(({ runId }) => runId), [run.runId]);
const again = client.attach({ runId: run.runId, userId });
await run.cancel();
const [written, exited] = await text(again);
assert.equal(written, "line of the store\n");
assert.equal(exited.reason, api.ExitReason.CANCELLED);
await events.return();
done("Run", "WatchRuns", "GetRun", "ListRuns", "Attach", "CancelRun");

const command = { case: "argv", value: { text: ["echo", "job"] } };
const { accepted } = await calls.submitJob({ start: { ...name, command } });
assert.equal((await text(client.attach({ runId: accepted.runId, userId })))[0], "job\n");
const { leaseId } = (await calls.allocate(name)).lease;
assert.equal((await text(client.run({ ...name, leaseId, command })))[0], "job\n");
await calls.release({ leaseId: (await calls.allocate(name)).lease.leaseId, userId });
done("SubmitJob", "Allocate", "Release");

const result = await calls.runScript({ userId, script: "print(6 * 7)" });
assert.equal(result.status, api.ScriptStatus.SUCCESS);
assert.equal(new TextDecoder().decode(result.stdout), "42\n");
done("RunScript");

{
  const watching = calls.watchApprovals({ userId })[Symbol.asyncIterator]();
  assert.deepEqual((await watching.next()).value.approvals, []);
  const waits = client.run({ ...name, command: { case: "argv", value: { text: ["needs-approval"] } } });
  const waiting = waits[Symbol.asyncIterator]();
  const { value: required } = (await waiting.next()).value;
  assert.equal(required.reason, "ask somebody");
  const [told] = (await watching.next()).value.approvals;
  await watching.return?.();
  const { approvals } = await calls.listApprovals({ userId });
  assert.deepEqual(approvals, [told]);
  const { approvalId } = required;
  const { approval } = await calls.getApproval({ approvalId });
  assert.deepEqual(approval.subject.value.argv, ["needs-approval"]);
  await assert.rejects(calls.approve({ approvalId }), (error) => reason(error) === "OWN_APPROVAL");
  const denied = await calls.deny({ approvalId, comment: "no" });
  assert.equal(denied.approval.state, api.ApprovalState.DENIED);
  await assert.rejects(waiting.next(), (error) => reason(error) === "APPROVAL_DENIED");
  done("WatchApprovals", "ListApprovals", "GetApproval", "Approve", "Deny");
}

await calls.deleteCredential(name);
done("DeleteCredential");
await assert.rejects(text(client.run(name)), (error) => reason(error) === "INVALID");
client.close();
