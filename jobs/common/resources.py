"""What a job's actors reserve, held against what Ray has: nothing waits for ever for a GPU that is not there."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from jobs.common.background import repeating

WAITING_SECONDS = 30.0
"""Pause between two lines about what a cluster lacks."""
SUFFICES = 1e-6


@dataclass(frozen=True)
class Need:
    """What one actor of a stage reserves. setting: the dotted name of its resources in the configuration."""

    setting: str
    reserved: Mapping[str, float]

    def lacking(self, total: Mapping[str, float]) -> dict[str, float]:
        """The resources of which `total` has too little for even one actor, and how much it has."""
        has = {name: total.get(name, 0.0) for name in self.reserved}
        return {name: has[name] for name, amount in self.reserved.items() if amount > has[name] + SUFFICES}

    def field(self, name: str) -> str:
        """The dotted name of the setting that reserves a resource."""
        known = {"GPU": "num_gpus", "CPU": "num_cpus"}
        return f"{self.setting}.{known.get(name, f'custom.{name}')}"


def find_needs(config: Any, section: str = "") -> Iterator[Need]:
    """Yield what the stages of a job's configuration reserve, at any depth. Workers that start together count together.

    Args:
        section: dotted name of the part of the configuration that is looked at; empty: all, but for the parts that a
            configuration names in `not_reserved`. They never run, or are looked at by their own section when they do.
    """
    for name in filter(None, section.split(".")):
        config = getattr(config, name)
    yield from _find_needs(config, f"{section}." if section else "")


def _find_needs(config: Any, prefix: str) -> Iterator[Need]:
    for field in fields(config):
        value, name = getattr(config, field.name), f"{prefix}{field.name}"
        if field.name in getattr(config, "not_reserved", ()):
            continue
        if field.name == "resources":
            together = getattr(config, "num_workers", 1)
            amounts = {"CPU": value.num_cpus, "GPU": value.num_gpus, **value.custom}
            yield Need(name, {key: amount * together for key, amount in amounts.items() if amount})
        elif is_dataclass(value):
            yield from _find_needs(value, f"{name}.")
        elif isinstance(value, (list, tuple)):
            for place, each in enumerate(value):
                if is_dataclass(each):
                    yield from _find_needs(each, f"{name}[{place}].")


def check_local(config: Any, section: str = "") -> None:
    """Raise ValueError if a stage reserves more than the local Ray of this process has, or ever will have.

    Nothing is raised on a cluster: nodes may come. `section` is that of `find_needs`.
    """
    if on_cluster():
        return
    import ray

    total = ray.cluster_resources()
    for need in find_needs(config, section):
        for name, has in need.lacking(total).items():
            raise ValueError(f"{need.field(name)}: {need.reserved[name]:g} {name} are reserved, {_describe_local(name, has)}")


def _describe_local(name: str, has: float) -> str:
    if name == "GPU":
        found = "Ray finds no GPU on this machine" if not has else f"this machine has {has:g}"
        return f"and {found}: set it to 0 to compute on the CPU, or run on a cluster (RAY_ADDRESS)"
    if name == "CPU":
        return f"and this machine's Ray has {has:g}: set it lower, or ray.num_cpus higher"
    return f"and a local Ray has {has:g}: leave it out, or run on a cluster (RAY_ADDRESS) whose nodes have it"


def on_cluster() -> bool:
    """Whether jobs run on a cluster that was there before, whose nodes may come and go."""
    return os.environ.get("RAY_ADDRESS", "local") not in ("", "local")


@contextmanager
def telling_what_is_awaited(config: Any, name: str, say: Callable[[str], None], section: str = "") -> Iterator[None]:
    """Within, say every WAITING_SECONDS what a stage needs and the cluster lacks now; a node that has it may yet come.

    Args:
        config: of the stage's job.
        name: of the stage.
        section: that of `find_needs`.
    """
    if not on_cluster():
        yield
        return

    def tell() -> None:
        import ray

        for told in describe_lacking(find_needs(config, section), ray.cluster_resources()):
            say(f"{name:<22} waits for {told}")

    with repeating(tell, WAITING_SECONDS, "awaited-resources"):
        yield


def describe_lacking(needs: Iterator[Need], total: Mapping[str, float]) -> Iterator[str]:
    """Say what each need lacks of what the cluster has."""
    for need in needs:
        for name, has in need.lacking(total).items():
            yield f"{need.reserved[name]:g} {name} ({need.field(name)}): the cluster's nodes have {has:g} now"
