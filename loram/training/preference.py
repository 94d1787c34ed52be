"""How preferences are trained on: batches of pairs or of labelled answers, and a Trainer with the method's loss.

TRL's own trainers read the weight of lm_head, where an adapter or 4 bits may be, and add a second adapter; see
`docs/architecture.md`. So the loss is a method's (`methods/preference.py`), and the rest is the Trainer of `train`.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from loram.base import processes
from loram.data.batches import IGNORED
from loram.data.tokens import DESIRABLE, REJECTED
from loram.disk.adapter import Adapter
from loram.training.methods.adapters import factors_of
from loram.training.methods.preference import Preference, PreferenceOptions
from loram.training.trainer import AdapterTrainer

_Sequence = tuple[list[int], list[int]]  # token ids and labels


@dataclass(frozen=True, kw_only=True)
class PreferenceCollator:
    """Makes batches of tokenised pairs, or of answers with a label.

    Args:
        padding: the token that fills rows.
        max_length: the limit of a mismatched answer with its prompt, in tokens.
        multiple: widths are a multiple of this; None for any.
    """

    padding: int
    max_length: int
    multiple: int | None = None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return a batch of rows as `Preference.loss` takes it."""
        answers = [(row["input_ids"], row["labels"]) for row in rows]
        if DESIRABLE not in rows[0]:
            return self._padded([*answers, *((row[f"{REJECTED}input_ids"], row[f"{REJECTED}labels"]) for row in rows)])
        others = self._padded(self._mismatched(answers))
        return {
            **self._padded(answers),
            DESIRABLE: torch.tensor([row[DESIRABLE] for row in rows]),
            **{f"kl_{name}": tensor for name, tensor in others.items()},
        }

    def _padded(self, sequences: Sequence[_Sequence]) -> dict[str, Tensor]:
        """Return token ids, attention mask and labels, (sequences, width), padded on the right."""
        width = max(len(ids) for ids, _ in sequences)
        width += -width % (self.multiple or 1)

        def padded(values: Sequence[list[int]], fill: int) -> Tensor:
            return torch.tensor([value + [fill] * (width - len(value)) for value in values])

        return {
            "input_ids": padded([ids for ids, _ in sequences], self.padding),
            "attention_mask": padded([[1] * len(ids) for ids, _ in sequences], 0),
            "labels": padded([labels for _, labels in sequences], IGNORED),
        }

    def _mismatched(self, answers: Sequence[_Sequence]) -> list[_Sequence]:
        """Return each prompt with the answer of the row before it, and the first with the last one's."""
        starts = [next(place for place, label in enumerate(labels) if label != IGNORED) for _, labels in answers]
        mixed = []
        for row, (ids, labels) in enumerate(answers):
            other_ids, other_labels = (part[starts[row - 1] :] for part in answers[row - 1])
            both = (ids[: starts[row]] + other_ids, labels[: starts[row]] + other_labels)
            mixed.append((both[0][: self.max_length], both[1][: self.max_length]))
        return mixed


class PreferenceTrainer(AdapterTrainer):
    """The Trainer of a method that learns from preferences, for a model after `use_log_probs_`.

    Args:
        method: the method.
        preference: its options.
        start: the adapter that the training goes on with, which is the reference; None for a new one, where the
            reference is the model without an adapter.
    """

    loss_is_scaled_for_ga = False  # it is the mean over a micro-batch, and the Trainer takes the mean of these

    def __init__(
        self, *args: Any, method: Preference, preference: PreferenceOptions, start: Adapter | None, **options: Any
    ) -> None:
        super().__init__(*args, **options)
        self.method, self.preference, self.start = method, preference, start
        self._sums: dict[str, list[float]] = {}  # since the last log: name -> sum, and of how many

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Return the method's loss of a micro-batch, and add its figures to those of the next log."""

        def policy(ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
            log_probs: Tensor = model(input_ids=ids, attention_mask=mask, labels=labels).log_probs
            return log_probs

        def reference(*rows: Tensor) -> Tensor:
            with torch.no_grad(), self._as_reference():
                return policy(*rows)

        loss, figures = self.method.loss(inputs, policy, reference, self.preference)
        values = torch.stack([figure.detach().float() for figure in figures.values()]).tolist()  # waits only once
        for name, value in zip(figures, values, strict=True):
            total, count = self._sums.get(name, (0.0, 0))
            self._sums[name] = [total + value, count + 1]
        return loss

    @contextlib.contextmanager
    def _as_reference(self) -> Iterator[None]:
        """Let the model be the reference meanwhile. No backward pass may wait for values of the factors then."""
        model: Any = self.accelerator.unwrap_model(self.model)
        assert isinstance(model, PeftModel)
        if self.start is None:
            with model.disable_adapter():
                yield
            return
        factors = factors_of(model)
        trained = {name: factor.detach().clone() for name, factor in factors.items()}
        try:
            _put_(factors, self.start.tensors)
            yield
        finally:
            _put_(factors, trained)

    def log(self, logs: dict[str, float], *args: Any, **options: Any) -> None:
        """Log the means of the figures since the last log, over all processes, under TRL's names."""
        parts, self._sums = processes.gather(self._sums), {}
        means = {}
        for name in sorted({name for part in parts for name in part}):
            entries = [part[name] for part in parts if name in part]
            means[name] = sum(total for total, _ in entries) / sum(count for _, count in entries)
        super().log({**logs, **means}, *args, **options)

    def _save_rng_state(self, output_dir: str) -> None:
        """Save the sums since the last log too, so that the log is the same wherever the training stops."""
        super()._save_rng_state(output_dir)
        _figures_file(output_dir).write_text(json.dumps(self._sums), encoding="utf-8")

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        assert checkpoint is not None
        self._sums = json.loads(_figures_file(checkpoint).read_text(encoding="utf-8"))


def _put_(factors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, factor in factors.items():
        factor.data.copy_(values[name])


def _figures_file(checkpoint: str) -> Path:
    return Path(checkpoint) / f"figures_{processes.number()}.json"
