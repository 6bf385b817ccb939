"""The model type `headinfer` of lm-evaluation-harness; importing this package registers it.

The harness finds no model types by itself, so a program imports this package first:

    import lm_eval

    import headinfer.evaluate.harness

    results = lm_eval.simple_evaluate(
        model="headinfer",
        model_args={"pretrained": "Qwen/Qwen3-8B", "device_memory": "24GiB"},
        tasks=["hellaswag"],
    )
"""

from headinfer.evaluate.harness.answering import AnsweringLM
from headinfer.evaluate.harness.model import HeadInferLM

__all__ = ["AnsweringLM", "HeadInferLM"]
