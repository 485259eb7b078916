"""Simulated sites: the same apps, door and audit log as at a hospital, on shared worker processes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from flwr.app import Context, RecordDict
from flwr.clientapp import ClientApp

from fedward_client.outbound_log import sent_messages
from fedward_client.simulated import SimulatedSites
from fedward_client.worker_process import WorkError
from fedward_common.envelope import Action, parse_envelope, signed_bytes
from fedward_common.errors import RefusalCode
from fedward_common.identity import verify
from fedward_common.models import initial_weights, layout_of
from fedward_common.plan import SignedPlan, canonical_bytes
from fedward_common.protocol import Down, Up, down_content, read_up
from fedward_common.weights import pack
from tests.client.site_workers import NUM_TRAIN, a_divided_site, a_small_plan
from tests.integration.deployment import alive
from tests.messages import a_message, an_instruction, signed

PLAN = a_small_plan()


@pytest.fixture(scope="module")
def sites() -> Iterator[SimulatedSites]:
    made = SimulatedSites.warm_up(1)
    yield made
    made.close()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("simulated")
    found = {}
    for name in ("south", "north"):
        a_divided_site(root / name)
        found[name] = root / name
    return found


@pytest.fixture(scope="module")
def opened(sites: SimulatedSites, folders: dict[str, Path]) -> tuple[dict[str, ClientApp], dict[str, str]]:
    return sites.open_sites(folders, threads=1, device="cpu")


def ask(app: ClientApp, plan: SignedPlan, action: Action, base: bytes | None = None) -> Up:
    instruction = an_instruction(plan, action, base=base)
    down = Down(canonical_bytes(instruction), plan.to_bytes(), base)
    message = a_message(down_content(down), {"prepare": "query", "train": "train"}.get(action, "evaluate"))
    return read_up(app(message, Context(1, 2, {}, RecordDict(), {})), max_payload=10_000_000)


def test_the_untrained_model_is_made_by_a_worker_and_is_the_plans(sites: SimulatedSites) -> None:
    layout, payload = sites.untrained(PLAN)
    assert layout == layout_of(PLAN)
    assert payload == pack(initial_weights(PLAN), layout)


def test_every_site_answers_under_its_own_name_and_key(
    sites: SimulatedSites, opened: tuple[dict[str, ClientApp], dict[str, str]]
) -> None:
    apps, keys = opened
    layout, base = sites.untrained(PLAN)
    plan = signed(PLAN, layout)
    assert sorted(apps) == sorted(keys) == ["north", "south"]
    payloads = set()
    for name, app in apps.items():
        assert parse_envelope(ask(app, plan, "prepare").envelope).numbers.num_train == NUM_TRAIN
        up = ask(app, plan, "train", base)
        assert verify(keys[name], signed_bytes(up.envelope), up.signature)
        assert parse_envelope(up.envelope).site == name
        payloads.add(up.payload)
    assert len(payloads) == 2
    assert keys["north"] != keys["south"]


def test_what_a_simulated_site_sends_is_in_its_own_audit_log(
    sites: SimulatedSites,
    opened: tuple[dict[str, ClientApp], dict[str, str]],
    folders: dict[str, Path],
) -> None:
    layout, base = sites.untrained(PLAN)
    audit = folders["north"] / "home" / "audit.jsonl"
    before = len(sent_messages(audit, run_id=None, round_index=None)) if audit.exists() else 0
    ask(opened[0]["north"], signed(PLAN, layout), "evaluate", base)
    assert len(sent_messages(audit, run_id=None, round_index=None)) == before + 1


def test_the_result_does_not_depend_on_how_many_workers_share_the_sites(
    sites: SimulatedSites,
    opened: tuple[dict[str, ClientApp], dict[str, str]],
    folders: dict[str, Path],
) -> None:
    layout, base = sites.untrained(PLAN)
    plan = signed(PLAN, layout)
    two = SimulatedSites.warm_up(2)
    try:
        apps, _ = two.open_sites(folders, threads=1, device="cpu")
        for name in ("north", "south"):
            for action in ("train", "evaluate", "baseline"):
                assert (
                    ask(apps[name], plan, action, base).payload
                    == ask(opened[0][name], plan, action, base).payload
                )
    finally:
        two.close()


def test_closed_sites_have_no_process_and_refuse_as_cancelled(folders: dict[str, Path]) -> None:
    sites = SimulatedSites.warm_up(2)
    pids = [worker.pid for worker in sites.workers]
    apps, _ = sites.open_sites(folders, threads=1, device="cpu")
    sites.close()
    assert not any(alive(pid) for pid in pids if pid is not None)
    assert None not in pids
    up = ask(apps["north"], signed(PLAN), "prepare")
    assert parse_envelope(up.envelope).code == RefusalCode.CANCELLED
    with pytest.raises(WorkError):
        sites.untrained(PLAN)
    assert [worker.pid for worker in sites.workers] == [None, None]
