"""Tiny models of every family, built on the fly, and a tiny tokenizer with a chat template."""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs the network, and none may wait for it
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny matrices: a second thread only gets in the way
os.environ.setdefault("LORAM_CACHE", tempfile.mkdtemp(prefix="loram-tests-"))  # what users keep is none of ours

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedTokenizerFast

import loram
from loram.model.families import family_of

FAMILIES = ("llama", "qwen3", "gemma2", "phi3")
# Families whose rows differ little from Llama's. They have the laws, streaming, the planner's sums and a chain of
# stages (test_near_llama.py), but not the hundreds of tests that run on FAMILIES.
NEAR_LLAMA = (
    "mistral",
    "qwen2",
    "gemma3_text",
    "seed_oss",
    "smollm3",
    "granite",
    "ministral3",
    "ernie4_5",
    "hunyuan_v1_dense",
    "exaone4",
    "olmo2",
    "olmo3",
    "glm4",
    "cohere2",
)
# Mixtures of experts. Their tests are in test_experts.py, and the planner's sums.
EXPERTS = (
    "qwen3_moe",
    "mixtral",
    "gpt_oss",
    "glm4_moe",
    "olmoe",
    "qwen2_moe",
    "ernie4_5_moe",
    "minimax_m2",
    "granitemoe",
)
# Families whose layers are of several kinds; tested as those near Llama.
HYBRIDS = ("qwen3_5_text", "lfm2")
HYBRID_EXPERTS = ("qwen3_5_moe_text", "qwen3_next")  # their laws are in test_experts.py
VARIED = ("gemma4_text",)  # families whose layers differ in size; tested as those near Llama
EVERY_FAMILY = (*FAMILIES, *NEAR_LLAMA, *HYBRIDS, *VARIED)
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
VOCABULARY = 320
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_DELTA_NETS = {
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_num_value_heads": 4,
    "linear_value_head_dim": 6,
    "linear_conv_kernel_dim": 3,
}
_SHARED_EXPERT = {
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 12,
}
# What each family needs beyond SIZES, so that the odd parts of it are tested: biases, windows, untied or tied heads.
ODDITIES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "mistral": {"sliding_window": 8},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"attention_bias": True},
    "gemma2": {"sliding_window": 8, "query_pre_attn_scalar": 8},
    "gemma3_text": {"sliding_window": 8, "query_pre_attn_scalar": 8},
    "phi3": {
        "sliding_window": 8,
        "original_max_position_embeddings": 256,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    },
    "seed_oss": {"mlp_bias": True},
    "smollm3": {"attention_bias": True, "use_sliding_window": True, "sliding_window": 8, "no_rope_layer_interval": 2},
    "granite": {
        "attention_bias": True,
        "mlp_bias": True,
        "embedding_multiplier": 6.0,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.5,
        "logits_scaling": 3.0,
        "tie_word_embeddings": True,
    },
    "ministral3": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1000000.0,
            "factor": 16.0,
            "original_max_position_embeddings": 8,  # queries are scaled from here on
            "max_position_embeddings": 128,
            "llama_4_scaling_beta": 0.1,
        },
        "max_position_embeddings": 128,
    },
    "ernie4_5": {"use_bias": True},
    "hunyuan_v1_dense": {"attention_bias": True},
    "exaone4": {"sliding_window": 8, "sliding_window_pattern": 2},
    "olmo2": {"attention_bias": True, "rms_norm_eps": 0.1},  # large enough that it matters how it is scaled
    "olmo3": {"sliding_window": 8, "rms_norm_eps": 0.1},
    "glm4": {},
    "cohere2": {"attention_bias": True, "sliding_window": 8, "logit_scale": 0.3},
    "qwen3_moe": {
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "mlp_only_layers": [1],
        "norm_topk_prob": True,
        "attention_bias": True,
    },
    "mixtral": {"num_local_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 16, "sliding_window": 8},
    "qwen3_5_text": {"attention_bias": True, "full_attention_interval": 2, **_DELTA_NETS},
    "qwen3_5_moe_text": {**_DELTA_NETS, **_SHARED_EXPERT, "full_attention_interval": 3},
    "qwen3_next": {
        **_DELTA_NETS,
        **_SHARED_EXPERT,
        "full_attention_interval": 3,
        "mlp_only_layers": [1],
        "attention_bias": True,
    },
    # the MLP is 32 wide, the next multiple of 8 after two thirds of 40
    "lfm2": {"full_attn_idxs": [1, 3], "conv_bias": True, "block_multiple_of": 8},
    # the last layer reads the keys and values of layer 2; layers 1 and 2 take their keys for values
    "gemma4_text": {
        "layer_types": [f"{kind}_attention" for kind in ("sliding", "full", "full", "sliding", "full")],
        "sliding_window": 8,
        "global_head_dim": 16,
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 2,
        "num_kv_shared_layers": 1,
        "use_double_wide_mlp": True,
        "hidden_size_per_layer_input": 6,
        "vocab_size_per_layer_input": VOCABULARY,
        "attention_bias": True,
        "final_logit_softcapping": 5.0,
    },
    "gpt_oss": {
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "intermediate_size": 16,
        "sliding_window": 8,
        "swiglu_limit": 0.5,  # small enough that it limits
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 8,
        },
    },
    "glm4_moe": {
        "n_routed_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "n_shared_experts": 2,
        "use_qk_norm": True,
        "attention_bias": True,
        "routed_scaling_factor": 1.5,
    },
    "olmoe": {
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "intermediate_size": 16,
        "head_dim": 4,
        "clip_qkv": 1.0,
        "rms_norm_eps": 0.1,
    },
    "qwen2_moe": {
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 24,
        "mlp_only_layers": [1],
        "use_sliding_window": True,
        "sliding_window": 8,
    },
    "ernie4_5_moe": {"moe_num_experts": 6, "moe_k": 2, "moe_intermediate_size": 16},
    "minimax_m2": {
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "intermediate_size": 16,
        "rotary_dim": 4,
        "rms_norm_eps": 0.1,
    },
    "granitemoe": {
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "intermediate_size": 16,
        "attention_bias": True,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.5,
        "logits_scaling": 3.0,
    },
}
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ROWS = [
    {"question": f"What is {a} plus {b}?", "answer": f"{a} plus {b} is {a + b}."} for a in range(4) for b in range(5)
]


