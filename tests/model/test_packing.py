"""What config.json says about weights in few bits is read, or refused in one line."""

from typing import Any

import pytest

import loram
from loram.model.packing import FORMATS, Packing, dense_config, packing_of

FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
WEIGHTS = {"type": "float", "num_bits": 8, "strategy": "channel", "symmetric": True}


def compressed(**changes: Any) -> dict[str, Any]:
    """What llm-compressor writes for weights in FP8 with a scale per row."""
    group = {"targets": ["Linear"], "weights": {**WEIGHTS, **changes}, "input_activations": None}
    return {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": group}}


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        (None, None),
        ({}, None),
        (FP8, Packing(bits=8, block=(128, 128))),
        ({"quant_method": "fp8", "weight_block_size": None, "activation_scheme": "static"}, Packing(bits=8)),
        ({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, Packing(bits=8)),
        (compressed(), Packing(bits=8)),
        (compressed(strategy="block", block_structure=[64, 32]), Packing(bits=8, block=(64, 32))),
        (compressed(strategy="group", group_size=16), Packing(bits=8, block=(1, 16))),
        ({"quant_method": "mxfp4"}, Packing(bits=4, values="_blocks", scales=("_scales",), block=(1, 32))),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, None),
    ],
    ids=str,
)
def test_formats_that_are_read(stored: dict[str, Any] | None, expected: Packing | None) -> None:
    assert packing_of({"quantization_config": stored}, "config.json") == expected
    assert packing_of({"text_config": {"quantization_config": stored}}, "config.json") == expected


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, f"quant_method is 'gptq', and not one of {', '.join(FORMATS)}; start"),
        ({"bits": 4}, "quant_method is None"),
        ("awq", "quant_method is None"),
        ({"quant_method": ["fp8"]}, r"quant_method is \['fp8'\]"),
        ({**FP8, "weight_block_size": [128]}, r"quantization_config.weight_block_size.1 is .*Field required"),
        ({**FP8, "weight_block_size": [128, 0]}, r"quantization_config.weight_block_size.1 is 0, .* greater than 0"),
        ({**FP8, "expert_dtype": "fp4"}, "quantization_config.expert_dtype is 'fp4', which is not read for fp8"),
        ({**compressed(), "format": "pack-quantized"}, "quantization_config.format is 'pack-quantized', which is not"),
        ({**compressed(), "config_groups": {}}, "quantization_config.config_groups is {}, which is not read"),
        (compressed(num_bits=4), r"config_groups.group_0.weights.num_bits is 4, which is not read .*start from"),
        (compressed(type="int"), "config_groups.group_0.weights.type is 'int'"),
        (compressed(symmetric=False), "config_groups.group_0.weights.symmetric is False"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "quantization_config.load_in_8bit is True"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quantization_config.bnb_4bit_quant_type is 'fp4'"),
    ],
    ids=str,
)
def test_other_formats_are_refused(stored: Any, message: str) -> None:
    with pytest.raises(loram.UserError, match=f"^config.json: .*{message}") as refusal:
        packing_of({"quantization_config": stored}, "config.json")
    assert "\n" not in str(refusal.value)
    assert str(refusal.value).endswith("; start from the weights in 16 or 32 bits")


def test_groups_of_different_blocks_are_refused() -> None:
    two = compressed(block_structure=[64, 32])
    two["config_groups"]["group_1"] = {"weights": {**WEIGHTS, "group_size": 16}}
    with pytest.raises(loram.UserError, match="groups differ in the size of their blocks"):
        packing_of({"quantization_config": two}, "config.json")


def test_the_config_of_dense_weights_says_nothing_of_packed_ones() -> None:
    config = {"hidden_size": 8, "quantization_config": FP8, "text_config": {"a": 1, "quantization_config": FP8}}
    assert dense_config(config) == {"hidden_size": 8, "text_config": {"a": 1}}
