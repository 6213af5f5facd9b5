import pytest
from matplotlib.image import imread

from moefit.train.display import draw_curve


@pytest.mark.parametrize("routers", [True, False])
def test_curve_is_drawn(tmp_path, routers):
    state = {
        "mlp_h_e": 0.9,
        "mlp_h_e_given_x": 0.2,
        "mlp_mi": 0.7,
        "mlp_active": 0.2,
        "mlp_dead": 0.0,
    }
    records = [
        {"kind": "train", "step": step, "loss": 5 / step, **(state if routers else {})}
        for step in range(1, 9)
    ]
    records.append({"kind": "eval", "step": 8, "loss": 0.7})
    draw_curve(records, tmp_path / "curve.png")
    height, width, _ = imread(tmp_path / "curve.png").shape
    assert (height > 600) == routers
    assert width > 800