# Modules that `make check` leaves out: they train, start processes of their own, or run on every family.
SLOW = (
    "test_align",
    "test_anchors",
    "test_belonging",
    "test_compare",
    "test_configs",
    "test_correct",
    "test_depth",
    "test_dry_run",
    "test_gradients",
    "test_end_to_end",
    "test_examples",
    "test_expert_adapters",
    "test_kill",
    "test_laws",
    "test_loading",
    "test_memory",
    "test_methods",
    "test_near_llama",
    "test_nf4",
    "test_package",
    "test_packed",
    "test_paths",
    "test_pipeline",
    "test_planner",
    "test_polish",
    "test_processes",
    "test_prune",
    "test_resume",
    "test_sparse",
    "test_sparse_train",
    "test_stopping",
    "test_streamed",
    "test_teach",
    "test_template",
    "test_train",
    "test_unevaluated",
    "test_wrapped",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of slow modules, so that `-m "not slow"` leaves them out."""
    for item in items:
        if item.path.stem in SLOW:
            item.add_marker(pytest.mark.slow)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call() -> None:
    """Give every test the float arithmetic that Python starts with.

    `loram` flushes denormals for its whole process, which is right for a command, but hypothesis refuses to draw
    floats there. A hook and not a fixture: it comes after the fixtures of every scope, some of which run a stage.
    """
    torch.set_flush_denormal(False)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE with a few merges; it pads with its end-of-sequence token, as many chat models do."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator([json.dumps(row) for row in ROWS], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=CHAT_TEMPLATE,
    )


def make_model(folder: Path, model_type: str, tokenizer: Any, seed: int = 0, **changes: Any) -> Path:
    """A small random model of a family, saved as an ordinary folder."""
    config = AutoConfig.for_model(model_type, **{**SIZES, **ODDITIES[model_type], **changes})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return _save_disturbed(model, tokenizer, folder)


def _save_disturbed(model: Any, tokenizer: Any, folder: Path) -> Path:
    """Save a model after noise is added to all that it saves, with a tokenizer."""
    stored = model.state_dict()
    buffers = [(name, buffer) for name, buffer in model.named_buffers() if name in stored]
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *buffers):
            if name.endswith("A_log"):
                tensor.fill_(-2)  # else states forget at once, and nobody would notice how they are kept
            # biases and norms too, so that forgetting one shows; and large enough that every unit matters
            tensor.add_(0.1 * torch.randn_like(tensor))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


_TOWERS: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "out_hidden_size": 32,
    "image_size": 28,
    "patch_size": 14,
}
_IMAGE = {"image_token_index": 300, "image_token_id": 300, "boi_token_index": 301, "eoi_token_index": 302}
# wrapper -> the family of its text model, its tower, and what else its config needs
WRAPPED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gemma3": ("gemma3_text", "siglip_vision_model", {"mm_tokens_per_image": 4}),
    "gemma4": ("gemma4_text", "gemma4_vision", {"audio_config": None}),
    "mistral3": ("mistral", "pixtral", {"tie_word_embeddings": False}),
    "llava": ("llama", "clip_vision_model", {}),
    "llava_next": ("mistral", "clip_vision_model", {}),
    "llava_onevision": ("qwen2", "siglip_vision_model", {}),
    "internvl": ("qwen2", "internvl_vision", {}),
    "qwen3_5": ("qwen3_5_text", "qwen3_5_vision", {"video_token_id": 303}),
    "qwen3_5_moe": ("qwen3_5_moe_text", "qwen3_5_moe_vision", {"video_token_id": 303}),
}


def make_wrapped(folder: Path, model_type: str, tokenizer: Any, *, today: bool = True, **changes: Any) -> Path:
    """A small random wrapped model, saved as an ordinary folder.

    Its tensors have the names of today's modules (`model.language_model.layers...`), or those that transformers writes
    (`language_model.model.layers...`).
    """
    text, tower, more = WRAPPED[model_type]
    config = AutoConfig.for_model(
        model_type,
        text_config={**SIZES, **ODDITIES[text], "model_type": text, "final_logit_softcapping": 5.0},
        vision_config={**_TOWERS, "model_type": tower},
        **{**more, **_IMAGE, **changes},
    )
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    _save_disturbed(model, tokenizer, folder)
    (folder / "preprocessor_config.json").write_text('{"size": 28}')
    if today:
        weights = load_file(folder / "model.safetensors")
        renamed = {re.sub("^language_model.model.", "model.language_model.", name): weights[name] for name in weights}
        renamed = {re.sub("^language_model.lm_head", "lm_head", name): tensor for name, tensor in renamed.items()}
        renamed = {re.sub("^(vision_tower|multi_modal)", r"model.\1", name): renamed[name] for name in renamed}
        save_file(renamed, folder / "model.safetensors", {"format": "pt"})
    return folder


def elsewhere(code: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run Python where loram is never imported."""
    environment = {**os.environ, "HF_MODULES_CACHE": str(cwd / "modules")}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, env=environment, check=False, stdin=subprocess.DEVNULL
    )


