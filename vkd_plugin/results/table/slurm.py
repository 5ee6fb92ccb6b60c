"""A Slurm job array that runs what a table lacks, a task for each row and seed."""

import os
import shlex
import sys
from collections.abc import Sequence

from vkd_plugin.errors import EXIT_BAD_INPUT, EXIT_STOPPED, UserError

from .data import Run, Table, slug
from .earlier import holds_checkpoint, is_interrupted
from .measured import missing_runs
from .running import passed_on
from .soundness import check_experiments

_SCRIPT = """\
#!/bin/bash
# {title}
# What {table} lacks on the day this was printed: {count} runs, a task each.
#
# Fill in for your cluster:
#SBATCH --partition=PARTITION
#SBATCH --account=ACCOUNT
#SBATCH --time=24:00:00
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
{gpus}#
# Leave as it is: what is stopped saves, comes back into the queue and goes on.
#SBATCH --job-name={name}
#SBATCH --array=0-{last}
#SBATCH --output=slurm-%x-%A_%a.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=USR1@120

cd {folder} || exit {bad}
python={python}

case "$SLURM_ARRAY_TASK_ID" in
{tasks}
*) echo "no task $SLURM_ARRAY_TASK_ID" >&2; exit {bad} ;;
esac

# With more than one task per node, the processes of a run meet here.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$((29500 + SLURM_ARRAY_TASK_ID))

trap : TERM USR1  # they are for the run; this shell waits for it to save
srun "$python" -m vkd_plugin "${{arguments[@]}}" --resume auto
code=$?
if [ "$code" -eq {stopped} ]; then
    # Not by SLURM_JOB_ID: the last task's is that of the whole array.
    scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID"
fi
exit "$code"
"""


def slurm_script(table: Table, device: str | None = None, trust: Sequence[str] = ()) -> str:
    """The script for ``sbatch``, which goes to the present folder and uses the present Python.

    Args:
        table: the table.
        device: ``--device`` of the runs; no GPU is asked for with ``cpu``.
        trust: ``--trust`` of the runs.

    Raises:
        ConfigErrors: rows do not fit their experiments.
        UserError: folders hold runs of other experiments, which the tasks could neither go on with nor replace.
    """
    missing = missing_runs(table)
    if not missing:
        return f"#!/bin/bash\n# {table.path}: nothing is missing.\n"
    check_experiments(missing, trust)
    in_the_way = [run for run in missing if holds_checkpoint(run) and not is_interrupted(run, trust)]
    if in_the_way:
        lines = (f"{run.folder}: another experiment than '{run.row.name}' is now; move it away" for run in in_the_way)
        raise UserError("\n".join(lines))
    return _SCRIPT.format(
        title=table.title,
        table=shlex.quote(str(table.path)),
        count=len(missing),
        gpus="" if device == "cpu" else "#SBATCH --gpus-per-node=1\n",
        name=slug(table.path.stem) or "table",
        last=len(missing) - 1,
        folder=shlex.quote(os.getcwd()),
        python=shlex.quote(sys.executable),
        tasks="\n".join(_task(number, run, passed_on(device, trust)) for number, run in enumerate(missing)),
        bad=EXIT_BAD_INPUT,
        stopped=EXIT_STOPPED,
    )


def _task(number: int, run: Run, more: list[str]) -> str:
    return f"{number}) arguments=({shlex.join([*run.arguments, *more])}) ;;  # {run.name}"
