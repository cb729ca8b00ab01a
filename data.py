"""Pixels in, pixels out: IDX, CIFAR-10 and .npy files become uint8 tensors, images become pictures.

No more of a file is read than its header can justify, no pickle is loaded, no download is trusted
before its checksum, and nothing half-written ever has its final name. Whatever is wrong with a file
is a ValueError that names it.
"""
import contextlib
import errno
import gzip
import hashlib
import http.client
import io
import math
import os
import re
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
    classes: tuple          # names of the labels 0, 1, ..
    mirrors: tuple          # web addresses, to which a file's name and .gz are appended
    files: dict             # split -> ((name, checksum), ..): SHA-256 of the IDX file, unzipped, or
                            #          MD5 of CIFAR-10's archive
    folders: tuple = ()     # where else the files may be, relative to --data-dir
    hint: str = ""          # how else to get them
    flip: bool = False      # whether a mirrored image is as good an image


def idx_files(*sha256):
    """The four files of MNIST and of data sets laid out like it, with their checksums."""
    names = [f"{kind}-{content}-ubyte" for kind in ("train", "t10k")
             for content in ("images-idx3", "labels-idx1")]
    files = tuple(zip(names, sha256, strict=True))
    return {"train": files[:2], "test": files[2:]}


DATASETS = {
    "fashion-mnist": Dataset(
        classes=("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt",
                 "Sneaker", "Bag", "Ankle boot"),
        mirrors=("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
                 "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/"),
        files=idx_files("c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
                        "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
                        "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
                        "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"),
        folders=("FashionMNIST/raw", "/usr/share/datasets/fashion-mnist"),
        hint="install the Debian or Ubuntu package dataset-fashion-mnist"),
    "mnist": Dataset(
        classes=tuple("0123456789"),
        mirrors=("https://ossci-datasets.s3.amazonaws.com/mnist/",
                 "https://storage.googleapis.com/cvdf-datasets/mnist/"),
        files=idx_files("ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
                        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
                        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
                        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"),
        folders=("MNIST/raw",)),
    "cifar10": Dataset(
        classes=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship",
                 "truck"),
        mirrors=("https://www.cs.toronto.edu/~kriz/",),
        files=dict.fromkeys(("train", "test"),
                            (("cifar-10-binary.tar", "c32a1d4ab5d03f1284b67883e8d87530"),)),
        hint="it must be the binary version, still zipped, not the Python version", flip=True),
}
EXCERPT = Path(__file__).parent / "assets"      # a tenth of Fashion-MNIST (MIT licence, Zalando SE)
TIMEOUT = 5                                     # seconds that a server may be silent
LARGEST = 2**31                                 # bytes: no file that unpacks to more is read
LARGEST_SIDE = 2**14                            # pixels
IDX_TYPES = {8: ">u1", 9: ">i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}
OWN_PICTURES = 'README.md, "Your own pictures", has the lines that make a FILE.npy'


# ------------------------------------------------------------------------------------------ pixels


def to_model(images):
    """uint8 0..255 -> float32 in [-1, 1], linearly (Section 3.3)."""
    return images.float() / 127.5 - 1


def to_pixels(x):
    """float in [-1, 1] -> uint8, by rounding: truncation would change 63 of 256 grey levels."""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


# ---------------------------------------------------------------------------------------- data sets


def load_dataset(name, split="train", root="data"):
    """-> images uint8 (N, C, H, W), labels int64 (N,) in 0..K-1; split is "train" or "test".

    name is one of DATASETS, or a file: a FILE.npy of uint8 (N, H, W), (N, H, W, C) or (N, C, H, W)
    with C = 1 or 3, beside it FILE.labels.npy, FILE.test.npy and FILE.test.labels.npy if there are
    any; or an IDX file, beside it the others under their usual names. ValueError says what to do.
    """
    return load_with_classes(name, split, root)[:2]


def load_with_classes(name, split="train", root="data", only=None):
    """load_dataset's images and labels, and the names of the K classes; `only` those of a class."""
    if split not in ("train", "test"):
        raise ValueError(f"split must be train or test, not {split!r}")
    if name in DATASETS:
        where, classes = name, DATASETS[name].classes
        images, labels, known = *load_named(name, split, root), np.arange(len(classes))
    else:
        where = Path(name).expanduser()
        images, labels, known = load_file(where, split)
        classes = tuple(str(value) for value in known)
    images = as_images(images, where)
    labels = as_labels(labels, known, len(images), where)
    if only is not None:
        chosen = labels == find_label(only, classes)
        if not chosen.any():
            raise ValueError(f"{name} ({split}) has no image of {only!r}")
        images, labels = images[chosen], labels[chosen]
    return images, labels, classes


def load_named(name, split, root):
    """Images and labels of one of DATASETS, as arrays."""
    files = DATASETS[name].files[split]
    if name == "cifar10":
        return find_file(name, *files[0], root, lambda path, md5: read_cifar10(path, split, md5))
    try:
        return [find_file(name, *file, root, read_idx) for file in files]
    except ValueError:
        if name != "fashion-mnist" or not (EXCERPT / f"{files[0][0]}.gz").exists():
            raise
    progress("using the tenth of Fashion-MNIST that comes with this project: samples get a little "
             f"worse (see the README). For all of it, {DATASETS[name].hint}, or put its four .gz "
             f"files into {Path(root) / name}", final=True)
    return [read_idx(EXCERPT / f"{filename}.gz") for filename, _ in files]


def load_file(path, split):
    """Arrays from one's own file: images, labels or None, and the values that labels can have."""
    suffix = path.suffix.lower()
    if suffix != ".npy" and "ubyte" not in path.name.lower():
        raise ValueError(f"{path} is no data set: use {', '.join(DATASETS)}, a FILE.npy or an IDX "
                         f"file (FILE-idx3-ubyte.gz). {OWN_PICTURES}")
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    read = read_npy if suffix == ".npy" else read_idx

    def beside(path, kind):
        if suffix == ".npy":
            return path.with_suffix(f".{kind}.npy")
        name = path.name.replace("train", "t10k") if kind == "test" else (
            path.name.replace("images", "labels").replace("idx3", "idx1"))
        return path.with_name(name if name != path.name else f"no {kind} file")

    known = np.unique(read(beside(path, "labels"))) if beside(path, "labels").is_file() else None
    if split == "test" and beside(path, "test").is_file():
        path = beside(path, "test")
    elif split == "test":
        progress(f"there is no {beside(path, 'test')}: {path} is its own test split", final=True)
    if known is None:
        return read(path), None, np.zeros(1, np.int64)
    if not beside(path, "labels").is_file():
        raise ValueError(f"there is no {beside(path, 'labels')}, but training images have labels")
    return read(path), read(beside(path, "labels")), known


def as_images(array, where):
    """An array as uint8 pixels (N, C, H, W), not copied. ValueError says what would mend it."""
    shape = array.shape
    if array.dtype != np.uint8:
        raise ValueError(f"{where} holds {array.dtype}, not uint8 pixels 0..255: floats in 0..1 "
                         "become that by (255 * x).round().astype(np.uint8), 16 bits by x // 257")
    if array.ndim == 2:
        side = math.isqrt(shape[1])
        raise ValueError(f"{where} has shape {shape}: x.reshape(-1, {side}, {shape[1] // side})?")
    if array.ndim == 3 and (shape[0] == 3 or shape[2] <= 4):
        raise ValueError(f"{where} has shape {shape}: save x[None] if that is one colour picture, "
                         f"x[:, None] if it is {shape[0]} grey ones")
    if array.ndim == 4 and shape[1] in (1, 3) and shape[3] in (1, 3):
        raise ValueError(f"{where} has shape {shape}: save x.transpose(0, 2, 3, 1) if the channels "
                         "come first, x.transpose(0, 3, 1, 2) if last")
    images = torch.from_numpy(array[:, None] if array.ndim == 3 else array)
    if images.ndim == 4 and images.shape[1] not in (1, 3):
        images = images.permute(0, 3, 1, 2)
    if images.ndim != 4 or images.shape[1] not in (1, 3) or images.numel() == 0:
        raise ValueError(f"{where} has shape {shape}; it must be (N, H, W), (N, H, W, C) or "
                         f"(N, C, H, W), with C = 1 or 3. {OWN_PICTURES}")
    if max(images.shape[2:]) > LARGEST_SIDE:
        raise ValueError(f"{where} has images with a side above {LARGEST_SIDE} pixels")
    if (brightest := int(images[:1000].max())) < 32:
        progress(f"warning: the brightest pixel of {where} is {brightest} of 255. Pixels in 0..1 "
                 "must be multiplied by 255", final=True)
    return images


def as_labels(labels, known, n, where):
    """Labels (n,) as indices into the sorted values `known`; None: all 0."""
    if labels is None:
        return torch.zeros(n, dtype=torch.int64)
    if labels.shape == (n, 1):
        labels = labels[:, 0]
    if labels.shape != (n,) or labels.dtype.kind not in "iubUS":
        raise ValueError(f"the labels of {where} are {labels.dtype} {labels.shape}; they must be "
                         f"{n} whole numbers or strings, one per image")
    if len(unknown := np.setdiff1d(labels, known)) > 0:
        raise ValueError(f"the labels of {where} have {unknown[:9]}, not among {known[:99]}")
    return torch.from_numpy(np.searchsorted(known, labels))


def find_label(text, classes):
    """The index of a class given by its name, in any case, or by its index."""
    names = [name.lower() for name in classes]
    if text.lower() in names:
        return names.index(text.lower())
    if text.isdecimal() and int(text) < len(classes):
        return int(text)
    raise ValueError(f"no label {text!r}: use an index 0..{len(classes) - 1} or one of "
                     f"{', '.join(classes[:100])}")


def fingerprint(images, labels):
    """A short text that tells one data set from another, wherever its files are."""
    some = images[torch.linspace(0, len(images) - 1, min(len(images), 1000)).long()]
    content = some.contiguous().numpy().tobytes() + labels.numpy().tobytes()
    return hashlib.sha256(f"{tuple(images.shape)}".encode() + content).hexdigest()[:16]


# ----------------------------------------------------------------------------------- reading files


@contextlib.contextmanager
def named_errors(path):
    """Whatever goes wrong inside, but for the disk's own errors, is a ValueError about `path`."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:
            raise
        raise ValueError(f"{path} is damaged: {error}") from None
    except Exception as error:  # noqa: BLE001      numpy's and torch's readers fail in many ways
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path}: {reason[:200]}") from None


def read_at_most(file, size):
    """Up to `size` bytes, in pieces, so that a header's lie about its size costs no memory."""
    pieces = []
    while size > 0 and (piece := file.read(min(size, 2**22))):
        pieces.append(piece)
        size -= len(piece)
    return b"".join(pieces)


def unzipped(file):
    """The open file, through gzip if its first two bytes say so."""
    zipped = file.read(2) == b"\x1f\x8b"
    file.seek(0)
    return gzip.GzipFile(fileobj=file) if zipped else file


def read_idx(path, sha256=None):
    """An IDX file, plain or gzipped -> ndarray. ValueError unless it is just what its header says.

    IDX: two zero bytes, a type, the number of dimensions, each dimension in 4 bytes, the values,
    all big-endian. sha256 (hex), if given, is that of the unzipped file.
    """
    with named_errors(path), open(path, "rb") as raw:
        file = unzipped(raw)
        head = read_at_most(file, 4)
        if len(head) < 4 or head[:2] != b"\0\0" or head[2] not in IDX_TYPES or head[3] == 0:
            raise ValueError(f"not an IDX file, it starts with {head!r}")
        dtype, dimensions = np.dtype(IDX_TYPES[head[2]]), read_at_most(file, 4 * head[3])
        if len(dimensions) < 4 * head[3]:
            raise ValueError("cut short within its header")
        shape = struct.unpack(f">{head[3]}I", dimensions)
        size = math.prod(shape) * dtype.itemsize
        if size > min(LARGEST, 1100 * os.path.getsize(path)):       # gzip shrinks by 1032 at best
            raise ValueError(f"announces {size:,} bytes, more than a file of its length can hold")
        values = read_at_most(file, size + 1)
        if len(values) != size:
            raise ValueError("cut short" if len(values) < size else f"goes on after {size:,} bytes")
        if sha256 and hashlib.sha256(head + dimensions + values).hexdigest() != sha256:
            raise ValueError("wrong checksum (SHA-256)")
        array = np.frombuffer(bytearray(values), dtype).reshape(shape)
        return array.astype(dtype.newbyteorder("="), copy=False)


def read_cifar10(path, split="train", md5=None):
    """CIFAR-10's binary archive, read in memory -> images (N, 3, 32, 32), labels (N,), uint8.

    A record is a label and 3 x 32 x 32 pixels. Five data_batch files are the training split.
    """
    names = [f"data_batch_{k}" for k in range(1, 6)] if split == "train" else ["test_batch"]
    wanted = [f"{name}.bin" for name in names]
    batches = {}
    with named_errors(path), open(path, "rb") as raw:
        if md5 and hashlib.md5(raw.read(2**28), usedforsecurity=False).hexdigest() != md5:
            raise ValueError("wrong checksum (MD5)")
        raw.seek(0)
        content = read_at_most(unzipped(raw), 2**28 + 1)            # the real one is 184 MB
        if len(content) > 2**28:
            raise ValueError("unpacks to more than CIFAR-10 is")
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as archive:
            for member in archive:
                name = member.name.rpartition("/")[2]
                if name in wanted and member.isreg():
                    batches[name] = archive.extractfile(member).read()
        if any(len(batches.get(name, b"")) == 0 or len(batches[name]) % 3073 for name in wanted):
            raise ValueError(f"no CIFAR-10 binary archive: no good {', '.join(wanted)}")
        joined = bytearray().join(batches[name] for name in wanted)
        records = np.frombuffer(joined, np.uint8).reshape(-1, 3073)
        return records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0]


