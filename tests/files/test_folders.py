"""Folders that appear whole or not at all, and what goes along in them."""

from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from spectra.adapters import plan_updates
from spectra.adapters.peft.repaired import replaceable, write_repaired
from spectra.adapters.peft.writing import why_no_adapter
from spectra.errors import CorruptFileError, MissingFileError, UsageError
from spectra.files.checkpoint import open_checkpoint
from spectra.files.folders import (
    RECORD,
    check_apart,
    check_folder,
    companions,
    copy_file,
    files_in,
    whole_folder,
    write_card,
    write_record,
)
from spectra.repairs.merged import copy_checkpoint
from spectra.updates.algebra import LowRank


def anything(_):
    return None


def written(folder, content="new", **options):
    with whole_folder(folder, **{"ours": anything, **options}) as home:
        (home / "a.txt").write_text(content)
    return folder


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# Whole or not at all


def test_a_folder_appears_with_everything_in_it(tmp_path):
    out = tmp_path / "deep" / "er" / "out"
    with whole_folder(out, ours=anything) as home:
        assert home.parent == out.parent
        assert home.name.startswith(".out.")
        assert home.name.endswith(".part")
        assert not out.exists()
        (home / "a.txt").write_text("x")
    assert names(out) == ["a.txt"]
    assert names(out.parent) == ["out"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("no"), KeyboardInterrupt()])
def test_nothing_is_left_of_a_failure(tmp_path, error):
    with (  # noqa: PT012
        pytest.raises(UsageError if isinstance(error, OSError) else type(error)),
        whole_folder(tmp_path / "deep" / "out", ours=anything) as home,
    ):
        (home / "a.txt").write_text("x")
        raise error
    assert names(tmp_path) == []
    (tmp_path / "deep").mkdir()
    written(tmp_path / "deep" / "out", "old")
    with pytest.raises((UsageError, RuntimeError, KeyboardInterrupt)):  # noqa: SIM117
        with whole_folder(tmp_path / "deep" / "out", force=True, ours=anything):
            raise error
    assert (tmp_path / "deep" / "out" / "a.txt").read_text() == "old"
    assert names(tmp_path / "deep") == ["out"]


def test_our_own_errors_stay_what_they_are(tmp_path):
    with (
        pytest.raises(MissingFileError, match="x: gone"),
        whole_folder(tmp_path / "out", ours=anything),
    ):
        raise MissingFileError("x", "gone")


def test_the_file_that_could_not_be_read_is_named(tmp_path):
    with (
        pytest.raises(UsageError, match=rf"out: could not be written: No such file.*\({tmp_path}/gone\)"),
        whole_folder(tmp_path / "out", ours=anything) as home,
    ):
        copy_file(tmp_path / "gone", home / "gone")
    with (
        pytest.raises(UsageError, match=r"could not be written: No such file or directory$"),
        whole_folder(tmp_path / "out", ours=anything) as home,
    ):
        (home / "gone").read_bytes()


def test_a_full_disk_is_not_the_sources_fault(tmp_path, monkeypatch):
    (tmp_path / "source").write_text("x" * 100)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "sendfile", full)
    with (
        pytest.raises(UsageError, match=r"out: could not be written: No space left on device$"),
        whole_folder(tmp_path / "out", ours=anything) as home,
    ):
        copy_file(tmp_path / "source", home / "copy")


def test_what_is_there_is_replaced_only_where_it_may(tmp_path):
    out = written(tmp_path / "out", "old")
    with pytest.raises(UsageError, match="exists already"):
        written(out)
    with pytest.raises(UsageError, match="out: is dear to me, so it is not overwritten"):
        written(out, force=True, ours=lambda path: "is dear to me")
    (tmp_path / "link").symlink_to(out)
    (tmp_path / "file").write_text("x")
    for name in ("link", "file"):
        with pytest.raises(UsageError, match="is no folder"):
            written(tmp_path / name, force=True)
    assert (out / "a.txt").read_text() == "old"
    written(out, force=True)
    assert (out / "a.txt").read_text() == "new"
    assert names(tmp_path) == ["file", "link", "out"]


def test_names_that_are_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (".", "", "..", "a/..", "/"):
        with pytest.raises(UsageError, match="names no folder"):
            written(name, force=True)
    with pytest.raises(UsageError, match="could not be written: File name too long"):
        written("x" * 300)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="could not be written"):
        written("file/out")


