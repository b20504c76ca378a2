"""CIFAR-10 and its cache: first use, many trials at once, damage, no network; synthetic images.

Other users may write in the same folder: their links, fifos and locks are tested, too.
"""

import concurrent.futures
import errno
import fcntl
import os
import pwd
import shutil
import stat
import tempfile
import time
from pathlib import Path

import pytest
import tiny_cifar10
import torch
from conftest import nobody
from tiny_cifar10 import DOWNLOADED, USED, assert_equals_torchvisions, names
from torchvision.datasets import CIFAR10

from trial import data

LENGTHS = "[50, 50, 10, 10]\n"


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
        lambda content: b"",
        lambda content: b"not a cache" * 1000,
        lambda content: content[:-1],
    ],
)
def test_a_damaged_cache_is_replaced(filled, capsys, damage):
    data.load_cifar10(filled)
    cache = filled / "cifar10.pt"
    good = cache.read_bytes()
    cache.write_bytes(damage(good))
    assert_equals_torchvisions(data.load_cifar10(filled), filled)
    assert capsys.readouterr().err == f"{cache} is damaged or not CIFAR-10, and not used\n"
    assert cache.read_bytes() == good


def with_checksums(tensors):
    return {"tensors": tensors, "checksums": data.checksums(tensors)}


@pytest.mark.parametrize(
    "other",
    [
        lambda tensors: {"weights": torch.zeros(3)},
        lambda tensors: with_checksums(tensors[:2]),
        lambda tensors: with_checksums([*tensors, tensors[1]]),
        lambda tensors: with_checksums([tensors[0].float(), *tensors[1:]]),
        lambda tensors: with_checksums([tensors[0], tensors[1].double(), *tensors[2:]]),
        lambda tensors: with_checksums([tensors[0].transpose(1, 2).contiguous(), *tensors[1:]]),
        lambda tensors: with_checksums([tensor[:8] for tensor in tensors]),
        lambda tensors: with_checksums([tensors[0], tensors[1] + 1, *tensors[2:]]),
        lambda tensors: with_checksums([*tensors[:3], tensors[3] - 1]),
        lambda tensors: with_checksums(tensors) | {"tensors": [x.to_sparse() for x in tensors]},
    ],
)
def test_a_cache_with_other_content_is_replaced(filled, capsys, other):
    tensors = data.load_cifar10(filled)
    cache = filled / "cifar10.pt"
    torch.save(other([tensor.clone() for tensor in tensors]), cache)
    assert_equals_torchvisions(data.load_cifar10(filled), filled)
    assert capsys.readouterr().err == f"{cache} is damaged or not CIFAR-10, and not used\n"
    assert_equals_torchvisions(data.read_cache(cache), filled)


@pytest.mark.parametrize(
    "put",
    [os.mkfifo, Path.mkdir, lambda cache: cache.symlink_to("/dev/zero")],
    ids=["fifo", "folder", "device"],
)
def test_a_cache_that_is_no_regular_file_is_left_alone(filled, capsys, put):
    cache = filled / "cifar10.pt"
    put(cache)
    kind = stat.S_IFMT(cache.stat().st_mode)
    assert_equals_torchvisions(data.load_cifar10(filled), filled)
    line = f"{cache} is not a regular file, so this run decodes CIFAR-10 for itself\n"
    assert capsys.readouterr().err == line
    assert stat.S_IFMT(cache.stat().st_mode) == kind
    assert names(filled) == ["cifar-10-batches-py", "cifar10.pt"]


def test_a_fifo_that_replaces_the_cache_during_the_wait_is_left_alone(filled, capsys, monkeypatch):
    cache = filled / "cifar10.pt"
    monkeypatch.setattr("fcntl.flock", lambda file, operation: os.mkfifo(cache))
    assert_equals_torchvisions(data.load_cifar10(filled), filled)
    line = f"{cache} is not a regular file, so this run decodes CIFAR-10 for itself\n"
    assert capsys.readouterr().err == line
    assert data.read_cache(cache) is None  # it is not opened, even after the checks
    assert cache.is_fifo()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("torch's")])
