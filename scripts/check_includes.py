#!/usr/bin/env python3
"""Checks that modules include only what DESIGN.md section 2 allows.

A module may include its own headers, those of the modules named in its row, and everything those may include.
Exits 1 and lists every include that points the wrong way.
"""

import pathlib
import re
import sys

DIRECT = {
    "base": [],
    "chat": ["base"],
    "net": ["base"],
    "http": ["net"],
    "tensor": ["base"],
    "gguf": ["tensor"],
    "vocab": ["gguf"],
    "weights": ["gguf"],
    "graph": ["tensor"],
    "device": ["graph"],
    "device/cpu": ["device"],
    "models": ["weights", "graph"],
    "stage": ["models", "device"],
    "remote": ["net", "stage"],
    "plan": ["stage"],
    "engine": ["stage", "vocab"],
    "cluster": ["remote", "plan", "engine"],
    "server": ["engine", "chat", "http"],
}


def module_of(path):
    """'device/cpu/kernels/x.h' -> 'device/cpu': the deepest known module that holds the file."""
    parts = path.split("/")[:-1]
    for n in range(len(parts), 0, -1):
        if "/".join(parts[:n]) in DIRECT:
            return "/".join(parts[:n])
    return None


def reachable(module):
    """The module and everything it may include."""
    seen, todo = set(), [module]
    while todo:
        m = todo.pop()
        if m not in seen:
            seen.add(m)
            todo.extend(DIRECT[m])
    return seen


def main():
    root = pathlib.Path(__file__).resolve().parent.parent / "src"
    wrong, checked = [], 0
    for file in sorted(root.rglob("*")):
        if file.suffix not in (".h", ".cpp", ".inc"):
            continue
        relative = file.relative_to(root).as_posix()
        module = module_of(relative)
        if module is None:
            wrong.append(f"src/{relative}: belongs to no known module")
            continue
        allowed = reachable(module)
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            match = re.match(r'\s*#\s*include\s+"([^"]+)"', line)
            if not match or "/" not in match.group(1):
                continue
            checked += 1
            target = module_of(match.group(1))
            if target is None:
                wrong.append(f"src/{relative}:{number}: '{match.group(1)}' is in no known module")
            elif target not in allowed:
                wrong.append(f"src/{relative}:{number}: {module} must not include {target} ('{match.group(1)}')")
    print("\n".join(wrong) if wrong else f"include directions: {checked} includes, all as allowed")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
