"""metrics.jsonl over kills and resumes."""

from utils.metrics_file import MetricsFile


def test_resuming_drops_what_the_checkpoint_does_not_know(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, 0)
    for step in (10, 20, 30):
        file.append({"step": step, "loss": 0.5})
    with path.open("a") as torn:
        torn.write('{"step": 40, "lo')  # killed in the middle of a line
    MetricsFile(path, 20).append({"step": 30, "loss": 0.25})
    assert path.read_text().splitlines() == [
        '{"step": 10, "loss": 0.5}',
        '{"step": 20, "loss": 0.5}',
        '{"step": 30, "loss": 0.25}',
    ]