def test_a_cache_that_cannot_be_written_leaves_nothing(filled, error):
    def half_written(content, file):
        file.write(b"half of it")
        raise error

    with pytest.MonkeyPatch.context() as full_disk:
        full_disk.setattr("torch.save", half_written)
        with pytest.raises(OSError, match=f"cannot write {filled}/cifar10.pt"):
            data.load_cifar10(filled)
    assert names(filled) == ["cifar-10-batches-py", "cifar10.pt.lock"]
    assert_equals_torchvisions(data.load_cifar10(filled), filled)


def test_a_signal_during_a_save_is_not_reported_as_a_full_disk(tmp_path, monkeypatch):
    def interrupted(content, file):
        try:
            raise SystemExit(143)
        finally:  # as torch.save, which closes what it has not written to its end
            raise RuntimeError("unexpected pos 960 vs 854")

    monkeypatch.setattr("torch.save", interrupted)
    with pytest.raises(SystemExit) as end:
        data.save({}, tmp_path / "model.pt", [])
    assert end.value.code == 143
    assert names(tmp_path) == []


@pytest.mark.parametrize("name", ["target", "missing"])
@pytest.mark.parametrize("place", [CIFAR10.filename, f"{CIFAR10.base_folder}/data_batch_3"])
def test_a_link_is_not_followed_by_a_download(archive, folder, place, name):
    target = folder.parent / "target"
    target.write_text("of the user")
    link = folder / place
    link.parent.mkdir(parents=True)
    link.symlink_to(folder.parent / name)
    with tiny_cifar10.server(archive):
        assert_equals_torchvisions(data.load_cifar10(folder), folder)
    assert target.read_text() == "of the user"
    assert not (folder.parent / "missing").exists()
    assert not link.is_symlink()


def test_a_link_to_a_damaged_folder_is_refused(archive, folder):
    (target := folder.parent / "target").mkdir()
    (target / "data_batch_1").write_text("of the user")
    folder.mkdir()
    shutil.copy(archive, folder)
    (folder / CIFAR10.base_folder).symlink_to(target)
    with pytest.raises(FileNotFoundError, match=f"{folder}/{CIFAR10.base_folder} is a link"):
        data.load_cifar10(folder)
    assert names(target) == ["data_batch_1"]
    assert (target / "data_batch_1").read_text() == "of the user"


def test_links_to_a_good_data_set_are_followed_and_stay(archive, folder, capsys):
    folder.mkdir()
    (folder / CIFAR10.filename).symlink_to(archive)
    assert_equals_torchvisions(data.load_cifar10(folder), folder)
    assert (folder / CIFAR10.filename).readlink() == archive
    elsewhere = shutil.move(folder / CIFAR10.base_folder, folder.parent)
    (folder / CIFAR10.base_folder).symlink_to(elsewhere)
    (folder / "cifar10.pt").unlink()
    assert_equals_torchvisions(data.load_cifar10(folder), folder)
    assert (folder / CIFAR10.base_folder).is_symlink()
    cache = shutil.move(folder / "cifar10.pt", folder.parent)
    (folder / "cifar10.pt").symlink_to(cache)
    assert_equals_torchvisions(data.load_cifar10(folder), folder)
    assert (folder / "cifar10.pt").is_symlink()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("before", [[], [CIFAR10.filename]])
def test_a_failed_download_changes_no_file(archive, folder, before):
    folder.mkdir()
    for name in before:
        (folder / name).write_text("brought by hand, damaged")
    failure = pytest.raises(FileNotFoundError, match="You can do one of these")
    with tiny_cifar10.server(archive, cut=True), failure:
        data.load_cifar10(folder)
    assert names(folder) == [*before, "cifar10.pt.lock"]
    for name in before:
        assert (folder / name).read_text() == "brought by hand, damaged"
    with tiny_cifar10.server(archive):
        assert_equals_torchvisions(data.load_cifar10(folder), folder)


