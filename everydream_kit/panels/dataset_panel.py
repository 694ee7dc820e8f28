"""The dataset panel: add images, look through them, edit captions and settings, report, exclude problems."""

from __future__ import annotations

import html
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ipywidgets as widgets

from everydream_kit.actions.background import INSPECTION_FILE
from everydream_kit.actions.background_task import BackgroundTask
from everydream_kit.actions.dataset_issues import EMPTY, UNUSABLE, is_fresh, list_issues, report_settings
from everydream_kit.actions.project import Project
from everydream_kit.data.album import SETTINGS, Album
from everydream_kit.data.changes import PrepReport
from everydream_kit.data.epoch_plan import PlanSettings
from everydream_kit.data.report import fill_buckets
from everydream_kit.data.sources import kind_of_source
from everydream_kit.errors import ConfigError, DataError, KitError
from everydream_kit.panels import style
from everydream_kit.panels.auto_caption import AutoCaption
from everydream_kit.panels.bulk_edit import BulkEdit
from everydream_kit.panels.clock import make_clock
from everydream_kit.panels.gallery import Gallery, count_images, count_things
from everydream_kit.panels.issues_box import IssuesBox
from everydream_kit.panels.login import token_environment
from everydream_kit.panels.mask_editor import MaskEditor
from everydream_kit.panels.pages import Pages
from everydream_kit.panels.panel import Panel, set_html
from everydream_kit.panels.svg_charts import bar_chart
from everydream_kit.panels.upload_area import Receiver, make_drop_zone
from everydream_kit.strict_json import read_json

SHOWN_TAGS = 16
MASKS = 5
"""Number of the page with the brush: its image is sent only while it is shown."""


