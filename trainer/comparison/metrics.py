"""What a comparison shows of a run: headings, units, and which way is better."""

from __future__ import annotations

from dataclasses import dataclass

LOWER, HIGHER, NEITHER = -1, 1, 0
ROUGE_L = "rouge_l:"
"""Before the name of a data file: ROUGE-L of answers to its prompts."""


@dataclass(frozen=True)
class Metric:
    """heading: of a column.  description: with its unit.  better: LOWER, HIGHER or NEITHER."""

    heading: str
    description: str
    better: int = NEITHER


METRICS = {
    "ce": Metric("CE", "cross-entropy (nats)", LOWER),
    "perplexity": Metric("perplexity", "perplexity", LOWER),
    "fkl": Metric("FKL", "FKL to the teacher (nats)", LOWER),
    "rkl": Metric("RKL", "RKL to the teacher (nats)", LOWER),
    "agreement": Metric("top-1 agreement", "top-1 agreement with the teacher", HIGHER),
    "ece": Metric("ECE", "expected calibration error", LOWER),
    "student_tail": Metric("student's tail", "student's mass outside the entries"),
    "tokens_per_second": Metric("tokens/s", "tokens per second of training"),
    "data_wait": Metric("data wait", "share of training spent waiting for data"),
    "minutes": Metric("minutes", "minutes of training, evaluations included"),
}
IN_TABLES = ("ce", "perplexity", "fkl", "rkl", "agreement", "ece")
PACE = ("tokens_per_second", "data_wait", "minutes")
CURVES = ("ce", "perplexity", "fkl", "rkl", "agreement", "ece", "student_tail")
"""Those that are measured on the held-out cache as a run goes on."""


def metric(name: str) -> Metric:
    """What is known of a metric of `finished.FinishedRun`."""
    if name.startswith(ROUGE_L):
        data = name.removeprefix(ROUGE_L)
        return Metric(f"ROUGE-L {data}", f"ROUGE-L of answers to {data} (×100)", HIGHER)
    return METRICS[name]
