"""The README's commands parse, and the tables of equations in the docstrings name what exists."""
import importlib
import re
import shlex

import pytest
import torch.distributed.run
from conftest import ROOT

SCRIPTS = sorted(p.stem for p in ROOT.glob("*.py") if p.stem != "common")
METHODS = [s for s in SCRIPTS if "\nEquations" in importlib.import_module(s).__doc__]


def commands():
    """Every line of a code block, and of a docstring, that starts one of the scripts."""
    texts = {"README.md": (ROOT / "README.md").read_text()}
    texts.update({f"{s}.py": importlib.import_module(s).__doc__ for s in SCRIPTS})
    for name, text in texts.items():
        for line in re.sub(r"\\\n\s*", "", text).splitlines():
            for part in line.split("&&"):
                found = re.match(r"\s*(python|torchrun)\s.*?(?P<script>\S+)\.py(?P<rest>.*)",
                                 part.split("  #")[0])
                if found:
                    rest = re.split(r"\s{3,}", found["rest"])[0]  # docstrings explain at the right
                    yield name, found["script"], shlex.split(rest)


FOUND = list(commands())


def test_there_are_commands():
    assert len([name for name, *_ in FOUND if name == "README.md"]) >= 6
    assert {script for _, script, _ in FOUND} >= {"moco_v2", "finetune_fasterrcnn", "scenes"}
    assert {*METHODS} >= {"moco_v2", "detco", "dupr", "soco", "selective_search", "barlow_twins",
                          "vicreg"}


@pytest.mark.parametrize("name, script, words", FOUND)
def test_command_parses(name, script, words):
    assert (ROOT / f"{script}.py").is_file()
    module = importlib.import_module(script.replace("/", "."))
    if hasattr(module, "parse_args"):
        module.parse_args(words)


def test_the_readmes_line_counts():
    rows = re.findall(r"\| `(\w+\.py)` \|.*?\| (\d+) \|", (ROOT / "README.md").read_text())
    assert len(rows) >= 2
    for name, lines in rows:
        assert int(lines) == len((ROOT / name).read_text().splitlines()), name


@pytest.mark.parametrize("name", [s for s in SCRIPTS if s != "scenes"])
def test_torchrun_takes_no_flag_for_its_own(name):
    """torchrun stops at a script's flag that could be short for one of its own, such as --m."""
    theirs = torch.distributed.run.get_args_parser()._option_string_actions
    text = (ROOT / f"{name}.py").read_text() + (ROOT / "common.py").read_text()
    ours = set(re.findall(r'"(--[\w-]+)"', text))
    assert "--out" in ours and "--data" in ours
    assert not [(a, b) for a in ours for b in theirs if b.startswith(a) and a != b]


@pytest.mark.parametrize("name, head", [*((name, "Equations") for name in METHODS),
                                        ("linear_probe", "Formulae")])
def test_equations_name_what_exists(name, head):
    module = importlib.import_module(name)
    table = module.__doc__.split(head)[1].split("Commands")[0]
    rows = [re.split(r"\s{2,}", row.strip())[-1] for row in table.rstrip().splitlines()[1:]]
    named = [re.findall(r"\b(?:(?:common|selective_search|[A-Z]\w+)\.)?[a-z]\w+\b", row)
             for row in rows]
    assert len(rows) >= 3
    for row, names in zip(rows, named):
        found = []
        for owner, _, attribute in (name.rpartition(".") for name in names):
            place = importlib.import_module(owner) if owner in SCRIPTS + ["common"] else (
                getattr(module, owner) if owner else module)
            if owner or hasattr(place, attribute):
                found.append(callable(getattr(place, attribute)))
        assert found and all(found), row


@pytest.mark.parametrize("name", METHODS)
def test_symbols_are_in_the_code(name):
    module = importlib.import_module(name)
    code = (ROOT / f"{name}.py").read_text().replace(module.__doc__, "")
    rows = module.__doc__.split("Symbols")[1].split("Equations")[0].strip().splitlines()[1:]
    for row in rows:
        for symbol in re.split(r"\s{2,}", row.strip())[1].split(", "):
            assert re.search(rf"\b{re.escape(symbol)}\b", code), symbol


@pytest.mark.parametrize("name", SCRIPTS)
def test_method_files_stand_alone(name):
    """A copy of the file needs common.py, and the built-in scenes only when they are asked for."""
    text = (ROOT / f"{name}.py").read_text()
    imported = set(re.findall(r"^\s*(?:from|import) (\w+)", text, re.M)) & {*SCRIPTS, "common"}
    may = {"soco": {"selective_search"}, "visualize": {*SCRIPTS},
           "linear_probe": {"finetune_fasterrcnn", "visualize"}}
    assert imported <= {"common", "scenes"} | may.get(name, set())
    assert not re.search(r"^(from|import) scenes", text, re.M)
