"""The discriminator in a training: its losses, its own step, and a watch over the balance of the two."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from pipelines.train.engine.config import EngineConfig
from pipelines.train.engine.deepspeed import Engine
from pipelines.train.engine.optim import learning_rate
from pipelines.train_autoencoder.config import AdversarialConfig
from pipelines.train_autoencoder.parts import TrainableAutoencoder
from sana_model.nn.discriminator import PatchDiscriminator

LARGEST_RATIO = 1e4
"""Of the norms of gradients, for the adaptive weight (as in VQGAN)."""
WATCHED_STEPS = 200
WINS_SHARE = 0.99
"""Share of patches told apart from which on the discriminator has won."""
SMALLEST_GAP = 0.02
"""Between the mean logits of real and decoded patches, below which it tells nothing apart."""


class Adversary:
    """The discriminator of one rank, with its engine and optimizer.

    Args:
        config: its settings.
        num_steps: steps of the training.
        dtype: of the training; with fp16 the discriminator computes in fp32.
        micro_batch_size, grad_accum_steps: of the training.
        device: device to train on.
        seed: seed of its weights.
    """

    def __init__(
        self,
        config: AdversarialConfig,
        *,
        num_steps: int,
        dtype: str,
        micro_batch_size: int,
        grad_accum_steps: int,
        device: torch.device,
        seed: int,
    ):
        self.config = config
        self.num_steps = num_steps
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = PatchDiscriminator(layers=config.layers, width=config.width)
        self.engine = Engine(
            model,
            EngineConfig(zero_stage=0, dtype="bf16" if dtype == "bf16" else "fp32"),
            config.optim,
            micro_batch_size=micro_batch_size,
            grad_accum_steps=grad_accum_steps,
            device=device,
        )

    def learns(self, step: int) -> bool:
        """Whether the discriminator is trained in the step with this index, from 0."""
        return step >= self.config.start_step - self.config.warm_start_steps

    def teaches(self, step: int) -> bool:
        """Whether the autoencoder gets its loss in this step."""
        return step >= self.config.start_step

    def generator_loss(self, decoded: Tensor) -> Tensor:
        """The loss of decoded images (B, 3, H, W) that are to be held for real, (B,). The discriminator gets no gradients."""
        model = self.engine.module
        frozen = {name: weight.detach() for name, weight in model.named_parameters()}
        logits = functional_call(model, frozen, (decoded.to(self.engine.config.torch_dtype),))
        return -logits.float().flatten(1).mean(1)

    def weight(self, others: Tensor, adversarial: Tensor, decoded: Tensor, model: TrainableAutoencoder) -> Tensor:
        """The factor of the adversarial loss in this micro-batch.

        others, adversarial: the means of the other losses' sum and of this one, as computed from the decoded images.
        """
        if not self.config.adaptive:
            return torch.tensor(self.config.weight, device=others.device)
        norms = [
            model.last_gradient(torch.autograd.grad(loss, decoded, retain_graph=True)[0]).float().norm()
            for loss in (others, adversarial)
        ]
        return self.config.weight * (norms[0] / (norms[1] + 1e-4)).clamp(0.0, LARGEST_RATIO).detach()

    def backward(self, image: Tensor, decoded: Tensor) -> dict[str, Tensor]:
        """Add a micro-batch's gradients to the discriminator's. Returns measurements by name, each (B,)."""
        real, fake = self.engine(torch.cat([image, decoded.detach()])).float().flatten(1).chunk(2)
        loss = 0.5 * (F.relu(1 - real).mean(1) + F.relu(1 + fake).mean(1))
        self.engine.backward(loss.mean())
        told_apart = 0.5 * ((real > 0).float().mean(1) + (fake < 0).float().mean(1))
        measured = {"loss": loss, "real": real.mean(1), "fake": fake.mean(1), "told_apart": told_apart}
        return {f"discriminator.{name}": value.detach() for name, value in measured.items()}

    def step(self, step: int) -> float:
        """Update the discriminator in the step with this index. Returns the norm of its gradients, see `Engine.step`."""
        return self.engine.step(learning_rate(step, self.num_steps, self.config.optim))


@dataclass
class BalanceWatch:
    """Tells, once each time it happens, that the discriminator has won or has collapsed for WATCHED_STEPS steps."""

    state: str = "balanced"
    since: int = 0
    told: bool = False

    def look(self, step: int, metrics: Mapping[str, float]) -> str | None:
        """Return a message for a person, or None. `metrics`: those of the steps up to `step`."""
        if "discriminator.told_apart" not in metrics:
            return None
        gap = metrics["discriminator.real"] - metrics["discriminator.fake"]
        if metrics["discriminator.told_apart"] >= WINS_SHARE:
            state = "won"
        elif abs(gap) < SMALLEST_GAP:
            state = "collapsed"
        else:
            state = "balanced"
        if state != self.state:
            self.state, self.since, self.told = state, step, False
        if state == "balanced" or self.told or step - self.since < WATCHED_STEPS:
            return None
        self.told = True
        if state == "won":
            return (
                f"the discriminator has won: since step {self.since} it tells {metrics['discriminator.told_apart']:.0%} of the "
                "patches apart, and teaches little; lower losses.adversarial.optim.lr, or raise losses.adversarial.weight"
            )
        return (
            f"the discriminator has collapsed: since step {self.since} its logits of real and decoded patches differ by "
            f"{abs(gap):.2g} only; raise losses.adversarial.optim.lr or warm_start_steps, or lower its weight"
        )

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.state, self.since, self.told = state["state"], state["since"], state["told"]
