"""python -m analysis.compare: see `analysis.compare.command`."""

from extract.interrupts import one_line_interrupts

with one_line_interrupts():
    from analysis.compare.command import main

    main()
