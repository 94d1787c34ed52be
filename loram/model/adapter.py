"""Reading and writing stock PEFT LoRA adapters without building a model."""

import hashlib
import json
import math
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from loram.errors import UserError
from loram.model.checkpoint import Checkpoint
from loram.model.plan import find_plan

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_FACTOR = re.compile(r"^base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])\.weight$")


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """A LoRA adapter as PEFT saves it.

    Args:
        folder: where it was read from.
        config: adapter_config.json.
        tensors: adapter_model.safetensors; `lora_A` is (r, in_features), `lora_B` (out_features, r).
    """

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]

    @classmethod
    def load(cls, folder: Path) -> "Adapter":
        """Read an adapter folder.

        Raises:
            UserError: it is no LoRA adapter, a factor is missing or not finite, or a variant we cannot widen or merge.
        """
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder")
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            if not (folder / name).is_file():
                raise UserError(f"{folder}: no {name} here, so this is not a LoRA adapter folder")
        try:
            config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
            tensors = load_file(folder / WEIGHTS_NAME)
        except ValueError as error:
            raise UserError(f"{folder / CONFIG_NAME}: not valid JSON: {error}") from error
        except SafetensorError as error:
            raise UserError(f"{folder / WEIGHTS_NAME}: not a whole safetensors file: {error}") from error
        adapter = cls(folder=folder, config=config, tensors=tensors)
        adapter._check()
        return adapter

    def _check(self) -> None:
        kind = self.config.get("peft_type")
        if kind != "LORA" or self.config.get("use_dora"):
            raise UserError(
                f"{self.folder}: a {'DoRA' if kind == 'LORA' else kind} adapter; only plain LoRA is supported"
            )
        if self.config.get("fan_in_fan_out"):
            raise UserError(f"{self.folder}: fan_in_fan_out adapters are for Conv1D models, which we do not support")
        for name, tensor in self.tensors.items():
            if _FACTOR.match(name) is None:
                raise UserError(f"{self.folder / WEIGHTS_NAME}: {name} is not a LoRA factor")
            if not torch.isfinite(tensor).all():
                raise UserError(f"{self.folder / WEIGHTS_NAME}: {name} has values that are not finite")
        for module, factors in self.modules.items():
            if missing := {"A", "B"} - factors.keys():
                raise UserError(f"{self.folder / WEIGHTS_NAME}: {module} lacks lora_{min(missing)}")
        if not self.modules:
            raise UserError(f"{self.folder / WEIGHTS_NAME}: holds no LoRA factors")

    @cached_property
    def modules(self) -> dict[str, dict[str, Tensor]]:
        """Module path in the base model (`model.layers.3.mlp.up_proj`) -> its factors `A` and `B`."""
        found: dict[str, dict[str, Tensor]] = {}
        for name, tensor in self.tensors.items():
            if match := _FACTOR.match(name):
                found.setdefault(match["module"], {})[match["factor"]] = tensor
        return found

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the two files."""
        digest = hashlib.sha256()
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            digest.update((self.folder / name).read_bytes())
        return digest.hexdigest()

    def scaling(self, module: str) -> float:
        """PEFT's factor before B·A: alpha / r, or alpha / sqrt(r) with rsLoRA."""
        rank = self.modules[module]["A"].shape[0]
        alpha = float(_pattern(self.config.get("alpha_pattern"), module, self.config["lora_alpha"]))
        return alpha / math.sqrt(rank) if self.config.get("use_rslora") else alpha / rank

    def delta(self, module: str, start: int = 0, stop: int | None = None) -> Tensor:
        """The update scaling·B·A of a module's weight, or of its rows `start` to `stop`: float32."""
        factors = self.modules[module]
        return self.scaling(module) * (factors["B"][start:stop].float() @ factors["A"].float())

    def check_fits(self, checkpoint: Checkpoint) -> None:
        """Refuse an adapter whose modules or shapes are not the model's.

        Raises:
            UserError: names the module, both shapes, and says `loram recover` where the adapter was trained on the
                pruned model and this is the full one.
        """
        for module, factors in self.modules.items():
            shape = (factors["B"].shape[0], factors["A"].shape[1])
            weight = f"{module}.weight"
            if weight not in checkpoint.index and module == "lm_head" and checkpoint.tied:
                weight = "model.embed_tokens.weight"
            if weight not in checkpoint.index:
                raise UserError(f"{self.folder}: adapts {module}, which {checkpoint.name} does not have")
            if (expected := checkpoint.shape(weight)) != shape:
                raise UserError(self._misfit(module, shape, checkpoint, expected))

    def _misfit(self, module: str, shape: tuple[int, ...], checkpoint: Checkpoint, expected: tuple[int, ...]) -> str:
        what = f"{self.folder}: {module} is for a weight of shape {shape}, but {checkpoint.name} has {expected}"
        if not checkpoint.pruned and all(a <= b for a, b in zip(shape, expected, strict=True)):
            return f"{what}; this adapter was trained on a pruned model: run `loram recover` on it first"
        return f"{what}; it belongs to another model"


def load_for(checkpoint: Checkpoint, folder: Path) -> Adapter:
    """Read an adapter and make sure that it is one for this model.

    Raises:
        UserError: it is no sound adapter, its modules or shapes are not the model's, or the plan beside it was made
            from other weights.
    """
    adapter = Adapter.load(folder)
    adapter.check_fits(checkpoint)
    plan, ours = find_plan(folder), find_plan(checkpoint.folder)
    if plan is not None and ours is not None and ours.fingerprint != plan.fingerprint:
        raise UserError(f"{folder}: was trained on another pruned model than {checkpoint.name} (their plans differ)")
    if plan is not None and ours is None and checkpoint.fingerprint != plan.base.fingerprint:
        raise UserError(
            f"{folder}: was made for {plan.base.name}, and the weights of {checkpoint.name} are others "
            f"(fingerprint {checkpoint.fingerprint[:12]} instead of {plan.base.fingerprint[:12]})"
        )
    return adapter


def _pattern(patterns: dict[str, Any] | None, module: str, default: Any) -> Any:
    """PEFT's way of looking a module up in `rank_pattern` or `alpha_pattern`: a key is a regex for the path's end."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def save_adapter(out: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write a stock PEFT adapter into a folder; keys and names in a fixed order, so equal means equal bytes."""
    ordered = {
        key: sorted(value) if key in ("target_modules", "exclude_modules") and isinstance(value, list) else value
        for key, value in sorted(config.items())
    }
    (out / CONFIG_NAME).write_text(json.dumps(ordered, indent=2) + "\n", encoding="utf-8")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out / WEIGHTS_NAME, {"format": "pt"})
