"""Where code that a model wrote is run: a short-lived process that can do next to nothing.

    running (in the sweep) ──> guard ──> init ──> inside: the model's code, then its unit tests

`running.run_tests` is the door; `isolation` says what this kernel gives. All other modules run in
the sandbox's own processes, under `python -I -S`: they import the standard library alone, and each
other by relative names, because there the package above them is never imported.

What it is and what it is not stands in `running`.
"""
