"""The metrics of a run: headings, units, and which way is better."""

from __future__ import annotations

from dataclasses import dataclass

LOWER, HIGHER, NEITHER = -1, 1, 0
ROUGE_L = "rouge_l:"
"""Before the name of a data file: ROUGE-L of answers to its prompts."""


@dataclass(frozen=True)
class Metric:
    """A metric: the heading of its column, its name with the unit, and the better direction."""

    heading: str
    description: str
    better: int = NEITHER


METRICS = {
    "ce": Metric("CE", "cross-entropy (nats)", LOWER),
    "perplexity": Metric("perplexity", "perplexity", LOWER),
    "fkl": Metric("FKL", "FKL to the teacher, with the tail bucketed or rebuilt (nats)", LOWER),
    "rkl": Metric("RKL", "RKL to the teacher, with the tail bucketed or rebuilt (nats)", LOWER),
    "agreement": Metric("top-1 agreement", "top-1 agreement with the teacher", HIGHER),
    "ece": Metric("ECE", "expected calibration error", LOWER),
    "teacher_tail": Metric("teacher's tail", "teacher's mass outside the entries"),
    "student_tail": Metric("student's tail", "student's mass outside the entries"),
    "positions": Metric("positions", "positions"),
    "tokens_per_second": Metric("tokens/s", "tokens per second of training"),
    "data_wait": Metric("data wait", "share of training spent waiting for data"),
    "minutes": Metric("minutes", "minutes of training, evaluations included"),
}
PACE = ("tokens_per_second", "data_wait", "minutes")
HELD_OUT = tuple(name for name in METRICS if name not in PACE)
"""Metrics that are measured on a held-out cache."""
JUDGED = tuple(name for name, metric in METRICS.items() if metric.better)
"""Metrics by which one student is better than another."""
CURVES = (*JUDGED, "student_tail")
"""Metrics that a comparison draws over the steps of a run."""


def metric_of(name: str) -> Metric:
    """Return a metric by its name, also ROUGE-L to the prompts of a data file."""
    if name.startswith(ROUGE_L):
        data = name.removeprefix(ROUGE_L)
        return Metric(f"ROUGE-L {data}", f"ROUGE-L of answers to {data} (×100)", HIGHER)
    return METRICS[name]
