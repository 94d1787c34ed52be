"""Read and write stock PEFT LoRA adapters without building a model."""

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from loram.base.errors import UserError, first_problem
from loram.disk.expert_factors import by_expert, is_of_experts, is_targeted, own_name, peft_name
from loram.disk.files import read_json
from loram.disk.lora_keys import ALL_LINEAR, INSTEAD, READ, changes_the_base, refused_key
from loram.disk.tensorfile import TensorFile
from loram.model.modeling_loram import unpack
from loram.model.plan import MASKS_NAME

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
# beside a DoRA adapter: the lengths of the rows of the pruned weights that it was trained on
ROW_LENGTHS_NAME = "row_lengths.safetensors"
_PICKLED_NAME = "adapter_model.bin"
_UNORDERED = ("target_modules", "target_parameters", "exclude_modules")  # the lists whose order says nothing
_FACTOR = re.compile(r"^base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])\.weight$")
_MAGNITUDE = re.compile(r"^base_model\.model\.(?P<module>.+)\.lora_magnitude_vector$")
# a weight of the base that PEFT saves with the factors: save_embedding_layers is on, or lm_head is targeted
_BASE_WEIGHT = re.compile(r"^base_model\.model\.(?P<module>(?!.*\.lora_).+?)(\.base_layer)?\.weight$")


