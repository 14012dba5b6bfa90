"""Data sets in every format: round trips, foreign files, checks, conversion, the command line, and hostile files."""

import io
import os
import pickle
import struct
import sys
import tarfile
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from numpy.testing._private.utils import runstring
from tensorboard.compat.tensorflow_stub import pywrap_tensorflow
from torch.utils.data import DataLoader, Dataset

import recognition.test as verification
from recognition.augment import Augmentation
from recognition.backbones import build_backbone
from recognition.benchmark_sets import embed_pairs
from recognition.datasets import IdentityDataset, read_training_set
from tests.malicious import Call
from utils.config import UserError, command_line
from utils.data.__main__ import main
from utils.data.formats import recordio, writers
from utils.data.formats.check import check_images
from utils.data.formats.crc32c import crc32c, masked_crc32c
from utils.data.formats.labelled import FileParts
from utils.data.formats.pairs import draw_pairs, read_bin, read_pairs, write_bin
from utils.data.formats.recognise import open_images, open_labelled
from utils.data.formats.tfrecord import feature
from utils.data.formats.writers import write_labelled
from utils.images import decode_image, encode_image, write_image

FORMATS = ("folders", "tfrecord", "rec", "webdataset")


def noise(seed: int, size: int = 16) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (size, size, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def faces(tmp_path_factory) -> Path:
    """Class folders of 4 identities with 3, 1, 5 and 2 images in three encodings, one of them a folder deeper."""
    root = tmp_path_factory.mktemp("faces")
    seed = 0
    for identity, count in {"0012": 3, "Bo Lee": 1, "ann": 5, "müller": 2}.items():
        for k in range(count):
            seed += 1
            folder = root / identity / "more" if (identity, k) == ("ann", 4) else root / identity
            write_image(folder / f"{identity}_{k + 1:04d}{('.png', '.jpg', '.webp')[k % 3]}", noise(seed))
    return root


def content(data) -> list[tuple[str, int, str, bytes]]:
    """What must survive a round trip: names, labels, identities, bytes."""
    return [
        (name, int(label), data.identities[label], data.encoded(i))
        for i, (name, label) in enumerate(zip(data.names, data.labels, strict=True))
    ]


def written(faces: Path, tmp_path: Path, to: str, **kwargs) -> Path:
    out = tmp_path / f"set.{to}"
    write_labelled(open_labelled(faces), out, to, **kwargs)
    return out


# Round trips


@pytest.mark.parametrize("images_per_shard", [4, 100])
@pytest.mark.parametrize("to", FORMATS)
def test_every_format_keeps_bytes_labels_names_and_identities(faces, tmp_path, to, images_per_shard) -> None:
    source = open_labelled(faces)
    assert source.labels.tolist() == [0, 0, 0, 1, 2, 2, 2, 2, 2, 3, 3]
    data = open_labelled(written(faces, tmp_path, to, images_per_shard=images_per_shard))
    assert data.identities == ["0012", "Bo Lee", "ann", "müller"]
    assert content(data) == content(source)
    assert np.array_equal(data.pixels(10), source.pixels(10))
    shards = len([p for p in tmp_path.rglob("*0*") if p.suffix in (".tar", ".tfrecord")])
    assert shards == (0 if to in ("folders", "rec") else 3 if images_per_shard == 4 else 1)


def test_through_all_formats_and_back(faces, tmp_path) -> None:
    path = faces
    for number, to in enumerate(("webdataset", "rec", "tfrecord", "folders")):
        write_labelled(open_labelled(path), tmp_path / str(number), to, images_per_shard=3)
        path = tmp_path / str(number)
    files = {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*.*") if p.name != writers.RECORD}
    assert files == {p.relative_to(faces).as_posix(): p.read_bytes() for p in faces.rglob("*.*")}


class Encoded(Dataset):
    def __init__(self, data) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> bytes:
        return self.data.encoded(index)


@pytest.mark.parametrize("to", FORMATS)
def test_forked_and_spawned_workers_read_the_same(faces, tmp_path, to) -> None:
    data = open_labelled(written(faces, tmp_path, to, images_per_shard=4))
    expected = [data.encoded(i) for i in range(len(data))]  # the files are open now
    loader = DataLoader(Encoded(data), batch_size=None, num_workers=2, multiprocessing_context="fork")
    assert list(loader) == expected
    sent = pickle.loads(pickle.dumps(data))  # as a spawned worker gets it
    assert [sent.encoded(i) for i in range(len(sent))] == expected


def test_many_files_do_not_run_out_of_descriptors(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("utils.data.formats.labelled.MAX_OPEN_FILES", 2)
    paths = [tmp_path / str(k) for k in range(5)]
    for k, path in enumerate(paths):
        path.write_bytes(bytes([k]))
    parts = FileParts(paths)
    assert [parts.read(k, 0, 1)[0] for k in (4, 3, 2, 1, 0, 4, 3)] == [4, 3, 2, 1, 0, 4, 3]
    assert len(parts._open) == 2


# Name lists


@pytest.mark.parametrize("name", ["image_names.pkl", "image_names.txt", "elsewhere/list.pkl"])
def test_name_lists(faces, tmp_path, name, caplog) -> None:
    root = tmp_path / "root"
    write_labelled(open_labelled(faces), root / "casia", "folders")
    names = [r".\casia\ann\ann_0002.jpg", "casia/0012/0012_0001.png", "casia/ann/ann_0001.png", "casia/ann/gone.jpg"]
    path = tmp_path / name if "/" in name else root / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(pickle.dumps(names) if name.endswith("pkl") else "\n".join(names).encode())
    data = open_labelled(path, root) if "/" in name else open_labelled(root)
    assert data.names == ["casia/ann/ann_0002.jpg", "casia/0012/0012_0001.png", "casia/ann/ann_0001.png"]
    assert data.identities == ["casia/0012", "casia/ann"] and data.labels.tolist() == [1, 0, 1]
    assert data.encoded(0) == (faces / "ann/ann_0002.jpg").read_bytes()
    assert "1 names without an image are left out, first casia/ann/gone.jpg" in caplog.text
    write_labelled(data, tmp_path / "flat", "folders")
    assert open_labelled(tmp_path / "flat").names == [
        "casia_0012/0012_0001.png",
        "casia_ann/ann_0001.png",
        "casia_ann/ann_0002.jpg",
    ]
    write_labelled(data, tmp_path / "rec", "rec")
    assert sorted(open_labelled(tmp_path / "rec").names) == sorted(data.names)


# TFRecord


def test_crc32c() -> None:
    assert crc32c(b"") == 0 and crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA and crc32c(b"\xff" * 32) == 0x62A8AB43  # RFC 3720, B.4
    for length in (1, 255, 256, 257, 1000):
        data = noise(length, 32).tobytes()[:length]
        assert masked_crc32c(data) == pywrap_tensorflow.masked_crc32c(data)


def protobuf_example():
    """tf.train.Example by Google's own library, from the definition of the message."""
    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="t", syntax="proto3")

    def message(name: str, *fields: tuple[str, int, int, int, str | None], oneof: bool = False) -> None:
        added = file.message_type.add(name=name)
        if oneof:
            added.oneof_decl.add(name="kind")
        for field, number, label, kind, type_name in fields:
            new = added.field.add(name=field, number=number, label=label, type=kind, type_name=type_name)
            if oneof:
                new.oneof_index = 0

    message("BytesList", ("value", 1, 3, 12, None))
    message("FloatList", ("value", 1, 3, 2, None))
    message("Int64List", ("value", 1, 3, 3, None))
    lists = [("bytes_list", 1, 1, 11, ".t.BytesList"), ("float_list", 2, 1, 11, ".t.FloatList")]
    message("Feature", *lists, ("int64_list", 3, 1, 11, ".t.Int64List"), oneof=True)
    message("Features", ("feature", 1, 3, 11, ".t.Features.FeatureEntry"))
    entry = file.message_type[-1].nested_type.add(name="FeatureEntry", options={"map_entry": True})
    entry.field.add(name="key", number=1, label=1, type=9)
    entry.field.add(name="value", number=2, label=1, type=11, type_name=".t.Feature")
    message("Example", ("features", 1, 1, 11, ".t.Features"))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("t.Example"))


def test_tensorboard_and_protobuf_read_our_tfrecords(faces, tmp_path) -> None:
    out = written(faces, tmp_path, "tfrecord", images_per_shard=4)
    example, found = protobuf_example(), []
    for number in range(3):
        path = out / "set.tfrecord" / f"set.tfrecord-{number:05d}.tfrecord"
        reader = pywrap_tensorflow.PyRecordReader_New(str(path))  # checks both checksums of each record
        while True:
            try:
                reader.GetNext()
            except pywrap_tensorflow.errors.OutOfRangeError:
                break
            features = example.FromString(reader.record()).features.feature
            found.append((features["image"].bytes_list.value[0], features["label"].int64_list.value[0]))
    data = open_labelled(faces)
    assert found == [(data.encoded(i), int(data.labels[i])) for i in range(len(data))]

    # an index line leads to its record
    name, shard, offset, label = (out / "set.tfrecord.txt").read_text().splitlines()[6].split("\t")
    record = (out / name / f"{name}-{int(shard):05d}.tfrecord").read_bytes()[int(offset) :]
    (length,) = struct.unpack("<Q", record[:8])
    assert example.FromString(record[12 : 12 + length]).features.feature["image"].bytes_list.value == [data.encoded(6)]
    assert (name, shard, label) == ("set.tfrecord", "1", "2")


def test_examples_of_other_writers(tmp_path) -> None:
    message = protobuf_example()()
    message.features.feature["before"].float_list.value.extend([1.0, 2.0])
    message.features.feature["image"].bytes_list.value.append(b"jpeg")
    message.features.feature["z"].int64_list.value.extend([-1, 2])
    data = message.SerializeToString()
    assert feature(data, b"image", "x") == b"jpeg"
    for wrong, words in ((data, "no bytes feature 'other'"), (data[:-3], "is not a tf"), (b"\x0a\xff", "is not a tf")):
        with pytest.raises(UserError, match=words):
            feature(wrong, b"other", "x")


def test_both_index_forms_alone(faces, tmp_path) -> None:
    out = written(faces, tmp_path, "tfrecord", images_per_shard=4)
    source = open_labelled(faces)
    labelled, paths = out / "set.tfrecord.txt", out / "set.tfrecord.index"
    text = paths.read_text()
    paths.unlink()
    data = open_labelled(out)
    assert data.identities == ["0000000", "0000001", "0000002", "0000003"] and data.names[3] == "0000001/0000003"
    assert [c[1::2] for c in content(data)] == [c[1::2] for c in content(source)]
    write_labelled(data, tmp_path / "folders", "folders")
    assert open_labelled(tmp_path / "folders").names[3] == "0000001/0000003.png"  # a suffix by content

    labelled.unlink()  # ADMIS: absolute paths of another machine, the number of the folder is the label
    numbered = {"0012": "10", "Bo Lee": "1", "ann/more": "9", "ann": "9", "müller": "2"}
    lines = [line.split("/", 1) for line in text.splitlines()]
    rows = [f"/data/x/{numbered[identity]}/{rest.replace('more/', '')}\n" for identity, rest in lines]
    moved = tmp_path / "indices" / paths.name
    moved.parent.mkdir()
    moved.write_text("".join(rows))
    data = open_labelled(moved, root=out)
    assert data.identities == ["1", "2", "9", "10"]
    assert data.labels.tolist() == [3, 3, 3, 0, 2, 2, 2, 2, 2, 1, 1]
    assert data.names[3] == "1/Bo Lee_0001.png" and data.encoded(3) == source.encoded(3)
    with pytest.raises(UserError, match=r"no set\.tfrecord-00000\.tfrecord in .* give the right root"):
        open_labelled(moved)


# RecordIO


def plain_records(path: Path) -> list[tuple[int, bytes]]:
    """Offset and data of each record, by the published layout, for files whose data never hold the magic."""
    raw, offset, found = path.read_bytes(), 0, []
    while offset < len(raw):
        magic, length = struct.unpack_from("<II", raw, offset)
        assert magic == 0xCED7230A and length >> 29 == 0
        found.append((offset, raw[offset + 8 : offset + 8 + length]))
        offset += 8 + -(-length // 4) * 4
    return found


def test_records_as_insightface_lays_them_out(faces, tmp_path) -> None:
    out = written(faces, tmp_path, "rec")
    source = open_labelled(faces)
    records = plain_records(out / "train.rec")
    index = [tuple(map(int, line.split("\t"))) for line in (out / "train.idx").read_text().splitlines()]
    assert index == [(key, offset) for key, (offset, _) in enumerate(records)]
    headers = [struct.unpack_from("<IfQQ", data) for _, data in records]
    assert [h[0] for h in headers] == [2] + [0] * 11 + [2] * 4
    assert struct.unpack_from("<2f", records[0][1], 24) == (12, 16)
    assert [h[1] for h in headers[1:12]] == source.labels.tolist() and [h[2] for h in headers] == list(range(16))
    assert [data[24:] for _, data in records[1:12]] == [source.encoded(i) for i in range(11)]
    assert [struct.unpack_from("<2f", data, 24) for _, data in records[12:]] == [(1, 4), (4, 5), (5, 10), (10, 12)]
    assert (out / "train.lst").read_text().splitlines()[4] == "5\t2\tann/ann_0001.png"
    assert content(open_labelled(out / "train.idx")) == content(open_labelled(out / "train.rec")) == content(source)


@pytest.mark.parametrize("identities", [True, False])
def test_records_of_other_writers(tmp_path, identities) -> None:
    """Labels as arrays, as later insightface sets have them; with identity records and without; no .lst."""
    labels, offsets = [2, 2, 0], []
    items = [recordio.pack((4.0, 6.0), 0)] if identities else []
    items += [recordio.pack((float(label), 1.0), k, b"image%d" % k) for k, label in enumerate(labels)]
    items += [recordio.pack(bounds, 9) for bounds in ((1.0, 3.0), (3.0, 4.0))] if identities else []
    with (tmp_path / "train.rec").open("wb") as file:
        for item in items:
            offsets.append(file.tell())
            recordio.write_record(file, item)
    first = 0 if identities else 1
    lines = [f"{key}\t{offset}\n" for key, offset in enumerate(offsets, start=first)]
    (tmp_path / "train.idx").write_text("".join(lines))
    data = open_labelled(tmp_path)
    assert data.labels.tolist() == labels and data.identities == ["0000000", "0000001", "0000002"]
    assert [data.encoded(i) for i in range(3)] == [b"image0", b"image1", b"image2"]
    assert data.names[0] == "0000002/0000001"


@pytest.mark.parametrize("content", [b"", b"abc", recordio.MAGIC_BYTES, b"ab" + recordio.MAGIC_BYTES * 3 + b"x"])
def test_records_that_hold_the_magic(tmp_path, content) -> None:
    with (tmp_path / "x.rec").open("wb") as file:
        for data in (b"head", content, recordio.MAGIC_BYTES + content + recordio.MAGIC_BYTES, b"tail"):
            recordio.write_record(file, data)
    raw = (tmp_path / "x.rec").read_bytes()
    aligned = sum(raw[i : i + 4] == recordio.MAGIC_BYTES for i in range(0, len(raw), 4))
    parts, offset, found, pieces = FileParts([tmp_path / "x.rec"]), 0, [], 0
    while offset < len(raw):
        found.append(recordio.read_record(parts, offset))
        while True:
            _, word = struct.unpack_from("<II", raw, offset)
            offset += 8 + -(-(word & (1 << 29) - 1) // 4) * 4
            pieces += 1
            if word >> 29 in (0, 3):
                break
    assert found == [b"head", content, recordio.MAGIC_BYTES + content + recordio.MAGIC_BYTES, b"tail"]
    assert aligned == pieces  # no magic at a multiple of 4 but those that begin a part: a scan finds every record


# WebDataset


def tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def test_shards_of_other_writers(tmp_path) -> None:
    image = encode_image(noise(0))
    members = {"./a/1.png": image, "./a/1.cls": b"7\n", "./a/1.json": b"[1]", "readme": b"x", "b.x/2.seg.png": b"no"}
    tar(tmp_path / "0.tar", {**members, "b.x/2.jpg": image, "b.x/2.cls": b"0"})
    data = open_labelled(tmp_path / "0.tar")
    assert data.names == ["a/1.png", "b.x/2.jpg"] and data.labels.tolist() == [7, 0]
    assert data.identities[7] == "a" and data.identities[0] == "b.x" and data.identities[1] == "0000001"
    tar(tmp_path / "0.tar", {"p2/1.JPG": image, "p10/1.png": image, "p2/2.png": image})
    data = open_labelled(tmp_path / "0.tar")
    assert (data.identities, data.labels.tolist()) == (["p10", "p2"], [1, 0, 1])
    with tarfile.open(tmp_path / "0.tar", "r:") as archive, archive.extractfile("p10/1.png") as member:
        assert data.encoded(1) == member.read()


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"/etc/1.jpg": b"x", "/etc/1.cls": b"0"}, r"refused: the name '/etc/1\.jpg'"),
        ({"a/../../1.jpg": b"x"}, "refused"),
        ({"1.jpg": b"x", "1.cls": b"0", "1.json": b'{"name": "../../x"}'}, "refused"),
        ({"1.jpg": b"x", "1.cls": b"0", "1.json": b"{"}, "1.json is not JSON"),
        ({"1.jpg": b"x", "1.cls": b"cat"}, "'cat'; a whole number"),
        ({"1.jpg": b"x", "1.cls": b"-1"}, "the label -1"),
        ({"1.jpg": b"x", "1.cls": b"99999999"}, "the label 99999999"),
        ({"1.jpg": b"x", "1.cls": b"0", "2.jpg": b"x"}, "2 has no label"),
        ({"1.jpg": b"x"}, "1 has no label"),
        ({"1.jpg": b"x", "1.png": b"x", "1.cls": b"0"}, "1 has 2 images"),
        ({"1.cls": b"0"}, "1 has 0 images"),
        ({}, "no images"),
    ],
)
def test_hostile_and_wrong_tar_files(tmp_path, members, words) -> None:
    with pytest.raises(UserError, match=rf"x\.tar.*{words}"):
        open_labelled(tar(tmp_path / "x.tar", members))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_in_tar_files(tmp_path, kind) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        member = tarfile.TarInfo("a/1.jpg")
        member.type, member.linkname = kind, "/etc/passwd"
        archive.addfile(member)
    with pytest.raises(UserError, match=r"x\.tar: refused: a/1\.jpg is a link or a device"):
        open_labelled(tmp_path / "x.tar")


