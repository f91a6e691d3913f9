"""Where work is done: in this process, in others, or on a ray cluster, with the same draws to the bit.

Read `runner` first (what a task is and what a runner promises) with `serial`, the shortest one, then `blocks` (how an
algorithm's prompts become tasks, and their draws one answer again). `processes` runs tasks in worker processes and `cluster`
on ray; both send them by `transport` (pickles whose arrays lie in one file that all workers share; functions that no worker
could import go `by_value`), and `worker` is what happens on the other side. `sendable` says in words what cannot be sent.
"""
