"""CIFAR-10 and its cache: first use, many trials at once, damage, no network; synthetic images."""

import errno
import os
import shutil
import socket
import stat
import tempfile
from pathlib import Path

import pytest
import tiny_cifar10
import torch
from conftest import nobody
from tiny_cifar10 import DOWNLOADED, USED, assert_equals_torchvisions, names
from torchvision.datasets import CIFAR10

from trial import data

LENGTHS = "[50, 50, 10, 10]\n"
OWN = "this run decodes CIFAR-10 for itself\n"


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "data folder"


@pytest.fixture
def filled(archive, folder):
    """The folder with the batch files of the tiny data set in it."""
    tiny_cifar10.write(folder)
    return folder


def test_the_cache_holds_what_torchvision_decodes(filled):
    assert_equals_torchvisions(data.load_cifar10(filled), filled)
    assert names(filled) == USED
    shutil.copytree(filled / CIFAR10.base_folder, filled.parent / "copy" / CIFAR10.base_folder)
    shutil.rmtree(filled / CIFAR10.base_folder)
    assert_equals_torchvisions(data.load_cifar10(filled), filled.parent / "copy")


def test_twenty_trials_at_once_download_once(program, archive, folder):
    with tiny_cifar10.server(archive) as (port, requests):
        loading = [program("load_data.py", folder, archive, port) for _ in range(20)]
        statuses = [each.wait() for each in loading]
    errors = [each.stderr for each in loading]
    assert statuses == [0] * 20, errors
    assert [each.stdout for each in loading] == [LENGTHS] * 20
    assert sum("100%" in text for text in errors) == 1  # one progress bar of one download
    assert len(requests) == 2  # torchvision asks once for where it is redirected to, once for all
    assert names(folder) == DOWNLOADED


def flip_a_bit(content):
    middle = len(content) // 2  # within an image
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        flip_a_bit,
        lambda content: content[: len(content) // 2],
        lambda content: content[:-1],
        lambda content: b"",
        lambda content: b"not a cache" * 1000,
        {"weights": torch.zeros(3)},
        {"tensors": [torch.zeros(2)], "checksums": [1]},
    ],
)
def test_a_damaged_or_foreign_cache_is_replaced(filled, capsys, damage):
    data.load_cifar10(filled)
    cache = filled / "cifar10.pt"
    good = cache.read_bytes()
    if callable(damage):
        cache.write_bytes(damage(good))
    else:
        torch.save(damage, cache)
    assert_equals_torchvisions(data.load_cifar10(filled), filled)
    assert capsys.readouterr().err == f"{cache} is damaged or not CIFAR-10, and not used\n"
    assert cache.read_bytes() == good