class _Options(BaseModel):
    """The keys of adapter_config.json that we read, with PEFT's defaults."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    peft_type: str
    r: PositiveInt = 8
    lora_alpha: float = 8
    rank_pattern: dict[str, PositiveInt] | None = None
    alpha_pattern: dict[str, float] | None = None
    use_rslora: bool | None = False
    use_dora: bool | None = False
    fan_in_fan_out: bool | None = False
    target_modules: str | list[str]
    target_parameters: list[str] | None = None
    exclude_modules: str | list[str] | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """A LoRA adapter as PEFT saves it.

    Args:
        folder: the folder that it was read from.
        config: the content of adapter_config.json.
        tensors: the tensors of adapter_model.safetensors: `lora_A` is (r, in_features), `lora_B` (out_features, r), and
            DoRA's `lora_magnitude_vector` (out_features,). They have PEFT's names, but for factors of experts (see
            `loram.disk.expert_factors`), which are (experts * r, in_features) and (out_features, r * experts).
        masks: module path -> the mask of its update, (out_features, in_features / 8) uint8, if the adapter was trained
            with `mask_update`; it then has `loram_masks.safetensors` beside it.
        base_weights: weight of the base -> the tensor of adapter_model.safetensors that repeats it; it is not read.
    """

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    base_weights: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path) -> "Adapter":
        """Read an adapter folder.

        Raises:
            UserError: the folder has no LoRA adapter, or a variant that we cannot widen or merge; adapter_config.json
                has a key that we do not know and that is not off; or a factor is missing, not finite, or has another
                rank than the config says.
        """
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder")
        if (folder / _PICKLED_NAME).is_file() and not (folder / WEIGHTS_NAME).is_file():
            raise UserError(f"{folder / _PICKLED_NAME}: pickled, so it is not opened; save the adapter as safetensors")
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            if not (folder / name).is_file():
                raise UserError(f"{folder}: no {name} here, so this is not a LoRA adapter folder")
        config, file = read_json(folder / CONFIG_NAME), TensorFile(folder / WEIGHTS_NAME)
        repeated = {f"{match['module']}.weight": name for name in file.specs if (match := _BASE_WEIGHT.match(name))}
        tensors, masks = {name: file.read(name) for name in file.specs if name not in repeated.values()}, {}
        if (folder / MASKS_NAME).is_file():
            bits = TensorFile(folder / MASKS_NAME)
            masks = {name.removesuffix(".mask"): bits.read(name) for name in bits.specs}
        adapter = cls(folder=folder, config=config, tensors=tensors, masks=masks, base_weights=repeated)
        adapter._check_config()
        targets = adapter._options.target_parameters
        adapter = dataclasses.replace(adapter, tensors={own_name(name, targets): tensors[name] for name in tensors})
        adapter._check_tensors()
        return adapter

    def _check_config(self) -> None:
        kind, where = self.config.get("peft_type"), self.folder / CONFIG_NAME
        if kind != "LORA":
            raise UserError(f"{self.folder}: a {kind} adapter; only LoRA and DoRA are supported")
        if self._options.fan_in_fan_out:
            raise UserError(f"{self.folder}: fan_in_fan_out adapters are for Conv1D models, which we do not support")
        if (key := refused_key(self.config, READ)) is not None:
            unknown = (
                "LoRAM does not know an adapter with it; train one without it, or remove the key if it says nothing "
                "about the weights"
            )
            raise UserError(f"{where}: {key} is {shown(self.config[key])}, and {INSTEAD.get(key, unknown)}")
        if changes_the_base(initial := self.config.get("init_lora_weights", True)):
            raise UserError(
                f"{where}: init_lora_weights is {initial!r}, which takes a part out of the base's weights, so this "
                "adapter does not fit the base; convert it with PEFT: "
                "save_pretrained(..., path_initial_model_for_weight_conversion=...)"
            )

    def _check_tensors(self) -> None:
        where = self.folder / WEIGHTS_NAME
        for name, tensor in self.tensors.items():
            if ".lora_embedding_" in name:
                raise UserError(f"{where}: {name} {INSTEAD['lora_embedding']}")
            if _FACTOR.match(name) is None and not (self.dora and _MAGNITUDE.match(name)):
                raise UserError(
                    f"{where}: {name} is not a LoRA factor (base_model.model.MODULE.lora_A.weight or lora_B)"
                )
            if not torch.isfinite(tensor).all():
                raise UserError(f"{where}: {name} has values that are not finite")
        for module, factors in self.modules.items():
            if missing := {"A", "B"} - factors.keys():
                raise UserError(f"{where}: {module} lacks lora_{min(missing)}")
            rank = self.rank(module)
            for (factor, tensor), axis in zip(sorted(factors.items()), (0, 1), strict=True):
                if tensor.ndim != 2 or tensor.shape[axis] != rank * (self.experts(module) or 1):
                    raise UserError(
                        f"{where}: {module}.lora_{factor} has shape {tuple(tensor.shape)}, "
                        f"but {CONFIG_NAME} says rank {rank}"
                    )
            if self.dora:
                self._check_magnitude(module, factors["B"].shape[0])
        if not self.modules:
            raise UserError(f"{where}: holds no LoRA factors")

    def _check_magnitude(self, module: str, rows: int) -> None:
        where, magnitude = self.folder / WEIGHTS_NAME, self.magnitudes.get(module)
        if magnitude is None:
            raise UserError(f"{where}: {module} lacks lora_magnitude_vector, though {CONFIG_NAME} says use_dora")
        if magnitude.shape != (rows,):
            raise UserError(
                f"{where}: {module}.lora_magnitude_vector has shape {tuple(magnitude.shape)}, not ({rows},)"
            )

    @cached_property
    def _options(self) -> _Options:
        config = self.config
        if config.get("target_modules") is None and config.get("target_parameters"):  # to PEFT that is no module
            config = {**config, "target_modules": []}
        try:
            return _Options.model_validate(config)
        except ValidationError as error:
            raise UserError(f"{self.folder / CONFIG_NAME}: {first_problem(error)}") from error

    @cached_property
    def modules(self) -> dict[str, dict[str, Tensor]]:
        """The factors `A` and `B` of every adapted module, by its path in the base (`model.layers.3.mlp.up_proj`)."""
        modules: dict[str, dict[str, Tensor]] = {}
        for name, tensor in self.tensors.items():
            if match := _FACTOR.match(name):
                modules.setdefault(match["module"], {})[match["factor"]] = tensor
        return modules

    @cached_property
    def of_experts(self) -> tuple[str, ...]:
        """The adapted tensors of experts among `modules`."""
        return tuple(module for module in self.modules if is_of_experts(module))

    @property
    def dora(self) -> bool:
        """Return whether this is a DoRA adapter, which also has the length of every row of the adapted weights."""
        return bool(self._options.use_dora)

    @cached_property
    def magnitudes(self) -> dict[str, Tensor]:
        """The lengths that a DoRA adapter gives to the rows of a weight, by the module's path in the base."""
        return {match["module"]: tensor for name, tensor in self.tensors.items() if (match := _MAGNITUDE.match(name))}

    @cached_property
    def fingerprint(self) -> str:
        """The SHA-256 of the two files."""
        digest = hashlib.sha256()
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            with (self.folder / name).open("rb") as file:  # in pieces, since an adapter may have hundreds of megabytes
                while piece := file.read(1 << 20):
                    digest.update(piece)
        return digest.hexdigest()

    def scaling(self, module: str) -> float:
        """Return the factor that PEFT multiplies B·A by: alpha / r, or alpha / sqrt(r) with rsLoRA."""
        rank, alpha = self.rank(module), self.alpha(module)
        return alpha / math.sqrt(rank) if self._options.use_rslora else alpha / rank

    def rank(self, module: str) -> int:
        """Return the rank of a module's update; of a tensor of experts, that of each expert's."""
        return int(self._pattern(self._options.rank_pattern, module, self._options.r))

    def experts(self, module: str) -> int | None:
        """Return how many experts a tensor of experts has factors for; None for any other module."""
        return self.modules[module]["A"].shape[0] // self.rank(module) if module in self.of_experts else None

    def _shape(self, module: str) -> tuple[int, ...]:
        """Return the shape of a module's update: (out_features, in_features), or with the experts before these."""
        factors, experts = self.modules[module], self.experts(module)
        shape = factors["B"].shape[0], factors["A"].shape[1]
        return shape if experts is None else (experts, *shape)

    def alpha(self, module: str) -> float:
        """Return the alpha of a module."""
        return float(self._pattern(self._options.alpha_pattern, module, self._options.lora_alpha))

    def _pattern(self, patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
        """Look a module up in `rank_pattern` or `alpha_pattern` as PEFT does: a key is a regex for a path's end."""
        for pattern, value in (patterns or {}).items():
            try:
                if re.match(rf"(.*\.)?({pattern})$", module):
                    return value
            except re.error as error:
                raise UserError(f"{self.folder / CONFIG_NAME}: {pattern!r} is not a valid regex: {error}") from error
        return default

    def delta(self, module: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Return the update scaling·B·A of a module's rows `start` to `stop`, masked if it has a mask: float32.

        The rows of a tensor of experts are experts; each of them is (out_features, in_features).
        """
        a, b = (self.modules[module][factor] for factor in "AB")
        if (experts := self.experts(module)) is not None:
            a, b = (factor[start:stop].float() for factor in by_expert(a, b, experts))
            return self.scaling(module) * (b @ a)
        a, b = a.float(), b.float()
        if (mask := self.masks.get(module)) is not None:
            return masked_delta(a, b[start:stop], mask[start:stop], self.scaling(module))
        return self.scaling(module) * (b[start:stop] @ a)

    def add_to_(
        self, linear: nn.Module, module: str, device: torch.device
    ) -> tuple[RemovableHandle, dict[str, Tensor]]:
        """Let a linear add a module's update, as `add_update_` does; a masked update is computed once, as a whole.

        Returns:
            The hook's handle, and the factors on the device, by PEFT's names; a masked update has none.
        """
        if module in self.masks:
            delta = self.delta(module).to(device)
            return linear.register_forward_hook(lambda _, args, output: output + args[0] @ delta.to(args[0]).T), {}
        a, b = (self.modules[module][factor].detach().to(device, torch.float32) for factor in "AB")
        names = {f"base_model.model.{module}.lora_{part}.weight": factor for part, factor in (("A", a), ("B", b))}
        return add_update_(linear, a, b, self.scaling(module)), names

    def updated(self, module: str, rows: Tensor, start: int = 0, *, transposed: bool = False) -> Tensor:
        """Return the rows of a module's weight with the adapter's update: W + scaling·B·A.

        With DoRA every row is then brought to its magnitude (arXiv 2402.09353, equation 5).

        Args:
            module: the module's path in the base.
            rows: some rows of its weight, (rows, in_features), or experts, (experts, out_features, in_features).
            start: the index of the first of them.
            transposed: whether these experts are (experts, in_features, out_features).

        Returns:
            The same shape in float32, on the rows' device.
        """
        stop = start + len(rows)
        delta = self.delta(module, start, stop).to(rows.device)
        weight = (delta.mT if transposed else delta).add_(rows)
        if self.dora:
            lengths = torch.linalg.vector_norm(weight, dim=1)  # (rows,)
            weight *= (self.magnitudes[module][start:stop].to(lengths) / lengths)[:, None]
        return weight

    def targets(self, modules: Iterable[str]) -> list[str]:
        """Return the modules that adapter_config.json targets, by PEFT's own matching.

        Args:
            modules: the paths of a model's linears, and of its tensors of experts.

        Raises:
            UserError: adapter_config.json contradicts itself.
        """
        from peft import LoraConfig
        from peft.tuners.tuners_utils import check_target_module_exists

        keys = {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"}
        options = self._options.model_dump(include=keys)
        parameters = [module for module in modules if is_of_experts(module)]
        targeted = [name for name in parameters if is_targeted(name, self._options.target_parameters)]
        if str(options["target_modules"]).lower() == ALL_LINEAR:  # which to PEFT are all but the head's
            options |= {"target_modules": r".*\.\d+\..*"}  # all in a numbered layer
        try:
            config = LoraConfig(**options)
            linears = [module for module in modules if module not in parameters]
            return [*targeted, *(module for module in linears if check_target_module_exists(config, module))]
        except (ValueError, re.error) as error:
            raise UserError(f"{self.folder / CONFIG_NAME}: {error}") from error

    def check_fits(self, shapes: Mapping[str, tuple[int, ...]], model: str, *, full: bool = False) -> None:
        """Refuse an adapter that does not fit a model: it lacks a module, has one too many, or shapes differ.

        Args:
            shapes: (out_features, in_features) of each of the model's linear modules, by path, and (experts,
                out_features, in_features) of each of its tensors of experts, by name.
            model: what the error message calls the model.
            full: whether it is a full model, so that narrower factors come from a pruned one.

        Raises:
            UserError: the message names the file and the key, or the module and both shapes. It says `loram recover`
                if the adapter was trained on the pruned model and this is the full one.
        """
        weights = self.folder / WEIGHTS_NAME
        targets = set(self.targets(shapes))
        for module in self.modules:
            key, shape = self._key(module), self._shape(module)
            if module not in shapes:
                raise UserError(f"{weights}: {key} adapts {module}, which {model} does not have")
            if module not in targets:
                raise UserError(f"{weights}: {key} adapts {module}, which {CONFIG_NAME} does not target")
            if shape != shapes[module]:
                what = f"{self.folder}: {module} is for a weight of shape {shape}, but {model} has {shapes[module]}"
                if full and all(a <= b for a, b in zip(shape, shapes[module], strict=True)):
                    raise UserError(
                        f"{what}; this adapter was trained on a pruned model: run `loram recover` on it first"
                    )
                raise UserError(f"{what}; it belongs to another model")
        for module in shapes:
            if module in targets - self.modules.keys():
                key = self._key(module)
                raise UserError(f"{weights}: {key} is missing, though {CONFIG_NAME} targets {module}")

    def _key(self, module: str) -> str:
        """Return the name in the file of a module's lora_A."""
        return peft_name(f"base_model.model.{module}.lora_A.weight", self._options.target_parameters)

    @property
    def in_files(self) -> dict[str, Tensor]:
        """The tensors by PEFT's names."""
        return {peft_name(name, self._options.target_parameters): tensor for name, tensor in self.tensors.items()}


def add_update_(linear: nn.Module, a: Tensor, b: Tensor, scaling: float) -> RemovableHandle:
    """Let a linear add scaling·B·A·x to its output, as PEFT does; the product is in the factors' dtype.

    This is a hook, so the module itself stays as it is; the returned handle removes the hook again.

    Args:
        linear: the module, which reads x, (..., in_features).
        a, b: lora_A, (r, in_features), and lora_B, (out_features, r).
        scaling: what the product is multiplied by.
    """

    def add(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return (output + (args[0].to(a.dtype) @ a.T @ b.T) * scaling).to(output.dtype)  # no name holds a part of it

    return linear.register_forward_hook(add)


def masked_delta(a: Tensor, b: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """Return the masked update scaling * M ∘ (B A): (out_features, in_features), in the factors' dtype.

    Args:
        a, b: lora_A, (r, in_features), and lora_B, (out_features, r).
        mask: (out_features, in_features / 8) uint8, as in a sparse folder.
        scaling: what the product is multiplied by.
    """
    delta: Tensor = b @ a
    return delta.mul_(scaling).mul_(unpack(mask))


def shown(value: Any) -> str:
    """Return a value of a config as an error names it, cut where it is long."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:60]}..."


def scaled(adapter: Adapter, factor: float) -> Adapter:
    """Return an adapter whose update is `factor` times as large, since every lora_B is."""
    tensors = {n: t * factor if n.endswith(".lora_B.weight") else t for n, t in adapter.tensors.items()}
    return dataclasses.replace(adapter, tensors=tensors)


def save_adapter(out: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write a stock PEFT adapter into a folder, with keys in a fixed order, so that equal adapters have equal bytes.

    The tensors are named as in `Adapter`.
    """
    ordered = {
        key: sorted(value) if key in _UNORDERED and isinstance(value, list) else value
        for key, value in sorted(config.items())
    }
    (out / CONFIG_NAME).write_text(json.dumps(ordered, indent=2) + "\n", encoding="utf-8")
    targets = config.get("target_parameters")
    stored = {peft_name(name, targets): tensor.contiguous() for name, tensor in tensors.items()}
    save_file(stored, out / WEIGHTS_NAME, {"format": "pt"})
