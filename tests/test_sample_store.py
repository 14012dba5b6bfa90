"""A data set on the disk: the same bytes whatever happens while it is drawn, in every layout and image format."""

import hashlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

import sample
from diffusion.layouts import make_layout
from diffusion.sample_store import SampleStore
from diffusion.sample_writer import SampleWriter
from tests.conftest import ROOT
from tests.processes import start_script
from tests.test_sample import files, manifest, one_thread, overrides, run  # noqa: F401 (fixtures)
from tests.test_split_products import needs_amx
from utils import distributed, folder_lock
from utils.alignment_job import plan
from utils.config import UserError
from utils.data.formats.recognise import open_labelled
from utils.folder_lock import FolderLock
from utils.images import read_image
from utils.version import code_version

FAST = ("sampler.num_steps=5", "sampling.sample_config.MSE_th=0.125", "sampling.compute_batch=6")
LIMIT = 300  # seconds that anything may take on a machine that is busy with other work
LAYOUTS = {
    "folders": ("sampling.save_mode=folders",),
    "blocks": ("sampling.save_mode=blocks",),
    "shards": ("sampling.save_mode=shards", "sampling.images_per_shard=25"),
}


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a data set, hidden ones too, but for the log."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != "log.txt")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def same(folder: Path, other: Path) -> bool:
    """Whether two data sets agree to the last byte; names the files that do not."""
    one, two = contents(folder), contents(other)
    assert one.keys() == two.keys()
    assert [name for name in one if one[name] != two[name]] == []
    return True


def lines_so_far(folder: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in (folder / ".parts").glob("*.jsonl"))


def wait_for_lines(folder: Path, count: int, processes: list) -> None:
    deadline = time.monotonic() + LIMIT
    while lines_so_far(folder) < count and all(process.is_alive() for process in processes):
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_killed_again_and_again_the_bytes_are_the_same(files, tmp_path, layout):  # noqa: F811
    """One process; two processes with another batch size; three that are killed, all or one of them, and restarted."""
    words = (*FAST, *LAYOUTS[layout], "sampling.n_samples_per_context=12")
    whole, two, killed = (tmp_path / name / "out" for name in ("whole", "two", "killed"))
    run(files, whole, *words, "sampling.batch_size=8")

    processes = start_script(
        "sample.py", overrides(files, two, *words, "sampling.batch_size=3"), 2, tmp_path / "two.txt"
    )
    for process in processes:
        process.join(LIMIT)
    assert [process.exitcode for process in processes] == [0, 0], (tmp_path / "two.txt").read_text()
    assert same(two, whole)

    rng, output = np.random.default_rng(0), tmp_path / "killed.txt"
    arguments = overrides(files, killed, *words, "sampling.batch_size=3")
    kills, most = 0, 3 if layout == "folders" else 1
    while kills < most:
        before = lines_so_far(killed)
        processes = start_script("sample.py", arguments, 3, output)
        wait_for_lines(killed, before + int(rng.integers(1, 9)), processes)
        time.sleep(rng.uniform(0, 0.05))
        if not all(process.is_alive() for process in processes):
            break  # on a busy machine this process may wake too late, when all is drawn; what ended is looked at below
        for process in rng.permutation(processes):  # torchrun, too, ends the others when one has died
            os.kill(process.pid, signal.SIGKILL)
        for process in processes:
            process.join()
        kills += 1
    for process in processes:
        process.join(LIMIT)
    assert kills >= 1, output.read_text()
    assert kills == most or [process.exitcode for process in processes] == [0, 0, 0], output.read_text()
    processes = start_script("sample.py", arguments, 3, output)
    for process in processes:
        process.join(LIMIT)
    assert [process.exitcode for process in processes] == [0, 0, 0], output.read_text()
    assert same(killed, whole)
    drawn = [int(number) for number in re.findall(r"images of 4 identities, (\d+) to draw", output.read_text())]
    assert drawn[0] == 48 and drawn == sorted(drawn, reverse=True) and drawn[-1] < 48


def test_a_data_set_from_before_a_setting_goes_on(files, tmp_path):  # noqa: F811
    words = (*FAST, "sampling.n_contexts=1")
    run(files, tmp_path / "out", *words, "sampling.n_samples_per_context=1")
    told = json.loads((tmp_path / "out/dataset.json").read_text())
    assert told["settings"].pop("sampling.float32_matmul_precision") == "highest"
    (tmp_path / "out/dataset.json").write_text(json.dumps(told))
    assert run(files, tmp_path / "out", *words, "sampling.n_samples_per_context=2")["drawn"] == 1


