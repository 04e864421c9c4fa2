"""How ``megaresnorm launch`` starts a job on several nodes: by which launcher, with which words, watched by whom.

On every node the same command runs, whoever starts it there: ``python -m megaresnorm launch RECIPE ...``, which is the
supervisor of the node's ranks (resilience/supervisor.py) and learns its place from options or from the launcher's
variables (parallel/launchers.py). What is here is for the terminal from which a job is submitted:

  request.py      what was asked for, checked, and the command of a node
  hostfile.py     lists of hosts
  ssh.py deepspeed.py mpirun.py slurm.py kubernetes.py    the command or the file for each launcher
  slurm_job.py    a submitted batch job, waited for
  front.py        runs such commands: output, signals, the first error, nothing left behind
  tell.py         sends a signal to the supervisors of a job on one node
"""
