"""From encoded captions to latents: the steps of a drawing between the text encoder and the decoder."""

from collections.abc import Callable

from torch import Tensor, nn

from sana_model.arguments import whole_number
from sana_model.guidance import Caption, embedded_guidance_velocity, guided_velocity
from sana_model.nn.controlnet import Control
from sana_model.nn.finite import check_finite
from sana_model.nn.transformer import SanaTransformer
from sana_model.offload import bring
from sana_model.pictures import StartLatents
from sana_model.solver import SCM, SOLVERS, OnEstimate, OnStep, PredictVelocity, make_solver, watch_estimates


def choose_solver(
    solver: str | None,
    num_steps: int | None,
    negative_prompt: str | None,
    guidance_interval: tuple[float, float],
    *,
    sprints: bool,
) -> tuple[str, int]:
    """The solver and its number of steps; None stands for the model's own. `sprints`: the model is Sana-Sprint.

    Raises ValueError for what the model cannot take.
    """
    solver = solver or (SCM if sprints else "flow_dpm_solver")
    num_steps = (2 if sprints else 20) if num_steps is None else num_steps
    if solver not in ((SCM,) if sprints else SOLVERS):
        choices = "its own is scm" if sprints else f"choose one of {', '.join(SOLVERS)}"
        raise ValueError(f"unknown solver {solver!r} for this model: {choices}")
    if sprints and (negative_prompt or tuple(guidance_interval) != (0.0, 1.0)):
        raise ValueError("Sana-Sprint guides within the model: it takes neither a negative_prompt nor a guidance_interval")
    return solver, whole_number("num_steps", num_steps)


def draw_latents(
    transformer: SanaTransformer,
    captions: Caption,
    null: Caption | None,
    draw_noise: Callable[[], Tensor],
    *,
    solver: str,
    num_steps: int,
    flow_shift: float,
    guidance_scale: float,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    control: Control | None = None,
    start: StartLatents | None = None,
    on_step: OnStep | None = None,
    on_estimate: OnEstimate | None = None,
) -> Tensor:
    """Draw scaled latents (B, C, h, w) of B captions, for `decode_pictures`.

    Args:
        captions, null: as `TextToImage.encode_prompts` and `encode_null` return them.
        draw_noise: returns new noise (B, C, h, w) at each call, see `flow.noise_source`.
        solver, num_steps: see `choose_solver`.
        control: what steers the drawings. start: pictures that they start from.
        on_estimate: see `watch_estimates`. The other arguments are those of `TextToImage`.

    Raises ValueError for num_steps below 1 and a bad guidance_interval; NotFiniteError if the transformer gives values that are
    not finite.
    """
    parts = (transformer, *([control.controlnet] if control else []))
    bring(*parts)
    latents = draw_noise()
    if null is None:
        predict_velocity = embedded_guidance_velocity(transformer, captions, guidance_scale, control)
    else:
        predict_velocity = guided_velocity(
            transformer,
            captions,
            null,
            guidance_scale=guidance_scale,
            guidance_interval=guidance_interval,
            control=control,
        )
    predict_velocity = _brought(predict_velocity, parts)
    if on_estimate is not None:
        predict_velocity = watch_estimates(predict_velocity, on_estimate)
    solve, sigmas = make_solver(solver, num_steps, flow_shift, draw_noise)
    if start is not None:
        predict_velocity, latents, sigmas = start.begin(predict_velocity, latents, sigmas)
    drawn = solve(predict_velocity, latents, sigmas, on_step=on_step)
    hint = f"lower guidance_scale={guidance_scale:g}" + (f" or control_scale={control.scale:g}" if control else "")
    check_finite(drawn, transformer, "transformer", hint=hint)
    return drawn


def _brought(predict_velocity: PredictVelocity, parts: tuple[nn.Module, ...]) -> PredictVelocity:
    """Have the parts on their device at each prediction: a callback that decodes may have taken them away since the last."""

    def predict(latents: Tensor, sigma: Tensor) -> Tensor:
        bring(*parts)
        return predict_velocity(latents, sigma)

    return predict