# Verification pairs


def pairs_text(faces: Path, tmp_path: Path) -> Path:
    lines = ["1\t2", "ann\t1\t2", "0012\t1\t3", "ann\t1\t0012\t2", "müller\t1\tBo Lee\t1"]
    (tmp_path / "pairs.txt").write_text("\n".join(lines))
    return tmp_path / "pairs.txt"


def test_bin_files_by_plain_pickle(faces, tmp_path) -> None:
    pairs = read_pairs(pairs_text(faces, tmp_path), faces)
    path = write_bin(pairs, tmp_path / "x.bin")
    with path.open("rb") as file:
        images, issame = pickle.load(file, encoding="bytes")  # as insightface reads it
    assert issame == [True, True, False, False]
    names = ["ann/ann_0001.png", "ann/ann_0002.jpg", "0012/0012_0001.png", "0012/0012_0003.webp"]
    names += ["ann/ann_0001.png", "0012/0012_0002.jpg", "müller/müller_0001.png", "Bo Lee/Bo Lee_0001.png"]
    assert images == [(faces / name).read_bytes() for name in names]
    data = read_bin(path)
    assert [data.encoded(i) for i in range(8)] == images and data.issame.tolist() == issame
    assert data.pairs.tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    write_bin(data, tmp_path / "again.bin")
    assert (tmp_path / "again.bin").read_bytes() == path.read_bytes()


