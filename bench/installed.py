"""What an installation holds beside torch: run by the interpreter that is measured.

    /path/to/python bench/installed.py [ROOT] [EXCLUDED]

Prints JSON: the distributions that ROOT (pyserve) requires, directly or not, and that EXCLUDED
(torch) does not, with the bytes of their files. Needs only the standard library and `packaging`.
"""

from __future__ import annotations

import json
import os
import sys
from importlib import metadata, util
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def closure(root: str, installed: dict[str, metadata.Distribution]) -> set[str]:
    """Names of all distributions that `root` needs here, itself included.

    Follows extras and evaluates markers in this interpreter; what is not installed is left out
    (a marker-free requirement that is missing would be pip's error, not ours).
    """
    seen: set[tuple[str, str]] = set()
    stack = [(canonicalize_name(root), "")]
    while stack:
        name, extra = stack.pop()
        if (name, extra) in seen or name not in installed:
            continue
        seen.add((name, extra))
        for text in installed[name].requires or ():
            requirement = Requirement(text)
            if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
                continue
            target = canonicalize_name(requirement.name)
            stack += [(target, wanted) for wanted in ("", *requirement.extras)]
    return {name for name, _ in seen}


def file_bytes(distribution: metadata.Distribution) -> int:
    """Bytes of all files its RECORD names and, of an editable one, of its package folder.

    Hidden folders of an editable one are tools' caches and no part of it.
    """
    files = {os.path.realpath(str(file.locate())) for file in distribution.files or ()}
    if _is_editable(distribution):
        spec = util.find_spec(canonicalize_name(distribution.metadata["Name"]).replace("-", "_"))
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            for path in Path(folder).rglob("*"):
                is_hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
                if path.is_file() and not is_hidden:
                    files.add(os.path.realpath(path))
    return sum(os.path.getsize(path) for path in files if os.path.isfile(path))


def _is_editable(distribution: metadata.Distribution) -> bool:
    text = distribution.read_text("direct_url.json")
    return bool(text and json.loads(text).get("dir_info", {}).get("editable"))


def report(root: str, excluded: str) -> dict[str, object]:
    """The JSON of this program."""
    installed: dict[str, metadata.Distribution] = {
        canonicalize_name(distribution.metadata["Name"]): distribution
        for distribution in metadata.distributions()
    }
    if canonicalize_name(root) not in installed:
        raise SystemExit(f"{root} is not installed for {sys.executable}")
    excluded_names = closure(excluded, installed)
    names = closure(root, installed) - excluded_names
    return {
        "root": root,
        "is_editable": _is_editable(installed[canonicalize_name(root)]),
        "packages": {name: file_bytes(installed[name]) for name in sorted(names)},
        "versions": {name: installed[name].version for name in sorted(names)},
        "excluded": {name: file_bytes(installed[name]) for name in sorted(excluded_names)},
        "num_all_packages": len(installed),
    }


if __name__ == "__main__":
    named = sys.argv[1:3]
    print(json.dumps(report(*named, *["pyserve", "torch"][len(named) :])))