class DatasetPanel(Panel):
    """`edk.panels.dataset(project)`: upload, look through, caption, tag, report; every change can be undone.

    Attributes:
        project: the project folder.
        album: the images and what can be done with them.
        gallery: the page of images.
    """

    def __init__(self, folder: str | Path, *, demo: bool = False) -> None:
        """Open the project's dataset: its own folder, or the one its settings name.

        Args:
            folder: the project's name or folder.
            demo: put the kit's demo images into the project if it has none.
        """
        super().__init__()
        self.project = Project.open(folder)
        if demo:
            self.project.add_demo_images()
        self.fetching = BackgroundTask(self.project.folder / "fetch", token_environment())
        self.unpacking = BackgroundTask(self.project.folder / "unpack")
        self.inspecting = BackgroundTask(self.project.folder / "inspect")
        self.album = Album(self.project.dataset_folder)
        self._inspection: dict[str, Any] = read_report(self.inspecting.folder)
        self.bar = style.progress_bar()
        self._inspection_failed = False
        self.head, self.figures, self.report = widgets.HTML(), widgets.HTML(), widgets.HTML()
        self.undo_button = self.button("Undo", self.undo, icon="undo")
        self.reload_button = self.button("Rescan", self.reload, icon="refresh", hint="Scan the folder again")
        self.add_tag_button = self.button("", lambda: self._change_tags(add=True))
        self.remove_tag_button = self.button("", lambda: self._change_tags(add=False))
        self.exclude_button = self.button("", self.exclude_selected, icon="archive")
        self.gallery = Gallery(self.album, self.say, self._render)
        self.gallery.on_select = self._name_actions
        self.tabs = Pages(
            {
                "Add images": self._build_add(),
                "Images": self._build_edit(),
                "Report": style.column(self.report),
                "Problems": self._build_problems(),
                "Auto-caption": self._build_captioner(),
                "Masks": self._build_masks(),
            }
        )
        self.tabs.on_choose = lambda index: self.masks.show() if index == MASKS else None
        self.clock = make_clock(self.on_beat)
        self.box = style.panel_box(
            [
                self.head,
                self.figures,
                style.actions(self.undo_button, self.reload_button, message=self.message),
                self.bar,
                self.tabs.box,
                self.clock,
            ]
        )
        self._render()
        self._name_actions()
        self.tabs.selected_index = 1 if len(self.album) else 0

    # The tabs

    def _build_add(self) -> widgets.Widget:
        self.receiver = Receiver(self.album.root, self.album.excluded)
        zone = make_drop_zone(self.receiver, self._received)
        where = html.escape(str(self.album.root))
        example = "/data/jets, images.zip, or owner/dataset on the Hub"
        self.source = style.control(widgets.Text, "Or use", "520px", label="60px", placeholder=example)
        self.source_button = self.button("Use it", self.use_source)
        hint = f'<div class="edk-hint">Files can also be copied into <code>{where}</code>; then press Rescan.</div>'
        return style.column(*([zone] if zone else []), style.row(self.source, self.source_button), widgets.HTML(hint))

    def _build_edit(self) -> widgets.Widget:
        self.tag = style.control(widgets.Text, "Tags", "260px", label="36px", placeholder="red hair, smile")
        self.setting = style.control(widgets.Dropdown, "Set", "200px", label="36px", options=list(SETTINGS))
        self.setting_value = style.control(widgets.Text, "to", "190px", label="20px", placeholder="empty: take it away")
        self.setting_where = style.control(widgets.Dropdown, "for", "260px", label="26px")
        self.setting_button = self.button("Apply", self.apply_setting)
        self.bulk = BulkEdit(lambda: self.album, lambda: self.gallery.chosen_indices)
        self.on_press(self.bulk.button, self.edit_captions)
        self.gallery.tools.children = (
            style.row(self.tag, self.add_tag_button, self.remove_tag_button, self.exclude_button),
            self.bulk.box,
            style.row(self.setting, self.setting_value, self.setting_where, self.setting_button),
        )
        return self.gallery.box

    def _build_captioner(self) -> widgets.Widget:
        self.captioner = AutoCaption(
            self.project.folder / "caption",
            lambda: self.album,
            lambda: self.gallery.chosen_indices,
            token_environment(),
        )
        self.on_press(self.captioner.start_button, self.captioner.start)
        self.on_press(self.captioner.stop_button, self.captioner.stop)
        self.on_press(self.captioner.write_button, self.write_suggestions)
        self.on_press(self.captioner.discard_button, self.captioner.discard)
        lead = "A model suggests captions. Look through them, correct them, then write those that are ticked."
        return style.column(widgets.HTML(f'<p class="edk-lead">{lead}</p>'), self.captioner.box)

    def _build_masks(self) -> widgets.Widget:
        self.masks = MaskEditor(lambda: self.album, lambda: self.gallery.found, self.save_mask, self.say)
        lead = "Paint over what the model must not learn. The images are those of the search under Images."
        return style.column(widgets.HTML(f'<p class="edk-lead">{lead}</p>'), self.masks.box)

    def _build_problems(self) -> widgets.Widget:
        self.problems = IssuesBox(lambda: self.album.root, lambda files: self._press(lambda: self._exclude(files)))
        return self.problems.box

    # What the buttons do

    def undo(self) -> None:
        """Take the last change back."""
        title = self.album.last_change
        report = self.album.undo()
        self._rerender()
        left = "" if report is None else _left_alone(report)
        words = f"Undone: {title}." if report is not None else "There is nothing to undo."
        self.say(words + left, "warn" if left else "plain")

    def reload(self) -> None:
        """Scan the folder again."""
        self.album.reload()
        self._rerender()
        self.refresh()

    def use_source(self) -> None:
        """Take another folder as the dataset, or fetch an archive or a Hub dataset in a process of its own."""
        text = self.source.value.strip()
        if not text:
            raise DataError("Type the path of a folder or an archive, or the id of a Hub dataset.")
        if kind_of_source(text) == "folder":
            self._use_folder(Path(text).expanduser())
            return
        self.fetching.begin("fetch", text)
        self.say_progress(f"Fetching {text} …")

    def apply_setting(self) -> None:
        """Write a setting for a folder or for the selected images."""
        text, name = self.setting_value.value.strip(), self.setting.value
        try:
            value = float(text) if text else None
        except ValueError as error:
            raise DataError(f"{name}: must be a number (got {text!r})") from error
        if self.setting_where.value == "":
            self._require_selection()
            report = self.album.set_for_images(self.gallery.chosen_indices, name, value)
        else:
            report = self.album.set_for_folder(self.setting_where.value, name, value)
        self._report(report, f"Written: {report.title}." if report.changes else "Nothing to change.")

    def edit_captions(self) -> None:
        """Edit the captions of the selected images as the row of actions says."""
        report = self.bulk.apply()
        self._report(report, f"{count_things(len(report.changes), 'caption')} changed in {self.album.root}.")

    def write_suggestions(self) -> None:
        """Write the suggested captions that are ticked."""
        report = self.captioner.write()
        self._report(report, f"{count_things(len(report.changes), 'caption')} written in {self.album.root}.")

    def save_mask(self, index: int, mask: bytes | None) -> None:
        """Write a mask, or remove it; the first one switches masks on for the project's training."""
        name = self.album.name(index)
        report = self.album.set_mask(index, mask)
        words = f"Mask of {name} {'written' if mask else 'removed'}." if report.changes else f"{name} has no mask."
        if mask is not None and self.project.settings().get("loss_mask", "off") == "off":
            self.project.save_settings({"loss_mask": "file"})
            words += " Training uses masks from now on (loss_mask: file)."
        self._report(report, words)

    def exclude_selected(self) -> None:
        """Move the selected images out of the dataset."""
        self._require_selection()
        self._exclude([self.album.path(index) for index in self.gallery.chosen_indices])

    def refresh(self) -> None:
        """Look after what is under way: fetching, unpacking, inspecting the images."""
        if (
            folder := self.project.dataset_folder
        ).resolve() != self.album.root:  # the training panel has chosen another
            self._use_folder(folder)
        self._follow_fetching()
        self._follow_unpacking()
        self._follow_captioning()
        self._follow_inspection()

    def _follow_captioning(self) -> None:
        status = self.captioner.refresh()
        if status is not None:
            style.show_progress(self.bar, status if status["alive"] else None)
            self.say_status(status)

    def _follow_fetching(self) -> None:
        status = self.fetching.poll()
        if status is not None and status["state"] == "finished" and not status["alive"]:
            self._use_folder(Path(status["folder"]))
        elif status is not None:
            self.say_status(status, running="Fetching …", failed="The dataset could not be fetched.")

    def _follow_unpacking(self) -> None:
        status = self.unpacking.poll()
        if status is not None:
            style.show_progress(self.bar, status if status["alive"] else None)
            if status["alive"]:
                self.say_status(status, running="Unpacking …")
                return
            if status["state"] == "finished" and (unpacked := Path(status["folder"])).is_relative_to(self.album.root):
                self.album.record_moves(
                    f"{unpacked.name} unpacked", [(self.receiver.place_outside(unpacked.name), unpacked)]
                )
            else:
                self.album.reload()
            self._rerender()
            self.say_status(status, failed="The archive could not be unpacked.")
        if self.receiver.archives and not self.unpacking.attach():
            archive, target = self.receiver.archives.pop(0)
            if not archive.is_file():  # another panel has unpacked it
                return
            self.unpacking.begin("unpack", str(archive), str(target))
            self.say_progress(f"Unpacking {archive.name.partition('-')[2]} …")

    def _follow_inspection(self) -> None:
        status = self.inspecting.poll()
        if status is not None and not status["alive"]:
            self._inspection = read_report(self.inspecting.folder)
            self._inspection_failed = status["state"] != "finished"
            self.problems.report(
                f"Duplicates could not be looked for: {status.get('message')}" if self._inspection_failed else ""
            )
            self._render()
        elif status is not None:
            done, total = status.get("step") or 0, len(self.album)
            self.problems.report(f"Checking for duplicates and broken images: {done:,} of {total:,} …")
        elif self._needs_inspection() and not self.inspecting.attach():
            settings = {**asdict(self._report_settings()), "base": str(self.project.settings()["resume_ckpt"])}
            self.inspecting.begin("inspect", str(self.album.root), json.dumps(settings))

    def _needs_inspection(self) -> bool:
        is_busy = any(task.job is not None for task in (self.captioner.task, self.unpacking, self.fetching))
        return not (is_busy or self._inspection_failed or self._fresh) and len(self.album) > 0

    def _report_settings(self) -> PlanSettings:
        try:
            return report_settings(self.project.config())
        except ConfigError:
            return report_settings(None)

    def _use_folder(self, folder: Path) -> None:
        self.album = Album(folder)
        self.receiver.folder, self.receiver.excluded = self.album.root, self.album.excluded
        self.project.save_settings({"data_root": str(folder.resolve())})
        self.gallery.use(self.album)
        self._rerender()
        self.say(f"The dataset is now {self.album.root}.", "good")

    def _received(self) -> None:
        count, moves = len(self.receiver.received), list(self.receiver.moves)
        self.receiver.received.clear()
        self.receiver.moves.clear()
        if count:
            words = count_things(count, "file")
            self.album.record_moves(f"upload of {words}", moves)
            self._inspection_failed = False
            self._rerender()
            replaced = len(moves) - count
            more = f" {replaced:,} replaced; what was there is in {self.album.excluded}." if replaced else ""
            self.say(f"{words} received.{more} Undo takes them back.", "good")
        self.refresh()

    def _change_tags(self, *, add: bool) -> None:
        self._require_selection()
        change = self.album.add_tags if add else self.album.remove_tags
        report = change(self.gallery.chosen_indices, self.tag.value)
        self._report(report, f"{count_things(len(report.changes), 'caption')} changed in {self.album.root}.")

    def _exclude(self, paths: Sequence[str | Path]) -> None:
        report = self.album.exclude([path for path in paths if Path(path).is_file()])
        moved = count_things(len(report.changes), "file")
        self._report(report, f"{moved} moved to {self.album.excluded}. Undo moves them back.")

    def _report(self, report: PrepReport, words: str) -> None:
        """Show a step's result, and what it left alone."""
        self._rerender()
        left = _left_alone(report)
        self.say(words + left, "warn" if left else "good")

    def _name_actions(self) -> None:
        """Every action on the selection says how many images it will touch before it is pressed."""
        number = len(self.gallery.chosen)
        end = f" ({number:,})" if number else ""
        self.add_tag_button.description = f"Add to selected{end}"
        self.remove_tag_button.description = f"Remove from selected{end}"
        self.exclude_button.description = f"Exclude selected{end}"
        for control in (self.add_tag_button, self.remove_tag_button, self.exclude_button):
            control.tooltip = f"{control.description}: {count_images(number)} in {self.album.root}"
        self.bulk.show()

    def _require_selection(self) -> None:
        if not self.gallery.chosen:
            raise DataError("Select images first: tick them, or press Select page.")

    # Showing

    def _rerender(self) -> None:
        self.gallery.update()
        if self.tabs.selected_index == MASKS:
            self.masks.show()
        self._render()

    def _render(self) -> None:
        album = self.album
        self._fresh = is_fresh(album.dataset, self._inspection)
        issues = list_issues(album.dataset, self._report_settings(), self._inspection)
        set_html(self.head, style.heading("Dataset", str(album.root)))
        counted = [issue for issue in issues if issue.kind != EMPTY]
        worst = sum(issue.kind == UNUSABLE for issue in counted)
        named, missing = album.count_captions()
        entries = [
            ("images", f"{len(album):,}"),
            ("folder" if len(album.folders()) == 1 else "folders", f"{len(album.folders()):,}"),
            ("captions from file names", f"{named:,}"),
            ("without a caption", f"{missing:,}"),
            ("cannot be used", f"{worst:,}"),
            ("notes", f"{len(counted) - worst:,}"),
        ]
        set_html(self.figures, style.facts(entries))
        self.undo_button.disabled = not album.last_change
        self.undo_button.tooltip = f"Undo: {album.last_change}" if album.last_change else "Nothing to undo"
        chosen = self.setting_where.value
        options = [("the selected images", ""), *((f"folder {name}", name) for name in album.folders())]
        if tuple(options) != tuple(self.setting_where.options):
            self.setting_where.options = options
            self.setting_where.value = chosen if chosen in [value for _, value in options] else ""
        for index, title in enumerate(("Add images", "Images", "Report", f"Problems ({len(counted):,})")):
            self.tabs.set_title(index, title)
        set_html(self.report, _report_html(album, self._report_settings(), self._inspection))
        self.problems.show(issues, complete=self._fresh)

    def show_image(self, path: Path) -> None:
        """Bring one image to the front, with its caption to edit."""
        self.tabs.selected_index = 1
        self.gallery.search.value = path.resolve().relative_to(self.album.root).as_posix()


