"""Figures of the replicas for Prometheus, beside Ray Serve's own: Ray exports them with `ray_` before their names.

These are counters and histograms, unlike those of jobs (`jobs/common/prometheus.py`): a server lives long, so that the first
value of a counter, which Prometheus' `increase` does not see, does not matter.
"""

from ray.util.metrics import Counter, Gauge, Histogram

SECONDS = [0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0, 120.0, 300.0]
PICTURES = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0]


class PainterMetrics:
    """Of one replica."""

    def __init__(self, model: str):
        self._pictures = Counter("sana_serve_pictures", "Pictures by what became of them", ("model", "outcome"))
        self._prompts = Counter("sana_serve_prompts", "Prompts by whether their embeddings were kept", ("model", "embedding"))
        self._seconds = Histogram("sana_serve_batch_seconds", "Drawing a batch of pictures", SECONDS, ("model",))
        self._sizes = Histogram("sana_serve_batch_pictures", "Pictures drawn together", PICTURES, ("model",))
        self._waiting = Gauge("sana_serve_waiting_pictures", "Pictures that wait in a replica", ("model",))
        for metric in (self._pictures, self._prompts, self._seconds, self._sizes, self._waiting):
            metric.set_default_tags({"model": model})

    def count_pictures(self, outcome: str, number: int) -> None:
        """outcome: drawn, abandoned, or the code of an error."""
        if number:
            self._pictures.inc(number, {"outcome": outcome})

    def count_prompts(self, kept: int, encoded: int) -> None:
        for embedding, number in (("kept", kept), ("encoded", encoded)):
            if number:
                self._prompts.inc(number, {"embedding": embedding})

    def time_batch(self, seconds: float, size: int) -> None:
        self._seconds.observe(seconds)
        self._sizes.observe(size)

    def set_waiting(self, number: int) -> None:
        self._waiting.set(number)
