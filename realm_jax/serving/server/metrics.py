"""What an operator watches, as Prometheus reads it; the names are vLLM's after the prefix."""

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from realm_jax.serving.request import FinishReason, GenerationOutput, TextDelta
from realm_jax.serving.tenants import ANONYMOUS

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
PREFIX = "realm:"
MAX_LABELS = 500
"""Names of tenants and adapters that have figures of their own."""
_FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_TOTAL = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5)
_WHOSE = ("model_name", "tenant", "adapter")
_LENGTHS = tuple(b * 10**e for e in range(5) for b in (1, 2, 5))


class Metrics:
    """The metrics of one server. All methods may be called from any thread."""

    def __init__(self, models: Iterable[str]) -> None:
        self.registry = CollectorRegistry()
        self._running = self._gauge("num_requests_running", "Sequences that have a slot.")
        self._waiting = self._gauge("num_requests_waiting", "Sequences that wait for a slot.")
        self._loaded = self._gauge("model_loaded", "1 while the model is in memory.")
        self._loads = self._counter("model_loads", "How often the model was loaded.")
        self._labels: set[str] = set()
        self._prompt = self._counter("prompt_tokens", "Tokens of prompts of requests that ended.", _WHOSE)
        self._generated = self._counter("generation_tokens", "Tokens generated.", _WHOSE)
        self._queries = self._counter("prefix_cache_queries", "Tokens of prompts looked up for reuse.")
        self._hits = self._counter("prefix_cache_hits", "Tokens of prompts reused from earlier ones.")
        self._drafts = self._counter("spec_decode_num_drafts", "Steps with guesses to verify.")
        self._drafted = self._counter("spec_decode_num_draft_tokens", "Guesses that were verified.")
        self._accepted = self._counter("spec_decode_num_accepted_tokens", "Guesses that were right.")
        self._first = self._histogram("time_to_first_token_seconds", "From arrival.", _FIRST)
        self._token = self._histogram(
            "request_time_per_output_token_seconds", "Mean of a request, after its first token.", _TOKEN
        )
        self._total = self._histogram("e2e_request_latency_seconds", "From arrival to the end.", _TOTAL)
        self._prompts = self._histogram("request_prompt_tokens", "Tokens of a prompt.", _LENGTHS)
        self._answers = self._histogram("request_generation_tokens", "Tokens of an answer.", _LENGTHS)
        self._ended = self._counter(
            "request_success", "Sequences that ended, by why.", (*_WHOSE, "finished_reason")
        )
        for model in models:
            self._begin(model)

    def _begin(self, model: str) -> None:
        """The model's figures are there from the start, as zeros."""
        for metric in (self._running, self._waiting, self._loaded, self._loads, self._queries, self._hits):
            metric.labels(model)
        for metric in (self._drafts, self._drafted, self._accepted, self._first, self._token, self._total):
            metric.labels(model)
        for metric in (self._prompts, self._answers):
            metric.labels(model)
        for metric in (self._prompt, self._generated):
            metric.labels(model, ANONYMOUS.name, "")
        for reason in FinishReason:
            self._ended.labels(model, ANONYMOUS.name, "", str(reason))

    def text(self, tenant: str | None = None) -> bytes:
        """All of them, in Prometheus' text format; or only those of a tenant."""
        text = generate_latest(self.registry)
        if tenant is None:
            return text
        mine = f'tenant="{tenant}"'.encode()  # a name has no character that would have to be escaped
        lines = text.splitlines(keepends=True)
        return b"".join(line for line in lines if line.startswith(b"#") or mine in line)

    def on_memory(self, model: str, *, is_loaded: bool) -> None:
        """The model came into memory, or left it."""
        self._loaded.labels(model).set(is_loaded)
        self._loads.labels(model).inc(is_loaded)

    def on_load(self, model: str, running: int, waiting: int) -> None:
        """So many sequences run and wait."""
        self._running.labels(model).set(running)
        self._waiting.labels(model).set(waiting)

    def on_delta(self, delta: TextDelta, model: str, tenant: str, adapter: str) -> None:
        """A sequence went on, and perhaps ended."""
        whose = model, self._bounded(tenant), self._bounded(adapter)
        self._generated.labels(*whose).inc(len(delta.token_ids))
        if delta.output is not None:
            self._on_end(delta.output, whose)

    def _bounded(self, name: str) -> str:
        """The name as a label; names past the first few hundred share one."""
        if len(self._labels) < MAX_LABELS:
            self._labels.add(name)
        return name if name in self._labels else "others"

    def _on_end(self, output: GenerationOutput, whose: tuple[str, str, str]) -> None:
        usage, metrics = output.usage, output.metrics
        self._ended.labels(*whose, str(output.finish_reason)).inc()
        self._prompt.labels(*whose).inc(usage.prompt_tokens)
        model = whose[0]
        self._queries.labels(model).inc(usage.prompt_tokens)
        self._hits.labels(model).inc(usage.cached_tokens)
        self._prompts.labels(model).observe(usage.prompt_tokens)
        self._answers.labels(model).observe(usage.completion_tokens)
        self._total.labels(model).observe(metrics.finished_s)
        if metrics.drafts is not None:
            self._drafts.labels(model).inc(metrics.drafts.steps)
            self._drafted.labels(model).inc(metrics.drafts.drafted)
            self._accepted.labels(model).inc(metrics.drafts.accepted)
        if metrics.first_token_s is not None:
            self._first.labels(model).observe(metrics.first_token_s)
            if usage.completion_tokens > 1:
                rest = metrics.finished_s - metrics.first_token_s
                self._token.labels(model).observe(rest / (usage.completion_tokens - 1))

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(PREFIX + name, text, ("model_name",), registry=self.registry)

    def _counter(self, name: str, text: str, labels: tuple[str, ...] = ("model_name",)) -> Counter:
        return Counter(PREFIX + name, text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(PREFIX + name, text, ("model_name",), registry=self.registry, buckets=buckets)
