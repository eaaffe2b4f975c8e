"""The best-of stage: of the drawn pictures of each prompt, those that a metric puts first are kept."""

from functools import partial
from itertools import groupby

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.evaluate.best_of.choose import Rank, choose
from pipelines.evaluate.best_of.config import BestOfConfig
from pipelines.evaluate.metric import metric_table
from pipelines.evaluate.registry import metric_class
from pipelines.stages.contract import OnProgress, Resources, ShardOutput, StageResult
from pipelines.stages.run import run_shards
from pipelines.storage.lease import Leases
from pipelines.tables.errors import WrongInputError
from pipelines.tables.identity import Identity, Manifest
from pipelines.tables.rejects import RowRefused, reject
from pipelines.tables.schema import PROMPT_METADATA, SAMPLES, Row, samples_path, samples_schema
from pipelines.tables.table import Table

JUDGEMENT = "judgement"
NO_PICTURE = "num_prompts_without_picture"
"""The figure that counts the prompts none of whose candidates was judged."""


def run_best_of(
    dataset_uri: str,
    candidates: str,
    config: BestOfConfig,
    *,
    on_progress: OnProgress = lambda _: None,
    leases: Leases | None = None,
) -> StageResult:
    """Keep the best of `samples/<candidates>`, by `evaluations/<candidates>/<judge>`, in `samples/<config.name>`.

    The others are its rejects: `not_chosen`, or `not_judged`. Shards stay aligned with those of the candidates.

    Raises MissingTableError, WrongInputError if a shard cuts a prompt's pictures apart, and as `run_shards`.
    """
    drawn = Table(dataset_uri, samples_path(candidates), SAMPLES)
    manifest = drawn.require()
    judged = metric_table(dataset_uri, candidates, config.judge)
    each = num_candidates(manifest)
    if manifest.config["rows_per_shard"] % each:
        raise WrongInputError(
            f"{drawn.uri} has {manifest.config['rows_per_shard']} pictures in a shard and {each} of each prompt: draw them "
            f"with draw.rows_per_shard a multiple of {each}"
        )
    settings = {"keep": config.keep, "judge": config.judge, "choice": config.choice}
    settings |= {name: value for name, value in manifest.config.items() if name == PROMPT_METADATA}
    inputs = {drawn.path: manifest.fingerprint, judged.path: judged.require().fingerprint}
    return run_shards(
        Table(dataset_uri, samples_path(config.name), samples_schema(settings)),
        Identity("best_of", settings, {}, inputs, rows_of=drawn.path),
        drawn.list_shards(),
        read_shard=partial(_read_judged, drawn, judged),
        make_worker=partial(Chooser, config.judge, config.choice, config.keep, each),
        resources=Resources(),
        max_reject_share=1.0,
        on_progress=on_progress,
        leases=leases,
    )


def num_candidates(manifest: Manifest) -> int:
    """Pictures of each prompt in a samples table, from its manifest."""
    each: int = manifest.config.get("images_per_prompt", 1)
    return each


def prompt_number(picture_id: str, each: int) -> int:
    """The number of a drawn picture's prompt, if there are `each` pictures of every prompt."""
    return int(picture_id) // each


def _read_judged(drawn: Table, judged: Table, shard: str) -> pa.Table:
    """A shard of pictures, in the order of their numbers, with the judge's row of each in JUDGEMENT; null where it has none."""
    rows = drawn.read_shard(shard)
    rows = rows.take(pc.sort_indices(pc.cast(rows["id"], pa.int64())))
    judgements = judged.read_shard(shard)
    places = pc.index_in(rows["id"], judgements["id"].combine_chunks())
    structs = pa.array(judgements.to_pylist(), pa.struct(judgements.schema))
    return rows.append_column(JUDGEMENT, structs.take(places.combine_chunks()))


class Chooser:
    """Ray Data actor: judged candidates -> those that are kept; the others are rejects that say their place."""

    def __init__(self, judge: str, choice: str, keep: int, each: int):
        self.judge, self.choice, self.keep, self.each = metric_class(judge), choice, keep, each

    def process(self, table: pa.Table) -> ShardOutput:
        ids = table["id"].to_pylist()
        judgements = table[JUDGEMENT].to_pylist()
        ranks = [None if row is None else self.judge.rank(row) for row in judgements]
        kept: list[int] = []
        rejects: list[Row] = []
        num_without = 0
        for _, group in groupby(range(len(ids)), lambda index: prompt_number(ids[index], self.each)):
            members = list(group)
            own = [ranks[index] for index in members]
            chosen = choose(own, self.keep, self.choice)  # type: ignore[arg-type]
            kept += [members[place] for place in chosen]
            num_without += not chosen
            rejects += [
                reject({"id": ids[index]}, self._refusal(own, place))
                for place, index in enumerate(members)
                if place not in chosen
            ]
        rows = table.take(pa.array(kept, pa.int64())).drop_columns([JUDGEMENT])
        return ShardOutput(rows, rejects, {NO_PICTURE: num_without} if num_without else {})

    def _refusal(self, ranks: list[Rank | None], place: int) -> RowRefused:
        rank = ranks[place]
        if rank is None:
            return RowRefused("not_judged", f"{self.judge.name} refused the picture: see its rejects")
        better = sum(other is not None and other > rank for other in ranks)
        told = ", ".join(f"{value:.4g}" for value in rank)
        return RowRefused("not_chosen", f"{self.judge.name} {told}: place {better + 1} of {len(ranks)}")
