"""A checkpoint is complete if all files of its list are there, unchanged."""

import pytest

from emogen.training.checkpoints import flaw, list_files


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "checkpoint-4"
    (folder / "deep").mkdir(parents=True)
    for name in ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "deep/rng_state.pth"):
        (folder / name).write_bytes(name.encode() * 9)
    list_files(folder)
    return folder


def test_a_complete_checkpoint_has_no_flaw(checkpoint):
    assert flaw(checkpoint) is None
    list_files(checkpoint)  # as after a resumed run, which saves the same step again
    assert flaw(checkpoint) is None


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "deep/rng_state.pth"])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "flipped"])
def test_a_damaged_file_is_named(checkpoint, name, damage):
    path = checkpoint / name
    content = path.read_bytes()
    changed = {"empty": b"", "cut": content[:-1], "flipped": bytes([content[0] ^ 1]) + content[1:]}
    path.unlink() if damage == "missing" else path.write_bytes(changed[damage])
    assert flaw(checkpoint) == f"{name} is {'missing' if damage == 'missing' else 'damaged'}"


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b"{}", b"\xff"])
def test_without_its_list_it_is_incomplete(checkpoint, content):
    path = checkpoint / "files.json"
    path.unlink() if content is None else path.write_bytes(content)
    assert flaw(checkpoint) == "it is incomplete (the run was killed while it was written)"


def test_weights_alone_do_not_continue_a_training(checkpoint):
    (checkpoint / "optimizer.pt").unlink()
    list_files(checkpoint)
    assert flaw(checkpoint) == "it has no state of the optimizer (save_only_model)"