LONGEST = {"ascii": "x" * 255, "two bytes": "a" + "é" * 127, "three bytes": "数" * 85}  # 255 bytes


@pytest.mark.parametrize("force", [False, True], ids=["new", "force"])
@pytest.mark.parametrize("kind", LONGEST)
def test_names_as_long_as_they_may_be(tmp_path, kind, force):
    name = LONGEST[kind]
    assert len(name.encode()) == 255
    out = written(tmp_path / name, "old")
    assert (out / "a.txt").read_text() == "old"
    if not force:
        with pytest.raises(UsageError, match=f"{name}: exists already"):
            written(out)
    else:
        written(out, force=True)
    assert (out / "a.txt").read_text() == ("new" if force else "old")
    assert names(tmp_path) == [name]


@pytest.mark.parametrize("force", [False, True], ids=["new", "force"])
@pytest.mark.parametrize("kind", LONGEST)
def test_errors_in_a_folder_of_a_long_name(tmp_path, kind, force):
    out = tmp_path / LONGEST[kind]
    if force:
        written(out, "old")
    before = contents(out)
    for action, why in [
        (lambda home: (home / "gone").read_bytes(), "No such file or directory"),
        (lambda home: (home / ("y" * 256)).write_text("x"), "File name too long"),
        (lambda home: corrupt(home / "a"), "a: broken"),
    ]:
        with pytest.raises(UsageError) as e, whole_folder(out, force=force, ours=anything) as home:
            action(home)
        assert str(e.value) == f"{out}: could not be written: {why}"
        assert contents(out) == before
        assert len(names(tmp_path)) == force


def corrupt(file):
    raise CorruptFileError(file, "broken")


@pytest.mark.parametrize("force", [False, True], ids=["new", "force"])
@pytest.mark.parametrize("more", ["x", "é", "数" * 60])
@pytest.mark.parametrize("kind", LONGEST)
def test_names_that_are_too_long(tmp_path, kind, more, force):
    out = tmp_path / (LONGEST[kind] + more)
    with pytest.raises(UsageError) as e:
        written(out, force=force)
    assert str(e.value) == f"{out}: could not be written: File name too long"
    assert names(tmp_path) == []


def test_a_folder_that_came_meanwhile_is_not_replaced(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="exists already"), whole_folder(out, ours=anything) as home:  # noqa: PT012
        (home / "a.txt").write_text("mine")
        out.mkdir()
        (out / "a.txt").write_text("theirs")
    assert (out / "a.txt").read_text() == "theirs"
    assert names(tmp_path) == ["out"]


def test_the_old_folder_is_never_lost(tmp_path, monkeypatch):
    """Somebody takes the name in the very moment in which the old folder is aside."""
    out = written(tmp_path / "out", "old")
    rename = Path.rename

    def racing(self, target):
        if self.name.endswith(".part"):
            out.mkdir()
            (out / "theirs").write_text("x")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", racing)
    with pytest.raises(UsageError, match=r"what was there lies in \.out\.\w+\.old now"):
        written(out, force=True)
    (aside,) = tmp_path.glob(".out.*.old")
    assert (aside / "a.txt").read_text() == "old"
    assert names(out) == ["theirs"]


def test_an_interrupt_after_the_last_step_leaves_the_new_folder(tmp_path, monkeypatch):
    out = written(tmp_path / "out", "old")
    rename = Path.rename

    def late(self, target):
        rename(self, target)
        if self.name.endswith(".part"):
            raise KeyboardInterrupt

    monkeypatch.setattr(Path, "rename", late)
    with pytest.raises(KeyboardInterrupt):
        written(out, force=True)
    assert (out / "a.txt").read_text() == "new"
    assert names(tmp_path) == ["out"]


# A crash at every point of writing


