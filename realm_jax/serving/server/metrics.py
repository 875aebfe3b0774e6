"""What an operator watches, as Prometheus reads it; the names are vLLM's after the prefix."""

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
_LENGTHS = tuple(b * 10**e for e in range(5) for b in (1, 2, 5))


class Metrics:
    """The metrics of one server. All methods may be called from any thread."""

    def __init__(self, model: str) -> None:
        self.registry = CollectorRegistry()
        self._model = model
        self._running = self._gauge("num_requests_running", "Sequences that have a slot.")
        self._waiting = self._gauge("num_requests_waiting", "Sequences that wait for a slot.")
        self._labels: set[str] = set()
        self._prompt = self._by_tenant("prompt_tokens", "Tokens of prompts of requests that ended.")
        self._generated = self._by_tenant("generation_tokens", "Tokens generated.")
        self._queries = self._counter("prefix_cache_queries", "Tokens of prompts looked up for reuse.")
        self._hits = self._counter("prefix_cache_hits", "Tokens of prompts reused from earlier ones.")
        self._first = self._histogram("time_to_first_token_seconds", "From arrival.", _FIRST)
        self._token = self._histogram(
            "request_time_per_output_token_seconds", "Mean of a request, after its first token.", _TOKEN
        )
        self._total = self._histogram("e2e_request_latency_seconds", "From arrival to the end.", _TOTAL)
        self._prompts = self._histogram("request_prompt_tokens", "Tokens of a prompt.", _LENGTHS)
        self._answers = self._histogram("request_generation_tokens", "Tokens of an answer.", _LENGTHS)
        self._ended = Counter(
            PREFIX + "request_success",
            "Sequences that ended, by why.",
            ("model_name", "tenant", "adapter", "finished_reason"),
            registry=self.registry,
        )
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

    def on_load(self, running: int, waiting: int) -> None:
        """So many sequences run and wait."""
        self._running.set(running)
        self._waiting.set(waiting)

    def on_delta(self, delta: TextDelta, tenant: str, adapter: str) -> None:
        """A sequence went on, and perhaps ended."""
        whose = self._model, self._bounded(tenant), self._bounded(adapter)
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
        self._queries.inc(usage.prompt_tokens)
        self._hits.inc(usage.cached_tokens)
        self._prompts.observe(usage.prompt_tokens)
        self._answers.observe(usage.completion_tokens)
        self._total.observe(metrics.finished_s)
        if metrics.first_token_s is not None:
            self._first.observe(metrics.first_token_s)
            if usage.completion_tokens > 1:
                rest = metrics.finished_s - metrics.first_token_s
                self._token.observe(rest / (usage.completion_tokens - 1))

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(PREFIX + name, text, ("model_name",), registry=self.registry).labels(self._model)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(PREFIX + name, text, ("model_name",), registry=self.registry).labels(self._model)

    def _by_tenant(self, name: str, text: str) -> Counter:
        found = Counter(PREFIX + name, text, ("model_name", "tenant", "adapter"), registry=self.registry)
        found.labels(self._model, ANONYMOUS.name, "")  # there from the start
        return found

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        made = Histogram(PREFIX + name, text, ("model_name",), registry=self.registry, buckets=buckets)
        return made.labels(self._model)
