"""Many sites on one machine: the same sessions and outbound door as at a hospital, without a network.

The simulation in the server package finds `SimulatedSites` by its name. Each site has its own folder; they
share as many worker processes as may train at the same time, so 100 sites need no more memory for
PyTorch than two. What a plan gate and a certificate protect at a hospital is not simulated: plans are
accepted as given and keys are made on the spot.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedward_client.outbound import OutboundDoor
from fedward_client.session import SiteSession, SiteSettings, SiteWorker
from fedward_client.site_data import SiteData
from fedward_client.worker_process import WorkerProcess
from fedward_common.audit import AuditLog
from fedward_common.envelope import job_seed
from fedward_common.identity import new_signer
from fedward_common.plan import SignedPlan, TrainingPlan, parse_signed_plan
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

    def admit_round(self, run_id: str, round_index: int, base_digest: str) -> None:
        """Any round, any number of times."""


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

    def close(self) -> None:
        """End the workers; whoever still asks one is refused."""
        for worker in self.workers:
            worker.retire()


def simulated_settings(name: str, folder: Path, *, threads: int, device: str) -> SiteSettings:
    """Settings of a site whose `dicom/`, `labels.csv` and home are in `folder`."""
    data = SiteData(folder / "home", folder / "dicom", folder / "labels.csv")
    return SiteSettings(name, data, threads, device)


def simulated_session(
    settings: SiteSettings, sign: Callable[[bytes], str], worker: SiteWorker
) -> SiteSession:
    """Make a session that accepts every plan; the site's home is made if absent."""
    home = settings.data.home
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    door = OutboundDoor(settings.name, sign, AuditLog(home / "audit.jsonl").append)
    return SiteSession(settings, _OpenGate(), door, worker, _say_nothing)


def _say_nothing(event: str, **fields: Any) -> None:
    """Refusals reach the researcher as numbers in the run's events."""
    del event, fields