def test_bin_files_of_other_writers(tmp_path) -> None:
    # dumps((["\xff\xd8", "b"] * 2, [True, False]), 2) of Python 2, and numpy arrays as mxnet's scripts write them
    python2 = b"\x80\x02]q\x01(U\x02\xff\xd8U\x01bU\x02\xff\xd8U\x01be]q\x02(\x88\x89e\x86q\x03."
    arrays = ([np.frombuffer(b, np.uint8) for b in (b"\xff\xd8", b"b") * 2], np.array([True, False]))
    for data in (python2, pickle.dumps(arrays, 2), pickle.dumps(arrays, 5)):
        (tmp_path / "x.bin").write_bytes(data)
        pairs = open_images(tmp_path / "x.bin")
        assert [pairs.encoded(i) for i in range(4)] == [b"\xff\xd8", b"b"] * 2
        assert pairs.issame.tolist() == [True, False] and pairs.num_folds == 10


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (["a.jpg"], "no verification set"),
        (([b"x"] * 4, [True, "no"]), "no verification set"),
        ((["x"] * 4, [True, False]), "no verification set"),
        (([b"x"] * 3, [True, False]), "3 images and 2 flags"),
        (([b"x"] * 4, [True, True]), "2 genuine and 0 impostor"),
    ],
)
def test_wrong_bin_files(tmp_path, value, words) -> None:
    (tmp_path / "x.bin").write_bytes(pickle.dumps(value))
    with pytest.raises(UserError, match=rf"x\.bin: (holds )?{words}"):
        open_images(tmp_path / "x.bin")


