"""The process of one run: `python -m fedward_server.runner`, started ahead of time and kept warm.

It imports Flower and PyTorch, then waits for one JSON line on its standard input that says which run
to execute; launching a run therefore costs no imports. A second line can stop the run; the end of the
input means that the server died, and the runner ends too, leaving the last committed round.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

os.environ.update(
    FLWR_TELEMETRY_ENABLED="0",
    FLWR_DISABLE_UPDATE_CHECK="1",
    FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION="1",
)

from fedward_common.errors import FederationError, StorageError
from fedward_common.federation import read_federation
from fedward_common.plan import parse_signed_plan
from fedward_common.state_payload import state_bytes
from fedward_common.weights import Weights, num_bytes
from fedward_server.checkpoints import Checkpoints
from fedward_server.config import ServerHome
from fedward_server.runs import RunStore

_HEARTBEAT_S = 10.0


def main() -> None:
    """Warm up, wait for the assignment, run it."""
    # what a run needs, loaded while there is nothing else to do; PyTorch makes the untrained model
    import torch  # noqa: F401

    import fedward_common.models  # noqa: F401
    import fedward_server.app
    import fedward_server.grid
    import fedward_server.reporting  # noqa: F401

    line = sys.stdin.readline()
    if not line:
        return
    stop = threading.Event()
    threading.Thread(target=_listen, args=(stop,), daemon=True, name="orders").start()
    try:
        execute(json.loads(line), stop)
    except StorageError as error:  # the end of the run cannot be recorded from here; the server will
        sys.exit(error.exit_code)


def execute(assignment: dict[str, Any], stop: threading.Event) -> None:
    """Run the assigned plan and write down how it ended.

    Args:
        assignment: run_id, flower_run_id, token, runtime_address, home, resume.
        stop: set to end the run between two looks at the mailbox.
    """
    from fedward_server.fleet import RunStoppedError

    home = ServerHome(Path(assignment["home"]))
    store = RunStore(home.runs)
    run_id = assignment["run_id"]
    try:
        store.set_status(run_id, "running")
        store.add_event(run_id, "status", {"status": "running", "reason": ""})
        selected = _run(assignment, home, store, stop)
        store.finish(run_id, "completed", "", selected)
    except RunStoppedError:
        store.finish(run_id, "stopped", "stopped by a coordinator")
    except FederationError as error:
        store.finish(run_id, "failed", f"{error.message} - {error.remedy}")
    except Exception as error:  # process edge: the run must not stay "running"
        store.finish(run_id, "failed", f"internal fault: {type(error).__name__}; see the server's log")
        raise
    finally:
        store.close()


def _run(assignment: dict[str, Any], home: ServerHome, store: RunStore, stop: threading.Event) -> int | None:
    from flwr.app import Context, RecordDict
    from flwr.supercore.task_identity import TaskIdentity

    from fedward_server.app import RunContext, server_app
    from fedward_server.reporting import result_document
    from fedward_server.rounds import RunOutcome
    from fedward_server.survey import SurveyOutcome

    run_id = assignment["run_id"]
    signed = parse_signed_plan(store.signed_plan(run_id))
    federation = read_federation(home.federation)
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = assignment["flower_run_id"], 1, 1
    outcomes: list[RunOutcome | SurveyOutcome] = []
    context = RunContext(
        run_id=run_id,
        signed=signed,
        store=store,
        checkpoints=Checkpoints(home.checkpoints(run_id)),
        signing_keys={name: entry.signing_key for name, entry in federation.sites.items()},
        initial_weights=lambda: _initial(signed),
        stop=stop,
        resume=bool(assignment["resume"]),
    )
    with _connected(assignment, max(num_bytes(signed.body.layout), state_bytes(signed.content))) as grid:
        app = server_app(context, outcomes.append)
        app(grid, Context(assignment["flower_run_id"], 1, {}, RecordDict(), {}))
    store.set_result(run_id, result_document(outcomes[0]))
    return outcomes[0].selected_round if isinstance(outcomes[0], RunOutcome) else None


def _initial(signed: Any) -> Weights:
    from fedward_common.models import initial_weights
    from fedward_common.weights import check

    weights = initial_weights(signed.plan)
    check(weights, signed.body.layout)
    return weights


@contextlib.contextmanager
def _connected(assignment: dict[str, Any], max_payload: int) -> Any:
    """Flower's own grid on the loopback listener, kept alive by task heartbeats."""
    from fedward_server.grid import open_grid

    with open_grid(
        assignment["runtime_address"],
        assignment["token"],
        assignment["flower_run_id"],
        _HEARTBEAT_S,
        max_payload=max_payload,
    ) as grid:
        yield grid


def _listen(stop: threading.Event) -> None:
    """Obey later lines; leave at once when the server is gone."""
    for line in sys.stdin:
        if json.loads(line).get("stop"):
            stop.set()
    os._exit(0)


if __name__ == "__main__":
    main()
