"""Every option is declared once; the command line, the names of other tools and the reference page follow from that."""

import re
from collections import Counter
from pathlib import Path

import pytest
import typer
from pydantic.fields import FieldInfo

import loram
from loram.base.names import in_recipe, on_the_line
from loram.base.options import Options, extra_of, fields_below, flag_of, has_flag, named_in, section_in
from loram.cli import reference
from loram.cli.commands import COMMANDS
from loram.cli.flags import flags_of, keywords
from loram.cli.parser import make_app
from loram.planner.settings import PRUNING, TRAINING, PlannerOptions, Settings
from loram.run.recipe import Recipe
from loram.training.options import TrainOptions

ROOT = Path(loram.__file__).parent
DECLARED = [(place, name, field) for place, name, field in fields_below(Recipe) if "NAME" not in place]
IDS = [f"{place}.{name}".lstrip(".") for place, name, _ in DECLARED]


@pytest.mark.parametrize(("place", "name", "field"), DECLARED, ids=IDS)
def test_an_option_says_what_it_does_in_one_sentence(place: str, name: str, field: FieldInfo) -> None:
    text = field.description
    assert text[0].isupper()
    assert text.endswith(".")
    assert "\n" not in text


def test_an_alias_stands_once_and_is_no_name_of_its_section() -> None:
    for place in {place for place, _, _ in DECLARED}:
        here = [(name, extra_of(field).get("also", ())) for section, name, field in DECLARED if section == place]
        aliases = Counter(alias for _, also in here for alias in also)
        assert not [alias for alias, count in aliases.items() if count > 1], place
        assert not aliases.keys() & {name for name, _ in here}, place


@pytest.mark.parametrize(("place", "name", "field"), DECLARED, ids=IDS)
def test_every_other_name_is_answered(place: str, name: str, field: FieldInfo) -> None:
    extra = extra_of(field)
    for alias in extra.get("also", ()):
        answer = in_recipe(alias, place, root=Recipe)
        assert answer == name + extra["notes"].get(alias, ""), alias
        assert on_the_line(f"--{alias}", [], ["overrides"], root=Recipe) is not None
    for other in extra.get("others", ()):
        assert in_recipe(other, "recover", root=Recipe) is not None, other


