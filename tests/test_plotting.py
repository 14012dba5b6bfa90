"""The figures: the numbers and images behind them, on a tiny random model, the files, and what users get wrong."""

import ast
import copy
import dataclasses
import io
from pathlib import Path

import hydra
import numpy as np
import pytest
import torch
from PIL import Image

from diffusion.drawing import FaceDrawer
from diffusion.first_stage import FirstStage
from diffusion.perturbation import lower_bounds
from diffusion.rules import Progress
from diffusion.samplers import OneStage, sample_ddim, sample_two_stage
from diffusion.sampling_run import image_seed
from diffusion.sampling_settings import drawing_settings
from evaluation.results import Histogram, Identities, Images, SetResult
from tests import test_sample
from utils.config import CONFIG_DIR, UserError
from utils.images import read_image, write_image
from utils.plotting import __main__ as plotting
from utils.plotting import method_arrays, result_plots
from utils.plotting.canvas import CELL, DPI, image_grid, png
from utils.plotting.catalogue import METHOD_FIGURES, SET_FIGURES, method_figures, method_names
from utils.plotting.method_plots import PHASES, attention_change_figure, attention_maps_figure, phase
from utils.plotting.roc import roc_figure
from utils.plotting.settings import Method, load_method

files = test_sample.files  # the fixture: a checkpoint, its decoder, four contexts
STEPS = 10  # t = 900, 800 .. 0; stage 1 at 900 .. 500


def compose(*overrides: str):
    with hydra.initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        return hydra.compose("plotting_config", list(overrides))


def settings(files: Path, output_dir: Path, *more: str) -> list[str]:
    return [
        f"checkpoint.path={files / 'run'}",
        f"VQDecoder_path={files / 'vq_decoder.safetensors'}",
        f"sampling.contexts_file={files / 'contexts.npy'}",
        f"output_dir={output_dir}",
        "sampling.sample_config.MSE_th=0",
        *((f"sampler.num_steps={STEPS}", "sampler.indexing=exact") if "sampler=ddpm" not in more else ()),
        "figures.n_curves=6",
        "figures.n_rows=2",
        "figures.fixed_t0=[400,600]",
        "figures.guidance_scales=[0,1,3]",
        "figures.perturbation_cosines=[1,0.8,0]",
        *more,
    ]


def run(files: Path, output_dir: Path, *more: str) -> list[Path]:
    return plotting.main.__wrapped__(compose(*settings(files, output_dir, *more)))


def switching(method: Method) -> Method:
    """With the threshold at which about half of the images switch."""
    d = method_arrays.attention_change(method).d
    threshold = float(np.median(d.min(axis=0))) * 1.0001
    return dataclasses.replace(method, sampler=dataclasses.replace(method.sampler, threshold=threshold))


@pytest.fixture(scope="module")
def latent_method(files, tmp_path_factory) -> Method:
    return switching(load_method(compose(*settings(files, tmp_path_factory.mktemp("plots")))))


@pytest.fixture(scope="module")
def method(latent_method) -> Method:
    """A network that heeds its context, and a decoder without a codebook, so that what differs is seen."""
    unet = copy.deepcopy(latent_method.generator.unet)
    for name, weights in unet.named_parameters():
        if any(part in name for part in ("x_proj_out", "cross_attention.to_q", "cross_attention.to_k")):
            weights *= 5
    first_stage = FirstStage(decoder=torch.nn.Tanh(), latent_scale=64.0)  # x_0 is about so large
    generator = dataclasses.replace(latent_method.generator, unet=unet, first_stage=first_stage)
    return switching(dataclasses.replace(latent_method, generator=generator))


@pytest.fixture(scope="module")
def change(method) -> method_arrays.AttentionChange:
    return method_arrays.attention_change(method)


@pytest.fixture(scope="module")
def path(method) -> method_arrays.Path:
    """At every one of its steps."""
    return method_arrays.path(with_figures(method, n_timesteps=STEPS))


