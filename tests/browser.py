"""A headless Chromium for tests, driven over a pair of pipes by its own protocol: no driver, no package."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# Windows key codes, which the protocol asks for.
CODES = {"ArrowLeft": 37, "ArrowRight": 39, "ArrowDown": 40, "Backspace": 8}


class Browser:
    """One page of a browser of its own, with a profile in ``folder``."""

    def __init__(self, folder: Path) -> None:
        assert CHROMIUM is not None
        to_read, self.write = os.pipe()
        self.read, to_write = os.pipe()
        command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        command += ["--remote-debugging-pipe", f"--user-data-dir={folder}", "--no-first-run", "--mute-audio"]
        # the browser reads from descriptor 3 and writes to 4
        shell = ["bash", "-c", f'exec "$@" 3<&{to_read} 4>&{to_write}', "bash", *command, "about:blank"]
        self.log = open(folder.with_suffix(".log"), "wb")  # noqa: SIM115  closed with the browser
        self.process = subprocess.Popen(shell, pass_fds=(to_read, to_write), stdout=self.log, stderr=self.log)
        os.close(to_read)
        os.close(to_write)
        self.rest, self.number, self.tab = b"", 0, ""
        self.errors: list[str] = []  # what pages said went wrong
        self.tab = self.open()

    def open(self) -> str:
        """One more tab; ``tab`` is the one that is driven."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        tab: str = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.tab = tab
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        return tab

    def use(self, tab: str) -> None:
        """Drive another tab, in front: one that is not to be seen draws nothing."""
        self.tab = tab
        self.call("Page.bringToFront")

    def call(self, method: str, **options: Any) -> dict[str, Any]:
        """A command of the protocol and its answer."""
        self.number += 1
        message: dict[str, Any] = {"id": self.number, "method": method, "params": options}
        if self.tab and not method.startswith("Target."):
            message["sessionId"] = self.tab
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self.number:
                assert "error" not in answer, (method, answer["error"])
                found: dict[str, Any] = answer["result"]
                return found
            self._note(answer)

    def go(self, address: str) -> None:
        """Load a page."""
        self.call("Page.navigate", url=address)

    def value(self, code: str) -> Any:
        """What an expression of the page gives."""
        found = self.call("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def until(self, code: str, seconds: float = 60) -> None:
        """Wait until an expression is true."""
        end = time.monotonic() + seconds
        while not self.value(code):
            assert time.monotonic() < end, f"never: {code}\n{self.value('document.body.innerText')}"
            time.sleep(0.02)

    def press(self, key: str) -> None:
        """One key, down and up."""
        code = {"key": key, "windowsVirtualKeyCode": CODES.get(key, ord(key[0].upper()))}
        text = {"text": key} if len(key) == 1 else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", **code, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **code)

    def look(self, width: int, height: int, dark: bool = False) -> None:
        """A window of that many pixels, and which colours the person likes."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def shot(self, file: Path) -> Path:
        """What is to be seen, as PNG."""
        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))
        return file

    def close(self) -> None:
        """End it."""
        for handle in (self.write, self.read):
            os.close(handle)
        try:
            self.process.wait(10)  # it goes when its pipe does
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(10)
        self.log.close()

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self.rest:
            assert select.select([self.read], [], [], 120)[0], "the browser does not answer"
            more = os.read(self.read, 1 << 16)
            assert more, f"the browser ended: {Path(self.log.name).read_text()[-2000:]}"
            self.rest += more
        message, _, self.rest = self.rest.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found

    def _note(self, event: Mapping[str, Any]) -> None:
        if event.get("method") == "Runtime.exceptionThrown":
            self.errors.append(str(event["params"]["exceptionDetails"]))
        if event.get("method") == "Log.entryAdded" and event["params"]["entry"]["level"] == "error":
            self.errors.append(event["params"]["entry"]["text"])
