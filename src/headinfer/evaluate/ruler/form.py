"""What lm-evaluation-harness makes of samples: prompts, settings of generation, and scores."""

from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import lm_eval.tasks
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks.ruler import common_utils

from headinfer.evaluate.harness.answering import AnsweringLM
from headinfer.evaluate.ruler.samples import Sample


@cache
def _index() -> Any:
    """Return the harness's RULER by name; not by its package, whose import draws all words."""
    folder = Path(lm_eval.tasks.__file__).parent / "ruler"
    manager = lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False)
    return manager.task_index


class _Docs(list[dict[str, Any]]):
    """A list of samples that names their fields, as the harness asks its data sets to."""

    @property
    def features(self) -> dict[str, Any]:
        """A sample, whose keys are the fields."""
        return self[0]


class Form:
    """A task of the harness, of one kind and length, that takes samples made elsewhere.

    Args:
        kind: name of the task.
        context_tokens: the length. The harness counts scores by it, and knows six of them.
        sample: any of the task.
    """

    def __init__(self, kind: str, context_tokens: int, sample: Sample) -> None:
        self._context_tokens = context_tokens
        config = dict(_index()[kind].cfg)
        del config["tag"]
        score = config["process_results"].rpartition(".")[2]
        config |= {
            "process_results": getattr(common_utils, score),
            "metric_list": [
                {
                    "metric": str(context_tokens),
                    "aggregation": common_utils.aggregate_metrics,
                    "higher_is_better": True,
                }
            ],
            "custom_dataset": lambda **_: {"test": _Docs([self._doc(sample)])},
        }
        self._task = ConfigurableTask(config=config)

    def _doc(self, sample: Sample) -> dict[str, Any]:
        return asdict(sample) | {"max_length": self._context_tokens}

    @property
    def gen_kwargs(self) -> dict[str, Any]:
        """Settings of generation."""
        return dict(self._task.config.generation_kwargs)

    def prompt(self, sample: Sample, lm: AnsweringLM, *, chat: bool) -> str:
        """Return a sample's prompt, which ends with the beginning of the answer.

        Args:
            sample: of this task.
            lm: has the chat template.
            chat: whether to use it.
        """
        doc = self._doc(sample)
        text: str = self._task.fewshot_context(
            doc,
            num_fewshot=0,
            apply_chat_template=chat,
            chat_template=lm.apply_chat_template if chat else None,
            gen_prefix=self._task.doc_to_prefix(doc),
        )
        return text

    def score(self, sample: Sample, answer: str) -> float:
        """Return the share of right answers that an answer holds, or whether it holds any."""
        values = self._task.process_results(self._doc(sample), [answer])
        return float(values[str(self._context_tokens)])