def refuse(number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    return refuse


@pytest.mark.parametrize(
    ("function", "number"),
    [
        ("os.replace", errno.EPERM),  # of another user, in a folder where only owners may do that
        ("pathlib.Path.write_bytes", errno.ENOSPC),
        ("tempfile.mkdtemp", errno.EROFS),
    ],
)
def test_a_cache_that_cannot_be_written_costs_time_only(filled, capsys, function, number):
    with pytest.MonkeyPatch.context() as disk:
        disk.setattr(function, refuse(number))
        assert_equals_torchvisions(data.load_cifar10(filled), filled)
    line = f"cannot write {filled}/cifar10.pt: {os.strerror(number)}: {OWN}"
    assert capsys.readouterr().err == line
    assert names(filled) == ["cifar-10-batches-py", "cifar10.pt.lock"]
    assert_equals_torchvisions(data.load_cifar10(filled), filled)
    assert names(filled) == USED


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(filled, capsys, monkeypatch, number):
    monkeypatch.setattr("fcntl.flock", refuse(number))
    assert_equals_torchvisions(data.load_cifar10(filled), filled)
    assert capsys.readouterr().err == ""
    assert names(filled) == USED


@pytest.fixture
def shared(archive):
    """The archive and a folder with the batch files, which other users may enter, unlike pytest's.

    Root could write in spite of the mode, so a child process of root becomes another user.
    """
    with tempfile.TemporaryDirectory() as root:
        os.chmod(root, 0o755)
        folder = Path(root, "data")
        batches = tiny_cifar10.write(folder)
        yield shutil.copy(archive, root), folder
        folder.chmod(0o755)
        batches.chmod(0o755)


@pytest.mark.parametrize(("mode", "has_cache"), [(0o555, False), (0o1777, True), (0o777, True)])
def test_a_folder_of_another_user(program, shared, mode, has_cache):
    """It is read-only, or has a damaged cache and a lock of its owner's."""
    archive, folder = shared
    if has_cache:
        (folder / "cifar10.pt").write_text("damaged")
        (folder / "cifar10.pt.lock").touch(0o644)
    folder.chmod(mode)
    (folder / CIFAR10.base_folder).chmod(0o555)
    result = program("load_data.py", folder, archive, 0, nobody())
    result.wait()
    assert result.stdout == LENGTHS, result.stderr
    if mode == 0o777:
        assert names(folder) == USED
    else:
        assert f"cannot write {folder}/cifar10.pt: " in result.stderr
        assert result.stderr.endswith(OWN)


def test_a_read_only_project_without_data_ends_with_the_advice(program, shared):
    archive, folder = shared
    folder.chmod(0o555)
    result = program("load_data.py", folder / "data", archive, 0, nobody())
    assert result.wait() == 1
    assert "point --data-dir or CIFAR10_DIR at a folder" in result.stderr


@pytest.mark.parametrize(
    ("fault", "failure"),
    [
        ({}, "URLError: <urlopen error [Errno 111] Connection refused>"),
        ({"cut": True}, "RuntimeError: File not found or corrupted"),
        ({"stalls": True}, "TimeoutError: timed out"),
        ({"wrong": True}, "RuntimeError: File not found or corrupted"),
    ],
    ids=str,
)
@pytest.mark.parametrize("before", [[], [CIFAR10.filename]])
def test_a_failed_download_says_what_to_do(archive, folder, monkeypatch, fault, failure, before):
    wait = socket.setdefaulttimeout
    monkeypatch.setattr("socket.setdefaulttimeout", lambda s: wait(s and s / 15))
    folder.mkdir()
    for name in before:
        (folder / name).write_text("brought by hand, damaged")
    with tiny_cifar10.server(archive, **fault) as (port, _):
        tiny_cifar10.expect(archive, port if fault else 1)
        with pytest.raises(FileNotFoundError) as error:
            data.load_cifar10(folder)
    assert socket.getdefaulttimeout() is None
    message = str(error.value)
    assert f"CIFAR-10 is missing or damaged in {folder}/cifar-10-batches-py\n" in message
    assert f"What failed: {failure}" in message
    assert "put cifar-10-python.tar.gz" in message
    assert "--data-dir or CIFAR10_DIR" in message
    assert "--dataset synthetic" in message
    with tiny_cifar10.server(archive):
        assert_equals_torchvisions(data.load_cifar10(folder), folder)
    assert names(folder) == DOWNLOADED


def test_saved_files_have_the_mode_that_the_umask_allows(filled):
    before = os.umask(0o027)
    try:
        data.load_cifar10(filled)
        data.save({}, filled / "model.pt")
    finally:
        os.umask(before)
    for name in ("cifar10.pt", "cifar10.pt.lock", "model.pt"):
        assert stat.S_IMODE((filled / name).stat().st_mode) == 0o640


@pytest.mark.parametrize("data_dir", ["data folder/cifar-10-batches-py", "."])
def test_data_dir_may_be_the_folder_of_the_batch_files(archive, folder, monkeypatch, data_dir):
    batches = tiny_cifar10.write(folder)
    monkeypatch.chdir(batches if data_dir == "." else folder.parent)
    before = names(batches)
    assert_equals_torchvisions(data.load_cifar10(Path(data_dir)), folder)
    assert (names(batches), names(folder)) == (before, USED)


def test_data_dir_may_have_the_name_of_the_folder_in_it(archive, folder):
    outer = folder / CIFAR10.base_folder
    tiny_cifar10.write(outer)
    assert_equals_torchvisions(data.load_cifar10(outer), outer)
    assert names(outer) == USED


def test_synthetic_images_are_the_same_for_everyone(synthetic):
    images, labels, test_images, test_labels = synthetic
    assert images.shape == (10_000, 3, 32, 32)
    assert test_images.shape == (2_000, 3, 32, 32)
    assert images.dtype == test_images.dtype == torch.uint8
    assert labels.bincount().tolist() == [1000] * 10
    assert test_labels.bincount().tolist() == [200] * 10
    assert 100 < images.float().mean() < 156
    again = data.make_synthetic()
    assert all(torch.equal(a, b) for a, b in zip(synthetic, again, strict=True))


def test_validation_holds_out_a_tenth_of_each_class(synthetic):
    images, labels = synthetic[:2]
    kept, kept_labels, held, held_labels = data.hold_out(images, labels)
    assert kept_labels.bincount().tolist() == [900] * 10
    assert held_labels.bincount().tolist() == [100] * 10
    assert held_labels[(held == images[-1]).flatten(1).all(1)].tolist() == [labels[-1]]
    assert torch.equal(torch.cat([kept, held]).sum(0), images.sum(0))  # each once
