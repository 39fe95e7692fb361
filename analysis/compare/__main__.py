"""Which kinds of latents one tuned model has more of than another, with what the small counts allow to be said.

    python -m analysis.compare experiment=STUDY       categories of the tuned-only latents of models that share a base
    python -m analysis.compare counts=FILE            counts from anywhere: a CSV `category,<model>,<model>...`

Those of arXiv 2509.18792 come with it: analysis/published/classes.csv (its tables 2 and 5), categories.csv (table 4).
Beside counts=FILE there are the settings below analysis.compare without that prefix, taxonomy=FILE and outputs=FOLDER.
"""

from extract.interrupts import one_line_interrupts

with one_line_interrupts():
    from analysis.compare.command import main

    main()
