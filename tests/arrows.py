"""Reads the imports of the package, which tests/test_house.py holds to its laws and tests/house.py measures.

Imports count wherever they stand, inside a function and under TYPE_CHECKING too. `kernels/` is `xpo_fast.kernels`.
"""

import ast
from pathlib import Path


def read(root):
    """Returns {module: (path, syntax tree)} of xpo_fast/ and kernels/; a face, `__init__.py`, has its folder's name."""
    found, root = {}, Path(root).resolve()
    for path in sorted({p.resolve() for folder in ("xpo_fast", "kernels") for p in (root / folder).rglob("*.py")}):
        parts = path.relative_to(root).with_suffix("").parts
        name = ".".join(["xpo_fast"] * (parts[0] == "kernels") + [*parts]).removesuffix(".__init__")
        found[name] = path, ast.parse(path.read_text("utf-8"))
    return found


def imports(files):
    """Yields (importer, imported module, name taken from it or None, local name) of the imports inside the package."""
    offered = {module: _taken(tree) for module, (path, tree) in files.items() if path.name == "__init__.py"}
    for module, (path, tree) in files.items():
        package = module.split(".")[: None if path.name == "__init__.py" else -1]
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                yield from ((module, a.name, None, a.asname or a.name) for a in node.names if a.name in files)
            elif isinstance(node, ast.ImportFrom):
                base = package[: len(package) + 1 - node.level] if node.level else []
                source = ".".join(base + [node.module] * bool(node.module))
                names = offered.get(source, ()) if source != module else ()
                for a in node.names:  # `from ..data import load`: the face's function, not data/load.py
                    is_file = (file := f"{source}.{a.name}") in files and a.name not in names
                    if is_file or source in files:
                        yield module, file if is_file else source, None if is_file else a.name, a.asname or a.name


def _taken(tree):
    """Returns the names that a file takes from other files."""
    return {a.name for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module for a in n.names}


def knots(files):
    """Returns the sets of files that import one another, directly or through others; the package's face left out."""
    reach = {module: set() for module in files}
    for module, target, *_ in imports(files):
        reach[module] |= {target} - {module} if "xpo_fast" not in (module, target) else set()
    for middle in files:  # Warshall's closure
        for targets in reach.values():
            targets |= reach[middle] if middle in targets else set()
    return sorted({frozenset(m for m in reach[k] if k in reach[m]) for k in files if k in reach[k]}, key=sorted)


def privates(files):
    """Returns "importer: module.name" for each private name that a file takes from another."""
    taken = [x for x in imports(files) if x[0] != x[1]]
    found = {(module, f"{target}.{name}") for module, target, name, _ in taken if name is not None}
    local = {(module, alias): target for module, target, name, alias in taken if name is None}
    for module, (_, tree) in files.items():
        for n in ast.walk(tree):
            if isinstance(n, ast.Attribute) and (target := local.get((module, ast.unparse(n.value)))):
                found.add((module, f"{target}.{n.attr}"))
    return sorted(f"{m}: {x}" for m, x in found if x.split(".")[-1][:1] == "_" and x[-2:] != "__")
