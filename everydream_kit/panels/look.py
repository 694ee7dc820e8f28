"""How panels look: one style sheet, scoped to the class `edk`, and the few pieces of HTML that all of them use.

Colours follow the notebook's theme where it has variables for them, with plain fallbacks. Every text from outside is
escaped here.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Literal

import ipywidgets as widgets

Tone = Literal["plain", "good", "warn", "bad", "busy"]

STYLE = """
.edk { --edk-text: var(--jp-ui-font-color1, #1f2328); --edk-dim: var(--jp-ui-font-color2, #59636e);
  --edk-edge: var(--jp-border-color2, #d9dee3); --edk-soft: var(--jp-layout-color2, #f4f6f8);
  --edk-ground: var(--jp-layout-color1, #fff); --edk-accent: #3b6fd4; --edk-good: #2b7a46; --edk-warn: #9a5b00;
  --edk-bad: #c0362c; max-width: 1000px; margin: 4px 0; padding: 18px 22px 20px; box-sizing: border-box;
  border: 1px solid var(--edk-edge); border-radius: 12px; background: var(--edk-ground); overflow: hidden;
  color: var(--edk-text); font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
.edk .widget-html, .edk .widget-html-content { line-height: 1.45; }
.edk .widget-html-content { font-size: 13px; overflow: visible; }
.edk .widget-label { color: var(--edk-text); text-align: left; }
.edk-head { display: flex; align-items: baseline; gap: 10px; flex-wrap: wrap; }
.edk-head h3 { margin: 0; font-size: 19px; font-weight: 650; letter-spacing: -0.01em; }
.edk-head .edk-where { color: var(--edk-dim); font-size: 13px; font-family: var(--jp-code-font-family, monospace); }
.edk-lead { color: var(--edk-dim); margin: 2px 0 0; }
.edk-group { margin: 8px 0 0; padding-top: 8px; border-top: 1px solid var(--edk-edge); font-size: 12px;
  font-weight: 650; color: var(--edk-dim); letter-spacing: 0.03em; text-transform: uppercase; }
.edk-section { margin: 10px 0 2px; font-size: 14px; font-weight: 650; }
.edk-badge { display: inline-block; padding: 1px 10px; border-radius: 999px; font-size: 12px; font-weight: 600;
  border: 1px solid var(--edk-edge); color: var(--edk-dim); background: var(--edk-soft); }
.edk-badge.good { color: var(--edk-good); border-color: currentColor; }
.edk-badge.warn { color: var(--edk-warn); border-color: currentColor; }
.edk-badge.bad { color: var(--edk-bad); border-color: currentColor; }
.edk-badge.busy { color: var(--edk-accent); border-color: currentColor; }
.edk-note { padding: 8px 12px; border-radius: 8px; border: 1px solid var(--edk-edge); background: var(--edk-soft);
  border-left: 4px solid var(--edk-dim); margin: 4px 0; white-space: pre-wrap; overflow-wrap: anywhere; }
.edk-note.good { border-left-color: var(--edk-good); }
.edk-note.warn { border-left-color: var(--edk-warn); }
.edk-note.bad { border-left-color: var(--edk-bad); }
.edk-note.busy { border-left-color: var(--edk-accent); }
.edk-hint { color: var(--edk-dim); font-size: 12px; line-height: 1.4; }
.edk-hint .edk-help { display: block; }
.edk-hint .edk-range { display: block; opacity: 0.85; }
.edk-hint code, .edk-note code { background: var(--edk-soft); padding: 0 3px; border-radius: 4px; font-size: 92%; }
.edk-error { display: block; color: var(--edk-bad); font-weight: 600; }
.edk-facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(118px, 1fr)); gap: 6px 12px; margin: 4px 0; }
.edk-facts b { display: block; font-size: 16px; font-weight: 600; font-variant-numeric: tabular-nums; }
.edk-facts span { color: var(--edk-dim); font-size: 12px; }
.edk-table { border-collapse: collapse; width: 100%; font-size: 13px; }
.edk-table td, .edk-table th { padding: 4px 10px 4px 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--edk-edge); }
.edk-table th { color: var(--edk-dim); font-weight: 600; }
.edk-chart { width: 100%; height: auto; display: block; }
.edk-chart-title { font: 600 12px system-ui, sans-serif; fill: var(--edk-text); }
.edk-axis { font: 11px system-ui, sans-serif; fill: var(--edk-dim); font-variant-numeric: tabular-nums; }
.edk-grid { stroke: var(--edk-edge); stroke-width: 1; }
.edk-line { fill: none; stroke-width: 2; stroke-linejoin: round; stroke: var(--edk-c, var(--edk-accent)); }
.edk-key, .edk-dot { fill: var(--edk-c, var(--edk-accent)); }
.edk-line-0 { --edk-c: #3b6fd4; } .edk-line-1 { --edk-c: #3b6fd4; } .edk-line-2 { --edk-c: #d9822b; }
.edk-line-3 { --edk-c: #7c5cc4; }
.edk-faint { --edk-c: #9db6e4; stroke-width: 1.2; opacity: 0.75; }
.edk-bar { fill: var(--edk-accent); opacity: 0.8; }
.edk-empty { display: flex; align-items: center; justify-content: center; color: var(--edk-dim); font-size: 12px;
  border: 1px dashed var(--edk-edge); border-radius: 8px; min-height: 60px; padding: 8px 14px; text-align: center; }
.edk-log { display: flex; flex-direction: column-reverse; height: 320px; overflow: auto; border-radius: 8px;
  border: 1px solid var(--edk-edge); background: var(--edk-soft); }
.edk-log div { white-space: pre-wrap; flex: none; padding: 8px 12px; font-size: 12px; line-height: 1.45;
  font-family: var(--jp-code-font-family, monospace); overflow-wrap: anywhere; }
.edk-shots { display: flex; flex-wrap: wrap; gap: 10px; }
.edk-shots figure { margin: 0; } .edk-shots img { border-radius: 8px; display: block; max-width: 100%; }
.edk-shots figcaption { color: var(--edk-dim); font-size: 12px; margin-top: 3px; }
.edk-card { border: 1px solid var(--edk-edge); border-radius: 10px; background: var(--edk-ground); overflow: hidden; }
.edk-card.edk-chosen { border-color: var(--edk-accent); box-shadow: 0 0 0 1px var(--edk-accent); }
.edk .jupyter-button { border-radius: 7px; font-weight: 550; }
.edk .jupyter-button:focus-visible, .edk input:focus-visible, .edk textarea:focus-visible, .edk select:focus-visible {
  outline: 2px solid var(--edk-accent); outline-offset: 1px; }
.edk .widget-text input, .edk .widget-textarea textarea, .edk .widget-dropdown select { border-radius: 6px; }
.edk .edk-wrong input, .edk .edk-wrong textarea { border-color: var(--edk-bad) !important; }
.edk .widget-tab, .edk .jupyter-widget-tab { margin-top: 2px; }
.edk-table img { border-radius: 6px; display: block; }
"""


def style_sheet() -> widgets.HTML:
    """The style sheet as a widget; each panel carries it once, so that any one of them works alone."""
    return widgets.HTML(f"<style>{STYLE}</style>", layout=widgets.Layout(height="0", margin="0", overflow="hidden"))


def panel_box(children: Sequence[widgets.Widget]) -> widgets.VBox:
    """The outer box of a panel."""
    box = widgets.VBox([style_sheet(), *children], layout=widgets.Layout(width="100%"))
    box.add_class("edk")
    return box


def row(*children: widgets.Widget, gap: str = "8px") -> widgets.HBox:
    """Controls beside each other, wrapping on narrow pages."""
    return widgets.HBox(
        list(children), layout=widgets.Layout(flex_flow="row wrap", align_items="center", grid_gap=gap, width="100%")
    )


def column(*children: widgets.Widget) -> widgets.VBox:
    return widgets.VBox(list(children), layout=widgets.Layout(width="100%"))


def button(text: str, *, tone: str = "", icon: str = "", width: str = "auto", hint: str = "") -> widgets.Button:
    return widgets.Button(
        description=text, button_style=tone, icon=icon, tooltip=hint or text, layout=widgets.Layout(width=width)
    )


def heading(title: str, where: str = "", lead: str = "", badge: str = "") -> str:
    """A panel's title line; `badge` is HTML from `badge()`."""
    text = f'<div class="edk-head"><h3>{html.escape(title)}</h3>'
    text += f'<span class="edk-where">{html.escape(where)}</span>' if where else ""
    text += badge + "</div>"
    return text + (f'<p class="edk-lead">{html.escape(lead)}</p>' if lead else "")


def badge(text: str, tone: Tone = "plain") -> str:
    return f'<span class="edk-badge {tone}">{html.escape(text)}</span>'


def note(text: str, tone: Tone = "plain") -> str:
    """A boxed sentence; errors are announced by screen readers."""
    if not text:
        return ""
    role = ' role="alert"' if tone == "bad" else ' role="status"'
    return f'<div class="edk-note {tone}"{role}>{html.escape(text)}</div>'


def section(text: str) -> widgets.HTML:
    return widgets.HTML(f'<div class="edk-section">{html.escape(text)}</div>')


def facts(entries: Sequence[tuple[str, str]]) -> str:
    """Values with their names below, in a row that keeps its places."""
    cells = "".join(f"<div><b>{html.escape(v)}</b><span>{html.escape(k)}</span></div>" for k, v in entries)
    return f'<div class="edk-facts">{cells}</div>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of plain texts."""
    top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in line) + "</tr>" for line in rows)
    return f'<table class="edk-table"><tr>{top}</tr>{body}</table>'


def log_view(lines: Sequence[str]) -> str:
    """The end of a log, newest line in view without a script (the outer box lays out from its bottom)."""
    text = html.escape("\n".join(lines)) or "The log is empty so far."
    return f'<div class="edk-log" tabindex="0" role="log"><div>{text}</div></div>'


def duration(seconds: float | None) -> str:
    """`95` as `1 min 35 s`; None as a dash."""
    if seconds is None:
        return "–"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s" if whole < 600 else f"{whole // 60} min"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


def size(num_bytes: float | None) -> str:
    """Bytes in the unit that people read; None as a dash."""
    if not num_bytes:
        return "–"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if num_bytes < 1000 or unit == "TB":
            return f"{num_bytes:.0f} {unit}" if unit in ("B", "kB", "MB") else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    raise AssertionError("unreachable")
