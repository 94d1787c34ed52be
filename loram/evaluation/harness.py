"""What stands between LoRAM and lm-evaluation-harness: its tasks, and a model of ours as it wants to see one.

Everything that imports `lm_eval` is here. Prompts, tokens, few-shot examples and metrics are the harness's own.
"""

import contextlib
import difflib
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks.manager import TaskDict
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from loram.base import processes
from loram.base.constants import BATCH_TOKENS
from loram.base.errors import UserError, in_one_line
from loram.compute.device import compute_dtype
from loram.compute.loading import empty_model
from loram.compute.streaming import Stream
from loram.data.batches import IGNORED, make_batches
from loram.disk.adapter import Adapter
from loram.disk.checkpoint import Checkpoint
from loram.evaluation.options import TaskOptions, is_file_of_a_task

# Tokens. Requests of at most this many go through a streamed model in one pass. Their hidden states are kept, which is
# 4 GB in 16 bits where the hidden size is 4096.
_PASS_TOKENS = 1 << 19

Request = tuple[
    tuple[str, str] | None, list[int], list[int]
]  # the two texts, and their tokens: what stands before, what is scored


def load_tasks(names: Sequence[str]) -> TaskDict:
    """Read tasks and their data.

    Args:
        names: names that lm-evaluation-harness knows, and YAML files.

    Returns:
        As the harness has them: under `tasks` every single task by its name, and under `groups` every group.

    Raises:
        UserError: there is no such task, its description is not sound, or its data cannot be read.
    """
    for name in names:
        if is_file_of_a_task(name) and not Path(name).is_file():
            raise UserError(f"{name}: no such file; a task is a YAML file, or a name that lm-evaluation-harness knows")
    with _quiet_harness():
        # the harness reads all its 14,000 descriptions to know the names in them, which takes seconds
        manager = TaskManager(include_defaults=not all(map(is_file_of_a_task, names)))
        loaded = [_load_task(manager, name) for name in names]
    return TaskDict(
        tasks={name: task for each in loaded for name, task in each["tasks"].items()},
        groups={name: group for each in loaded for name, group in each["groups"].items()},
    )


def _load_task(manager: TaskManager, name: str) -> TaskDict:
    if not is_file_of_a_task(name) and name not in manager.task_index:
        near = difflib.get_close_matches(name, manager.all_tasks, 3)
        hint = f"did you mean {' or '.join(near)}?" if near else "`lm_eval ls tasks` lists its tasks"
        raise UserError(f"{name}: lm-evaluation-harness has no task of this name; {hint}")
    try:
        return manager.load([name])
    except OSError as error:  # the hub's own errors derive from it
        raise UserError(
            f"{name}: the data of this task cannot be read ({in_one_line(error)}); data on the Hugging Face hub "
            "needs a network the first time"
        ) from error
    except Exception as error:  # a description may call code of its own
        raise UserError(f"{name}: lm-evaluation-harness cannot make a task of it ({in_one_line(error)})") from error


def run_tasks(model: HFLM, tasks: TaskDict, options: TaskOptions) -> dict[str, Any]:
    """Run tasks.

    This is the harness's `simple_evaluate` without its report on the machine, for which it runs pip.

    Args:
        model: a `loaded_model` or a `StreamedModel`.
        tasks: what `load_tasks` gave.
        options: how to run them.

    Returns:
        The results as lm-evaluation-harness gives them.

    Raises:
        UserError: a task has not what these options ask of it.
    """
    set_seed(DEFAULT_OTHER_SEED)  # a task may draw what the model writes
    for task in tasks["tasks"].values():
        own = task.get_config("num_fewshot")
        if own != 0:  # such tasks are meant to have none
            task.set_config(key="num_fewshot", value=own or 0 if options.num_fewshot is None else options.num_fewshot)
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    with _quiet_harness():
        try:
            results: dict[str, Any] = evaluate(
                lm=model,
                task_dict=tasks,
                limit=options.limit,
                log_samples=False,
                apply_chat_template=options.apply_chat_template,
                fewshot_as_multiturn=True,
                confirm_run_unsafe_code=options.confirm_run_unsafe_code,
            )
        except AssertionError as error:  # how it says that options and tasks do not fit
            raise UserError(f"lm-evaluation-harness cannot run these tasks so: {in_one_line(error)}") from error
    return results


