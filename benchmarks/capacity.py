"""The plan on paper: how long an archive takes, and what limits it, from measured seconds per scan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Steps:
    """Seconds of one core per scan, by step, and mean sizes of a scan's file and of its row in a store."""

    hash_s: float
    read_s: float
    preprocess_s: float
    inference_s: float
    write_s: float
    bytes: int
    row_bytes: int

    @property
    def reading_s(self) -> float:
        """All that is done before inference."""
        return self.hash_s + self.read_s + self.preprocess_s


@dataclass(frozen=True)
class Archive:
    """``gpus``: of each machine; 0 = inference on its cores, too."""

    scans: int
    machines: int
    cores: int
    gpus: int


@dataclass(frozen=True)
class Plan:
    """``hours``: by the cores, if nothing else is slower. ``bytes_per_s``: to be read from storage, all machines.

    ``gpu_budget_s``: seconds that each GPU may take per scan before it becomes the limit; None without GPUs.
    """

    hours: float
    scans_per_s: float
    bytes_per_s: float
    gpu_budget_s: float | None
    store_bytes: float


#: CT-RATE on one machine, and an archive of a large hospital group on twenty.
ARCHIVES = (Archive(50_188, 1, 16, 1), Archive(50_188, 1, 16, 0), Archive(10_000_000, 20, 16, 1),
            Archive(10_000_000, 20, 16, 0))


def plan(steps: Steps, archive: Archive) -> Plan:
    """All cores of a machine read; one for each GPU is kept for feeding it. Without GPUs they compute, too.

    Cores are taken to be as fast together as alone, which disks, memory and hyper-threads make less true.
    """
    cores = archive.cores - archive.gpus
    core_s = steps.reading_s + (0 if archive.gpus else steps.inference_s)
    scans_per_s = archive.machines * cores / core_s
    budget_s = archive.gpus * archive.machines / scans_per_s if archive.gpus else None
    return Plan(archive.scans / scans_per_s / 3600, scans_per_s, scans_per_s * steps.bytes, budget_s,
                archive.scans * steps.row_bytes)


def plan_rows(steps: Steps, archives: Sequence[Archive]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Columns and rows of a table."""
    rows = []
    for archive in archives:
        found = plan(steps, archive)
        budget = f"{found.gpu_budget_s * 1e3:.0f} ms" if found.gpu_budget_s is not None else "-"
        rows.append((f"{archive.scans:,}", str(archive.machines), str(archive.cores), str(archive.gpus),
                     f"{found.scans_per_s:.1f}", _duration(found.hours), f"{found.bytes_per_s / 1e9:.2f} GB/s", budget,
                     f"{found.store_bytes / 1e9:.1f} GB"))
    return ("scans", "machines", "cores each", "GPUs each", "scans/s", "time", "storage must give",
            "each GPU may take", "store"), rows


def _duration(hours: float) -> str:
    return f"{hours:.1f} hours" if hours < 48 else f"{hours / 24:.1f} days"
