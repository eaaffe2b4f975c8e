"""The benchmarks, each with a small configuration: what they measure, and that they print it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from jobs.benchmark import model
from jobs.benchmark.__main__ import main
from jobs.benchmark.fitting import layer_sqnr
from jobs.benchmark.inputs import SPRINT_FIELDS
from jobs.benchmark.model import make_transformers
from jobs.benchmark.solver import STEPS, mixture_errors
from jobs.benchmark.tiling import peaks_mib
from jobs.benchmark.timing import count_flops
from jobs.benchmark.variants import controlnet_sampling, make_controlnets, sprint_sampling
from pipelines.shapes.drawing import draw_row
from sana_model.files.checkpoint import export
from sana_model.files.key_maps import CONTROLNET_DIFFUSERS, diffusers_names
from sana_model.kernels.linear import Linear
from sana_model.nn.transformer import SanaTransformer
from tests.support.peers import TINY, assert_close, scramble


def test_flow_dpm_solver_needs_fewer_steps_than_euler_on_a_gaussian_mixture():
    """Sana's claim (14-20 steps where flow-Euler needs 28-50) where the velocity is exact."""
    errors = mixture_errors()
    dpm, euler = errors["flow_dpm_solver"], errors["flow_euler"]
    for row in (dpm, euler):
        assert sorted(row.values(), reverse=True) == list(row.values()), "more steps must be closer"
    assert all(dpm[n] < euler[n] for n in STEPS)
    assert dpm[14] < euler[28] and dpm[20] < euler[28] and dpm[20] < euler[50]


@pytest.mark.parametrize("what", ["encode", "decode"])
def test_memory_in_tiles_is_bounded_by_the_tile(what):
    """Four times the pixels: in one piece the peak grows as many times, in tiles by little more than the image itself."""
    runs = [(size, tile) for size in (384, 768) for tile in (128, None)]
    peaks = dict(zip(runs, peaks_mib(what, runs, "tiny", "float32"), strict=True))
    image_mib = 3 * 768**2 * 4 / 2**20
    assert peaks[768, None] > 3 * peaks[384, None]
    assert peaks[768, 128] < peaks[384, 128] + 2 * image_mib
    assert peaks[768, 128] < peaks[768, None] / 4


def test_operations_are_counted_whoever_multiplies():
    x = torch.randn(6, 192)
    for layer in (torch.nn.Linear(192, 160), Linear(192, 160)):
        with torch.no_grad():
            assert count_flops(lambda layer=layer: layer(x)) == 2 * 6 * 192 * 160


def test_more_bits_leave_less_noise_in_every_class_of_layers():
    model = scramble(SanaTransformer(TINY))
    inputs = torch.randn(1, TINY.in_channels, 4, 4), torch.tensor([500.0]), torch.randn(1, 3, TINY.caption_dim)
    table = layer_sqnr(model, lambda: model(*inputs))
    projections = {"attention.qkv", "attention.proj", "cross_attention.query", "cross_attention.proj"}
    assert set(table) == projections | {"ffn.expand", "ffn.project"}
    assert all(found["int8"] > found["w8a8"] > 30 > found["int4"] > 15 for found in table.values())


