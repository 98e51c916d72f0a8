"""The command `nbl`: parses, calls the library, prints.

    app       the application: errors, --json, exit codes
    options   options that several commands share, their defaults, and their parsing
    commands  one function for each command
    models    a model found, loaded, run, saved; its text; its record
    streams   our consoles, and where other libraries' output goes
    show      tables and progress bars
    scores    what the scores of layers say
    cases     what `nbl bench` measured, as a table and as a plot
    report    what a run measured, as one HTML file
    output    files and folders that are whole or absent

The package is outside of `nbl` because importing that registers model types with transformers. What
needs torch, transformers or nbl is imported inside the commands that use it: `models` and `cases`
by those, `report` by the two that draw. So `--help` and `nbl report` need none of them.
"""