SHOWN_PROBLEMS = 3
MAX_REPORT_BYTES = 1 << 30
"""A report lists every issue of a dataset, which may have a million images."""
logger = logging.getLogger(__name__)


def _report_html(album: Album, settings: PlanSettings, inspection: Mapping[str, Any]) -> str:
    """Buckets and frequent tags of a dataset.

    Args:
        inspection: as `read_report` gives it; it has counted where the captions come from.
    """
    if not len(album):
        return '<div class="edk-empty">The report begins with the first images.</div>'
    fills, num_images, num_steps = fill_buckets(album.dataset, settings)
    bars = [
        (f"{fill.size[0]} × {fill.size[1]}", fill.num_images, f"{fill.num_images:,} · {fill.fullness:.0%} full")
        for fill in fills
    ]
    lead = f"{num_images:,} images make {num_steps:,} steps in the first epoch, at batch size {settings.batch_size}"
    resolution = ", ".join(map(str, settings.resolutions))
    tags = album.count_tags(most=len(album) * 40)
    several = [(tag, float(count), f"{count:,}") for tag, count in tags if count > 1]
    rest = len(tags) - len(several)
    words = f"{rest:,} other parts are in one caption each." if rest else ""
    if counts := inspection.get("captions"):
        named, empty, shared = counts["from_file_name"], counts["empty"], len(counts["repeated"])
        words += f"<br>{named:,} captions come from file names, {empty:,} are empty, {shared:,} are shared by several images."
    tags_chart = bar_chart(several[:SHOWN_TAGS], title="Most frequent caption parts", label_width=300)
    parts = [
        f'<p class="edk-lead">{lead}.</p>',
        bar_chart(bars, title=f"Images in each bucket at resolution {resolution}"),
        f'{tags_chart}<div class="edk-hint">{words}</div>',
    ]
    return '<div class="edk-apart">' + "</div><div class=edk-apart>".join(parts) + "</div>"


def _left_alone(report: PrepReport) -> str:
    """What a step left alone, as further lines of a message."""
    if not report.problems:
        return ""
    lines = [f"{Path(problem.path).name}: {problem.cause} {problem.cure}" for problem in report.problems]
    more = [f"and {len(lines) - SHOWN_PROBLEMS:,} more"] if len(lines) > SHOWN_PROBLEMS else []
    return "\n".join([f" {len(lines):,} left alone:", *lines[:SHOWN_PROBLEMS], *more])


def read_report(folder: Path) -> dict[str, Any]:
    """The result of the last inspection; nothing where there was none."""
    path = folder / INSPECTION_FILE
    try:
        return dict(read_json(path, missing={}, allow_nan=True, max_bytes=MAX_REPORT_BYTES))
    except KitError as problem:  # it is made again
        logger.warning("%s The dataset is inspected again.", problem)
        return {}