def a_source(home, kind):
    home.mkdir()
    tensors = {
        "base_model.model.q.lora_A.weight": torch.ones(2, 5),
        "base_model.model.q.lora_B.weight": torch.ones(6, 2),
    }
    if kind == "adapter":
        save_file(tensors, home / "adapter_model.safetensors")
        (home / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    else:
        save_file({"q.weight": torch.ones(6, 5)}, home / "model.safetensors")
    (home / "README.md").write_text("# Card\n")
    (home / "tokenizer.json").write_text("{}")
    return open_checkpoint(home)


def repaired(source, out, *, force=False, value=0.0):
    with whole_folder(out, force=force, ours=replaceable) as home:
        if source.adapter_config is not None:
            new = LowRank(torch.full((6, 3), value), torch.zeros(3, 5), 2.0)
            write_repaired(home, source, plan_updates(source), {"q": new}, remarks=["## New"])
        else:
            edited = copy_checkpoint(home, source)
            edited.put("q.weight", torch.full((6, 5), value))
            edited.finish(remarks=["## New"])
        write_record(home, json.dumps({"output": {"files": files_in(home)}}))


CALLS = ["Path.open", "Path.rename", "Path.mkdir", "Path.write_text", "Path.write_bytes", "Path.iterdir", "os.fsync",
         "os.open", "shutil.copyfile"]  # fmt: skip


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else None


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()], ids=["disk", "interrupt"])
@pytest.mark.parametrize("force", [False, True], ids=["new", "force"])
@pytest.mark.parametrize("kind", ["adapter", "checkpoint"])
def test_a_crash_at_any_call_changes_nothing(tmp_path, monkeypatch, kind, force, error):
    source = a_source(tmp_path / "source", kind)
    before, out, crashes = contents(source.path), tmp_path / "out", 0
    repaired(source, out)
    new = contents(out)
    shutil.rmtree(out)
    if force:
        repaired(source, out, value=1.0)
    old = contents(out)
    assert old != new
    for call in CALLS:
        owner = {"Path": Path, "os": os, "shutil": shutil}[call.split(".")[0]]
        name = call.split(".")[1]
        original = getattr(owner, name)
        for at in range(1000):
            count = -1

            def failing(*args, original=original, at=at, **options):
                nonlocal count
                count += 1
                if count == at:
                    raise error
                return original(*args, **options)

            with monkeypatch.context() as patch:
                patch.setattr(owner, name, failing)
                failed = error_of(repaired, source, out, force=force)
            if failed is None and count < at:
                break  # there are fewer calls
            crashes += 1
            found, left = contents(out), set(names(tmp_path)) - {"out", "source"}
            if failed is None or (found == new and isinstance(failed, KeyboardInterrupt)):
                # it was in place already, and what failed was to delete the old one
                assert (found, force) == (new, True)
                for remnant in left:
                    assert remnant.endswith(".old")
                    shutil.rmtree(tmp_path / remnant)
                shutil.rmtree(out)
                repaired(source, out, value=1.0)
            else:
                # one where a file was being read, the other where one was written
                kinds = (CorruptFileError, UsageError) if isinstance(error, OSError) else (KeyboardInterrupt,)
                assert type(failed) in kinds
                assert ".part" not in str(failed)
                assert found == old, (call, at)
                assert not left, (call, at)
            assert contents(source.path) == before
        shutil.rmtree(out)
        if force:
            repaired(source, out, value=1.0)
    assert crashes > 25


def error_of(function, *args, **options):
    try:
        function(*args, **options)
    except (Exception, KeyboardInterrupt) as error:
        return error
    return None


# What may be replaced


def test_only_what_we_wrote_is_replaced(tmp_path):
    source = a_source(tmp_path / "source", "checkpoint")
    out = tmp_path / "out"
    repaired(source, out)
    assert replaceable(out) is None
    check_folder(out, force=True, ours=replaceable)
    (out / "eval.json").write_text("{}")
    with pytest.raises(UsageError, match=r"holds more than was written there \(eval\.json\)"):
        check_folder(out, force=True, ours=replaceable)
    (out / "eval.json").unlink()
    (out / "runs").mkdir()
    assert "runs" in str(replaceable(out))
    (out / "runs").rmdir()
    (out / "tokenizer.json").unlink()
    assert replaceable(out) is None  # less is no loss
    (out / "tokenizer.json").symlink_to(tmp_path)
    assert "tokenizer.json" in str(replaceable(out))
    (out / "tokenizer.json").unlink()
    for text in ("", "[]", "{}", '{"output": null}', '{"output": {"files": 3}}', "\xff"):
        (out / RECORD).write_bytes(text.encode("latin-1"))
        assert replaceable(out) == "exists and is no earlier result of spectra repair"
    (out / RECORD).unlink()
    assert replaceable(out) == "exists and is no earlier result of spectra repair"


