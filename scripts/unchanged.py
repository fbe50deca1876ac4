"""Is this checkout still what an older commit was? Samples to the bit, speed, and the size of the house, side by side.

"new" is the checkout as it stands, uncommitted changes included; "old" is OLD_COMMIT, in a temporary folder. Each
runs in processes of its own (scripts/unchanged_worker.py), of one Python, away from both. The two share a cache of
compiled programs while samples are compared: where they ask XLA for the same program, they get the same one.

- Samples: exit status 1 if any result differs, in a bit or by more than --tolerance.
- --float64: the loops in float32 against the same in float64, as root mean squares; 1 where the new error is larger
  than 1.05 times the old one plus 1e-9, or where the two float64 runs differ by more than 1e-9.
- Speed: the two in turn, medians; without a verdict, since what is a loss depends on the machine.
- The house: modules, statements, and who imports whom.
"""

from __future__ import annotations

import argparse
import ast
import functools
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
WORKER = Path(__file__).with_name("unchanged_worker.py")
SHARED = "shared/checkpoints/emoji-pilot/checkpoint"  # beside the project, on machines that have it
SIDES = ("old", "new")
Arrays = Mapping[str, np.ndarray]


class UnchangedError(Exception):
    """What keeps the two from being compared, in one line."""


# -- comparing --------------------------------------------------------------------------------------------------------


def difference(old: np.ndarray, new: np.ndarray, tolerance: float | None = None) -> str | None:
    """How two results differ, or None: not by a bit, or by no more than the tolerance."""
    if any(array.dtype.kind == "U" for array in (old, new)):  # refused or broken
        old_text, new_text = (str(x) if x.dtype.kind == "U" else "an array" for x in (old, new))
        return None if old_text == new_text == "refused" else f"{old_text} -> {new_text}"
    if (old.dtype, old.shape) != (new.dtype, new.shape):
        return f"{old.dtype}{list(old.shape)} -> {new.dtype}{list(new.shape)}"
    if old.tobytes() == new.tobytes():
        return None
    with np.errstate(invalid="ignore"):
        apart = np.abs(new.astype(np.float64) - old.astype(np.float64))
    same = (np.isnan(old) & np.isnan(new)) | (old == new)
    largest = float(np.max(np.where(same, 0, apart), initial=0))
    if tolerance is not None and largest <= tolerance:
        return None
    return f"{np.mean(~same):.0%} of the numbers, max abs {largest:.3g}" if largest else "in the sign of zeros or NaNs"


def compare(old: Arrays, new: Arrays, tolerance: float | None = None) -> tuple[list[str], list[str]]:
    """Lines on what differs, which count; and on what only the new tree has, which do not."""
    found = []
    for name in old:
        said = difference(old[name], new[name], tolerance) if name in new else "no longer there"
        found += [] if said is None else [f"{name}: {said}"]
    return found, [name for name in new if name not in old]


class Errors(NamedTuple):
    """A setting's errors in float32, root mean squares and largest, against the old tree's float64 run of it."""

    name: str
    old: float
    new: float
    old_largest: float
    new_largest: float
    between: float
    """The largest difference of the two float64 runs."""

    @property
    def lost(self) -> bool:
        return not (self.new <= 1.05 * self.old + 1e-9 and self.between <= 1e-9)


def against_float64(float32: Sequence[Arrays], float64: Sequence[Arrays]) -> list[Errors]:
    """By setting, of those that both trees have; each argument holds the old tree's arrays and the new one's."""
    found = []
    for name, exact in float64[0].items():
        both = [*float32, float64[1]]
        if exact.dtype != np.float64 or "(float32)" in name or any(name not in arrays for arrays in both):
            continue
        apart = [np.abs(arrays[name].astype(np.float64) - exact) for arrays in both]
        rms = [float(np.sqrt(np.mean(x**2))) for x in apart[:2]]
        found.append(Errors(name, *rms, *(float(x.max()) for x in apart)))
    return found


# -- the house --------------------------------------------------------------------------------------------------------


