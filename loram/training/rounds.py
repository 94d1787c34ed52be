"""The Trainer of an anchored training: it measures the batches of some steps together, and then trains on them.

An adapter changes most in its first steps, so the first rounds are 1, 1, 2, 4, ... steps long.
"""

import logging
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from loram.base import processes
from loram.data.batches import IGNORED
from loram.training.anchors import Anchors, Course

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class _Round:
    """The steps that train on one measurement.

    Args:
        batches: their batches.
        adapter: the adapter's trained parameters at the measurement.
    """

    batches: Sequence[Mapping[str, Tensor]]
    adapter: Mapping[str, Tensor]

    def save(self, file: Path, left: int) -> None:
        """Write the round into a file.

        Args:
            file: the file to write.
            left: how many batches, the last ones, have not been trained on.
        """
        tensors = {f"adapter {name}": tensor for name, tensor in self.adapter.items()}
        for number, batch in enumerate(self.batches):
            tensors |= {f"{number} {column}": values.contiguous() for column, values in batch.items()}
        save_file(tensors, file, {"left": str(left)})

    @staticmethod
    def load(file: Path) -> "tuple[_Round, int]":
        """Read what `save` wrote: the round, and how many batches are left."""
        adapter, batches = dict[str, Tensor](), dict[int, dict[str, Tensor]]()
        with safe_open(file, "pt") as opened:
            for key in opened.keys():  # noqa: SIM118
                place, _, name = key.partition(" ")
                target = adapter if place == "adapter" else batches.setdefault(int(place), {})
                target[name] = opened.get_tensor(key)
            left = int(opened.metadata()["left"])
        return _Round(batches=[batches[number] for number in sorted(batches)], adapter=adapter), left


def steps_of_round(done: int, every: int, total: int) -> int:
    """Return how many steps train on the next measurement: 1, 1, 2, 4, ... from the first on, and at last `every`.

    Args:
        done: the steps before it.
        every: the longest round.
        total: the steps of the training.
    """
    return min(max(1, done), every - done % every, total - done)


def _round_file(checkpoint: str) -> Path:
    return Path(checkpoint) / f"round_{processes.number()}.safetensors"


def anchored(kind: type, course: Course) -> type:
    """Make a Trainer class that measures anchors every `course.steps` steps, at first sooner, and trains with them.

    Args:
        kind: the Trainer class to derive from.
        course: the full model and how to stay on its course.
    """

    class Anchored(kind):  # type: ignore[misc]
        """The given Trainer, anchored."""

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self._anchors = Anchors(course, self.model)
            self._round = _Round(batches=[], adapter={})
            self._ahead: deque[Any] = deque()  # what is left of the round
            self._checkpoint: str | None = None  # to go on from

        def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, *args: Any) -> Any:
            """Take the batches of one step; the batches of the next steps are measured together."""
            if self._checkpoint is not None:
                self._go_on(_round_file(self._checkpoint), epoch_iterator)
                self._checkpoint = None
            if not self._ahead:
                done = self.state.global_step
                steps = steps_of_round(done, course.steps, self.state.max_steps)
                batches = list(islice(epoch_iterator, steps * self.args.gradient_accumulation_steps))
                self._round = _Round(batches=batches, adapter=self._adapter())
                self._measure()
            step = [self._ahead.popleft() for _ in range(min(num_batches, len(self._ahead)))]
            return super().get_batch_samples(iter(step), num_batches, *args)

        def _measure(self) -> None:
            batches = self._round.batches
            what = "batch" if len(batches) == 1 else f"{len(batches)} batches"
            logger.info("measuring the full model's course on the next %s", what)
            for batch, rows in zip(batches, self._anchors.measure_(batches), strict=True):
                self._ahead.append({**batch, "anchor_rows": rows})

        def _adapter(self) -> dict[str, Tensor]:
            return {name: p.detach().to("cpu", copy=True) for name, p in self._trained()}

        def _trained(self) -> list[tuple[str, nn.Parameter]]:
            return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]

        def _save_rng_state(self, output_dir: str) -> None:
            """Save with each process's random state also its round, where that is not over."""
            super()._save_rng_state(output_dir)
            if self._ahead:
                self._round.save(_round_file(output_dir), len(self._ahead))

        def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any) -> None:
            super()._load_from_checkpoint(resume_from_checkpoint, *args)
            self._checkpoint = resume_from_checkpoint

        def _go_on(self, file: Path, epoch_iterator: Iterator[Any]) -> None:
            """Measure a round that is not over once more, with the adapter that it was measured with."""
            if not file.is_file():
                return
            self._round, left = _Round.load(file)
            adapter = self._adapter()
            self._put(self._round.adapter)
            self._measure()
            self._put(adapter)
            for _ in range(len(self._ahead) - left):
                self._ahead.popleft()
            deque(islice(epoch_iterator, left), maxlen=0)  # they are in the round

        def _put(self, adapter: Mapping[str, Tensor]) -> None:
            for name, parameter in self._trained():
                parameter.data.copy_(adapter[name])

        def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Any:
            rows = inputs.pop("anchor_rows")
            tokens = num_items_in_batch
            if tokens is None:
                tokens = (inputs["labels"][:, 1:] != IGNORED).sum() * self.args.gradient_accumulation_steps
            elif self.args.average_tokens_across_devices:  # gradients are averaged over processes, the count is of all
                tokens = tokens / self.accelerator.num_processes
            self._anchors.use_(rows, 1 / tokens)
            return super().training_step(model, inputs, num_items_in_batch)

    return Anchored
