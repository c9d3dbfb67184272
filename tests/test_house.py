"""The laws of docs/design.md: what a room may import, that no files import one another, and how large a file may be.

Each law is a function that returns what breaks it. Beside it stands a house that breaks it, which it must catch.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import arrows

ROOT = Path(__file__).resolve().parent.parent
# From the top down: a room imports from lower floors only. "" is the face of the package, which imports when asked.
FLOORS = (
    *("cli", "", "bench evaluate fit report", "recipes", "rl", "rewards integrations", "trainer", "rollout"),
    *("data objective", "layouts", "models", "head", "methods kernels"),
    "demo_data device files native precision reduce reporters resume seeds store types version wording",
)
GROUND = len(FLOORS) - 1
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms.split(" ")}
# What lies below, and is not to be known all the same.
UNKNOWN = {"head": ("methods",), "data": ("methods",)}
KNOWN_TO_KERNELS = ("files", "store", "wording")
LISTS = ("xpo_fast.methods.pairwise", "xpo_fast.methods.policy")  # of methods: long, and no machines
FACES_WITH_MORE = ("xpo_fast", "xpo_fast.demo_data")  # names that are imported late; a path
FILE_LINES, CLASS_LINES = 500, 400
ROOMS = ("xpo_fast", "kernels", "bench", "tests", "examples")
THEIRS = {"rewards.py"}  # files of a reader's own, in commands


def room(module):
    """ "head" for xpo_fast.head.plan, "types" for xpo_fast.types, "" for xpo_fast itself."""
    return module.split(".")[1] if "." in module else ""


def upward(files):
    """Imports from a room that is not on a lower floor; the files of the ground floor may import one another."""
    pairs = sorted({(m, t) for m, t, *_ in arrows.imports(files) if room(m) != room(t)})
    floors = ((m, t, FLOOR[room(m)], FLOOR[room(t)]) for m, t in pairs)
    return [f"{m} imports {t}" for m, t, above, below in floors if above >= below and not above == below == GROUND]


def unknown(files):
    """Imports of a lower room that the importing one must not know."""
    pairs = sorted({(m, t) for m, t, *_ in arrows.imports(files) if room(m) != room(t)})
    of_kernels = [(m, t) for m, t in pairs if room(m) == "kernels" and room(t) not in KNOWN_TO_KERNELS]
    return [f"{m} imports {t}" for m, t in pairs if room(t) in UNKNOWN.get(room(m), ()) or (m, t) in of_kernels]


def own_faces(files):
    """Files that import the face of their own room, and not the file that has what they need."""
    pairs = {(m, t) for m, t, *_ in arrows.imports(files) if m.rpartition(".")[0] == t != "xpo_fast"}
    return sorted(f"{m} imports {t}" for m, t in pairs if m != "xpo_fast.cli.__main__")


def busy_faces(files):
    """Faces that do more than import names and list them."""
    found = []
    for module, (path, tree) in files.items():
        rest = [ast.unparse(x) for x in tree.body[1:] if not isinstance(x, (ast.Import, ast.ImportFrom))]
        plain = ast.get_docstring(tree) and all(x.startswith("__all__ = ") for x in rest)
        if path.name == "__init__.py" and module not in FACES_WITH_MORE and not plain:
            found.append(module)
    return found


def too_long(files):
    """Files and classes over their limits, with their lines."""
    found = []
    for module, (path, tree) in files.items():
        lengths = {module: 0 if module in LISTS else len(path.read_text(encoding="utf-8").splitlines()) - FILE_LINES}
        classes = (x for x in ast.walk(tree) if isinstance(x, ast.ClassDef))
        lengths |= {f"{module}.{x.name}": x.end_lineno + 1 - x.lineno - CLASS_LINES for x in classes}
        found += [f"{name}: {over} lines too long" for name, over in lengths.items() if over > 0]
    return found


def knots(files):
    return [sorted(knot) for knot in arrows.knots(files)]


@pytest.fixture(scope="module")
def files():
    return arrows.read(ROOT)


LAWS = (upward, unknown, knots, arrows.privates, own_faces, busy_faces, too_long)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_is_held(law, files):
    assert not law(files)


BROKEN = [
    (upward, ["head/plan.py", "def f(): from ..models import Head"], ["xpo_fast.head.plan imports xpo_fast.models"]),
    (upward, ["methods/math.py", "import xpo_fast.head as h"], ["xpo_fast.methods.math imports xpo_fast.head"]),
    (upward, ["data/rows.py", "if A: from .. import objective"], ["xpo_fast.data.rows imports xpo_fast.objective"]),
    (
        upward,
        ["files.py", "from .head import x", "types.py", "from . import files"],
        ["xpo_fast.files imports xpo_fast.head"],
    ),
    (upward, ["rl/trainer.py", "import xpo_fast as xf"], ["xpo_fast.rl.trainer imports xpo_fast"]),
    (unknown, ["head/plan.py", "from .. import methods"], ["xpo_fast.head.plan imports xpo_fast.methods"]),
    (unknown, ["data/rows.py", "from ..methods.math import x"], ["xpo_fast.data.rows imports xpo_fast.methods.math"]),
    (unknown, ["kernels/rows.py", "import xpo_fast.types"], ["xpo_fast.kernels.rows imports xpo_fast.types"]),
    (
        knots,
        ["head/a.py", "from .b import x", "head/b.py", "from . import a"],
        [["xpo_fast.head.a", "xpo_fast.head.b"]],
    ),
    (
        knots,
        ["a.py", "from . import b", "b.py", "from .head import x", "head/__init__.py", "from ..a import x"],
        [["xpo_fast.a", "xpo_fast.b", "xpo_fast.head"]],
    ),
    # The function `load` of the face, not the file data/load.py.
    (
        knots,
        [
            "data/__init__.py",
            "from .load import load",
            "a.py",
            "from .data import load",
            "data/load.py",
            "from .. import a",
        ],
        [["xpo_fast.a", "xpo_fast.data", "xpo_fast.data.load"]],
    ),
    (arrows.privates, ["head/a.py", "from .b import _x, __version__, y"], ["xpo_fast.head.a: xpo_fast.head.b._x"]),
    (arrows.privates, ["head/a.py", "from . import b\nb._x(self._y)"], ["xpo_fast.head.a: xpo_fast.head.b._x"]),
    (own_faces, ["head/a.py", "from . import b, x"], ["xpo_fast.head.a imports xpo_fast.head"]),
    (busy_faces, ["head/__init__.py", "'Doc.'\nfrom . import a\nx = 1"], ["xpo_fast.head"]),
    (too_long, ["head/a.py", "x = 1\n" * 502], ["xpo_fast.head.a: 2 lines too long"]),
    (too_long, ["head/a.py", "class A:\n" + "    x = 1\n" * 400], ["xpo_fast.head.a.A: 1 lines too long"]),
]


@pytest.mark.parametrize(("law", "changed", "expected"), BROKEN)
def test_catches(law, changed, expected, tmp_path):
    sources = {f"{room}/__init__.py": '"""A face."""' for rooms in FLOORS[:-1] for room in rooms.split(" ") if room}
    sources |= dict.fromkeys(
        ("__init__.py", "types.py", "files.py", "head/b.py", "objective/call.py", "methods/math.py"), ""
    )
    for broken in (False, True):
        for name, text in (sources | (dict(zip(changed[::2], changed[1::2])) if broken else {})).items():
            path = tmp_path / name if name.startswith("kernels") else tmp_path / "xpo_fast" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        assert law(arrows.read(tmp_path)) == (expected if broken else [])


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/design.md", "README.md", "docs/gpu.md"])
def test_pages_name_files_that_exist(page):
    named = set(re.findall(r"[\w/]*\b\w+\.py\b", (ROOT / page).read_text("utf-8")))
    tracked = [f"/{p.relative_to(ROOT)}" for room in ROOMS for p in (ROOT / room).rglob("*.py")] + ["/setup.py"]
    missing = {name for name in named if not any(path.endswith("/" + name.lstrip("/")) for path in tracked)}
    assert named and missing <= THEIRS
