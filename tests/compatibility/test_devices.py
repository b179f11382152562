"""Names of devices: what vitface cannot run on is refused before anything is read."""

import pytest
import torch
from cases import case

import vitface
from vitface.__main__ import main
from vitface.device import known_device, resolve_device
from vitface.errors import ConfigError

KIND = "Devices"
NEVER = "vitface runs on cpu and cuda, and was never tried on {}; use cpu"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        pytest.param("mps", NEVER.format("mps"), marks=case("`--device mps`", "refused at once; use cpu")),
        pytest.param("mps:0", NEVER.format("mps"), marks=case("`--device mps:0`", "refused at once; use cpu")),
        pytest.param("xpu", NEVER.format("xpu"), marks=case("`--device xpu`", "refused at once; use cpu")),
        pytest.param("hpu", NEVER.format("hpu"), marks=case("`--device hpu`", "refused at once; use cpu")),
        pytest.param("meta", NEVER.format("meta"), marks=case("`--device meta`", "refused at once; use cpu")),
        pytest.param("gpu", "is none of cpu, cuda", marks=case("`--device gpu`", "the names there are")),
        pytest.param("CUDA", "is none of cpu, cuda", marks=case("`--device CUDA`", "the names there are")),
        pytest.param("cuda:x", "is none of cpu", marks=case("`--device cuda:x`", "the names there are")),
    ],
)
def test_other_devices_are_refused_before_anything_is_read(tmp_path, monkeypatch, capsys, name, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        vitface.load("nowhere", device=name)
    assert main(["info", "nowhere"]) == 2 and "nowhere is neither" in capsys.readouterr().err
    assert main(["verify", "--no-align", *2 * [str(crop(tmp_path))], "--checkpoint", "no", "--device", name]) == 2
    assert message in capsys.readouterr().err
    assert main(["train", "--exp", "demo", "--save-dir", "run", "--device", name]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "run").exists()


def crop(folder):
    from PIL import Image

    Image.new("RGB", (112, 112)).save(folder / "a.png")
    return folder / "a.png"


@case("`--device cuda:99`", "an error that says how many GPUs torch finds")
def test_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match="--device cuda:99 cannot be used here, torch finds 2 GPUs: "):
        resolve_device("cuda:99")
    assert known_device("cuda:99") == torch.device("cuda:99") and known_device("auto").type in ("cpu", "cuda")


@case('`model.to("mps")`', "refused; the model stays where it is")
def test_moving_a_model():
    from conftest import tiny_recogniser

    model = tiny_recogniser()
    with pytest.raises(ConfigError, match="never tried on mps"):
        model.to("mps")
    assert model.model.vit.device.type == "cpu"
