"""The server as an application of Ray Serve: a front that reads requests, and replicas that draw."""

import math
import os
import time
from collections.abc import AsyncIterator
from typing import Any

from ray import serve
from ray.exceptions import OutOfMemoryError, RayActorError
from ray.serve.config import AutoscalingConfig
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle
from ray.util.metrics import Counter

from pipelines.serve.config import KEYS_VARIABLE, ServeConfig
from pipelines.serve.front import make_app
from pipelines.serve.gate import read_keys
from pipelines.serve.orders import Accepted, Event, Finished, ModelFacts, Order, Preview, Refused
from pipelines.serve.painter import SanaPainter

APPLICATION = "sana"
LOST = (RayActorError, OutOfMemoryError, ReplicaUnavailableError)
TRIES = 4
"""Replicas that are tried in turn for an order whose replica is lost: a picture is drawn anew from its seed."""
BATCHES_AHEAD = 2
"""Requests that a replica holds, in batches: one is drawn while the next one gathers."""
MOST_IN_FRONT = 100_000
"""Requests in a front: those that draw are limited by `max_waiting`, others are answered at once."""


def build_app(config: ServeConfig, *, keys_expected: bool = False, host: str = "localhost") -> serve.Application:
    """The application, for `serve.run`.

    Args:
        keys_expected: whoever starts the server has keys in the environment. A front that finds none does not start: it would
            be open to everybody.
        host: the address that the server listens on.
    """
    resources = config.resources
    at_once = BATCHES_AHEAD * config.batch_size
    painter = serve.deployment(
        name="painter",
        ray_actor_options={
            "num_cpus": resources.num_cpus,
            "num_gpus": resources.num_gpus,
            "resources": resources.custom,
        },
        max_ongoing_requests=at_once,
        max_queued_requests=math.ceil(config.max_waiting / config.fronts),  # Serve counts in each front
        autoscaling_config=AutoscalingConfig(
            min_replicas=resources.num_actors,
            max_replicas=config.max_replicas or resources.num_actors,
            target_ongoing_requests=config.batch_size,
        ),
        graceful_shutdown_timeout_s=60,
    )(SanaPainter)
    front = serve.deployment(
        name="front",
        num_replicas=config.fronts,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=MOST_IN_FRONT,
    )(Front)
    return front.bind(config, painter.bind(config), config.require_key or keys_expected, host)


@serve.ingress()
class Front:
    """Reads requests and writes answers. Raises ValueError if keys are needed, and this process has none."""

    def __init__(self, config: ServeConfig, painter: DeploymentHandle[Any], needs_keys: bool, host: str):
        self._config, self._painter = config, ServedPainter(painter, config.served_name)
        self._host = host
        self._keys = read_keys(os.environ.get(KEYS_VARIABLE, ""))
        if needs_keys and not self._keys:
            raise ValueError(f"{KEYS_VARIABLE} is empty where Ray's workers run, and keys are required: set it there")

    def __serve_build_asgi_app__(self) -> Any:
        return make_app(self._config, self._painter, self._keys, self._host)


class ServedPainter:
    """The replicas as one painter. An order whose replica is lost is given to another one; a full queue refuses."""

    def __init__(self, handle: DeploymentHandle[Any], model: str):
        self._handle = handle
        self._seconds = 1.0  # that an order took lately, with its waiting
        self._lost = Counter("sana_serve_retries", "Orders given to another replica, because theirs was lost", ("model",))
        self._full = Counter("sana_serve_refused_full", "Orders refused because too many waited", ("model",))
        for counter in (self._lost, self._full):
            counter.set_default_tags({"model": model})

    async def describe(self) -> ModelFacts | Refused:
        try:
            return await self._handle.describe.remote()
        except LOST:
            return _given_up()
        except (BackPressureError, DeploymentUnavailableError) as error:
            return self._refuse(error)

    async def draw(self, order: Order) -> list[bytes] | Refused:
        started = time.monotonic()
        for _ in range(TRIES):
            try:
                drawn = await self._handle.draw.remote(order)
            except LOST:
                self._lost.inc()
                continue
            except (BackPressureError, DeploymentUnavailableError) as error:
                return self._refuse(error)
            self._note(time.monotonic() - started)
            return drawn
        return _given_up()

    async def stream(self, order: Order) -> AsyncIterator[Event]:
        started = time.monotonic()
        finished: set[int] = set()
        accepted = False
        for _ in range(TRIES):
            try:
                events: Any = self._handle.options(stream=True).stream.remote(order)
                async for event in events:
                    repeated = isinstance(event, Finished | Preview) and event.index in finished
                    if repeated or (accepted and isinstance(event, Accepted)):
                        continue
                    accepted = True
                    if isinstance(event, Finished):
                        finished.add(event.index)
                    yield event
                self._note(time.monotonic() - started)
                return
            except LOST:
                if len(finished) == len(order.seeds):  # it was lost after its last picture
                    return
                self._lost.inc()
            except (BackPressureError, DeploymentUnavailableError) as error:
                yield self._refuse(error)
                return
        yield _given_up()

    def _note(self, seconds: float) -> None:
        self._seconds += 0.2 * (seconds - self._seconds)

    def _refuse(self, error: Exception) -> Refused:
        if not isinstance(error, BackPressureError):
            return Refused(503, "no replica of the model could be started; the server's log says why", "unavailable")
        self._full.inc()
        text = "too many requests wait already: try again later"
        return Refused(429, text, "queue_full", retry_after=max(1, math.ceil(self._seconds)))


def _given_up() -> Refused:
    return Refused(503, "the replicas that were at this were lost: try again later", "replicas_lost", retry_after=10)
