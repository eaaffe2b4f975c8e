"""Random numbers of a key: the same on every machine, as datasets and trainings made before have them."""

import pytest

from pipelines.tables.chance import row_seed, uniform


def test_uniform_is_the_same_on_every_machine() -> None:
    assert uniform(0, 0, "a") == pytest.approx(0.8227784960076593, abs=1e-12)
    assert 0 <= min(uniform(number) for number in range(1000)) < max(uniform(number) for number in range(1000)) < 1


def test_a_row_s_seed_depends_on_seed_and_id_and_is_one_that_servers_take() -> None:
    assert row_seed(3, "a") == 516612839
    seeds = {row_seed(seed, row_id) for seed in range(10) for row_id in ("a", "b", "c")}
    assert len(seeds) == 30 and all(0 <= seed < 2**31 for seed in seeds)
