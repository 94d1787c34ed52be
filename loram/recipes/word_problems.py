"""Write the quickstart's data set: word problems of several steps with worked answers, the same for the same seed.

    python -m loram.recipes.word_problems OUT_DIR [--train 2000] [--test 200] [--seed 42]

The script writes train.jsonl and test.jsonl to OUT_DIR, with rows of `question` and `answer`. Each step of an answer
contains its calculation as <<48/2=24>>, and the last line is `#### ` and the result. No two rows of the two files have
the same template and numbers; other names alone do not make a new problem.
"""

import argparse
import json
import os
import random
import sys
from collections.abc import Callable, Iterator
from fractions import Fraction
from math import prod
from pathlib import Path

NAMES = [
    "Ada",
    "Ben",
    "Carla",
    "Dimitri",
    "Elif",
    "Farid",
    "Greta",
    "Hugo",
    "Ines",
    "Jonas",
    "Kira",
    "Liam",
    "Mona",
    "Nadia",
    "Omar",
    "Petra",
    "Quinn",
    "Rosa",
    "Sven",
    "Tara",
    "Uma",
    "Victor",
    "Wanda",
    "Xavier",
    "Yara",
    "Zeno",
    "Anouk",
    "Boris",
    "Celia",
    "Dario",
    "Emil",
    "Fleur",
    "Gus",
    "Hana",
    "Ivo",
    "Jana",
    "Karl",
    "Lena",
    "Milo",
    "Nora",
]
GOODS = ["notebooks", "pens", "candles", "mugs", "plants", "puzzles", "lamps", "scarves", "baskets", "kites"]
Row = dict[str, str]


