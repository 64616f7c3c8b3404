"""What models write, taken apart into reasoning, content and tool calls. Pure: text in, events out.

One module for each format; `formats.py` knows their names. docs/formats.md is the table of them.
"""
