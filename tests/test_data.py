"""CIFAR-10 and its cache: first use, many at once, damage, no network; and the synthetic images."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest
import tiny_cifar10
import torch
from torchvision.datasets import CIFAR10

import cifar10

# What a child process runs to load the tiny data set in place of CIFAR-10.
LOAD = """
import os, sys
from pathlib import Path
import cifar10, tiny_cifar10
folder, archive, port = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
tiny_cifar10.expect(archive, port)
if len(sys.argv) > 4:
    os.setuid(int(sys.argv[4]))
try:
    print([len(tensor) for tensor in cifar10.load_cifar10(folder)])
except FileNotFoundError as error:
    sys.exit(str(error))
"""
LENGTHS = "[50, 50, 10, 10]\n"


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """The archive of the tiny data set, which torchvision takes for CIFAR-10 in this test."""
    for name in ("train_list", "test_list", "meta", "tgz_md5", "url"):
        monkeypatch.setattr(CIFAR10, name, getattr(CIFAR10, name))
    (tmp_path / "home").mkdir()
    archive = tiny_cifar10.write_archive(tmp_path / "home")
    tiny_cifar10.expect(archive)
    return archive


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "data folder"


def assert_equals_torchvisions(tensors, folder):
    for images, labels, is_training in ((*tensors[:2], True), (*tensors[2:], False)):
        theirs = CIFAR10(folder, train=is_training)
        assert images.dtype == torch.uint8
        assert labels.dtype == torch.int64
        assert torch.equal(images.permute(0, 2, 3, 1), torch.from_numpy(theirs.data))
        assert labels.tolist() == theirs.targets


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_cache_holds_what_torchvision_decodes(archive, folder):
    tiny_cifar10.write(folder)
    assert_equals_torchvisions(cifar10.load_cifar10(folder), folder)
    shutil.copytree(folder / CIFAR10.base_folder, folder.parent / "copy" / CIFAR10.base_folder)
    shutil.rmtree(folder / CIFAR10.base_folder)
    assert_equals_torchvisions(cifar10.load_cifar10(folder), folder.parent / "copy")


def test_the_real_cache_holds_what_torchvision_decodes(cifar10_dir):
    cifar10.load_cifar10(cifar10_dir)
    tensors = cifar10.load_cifar10(cifar10_dir)
    assert [len(tensor) for tensor in tensors] == [50_000, 50_000, 10_000, 10_000]
    assert_equals_torchvisions(tensors, cifar10_dir)


def test_an_archive_brought_by_hand_is_enough(archive, folder):
    folder.mkdir()
    shutil.copy(archive, folder)
    assert len(cifar10.load_cifar10(folder)[0]) == 50


def test_twenty_at_once_on_an_empty_folder_download_once(start, archive, folder):
    with tiny_cifar10.server(archive) as (port, requests):
        processes = [start(folder, archive, port, code=LOAD) for _ in range(20)]
        outputs = [process.communicate(timeout=300) for process in processes]
    assert [stdout for stdout, _ in outputs] == [LENGTHS] * 20, outputs
    assert sum("100%" in stderr for _, stderr in outputs) == 1  # one progress bar of one download
    assert len(requests) == 2  # torchvision asks once for where it is redirected to, once for all
    assert names(folder) == [
        "cifar-10-batches-py",
        "cifar-10-python.tar.gz",
        "cifar10.pt",
        "cifar10.pt.lock",
    ]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2],
        lambda content: b"",
        lambda content: b"not a cache" * 1000,
        lambda content: content[:-1],
    ],
)
def test_a_damaged_cache_is_made_anew(archive, folder, capsys, damage):
    tiny_cifar10.write(folder)
    cifar10.load_cifar10(folder)
    cache = folder / "cifar10.pt"
    good = cache.read_bytes()
    cache.write_bytes(damage(good))
    assert_equals_torchvisions(cifar10.load_cifar10(folder), folder)
    assert f"{cache} is damaged" in capsys.readouterr().err
    assert cache.read_bytes() == good


def test_a_flipped_bit_in_the_cache_is_noticed(archive, folder, capsys):
    tiny_cifar10.write(folder)
    first_image = cifar10.load_cifar10(folder)[0][0].numpy().tobytes()
    cache = folder / "cifar10.pt"
    content = bytearray(cache.read_bytes())
    content[content.index(first_image) + 1000] ^= 1
    cache.write_bytes(content)
    assert_equals_torchvisions(cifar10.load_cifar10(folder), folder)
    assert f"{cache} is damaged" in capsys.readouterr().err


def test_a_cache_of_something_else_is_not_used(archive, folder):
    tiny_cifar10.write(folder)
    torch.save({"weights": torch.zeros(3)}, folder / "cifar10.pt")
    assert_equals_torchvisions(cifar10.load_cifar10(folder), folder)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("torch's")])
def test_a_cache_that_cannot_be_written_leaves_nothing(archive, folder, error):
    def half_written(content, file):
        file.write(b"half of it")
        raise error

    tiny_cifar10.write(folder)
    with pytest.MonkeyPatch.context() as full_disk:
        full_disk.setattr("torch.save", half_written)
        with pytest.raises(OSError, match=f"cannot write {folder}/cifar10.pt"):
            cifar10.load_cifar10(folder)
    assert names(folder) == ["cifar-10-batches-py", "cifar10.pt.lock"]
    assert_equals_torchvisions(cifar10.load_cifar10(folder), folder)


def test_a_truncated_batch_file_is_restored_from_the_archive(archive, folder):
    batches = tiny_cifar10.write(folder)
    shutil.copy(archive, folder)
    (batches / "data_batch_3").write_bytes(b"half")
    assert_equals_torchvisions(cifar10.load_cifar10(folder), folder)


@pytest.mark.parametrize("name", ["data_batch_3", "test_batch", "batches.meta"])
def test_a_truncated_file_is_named(archive, folder, name):
    batches = tiny_cifar10.write(folder)
    (batches / name).write_bytes(tiny_cifar10.FILES[name][:20])
    with pytest.raises(FileNotFoundError, match=f"damaged in {batches}: {name}\n"):
        cifar10.load_cifar10(folder)
    assert not (folder / "cifar10.pt").exists()


def test_what_to_do_without_data_and_network(archive, folder):
    with pytest.raises(FileNotFoundError) as error:
        cifar10.load_cifar10(folder)
    message = str(error.value)
    assert str(folder) in message
    assert "Connection refused" in message
    assert "put cifar-10-python.tar.gz" in message
    assert "--data-dir or CIFAR10_DIR" in message
    assert "--dataset synthetic" in message


def test_a_download_that_stops_in_the_middle(run, archive, folder):
    with tiny_cifar10.server(archive, cut=True) as (port, _):
        result = run(folder, archive, port, code=LOAD)
    assert result.returncode == 1
    assert "What failed: " in result.stderr
    assert "Traceback" not in result.stderr
    assert not (folder / "cifar10.pt").exists()
    with tiny_cifar10.server(archive) as (port, _):
        assert run(folder, archive, port, code=LOAD).stdout == LENGTHS


def test_a_read_only_folder(run, archive):
    # Not pytest's folder, which no other user may enter: root could write in spite of the mode, so
    # root's child process becomes nobody.
    with tempfile.TemporaryDirectory() as root:
        os.chmod(root, 0o755)
        folder = Path(root, "data")
        batches = tiny_cifar10.write(folder)
        folder.chmod(0o555)
        batches.chmod(0o555)
        reachable = shutil.copy(archive, root)
        nobody = [65534] if os.getuid() == 0 else []
        result = run(folder, reachable, 0, *nobody, code=LOAD)
        folder.chmod(0o755)
        batches.chmod(0o755)
        assert result.stdout == LENGTHS, result.stderr
        assert f"{folder} is read-only" in result.stderr
        assert names(folder) == ["cifar-10-batches-py"]


def test_synthetic_images_are_the_same_for_everyone():
    images, labels, test_images, test_labels = tensors = cifar10.make_synthetic()
    assert images.shape == (10_000, 3, 32, 32)
    assert test_images.shape == (2_000, 3, 32, 32)
    assert images.dtype == test_images.dtype == torch.uint8
    assert labels.bincount().tolist() == [1000] * 10
    assert test_labels.bincount().tolist() == [200] * 10
    assert 100 < images.float().mean() < 156
    again = cifar10.make_synthetic()
    assert all(torch.equal(a, b) for a, b in zip(tensors, again, strict=True))
