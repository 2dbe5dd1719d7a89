"""Bugs planted in a copy of the package, and how many inputs the fuzzer takes to find each.

Each is one that such readers have had: a check left out, or what only a rare input sets off.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
LIMIT = 100_000

SEARCH = """
import json, sys
from dataclasses import asdict
from pathlib import Path
from benchmarks.fuzz import run_fuzz
import spectra
assert Path(spectra.__file__).is_relative_to(Path.cwd()), "the copy is what is fuzzed"
seed, most, scratch, *kinds = sys.argv[1:]
print(json.dumps(asdict(run_fuzz(int(seed), int(most), Path(scratch), True, kinds))))
"""


@dataclass(frozen=True)
class Planted:
    """``old`` becomes ``new`` in a module; what the finding must say; the kind of input that shows it.

    ``quick`` : that it takes few inputs is what the tests ask for.
    """

    name: str
    module: str
    old: str
    new: str
    says: str
    kind: str
    quick: bool = False


PLANTED = (
    Planted(
        "a span that is not where the header says, of one dtype",
        "files/headers.py",
        "tuple(shape), path, (begins + begin, end - begin), stamp=stamp)",
        'tuple(shape), path, (begins + (0 if dtype == "BOOL" else begin), end - begin), stamp=stamp)',
        "another tensor",
        "header",
    ),
    Planted(
        "a KeyError for a dtype nobody uses",
        "files/headers.py",
        "    if math.prod(shape) * BITS[dtype] !=",
        '    if math.prod(shape) * {key: n for key, n in BITS.items() if key != "F6_E3M2"}[dtype] !=',
        "KeyError",
        "header",
        quick=True,
    ),
    Planted(
        "a name that is encoded, with half a character in it",
        "files/headers.py",
        "    if len(name) > MAX_NAME:\n",
        "    if len(name.encode()) > MAX_NAME:\n",
        "UnicodeEncodeError",
        "header",
        quick=True,
    ),
    Planted(
        "a name that is decoded without a net",
        "files/headers.py",
        "            name = json.loads(stored.decode())\n    except ValueError as error:",
        "            name = json.loads(stored.decode())\n    except json.JSONDecodeError as error:",
        "UnicodeDecodeError",
        "header",
        quick=True,
    ),
    Planted(
        "deep nesting in an entry",
        "files/headers.py",
        "    except (ValueError, RecursionError):\n",
        "    except ValueError:\n",
        "RecursionError",
        "header",
    ),
    Planted(
        "deep nesting in an index",
        "files/configs.py",
        "    except (OSError, ValueError, RecursionError) as error:\n        raise CorruptFileError(path, f",
        "    except (OSError, ValueError) as error:\n        raise CorruptFileError(path, f",
        "RecursionError",
        "index",
    ),
    Planted(
        "a field of an entry that occurs twice",
        "files/configs.py",
        "            if name in entries:\n",
        "            if name in entries and tensor is None:\n",
        "",
        "header",
    ),
    Planted(
        "a message with what the file says, as it stands",
        "errors.py",
        'super().__init__(in_one_line(f"{where}: {problem}"))',
        'super().__init__(f"{where}: {problem}")',
        "says",
        "config",
    ),
    Planted(
        "a shard's name that need not be one",
        "files/checkpoint.py",
        "not isinstance(shard, str)\n",
        "False\n",
        "TypeError",
        "index",
        quick=True,
    ),
    Planted(
        "a pattern that is no expression",
        "adapters/peft/pattern.py",
        "except (regex.error, MemoryError, RecursionError, OverflowError) as error:",
        "except (MemoryError, RecursionError, OverflowError) as error:",
        "error",
        "config",
    ),
    Planted(
        "a pattern that takes long",
        "adapters/peft/pattern.py",
        "        except TimeoutError:\n            raise",
        "        except InterruptedError:\n            raise",
        "TimeoutError",
        "config",
    ),
    Planted(
        "a storage of two dtypes, read as the second",
        "files/pickles.py",
        "if self.storages.setdefault(storage.key, storage) != storage:",
        "if self.storages.setdefault(storage.key, storage).key != storage.key:",
        "another",
        "pickle",
    ),
    Planted(
        "rows of a tensor that begin at the first",
        "files/pickles.py",
        "first * self.strides[0]",
        "0 * self.strides[0]",
        "another value of some rows",
        "pickle",
        quick=True,
    ),
    Planted(
        "a component that is left out, and yet read",
        "files/pipelines.py",
        "or len(value) != 2 or None in value:",
        "or None in value:",
        "IndexError",
        "pipeline",
        quick=True,
    ),
)  # fmt: skip


def plant(bug: Planted, home: Path) -> Path:
    """A copy of the package and of the fuzzer, with the bug in it.

    Raises
    ------
    ValueError : the package has changed, so that it cannot be planted there.
    """
    names = shutil.ignore_patterns("__pycache__", "results")
    for folder in ("spectra", "benchmarks"):
        shutil.copytree(ROOT / folder, home / folder, ignore=names)
    for file in ("lora-r4/adapter_model.safetensors", "lora-r4/adapter_config.json", "base/config.json"):
        (home / "fixtures" / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / "fixtures" / file, home / "fixtures" / file)
    module = home / "spectra" / bug.module
    text = module.read_text(encoding="utf-8")
    if text.count(bug.old) != 1:
        raise ValueError(f"{bug.name}: {bug.old!r} occurs {text.count(bug.old)} times in {bug.module}; expected once")
    module.write_text(text.replace(bug.old, bug.new), encoding="utf-8")
    return home


def inputs_until_found(bug: Planted, folder: Path, most: int = LIMIT, seed: int = 0) -> int | None:
    """How many inputs it took, or None where ``most`` did not do."""
    home = plant(bug, folder)
    command = [sys.executable, "-c", SEARCH, str(seed), str(most), str(home / "scratch"), bug.kind]
    done = subprocess.run(command, cwd=home, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{bug.name}: {done.stderr[-2000:]}")
    tally = json.loads(done.stdout)
    crashes = tally["crashes"]
    if crashes and bug.says not in crashes[0]:
        raise RuntimeError(f"{bug.name}: found something else: {crashes[0]}")
    return int(tally["headers"]) if crashes else None


def find_all(folder: Path, most: int = LIMIT) -> list[str]:
    """Looks for every planted bug, says how long it took, and returns those that were not found."""
    missed = []
    for number, bug in enumerate(PLANTED):
        count = inputs_until_found(bug, folder / str(number), most)
        took = f"found after {count:,} inputs" if count is not None else f"NOT found in {most:,} inputs"
        print(f"{bug.kind:>7}  {bug.name}: {took}", flush=True)
        if count is None:
            missed.append(f"not found: {bug.name}")
        shutil.rmtree(folder / str(number))
    return missed
