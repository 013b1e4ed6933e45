"""Headless Chromium through chromedriver's WebDriver protocol."""

import base64
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
MISSING = None if CHROMIUM and DRIVER else "needs Debian's chromium and chromium-driver"
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
# a window that nobody sees draws as often as one that is looked at
AWAKE = [
    "--disable-background-timer-throttling",
    "--disable-backgrounding-occluded-windows",
    "--disable-renderer-backgrounding",
]
_DIRECTLY = urllib.request.build_opener(urllib.request.ProxyHandler({}))
KEYS = {"left": "\ue012", "right": "\ue014", "tab": "\ue004", "enter": "\ue007", "home": "\ue011", "end": "\ue010",
        "escape": "\ue00c"}  # fmt: skip


class Browser:
    """One window; used as a context."""

    def __init__(self, width=1280, height=900):
        self.size = width, height

    def __enter__(self):
        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)  # its processes end on their own
        with open(os.path.join(self._folder.name, "driver.txt"), "xb") as said:
            self._driver = subprocess.Popen([DRIVER, "--port=0"], stdout=said, stderr=subprocess.STDOUT)
        self._base = ""
        try:
            self._begin(said.name)
        except BaseException:
            self.__exit__()
            raise
        return self

    def _begin(self, said):
        """said: the file in which the driver says which port it has found."""
        end = time.monotonic() + 60
        while not (found := re.search(r"started successfully on port (\d+)", Path(said).read_text(errors="replace"))):
            assert time.monotonic() < end and self._driver.poll() is None, Path(said).read_text(errors="replace")
            time.sleep(0.02)
        self._base = f"http://127.0.0.1:{found[1]}"
        words = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={self._folder.name}"]
        words += [f"--window-size={self.size[0]},{self.size[1]}", "--disable-dev-shm-usage", *AWAKE]
        wanted = {"goog:chromeOptions": {"binary": CHROMIUM, "args": words}, "goog:loggingPrefs": {"browser": "ALL"}}
        made = self._ask("POST", "/session", capabilities={"alwaysMatch": wanted})
        self._base += f"/session/{made['sessionId']}"

    def __exit__(self, *error):
        try:
            if "/session/" in self._base:
                self._ask("DELETE", "")
        finally:
            self._driver.terminate()
            self._driver.wait()
            self._folder.cleanup()

    def _ask(self, method, path, **body):
        data = json.dumps(body).encode() if method == "POST" else None
        request = urllib.request.Request(self._base + path, data, {"Content-Type": "application/json"}, method=method)
        try:
            with _DIRECTLY.open(request, timeout=60) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(json.load(error)["value"]["message"]) from None

    def open(self, url):
        self._ask("POST", "/url", url=url)

    def run(self, script, *arguments):
        """What a function's body returns, or what its promise is fulfilled with."""
        return self._ask("POST", "/execute/sync", script=script, args=list(arguments))

    def until(self, script, *arguments, seconds=60, said=None):
        """Runs it until what it returns is true, and returns that. said: a script whose answer a failure shows."""
        end = time.monotonic() + seconds
        while not (found := self.run(script, *arguments)):
            if time.monotonic() > end:
                facts = self.run(said) if said else ""
                raise AssertionError(f"never true: {script.strip()} {facts} {self.log()}")
            time.sleep(0.02)
        return found

    def press(self, *keys):
        """On what has the focus."""
        pressed = [{"type": kind, "value": KEYS[key]} for key in keys for kind in ("keyDown", "keyUp")]
        self._ask("POST", "/actions", actions=[{"type": "key", "id": "keys", "actions": pressed}])

    def choose(self, selector, value):
        """An option of a select, by its value, as a click does it."""
        found = self._ask("POST", "/element", using="css selector", value=f'{selector} option[value="{value}"]')
        self._ask("POST", f"/element/{found[ELEMENT]}/click")

    def devtools(self, command, **parameters):
        return self._ask("POST", "/goog/cdp/execute", cmd=command, params=parameters)

    def resize(self, width, height=900):
        """The viewport, which may be narrower than a window can be."""
        self.devtools(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )

    def scheme(self, name):
        """light or dark"""
        self.devtools("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": name}])

    def log(self):
        """What the console was told since the last time."""
        return self._ask("POST", "/se/log", type="browser")

    def screenshot(self, path):
        path.write_bytes(base64.b64decode(self._ask("GET", "/screenshot")))
