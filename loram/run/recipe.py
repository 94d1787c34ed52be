"""A recipe: the YAML that describes a whole run, validated before anything happens."""

import re
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import NonNegativeInt, PositiveFloat, ValidationError, field_validator, model_validator

from loram.alignment.options import AlignOptions, TeachOptions
from loram.base.errors import UserError
from loram.base.hashes import file_sha256
from loram.base.names import in_recipe
from loram.base.options import Options, canonical, first_problem_of, option, section_at, suggestion
from loram.base.paths import LocalPath, Named, local
from loram.data.spec import DataSpec, WeightedSpec, several, why_not_weighted
from loram.disk.artifacts import digest
from loram.evaluation.options import EvaluateOptions, TaskOptions
from loram.pruning.options import PruneOptions
from loram.recovery.options import RecoverOptions
from loram.training.methods.table import METHODS
from loram.training.options import PolishOptions, TrainOptions


class PolishSection(PolishOptions):
    """Options of `loram.polish`, by default on the training data, at the learning rate of training."""

    dataset: tuple[WeightedSpec, ...] = option((), "The rows to polish on (default: the training data).")
    learning_rate: PositiveFloat | None = option(  # type: ignore[assignment]
        None, "The learning rate of the first step (default: that of training)."
    )

    _several = field_validator("dataset", mode="before")(several)


class EvaluateSection(EvaluateOptions, TaskOptions):
    """Options of `loram.evaluate` and of `loram.evaluate_tasks`, and what else is evaluated."""

    full_lora: bool = option(False, "Also train LoRA on the full model, to compare with.")
    examples: NonNegativeInt = option(
        0, "Show how the full model answers this many rows of each data set, before and after the training."
    )


class Variant(Options):
    """One row of a comparison: what it changes in the recipe, section by section and key by key."""

    base: Literal["full", "pruned"] = option("pruned", "The model that is trained on.")
    prune: dict[str, Any] = option({}, "What changes in the section `prune`.")
    train: dict[str, Any] = option({}, "What changes in the section `train`.")


