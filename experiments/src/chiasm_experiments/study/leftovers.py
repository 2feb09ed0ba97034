"""What a driver makes in the cluster, and what one that was killed has left there.

Ray ends the actors of a driver with it. Placement groups of Ray Train have no name, and some were seen to stay: they
are known by the job that made them, and the jobs of a study by marks in the cluster's own store.
"""

from __future__ import annotations

import secrets

import ray
from ray.experimental import internal_kv
from ray.util import list_named_actors
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

NAMESPACE = "chiasm"


class Traces:
    """The marks of one driver.

    Args:
        study: its name.
    """

    namespace = NAMESPACE

    def __init__(self, study: str) -> None:
        self.study = study
        self.job = ray.get_runtime_context().get_job_id()
        self.name = f"{study}/{self.job}-{secrets.token_hex(4)}"
        self.hub = f"{self.name}/hub"
        self._mark = f"{NAMESPACE}/{self.name}"
        self._before = set(_groups())
        internal_kv._internal_kv_put(self._mark, self.job)

    def clear(self) -> list[str]:
        """Removes what drivers of the study that no longer live have left; in words, what that was."""
        actors = {item["name"] for item in list_named_actors(all_namespaces=True) if item["namespace"] == NAMESPACE}
        marks = {mark.decode(): mark.decode().removeprefix(f"{NAMESPACE}/") for mark in self._marks()}
        removed = []
        for mark, name in marks.items():
            if f"{name}/hub" in actors or mark == self._mark:
                continue
            for actor in sorted(actor for actor in actors if actor.startswith(f"{name}/")):
                ray.kill(ray.get_actor(actor, NAMESPACE))
                removed.append(f"actor {actor}")
            job = name.rpartition("/")[2].partition("-")[0]
            if job != self.job:
                removed += _remove({group for group in _groups() if group.endswith(job)})
            internal_kv._internal_kv_del(mark)
        return removed

    def forget(self) -> None:
        """Removes what this driver has left, and its mark."""
        _remove({group for group in _groups() if group.endswith(self.job)} - self._before)
        internal_kv._internal_kv_del(self._mark)

    def _marks(self) -> list[bytes]:
        found: list[bytes] = internal_kv._internal_kv_list(f"{NAMESPACE}/{self.study}/")
        return found


def _groups() -> list[str]:
    """The ids of all placement groups that have no name and are not removed."""
    table = placement_group_table()
    return [key for key, group in table.items() if not group["name"] and group["state"] != "REMOVED"]


def _remove(groups: set[str]) -> list[str]:
    for group in groups:
        remove_placement_group(PlacementGroup(ray.PlacementGroupID.from_hex(group)))
    return [f"placement group {group}" for group in sorted(groups)]
