"""A recipe: the YAML that describes a whole run, validated before anything happens."""

import difflib
import hashlib
import re
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from loram.alignment.spec import AlignSpec
from loram.base.errors import UserError
from loram.base.names import in_recipe
from loram.data.spec import DataSpec
from loram.model.sparsity import STRUCTURED
from loram.pruning.settings import PruneSettings, prune_settings
from loram.training.methods.lisa import LisaOptions
from loram.training.methods.lora_sp import LoraSpOptions


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PruneSection(_Section):
    """Options of `loram.prune`."""

    ratio: float | None = Field(default=None, gt=0, lt=1)
    criterion: str | None = None
    pattern: str = STRUCTURED
    calibration: DataSpec | None = None
    calibration_samples: PositiveInt = 10
    calibration_length: PositiveInt = 128
    keep_first: int | None = Field(default=None, ge=0)
    keep_last: int | None = Field(default=None, ge=0)
    bias_compensation: bool = False

    _spec = field_validator("calibration", mode="before")(lambda value: _as_spec(value))
    _text = field_validator("pattern", mode="before")(lambda value: _as_pattern(value))

    def settled(self) -> PruneSettings:
        """What `prune` makes of it."""
        names = ("pattern", "ratio", "criterion", "keep_first", "keep_last", "bias_compensation")
        return prune_settings(**{name: getattr(self, name) for name in names})


class TeachSection(_Section):
    """Options of `loram.teach`: what the full model predicts on the data sets of `align` is cached first."""

    top_k: PositiveInt = 64
    part_tokens: PositiveInt = 1 << 18


class TrainSection(_Section):
    """Options of `loram.train`: `lora` goes to PEFT's LoraConfig, `trainer` to TRL's SFTConfig, as they are; `lisa` and
    `lora_sp` are for the methods of these names."""

    method: str = "lora"
    load_in_4bit: bool = False
    offload_embedding: bool = False
    mask_update: bool = False
    lora_dtype: Literal["float32", "bfloat16"] = "float32"
    anchor_steps: int | None = Field(default=None, ge=0)
    anchor_gradients: bool = True
    lisa: LisaOptions | None = None
    lora_sp: LoraSpOptions | None = None
    lora: dict[str, Any] = Field(default_factory=dict)
    trainer: dict[str, Any] = Field(default_factory=dict)


class RecoverSection(_Section):
    """Options of `loram.recover`: what is beyond widening, and reads the full model's weights."""

    correct: bool = False
    dev_dataset: DataSpec | None = None

    _spec = field_validator("dev_dataset", mode="before")(lambda value: _as_spec(value))


class PolishSection(_Section):
    """Options of `loram.polish`: a few steps of the recovered adapter on the full model, streamed; by default on the
    training data, at the learning rate of training."""

    dataset: DataSpec | None = None
    max_steps: PositiveInt = 8
    per_device_train_batch_size: PositiveInt = 16
    learning_rate: PositiveFloat | None = None
    max_length: PositiveInt = 512

    _spec = field_validator("dataset", mode="before")(lambda value: _as_spec(value))


class Variant(_Section):
    """One row of a comparison: what it changes in the recipe, section by section and key by key."""

    base: Literal["full", "pruned"] = "pruned"  # what is trained on
    prune: dict[str, Any] = Field(default_factory=dict)
    train: dict[str, Any] = Field(default_factory=dict)


class EvaluateSection(_Section):
    """Options of `loram.evaluate`; `full_lora` also trains LoRA on the full model, to compare with; `stream`ed
    evaluations never load the model."""

    max_samples: PositiveInt | None = None
    max_length: PositiveInt = 1024
    stream: bool = False
    full_lora: bool = False


