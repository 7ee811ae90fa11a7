"""Charts of a report: points lie where their ticks say."""

import pytest

from smezo_cli.report import page_chart
from smezo_cli.report.series import Panel, Series


@pytest.mark.parametrize("low", [-3.0, 0.0, 0.7, 1e-9, 12345.0])
@pytest.mark.parametrize("wide", [0.0, 1e-7, 0.013, 1.0, 99.0, 1e7])
def test_points_and_ticks_lie_within_a_chart(low: float, wide: float) -> None:
    """Ticks that say different things stand at different places, in order."""
    series = Series("a", (0.0, 5.0, 10.0), ((low, low + wide), (low,), (low + wide,)))
    chart = page_chart.lines(Panel("t", "loss", [series]), "steps", "t", {})
    (line,) = chart.lines
    for x, y in [point.split(",") for text in (line.points, line.band) for point in text.split()]:
        assert chart.left <= float(x) <= chart.right
        assert chart.top <= float(y) <= chart.bottom
    for ticks in (chart.x_ticks, chart.y_ticks):
        assert 2 <= len(ticks) <= 7
        assert len({tick.text for tick in ticks}) == len({tick.at for tick in ticks}) == len(ticks)
    assert chart.left - 6 >= 7.5 * max(len(tick.text) for tick in chart.y_ticks)  # 12 units high
    values = [float(tick.text) for tick in chart.y_ticks]
    assert values == sorted(values)


def test_a_tick_says_where_it_is() -> None:
    series = Series("a", (0.0, 20.0), ((1.0,), (3.0,)))
    chart = page_chart.lines(Panel("t", "loss", [series]), "steps", "t", {})
    at = {tick.text: float(tick.at) for tick in chart.x_ticks}
    start, end = (float(point.split(",")[0]) for point in chart.lines[0].points.split())
    assert (at["0"], at["20"]) == (start, end)
    assert all(text.isdecimal() for text in at), "there is no half a step"
    assert at["10"] == pytest.approx((start + end) / 2, abs=0.01)  # written to a hundredth