class Answer:
    """The steps of a worked answer. Every result is computed here, so none that is written can be wrong."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.result = 0

    def step(self, sentence: str, *numbers: int, sign: str) -> int:
        """Add a step and return its result. In the sentence `{}` becomes `3*4 = <<3*4=12>>12`."""
        first, *rest = numbers
        value = {
            "+": Fraction(sum(numbers)),
            "-": Fraction(first - sum(rest)),
            "*": Fraction(prod(numbers)),
            "/": Fraction(first, prod(rest)),
        }[sign]
        assert value.denominator == 1, (numbers, sign)
        assert value > 0, (numbers, sign)
        self.result = int(value)
        written = sign.join(map(str, numbers))
        self.lines.append(sentence.format(f"{written} = <<{written}={self.result}>>{self.result}"))
        return self.result


# A template draws its numbers, works out the answer, and returns the question and the values that identify the problem.
Template = Callable[[random.Random, Answer, str, str], tuple[str, tuple[object, ...]]]


def shopping(rng: random.Random, w: Answer, a: str, b: str) -> tuple[str, tuple[object, ...]]:
    """Two purchases and the change from a bill."""
    n, p, m, q = (rng.randint(2, 12) for _ in range(4))
    one, other = rng.sample(GOODS, 2)
    paid = 50 * ((n * p + m * q + 1) // 50 + 1)  # never 1 dollar of change
    first = w.step(f"The {one} cost {{}} dollars.", n, p, sign="*")
    second = w.step(f"The {other} cost {{}} dollars.", m, q, sign="*")
    total = w.step("Together that is {} dollars.", first, second, sign="+")
    w.step(f"{a} gets back {{}} dollars.", paid, total, sign="-")
    buys = f"{a} buys {n} {one} at ${p} each and {m} {other} at ${q} each"
    return f"{buys} and pays with ${paid}. How many dollars does {a} get back?", (n, p, m, q, one, other)


def discount(rng: random.Random, w: Answer, a: str, b: str) -> tuple[str, tuple[object, ...]]:
    """Several things at a reduced price."""
    price, share, n = rng.randint(2, 30) * 20, rng.choice([2, 4, 5, 10]), rng.randint(2, 8)
    thing = rng.choice(["chair", "jacket", "radio", "tent", "bicycle", "desk"])
    off = w.step("The discount is {} dollars.", price, share, sign="/")
    now = w.step(f"One {thing} now costs {{}} dollars.", price, off, sign="-")
    w.step(f"{a} pays {{}} dollars.", n, now, sign="*")
    sale = f"A {thing} costs ${price}, and in a sale {100 // share} percent is taken off"
    return f"{sale}. How many dollars does {a} pay for {n} of them in the sale?", (price, share, n, thing)


def journey(rng: random.Random, w: Answer, a: str, b: str) -> tuple[str, tuple[object, ...]]:
    """The distance of a journey at two speeds."""
    v, t, u, s = rng.randint(8, 20), rng.randint(2, 6), rng.randint(3, 7), rng.randint(2, 5)
    vehicle = rng.choice(["bicycle", "scooter"])
    ridden = w.step(f"On the {vehicle} {a} covers {{}} kilometres.", v, t, sign="*")
    walked = w.step(f"On foot {a} covers {{}} kilometres.", u, s, sign="*")
    w.step("The whole way is {} kilometres.", ridden, walked, sign="+")
    way = f"{a} rides a {vehicle} at {v} kilometres an hour for {t} hours and then walks at {u} kilometres an hour"
    return f"{way} for {s} hours. How many kilometres is that in all?", (v, t, u, s, vehicle)


def sharing(rng: random.Random, w: Answer, a: str, b: str) -> tuple[str, tuple[object, ...]]:
    """Equal shares after some are lost."""
    friends, each, eaten, bags = rng.randint(3, 9), rng.randint(2, 12), rng.randint(2, 20), rng.randint(2, 6)
    sweets = rng.choice(["marbles", "cherries", "stickers", "walnuts", "beads"])
    total = friends * each + eaten
    if total % bags:
        bags = next(k for k in range(2, total + 1) if total % k == 0)
    size = total // bags
    have = w.step(f"{a} has {{}} {sweets}.", bags, size, sign="*") if size > 1 else total
    left = w.step(f"After losing some there are {{}} {sweets}.", have, eaten, sign="-")
    w.step(f"Each friend gets {{}} {sweets}.", left, friends, sign="/")
    holds = f"{a} has {bags} bags with {size} {sweets} in each" if size > 1 else f"{a} has {bags} {sweets}"
    rest = f"{a} loses {eaten} of them and shares the rest equally among {friends} friends"
    return f"{holds}. {rest}. How many {sweets} does each friend get?", (friends, each, eaten, bags, sweets)


def ages(rng: random.Random, w: Answer, a: str, b: str) -> tuple[str, tuple[object, ...]]:
    """The ages of two people in some years."""
    young, times, years = rng.randint(3, 20), rng.randint(2, 4), rng.randint(2, 25)
    old = w.step(f"{b} is {{}} years old.", young, times, sign="*")
    then = w.step(f"In {years} years {b} will be {{}}.", old, years, sign="+")
    will = w.step(f"In {years} years {a} will be {{}}.", young, years, sign="+")
    w.step("Together they will be {}.", then, will, sign="+")
    now = f"{a} is {young} years old and {b} is {times} times as old"
    return f"{now}. In {years} years, what will their ages add up to?", (young, times, years)


def baking(rng: random.Random, w: Answer, a: str, b: str) -> tuple[str, tuple[object, ...]]:
    """A recipe for more people."""
    serves, times, grams, sugar = rng.randint(2, 8), rng.randint(2, 6), rng.randint(6, 40) * 10, rng.randint(3, 20) * 10
    cake = rng.choice(["bread", "pancakes", "dumplings", "muffins"])
    factor = w.step("The recipe must be made {} times.", serves * times, serves, sign="/")
    flour = w.step("That takes {} grams of flour.", grams, factor, sign="*")
    sweet = w.step("It takes {} grams of sugar.", sugar, factor, sign="*")
    w.step("Together that is {} grams.", flour, sweet, sign="+")
    text = f"A recipe for {cake} for {serves} people needs {grams} grams of flour and {sugar} grams of sugar"
    question = f"How many grams of flour and sugar together does {a} need for {serves * times} people?"
    return f"{text}. {question}", (serves, times, grams, sugar, cake)


def work(rng: random.Random, w: Answer, a: str, b: str) -> tuple[str, tuple[object, ...]]:
    """Two people who pack at two rates."""
    x, y, hours, packed_before = rng.randint(3, 15), rng.randint(3, 15), rng.randint(2, 9), rng.randint(5, 40)
    things = rng.choice(["envelopes", "toys", "parcels", "baskets"])
    rate = w.step(f"In an hour they pack {{}} {things}.", x, y, sign="+")
    packed = w.step(f"In {hours} hours they pack {{}} {things}.", rate, hours, sign="*")
    w.step(f"With those from before there are {{}} {things}.", packed, packed_before, sign="+")
    text = f"{a} packs {x} {things} an hour and {b} packs {y} an hour. {packed_before} {things} are packed already"
    return f"{text}. How many are packed after both have worked {hours} hours?", (x, y, hours, packed_before, things)


def saving(rng: random.Random, w: Answer, a: str, b: str) -> tuple[str, tuple[object, ...]]:
    """The weeks until something can be bought."""
    weekly, spent, weeks, start = rng.randint(12, 40), rng.randint(2, 10), rng.randint(3, 20), rng.randint(5, 60)
    price = start + (weekly - spent) * weeks
    thing = rng.choice(["guitar", "camera", "telescope", "skateboard", "drum"])
    missing = w.step(f"{a} still needs {{}} dollars.", price, start, sign="-")
    kept = w.step(f"Each week {a} keeps {{}} dollars.", weekly, spent, sign="-")
    w.step("That takes {} weeks.", missing, kept, sign="/")
    text = f"{a} has ${start}, earns ${weekly} a week and spends ${spent} of it. A {thing} costs ${price}"
    return f"{text}. After how many weeks can {a} buy it?", (weekly, spent, weeks, start, thing)


def seats(rng: random.Random, w: Answer, a: str, b: str) -> tuple[str, tuple[object, ...]]:
    """The price of the seats in some rows, of which some are empty."""
    rows, wide, empty, price = rng.randint(5, 25), rng.randint(6, 24), rng.randint(3, 25), rng.randint(2, 15)
    place = rng.choice(["theatre", "cinema", "circus tent", "concert hall"])
    all_ = w.step(f"The {place} has {{}} seats.", rows, wide, sign="*")
    taken = w.step("Of these {} are taken.", all_, empty, sign="-")
    w.step("The tickets bring in {} dollars.", taken, price, sign="*")
    text = f"A {place} has {rows} rows of {wide} seats, and tickets cost ${price}. Tonight {empty} seats are empty"
    return f"{text}. How many dollars do the tickets bring in?", (rows, wide, empty, price, place)


def comparing(rng: random.Random, w: Answer, a: str, b: str) -> tuple[str, tuple[object, ...]]:
    """More and fewer things than somebody else."""
    n, times, less = rng.randint(6, 40), rng.randint(2, 5), rng.randint(2, 9)
    things = rng.choice(["stamps", "shells", "postcards", "coins", "badges"])
    many = w.step(f"{times} times as many would be {{}}.", n, times, sign="*")
    second = w.step(f"{b} has {{}} {things}.", many, less, sign="-")
    w.step(f"Together they have {{}} {things}.", n, second, sign="+")
    text = f"{a} has {n} {things}. {b} has {less} fewer than {times} times as many as {a}"
    return f"{text}. How many {things} do they have together?", (n, times, less, things)


def units(rng: random.Random, w: Answer, a: str, b: str) -> tuple[str, tuple[object, ...]]:
    """A time in hours and minutes on several days."""
    hours, minutes, days, used = rng.randint(2, 9), rng.randint(1, 11) * 5, rng.randint(2, 7), rng.randint(10, 100)
    doing = rng.choice(["practises the piano", "paints", "trains for a race", "works in the garden"])
    whole = w.step("The whole hours are {} minutes.", hours, 60, sign="*")
    daily = w.step("A day comes to {} minutes.", whole, minutes, sign="+")
    total = w.step(f"In {days} days that is {{}} minutes.", daily, days, sign="*")
    w.step("Without the breaks it is {} minutes.", total, used, sign="-")
    text = f"{a} {doing} for {hours} hours and {minutes} minutes on each of {days} days"
    question = f"Of the whole time {used} minutes are breaks. How many minutes are left without the breaks?"
    return f"{text}. {question}", (hours, minutes, days, used, doing)


def packing(rng: random.Random, w: Answer, a: str, b: str) -> tuple[str, tuple[object, ...]]:
    """The number of things that are left over after boxes are filled."""
    trays, eggs, size, boxes = rng.randint(3, 12), rng.randint(8, 30), rng.randint(4, 12), rng.randint(3, 12)
    if trays * eggs <= size * boxes + 1:
        trays, eggs = trays + size, eggs + boxes
    fruit = rng.choice(["eggs", "peaches", "lemons", "tomatoes"])
    total = w.step(f"There are {{}} {fruit}.", trays, eggs, sign="*")
    sold = w.step(f"The boxes hold {{}} {fruit}.", boxes, size, sign="*")
    w.step(f"So {{}} {fruit} are left over.", total, sold, sign="-")
    text = f"{a} has {trays} trays of {eggs} {fruit} and fills {boxes} boxes with {size} {fruit} each"
    return f"{text}. How many {fruit} are left over?", (trays, eggs, size, boxes, fruit)


def fence(rng: random.Random, w: Answer, a: str, b: str) -> tuple[str, tuple[object, ...]]:
    """The price of a fence around a rectangle."""
    length, width, price, gate = rng.randint(8, 60), rng.randint(5, 40), rng.randint(2, 12), rng.randint(2, 6)
    land = rng.choice(["garden", "meadow", "yard", "playground"])
    half = w.step("Length and width are {} metres.", length, width, sign="+")
    around = w.step("The way around is {} metres.", 2, half, sign="*")
    fenced = w.step("Without the gate that is {} metres.", around, gate, sign="-")
    w.step("The fence costs {} dollars.", fenced, price, sign="*")
    text = f"{a} fences a {land} {length} metres long and {width} metres wide, leaving {gate} metres open for a gate"
    return f"{text}. The fence costs ${price} a metre. How many dollars is that?", (length, width, price, gate, land)


def tiling(rng: random.Random, w: Answer, a: str, b: str) -> tuple[str, tuple[object, ...]]:
    """The tiles for two rooms."""
    j, k, m, n = (rng.randint(3, 15) for _ in range(4))
    tiles = rng.randint(4, 16)
    kitchen = w.step("The kitchen has {} square metres.", j, k, sign="*")
    hall = w.step("The hall has {} square metres.", m, n, sign="*")
    both = w.step("Together they have {} square metres.", kitchen, hall, sign="+")
    w.step(f"{a} needs {{}} tiles.", both, tiles, sign="*")
    text = f"{a} tiles a kitchen of {j} by {k} metres and a hall of {m} by {n} metres"
    return f"{text}. A square metre takes {tiles} tiles. How many tiles are needed?", (j, k, m, n, tiles)


def reading(rng: random.Random, w: Answer, a: str, b: str) -> tuple[str, tuple[object, ...]]:
    """The days that the rest of a book takes."""
    slow, days, fast, more = rng.randint(8, 30), rng.randint(3, 9), rng.randint(10, 40), rng.randint(3, 12)
    pages = slow * days + fast * more
    book = rng.choice(["novel", "travel book", "history book", "biography"])
    read = w.step(f"{a} has read {{}} pages.", slow, days, sign="*")
    left = w.step("There are {} pages left.", pages, read, sign="-")
    w.step("That takes {} more days.", left, fast, sign="/")
    text = f"A {book} has {pages} pages. {a} reads {slow} pages a day for {days} days, then {fast} pages a day"
    return f"{text}. How many more days does the rest take?", (slow, days, fast, more, book)


TEMPLATES: tuple[Template, ...] = (
    *(shopping, discount, journey, sharing, ages, baking, work, saving),
    *(seats, comparing, units, packing, fence, tiling, reading),
)


def problems(seed: int) -> Iterator[Row]:
    """Yield distinct problems, the templates in turn, until they repeat themselves too often."""
    rng, repeats = random.Random(seed), 0
    seen: set[tuple[object, ...]] = set()
    while repeats < 10_000:
        template = TEMPLATES[len(seen) % len(TEMPLATES)]
        answer = Answer()
        first, second = rng.sample(NAMES, 2)
        question, numbers = template(rng, answer, first, second)
        key = (template.__name__, numbers)
        if key in seen:
            repeats += 1
            continue
        seen.add(key)
        yield {"question": question, "answer": "\n".join([*answer.lines, f"#### {answer.result}"])}


def write(path: Path, rows: list[Row]) -> None:
    """Write rows as JSON lines. The file appears whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    os.replace(partial, path)