class Recipe(_Section):
    """A run, or a part of one: prune, align, train, recover, evaluate.

    Without `prune` it begins with a folder that is pruned already, and without `dataset` it ends before training: what
    one recipe leaves, another goes on from, on another machine.

    Args:
        model_name_or_path: hub id, folder or GGUF file of the full model; without `prune`, a pruned folder.
        base_model_name_or_path: without `prune`: the full model, where it is not at the name that the plan has.
        output_dir: one folder a stage and the report go here.
        dataset: training rows: a file, a hub name, or a mapping (see `loram.data.tokens.DataSpec`).
        eval_dataset: held-out rows, likewise; or a mapping of names to data sets.
        seed: of pruning, initialisation, data order.
        device: `cpu`, `cuda`, ...; the first GPU where there is one.
        prune, teach, align, polish: their stages' options; a stage without a section is left out.
        train, recover, evaluate: their stages' options.
        compare: what `loram compare` puts side by side, by name; `loram run` passes it over.
    """

    model_name_or_path: str
    base_model_name_or_path: str | None = None
    output_dir: Path
    dataset: DataSpec | None = None
    eval_dataset: dict[str, DataSpec] = Field(default_factory=dict)
    seed: int = 42
    device: str | None = None
    prune: PruneSection | None = None
    teach: TeachSection | None = None
    align: AlignSpec | None = None
    train: TrainSection = Field(default_factory=TrainSection)
    recover: RecoverSection = Field(default_factory=RecoverSection)
    polish: PolishSection | None = None
    evaluate: EvaluateSection = Field(default_factory=EvaluateSection)
    compare: dict[str, Variant] = Field(default_factory=dict)

    _spec = field_validator("dataset", mode="before")(lambda value: _as_spec(value))

    @field_validator("eval_dataset", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        if isinstance(value, str) or (isinstance(value, dict) and "path" in value):
            return {"eval": _as_spec(value)}
        return {name: _as_spec(spec) for name, spec in value.items()} if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _parts_fit(self) -> "Recipe":
        if self.dataset is None and ("train" in self.model_fields_set or self.evaluate.full_lora):
            raise ValueError("dataset: missing, and training needs rows; a recipe that trains nothing has no `train`")
        if self.dataset is not None and not self.eval_dataset:
            raise ValueError("eval_dataset: missing, and what was trained is compared on held-out rows")
        if self.dataset is None and self.prune is None and self.align is None:
            raise ValueError("prune, align, dataset: at least one is needed, else there is nothing to do")
        if self.prune is not None and self.base_model_name_or_path is not None:
            raise ValueError("base_model_name_or_path: with `prune`, model_name_or_path is the full model; drop it")
        if self.polish is not None and (self.dataset is None or self.train.mask_update):
            raise ValueError("polish: needs a `dataset`, and an adapter that is recovered, so no mask_update")
        if self.teach is not None and (self.align is None or not self.align.dataset or self.align.objective == "clm"):
            raise ValueError("teach: needs an `align` section with a dataset, and an objective that asks the teacher")
        return self


def _as_spec(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


def _as_pattern(value: Any) -> Any:
    """4:8 without quotes is a number to YAML: 4 times 60 and 8."""
    return f"{value // 60}:{value % 60}" if type(value) is int else value


class _Loader(yaml.SafeLoader):
    """YAML 1.2 numbers: PyYAML reads 1e-3 as text. Repeated keys are an error: PyYAML drops the first in silence.

    A value that its own tag or look contradicts (2020-13-45, !!int x) is an error with a line: PyYAML lets whatever
    Python raised through.
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


def load_recipe(path: Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe and apply `key.sub=value` overrides (values are YAML).

    Raises:
        UserError: the file is missing or not YAML, or a key is unknown (names the nearest one) or has a bad value.
    """
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
    """The first problem in one line: `prune.ration: unknown key; did you mean ratio?`.

    Unknown keys come first: one of them may be why another is missing.
    """
    problem = min(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    where = ".".join(map(str, problem["loc"]))
    if problem["type"] != "extra_forbidden":
        found = f" (found {problem['input']!r})" if isinstance(problem["input"], str | int | float) else ""
        return f"{where}: {problem['msg']}{found}".removeprefix(": ").replace("Value error, ", "")
    known = _known_keys(problem["loc"][:-1])
    key, section = str(problem["loc"][-1]), ".".join(map(str, problem["loc"][:-1]))
    if ours := in_recipe(key, section, known):
        return f"{where}: unknown key; here it is called {ours}"
    near = difflib.get_close_matches(key, known, 1)
    return f"{where}: unknown key; " + (f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}")


def _known_keys(location: tuple[int | str, ...]) -> list[str]:
    section: type[BaseModel] = Recipe
    for key in location:
        if str(key) in section.model_fields:
            section = _model_in(section.model_fields[str(key)].annotation) or DataSpec
    return list(section.model_fields)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The first of our models in a type like `PruneSection | None` or `tuple[DataSpec, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _model_in(part))), None)


def file_digest(spec: DataSpec) -> str:
    """SHA-256 of a local data file; of a hub data set its name and settings, which is all that can be known cheaply."""
    path = Path(spec.path).expanduser()
    content = path.read_bytes() if path.is_file() else b""
    return hashlib.sha256(spec.model_dump_json().encode() + content).hexdigest()