def test_drawn_pairs(tmp_path) -> None:
    for k in range(40):
        for i in range(3):
            write_image(tmp_path / "src" / f"{k:02d}" / f"{i}.png", noise(1, 4))
    data = open_labelled(tmp_path / "src")
    pairs = draw_pairs(data, 4, seed=0)
    labels = data.labels[pairs.pairs]
    assert np.array_equal(labels[:, 0] == labels[:, 1], pairs.issame)
    assert pairs.issame.reshape(10, 2, 4).all(axis=2).tolist() == [[True, False]] * 10
    assert len({tuple(pair) for pair in pairs.pairs.tolist()}) == 80
    people = [set(fold.reshape(-1).tolist()) for fold in labels.reshape(10, 8, 2)]
    assert all(not a & b for i, a in enumerate(people) for b in people[:i])
    assert np.array_equal(draw_pairs(data, 4, seed=0).pairs, pairs.pairs)
    assert not np.array_equal(draw_pairs(data, 4, seed=1).pairs, pairs.pairs)
    with pytest.raises(UserError, match=r"pairs_per_fold: 13; the 4 identities of fold 1 of 10 give 12 genuine pairs"):
        draw_pairs(data, 13, seed=0)


# Hostile and damaged files


PAYLOADS = {
    "os.system": pickle.dumps(([b"x", Call(os.system, "touch pwned")], [True])),
    "eval": pickle.dumps([Call(eval, "open('pwned', 'w').close()")]),
    "numpy": pickle.dumps([Call(runstring, "open('pwned', 'w').close()", {})]),
    "numpy array": pickle.dumps(np.array([Call(os.system, "touch pwned")], dtype=object)),
}


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("place", ["x.bin", "image_names.pkl", "names.pkl", "unnamed"])
def test_malicious_pickles_run_nothing(tmp_path, monkeypatch, capsys, payload, place) -> None:
    monkeypatch.chdir(tmp_path)
    pickle.loads(PAYLOADS[payload])
    assert Path("pwned").exists()  # the payload works where pickles are trusted
    Path("pwned").unlink()
    Path("set").mkdir()
    (Path("set") / place).write_bytes(PAYLOADS[payload])
    target = "set" if place == "image_names.pkl" else f"set/{place}"
    for command in (["validate", target], ["convert", target, "out", "--to", "folders"]):
        monkeypatch.setattr(sys, "argv", ["utils.data", *command])
        with pytest.raises(SystemExit) as status:
            command_line(main)
        error = capsys.readouterr().err
        assert status.value.code == 2 and error.count("\n") == 1
        assert error.startswith(f"error: set/{place}: refused: the pickle wants to call ")
    if place == "x.bin":
        with pytest.raises(UserError, match="refused"):
            verification.open_all(verification.TestSettings("o", None, bin_file="set/x.bin"))
    assert not Path("pwned").exists() and not Path("out").exists()


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def cut(path: Path, end: int) -> None:
    path.write_bytes(path.read_bytes()[:end])


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def fourth_header(out: Path) -> int:
    """Where the second image's header begins: tarfile itself takes damage there for the end of the file."""
    with tarfile.open(next(out.glob("*.tar"))) as archive:
        return archive.getmembers()[3].offset


