"""The generator of the quickstart's data: distinct, disjoint, right, and the same for the same seed."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "loram" / "recipes" / "word_problems.py"
MARK = re.compile(r"<<([\d+*/-]+)=(\d+)>>(\d+)")


def make(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, out, *options], capture_output=True, text=True, check=False)


def rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("problems")
    assert make(out).returncode == 0
    return out


def test_counts_and_disjointness(made: Path) -> None:
    train, test = rows(made / "train.jsonl"), rows(made / "test.jsonl")
    assert (len(train), len(test)) == (2000, 200)
    questions = [row["question"] for row in train + test]
    assert len(set(questions)) == 2200
    # names alone do not make a problem new: without them the questions still differ
    nameless = [re.sub(r"\b[A-Z][a-z]+\b", "X", question) for question in questions]
    assert len(set(nameless)) == 2200


def calculate(sum_: str) -> int:
    sign = re.search(r"[+*/-]", sum_)
    assert sign
    first, *rest = map(int, sum_.split(sign.group()))
    for number in rest:
        if sign.group() == "/":
            assert first % number == 0
            first //= number
        else:
            first = {"+": first + number, "-": first - number, "*": first * number}[sign.group()]
    return first


def test_every_sum_is_right_and_the_last_is_the_result(made: Path) -> None:
    for row in rows(made / "train.jsonl") + rows(made / "test.jsonl"):
        marks = MARK.findall(row["answer"])
        assert 2 <= len(marks) <= 4
        for sum_, value, shown in marks:
            assert str(calculate(sum_)) == value == shown
            assert int(value) > 0
        assert row["answer"].splitlines()[-1] == f"#### {marks[-1][1]}"


def test_grammar_of_one(made: Path) -> None:
    for row in rows(made / "train.jsonl"):
        assert not re.search(r"(?<![\d+*/-])\b1 [a-z]+s\b", row["question"] + row["answer"].replace("\n", " ")), row


def test_seed(made: Path, tmp_path: Path) -> None:
    for name, seed in (("same", "42"), ("other", "43")):
        assert make(tmp_path / name, "--seed", seed).returncode == 0
    assert (tmp_path / "same" / "train.jsonl").read_bytes() == (made / "train.jsonl").read_bytes()
    assert (tmp_path / "other" / "train.jsonl").read_bytes() != (made / "train.jsonl").read_bytes()


def test_more_than_can_be_made_is_refused(tmp_path: Path) -> None:
    done = make(tmp_path / "out", "--train", "0")
    assert done.returncode == 2
    assert "at least 1" in done.stderr
    assert not (tmp_path / "out").exists()
