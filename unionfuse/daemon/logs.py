"""Where a mount's log lines go: a file, the terminal, or syslog."""

from __future__ import annotations

import logging
import os
import sys
import syslog

from unionfuse.options import MountOptions


class _Syslog(logging.Handler):
    _PRIORITIES = ((logging.ERROR, syslog.LOG_ERR), (logging.WARNING, syslog.LOG_WARNING))

    def emit(self, record: logging.LogRecord) -> None:
        reached = (number for level, number in self._PRIORITIES if record.levelno >= level)
        priority = next(reached, syslog.LOG_INFO)
        for line in self.format(record).splitlines():
            syslog.syslog(priority, line)


def log_to(file: int | None, options: MountOptions) -> None:
    """Send log lines to a descriptor, or else to stderr (in the foreground) or syslog.

    A daemon that detaches warns whoever mounts on stderr, too, until it lets go of that.
    """
    handler: logging.Handler
    if file is not None:
        handler = logging.StreamHandler(os.fdopen(file, "a", encoding="utf-8"))
    elif options.foreground:
        handler = logging.StreamHandler(sys.stderr)
    else:
        syslog.openlog("unionfuse", syslog.LOG_PID, syslog.LOG_DAEMON)
        handler = _Syslog()
    if not isinstance(handler, _Syslog):
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    handlers = [handler]
    if not options.foreground:
        notices = logging.StreamHandler(sys.stderr)
        notices.setLevel(logging.WARNING)
        notices.setFormatter(logging.Formatter("unionfuse: %(message)s"))
        handlers.append(notices)
    logging.basicConfig(handlers=handlers, level=logging.INFO)
    if options.debug:
        logging.getLogger("unionfuse").setLevel(logging.DEBUG)
