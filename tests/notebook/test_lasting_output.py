"""What stays of a run under its panel: after every way of moving it, and on a page that was closed meanwhile."""

from __future__ import annotations

import time
import uuid

import pytest

from kernels import SETUP, Kernel
from places import SUPPORT

pytestmark = pytest.mark.kernel
PLACEHOLDER = "the result appears here"


class Page(Kernel):
    """A kernel with a page that keeps what each output shows, by its display id; opened again, it has none of them."""

    def __init__(self, folder):
        super().__init__(folder)
        self.shown, self.cells = {}, {}
        receive = self.client.get_iopub_msg

        def get_iopub_msg(**options):
            message = receive(**options)
            content = message["content"]
            if message["msg_type"] in ("display_data", "update_display_data"):
                name = content.get("transient", {}).get("display_id")
                new = message["msg_type"] == "display_data"
                if name and (new or name in self.shown):
                    self.shown[name] = content["data"]
            return message

        self.client.get_iopub_msg = get_iopub_msg

    def open_again(self):
        self.shown.clear()
        self.client.session.session = uuid.uuid4().hex

    @property
    def texts(self):
        return [data.get("text/plain", "") for data in self.shown.values()]

    @property
    def summary(self):
        """The first line of the one summary there is."""
        found = [text.splitlines()[0] for text in self.summaries]
        assert len(found) == 1, found
        return found[0]

    @property
    def summaries(self):
        plain = [data["text/plain"] for data in self.shown.values() if "image/png" not in data]
        return [text for text in plain if " update " in text or PLACEHOLDER in text]

    @property
    def figures(self):
        return [data for data in self.shown.values() if "image/png" in data]


@pytest.fixture
def page(tmp_path, tiny_folder):
    page = Page(tmp_path)
    status, text = page.run(SETUP.format(tests=str(SUPPORT)))
    assert status == "ok", text
    page.run(
        f"%%finetune --name a -o a --paused\nmodel: {tiny_folder}\ndata: rows\niters: 12\nsteps_per_eval: -1\n"
        "loss_spike: null\nlora_parameters: {rank: 4}"
    )
    # As a browser says that shows it.
    status, text = page.run("get_ipython()._mlx_nb_magics.session._shown['a'][0]._views = 1")
    assert status == "ok", text
    yield page
    page.close()


WAYS = {
    "%finetune step 3": "paused after update 3",
    "%finetune run --wait": "finished after update 12",
    "a.step(3)": "paused after update 3",
    "a.step(3); _ = a.rewind(1)": "paused after update 2",
    "%finetune step 3\n%finetune rewind 1": "paused after update 2",
    "%finetune step 3\n%finetune stop": "stopped after update 3",
    "a.start(); _ = await a": "finished after update 12",
    "_ = a.run(); a.set(iters=20)": "paused after update 12",
}


@pytest.mark.parametrize("how", WAYS)
def test_the_result_stands_under_the_panel_however_the_run_was_moved(page, how):
    assert PLACEHOLDER in page.summary
    status, text = page.run(how)
    assert status == "ok", text
    page.run("1")  # what was due after the cell has been done
    assert page.summary == f"a: {WAYS[how]}"
    assert len(page.figures) == 1
    assert not any("loading" in text or PLACEHOLDER in text for text in page.texts)


def test_a_result_is_replaced_by_every_later_one_and_by_how_the_run_was_replaced(page):
    seen = []
    for code in ("%finetune step 3", "%finetune rewind 2", "%finetune run 20 --wait", "a.step.__self__.rewind(to=1)"):
        page.run(code)
        page.run("1")
        seen.append(page.summary)
    assert seen == [
        "a: paused after update 3",
        "a: paused after update 1",
        "a: finished after update 21",
        "a: paused after update 1",
    ]
    assert not page.figures  # one update has no curve
    page.run("%finetune resume a -o b")
    page.run("1")
    old, new = page.summaries
    assert "a was replaced by the same run, resumed in this process (the variable b) after update 1" in old
    assert new.startswith("a: paused after update 1\n")
    assert "replaced" not in new


def test_a_run_that_was_paused_while_it_loads_has_no_promise_under_its_panel(page):
    page.run("from mlx_nb.events import Pause\na.request(Pause())")
    page.run("%finetune run --background\n")
    deadline = time.monotonic() + 20
    while page.value("a.state") == "running" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any("loading" in text or PLACEHOLDER in text for text in page.texts)


def test_a_page_that_was_closed_gets_the_result_with_the_next_command(page):
    page.run("%finetune run --background")
    page.open_again()
    while page.value("a.state") != "finished":
        time.sleep(0.05)
    assert page.texts == []  # a kernel cannot write into outputs that a page does not have any more
    page.run("%finetune status")
    assert page.summary == "a: finished after update 12"
    assert len(page.figures) == 1
    page.run("%finetune status")
    assert page.summary == "a: finished after update 12"
    page.run("%finetune rewind 2")
    page.run("1")
    assert page.summary == "a: paused after update 10"
