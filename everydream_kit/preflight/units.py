"""Times, sizes and costs as people read them."""

from __future__ import annotations


def duration(seconds: float | None) -> str:
    """`95` as `1 min 35 s`; None as a dash."""
    if seconds is None:
        return "–"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s" if whole < 600 else f"{whole // 60} min"
    if whole < 48 * 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02} min"
    return f"{whole // 86400:,} days {whole % 86400 // 3600} h"


def size(num_bytes: float | None) -> str:
    """Bytes in the unit that people read; None as a dash."""
    if not num_bytes:
        return "–"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if num_bytes < 1000 or unit == "TB":
            return f"{num_bytes:.0f} {unit}" if unit in ("B", "kB", "MB") else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    raise AssertionError("unreachable")


def cost(usd: float) -> str:
    """US dollars, with more digits the smaller it is: `0.65 USD`, `0.004 USD`, `120 USD`."""
    if usd >= 100:
        return f"{usd:,.0f} USD"
    return f"{usd:.2f} USD" if usd >= 0.1 or usd == 0 else f"{usd:.3f} USD"
