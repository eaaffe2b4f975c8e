"""The ledger of ids: what came before is found whatever the order of asking, and nobody waits for ever."""

import asyncio

import numpy as np
import ray

from pipelines.ingest.ledger import UNSEEN, DigestSet, Ledger, claim, to_digests


def digests(*numbers: int) -> np.ndarray:
    return to_digests([f"{number:032x}" + "0" * 32 for number in numbers])


def test_digest_set_against_a_dictionary() -> None:
    rng = np.random.default_rng(0)
    seen, known = DigestSet(), {}
    for shard in range(60):
        # Few different first halves: many digests share one, and differ only in the second.
        batch = np.unique(rng.integers(0, (7, 900), (rng.integers(0, 80), 2)).astype(np.uint64), axis=0)
        expected = [known.get(tuple(row), UNSEEN) for row in batch.tolist()]
        found = seen.find(batch)
        assert found.tolist() == expected
        new = batch[found == UNSEEN]
        seen.add(new, np.full(len(new), shard))
        known |= {tuple(row): shard for row in new.tolist()}
    assert sum(len(run[0]) for run in seen.runs) == len(known)
    assert len(seen.runs) < 12


def test_digests_are_the_first_128_bits() -> None:
    assert to_digests(["0123456789abcdef" + "fedcba9876543210" + "f" * 32]).tolist() == [
        [0x0123456789ABCDEF, 0xFEDCBA9876543210]
    ]
    assert to_digests([]).shape == (0, 2)


def test_the_first_in_the_plan_stays_whoever_asks_first() -> None:
    async def ask() -> list[list[int]]:
        ledger = Ledger([0, 2, 3])
        await ledger.add_done(1, digests(10, 11))
        later = [
            asyncio.create_task(ledger.claim(3, digests(1, 2, 10, 7))),
            asyncio.create_task(ledger.claim(2, digests(2, 7))),
        ]
        await asyncio.sleep(0.05)
        assert not any(task.done() for task in later)
        first = await ledger.claim(0, digests(1, 2, 3, 1))
        answers = [first, await later[1], await later[0]]
        repeated = [await ledger.claim(0, digests(1, 2, 3, 1)), await ledger.claim(3, digests(1, 2, 10, 7))]
        assert [answer.tolist() for answer in repeated] == [answers[0].tolist(), answers[2].tolist()]
        return [answer.tolist() for answer in answers]

    assert asyncio.run(ask()) == [[UNSEEN] * 4, [0, UNSEEN], [0, 0, 1, 2]]


def test_who_waits_too_long_is_told_for_whom() -> None:
    async def ask() -> None:
        ledger = Ledger([0, 1, 2], stall=0.05)
        assert await ledger.claim(2, digests(5)) == 0
        assert isinstance(await ledger.claim(0, digests(5)), np.ndarray)
        assert await ledger.claim(2, digests(5)) == 1
        assert (await ledger.claim(2, digests(5, 6))).tolist() == [0, UNSEEN]  # told once, then it is skipped
        assert (await ledger.claim(1, digests(6, 7))).tolist() == [2, UNSEEN]

    asyncio.run(ask())


def test_what_cannot_be_read_holds_up_nobody() -> None:
    async def ask() -> None:
        ledger = Ledger([0, 1, 2])
        waiting = asyncio.create_task(ledger.claim(2, digests(1, 2)))
        await ledger.skip(0)
        await ledger.skip(1)
        assert (await waiting).tolist() == [UNSEEN, UNSEEN]
        assert (await ledger.claim(0, digests(2, 3))).tolist() == [2, UNSEEN]
        assert (await ledger.claim(1, digests(3, 4))).tolist() == [0, UNSEEN]
        assert (await ledger.claim(9, digests(4, 5))).tolist() == [1, UNSEEN]  # one that nobody knew to be missing

    asyncio.run(ask())


def test_of_a_shard_that_is_read_twice_the_last_reading_counts() -> None:
    async def ask() -> None:
        ledger = Ledger([0, 1, 2])
        await ledger.claim(0, digests(1, 2))
        assert (await ledger.claim(0, digests(2, 3))).tolist() == [UNSEEN, UNSEEN]
        assert (await ledger.claim(1, digests(1, 2, 3))).tolist() == [UNSEEN, 0, 0], "1 was lost, or 3 comes twice"
        assert (await ledger.claim(0, digests(1, 2))).tolist() == [1, UNSEEN], "1 comes twice"
        assert (await ledger.claim(2, digests(2, 3))).tolist() == [0, UNSEEN]

    asyncio.run(ask())


def test_what_cannot_be_read_the_same_again_comes_after_those_that_wait(local_ray: None) -> None:
    ledger = ray.remote(Ledger).options(num_cpus=0).remote([0, 1], stall=0.1)
    assert claim(ledger, 1, digests(5), None).tolist() == [UNSEEN]
    assert claim(ledger, 0, digests(5, 6), None).tolist() == [1, UNSEEN]
