"""Sites as an actor of the Ray engine has them: any actor, with or without a past, gives the same answer."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict

from fedward_client import ray_sites
from fedward_client.dicom.synthetic import write_phantom_sites
from fedward_common.audit import verify
from fedward_common.models import initial_weights, layout_of
from fedward_common.plan import SignedPlan, TrainingPlan
from fedward_common.weights import pack
from fedward_server.fleet import Fleet, Question
from fedward_server.local_grid import LocalGrid
from tests import messages
from tests.training_builders import a_training_plan

NAMES = ("north", "south")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("images")
    write_phantom_sites(root, NAMES, cases_per_site=40, size=16, seed=2)
    return {name: root / name for name in NAMES}


@pytest.fixture
def new_actor() -> Iterator[Any]:
    """Called: from now on, messages are answered by an actor that has met no site."""
    forget = ray_sites._app.cache_clear
    forget()
    yield forget
    forget()


def the_plan() -> TrainingPlan:
    return a_training_plan(privacy={"min_cases": 1}, participation={"deadline_s": 60})


class Federation:
    """The server's fleet, and behind it what an actor calls for each message."""

    def __init__(self, folders: dict[str, Path]) -> None:
        nodes, keys = ray_sites.open_sites(folders, threads=1, device="cpu")
        self.signed: SignedPlan = messages.signed(the_plan(), layout_of(the_plan()))
        apps: dict[str, Any] = {name: _as_app(nodes[name]) for name in nodes}
        self.grid = LocalGrid(apps, parallel=1)
        self.fleet = Fleet(self.grid, self.signed, "run", keys, threading.Event())

    def train(self, *sites: str) -> dict[str, bytes]:
        """Each site's update of the untrained model, as bytes."""
        payload = pack(initial_weights(the_plan()), self.signed.body.layout)
        answers = self.fleet.ask(sites, Question("train", 1, payload, 60.0))
        deltas = {answer.site: answer.delta for answer in answers if answer.ok}
        return {
            site: b"".join(np.asarray(each).tobytes() for each in delta.values())
            for site, delta in deltas.items()
            if delta is not None
        }


def _as_app(config: dict[str, str | int]) -> Any:
    def app(message: Message, _: Context) -> Message:
        context = Context(1, 2, {**config, "partition-id": 0}, RecordDict(), {})
        return ray_sites.serve()(message, context)

    return app


@pytest.fixture
def federation(folders: dict[str, Path]) -> Iterator[Federation]:
    federation = Federation(folders)
    yield federation
    federation.grid.close()


def test_an_actor_that_meets_a_site_in_the_middle_of_a_run_gives_the_same_signed_update(
    federation: Federation, new_actor: Any, folders: dict[str, Path]
) -> None:
    prepared = list(federation.fleet.ask(NAMES, Question("prepare", 0, None, 60.0)))
    assert {answer.site for answer in prepared if answer.ok} == set(NAMES)
    first = federation.train(*NAMES)
    new_actor()
    second = federation.train(*NAMES)

    assert set(first) == set(NAMES)
    assert first["north"] != first["south"]
    assert second == first
    # both actors wrote into one log, and its chain holds
    assert verify(folders["north"] / "home" / "audit.jsonl") >= 3


def test_what_an_actor_is_sent_is_a_name_and_no_code() -> None:
    sent = pickle.dumps(ray_sites.serve)

    assert len(sent) < 100
    assert b"fedward_client.ray_sites" in sent


def test_every_site_has_a_key_of_its_own_and_paths_do_not_depend_on_the_current_folder(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folders["north"].parent)
    nodes, keys = ray_sites.open_sites(
        {"north": Path("north"), "south": Path("south")}, threads=3, device="auto"
    )

    assert len(set(keys.values())) == 2
    assert {config["folder"] for config in nodes.values()} == {str(folders[name]) for name in NAMES}
    # Flower's node configuration takes plain values only
    assert {type(value) for config in nodes.values() for value in config.values()} == {str, int}
