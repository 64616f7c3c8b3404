"""What is kept of a comparison, as JSON. All that the report says is computed from it. Pure."""

import json
import statistics

from pydantic import BaseModel, ConfigDict

from benchmarks.kv_index.cases import Case
from benchmarks.serving.results import Machine


class Run(BaseModel):
    """One side in one case."""

    model_config = ConfigDict(frozen=True)

    side: str
    round: int
    case: Case
    figures: dict[str, float]


class Comparison(BaseModel):
    model_config = ConfigDict(frozen=True)

    started_at: str
    commit: str
    """With "+changes" when the working tree had any."""
    machine: Machine
    versions: dict[str, str]
    rounds: int
    runs: list[Run]

    def median(self, side: str, case: Case, figure: str) -> float:
        """Of the rounds."""
        return statistics.median(
            run.figures[figure] for run in self.runs if (run.side, run.case) == (side, case)
        )

    def to_json(self) -> str:
        """A line for each run."""
        about = self.model_dump_json(indent=1, exclude={"runs"}).removesuffix("\n}")
        runs = ",\n  ".join(json.dumps(run.model_dump()) for run in self.runs)
        return f'{about},\n "runs": [\n  {runs}\n ]\n}}\n'
