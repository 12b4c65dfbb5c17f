"""An attnd process of our own: started, waited for, and never left behind."""

import os
import pathlib
import subprocess
import tempfile
import time

START_SECONDS = 20
STOP_SECONDS = 15


class ServerFailed(Exception):
    """The server did not start, or did not end as it should; the message has the end of its log."""


class ServerProcess:
    """`with ServerProcess(binary, flags) as server:` runs attnd on a free loopback port.

    Inside, `server.address` is where it listens. On the way out it gets SIGTERM, and SIGKILL should it not have ended
    within STOP_SECONDS. Should this process be killed, the kernel kills the server too: that is what it is started
    through `setpriv --pdeathsig` for. Raises ServerFailed.
    """

    def __init__(self, binary, flags):
        if not os.access(binary, os.X_OK):
            raise ServerFailed(f"{binary}: no such program")
        self._command = ["setpriv", "--pdeathsig", "KILL", str(binary), "--listen", "127.0.0.1:0", *flags]
        self._folder = None
        self._process = None
        self.address = None

    def __enter__(self):
        self._folder = tempfile.TemporaryDirectory(prefix="attnd-demo-")
        self._ready = pathlib.Path(self._folder.name, "ready")
        self._log = pathlib.Path(self._folder.name, "log")
        try:
            with open(self._log, "wb") as log:
                # A session of its own: Ctrl-C is for this process, which then stops the server in good order.
                self._process = subprocess.Popen([*self._command, "--ready-file", str(self._ready)], stdout=log,
                                                 stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)
            self.address = self._wait_until_ready()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, kind, error, trace):
        status, log = self._stop()
        if status != 0 and kind is None:
            raise ServerFailed(f"the server ended with status {status}\n{log}")

    def _wait_until_ready(self):
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise ServerFailed(f"the server ended with status {self._process.returncode}\n{self._log_tail()}")
            # The last newline says that the file is complete.
            if self._ready.exists() and (text := self._ready.read_text()).endswith("\n"):
                return text.splitlines()[0]
            time.sleep(0.01)
        raise ServerFailed(f"the server was not ready within {START_SECONDS} s\n{self._log_tail()}")

    def _stop(self):
        """Ends the process and removes its files; its exit status and the end of its log."""
        status, log = 0, ""
        if self._process is not None:
            self._process.terminate()
            try:
                status = self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                status = self._process.wait()
            log = self._log_tail()
            self._process = None
        self._folder.cleanup()
        return status, log

    def _log_tail(self):
        return "\n".join(self._log.read_text("utf-8", "replace").splitlines()[-15:])
