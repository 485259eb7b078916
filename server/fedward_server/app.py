"""Composition root of the server side: a run becomes a Flower `ServerApp`.

The same app runs in the runner process of a real federation and in a simulation; only the grid differs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedward_common.errors import CheckpointError
from fedward_common.plan import ReadinessPlan, SignedPlan
from fedward_common.weights import Weights
from fedward_server.checkpoints import Checkpoints
from fedward_server.fleet import Fleet
from fedward_server.rounds import GlobalModel, RoundLoop, RunOutcome, first_model
from fedward_server.run_records import RoundRecord
from fedward_server.runs import EventKind, RunStore
from fedward_server.survey import SurveyOutcome, run_survey


@dataclass(frozen=True)
class RunContext:
    """One run: what it is, where it is recorded, and when to stop.

    Attributes:
        initial_weights: makes the untrained model; called once, off the path of a resumed run's rounds.
        signing_keys: site name -> Ed25519 public key (hex).
        resume: continue after the last round whose checkpoint is whole.
    """

    run_id: str
    signed: SignedPlan
    store: RunStore
    checkpoints: Checkpoints
    signing_keys: Mapping[str, str]
    initial_weights: Callable[[], Weights]
    stop: threading.Event
    resume: bool = False


class StoreRecorder:
    """Writes a run's traces to the run store and its models to checkpoints."""

    def __init__(self, context: RunContext) -> None:
        self._run = context

    def event(self, kind: str, fields: dict[str, Any]) -> None:
        """Append an event for whoever watches."""
        self._run.store.add_event(self._run.run_id, cast(EventKind, kind), fields)

    def commit(self, model: GlobalModel, record: RoundRecord, keep: int) -> None:
        """Write the checkpoint, then the record that makes the round count."""
        ref = self._run.checkpoints.write(
            model.round_index,
            model.values,
            model.strategy_state,
            {"plan_digest": self._run.signed.digest, "weights_digest": record.weights_digest},
            keep={keep},
        )
        named = record.model_copy(update={"checkpoint_file": ref.file, "checkpoint_sha256": ref.sha256})
        self._run.store.commit_round(self._run.run_id, named)

    def model_of(self, round_index: int) -> GlobalModel:
        """Read a committed round's model."""
        checkpoint = self._run.checkpoints.read(round_index)
        return GlobalModel(round_index, checkpoint.weights, checkpoint.strategy_state)


def server_app(context: RunContext, done: Callable[[RunOutcome | SurveyOutcome], None]) -> ServerApp:
    """A Flower app that runs the plan of `context` and hands its outcome to `done`."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, _: Context) -> None:
        fleet = Fleet(grid, context.signed, context.run_id, context.signing_keys, context.stop)
        recorder, plan = StoreRecorder(context), context.signed.content
        if isinstance(plan, ReadinessPlan):
            done(run_survey(fleet, plan, recorder.event))
            return
        loop = RoundLoop(fleet, context.signed, recorder)
        initial = context.initial_weights()
        start, history = _starting_point(context, initial)
        done(loop.run(start, initial, history))

    return app


def _starting_point(context: RunContext, initial: Weights) -> tuple[GlobalModel, list[RoundRecord]]:
    """Round 0, or the last round of which both record and checkpoint are whole."""
    if not context.resume or not (history := context.store.rounds(context.run_id)):
        return first_model(context.signed, initial), []
    checkpoint = context.checkpoints.latest_good(at_most=history[-1].round_index)
    if checkpoint is None:
        context.store.discard_rounds_after(context.run_id, 0)
        return first_model(context.signed, initial), []
    if checkpoint.record.get("plan_digest") != context.signed.digest:
        raise CheckpointError(
            f"checkpoint of round {checkpoint.round_index} belongs to another plan",
            remedy="Restore the run's own checkpoints, or launch the plan as a new run.",
        )
    context.store.discard_rounds_after(context.run_id, checkpoint.round_index)
    history = [record for record in history if record.round_index <= checkpoint.round_index]
    return GlobalModel(checkpoint.round_index, checkpoint.weights, checkpoint.strategy_state), history
