"""torchrun as launch/torchrun.sh starts it: it leaves signals to the supervisor, and ends with its supervisor.

Thirty seconds after a SIGTERM torchrun by itself would kill ranks that have not saved yet. Here it never hears of one:
signals are blocked, a thread passes them on to the supervisor, and the ranks inherit the mask, so that a signal that
comes while a rank is still importing torch waits until somebody listens (resilience/signals.py).
"""

import os
import signal
import sys
import threading

from megaresnorm.errors import LostRankError
from megaresnorm.parallel.environment import read_environment
from megaresnorm.resilience.launcher import SIGNALS, Launcher, children, end_with, kill
from megaresnorm.text import say

BLOCKED = (*SIGNALS, signal.SIGHUP)


def main() -> None:
    """Run torchrun with the arguments of this process; its parent is the supervisor."""
    supervisor = os.getppid()
    signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED)
    folder = read_environment().launcher
    assert folder is not None, "the supervisor names it"
    launcher = Launcher(folder)
    threading.Thread(target=_pass_on, args=(supervisor,), name="signals", daemon=True).start()
    end_with(supervisor, launcher, first=_kill_ranks)
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.run import main as torchrun

    try:
        torchrun(sys.argv[1:])
    except SignalException:  # the supervisor's SIGQUIT
        sys.exit(1)
    except RendezvousError as e:
        reason = str(e).splitlines()[0]
        say(f"megaresnorm: error: this node and the one at MASTER_ADDR did not meet ({reason})", error=True)
        sys.exit(LostRankError.exit_code)


def _kill_ranks() -> None:
    for rank in children(os.getpid()):
        kill(rank)


def _pass_on(supervisor: int) -> None:
    while True:
        kill(supervisor, signal.Signals(signal.sigwait(BLOCKED)))


if __name__ == "__main__":
    main()