def loaded_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> HFLM:
    """Return a model in memory as lm-evaluation-harness sees it."""
    with _quiet_harness():
        return SharedModel(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)


class SharedModel(HFLM):  # type: ignore[misc]  # lm_eval is an extra
    """A model as lm-evaluation-harness sees it: several processes share its requests, and all get the answers."""

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        """Score texts that stand after others."""
        return self._shared(super().loglikelihood, requests, disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        """Score whole texts."""
        return self._shared(super().loglikelihood_rolling, requests, disable_tqdm)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        """Write texts."""
        return self._shared(super().generate_until, requests, disable_tqdm)

    def _shared(self, answer: Callable[..., list[Any]], requests: list[Any], quiet: bool) -> list[Any]:
        own = processes.share(requests)
        return processes.merge(answer(own, disable_tqdm=quiet or not processes.first()) if own else [])


class StreamedModel(SharedModel):
    """A model on disk as lm-evaluation-harness sees it: requests go through it one decoder layer at a time.

    Texts become tokens as in a model in memory. Only texts that are given can be scored.

    Args:
        checkpoint: the model.
        adapter: a LoRA adapter that fits it.
        tokenizer: its tokenizer.
        device: where the layers compute.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        adapter: Adapter | None,
        tokenizer: PreTrainedTokenizerBase,
        device: torch.device,
    ) -> None:
        self._checkpoint, self._adapter, self._on = checkpoint, adapter, device
        empty = empty_model(checkpoint, compute_dtype(device), dense=True)
        with _quiet_harness():
            # all windows of a long text in one pass: this is how many of them `loglikelihood_rolling` sends at once
            super().__init__(pretrained=empty, tokenizer=tokenizer, backend="causal", batch_size=sys.maxsize)

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Score texts that stand after others; the harness calls it.

        Returns:
            For each request (log-likelihood in nats, whether each of its tokens is the likeliest one).
        """
        answers: list[tuple[float, bool]] = []
        rows = [(before + scored)[-(self.max_length + 1) :] for _, before, scored in requests]
        labels = [
            [IGNORED] * (len(row) - len(scored)) + scored for row, (_, _, scored) in zip(rows, requests, strict=True)
        ]
        for part in _parts([len(row) for row in rows]):
            answers += self._score(rows[part], labels[part])
        return answers

    def _score(self, rows: list[list[int]], labels: list[list[int]]) -> list[tuple[float, bool]]:
        """Score rows of tokens in one pass over the layers."""
        batches = make_batches(rows, labels, max_tokens=BATCH_TOKENS)
        stream = Stream(
            self._checkpoint,
            batches,
            device=self._on,
            dtype=compute_dtype(self._on),
            adapter=self._adapter,
            model=self._model,
        )
        for _ in stream.forward():
            pass
        answers = {}
        for batch, log_probs, best in zip(batches, stream.log_probs(), stream.top_k(1), strict=True):
            counts = batch.wanted.sum(1).tolist()
            hits = best.ids[:, 0] == batch.targets
            for row, own, right in zip(batch.rows, log_probs.split(counts), hits.split(counts), strict=True):
                answers[row] = float(own.double().sum()), bool(right.all())
        return [answers[row] for row in range(len(rows))]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> NoReturn:
        """Refuse to write text, one token at a time, with a model that is read from disk for each of them."""
        raise UserError(refusal(requests[0].task_name))


def refusal(task: str) -> str:
    """Return why a task in which the model writes text cannot be run on a streamed model."""
    return (
        f"{task}: the model writes text in this task, and a streamed model, which is read from disk layer by layer, "
        "only scores texts; leave it out, or take a model that fits into memory, without --stream"
    )


def _parts(lengths: Sequence[int]) -> Iterator[slice]:
    """Yield slices of rows that have at most `_PASS_TOKENS` tokens together, or one row."""
    start = total = 0
    for end, length in enumerate(lengths):
        if end > start and total + length > _PASS_TOKENS:
            yield slice(start, end)
            start, total = end, 0
        total += length
    if lengths:
        yield slice(start, len(lengths))


@contextlib.contextmanager
def _quiet_harness() -> Iterator[None]:
    """Keep standard output for results, where the harness prints, and its notes about its own settings to itself."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        logger.setLevel(level)
