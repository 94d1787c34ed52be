"""GGUF files as ordinary model folders: a file is converted once, and then read like any other model."""

import hashlib
from pathlib import Path

import torch
from torch import nn

from loram.base import processes
from loram.base.errors import UserError
from loram.base.hashes import file_sha256
from loram.base.paths import cache_folder, local
from loram.disk.artifacts import check_output, find_manifest, publish
from loram.disk.files import read_json, refuse_pointer, write_json
from loram.disk.tensorfile import TensorSpec
from loram.disk.writer import ShardedWriter
from loram.model.modeling_loram import older_rope_keys


def cached_conversion(path: Path) -> Path:
    """Return the folder a GGUF file was converted into, in loram's cache.

    Raises:
        UserError: it is not there yet, and several processes would convert it at the same time.
    """
    stat = path.stat()
    key = hashlib.sha256(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:16]
    folder = cache_folder() / f"{path.stem}-{key}"
    if not folder.exists() or find_manifest(folder) is None:
        if processes.count() > 1:
            raise UserError(f"{path}: convert it first, in one process: loram convert {path} FOLDER")
        convert_gguf(path, folder)
    return folder


def convert_gguf(path: str | Path, out: str | Path) -> Path:
    """Dequantise a GGUF file into a Hugging Face folder: float32 safetensors, config, tokenizer, chat template.

    transformers reads the file. float32 keeps exactly the values that `from_pretrained(..., gguf_file=...)` gives.

    Raises:
        UserError: there is no such file, it is not GGUF, or transformers does not know its architecture.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path, out = local(path), check_output(out)
    check_gguf(path)
    folder, name = str(path.parent), path.name
    with publish(out, kind="base", made_from={"gguf": file_sha256(path)}) as staging:
        try:
            model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
        except (ValueError, KeyError, NotImplementedError, ImportError) as error:
            raise UserError(f"{path}: transformers cannot read this GGUF file: {str(error).splitlines()[0]}") from error
        config = model.config
        del config.quantization_config
        config.architectures = [type(model).__name__]
        config.save_pretrained(staging)
        model.generation_config.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        _let_transformers_4_read_(staging)
        head: nn.Module = model.get_output_embeddings()
        shared = [f"{path}.weight" for path, module in model.named_modules() if module is head]
        left_out = shared if config.tie_word_embeddings else []
        tensors = {key: value for key, value in model.state_dict().items() if key not in left_out}
        with ShardedWriter(staging, {key: TensorSpec.of(tensor) for key, tensor in tensors.items()}) as writer:
            for key, tensor in tensors.items():
                writer.write(key, tensor)
    return out


def check_gguf(path: Path) -> None:
    """Refuse what is not a GGUF file.

    Raises:
        UserError: there is no such file, or it begins as no GGUF file does.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    refuse_pointer(path)
    with path.open("rb") as handle:
        if handle.read(4) != b"GGUF":
            raise UserError(f"{path}: not a GGUF file (it does not begin with the letters GGUF)")


def _let_transformers_4_read_(folder: Path) -> None:
    """Add to config.json what transformers 4 reads, and name the tokenizer's class as both versions know it."""
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", config | older_rope_keys(config.get("rope_parameters") or {}))
    tokenizer = read_json(folder / "tokenizer_config.json")
    if tokenizer.get("tokenizer_class") == "TokenizersBackend":
        write_json(folder / "tokenizer_config.json", tokenizer | {"tokenizer_class": "PreTrainedTokenizerFast"})