class Recipe(Options):
    """A run, or a part of one: prune, align, train, recover, polish, evaluate.

    Without `prune` it begins with a folder that is pruned already, and without `dataset` it ends before training. So
    one recipe can prune on one machine, and another can train on what it left on another machine.
    """

    model_name_or_path: Named = option(
        ...,
        "The hub id, folder or GGUF file of the full model; without `prune`, a pruned folder.",
        flag="MODEL",
        also="base_model model model_id model_name pretrained_model_name_or_path",
    )
    base_model_name_or_path: Named | None = option(
        None, "The full model of a pruned folder, if it is not where the plan says.", flag="base"
    )
    chat_template_path: Named | None = option(
        None,
        "A .jinja file, or a model whose tokenizer has the chat template, in place of the model's own template.",
        flag="chat-template",
        also="chat_template chat_template_jinja",
    )
    output_dir: LocalPath = option(
        ..., "The folder for the report and one folder per stage.", flag="OUT", also="output"
    )
    dataset: tuple[WeightedSpec, ...] = option(
        (),
        "The training rows: a file, a hub name or a mapping, or a list of these, each with an optional weight.",
        also="datasets dataset_name train_dataset train_file data_path",
    )
    eval_dataset: dict[str, DataSpec] = option(
        {},
        "The held-out rows: a file, a hub name, or a mapping of names to data sets; without it, nothing is evaluated.",
        also="test_datasets val_dataset validation_dataset validation_file",
        flag="dataset",
    )
    seed: int = option(42, "The seed of everything that is random.", also="random_state")
    device: str | None = option(None, "The device: cpu, cuda, cuda:1 (default: a GPU if there is one).")
    prune: PruneOptions | None = option(None, "How to prune; without it, nothing is pruned.")
    teach: TeachOptions | None = option(None, "How to cache the full model's predictions; without it, none is cached.")
    align: AlignOptions | None = option(None, "How to align; without it, nothing is aligned.")
    train: TrainOptions = option(TrainOptions(), "How to train.")
    recover: RecoverOptions = option(RecoverOptions(), "What recovery does beyond widening.")
    polish: PolishSection | None = option(None, "How to polish; without it, nothing is polished.")
    evaluate: EvaluateSection | None = option(
        EvaluateSection(), "How to evaluate, and what to compare with; with false, nothing is evaluated."
    )
    compare: dict[str, Variant] = option({}, "What `loram compare` puts side by side, by name.")

    _several = field_validator("dataset", mode="before")(several)

    @field_validator("eval_dataset", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        if value is None:
            return {}
        return {"eval": value} if isinstance(value, str) or (isinstance(value, dict) and "path" in value) else value

    @field_validator("evaluate", mode="before")
    @classmethod
    def _left_out(cls, value: Any) -> Any:
        return None if value is False else value

    @property
    def pruning(self) -> PruneOptions | None:
        """How to prune: where the recipe names no text for a refit, it reads the training rows, if they are texts."""
        section, method = self.prune, METHODS.get(self.train.method)
        if section is None or not self.dataset or method is None or method.learns != "text":
            return section
        if section.calibration is not None or section.refit_dataset is not None or not section.resolved().refit:
            return section
        return section.model_copy(update={"refit_dataset": self.dataset[0].unweighted()})

    @property
    def held_out(self) -> dict[str, DataSpec]:
        """The data sets that models are evaluated on, by name; none where the run evaluates nothing."""
        return {} if self.evaluate is None else self.eval_dataset

    @property
    def tasks(self) -> TaskOptions | None:
        """The tasks of lm-evaluation-harness that models are evaluated on; None where there are none."""
        if self.evaluate is None or not self.evaluate.tasks:
            return None
        return TaskOptions.of(**{name: getattr(self.evaluate, name) for name in TaskOptions.model_fields})

    @property
    def examples(self) -> int:
        """Return how many rows of each evaluation data set are answered before and after the training."""
        return 0 if self.evaluate is None else self.evaluate.examples

    @property
    def compares(self) -> bool:
        """Return whether LoRA on the full model is trained too, to compare with."""
        return self.evaluate is not None and self.evaluate.full_lora

    @model_validator(mode="after")
    def _parts_fit(self) -> "Recipe":
        if problem := why_not_weighted(self.dataset):
            raise ValueError(f"dataset: {problem}")
        if not self.dataset and ("train" in self.model_fields_set or self.compares):
            raise ValueError("dataset: missing, and training needs rows; a recipe that trains nothing has no `train`")
        chosen = self.evaluate not in (None, EvaluateSection())
        if self.dataset and not self.eval_dataset and chosen and (self.tasks is None or self.examples):
            raise ValueError("evaluate: needs an `eval_dataset`; without held-out rows, only `tasks` can be run")
        if not self.dataset and self.examples:
            raise ValueError(
                "evaluate.examples: shows what a training changes, and there is no `dataset`; leave it out"
            )
        if not self.dataset and self.prune is None and self.align is None:
            raise ValueError("prune, align, dataset: at least one is needed, else there is nothing to do")
        if self.prune is not None and self.base_model_name_or_path is not None:
            raise ValueError("base_model_name_or_path: with `prune`, model_name_or_path is the full model; drop it")
        if self.polish is not None and (not self.dataset or self.train.mask_update):
            raise ValueError("polish: needs a `dataset`, and an adapter that is recovered, so no mask_update")
        learns = row.learns if (row := METHODS.get(self.train.method)) is not None else "text"
        if self.polish is not None and not self.polish.dataset and learns != "text":
            raise ValueError(
                f"polish: learns from texts, and {self.train.method} from preferences; name texts in polish.dataset, "
                "or set polish: null"
            )
        if self.polish is not None and row is not None and row.lora.get("use_dora"):
            raise ValueError("polish: trains plain LoRA further, and no DoRA adapter; set polish: null")
        if self.teach is not None and (self.align is None or not self.align.dataset or self.align.objective == "clm"):
            raise ValueError("teach: needs an `align` section with a dataset, and an objective that asks the teacher")
        if self.teach is not None and self.teach.top_k < 1:
            raise ValueError(f"teach.top_k: {self.teach.top_k} next tokens; should be at least 1")
        if self.teach is not None and "max_length" in self.teach.model_fields_set:
            raise ValueError("teach.max_length: in a recipe it is align.trainer.max_length; leave it out")
        return self


class _Loader(yaml.SafeLoader):
    """A YAML loader that reads numbers as YAML 1.2 does, and that refuses repeated keys.

    PyYAML alone reads 1e-3 as text and drops the first of two equal keys in silence. A value that contradicts its own
    tag or form (2020-13-45, !!int x) is an error with a line here, where PyYAML lets Python's own error through.
    """

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        """Build a value."""
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError, TypeError) as error:
            kind = node.tag.rpartition(":")[2]
            problem = f"{_short(node.value)} is not a {kind}; put it in quotes if it is text"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from error

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping, refusing a repeated key."""
        pairs = node.value if isinstance(node, yaml.MappingNode) else []  # super() refuses the others
        seen = set()
        for key in (key for key, _ in pairs if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} stands twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe and apply `key.sub=value` overrides (values are YAML).

    Raises:
        UserError: the file is missing or not YAML, or a key is unknown (names the nearest one) or has a bad value.
    """
    path = local(path)
    if not path.is_file():
        raise UserError(f"{path}: no such recipe")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}; a recipe is YAML in UTF-8") from error
    values = _parse(text, str(path))
    if not isinstance(values, dict):
        raise UserError(f"{path}: a recipe is a mapping of keys to values")
    for override in overrides or []:
        _override(values, override)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{path}: {_explain(error)}") from error


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{where}{line}: not valid YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not valid YAML: {str(error).splitlines()[0]}") from error
    except RecursionError as error:
        raise UserError(f"{where}: not valid YAML for a recipe: nested too deeply") from error


