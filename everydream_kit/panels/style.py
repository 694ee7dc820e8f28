"""How panels look: one style sheet (`assets/panel.css`, scoped to the class `edk`) and the pieces of HTML they share.

Colors follow the notebook's theme where it has variables for them, with plain fallbacks. Every text from outside is
escaped here.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import ipywidgets as widgets

from everydream_kit.panels.asset_files import read_asset
from everydream_kit.panels.viewer import make_viewer
from everydream_kit.plain_text import printable
from everydream_kit.preflight.units import duration, size

__all__ = [
    "Tone", "actions", "badge", "button", "column", "control", "document", "duration", "facts", "heading", "line", "log_view",
    "name_html", "named", "note", "panel_box", "progress_bar", "read_asset", "row", "section", "set_hint", "show_progress",
    "size", "style_sheet", "table", "with_hint",
]  # fmt: skip

Tone = Literal["plain", "good", "warn", "bad", "busy"]


def style_sheet() -> widgets.HTML:
    """The style sheet as a widget; each panel carries it once, so that any one of them works alone."""
    style = read_asset("panel.css")
    return widgets.HTML(f"<style>{style}</style>", layout=widgets.Layout(height="0", margin="0", overflow="hidden"))


def panel_box(children: Sequence[widgets.Widget]) -> widgets.VBox:
    """The outer box of a panel, whose images can be opened large."""
    box = widgets.VBox([style_sheet(), *children, make_viewer()], layout=widgets.Layout(width="100%"))
    box.add_class("edk")
    return box


def row(*children: widgets.Widget, gap: str = "8px") -> widgets.HBox:
    """Controls next to each other, wrapping on narrow pages."""
    return widgets.HBox(
        list(children), layout=widgets.Layout(flex_flow="row wrap", align_items="center", grid_gap=gap, width="100%")
    )


def line(text: str, *controls: widgets.Widget, basis: str = "260px") -> widgets.HBox:
    """A line of a list: words as HTML, at least `basis` wide where the page allows it, and what can be done about them."""
    box = row(widgets.HTML(text, layout=widgets.Layout(flex=f"1 1 {basis}", width="auto")), *controls)
    box.add_class("edk-line")
    return box


def with_hint(control: widgets.Widget, hint: widgets.HTML) -> widgets.HBox:
    """A control with a sentence next to it, below it on narrow pages."""
    hint.layout = widgets.Layout(flex="1 1 260px", width="auto", min_width="220px")
    layout = widgets.Layout(flex_flow="row wrap", align_items="flex-start", grid_gap="2px 14px", padding="3px 0")
    return widgets.HBox([control, hint], layout=layout)


def actions(*buttons: widgets.Widget, message: widgets.HTML) -> widgets.HBox:
    """Buttons with the panel's message next to them, so that a message comes and goes without moving anything."""
    message.layout.flex, message.layout.width, message.layout.margin = "1 1 320px", "auto", "0"
    return row(*buttons, message)


def progress_bar() -> widgets.IntProgress:
    """A thin bar that keeps its place while there is nothing to show."""
    layout = widgets.Layout(width="100%", height="14px", margin="2px 0", visibility="hidden")
    return widgets.IntProgress(min=0, max=1, layout=layout)


def show_progress(bar: widgets.IntProgress, status: Mapping[str, Any] | None) -> None:
    """Show how far a background task is by its status; None hides the bar."""
    bar.layout.visibility = "hidden" if status is None else "visible"
    if status is not None:
        bar.max = max(1, status.get("num_steps") or 1)
        bar.value = bar.max if status.get("state") == "finished" else status.get("step") or 0


def column(*children: widgets.Widget) -> widgets.VBox:
    return widgets.VBox(list(children), layout=widgets.Layout(width="100%"))


def button(text: str, *, tone: str = "", icon: str = "", width: str = "auto", hint: str = "") -> widgets.Button:
    """A button that is as wide as its text."""
    return widgets.Button(
        description=text, button_style=tone, icon=icon, tooltip=hint or text, layout=widgets.Layout(width=width)
    )


def control(kind: Any, description: str, width: str, *, label: str = "", **options: Any) -> Any:
    """A control with constant words in a label `label` wide, both in all `width` wide where the page allows it (CSS lengths)."""
    if label:
        options["style"] = {"description_width": label}
    return kind(description=description, layout=widgets.Layout(width=width, max_width="calc(100% - 4px)"), **options)


def name_html(text: str) -> str:
    """A name from outside (a file, a run, a repository) as HTML: the one way for names into `HTML` widgets."""
    return html.escape(printable(text))


def set_hint(widget: widgets.Widget, text: str) -> None:
    """Give a control a tooltip: the page sets it as an attribute, so names may be in it.

    A `description` must be constant: ipywidgets 7 puts it into the page as HTML.
    """
    attribute = "description_tooltip" if not widget.has_trait("tooltip") else "tooltip"
    setattr(widget, attribute, printable(text))


def named(control: widgets.Widget, name: str) -> widgets.HBox:
    """A control with a name from outside next to it. The control's own constant label is for screen readers alone."""
    control.add_class("edk-unlabelled")
    label = widgets.HTML(f'<span class="edk-name">{name_html(name)}</span>')
    return widgets.HBox([control, label], layout=widgets.Layout(align_items="center", width="auto"))


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


def document(text: str, name: str) -> str:
    """A long text in a box of its own that scrolls, also by keys; `name` is read aloud."""
    safe = html.escape(name, quote=True)
    return f'<div class="edk-doc" tabindex="0" role="region" aria-label="{safe}">{html.escape(text)}</div>'


def log_view(lines: Sequence[str]) -> str:
    """The end of a log, latest line in view without a script (the outer box lays out from its bottom)."""
    text = html.escape("\n".join(lines)) or "The log is empty so far."
    return f'<div class="edk-log" tabindex="0" role="log" aria-label="Log"><div>{text}</div></div>'
