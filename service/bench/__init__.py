"""`dmn bench`: figures that anyone can measure again, one part a module.

A part is a module of this package with three functions, and one command in `service.cli.bench` that gives it options:

- `measure(...) -> dict[str, Any]` returns plain figures, ready for JSON. What is compared is measured in one run, in
  turns, and told as medians and ratios. It raises `Absent` where a device or a package is not there: never a made-up
  number.
- `table(told) -> rich.table.Table` shows the same figures to people.
- `draw(told, axes) -> None` draws them on matplotlib's axes.

The command ends with `tell(part, lambda: part.measure(...), as_json=as_json, plot=plot)`, which stamps the figures with
the machine, the date and the command line, prints a table or with `--json` one object, and writes a PNG with `--plot`.
"""