TXT, INDEX, SHARD = "set.tfrecord.txt", "set.tfrecord.index", "set.tfrecord/set.tfrecord-00000.tfrecord"


@pytest.mark.parametrize(
    ("to", "damage", "words"),
    [
        (
            "tfrecord",
            lambda out: edit(out / TXT, "\t0\t0\t0", "\t0\t999999999\t0"),
            "begins at byte 999999999, outside",
        ),
        ("tfrecord", lambda out: edit(out / TXT, "\t0\t0\t0", "\t0\t-1\t0"), "begins at byte -1, outside"),
        ("tfrecord", lambda out: edit(out / TXT, "\t0\t0\t0", "\t7\t0\t0"), r"no set\.tfrecord-00007\.tfrecord"),
        (
            "tfrecord",
            lambda out: edit(out / TXT, "set.tfrecord", "../x"),
            r"refused: '\.\./x' is not the name of a set",
        ),
        ("tfrecord", lambda out: edit(out / TXT, "\t0\t0\t0", "\t0\tx\t0"), "line 1: 'x'; a whole number is wanted"),
        (
            "tfrecord",
            lambda out: edit(out / TXT, "\t0\t0\t0", "\t0\t0"),
            r"line 2: 4 columns; the first line has 3|index",
        ),
        ("tfrecord", lambda out: edit(out / TXT, "\t0\t0\t0", "\t0\t0\t-3"), "the label -3"),
        ("tfrecord", lambda out: edit(out / INDEX, "0012/0012_0001", "../../x"), r"refused: the name '\.\./\.\./x"),
        ("tfrecord", lambda out: cut(out / SHARD, 50), "outside .*which has 50 bytes"),
        (
            "rec",
            lambda out: edit(out / "train.idx", "3\t", "3\t99999999"),
            r"train\.idx line 4: record 3 begins at byte 9",
        ),
        ("rec", lambda out: edit(out / "train.idx", "3\t", "3\t-"), r"line 4: record 3 begins at byte -"),
        ("rec", lambda out: edit(out / "train.idx", "3\t", "3 4\t"), "a key and a byte offset are wanted"),
        ("rec", lambda out: edit(out / "train.idx", "12\t", "99\t"), r"train\.idx: has no record 12"),
        ("rec", lambda out: (out / "train.idx").unlink(), r"train\.idx: no such file"),
        ("rec", lambda out: edit(out / "train.lst", "0012/0012_0001", "/etc/passwd"), "refused: the name '/etc"),
        ("rec", lambda out: cut(out / "train.rec", 500), "outside the .rec file of 500 bytes"),
        ("webdataset", lambda out: cut(next(out.glob("*.tar")), 3000), "(not a readable tar|cut short)"),
        (
            "webdataset",
            lambda out: cut(next(out.glob("*.tar")), fourth_header(out)),
            r"\.tar: damaged or cut short at byte",
        ),
        (
            "webdataset",
            lambda out: flip(next(out.glob("*.tar")), fourth_header(out) + 9),
            r"\.tar: damaged or cut short at",
        ),
        ("folders", lambda out: edit(out / writers.RECORD, "true", "false"), "conversion that was interrupted"),
    ],
)
def test_damaged_sets_are_refused_when_opened(faces, tmp_path, to, damage, words) -> None:
    out = written(faces, tmp_path, to)
    damage(out)
    with pytest.raises(UserError, match=words) as error:
        open_labelled(out)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("to", "damage", "words"),
    [
        ("tfrecord", lambda out: flip(out / SHARD, 3), r"00000\.tfrecord: no TFRecord begins at byte 0"),
        ("tfrecord", lambda out: flip(out / SHARD, 60), r"00000\.tfrecord: the record at byte 0 is damaged"),
        ("rec", lambda out: flip(out / "train.rec", 41), r"train\.rec: no record begins at byte 40|label"),
        ("rec", lambda out: flip(out / "train.rec", 54), r"train\.rec: record 1 "),
    ],
)
def test_damage_inside_is_found_when_the_image_is_read(faces, tmp_path, to, damage, words) -> None:
    out = written(faces, tmp_path, to)
    damage(out)
    with pytest.raises(UserError, match=words):
        open_labelled(out).encoded(0)


