"""How the functions that users write are called: with what, in which order, and what they may return.

A function that works with TRL's trainers works here unchanged: it asks for columns by name, may be async, may return None
where it does not apply, may be an `nn.Module`, and several may be summed with weights.

Read `signatures` first (which arguments a function asks for), then `calls` (calling it, and the completion that made it raise)
and `returned` (what it returned, as numbers). `sums` has weighted sums of several functions, `coroutines` the event loop that
async functions run on, and `limits` the alphas, bounds and sizes that rewards may have.
"""
