"""Prints the measures of the house: `python tests/house.py [ROOT]`; tests/test_house.py holds its laws. Imports count
wherever they stand, inside a function and under TYPE_CHECKING too. `kernels/` is `xpo_fast.kernels`."""

import ast
import sys
from collections import Counter
from pathlib import Path

WORDS = "hidden weight targets bias adapter temperature softcap logit_scale scaling ignore_index ref ref_hidden"
WORDS += " ref_bias ref_weight weight_grad vocab_shard chunk_tokens tile_bytes tiling backend outputs"  # of the head


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
    for module, (path, tree) in files.items():
        package = module.split(".")[: None if path.name == "__init__.py" else -1]
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                yield from ((module, a.name, None, a.asname or a.name) for a in node.names if a.name in files)
            elif isinstance(node, ast.ImportFrom):
                base = package[: len(package) + 1 - node.level] if node.level else []
                source = ".".join(base + [node.module] * bool(node.module))
                face = ast.walk(files[source][1]) if source in files and source != module else ()
                offered = {a.name for n in face if isinstance(n, ast.ImportFrom) and n.module for a in n.names}
                for a in node.names:  # `from ..data import load`: the face's function, not data/load.py
                    is_file = (file := f"{source}.{a.name}") in files and a.name not in offered
                    if is_file or source in files:
                        yield module, file if is_file else source, None if is_file else a.name, a.asname or a.name


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


def main(root="."):
    """Prints files per folder, the largest file and class, wide signatures, knots, private imports and lines."""
    files, folders, lengths, wide = read(root), Counter(), {"file": {}, "class": {}}, []
    for module, (path, tree) in files.items():
        folders[module if path.name == "__init__.py" else module.rpartition(".")[0]] += 1
        lengths["file"][module] = len(path.read_text("utf-8").splitlines())
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                lengths["class"][f"{module}.{node.name}"] = node.end_lineno - node.lineno + 1
            elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                count = len({a.arg for a in ast.walk(node.args) if isinstance(a, ast.arg)} & {*WORDS.split()})
                wide += [f"{module}.{node.name} {count}"] * (count >= 6)
    print(f"{len(files)} files:", *(f"{folder} {count}," for folder, count in folders.items()))
    for kind, of in lengths.items():
        print(f"largest {kind}:", *(f"{name} {of[name]}," for name in sorted(of, key=of.get, reverse=True)[:4]))
    tangled = knots(files)
    for what, found in (("signatures of six or more of the head's words", wide), ("private imports", privates(files))):
        print(f"{len(found)} {what}:", *(f"\n  {name}" for name in found))
    print(f"{len(tangled)} circles, {sum(map(len, tangled))} files in them:", *(f"\n  {sorted(k)}" for k in tangled))
    source = [line for path, _ in files.values() for line in path.read_text("utf-8").splitlines()]
    print(f"{len(source)} lines of source, {sum(map(bool, map(str.strip, source)))} without blank ones")
    tracked = [p for p in Path(root).rglob("*.py") if not {".venv", "build"} & {*p.parts}]
    print(sum(len(line) > 120 for p in tracked for line in p.read_text("utf-8").splitlines()), "lines over 120 columns")


if __name__ == "__main__":
    main(*sys.argv[1:])
