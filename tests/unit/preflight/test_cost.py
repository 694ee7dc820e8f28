"""Prices: entered, dated, one's own; and what is wrong with a wrong one."""

import json
import re
from datetime import date

import pytest

from everydream_kit.errors import ConfigError
from everydream_kit.preflight.cost import Price, entered_price, find_price, read_prices
from everydream_kit.preflight.gpus import find_gpu


def test_every_price_of_the_kit_has_its_card_its_day_and_its_source():
    prices = read_prices()
    assert len(prices) > 10
    for price in prices:
        assert find_gpu(price.gpu).name == price.gpu
        assert date.fromisoformat(price.read_on) <= date.today()
        assert re.match(r"https://\S+$", price.source)
        assert 0 < price.usd_per_hour < 20 and price.host


def test_an_hour_costs_what_was_entered():
    price = entered_price(0.35)
    assert price.cost(3600) == pytest.approx(0.35)
    assert price.cost(5400) == pytest.approx(0.525)
    assert price.describe() == "0.35 USD an hour, entered"


@pytest.mark.parametrize("wrong", [-0.01, float("nan"), float("inf")])
def test_a_price_below_nothing_is_refused(wrong):
    with pytest.raises(ConfigError, match="price: must be 0 or more US dollars an hour"):
        entered_price(wrong)


def test_the_host_where_one_is_comes_first_and_else_the_lowest():
    prices = (
        Price(2.0, "H100", "Vast", "2026-01-01"),
        Price(1.0, "H100", "RunPod", "2026-01-02"),
        Price(0.1, "T4", "RunPod"),
    )
    assert find_price("H100", prices).usd_per_hour == 1.0
    assert find_price("H100", prices, "vast").usd_per_hour == 2.0
    assert find_price("H100", prices, "colab").usd_per_hour == 1.0
    assert find_price("A40", prices) is None


def test_the_date_and_the_place_are_said_with_a_price_from_the_table():
    words = Price(0.44, "L4", "RunPod", "2026-03-10", "https://x", "lowest listed").describe()
    assert words == "0.44 USD an hour at RunPod (lowest listed), read on 2026-03-10"


def write(folder, *entries):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "prices.json").write_text(json.dumps({"prices": entries}), "utf-8")


ENTRY = {"card": "t4", "host": "Colab", "usd_per_hour": 0.5, "read_on": "2026-11-20"}


def test_ones_own_prices_win_and_the_nearest_most(tmp_path):
    write(tmp_path, ENTRY, {**ENTRY, "card": "3090", "host": "my cellar", "usd_per_hour": 0.08})
    write(tmp_path / "jets" / "logs", {**ENTRY, "usd_per_hour": 0.6})
    prices = read_prices(tmp_path / "jets" / "logs")
    assert find_price("T4", prices).usd_per_hour == 0.6
    assert find_price("RTX 3090", prices).host == "my cellar"
    assert find_price("A40", prices).host == "RunPod"  # the kit's own stay
    assert find_price("T4", read_prices(tmp_path / "cats")).usd_per_hour == 0.5


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({**ENTRY, "usd_per_hour": -1}, r"entry 1: usd_per_hour must be a number, 0 or more \(got -1\)"),
        ({**ENTRY, "usd_per_hour": "1"}, "usd_per_hour must be a number"),
        ({**ENTRY, "card": "T5"}, "entry 1: gpu: no GPU named 'T5' is known; did you mean T4"),
        ({"card": "T4"}, "entry 1: has no host, usd_per_hour, read_on"),
        ("T4", "entry 1: has no card"),
    ],
)
def test_a_wrong_entry_is_named(tmp_path, entry, message):
    write(tmp_path, entry)
    with pytest.raises(ConfigError, match=message):
        read_prices(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"prices": 3}'])
def test_a_file_of_something_else_is_named(tmp_path, text):
    (tmp_path / "prices.json").write_text(text, "utf-8")
    with pytest.raises(ConfigError, match=re.escape(str(tmp_path / "prices.json"))):
        read_prices(tmp_path)