def random_adapter(model: Any, folder: Path, **options: Any) -> Path:
    """A LoRA adapter with no zeros in it, on all linears of the layers, saved by PEFT."""
    torch.manual_seed(3)
    targets = targets_of(model.config.model_type)
    chosen = {"r": 3, "lora_alpha": 6, "target_modules": targets, "init_lora_weights": False, **options}
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **chosen))
    adapted.save_pretrained(folder, save_embedding_layers=False)
    return folder


def targets_of(family: str, *more: str) -> list[str]:
    """The target modules of an adapter on all linears of a family's layers, and on `more`."""
    return [*family_of({"model_type": family}).adapter_targets, *more]


_FUSED = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj"),
    **dict.fromkeys(("gate_proj", "up_proj"), "gate_up_proj"),
}


def own_names(family: str, options: dict[str, Any]) -> dict[str, Any]:
    """PEFT's options with the names of Llama's linears replaced by those of a family's."""
    own, names = targets_of(family), dict[str, str]()
    names |= {name: fused for name, fused in _FUSED.items() if name not in own}

    def renamed(value: Any) -> Any:
        if isinstance(value, list):
            return list(dict.fromkeys(names.get(part, part) for part in value))
        return {names.get(key, key): part for key, part in value.items()} if isinstance(value, dict) else value

    return {key: renamed(value) for key, value in options.items()}