def test_batch_files_are_restored_from_the_archive_and_other_files_stay(archive, folder):
    batches = tiny_cifar10.write(folder)
    shutil.copy(archive, folder)
    (batches / "test_batch").unlink()
    (batches / "data_batch_3").write_bytes(b"half")
    (batches / "notes").write_text("of the user")
    assert_equals_torchvisions(data.load_cifar10(folder), folder)
    assert (batches / "notes").read_text() == "of the user"
    assert names(batches) == sorted([*tiny_cifar10.FILES, "notes"])


def test_temporary_folders_of_killed_trials_are_removed_but_not_links(filled):
    (filled / "cifar10.download.1").mkdir(0o700)
    (filled / "cifar10.download.1" / CIFAR10.filename).write_bytes(b"half")
    (target := filled.parent / "target").mkdir()
    (target / "file").write_text("of the user")
    (filled / "cifar10.download.2").symlink_to(target)
    data.load_cifar10(filled)
    assert names(target) == ["file"]
    assert names(filled) == sorted([*USED, "cifar10.download.2"])


@pytest.mark.parametrize("name", ["data_batch_3", "test_batch", "batches.meta"])
def test_a_truncated_file_is_named(archive, folder, name):
    batches = tiny_cifar10.write(folder)
    (batches / name).write_bytes(tiny_cifar10.FILES[name][:20])
    with pytest.raises(FileNotFoundError, match=f"damaged in {batches}: {name}\n"):
        data.load_cifar10(folder)
    assert not (folder / "cifar10.pt").exists()


def test_without_data_and_network_the_error_says_what_to_do(archive, folder):
    with pytest.raises(FileNotFoundError) as error:
        data.load_cifar10(folder)
    message = str(error.value)
    assert str(folder) in message
    assert "Connection refused" in message
    assert "put cifar-10-python.tar.gz" in message
    assert "--data-dir or CIFAR10_DIR" in message
    assert "--dataset synthetic" in message


@pytest.fixture
def reachable(archive):
    """The archive and a folder with the batch files, which other users may enter, unlike pytest's.

    Root could write in spite of the mode, so root's child process becomes another user.
    """
    with tempfile.TemporaryDirectory() as root:
        os.chmod(root, 0o755)
        folder = Path(root, "data")
        batches = tiny_cifar10.write(folder)
        yield shutil.copy(archive, root), folder
        folder.chmod(0o755)
        batches.chmod(0o755)