@needs_amx
@pytest.mark.slow
def test_products_of_bf16_give_the_same_bytes_anywhere(files, tmp_path):  # noqa: F811
    words = (*FAST, "sampling.float32_matmul_precision=high", "sampling.n_samples_per_context=3")
    run(files, tmp_path / "one/out", *words)
    processes = start_script(
        "sample.py", overrides(files, tmp_path / "two/out", *words, "sampling.batch_size=3"), 2, tmp_path / "two.txt"
    )
    for process in processes:
        process.join(LIMIT)
    assert [process.exitcode for process in processes] == [0, 0], (tmp_path / "two.txt").read_text()
    assert same(tmp_path / "one/out", tmp_path / "two/out")
    with pytest.raises(UserError, match=r'sampling\.float32_matmul_precision: "highest", before "high"; '):
        run(files, tmp_path / "one/out", *FAST, "sampling.n_samples_per_context=3")


@pytest.mark.slow
def test_sigterm_ends_it_cleanly(files, tmp_path):  # noqa: F811
    out, output = tmp_path / "out", tmp_path / "output.txt"
    arguments = overrides(files, out, *FAST, "sampling.n_samples_per_context=20")
    processes = start_script("sample.py", arguments, 2, output)
    wait_for_lines(out, 5, processes)
    for process in processes:
        process.terminate()
    for process in processes:
        process.join(LIMIT)
    assert [process.exitcode for process in processes] == [143, 143], output.read_text()
    assert "SIGTERM: what is drawn is kept" in output.read_text() and "Traceback" not in output.read_text()
    kept = lines_so_far(out)
    assert kept == len([*out.glob("*/*.png")]) and not [*out.glob(".parts/run_*/*")]
    assert run(files, out, *FAST, "sampling.n_samples_per_context=20")["drawn"] == 80 - kept


