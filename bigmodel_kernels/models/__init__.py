"""Does every model family do patched what it does unpatched? The command `bigmodel-kernels models`.

`tiny` has a small model of each family, `rule` what counts as right, `checks` what is held against it, and
`table` runs each check on each family. The tests of the families use the same models and the same checks.
"""
