"""Datasets => Examples: manifests, and the tasks of the procedural world."""

from dsd.tasks.manifest import read_manifest, read_table, write_manifest
from dsd.tasks.world import WORLD_TASKS, world_task

__all__ = ["WORLD_TASKS", "read_manifest", "read_table", "world_task", "write_manifest"]
