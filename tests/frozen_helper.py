"""To be imported last by a process that forks others: their collectors leave alone what it has imported.

Else they write into that memory, which copies it, and take longer than most of the runs that tests start.
"""

import gc

gc.collect()
gc.freeze()
