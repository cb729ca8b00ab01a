"""Pixels in, pixels out: IDX, CIFAR-10 and .npy files become uint8 tensors; images become PGM, PPM and PNG files.

Files come from strangers and from bad networks, so three functions carry this module: read_at_most (never more is read
or decompressed than a header can justify), fetch (nothing is trusted before its checksum) and atomic (nothing
half-written ever has its final name). Whatever is wrong with a file is a ValueError that names the file.
"""
import contextlib
import errno
import gzip
import hashlib
import http.client
import io
import math
import os
import shutil
import struct
import sys
import tarfile
import tempfile
import time
import urllib.request
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch


class Dataset(NamedTuple):
    """What a data set is and where it comes from."""
    classes: tuple          # names of the labels 0, 1, ...
    mirrors: tuple          # web addresses that a file's name is appended to, tried in turn
    files: dict             # split -> ((file name, checksum), ...): SHA-256 of IDX content, MD5 of CIFAR-10's archive
    folders: tuple = ()     # where a system package puts the same files
    package: str = ""       # that package
    flip: bool = False      # whether a mirrored image is as good an image (train.py --flip)


DATASETS = {
    "fashion-mnist": Dataset(
        classes=("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
        mirrors=("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
                 "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/"),
        files={"train": (("train-images-idx3-ubyte", "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888"),
                         ("train-labels-idx1-ubyte", "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9")),
               "test": (("t10k-images-idx3-ubyte", "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b"),
                        ("t10k-labels-idx1-ubyte", "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"))},
        folders=("/usr/share/datasets/fashion-mnist",), package="dataset-fashion-mnist"),
    "mnist": Dataset(
        classes=tuple("0123456789"),
        mirrors=("https://ossci-datasets.s3.amazonaws.com/mnist/",
                 "https://storage.googleapis.com/cvdf-datasets/mnist/"),
        files={"train": (("train-images-idx3-ubyte", "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"),
                         ("train-labels-idx1-ubyte", "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5")),
               "test": (("t10k-images-idx3-ubyte", "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7"),
                        ("t10k-labels-idx1-ubyte", "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"))}),
    "cifar10": Dataset(
        classes=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
        mirrors=("https://www.cs.toronto.edu/~kriz/",),
        files=dict.fromkeys(("train", "test"), (("cifar-10-binary.tar", "c32a1d4ab5d03f1284b67883e8d87530"),)),
        flip=True),
}

TIMEOUT = 30                      # seconds that a server may be silent
LARGEST = 2**31                   # bytes: no file that unpacks to more is read
IDX_TYPES = {8: ">u1", 9: ">i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}


class WrongChoice(ValueError):
    """What a person chose by name or flag and cannot have; the scripts end with exit code 2, not 1."""


# ---------------------------------------------------------------------------------------------------------------- pixels


def to_model(images):
    """uint8 0..255 -> float32 in [-1, 1], linearly (Section 3.3)."""
    return images.float() / 127.5 - 1


def to_pixels(x):
    """float in [-1, 1] -> uint8, by rounding (truncation would change 63 of the 256 grey levels on a round trip)."""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


# --------------------------------------------------------------------------------------------------------- reading files


def load_dataset(name, split="train", root="data"):
    """-> images uint8 (N, C, H, W), labels int64 (N,); split is "train" or "test".

    name is one of DATASETS, or the path of a FILE.npy: uint8 (N, H, W), (N, H, W, 1 or 3) or (N, C, H, W), with labels
    (N,) in FILE.labels.npy if there are any (all 0 otherwise), and a test split in FILE.test.npy and FILE.test.labels.npy
    (FILE.npy itself, otherwise). ValueError if the data cannot be had: it names every place tried and the ways out.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be train or test, not {split!r}")
    dataset = known(name)
    if dataset is None:
        return load_npy(Path(name).expanduser(), split)
    if name == "cifar10":
        images, labels = find(name, *dataset.files[split][0], root, lambda path, md5: read_cifar10(path, split, md5))
    else:
        images, labels = (find(name, *file, root, read_idx) for file in dataset.files[split])
        images = images[:, None]
    return torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64))


def known(name):
    """The Dataset of that name; None for the path of a FILE.npy; else WrongChoice."""
    if name not in DATASETS and not (str(name).endswith(".npy") and str(name).isprintable()):
        raise WrongChoice(f"unknown data set {name!r}: use {', '.join(DATASETS)}, or the path of a FILE.npy")
    return DATASETS.get(name)


def load_chosen(name, only=None, split="train", root="data"):
    """load_dataset's images (N, C, H, W) and labels (N,), of the class `only` if that is not None, and all classes' names.

    WrongChoice for an unknown data set or class; ValueError for a class without images, and whatever load_dataset has.
    """
    images, labels = load_dataset(name, split, root)
    dataset = known(name)
    classes = dataset.classes if dataset else tuple(str(k) for k in range(int(labels.max()) + 1))
    if only is not None:
        chosen = labels == find_label(only, classes)
        if not chosen.any():
            raise ValueError(f"{name} ({split}) has no image of {only!r}")
        images, labels = images[chosen], labels[chosen]
    return images, labels, classes


def find_label(text, classes):
    """The index of a class given by its name, in any case, or by its index. WrongChoice lists them."""
    names = [name.lower() for name in classes]
    if text.lower() in names:
        return names.index(text.lower())
    if text.isdecimal() and int(text) < len(classes):
        return int(text)
    raise WrongChoice(f"no label {text!r}: use an index 0..{len(classes) - 1} or one of {', '.join(classes[:100])}")


def read_at_most(file, size):
    """Up to `size` bytes of an open file, in pieces, so that a header's lie about its size costs no memory."""
    pieces = []
    while size > 0 and (piece := file.read(min(size, 2**22))):
        pieces.append(piece)
        size -= len(piece)
    return b"".join(pieces)


@contextlib.contextmanager
def damaged(said):
    """Whatever goes wrong inside, but for what the disk does, is a ValueError: `said` and, in one line, why."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # noqa: BLE001       numpy's and torch's readers fail in a dozen ways on a hostile file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{said} ({reason[:200]})") from None


@contextlib.contextmanager
def opened(path):
    """A file opened for reading, through gzip if its first bytes say so; whatever is wrong inside is a ValueError."""
    with open(path, "rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        try:
            yield gzip.GzipFile(fileobj=file) if zipped else file
        except (EOFError, zlib.error, gzip.BadGzipFile, tarfile.TarError) as error:
            raise ValueError(f"{path} is damaged: {error}") from None


def read_idx(path, sha256=None):
    """An IDX file, plain or gzipped -> ndarray. ValueError for anything but the header's type, shape and exact length.

    IDX: two zero bytes, a type, the number of dimensions, each dimension in 4 bytes, the values; all big-endian.
    If sha256 (hex) is given, the unzipped content must have it.
    """
    with opened(path) as file:
        head = read_at_most(file, 4)
        if len(head) < 4 or head[:2] != b"\0\0" or head[2] not in IDX_TYPES or head[3] == 0:
            raise ValueError(f"{path} is not an IDX file: it starts with {head.hex() or 'nothing'}")
        dtype, dimensions = np.dtype(IDX_TYPES[head[2]]), read_at_most(file, 4 * head[3])
        if len(dimensions) < 4 * head[3]:
            raise ValueError(f"{path} is cut short within its header")
        shape = struct.unpack(f">{head[3]}I", dimensions)
        size = math.prod(shape) * dtype.itemsize
        if size > min(LARGEST, 1100 * os.path.getsize(path)):          # gzip shrinks by 1032 at best
            raise ValueError(f"{path} announces {size:,} bytes ({shape}): more than a file of its length can hold")
        values = read_at_most(file, size + 1)
    if len(values) != size:
        raise ValueError(f"{path} {'is cut short' if len(values) < size else 'goes on'} after its {size:,} bytes of values")
    if sha256 and hashlib.sha256(head + dimensions + values).hexdigest() != sha256:
        raise ValueError(f"{path} has the wrong checksum (SHA-256)")
    with damaged(f"{path} has a shape that cannot be"):
        return np.frombuffer(bytearray(values), dtype).reshape(shape).astype(dtype.newbyteorder("="), copy=False)


def read_cifar10(path, split="train", md5=None):
    """CIFAR-10's binary archive, in memory -> images (N, 3, 32, 32), labels (N,), uint8. Nothing is extracted to disk.

    Each record is a label and 3 x 32 x 32 pixels; five data_batch files are the training split, test_batch the other.
    """
    if md5 and hashlib.md5(Path(path).read_bytes(), usedforsecurity=False).hexdigest() != md5:
        raise ValueError(f"{path} has the wrong checksum (MD5)")
    wanted = [f"data_batch_{k}.bin" for k in range(1, 6)] if split == "train" else ["test_batch.bin"]
    batches = {}
    with opened(path) as file:
        content = read_at_most(file, 2**28 + 1)                        # the real one is 184 MB
        if len(content) > 2**28:
            raise ValueError(f"{path} unpacks to more than CIFAR-10 is")
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as archive:
            for member in archive:
                name = member.name.rpartition("/")[2]
                if name in wanted and member.isreg():
                    batches[name] = archive.extractfile(member).read()
    for name in wanted:
        if len(batches.get(name, b"")) == 0 or len(batches[name]) % 3073:
            raise ValueError(f"{path} is no CIFAR-10 binary archive: {name} is missing or not made of 3073-byte records")
    records = np.frombuffer(bytearray().join(batches[name] for name in wanted), np.uint8).reshape(-1, 3073)
    if records[:, 0].max() > 9:
        raise ValueError(f"{path} has a label of {records[:, 0].max()}; CIFAR-10's are 0..9")
    return records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0]


def load_npy(path, split):
    """Images and labels of a FILE.npy: see load_dataset."""
    if not path.exists():
        raise WrongChoice(f"there is no {path}")
    labelled = path.with_suffix(".labels.npy").exists()
    if split == "test" and path.with_suffix(".test.npy").exists():
        path = path.with_suffix(".test.npy")
    elif split == "test":
        say(f"there is no {path.with_suffix('.test.npy')}: {path} itself is taken for the test split", done=True)
    images = read_npy(path)
    if images.dtype != np.uint8:
        raise ValueError(f"{path} holds {images.dtype}; it must hold uint8 pixels, 0..255")
    if images.ndim == 3:
        images = images[:, None]
    elif images.ndim == 4 and images.shape[1] not in (1, 3) and images.shape[3] in (1, 3):
        images = images.transpose(0, 3, 1, 2)
    if images.ndim != 4 or images.shape[1] not in (1, 3) or images.size == 0:
        raise ValueError(f"{path} has shape {images.shape}; it must be (N, H, W), (N, H, W, 1 or 3) or (N, 1 or 3, H, W)")
    labels, beside = np.zeros(len(images), np.int64), path.with_suffix(".labels.npy")
    if beside.exists():
        labels = read_npy(beside)
        if labels.shape != (len(images),) or labels.dtype.kind not in "iu":
            raise ValueError(f"{beside} must hold {len(images)} whole numbers, a label for each image of {path}; "
                             f"it holds {labels.dtype} {labels.shape}")
        if labels.min() < 0 or labels.max() > 65535:
            raise ValueError(f"{beside} has labels from {labels.min()} to {labels.max()}; they must count from 0")
    elif labelled:
        raise ValueError(f"there is no {beside}, and the training images have labels")
    return torch.from_numpy(images.copy()), torch.from_numpy(labels.astype(np.int64))


def read_npy(path):
    """An .npy array, never unpickled; mapped into memory, so that its header cannot ask for more than the file holds."""
    with damaged(f"{path} is no readable .npy file"):
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(array, np.memmap) or array.offset + array.nbytes != os.path.getsize(path):
            raise ValueError("not one array of the file's length")
    return np.asarray(array)


# -------------------------------------------------------------------------------------------------------- finding files


def find(name, filename, checksum, root, read):
    """read(path, checksum) of a data set's file: from the data folder, a system package, or the web, whichever is good."""
    dataset, home, tried = DATASETS[name], Path(root) / name, []
    for folder in (home, Path(root), *map(Path, dataset.folders)):
        for path in (folder / f"{filename}.gz", folder / filename):
            if path.is_file():
                try:
                    return read(path, checksum)
                except (ValueError, OSError) as error:
                    print(f"not used: {error}", file=sys.stderr)
                    tried.append(f"{path} ({error})")
        tried.append(str(folder))
    for mirror in dataset.mirrors:
        url, path = f"{mirror}{filename}.gz", home / f"{filename}.gz"
        try:
            return fetch(url, path, lambda part: read(part, checksum))
        except (OSError, ValueError, http.client.HTTPException) as error:
            say(f"{url}: {error}", done=True)
            tried.append(f"{url} ({error})")
    package = f"install the Debian or Ubuntu package {dataset.package}, or " if dataset.package else ""
    raise ValueError(f"no good copy of {name}'s {filename}. Ways out: {package}put {filename}.gz into {home}, or name the "
                     f"folder that holds it with --data-dir. Tried: {'; '.join(tried)}")


def fetch(url, path, read, limit=2**28):
    """Download url to `path` -> read(file). Its final name is given only to what `read` accepted.

    Each process downloads to a name of its own, so that two at once do no harm; what a killed one left goes after an hour.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for stale in path.parent.glob(f".{path.name}.*.part"):
        with contextlib.suppress(OSError):
            if time.time() - stale.stat().st_mtime > 3600:
                stale.unlink()
    part = path.parent / f".{path.name}.{os.getpid()}.part"
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as response, open(part, "wb") as file:
            total, done = int(response.headers.get("Content-Length") or 0), 0
            while piece := response.read1(2**18):
                file.write(piece)
                done += len(piece)
                if done > limit:
                    raise ValueError(f"more than {limit:,} bytes: not the file")
                say(f"{url}: {done / 1e6:.1f} MB" + (f" of {total / 1e6:.1f}" if total else ""))
            if done < total:
                raise ValueError(f"cut off after {done:,} of {total:,} bytes")
            file.flush()
            os.fsync(file.fileno())
        content = read(part)
        os.replace(part, path)
        say(f"{url}: {done / 1e6:.1f} MB, checked, now in {path}", done=True)
        return content
    finally:
        part.unlink(missing_ok=True)


_last_said = 0.0


def say(text, done=False):
    """Progress: one line that is written over in a terminal; in a log, a plain line every ten seconds and the last one."""
    global _last_said
    terminal = sys.stdout is not None and sys.stdout.isatty()
    if done or time.monotonic() - _last_said > (0.1 if terminal else 10):
        _last_said = time.monotonic()
        if terminal:                                 # the cursor waits at the left, where an error or a prompt may follow
            width = shutil.get_terminal_size().columns - 1
            text = (text if done else text[:width]).ljust(width)
        try:
            print(text, end="\r" if terminal and not done else "\n", flush=True)
        except OSError:                              # the terminal, or the other end of a pipe, is gone: the work goes on
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# -------------------------------------------------------------------------------------------------------- writing files


@contextlib.contextmanager
def atomic(path):
    """A file to write to, which gets its name `path` only when all is written; until then an older file keeps it."""
    target = os.path.realpath(path)                  # a link stays a link
    part = f"{target}.part"
    try:
        if os.path.exists(target) and not os.path.isfile(target):
            raise OSError(errno.EINVAL, "is not a regular file")
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, target)
    except OSError as error:
        raise OSError(error.errno or errno.EIO, error.strerror or str(error), str(path)) from None
    finally:
        with contextlib.suppress(OSError):
            os.unlink(part)


def keep_older(path):
    """Give the file that a new one would replace another name: ddpm.1.pt, ddpm.2.pt, ..."""
    stem, suffix = os.path.splitext(path)
    for kept in (f"{stem}.{k}{suffix}" for k in range(1, 10**6)):
        if not os.path.exists(kept):
            try:
                os.link(os.path.realpath(path), kept)        # two names for a moment: `path` is there all the time
            except FileExistsError:                          # another process was faster
                continue
            except OSError:                                  # a file system without links
                shutil.copy2(path, kept)
            break
    say(f"{path} was there already and is now {kept}", done=True)


def check_writable(path):
    """WrongChoice now, rather than an OSError after hours of work, if `path` could not be written."""
    try:
        if os.path.exists(path) and not (os.path.isfile(path) and os.access(path, os.W_OK)):
            raise OSError(errno.EINVAL, "it is not a file, or is write-protected")
        with tempfile.TemporaryFile(dir=os.path.dirname(os.path.realpath(path))):
            pass
    except OSError as error:
        raise WrongChoice(f"{path} cannot be written: {error.strerror}") from None


def grid(images, columns=None):
    """uint8 (N, C, H, W) -> one picture (rows H, columns W, C), row by row; columns: about as many as rows. Rest: black."""
    images = (images if images.dtype == torch.uint8 else to_pixels(images)).cpu()
    N, C, H, W = images.shape
    if N == 0:
        raise ValueError("no images to draw")
    columns = min(columns or math.ceil(math.sqrt(N)), N)
    rows = math.ceil(N / columns)
    cells = torch.cat([images, images.new_zeros(rows * columns - N, C, H, W)]).reshape(rows, columns, C, H, W)
    return cells.permute(0, 3, 1, 4, 2).reshape(rows * H, columns * W, C).numpy()


def save_image(path, images, columns=None):
    """Images (N, C, H, W), uint8 or float in [-1, 1], C 1 or 3, as one grid; the suffix says how: .pgm, .ppm or .png.

    .pgm is for grey, .ppm turns grey into colour. ValueError for another suffix or number of channels.
    """
    picture, suffix = grid(images, columns), check_suffix(path, (".pgm", ".ppm", ".png"))
    if picture.shape[2] not in (1, 3) or (suffix == ".pgm" and picture.shape[2] == 3):
        raise ValueError(f"{path}: images of {picture.shape[2]} channels; .pgm is for 1, .ppm and .png for 1 or 3")
    if suffix == ".ppm":
        picture = np.broadcast_to(picture, picture.shape[:2] + (3,))
    with atomic(path) as file:
        if suffix == ".png":
            file.write(png([picture]))
        else:
            file.write(f"P{6 if suffix == '.ppm' else 5}\n{picture.shape[1]} {picture.shape[0]}\n255\n".encode())
            file.write(picture.tobytes())


def save_movie(path, frames, columns=None, seconds=4.0, hold=2.0):
    """Frames, each (N, C, H, W), as an animated PNG of `seconds`, whose last frame stays for `hold` seconds more."""
    check_suffix(path, (".png",))
    with atomic(path) as file:
        file.write(png([grid(frame, columns) for frame in frames], seconds / max(len(frames), 1), hold))


def check_suffix(path, allowed):
    """The suffix of a file's name, in small letters; WrongChoice unless it is one of `allowed`."""
    suffix = Path(path).suffix.lower()
    if suffix not in allowed:
        raise WrongChoice(f"{path}: the file name must end in {' or '.join(allowed)}")
    return suffix


def png(pictures, delay=0.0, hold=0.0):
    """Pictures (H, W, 1 or 3) uint8 as the bytes of a PNG file; more than one make an animation (APNG), `delay` s each."""
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    H, W, C = pictures[0].shape
    chunks = [b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", struct.pack(">IIBBBBB", W, H, 8, 0 if C == 1 else 2, 0, 0, 0))]
    if len(pictures) > 1:
        chunks.append(chunk(b"acTL", struct.pack(">II", len(pictures), 0)))                          # 0: play for ever
    for k, picture in enumerate(pictures):
        rows = np.concatenate([np.zeros((H, 1), np.uint8), picture.reshape(H, W * C)], axis=1)       # filter 0 in each row
        body = zlib.compress(rows.tobytes(), 9)
        if len(pictures) > 1:
            milliseconds = round(1000 * (delay + (hold if k == len(pictures) - 1 else 0)))
            chunks.append(chunk(b"fcTL", struct.pack(">IIIIIHHBB", max(2 * k - 1, 0), W, H, 0, 0, milliseconds, 1000, 0, 0)))
        chunks.append(chunk(b"fdAT", struct.pack(">I", 2 * k) + body) if k > 0 else chunk(b"IDAT", body))
    return b"".join(chunks + [chunk(b"IEND", b"")])
