r"""Units of measurement behind the numbers of an answer: taken off, so that what remains is mathematics.

In: the text of one answer. Out: that text without units, what they measure and in which size. Only units listed here
are known; `notation` treats any other noun as a word.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

# Per line: what is measured, then `size name name ...` for each unit; `itself`: each measures something of its own.
_TABLE = """
length: 1 m meter metre; .001 mm millimeter millimetre; .01 cm centimeter centimetre; .1 dm; 1000 km kilometer \
kilometre; .0254 inch inche; .3048 ft foot feet; .9144 yd yard; 1609.344 mi mile
mass: 1 g gram; .001 mg milligram; 1000 kg kilogram; 453.59237 lb pound; 28.349523125 oz ounce
time: 1 s sec second; .001 ms millisecond; 60 min minute; 3600 h hr hour; 86400 day; 604800 week
calendar: 1 month; 12 yr year
volume: .001 l L liter litre; .000001 ml mL milliliter millilitre; .003785411784 gallon
dollar: 1 dollar USD; .01 cent
pascal: 1 pascal Pa; 1000 kPa
joule: 1 joule J; 1000 kJ
watt: 1 watt W; 1000 kW
itself: 1 degree deg; 1 radian rad; 1 celsius degC; 1 fahrenheit degF; 1 kelvin; 1 newton N; 1 volt V; 1 ampere amp A; \
1 ohm; 1 hertz Hz; 1 mole mol; 1 euro EUR; 1 sterling GBP; 1 rupee Rs; 1 yen; 1 am AM; 1 pm PM
"""


def _sizes() -> Iterator[tuple[str, tuple[str, Fraction]]]:
    for line in _TABLE.strip().splitlines():
        measured, _, units = line.partition(": ")
        for unit in units.split(";"):
            size, *names = unit.split()
            kind = names[0] if measured == "itself" else measured
            yield from ((name, (kind, Fraction(size))) for name in names)


_SIZES = dict(_sizes())
_NAME = "|".join(
    rf"(?i:{name})s?" if len(name) > 2 else name for name in sorted(_SIZES, key=lambda name: len(name), reverse=True)
)
_POWER = r"(?![A-Za-z])(?:\s*\^\s*(\{[23]\}|[23](?!\d)))?"
# A letter right behind a number is a variable (2h), behind a space a unit (2 h), unless the expression goes on.
_UNIT = re.compile(
    rf"(?:(?<=[\d)}}\s])\s+|(?<=[\d)}}])(?![a-zA-Z]\b))(?:((?i:square|sq|cubic|cu))\.?\s+)?({_NAME}){_POWER}\.?"
    rf"(?:\s*(?:/|per\s)\s*({_NAME}){_POWER})?(?=\s*(?:$|[,;)\d]|and\b|or\b|by\b))"
)
_NUMBER = re.compile(r"(?<![\w.])-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)$")


@dataclass(frozen=True)
class Unit:
    """What a text measures: `(("length", 1), ("time", -1))` for a speed, one such tuple for each different unit."""

    measured: tuple[tuple[tuple[str, int], ...], ...]
    size: Fraction  # in the base units of the table


def without_units(text: str) -> tuple[str, Unit | None]:
    """The text without its units, and what they were; None if it has none.

    Quantities of one kind in different units come back in base units, added up where they are one quantity:
    `3 hours 20 minutes` is `(3)\\cdot(3600)+(20)\\cdot(60)`.
    """
    found = list(_UNIT.finditer(text))
    if not found:
        return text, None
    units = [_unit(*match.groups()) for match in found]
    kinds = tuple(dict.fromkeys(unit.measured[0] for unit in units))
    sizes = [unit.size for unit in units]
    if len(set(sizes)) == 1 or len(kinds) > 1:
        return _UNIT.sub("", text), Unit(kinds, sizes[0] if len(kinds) == 1 else Fraction(1))
    parts, stop = [], 0
    for match, size in zip(found, sizes, strict=True):
        before = text[stop : match.start()]
        number = _NUMBER.search(before)
        if number is None:
            return text, None
        parts += [before[: number.start()], f"({number[0]})\\cdot({latex_fraction(size)})"]
        stop = match.end()
    falling = sizes == sorted(set(sizes), reverse=True)
    if falling and all(part.strip(" ,") in ("", "and") for part in parts[::2]):
        parts[2::2] = ["+"] * (len(sizes) - 1)
    return "".join(parts) + text[stop:], Unit(kinds, Fraction(1))


def latex_fraction(value: Fraction) -> str:
    """The number in LaTeX, exactly."""
    return f"\\frac{{{value.numerator}}}{{{value.denominator}}}"


def _unit(shape: str | None, name: str, power: str | None, divisor: str | None, divisor_power: str | None) -> Unit:
    exponent = int((power or "1").strip("{}")) if shape is None else 2 if shape.lower().startswith("sq") else 3
    measured, size = _size(name)
    kinds, size = [_lengths(measured, exponent)], size**exponent
    if divisor is not None:
        below, below_size = _size(divisor)
        below_exponent = int((divisor_power or "1").strip("{}"))
        kinds.append(_lengths(below, -below_exponent))
        size /= below_size**below_exponent
    return Unit((tuple(kinds),), size)


def _lengths(measured: str, exponent: int) -> tuple[str, int]:
    """A volume as the length of which it is the cube: 100 mL are 100 cm^3."""
    return ("length", 3 * exponent) if measured == "volume" else (measured, exponent)


def _size(name: str) -> tuple[str, Fraction]:
    names = (name, name.lower(), name.removesuffix("s"), name.lower().removesuffix("s"))
    return next(_SIZES[each] for each in names if each in _SIZES)
