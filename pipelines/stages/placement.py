"""Where Ray puts actors that are to live as long as the driver."""

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


def on_this_node() -> NodeAffinitySchedulingStrategy:
    """Here: Ray puts an actor that reserves nothing on any node, and with that node it would be lost."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
