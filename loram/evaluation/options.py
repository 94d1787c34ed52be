"""Options of evaluation."""

from typing import Annotated, Any, ClassVar, Self

from pydantic import BeforeValidator, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from loram.base.options import Options, option
from loram.base.paths import local


def is_file_of_a_task(name: str) -> bool:
    """Return whether a task is named by the file that describes it, and not by its name in lm-evaluation-harness."""
    return name.endswith((".yaml", ".yml"))


def _listed(value: Any) -> Any:
    """Return names as a list, also where commas separate them; paths become absolute."""
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list | tuple) or not all(isinstance(item, str) for item in items):
        return value  # which pydantic refuses
    names = [name.strip() for item in items for name in item.split(",") if name.strip()]
    return [str(local(name)) if is_file_of_a_task(name) else name for name in names]


class _Streamable(Options):
    stage: ClassVar[str] = "eval"

    stream: bool = option(False, "Never load the model: read it from disk layer by layer.")


class EvaluateOptions(_Streamable):
    """How to compute a perplexity; see `loram.evaluation.evaluate.evaluate`."""

    max_samples: PositiveInt | None = option(
        None, "Score only this many rows from the start, or pieces of a long text.", common=True
    )
    max_length: PositiveInt = option(
        1024,
        "Rows are cut to this many tokens, and long texts into pieces of this length.",
        also="sequence_len cutoff_len",
    )


class TaskOptions(_Streamable):
    """How to run tasks of lm-evaluation-harness, under its own names; see `loram.evaluation.tasks.evaluate_tasks`."""

    tasks: Annotated[list[str], BeforeValidator(_listed)] | None = option(
        None,
        "Tasks of lm-evaluation-harness: their names, or YAML files that describe them, separated by commas.",
        common=True,
    )
    num_fewshot: NonNegativeInt | None = option(
        None, "How many solved examples stand before each question (default: what the task says)."
    )
    limit: PositiveFloat | None = option(
        None, "Use only this many examples of each task, or this share of them if it is below 1."
    )
    batch_size: PositiveInt = option(1, "How many requests a model in memory gets at once.")
    apply_chat_template: bool = option(False, "Put each prompt into the model's chat template.")
    confirm_run_unsafe_code: bool = option(
        False, "Allow tasks that run the code that the model writes, such as humaneval."
    )

    @model_validator(mode="after")
    def _of_tasks(self) -> Self:
        others = TaskOptions.model_fields.keys() - EvaluateOptions.model_fields.keys() - {"tasks"}
        unused = [name for name in sorted(others) if getattr(self, name) != TaskOptions.model_fields[name].default]
        if not self.tasks and unused:
            raise ValueError(f"{unused[0]} is an option of tasks, and no task is named; name some with `tasks`")
        return self