def read_npy(path):
    """An .npy array, never unpickled, and mapped: a header cannot ask for more than there is."""
    with named_errors(path):
        with open(path, "rb") as file:
            if (start := file.read(6)) != b"\x93NUMPY":
                raise ValueError(f"not an .npy file, it starts with {start!r}")
            if b"|O" in file.read(200):
                raise ValueError("holds Python objects: are the images of different sizes?")
        array = np.load(path, mmap_mode="c", allow_pickle=False)    # refuses Python objects
        if array.offset + array.nbytes != os.path.getsize(path):
            raise ValueError("not one array of the file's length")
        return np.asarray(array)


def find_file(name, filename, checksum, root, read):
    """read(path, checksum) of a data set's file, from the first place that has a good one: the data
    folder, other programs' folders, a system package, the web."""
    dataset, tried = DATASETS[name], []
    names = [f"{filename}.gz"]
    if not filename.endswith(".tar"):                   # its checksum is that of the .gz
        dotted = filename.replace("-idx", ".idx")
        names += [filename, dotted, f"{dotted}.gz"]
    for folder in (name, "", *dataset.folders):
        for path in (Path(root) / folder / each for each in names):
            try:
                if path.is_file():
                    return read(path, checksum)
            except (ValueError, OSError) as error:
                progress(f"not used: {error}", final=True)
        tried.append(str(Path(root) / folder))
    for mirror in dataset.mirrors:
        if mirror in _unreachable:
            continue
        url, path = f"{mirror}{filename}.gz", Path(root) / name / f"{filename}.gz"
        try:
            return fetch(url, path, lambda part: read(part, checksum))
        except (OSError, ValueError, http.client.HTTPException) as error:
            progress(f"not used: {url} ({str(error)[:200]})", final=True)
            _unreachable.add(mirror)
    raise ValueError(f"no good copy of {name}'s {filename}. Ways out: put {filename}.gz into "
                     f"{Path(root) / name}, or name its folder with --data-dir"
                     f"{dataset.hint and '; '}{dataset.hint}. Tried: {', '.join(tried)}, "
                     f"{', '.join(dataset.mirrors)}")


