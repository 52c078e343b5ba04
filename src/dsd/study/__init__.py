"""The paper's study on the embedded model: every method on every task, resumable.

``grid`` says what is measured, ``measure`` does it, ``store`` keeps it in files that appear whole, ``run`` goes through
the grid, ``found`` is what comes of it, and ``report`` turns that into tables, plots and a page.
"""
