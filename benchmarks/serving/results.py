"""What is kept of a benchmark, as JSON. All that the report says is computed from it. Pure."""

from pydantic import BaseModel, ConfigDict


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True)


class ScenarioRecord(_Record):
    name: str
    clients: int
    output_tokens: int
    is_streamed: bool
    prompt_bytes: int
    run_length: int


class ProbeRecord(_Record):
    """One answer that was looked at closely."""

    ttft_seconds: float
    total_seconds: float
    text_events: int


class Run(_Record):
    """One system under one load for some seconds."""

    scenario: str
    system: str
    round: int
    window_seconds: float
    """What is counted is counted over the same part of the run, after its start-up and before its
    end: with as many requests in progress at both ends, neither cuts anything off."""
    answers: int
    """Whole answers with status 200 that ended in the window."""
    probe_answers: int
    """The same of the probes."""
    refused_answers: int
    """With a status of 400 or more."""
    socket_errors: int
    timeouts: int
    failed_probes: int
    latency_p50_seconds: float
    latency_p99_seconds: float
    output_tokens: int
    """Of each answer."""
    is_streamed: bool
    probes: list[ProbeRecord]
    cpu_seconds: dict[str, float]
    """By role, in user and system mode together, in the window."""
    resident_bytes: dict[str, int]
    """By role, at the end of the window."""
    load_generator_cpu_cores: float
    """Of the whole run."""
    other_cpu_seconds: float
    """Of all else on the machine in the window, the idle system and this program included."""

    @property
    def requests_per_second(self) -> float:
        return self.answers / self.window_seconds

    @property
    def tokens_per_second(self) -> float:
        return self.requests_per_second * self.output_tokens

    def cpu_seconds_per_1000_tokens(self, *roles: str) -> float:
        """Of these roles; of all without."""
        chosen = roles or tuple(self.cpu_seconds)
        tokens = (self.answers + self.probe_answers) * self.output_tokens
        seconds = sum(self.cpu_seconds.get(role, 0.0) for role in chosen)
        return 1_000 * seconds / max(tokens, 1)

    @property
    def failures(self) -> int:
        return self.refused_answers + self.socket_errors + self.timeouts + self.failed_probes


class Check(_Record):
    """What one client alone found before the load."""

    prompt_tokens: int
    output_tokens: int
    step_ms: float
    """Median gap between tokens."""


class Ceiling(_Record):
    """The simulated engine alone in a process, with steps that take no time."""

    sequences: int
    """Running at once."""
    tokens_per_second: float


class Machine(_Record):
    cpu: str
    cores: int
    memory_bytes: int
    system: str


class Benchmark(_Record):
    started_at: str
    commit: str
    """With "+changes" when the working tree had any."""
    machine: Machine
    versions: dict[str, str]
    step_ms: float
    rounds: int
    seconds_per_run: float
    scenarios: list[ScenarioRecord]
    checks: dict[str, dict[str, Check]]
    """By system, then by scenario."""
    idle_cpu_cores: dict[str, float]
    """By system, both running and nothing asked."""
    ceilings: list[Ceiling]
    runs: list[Run]

    @property
    def systems(self) -> list[str]:
        """Those that were measured, in the order in which they were started."""
        return list(dict.fromkeys(run.system for run in self.runs))

    def runs_of(self, system: str, scenario: str) -> list[Run]:
        return [run for run in self.runs if (run.system, run.scenario) == (system, scenario)]