def write_problems(out: Path, *, train: int = 2000, test: int = 200, seed: int = 42) -> None:
    """Write train.jsonl and test.jsonl, with this many distinct problems each, into a folder, which is made if need be.

    Raises:
        ValueError: a number is below 1, or there are not as many distinct problems.
    """
    if train < 1 or test < 1:
        raise ValueError("--train and --test must be at least 1")
    count = train + test
    rows = [row for row, _ in zip(problems(seed), range(count), strict=False)]
    if len(rows) < count:
        raise ValueError(f"--train and --test: only {len(rows)} distinct problems can be made, not {count}")
    random.Random(seed).shuffle(rows)
    out.mkdir(parents=True, exist_ok=True)
    write(out / "train.jsonl", rows[:train])
    write(out / "test.jsonl", rows[train:])


def main() -> None:
    """Run the command line; it exits with code 2 if it cannot make as many problems as it should."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the folder to write train.jsonl and test.jsonl to")
    parser.add_argument("--train", type=int, default=2000, help="the number of training rows")
    parser.add_argument("--test", type=int, default=200, help="the number of held-out test rows")
    parser.add_argument("--seed", type=int, default=42, help="the seed of all draws")
    args = parser.parse_args()
    try:
        write_problems(args.out, train=args.train, test=args.test, seed=args.seed)
    except ValueError as error:
        parser.error(str(error))
    print(f"{args.out}: {args.train:,} training and {args.test:,} test problems", file=sys.stderr)


if __name__ == "__main__":
    main()
