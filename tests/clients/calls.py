"""Makes every call of polydev.runtime.v1 against a real shim, and prints the name of each one
that has answered as it should."""

import asyncio
import os

from polydev import Client, api, reason

USER = "python"
NAME = dict(user_id=USER, provider="anthropic")


def done(*names):
    print(*names, sep="\n", flush=True)


async def text(run, name="stdout"):
    """What a run writes, until it ends; and its end."""
    written = b""
    async for event in run:
        match event.WhichOneof("event"):
            case "stdout":
                written += event.stdout.data
            case "exited":
                return written.decode(), event.exited


async def pools(calls):
    status = await calls.GetClusterStatus(api.GetClusterStatusRequest())
    assert [node.reachable for node in status.nodes] == [True]
    listed = await calls.ListPools(api.ListPoolsRequest())
    assert [pool.provider for pool in listed.pools] == ["anthropic", "google", "openai", "python"]
    pool = await calls.GetPool(api.GetPoolRequest(provider="claude_code"))
    assert pool.pool.slots == len(pool.slots) > 0
    async for watched in calls.WatchPools(api.WatchPoolsRequest()):
        assert len(watched.pools) == 4
        break
    done("GetClusterStatus", "ListPools", "GetPool", "WatchPools")
    images = await calls.ListImages(api.ListImagesRequest())
    assert any(image.in_use for image in images.nodes[0].images)
    prune = await calls.PruneImages(api.PruneImagesRequest(all=True))
    assert not any(image.in_use for image in prune.nodes[0].images)
    done("ListImages", "PruneImages")
    async for event in calls.ScalePool(api.ScalePoolRequest(provider="google", size=0)):
        scaled = event
    assert scaled.scaled.to == 0
    async for event in calls.DrainPool(api.DrainPoolRequest(provider="google")):
        drained = event
    assert drained.HasField("drained")
    async for event in calls.ResumePool(api.ResumePoolRequest(provider="google")):
        resumed = event
    assert resumed.HasField("scaled")
    done("ScalePool", "DrainPool", "ResumePool")


async def runs(client):
    calls = client.calls
    watching = calls.WatchRuns(api.WatchRunsRequest(user_id=USER))
    await watching.read()
    stored = api.Credential(stored=api.StoredCredential())
    script = 'read line; echo "$line $SECRET"; exec sleep 300'
    argv = api.Argv(text=["sh", "-c", script])
    run = client.run(api.RunStart(**NAME, argv=argv, credential=stored, stdin=True))
    await run.write(b"line\n")
    async for event in run:
        if event.WhichOneof("event") == "stdout":
            assert event.stdout.data == b"line of the store\n"
            break
    while not any(seen.run_id == run.run_id for seen in (await watching.read()).runs):
        pass
    watching.cancel()
    shown = await calls.GetRun(api.GetRunRequest(run_id=run.run_id, user_id=USER))
    assert shown.run.state == api.RUN_STATE_RUNNING
    listed = await calls.ListRuns(api.ListRunsRequest(user_id=USER))
    assert [seen.run_id for seen in listed.runs] == [run.run_id]
    again = client.attach(api.AttachStart(run_id=run.run_id, user_id=USER))
    await run.cancel()
    written, exited = await text(again)
    assert written == "line of the store\n" and exited.reason == api.EXIT_REASON_CANCELLED
    await run.aclose()
    done("Run", "WatchRuns", "GetRun", "ListRuns", "Attach", "CancelRun")

    start = api.RunStart(**NAME, argv=api.Argv(text=["echo", "job"]))
    submitted = await calls.SubmitJob(api.SubmitJobRequest(start=start))
    job = api.AttachStart(run_id=submitted.accepted.run_id, user_id=USER)
    written, exited = await text(client.attach(job))
    assert written == "job\n" and exited.exit_code == 0
    allocated = await calls.Allocate(api.AllocateRequest(**NAME))
    lease_id = allocated.lease.lease_id
    written, _ = await text(client.run(api.RunStart(**NAME, lease_id=lease_id, argv=start.argv)))
    assert written == "job\n"
    allocated = await calls.Allocate(api.AllocateRequest(**NAME))
    await calls.Release(api.ReleaseRequest(lease_id=allocated.lease.lease_id, user_id=USER))
    done("SubmitJob", "Allocate", "Release")


async def approvals(client):
    calls = client.calls
    watching = calls.WatchApprovals(api.WatchApprovalsRequest(user_id=USER))
    assert not (await watching.read()).approvals
    run = client.run(api.RunStart(**NAME, argv=api.Argv(text=["needs-approval"])))
    required = (await anext(run)).approval_required
    assert required.reason == "ask somebody", required
    [told] = (await watching.read()).approvals
    watching.cancel()
    listed = await calls.ListApprovals(api.ListApprovalsRequest(user_id=USER))
    [waiting] = listed.approvals
    assert waiting == told and waiting.approval_id == required.approval_id
    name = dict(approval_id=required.approval_id)
    shown = await calls.GetApproval(api.GetApprovalRequest(**name))
    assert shown.approval.run.argv == ["needs-approval"]
    try:
        await calls.Approve(api.ApproveRequest(**name))
        raise AssertionError("it is their own")
    except Exception as error:
        assert reason(error) == "OWN_APPROVAL", error
    denied = await calls.Deny(api.DenyRequest(**name, comment="no"))
    assert denied.approval.state == api.APPROVAL_STATE_DENIED
    try:
        await anext(run)
        raise AssertionError("it was denied")
    except Exception as error:
        assert reason(error) == "APPROVAL_DENIED", error
    done("WatchApprovals", "ListApprovals", "GetApproval", "Approve", "Deny")


async def credentials(calls):
    secret = api.Secret(environment=api.SecretEnvironment(variables={"SECRET": "of the store"}))
    put = api.PutCredentialRequest(**NAME, credential=api.Credential(secret=secret))
    assert (await calls.PutCredential(put)).credential.version == 1
    listed = await calls.ListCredentials(api.ListCredentialsRequest(user_id=USER))
    assert [kept.kind for kept in listed.credentials] == [api.CREDENTIAL_KIND_ENVIRONMENT]
    assert (await calls.RotateCredentials(api.RotateCredentialsRequest())).left == 0
    done("PutCredential", "ListCredentials", "RotateCredentials")


async def scripts(calls):
    script = api.RunScriptRequest(user_id=USER, script="print(6 * 7)")
    result = await calls.RunScript(script)
    assert (result.status, result.stdout) == (api.SCRIPT_STATUS_SUCCESS, b"42\n"), result
    done("RunScript")


async def main():
    async with Client(os.environ["POLYDEV_ADDRESS"]) as client:
        calls = client.calls
        await pools(calls)
        await credentials(calls)
        await runs(client)
        await scripts(calls)
        await approvals(client)
        await calls.DeleteCredential(api.DeleteCredentialRequest(**NAME))
        done("DeleteCredential")
        try:
            await anext(client.run(api.RunStart(**NAME)))
            raise AssertionError("a run without a command was taken")
        except Exception as error:
            assert reason(error) == "INVALID", error


asyncio.run(main())
