"""Many sites on one machine: the same server app and client app as a real federation, no network.

As many sites train at the same time as there are processor cores; each uses its share of threads, so that
the result has the same bits as that of real processes given the same share. The client's side is found by
name, as the two packages do not import each other.
"""

from __future__ import annotations

import os
import secrets
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fedward_common.console import complain, say
from fedward_common.errors import FederationError, PlanError, RunFailedError, UsageError
from fedward_common.home_lock import lock_home
from fedward_common.plan import (
    PlanBody,
    ReadinessPlan,
    SignedPlan,
    TrainingPlan,
    canonical_bytes,
    check_names,
)
from fedward_common.weights import Layout, unpack

if TYPE_CHECKING:
    from fedward_server.run_records import RunStatus
    from fedward_server.simulated_failures import Failures

Engine = Literal["local", "ray"]
Plan = TrainingPlan | ReadinessPlan
_DEADLINE_S = 86400.0


@dataclass(frozen=True)
class SimulationSettings:
    """How to simulate.

    Attributes:
        out: folder for the run's record, checkpoints and report.
        folders: site name -> folder with `dicom/` and `labels.csv`.
        workers: sites that train at the same time; 0 is one per core.
        threads: CPU threads per worker; 0 shares the cores among the workers.
        engine: "local" is processes of our own; "ray" is Flower's engine, here or on the cluster that
            RAY_ADDRESS names.
    """

    out: Path
    folders: Mapping[str, Path]
    workers: int = 0
    threads: int = 0
    device: str = "auto"
    engine: Engine = "local"


def simulate(
    plan: Plan,
    *,
    num_sites: int,
    data: Path | None,
    out: Path,
    workers: int = 0,
    threads: int = 0,
    device: str = "auto",
    engine: Engine = "local",
    json_lines: bool = False,
) -> RunStatus:
    """Run a plan with `num_sites` sites on this machine; show its events and result; write its report.

    Args:
        plan: an unsigned plan.
        num_sites: how many sites.
        data: see `site_folders.prepare_folders`.
        out: folder for images, models, records and report.
        workers, threads, device, engine: see `SimulationSettings`.
        json_lines: print each event as a line of JSON.

    Returns:
        The run's status.

    Raises:
        UsageError: another simulation writes to `out`, the images cannot be used, or the engine is not
            installed.
        PlanError: the plan needs more sites than there are, or names something unknown here.
        NotReadyError: the plan is a readiness plan, and the sites are not ready.
    """
    _check_quorum(plan, num_sites)
    _check_engine(engine)  # before anything is made
    lock = _only_simulation(out)
    simulation = Simulation(num_sites, workers=workers, threads=threads, engine=engine)
    try:
        kind, folders = _folders(plan, num_sites, data, out)
        if not json_lines:
            say(f"{num_sites} simulated sites: {kind}")
        settings = SimulationSettings(out, folders, workers, threads, device, engine)
        return _run_and_report(simulation, plan, settings, kind, json_lines)
    finally:
        simulation.close()
        os.close(lock)


def _check_engine(engine: Engine) -> None:
    """Raise UsageError for an engine that is not installed."""
    if engine == "ray":
        from fedward_server.ray_session import require_ray

        require_ray()


def _run_and_report(
    simulation: Simulation, plan: Plan, settings: SimulationSettings, kind: str, json_lines: bool
) -> RunStatus:
    """Show a run while it goes and its result at the end, unless only events are wanted; its status."""
    from fedward_server.console import show_result
    from fedward_server.following import follow
    from fedward_server.reports import expect_go, write_any_report
    from fedward_server.simulated_failures import tell_failures
    from fedward_server.watch import watch

    failures = simulation.failures(plan, settings)
    run = simulation.launch(plan, settings)
    try:
        events = follow(run.store, run.run_id, stop=threading.Event(), poll_s=0.05)
        told = tell_failures(events, failures, as_json=json_lines)
        status = watch(told, plan=run.signed.content, json_lines=json_lines)
        run.join()
        report, page = write_any_report(run.store, run.run_id, settings.out, data_note=kind)
    finally:
        run.stop.set()  # of no effect after the end; after Ctrl-C, the sites that wait are not begun
    if not json_lines:
        show_result(report)
        say(f"Report: {page}")
    if status == "completed":
        expect_go(report)
    return status


