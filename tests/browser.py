"""A headless Chromium that a test drives: pages, files, screenshots, what it asked for and what went wrong."""

import base64
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium")
SWITCHES = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--remote-debugging-pipe"),
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",  # no network
    *("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"),  # a camera, and leave to use it
]


class Browser:
    """One page, over Chromium's pipe. `requests` are the addresses that it and its workers asked for, `faults` what it
    wrote to the console as a warning or an error."""

    def __init__(self, process: subprocess.Popen, to: int, back: int):
        self.process, self.to, self.back = process, to, back
        self.buffer, self.last, self.session, self.requests, self.faults = b"", 0, None, [], []
        target = self.send("Target.createTarget", {"url": "about:blank"})["targetId"]
        self.session = self.send("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
        self._watch(self.session)
        self.send("Page.enable", {})

    def _watch(self, session: str) -> None:
        for method in ("Network.enable", "Runtime.enable", "Log.enable"):
            self._post(method, {}, session)
        self._post(
            "Target.setAutoAttach", {"autoAttach": True, "waitForDebuggerOnStart": True, "flatten": True}, session
        )
        self._post("Runtime.runIfWaitingForDebugger", {}, session)

    def _post(self, method: str, params: dict[str, Any], session: str | None) -> int:
        self.last += 1
        message = {"id": self.last, "method": method, "params": params, **({"sessionId": session} if session else {})}
        os.write(self.to, json.dumps(message).encode() + b"\0")
        return self.last

    def send(self, method: str, params: dict[str, Any]) -> dict[str, Any]:
        number = self._post(method, params, self.session)
        while True:
            message = self._read()
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self.buffer:
            data = os.read(self.back, 1 << 20)
            assert data, "Chromium ended"
            self.buffer += data
        line, _, self.buffer = self.buffer.partition(b"\0")
        message = json.loads(line)
        params = message.get("params", {})
        match message.get("method"):
            case "Target.attachedToTarget":
                if params["sessionId"] != self.session and self.session:
                    self._watch(params["sessionId"])
            case "Network.requestWillBeSent":
                self.requests.append(params["request"]["url"])
            case "Runtime.exceptionThrown":
                self.faults.append(params["exceptionDetails"])
            case "Log.entryAdded":
                self.faults.append(params["entry"])
            case "Runtime.consoleAPICalled" if params["type"] in ("warning", "error"):
                self.faults.append(params["args"])
        return message

    def run(self, script: str) -> Any:
        """The value of a script's expression, or of what it promises."""
        asked = {"expression": script, "awaitPromise": True, "returnByValue": True, "userGesture": True}
        found = self.send("Runtime.evaluate", asked)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, script: str, seconds: float = 60) -> Any:
        """Waits until a script's expression is true; returns it."""
        stop = time.monotonic() + seconds
        while not (found := self.run(script)):
            assert time.monotonic() < stop, (script, self.run("document.body.innerText"), self.faults)
            time.sleep(0.05)
        return found

    def open(self, address: str, width: int = 1280, dark: bool = False) -> None:
        """Opens a page; what was asked for and went wrong before is forgotten."""
        self.look(width, dark)
        self.requests.clear(), self.faults.clear()
        self.send("Page.navigate", {"url": address})
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def look(self, width: int, dark: bool) -> None:
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.send("Emulation.setDeviceMetricsOverride", size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", {"features": [scheme]})

    def choose(self, selector: str, file: Path) -> None:
        """Chooses a file in a file input."""
        found = self.send("Runtime.evaluate", {"expression": selector})["result"]["objectId"]
        self.send("DOM.setFileInputFiles", {"files": [str(file)], "objectId": found})

    def screenshot(self) -> bytes:
        """The whole page, a PNG."""
        return base64.b64decode(self.send("Page.captureScreenshot", {"captureBeyondViewport": True})["data"])


@contextmanager
def chromium(profile: Path) -> Iterator[Browser]:
    assert CHROMIUM
    theirs, to = os.pipe()
    back, answers = os.pipe()
    line = 'in=$1 out=$2; shift 2; exec "$@" 3<&"$in" 4>&"$out"'  # Chromium reads from 3 and writes to 4
    command = ["bash", "-c", line, "bash", str(theirs), str(answers), CHROMIUM, *SWITCHES, f"--user-data-dir={profile}"]
    process = subprocess.Popen(command, pass_fds=(theirs, answers), stderr=subprocess.DEVNULL)
    os.close(theirs), os.close(answers)
    try:
        yield Browser(process, to, back)
    finally:
        process.terminate()
        process.wait(20)
        os.close(to), os.close(back)
