"""What a method is: one object that holds everything particular to it. This module imports nothing heavy."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from loram.base.errors import UserError
from loram.base.options import Options
from loram.data.spec import Kind

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import TrainerCallback

    from loram.training.options import TrainOptions


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to train.

    A method that is a switch of PEFT is described by these fields alone. A method with behaviour is a subclass that
    overrides the functions below, in a file of its own; it imports torch and PEFT inside them, since the command line
    and the planner read the table of methods.

    Args:
        name: the method's name in a recipe and on the command line.
        summary: what trains, in one line.
        section: the section of `train` in a recipe that holds the method's own options; None if it has none.
        options: the class of these options.
        lora: the options of PEFT's LoraConfig that make the method; the user cannot set them to anything else.
        defaults: the options of LoraConfig that have another default than plain LoRA's.
        trainer: the options of the Trainer that have another default.
        learns: what it learns from rows: how a text goes on, which of two answers is better, or whether one is good.
        forward_passes: how many forward passes without gradients a step has beside the one with gradients.
        weights: whether the model's own weights train, and not an adapter. What that changes in a pruned model is
            extracted as an adapter; from a full model it makes a full model.
        anchored: whether the adapter can be recovered at any step, which anchors need.
        masked: whether `mask_update` works with it.
        experts: whether `target_parameters` works with it.
        streamed: whether the streamed engine can train by it.
        sharded: whether it trains a model that FSDP has sharded over processes.
        continues: whether it can go on training an adapter that exists.
        in_float32: why what trains must be in float32; empty if it may also be in 16 bits.
        planned: whether the planner can estimate its memory.
        adds_files: whether the adapter needs `added_files` beside it.
    """

    name: str
    summary: str
    section: str | None = None
    options: type[Options] | None = None
    lora: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    trainer: Mapping[str, Any] = field(default_factory=dict)
    learns: Kind = "text"
    forward_passes: int = 0
    weights: bool = False
    anchored: bool = True
    masked: bool = False
    experts: bool = False
    streamed: bool = False
    sharded: bool = False
    continues: bool = False
    in_float32: str = ""
    planned: bool = False
    adds_files: bool = False

    def own_options(self, options: "TrainOptions") -> Options | None:
        """Return the method's own options with their defaults filled in; None if it has none."""
        if self.section is None or self.options is None:
            return None
        section: Options | None = getattr(options, self.section)
        return self.options() if section is None else section

    def check(self, options: "TrainOptions", lora: Mapping[str, Any]) -> None:
        """Refuse options that contradict the method or that it would ignore.

        Args:
            options: the options as the user gave them.
            lora: the options of LoraConfig with every default filled in.

        Raises:
            UserError: names the option and what to do.
        """
        for key, value in self.lora.items():
            if options.lora.get(key, value) != value:
                raise UserError(f"lora: {key} is {value} with method {self.name}; leave it out")

    def specialise_(self, model: "nn.Module", own: Options | None, *, pruned: bool) -> None:
        """Change which parameters of a model train, and how, to what the method says.

        Args:
            model: the model with PEFT's adapter on it; with `weights`, the model itself.
            own: the method's own options, as `own_options` returns them.
            pruned: whether it is a pruned model.
        """

    def callbacks(self, model: "nn.Module", own: Options | None, seed: int) -> Sequence["TrainerCallback"]:
        """Return the callbacks that the Trainer needs for the method, for a model after `specialise_`."""
        return ()

    def added_files(self, model: "nn.Module") -> Mapping[str, Mapping[str, "Tensor"]]:
        """Return the safetensors files that recovery needs beside the adapter of a pruned model: name -> its tensors.

        Args:
            model: the model before the first step.
        """
        return {}

    def trained_ranks(self, r: int, own: Options | None) -> tuple[int, int]:
        """Return how many of an adapter's `r` ranks train in lora_A, and how many in lora_B."""
        return r, r

    def layers_at_once(self, layers: int, own: Options | None) -> int:
        """Return how many of a model's decoder layers train in the same step, with `weights`."""
        return layers