@pytest.mark.slow
def test_torchrun_restarts_what_is_killed(files, tmp_path):  # noqa: F811
    words = (*FAST, "sampling.n_samples_per_context=15")
    run(files, tmp_path / "one" / "out", *words)
    out, output = tmp_path / "two" / "out", tmp_path / "output.txt"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["--max-restarts=1", "sample.py", *overrides(files, out, *words)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with output.open("w") as said:
        agent = subprocess.Popen(command, cwd=ROOT, env=env, stdout=said, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + LIMIT
    while lines_so_far(out) < 10:
        assert agent.poll() is None and time.monotonic() < deadline, output.read_text()[-3000:]
        time.sleep(0.005)
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    assert agent.wait(LIMIT) == 0, output.read_text()[-3000:]
    assert output.read_text().count("to draw, in") == 2
    assert same(out, tmp_path / "one" / "out")


@pytest.mark.slow
def test_two_nodes_make_one_data_set(files, tmp_path):  # noqa: F811
    """Two torchrun agents, as on two machines that see the same folder, against one process."""
    words = (*FAST, "sampling.n_samples_per_context=6")
    run(files, tmp_path / "one" / "out", *words)
    out = tmp_path / "nodes" / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--rdzv_id=test"]
        command += ["--rdzv_backend=c10d", f"--rdzv_endpoint=localhost:{20_000 + os.getpid() % 10_000}", "sample.py"]
        agents = [
            subprocess.Popen([*command, *overrides(files, out, *words)], cwd=ROOT, stderr=subprocess.PIPE, text=True)
            for _ in range(2)
        ]
        said = [agent.communicate(timeout=2 * LIMIT)[1] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], "\n".join(said)[-3000:]
    assert "drawing (2 processes)" in "".join(said)
    assert same(out, tmp_path / "one" / "out")


@pytest.fixture(scope="module")
def finished(files, tmp_path_factory):  # noqa: F811
    """4 people x 3 images in every layout."""
    folders = {}
    for layout, words in LAYOUTS.items():
        folders[layout] = tmp_path_factory.mktemp(layout) / "out"
        more = ("sampling.images_per_shard=7",) if layout == "shards" else ()
        run(files, folders[layout], *FAST, *words, *more, "sampling.licence=cc-by-4.0")
    return folders


def test_shards_hold_the_images_of_the_folders(finished):
    plain, out = finished["folders"], finished["shards"]
    assert sorted(path.name for path in out.glob("*.tar")) == ["faces-000000.tar", "faces-000001.tar"]
    images = open_labelled(out)  # as recognition.train opens them
    assert images.names == [line["file"] for line in manifest(plain)]
    assert images.identities == ["00000", "00001", "00002", "00003"]
    assert images.labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    for number, (line, of_file) in enumerate(zip(manifest(out), manifest(plain), strict=True)):
        encoded = images.encoded(number)
        assert line["file"] == f"faces-{number // 6:06d}.tar/{number:09d}.png"
        assert encoded == (plain / of_file["file"]).read_bytes()
        assert line["sha256"] == of_file["sha256"] == hashlib.sha256(encoded).hexdigest()
    assert "<svg" not in (out / "preview.html").read_text() and "base64" in (out / "preview.html").read_text()


def test_align_reads_shards(finished, tmp_path, compose):
    from utils.alignment_job import AlignSettings, Worker
    from utils.config import settings

    cfg = compose("align_config", f"input_dir={finished['shards']}", f"output_dir={tmp_path}")
    options = settings(cfg, AlignSettings, "")
    options.check()
    layout, units = plan(options)
    names = [file for unit in units for file in unit.files]
    assert layout == "shards" and names == [line["file"] for line in manifest(finished["folders"])]
    options.just_resize_if_fail = True
    records = Worker(options, "cpu").run(units[0])
    assert [record["file"] for record in records] == names
    assert read_image(tmp_path / "00003" / "2.png").shape == (112, 112, 3)
    options.layout = "blocks"
    with pytest.raises(UserError, match=r"layout: blocks, but .* holds WebDataset shards"):
        plan(options)


def test_a_shard_that_grows_is_drawn_again(files, finished, tmp_path):  # noqa: F811
    words = (*FAST, "sampling.save_mode=shards", "sampling.images_per_shard=7", "sampling.licence=cc-by-4.0")
    run(files, tmp_path / "out", *words, "sampling.n_contexts=3")
    first = (tmp_path / "out" / "faces-000000.tar").stat().st_mtime_ns
    assert run(files, tmp_path / "out", *words)["drawn"] == 6
    assert (tmp_path / "out" / "faces-000000.tar").stat().st_mtime_ns == first
    assert same(tmp_path / "out", finished["shards"])
    with pytest.raises(UserError, match=r"sampling\.images_per_shard: 9, before 7"):
        run(files, tmp_path / "out", *words, "sampling.images_per_shard=9")
    with pytest.raises(UserError, match=r"sampling\.n_samples_per_context: 4, before 3"):
        run(files, tmp_path / "out", *words, "sampling.n_samples_per_context=4")


@pytest.mark.parametrize("layout", ["folders", "blocks", "shards"])
def test_verify_finds_what_is_damaged(files, finished, tmp_path, layout):  # noqa: F811
    out = tmp_path / "out"
    shutil.copytree(finished[layout], out)
    words = (*FAST, *LAYOUTS[layout], "sampling.licence=cc-by-4.0")
    words += ("sampling.images_per_shard=7",) if layout == "shards" else ()
    damaged = {"folders": "00001/1.png", "blocks": "00001.png", "shards": "faces-000001.tar"}[layout]
    data = bytearray((out / damaged).read_bytes())
    place = data.index(b"IDAT") + 8
    data[place] ^= 1
    (out / damaged).write_bytes(data)
    (out / ".manifest.jsonl.1234abcd.tmp").write_text("of a run that was killed")
    assert run(files, out, *words, "sampling.verify=true")["drawn"] == {"folders": 1, "blocks": 3, "shards": 6}[layout]
    assert same(out, finished[layout])


@pytest.mark.parametrize(("format", "quality"), [("jpg", None), ("jpg", 60), ("webp", None), ("webp", 60)])
def test_image_formats(files, finished, tmp_path, format, quality):  # noqa: F811
    words = [*FAST, f"sampling.image_format={format}", "sampling.n_contexts=1", "sampling.n_samples_per_context=1"]
    words += [] if quality is None else [f"sampling.image_quality={quality}"]
    run(files, tmp_path / "out", *words)
    (line,) = manifest(tmp_path / "out")
    assert line["file"] == f"00000/0.{format}"
    difference = read_image(tmp_path / "out" / line["file"]).astype(int) - read_image(
        finished["folders"] / "00000/0.png"
    )
    if (format, quality) == ("webp", None):
        assert not difference.any()
    else:
        assert 0 < np.abs(difference).mean() < 40
    run(files, tmp_path / "blocks", *words, "sampling.save_mode=blocks")
    assert manifest(tmp_path / "blocks")[0]["file"] == f"00000.{format}"
    with pytest.raises(UserError, match=rf"sampling\.image_format: \"png\", before \"{format}\""):
        run(files, tmp_path / "out", *FAST, "sampling.n_contexts=1")


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("sampling.image_format=gif", r"image_format: 'gif' is not one of png, jpg, webp"),
        ("sampling.image_quality=90", r"image_quality: 90, but png is without loss"),
        ("sampling.image_format=jpg sampling.image_quality=0", r"image_quality: 0; give 1 to 100"),
        ("sampling.images_per_shard=0", r"images_per_shard: 0; give at least 1"),
        ("sampling.contexts_file=null sampling.n_contexts=1 sampling.seed=-1", r"seed: -1; give 0 or more"),
    ],
)
def test_mistakes(files, tmp_path, mistake, message):  # noqa: F811
    with pytest.raises(UserError, match=rf"sampling\.{message}"):
        run(files, tmp_path / "out", *mistake.split())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dataset.json", r"sampling\.save_dir: .*dataset\.json is damaged .*; put back a copy, or give another folder"),
        ("calibration.json", r"calibration\.json: damaged .*; delete it, and the threshold is measured again"),
        ("attention_change.npz", r"attention_change\.npz: damaged .*; put back a copy, or delete it"),
        ("00001/1.png", r"1\.png: not a readable image .*; sampling\.verify=true finds what is damaged"),
    ],
)
def test_a_file_cut_short_is_one_line(files, tmp_path, name, message):  # noqa: F811
    out, words = tmp_path / "out", ("sampling.n_contexts=2", "sampling.n_samples_per_context=2")
    run(files, out, *words)
    whole = (out / name).read_bytes()
    (out / name).write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(UserError, match=message):
        run(files, out, *words)
    (out / name).write_bytes(whole)
    assert run(files, out, *words)["drawn"] == 0