def parse_pair(text: str, where: str) -> tuple[str, Any]:
    """`key=value` with a YAML value.

    Raises:
        UserError: there is no key or no equals sign, or the value is not YAML.
    """
    key, sign, value = text.partition("=")
    if not sign or not key:
        raise UserError(f"{where} {text!r}: should be key=value")
    return key, _parse(value, f"{where} {text!r}")


def _override(values: dict[str, Any], override: str) -> None:
    key, value = parse_pair(override, "override")
    *parents, last = key.split(".")
    target: Any = values
    for parent in parents:
        target = target.setdefault(parent, {})
        if not isinstance(target, dict):
            raise UserError(f"{override!r}: {parent} is not a section of the recipe")
    target[last] = value


def _explain(error: ValidationError) -> str:
    """Return the first problem in one line: `prune.ration: unknown key; did you mean ratio?`."""
    problem = first_problem_of(error)
    place = canonical(problem["loc"], Recipe)
    where = ".".join(place)
    if problem["type"] != "extra_forbidden":
        scalar = f" (found {problem['input']!r})" if isinstance(problem["input"], str | int | float) else ""
        return f"{where}: {problem['msg']}{scalar}".removeprefix(": ").replace("Value error, ", "")
    section, key = ".".join(place[:-1]), place[-1]
    known = list((section_at(place[:-1], Recipe) or Recipe).model_fields)
    if ours := in_recipe(key, section, known, root=Recipe):
        return f"{where}: unknown key; here it is called {ours}"
    return f"{where}: unknown key; {suggestion(key, known)}"


def file_digest(spec: DataSpec) -> str:
    """Return the SHA-256 of the content of a data set's files, or the name of a hub data set, which is not fetched."""
    from loram.data.files import find_files

    paths = find_files(spec)
    if paths is None:
        return spec.path
    files = [file for path in paths for file in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    hashes = [file_sha256(file) for file in files if file.is_file()]
    return hashes[0] if len(hashes) == 1 else digest(hashes)
