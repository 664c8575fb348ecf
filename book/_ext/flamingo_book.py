"""Sphinx glue of this book: a badge on exported cells, one copy of thebe's script."""

import re

from docutils import nodes

DIRECTIVE = re.compile(r"^#\|\s*(default_exp|export)\b[ \t]*(\S*)[ \t]*\n?", re.M)


def badges(app, doctree):
    """Show `#| export` as a badge naming the module; hide `#| default_exp` cells."""
    module = None
    for cell in list(doctree.findall(nodes.container)):
        if cell.get("nb_element") != "cell_code":
            continue
        block = next(cell.findall(nodes.literal_block), None)
        match = DIRECTIVE.match(block.rawsource or block.astext()) if block else None
        if match is None:
            continue
        if match[1] == "default_exp":
            module = match[2]
            cell.parent.remove(cell)
            continue
        code = DIRECTIVE.sub("", block.astext()).lstrip("\n")
        attributes = {key: value for key, value in block.attributes.items() if value}
        block.replace_self(nodes.literal_block(code, code, **attributes))
        cell["classes"].append("exported")
        badge = nodes.paragraph("", classes=["export-badge"])
        badge += [
            nodes.Text("exported to "),
            nodes.literal("", f"flamingo_lite/{module}.py"),
        ]
        cell.insert(0, badge)


def one_thebe(app, pagename, templatename, context, doctree):
    """sphinx-thebe adds its inline script twice; the second is a console error."""
    seen, keep = False, []
    for script in context.get("script_files", []):
        body = getattr(script, "attributes", {}).get("body") or ""
        if "THEBE_JS_URL" in body:
            if seen:
                continue
            seen = True
        keep.append(script)
    if "script_files" in context:
        context["script_files"][:] = keep


def setup(app):
    """Called by Sphinx."""
    app.connect("doctree-read", badges)
    app.connect("html-page-context", one_thebe, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
