import re

import pytest

import train


@pytest.mark.slow
def test_the_demo_gains_ten_points(tmp_path, capsys):
    assert train.main(["--exp", "demo", "--save-dir", str(tmp_path / "demo")]) == 0
    rows = re.findall(r"^synthetic .*?(\d+\.\d+) ± ", capsys.readouterr().out, re.MULTILINE)
    frozen, adapted = map(float, rows)
    assert adapted >= frozen + 10