def run_benchmark(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    """Run `python -m jobs.benchmark` in this process, which has loaded what it needs; return the lines that it prints."""
    assert main(arguments) == 0
    return capsys.readouterr().out.splitlines()


def test_solver_command_prints_the_table(capsys: pytest.CaptureFixture[str]):
    rows = {line.split()[0]: line.split()[1:] for line in run_benchmark(capsys, "solver")[1:]}
    assert rows["steps"] == [str(n) for n in STEPS] and len(rows["flow_dpm_solver"]) == len(STEPS)


@pytest.mark.slow
def test_model_command_prints_a_ratio_for_every_part(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(model, "NUM_STEPS", 3)
    options = [
        "--depth=1",
        "--text_depth=1",
        "--sizes=[128]",
        "--dtypes=[float32]",
        "--autoencoder_size=64",
        "--captions=2",
        "--repeats=1",
    ]
    table = run_benchmark(capsys, "model", *options)[-9:]
    parts = [f"transformer {part}" for part in ("forward", "training", "sampling")]
    for part in (*parts, "Sprint 2 steps", "ControlNet sampling", "DC-AE encode", "DC-AE decode", "text"):
        assert any(line.strip().startswith(part) and "x  " in line for line in table), (part, table)


def test_both_ways_give_the_same_latents_for_sprint_and_controlnet():
    """From the same weights and noise; a ratio of two different works would say nothing."""
    for part in ("sprint", "controlnet"):
        fields = SPRINT_FIELDS if part == "sprint" else {"time_input": "whole"}
        ours, peer = make_transformers(torch.device("cpu"), torch.float32, 2, **fields)
        peer.load_state_dict(export(scramble(ours).state_dict(), diffusers_names(ours.config)))
        latents, captions = torch.randn(2, 32, 2, 2), (torch.randn(2, 5, 2304), torch.ones(2, 5))
        if part == "sprint":
            pair = sprint_sampling(ours, peer, latents, captions, 4.5)
        else:
            controlnets = make_controlnets(ours, peer)
            controlnets[1].load_state_dict(export(scramble(controlnets[0], 1).state_dict(), CONTROLNET_DIFFUSERS))
            null = (torch.randn(1, 5, 2304).expand(2, -1, -1), (torch.arange(5) < 1).float().expand(2, -1))
            settings = {"num_steps": 3, "guidance_scale": 4.5, "flow_shift": 3.0}
            pair = controlnet_sampling((ours, peer), controlnets, latents, captions, null, **settings)
        drawn = []
        for run in pair:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                drawn.append(run())
        assert_close(*drawn)


def test_train_command_prints_images_per_second_both_ways(capsys: pytest.CaptureFixture[str]):
    lines = run_benchmark(
        capsys, "train", "--depth=1", "--text_depth=1", "--sizes=[64]", "--dtype=float32", "--batch_size=1", "--repeats=1"
    )
    rows = {line[:28].strip(): line[28:].split() for line in lines[lines.index("64 px") :]}
    for part in ("DC-AE encodes images", "text encoder", "transformer and optimizer"):
        assert len(rows[part]) in (4, 5), rows
    for step in ("step as measured", "step at full depth"):
        assert rows[step][-1] == "images/s" and float(rows[step][4].rstrip("x")) > 1, rows


def test_stage_command_prints_the_ratio_and_the_memory(local_ray: None, capsys: pytest.CaptureFixture[str]):
    lines = run_benchmark(capsys, "stage", "--rows=60", "--ms_per_row=1", "--rows_per_shard=20", "--memory_rows=[50, 100]")
    ratio = r"60 rows, 1 ms each: bare loop \d+\.\d s, stage \d+\.\d s, ratio \d+\.\d%"
    assert any(re.fullmatch(ratio, line) for line in lines), lines
    rows = [line.split() for line in lines[-2:]]
    assert [row[0] for row in rows] == ["50", "100"]
    assert all(int(figure) > 0 for row in rows for figure in row[3:5]), "memory of driver and workers"


def test_judging_command_prints_the_ratio_to_the_bare_loop_of_each_metric(capsys: pytest.CaptureFixture[str]):
    lines = run_benchmark(capsys, "judging", "--num_pictures=3", "--side=64", "--repeats=1", "--metrics=[clip_score,shapes]")
    rows = {line.split()[0]: line.split()[1:] for line in lines[2:4]}
    assert rows.keys() == {"clip_score", "shapes"}
    assert all(len(row) == 6 and float(row[0]) > 0 and row[-1].endswith("%") for row in rows.values()), rows


def test_duplicates_command_prints_recall_and_what_changed_pictures_are_found(
    tmp_path: Path, local_ray: None, capsys: pytest.CaptureFixture[str]
):
    for index in range(2):
        Image.fromarray(draw_row(index)[1]).save(tmp_path / f"{index}.png")
    lines = run_benchmark(capsys, "duplicates", "--rows=[200]", "--width=16", f"--pictures={tmp_path}")
    search = next(line.split() for line in lines if line.strip().startswith("200"))
    assert search[-1] == "100.0%"
    halved = next(line.split() for line in lines if line.strip().startswith("half the size"))
    assert len(halved) == 8 and halved[5] == "100.0%"


def test_help_and_bad_values_are_clear(capsys: pytest.CaptureFixture[str]):
    for arguments, code, told in ((["--help"], 0, "repeats"), (["--parts=[forwards]"], 2, "unknown parts ['forwards']")):
        with pytest.raises(SystemExit) as ended:
            main(["model", *arguments])
        shown = capsys.readouterr()
        assert ended.value.code == code and told in (shown.err if code else shown.out)
    misspelt = subprocess.run([sys.executable, "-m", "jobs.benchmark", "solver", "--sede=1"], capture_output=True, text=True)
    assert misspelt.returncode == 2 and "sede" in misspelt.stderr
