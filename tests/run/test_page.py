"""The page of a run and the comparison of runs: whole, escaped, and with every value of the report."""

import json
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

import loram
from loram.cli import main
from loram.run.figures import curves, kept, ticks
from loram.run.overview import columns, overview
from loram.run.page import PAGE_NAME, page, write_page
from loram.run.pipeline import run
from loram.run.recipe import Recipe
from loram.run.results import RunResults

VOID = {"meta", "br", "line", "rect", "polyline"}


class Page(HTMLParser):
    """Collects the text, and refuses tags that do not close in order, and whatever loads from elsewhere."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "img", "iframe", "object", "use", "image")
        assert not {name for name, _ in attrs} & {"src", "href", "xlink:href", "srcset", "data", "action", "style"}
        assert not [name for name, _ in attrs if name.startswith("on")]
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in VOID
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "style":
            assert "url(" not in data
            assert "@import" not in data
        self.text += data


@pytest.fixture(scope="module")
def done(tiny_llama: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("page") / "first & <best>"
    values = {
        "model_name_or_path": str(tiny_llama),
        "output_dir": out,
        "dataset": str(rows_file),
        "eval_dataset": {"task <b>": str(rows_file), "short": {"path": str(rows_file), "max_samples": 3}},
        "prune": {"ratio": 0.5, "criterion": "magnitude", "keep_first": 1, "keep_last": 1},
        "train": {"trainer": {"max_steps": 3, "logging_steps": 1}, "anchor_steps": 0},
    }
    run(Recipe.model_validate(values))
    return out


def with_examples(done: Path, copy: Path) -> RunResults:
    shutil.copytree(done, copy)
    report = json.loads((copy / "report.json").read_text())
    answers = {"base": "<script>alert('x')</script>", "recovered": "& so on"}
    report["examples"] = [{"dataset": "short", "prompt": "1 < 2?", "expected": '"yes"', "answers": answers}]
    (copy / "report.json").write_text(json.dumps(report))
    return RunResults.load(copy)


def test_a_run_leaves_a_page_with_every_value_of_its_report(done: Path) -> None:
    report, shown = json.loads((done / "report.json").read_text()), Page((done / PAGE_NAME).read_text())
    assert done.name in shown.text
    for row in report["rows"]:
        assert row["name"] in shown.text
        assert f"{row['parameters']:,}" in shown.text
        for name, perplexity in row["perplexity"].items():
            assert name in shown.text
            assert f"{perplexity:.3f}" in shown.text
        for cost in filter(None, (row["made"], row["evaluated"])):
            assert f"{cost['seconds']:,.1f} s" in shown.text
            assert f"{cost['peak_rss'] / 1e9:.2f} GB" in shown.text
    for name, version in report["versions"].items():
        assert f"{name} {version}" in shown.text
    assert "criterion: magnitude" in shown.text
    losses = [json.loads(line)["loss"] for line in (done / "adapter" / "training_log.jsonl").read_text().splitlines()]
    assert f"adapter: training loss: {losses[0]:.4g} at step 1, {losses[-1]:.4g} at step 3" in shown.text
    assert "Recovered for" in shown.text
    assert shown.tags.count("polyline") == 1
    plan = loram.PruningPlan.load(done / "pruned")
    narrowed = min(plan.layers)
    full = plan.geometry.num_key_value_heads
    assert f"layer {narrowed}: {plan.units(narrowed)['kv_groups']} of {full} key-value groups" in shown.text


def test_the_cards_of_a_run_have_its_perplexities(done: Path) -> None:
    rows = {row["name"]: row for row in json.loads((done / "report.json").read_text())["rows"]}
    for folder, name in (("pruned", "pruned"), ("adapter", "pruned + adapter"), ("recovered", "recovered")):
        card = ModelCard.load(done / folder / "README.md")
        results = {result.dataset_name: result for result in card.data.eval_results}
        assert results.keys() == {"task <b>", "short"}
        for dataset, perplexity in rows[name]["perplexity"].items():
            result = results[dataset]
            assert (result.metric_type, result.metric_value) == ("perplexity", pytest.approx(perplexity, abs=1e-4))
            assert (result.task_type, result.dataset_type) == ("text-generation", dataset)
            assert f"**{perplexity:.3f}**" in card.text
            assert f"{rows['base']['perplexity'][dataset]:.3f}" in card.text


def test_examples_are_shown_as_text(done: Path, tmp_path: Path) -> None:
    shown = Page(page([with_examples(done, tmp_path / "run")]))
    for text in ("<script>alert('x')</script>", "& so on", "1 < 2?", '"yes"'):
        assert text in shown.text


def test_several_runs_are_in_one_table(done: Path, tmp_path: Path) -> None:
    results = [RunResults.load(done), with_examples(done, tmp_path / "second")]
    write_page(results, tmp_path / "both.html")
    shown = Page((tmp_path / "both.html").read_text())
    lines = overview(results)
    table = columns(lines)
    assert table["run"] == [done.name, "second"]
    assert table["pruned"] == ["0.5 by magnitude"] * 2
    rows = {row.name: row for row in results[0].report.rows}
    base, final = rows["base"].perplexity["short"], rows["recovered"].perplexity["short"]
    assert table["perplexity short"] == [f"{base:.3f} → {final:.3f}"] * 2
    assert not [heading for heading in table if heading.startswith("kept gain")]
    made = [rows[name].made for name in ("pruned", "pruned + adapter", "recovered")]
    assert lines[0].seconds == pytest.approx(sum(cost.seconds for cost in made if cost is not None))
    for cells in table.values():
        for cell in cells:
            assert cell in shown.text
    assert [path.name for path in tmp_path.glob("*.partial")] == []


def test_the_command_prints_a_table_or_one_json_object(
    done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def call(*arguments: Any) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["loram", "report", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        return int(stop.value.code or 0), *capsys.readouterr()

    code, out, _ = call(done, "--html", tmp_path / "a.html")
    assert (code, "magnitude" in out, (tmp_path / "a.html").exists()) == (0, True, True)
    code, out, _ = call(done, done, "--json")
    assert [line["final"] for line in json.loads(out)["runs"]] == ["recovered"] * 2
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "report.json").write_text("{}")
    for arguments, message in (
        ((), "name at least one run"),
        ((tmp_path,), "no report.json here"),
        ((tmp_path / "broken",), "not a valid report"),
        ((done, "--html", tmp_path / "a.html"), "exists already"),
        ((done, "--html", tmp_path / "a.html" / "b.html"), "is a file, so no folder can be made below it"),
    ):
        code, out, error = call(*arguments)
        assert (code, out) == (2, "")
        assert message in error


def test_a_run_that_only_prunes_has_a_page(tiny_llama: Path, tmp_path: Path) -> None:
    values = {
        "model_name_or_path": str(tiny_llama),
        "output_dir": tmp_path / "out",
        "prune": {"pattern": "2:4", "criterion": "magnitude", "keep_first": 1, "keep_last": 1},
    }
    run(Recipe.model_validate(values))
    shown = Page((tmp_path / "out" / PAGE_NAME).read_text())
    assert "pruned: 2:4 by magnitude" in shown.text
    assert "layer 1: 50% of the weights in its linears" in shown.text
    assert "polyline" not in shown.tags


def test_what_is_dropped_is_drawn(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    options: dict[str, Any] = {"criterion": "random", "keep_first": 1, "keep_last": 1}
    plan = loram.prune(tiny_models["llama"], tmp_path / "out", drop_layers=1, **options)
    bars = kept(plan)
    assert bars.keys() == {"key-value groups", "channels"}
    assert [bar.dropped for bar in bars["channels"]] == [
        layer in plan.dropped for layer in range(plan.geometry.num_hidden_layers)
    ]
    assert kept(None) == {}


def test_curves_leave_out_what_cannot_be_drawn() -> None:
    entries = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": float("nan")}, {"step": 3, "loss": 1.0}, {"kept_share": 1}]
    (curve,) = curves({"adapter": entries, "polished": [{"step": 1, "loss": 1.0}]})
    assert curve.points == ((1.0, 2.0), (3.0, 1.0))
    assert curve.places[0] == (0.0, 0.0)
    assert curve.places[1] == (1.0, 1.0)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((1.83, 3.4), [1.5, 2.0, 2.5, 3.0, 3.5]),
        ((0, 400), [0, 100, 200, 300, 400]),
        ((2, 2), [1.5, 2.0, 2.5]),
        ((2, 2 + 1e-13), [1.5, 2.0, 2.5]),
        ((0.0012, 0.0019), [0.0012, 0.0014, 0.0016, 0.0018, 0.002]),
    ],
)
def test_ticks_are_round_and_hold_all_values(values: tuple[float, float], expected: list[float]) -> None:
    assert ticks(values) == pytest.approx(expected)


def test_a_log_that_is_broken_is_named(done: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(done, tmp_path / "copy")
    make: Callable[[str], object] = (copy / "adapter" / "training_log.jsonl").write_text
    for text in ("{", "[1]"):
        make(text)
        with pytest.raises(loram.UserError, match=r"training_log\.jsonl: "):
            RunResults.load(copy)