def test_a_trained_adapter_is_never_replaced(tmp_path):
    """It took a training to make, and to whoever writes factors alone it looks like one that was computed."""
    out = tmp_path / "out"
    source = a_source(tmp_path / "source", "adapter")
    a_source(out, "adapter")
    assert why_no_adapter(out) == "holds more than an adapter (tokenizer.json)"
    (out / "tokenizer.json").unlink()
    assert why_no_adapter(out) is None
    before = contents(out)
    refused = "out: exists and is no earlier result of spectra repair, so it is not overwritten"
    with pytest.raises(UsageError, match=refused):
        check_folder(out, force=True, ours=replaceable)
    with pytest.raises(UsageError, match=refused):
        repaired(source, out, force=True)
    assert contents(out) == before
    assert names(tmp_path) == ["out", "source"]
    (out / RECORD).write_text(json.dumps({"output": {"files": files_in(out)}}))
    check_folder(out, force=True, ours=replaceable)
    (out / "adapter_config.json").unlink()
    assert why_no_adapter(out) == "exists and is no PEFT adapter folder"


def test_outputs_do_not_touch_inputs(tmp_path, monkeypatch):
    model, adapter = (
        a_source(tmp_path / "model", "checkpoint"),
        a_source(tmp_path / "a" / "adapter", "adapter") if ((tmp_path / "a").mkdir() is None) else None,
    )
    assert adapter is not None
    for place in ("model", "model/out", "model/../model/x", "a/adapter"):
        with pytest.raises(UsageError, match="lies in what is being read"):
            check_apart(tmp_path / place, model, adapter)
    with pytest.raises(UsageError, match="what is being read lies in it"):
        check_apart(tmp_path / "a", model, adapter)
    (tmp_path / "link").symlink_to(tmp_path / "model")
    with pytest.raises(UsageError, match="lies in what"):
        check_apart(tmp_path / "link" / "out", model)
    check_apart(tmp_path / "out", model, adapter)
    file = open_checkpoint(tmp_path / "model" / "model.safetensors")
    check_apart(tmp_path / "model" / "out", file)
    with pytest.raises(UsageError, match="what is being read lies in it"):
        check_apart(tmp_path / "model", file)
    # a link to a file in the folder that would be replaced
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "model.safetensors").symlink_to(tmp_path / "model" / "model.safetensors")
    with pytest.raises(UsageError, match="what is being read lies in it"):
        check_apart(tmp_path / "model", open_checkpoint(tmp_path / "b" / "model.safetensors"))
    monkeypatch.chdir(tmp_path / "model")
    with pytest.raises(UsageError, match="lies in what"):
        check_apart("out", model)


# What goes along


def test_companions(tmp_path):
    home = tmp_path / "model"
    home.mkdir()
    save_file({"q.weight": torch.ones(2, 2)}, home / "model.safetensors")
    along = ["config.json", "tokenizer.json", "chat_template.jinja", "README.md", "LICENSE", "modeling_x.py"]
    for name in along:
        (home / name).write_text("{}")
    left = ["pytorch_model.bin", "pytorch_model.bin.index.json", "optimizer.pt", "x.PTH", "a.ckpt", "b.pkl",
            "tf_model.h5", "flax_model.msgpack", "model.onnx", "q4.gguf", "rust_model.ot", "consolidated.safetensors",
            "model.safetensors.index.json", ".hidden", RECORD]  # fmt: skip
    for name in left:
        (home / name).write_text("{}")
    (home / "runs").mkdir()
    (tmp_path / "secret").write_text("x")
    (home / "out.json").symlink_to(tmp_path / "secret")
    (home / "in.json").symlink_to("config.json")
    (home / "dangling.json").symlink_to("nowhere")
    os.mkfifo(home / "pipe")
    found = companions(open_checkpoint(home))
    assert [path.name for path in found.files] == sorted([*along, "in.json"])
    assert sorted(found.left_behind) == sorted([*left, "runs", "out.json", "dangling.json", "pipe"])
    reasons = found.left_behind
    assert reasons["runs"] == "a sub-folder"
    assert reasons["out.json"] == "a link that leads out of the folder"
    assert reasons["dangling.json"] == "a link to nothing"
    assert reasons["pipe"] == "no regular file"
    assert reasons["pytorch_model.bin"] == reasons["x.PTH"] == reasons["model.safetensors.index.json"]
    assert "old values" in reasons["q4.gguf"]