def test_the_section_where_a_name_stands_wins_and_then_training() -> None:
    assert in_recipe("lr", "align", root=Recipe) == "align.trainer.learning_rate"
    assert in_recipe("lr", "prune", root=Recipe) == "train.trainer.learning_rate"
    assert in_recipe("cutoff_len", "evaluate", root=Recipe) == "max_length"
    assert in_recipe("use_dora", root=Recipe) == "train.method: dora"
    assert in_recipe("lr", "train.lora", root=TrainOptions, at="train") == "train.trainer.learning_rate"
    assert in_recipe("nothing_like_it", root=Recipe) is None


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_says_what_it_does_in_one_line_of_80_columns(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    make_app()(["-h"], prog_name="loram", standalone_mode=False)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith(f"  {name} "))
    assert len(line) <= 80
    assert line.endswith(".")
    assert not line.endswith("...")


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_has_the_common_options_first_and_80_columns(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    make_app()([name, "-h"], prog_name="loram", standalone_mode=False)
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    headings = re.findall(r"^(\S.*):$", text, re.MULTILINE)
    if "Common options" in headings:
        assert headings.index("Common options") == headings.index("Arguments") + 1
    if not COMMANDS[name].arguments:
        assert "Arguments" not in headings
    assert headings[-1] == "This run"
    for flag in COMMANDS[name].flags:
        assert f"--{flag.name}" in text


@pytest.mark.parametrize("stage", ["prune", "teach", "align", "train", "recover", "polish", "evaluate"])
def test_every_option_of_a_stage_has_its_flag(stage: str) -> None:
    command = COMMANDS["eval" if stage == "evaluate" else stage]
    flags = {flag.name for flag in command.flags}
    for place, name, field in DECLARED:
        section = section_in(field.annotation)
        inside = named_in(field) is None and section is not None and issubclass(section, Options)
        if (
            place.split(".")[0] == stage
            and has_flag(field)
            and not inside
            and (place, name) not in (("evaluate", "full_lora"), ("evaluate", "examples"))
        ):
            assert flag_of(name, field) in flags, f"{place}.{name}"


def test_what_is_not_on_the_line_is_not_set() -> None:
    flags = list(flags_of(TrainOptions, "Further options"))
    nothing = dict.fromkeys(flag.key for flag in flags)
    assert keywords(flags, nothing) == {}
    given = keywords(
        flags, {**nothing, "lora_r": 4, "lora": ["use_rslora=true", "r=5"], "lisa_layers": 3, "anchor_gradients": False}
    )
    assert given == {"lora": {"use_rslora": True, "r": 5}, "lisa": {"active_layers": 3}, "anchor_gradients": False}
    assert TrainOptions.of(**given).model_fields_set == given.keys()


def test_a_line_becomes_options(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}
    command = COMMANDS["align"]
    monkeypatch.setitem(
        COMMANDS, "align", type(command)(**{**vars(command), "call": lambda *a, **k: seen.update(arguments=a, **k)})
    )
    line = (
        "align p o --dataset a.jsonl=0.7 --dataset b.txt --no-probe --trainer weight_decay=0.1 --max-steps 3 --base m"
    )
    make_app()(line.split(), prog_name="loram", standalone_mode=False)
    assert seen == {
        "arguments": ("p", Path.cwd() / "o"),
        "dataset": [{"path": "a.jsonl", "weight": 0.7}, {"path": "b.txt"}],
        "probe": False,
        "trainer": {"max_steps": 3, "weight_decay": 0.1},
        "base": "m",
    }
    with pytest.raises(typer.TyperException) as caught:
        make_app()([*line.split(), "--seed", "x"], prog_name="loram", standalone_mode=False)
    assert "--seed" in caught.value.format_message()


def test_the_planner_has_the_options_that_are_marked() -> None:
    assert Settings.model_fields.keys() == {"device", *TRAINING}
    assert PlannerOptions.model_fields.keys() == {"device", *PRUNING, *TRAINING}
    assert {"lora_r", "lora_target_modules", "lora_sp_share", "max_length"} <= TRAINING.keys()
    for name, option in TRAINING.items():
        if option.field.default is not None:
            assert Settings.model_fields[name].default == option.field.default
    flags = {flag.key for flag in COMMANDS["estimate"].flags}
    assert flags == {"memory", "json", *PlannerOptions.model_fields}


def test_the_reference_page_is_up_to_date() -> None:
    path = ROOT.parent / "docs" / "reference" / "options.md"
    assert path.read_text(encoding="utf-8") == reference.page(), "run `make reference`"


# Names that stand in more than four files for a reason that has nothing to do with where options are declared.
ELSEWHERE = {
    "a word of plain English or of Python, or the name of a stage, library or method": (
        "prune teach align train recover polish evaluate compare correct lora trainer lisa calibration criterion "
        "dataset device engine examples limit method packing pattern preference probe r ratio refit seed share stream "
        "tasks teacher"
    ),
    "an option of transformers, PEFT, TRL or bitsandbytes, under its name in each stage that uses them": (
        "activation_offloading apply_chat_template batch_size learning_rate load_in_4bit lora_alpha lora_dropout "
        "lora_r max_length max_steps optim output_dir per_device_train_batch_size save_strategy save_total_limit "
        "target_modules target_parameters top_k"
    ),
    "two or more stages have an option of this name": "max_samples",
    "`trainer/resume.py` lists it among what may change before a training goes on": "probe_dataset",
    "it is written into a plan, an adapter or a manifest, and read from there": (
        "base_model_name_or_path bias_compensation bypass_rank keep_first keep_last mask_update"
    ),
    "the modules of the room `run` read this part of the recipe, or name it": (
        "model_name_or_path eval_dataset chat_template_path"
    ),
}


def test_the_name_of_an_option_stands_in_few_files() -> None:
    texts = {path: set(re.findall(r"\w+", path.read_text(encoding="utf-8"))) for path in ROOT.rglob("*.py")}
    excepted = {name for names in ELSEWHERE.values() for name in names.split()}
    files = {name: [path for path, words in texts.items() if name in words] for _, name, _ in DECLARED}
    spread = {name: sorted(str(path.relative_to(ROOT)) for path in paths) for name, paths in files.items()}
    assert {name: paths for name, paths in spread.items() if len(paths) > 4 and name not in excepted} == {}
    assert {name for name in excepted if len(spread.get(name, ())) <= 4} == set(), "no longer exceptions"


def test_a_bad_value_is_one_line() -> None:
    with pytest.raises(loram.UserError, match=r"^estimate: ratio 2.0: must lie between 0 and 1"):
        PlannerOptions.of(ratio=2.0)
