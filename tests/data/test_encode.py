"""Special tokens stand once, whoever wrote them."""

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from loram.data.batches import IGNORED
from loram.data.encode import Encoder
from loram.data.forms import Completion, Text


def make_tokenizer(*, bos: bool, eos: bool) -> Any:
    """A tokenizer of single characters that adds the beginning and the end token by itself, or does not."""
    inner = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(pre_tokenizers.ByteLevel.alphabet())}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["<bos>", "<eos>"])
    single = ("<bos> " if bos else "") + "$A" + (" <eos>" if eos else "")
    tokens = [(token, inner.token_to_id(token)) for token in ("<bos>", "<eos>")]
    inner.post_processor = processors.TemplateProcessing(single=single, pair=f"{single} $B:1", special_tokens=tokens)
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<bos>", eos_token="<eos>")


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("eos", [False, True])
@pytest.mark.parametrize("first", ["", "<bos>", " <bos>"])
@pytest.mark.parametrize("last", ["", "<eos>", "<eos>\n"])
def test_a_text_has_one_beginning_and_one_end(bos: bool, eos: bool, first: str, last: str) -> None:
    tokenizer = make_tokenizer(bos=bos, eos=eos)
    expected = (first or ("<bos>" if bos else "")) + "ab" + (last or "<eos>")
    [(ids, labels)] = Encoder(tokenizer).encode(Text(text=f"{first}ab{last}"), 100, "rows.jsonl:1")
    assert tokenizer.decode(ids) == expected
    assert labels == ids
    [(ids, labels)] = Encoder(tokenizer).encode(Completion(prompt=f"{first}a", completion=f"b{last}"), 100, "rows:1")
    assert tokenizer.decode(ids) == expected
    assert tokenizer.decode([label for label in labels if label != IGNORED]) == "b" + (last or "<eos>")


def test_a_token_across_the_end_of_the_prompt_is_in_the_loss() -> None:
    """Otherwise the first character of the answer would not be learnt."""
    inner = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2, "<eos>": 3}, merges=[("a", "b")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")
    [(ids, labels)] = Encoder(tokenizer).encode(Completion(prompt="ba", completion="bb"), 100, "rows.jsonl:1")
    assert (ids, labels) == ([1, 2, 1, 3], [IGNORED, 2, 1, 3])