def test_links_into_the_hub_caches_blobs_are_followed(tmp_path):
    repository = tmp_path / "models--org--name"
    (repository / "blobs").mkdir(parents=True)
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    save_file({"q.weight": torch.ones(2, 2)}, repository / "blobs" / "1")
    (repository / "blobs" / "2").write_text('{"a": 1}')
    (snapshot / "model.safetensors").symlink_to("../../blobs/1")
    (snapshot / "config.json").symlink_to("../../blobs/2")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/2")
    with whole_folder(tmp_path / "out", ours=anything) as home:
        copy_checkpoint(home, open_checkpoint(snapshot)).put("q.weight", torch.zeros(2, 2))
    assert names(tmp_path / "out") == ["config.json", "model.safetensors", "tokenizer.json"]
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert not open_checkpoint(tmp_path / "out").read("q.weight").any()
    assert open_checkpoint(snapshot).read("q.weight").all()


def test_a_config_that_was_read_through_a_link_goes_along(tmp_path):
    source = a_source(tmp_path / "source", "adapter")
    (source.path / "adapter_config.json").rename(source.path / "other.json")
    (source.path / "adapter_config.json").symlink_to("other.json")
    repaired(open_checkpoint(source.path), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["rank_pattern"] == {"q": 3}
    assert "rank_pattern" not in json.loads((source.path / "other.json").read_text())


def test_the_index_of_the_own_shards_goes_along_alone(tmp_path):
    home = tmp_path / "model"
    home.mkdir()
    for name in ("a", "b"):
        save_file({name: torch.ones(1)}, home / f"{name}.safetensors")
    own, other = {"a": "a.safetensors", "b": "b.safetensors"}, {"a": "a.safetensors"}
    (home / "model.safetensors.index.json").write_text(json.dumps({"weight_map": own}))
    (home / "model.fp16.safetensors.index.json").write_text(json.dumps({"weight_map": other}))
    (home / "broken.safetensors.index.json").write_text("{")
    found = companions(open_checkpoint(home / "model.safetensors.index.json"))
    assert [path.name for path in found.files] == ["model.safetensors.index.json"]
    assert sorted(found.left_behind) == ["broken.safetensors.index.json", "model.fp16.safetensors.index.json"]


def test_a_named_file_takes_along_what_loads_it(tmp_path):
    save_file({"q": torch.ones(1)}, tmp_path / "mine.safetensors")
    for name in (
        "config.json",
        "tokenizer_config.json",
        "spiece.model",
        "merges.txt",
        "photo.jpg",
        "notes.txt",
        "x.bin",
    ):
        (tmp_path / name).write_text("{}")
    found = companions(open_checkpoint(tmp_path / "mine.safetensors"))
    assert [path.name for path in found.files] == ["config.json", "merges.txt", "spiece.model", "tokenizer_config.json"]
    assert found.left_behind == {}


def test_cards(tmp_path):
    write_card(tmp_path, None, [], [])
    assert names(tmp_path) == []
    (tmp_path / "old").write_bytes(b"\xff\xfe not text \n\n\n")
    write_card(tmp_path, tmp_path / "old", ["# λ", "b"], ["x: y"])
    assert (tmp_path / "README.md").read_bytes() == b"\xff\xfe not text\n\n" + "# λ\n\nb\n".encode()
    (tmp_path / "old").write_bytes(b"\n")
    write_card(tmp_path, tmp_path / "old", ["# λ"], ["x: y"])
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == "---\nx: y\n---\n\n# λ\n"


def test_records(tmp_path):
    write_record(tmp_path, '{"λ": 1}')
    assert (tmp_path / RECORD).read_bytes() == '{"λ": 1}\n'.encode()
    write_record(tmp_path, "{}\n")
    assert (tmp_path / RECORD).read_text() == "{}\n"
    (tmp_path / "a.txt").write_text("x")
    assert files_in(tmp_path) == ["a.txt", RECORD]
    (tmp_path / RECORD).unlink()
    assert files_in(tmp_path) == ["a.txt", RECORD]  # which it lists itself


def test_every_file_is_forced_to_the_disk(tmp_path, monkeypatch):
    synced = []
    fsync = os.fsync

    def noted(handle):
        synced.append(Path(f"/proc/self/fd/{handle}").readlink().name)
        fsync(handle)

    monkeypatch.setattr(os, "fsync", noted)
    with whole_folder(tmp_path / "out", ours=anything) as home:
        threads = [threading.Thread(target=(home / f"{i}").write_text, args=("x",)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(synced)[1:] == ["0", "1", "2"]
    assert sorted(synced)[0].endswith(".part")
