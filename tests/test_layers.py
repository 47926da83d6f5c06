"""The layers of the house: what may import what, no circle, no name twice, and who may take a whole experiment."""

import ast
import subprocess
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from tests.conftest import ROOT

# From the bottom up: a room imports those before it, and `trainer`'s own modules, which are of everybody.
TRAINER = ("experiment", "data", "run", "models", "distributed", "teacher", "checkpoints", "planning", "evaluate",
           "training", "student", "sweep")
BELOW_ALL = ("errors", "files", "model_files")
ABOVE_ALL = ("early_checks", "preparation", "starting_student", "pipeline", "script", "stages", "command_line",
             "failures", "starter", "quick_imports", "cli")
REMATERIALIZATION = ("solve", "capture", "price", "execute")
MOST_WITH_EXPERIMENT = 30  # functions outside of experiment/, planning/ and the pipeline


def sources(*folders: str) -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard", *folders], cwd=ROOT,
                            capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in listed.split() if name.endswith(".py") and (ROOT / name).exists()]


def module_name(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@pytest.fixture(scope="module")
def imports() -> dict[str, set[str]]:
    """Modules that each module of the product imports, those that only a type checker reads included."""
    files = {module_name(file): file for file in sources("trainer", "strategies")}
    found: dict[str, set[str]] = {name: set() for name in files}
    for name, file in files.items():
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                found[name] |= {alias.name for alias in node.names} & files.keys()
            elif isinstance(node, ast.ImportFrom) and node.module:
                whole = {f"{node.module}.{alias.name}" for alias in node.names} & files.keys()
                found[name] |= whole or {node.module} & files.keys()
        found[name].discard(name)
    return found


def test_no_module_imports_itself_by_way_of_others(imports):
    state: dict[str, int] = {}

    def follow(name: str, way: tuple[str, ...]) -> None:
        state[name] = 1
        for other in sorted(imports[name]):
            assert state.get(other) != 1, " -> ".join((*way, name, other))
            if other not in state:
                follow(other, (*way, name))
        state[name] = 2

    for name in imports:
        if name not in state:
            follow(name, ())


def test_rooms_import_those_below_them(imports):
    for name, others in imports.items():
        mine = name.split(".")
        for other in others:
            theirs, said = other.split("."), f"{name} imports {other}"
            if mine[0] == "strategies":
                assert theirs[0] == "strategies" and theirs[1] in (mine[1], "common", "memory"), said
                if mine[1] in ("common", "memory"):
                    assert theirs[1] == mine[1] or (mine[1], theirs[1]) == ("memory", "common"), said
                if mine[1] == theirs[1] == "rematerialization" and len(mine) == 4:
                    assert len(theirs) == 4, said
                    assert REMATERIALIZATION.index(theirs[2]) <= REMATERIALIZATION.index(mine[2]), said
            elif theirs[0] == "trainer" and len(mine) > 1 and len(theirs) > 1:
                if mine[1] in BELOW_ALL:
                    assert theirs[1] in BELOW_ALL, said
                elif mine[1] not in ABOVE_ALL:
                    assert theirs[1] in BELOW_ALL or TRAINER.index(theirs[1]) <= TRAINER.index(mine[1]), said


def test_every_room_has_a_place(imports):
    rooms = {name.split(".")[1] for name in imports if name.startswith("trainer.")}
    assert rooms == {*TRAINER, *BELOW_ALL, *ABOVE_ALL}


def test_a_module_is_found_by_its_name_alone():
    names = Counter(file.name for file in sources("trainer", "strategies", "benchmarks", "tests"))
    assert [name for name, count in names.items() if count > 1] in (["__init__.py"], ["__init__.py", "__main__.py"])


def test_parts_take_the_node_of_the_experiment_that_they_need():
    found = defaultdict(list)
    for file in sources("trainer"):
        place = file.relative_to(ROOT / "trainer")
        if place.parts[0] in ("experiment", "planning", "pipeline.py", "early_checks.py", "preparation.py",
                              "starting_student.py"):
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef) and any(
                    isinstance(part, ast.Name) and part.id == "Experiment"
                    for argument in (*node.args.args, *node.args.kwonlyargs) if argument.annotation is not None
                    for part in ast.walk(argument.annotation)):
                found[str(place)].append(node.name)
    assert sum(map(len, found.values())) <= MOST_WITH_EXPERIMENT, dict(found)