@pytest.mark.parametrize(
    "name", ["../out/1.png", "/etc/1.png", "a/../../1.png", "C:\\a\\1.png", "..\\x\\1.png", "a\n/1.png"]
)
def test_name_lists_cannot_lead_outside(faces, tmp_path, name) -> None:
    (tmp_path / "names.pkl").write_bytes(pickle.dumps(["ann/ann_0001.png", name]))
    with pytest.raises(UserError, match=r"names\.pkl: refused: the name"):
        open_labelled(tmp_path / "names.pkl", faces)


def test_what_is_no_data_set(tmp_path, faces) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        open_labelled(tmp_path / "none")
    with pytest.raises(UserError, match="verification pairs; a set of labelled images is wanted"):
        open_labelled(pairs_text(faces, tmp_path), faces)
    out = written(faces, tmp_path, "tfrecord")
    with pytest.raises(UserError, match="one shard of a TFRecord set; give its index"):
        open_labelled(out / SHARD)
    (out / TXT).unlink()
    (out / INDEX).unlink()
    with pytest.raises(UserError, match=r"shards without <name>\.txt or <name>\.index"):
        open_labelled((out / SHARD).parent)
    (tmp_path / "x.jpg").write_bytes(encode_image(noise(0), ".jpg"))
    with pytest.raises(UserError, match=r"x\.jpg: not a text file in UTF-8"):
        open_labelled(tmp_path / "x.jpg")


# Conversion


