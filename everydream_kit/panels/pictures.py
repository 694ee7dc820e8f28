"""The dataset panel: add pictures, look through them, edit captions and settings, report, set problems aside."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

import ipywidgets as widgets

from everydream_kit import jobs
from everydream_kit.data.buckets import assign_buckets, bucket_table
from everydream_kit.errors import ConfigError, DataError
from everydream_kit.panels import look
from everydream_kit.panels.album import SETTINGS, Album
from everydream_kit.panels.chart import bar_chart
from everydream_kit.panels.clock import make_clock
from everydream_kit.panels.gallery import Gallery
from everydream_kit.panels.pages import Pages
from everydream_kit.panels.panel import Panel, set_html
from everydream_kit.panels.project import Project
from everydream_kit.panels.upload import Receiver, make_drop_zone, unpack_upload

SHOWN_PROBLEMS = 15


class DatasetPanel(Panel):
    """`edk.panels.dataset(project)`. Every change is written at once, and can be undone.

    Attributes:
        project: the project folder.
        album: the pictures and what can be done with them.
        gallery: the page of pictures.
    """

    def __init__(self, folder: str | Path, *, demo: bool = False) -> None:
        """Open the project's dataset: its own folder, or the one its settings name.

        Args:
            folder: the project's name or folder.
            demo: put the kit's demo pictures into the project if it has none.
        """
        super().__init__()
        self.project = Project.open(folder)
        if demo:
            self.project.add_demo_pictures()
        self.fetching: jobs.Job | None = None
        self.album = Album(self._dataset_folder())
        self.head, self.figures, self.report = widgets.HTML(), widgets.HTML(), widgets.HTML()
        self.undo_button = look.button("Undo", icon="undo")
        self.reload_button = look.button("Look again", icon="refresh", hint="Scan the folder again")
        self.gallery = Gallery(self.album, self.say, self._draw)
        self.on_press(self.undo_button, self.undo)
        self.on_press(self.reload_button, self.reload)
        self.tabs = Pages(
            {
                "Add pictures": self._build_add(),
                "Pictures": self._build_edit(),
                "Report": look.column(self.report),
                "Problems": self._build_problems(),
            }
        )
        self.clock = make_clock(self.refresh)
        self.box = look.panel_box(
            [
                self.head,
                self.figures,
                look.actions(self.undo_button, self.reload_button, message=self.message),
                self.tabs.box,
                self.clock,
            ]
        )
        self._draw()
        self.tabs.selected_index = 1 if len(self.album) else 0

    def _dataset_folder(self) -> Path:
        root = self.project.settings()["data_root"]
        return Path(root) if isinstance(root, str) and Path(root).is_dir() else self.project.pictures_folder

    # The tabs

    def _build_add(self) -> widgets.Widget:
        self.receiver = Receiver(self.album.root, unpack_upload)
        zone = make_drop_zone(self.receiver, self._received)
        where = html.escape(str(self.album.root))
        self.source = widgets.Text(
            placeholder="/data/jets, pictures.zip, or owner/dataset on the Hub",
            description="Or use",
            style={"description_width": "60px"},
            layout=widgets.Layout(width="520px"),
        )
        self.source_button = look.button("Use it")
        self.on_press(self.source_button, self.use_source)
        hint = f'<div class="edk-hint">Files can also be copied into <code>{where}</code>; then press Look again.</div>'
        return look.column(*([zone] if zone else []), look.row(self.source, self.source_button), widgets.HTML(hint))

    def _build_edit(self) -> widgets.Widget:
        self.tag = widgets.Text(
            description="Tag", style={"description_width": "36px"}, layout=widgets.Layout(width="260px")
        )
        self.add_tag_button, self.remove_tag_button = (
            look.button("Add to selected"),
            look.button("Remove from selected"),
        )
        self.setting = widgets.Dropdown(
            options=list(SETTINGS), description="Set", style={"description_width": "36px"},
            layout=widgets.Layout(width="200px"),
        )  # fmt: skip
        self.setting_value = widgets.Text(
            description="to", placeholder="empty: take it away", style={"description_width": "20px"},
            layout=widgets.Layout(width="190px"),
        )  # fmt: skip
        self.setting_where = widgets.Dropdown(
            description="for", style={"description_width": "26px"}, layout=widgets.Layout(width="260px")
        )
        self.setting_button = look.button("Apply")
        self.aside_button = look.button("Set selected aside", icon="archive")
        self.on_press(self.add_tag_button, lambda: self._change_tags(add=True))
        self.on_press(self.remove_tag_button, lambda: self._change_tags(add=False))
        self.on_press(self.setting_button, self.apply_setting)
        self.on_press(self.aside_button, self.set_selected_aside)
        self.gallery.tools.children = (
            look.row(self.tag, self.add_tag_button, self.remove_tag_button, self.aside_button),
            look.row(self.setting, self.setting_value, self.setting_where, self.setting_button),
        )
        return self.gallery.box

    def _build_problems(self) -> widgets.Widget:
        self.problem_list = widgets.HTML()
        self.problems_button = look.button("Set all of them aside", icon="archive")
        self.on_press(self.problems_button, self.set_problems_aside)
        return look.column(self.problem_list, look.row(self.problems_button))

    # What the buttons do

    def undo(self) -> None:
        """Take the last change back."""
        title = self.album.undo()
        self._redraw()
        self.say(f"Undone: {title}." if title else "There is nothing to undo.")

    def reload(self) -> None:
        """Scan the folder again."""
        self.album.reload()
        self._redraw()

    def use_source(self) -> None:
        """Take another folder as the dataset, or fetch an archive or a Hub dataset in a process of its own."""
        text = self.source.value.strip()
        if not text:
            raise DataError("Type the path of a folder or an archive, or the id of a Hub dataset.")
        if Path(text).expanduser().is_dir():
            self._use_folder(Path(text).expanduser())
            return
        work = self.project.folder / "fetch"
        self.fetching = jobs.start_module(work, "everydream_kit.panels.chores", ["fetch", str(work), text])
        self.say(f"Fetching {text} …", "busy")

    def apply_setting(self) -> None:
        """Write a setting for a folder or for the selected pictures."""
        text, name = self.setting_value.value.strip(), self.setting.value
        try:
            value = float(text) if text else None
        except ValueError as error:
            raise DataError(f"{name}: must be a number (got {text!r})") from error
        if self.setting_where.value == "":
            self._require_selection()
            self.album.set_for_pictures(sorted(self.gallery.chosen), name, value)
        else:
            self.album.set_for_folder(self.setting_where.value, name, value)
        self._redraw()
        self.say(f"Written: {self.album.last_change}.", "good")

    def set_selected_aside(self) -> None:
        """Move the selected pictures out of the dataset."""
        self._require_selection()
        self._set_aside([self.album.path(index) for index in sorted(self.gallery.chosen)])
        self.gallery.chosen = set()
        self._redraw()

    def set_problems_aside(self) -> None:
        """Move every file that cannot be used out of the dataset."""
        self._set_aside([Path(problem.path) for problem in self.album.problems if problem.skipped])

    def refresh(self) -> None:
        """Look after a fetch in progress."""
        if self.fetching is None:
            return
        status = self.fetching.status()
        if status["alive"]:
            self.say(status.get("message") or "Fetching …", "busy")
            return
        self.fetching = None
        if status["state"] == "finished":
            self._use_folder(Path(status["folder"]))
        else:
            self.say(status.get("message") or "The dataset could not be fetched.", "bad")

    def _use_folder(self, folder: Path) -> None:
        settings = {**self.project.settings(), "data_root": str(folder.resolve())}
        self.album = self.gallery.album = Album(folder)
        self.receiver.folder = self.album.root
        self.project.save_settings(settings)
        self._redraw()
        self.say(f"The dataset is now {self.album.root}.", "good")

    def _received(self) -> None:
        self.album.reload()
        self._redraw()
        self.say(f"{len(self.receiver.received)} files received.", "good")
        self.receiver.received.clear()

    def _change_tags(self, *, add: bool) -> None:
        self._require_selection()
        change = self.album.add_tag if add else self.album.remove_tag
        count = change(sorted(self.gallery.chosen), self.tag.value)
        self._redraw()
        self.say(f"{count} captions changed.", "good")

    def _set_aside(self, paths: list[Path]) -> None:
        count = self.album.set_aside([path for path in paths if path.is_file()])
        self._redraw()
        self.say(f"{count} files moved to {self.album.aside}. Undo moves them back.", "good")

    def _require_selection(self) -> None:
        if not self.gallery.chosen:
            raise DataError("Select pictures first: tick them, or press Select page.")

    # Showing

    def _redraw(self) -> None:
        self.gallery.update()
        self._draw()

    def _draw(self) -> None:
        album, problems = self.album, self.album.problems
        set_html(self.head, look.heading("Dataset", str(album.root)))
        worst = sum(problem.skipped for problem in problems)
        captions = sum(1 for index in range(len(album)) if not album.caption(index))
        entries = [
            ("pictures", f"{len(album):,}"),
            ("folders", f"{len(album.folders()):,}"),
            ("without a caption", f"{captions:,}"),
            ("cannot be used", f"{worst:,}"),
            ("remarks", f"{len(problems) - worst:,}"),
        ]
        set_html(self.figures, look.facts(entries))
        self.undo_button.disabled = not album.last_change
        self.undo_button.tooltip = f"Undo: {album.last_change}" if album.last_change else "Nothing to undo"
        chosen = self.setting_where.value
        options = [("the selected pictures", ""), *((f"folder {name}", name) for name in album.folders())]
        if tuple(options) != tuple(self.setting_where.options):
            self.setting_where.options = options
            self.setting_where.value = chosen if chosen in [value for _, value in options] else ""
        for index, title in enumerate(("Add pictures", "Pictures", "Report", f"Problems ({len(problems)})")):
            self.tabs.set_title(index, title)
        self._draw_report()
        self._draw_problems()

    def _draw_report(self) -> None:
        if not len(self.album):
            set_html(self.report, '<div class="edk-empty">The report begins with the first pictures.</div>')
            return
        tags = bar_chart(self.album.count_tags(most=16), title="Most frequent caption parts", label_width=300)
        set_html(self.report, self._bucket_chart() + '<div style="height:12px"></div>' + tags)

    def _bucket_chart(self) -> str:
        try:
            resolution = self.project.config().resolutions[0]
        except ConfigError:
            resolution = 512
        table = bucket_table(resolution)
        numbers = self.album.dataset.numbers
        counts: dict[int, int] = {}
        for bucket in assign_buckets(numbers["width"], numbers["height"], table):
            counts[int(bucket)] = counts.get(int(bucket), 0) + 1
        bars = [(f"{table[b][0]} × {table[b][1]}", count) for b, count in sorted(counts.items())]
        return bar_chart(bars, title=f"Pictures in each bucket at resolution {resolution}")

    def _draw_problems(self) -> None:
        problems = self.album.problems
        self.problems_button.disabled = not any(p.skipped and Path(p.path).is_file() for p in problems)
        if not problems:
            set_html(self.problem_list, look.note("No problems: every file can be used.", "good"))
            return
        rows = [(self._short(p.path), p.cause, p.cure) for p in problems[:SHOWN_PROBLEMS]]
        more = len(problems) - len(rows)
        text = look.table(("file", "problem", "what to do"), rows)
        set_html(self.problem_list, text + (f'<div class="edk-hint">and {more} more</div>' if more > 0 else ""))

    def _short(self, path: str) -> str:
        return path.removeprefix(f"{self.album.root}/")

    def show_tab(self, title: str) -> None:
        """Bring a tab to the front, by the beginning of its title."""
        titles: list[Any] = ["Add pictures", "Pictures", "Report", "Problems"]
        self.tabs.selected_index = titles.index(title)
