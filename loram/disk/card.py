"""Model cards: the README.md of a folder of ours, with the metadata that the hub reads.

A card tells how its folder was made, step by step. It takes the earlier steps and the licence from the cards of the
folders that its own was made from. No manifest lists it, so anybody may edit it.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData, metadata_load

from loram.base.paths import is_on_hub
from loram.base.vllm import serve_command
from loram.disk.adapter import CONFIG_NAME
from loram.disk.artifacts import CARD_NAME, replace_text
from loram.disk.files import read_json
from loram.model.plan import MASKS_NAME, PLAN_NAME, PruningPlan, find_plan

_TEMPLATE = Path(__file__).parent / "card.md.jinja"
_STEPS, _EVALUATION, _END = "<!-- loram: steps -->", "<!-- loram: evaluation -->", "<!-- loram: end -->"
_RELATIONS = {"adapter": "adapter", "recovered": "adapter", "quantized": "quantized"}  # all others: finetune
_TITLES = {
    "pruned": "{}, pruned",
    "adapter": "LoRA adapter for {}",
    "recovered": "LoRA adapter for {}",
    "quantized": "{} in 4 bits",
}
_LICENCE = ("license", "license_name", "license_link")


@dataclass(frozen=True, kw_only=True)
class Making:
    """The last step in the making of a folder, which its card describes.

    Args:
        kind: the kind of the folder, as its manifest names it.
        step: what was done, as one line of Markdown.
        model: the name of the model that the folder is an adapter for, or was made from.
        parents: the folders that it was made from; the steps and the licence are those of the first that has them.
        datasets: the names of the data sets that it was trained on.
        wrapped: whether the model takes images beside text.
    """

    kind: str
    step: str
    model: str
    parents: Sequence[Path] = ()
    datasets: Sequence[str] = ()
    wrapped: bool = False


def write_card(folder: Path, making: Making) -> None:
    """Write the card of a folder whose other files are in place. The same folder always gets the same bytes."""
    plan, kind = find_plan(folder), making.kind
    base = making.model if plan is None or kind == "recovered" else plan.base.name
    of_pruned = plan is not None and kind not in ("pruned", "recovered")
    parents = [_Parent.read(parent) for parent in making.parents]
    steps = next((parent.steps for parent in parents if parent.steps), ())
    if not steps and plan is not None and kind != "pruned":
        steps = (pruning_step(plan),)
    ids = [name for name in (making.model, *(() if of_pruned and kind == "adapter" else (base,))) if is_on_hub(name)]
    datasets = {name for parent in parents for name in parent.datasets} | set(filter(is_on_hub, making.datasets))
    licence = next((parent.licence for parent in parents if parent.licence), {})
    further: dict[str, Any] = {**licence}
    if ids:
        further["base_model_relation"] = _RELATIONS.get(kind, "finetune")
    data = ModelCardData(
        base_model=ids[0] if ids else None,
        datasets=sorted(datasets) or None,
        library_name="peft" if (folder / CONFIG_NAME).exists() else "transformers",
        pipeline_tag="image-text-to-text" if making.wrapped else "text-generation",
        tags=_tags(folder, plan, kind),
        **further,
    )
    short = shown(base).rpartition("/")[2]
    title = _TITLES.get(kind, "{}, fine-tuned").format(f"a pruned {short}" if of_pruned else short)
    on = shown(making.model)
    card = ModelCard.from_template(
        data,
        template_path=str(_TEMPLATE),
        kind=kind,
        title=title[0].upper() + title[1:],
        base=shown(base),
        on=on,
        of_pruned=of_pruned,
        auto_class="AutoModelForImageTextToText" if making.wrapped else "AutoModelForCausalLM",
        remote_code=", trust_remote_code=True" if plan is not None and kind != "recovered" else "",
        tokenizer="FOLDER" if (folder / "tokenizer_config.json").exists() else on,
        steps=[*steps, making.step],
        masked=(folder / MASKS_NAME).exists(),
        plan=plan is not None,
        steps_begin=_STEPS,
        evaluation_begin=_EVALUATION,
        end=_END,
        **_serving(folder, on),
    )
    (folder / CARD_NAME).write_text(f"{str(card).rstrip()}\n", encoding="utf-8")


def add_evaluation(folder: Path, text: str, results: Sequence[EvalResult], model_name: str) -> None:
    """Put the results of an evaluation into a folder's card: a text, and the metadata that the hub shows.

    What a user wrote elsewhere in the card stays. A card without the marks of the evaluation stays as it is, and so
    does a card whose metadata cannot be read.
    """
    path = folder / CARD_NAME
    try:
        before = path.read_text(encoding="utf-8")
        card = ModelCard(before, ignore_metadata_errors=True)
    except (OSError, ValueError, yaml.YAMLError):
        return
    if (between := _between(card.text, _EVALUATION)) is None:
        return
    assert isinstance(card.data, ModelCardData)
    card.data.model_name, card.data.eval_results = model_name, list(results)
    card.text = f"{card.text[: between.start(1)]}## Evaluation\n\n{text}\n{card.text[between.end(1) :]}"
    if str(card) != before:
        replace_text(path, str(card))


def pruning_step(plan: PruningPlan) -> str:
    """Return how a model was pruned, as one line of Markdown."""
    full, pruned = plan.parameters()
    ratios = [f"ratio {plan.ratio:g}"] if plan.ratio is not None else []
    ratios += [f"ratio {ratio:g} for {space.replace('_', ' ')}" for space, ratio in sorted(plan.ratios.items())]
    parts = [
        f"**Pruned** from `{shown(plan.base.name)}`, {full:,} → {pruned:,} parameters",
        *([", ".join([f"pattern {plan.pattern}" if plan.sparse else "structured", *ratios])] if ratios else []),
        f"criterion {plan.criterion}",
        *([f"layers {', '.join(map(str, plan.dropped))} dropped"] if plan.dropped else []),
        f"the first {plan.keep_first} and the last {plan.keep_last} layers kept whole",
        *(["biases make up for removed inputs"] if plan.bias_compensation else []),
        *(["output projections refitted"] if plan.refit else []),
        *([f"bypasses of rank {plan.bypass_rank}"] if plan.bypass_rank else []),
        f"seed {plan.seed}",
    ]
    return "; ".join(parts) + "."


def steps_of(folder: Path) -> tuple[str, ...]:
    """Return how a folder was made, one step per line of Markdown, as its card has it; none where no card tells."""
    return _Parent.read(folder).steps


def shown(name: str) -> str:
    """Return a name as a card shows it: a hub id as it is, and of a path, which means nothing elsewhere, the end."""
    return name if is_on_hub(name) else Path(name).name


def _tags(folder: Path, plan: PruningPlan | None, kind: str) -> list[str]:
    adapter, pruned = (folder / CONFIG_NAME).exists(), plan is not None and kind != "recovered"
    return [*(["lora"] if adapter else []), "loram", *(["pruned"] if pruned else [])]


def _serving(folder: Path, on: str) -> dict[str, Any]:
    """Return the rank of an adapter, None for a model, and how vLLM serves the folder where it can."""
    if not (folder / CONFIG_NAME).exists():
        return {"rank": None, "serve": "" if (folder / PLAN_NAME).exists() else "vllm serve FOLDER"}
    config = read_json(folder / CONFIG_NAME)
    rank = max([config.get("r") or 1, *(config.get("rank_pattern") or {}).values()])
    plain = not config.get("use_dora") and not config.get("target_parameters")
    plain = plain and "lm_head" not in (config.get("target_modules") or ())
    line = serve_command(on, name="mine", folder="FOLDER", rank=rank) if plain else None
    return {"rank": rank, "serve": line or ""}


@dataclass(frozen=True, kw_only=True)
class _Parent:
    """What a card takes over from the card of a folder that its own was made from."""

    steps: tuple[str, ...] = ()
    licence: Mapping[str, str]
    datasets: tuple[str, ...] = ()

    @classmethod
    def read(cls, folder: Path) -> "_Parent":
        """Read a folder's card, which may be anybody's, or missing."""
        try:
            text, metadata = (folder / CARD_NAME).read_text(encoding="utf-8"), metadata_load(folder / CARD_NAME) or {}
        except (OSError, ValueError, yaml.YAMLError):
            return cls(licence={})
        licence = {key: metadata[key] for key in _LICENCE if isinstance(metadata.get(key), str)}
        if (between := _between(text, _STEPS)) is None:
            return cls(licence=licence)
        steps = tuple(line.removeprefix("1. ") for line in between.group(1).splitlines() if line.startswith("1. "))
        datasets = metadata.get("datasets") or ()
        return cls(licence=licence, steps=steps, datasets=tuple(datasets if isinstance(datasets, list) else ()))


def _between(text: str, begin: str) -> re.Match[str] | None:
    """Find what stands between a mark and the next end, as group 1."""
    return re.search(rf"{re.escape(begin)}\n(.*?){re.escape(_END)}", text, re.DOTALL)