@pytest.mark.parametrize("to", FORMATS)
def test_an_interrupted_conversion_goes_on(faces, tmp_path, monkeypatch, to) -> None:
    expected = written(faces, tmp_path / "whole", to, images_per_shard=3)
    data, read = open_labelled(faces), []

    def die_after(count: int, index: int) -> bytes:
        read.append(index)
        if len(read) > count:
            raise KeyboardInterrupt
        return type(data).encoded(data, index)

    out = tmp_path / "part" / expected.name
    monkeypatch.setattr(data, "encoded", partial(die_after, 7))
    with pytest.raises(KeyboardInterrupt):
        write_labelled(data, out, to, images_per_shard=3)
    with pytest.raises(UserError, match="interrupted"):
        open_labelled(out)
    (out / ".set.tar.0.tmp").write_bytes(b"half a file, as SIGKILL leaves it")
    read.clear()
    monkeypatch.setattr(data, "encoded", partial(die_after, 100))
    write_labelled(data, out, to, images_per_shard=3)
    assert len(read) == (5 if to in ("tfrecord", "webdataset") else 11)  # two shards of three were there
    files = [
        {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        for folder in (out, expected)
    ]
    assert files[0] == files[1]


def test_conversions_that_are_refused(faces, tmp_path) -> None:
    data = open_labelled(faces)
    for out, words in ((faces / "out", "is inside"), (tmp_path, "is not empty"), (tmp_path / "file", "is a file")):
        (tmp_path / "file").touch()
        with pytest.raises(UserError, match=words):
            write_labelled(data, out, "rec")
    write_labelled(data, tmp_path / "out", "webdataset", images_per_shard=3)
    for to, number in (("webdataset", 4), ("rec", 3)):
        with pytest.raises(UserError, match="holds a conversion of other images or with other settings"):
            write_labelled(data, tmp_path / "out", to, images_per_shard=number)


# Checks


def run_command(monkeypatch, capsys, *arguments) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["utils.data", *map(str, arguments)])
    with pytest.raises(SystemExit) as status:
        command_line(main)
    captured = capsys.readouterr()
    return status.value.code, captured.out, captured.err


@pytest.mark.parametrize("to", FORMATS)
def test_validate_says_what_is_there(faces, tmp_path, monkeypatch, capsys, to) -> None:
    out = written(faces, tmp_path, to)
    code, text, _ = run_command(monkeypatch, capsys, "validate", out, "--mean-face", tmp_path / "m.png", "--threads", 2)
    facts = dict(line.split("  ", 1) for line in text.splitlines()[:-1])
    assert code == 0
    assert {name.strip(): value.strip() for name, value in facts.items()} == {
        "format": open_labelled(out).format,
        "images": "11",
        "identities": "4",
        "images per identity": "minimum 1, median 2.5, maximum 5",
        "with one image": "1 identities: Bo Lee",
        "sizes": "16 x 16 (11 images)",
        "encodings": "PNG (5 images), JPEG (4 images), WEBP (2 images)",
        "duplicates": "0 images have the bytes of an earlier one",
        "unreadable": "0",
    }
    mean = decode_image((tmp_path / "m.png").read_bytes())
    assert mean.shape == (112, 112, 3) and abs(mean.mean() - 127) < 12


def bomb() -> bytes:
    """A PNG of 60,000 x 60,000 pixels in some hundred bytes."""
    png = bytearray(encode_image(noise(0, 4)))
    png[16:24] = struct.pack(">II", 60000, 60000)
    png[29:33] = struct.pack(">I", zlib.crc32(bytes(png[12:29])))
    return bytes(png)


def test_validate_finds_what_would_spoil_a_run(faces, tmp_path, monkeypatch, capsys) -> None:
    bad = tmp_path / "bad"
    write_labelled(open_labelled(faces), bad, "folders")
    (bad / writers.RECORD).unlink()
    (bad / "nobody").mkdir()
    (bad / "müller" / "copy.png").write_bytes((bad / "ann" / "ann_0001.png").read_bytes())
    (bad / "ann" / "ann_0009.png").write_bytes((bad / "ann" / "ann_0001.png").read_bytes())
    (bad / "ann" / "bomb.png").write_bytes(bomb())
    cut(bad / "ann" / "ann_0002.jpg", 300)
    (bad / "ann" / "text.png").write_text("no image")
    code, text, _ = run_command(monkeypatch, capsys, "validate", bad, "--mean-face", tmp_path / "m.png")
    faults = [line for line in text.splitlines() if line.startswith("fault: ")]
    assert code == 1 and len(faults) == 3
    assert faults[0].startswith("fault: 3 of 15 images cannot be read: ")
    assert f"{bad}/ann/bomb.png: not a readable image (Image size (3600000000 pixels) exceeds" in faults[0]
    assert f"{bad}/ann/ann_0002.jpg: not a readable image" in faults[0]
    assert faults[1] == "fault: 1 identities have no image: nobody"
    assert faults[2] == "fault: the same bytes under two identities, 1 times: ann/ann_0001.png and müller/copy.png"
    assert "2 images have the bytes of an earlier one" in text


