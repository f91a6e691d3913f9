"""The commands, one file each, which adds itself to the application.

Read `compare` first, then `sample`, `tune`, `certify`, `frontier`, `suite` and `amortise`, which take a posterior or a suite;
`report` shows what they wrote, and `gallery` runs examples.
"""