def _only_simulation(out: Path) -> int:
    """Lock the folder against a second simulation, which would mix up its images, models and records."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{out}: {error.strerror}", remedy="Give another folder with --out.") from error
    return lock_home(
        out / "simulation.lock",
        holder=f"another simulation writes to {out}",
        remedy="Wait for its end, or give another folder with --out.",
    )


def _folders(plan: Plan, num_sites: int, data: Path | None, out: Path) -> tuple[str, Mapping[str, Path]]:
    """What the images are, in a phrase, and each site's folder."""
    from fedward_server.site_folders import prepare_folders, site_names

    if plan.data.dataset == "dicom_folder":
        seed = plan.seed if isinstance(plan, TrainingPlan) else plan.data.split_seed
        prepared = prepare_folders(data, out / "sites", site_names(num_sites), seed=seed)
        return prepared.kind, prepared.folders
    return f"dataset {plan.data.dataset}", {name: out / "sites" / name for name in site_names(num_sites)}


class Simulation:
    """A simulation whose workers are already loading PyTorch while the rest is prepared."""

    def __init__(
        self, num_sites: int, *, workers: int = 0, threads: int = 0, engine: Engine = "local"
    ) -> None:
        """Start the workers and return at once.

        Args:
            num_sites: sites to come; no more workers than that are started.
            workers, threads, engine: see `SimulationSettings`. With Ray, one worker makes the untrained
                model; Ray's own processes come with the run.

        Raises:
            UsageError: the engine is not installed.
        """
        _check_engine(engine)
        self.cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.num_workers = min(num_sites, workers or self.cores)
        self.threads = threads or max(1, self.cores // self.num_workers)
        os.environ.setdefault("OMP_NUM_THREADS", str(self.threads))
        sites = import_module("fedward_client.simulated").SimulatedSites
        self._sites = sites.warm_up(self.num_workers if engine == "local" else 1)
        self._grid: Any = None

    def close(self) -> None:
        """End the workers, and what else the engine started."""
        self._sites.close()
        if self._grid is not None:
            self._grid.close()

    def failures(self, plan: Plan, settings: SimulationSettings) -> Failures:
        """What will have failed at which site from now on, as the sites write it down."""
        found: Failures = self._sites.failures(settings.folders, plan)
        return found

    def launch(self, plan: Plan, settings: SimulationSettings) -> SimulatedRun:
        """Start the run in a thread; its events appear in the run's record.

        Raises:
            PlanError: the plan needs more sites than there are, or names something unknown here.
        """
        _check_quorum(plan, len(settings.folders))
        self._grid, keys = self._connect(settings)
        layout, payload = self._untrained(plan)
        if settings.engine == "ray":
            self._sites.close()
        return SimulatedRun(self._grid, keys, _signed(plan, layout), unpack(payload, layout), settings)

    def _untrained(self, plan: Plan) -> tuple[Layout, bytes]:
        """Layout and packed weights of the untrained model; nothing for a plan without a model."""
        if isinstance(plan, ReadinessPlan):
            check_names(plan)
            return (), b""
        try:
            layout, payload = self._sites.untrained(plan)
        except FederationError:
            from fedward_common.models import layout_of

            check_names(plan)  # these say in words what the worker says with a number
            layout_of(plan)
            raise
        return layout, payload

    def _connect(self, settings: SimulationSettings) -> tuple[Any, dict[str, str]]:
        """Flower's grid with every site behind it, and the key with which each of them signs."""
        if settings.engine == "ray":
            from fedward_server.ray_engine import start_ray_sites

            return start_ray_sites(
                settings.folders,
                workers=settings.workers,
                cores=self.cores,
                threads=self.threads,
                device=settings.device,
            )
        from fedward_server.local_grid import LocalGrid

        apps, keys = self._sites.open_sites(settings.folders, threads=self.threads, device=settings.device)
        return LocalGrid(apps, parallel=min(64, len(apps))), keys


class SimulatedRun:
    """One run in progress."""

    def __init__(
        self,
        grid: Any,
        keys: Mapping[str, str],
        signed: SignedPlan,
        initial: Any,
        settings: SimulationSettings,
    ) -> None:
        from fedward_server.runs import RunStore

        self.run_id = secrets.token_hex(8)
        self.signed = signed
        self._settings = settings
        settings.out.mkdir(parents=True, exist_ok=True)
        self.store = RunStore(settings.out / "runs.db")
        self.store.create(self.run_id, signed.to_bytes(), signed.digest, signed.content.name)
        self.stop = threading.Event()
        self._grid, self._keys = grid, keys
        self._initial = initial
        self._thread = threading.Thread(target=self._run, daemon=True, name="serverapp")
        self._thread.start()

    def join(self) -> None:
        """Wait for the end of the run, however it ends."""
        self._thread.join()

    def _run(self) -> None:
        from fedward_server.fleet import RunStoppedError
        from fedward_server.reporting import result_document
        from fedward_server.rounds import RunOutcome

        try:
            self.store.set_status(self.run_id, "running")
            self.store.add_event(self.run_id, "status", {"status": "running", "reason": ""})
            outcome = self._execute()
            self.store.set_result(self.run_id, result_document(outcome))
            chosen = outcome.selected_round if isinstance(outcome, RunOutcome) else None
            self.store.finish(self.run_id, "completed", "", chosen)
        except RunStoppedError:
            self.store.finish(self.run_id, "stopped", "stopped")
        except (RunFailedError, PlanError) as error:  # they name sites and keys of the plan, nothing else
            self.store.finish(self.run_id, "failed", f"{error.message} - {error.remedy}")
        except FederationError as error:
            complain(error, as_json=False)  # may name a file, which a report must not
            self.store.finish(self.run_id, "failed", f"{type(error).__name__}; see what was printed")
        except Exception as error:  # thread edge: whoever follows the events must see an end
            self.store.finish(self.run_id, "failed", f"internal fault: {type(error).__name__}")
            raise

    def _execute(self) -> Any:
        from flwr.app import Context, RecordDict

        from fedward_server.app import RunContext, server_app
        from fedward_server.checkpoints import Checkpoints
        from fedward_server.local_grid import RUN_ID

        outcomes: list[Any] = []
        context = RunContext(
            run_id=self.run_id,
            signed=self.signed,
            store=self.store,
            checkpoints=Checkpoints(self._settings.out / "checkpoints" / self.run_id),
            signing_keys=self._keys,
            initial_weights=lambda: self._initial,
            stop=self.stop,
        )
        try:
            server_app(context, outcomes.append)(self._grid, Context(RUN_ID, 1, {}, RecordDict(), {}))
        finally:
            self._grid.close()
        return outcomes[0]


def _check_quorum(plan: Plan, num_sites: int) -> None:
    if plan.participation.quorum > num_sites:
        raise PlanError(
            f"the plan's quorum is {plan.participation.quorum}, there are {num_sites} sites",
            remedy="Simulate more sites with --sites, or lower participation.quorum.",
        )


def _signed(plan: Plan, layout: Layout) -> SignedPlan:
    """Give the plan the form of a signed one; in a simulation nobody checks who signed."""
    expires = plan.expires or datetime.now(UTC) + timedelta(seconds=_DEADLINE_S)
    document = plan.model_copy(
        update={"expires": expires, "federation_id": plan.federation_id or "simulation"}
    )
    body = PlanBody(
        plan=type(plan).model_validate(document.model_dump()),
        layout=layout,
        nonce=secrets.token_hex(16),
        signed_at=datetime.now(UTC),
    )
    assert canonical_bytes(body)
    return SignedPlan(body=body, signer="simulation", signature="0" * 128)