def test_validate_other_faults(tmp_path, monkeypatch, capsys) -> None:
    write_image(tmp_path / "one" / "a" / "1.png", noise(0))
    code, text, _ = run_command(monkeypatch, capsys, "validate", tmp_path / "one", "--mean-face", tmp_path / "m.png")
    assert code == 1 and text.splitlines()[-2] == "fault: 1 identities with images; training wants two or more"
    image = encode_image(noise(0))
    members = {"1.png": image, "1.cls": b"0", "2.png": image[:400], "2.cls": b"2"}
    report = check_images(open_labelled(tar(tmp_path / "x.tar", members)))
    assert report.faults[0].startswith("1 of 2 images cannot be read: ") and "x.tar: 2.png" in report.faults[0]
    assert report.faults[1] == "1 identities have no image: 0000001"


def test_commands(faces, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    code, text, _ = run_command(monkeypatch, capsys, "convert", faces, "shards", "--to", "tfrecord")
    assert (code, text) == (0, "11 images of 4 identities in shards\n")
    assert content(open_labelled("shards")) == content(open_labelled(faces))
    command = ("convert", faces, "x.bin", "--to", "bin", "--pairs-file", pairs_text(faces, tmp_path))
    assert run_command(monkeypatch, capsys, *command)[:2] == (0, "4 pairs in x.bin\n")
    code, text, _ = run_command(monkeypatch, capsys, "validate", "x.bin")
    assert code == 0 and "4: 2 genuine, 2 impostor" in text and Path("mean_face.png").is_file()
    for arguments, error in (
        (command, "error: OUT: x.bin exists; name a new file\n"),
        (
            ("convert", faces, "x.bin/y", "--to", "rec"),
            f"error: OUT: cannot write x.bin/y ({tmp_path / 'x.bin'} is a file); give another place\n",
        ),
        (
            ("validate", "x.bin", "--mean-face", "x.bin/m.png"),
            f"error: --mean-face: cannot write x.bin/m.png ({tmp_path / 'x.bin'} is a file); give another place\n",
        ),
        (("validate", "none"), "error: none: no such file or folder\n"),
        (("validate", "x.bin", "--threads", 0), "error: --threads: 0; it must be at least 1\n"),
        (
            ("convert", "x.bin", "out", "--to", "rec"),
            "error: x.bin: verification pairs; a set of labelled images is wanted\n",
        ),
        (("convert", faces, "o", "--to", "bin", "--pairs-file", "none"), "error: --pairs-file: no such file: none\n"),
    ):
        assert run_command(monkeypatch, capsys, *arguments) == (2, "", error)
    code, _, error = run_command(monkeypatch, capsys, "convert", faces, "out", "--to", "zip")
    assert code == 2 and error.startswith("error: argument --to: invalid choice: 'zip'") and error.count("\n") == 1


# Joined with recognition


@pytest.mark.parametrize("to", FORMATS)
def test_a_recogniser_trains_on_any_format(faces, tmp_path, to) -> None:
    (tmp_path / "out.txt").write_text("0012\n")
    sets = [
        read_training_set(root, exclude_identities_file=tmp_path / "out.txt", min_images_per_identity=2)
        for root in (faces, written(faces, tmp_path, to))
    ]
    assert sets[1].identities == ["ann", "müller"] and sets[1].labels.tolist() == [0] * 5 + [1] * 2
    for cached in (False, True):
        items = [
            [
                IdentityDataset(s, size=12, augment=Augmentation(), seed=0, cache_in_memory=cached)[0, i]
                for i in range(7)
            ]
            for s in sets
        ]
        assert all(np.array_equal(a, b) and la == lb for (a, la), (b, lb) in zip(*items, strict=True))


def test_a_training_root_that_is_no_set(tmp_path) -> None:
    (tmp_path / "x.rec").write_bytes(recordio.MAGIC_BYTES)
    with pytest.raises(UserError, match=r"dataset\.root: .*x\.idx: no such file"):
        read_training_set(tmp_path / "x.rec")


def test_bin_and_pairs_file_give_the_same_embeddings(faces, tmp_path) -> None:
    text = pairs_text(faces, tmp_path)
    path = write_bin(read_pairs(text, faces), tmp_path / "x.bin")
    torch.manual_seed(0)
    backbone = build_backbone("ir_18", input_size=16, num_features=8, width=0.125).eval()
    pairs = [read_pairs(text, faces), read_bin(path)]
    embeddings = [embed_pairs(backbone, p, batch_size=3, flip=True) for p in pairs]
    assert embeddings[0].shape == (8, 8) and np.allclose(*embeddings, atol=1e-6)
    assert np.array_equal(pairs[0].issame, pairs[1].issame)
    assert len(pairs[0]) == 7 and len(pairs[1]) == 8  # one image stands in two pairs: embedded once
    with pytest.raises(UserError, match="bin_file: holds pairs and images; leave pairs_file"):
        verification.open_all(verification.TestSettings("o", None, bin_file=str(path), pairs_file=str(text)))
    with pytest.raises(UserError, match=r"pairs_file: not set.*or bin_file=FILE"):
        verification.open_all(verification.TestSettings("o", None))
    with pytest.raises(UserError, match=r"4 pairs in 10 folds"):
        verification.open_all(verification.TestSettings("o", None, bin_file=str(path)))
