"""Tables as data: rows are experiments with overrides, cells are means over seeds of what the runs recorded.

.. code-block:: YAML

    title: 'A student on ImageNet'
    metric: 'last.val/top1'            # a path into each run's summary.json, or {column title: path, ...}
    seeds: [0, 1, 2]                   # default: [0]
    notes: ['printed below the table']
    paired_with: 'no distillation'     # each row's difference to it, seed by seed, and the p of a paired t-test
    rows:
      - name: 'no distillation'
        config: 'configs/ilsvrc2012/ce/student.yaml'
      - name: 'VkD, Cayley map'
        config: 'configs/ilsvrc2012/vkd/student_from_teacher.yaml'
        set: ['train.student.auxiliary_model_wrapper.kwargs.features.tokens.projector.orthogonal_map=cayley']
        seeds: [0]                     # instead of the table's; metric and paired_with as well
        published: {value: 78.3, source: 'the paper, Table 2', verified: True}
        note: 'printed below the table, with the row named'
      - name: 'another method'         # a row without config shows what others have published
        published: {value: 74.9, source: 'its paper', verified: False}

``verified: True`` says that somebody has read the figure in its source; others are printed as unverified. With several
columns, ``value`` is a mapping from their titles to figures: those that were published.

Runs live in ``runs/tables/<file stem>/<row>/seed<N>``, with each run's student where the experiment saves one.
"""

from .reading import load_table
from .rendering import print_table
from .running import run_missing
from .slurm import slurm_script

__all__ = ["load_table", "print_table", "run_missing", "slurm_script"]