_unreachable: set = set()               # mirrors that failed once are not waited for again


def fetch(url, path, read, limit=2**28):
    """Download url to `path` -> read(file). It gets that name only after `read` accepted it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with (urllib.request.urlopen(url, timeout=TIMEOUT) as response,
          atomic(path, part=f".{os.getpid()}.part") as file):       # two processes may download it
        total, size = int(response.headers.get("Content-Length") or 0), 0
        while piece := response.read1(2**18):
            file.write(piece)
            size += len(piece)
            if size > limit:
                raise ValueError(f"more than {limit:,} bytes: not the file")
            progress(f"{url}: {size / 1e6:.1f} MB" + (f" of {total / 1e6:.1f}" if total else ""))
        if size < total:
            raise ValueError(f"cut off after {size:,} of {total:,} bytes")
        file.flush()
        content = read(file.name)
    progress(f"{url}: {size / 1e6:.1f} MB, checked, now in {path}", final=True)
    return content


# ------------------------------------------------------------------------- progress, writing files


def progress(text, final=False):
    """A line that is written over in a terminal, or one every ten seconds in a log; a final one
    stays. It is no error if nobody listens any more."""
    terminal = sys.stdout is not None and sys.stdout.isatty()
    if final or time.monotonic() - progress.last > (0.1 if terminal else 10):
        progress.last = time.monotonic()
        if terminal:
            width = shutil.get_terminal_size().columns - 1
            text = (text if final else text[:width]).ljust(width)
        with contextlib.suppress(OSError):
            print(text, end="\r" if terminal and not final else "\n", flush=True)


progress.last = 0.0


@contextlib.contextmanager
def atomic(path, part=".part"):
    """A file to write to. It gets its name when all is written; an older one has it until then."""
    target = os.path.realpath(path)                     # a link stays a link
    try:
        if os.path.exists(target) and not os.path.isfile(target):
            raise OSError(errno.EINVAL, "is not a regular file")
        with open(target + part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(target + part, target)
    except OSError as error:
        raise OSError(error.errno or errno.EIO, error.strerror or str(error), str(path)) from None
    finally:
        with contextlib.suppress(OSError):
            os.unlink(target + part)


def keep_older(path):
    """Keep the file at `path`, which a new one will replace, as FILE.old, FILE.old2, .."""
    names = (f"{path}.old{k if k > 1 else ''}" for k in range(1, 10**6))
    kept = next(name for name in names if not os.path.exists(name))
    shutil.copy2(path, kept)
    progress(f"{path} was there already and is now {kept}", final=True)


def check_outputs(outputs, inputs):
    """ValueError, before any work, for an output that cannot be written or is used otherwise."""
    taken = {os.path.realpath(path).casefold() for path in inputs if path}
    for path in filter(None, outputs):
        place = os.path.realpath(path).casefold()       # A.png and a.png may be one file
        if place in taken:
            raise ValueError(f"{path} is used twice by this command: choose another name")
        taken.add(place)
        try:
            if os.path.exists(path) and not (os.path.isfile(path) and os.access(path, os.W_OK)):
                raise OSError(errno.EINVAL, "it is not a file, or is write-protected")
            with tempfile.TemporaryFile(dir=os.path.dirname(os.path.realpath(path))):
                pass
        except OSError as error:
            raise ValueError(f"{path} cannot be written: {error.strerror}") from None


def grid(images, columns=None, gap=2, zoom=1):
    """Images (N, C, H, W) -> one picture (h, w, C) uint8, row by row, `gap` white pixels apart."""
    images = (images if images.dtype == torch.uint8 else to_pixels(images)).cpu()
    N, C = images.shape[:2]
    if N == 0:
        raise ValueError("no images to draw")
    columns = min(columns or math.ceil(math.sqrt(N)), N)
    rows = math.ceil(N / columns)
    images = images.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    images = torch.nn.functional.pad(images, (0, gap, 0, gap), value=255)
    missing = images.new_full((rows * columns - N, *images.shape[1:]), 255)
    cells = torch.cat([images, missing]).unflatten(0, (rows, columns))
    picture = cells.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    return picture[:picture.shape[0] - gap, :picture.shape[1] - gap].contiguous().numpy()


def save_image(path, images, columns=None, gap=2, zoom=1):
    """Images (N, C, H, W), uint8 or float in [-1, 1], as one grid. The suffix says how: .pgm for
    C = 1, .ppm for C = 3 (1 becomes 3), .png for both. ValueError for anything else."""
    picture, suffix = grid(images, columns, gap, zoom), check_suffix(path, (".pgm", ".ppm", ".png"))
    if picture.shape[2] not in (1, 3) or (suffix == ".pgm" and picture.shape[2] == 3):
        raise ValueError(f"{path}: {picture.shape[2]} channels; .pgm takes 1, .ppm and .png 1 or 3")
    if suffix == ".ppm":
        picture = np.broadcast_to(picture, picture.shape[:2] + (3,))
    with atomic(path) as file:
        if suffix == ".png":
            file.write(png([picture]))
        else:
            kind = "P6" if suffix == ".ppm" else "P5"
            file.write(f"{kind}\n{picture.shape[1]} {picture.shape[0]}\n255\n".encode())
            file.write(picture.tobytes())


def save_movie(path, frames, columns=None, gap=2, zoom=1, seconds=4.0, hold=2.0):
    """Frames, each (N, C, H, W), as an animated PNG of `seconds`; the last is held longer."""
    check_suffix(path, (".png",))
    pictures = [grid(frame, columns, gap, zoom) for frame in frames]
    with atomic(path) as file:
        file.write(png(pictures, seconds / max(len(frames), 1), hold))


def check_suffix(path, allowed):
    """The suffix of a file's name in small letters. ValueError unless it is one of `allowed`."""
    suffix = Path(path).suffix.lower()
    if suffix not in allowed:
        raise ValueError(f"{path}: the file name must end in {' or '.join(allowed)}")
    return suffix


