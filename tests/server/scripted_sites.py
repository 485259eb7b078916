"""Sites that follow a script: real Flower apps and messages, real signatures, no images and no PyTorch."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedward_common import weights
from fedward_common.envelope import Action, Instruction, Numbers, parse_instruction
from fedward_common.errors import RefusalCode
from fedward_common.identity import new_signer
from fedward_common.plan import SignedPlan
from fedward_common.protocol import Down, Up, read_down, up_content
from fedward_common.weights import Weights
from fedward_server.app import RunContext, server_app
from fedward_server.checkpoints import Checkpoints
from fedward_server.local_grid import RUN_ID, LocalGrid
from fedward_server.rounds import RunOutcome
from fedward_server.runs import RunStore
from fedward_server.survey import SurveyOutcome
from tests.messages import LAYOUT, NUM_ELEMENTS, a_state, an_answer

Script = Callable[["ScriptedSite", Instruction, Down], Up | RecordDict]
PATIENCE_S = 30.0


@dataclass
class ScriptedSite:
    """An honest site, but for what `scripts` says for some actions.

    Attributes:
        scripts: action -> what to do instead.
        num_cases: training cases.
        skill: round -> how well the model of that round tells this site's cases apart, 0 to 1.
        asked: instructions in the order of arrival.
    """

    name: str
    num_cases: int = 20
    scripts: Mapping[Action, Script] = field(default_factory=dict)
    skill: Mapping[int, float] = field(default_factory=dict)
    asked: list[Instruction] = field(default_factory=list)
    last: Up | None = None

    def __post_init__(self) -> None:
        self.sign, self.key = new_signer()

    def honest(self, instruction: Instruction, down: Down) -> Up:
        """What a site that does as it is told answers."""
        if instruction.action == "prepare":
            return an_answer(
                instruction, self.sign, site=self.name, numbers=Numbers(num_train=self.num_cases)
            )
        if instruction.action == "train":
            return self.update(instruction, delta_of(self.name, down.payload or b""))
        plan = parse_plan_of(down)
        state = a_state(plan.plan, skill=self.skill.get(instruction.round_index, 0.5))
        return an_answer(instruction, self.sign, site=self.name, payload=state, numbers=Numbers(num_cases=20))

    def update(self, instruction: Instruction, payload: bytes, **changes: Any) -> Up:
        """A signed update, whatever its payload."""
        numbers = Numbers(num_cases=self.num_cases, mean_loss=0.5)
        return an_answer(instruction, self.sign, site=self.name, payload=payload, numbers=numbers, **changes)

    def app(self) -> ClientApp:
        """The site as a Flower app."""
        app = ClientApp()

        def answer(message: Message, _: Context) -> Message:
            down = read_down(message, max_payload=4 * NUM_ELEMENTS)
            instruction = parse_instruction(down.instruction)
            self.asked.append(instruction)
            script = self.scripts.get(instruction.action)
            said = self.honest(instruction, down) if script is None else script(self, instruction, down)
            if isinstance(said, Up):
                self.last = said
            return Message(up_content(said) if isinstance(said, Up) else said, reply_to=message)

        app.query()(answer)
        app.train()(answer)
        app.evaluate()(answer)
        return app


def parse_plan_of(down: Down) -> SignedPlan:
    return SignedPlan.model_validate_json(down.signed_plan)


def delta_of(site: str, base: bytes) -> bytes:
    """A change that depends on the site and on every bit of the base model; sums of it round in float32."""
    seed = hashlib.sha256(site.encode() + base).digest()[:8]
    generator = np.random.default_rng(int.from_bytes(seed, "big"))
    return generator.normal(scale=0.3, size=NUM_ELEMENTS).clip(-1, 1).astype("<f4").tobytes()


def refuse(code: RefusalCode) -> Script:
    """Say no."""
    return lambda site, instruction, _: an_answer(instruction, site.sign, site=site.name, code=int(code))


def first_model() -> Weights:
    """The untrained model of all scripted runs."""
    return weights.unpack(np.linspace(-1, 1, NUM_ELEMENTS, dtype="<f4").tobytes(), LAYOUT)


@dataclass
class ScriptedRun:
    """A run of scripted sites through the real server app, recorded in a folder.

    Attributes:
        roster: names in the federation's roster; sites that are not among `sites` are offline.
    """

    folder: Path
    plan: SignedPlan
    sites: list[ScriptedSite]
    roster: Iterable[str] = ()
    parallel: int = 8
    stop: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.store = RunStore(self.folder / "runs.db")
        self.checkpoints = Checkpoints(self.folder / "checkpoints")
        if not self.store.runs():
            self.store.create("run-1", self.plan.to_bytes(), self.plan.digest, self.plan.plan.name)

    def execute(self, *, resume: bool = False, unblock: Callable[[], None] = lambda: None) -> RunOutcome:
        """Run to the end, in this thread; `unblock` frees sites that hang, so that their threads can end."""
        keys = {site.name: site.key for site in self.sites}
        context = RunContext(
            run_id="run-1",
            signed=self.plan,
            store=self.store,
            checkpoints=self.checkpoints,
            signing_keys={name: new_signer()[1] for name in self.roster} | keys,
            initial_weights=first_model,
            stop=self.stop,
            resume=resume,
        )
        grid = LocalGrid({site.name: site.app() for site in self.sites}, parallel=self.parallel)
        outcomes: list[RunOutcome | SurveyOutcome] = []
        try:
            server_app(context, outcomes.append)(grid, Context(RUN_ID, 1, {}, RecordDict(), {}))
        finally:
            unblock()
            grid.close()
        (outcome,) = outcomes
        assert isinstance(outcome, RunOutcome)
        return outcome

    @property
    def digests(self) -> list[str]:
        """SHA-256 of the global weights after each committed round."""
        return [record.weights_digest for record in self.store.rounds("run-1")]

    def codes(self, round_index: int) -> dict[str, int]:
        """What the record of a round says of each site."""
        (record,) = [one for one in self.store.rounds("run-1") if one.round_index == round_index]
        return {site.site: site.code for site in record.sites}

    def events(self, kind: str) -> list[dict[str, Any]]:
        """Fields of all events of a kind."""
        return [dict(event.fields) for event in self.store.events("run-1") if event.kind == kind]
