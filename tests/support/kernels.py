"""A real ipykernel, to execute cells and read values."""

from __future__ import annotations

import queue
import time
from contextlib import suppress
from datetime import timedelta

from jupyter_client.manager import KernelManager

SETUP = """%load_ext mlx_nb
import sys; sys.path.insert(0, {tests!r})
from tiny import tiny_rows
rows = tiny_rows(40)"""


class Kernel:
    """One kernel and the outputs of its cells."""

    def __init__(self, folder):
        self.manager = KernelManager(kernel_name="python3")
        self.manager.start_kernel(cwd=str(folder))
        self.client = self.manager.client()
        self.client.session.metadata = {"cellId": "cell"}  # as a notebook, and no console, sends with its requests
        self.client.start_channels()
        self.client.wait_for_ready(timeout=180)

    def run(self, code, timeout=300, on_output=lambda text: None):
        """Execute; returns (status, text of all streams and results). `on_output` sees each piece as it comes."""
        message_id = self.client.execute(code)
        text = ""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            message = self.client.get_iopub_msg(timeout=timeout)
            if message["parent_header"].get("msg_id") != message_id:
                continue
            kind, content = message["msg_type"], message["content"]
            piece = content.get("text") or content.get("data", {}).get("text/plain", "") or content.get("evalue", "")
            text += piece
            on_output(piece)
            if kind == "status" and content["execution_state"] == "idle":
                break
        return self.reply_to(message_id)["content"]["status"], text

    def bundles(self, code, timeout=300):
        """The MIME bundles that a cell displays."""
        found = []

        def collect(message):
            if message["msg_type"] in ("display_data", "execute_result"):
                found.append(message["content"]["data"])

        self.client.execute_interactive(code, output_hook=collect, timeout=timeout)
        return found

    def reply_to(self, message_id, timeout=300):
        """The output of a request after its execution."""
        reply = self.client.get_shell_msg(timeout=timeout)
        while reply["parent_header"].get("msg_id") != message_id:
            reply = self.client.get_shell_msg(timeout=timeout)
        return reply

    def run_all(self, cells, timeout=300, clock=0.0):
        """Send all cells at once, as Run All does; returns (status, text) of each.

        `clock` is by how many seconds the clock of the front end is ahead of the kernel's.
        """
        sent = []
        for code in cells:
            content = {"code": code, "silent": False, "store_history": True, "allow_stdin": True, "stop_on_error": True}
            message = self.client.session.msg("execute_request", content)
            message["header"]["date"] += timedelta(seconds=clock)
            self.client.shell_channel.send(message)
            sent.append(message["header"]["msg_id"])
        texts, statuses = dict.fromkeys(sent, ""), {}
        displays = {}  # the cell that a display is in, by its id: an update changes it there
        while len(statuses) < len(sent):
            reply = self.client.get_shell_msg(timeout=timeout)
            if (parent := reply["parent_header"].get("msg_id")) in texts:
                statuses[parent] = reply["content"]["status"]
        with suppress(queue.Empty):
            while True:
                message = self.client.get_iopub_msg(timeout=0.5)
                content, parent = message["content"], message["parent_header"].get("msg_id")
                display_id = content.get("transient", {}).get("display_id")
                if message["msg_type"] == "display_data":
                    displays[display_id] = parent
                elif message["msg_type"] == "update_display_data":
                    parent = displays.get(display_id)
                if parent in texts:
                    shown = content.get("data", {}).get("text/plain") or content.get("evalue")
                    texts[parent] += f"{shown}\n" if shown else content.get("text", "")
        return [(statuses[one], texts[one]) for one in sent]

    def value(self, expression):
        status, text = self.run(f"print({expression})")
        assert status == "ok", text
        return text.strip()

    def close(self):
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)
