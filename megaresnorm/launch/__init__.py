"""How ``megaresnorm launch`` starts a job on several nodes: by which launcher, with which words, watched by whom.

On every node the same command runs, whoever starts it there: ``python -m megaresnorm launch RECIPE ...``, which is the
supervisor of the node's ranks (resilience/supervisor.py; torchrun.py, agent.py and hearing.py beside it). It learns its
place from options or variables (parallel/plan.py) or from those of the launcher (parallel/launchers.py). What is here
is for the terminal from which a job is submitted:

  submit.py       from what was asked for to a running, submitted or printed job; read this first
  request.py      what was asked for, checked, and the command of a node
  hostfile.py     lists of hosts
  ssh.py deepspeed.py mpirun.py slurm.py kubernetes.py    the command or the file for each launcher
  slurm_job.py    a submitted job of Slurm, and waiting for its end
  front.py        runs commands that start nodes: output, signals, the first error, nothing left behind
  tell.py         sends a signal to the supervisors of a job on one node
  words.py        words in characters that no shell changes
  drill.py soak.py    megaresnorm drill: a run with faults on this host, watched from outside, and what came of it
"""