def unfused(layer: Any, of: Callable[[Any], torch.Tensor]) -> dict[str, torch.Tensor]:
    """What `of` gives for the linears of a tiny model's layer, by the names of Llama's; a fused one is taken apart."""
    tensors = {
        name: of(part)
        for block in (layer.self_attn, layer.mlp)
        for name, part in block.named_children()
        if isinstance(part, torch.nn.Linear)
    }
    if "qkv_proj" in tensors:
        queries, keys, values = tensors.pop("qkv_proj").split([64, 32, 32])
        gate, up = tensors.pop("gate_up_proj").split(40)
        tensors |= {"q_proj": queries, "k_proj": keys, "v_proj": values, "gate_proj": gate, "up_proj": up}
    return tensors


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, as a share of the largest expected value."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


def weakened(folder: Path, group: int, channel: int) -> Path:
    """Make one group and one channel of a tiny model's layer 2 contribute next to nothing."""
    weights = load_file(folder / "model.safetensors")
    queries, head = slice(16 * group, 16 * (group + 1)), slice(8 * group, 8 * (group + 1))
    for name, tensor in weights.items():
        parts = {"q_proj": queries, "v_proj": head, "gate_proj": channel, "up_proj": channel}
        columns = {"o_proj": queries, "down_proj": channel}
        linear = name.split(".")[-2]
        if not name.startswith("model.layers.2."):
            continue
        if linear in parts:
            tensor[parts[linear]] *= 1e-4
        elif linear in columns and tensor.ndim == 2:
            tensor[:, columns[linear]] *= 1e-4
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


class _Folders(dict[str, Path]):
    """Family -> folder, which is made when it is first wanted."""

    def __init__(self, make: Callable[[str], Path]) -> None:
        super().__init__()
        self.make = make

    def __missing__(self, family: str) -> Path:
        self[family] = self.make(family)
        return self[family]


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> dict[str, Path]:
    """Family -> folder of a tiny model of it."""
    root = tmp_path_factory.mktemp("models")
    return _Folders(lambda family: make_model(root / family, family, tokenizer))


@pytest.fixture(scope="session")
def pruned_models(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Family -> folder of its tiny model pruned by half in layers 2 and 3."""
    root = tmp_path_factory.mktemp("pruned")
    options = {"ratio": 0.5, "criterion": "magnitude", "keep_first": 2, "keep_last": 1}

    def make(family: str) -> Path:
        loram.prune(tiny_models[family], root / family, **options)
        return root / family

    return _Folders(make)


@pytest.fixture(scope="session")
def tiny_llama(tiny_models: dict[str, Path]) -> Path:
    return tiny_models["llama"]


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small question-answer data set."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return path


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., Path]:
    """Write rows into a .jsonl file: `jsonl({"text": "a"}, ...)`."""

    def write(*rows: dict[str, Any], name: str = "data.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write
