import pickle

import numpy as np
import pytest
import torch

from utils.config import UserError
from utils.contexts import (
    _covariance,
    gaussian_contexts,
    mean_contexts,
    read_contexts,
    read_embeddings,
    uniform_contexts,
    write_embeddings,
)

NAMES = ["b/1.png", "a/x.png", "a/y.png"]
ROWS = uniform_contexts(3, 8, seed=0)


def check(found, names=NAMES, rows=ROWS):
    assert found[0] == names
    assert found[1].dtype == np.float32
    np.testing.assert_allclose(found[1], rows, atol=1e-6)


def test_what_is_written_is_read(tmp_path):
    write_embeddings(tmp_path, NAMES, ROWS)
    check(read_embeddings(tmp_path / "embeddings.npy"))
    names, contexts = read_contexts(tmp_path / "contexts.npy")
    assert names == ["a", "b"]
    np.testing.assert_allclose(contexts[1], ROWS[0], atol=1e-6)
    mean = (ROWS[1] + ROWS[2]) / 2
    np.testing.assert_allclose(contexts[0], mean / np.linalg.norm(mean), atol=1e-6)
    expected = ["context_names.txt", "contexts.npy", "embeddings.npy", "image_names.txt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == expected


def test_rows_come_back_as_unit_vectors(tmp_path):
    np.savez(tmp_path / "a.npz", names=np.array(NAMES), embeddings=(ROWS * 7).astype(np.float64))
    check(read_embeddings(tmp_path / "a.npz"))
    check(read_contexts(tmp_path / "a.npz"))


def test_names_from_a_pickle(tmp_path):
    np.save(tmp_path / "rows.npy", ROWS)
    windows = [name.replace("/", "\\") for name in NAMES]
    (tmp_path / "image_names.pkl").write_bytes(pickle.dumps(windows, 2))
    check(read_embeddings(tmp_path / "rows.npy"))
    (tmp_path / "other.txt").write_text("".join(f"./{name}\n" for name in NAMES[::-1]))
    check(read_embeddings(tmp_path / "rows.npy", tmp_path / "other.txt"), NAMES[::-1])


@pytest.mark.parametrize("kind", ["npy", "pickle", "torch", "tensors", "folder", "folder of archives"])
def test_dictionaries_and_folders(tmp_path, kind):
    dictionary = {name.removesuffix(".png"): row for name, row in zip(NAMES, ROWS, strict=True)}
    path = tmp_path / "contexts.npy"
    names = list(dictionary)
    if kind == "npy":
        np.save(path, np.array(dictionary, dtype=object), allow_pickle=True)
    elif kind == "pickle":
        path.write_bytes(pickle.dumps({name: row[None] for name, row in dictionary.items()}))
    elif kind == "torch":
        torch.save(dictionary, path)
    elif kind == "tensors":
        torch.save({name: torch.from_numpy(row) for name, row in dictionary.items()}, path)
    else:
        path = tmp_path / "folder"
        for name, row in dictionary.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            if kind == "folder":
                np.save(path / f"{name}.npy", row)
            else:
                torch.save(row, path / f"{name}.npy")
        names = sorted(names)
    rows = np.stack([dictionary[name] for name in names])
    check(read_contexts(path), names, rows)
    check(read_embeddings(path), names, rows)


def test_nameless_contexts_are_numbered(tmp_path):
    np.save(tmp_path / "mine.npy", ROWS)
    check(read_contexts(tmp_path / "mine.npy"), ["00000", "00001", "00002"])
    np.save(tmp_path / "one.npy", ROWS[0])
    check(read_contexts(tmp_path / "one.npy"), ["00000"], ROWS[:1])


def test_mistakes_are_named(tmp_path):
    def error(rows, names=NAMES) -> str:
        np.save(tmp_path / "e.npy", rows)
        (tmp_path / "image_names.txt").write_text("\n".join(names))
        with pytest.raises(UserError) as caught:
            read_embeddings(tmp_path / "e.npy")
        return str(caught.value).split(": ", 1)[1]

    bad = ROWS.copy()
    bad[1, 2] = np.nan
    assert error(bad) == "row 1, a/x.png, has numbers that are not finite"
    assert error(np.stack([ROWS[0], 0 * ROWS[1], 0 * ROWS[2]])) == "row 1, a/x.png, is zero (and 1 more)"
    assert error(ROWS[:2]) == "2 rows, but 3 names"
    assert error(ROWS[None]) == "has shape (1, 3, 8); embeddings are (number, width)"
    assert error(np.ones((3, 8), int)) == "holds int64 (3, 8); embeddings are floating-point numbers"
    assert error(ROWS, ["a", "b", "a"]) == "the name a stands for two rows"
    (tmp_path / "image_names.txt").unlink()
    with pytest.raises(UserError, match="rows have no names"):
        read_embeddings(tmp_path / "e.npy")
    with pytest.raises(UserError, match="no such file of names"):
        read_embeddings(tmp_path / "e.npy", tmp_path / "absent.txt")
    with pytest.raises(UserError, match="no such file or folder"):
        read_contexts(tmp_path / "absent.npy")
    np.save(tmp_path / "d.npy", np.array({"a": ROWS[0], "b": ROWS[0][:5]}, dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="b is 5 wide, a 8"):
        read_contexts(tmp_path / "d.npy")


def test_mean_contexts_identities():
    names, contexts = mean_contexts(["x.png", "c/d/2.png", "c/d/1.png", "c/3.png"], uniform_contexts(4, 8, 1))
    assert names == ["c", "c/d", "x"] and contexts.shape == (3, 8)
    with pytest.raises(UserError, match="a: the embeddings of its images cancel out"):
        mean_contexts(["a/1", "a/2"], np.stack([ROWS[0], -ROWS[0]]))


def test_uniform_contexts():
    contexts = uniform_contexts(500, 16, seed=3)
    np.testing.assert_allclose(np.linalg.norm(contexts, axis=1), 1, atol=1e-6)
    assert np.abs(contexts.mean(axis=0)).max() < 0.05
    assert np.array_equal(uniform_contexts(7, 16, seed=3), contexts[:7])
    assert not np.array_equal(uniform_contexts(7, 16, seed=4), contexts[:7])
    np.testing.assert_allclose(uniform_contexts(1, 3, seed=0)[0], [0.18882, -0.19839, 0.96176], atol=1e-5)


def cone(count: int, seed: int) -> np.ndarray:
    """Unit vectors around an axis, spread along few directions, as a recogniser's are."""
    generator = np.random.default_rng(seed)
    rows = generator.standard_normal((count, 32)) * (0.4 / np.arange(1, 33))
    rows[:, 0] += 0.3
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def test_gaussian_contexts_follow_the_reference():
    reference = cone(2000, 0)
    drawn = gaussian_contexts(reference, 1500, seed=1, max_similarity=1.0)
    assert drawn.shape == (1500, 32) and drawn.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(drawn, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(drawn.mean(axis=0), reference.mean(axis=0), atol=0.06)
    np.testing.assert_allclose(drawn.std(axis=0), reference.std(axis=0), atol=0.1)
    assert np.array_equal(gaussian_contexts(reference, 5, seed=1, max_similarity=1.0), drawn[:5])


def test_gaussian_contexts_keep_their_distance():
    reference = uniform_contexts(60, 32, seed=5)
    drawn = gaussian_contexts(reference, 40, seed=2, max_similarity=0.5)
    assert (drawn @ reference.T).max() <= 0.5 + 1e-6
    assert np.triu(drawn @ drawn.T, 1).max() <= 0.5 + 1e-6
    # By default new people look no more alike than the known ones do.
    known = np.quantile((reference @ reference.T)[np.triu_indices(60, 1)], 0.999)
    drawn = gaussian_contexts(reference, 40, seed=2)
    assert max((drawn @ reference.T).max(), np.triu(drawn @ drawn.T, 1).max()) <= known + 1e-6


def test_gaussian_contexts_give_up():
    with pytest.raises(
        UserError, match=r"max_similarity: -0\.500 leaves room for 0 of 10 new identities in 2000 draws"
    ):
        gaussian_contexts(cone(20, 0), 10, seed=0, max_similarity=-0.5)
    with pytest.raises(UserError, match="at least two contexts"):
        gaussian_contexts(ROWS[:1], 10, seed=0)


def test_shrinkage_is_that_of_ledoit_and_wolf():
    rows = np.random.default_rng(0).standard_normal((12, 5)) * [3, 2, 1, 0.5, 0.1]
    shrunk = _covariance(rows, None)  # the numbers of sklearn.covariance.ledoit_wolf, whose share is 0.3157
    np.testing.assert_allclose(np.diag(shrunk), [2.3991457, 2.85173338, 1.2895254, 0.57965973, 0.48691277], atol=1e-8)
    assert shrunk[0, 1] == pytest.approx(-0.52869989)
    np.testing.assert_allclose(_covariance(rows, 0.0), np.cov(rows.T, ddof=0), atol=1e-12)


def test_embeddings_of_images_are_not_taken_for_contexts(tmp_path):
    write_embeddings(tmp_path, ["a/0.png", "a/1.png", "b/0.png"], np.eye(3, 8, dtype=np.float32))
    with pytest.raises(UserError, match=r"embeddings\.npy: one embedding an image, .* contexts\.npy is beside it"):
        read_contexts(tmp_path / "embeddings.npy")
    assert read_contexts(tmp_path / "contexts.npy")[0] == ["a", "b"]
