"""Every command of README, RESULTS and docstrings parses; what docstrings name is in the code."""
import ast
import importlib
import re
import shlex

import pytest
import torch.distributed.run
from conftest import ROOT

SCRIPTS = sorted(p.stem for p in ROOT.glob("*.py") if p.stem != "common")
TEXTS = {name: (ROOT / name).read_text() for name in ("README.md", "RESULTS.md")}
TEXTS.update((str(path.relative_to(ROOT)), ast.get_docstring(ast.parse(path.read_text())))
             for path in [*ROOT.glob("*.py"), *ROOT.glob("tools/*.py")])
METHODS = [script for script in SCRIPTS if "\nEquations" in TEXTS[f"{script}.py"]]


def commands():
    """Every line that starts a script: the text, the script, its words."""
    for name, text in TEXTS.items():
        for line in re.sub(r"\\\n\s*", "", text).splitlines():
            for part in line.split("&&"):
                found = re.match(r"\s*(python|torchrun)\s.*?(?P<script>\S+)\.py(?P<rest>.*)",
                                 part.split("  #")[0])
                if found:
                    rest = re.split(r"\s{3,}", found["rest"])[0]  # docstrings explain at the right
                    yield name, found["script"], shlex.split(rest)


FOUND = list(commands())


def test_there_are_commands():
    for name in ("README.md", "RESULTS.md"):
        assert len([text for text, *_ in FOUND if text == name]) >= 6
    assert {script for _, script, _ in FOUND} == {
        *SCRIPTS, "tools/benchmark", "tools/stress", "tools/table"}
    assert {*METHODS} == {"moco_v2", "detco", "dupr", "soco", "selective_search", "barlow_twins",
                          "vicreg"}


@pytest.mark.parametrize("name, script, words", FOUND)
def test_command_parses(monkeypatch, name, script, words):
    assert (ROOT / f"{script}.py").is_file()
    module = importlib.import_module(script.replace("/", "."))
    if "--eval-only" in words:  # the arguments that a checkpoint holds
        monkeypatch.setattr(module, "load_fine_tuned", lambda _path: dict(args={}))
    if hasattr(module, "parse_args"):
        module.parse_args(words)


@pytest.mark.parametrize("name", [script for script in SCRIPTS if script != "scenes"])
def test_torchrun_takes_no_flag_for_its_own(name):
    """torchrun stops at a script's flag that could be short for one of its own, such as --m."""
    theirs = torch.distributed.run.get_args_parser()._option_string_actions
    files = [ROOT / f"{name}.py", *ROOT.glob("plumbing/*.py"), *ROOT.glob("detection/*.py")]
    ours = {flag for file in files for flag in re.findall(r'"(--[\w-]+)"', file.read_text())}
    assert "--out" in ours and "--data" in ours
    assert not [(a, b) for a in ours for b in theirs if b.startswith(a) and a != b]


@pytest.mark.parametrize("name", METHODS)
def test_equations_name_what_exists(name):
    module = importlib.import_module(name)
    table = module.__doc__.split("Equations")[1].split("Command")[0]
    rows = [re.split(r"\s{2,}", row.strip())[-1] for row in table.rstrip().splitlines()[1:]]
    named = [re.findall(r"\b(?:(?:plumbing\.\w+|common|selective_search|[A-Z]\w+)\.)?[a-z]\w+\b",
                        row) for row in rows]
    assert len(rows) >= 3
    for row, names in zip(rows, named):
        found = []
        for owner, _, attribute in (name.rpartition(".") for name in names):
            place = getattr(module, owner) if owner[:1].isupper() else (
                importlib.import_module(owner) if owner else module)
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


@pytest.mark.parametrize("name", METHODS)
def test_a_method_says_where_it_departs_from_its_paper(name):
    """At the line that departs, and not in a docstring that nobody reads to its end."""
    text = (ROOT / f"{name}.py").read_text()
    assert len(TEXTS[f"{name}.py"].splitlines()) <= 40
    assert re.search(r"^ *# (Differs|Paper silent)\b.*: ", text, re.M)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            assert "where this differs" not in (ast.get_docstring(node) or "").lower()


def test_what_the_linear_probe_names_exists():
    module = importlib.import_module("linear_probe")
    named = re.findall(r"\b[a-z]+_[a-z_]+\b", module.__doc__.split("Data sets")[1].split("Comm")[0])
    assert len(named) >= 3 and all(callable(getattr(module, name)) for name in named)
