"""`python -m emqlib.deploy`: what it prints, against the network itself; it needs no PyTorch."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import emqlib as emq
from emqlib.deploy import __main__ as command
from emqlib.train.data import normalize
from emqlib.train.evaluate import batches

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@pytest.fixture(scope="module")
def trained() -> tuple[torch.nn.Module, emq.Dataset]:
    pytest.importorskip("sklearn")
    torch.manual_seed(0)
    data = emq.load_dataset("digits", image_size=16).subset(300, 50)
    model = emq.convert(emq.models.resnet8(10, width=4), emq.QuantSpec(bits=(4, 8)))
    emq.train(model, data, emq.TrainConfig(epochs=2, batch_size=50, optimizer="adamw", lr=5e-3), progress=False)
    return model, data


@pytest.fixture(scope="module")
def file(trained: tuple[torch.nn.Module, emq.Dataset], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("command") / "net.onnx"
    emq.export_onnx(trained[0], path, 8, normalize(trained[1].test.images, trained[1]))
    return path


def test_a_file_says_what_it_is(trained: tuple[torch.nn.Module, emq.Dataset], file: Path) -> None:
    (entry,) = onnx.load(file).metadata_props
    data = trained[1].about()
    expected = {"network": "resnet8", "bits": 8, "data": data, "version": emq.__version__}
    assert entry.key == "emqlib" and json.loads(entry.value) == json.loads(json.dumps(expected))


def test_answers_are_the_networks(
    trained: tuple[torch.nn.Module, emq.Dataset], file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, data = trained
    names = [str(tmp_path / f"{i}.png") for i in range(20)]
    for image, name in zip(data.test.images, names, strict=False):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(name)
    command.main([str(file), *names])
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == "resnet8 at 8 bits, trained on digits"
    found = [int(line.split("class ")[1].split(",")[0]) for line in lines]
    with torch.no_grad():
        expected = model(normalize(data.test.images[:20], data)).argmax(1)
    assert (np.array(found) == expected.numpy()).mean() >= 0.9 and all(line.endswith(" ms") for line in lines)


def test_an_image_has_as_many_channels_as_the_network_takes() -> None:
    colors = Image.merge("RGB", [Image.new("L", (5, 4), level) for level in (10, 200, 30)])
    for channels in (1, 3):
        about = {"data": {"mean": [0.5] * channels, "std": [0.25] * channels}}
        found = command.pixels(colors, ("N", channels, 4, 5), about)
        image = colors.convert("L" if channels == 1 else "RGB")
        expected = (np.asarray(image, np.float32).reshape(4, 5, channels) / 255 - 0.5) / 0.25
        assert found.shape == (1, channels, 4, 5)
        np.testing.assert_allclose(found[0], expected.transpose(2, 0, 1), rtol=1e-6)


def test_streamed_images_are_cropped_as_in_testing(tmp_path: Path) -> None:
    y, x = np.mgrid[:96, :128]
    image = Image.fromarray(np.stack([x * 2 % 256, y * 5 // 2 % 256, (x + y) % 256], -1).astype(np.uint8))
    for split in ("train", "test"):
        for kind in ("a", "b"):
            (tmp_path / split / kind).mkdir(parents=True)
            image.save(tmp_path / split / kind / "0.png")
    data = emq.load_dataset(f"imagefolder:{tmp_path}", image_size=64, stream=True, workers=0)
    expected, _ = next(iter(batches(data, "test", torch.device("cpu"), 1)))
    found = command.pixels(image, ("N", 3, 64, 64), {"data": data.about()})
    assert np.abs(found - expected.numpy()).mean() < 0.04  # standard deviations; 0.1 if the whole image is taken


def test_16_bits_are_scaled_and_not_cut_off() -> None:
    shades = np.full((4, 5), 90 * 257, np.uint16)
    about = {"data": {"mean": [0.0], "std": [1.0]}}
    found = command.pixels(Image.fromarray(shades), ("N", 1, 4, 5), about)
    np.testing.assert_allclose(found, 90 / 255, rtol=1e-6)


def test_32_bits_are_refused_by_name(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.fromarray(np.ones((16, 16), np.float32)).save(tmp_path / "float.tiff")
    with pytest.raises(SystemExit):
        command.main([str(file), str(tmp_path / "float.tiff")])
    assert "float.tiff: 32 bits a pixel; save it with 8 or 16" in capsys.readouterr().err


def test_what_it_refuses(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = onnx.load(file)
    del other.metadata_props[:]
    onnx.save(other, tmp_path / "other.onnx")
    for arguments in (["nowhere.onnx", "x.png"], [str(tmp_path / "other.onnx"), "x.png"], [str(file), "nowhere.png"]):
        with pytest.raises(SystemExit) as stopped:
            command.main(arguments)
        assert stopped.value.code == 1 and capsys.readouterr().err


def test_it_runs_without_pytorch(file: Path, tmp_path: Path) -> None:
    Image.new("RGB", (20, 16)).save(tmp_path / "x.png")
    script = f"import runpy, sys; sys.argv = ['x', {str(file)!r}, {str(tmp_path / 'x.png')!r}]; "
    script += f"runpy.run_path({command.__file__!r}, run_name='__main__'); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and "class " in done.stdout, done.stderr
    assert runpy.run_path(command.__file__)["main"]