def test_a_line_of_something_else_is_passed_over(files, finished, tmp_path):  # noqa: F811
    out = tmp_path / "out"
    shutil.copytree(finished["folders"], out)
    lines = (out / "manifest.jsonl").read_text().splitlines(keepends=True)
    lines[4] = json.dumps({**json.loads(lines[4]), "identity": ["00001"]}) + "\n"
    lines[6] = "[1, 2]\n"
    (out / "manifest.jsonl").write_text("".join(lines))
    assert run(files, out, *FAST, "sampling.licence=cc-by-4.0")["drawn"] == 2
    assert same(out, finished["folders"])


def test_a_run_begins_out_of_reach_of_those_before(tmp_path, monkeypatch):
    """A process that outlived its run makes and deletes files there while they are cleared."""
    layout = make_layout("folders", ["a"], 1, image_format="png", quality=None, images_per_shard=1)
    store = SampleStore(tmp_path, layout)
    first = store.run_folder(store.claim({}, {}, {"code_versions": []}))
    (first / "half").write_text("an image that is being written")
    remove, seen = shutil.rmtree, []

    def see(path):
        seen.append(first.exists())
        remove(path)

    monkeypatch.setattr(shutil, "rmtree", see)
    second = store.run_folder(store.claim({}, {}, {"code_versions": []}))
    store.lock.release()
    assert seen == [False] and [*store.parts.iterdir()] == [second]


def test_one_run_a_folder(files, finished, tmp_path, monkeypatch):  # noqa: F811
    out = tmp_path / "out"
    shutil.copytree(finished["folders"], out)
    monkeypatch.setattr(folder_lock, "PATIENCE", 0.0)
    other = FolderLock(out, "")
    other.acquire()
    with pytest.raises(UserError, match=rf"sampling\.save_dir: .* is in use by process {os.getpid()} on \S+; wait"):
        run(files, out, *FAST)
    other.release()
    (out / ".lock").write_text("process 1 on a machine that was switched off\n")  # what a kill leaves behind
    assert run(files, out, *FAST, "sampling.licence=cc-by-4.0")["drawn"] == 0
    assert same(out, finished["folders"])


