"""The demo's parts, and the demo itself with one epoch."""

from __future__ import annotations

from pathlib import Path

import pytest

from tritonconv.demo import attribute, digits, lenet5, run


def test_images_are_real_and_in_a_fixed_order() -> None:
    images, labels = digits()
    assert images.shape == (1797, 1, 32, 32)
    assert 0 <= images.min() < images.max() <= 1
    assert sorted(set(labels.tolist())) == list(range(10))
    assert digits()[0].equal(images)


def test_lenet_has_the_papers_layers() -> None:
    """Its third convolution sees a whole 5x5 image, so that 120 numbers are left."""
    sizes = {name: tuple(p.shape) for name, p in lenet5().named_parameters() if name.endswith("weight")}
    assert sizes == {
        "c1.weight": (6, 1, 5, 5),
        "c3.weight": (16, 6, 5, 5),
        "c5.weight": (120, 16, 5, 5),
        "f6.weight": (84, 120),
        "output.weight": (10, 84),
    }


def test_launches_must_be_those_of_the_report() -> None:
    row = dict(name="c1", backend="triton", reason="conv_flat")
    assert attribute([row], ["conv_flat_kernel"]) == [["conv_flat_kernel"]]
    with pytest.raises(RuntimeError, match="c1 should have launched conv_flat_kernel"):
        attribute([row], ["conv_fprop_kernel"])
    with pytest.raises(RuntimeError, match="should have launched"):
        attribute([row], [])
    with pytest.raises(RuntimeError, match="no layer of the report"):
        attribute([row], ["conv_flat_kernel", "matmul_kernel"])


def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "demo.png"
    assert run(picture, epochs=1)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "Same prediction for 360 of 360 images" in capsys.readouterr().out