def with_figures(method: Method, **changed) -> Method:
    return dataclasses.replace(method, figures=dataclasses.replace(method.figures, **changed))


def start(method: Method, samples: list[tuple[str, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """x_T (n, C, h, w) and contexts (n, D) of these images, made by hand."""
    seeds = [image_seed(method.sampling.seed, *sample) for sample in samples]
    x_T = [torch.randn(method.generator.latent_shape, generator=torch.Generator().manual_seed(s)) for s in seeds]
    contexts = method.identities.contexts_of([name for name, _ in samples])
    return torch.stack(x_T), contexts * method.generator.context_scale


def decoded(method: Method, x_0: torch.Tensor) -> np.ndarray:
    return FaceDrawer(method.generator, method.sampler, drawing_settings(method.sampling)).decode(x_0)


def nearly(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal but for rounding, which may move a few latents to another code."""
    return a.shape == b.shape and float(np.abs(a.astype(int) - b.astype(int)).mean()) < 0.5


# ------------------------------------------------------------------------------------------------ numbers of the method


def test_attention_change_is_that_of_the_sampler(method, change):
    names = method.identities.names
    x_T, context = start(method, [(names[i % 4], i // 4) for i in range(6)])
    own = {name: getattr(method.sampler, name) for name in ("num_steps", "threshold", "min_t", "guidance_scale")}
    expected = sample_two_stage(method.generator.unet, x_T, context, method.generator.schedule, **own)
    np.testing.assert_allclose(change.d, expected.d.numpy(), rtol=1e-3, atol=1e-6)
    assert change.switch_t.tolist() == expected.switch_t.tolist()
    assert change.timesteps == expected.timesteps[1 : len(change.d) + 1] == [800, 700, 600, 500]
    assert 0 < (change.switch_t > 0).sum() < 6 and (change.threshold, change.min_t) == (own["threshold"], 500)


def test_attention_change_figure_marks_each_switch(change):
    curves, counts = attention_change_figure(change).axes
    switched = np.flatnonzero(change.switch_t > 0)
    at = [(t, change.d[change.timesteps.index(t), i]) for i, t in zip(switched, change.switch_t[switched], strict=True)]
    np.testing.assert_allclose(curves.collections[0].get_offsets(), at)
    assert sum(bar.get_height() for bar in counts.patches) == 6
    assert counts.patches[-1].get_height() == 6 - len(switched)  # those of stage 2


def test_path_ends_in_the_image_that_sample_draws(latent_method, files, tmp_path):
    path = method_arrays.path(with_figures(latent_method, n_timesteps=STEPS, index=1))
    test_sample.run(
        files,
        tmp_path / "out",
        "sampling.n_contexts=1",
        "sampling.n_samples_per_context=2",
        "sampler.indexing=exact",
        f"sampling.sample_config.MSE_th={latent_method.sampler.threshold}",
    )
    assert path.timesteps == list(range(900, -1, -100))
    assert np.array_equal(path.predicted[-1], path.sample)  # with exact indexing the last step goes to x_0 itself
    assert np.array_equal(path.sample, read_image(tmp_path / "out" / latent_method.identity / "1.png"))


def test_change_between_maps_is_d(path):
    between = np.abs(np.diff(path.h, axis=0)).mean(axis=(1, 2))
    in_stage_1 = [t >= 500 for t in path.timesteps[1:]]
    np.testing.assert_allclose(path.d[1:][in_stage_1], between[in_stage_1], rtol=1e-5)
    assert np.isnan(path.d[[0, *range(5, 10)]]).all() and path.h.shape == (10, 32, 32)
    assert path.h.min() == 0 and path.h.max() == 1


def test_before_the_switch_the_empty_context_is_what_is_sampled(path):
    waiting = [t >= max(path.switch_t, path.min_t) for t in path.timesteps]
    assert any(waiting) and nearly(path.empty[waiting], path.predicted[waiting])
    assert not np.array_equal(path.empty[waiting], path.identity[waiting])


def test_prediction_with_the_identity_is_that_of_one_stage(method):
    x_T, context = start(method, [(method.identity, 0)])
    seen = []
    generator = method.generator
    sample_ddim(
        generator.unet, x_T, context, generator.schedule, num_steps=STEPS, callback=lambda *step: seen.append(step)
    )
    x_t = torch.cat([seen[step][2] for step in (0, 7)])
    predicted = method_arrays.predict(method.drawer(), x_t, [0, 7], context[0])
    torch.testing.assert_close(predicted, torch.cat([seen[step][3] for step in (0, 7)]), rtol=1e-4, atol=1e-4)


def test_comparison_starts_every_column_from_the_same_noise(method):
    grid = method_arrays.comparison(method)
    x_T, context = start(method, [(method.identity, 0), (method.identity, 1)])
    given = (method.generator.unet, x_T, context, method.generator.schedule)
    two = {"num_steps": STEPS, "guidance_scale": 1.0}
    adaptive = sample_two_stage(*given, **two, threshold=method.sampler.threshold)
    columns = [
        sample_ddim(*given, num_steps=STEPS),
        sample_ddim(*given, num_steps=STEPS, guidance_scale=1.0),
        sample_two_stage(*given, **two, threshold=0.0, min_t=400).x_0,
        sample_two_stage(*given, **two, threshold=0.0, min_t=600).x_0,
        adaptive.x_0,
    ]
    assert grid.columns == ["one stage", "one stage,\n$s$ = 1", "$t_0$ = 400", "$t_0$ = 600", "adaptive"]
    expected = [decoded(method, x_0).astype(int) for x_0 in columns]
    for column in range(5):
        away = [np.abs(grid.images[:, column] - image).mean() for image in expected]
        assert away[column] < 0.05 * min(away[:column] + away[column + 1 :])
    told = ["no switch" if t < 0 else f"switch at {t}" for t in adaptive.switch_t.tolist()]
    assert grid.rows == [f"noise {row + 1}\n{text}" for row, text in enumerate(told)]


def test_compared_samplers_share_solver_and_steps(method):
    noisy = dataclasses.replace(method.sampler, eta=0.5, guidance_scale=0.0, threshold_num_steps=20)
    found = method_arrays.compared_samplers(noisy, [700])
    assert found == {
        "one stage": OneStage(num_steps=STEPS, eta=0.5),
        "$t_0$ = 700": dataclasses.replace(noisy, threshold=0.0, threshold_num_steps=None, min_t=700),
        "adaptive": noisy,
    }


def test_sweeps_hold_the_samplers_own_image(method, path):
    guidance = method_arrays.guidance(method)
    assert guidance.rows == method.identities.names[:2] and guidance.columns == ["$s$ = 0", "$s$ = 1", "$s$ = 3"]
    assert np.array_equal(guidance.images[0, 1], path.sample)  # s = 1, identity 0, index 0
    assert not np.array_equal(guidance.images[0, 0], guidance.images[0, 2])
    turned = method_arrays.perturbation(method)
    assert np.array_equal(turned.images[0, 0], path.sample)  # cos = 1
    assert not np.array_equal(turned.images[0, 0], turned.images[0, 2])
    bound = lower_bounds(method.identities.contexts.numpy(), method.identities.neighbours.numpy(), 0.0)[0]
    assert turned.marked.tolist() == [False, bound > 0.8, True]


def test_figures_of_one_show_the_one_asked_for(method):
    name = method.identities.names[2]
    other = with_figures(method, identity=name, index=1, n_timesteps=2)
    x_T, context = start(method, [(name, 1)])
    own = {"num_steps": STEPS, "threshold": method.sampler.threshold}
    x_0 = sample_two_stage(method.generator.unet, x_T, context, method.generator.schedule, **own).x_0
    path = method_arrays.path(other)
    assert nearly(path.sample, decoded(method, x_0)[0]) and path.timesteps == [900, 0]
    assert method_arrays.guidance(other).rows == method.identities.names[2:4]


def test_observer_changes_no_image(method, path):
    (drawn,) = method.drawer().draw(method.jobs([(method.identity, 0)]))
    assert np.array_equal(drawn.image, path.sample)


@pytest.mark.parametrize(
    ("size", "count", "expected"),
    [(50, 3, [0, 24, 49]), (12, 8, [0, 2, 3, 5, 6, 8, 9, 11]), (3, 8, [0, 1, 2]), (9, 1, [0])],
)
def test_spread(size, count, expected):
    assert method_arrays.spread(size, count) == expected


@pytest.mark.parametrize(
    ("t", "switch_t", "expected"),
    [(900, 700, 0), (700, 700, 0), (600, 700, 1), (400, 700, 2), (500, -1, 0), (499, -1, 2)],
)
def test_phase(t, switch_t, expected):
    assert phase(t, switch_t, 500) == expected


def test_phases_agree_with_the_rule(method, path):
    """What the bars say is what the engine asked of the network."""
    rule = method.drawer().engine.rule
    for t in path.timesteps:
        evaluation = rule.evaluation(t, Progress(switch_t=path.switch_t if t < path.switch_t else -1))
        number = 2 if evaluation.blends_cross else 1 if len(evaluation.branches) == 2 else 0
        assert phase(t, path.switch_t, path.min_t) == number


# ------------------------------------------------------------------------------------------------------------- drawing


def test_grid_shows_images_at_their_place():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 3, 8, 8, 3), dtype=np.uint8)
    figure, axes = image_grid([images[0], [images[1, 0], None, rng.random((4, 4))]], columns=["a", "b", "c"])
    assert np.array_equal(axes[0, 2].images[0].get_array(), images[0, 2])
    assert not axes[1, 1].images and axes[1, 2].images[0].get_clim() == (0, 1)
    picture = Image.open(io.BytesIO(png(figure, "Title", "What it shows")))
    assert picture.text["Title"] == "Title" and picture.text["Description"] == "What it shows"
    box = axes[0, 0].get_position()  # without row titles the image begins at the margin, and is square
    assert box.width * picture.width == pytest.approx(CELL * DPI, abs=1)
    assert box.height * picture.height == pytest.approx(CELL * DPI, abs=1)


def test_maps_figure_puts_map_below_image(path):
    axes = np.array(attention_maps_figure(path).axes).reshape(3, STEPS + 1)
    assert np.array_equal(axes[0, 4].images[0].get_array(), path.predicted[4])
    assert np.array_equal(axes[1, 4].images[0].get_array(), path.h[4])
    assert np.array_equal(axes[0, STEPS].images[0].get_array(), path.sample)
    assert [text.get_text() for text in axes[0, 0].figure.legends[0].get_texts()] == list(PHASES)


# -------------------------------------------------------------------------------------------------------- evaluations


@pytest.fixture
def result(tmp_path) -> SetResult:
    """Five identities of three images, whose consistency is 0.5 .. 0.9 in another order, and training faces."""
    rng = np.random.default_rng(0)
    files = [f"{name}/{k}.png" for name in "abcde" for k in range(3)]
    for root, names in (("faces", files), ("training", ["x/0.png", "y/0.png"])):
        for name in names:
            write_image(tmp_path / root / name, rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    consistency = np.array([0.7, 0.9, 0.5, 0.8, 0.6])
    columns = [np.array(list("abcde")), np.full(5, 3), consistency, consistency, np.zeros(5, int), consistency]
    images = Images(np.array(files), np.repeat(np.arange(5), 3), np.linspace(0, 1, 15), np.full(15, -1))
    edges = np.linspace(-1, 1, 21)
    return SetResult(
        "two_stage",
        str(tmp_path / "faces"),
        {"eer": 0.125},
        Identities(*columns),
        images,
        {},
        {},
        training_root=str(tmp_path / "training"),
        nearest_training_images=[("c/1.png", "y/0.png", 0.75), ("a/0.png", "x/0.png", 0.5)],
        histograms={
            "genuine": Histogram(edges, np.arange(20)),
            "impostor": Histogram(edges, np.r_[np.zeros(5, int), np.full(10, 7), np.zeros(5, int)]),
        },
        roc=(np.array([0.0, 0.1, 1.0]), np.array([0.4, 0.9, 1.0])),
    )


def test_strips_are_the_best_and_the_worst(result):
    strips = result_plots.identity_strips(result, 2, 2)
    assert (strips.names, strips.num_best) == (["b", "d", "e", "c"], 2)
    assert strips.consistency == [0.9, 0.8, 0.6, 0.5]
    assert np.array_equal(strips.images[1][1], read_image(Path(result.root) / "d/1.png"))
    np.testing.assert_allclose(strips.cosines[1], [9 / 14, 10 / 14])
    everyone = result_plots.identity_strips(result, 4, 9)  # nobody twice
    assert (everyone.names, everyone.num_best) == (["b", "d", "a", "e", "c"], 3)
    assert [len(row) for row in everyone.images] == [3] * 5


def test_nearest_pairs_are_the_files_named(result):
    pairs = result_plots.nearest_pairs(result, 1)
    assert np.array_equal(pairs.generated[0], read_image(Path(result.root) / "c/1.png"))
    assert np.array_equal(pairs.training[0], read_image(Path(result.training_root) / "y/0.png"))
    assert pairs.cosines == [0.75]
    (Path(result.root) / "c/1.png").unlink()
    with pytest.raises(UserError, match=r"evaluation.dir: .*faces holds no c/1.png any more"):
        result_plots.nearest_pairs(result, 2)


def test_scores_are_densities(result):
    figure = result_plots.scores_figure(result.histograms, result.metrics)
    (axes,) = figure.axes
    impostor, _, genuine, _ = [patch.get_data() for patch in axes.patches]
    for values, edges, _ in (impostor, genuine):
        assert (values * np.diff(edges)).sum() == pytest.approx(1)
    assert genuine.values[19] == pytest.approx(19 / 190 / 0.1) and axes.get_xlim() == pytest.approx((-0.9, 1))
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "impostor (70)",
        "genuine (190)",
        "EER 12.50 %",
    ]


def test_roc_of_two_sets(result):
    other = dataclasses.replace(result, name="one_stage", metrics={}, roc=(np.array([0.01, 1]), np.array([0.5, 1])))
    (axes,) = roc_figure(result_plots.roc_curves([result, other])).axes
    labels = [line.get_label() for line in axes.lines]
    assert labels == ["two_stage (EER 12.50 %)", "one_stage"]
    np.testing.assert_array_equal(axes.lines[0].get_xydata(), [[0, 0.4], [0.1, 0.9], [1, 1]])
    assert axes.get_xlim() == (0.01, 1) and axes.get_title() == "pairs of images"


# --------------------------------------------------------------------------------------------------------- the command


def test_all_figures_appear(files, result, tmp_path):
    for name in ("two_stage", "one_stage"):
        dataclasses.replace(result, name=name).save(tmp_path / "evaluation" / name)
    few = [f"figures.{name}" for name in ("n_timesteps=2", "n_rows=1", "n_curves=2", "fixed_t0=[600]")]
    few += ["figures.guidance_scales=[1]", "evaluation.n_identities=1", "evaluation.n_images=2"]
    written = run(files, tmp_path / "out", f"evaluation.dir={tmp_path / 'evaluation'}", "sampling.image_size=24", *few)
    names = [name for name in SET_FIGURES if name != "roc"]
    expected = {*METHOD_FIGURES, "roc", *(f"{name}_{one}" for name in names for one in ("two_stage", "one_stage"))}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {f"{name}.png" for name in expected}
    assert {path.stem for path in written} == expected
    for path in written:
        picture = Image.open(path)
        assert min(picture.size) > 100 and picture.text["Title"] and picture.text["Description"]


def test_named_figures_alone_and_a_measured_threshold(files, tmp_path):
    auto = ("sampling.sample_config.MSE_th=auto", "sampling.calibration.n_contexts=3")
    run(files, tmp_path, "figure=[attention_change]", *auto)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["attention_change.png", "calibration.json"]


def test_method_figures_for_a_report(method):
    few = with_figures(method, n_timesteps=2, n_rows=1, n_curves=2)
    made = method_figures(few, ["stages", "guidance"])
    assert [title for title, _, _ in made] == ["The two stages", "Guidance"]
    assert all(caption and data.startswith(b"\x89PNG") for _, caption, data in made)


def test_other_samplers_have_the_sweeps_alone(files, tmp_path):
    one_stage = [word for word in settings(files, tmp_path, "sampler=ddim") if "MSE_th" not in word]
    assert method_names(load_method(compose(*one_stage))) == ["guidance", "perturbation"]
    with pytest.raises(UserError, match=r"figure: stages: only the two-stage sampler has it .*not OneStage"):
        plotting.main.__wrapped__(compose(*one_stage, "figure=stages"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("figure=faces", r"figure: 'faces' is no figure; there are attention_change, .*, and all"),
        ("figure=[]", r"figure: an empty list"),
        ("figure=[all,roc]", r"figure: 'all' is no figure"),
        ("figure=roc", r"evaluation.dir: not set"),
        ("evaluation.dir=nowhere", r"evaluation.dir: no such folder: nowhere; the output_dir of evaluate.py"),
        ("evaluation.dir=configs", r"evaluation.dir: no result.json in configs"),
        ("evaluation.n_pairs=0", r"evaluation.n_pairs: 0; give at least 1"),
        ("figures.n_rows=0", r"figures.n_rows: 0; give at least 1"),
        ("figures.index=-1", r"figures.index: -1; give at least 0"),
        ("figures.identity=nobody", r"figures.identity: 'nobody' is none of the 4 identities \(00000 .. 00003\)"),
        ("figures.fixed_t0=[400,1001]", r"figures.fixed_t0: \[400, 1001\]; give a list of numbers from 1 to 1000"),
        ("figures.guidance_scales=[]", r"figures.guidance_scales: \[\]; give a list of numbers from 0 on"),
        ("figures.perturbation_cosines=[2]", r"figures.perturbation_cosines: \[2.0\]; .* from 0 to 1"),
        ("figures.guidance_scales=[a]", r"figures.guidance_scales: "),
        ("+sampling.save_mode=blocks", r"sampling.save_mode: unknown key"),
        ("sampling.compute_batch=1", r"sampling.compute_batch: 1"),
        ("checkpoint.path=nowhere", r"checkpoint.path: no such file or folder: nowhere"),
    ],
)
def test_mistakes_are_one_line(files, tmp_path, override, message):
    with pytest.raises(UserError, match=message):
        run(files, tmp_path / "out", override)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ((), r"checkpoint.path: not set, nor is evaluation.dir"),
        (("figure=stages",), r"checkpoint.path: not set; the figure stages needs it"),
    ],
)
def test_nothing_to_draw_from(overrides, message):
    with pytest.raises(UserError, match=message):
        plotting.main.__wrapped__(compose(*overrides))


def test_results_that_do_not_hold_it(result, tmp_path):
    result.roc = None
    result.save(tmp_path / "set")
    with pytest.raises(UserError, match=r"figure: roc: the evaluation of two_stage holds no ROC"):
        plotting.main.__wrapped__(compose("figure=roc", f"evaluation.dir={tmp_path / 'set'}"))
    (tmp_path / "set" / "tables.npz").write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(UserError, match=r"evaluation.dir: .*set holds no result that this version reads"):
        plotting.main.__wrapped__(compose(f"evaluation.dir={tmp_path / 'set'}"))


def test_matplotlib_is_not_imported_before_a_figure_is_made():
    """Training processes import these packages, and it takes long to load."""
    for package in ("utils", "recognition", "diffusion", "evaluation"):
        for file in (test_sample.ROOT / package).rglob("*.py"):
            top = [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
            names = [getattr(node, "module", None) or node.names[0].name for node in top]
            assert not [name for name in names if name.startswith("matplotlib")], file
