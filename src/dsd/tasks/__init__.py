"""Datasets => Examples: manifests, the field's benchmarks, and the tasks of the procedural world."""

from dsd.tasks.benchmarks import BENCHMARKS, Benchmark, read_benchmark, read_rows
from dsd.tasks.captioned import with_hard_negatives
from dsd.tasks.manifest import read_manifest, read_table, write_manifest
from dsd.tasks.reading import LeftOut, Loaded
from dsd.tasks.splits import FalseNegative, FewShot, check_leakage, few_shot_split, find_false_negatives
from dsd.tasks.world import WORLD_TASKS, world_task

__all__ = [
    "BENCHMARKS",
    "WORLD_TASKS",
    "Benchmark",
    "FalseNegative",
    "FewShot",
    "LeftOut",
    "Loaded",
    "check_leakage",
    "few_shot_split",
    "find_false_negatives",
    "read_benchmark",
    "read_manifest",
    "read_rows",
    "read_table",
    "with_hard_negatives",
    "world_task",
    "write_manifest",
]