def arrows(root: Path, package: str = "jddim") -> dict[str, set[str]]:
    """Module -> the package's modules that it imports, lazily or for type checkers alone included.

    Left out: from a member to its own package's __init__, which re-exports its members, as tests/test_imports.py does.
    """
    paths = {
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path
        for path in sorted((root / package).rglob("*.py"))
    }
    graph: dict[str, set[str]] = {}
    for module, path in paths.items():
        names: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                above = module.split(".") + ([""] if path.name == "__init__.py" else [])
                base = ".".join(
                    [*(above[: -node.level] if node.level else []), *([node.module] if node.module else [])]
                )
                inner = {f"{base}.{alias.name}" for alias in node.names}
                names |= {name if name in paths else base for name in inner}
        graph[module] = {n for n in names if n in paths and n != module and not module.startswith(f"{n}.")}
    return graph


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """The groups of two and more modules that import one another, directly or not."""
    reached: dict[str, set[str]] = {}
    for module in graph:
        todo, seen = [*graph[module]], set()
        while todo:
            if (name := todo.pop()) not in seen:
                seen.add(name)
                todo += graph[name]
        reached[module] = seen
    groups = {tuple(sorted({m, *(n for n in reached[m] if m in reached[n])})) for m in graph}
    return [list(group) for group in sorted(groups) if len(group) > 1]


def longest_path(graph: Mapping[str, set[str]]) -> list[str]:
    """The longest chain of imports; one circle counts as one module, "a+b"."""
    home = {module: module for module in graph}
    home |= {module: "+".join(group) for group in circles(graph) for module in group}
    joined: dict[str, set[str]] = {place: set() for place in home.values()}
    for module, found in graph.items():
        joined[home[module]] |= {home[name] for name in found} - {home[module]}

    @functools.cache
    def below(place: str) -> list[str]:
        return [place, *max((below(name) for name in sorted(joined[place])), key=len, default=[])]

    return max((below(place) for place in sorted(joined)), key=len, default=[])


def house(root: Path) -> dict[str, str]:
    """What the table of a tree says."""
    files = [path for folder in ("jddim", "convert", "scripts") for path in (root / folder).rglob("*.py")]
    files += [path for path in (root / "tests").glob("*.py") if not path.name.startswith("test_")]
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in files]
    graph = arrows(root)
    return {
        "modules at the top of jddim": str(len(list((root / "jddim").glob("*.py")))),
        "statements (jddim, convert, scripts, tests' helpers)": (
            f"{sum(isinstance(node, ast.stmt) for tree in trees for node in ast.walk(tree)):,}"
        ),
        "imports between jddim's modules": str(sum(map(len, graph.values()))),
        "modules on the longest path of imports": str(len(longest_path(graph))),
        "circles": "; ".join(" ".join(group) for group in circles(graph)) or "none",
    }


