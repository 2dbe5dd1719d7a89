"""What the documents show, run: commands and Python of a page in its order, in one scratch folder.

A ``console`` block is commands, a ``python`` block is code, and a ``text`` block that follows one of them is what the
last command, or the code, prints; […] stands for what is left out.  A ``text`` block that begins with ``$`` has its own
command.  Names that stand for the reader's own files are made here, from the fixtures.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from spectra.cli import main
from tests.support.paths import FIXTURES, ROOT

# The reader's own files, by the names that the pages give them, and the fixtures that they are here, cut down to
# the first layer and some words so that commands take a second or two.
STAND_INS = {
    "base": "base",
    "path/to/base": "base",
    "my-adapter": "lora-r4",
    "my-corda": "lora-r4",  # said to have been begun by CorDA,
    "before": "run-r4/checkpoint-50",  # from this
    "tuned-model": "full",
    "r1": "lora-r1",
    "r4": "lora-r4",
    "r16": "lora-r16",
    "full": "full",
    "adapters/one": "lora-r1",
    "adapters/two": "lora-r16",
    "run/checkpoint-50": "run-r4/checkpoint-50",
    "run/checkpoint-100": "run-r4/checkpoint-100",
}
IN_THE_HUB_CACHE = {"org/name@revision": "base"}
PICKLED = {"old": "base"}
# How a command is to end, where its comment says so and it is not 0.
CODE = re.compile(r" #.*\b(?:exit code|exits with) (\d+):")
# What cannot be run here as it stands, and what is run in its place.
INSTEAD = {"tcp://host:8786": "the address of a cluster that the test starts"}
# What other tests run: installations (.ci/run does those of the README), the tests themselves, and the site.
ELSEWHERE = re.compile(r"python3 -m venv|\S*pip install|\S*python -m (pytest|sphinx -W docs build/docs)$")
BLOCK = re.compile(r"^```(console|python|sh|text)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str
    text: str
    line: int


@dataclass(frozen=True)
class Command:
    """One command of a console block; ``code`` is how it is to end."""

    words: tuple[str, ...]
    code: int

    def __str__(self) -> str:
        return shlex.join(self.words)


def blocks(page: Path) -> list[Block]:
    """The blocks of a page that can be run, or that show what was printed."""
    text = page.read_text(encoding="utf-8")
    return [Block(found[1], found[2], text[: found.start()].count("\n") + 1) for found in BLOCK.finditer(text)]


def commands(text: str) -> Iterator[Command]:
    """The commands of a console block; a comment says how one ends, where that is not 0."""
    for line in text.replace("\\\n", " ").splitlines():
        ending = CODE.search(line)
        words = tuple(shlex.split(line, comments=True))
        if words:
            yield Command(words, int(ending[1]) if ending else 0)


def shell_commands(text: str) -> Iterator[str]:
    """The commands of a sh block, one by one."""
    for line in text.splitlines():
        yield from (part.strip() for part in line.split("&&"))


def make_files(folder: Path) -> None:
    """The fixtures, and the reader's own files, in a folder."""
    shutil.copytree(FIXTURES, folder / "fixtures")
    for name, member in STAND_INS.items():
        _first_layer(FIXTURES / member, folder / name)
    config = folder / "my-corda" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"init_lora_weights": "corda"}))
    for name, member in PICKLED.items():
        _first_layer(FIXTURES / member, folder / name)
        file = folder / name / "model.safetensors"
        torch.save(load_file(file), folder / name / "pytorch_model.bin")
        file.unlink()
    for name, member in IN_THE_HUB_CACHE.items():
        model, _, revision = name.partition("@")
        home = folder / "hub" / f"models--{model.replace('/', '--')}"
        _first_layer(FIXTURES / member, home / "snapshots" / ("0" * 40))
        (home / "refs").mkdir()
        (home / "refs" / revision).write_text("0" * 40)


def _first_layer(source: Path, target: Path) -> None:
    """A model or an adapter of one layer, made from one of four."""
    target.mkdir(parents=True)
    for file in source.iterdir():
        if file.suffix == ".safetensors":
            kept = {name: tensor for name, tensor in load_file(file).items() if not re.search(r"layers\.[1-3]\.", name)}
            save_file({name: few_words(name, tensor) for name, tensor in kept.items()}, target / file.name)
        elif file.name == "config.json":
            (target / file.name).write_text(json.dumps(json.loads(file.read_text()) | {"num_hidden_layers": 1}))
        else:
            shutil.copy(file, target)


def few_words(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor; of a vocabulary the first 200 words."""
    return tensor[:200].contiguous() if "embed_tokens" in name else tensor


class Session:
    """Runs a page's blocks in a folder that has the files."""

    def __init__(self, page: Path, cluster: str):
        self.page, self.cluster = page, cluster
        self.printed = ""
        self.names: dict[str, object] = {}
        self.ran: list[str] = []

    def run(self, found: Sequence[Block]) -> None:
        for block in found:
            where = f"{self.page.relative_to(ROOT)}:{block.line}"
            if block.language == "console":
                for command in commands(block.text):
                    self.command(command, where)
            elif block.language == "sh":
                for line in shell_commands(block.text):
                    if not ELSEWHERE.match(line):
                        self.command(Command(("spectra", *shlex.split(line)[1:]), 0), where)
            elif block.language == "python":
                self.printed = self.python(block.text, where)
            else:
                shown = block.text
                if shown.startswith("$ "):
                    line, _, shown = shown.replace("\\\n", " ").partition("\n")
                    for command in commands(line.removeprefix("$ ")):
                        self.command(command, where)
                compare(self.printed, shown, where)

    def command(self, command: Command, where: str) -> None:
        assert command.words[0] == "spectra", f"{where}: {command} is not run by this test"
        words = [self.cluster if word in INSTEAD else word for word in command.words[1:]]
        said, errors = terminal(), io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(errors):
            try:
                code = main(words)
            except SystemExit as left:  # argparse
                code = int(left.code or 0)
        assert code == command.code, f"{where}: {command} ended with {code}: {errors.getvalue()}"
        self.printed = text_of(said)
        self.ran.append(str(command))

    def python(self, code: str, where: str) -> str:
        said = terminal()
        with contextlib.redirect_stdout(said):
            exec(compile(code, where, "exec"), self.names)
        self.ran.append(code)
        return text_of(said)


def terminal() -> io.TextIOWrapper:
    """A standard output that takes all of Unicode."""
    return io.TextIOWrapper(io.BytesIO(), encoding="utf-8")


def text_of(said: io.TextIOWrapper) -> str:
    """What was written to it."""
    said.seek(0)
    return said.read()


def compare(printed: str, shown: str, where: str) -> None:
    """Whether what is shown is what was printed, in its order and from end to end, but for what […] leaves out."""
    parts = [part.removeprefix("\n") if number else part for number, part in enumerate(shown.split("[…]"))]
    at = 0
    for number, part in enumerate(parts):
        found = printed.find(part, at)
        missing = next((line for line in part.splitlines() if line not in printed), part)
        assert found >= 0, f"{where}: this is not printed: {missing!r}\nbut\n{printed}"
        assert number or found == 0, f"{where}: the output begins otherwise:\n{printed}"
        at = found + len(part)
    assert parts[-1] == "" or not printed[at:].strip(), f"{where}: more is printed:\n{printed[at:]}"
