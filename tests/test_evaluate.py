"""evaluate.py: a small pipeline on rendered faces with a tiny network, and everything that users get wrong."""

import json
import shutil
import sys
from pathlib import Path

import hydra
import numpy as np
import pytest
import torch

import evaluate
from evaluation import features as extraction
from evaluation.feature_networks import FeatureNetwork
from evaluation.generated_set import DataSettings, open_set
from evaluation.metrics.frechet import frechet_distance, statistics_of
from evaluation.results import SetResult
from recognition import embedding_store
from recognition.backbones import build_backbone, save_backbone
from tests.processes import together
from utils.checkpoint import write_json
from utils.config import CONFIG_DIR, UserError
from utils.data.formats.recognise import open_labelled
from utils.data.formats.writers import write_labelled
from utils.data.rendered.identity import sample_identity, sample_nuisance
from utils.data.rendered.render import render_with_landmarks
from utils.embedders import backbone_embedder
from utils.embedding_job import EncodeSettings
from utils.embedding_job import run as encode
from utils.images import list_images, read_image, resize, write_block, write_image

PEOPLE, IMAGES, SIDE = 6, 4, 32
KEYS = ("c_intra", "u_class", "eer", "genuine_mean", "impostor_mean", "leakage_mean", "fid", "precision", "recall")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Drawn faces of 6 people with their manifest, 12 real people with embeddings, and an untrained network."""
    root = tmp_path_factory.mktemp("world")
    for person in range(PEOPLE):
        identity = sample_identity(0, person)
        for k in range(IMAGES):
            pixels, _ = render_with_landmarks(identity, sample_nuisance(0, person, k, 1.0), SIDE)
            write_image(root / f"faces/p{person}/{k}.png", pixels)
            write_image(root / f"real/p{person}/{k}.png", pixels[:, ::-1, ::-1])  # other people: other colours
            write_image(root / f"real/p{person + PEOPLE}/{k}.png", pixels[..., [1, 2, 0]])
    torch.manual_seed(0)
    save_backbone(build_backbone("iresnet18", input_size=32, num_features=16, width=0.125), root / "net.safetensors")
    lines = [
        {"file": name, "identity": name.split("/")[0], "index": k % IMAGES, "seed": 100 + k, "switch_t": 40 * k or None}
        for k, name in enumerate(list_images(root / "faces"))
    ]
    (root / "samples").mkdir()
    (root / "samples/manifest.jsonl").write_text("".join(json.dumps({**line, "sha256": ""}) + "\n" for line in lines))
    write_json(root / "samples/dataset.json", {"threshold": 0.25, "licence": None})
    d = np.arange(3 * len(lines), dtype=np.float32).reshape(3, -1)
    np.savez(root / "samples/attention_change.npz", d=d, timesteps=np.array([900, 800, 700]))
    settings = EncodeSettings(str(root / "net.safetensors"), str(root / "real"), str(root / "embeddings"), device="cpu")
    encode(settings, backbone_embedder(str(root / "net.safetensors")))
    return root


def words(world: Path, out: Path, *more: str) -> list[str]:
    """A command line; `more` comes last and wins."""
    return [
        f"data.root={world / 'faces'}",
        f"real.root={world / 'real'}",
        f"embedder.checkpoint={world / 'net.safetensors'}",
        f"output_dir={out}",
        "neighbours=3",
        "device=cpu",
        *more,
    ]


def run(arguments: list[str], choice: str = "own", report: bool = False) -> dict:
    """metrics.json of an evaluation in this process."""
    with pytest.MonkeyPatch.context() as patch:
        if not report:
            patch.setattr("evaluation.run.write_report", lambda results, path, figures: None)
        return _run(arguments, choice)


def _run(arguments: list[str], choice: str) -> dict:
    with hydra.initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        cfg = hydra.compose("evaluate_config", arguments)
    evaluate.run(cfg, choice)
    return json.loads((Path(cfg.output_dir) / "metrics.json").read_text())


@pytest.fixture(scope="module")
def first(world, tmp_path_factory) -> tuple[dict, Path]:
    """The evaluation of the faces: its metrics.json and its folder."""
    out = tmp_path_factory.mktemp("first")
    return run(words(world, out, f"data.samples_dir={world / 'samples'}"), report=True), out


def test_figures_are_those_of_the_embeddings(world, first):
    found, out = first
    metrics = found["sets"]["faces"]["metrics"]
    embedder = backbone_embedder(str(world / "net.safetensors"))
    rows = {kind: embedder.embed(list_images(world / kind), root=world / kind) for kind in ("faces", "real")}
    centres = {kind: e.reshape(-1, IMAGES, 16).mean(axis=1) for kind, e in rows.items()}
    centres = {kind: c / np.linalg.norm(c, axis=1, keepdims=True) for kind, c in centres.items()}
    own = np.einsum("nd,nd->n", rows["faces"], centres["faces"].repeat(IMAGES, axis=0))
    cosines = rows["faces"] @ rows["faces"].T
    same = np.equal.outer(*[np.arange(PEOPLE * IMAGES) // IMAGES] * 2)
    assert metrics["c_intra"] == pytest.approx((1 - own < 0.3).mean())
    assert metrics["genuine_mean"] == pytest.approx(cosines[same & ~np.eye(len(same), dtype=bool)].mean(), abs=1e-5)
    assert metrics["impostor_mean"] == pytest.approx(cosines[~same].mean(), abs=1e-5)
    assert metrics["leakage_max"] == pytest.approx((centres["faces"] @ centres["real"].T).max(), abs=1e-5)
    assert (metrics["num_images"], metrics["num_identities"], metrics["radius"]) == (24, 6, 0.3)
    assert metrics["num_genuine"] == 36 and metrics["num_impostor"] == 24 * 20 / 2
    assert metrics["d_intra"] is None and metrics["lpips"] is None and metrics["reproduction_real_real"] is None
    assert found["features"] == {"name": "the embedder's own features", "is_comparable": False}
    result = SetResult.load(out / "faces")
    np.testing.assert_allclose(result.images.centre_cosine, own, atol=1e-5)
    np.testing.assert_allclose(result.identities.consistency, own.reshape(-1, IMAGES).mean(axis=1), atol=1e-5)
    assert result.identities.training_name[0] in open_labelled(world / "real").identities
    assert sum(result.histograms["genuine"].counts) == 36
    assert result.nearest_training_images[0][2] == pytest.approx((rows["faces"] @ rows["real"].T).max(), abs=1e-5)
    assert (result.verdict is None and any("too few" not in w for w in result.warnings)) or not result.warnings
    assert (out / "report.html").stat().st_size > 1000


def test_records_are_joined_to_their_images(first):
    result = SetResult.load(first[1] / "faces")
    assert result.images.files.tolist()[:2] == ["p0/0.png", "p0/1.png"]
    assert result.images.seed.tolist() == list(range(100, 124))
    assert result.images.index.tolist() == [0, 1, 2, 3] * PEOPLE
    assert result.images.switch_t[:3].tolist() == [-1, 40, 80]
    assert result.identities.switch_t[:2].tolist() == [80, 220]
    assert result.metrics["switched"] == pytest.approx(23 / 24)
    timesteps, d, threshold = result.attention_change
    assert timesteps.tolist() == [900, 800, 700] and threshold == 0.25
    np.testing.assert_array_equal(d[2], [2, 26, 50])
    assert result.provenance["evaluation"]["settings"]["radius"] == 0.3


@pytest.mark.parametrize("form", ["blocks", "webdataset", "tfrecord", "rec"])
def test_every_format_gives_the_same_figures(world, first, tmp_path, form):
    images = open_labelled(world / "faces")
    if form == "blocks":
        for person in images.identities:
            tiles = [read_image(world / "faces" / person / f"{k}.png") for k in range(IMAGES)]
            write_image(tmp_path / form / f"{person}.png", write_block(np.stack(tiles), 4))
        settings = {"sampling.save_mode": "blocks", "sampling.image_format": "png"}
        write_json(tmp_path / form / "dataset.json", {"settings": settings})  # which tells the tiles' size
    else:
        write_labelled(images, tmp_path / form, form, images_per_shard=10)
    found = run(words(world, tmp_path / "out", f"data.root={tmp_path / form}", f"data.samples_dir={world / 'samples'}"))
    metrics, expected = found["sets"][form]["metrics"], first[0]["sets"]["faces"]["metrics"]
    for key in (*KEYS, "switch_t_mean"):
        assert metrics[key] == pytest.approx(expected[key], abs=1e-6), key
    assert SetResult.load(tmp_path / "out" / form).images.seed.tolist() == list(range(100, 124))


def impostors(rows: np.ndarray) -> np.ndarray:
    """Cosines of all pairs of different identities, ascending."""
    first, second = np.triu_indices(len(rows), 1)
    differ = first // IMAGES != second // IMAGES
    return np.sort(np.einsum("nd,nd->n", rows[first[differ]], rows[second[differ]]))


def test_embeddings_are_kept_by_content_and_a_killed_run_goes_on(world, first, tmp_path, monkeypatch):
    monkeypatch.setattr(embedding_store, "PART_SIZE", 7)
    real, calls = extraction.embed_images, []

    def counted(network, images, **settings):
        if len(calls) == 8:
            raise KeyboardInterrupt
        calls.append(len(images))
        return real(network, images, **settings)

    monkeypatch.setattr(extraction, "embed_images", counted)
    with pytest.raises(KeyboardInterrupt):
        run(words(world, tmp_path / "out"))
    assert calls == [7] * 6 + [6] + [7]  # the real set is whole, of the faces there is the first part
    assert not (tmp_path / "out/metrics.json").exists()
    calls.clear()
    found = run(words(world, tmp_path / "out"))
    assert calls == [7, 7, 3]
    for key in KEYS:
        assert found["sets"]["faces"]["metrics"][key] == pytest.approx(first[0]["sets"]["faces"]["metrics"][key])
    calls.clear()
    shutil.copytree(world / "faces", tmp_path / "copy")
    own = run(words(world, tmp_path / "out", f"data.root={tmp_path / 'copy'}", "radius=auto"))
    assert calls == []  # the same content elsewhere
    embedder = backbone_embedder(str(world / "net.safetensors"))
    rows = embedder.embed(list_images(world / "real"), root=world / "real")
    assert own["sets"]["copy"]["metrics"]["radius"] == pytest.approx(1 - impostors(rows)[-2], abs=1e-5)  # of 1056 pairs
    write_image(tmp_path / "copy/p0/0.png", read_image(world / "faces/p1/0.png"))
    changed = run(words(world, tmp_path / "out", f"data.root={tmp_path / 'copy'}"))
    assert calls == [7, 7, 7, 3]
    assert changed["sets"]["copy"]["metrics"]["duplicates_across"] > 0


def test_embeddings_of_encode_serve_the_real_set(world, first, tmp_path):
    more = ["real.root=null", f"real.embeddings_file={world / 'embeddings/embeddings.npy'}"]
    found = run(words(world, tmp_path / "out", *more))["sets"]["faces"]
    for key in KEYS:
        assert found["metrics"][key] == pytest.approx(first[0]["sets"]["faces"]["metrics"][key], abs=1e-5)
    rows, names = np.load(world / "embeddings/embeddings.npy"), list_images(world / "real")
    np.savez(tmp_path / "some.npz", names=names[4:], embeddings=rows[4:])  # a person fewer, and no encoder.json
    some = run(words(world, tmp_path / "out", f"real.embeddings_file={tmp_path / 'some.npz'}"))["sets"]["faces"]
    told = " ".join(some["warnings"])
    assert "4 of 48 real images have no embedding" in told and "nothing tells which network made some.npz" in told


def evaluate_here(arguments: list[str]) -> dict[str, float]:
    """What a process of several returns."""
    metrics = run(arguments)["sets"]["faces"]["metrics"]
    return {key: metrics[key] for key in KEYS}


@pytest.mark.slow
def test_two_processes_give_the_figures_of_one(world, first, tmp_path, monkeypatch):
    both = together(2, tmp_path / "ranks", evaluate_here, words(world, tmp_path / "out"))
    expected = first[0]["sets"]["faces"]["metrics"]
    assert both[0] == both[1] == pytest.approx({key: expected[key] for key in KEYS})


def test_identities_that_were_drawn_from_real_ones(world, tmp_path):
    """Names that coincide say nothing unless real.match says so."""
    found = run(
        words(
            world,
            tmp_path / "names",
            f"real.root={world / 'faces'}",
            *("real.match=names", "diversity_neighbours=1", "reproduction_pairs=1"),
        )
    )["sets"]["faces"]
    assert found["metrics"]["d_intra"] == 1.0 and found["metrics"]["leakage_mean"] == pytest.approx(1)
    assert any(warning.startswith("identity reproduction is left out") for warning in found["warnings"])  # 6 people
    (tmp_path / "context_names.txt").write_text("p4\np5\n")
    shutil.copytree(world / "faces/p0", tmp_path / "numbered/00000")
    shutil.copytree(world / "faces/p1", tmp_path / "numbered/00001")
    more = [f"data.root={tmp_path / 'numbered'}", f"real.match={tmp_path / 'context_names.txt'}"]
    found = run(words(world, tmp_path / "numbers", *more, "diversity_neighbours=3"))["sets"]["numbered"]
    assert 0 <= found["metrics"]["d_intra"] <= 1


def test_curation_lists_writes_and_compares(world, first, tmp_path):
    cosines = SetResult.load(first[1] / "faces").images.centre_cosine
    limit = float(np.sort(cosines)[4:6].mean())
    more = ["curate.enabled=true", f"curate.min_cosine={limit}", "curate.write=true", "curate.format=webdataset"]
    found = run(words(world, tmp_path, *more))
    expected = np.array(list_images(world / "faces"))[cosines >= limit].tolist()
    assert (tmp_path / "faces/curated.txt").read_text().splitlines() == expected and len(expected) == 19
    dropped = (tmp_path / "faces/dropped.tsv").read_text().splitlines()
    assert len(dropped) == 5 and dropped[0].endswith("\tfar from the identity's centre")
    assert open_labelled(tmp_path / "faces/curated").names == expected
    curation = found["curation"]["faces"]
    assert curation["images"]["kept"] == 19 and curation["identities"]["all"] == 6
    assert curation["after"]["genuine_mean"] > curation["before"]["genuine_mean"]
    assert found["sets"]["faces_curated"]["metrics"] == curation["after"]
    assert SetResult.load(tmp_path / "faces_curated").images.files.tolist() == expected
    again = run(words(world, tmp_path, *more))  # the same choice is there already
    assert again == found
    with pytest.raises(UserError, match=r"curate\.write: OUT: .*curated holds a conversion of other images"):
        run(words(world, tmp_path, *more, "curate.min_cosine=-0.99", "curate.max_identity_cosine=0.9"))
    with pytest.raises(UserError, match="curate: nothing is left of faces"):
        run(words(world, tmp_path, *more[:1], "curate.max_training_cosine=-0.99"))


class MeanColour(torch.nn.Module):
    """A feature network in place of Inception: the mean colour, of each half."""

    def prepare(self, image: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(resize(image, 16)).float()  # (16, 16, 3)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return batch.reshape(len(batch), 2, -1, 3).mean(dim=2).flatten(1)  # (B, 6)


def test_features_of_a_network_of_their_own(world, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "evaluation.feature_networks.own_features", lambda: FeatureNetwork("m", True, "m", MeanColour())
    )
    found = run(words(world, tmp_path / "out", "real.match=names", "diversity_neighbours=2"))["sets"]["faces"]
    mean = MeanColour()
    rows = {
        kind: mean(torch.stack([mean.prepare(read_image(world / kind / name)) for name in names])).numpy()
        for kind, names in ((kind, list_images(world / kind)) for kind in ("faces", "real"))
    }
    fid = frechet_distance(statistics_of(rows["faces"]), statistics_of(rows["real"]))
    assert found["metrics"]["fid"] == pytest.approx(fid, rel=1e-4)
    stored = list((tmp_path / "out/cache").glob("features-*"))
    assert len(stored) == 2
    few = run(words(world, tmp_path / "out", "feature_images=10"))["sets"]["faces"]
    assert few["metrics"]["fid"] != pytest.approx(fid, rel=1e-3)  # of ten images drawn from each set
    none = ["real.root=null", f"real.embeddings_file={world / 'embeddings/embeddings.npy'}"]
    without = run(words(world, tmp_path / "out", *none))["sets"]["faces"]
    assert without["metrics"]["fid"] is None and without["metrics"]["leakage_max"] == found["metrics"]["leakage_max"]
    assert without["warnings"] == ["FID, precision and recall need the real images; give real.root"]


def test_the_report_of_alignment_counts(world, tmp_path):
    lines = [{"file": "p0/0.png", "status": "aligned", "landmarks": [[1, 1]] * 5}]
    lines += [{"file": "p0/1.png", "status": "failed", "landmarks": None}, {"file": "p0/2.png", "status": "failed"}]
    (tmp_path / "report.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    more = ["real.root=null", f"data.alignment_report={tmp_path / 'report.jsonl'}"]
    assert run(words(world, tmp_path / "out", *more))["sets"]["faces"]["metrics"]["alignment_failures"] == 2 / 3


def test_aligned_blocks_are_joined_by_the_report(world, tmp_path):
    """Alignment closes up a block where it finds no face: tile 1 is image 2 then."""
    tile = np.full((112, 112, 3), 90, np.uint8)
    for name, count in (("p0", 3), ("p1", 4)):
        write_image(tmp_path / "blocks" / f"{name}.png", write_block(np.stack([tile] * count), 5))
    lines = [
        {"file": f"{name}.png", "index": k, "status": "failed" if (name, k) == ("p0", 1) else "aligned"}
        for name in ("p1", "p0")
        for k in range(IMAGES)
    ]
    (tmp_path / "report.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = DataSettings(str(tmp_path / "blocks"), None, str(world / "samples"), str(tmp_path / "report.jsonl"))
    found = open_set(settings, "data")
    assert found.index.tolist() == [0, 2, 3, 0, 1, 2, 3]
    assert found.seed.tolist() == [100, 102, 103, 104, 105, 106, 107]


def adaface(world: Path, tmp_path: Path) -> list[str]:
    file = tmp_path / "adaface_ir101_webface4m.safetensors"
    shutil.copy(world / "net.safetensors", file)
    return [f"embedder.checkpoint={file}"]


def test_a_verdict_only_with_the_embedder_of_the_thresholds(world, tmp_path):
    found = run(words(world, tmp_path / "a", *adaface(world, tmp_path)), choice="adaface_ir101")
    assert found["embedder"]["is_published"]
    assert found["sets"]["faces"]["verdict"].startswith("C_intra 1.000, consistent:")
    assert "as given" in found["sets"]["faces"]["verdict"]
    found = run(words(world, tmp_path / "b", *adaface(world, tmp_path)), choice="own")
    assert found["sets"]["faces"]["verdict"] is None


MISTAKES = [
    (["data.root=null"], r"data\.root: not set"),
    (["data.root={tmp}/none"], r"data\.root: no such folder: .*none"),
    (["data.root={tmp}"], r"data\.root: .* holds no identities"),
    (["sets=[{{name: a, root: {world}/faces}}]"], "data, sets: one or the other"),
    (["data.root=null", "sets=[]"], "sets: holds no set"),
    (["data.root=null", "sets=[{{path: x}}]"], r"sets\[0\]\.path: unknown key"),
    (
        ["data.root=null", "sets=[{{root: {world}/faces}},{{root: {world}/faces}}]"],
        r"sets\[1\]\.name: faces is the name",
    ),
    (["data.name=cache"], r"data\.name: cache is a folder of the evaluation"),
    (["data.samples_dir={world}/real"], r"data\.samples_dir: .*real holds neither manifest\.jsonl nor dataset\.json"),
    (["data.root={world}/real", "data.samples_dir={tmp}/others"], r"data\.samples_dir: .* none of them in .*real"),
    (["data.samples_dir={tmp}/damaged"], r"manifest\.jsonl line 2: not JSON"),
    (["data.samples_dir={tmp}/short"], r"manifest\.jsonl line 1: has no seed"),
    (["data.alignment_report={tmp}/none.jsonl"], r"data\.alignment_report: no such file"),
    (["output_dir={world}/faces/out"], "output_dir: .* lies in .*faces"),
    (["output_dir={world}/real/out"], "output_dir: .* lies in .*real"),
    (["output_dir={world}"], "output_dir: .*faces would hold the results of a set, and holds its images; give another"),
    (["output_dir={world}", "data.name=real"], "output_dir: .*real would hold the results of a set"),
    (["real.root={tmp}/none"], r"real\.root: no such folder"),
    (["real.root=null", "real.match=names"], r"real\.match: there is no real set"),
    (["real.root=null", "radius=auto"], "radius: auto is read off the real set"),
    (["real.match={tmp}/none.txt"], r"real\.match: no such file"),
    (["real.match={tmp}/nobody.txt"], r"real\.match: .*nobody\.txt: no generated identity \(such as p0\)"),
    (["real.image_names_file=x"], r"real\.image_names_file: names the rows of real\.embeddings_file"),
    (["real.embeddings_file={tmp}/none.npy"], r"real\.embeddings_file: no such file"),
    (["real.embeddings_file={tmp}/wide.npz"], r"real\.embeddings_file: .* holds rows 8 wide, this embedder's are 16"),
    (["real.embeddings_file={tmp}/rows.npz"], r"real\.embeddings_file: .* has no row for any image"),
    (["real.embeddings_file={tmp}/other/embeddings.npy"], "was made with other.safetensors, another network"),
    (["real.embeddings_file={world}/embeddings/embeddings.npy", "flip=false"], "flip: False, but .* flip=True"),
    (["real.root={world}/faces", "radius=auto"], "radius: auto needs 1000 impostor pairs; the real set has 240"),
    (["radius=3"], "radius: 3; a cosine distance"),
    (["radius=near"], "radius: 'near'; a cosine distance"),
    (["neighbours=0"], "neighbours: 0; it must be at least 1"),
    (["duplicate_cosine=1.5"], r"duplicate_cosine: 1\.5"),
    (["precision=fp8"], "precision: 'fp8'"),
    (["lpips_vgg={tmp}/vgg.pth"], "lpips_vgg, lpips_linear: LPIPS needs both"),
    (["lpips_vgg={tmp}/vgg.pth", "lpips_linear={tmp}/lin.pth"], "lpips_vgg: no such file"),
    (["curate.enabled=true"], r"curate\.enabled: true, but none of curate\.min_cosine"),
    (["curate.min_cosine=0.5"], r"curate\.min_cosine: 0\.5, but curate\.enabled is false"),
    (["curate.enabled=true", "curate.min_cosine=1.5"], r"curate\.min_cosine: 1\.5; a cosine"),
    (
        ["curate.enabled=true", "curate.min_cosine=0", "curate.format=zip"],
        r"curate\.format: 'zip' is not one of folders",
    ),
    (
        ["real.root=null", "curate.enabled=true", "curate.max_training_cosine=0.5"],
        "max_training_cosine: there is no real",
    ),
    (["features=inception"], r"features\.weights: not set"),
    (["features=inception", "features.weights={world}/net.safetensors"], r"features\.weights: .* has no classifier"),
    (["embedder.checkpoint={tmp}/none"], r"embedder\.checkpoint: no such file"),
]


@pytest.mark.parametrize(("more", "message"), MISTAKES)
def test_mistakes_are_told_before_any_work(world, tmp_path, more, message, monkeypatch):
    def works(*args, **kwargs):
        raise AssertionError("work has begun")

    monkeypatch.setattr(extraction, "embed_images", works)
    good = (world / "samples/manifest.jsonl").read_text().splitlines()
    for name, text in (
        ("others", good[0].replace("p0", "q0")),
        ("damaged", f"{good[0]}\n{good[1][:20]}"),
        ("short", '{"identity": "p0", "index": 0}'),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.jsonl").write_text(text)
    (tmp_path / "nobody.txt").write_text("q1\nq2\n")
    for name, width in (("wide", 8), ("rows", 16)):
        np.savez(tmp_path / f"{name}.npz", names=["x/0", "y/0"], embeddings=np.eye(2, width, dtype=np.float32))
    shutil.copytree(world / "embeddings", tmp_path / "other")
    write_json(tmp_path / "other/encoder.json", {"checkpoint": "other.safetensors", "embedder_sha256": "0"})
    arguments = words(world, tmp_path / "out", *(word.format(tmp=tmp_path, world=world) for word in more))
    with pytest.raises(UserError, match=message) as caught:
        run(arguments)
    assert "\n" not in str(caught.value)


def test_the_command_says_mistakes_in_one_line(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *words(world, tmp_path / "out", "curate.min_cos=0.3")])
    with pytest.raises(SystemExit) as left:
        evaluate.main()
    assert left.value.code == 2
    assert capsys.readouterr().err == "error: curate.min_cos: unknown key; did you mean curate.min_cosine?\n"
