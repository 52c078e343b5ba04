"""Datasets => Examples: manifests, and the tasks of the procedural world."""

from dsd.tasks.world import WORLD_TASKS, world_task

__all__ = ["WORLD_TASKS", "world_task"]
