"""tools/table.py, with runs that write what they would: AP by row and seed, and weights."""
import json

import numpy as np
import torch

from common import resnet_stages
from tools import table


def test_rows_seeds_and_differences(tmp_path, capsys, monkeypatch):
    started, pre_trained = [], []
    for seed in range(3):
        torch.manual_seed(seed)
        state = resnet_stages("resnet18").state_dict()
        pre_trained.append({name: 3 * value for name, value in state.items()})

    def run_script(words, out, threads):
        assert threads == 1
        seed = int(words[words.index("--seed") + 1])
        started.append((words[0], out.relative_to(tmp_path).as_posix()))
        out.mkdir(parents=True, exist_ok=True)
        if words[0] == "finetune_fasterrcnn.py":
            weights = str(words[words.index("--weights") + 1])
            ap = 0.1 + seed / 100 + (0.02 * (1 + seed) if "moco" in weights else 0)
            (out / "ap.json").write_text(json.dumps(dict(AP=ap, AP50=2 * ap, AP75=ap / 2)))
        else:
            torch.save(pre_trained[seed], out / "backbone.pt")

    monkeypatch.setattr(table, "run_script", run_script)
    words = ["table.py", "--rows", "random=none", "a moco=moco_v2.py --lr 1",
             "there={seed}/moco.pt", "--seeds", "0", "1", "2", "--vary", "", "--iterations 7",
             "--jobs", "2", "--out", str(tmp_path), "--against", "random"]
    monkeypatch.setattr("sys.argv", words)
    table.main()
    assert sorted(script for script, _ in started) == 18 * ["finetune_fasterrcnn.py"] + 3 * [
        "moco_v2.py"]
    assert ("moco_v2.py", "a_moco/seed2") in started
    assert ("finetune_fasterrcnn.py", "there/seed1/finetune_iterations_7") in started
    said = capsys.readouterr().out
    # AP 10, 11, 12; with 2, 4 and 6 added; each deviates by 1, 3 and (the difference) 2
    assert said.count("| random | 11.0 ± 1.0 | 10.00, 11.00, 12.00 | 22.0 | 5.5 |  |") == 2
    for name in ("a moco", "there"):
        row = f"| {name} | 15.0 ± 3.0 | 12.00, 15.00, 18.00 | 30.0 | 7.5 | 4.0 ± 2.0 |"
        assert said.count(row) == 2
    cosines = said[said.index("| cosine to the initial weights |"):].splitlines()[2:]
    assert cosines == ["| a moco |" + 5 * " 1.000 |"]  # three times as long, in the same direction
    table.main()  # once more: nothing is left to do
    assert len(started) == 21


def test_a_table_with_nothing_to_subtract(capsys):
    table.print_table(["a"], np.full((1, 2, 3), 7.0), "--flags", [])
    assert capsys.readouterr().out.splitlines() == [
        "", "| --flags | AP | of each seed | AP50 | AP75 |", "| --- | --- | --- | --- | --- |",
        "| a | 7.0 ± 0.0 | 7.00, 7.00 | 7.0 | 7.0 |"]