def table(title: str, rows: Sequence[Sequence[str]], *columns: str) -> str:
    lines = [(title, *columns), ("---", *("--:" for _ in columns)), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# -- running ----------------------------------------------------------------------------------------------------------


class Tree:
    """A tree on disk, whose code runs in processes of their own. scratch: their working folder, outside both trees."""

    def __init__(self, side: str, root: Path, scratch: Path):
        self.side, self.root, self.scratch = side, root, scratch
        self.log = scratch / f"{side}.log"
        self.checkpoint = scratch / f"{side}-mnist"
        scratch.mkdir(exist_ok=True)

    def start(self, *args: str, cache: Path | None, **options: Any) -> subprocess.Popen[str]:
        """A Python that finds this tree first. cache: of compiled programs, read by jax and by jddim's command line."""
        mine = ("JAX_COMPILATION_CACHE", "JAX_PERSISTENT_CACHE", "JAX_ENABLE_X64", "JDDIM_CACHE", "PYTHON")
        env = {name: value for name, value in os.environ.items() if not name.startswith(mine)}
        env |= {"PYTHONPATH": str(self.root), **options.pop("env", {})}
        env |= {"JDDIM_CACHE": str(cache or ""), "JAX_COMPILATION_CACHE_DIR": str(cache or "")}
        env |= {f"JAX_PERSISTENT_CACHE_MIN_{what}": "0" for what in ("COMPILE_TIME_SECS", "ENTRY_SIZE_BYTES")}
        with self.log.open("w") as log:
            command = [sys.executable, *args]
            return subprocess.Popen(command, env=env, cwd=self.scratch, stderr=log, text=True, **options)

    def run(self, *args: str, cache: Path | None, **env: str) -> tuple[float, int]:
        """Seconds from start to end, and the largest memory, as getrusage counts it."""
        started = time.perf_counter()
        process = self.start(*args, cache=cache, env=env, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            self.fail(" ".join(arg for arg in args if not Path(arg).is_absolute()))
        return time.perf_counter() - started, usage.ru_maxrss

    def fail(self, what: str) -> None:
        lines = [line.strip() for line in self.log.read_text().splitlines() if line.strip()]
        said = (lines or ["nothing"])[-1].replace(str(self.scratch), "...").replace(str(self.root), "...")
        raise UnchangedError(f"the {self.side} tree's `{what}` failed; the last it said: {said}")

    def convert(self) -> None:
        source = self.root / "scripts" / "assets" / "mnist-ddpm" / "ckpt.pth"
        self.run("-m", "jddim", "convert", "--no-verify", str(source), str(self.checkpoint), cache=None)

    def arrays(self, task: str, *args: str, x64: bool = False) -> dict[str, np.ndarray]:
        """What the worker finds for "samples" or "loops"."""
        out, cache = self.scratch / f"{self.side}.npz", self.scratch / "programs"
        self.run("-P", str(WORKER), task, str(out), *args, cache=cache, JAX_ENABLE_X64=str(int(x64)))
        with np.load(out) as found:
            return dict(found)

    def checkpoints(self) -> list[str]:
        found = {"mnist-ddpm": self.checkpoint, "mnist-guided": self.root / "scripts" / "assets" / "mnist-guided"}
        shared = ROOT.parent / SHARED
        return [f"{name}={path}" for name, path in (found | ({"emoji": shared} if shared.is_dir() else {})).items()]


def speed(trees: Sequence[Tree], rounds: int = 3, calls: int = 9) -> str:
    """The table of seconds and MiB: medians of the two taken in turn, each now first and now second."""
    taken: dict[str, dict[str, list[float]]] = {}

    def note(what: str, side: str, value: float) -> None:
        taken.setdefault(what, {each: [] for each in SIDES})[side].append(value)

    def in_turn(number: int) -> Sequence[Tree]:
        return trees if number % 2 == 0 else trees[::-1]

    mib = 2**20 if sys.platform == "darwin" else 2**10
    command = "-m", "jddim", "sample"
    options = "--num", "1", "--steps", "10"
    for tree in trees:  # what both read and compile to bytecode on their first run is not timed
        tree.run("-m", "jddim", "--help", cache=None)
        tree.run(*command, str(tree.checkpoint), str(tree.scratch / "out.png"), *options, cache=None)
    for number in range(rounds):
        for tree in in_turn(number):
            out, cache = tree.scratch / f"{tree.side}-{number}.png", tree.scratch / f"{tree.side}-cache-{number}"
            for state in ("cold", "warm"):
                seconds, peak = tree.run(*command, str(tree.checkpoint), str(out), *options, cache=cache)
                out.unlink()
                note(f"`jddim sample --num 1 --steps 10`, cache {state}, s", tree.side, seconds)
                note(f"its peak, cache {state}, MiB", tree.side, peak / mib)
            for _ in range(3):
                note("`jddim --help`, s", tree.side, tree.run("-m", "jddim", "--help", cache=None)[0])
    many, one = {"num": 16, "steps": 10}, {"num": 1, "steps": 1}
    for number in range(rounds):
        with Servers(trees) as servers:
            for tree in in_turn(number):
                note("first call (16 images, 10 steps: compiles), s", tree.side, servers.ask(tree, many)["seconds"])
                servers.ask(tree, one)
            for call in range(calls):
                for tree in in_turn(call):
                    note("a call (16 images, 10 steps), s", tree.side, servers.ask(tree, many)["seconds"])
                for _, tree in [(i, tree) for i in range(4) for tree in in_turn(call + i)]:
                    note("a call (1 image, 1 step), s", tree.side, servers.ask(tree, one)["seconds"])
            for tree in trees:
                note("peak of that process, MiB", tree.side, servers.ask(tree, one)["peak"] / mib)
    medians = {what: [statistics.median(values[side]) for side in SIDES] for what, values in taken.items()}
    rows = [(what, f"{old:.4g}", f"{new:.4g}", f"{new / old:.3f}") for what, (old, new) in medians.items()]
    return table("speed and memory", rows, "old", "new", "new / old")


class Servers:
    """A sampling process of each tree, both alive at once, asked one at a time."""

    def __init__(self, trees: Sequence[Tree]):
        self.trees = trees

    def __enter__(self) -> Servers:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        args = {tree.side: ("-P", str(WORKER), "serve", str(tree.checkpoint)) for tree in self.trees}
        self.processes = {tree.side: tree.start(*args[tree.side], cache=None, **pipes) for tree in self.trees}
        for tree in self.trees:
            self.answer(tree)  # once it is there
        return self

    def ask(self, tree: Tree, options: Mapping[str, int]) -> dict[str, float]:
        print(json.dumps(options), file=self.processes[tree.side].stdin, flush=True)
        return self.answer(tree)

    def answer(self, tree: Tree) -> dict[str, float]:
        line = self.processes[tree.side].stdout.readline()
        if not line:
            tree.fail("sample")
        return json.loads(line)

    def __exit__(self, *_: object) -> None:
        for process in self.processes.values():
            process.stdin.close()
            process.kill()
            process.wait()
            process.stdout.close()


def git(*args: str) -> bytes:
    if shutil.which("git") is None:
        raise UnchangedError("git is not on PATH")
    done = subprocess.run(["git", "-C", str(ROOT), *args], capture_output=True)
    if done.returncode:
        raise UnchangedError((done.stderr.decode().strip().splitlines() or [f"git {args[0]} failed"])[-1])
    return done.stdout


def commit_of(name: str) -> str:
    """The full name of a commit. Raises UnchangedError where there is none of that name."""
    git("rev-parse", "--git-dir")  # says what is wrong where this is no repository
    try:
        return git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}").decode().strip()
    except UnchangedError:
        raise UnchangedError(f"{name!r} is no commit of this repository; `git log --oneline` lists some") from None


def check_out(commit: str, place: Path) -> Path:
    with tarfile.open(fileobj=io.BytesIO(git("archive", "--format=tar", commit))) as archive:
        archive.extractall(place, filter="data")
    return place


def say(text: str) -> None:
    print(text, flush=True)  # into a pipe too: a run takes minutes


def report(args: argparse.Namespace, scratch: Path) -> int:
    """Everything that was asked for, said as it is found; the exit status."""
    commit = commit_of(args.old)
    dirty = " with uncommitted changes" if git("status", "--porcelain").strip() else ""
    say(f"old: {commit[:10]}; new: this checkout, {commit_of('HEAD')[:10]}{dirty}")
    roots = {"old": check_out(commit, scratch / "old"), "new": ROOT}
    if not args.quick:
        counted = [house(roots[side]) for side in SIDES]
        say("\n" + table("the house", [(what, counted[0][what], counted[1][what]) for what in counted[0]], *SIDES))
    if args.house:
        return 0
    trees = [Tree(side, roots[side], scratch / "run") for side in SIDES]
    failed, loops = False, []
    for tree in trees:
        tree.convert()
    for task in ("loops", "samples"):
        both = [tree.arrays(task, *(tree.checkpoints() if task == "samples" else [])) for tree in trees]
        loops = both if task == "loops" else loops
        found, added = compare(*both, args.tolerance)
        refused = sum(array.dtype.kind == "U" for array in both[0].values())
        alike = "to the bit" if args.tolerance is None else f"to {args.tolerance:g}"
        same = len(both[0]) - len(found)
        say(f"\n{task}: {same} of {len(both[0])} results equal {alike}, {refused} of all being refusals")
        for line in found:
            say(f"  differs: {line}")
        for name in added:
            say(f"  only new: {name}")
        failed |= bool(found)
    if args.float64:
        errors = against_float64(loops, [tree.arrays("loops", x64=True) for tree in trees])
        rows = [
            (
                each.name,
                f"{each.old:.2e} ({each.old_largest:.1e})",
                f"{each.new:.2e} ({each.new_largest:.1e})",
                (f"{each.new / each.old:.2f}" if each.old else "-") + (" LOST" if each.lost else ""),
            )
            for each in errors
        ]
        say("\n" + table("float32 less float64: root mean square (largest)", rows, *SIDES, "new / old"))
        apart = max((each.between for each in errors), default=0.0)
        lost = sum(each.lost for each in errors)
        say(f"\nfloat64: {lost} of {len(errors)} settings lost; the two float64 runs differ by at most {apart:.2g}")
        failed |= lost > 0
    if not args.quick:
        say("\n" + speed(trees))
    return int(failed)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("scripts/unchanged", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("old", metavar="OLD_COMMIT", help="what to compare with: anything git knows as a commit")
    parser.add_argument(
        "--tolerance", type=float, metavar="X", help="allow this absolute difference, not equal bits alone"
    )
    parser.add_argument("--float64", action="store_true", help="errors of both trees against float64, as a table")
    parser.add_argument("--quick", action="store_true", help="no speed and no house")
    parser.add_argument("--house", action="store_true", help="the house alone")
    args = parser.parse_args(argv)
    try:
        with tempfile.TemporaryDirectory(prefix="unchanged-", ignore_cleanup_errors=True) as scratch:
            return report(args, Path(scratch).resolve())
    except UnchangedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
