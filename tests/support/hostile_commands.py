"""The hostile cases through every command, as what was tuned and as the base.

``python -m tests.support.hostile_commands FOLDER RESULTS [STEP [COMMAND…]]`` runs them and says what is not as
promised; the tests take every fourth.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tests.support import hostile, hostile_formats  # noqa: F401  which registers its cases
from tests.support.hostile import CASES, Arguments, Job

# What a command is asked, by the paths of a fine-tune and its base, and where it may write.
COMMANDS: dict[str, Callable[[str, str, Path], Arguments]] = {
    "inspect": lambda tuned, base, _: ["inspect", tuned, "--base", base],
    "compare": lambda tuned, base, _: ["compare", tuned, "--base", base, "--quick", "--quiet"],
    "ranks": lambda tuned, base, _: ["ranks", tuned, "--base", base, "--quiet"],
    "repair": lambda tuned, base, out: ["repair", tuned, "--base", base, "--scale", "0.5", "--to", str(out / "out")],
    "plot": lambda tuned, base, out: ["plot", "depth", tuned, "--base", base, "-o", str(out / "out.png"), "--quiet"],
    "cache": lambda _, base, out: ["cache", base, "--cache", str(out / "kept"), "--quiet"],
}
# In the base's place these are no more than a base that does not have all that it could, or are not looked at.
SOUND_AS_BASE = (
    "very many dimensions", "NaN and infinity in the base", "quantised: scales alone", "quantised: a map of nothing",
    "thousands of names that end alike",
)  # fmt: skip
WITH_OPTIONS = ("an initial adapter", "pickled shards")  # are about options that not every command has
# What headers and configurations do not show, and what is told as a problem with the base beside what was found.
SEEN_BY_INSPECT = (
    "nothing to analyse", "non_finite", "NaN", "wrong base", "both match", "base model", "revision",
    "this is an adapter",
)  # fmt: skip
NOT_SEEN = (
    "a base that is a number", "a base that is nothing", "very many dimensions", "an update that does not fit the base",
    "two updates of one weight", "an adapter that is its own base", "four tebibytes of zeros without a byte on disk",
    "an update of enormous shape", "thousands of names that end alike", "a name of nothing", "a name of a path",
    "quantised: a map of nothing",
)  # fmt: skip
# Bases of which a layer is left out with the reason.
UNREAD = tuple(name for name in CASES if name.startswith(("quantised: blocks", "quantised: scales", "quantised: SCB")))
# What a command refuses for a reason of its own: too little room for a copy, no comparison.
IN_OTHER_WORDS = {
    "repair": ("four tebibytes of zeros without a byte on disk", "NaN and infinity in the base"),
    "plot": ("a configuration given for weights",),
}


def as_tuned(home: Path, command: str, name: str) -> Arguments:
    """Builds a case; the command's arguments with it in the fine-tune's place."""
    audit = hostile.prepare(home, CASES[name])
    base = audit[audit.index("--base") + 1] if "--base" in audit else None
    arguments = COMMANDS[command](audit[1], base or "", home)
    if base is None:  # named by the adapter's configuration
        at = arguments.index("--base")
        del arguments[at : at + 2]
    return arguments


def as_base(home: Path, command: str, name: str) -> Arguments:
    """Builds a case; the command's arguments with it in the base's place, beside a sound adapter."""
    hostile.prepare(home, CASES[name])
    (home / "sound").mkdir()
    hostile.adapter(home / "sound")
    return COMMANDS[command](str(home / "sound"), str(home / "box"), home)


def chosen(step: int, commands: Sequence[str] = tuple(COMMANDS)) -> Iterator[tuple[str, Job]]:
    """Every ``step``-th case, begun elsewhere for each command, so that together they take all."""
    names = [name for name in CASES if not name.startswith(WITH_OPTIONS)]
    for start, command in enumerate(COMMANDS):
        if command not in commands:
            continue
        if command != "cache":
            for name in names[start % step :: step]:
                yield f"{command}: {name}", partial(as_tuned, command=command, name=name)
        for name in names[(start + 1) % step :: step]:
            if name not in SOUND_AS_BASE:
                yield f"{command}, base: {name}", partial(as_base, command=command, name=name)


def check(job: str, found: dict[str, Any]) -> None:
    """Holds the result of a job to what is promised; raises AssertionError."""
    how, _, name = job.partition(": ")
    command = how.partition(",")[0]
    # What is written before the first weight is read lies in a folder that goes with the error.
    assert all(command == "repair" and (".part" in event or "os.remove" in event) for event in found["events"])
    if found["code"] == 0 and command == "inspect":
        assert (
            name in NOT_SEEN
            or how.endswith("base")
            or name in UNREAD
            or any(word in SEEN_BY_INSPECT for word in CASES[name].words)
        ), name
        assert found["err"] == ""
        assert all(line.isprintable() for line in found["out"].splitlines())
        assert found["raised"] is None
        hostile.check_quiet(found, CASES[name].mib)
        return
    if command == "inspect" and "\n  problem " in found["out"]:  # what could be told is told beside the error
        assert all(line.isprintable() for line in found["out"].splitlines())
        found = {**found, "raised": "SpectraError"}
    hostile.check_refused(found, CASES[name].mib)
    assert found["home"] in found["err"] or name == "a name that is no path", "names the file"
    if how == command and name not in IN_OTHER_WORDS.get(command, ()):
        assert all(word in found["err"] for word in CASES[name].words), found["err"]


def run(folder: Path, jobs: dict[str, Job]) -> Iterator[tuple[str, Any]]:
    """Runs jobs, after each of their commands has once been run on what is sound."""
    whole = hostile.prepare(folder / "whole", hostile.Case("whole", lambda box: hostile.adapter(box), ()))
    commands = {job.partition(":")[0].partition(",")[0] for job in jobs}
    ready = [COMMANDS[command](whole[1], whole[3], folder) for command in sorted(commands)]
    yield from hostile.run_all(folder, jobs, ready)


if __name__ == "__main__":
    step = int(sys.argv[3]) if sys.argv[3:] else 1
    results = dict(run(Path(sys.argv[1]), dict(chosen(step, sys.argv[4:] or tuple(COMMANDS)))))
    Path(sys.argv[2]).write_text(json.dumps(results))
    wrong = 0
    for job, found in results.items():
        try:
            check(job, found)
        except AssertionError as error:
            wrong += 1
            print(f"{job}: {str(error)[:500]}\n  {found['err'][:500]}", file=sys.stderr)
    print(f"{len(results)} cases, {wrong} not as promised")
