"""How checkpoints hold weights in few bits: one class per `quant_method` of config.json. No files, no torch.

Weights in FP8 and MXFP4 are two tensors each, values and scales, and are read as dense ones (`loram.disk.packed`).
Weights in NF4 stay in 4 bits (`loram.compute.nf4`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, field_validator, model_validator

from loram.base.errors import UserError

_KEY = "quantization_config"
_REMEDY = "start from the weights in 16 or 32 bits"

Block = tuple[PositiveInt, PositiveInt]  # rows and columns of a weight that share a scale


@dataclass(frozen=True, kw_only=True)
class Packing:
    """How the values and scales of a weight are named and laid out.

    Args:
        bits: 8 for FP8 values in the weight's own shape; 4 for two FP4 values per byte, the first in the lower bits,
            as gpt-oss has its experts: (experts, out_features, groups, 16), read as (experts, in_features,
            out_features).
        values: what follows the weight's name in the name of its values.
        scales: what may follow the weight's name in the name of its scales.
        block: how many rows and columns share a scale, where that is not one of them or all.
    """

    bits: Literal[4, 8]
    values: str = ""
    scales: tuple[str, ...] = ("_scale_inv", "_scale")  # both are multiplied by
    block: Block | None = None


class _Format(BaseModel):
    """What is read of `quantization_config`; pydantic refuses the values that we do not read."""

    model_config = ConfigDict(frozen=True, extra="ignore", validate_default=True)

    @property
    def packing(self) -> Packing | None:
        """How weights are stored that are read as dense ones; None where they stay in 4 bits."""
        return Packing(bits=8)


class _Fp8(_Format):
    """The FP8 format of DeepSeek and Qwen, which has a scale per block or per tensor."""

    weight_block_size: Block | None = None
    expert_dtype: Literal["fp8"] = "fp8"

    @property
    def packing(self) -> Packing:
        return Packing(bits=8, block=self.weight_block_size)


class _FbgemmFp8(_Format):
    """The FP8 format of Llama 3.1 405B, which has a scale per row."""


class _Weights(BaseModel):
    type: Literal["float"] = "float"
    num_bits: Literal[8] = 8
    symmetric: Literal[True] = True
    block_structure: Block | None = None
    group_size: PositiveInt | None = None

    @property
    def block(self) -> Block | None:
        return self.block_structure or (None if self.group_size is None else (1, self.group_size))


class _Group(BaseModel):
    weights: _Weights | None = None


class _CompressedTensors(_Format):
    """The FP8 format of llm-compressor, which has a scale per tensor, row, block or group of columns."""

    format: Literal["float-quantized", "naive-quantized"]
    config_groups: dict[str, _Group] = Field(min_length=1)

    @property
    def _blocks(self) -> set[Block]:
        groups = [group.weights for group in self.config_groups.values()]
        return {weights.block for weights in groups if weights is not None and weights.block is not None}

    @model_validator(mode="after")
    def _one_block(self) -> "_CompressedTensors":
        if len(self._blocks) > 1:
            raise ValueError("groups differ in the size of their blocks")
        return self

    @property
    def packing(self) -> Packing:
        return Packing(bits=8, block=next(iter(self._blocks), None))


class _Mxfp4(_Format):
    """The format of gpt-oss: its experts are in FP4, and every 32 values share a power of two.

    The OCP Microscaling Formats, version 1.0, define it in section 5.2.
    """

    @property
    def packing(self) -> Packing:
        return Packing(bits=4, values="_blocks", scales=("_scales",), block=(1, 32))


class _Nf4(_Format):
    """The NF4 format of QLoRA, which bitsandbytes writes."""

    load_in_8bit: Literal[False] = False
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "fp4"  # transformers' default

    @field_validator("bnb_4bit_quant_type")
    @classmethod
    def _nf4(cls, value: str) -> str:
        if value != "nf4":
            raise ValueError("Input should be 'nf4'")
        return value

    @property
    def packing(self) -> None:
        return None


FORMATS: Mapping[str, type[_Format]] = MappingProxyType(
    {
        "fp8": _Fp8,
        "fbgemm_fp8": _FbgemmFp8,
        "compressed-tensors": _CompressedTensors,
        "mxfp4": _Mxfp4,
        "bitsandbytes": _Nf4,
    }
)


def packing_of(config: Mapping[str, Any], where: str) -> Packing | None:
    """Return how a checkpoint stores the weights that are read as dense ones.

    Args:
        config: the content of config.json.
        where: what error messages call that file.

    Returns:
        None where nothing is quantised, or where the weights are in NF4 and stay so.

    Raises:
        UserError: the weights are quantised in a way that is not read; names the key and its value.
    """
    text = config.get("text_config")
    stored = config.get(_KEY) or (text.get(_KEY) if isinstance(text, Mapping) else None)
    if not stored:
        return None
    method = stored.get("quant_method") if isinstance(stored, Mapping) else None
    if not isinstance(method, str) or method not in FORMATS:
        raise UserError(f"{where}: {_KEY}.quant_method is {method!r}, and not one of {', '.join(FORMATS)}; {_REMEDY}")
    try:
        return FORMATS[method].model_validate(stored).packing
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(map(str, (_KEY, *problem["loc"])))
        raise UserError(
            f"{where}: {key} is {problem['input']!r}, which is not read for {method} ({problem['msg']}); {_REMEDY}"
        ) from error


def dense_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of config.json for the same model with dense weights."""
    plain = {key: value for key, value in config.items() if key != _KEY}
    if isinstance(text := plain.get("text_config"), Mapping):
        plain["text_config"] = {key: value for key, value in text.items() if key != _KEY}
    return plain
