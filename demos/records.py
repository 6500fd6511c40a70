"""The results that the tables are made of: demos/results/<demo>.jsonl, a line for each run.

A run adds its line on request (--record); demos/tables.py reads them. A line is the run's
result.json with the options that differ from the defaults, versions, and a hash of the code and the
models that it was made with.
"""
import ast
import hashlib
import json
import os
import pathlib
import platform
import re

import torch
import transformers

DEMOS = pathlib.Path(__file__).resolve().parent
RESULTS = DEMOS / "results"
# What says where and how a run is kept, not what it computes.
KEEPING = {"seed", "out", "overwrite", "record", "resume", "stop"}


def path(demo):
    return RESULTS / f"{demo}.jsonl"


def load(demo):
    return rows(path(demo))


def rows(path):
    """Of a file with a JSON object a line; without the file none."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()
            ] if path.exists() else []


def anywhere(text):
    """Where this folder lies is no news."""
    return text.replace(f"{DEMOS.parent}{os.sep}", "")


def text(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def add(result, options, made_with):
    RESULTS.mkdir(exist_ok=True)
    line = text([result | {
        "options": options, "hash": made_with,
        "python": platform.python_version(), "torch": torch.__version__,
        "transformers": transformers.__version__}])
    with open(path(result["demo"]), "a", encoding="utf-8") as file:
        file.write(anywhere(line))


def replace(demo, rows):
    new = path(demo).with_suffix(".new")
    new.write_text(text(rows), encoding="utf-8")
    os.replace(new, path(demo))


def options(parser, argv):
    """Of a command, those that differ from their defaults."""
    given, default = (vars(parser.parse_args(list(words))) for words in (argv, []))
    return {name: value if isinstance(value, (int, float, str, list)) else str(value)
            for name, value in given.items() if name not in KEEPING and value != default[name]}


def stamp(demo, *checkpoints):
    """A hash of dpg.py, the demo with all that it imports from demos/, and the models' files; what
    a comment or a docstring says does not count."""
    modules = [demo]
    for name in modules:  # grows on the way
        source = (DEMOS / f"{name}.py").read_text(encoding="utf-8")
        for one, several in re.findall(r"^from demos(?:\.(\w+))? import (.+)$", source, re.M):
            modules += [m for m in ([one] if one else several.split(", ")) if m not in modules]
    files = [DEMOS.parent / "dpg.py", *(DEMOS / f"{name}.py" for name in sorted(modules))]
    for folder in map(pathlib.Path, checkpoints):
        files += sorted(p for p in (folder.iterdir() if folder.is_dir() else [folder])
                        if p.is_file())
    digest = hashlib.sha256()
    for file in files:
        content = code(file) if file.suffix == ".py" else file.read_bytes()
        digest.update(file.name.encode() + b"\0" + hashlib.sha256(content).digest())
    return digest.hexdigest()[:16]


def code(file):
    """What a Python file says to Python."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr) and isinstance(
                body[0].value, ast.Constant):
            body[0] = ast.Pass()
    return ast.unparse(tree).encode()
