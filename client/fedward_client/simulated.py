"""Many sites on one machine: the same sessions and outbound door as at a hospital, without a network.

The simulation in the server package finds `SimulatedSites` by its name. Each site has its own folder; they
share as many worker processes as may train at the same time, so 100 sites need no more memory for
PyTorch than two. What a plan gate and a certificate protect at a hospital is not simulated: plans are
accepted as given and keys are made on the spot. What a site does and where it failed is in its own log,
HOME/site.log, as at a hospital; `failures` reads it for the researcher.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedward_client.config import SiteHome
from fedward_client.outbound import OutboundDoor
from fedward_client.readiness_told import forget_told
from fedward_client.session import SiteSession, SiteSettings, SiteWorker
from fedward_client.site_data import SiteData
from fedward_client.site_failures import SiteFailures
from fedward_client.worker_process import WorkerProcess
from fedward_common.audit import AuditLog
from fedward_common.envelope import Instruction, job_seed
from fedward_common.identity import new_signer
from fedward_common.logs import JsonLines
from fedward_common.plan import ReadinessPlan, SignedPlan, TrainingPlan, parse_signed_plan
from fedward_common.weights import TensorSpec

if TYPE_CHECKING:
    from flwr.clientapp import ClientApp

__all__ = ["SimulatedSites", "job_seed"]


class _OpenGate:
    """Accepts every well-formed plan: in a simulation, researcher and operator are one person."""

    def decide(self, document: bytes, run_id: str) -> SignedPlan:
        """Read the plan; whose signature it carries does not matter here."""
        del run_id
        return parse_signed_plan(document)

    def admit(self, signed: SignedPlan, instruction: Instruction) -> None:
        """Any question, any number of times."""


@dataclass(frozen=True)
class SimulatedSites:
    """Workers that are warming up, and the sites that will share them.

    Starting the workers is the first thing a simulation does: PyTorch loads while the rest is prepared.
    """

    workers: tuple[WorkerProcess, ...]

    @classmethod
    def warm_up(cls, num_workers: int) -> SimulatedSites:
        """Start `num_workers` worker processes and return at once."""
        workers = tuple(WorkerProcess() for _ in range(num_workers))
        for worker in workers:
            worker.start()
        return cls(workers)

    def untrained(self, plan: TrainingPlan) -> tuple[tuple[TensorSpec, ...], bytes]:
        """Layout and packed initial weights of the plan's model."""
        header, payload = self.workers[0].call({"op": "initial", "plan": plan.model_dump(mode="json")})
        return tuple(TensorSpec.model_validate(spec) for spec in header["layout"]), bytes(payload)

    def open_sites(
        self, folders: Mapping[str, Path], *, threads: int, device: str
    ) -> tuple[dict[str, ClientApp], dict[str, str]]:
        """Make one Flower client app per site.

        Args:
            folders: site name -> folder with `dicom/` and `labels.csv`; the site's home is inside.
            threads: CPU threads of each worker.
            device: as in a site's configuration.

        Returns:
            The apps, and the public key (hex) with which each site signs.
        """
        from fedward_client.app import client_app

        apps: dict[str, ClientApp] = {}
        keys: dict[str, str] = {}
        for index, (name, folder) in enumerate(sorted(folders.items())):
            sign, keys[name] = new_signer()
            session = simulated_session(
                simulated_settings(name, folder, threads=threads, device=device),
                sign,
                self.workers[index % len(self.workers)],
            )
            apps[name] = client_app(session)
        return apps, keys

    def failures(self, folders: Mapping[str, Path], plan: TrainingPlan | ReadinessPlan) -> SiteFailures:
        """What will have failed at which site, read from the sites' logs.

        Args:
            folders: as for `open_sites`, whichever engine runs them.
            plan: the plan that they are going to carry out.
        """
        data = {name: _data_of(folder) for name, folder in folders.items()}
        logs = {name: SiteHome(place.home).log for name, place in data.items()}
        return SiteFailures(logs, data, plan)

    def close(self) -> None:
        """End the workers; whoever still asks one is refused."""
        for worker in self.workers:
            worker.retire()


def simulated_settings(name: str, folder: Path, *, threads: int, device: str) -> SiteSettings:
    """Settings of a site whose `dicom/`, `labels.csv` and home are in `folder`."""
    return SiteSettings(name, _data_of(folder), threads, device)


def simulated_session(
    settings: SiteSettings, sign: Callable[[bytes], str], worker: SiteWorker
) -> SiteSession:
    """Make a session that accepts every plan; the site's home is made if absent."""
    home = settings.data.home
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    forget_told(home)
    door = OutboundDoor(settings.name, sign, AuditLog(home / "audit.jsonl").append)
    return SiteSession(settings, _OpenGate(), door, worker, _SiteLog(SiteHome(home).log, settings.name))


def _data_of(folder: Path) -> SiteData:
    return SiteData(folder / "home", folder / "dicom", folder / "labels.csv")


class _SiteLog:
    """Writes a site's events as the daemon's log does; opened for each line, as sites may be thousands."""

    def __init__(self, path: Path, site: str) -> None:
        self._path = path
        self._lines = JsonLines({"site": site})

    def __call__(self, event: str, **fields: Any) -> None:
        level = logging.INFO
        record = {"name": __name__, "levelno": level, "levelname": logging.getLevelName(level), "msg": event}
        line = self._lines.format(logging.makeLogRecord({**record, **fields}))
        with suppress(OSError), open(self._path, "a", encoding="utf-8", opener=_private) as file:
            file.write(line + "\n")  # a full disk must not stop a site, here as at a hospital


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
