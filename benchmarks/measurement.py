"""What a run has measured, and the JSON of it. What people read is in ``report.py``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.energy import Energy
from benchmarks.harness import machine
from benchmarks.harness.clock import Samples
from benchmarks.harness.compare import Row, Table
from benchmarks.registry import OURS
from benchmarks.suites.decoder import DecoderTable, padding
from benchmarks.suites.methods import MethodTable
from benchmarks.suites.pack import PackTable
from benchmarks.suites.prefill import PrefillTable
from benchmarks.suites.roofline import Ceilings
from benchmarks.suites.scaling import Point
from benchmarks.suites.training_step import Share
from benchmarks.targets import outcomes

SCHEMA = 1


@dataclass
class Record:
    """What was measured, by part; empty where a part was left out.

    Attributes:
        pool, memory: of the part ``pool``.
        no_energy: why the machine does not tell its energy.
    """

    pool: list[Table] = field(default_factory=list)
    memory: list[dict[str, Any]] = field(default_factory=list)
    methods: list[MethodTable] = field(default_factory=list)
    packing: list[PackTable] = field(default_factory=list)
    decoder: list[DecoderTable] = field(default_factory=list)
    prefill: list[PrefillTable] = field(default_factory=list)
    scaling: list[Point] = field(default_factory=list)
    ceilings: list[Ceilings] = field(default_factory=list)
    share: list[Share] = field(default_factory=list)
    energy: list[Energy] = field(default_factory=list)
    no_energy: str | None = None

    def document(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Everything, for a JSON file."""
        return {
            "schema": SCHEMA,
            "date": machine.now(),
            "commit": machine.commit(),
            "machine": machine.machine(),
            "versions": machine.versions(),
            "settings": dict(settings),
            "tables": [_table(table) for table in self.pool],
            "memory": self.memory,
            "methods": [
                {
                    "case": vars(table.case),
                    "method": table.method,
                    "dtype": table.dtype,
                    "threads": table.threads,
                    "direction": table.direction,
                    "tokens": table.tokens,
                    "samples": vars(table.disturbance),
                    "rows": _forms(table.samples),
                }
                for table in self.methods
            ],
            "packing": [
                {
                    "case": vars(table.case),
                    "dtype": table.dtype,
                    "threads": table.threads,
                    "direction": table.direction,
                    "bytes_moved": table.moved,
                    "samples": vars(table.disturbance),
                    "rows": _forms(table.samples),
                }
                for table in self.packing
            ],
            "decoder": [
                {
                    "direction": table.direction,
                    "threads": table.threads,
                    "lengths": table.sizes,
                    "padding": padding(table.sizes),
                    "peak_bytes": table.peaks,
                    "samples": vars(table.disturbance),
                    "rows": _forms(table.samples),
                }
                for table in self.decoder
            ],
            "prefill": [
                {
                    "threads": table.threads,
                    "size": vars(table.size),
                    "tokens": table.tokens,
                    "cache_bytes": table.cache,
                    "peak_bytes": table.peaks,
                    "samples": vars(table.disturbance),
                    "rows": _forms(table.samples),
                }
                for table in self.prefill
            ],
            "scaling": [{"axes": point.axes, **_table(point.table)} for point in self.scaling],
            "ceilings": [
                {
                    "threads": one.threads,
                    "read_bytes_per_second": one.read,
                    "copy_bytes_per_second": one.copy,
                    "operations_per_second": one.separate,
                    "fused_operations_per_second": one.fused,
                    "samples": vars(one.disturbance),
                }
                for one in self.ceilings
            ],
            "share": [
                {
                    "rule": one.rule,
                    "threads": one.threads,
                    "tokens_per_frame": one.tokens,
                    "step": _seconds(one.samples),
                    "busy_seconds": one.busy,
                    "reps": len(one.samples.seconds),
                    "ops": one.ops,
                    "share": one.share,
                    "samples": vars(one.disturbance),
                }
                for one in self.share
            ],
            "energy": [
                {
                    "case": one.case.name,
                    "frames": one.case.frames,
                    "dim": one.case.dim,
                    "dtype": one.dtype,
                    "threads": one.threads,
                    "joules": one.joules,
                }
                for one in self.energy
            ],
            "no_energy": self.no_energy,
            "targets": [
                {
                    "name": one.target.name,
                    "goal": one.target.goal,
                    "at_most": one.target.at_most,
                    "case": one.case,
                    "threads": one.threads,
                    "figure": one.figure,
                    "against": one.against,
                    "reached": one.reached,
                }
                for one in outcomes(self.pool)
            ],
        }


def _seconds(samples: Samples | Row) -> dict[str, float]:
    return {"median": samples.median, "p10": samples.p10, "p90": samples.p90}


def _forms(samples: Mapping[str, Samples]) -> list[dict[str, Any]]:
    return [
        {"form": name, "seconds": _seconds(sample), "reps": len(sample.seconds)}
        for name, sample in sorted(samples.items(), key=lambda item: item[1].median)
    ]


def _table(table: Table) -> dict[str, Any]:
    case = table.case
    return {
        "case": case.name,
        "sequences": len(case.lengths),
        "frames": case.frames,
        "dim": case.dim,
        "window": case.window,
        "tokens": table.tokens,
        "dtype": table.dtype,
        "threads": table.threads,
        "direction": table.direction,
        "input_buffers": table.buffers,
        "bytes_moved": table.moved,
        "samples": vars(table.disturbance),
        "rows": [_row(row, table) for row in sorted(table.rows, key=lambda row: row.median)],
        "not_timed": table.skipped,
    }


def _row(row: Row, table: Table) -> dict[str, Any]:
    ours, floor = table.row(OURS), table.row("floor, fresh")
    return {
        "contender": row.contender,
        "group": row.group,
        "seconds": _seconds(row),
        "reps": row.reps,
        "gigabytes_per_second": table.moved / row.median / 1e9,
        "multiple_of_floor": row.median / floor.median if floor else None,
        "multiple_of_fastcompress": row.median / ours.median if ours else None,
        "differing_boundaries": row.differing,
    }
