"""The pruning plan: what each layer of a model keeps, and everything needed to widen back."""

import hashlib
import json
import math
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from torch import Tensor

from loram.base.errors import UserError, first_problem
from loram.model.architecture import ARCHITECTURES, Architecture, Cut, Geometry, Space
from loram.model.sparsity import STRUCTURED, kept_values, n_of_m

PLAN_NAME, MASKS_NAME = "loram_plan.json", "loram_masks.safetensors"


class BaseReference(BaseModel):
    """The full model a plan was made from: its hub id or absolute path, and the fingerprint of its weights."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    fingerprint: str


class PruningPlan(BaseModel):
    """What every layer keeps: sorted indices of units a space where layers are narrowed, masks where they are sparse.

    Args:
        model_type: family of the full model.
        base: which full model.
        geometry: its sizes, so that recovery never reads its weights.
        layers: layer -> space name -> kept unit indices, sorted. A layer or space not named keeps everything.
        criterion, ratio, seed, keep_first, keep_last: how the plan was chosen.
        pattern: `structured`, or that of sparse layers: `unstructured`, or n:m, which keeps n of every m weights.
        masks: of a sparse plan, the SHA-256 of `loram_masks.safetensors`: `model.layers.3.mlp.up_proj.mask` is
            (out_features, in_features / 8) uint8, bit j of byte i for column 8 * i + j, 1 where the weight stays.
        bias_compensation: whether the pruned layers' o_proj and down_proj have a bias for what they lost.
        versions: of the libraries that made it.

    Example: `{4: {"kv_groups": (0, 2), "channels": (1, 5, 7)}}` keeps two groups and three channels of layer 4.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ignored_types=(cached_property,))

    format_version: Literal[1] = 1
    model_type: str
    base: BaseReference
    geometry: Geometry
    criterion: str
    ratio: float = Field(gt=0, lt=1)
    bias_compensation: bool = False
    seed: int
    keep_first: int = Field(ge=0)
    keep_last: int = Field(ge=0)
    pattern: str = STRUCTURED
    masks: str | None = None
    versions: dict[str, str]
    layers: dict[int, dict[str, tuple[int, ...]]]

    @field_validator("model_type")
    @classmethod
    def _known_family(cls, value: str) -> str:
        if value not in ARCHITECTURES:
            raise ValueError(f"{value!r} is not a supported family ({', '.join(ARCHITECTURES)})")
        return value

    @model_validator(mode="after")
    def _kept_units_exist(self) -> "PruningPlan":
        sizes = {space.name: self.geometry.units(space) for space in ARCHITECTURES[self.model_type].spaces}
        for layer, spaces in self.layers.items():
            if not 0 <= layer < self.geometry.num_hidden_layers:
                raise ValueError(f"layer {layer} is outside 0..{self.geometry.num_hidden_layers - 1}")
            for name, kept in spaces.items():
                if name not in sizes:
                    raise ValueError(f"layer {layer}: unknown space {name!r}")
                if not kept or any(a >= b for a, b in pairwise(kept)):
                    raise ValueError(f"layer {layer} {name}: kept indices must be at least one, sorted and distinct")
                if kept[0] < 0 or kept[-1] >= sizes[name]:
                    raise ValueError(f"layer {layer} {name}: kept indices must lie in 0..{sizes[name] - 1}")
        return self

    @model_validator(mode="after")
    def _narrow_or_sparse(self) -> "PruningPlan":
        n_of_m(self.pattern)
        if self.sparse != (self.masks is not None) or (self.sparse and (self.layers or self.bias_compensation)):
            raise ValueError(f"pattern {self.pattern}: sparse plans have masks and nothing narrowed, others no masks")
        return self

    @property
    def sparse(self) -> bool:
        """Whether weights were zeroed one by one, so that all shapes are the full model's."""
        return self.pattern != STRUCTURED

    @property
    def sparse_layers(self) -> range:
        """The layers whose linears are sparse."""
        return range(self.keep_first, self.geometry.num_hidden_layers - self.keep_last) if self.sparse else range(0)

    def kept_values(self) -> dict[str, int]:
        """How many weights a sparse layer keeps of each linear, by the linear's path in the layer."""
        shapes = {linear: self.geometry.linear_shape(linear) for linear in self.architecture.linears}
        return {linear: kept_values(*shape, self.pattern, self.ratio) for linear, shape in shapes.items()}

    def sparsity(self) -> dict[str, Any] | None:
        """What config.json of a sparse model says about it (see `modeling_loram`); None for other plans."""
        found = self.sparse_layers
        return {"layers": [found.start, found.stop], "values": self.kept_values()} if self.sparse else None

    @property
    def architecture(self) -> Architecture:
        """The family's row."""
        return ARCHITECTURES[self.model_type]

    def units(self, layer: int) -> dict[str, int]:
        """Kept units of every space in a layer, by space name."""
        narrowed = self.layers.get(layer, {})
        return {
            space.name: len(narrowed[space.name]) if space.name in narrowed else self.geometry.units(space)
            for space in self.architecture.spaces
        }

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """(out_features, in_features) of every linear of the pruned model, lm_head included, by module path."""
        return self.geometry.linear_shapes(self.architecture.linears, self.units)

    def kept_elements(self, layer: int, space: Space, cut: Cut) -> Tensor | None:
        """Row or column indices (int64, sorted) that a cut keeps in a layer, or None where it keeps all.

        Example: units (0, 2) of head_dim 2 keep the rows 0, 1, 4, 5.
        """
        kept = self.layers.get(layer, {}).get(space.name)
        if kept is None:
            return None
        width = self.geometry.unit_size(cut.unit)
        return (torch.tensor(kept).unsqueeze(1) * width + torch.arange(width)).flatten()

    def per_layer_config(self) -> dict[str, dict[str, int]]:
        """The narrowed layers' widths as transformers' `per_layer_config`."""
        group = self.geometry.num_attention_heads // self.geometry.num_key_value_heads
        result = {}
        for layer in sorted(self.layers):
            units = self.units(layer)
            result[str(layer)] = {
                "num_attention_heads": units["kv_groups"] * group,
                "num_key_value_heads": units["kv_groups"],
                "intermediate_size": units["channels"],
            }
        return result

    def parameters(self) -> tuple[int, int]:
        """(parameters of the full model, parameters of the pruned model; of sparse linears the weights that stay)."""
        full = pruned = self.geometry.other_parameters()
        for layer in range(self.geometry.num_hidden_layers):
            full += self.geometry.layer_parameters(self.architecture)
            pruned += self.geometry.layer_parameters(self.architecture, self.units(layer))
        if self.bias_compensation:
            consumers = [cut.linear for space in self.architecture.spaces for cut in space.cuts if cut.axis == 1]
            new = [linear for linear in consumers if linear not in self.geometry.biases]
            pruned += len(self.layers) * len(new) * self.geometry.hidden_size
        if self.sparse:
            shapes = [self.geometry.linear_shape(linear) for linear in self.architecture.linears]
            pruned -= len(self.sparse_layers) * (sum(map(math.prod, shapes)) - sum(self.kept_values().values()))
        return full, pruned

    def to_json(self) -> str:
        """The plan as JSON: a key a line, a layer a line, keys and layers in a fixed order."""
        new = set() if self.sparse else {"pattern", "masks"}  # older plans keep their fingerprints
        fields: dict[str, Any] = self.model_dump(mode="json", exclude=new)
        layers = fields.pop("layers")
        rows = [f"    {json.dumps(key)}: {json.dumps(layers[key], sort_keys=True)}" for key in sorted(layers, key=int)]
        lines = [f"  {json.dumps(key)}: {json.dumps(value, sort_keys=True)}," for key, value in fields.items()]
        body = ",\n".join(rows)
        return "\n".join(["{", *lines, '  "layers": {', *([body] if rows else []), "  }", "}", ""])

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the JSON form."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def save(self, folder: Path) -> None:
        """Write `loram_plan.json` into a folder."""
        (folder / PLAN_NAME).write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "PruningPlan":
        """Read a folder's plan; the inverse of `save`.

        Raises:
            UserError: there is no plan, or it is not a valid one; the message names the file and the place in it.
        """
        path = folder / PLAN_NAME
        if not path.is_file():
            raise UserError(
                f"{folder}: no {PLAN_NAME} here, so this is not a folder that `loram prune` or `train` made"
            )
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except (ValidationError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: not a valid pruning plan: {first_problem(error)}") from error


def find_plan(folder: Path) -> PruningPlan | None:
    """The plan that travels with a folder, or None where there is none."""
    return PruningPlan.load(folder) if (folder / PLAN_NAME).exists() else None
