"""A CIFAR-10 of 60 images in torchvision's format, its archive, and a server that delivers it."""

import contextlib
import hashlib
import http.server
import pickle
import tarfile
import threading

import numpy as np
import torch
from torchvision.datasets import CIFAR10

TRAIN = [f"data_batch_{i}" for i in range(1, 6)]
# What is in the folder after it was used for the first time, without and with a download.
USED = ["cifar-10-batches-py", "cifar10.pt", "cifar10.pt.lock"]
DOWNLOADED = ["cifar-10-batches-py", "cifar-10-python.tar.gz", "cifar10.pt", "cifar10.pt.lock"]


def pickled(seed):
    """Return a batch file of 10 images, one of each class."""
    random = np.random.default_rng(seed)
    data = random.integers(0, 256, (10, 3072), dtype=np.uint8)
    return pickle.dumps({"data": data, "labels": random.permutation(10).tolist()}, protocol=4)


FILES = {name: pickled(seed) for seed, name in enumerate([*TRAIN, "test_batch"])}
FILES["batches.meta"] = pickle.dumps({"label_names": [str(i) for i in range(10)]}, protocol=4)


def md5(content):
    return hashlib.md5(content).hexdigest()


def expect(archive, port=0):
    """Make torchvision take these files for CIFAR-10, and the local server for its home."""
    CIFAR10.train_list = [[name, md5(FILES[name])] for name in TRAIN]
    CIFAR10.test_list = [["test_batch", md5(FILES["test_batch"])]]
    CIFAR10.meta = CIFAR10.meta | {"md5": md5(FILES["batches.meta"])}
    CIFAR10.tgz_md5 = md5(archive.read_bytes())
    CIFAR10.url = f"http://127.0.0.1:{port}/{CIFAR10.filename}"


def assert_equals_torchvisions(tensors, folder):
    """Check that these are the data set in folder, as torchvision decodes it."""
    for images, labels, is_training in ((*tensors[:2], True), (*tensors[2:], False)):
        theirs = CIFAR10(folder, train=is_training)
        assert images.dtype == torch.uint8
        assert labels.dtype == torch.int64
        assert torch.equal(images.permute(0, 2, 3, 1), torch.from_numpy(theirs.data))
        assert labels.tolist() == theirs.targets


def names(folder):
    """Return the names in the folder, sorted."""
    return sorted(path.name for path in folder.iterdir())


def write(folder):
    """Write the batch files into folder, as a user would have them; return the folder with them."""
    batches = folder / CIFAR10.base_folder
    batches.mkdir(parents=True)
    for name, content in FILES.items():
        (batches / name).write_bytes(content)
    return batches


def write_archive(folder):
    """Write cifar-10-python.tar.gz into folder and return its path."""
    batches = write(folder / "content")
    with tarfile.open(folder / CIFAR10.filename, "w:gz") as archive:
        archive.add(batches, CIFAR10.base_folder)
    return folder / CIFAR10.filename


@contextlib.contextmanager
def server(archive, cut=False, stalls=False, wrong=False):
    """Serve the archive on a free port, torchvision's now; yield the port and the paths asked for.

    It may be cut in the middle, stall there until the server ends, or be something else.
    """
    content = archive.read_bytes()
    if wrong:
        content = b"<html>Please log in to the hotel's network</html>" * 100
    end = threading.Event()
    requests = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2] if cut or stalls else content)
            if stalls:
                self.wfile.flush()
                end.wait()

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        expect(archive, httpd.server_port)
        yield httpd.server_port, requests
        end.set()
        httpd.shutdown()
