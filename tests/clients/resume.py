"""A run of `cat` whose shim is killed on the way: prints `running`, waits for a line, and says
whether every byte came back."""

import asyncio
import os
import sys

from polydev import Client, api


async def main():
    data = os.urandom(3_000_000)
    argv = api.Argv(text=["cat"])
    start = api.RunStart(user_id="python", provider="anthropic", argv=argv, stdin=True)
    async with Client(os.environ["POLYDEV_ADDRESS"]) as client:
        run = client.run(start)

        async def feed():
            await run.write(data[:1_500_000])
            await asyncio.to_thread(sys.stdin.readline)
            await run.write(data[1_500_000:])
            run.close_stdin()

        feeding = asyncio.create_task(feed())
        kinds, written = [], bytearray()
        async for event in run:
            kind = event.WhichOneof("event")
            kinds.append(kind)
            if kind == "started":
                print("running", flush=True)
            elif kind == "stdout":
                written += event.stdout.data
        await feeding
        once = [kinds.count(kind) for kind in ("accepted", "started", "exited")]
        assert once == [1, 1, 1] and kinds[-1] == "exited", kinds
        assert written == data, (len(written), len(data))
        print("whole")


asyncio.run(main())
