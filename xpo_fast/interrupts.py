"""Ctrl-C while the command line is still importing torch: no traceback, and the shell's own status 130.

To be imported before anything else. `cli.main` hears Ctrl-C from then on. Programs that import the package are left as they are,
and so is a command that nobody may interrupt (nohup).
"""

import signal
import sys

_as_command = (sys.argv or [""])[0].endswith("xpo-fast") or "xpo_fast.cli" in sys.orig_argv
if _as_command and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
