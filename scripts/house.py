"""Measures the structure of a package: `python scripts/house.py [PACKAGE_DIR]`, by default s2s_jax.

For each room (a directory of the package), prints its files and lines, the longest file, the longest
function, signatures that take the whole `Config`, and annotations that are `Any`. Then prints the
number of arrows (imports between files), and how many of them lead from one room to another.
"""

import ast
import re
import sys
from pathlib import Path
from typing import NamedTuple

LONG_FILE, LONG_FUNCTION = 400, 60


class Facts(NamedTuple):
    """The counts of one file."""

    lines: int
    longest_function: int
    whole_configs: int
    anys: int


def facts_of(text: str) -> Facts:
    """Counts over the source text of a file.

    >>> facts_of("def f(config: Config, x: Any):\\n    return x\\n")
    Facts(lines=2, longest_function=2, whole_configs=1, anys=1)
    """
    tree = ast.parse(text)
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    arguments = [
        a.annotation
        for f in functions
        for a in (*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs)
        if a.annotation is not None
    ]
    names = [n.id for n in ast.walk(tree) if isinstance(n, ast.Name)]
    return Facts(
        lines=text.count("\n"),
        longest_function=max(
            (f.end_lineno - f.lineno + 1 for f in functions if f.end_lineno), default=0
        ),
        whole_configs=sum(isinstance(a, ast.Name) and a.id == "Config" for a in arguments),
        anys=names.count("Any"),
    )


def room_of(path: Path, package: Path) -> str:
    """The directory of a file relative to the package, with dots; "(top)" for the package itself."""
    parts = path.relative_to(package).parent.parts
    return ".".join(parts) or "(top)"


def arrows(package: Path) -> tuple[int, int]:
    """The number of imports between files of the package, and how many of them are between rooms."""
    every = across = 0
    for path in package.rglob("*.py"):
        pattern = rf"^\s*(?:from|import) ({package.name}(?:\.\w+)*)(?: import \(?([\w, \n]+))?"
        found: set[Path] = set()
        for module, names in re.findall(pattern, path.read_text(), re.MULTILINE):
            base = package.parent / Path(*module.split("."))
            files = [base.with_suffix(".py"), *(base / f"{n.strip()}.py" for n in names.split(","))]
            found |= {file for file in files if file.is_file()}
        every += len(found)
        across += sum(room_of(f, package) != room_of(path, package) for f in found)
    return every, across


def main(package: Path) -> None:
    """Prints the table."""
    rooms: dict[str, dict[str, Facts]] = {}
    for path in sorted(package.rglob("*.py")):
        if path.name != "__init__.py":
            rooms.setdefault(room_of(path, package), {})[path.name] = facts_of(path.read_text())
    heads = ("room", "files", "lines", "longest file", "function", "Config", "Any")
    print("{:24}{:>7}{:>8}{:>14}{:>10}{:>8}{:>6}".format(*heads))
    every = [facts for files in rooms.values() for facts in files.values()]
    for room, files in [*rooms.items(), ("all", dict(enumerate(every)))]:
        facts = list(files.values())
        print(
            f"{room:24}{len(facts):7}{sum(f.lines for f in facts):8,}{max(f.lines for f in facts):14}"
            f"{max(f.longest_function for f in facts):10}{sum(f.whole_configs for f in facts):8}"
            f"{sum(f.anys for f in facts):6}"
        )
    between, across = arrows(package)
    print(f"\narrows between files: {between}, of them between rooms: {across}")
    print(f"files over {LONG_FILE} lines: {sum(f.lines > LONG_FILE for f in every)}")
    print(
        f"files with a function over {LONG_FUNCTION} lines: "
        f"{sum(f.longest_function > LONG_FUNCTION for f in every)}"
    )


if __name__ == "__main__":
    given = sys.argv[1] if len(sys.argv) > 1 else Path(__file__).resolve().parents[1] / "s2s_jax"
    main(Path(given))