def test_a_read_only_folder(program, reachable):
    archive, folder = reachable
    folder.chmod(0o555)
    (folder / CIFAR10.base_folder).chmod(0o555)
    user = [nobody()] if os.getuid() == 0 else []
    result = program("load_data.py", folder, archive, 0, *user)
    result.wait()
    assert result.stdout == LENGTHS, result.stderr
    assert f"{folder} is read-only" in result.stderr
    assert names(folder) == ["cifar-10-batches-py"]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(filled, capsys, monkeypatch, number):
    def no_lock(file, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", no_lock)
    assert_equals_torchvisions(data.load_cifar10(filled), filled)
    problem = f"{filled}/cifar10.pt.lock cannot be locked ({os.strerror(number)})"
    own = "so this run decodes CIFAR-10 for itself"
    assert capsys.readouterr().err == f"{problem}, {own}\n"
    assert not (filled / "cifar10.pt").exists()


def test_a_lock_that_only_another_user_may_write(program, reachable):
    archive, folder = reachable
    folder.chmod(0o777)
    (folder / "cifar10.pt.lock").touch(0o644)
    result = program("load_data.py", folder, archive, 0, nobody())
    result.wait()
    assert result.stdout == LENGTHS, result.stderr
    problem = f"{folder}/cifar10.pt.lock cannot be locked (Permission denied)"
    assert result.stderr == f"{problem}, so this run decodes CIFAR-10 for itself\n"


@pytest.mark.parametrize("whose", ["own", "nobody's", "nameless"])
def test_a_long_wait_names_the_lock_and_its_owner_once(filled, capsys, monkeypatch, whose):
    path = filled / "cifar10.pt.lock"
    with concurrent.futures.ThreadPoolExecutor() as pool, open(path, "w") as file:
        owner = pwd.getpwuid(os.getuid()).pw_name
        if whose == "nobody's":
            os.chown(path, nobody(), -1)
            owner = pwd.getpwuid(nobody()).pw_name
        elif whose == "nameless":
            nobody()  # skips, unless this is root
            owner = 1_234_567
            os.chown(path, owner, -1)
        fcntl.flock(file, fcntl.LOCK_EX)
        monkeypatch.setattr(data, "NOTICE_AFTER", 0.01)
        loading = pool.submit(data.load_cifar10, filled)
        while not (told := capsys.readouterr().err):
            time.sleep(0.01)
        fcntl.flock(file, fcntl.LOCK_UN)
        assert_equals_torchvisions(loading.result(), filled)
    told += capsys.readouterr().err
    assert told == f"waiting for another process, which has locked {path}, a file of user {owner}\n"


@pytest.mark.parametrize(
    ("link", "name"),
    [(Path.symlink_to, "target"), (Path.symlink_to, "missing"), (Path.hardlink_to, "target")],
)
def test_a_lock_that_is_a_link_is_not_written_to(filled, capsys, link, name):
    target = filled.parent / "target"
    target.write_text("of the user")
    target.chmod(0o600)
    lock = filled / "cifar10.pt.lock"
    link(lock, filled.parent / name)
    assert_equals_torchvisions(data.load_cifar10(filled), filled)
    assert (f"{lock} cannot be locked (" in capsys.readouterr().err) == lock.is_symlink()
    assert target.read_text() == "of the user"
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    assert not (filled.parent / "missing").exists()


@pytest.mark.parametrize("how", ["by the process's number", "by guessing"])
def test_an_unfinished_file_that_is_a_link_is_not_followed(tmp_path, monkeypatch, how):
    foreseen = "guessed" if how == "by guessing" else str(os.getpid())
    target = tmp_path / "target"
    target.write_text("of the user")
    path = tmp_path / "model.pt"
    path.with_name(f"{path.name}.{foreseen}.tmp").symlink_to(target)
    if how == "by guessing":
        monkeypatch.setattr("secrets.token_hex", lambda length: foreseen)
        with pytest.raises(OSError, match=f"cannot write {path}.*File exists"):
            data.save({}, path, [])
    else:
        data.save({}, path, [])
        assert torch.load(path) == {}
    assert target.read_text() == "of the user"


def test_an_unfinished_file_that_cannot_be_removed_stays(filled):
    (filled / "cifar10.pt.1.tmp" / "of another user").mkdir(parents=True)
    (filled / "cifar10.pt.2.tmp").touch()
    assert_equals_torchvisions(data.load_cifar10(filled), filled)
    assert names(filled) == sorted([*USED, "cifar10.pt.1.tmp"])


def test_saved_files_have_the_mode_that_the_umask_allows(filled):
    before = os.umask(0o027)
    try:
        data.load_cifar10(filled)
        data.save({}, filled / "model.pt", [])
    finally:
        os.umask(before)
    for name in ("cifar10.pt", "cifar10.pt.lock", "model.pt"):
        assert stat.S_IMODE((filled / name).stat().st_mode) == 0o640


def test_save_replaces_regular_files_only(tmp_path):
    path = tmp_path / "fifo"
    os.mkfifo(path)
    with pytest.raises(OSError, match=f"cannot write {path}: it is not a regular file"):
        data.save({}, path, [])
    assert path.is_fifo()
    assert names(tmp_path) == ["fifo"]


@pytest.mark.parametrize("data_dir", ["data folder/cifar-10-batches-py", "."])
def test_data_dir_may_be_the_folder_of_the_batch_files(archive, folder, monkeypatch, data_dir):
    batches = tiny_cifar10.write(folder)
    monkeypatch.chdir(batches if data_dir == "." else folder.parent)
    before = names(batches)
    assert_equals_torchvisions(data.load_cifar10(Path(data_dir)), folder)
    assert names(batches) == before
    assert names(folder) == USED


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
