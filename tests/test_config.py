"""From a section of the configuration to a configuration class."""

from dataclasses import field

import pytest
from omegaconf import OmegaConf

from dalle2_video.config import ConfigError, config_class, default, defaults_of, from_config


@config_class
class Inner:
    rate: float
    levels: tuple[int, ...] = (1,)

    def __post_init__(self) -> None:
        if self.rate < 0:
            raise ValueError(f"rate must not be negative, got {self.rate}")


@config_class
class Outer:
    name: str
    inner: Inner
    size: int | None
    parts: tuple[Inner, ...] = ()
    table: dict[str, float] = field(default_factory=dict)


GOOD = {"name": "a", "inner": {"rate": 1, "levels": [1, 2]}, "size": None, "parts": [{"rate": 2}]}


def test_nested_sections_become_nested_classes():
    made = from_config(Outer, OmegaConf.create(GOOD), "outer")
    assert made == Outer("a", Inner(1.0, (1, 2)), None, (Inner(2.0),))
    assert isinstance(made.inner.rate, float) and isinstance(made.inner.levels, tuple)
    size = from_config(Outer, OmegaConf.create(GOOD | {"size": 1e6}), "outer").size
    assert size == 1_000_000 and isinstance(size, int)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"nmae": "x"}, r"outer\.nmae: unknown key; outer has: name, inner, size"),
        ({"inner": {"rate": 1, "rates": 2}}, r"outer\.inner\.rates: unknown key; .*has: rate, lev"),
        ({"inner": {}}, r"outer\.inner\.rate: missing key"),
        ({"inner": None}, r"outer\.inner: must be a section"),
        ({"inner": {"rate": -1}}, r"outer\.inner: rate must not be negative, got -1"),
        ({"size": "big"}, r"outer\.size: must be a valid integer, got 'big'"),
        ({"size": 1.5}, r"outer\.size: must be a valid integer.*, got 1\.5"),
        ({"size": True}, r"outer\.size: must be a valid integer, got True"),
        ({"inner": {"rate": "1"}}, r"outer\.inner\.rate: must be a valid number, got '1'"),
        ({"inner": {"rate": 1, "levels": 3}}, r"outer\.inner\.levels: must be a valid"),
        ({"inner": {"rate": 1, "levels": ["x"]}}, r"outer\.inner\.levels\.0: must be a valid int"),
        ({"parts": [{"rat": 2}]}, r"outer\.parts\.0\.rat: unknown key; .* has: rate, levels"),
        ({"table": {"a": "b"}}, r"outer\.table\.a: must be a valid number, got 'b'"),
    ],
)
def test_an_error_names_the_section_the_key_and_the_cause(change, words):
    with pytest.raises(ConfigError, match=words) as caught:
        from_config(Outer, OmegaConf.create(GOOD | change), "outer")
    assert "\n" not in str(caught.value)


def test_defaults_are_plain_values():
    @config_class
    class Sizes:
        inner: Inner = default(lambda: Inner(2.0, (3, 4)))

    assert defaults_of(Sizes) == {"inner": {"rate": 2.0, "levels": [3, 4]}}
    assert from_config(Sizes, {}, "sizes") == Sizes()
    with pytest.raises(AttributeError):
        Sizes().inner = Inner(1.0)  # frozen


def test_whole_numbers_are_integers_in_tuples_and_tables_too():
    """YAML reads 1e6 as a float."""
    made = from_config(Inner, {"rate": 2, "levels": (1e6, 2.0)}, "inner")
    assert made == Inner(2.0, (1_000_000, 2)) and isinstance(made.levels[0], int)
    listed = from_config(Outer, GOOD | {"parts": [{"rate": 1, "levels": [3.0]}]}, "outer")
    assert listed.parts == (Inner(1.0, (3,)),)


def test_every_mistake_of_a_section_is_named():
    with pytest.raises(ConfigError, match=r"outer\.size: .*; outer\.table\.a: "):
        from_config(Outer, GOOD | {"size": "big", "table": {"a": "b"}}, "outer")
