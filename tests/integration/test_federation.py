"""Real processes over mutual TLS: a run, its disturbances, and that nothing of them changes the result."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedward_common.errors import FederationError, RefusalCode
from fedward_common.plan import SignedPlan, parse_signed_plan
from fedward_server.run_records import Event
from tests.integration.deployment import (
    NAMES,
    SERVER,
    SITE,
    Deployment,
    a_deployment,
    a_plan_file,
    alive,
    call,
    children,
    wait_for,
)

pytestmark = pytest.mark.integration
# long enough that a process can be killed in the middle of a round
SLOW = {"local_epochs": 60, "learning_rate": 0.005}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with a_deployment(tmp_path_factory.mktemp("federation")) as deployment:
        deployment.start_server()
        for name in NAMES:
            deployment.start_site(name)
        deployment.await_sites(*NAMES)
        yield deployment


def contributed(report: dict[str, Any]) -> dict[int, set[str]]:
    """Round -> names of the sites whose updates made it."""
    return {
        each["round_index"]: {site["site"] for site in each["sites"] if site["status"] == "contributed"}
        for each in report["rounds"]
        if each["committed"] and each["round_index"] > 0
    }


def in_round(index: int) -> Any:
    def begun(event: Event) -> bool:
        return event.kind == "round_started" and event.fields["round"] == index

    return begun


def committed(index: int) -> Any:
    def done(event: Event) -> bool:
        return event.kind == "round_committed" and event.fields["round"] == index

    return done


def simulated_digests(plan: Path, images: Path, out: Path) -> dict[int, str]:
    """Digest of the global weights after each round of the same plan in a simulation."""
    call(
        *(*SERVER, "simulate", str(plan), "--sites", "3", "--data", str(images), "--out", str(out)),
        *("--threads", "1", "--json"),
    )
    return digests(json.loads((out / "report.json").read_text()))


def digests(report: dict[str, Any]) -> dict[int, str]:
    return {each["round_index"]: each["weights_digest"] for each in report["rounds"] if each["round_index"]}


def test_every_site_contributes_to_every_round_and_a_simulation_gives_the_same_bits(
    place: Deployment, tmp_path: Path
) -> None:
    plan = a_plan_file(tmp_path / "plan.toml", strategy={"name": "fedadam"})
    signed = place.sign(plan)
    place.approve(signed)
    report = place.finish(place.launch(signed))

    assert report["verdict"] == "completed"
    assert contributed(report) == {index: set(NAMES) for index in (1, 2, 3)}
    assert report["test"]["num_cases"] == sum(
        site["num_cases"] for site in report["test_sites"].values() if site
    )
    assert set(report["local_sites"]) == set(NAMES)
    assert digests(report) == simulated_digests(plan, place.root / "images", tmp_path / "simulation")


def test_a_run_waits_for_the_operator_and_goes_on_once_the_plan_is_approved(
    place: Deployment, tmp_path: Path
) -> None:
    signed = place.sign(a_plan_file(tmp_path / "plan.toml", rounds=1))
    place.approve(signed, "site-1", "site-2")
    run_id = place.launch(signed)

    def waits(event: Event) -> bool:
        return event.kind == "sites" and event.fields["waiting"] == {
            "site-3": int(RefusalCode.PLAN_NOT_APPROVED)
        }

    place.events(run_id, waits)
    digest = parse_signed_plan(signed.read_bytes()).digest
    listed = json.loads(call(*SITE, "plan", "list", "--json", "--home", str(place.home("site-3"))).stdout)
    assert [item["status"] for item in listed if item["digest"] == digest] == ["pending"]
    call(*SITE, "plan", "approve", digest, "--yes", "--home", str(place.home("site-3")))

    assert contributed(place.finish(run_id)) == {1: set(NAMES)}


def test_a_run_without_a_quorum_of_approvals_fails_and_names_the_sites(
    place: Deployment, tmp_path: Path
) -> None:
    patience = {"quorum": 2, "gather_s": 8, "deadline_s": 30}
    signed = place.sign(a_plan_file(tmp_path / "plan.toml", participation=patience))
    place.approve(signed, "site-1")
    report = place.finish(place.launch(signed))

    assert report["verdict"] == "failed"
    assert "site-2" in report["reason"]
    assert "approve" in report["reason"]
    assert {site["site"] for site in report["absent"]} == {"site-2", "site-3"}


def test_a_changed_byte_and_another_run_of_the_same_plan_are_refused(
    place: Deployment, tmp_path: Path
) -> None:
    signed = place.sign(a_plan_file(tmp_path / "plan.toml", rounds=1))
    document = signed.read_bytes()
    changed = tmp_path / "changed.signed"
    changed.write_bytes(document.replace(b'"rounds":1', b'"rounds":2'))
    for name in NAMES:
        refusal = call(
            *(*SITE, "plan", "approve", str(changed), "--yes", "--home", str(place.home(name))), code=3
        )
        assert "signature" in refusal.stderr
    with pytest.raises(FederationError, match="signature"):
        place.launch(changed)
    place.approve(signed)
    assert place.finish(place.launch(signed))["verdict"] == "completed"
    with pytest.raises(FederationError, match="already used"):
        place.launch(signed)


def test_a_killed_site_does_not_stop_the_run_and_returns_to_it(place: Deployment, tmp_path: Path) -> None:
    patience = {"quorum": 2, "deadline_s": 60, "gather_s": 60}
    plan = a_plan_file(tmp_path / "plan.toml", rounds=8, participation=patience, training=SLOW)
    signed = place.sign(plan)
    place.approve(signed)
    run_id = place.launch(signed)
    place.events(run_id, in_round(2))
    worker = children(place.processes["site-3"].pid)
    place.kill("site-3")
    wait_for(lambda: not any(alive(pid) for pid in worker), "the dead site's worker to end")
    place.events(run_id, committed(2))
    place.start_site("site-3")
    report = place.finish(run_id)

    assert report["verdict"] == "completed"
    rounds = contributed(report)
    assert sorted(rounds) == list(range(1, 9))
    assert rounds[1] == rounds[8] == set(NAMES)
    assert rounds[2] == {"site-1", "site-2"}
    absent = [site for each in report["rounds"] for site in each["sites"] if site["status"] == "missing"]
    assert {site["site"] for site in absent} == {"site-3"}
    assert all(site["reason"] for site in absent)


def test_a_site_restarted_within_the_round_still_contributes_to_it(place: Deployment, tmp_path: Path) -> None:
    plan = a_plan_file(tmp_path / "plan.toml", rounds=2, training=SLOW)
    signed = place.sign(plan)
    place.approve(signed)
    run_id = place.launch(signed)
    place.events(run_id, in_round(2))
    place.kill("site-2")
    place.start_site("site-2")
    report = place.finish(run_id)

    assert contributed(report) == {1: set(NAMES), 2: set(NAMES)}
    assert digests(report) == simulated_digests(plan, place.root / "images", tmp_path / "simulation")


def test_a_killed_server_resumes_after_the_last_committed_round_with_the_same_bits(
    place: Deployment, tmp_path: Path
) -> None:
    plan = a_plan_file(tmp_path / "plan.toml", rounds=3, training=SLOW, strategy={"name": "fedadam"})
    signed = place.sign(plan)
    place.approve(signed)
    run_id = place.launch(signed)
    place.events(run_id, in_round(2))
    runner = children(place.processes["server"].pid)
    place.kill("server")
    wait_for(lambda: not any(alive(pid) for pid in runner), "the dead server's runner to end")
    place.start_server()
    place.await_sites(*NAMES)
    with place.client() as client:
        (before,) = [run for run in client.runs() if run.run_id == run_id]
        assert (before.status, before.rounds_done) == ("interrupted", 1)
        client.resume(run_id)
    report = place.finish(run_id)

    assert report["verdict"] == "completed"
    assert contributed(report) == {index: set(NAMES) for index in (1, 2, 3)}
    assert digests(report) == simulated_digests(plan, place.root / "images", tmp_path / "simulation")


def test_stopping_a_run_ends_training_at_the_sites(place: Deployment, tmp_path: Path) -> None:
    endless = {"local_epochs": 100, "learning_rate": 0.001, "batch_size": 1}
    signed = place.sign(a_plan_file(tmp_path / "plan.toml", training=endless))
    place.approve(signed)
    run_id = place.launch(signed)
    place.events(run_id, in_round(1))
    workers = [pid for name in NAMES for pid in children(place.processes[name].pid)]
    assert workers
    with place.client() as client:
        client.stop(run_id)
    report = place.finish(run_id)

    assert report["verdict"] == "stopped"
    wait_for(lambda: not any(alive(pid) for pid in workers), "the workers to be ended")


def test_what_left_is_in_the_sites_audit_log(place: Deployment, tmp_path: Path) -> None:
    signed = place.sign(a_plan_file(tmp_path / "plan.toml", rounds=1))
    place.approve(signed)
    run_id = place.launch(signed)
    place.finish(run_id)
    shown = call(*SITE, "outbound", "show", "--run", run_id, "--json", "--home", str(place.home("site-1")))
    actions = [(entry["action"], entry["round"], entry["code"]) for entry in json.loads(shown.stdout)]

    assert actions == [
        ("prepare", 0, 0),
        ("train", 1, 0),
        ("evaluate", 1, 0),
        ("evaluate", 1, 0),
        ("baseline", 0, 0),
    ]
    layout_bytes = 4 * sum(spec.size for spec in _signed(signed).body.layout)
    assert [e["payload_bytes"] for e in json.loads(shown.stdout) if e["action"] == "train"] == [layout_bytes]


def test_sites_and_server_end_cleanly_on_sigterm(place: Deployment) -> None:
    assert place.stop("site-1") == 0
    assert place.stop("server") == 0
    place.start_server()
    place.start_site("site-1")
    place.await_sites(*NAMES)


def _signed(path: Path) -> SignedPlan:
    return parse_signed_plan(path.read_bytes())