def test_a_full_disk_is_one_line_and_loses_nothing(files, tmp_path, monkeypatch, capsys):  # noqa: F811
    """The kernel refuses to write from the seventh image on."""
    out, limit, write = tmp_path / "out", resource.getrlimit(resource.RLIMIT_FSIZE), SampleWriter._write
    words = (*FAST, "sampling.batch_size=2")
    written = []

    def fill(self, *arguments):
        written.append(arguments)
        if len(written) == 7:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50, limit[1]))
        return write(self, *arguments)

    monkeypatch.setattr(SampleWriter, "_write", fill)
    monkeypatch.setattr(sys, "argv", ["sample.py", *overrides(files, out, *words)])
    try:
        with pytest.raises(SystemExit) as end:
            sample.main()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    said = capsys.readouterr().err
    assert end.value.code == 2 and "Traceback" not in said
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: sampling.save_dir: File too large") and "what is there is kept" in line
    assert not [*out.glob(".parts/run_*/*")]
    assert 1 <= 12 - run(files, out, *words)["drawn"] <= 6
    assert len(manifest(out)) == 12 and not (out / ".parts").exists()


def test_a_folder_that_cannot_be_written_is_one_line(files, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr(sys, "argv", ["sample.py", *overrides(files, Path("/proc/self/fdinfo/out"))])
    with pytest.raises(SystemExit) as end:
        sample.main()
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("error: output_dir: cannot write /proc/self/fdinfo")


def test_a_process_that_outlived_its_run_writes_nothing(files, tmp_path, monkeypatch):  # noqa: F811
    """Another run has begun, and so has deleted the folder that the files of the first are made in."""
    out, write = tmp_path / "out", SampleWriter._write

    def taken_over(self, *arguments):
        shutil.rmtree(self.temporary, ignore_errors=True)
        return write(self, *arguments)

    monkeypatch.setattr(SampleWriter, "_write", taken_over)
    with pytest.raises(UserError, match=r"sampling\.save_dir: No such file or directory"):
        run(files, out, *FAST)
    assert not [*out.rglob("*.png")] and lines_so_far(out) == 0


def test_what_the_folder_tells_of_itself(finished):
    for layout, out in finished.items():
        told = json.loads((out / "dataset.json").read_text())
        assert told["complete"] and (told["images"], told["identities"], told["images_per_identity"]) == (12, 4, 3)
        assert (told["image_height"], told["image_width"], told["licence"]) == (16, 16, "cc-by-4.0")
        assert told["code_versions"] == [code_version()]
        assert told["settings"]["sampling.compute_batch"] == 6 and told["settings"]["sampling.precision"] == "fp32"
        assert re.fullmatch("[0-9a-f]{64}", told["settings"]["checkpoint"])
        switched = [line["switch_t"] for line in manifest(out) if line["switch_t"] >= 0]
        assert told["switched"] == len(switched) / 12 and told["mean_switch_t"] == np.mean(switched)
        card = (out / "README.md").read_text()
        head = yaml.safe_load(card.split("---")[1])
        assert head["license"] == "cc-by-4.0" and head["size_categories"] == ["n<1K"]
        assert ("configs" in head) == (layout == "shards")
        assert "12 face images of 4 identities, 3 of each" in card and "16 x 16 pixels" in card
        assert told["settings"]["checkpoint"] in card and "{UIFace}" in card and "cc-by-4.0" in card
        assert not re.search(r"\$\w|None|/tmp", card)


def test_progress_tells_the_mean_switch_step(files, tmp_path, capsys):  # noqa: F811
    summary = run(files, tmp_path / "out", *FAST, "sampling.n_contexts=2")
    timesteps = [800, 600, 400, 200, 0]
    steps = [timesteps.index(line["switch_t"]) + 1 for line in manifest(tmp_path / "out") if line["switch_t"] >= 0]
    assert steps and summary["mean_switch_step"] == np.mean(steps)
    assert f"mean switch step {np.mean(steps):.1f} of 5" in capsys.readouterr().err


def test_work_is_dealt_once_and_in_order():
    counter, other = distributed.SharedCounter("test/pieces"), distributed.SharedCounter("test/pieces")
    one, two = distributed.deal("abcde", counter), distributed.deal("abcde", other)
    assert [next(one), next(two), next(two), next(one), *two, *one] == list("abcde")
    assert counter.add() == 7, "each has asked once in vain"


def test_members_of_a_shard(finished):
    with tarfile.open(finished["shards"] / "faces-000000.tar") as archive:
        members = archive.getmembers()
        assert [member.name for member in members[:3]] == ["000000000.png", "000000000.cls", "000000000.json"]
        assert json.loads(archive.extractfile(members[2]).read()) == {"name": "00000/0.png"}
        assert {(member.mtime, member.uid, member.mode) for member in members} == {(0, 0, 0o644)}