def png(pictures, delay=0.0, hold=0.0):
    """Pictures (H, W, 1 or 3) uint8 as the bytes of a PNG; several make an animation (APNG)."""
    def chunk(kind, body):
        checksum = zlib.crc32(kind + body)
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum)

    H, W, C = pictures[0].shape
    header = struct.pack(">IIBBBBB", W, H, 8, 0 if C == 1 else 2, 0, 0, 0)  # 8 bits, grey or RGB
    chunks = [b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", header)]
    if len(pictures) > 1:
        chunks.append(chunk(b"acTL", struct.pack(">II", len(pictures), 0)))     # 0: for ever
    for k, picture in enumerate(pictures):
        filters = np.zeros((H, 1), np.uint8)            # each row starts with its filter: none
        rows = np.concatenate([filters, picture.reshape(H, W * C)], axis=1)
        body = zlib.compress(rows.tobytes(), 9)
        if len(pictures) > 1:
            milliseconds = round(1000 * (delay + (hold if k == len(pictures) - 1 else 0)))
            frame = (max(2 * k - 1, 0), W, H, 0, 0, milliseconds, 1000, 0, 0)
            chunks.append(chunk(b"fcTL", struct.pack(">IIIIIHHBB", *frame)))
        first = chunk(b"IDAT", body)
        chunks.append(first if k == 0 else chunk(b"fdAT", struct.pack(">I", 2 * k) + body))
    return b"".join([*chunks, chunk(b"IEND", b"")])
