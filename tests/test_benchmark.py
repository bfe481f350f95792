"""tools/benchmark.py, at sizes that take seconds."""
import csv
import subprocess
import sys

from conftest import ROOT


def test_a_step_with_more_keys_than_the_steps_have_images(tmp_path):
    """A method refuses to train with so many, unless the folder has as many images."""
    words = ("step --methods moco_v2 --rounds 1 --steps 1 --batch-size 8 --arch resnet18 "
             "--workers 0 --queue-size 1024")
    subprocess.run([sys.executable, ROOT / "tools" / "benchmark.py", *words.split(), "--csv",
                    tmp_path / "step.csv", "--flags", "--image-size", "64"], check=True)
    with open(tmp_path / "step.csv", newline="") as file:
        row, = csv.DictReader(file)
    assert row["variant"] == "moco_v2" and float(row["time"]) == 1
    # of an image: two networks forward and one backward, 2 x 1.81e9 / (224 / 64)^2 each time (the
    # backward pass is two), and the logits forward and backward
    counted = (4 * 2 * 1.81e9 / 3.5 ** 2 + 2 * 2 * 128 * 1024) / 1e12
    assert abs(float(row["tflop"]) / 8 / counted - 1) < 0.03
    assert float(row["images_per_s"]) > 0 and float(row["end_to_end"]) > 0
