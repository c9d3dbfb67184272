"""Prints the measures of the house: `python tests/house.py [ROOT]`; tests/test_house.py holds its laws."""

import ast
import sys
from collections import Counter
from pathlib import Path

from arrows import knots, privates, read

WORDS = "hidden weight targets bias adapter temperature softcap logit_scale scaling ignore_index ref ref_hidden"
WORDS += " ref_bias ref_weight weight_grad vocab_shard chunk_tokens tile_bytes tiling backend outputs"  # of the head


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
