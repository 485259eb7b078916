"""A runner without learning, for tests of what surrounds one: speaks the real protocol, keeps real records.

The plan's description is its script: "complete" commits every round; "wait" commits one round and then
waits to be stopped; "hang" does so and ignores the stop; "die" and "killed" end without a word after one
round. A resumed run completes, whatever the script.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

from fedward_common.plan import parse_signed_plan
from fedward_server.config import ServerHome
from fedward_server.runs import RunStore
from tests.server.run_builders import a_round


def main() -> None:
    line = sys.stdin.readline()
    if not line:
        return
    order = json.loads(line)
    store = RunStore(ServerHome(Path(order["home"])).runs)
    run_id = order["run_id"]
    plan = parse_signed_plan(store.signed_plan(run_id)).plan
    script = "complete" if order["resume"] else plan.description
    store.set_status(run_id, "running")
    store.add_event(
        run_id, "status", {"status": "running", "reason": "", "pid": os.getpid(), "order": json.dumps(order)}
    )
    first = store.run(run_id).rounds_done + 1
    for index in range(first, plan.rounds + 1 if script == "complete" else first + 1):
        store.commit_round(run_id, a_round(index))
        store.add_event(run_id, "round_committed", {"round": index, "seconds": 2.5})
    if script == "complete":
        store.finish(run_id, "completed", "", plan.rounds)
    elif script == "die":
        os._exit(3)
    elif script == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    else:
        _wait(store, run_id, obey=script == "wait")


def _wait(store: RunStore, run_id: str, *, obey: bool) -> None:
    for line in sys.stdin:
        if json.loads(line).get("stop") and obey:
            store.finish(run_id, "stopped", "stopped by a coordinator")
            return
    os._exit(0)


if __name__ == "__main__":
    main()
